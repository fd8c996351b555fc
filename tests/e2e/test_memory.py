"""Memory of the real processes under a tenfold burst, and what they tell of themselves meanwhile."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import httpx
import pytest
from installation import toml
from processes import Cluster, cluster

from k2 import limits
from k2.run.metrics import METRICS
from k2.run.readings import memory, read_readings
from k2.simulator.server import DEFAULT_SYMBOLS, Simulator

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="peak memory is read from /proc"),
]

RATE = 40.0
"""Events a second and symbol before the burst; each makes about two messages."""


GROWTH_RATE = 200.0
GROWTH_SECONDS = 300.0
GROWTH_LOOKS = 100
# What the allocators of Python, Arrow and the engines breathe.
GROWTH_SHARE, GROWTH_BYTES = 1.08, 16 << 20


def ceiling(process: str) -> int:
    """Return the declared ceiling of a process."""
    return limits.NODE_MEMORY_BYTES if process == "node" else limits.CAPTURE_MEMORY_BYTES


@pytest.mark.parametrize(
    ("exchanges", "before_seconds", "burst_seconds"),
    [(("binance", "kraken"), 1.0, 5.0), pytest.param(tuple(DEFAULT_SYMBOLS), 20.0, 60.0, marks=pytest.mark.slow)],
)
async def test_a_tenfold_burst_stays_below_the_ceilings(
    tmp_path: Path, exchanges: tuple[str, ...], before_seconds: float, burst_seconds: float
):
    """The most memory each process of `k2 up` ever took, by the kernel's account, is below its limit.

    All that was sent is ingested, and every declared metric is served.
    """
    symbols = {exchange: DEFAULT_SYMBOLS[exchange] for exchange in exchanges}
    async with Simulator(exchanges=exchanges, symbols=symbols, rate=RATE) as simulator:
        with cluster(tmp_path, settings(simulator, exchanges)) as running:
            runner = running.start("up", "up")
            data = running.installation.folder
            await running.until("the node answers", (data / "run" / "node.json").is_file)
            url = json.loads((data / "run" / "node.json").read_text())["url"]
            await running.until("all captures are there", lambda: len(peaks(running)) >= 2 + len(exchanges))
            await asyncio.sleep(before_seconds)
            simulator.set_rate(10 * RATE)
            await asyncio.sleep(burst_seconds)
            simulator.set_rate(0)
            await running.until("all is ingested", lambda: lag(url) == 0)
            found = peaks(running)
            text = httpx.get(f"{url}/metrics", timeout=30).text
            await asyncio.to_thread(runner.stop)
            running.runners.clear()

    assert {name: peak >> 20 for name, peak in found.items() if peak > ceiling(name)} == {}
    assert declared_and_missing(text) == set()
    for process in found:
        assert f'k2_process_peak_resident_bytes{{process="{process}"}}' in text
    assert re.search(r'k2_limit_max\{limit="hot.connections",process="node"\} 16\.0', text)
    assert re.search(r'k2_limit_acted_total\{limit="log.idle_connections",process="capture-kraken"\}', text)
    for limit, process in {
        "supervise.memory": "supervisor",
        "api.request": "node",
        "feeds.stop": "capture-kraken",
    }.items():
        assert f'k2_limit_acted_total{{limit="{limit}",process="{process}"}} 0.0' in text  # before it ever acts


@pytest.mark.slow
async def test_memory_stays_flat_under_constant_flow(tmp_path: Path):
    """Minutes of the same flow, with hundreds of flushes and commits and many maintenances: nobody grows with time.

    Two minutes are given to caches, thread pools and the first merges. What is then kept of each frame, flush, commit
    or snapshot would show in the least that a process takes.
    """
    symbols = {"binance": DEFAULT_SYMBOLS["binance"]}
    async with Simulator(exchanges=("binance",), symbols=symbols, rate=GROWTH_RATE) as simulator:
        often = {"flush_seconds": 0.5}, {"commit_seconds": 1.0, "maintain_seconds": 5.0, "keep_snapshots": 10}
        with cluster(tmp_path, settings(simulator, ("binance",), *often)) as running:
            runner = running.start("up", "up")
            await running.until("all processes tell of themselves", lambda: len(peaks(running)) == 3)
            seen: dict[str, list[int]] = {name: [] for name in peaks(running)}
            for _ in range(GROWTH_LOOKS):
                await asyncio.sleep(GROWTH_SECONDS / GROWTH_LOOKS)
                for readings in read_readings(running.installation.folder / "run"):
                    seen[readings.process].append(memory(readings.pid)[0])
            await asyncio.to_thread(runner.stop)
            running.runners.clear()

    fifth = GROWTH_LOOKS // 5
    for process, taken in seen.items():
        before, after = min(taken[2 * fifth : 3 * fifth]), min(taken[-fifth:])
        assert after < before * GROWTH_SHARE + GROWTH_BYTES, (process, [each >> 20 for each in taken[::5]])


def settings(
    simulator: Simulator,
    exchanges: tuple[str, ...],
    hot: Mapping[str, object] = MappingProxyType({}),
    cold: Mapping[str, object] = MappingProxyType({}),
) -> str:
    """The demo's, with commits that are often enough to be part of the load."""
    sections: dict[str, dict[str, object]] = {
        "capture": {"exchanges": list(exchanges)},
        "hot": {"flush_seconds": 1.0, **hot},
        "cold": {"commit_seconds": 5.0, "maintain_seconds": 10.0, **cold},
        "api": {"port": 0},
    }
    for exchange, urls in simulator.endpoints().items():
        sections[f"exchanges.{exchange}"] = {**urls, "symbols": list(DEFAULT_SYMBOLS[exchange])}
    return toml(sections)


def peaks(running: Cluster) -> dict[str, int]:
    """Return the most resident memory of each living process so far, bytes, as the kernel counts it."""
    told = read_readings(running.installation.folder / "run")
    return {readings.process: memory(readings.pid)[1] for readings in told}


def lag(url: str) -> int:
    """Return how many frames ingest is behind."""
    text = httpx.get(f"{url}/metrics", timeout=30).text
    return int(sum(float(value) for value in re.findall(r"^k2_ingest_lag_frames\{.*\} (\S+)$", text, re.MULTILINE)))


def declared_and_missing(text: str) -> set[str]:
    """Return the declared metrics that are not among those served."""
    served = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    return {name for name in METRICS if name not in served}
