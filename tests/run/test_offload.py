"""Offload: each row once in cold, whatever is cut, killed or run twice."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2.cold.base import Cold
from k2.cold.iceberg import IcebergCold
from k2.cold.memory import MemoryCold
from k2.errors import Corrupt, InUse, NotSuccessor, StoreDown
from k2.hot.memory import MemoryHot
from k2.log.memory import MemoryLog
from k2.model import Frame, LogBatch, Selection
from k2.run.normalise import REPEAT_WINDOW
from k2.run.offload import CLOSED_BEFORE, COLD_TABLES, Offloader
from k2.schema import (
    CANDLES,
    DEAD_LETTERS,
    FRAMES,
    GAPS,
    HOT_ROW_TABLES,
    QUOTES,
    TABLES,
    TIMEFRAMES,
    TRADES,
    Table,
    arrow_schema,
)
from k2.settings import ColdSettings, HotSettings, LogSettings, Settings

T0 = 1_700_000_040 * 10**9  # the start of a minute
LATER = T0 + 90 * 86_400 * 10**9
ROW: Mapping[str, Any] = {
    "symbol": "BTC-USDT",
    "kind": "trade",
    "price": Decimal("100.5"),
    "amount": Decimal("0.25"),
    "side": "buy",
    "off_market": False,
    "occurrence": 0,
    "source": "live",
    "row_in_frame": 0,
    "bid_price": Decimal(1),
    "bid_amount": Decimal(2),
    "ask_price": Decimal(3),
    "ask_amount": Decimal(4),
    "update_id": 0,
    "status": "open",
    "missing": 1,
    "cause": "skipped",
    "reason": "bad_price",
    "detail": "price 'x'",
    "frame": b"{}",
}


def row(table: Table, partition: str, offset: int, **values: Any) -> dict[str, Any]:
    """A row of any table, made from the frame at an offset; one a second."""
    ids = dict.fromkeys(("trade_id", "first_id", "last_id"), offset + 1)
    times = dict.fromkeys(("exchange_ns", "received_ns", "logged_ns"), T0 + offset * 10**9)
    full = {**ROW, **ids, **times, "exchange": partition, "log_partition": partition, "log_offset": offset, **values}
    return {name: full[name] for name in table.column_names}


class World:
    """A log and a hot tier that hold what ingest made of the frames, up to `progress`."""

    def __init__(self, cold: Cold, settings: Settings, frames: Mapping[str, int], hot: MemoryHot | None = None) -> None:
        self.log_ns = T0
        self.cold, self.log, self.hot = cold, MemoryLog(clock=lambda: self.log_ns), hot or MemoryHot()
        self.progress: dict[str, int] = {}
        self.now_ns = LATER
        for partition, count in frames.items():
            made = [Frame("frame", "live", "c", 0, o, T0 + o * 10**9, b"%d" % o) for o in range(count)]
            for at in range(0, count, 7):
                self.log_ns = T0 + at * 10**9
                self.log.append(partition, made[at : at + 7])
            self.fill(partition, 0, count)
            self.progress[partition] = count
        self.log_ns += 1
        self.offloader = self.another(cold, settings)

    def another(self, cold: Cold, settings: Settings) -> Offloader:
        """An offloader over this world."""
        return Offloader(settings, self.log, self.hot, cold, lambda: self.progress, clock=lambda: self.now_ns)

    def fill(self, partition: str, start: int, end: int) -> None:
        """Put the rows of frames into hot: a trade each, others now and then."""
        for table, every in ((TRADES, 1), (QUOTES, 3), (GAPS, 50), (DEAD_LETTERS, 70)):
            rows = [row(table, partition, o) for o in range(start, end) if o % every == 0]
            self.write(table, rows)

    def write(self, table: Table, rows: list[dict[str, Any]]) -> None:
        """Put rows into hot."""
        if rows:
            token = f"{rows[0]['log_partition']}:{rows[0]['log_offset']}-{rows[-1]['log_offset']}"
            self.hot.write(table.name, pa.Table.from_pylist(rows, schema=arrow_schema(table)), token)

    def everything(self) -> dict[str, pa.Table]:
        """All rows of hot."""
        return {t.name: self.hot.read_range(t.name, {}, self.progress) for t in HOT_ROW_TABLES}


def configured(data: object = "unused", commit_rows: int = 500_000, commit_seconds: float = 0) -> Settings:
    """Settings that keep nothing longer than they must."""
    return Settings(
        data=str(data),
        cold=ColdSettings(commit_rows=commit_rows, commit_seconds=commit_seconds),
        hot=HotSettings(retention_seconds=0),
        log=LogSettings(retention_seconds=0),
    )


def stored(cold: Cold, table: str) -> pa.Table:
    """All rows of a cold table, in `Table.sort` order."""
    rows = cold.read(cold.pin(table), Selection(table=table))
    return rows.sort_by([(c, "ascending") for c in TABLES[table].sort])


def assert_each_once(cold: Cold, frames: Mapping[str, int]) -> None:
    """Cold holds exactly what a world of so many frames made, and says so."""
    fresh = World(MemoryCold(), configured(), frames)
    for name, rows in fresh.everything().items():
        assert stored(cold, name).equals(rows), name
    offsets = stored(cold, "frames").select(["log_partition", "log_offset"]).to_pylist()
    assert [(r["log_partition"], r["log_offset"]) for r in offsets] == [
        (p, o) for p in sorted(frames) for o in range(frames[p])
    ]
    assert [dict(cold.pin(t).watermark) for t in COLD_TABLES] == [dict(frames)] * len(COLD_TABLES)


# -- what is moved ---------------------------------------------------------------------


def test_everything_is_moved_once() -> None:
    """A forced run moves all rows and frames; the next one finds nothing to move."""
    world = World(MemoryCold(), configured(), {"binance": 150, "kraken": 20})
    first, second = world.offloader.drain(), world.offloader.drain()

    assert_each_once(world.cold, {"binance": 150, "kraken": 20})
    assert (first.rows["trades"], first.rows["frames"]) == (170, 170)
    assert second.commits == {}
    assert world.offloader.lag() == dict.fromkeys(COLD_TABLES, 0)


def test_rows_beyond_the_progress_stay() -> None:
    """Only what ingest has committed is moved; frames come straight from the log."""
    world = World(MemoryCold(), configured(), {"binance": 100})
    world.progress = {"binance": 40}
    world.offloader.drain()

    assert stored(world.cold, "trades")["log_offset"].to_pylist() == list(range(40))
    assert stored(world.cold, "frames").num_rows == 100
    assert world.offloader.watermarks()["trades"] == {"binance": 40}


def test_a_commit_waits_for_rows_or_age() -> None:
    """Neither many nor old rows: nothing is moved; enough of them: those are."""
    world = World(MemoryCold(), configured(commit_rows=100, commit_seconds=3600), {"binance": 99})
    assert world.offloader.run_once().commits == {}
    world.fill("binance", 99, 100)
    world.progress["binance"] = 100

    assert world.offloader.run_once().commits == {"trades": 1}


def test_commits_hold_at_most_commit_rows() -> None:
    """A long range is cut, the same way each time, into commits of the configured size."""
    made = []
    for _ in range(2):
        world = World(MemoryCold(), configured(commit_rows=10), {"binance": 90, "kraken": 5})
        world.offloader.drain()
        made.append([(s.rows_added, s.end) for s in world.cold.snapshots("trades")])
        assert_each_once(world.cold, {"binance": 90, "kraken": 5})

    assert made[0] == made[1]
    assert all(5 <= rows <= 10 for rows, _end in made[0])


def test_a_frame_of_more_rows_than_fit_is_moved_whole() -> None:
    """The rows of one offset cannot be cut; they go together."""
    world = World(MemoryCold(), configured(commit_rows=3), {"binance": 4})
    world.write(TRADES, [row(TRADES, "binance", 2, row_in_frame=r, trade_id=100 + r) for r in range(1, 9)])
    world.offloader.drain()

    assert stored(world.cold, "trades").num_rows == 12
    assert max(s.rows_added for s in world.cold.snapshots("trades")) == 9


def test_tables_without_rows_move_their_watermark_when_forced() -> None:
    """Otherwise an empty table would hold the log back for ever; not forced it does so now and then."""
    world = World(MemoryCold(), configured(), {})
    world.progress = {"binance": 8}
    world.log.append("binance", [Frame("frame", "live", "c", 0, 0, T0, b"x")] * 8)

    assert set(world.offloader.run_once().commits) == {"frames"}
    world.offloader.drain()
    assert_each_watermark = [dict(world.cold.pin(t).watermark) for t in COLD_TABLES]
    assert assert_each_watermark == [{"binance": 8}] * len(COLD_TABLES)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_split_gives_the_same_tables(data: st.DataObject) -> None:
    """However progress comes in and whatever the size of commits, each row is in cold once."""
    frames = {"binance": data.draw(st.integers(0, 40)), "kraken": data.draw(st.integers(1, 40))}
    frames = {p: n for p, n in frames.items() if n}
    world = World(MemoryCold(), configured(), frames)
    world.progress = dict.fromkeys(frames, 0)
    for _ in range(data.draw(st.integers(0, 4))):
        world.progress = {p: data.draw(st.integers(done, frames[p])) for p, done in world.progress.items()}
        size = configured(commit_rows=data.draw(st.integers(1, 60)))
        world.another(world.cold, size).run_once(force=data.draw(st.booleans()))
    world.progress = dict(frames)
    world.offloader.drain()

    assert_each_once(world.cold, frames)


# -- what is refused -------------------------------------------------------------------


@pytest.mark.parametrize("expected", [9, 11])
def test_rows_ingest_did_not_account_for_are_refused(expected: int) -> None:
    """One row too many or too few stops the table before anything is committed."""
    world = World(MemoryCold(), configured(), {"binance": 10})
    world.offloader = Offloader(
        configured(), world.log, world.hot, world.cold, lambda: world.progress, lambda _t, _s, _e: expected
    )

    with pytest.raises(Corrupt, match=f"ingest put {expected} rows there, hot holds 10: 1 too"):
        world.offloader.drain()
    assert world.cold.pin("trades").location == ""


def test_hot_that_hands_out_other_rows_than_it_counts_is_refused() -> None:
    """Rows read are compared with the count of the same range."""

    class Forgetful(MemoryHot):
        def read_range(self, table: str, start: Mapping[str, int], end: Mapping[str, int]) -> pa.Table:
            return super().read_range(table, start, end).slice(1)

    world = World(MemoryCold(), configured(), {"binance": 10}, Forgetful())

    with pytest.raises(Corrupt, match="counts 10 rows and hands out 9"):
        world.offloader.drain()
    assert world.cold.pin("trades").location == ""


def test_damaged_frames_are_left_out_and_the_rest_goes_on() -> None:
    """Cold holds the frames before and behind the damage; the watermark is behind all of them."""

    class Damaged(MemoryLog):
        def read(
            self, partition: str, offset: int, *, max_frames: int = 10_000, max_bytes: int = 16 << 20
        ) -> list[LogBatch]:
            if offset + max_frames > 21 and offset < 28:
                raise Corrupt("bad checksum", first_offset=21, end_offset=28)
            return super().read(partition, offset, max_frames=max_frames, max_bytes=max_bytes)

    world = World(MemoryCold(), configured(), {"binance": 50})
    damaged = Damaged(clock=lambda: T0)
    damaged.append("binance", [f for b in world.log.read("binance", 0) for f in b.frames])
    Offloader(configured(), damaged, world.hot, world.cold, lambda: world.progress).drain()

    assert stored(world.cold, "frames")["log_offset"].to_pylist() == [*range(21), *range(28, 50)]
    assert dict(world.cold.pin("frames").watermark) == {"binance": 50}


def test_frames_the_log_has_forgotten_stop_the_offload() -> None:
    """A hole in cold would be silent otherwise."""
    world = World(MemoryCold(), configured(), {"binance": 50})
    world.log.commit_reader("somebody", {"binance": 50})
    world.log.trim(keep_seconds=0)

    with pytest.raises(Corrupt, match="removed them before cold held them"):
        world.offloader.drain()


# -- candles ---------------------------------------------------------------------------


def test_closed_candles_are_moved_and_late_trades_revise_them() -> None:
    """Open buckets stay; a trade that comes late makes a higher revision of its candles only."""
    world = World(MemoryCold(), configured(), {"binance": 150})  # two and a half minutes, one trade a second
    world.now_ns = T0 + 150 * 10**9
    world.offloader.drain()
    minutes = Selection(table="candles", end_ns=LATER)
    before = [r for r in world.cold.read(world.cold.pin("candles"), minutes).to_pylist() if r["timeframe"] == "1m"]
    late = row(TRADES, "binance", 150, exchange_ns=T0 + 5, price=Decimal(999))
    world.write(TRADES, [late])
    world.progress = {"binance": 151}
    world.offloader.drain()
    after = [r for r in world.cold.read(world.cold.pin("candles"), minutes).to_pylist() if r["timeframe"] == "1m"]

    assert [(r["start_ns"], r["trade_count"]) for r in before] == [(T0, 60), (T0 + 60 * 10**9, 60)]
    assert [(r["trade_count"], r["high"], r["revision"]) for r in after] == [(61, 999, 2), (60, Decimal("100.5"), 1)]


def heartbeat(world: World, logged_ns: int, partition: str = "kraken") -> None:
    """Log a frame without rows and let ingest pass it."""
    world.log_ns = logged_ns
    world.log.append(partition, [Frame("frame", "live", "c", 0, 0, logged_ns, b"{}")])
    world.progress = {**world.progress, partition: world.log.end_offset(partition)}


def test_a_candle_closes_without_new_rows() -> None:
    """Frames without rows close a bucket, also those of another exchange: they say how late it is."""
    world = World(MemoryCold(), configured(), {"binance": 30})
    world.offloader.drain()
    assert stored(world.cold, "candles").num_rows == 0
    heartbeat(world, T0 + 71 * 10**9)
    world.offloader.run_once()

    assert stored(world.cold, "candles")["timeframe"].to_pylist() == ["15m", "1m", "5m"]
    assert world.cold.properties("candles") == {CLOSED_BEFORE: str(T0 + 61 * 10**9)}


def test_the_clock_of_the_offload_closes_no_candle() -> None:
    """A clock that runs ahead of what was logged, or goes back, moves no open candle, and none twice."""
    world = World(MemoryCold(), configured(), {"binance": 30})
    for now_ns in (LATER, LATER * 2, T0, LATER):
        world.now_ns = now_ns
        world.offloader.drain()
        assert stored(world.cold, "candles").num_rows == 0
    heartbeat(world, T0 + 200 * 10**9)
    for _ in range(2):
        world.offloader.drain()
        heartbeat(world, T0 + 201 * 10**9)

    assert stored(world.cold, "candles")["revision"].to_pylist() == [2, 2, 2]


def test_candles_of_a_recording_are_closed_when_it_is_logged() -> None:
    """Old trades logged today: all their candles are closed."""
    world = World(MemoryCold(), configured(), {"binance": 30})
    heartbeat(world, LATER)
    world.offloader.drain()

    assert set(stored(world.cold, "candles")["timeframe"].to_pylist()) == set(TIMEFRAMES)


def test_candles_come_back_from_a_clock_error_of_the_log() -> None:
    """A frame logged in 2100 closes what is open; later its candles get a revision when they really close."""
    world = World(MemoryCold(), configured(), {"binance": 30})
    world.now_ns = 2 * LATER
    heartbeat(world, 2 * LATER)
    world.offloader.drain()
    world.now_ns = T0 + 50 * 10**9
    heartbeat(world, T0 + 50 * 10**9)
    world.offloader.drain()
    assert world.cold.properties("candles") == {CLOSED_BEFORE: str(T0 + 40 * 10**9)}
    world.write(TRADES, [row(TRADES, "binance", 30)])
    heartbeat(world, T0 + 80 * 10**9, "binance")
    world.offloader.drain()

    newest = world.cold.read(world.cold.pin("candles"), Selection(table="candles")).to_pylist()
    assert [r["trade_count"] for r in newest if r["timeframe"] == "1m"] == [31]
    assert world.cold.properties("candles") == {CLOSED_BEFORE: str(T0 + 70 * 10**9)}


def test_a_partition_that_ended_in_a_clock_error_closes_nothing_for_ever() -> None:
    """What was logged later than now is not believed."""
    world = World(MemoryCold(), configured(), {"binance": 30})
    heartbeat(world, 2 * LATER)
    world.offloader.drain()

    assert stored(world.cold, "candles").num_rows == 0


# -- letting go ------------------------------------------------------------------------


def test_only_what_every_cold_table_holds_is_forgotten() -> None:
    """Hot rows and log segments go when all tables have passed them, not before."""
    world = World(MemoryCold(), configured(), {"binance": 70})
    world.progress = {"binance": 30}
    done = world.offloader.drain()

    assert done.deleted == {"trades": 30, "quotes": 10, "gaps": 1, "dead_letters": 1}
    assert world.hot.read_range("trades", {}, {"binance": 70})["log_offset"].to_pylist() == list(range(30, 70))
    assert world.log.start_offset("binance") == 0  # they tell repeats to a hot tier made anew from cold


def test_the_log_keeps_what_tells_repeats_behind_cold() -> None:
    """Hot made anew from cold goes on there: the frames before, by which it knows a repeat, are not trimmed."""
    world = World(MemoryCold(), configured(), {"binance": 0})
    made = [Frame("frame", "live", "c", 0, o, T0 + o, b"") for o in range(REPEAT_WINDOW + 3_000)]
    for at in range(0, len(made), 1_000):
        world.log.append("binance", made[at : at + 1_000])
    world.progress = {"binance": len(made)}
    world.log_ns += 1
    world.log.commit_reader("ingest", world.progress)  # as if it was far ahead
    world.offloader.drain()
    world.log.trim(keep_seconds=0)

    start = world.log.start_offset("binance")
    assert 0 < start <= min(world.offloader.watermarks()["trades"].values()) - REPEAT_WINDOW


def test_the_log_knows_the_reader_before_anything_is_moved() -> None:
    """A reader at 0 keeps the log from forgetting what cold does not hold yet."""
    world = World(MemoryCold(), configured(commit_seconds=3600), {"binance": 70})
    world.log.commit_reader("ingest", {"binance": 70})
    world.offloader.run_once()
    world.log.trim(keep_seconds=0)

    assert world.log.start_offset("binance") == 0


# -- life ------------------------------------------------------------------------------


def test_run_forever_waits_out_what_may_pass_and_stops_when_told() -> None:
    """A store that is down or a lost race is tried again; stop wakes the wait; draining still works afterwards."""
    stop = threading.Event()

    class Flaky(MemoryCold):
        failures: ClassVar = [StoreDown("append: no space"), NotSuccessor("append: somebody else")]

        def append(self, table: str, rows: pa.Table, **rest: Any) -> Any:
            if self.failures:
                raise self.failures.pop()
            if table == "trades":
                stop.set()
            return super().append(table, rows, **rest)

    world = World(Flaky(), configured(), {"binance": 70})
    world.offloader.run_forever(stop)

    assert world.offloader.totals.rows["trades"] == 70
    world.offloader.drain()
    assert_each_once(world.cold, {"binance": 70})


def test_a_table_that_fails_keeps_no_other_from_moving() -> None:
    """Each table has its turn, and retention too; what failed is raised at the end."""

    class Full(MemoryCold):
        def append(self, table: str, rows: pa.Table, **rest: Any) -> Any:
            if table == "trades":
                raise StoreDown("append trades: no space")
            return super().append(table, rows, **rest)

    world = World(Full(), configured(), {"binance": 70})
    with pytest.raises(StoreDown, match="no space"):
        world.offloader.drain()

    marks = {t: dict(world.cold.pin(t).watermark) for t in COLD_TABLES}
    assert marks == {t: {} if t == "trades" else {"binance": 70} for t in COLD_TABLES}
    world.log.commit_reader("ingest", {"binance": 70})
    assert world.log.trim(keep_seconds=0) == {}  # the offload is known to need it still


def test_what_does_not_pass_is_raised_before_what_does() -> None:
    """A mistake is not hidden behind a full disk."""

    class Broken(MemoryCold):
        def append(self, table: str, rows: pa.Table, **rest: Any) -> Any:
            raise StoreDown("no space") if table == "trades" else RuntimeError("a mistake")

    world = World(Broken(), configured(), {"binance": 70})
    with pytest.raises(RuntimeError, match="a mistake"):
        world.offloader.run_forever()


def test_a_table_that_does_not_match_is_parked(caplog: pytest.LogCaptureFixture) -> None:
    """It is told once, left out for a while, and moved again when it matches; `run_forever` does not end."""
    stop = threading.Event()
    accounted = {"trades": 1}

    class Counting(MemoryHot):
        rounds = 0

        def closed_candles(self, *arguments: Any) -> pa.Table:
            self.rounds += 1
            if self.rounds == 3:
                stop.set()
            return super().closed_candles(*arguments)

    world = World(MemoryCold(), configured(), {"binance": 70}, Counting())
    offloader = Offloader(
        configured(), world.log, world.hot, world.cold, lambda: world.progress, lambda t, _s, _e: accounted.get(t)
    )
    assert offloader.parked == ""
    offloader.run_forever(stop)

    assert offloader.parked.startswith("trades: offload 'trades' binance [0, 70): ingest put 1 rows there")
    assert [r.getMessage() for r in caplog.records if "parked" in r.getMessage()] == [
        f"offload: trades is parked, and tried again every 60 s: {offloader.parked.removeprefix('trades: ')}"
    ]
    assert world.cold.pin("quotes").watermark == {"binance": 70}
    with pytest.raises(Corrupt):
        offloader.drain()
    accounted.clear()
    offloader.drain()
    assert offloader.parked == ""
    assert_each_once(world.cold, {"binance": 70})


def test_maintenance_in_between_does_not_starve_a_commit() -> None:
    """A commit refused though its own range is free is tried again at once; one whose range is taken is not."""

    class Maintained(MemoryCold):
        refusals = 3

        def append(self, table: str, rows: pa.Table, **rest: Any) -> Any:
            if self.refusals:
                self.refusals -= 1
                raise NotSuccessor("append: a compaction came between")
            return super().append(table, rows, **rest)

    world = World(Maintained(), configured(), {"binance": 70})
    world.offloader.drain()

    assert_each_once(world.cold, {"binance": 70})


# -- flushes ---------------------------------------------------------------------------


class Flushes:
    """What ingest remembers of flushes that end at some offsets of one partition."""

    def __init__(self, *ends: int, wrong: int = -1) -> None:
        self.ends, self.wrong, self.asked = ends, wrong, list[tuple[int, int, bool]]()

    def boundaries(self, start: Mapping[str, int], end: Mapping[str, int]) -> list[Mapping[str, int]]:
        """The ends within a range."""
        return [{"binance": e} for e in self.ends if start["binance"] < e <= end["binance"]]

    def expected(self, table: str, start: Mapping[str, int], end: Mapping[str, int]) -> int | None:
        """One trade an offset, and nothing to say of parts of a flush, nor of other tables."""
        low, high = start["binance"], end["binance"]
        known = {low, high} <= {0, *self.ends} and table == "trades"
        self.asked.append((low, high, known))
        return high - low - (low < self.wrong <= high) if known else None

    def offloader(self, world: World, commit_rows: int) -> Offloader:
        """An offloader that asks here."""
        return Offloader(
            configured(commit_rows=commit_rows),
            world.log,
            world.hot,
            world.cold,
            lambda: world.progress,
            self.expected,
            boundaries=self.boundaries,
        )


def test_commits_end_where_flushes_end() -> None:
    """As many flushes as fit; so every commit is checked against what ingest put there."""
    world, flushes = World(MemoryCold(), configured(), {"binance": 50}), Flushes(7, 14, 15, 29, 33, 50)
    flushes.offloader(world, 20).drain()

    assert [s.end for s in world.cold.snapshots("trades")] == [{"binance": e} for e in (15, 33, 50)]
    assert {(0, 15, True), (15, 33, True), (33, 50, True)} <= set(flushes.asked)
    assert_each_once(world.cold, {"binance": 50})


def test_a_flush_that_does_not_fit_is_cut_and_the_next_commits_end_with_flushes_again() -> None:
    """Inside it cuts are anywhere, but not beyond its end."""
    world, flushes = World(MemoryCold(), configured(), {"binance": 60}), Flushes(5, 40, 49, 60)
    flushes.offloader(world, 10).drain()

    assert [s.end["binance"] for s in world.cold.snapshots("trades")] == [5, 15, 25, 35, 40, 49, 59, 60]
    assert_each_once(world.cold, {"binance": 60})


def test_a_mismatch_is_told_of_the_flush_it_is_in() -> None:
    """However far ingest goes on meanwhile: the report stays the same."""
    world, flushes = World(MemoryCold(), configured(), {"binance": 60}), Flushes(5, 20, 30, 60, wrong=25)

    with pytest.raises(Corrupt, match=r"binance \[20, 30\): ingest put 9 rows there, hot holds 10: 1 too many"):
        flushes.offloader(world, 1000).drain()


# -- the real cold tier ----------------------------------------------------------------


def test_a_second_offloader_is_refused_by_the_lease(tmp_path: Path) -> None:
    """The one that comes second is told who is first."""
    one, two = IcebergCold(configured(tmp_path)), IcebergCold(configured(tmp_path))
    world = World(one, configured(tmp_path), {"binance": 20})
    world.offloader.drain()

    with pytest.raises(InUse, match="process"):
        world.another(two, configured(tmp_path)).drain()
    one.close()
    world.another(two, configured(tmp_path)).drain()
    assert_each_once(two, {"binance": 20})
    two.close()


def test_two_offloaders_without_a_lease_still_move_each_row_once(tmp_path: Path) -> None:
    """With the lock file taken away under the first both write; each commit of one refuses the other's."""
    settings = configured(tmp_path, commit_rows=5)
    colds = [IcebergCold(settings), IcebergCold(settings)]
    for cold in colds:
        cold.acquire_lease()
        (tmp_path / "cold" / "writer.lock").unlink()
    colds[0].catalog.load_or_create(TRADES)  # who makes the catalog takes drafts of it for those of the dead
    world = World(colds[0], settings, {"binance": 40})
    refused = [0, 0]

    def work(which: int) -> None:
        for _ in range(60):  # each refusal means the other one got ahead: 6 tables of about 8 commits
            try:
                world.another(colds[which], settings).drain()
                return
            except NotSuccessor:
                refused[which] += 1
        raise AssertionError("no end")

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert_each_once(colds[0], {"binance": 40})
    assert sum(s.rows_added for s in colds[1].snapshots("trades")) == 40
    for cold in colds:
        cold.close()


