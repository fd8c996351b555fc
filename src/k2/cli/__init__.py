"""The command line: `k2`."""

from __future__ import annotations

from k2.cli.main import main

__all__ = ["main"]
