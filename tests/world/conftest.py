"""The tests of a failing world use the installation and the processes of the end-to-end tests."""

from __future__ import annotations

import sys
from pathlib import Path

for _folder in (Path(__file__).resolve().parent, Path(__file__).resolve().parents[1] / "e2e"):
    sys.path.insert(0, str(_folder))
