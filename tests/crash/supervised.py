"""An installation as `k2 up` runs it, on simulated exchanges that go on trading while its processes die."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
from installation import Installation, toml
from processes import DEADLINE_SECONDS, reading

from k2 import crash
from k2.client import Client
from k2.cold import open_cold
from k2.cold.base import Cold
from k2.run.captured import read_captures
from k2.run.folder import run_folder
from k2.run.reconcile import Check, check_candles, reconcile
from k2.run.state import IngestState
from k2.run.supervise import ChildStatus, read_supervisor
from k2.schema import TIMEFRAMES
from k2.settings import Settings, load
from k2.simulator.server import Simulator

T = TypeVar("T")
Account = dict[str, Any]

POLL_SECONDS = 0.1
SETTLE_SECONDS = 60.0
START_NS = 1_709_250_000 * 10**9  # 2024-02-29T23:40:00Z: the run crosses midnight and the end of a month
MARKET_SPEED = 60.0  # a minute of the markets in a second of ours: many candles, all of them closed
TIERS = ("hot", "cold", "all")

# As `k2 up`, but a child that died is started again soon, however often. The supervisor and the processes named
# `spared` cannot be hit: the one has read its environment before, the others do not get it.
SUPERVISOR = """
import dataclasses, os, sys
from k2 import crash
from k2.run.folder import run_folder
from k2.run.supervise import ChildSpec, hold_data_folder, supervise
from k2.run.up import children, plan
from k2.settings import load
data, file, spared, node = sys.argv[1:5]
os.environ[crash.VARIABLE] = file
settings = load({"data": data}, environment={})
specs = children(settings, plan(settings), None)
for number, spec in enumerate(specs):
    argv = spec.argv
    if spec.name in spared.split(","):
        argv = ("env", "-u", crash.VARIABLE, *argv)
    if spec.name == "node" and node:
        argv = (*spec.argv[:3], *node.split(), "--data", data)
    specs[number] = dataclasses.replace(spec, argv=argv, restart_max_seconds=0.2)
with hold_data_folder(settings):
    sys.exit(supervise(specs, run_folder(settings), quiet=True))
