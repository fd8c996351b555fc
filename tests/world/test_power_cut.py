"""Power cuts under the whole platform: it comes up by itself, and what the log held is in hot and cold once."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from installation import Installation, toml
from power import Machine, missing
from processes import Appended, ingested, reading

from k2.client import Client, connect
from k2.cold import open_cold
from k2.model import Trade
from k2.settings import Settings, load
from k2.simulator.server import DEFAULT_SYMBOLS, Simulator

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "-")

DEADLINE_SECONDS = 120.0
MADE_ANEW = "hot is made anew from cold and the log: the machine went down"


class Platform:
    """Capture and node on a machine, with their settings outside of it."""

    def __init__(self, folder: Path, machine: Machine, simulator: Simulator, sync: str) -> None:
        self.machine, self.folder = machine, folder
        self.exchanges = tuple(simulator.endpoints())
        self.installation = Installation(machine.disk / "data", {"K2_CONFIG": str(folder / "k2.toml")})
        endpoints = simulator.endpoints()
        sections = {
            "hot": {"flush_seconds": 0.3},
            "cold": {"commit_seconds": 1.0},
            "log": {"sync": sync},
            "capture": {"backoff_first_seconds": 0.1, "backoff_max_seconds": 1.0},
            **{f"exchanges.{e}": {"symbols": DEFAULT_SYMBOLS[e], **endpoints[e]} for e in self.exchanges},
        }
        (folder / "k2.toml").write_text(toml(sections))
        self.settings: Settings = load({"data": str(machine.disk / "data")}, environment={}, file=folder / "k2.toml")
        self._processes: list[subprocess.Popen[str]] = []

    def start(self, *, node: bool = True) -> None:
        """Start all that writes."""
        self._processes = [self._start(f"capture-{exchange}", "capture", exchange) for exchange in self.exchanges]
        if node:
            self._processes.append(self._start("node", "node", "--port", "0"))

    def _start(self, name: str, *arguments: str) -> subprocess.Popen[str]:
        with (self.folder / f"{name}.log").open("a") as output:
            return self.machine.run(
                self.installation.argv(*arguments), environment=self.installation.environment, output=output
            )

    def k2(self, *arguments: str) -> None:
        """Run a command on the machine to its end."""
        process = self._start("command", *arguments)
        assert process.wait(DEADLINE_SECONDS) == 0, (self.folder / "command.log").read_text()[-3000:]

    async def until(self, what: str, condition: Callable[[], bool]) -> None:
        """Wait for something while all processes live."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not condition():
                for process in self._processes:
                    assert process.poll() is None, (what, self.said())
                await asyncio.sleep(0.05)

    def said(self) -> str:
        """Return the last of what the processes said."""
        return "\n".join(path.read_text()[-9000:] for path in sorted(self.folder.glob("*.log")))

    def in_cold(self) -> int:
        """Return how many offsets cold holds the trades below of."""
        cold = open_cold(self.settings)
        try:
            return sum(cold.pin("trades").watermark.values())
        finally:
            cold.close()

    async def works(self) -> None:
        """Wait until a flush was finished and a commit made since the last look."""
        flushed, committed = ingested(self.settings), self.in_cold()
        await self.until("ingest goes on", lambda: ingested(self.settings) > flushed)
        await self.until("offload goes on", lambda: self.in_cold() > committed)


async def run_and_cut(
    tmp_path: Path,
    cuts: int,
    *,
    exchanges: tuple[str, ...],
    entries: str = "strict",
    torn: int | None = None,
    seed: int = 1,
    sync: str = "full",
) -> list[int]:
    """Capture through power cuts; returns per cut how many frames of the log it took at most."""
    draw = random.Random(seed)
    taken = []
    async with Simulator(exchanges=exchanges, symbols=DEFAULT_SYMBOLS, seed=seed, rate=20.0) as simulator:
        with Machine(tmp_path, entries=entries, torn=torn) as machine:
            platform = Platform(tmp_path, machine, simulator, sync)
            for number in range(cuts):
                if number:
                    machine.switch_on()
                platform.start()
                await platform.works()
                await asyncio.sleep(draw.random() * 0.7)
                before = ends(platform.settings)
                machine.cut()
                machine.switch_on()
                after = ends(platform.settings)
                if number < cuts - 1:
                    machine.cut()
                taken.append(sum(max(0, end - after.get(name, 0)) for name, end in before.items()))
            await asyncio.to_thread(platform.k2, "ingest", "--drain")
            await asyncio.to_thread(platform.k2, "offload", "--drain")
            check_all(platform.settings, exchanges)
            said = platform.said()
            assert said.count(MADE_ANEW) == cuts, said
            assert "Traceback" not in said, said
    return taken


def ends(settings: Settings) -> dict[str, int]:
    with reading(settings) as log:
        return {name: log.end_offset(name) for name in log.partitions()}


def check_all(settings: Settings, exchanges: Sequence[str]) -> None:
    """Compare every tier with the log, to the digit; candles of hot and of the union with brute force."""
    with reading(settings) as log, connect(settings=settings) as client:
        for exchange in exchanges:
            trades = Appended(log, exchange).look()
            for symbol in DEFAULT_SYMBOLS[exchange]:
                kinds = {trade.kind for trade in trades if trade.symbol == symbol}
                for kind in kinds:
                    check_market(client, exchange, symbol, kind, trades)
        assert client.rows("dead_letters").arrow().num_rows == 0


