"""The installation every proof on recordings looks at: made once, by K2's own commands."""

from __future__ import annotations

import fcntl
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from installation import Installation
from recorded import Making, Proof


@pytest.fixture(scope="session")
def proof(recordings: Path, tmp_path_factory: pytest.TempPathFactory) -> Proof:
    """The recordings, through the whole pipeline once, however many workers test."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "recordings"
    shared.mkdir(exist_ok=True)
    made = Proof(shared, Installation(shared / "data"))
    with (shared / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "made").exists():
            (shared / "answers").mkdir()
            Making(made, recordings).run()
            (shared / "made").touch()
    return made