"""


class Exchanges:
    """Simulated exchanges on an event loop and a thread of their own. All markets open and close together."""

    def __init__(self, *simulators: Simulator) -> None:
        self._simulators = simulators
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="exchanges", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        for simulator in self._simulators:
            self._call(simulator.start())
        return self

    def __exit__(self, *_: object) -> None:
        for simulator in self._simulators:
            self._call(simulator.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(SETTLE_SECONDS + 30)

    def endpoints(self) -> dict[str, dict[str, str]]:
        """Return exchange -> the settings that lead there."""
        return {name: urls for simulator in self._simulators for name, urls in simulator.endpoints().items()}

    def close_markets(self) -> Account:
        """Stop trading, wait until everything told was read, and return the account."""

        async def close() -> list[bool]:
            return await asyncio.gather(*(s.close_markets(SETTLE_SECONDS) for s in self._simulators))

        settled = self._call(close())
        account = self.account()
        assert all(settled), f"a capture has not read all it was told: {_unread(account)}"
        return account

    def open_markets(self) -> None:
        """Go on trading."""

        async def reopen() -> None:
            for simulator in self._simulators:
                simulator.open_markets()

        self._call(reopen())

    def account(self) -> Account:
        """Return the account of all of them."""

        async def describe() -> list[dict[str, Any]]:
            return [market for s in self._simulators for market in s.account().describe()["markets"]]

        return {"markets": self._call(describe())}


BUSY = {"binance": ("BTC-USDT",)}
# Their snapshots (Kraken 50 trades, Coinbase 100) reach over the death of a capture at this rate.
SLOW = {"kraken": ("BTC-USD",), "coinbase": ("BTC-USD",)}


def exchanges() -> Exchanges:
    """Return the markets: a busy one, whose capture is spared, and slow ones."""
    common = {"speed": MARKET_SPEED, "start_ns": START_NS}
    return Exchanges(
        Simulator(exchanges=list(BUSY), symbols=BUSY, rate=50 / MARKET_SPEED, **common),  # type: ignore[arg-type]
        Simulator(exchanges=list(SLOW), symbols=SLOW, rate=1.5 / MARKET_SPEED, **common),  # type: ignore[arg-type]
    )


def sections(markets: Exchanges, /, **changes: dict[str, object]) -> dict[str, dict[str, object]]:
    """Return the settings: everything happens every second or two."""
    symbols = {**BUSY, **SLOW}
    made: dict[str, dict[str, object]] = {
        "log": {"segment_seconds": 2},
        "capture": {"exchanges": list(symbols), "backoff_first_seconds": 0.1, "backoff_max_seconds": 1.0},
        "hot": {"flush_seconds": 0.5},
        "cold": {
            "commit_seconds": 1.0,
            "maintain_seconds": 1.5,
            "keep_snapshots": 5,
            "grace_seconds": 3,
            "orphan_seconds": 3,
        },
        "api": {"port": 0},
    }
    for section, values in changes.items():
        made[section] = {**made[section], **values}
    for exchange, urls in markets.endpoints().items():
        made[f"exchanges.{exchange}"] = {"symbols": symbols[exchange], **urls}
    return made


def _unread(account: Account) -> dict[str, Any]:
    return {
        f"{market['exchange']} {market['symbol']}": (market["announced"], market["confirmed"])
        for market in account["markets"]
        if market["announced"] != market["confirmed"]
    }


@dataclass(frozen=True)
class Hit:
    """Who died at a point."""

    child: str
    pid: int


class Supervised:
    """The processes of one installation under the real supervisor, armed by a file."""

    def __init__(
        self, folder: Path, sections: Mapping[str, Mapping[str, object]], *, spared: Sequence[str] = (), node: str = ""
    ) -> None:
        """Store the parts; `node` replaces what the process `node` does: a command and its options."""
        self.installation = Installation(folder / "data")
        self.file = folder / "crash"
        self._log = folder / "supervisor.log"
        self._sections = sections
        self._spared, self._node = spared, node
        self._process: subprocess.Popen[bytes] | None = None
        self._cold: Cold | None = None

    @property
    def settings(self) -> Settings:
        """The settings as the processes see them."""
        return load({"data": str(self.installation.folder)}, environment={})

    def start(self) -> None:
        """Start the supervisor, which starts the rest."""
        self.installation.folder.mkdir(exist_ok=True)
        (self.installation.folder / "k2.toml").write_text(toml(self._sections))
        arguments = (str(self.installation.folder), str(self.file), ",".join(self._spared), self._node)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", SUPERVISOR, *arguments],
                env=self.installation.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def stop(self) -> None:
        """Stop everything in order; it must end with exit code 0."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        code = self._process.wait(2 * DEADLINE_SECONDS)
        assert code == 0, f"the supervisor ended with {code}:\n{self.tails()}"

    def end(self) -> None:
        """Kill what still runs: the children die with their supervisor."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        if self._cold is not None:
            self._cold.close()

    def children(self) -> dict[str, ChildStatus]:
        """Return what the supervisor tells of its children."""
        status = read_supervisor(run_folder(self.settings))
        return {child.name: child for child in status.children} if status else {}

    def all_run(self) -> bool:
        """Whether every child has given a sign of life."""
        children = self.children().values()
        return bool(children) and all(child.state == "running" for child in children)

    def until(self, what: str, condition: Callable[[], T], seconds: float = DEADLINE_SECONDS) -> T:
        """Wait until something holds, and return it."""
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert self._process is not None
            assert self._process.poll() is None, f"the supervisor has ended, waiting for: {what}\n{self.tails()}"
            assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}\n{self.tails()}"
            time.sleep(POLL_SECONDS)
        return found

    def tails(self) -> str:
        """Return the last of what the supervisor and its children said."""
        logs = [self._log, *sorted((self.installation.folder / "run").glob("*.log"))]
        return "\n".join(f"--- {log.name}\n{log.read_bytes()[-2_000:].decode(errors='replace')}" for log in logs)

    # -- dying -------------------------------------------------------------------------

    def arm(self, label: str, passing: int = 1) -> None:
        """Let the next process die that passes a point."""
        crash.arm(self.file, label, passing)

    def await_hit(self, label: str) -> int:
        """Wait until a process has died at the armed point; return its process id."""
        before = set(self.file.parent.glob(f"{self.file.name}.[0-9]*"))
        self.until(f"a process passes {label}", lambda: not self.file.exists())
        (marker,) = set(self.file.parent.glob(f"{self.file.name}.[0-9]*")) - before or before
        pid = int(marker.suffix[1:])
        marker.unlink()
        return pid

    def kill_at(self, point: crash.CrashPoint, *, begin: Callable[[], None] | None = None, deaths: int = 1) -> Hit:
        """Arm a point, wait for the death there and for the process that takes its place; no other may die.

        `begin` is called when armed; with it the process dies `deaths` times in all.
        """
        before = Counter({name: child.restarts for name, child in self.children().items()})
        if point.after:
            self.arm(point.after)
            self.await_hit(point.after)
            deaths += 1
        self.arm(point.label)
        if begin is not None:
            begin()
        pid = self.await_hit(point.label)

        def replaced() -> str:
            children = self.children()
            dead = [name for name, child in children.items() if child.restarts == before[name] + deaths]
            return dead[0] if dead and self.all_run() else ""

        name = self.until(f"the supervisor has replaced what died at {point.label}", replaced)
        after = self.children()
        assert after[name].last_end == "killed by SIGKILL"
        assert after[name].pid != pid
        assert {n for n, child in after.items() if child.restarts != before[n]} == {name}
        return Hit(name, pid)

    def kill(self, name: str) -> None:
        """kill -9 of one child, as soon as it runs; return when the supervisor knows of its end."""
        pid = self.until(f"{name} runs", lambda: self.children()[name].pid)
        os.kill(pid, signal.SIGKILL)
        self.until(f"the end of {name} is noticed", lambda: self.children()[name].pid != pid)

    # -- progress ----------------------------------------------------------------------

    def logged(self) -> dict[str, int]:
        """Return the end of each partition of the log."""
        with reading(self.settings) as log:
            return {partition: log.end_offset(partition) for partition in log.partitions()}

    def watermarks(self, table: str) -> dict[str, int]:
        """Return per partition up to which offset a cold table holds everything."""
        self._cold = self._cold or open_cold(self.settings)
        return dict(self._cold.pin(table).watermark)

    def await_subscribed(self) -> None:
        """Wait until every capture, as it runs now, listens to all it wants: from then on it knows what was missed."""

        def subscribed() -> bool:
            pids = {name: child.pid for name, child in self.children().items() if name.startswith("capture-")}
            return all_subscribed(self.settings, pids)

        self.until("all captures are subscribed", subscribed)

    def await_work(self) -> None:
        """Wait until what the log holds more than now has gone through every stage."""
        self.await_subscribed()
        begun = self.logged()
        self.until("more is logged", lambda: _beyond(self.logged(), begun))
        fresh = self.logged()
        for table in ("trades", "frames", "candles"):
            self.until(f"cold {table} go on", lambda table=table: _reach(self.watermarks(table), fresh))  # type: ignore[misc]

    def await_drained(self, client: Client) -> None:
        """Wait until every tier holds every trade the log holds now."""
        ends = self.logged()
        self.until("all is ingested", lambda: _reach(ingested(self.settings), ends))
        names = ["log_partition", "log_offset"]
        for table, source in (("trades", "trades"), ("candles", "trades"), ("quotes", "quotes"), ("frames", "quotes")):
            offsets = client.rows(source).arrow().select(names)
            last = offsets.group_by("log_partition").aggregate([("log_offset", "max")]).to_pylist()
            wanted = {row["log_partition"]: row["log_offset_max"] + 1 for row in last}
            self.until(
                f"cold holds all {table}",
                lambda table=table, wanted=wanted: _reach(self.watermarks(table), wanted),  # type: ignore[misc]
            )


def all_subscribed(settings: Settings, pids: Mapping[str, int]) -> bool:
    """Whether the captures (`capture-<exchange>`) with these process ids say that they listen to all they want."""
    told = {f"capture-{status.exchange}": status for status in read_captures(settings)}
    return all(
        name in told
        and told[name].pid == pid
        and [connection.state for connection in told[name].connections] == ["subscribed"]
        for name, pid in pids.items()
    )


def ingested(settings: Settings) -> dict[str, int]:
    """Return per partition how far ingest has come."""
    with contextlib.closing(IngestState(settings.data_path / "state.db")) as state:
        return state.progress()


def _reach(positions: Mapping[str, int], wanted: Mapping[str, int]) -> bool:
    return all(positions.get(partition, 0) >= offset for partition, offset in wanted.items())


def _beyond(positions: Mapping[str, int], passed: Mapping[str, int]) -> bool:
    return all(positions.get(partition, 0) > offset for partition, offset in passed.items())


def compare(client: Client, account: Account, *, hot_forgets: bool = False) -> list[Check]:
    """Compare hot, cold and their union with the account: every trade, every candle of every timeframe.

    With `hot_forgets` (retention) hot's rows may be fewer; they are still not doubled, and none is invented.
    Quotes and frames the account does not tell: see `check_offsets`.
    """
    stored = {tier: client.trades(tier=tier).arrow() for tier in TIERS}

    def rows(exchange: str, symbol: str, tier: str) -> pa.Table:
        trades = stored[tier]
        return trades.filter(pc.and_(pc.equal(trades["exchange"], exchange), pc.equal(trades["symbol"], symbol)))

    def candles(tier: str) -> Callable[[str, str, str, str], pa.Table]:
        return lambda exchange, symbol, timeframe, kind: client.candles(
            symbol, timeframe, exchange=exchange, kind=kind, tier=tier
        ).arrow()

    markets = [market for market in account["markets"] if market["count"]]
    checks = reconcile(account, rows, candles("all"))
    for tier in ("hot", "cold"):
        checks += [
            check_candles(market, frame, candles(tier)(market["exchange"], market["symbol"], frame, market["kind"]))
            for market in markets
            for frame in TIMEFRAMES
        ]
    if all(check.passed for check in checks):
        # Per market: three tiers of rows, and six timeframes in the union, in hot and in cold.
        assert len(checks) == len(markets) * (3 + 3 * len(TIMEFRAMES))
    checks += check_offsets(client, hot_forgets=hot_forgets)
    if hot_forgets:
        checks = [
            c for c in checks if not (c.name.endswith("s, hot") and c.detail.endswith(" lost, 0 doubled, 0 invented"))
        ]
    return checks


# Places in the log of the rows of a table, in the SQL of both tiers: how many, how many different ones, their sum.
_PLACES = """
SELECT log_partition AS name, count(*) AS n, count(DISTINCT log_offset * 10000 + row_in_frame) AS places,
       sum(log_offset * 10000 + row_in_frame) AS total, min(log_offset) AS low, max(log_offset) AS high
