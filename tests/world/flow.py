"""A simulated exchange flowing through real capture and node processes, and its account compared at the end."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import pyarrow as pa
from installation import toml
from processes import Cluster, Runner, cluster, ingested

from k2.client import Client, connect
from k2.cold import open_cold
from k2.errors import StoreDown
from k2.run.reconcile import Check, reconcile
from k2.settings import Settings
from k2.simulator.server import DEFAULT_SYMBOLS, Simulator

DEADLINE_SECONDS = 180.0
POLL_SECONDS = 0.05


class Flow:
    """What a test breaks: `running` has the processes, `simulator` the truth."""

    def __init__(self, running: Cluster, simulator: Simulator, exchanges: tuple[str, ...]) -> None:
        self.running, self.simulator = running, simulator
        self.exchanges = exchanges
        self.captures: list[Runner] = []
        self.node: Runner | None = None

    @property
    def settings(self) -> Settings:
        return self.running.settings

    def start(self) -> None:
        """Start a capture for each exchange, and the node."""
        self.captures = [self.running.start(f"capture-{e}", "capture", e) for e in self.exchanges]
        self.node = self.running.start("node", "node", "--port", "0")

    async def until(self, what: str, condition: Callable[[], bool]) -> None:
        """Wait for something while every process lives. Looks from a thread: the simulator needs the loop."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not await asyncio.to_thread(condition):
            for runner in self.running.runners.values():
                runner.check()
            assert time.monotonic() < deadline, f"not in time: {what}\n{self.running.tails()}"
            await asyncio.sleep(POLL_SECONDS)

    async def works(self, what: str = "the pipeline") -> None:
        """Wait until frames that come from now on are in cold."""
        total = ingested(self.settings) + 50
        await self.until(f"{what}: ingest goes on", lambda: ingested(self.settings) > total)
        with contextlib.closing(await asyncio.to_thread(open_cold, self.settings)) as cold:

            def committed() -> int:
                with contextlib.suppress(StoreDown):
                    return sum(cold.pin("trades").watermark.values())
                return 0

            await self.until(f"{what}: offload goes on", lambda: committed() > total)

    def said(self) -> str:
        """Return all that the processes have said."""
        return "\n".join(runner.log.read_text(errors="replace") for runner in self.running.runners.values())

    async def says(self, pattern: str, since: int) -> None:
        """Wait until a process says something that matches, behind so many characters of `said`."""
        await self.until(f"somebody says {pattern!r}", lambda: re.search(pattern, self.said()[since:]) is not None)

    async def end(self) -> list[Check]:
        """End trading, stop everything in order, and return what does not agree with the account."""
        settled = await self.simulator.close_markets(DEADLINE_SECONDS)
        account = self.simulator.account().describe()
        assert settled, "a capture has not read all it was told"
        for runner in [*self.captures, self.node]:
            assert runner is not None
            await asyncio.to_thread(runner.stop)
        self.running.runners.clear()
        with connect(settings=self.settings) as client:
            checks = reconcile(account, _rows(client), _candles(client))
            assert client.gaps().arrow().num_rows == 0
            assert client.rows("dead_letters").arrow().num_rows == 0
        assert len(checks) >= 4 * len(self.exchanges)
        return [check for check in checks if not check.passed]


@contextlib.asynccontextmanager
async def flow(
    folder: Path,
    *,
    exchanges: tuple[str, ...] = ("coinbase",),
    rate: float = 20.0,
    seed: int = 1,
    settings: Mapping[str, Mapping[str, object]] | None = None,
) -> AsyncIterator[Flow]:
    """Start a simulator and make an installation that captures it, with small flushes and commits."""
    async with Simulator(exchanges=exchanges, symbols=DEFAULT_SYMBOLS, seed=seed, rate=rate) as simulator:
        endpoints = simulator.endpoints()
        sections: dict[str, dict[str, object]] = {
            "hot": {"flush_seconds": 0.3},
            "cold": {"commit_seconds": 0.5},
            "capture": {"backoff_first_seconds": 0.1, "backoff_max_seconds": 1.0},
            **{f"exchanges.{e}": {"symbols": DEFAULT_SYMBOLS[e], **endpoints[e]} for e in exchanges},
        }
        for name, values in (settings or {}).items():
            sections[name] = {**sections.get(name, {}), **values}
        with cluster(folder, toml(sections)) as running:
            yield Flow(running, simulator, exchanges)


def _rows(client: Client) -> Callable[[str, str, str], pa.Table]:
    return lambda exchange, symbol, tier: client.trades(symbol, exchange=exchange, tier=tier, limit=0).arrow()


def _candles(client: Client) -> Callable[[str, str, str, str], pa.Table]:
    def candles(exchange: str, symbol: str, timeframe: str, kind: str) -> pa.Table:
        return client.candles(symbol, timeframe, exchange=exchange, kind=kind, limit=0).arrow()

    return candles
