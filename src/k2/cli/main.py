"""The tree of commands; each module adds its own."""

from __future__ import annotations

from typing import NoReturn

import click

import k2
from k2.cli import common


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(k2.__version__, prog_name="k2")
def root() -> None:
    """K2 market data platform: capture, keep, prove and query live market data."""


def main() -> NoReturn:
    """Run `k2`."""
    # Imported here: each module needs `root`.
    from k2.cli import data, demo, roles, settings, status  # noqa: F401

    common.run(root)
