"""The data folder of the first release, where it was made: Iceberg keeps full paths."""

from __future__ import annotations

import fcntl
import json
import shutil
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

ARCHIVE = HERE / "first-release.tar.xz"
SAID = json.loads((HERE / "first-release.json").read_text())
PLACE = Path(SAID["made_at"])


@pytest.fixture
def said() -> dict[str, Any]:
    """What the first release answered about its folder."""
    return SAID


@pytest.fixture
def first_release() -> Iterator[Path]:
    """The folder as the first release left it; one test at a time has it."""
    try:
        lock = PLACE.with_name(f"{PLACE.name}.lock").open("w")
    except OSError as error:
        pytest.skip(f"{PLACE} cannot be used here: {error}")
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        shutil.rmtree(PLACE, ignore_errors=True)
        with tarfile.open(ARCHIVE) as archive:
            archive.extractall(PLACE, filter="tar")
        yield PLACE
        shutil.rmtree(PLACE, ignore_errors=True)
