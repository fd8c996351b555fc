"""Fixtures every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def _recordings_folder() -> Path | None:
    candidates = [os.environ.get("K2_TEST_DATA"), Path(__file__).resolve().parents[2] / "shared" / "data"]
    return next((Path(c) for c in candidates if c and (Path(c) / "README.md").is_file()), None)


@pytest.fixture(scope="session")
def recordings() -> Path:
    """Folder of recorded exchange data; skips the test where it is not present."""
    folder = _recordings_folder()
    if folder is None:
        pytest.skip("recorded exchange data is not present (set K2_TEST_DATA to its folder)")
    return folder
