"""Every question of bench/ still runs, and its result can be shown."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
NAMES = sorted(
    path.stem for path in BENCH.glob("*.py") if path.stem not in ("cores", "harness", "inputs", "deployment", "page")
)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", NAMES)
def test_question_runs_in_small(name: str, tmp_path: Path):
    """With --quick it measures every figure it declares, of K2 at least."""
    done = subprocess.run(
        [sys.executable, BENCH / f"{name}.py", "--quick", "--out", tmp_path, "--scratch", tmp_path],
        capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / f"{name}.json").read_text())
    assert result["quick"]
    assert result["question"].endswith("?")
    assert result["figures"]
    assert all(found["k2"]["samples"] for found in result["figures"].values())
