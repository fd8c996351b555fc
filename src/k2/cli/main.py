"""The tree of commands; the module of a command is loaded when it is asked for."""

from __future__ import annotations

import importlib
from typing import NoReturn

import click

import k2
from k2.cli import common

_MODULE_OF = {
    "up": "roles", "demo": "demo", "status": "status", "tail": "status", "capture": "roles", "ingest": "roles",
    "offload": "roles", "serve": "roles", "node": "roles", "simulate": "roles", "import": "data", "query": "data",
    "candles": "data", "snapshots": "data", "sql": "data", "maintain": "data", "config": "settings",
    "upgrade": "upgrade",
}  # fmt: skip


class _Commands(click.Group):
    """Loads only what is asked for: `k2 status` should not wait for what `k2 demo` needs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_MODULE_OF)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _MODULE_OF:
            importlib.import_module(f"k2.cli.{_MODULE_OF[cmd_name]}")
        return super().get_command(ctx, cmd_name)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(k2.__version__, prog_name="k2")
def root() -> None:
    """K2 market data platform: capture, keep, prove and query live market data."""


def main() -> NoReturn:
    """Run `k2`."""
    common.run(root)
