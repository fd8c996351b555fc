"""More than the platform can take at the moment: it waits in the log, and memory stays below what is stated."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from flow import Flow, flow
from power import Machine, missing
from processes import Runner, ingested, logged, reading

from k2.limits import CAPTURE_MEMORY_BYTES, NODE_MEMORY_BYTES

TAIL_ROWS = 4_000
FLAT_BYTES = 64 << 20  # what the node may grow by while the log grows by many times its tail


def resident_bytes(runner: Runner) -> int:
    """Return the resident memory of a running process."""
    assert runner.process is not None
    lines = Path(f"/proc/{runner.process.pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS:")).split()[1]) << 10


def behind(flowing: Flow) -> int:
    """Return how many frames the log holds that are not in hot."""
    with reading(flowing.settings) as log:
        return logged(log) - ingested(flowing.settings)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(bool(missing()), reason=missing() or "-")
async def test_slow_hot_tier_lets_the_log_grow_and_memory_stay(tmp_path: Path) -> None:
    """Every write of hot takes its time: ingest stops at `hot.tail_rows`, the log grows, later all of it arrives."""
    (tmp_path / "data").mkdir()
    with Machine(tmp_path, disk=tmp_path / "data" / "hot") as machine:
        limits = {"hot": {"tail_rows": TAIL_ROWS, "flush_rows": 1_000}}
        async with flow(tmp_path, rate=300.0, settings=limits) as flowing:
            flowing.start()
            assert flowing.node is not None
            await flowing.works("before")
            machine.order("slow 0.2")
            await flowing.until("ingest falls behind", lambda: behind(flowing) > TAIL_ROWS)
            before, log_then = resident_bytes(flowing.node), behind(flowing)
            await flowing.until("the log grows", lambda: behind(flowing) > log_then + 5 * TAIL_ROWS)
            grown = resident_bytes(flowing.node) - before
            machine.order("heal")
            flowing.simulator.set_rate(50.0)
            await flowing.until("ingest caught up", lambda: behind(flowing) < 1_000)

            assert grown < FLAT_BYTES, f"the node grew by {grown >> 20} MiB"
            assert await flowing.end() == []


async def burst(folder: Path, seconds: float, rate: float) -> tuple[int, int, int]:
    """Trade ten times as fast for a while; returns frames logged and the highest memory of capture and node."""
    async with flow(folder, rate=rate) as flowing:
        flowing.start()
        await flowing.works("before")
        (capture,), node = flowing.captures, flowing.node
        assert node is not None
        highest = [0, 0]
        flowing.simulator.set_rate(10 * rate)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for place, runner in enumerate((capture, node)):
                runner.check()
                highest[place] = max(highest[place], resident_bytes(runner))
            await asyncio.sleep(0.1)
        flowing.simulator.set_rate(rate)
        await flowing.works("after")
        with reading(flowing.settings) as log:
            frames = logged(log)

        assert await flowing.end() == []
    return frames, highest[0], highest[1]


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_tenfold_burst_for_a_minute_is_taken_within_the_stated_memory(tmp_path: Path) -> None:
    """Ten times the events for a minute: nothing lost by the account, memory below the ceilings."""
    frames, capture_bytes, node_bytes = await burst(tmp_path, 60.0, rate=60.0)

    assert frames > 60 * 600
    assert capture_bytes < CAPTURE_MEMORY_BYTES
    assert node_bytes < NODE_MEMORY_BYTES
