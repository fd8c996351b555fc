"""How much memory does the whole platform take, idle and at 5,000 messages a second?

`k2 up` with four exchanges, played by the simulator, which is not counted: the supervisor, four captures and the
node (ingest, hot with chDB, offload, REST). Pages shared by several processes are split among them (PSS).
Idle: connected and subscribed, an event a second and symbol. Busy: trades and quotes of eight symbols, offload every
10 s; the largest of samples taken once a second.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from pathlib import Path

from deployment import Installation, memory_bytes, wait_for
from harness import LOWER, Figure, Run, below, main
from k2.log import open_log
from k2.settings import load
from k2.simulator.server import DEFAULT_SYMBOLS, Simulator

FIGURES = {
    "idle": Figure("MiB", LOWER, (below(1024),), "max", "four exchanges connected"),
    "busy": Figure("MiB", LOWER, (below(1536),), "max", "5,000 msg/s or more"),
}

_BUSY_EVENTS = 5_000 / 8  # a second and symbol; an event is a message or more


def measure(run: Run) -> None:
    """Two platforms, one after the other."""
    run.add({"idle": _platform(run, "idle", 1.0, 2 if run.quick else 20)})
    run.add({"busy": _platform(run, "busy", _BUSY_EVENTS, 2 if run.quick else 45)})


def _platform(run: Run, name: str, events: float, seconds: int) -> list[float]:
    """Return the memory of a platform at so many events a second and symbol, MiB, one sample a second."""
    exchanges = _Exchanges(events)
    k2 = Installation(run, name)
    try:
        _write_settings(k2.data, exchanges.endpoints)
        k2.start_node("up", "--quiet")
        wait_for(lambda: k2.rest("/v1/trades?limit=1")["data"] != [], "the first trade was found")
        began, before = time.monotonic(), _frames(k2.data)
        samples = []
        for _ in range(seconds):
            time.sleep(1.0)
            samples.append(memory_bytes(k2.pids()) / (1 << 20))
        rate = (_frames(k2.data) - before) / (time.monotonic() - began)
        run.detail(**{name: {"messages_per_second": round(rate), "processes": len(k2.pids())}})
    finally:
        k2.close()
        exchanges.close()
    return samples


def _write_settings(data: Path, endpoints: dict[str, dict[str, str]]) -> None:
    data.mkdir(parents=True)
    lines = ["[capture]", f"exchanges = {json.dumps(list(DEFAULT_SYMBOLS))}", "[cold]", "commit_seconds = 10.0"]
    for exchange, urls in endpoints.items():
        lines += [f"[exchanges.{exchange}]", f"symbols = {json.dumps(list(DEFAULT_SYMBOLS[exchange]))}"]
        lines += [f'{key} = "{value}"' for key, value in urls.items()]
    (data / "k2.toml").write_text("\n".join(lines) + "\n")


def _frames(data: Path) -> int:
    log = open_log(load({"data": str(data)}, environment={}))
    try:
        return sum(log.end_offset(partition) for partition in log.partitions())
    finally:
        log.close()


class _Exchanges:
    """The simulator, on a thread of its own."""

    def __init__(self, rate: float) -> None:
        self.endpoints: dict[str, dict[str, str]] = {}
        self._rate = rate
        self._loop = asyncio.new_event_loop()
        self._started, self._stop = threading.Event(), asyncio.Event()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._run()))
        self._thread.start()
        self._started.wait()

    async def _run(self) -> None:
        made = Simulator(exchanges=tuple(DEFAULT_SYMBOLS), symbols=DEFAULT_SYMBOLS, seed=1, rate=self._rate)
        async with made as simulator:
            self.endpoints = {name: dict(urls) for name, urls in simulator.endpoints().items()}
            self._started.set()
            await self._stop.wait()

    def close(self) -> None:
        """End it."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()


if __name__ == "__main__":
    main(__file__)