CHILD = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("world", {here!r})
world = importlib.util.module_from_spec(spec); spec.loader.exec_module(world)
settings = world.configured({data!r}, commit_rows=25)
cold = world.IcebergCold(settings)
made = world.World(cold, settings, {frames!r})
print("ready", flush=True)
made.offloader.drain()
cold.close()
"""


def killed_offloads(data: Path, frames: dict[str, int], kills: int, seed: int) -> int:
    """Run a real offload process and kill it at a random moment, again and again; then let one finish."""
    chance = random.Random(seed)
    code = CHILD.format(here=__file__, data=str(data), frames=frames)
    hit = 0
    for attempt in range(kills + 1):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            try:
                child.wait(timeout=chance.uniform(0.0, 0.8) if attempt < kills else 100)
            except subprocess.TimeoutExpired:
                child.send_signal(signal.SIGKILL)
                hit += 1
            assert attempt < kills or child.wait() == 0
    return hit


@pytest.mark.parametrize(
    ("kills", "count"), [(1, 200), pytest.param(10, 600, marks=[pytest.mark.slow, pytest.mark.timeout(300)])]
)
def test_killed_processes_lose_and_double_nothing(tmp_path: Path, kills: int, count: int) -> None:
    """kill -9 at any point, then again: each row is in cold exactly once."""
    frames = {"binance": count, "kraken": 90}
    hit = killed_offloads(tmp_path, frames, kills, seed=7)

    assert hit > 0
    cold = IcebergCold(configured(tmp_path))
    assert_each_once(cold, frames)
    again = World(MemoryCold(), configured(), frames)
    again.now_ns = LATER
    again.offloader.drain()
    bare = [c for c in CANDLES.column_names if c != "revision"]
    assert stored(cold, "candles").select(bare).equals(stored(again.cold, "candles").select(bare))
    cold.close()


def test_frames_keep_every_field() -> None:
    """What the log holds of a frame is in cold, byte for byte."""
    cold, log = MemoryCold(), MemoryLog(clock=lambda: 77)
    frame = Frame("answer", "backfill", "conn-1", 3, 9, 55, bytes(range(256)), "https://example.org/x?a=b")
    log.append("kraken", [frame])
    Offloader(configured(), log, MemoryHot(), cold, dict).drain()
    (kept,) = stored(cold, FRAMES.name).to_pylist()

    assert Frame(**{name: kept[name] for name in Frame.__struct_fields__}) == frame
    assert (kept["log_offset"], kept["logged_ns"], kept["exchange"]) == (0, 77, "kraken")