FROM {table} GROUP BY log_partition ORDER BY log_partition
"""


def check_offsets(client: Client, *, hot_forgets: bool = False) -> list[Check]:
    """Check by places in the log: no row is doubled, hot and cold hold the same, and cold holds every frame."""
    found = {
        (table, tier): client.sql(_PLACES.format(table=table), tier=tier).arrow().to_pylist()
        for table, tier in (
            ("trades", "hot"),
            ("trades", "cold"),
            ("quotes", "hot"),
            ("quotes", "cold"),
            ("frames", "cold"),
        )
    }
    checks = [
        Check(f"{table} by offset, {tier}", all(row["n"] == row["places"] for row in rows), str(rows))
        for (table, tier), rows in found.items()
    ]
    frames = found["frames", "cold"]
    whole = all(row["low"] == 0 and row["high"] + 1 == row["n"] for row in frames)
    checks.append(Check("frames without a hole, cold", bool(frames) and whole, str(frames)))
    for table in ("trades", "quotes"):
        hot, cold = ([{k: int(row[k]) for k in ("n", "total")} for row in found[table, t]] for t in ("hot", "cold"))
        checks.append(Check(f"{table} the same in hot and cold", hot_forgets or hot == cold, f"{hot} {cold}"))
    return checks


@contextlib.contextmanager
def supervised(
    folder: Path, sections: Mapping[str, Mapping[str, object]], *, spared: Sequence[str] = (), node: str = ""
) -> Iterator[Supervised]:
    """Give an installation in `folder`, not started yet; kill what runs of it at the end."""
    made = Supervised(folder, sections, spared=spared, node=node)
    try:
        yield made
    except BaseException as error:
        error.add_note(f"the data folder is kept: {made.installation.folder}; what the processes said is beside it")
        raise
    finally:
        made.end()