def check_market(client: Client, exchange: str, symbol: str, kind: str, trades: list[Trade]) -> None:
    logged = {t.trade_id: t for t in trades if t.symbol == symbol and t.kind == kind}
    assert len(logged) > 20
    for tier in ("hot", "cold", "all"):
        rows = client.trades(symbol, exchange=exchange, tier=tier, limit=0).arrow().to_pylist()
        stored = Counter(row["trade_id"] for row in rows if row["kind"] == kind)
        assert set(stored) == set(logged), (exchange, symbol, tier)
        assert set(stored.values()) == {1}, (exchange, symbol, tier)
        for row in rows:
            if row["kind"] == kind:
                trade = logged[row["trade_id"]]
                told = (Decimal(trade.price), Decimal(trade.amount), trade.side, trade.exchange_ns)
                assert tuple(row[name] for name in ("price", "amount", "side", "exchange_ns")) == told
    for tier in ("hot", "all"):
        candles = client.candles(symbol, "1m", exchange=exchange, kind=kind, tier=tier, limit=0).arrow().to_pylist()
        found = {
            row["start_ns"]: (row["open"], row["high"], row["low"], row["close"], row["volume"]) for row in candles
        }
        assert found == candles_of(logged), (exchange, symbol, tier)


def candles_of(trades: dict[int, Trade]) -> dict[int, tuple[Any, ...]]:
    """Compute one-minute candles the plain way."""
    buckets: dict[int, list[Trade]] = defaultdict(list)
    for trade in sorted(trades.values(), key=lambda t: (t.exchange_ns, t.trade_id)):
        buckets[trade.exchange_ns // 60_000_000_000 * 60_000_000_000].append(trade)
    made = {}
    for start, own in buckets.items():
        prices = [Decimal(t.price) for t in own]
        volume = sum((Decimal(t.amount) for t in own), Decimal(0))
        made[start] = (prices[0], max(prices), min(prices), prices[-1], volume)
    return made


@pytest.mark.timeout(400)
async def test_platform_is_exact_after_power_cuts(tmp_path: Path) -> None:
    """Unsynced writes forgotten under log, state, hot, catalog and warehouse at once: nothing the log had is lost."""
    taken = await run_and_cut(tmp_path, 1, exchanges=("coinbase",), seed=3)

    assert taken == [0]


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("entries", "torn"), [("strict", 4), ("journal", None), ("journal", 9)])
async def test_platform_is_exact_after_many_power_cuts(tmp_path: Path, entries: str, torn: int | None) -> None:
    """The same with four cuts, on disks that tear what they write and on ones that keep names like ext4."""
    taken = await run_and_cut(
        tmp_path, 4, exchanges=("binance", "coinbase"), entries=entries, torn=torn, seed=torn or 1
    )

    assert taken == [0] * 4


def last_logged(settings: Settings) -> int:
    """Return the highest trade id the log holds."""
    with reading(settings) as log:
        return Appended(log, "binance").last("BTC-USDT")


async def seconds_taken(tmp_path: Path, cuts: int, *, sync: str, node: bool) -> list[float]:
    """Return, per power cut, for how long before it trades were told that the log does not hold afterwards."""
    taken = []
    async with Simulator(exchanges=("binance",), symbols=("BTC-USDT",), seed=1, rate=200.0) as simulator:
        tally = next(tally for tally in simulator.account() if tally.kind == "trade")
        with Machine(tmp_path, entries="journal") as machine:
            platform = Platform(tmp_path, machine, simulator, sync)
            for number in range(cuts):
                if number:
                    machine.switch_on()
                platform.start(node=node)
                first = max((last for _, last in tally.announced), default=0)
                told: list[tuple[float, int]] = []
                await platform.until("capture appends", lambda first=first: last_logged(platform.settings) > first)
                until = time.monotonic() + 2.0
                async with asyncio.timeout(DEADLINE_SECONDS):
                    while time.monotonic() < until:
                        told.append((time.monotonic(), max((last for _, last in tally.announced), default=0)))
                        await asyncio.sleep(0.002)
                at = time.monotonic()
                machine.cut()
                machine.switch_on()
                kept = last_logged(platform.settings)
                machine.cut()
                taken.append(at - min((moment for moment, last in told if last > kept), default=at))
    return taken


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_what_the_default_policy_loses_in_a_power_cut(tmp_path: Path) -> None:
    """`log.sync = full`: what capture had received and not appended, well below a second; `normal`: more."""
    full = await seconds_taken(tmp_path / "full", 5, sync="full", node=False)
    normal = await seconds_taken(tmp_path / "normal", 5, sync="normal", node=False)
    sys.stdout.write(f"seconds of frames a power cut took: full {full}, normal {normal}\n")

    assert max(full) < 1.0
    assert max(normal) > 2 * max(full)


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_without_sync_the_log_never_ends_before_what_was_made_of_it(tmp_path: Path) -> None:
    """`log.sync = normal`: frames are lost, and hot and cold still hold exactly what the log does."""
    taken = await run_and_cut(tmp_path, 3, exchanges=("binance",), entries="journal", seed=2, sync="normal")

    assert max(taken) > 0
