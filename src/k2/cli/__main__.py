"""`python -m k2.cli`: how the supervisor starts its children."""

from __future__ import annotations

from k2.cli.main import main

main()
