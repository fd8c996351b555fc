"""Clocks that step under a running platform: what flows is neither lost, nor doubled, nor held up."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from flow import flow

_FOUND = importlib.util.find_spec("libfaketime")
LIBRARY = Path(_FOUND.origin).parent / "vendor/libfaketime/src/libfaketime.so.1" if _FOUND and _FOUND.origin else None

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or LIBRARY is None or not LIBRARY.exists(), reason="needs libfaketime"
)


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_clock_an_hour_back_and_a_day_forward(tmp_path: Path) -> None:
    """Every process sees the clock go an hour back, then to tomorrow, then back to today; the account is met."""
    clock = tmp_path / "clock"
    clock.write_text("+0\n")
    async with flow(tmp_path, rate=30.0) as flowing:
        flowing.running.installation.environment |= {
            "LD_PRELOAD": str(LIBRARY),
            "FAKETIME_TIMESTAMP_FILE": str(clock),
            "FAKETIME_CACHE_DURATION": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "DONT_FAKE_MONOTONIC": "1",
        }
        flowing.start()
        await flowing.works("before")
        for seconds in ("-3600", "+86400", "+0"):
            clock.write_text(f"{seconds}\n")
            await flowing.works(f"with the clock at {seconds} s")

        assert await flowing.end() == []
    repairs = [json.loads(line)["what"] for line in (tmp_path / "data/log/repairs.jsonl").read_text().splitlines()]
    assert any("the clock was set forward by" in what for what in repairs)
    assert any("behind the last logged time" in what for what in repairs)
