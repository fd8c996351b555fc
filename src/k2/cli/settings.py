"""`k2 config`: what is set, and from where it may be set."""

from __future__ import annotations

import click
from rich.console import Console
from rich.table import Table

from k2.cli.common import Context, command
from k2.cli.main import root
from k2.settings import describe


@root.group()
def config() -> None:
    """Settings."""


@command(config, "show")
def show(context: Context) -> None:
    """Show every setting with its value and meaning; secrets are masked."""
    rows = describe(context.settings())
    if context.as_json:
        context.show({name: value for name, value, _ in rows}, "")
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("setting", "value", "meaning"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "setting")
    for name, value, meaning in rows:
        table.add_row(name, ", ".join(value) if isinstance(value, tuple) else str(value), meaning)
    Console().print(table)
    click.echo(
        "\nFile k2.toml, then environment K2_<SECTION>_<NAME> (K2_LOG_SYNC=normal), then arguments: the later wins."
    )
