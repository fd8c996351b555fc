"""Answers questions over cold ∪ hot ∪ tail as if they were one table.

How the union is exact while flushes, commits and retention go on
-----------------------------------------------------------------
Every row has a log offset. Per partition there are three marks, and all three only rise:

    D(t)  hot retention has deleted rows below this       D(t) <= W(t): only what cold holds is deleted
    W(t)  cold holds every row below this                 the watermark, part of the Iceberg commit
    F(t)  hot was given every row below this              F(t) >= W(t): cold is filled from hot

The steps, in this order, each at its own moment:

    1  tail snapshot at t1:  T <= F(t1), and all rows at or above T that were made until t1
    2  cold watermark at t2: W0
    3  hot rows of [W0, T) at t3
    4  pin cold at t4:       W = W(t4); its rows below W, at that snapshot for ever
    5  answer = cold rows below W, hot rows of [W, T), tail rows at or above max(W, T)

Take an offset o of which rows were made before t1. If o < W its rows are taken from cold, which has
them all, and from nowhere else. If W <= o < T: hot had them at t3, because o < T <= F(t1), and
because what retention had deleted until t3 lies below D(t3) <= W(t3) <= W(t4) = W <= o. If o is at
least both, the snapshot has them. So each row comes once, and a flush, commit or retention run
between any two steps changes nothing. (Pinning *before* reading hot, and cutting there, would lose
rows: a commit and a retention run in between take rows away that the older pin does not have yet.)

Candles of hot are states without offsets to cut at, see `_pair_candles`.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from k2 import meters
from k2.candles import PARTIAL_SCHEMA, trade_bounds
from k2.cold.base import Cold, Pin, Snapshot
from k2.errors import StoreDown, TimedOut, UnknownName, nearest
from k2.hot.base import Hot
from k2.hot.tail import TailSource
from k2.model import AGGREGATE, TRADE, Positions, Selection
from k2.query.candles import bucket_starts, from_trades, merge
from k2.query.pinned import PinnedAnswers
from k2.query.plan import ALL, AUTO, COLD, HOT, Cursor, Question
from k2.query.rows import behind, cut, fitted, from_offsets, in_order, narrow, select, shaped
from k2.schema import CANDLES, QUOTES, TABLES, TRADES, Table, arrow_schema
from k2.settings import Settings

TAIL = "tail"

_MOST_SYMBOLS = 1_000_000  # more pairs than all exchanges list together


class Deadline:
    """The moment a query ends at the latest; may be brought forward from another thread."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds
        self._cancelled = threading.Event()

    def left(self) -> float:
        """Return the seconds left; raises TimedOut when there are none."""
        if self._cancelled.is_set():
            raise TimedOut("the query was given up by the one who asked")
        left = self._end - time.monotonic()
        if left <= 0:
            meters.acted("query.seconds")
            raise TimedOut(
                f"the query was interrupted after {self.seconds:g} s: ask for a shorter time or fewer rows, "
                "or raise query.timeout_seconds"
            )
        return left

    def cancel(self) -> None:
        """Let the query end at its next step."""
        self._cancelled.set()


@dataclass(frozen=True)
class Answer:
    """Rows, and what they are made from.

    `rows` has the stored columns of `table` (`schema.arrow_schema`), sorted by `plan.order`.
    `watermark` is the log offset per partition up to which cold answered. `next_cursor` continues
    behind the last row when the limit cut the answer; newest-first answers have nothing behind.
    """

    table: Table
    rows: pa.Table
    tiers: tuple[str, ...]
    watermark: Positions
    snapshot_id: int | None = None
    next_cursor: str | None = None
    note: str = ""


@dataclass(frozen=True)
class _Found:
    """Rows of one question, before they are checked and wrapped up."""

    rows: pa.Table
    tiers: tuple[str, ...]
    watermark: Positions
    snapshot_id: int | None = None


@dataclass(frozen=True)
class _Names:
    """The (exchange, symbol) pairs of a cold table at a snapshot, or of one committed right after it."""

    snapshot_id: int
    pairs: frozenset[tuple[str, str]]


class Engine:
    """One engine per process. Every method may be called from any thread; all of them block.

    `hot` is None where no hot tier can be opened: then only cold answers, and says so. `tail` is
    None where nothing is being ingested. The tiers belong to the caller, who closes them. `doubt` says
    at each call why hot is not to be trusted now, and is empty when it is: a doubted hot is not read.
    """

    def __init__(
        self,
        hot: Hot | None,
        cold: Cold,
        tail: TailSource | None,
        settings: Settings,
        doubt: Callable[[], str] | None = None,
    ) -> None:
        self._hot = hot
        self._cold = cold
        self._tail = tail
        self._doubt = doubt
        self._closed_why = ""
        self._settings = settings.query
        self._slots = threading.BoundedSemaphore(settings.query.concurrent)
        self._taken = 0  # about, for the metric: counted without a lock
        meters.watch("query.concurrent", self, lambda engine: engine._taken)
        self._cold_names: dict[str, _Names] = {}
        self._pinned = PinnedAnswers()

    def deadline(self, seconds: float | None = None) -> Deadline:
        """Return a deadline from now: the configured time limit, or a shorter one."""
        most = self._settings.timeout_seconds
        return Deadline(most if seconds is None else min(seconds, most))

    def answer(self, question: Question, deadline: Deadline | None = None, *, coded: bool = False) -> Answer:
        """Answer a question (see `plan.ask`) within its deadline; with `coded` names may come as dictionaries.

        Raises:
            UnknownName: there are no rows of that symbol or exchange at all, or no such snapshot.
            TimedOut: waiting for a slot or reading took too long; nothing goes on in the background.
            StoreDown: the hot tier was asked for and is not open, or is not to be trusted.
        """
        deadline = deadline or self.deadline()
        with self._slot(deadline):
            trusted = self._trusted()
            found = trusted._page(question, deadline)
            # What a doubted hot alone knows is not unknown: its answer is empty and says why.
            if found.rows.num_rows == 0 and question.after is None and not trusted._closed_why:
                trusted._check_names(question, deadline)
        return Answer(
            table=question.table,
            rows=found.rows if coded else shaped(found.rows, question.table),
            tiers=found.tiers,
            watermark=found.watermark,
            snapshot_id=found.snapshot_id,
            next_cursor=_next_cursor(question, found.rows),
            note=trusted._note(question),
        )

    def sql(
        self, query: str, *, tier: str = HOT, limit: int | None = None, deadline: Deadline | None = None
    ) -> pa.Table:
        """Run one read-only SELECT on the tables of one tier, in that tier's dialect (ClickHouse or DuckDB).

        At most `limit` rows come back, and never more than `query.max_limit`.
        """
        deadline = deadline or self.deadline()
        most = self._settings.max_limit
        count = min(limit or most, most)
        with self._slot(deadline):
            if tier == HOT:
                hot = self._trusted()._need_hot("SQL on the hot tier")
                return hot.sql(query, timeout_seconds=deadline.left(), limit=count)
            if tier == COLD:
                return self._cold.sql(query, timeout_seconds=deadline.left(), limit=count)
        raise UnknownName(f"SQL runs on one tier; {tier!r} is none{nearest(tier, (HOT, COLD))}")

    def symbols(self, deadline: Deadline | None = None) -> list[tuple[str, str]]:
        """Return the (exchange, symbol) pairs there is data of, sorted."""
        deadline = deadline or self.deadline()
        with self._slot(deadline):
            return sorted(self._trusted()._pairs(deadline))

    def snapshots(self, table: str | None = None) -> list[Snapshot]:
        """Return the retained commits of the cold tier, oldest first: what `as_of` accepts."""
        if table is not None and table not in TABLES:
            raise UnknownName(f"table {table!r} is unknown{nearest(table, TABLES)}")
        return self._cold.snapshots(table)

    def status(self) -> dict[str, Any]:
        """Return what the tiers hold: per cold table its watermark and snapshot, per hot table rows and bytes."""
        cold = {}
        for name, table in TABLES.items():
            if table.cold:
                pin = self._cold.pin(name)
                cold[name] = {"watermark": dict(pin.watermark), "snapshot_id": pin.snapshot_id}
        open_hot = self._trusted()._hot
        hot = None if open_hot is None else {name: dict(counts) for name, counts in open_hot.statistics().items()}
        return {"hot": hot, "cold": cold}

    def _trusted(self) -> Engine:
        """Return this engine; while hot is doubted, one that shares all but hot and tail, and says why."""
        reason = self._doubt() if self._doubt is not None and self._hot is not None else ""
        if not reason:
            return self
        alone = copy.copy(self)
        alone._hot = alone._tail = None
        alone._closed_why = f" ({reason}; `k2 up` and `k2 ingest` make it anew)"
        return alone

    # --- a page, a table, a union

    def _wait_for_slot(self, deadline: Deadline) -> bool:
        with meters.waiting("query.concurrent"):
            return self._slots.acquire(timeout=deadline.left())

    @contextmanager
    def _slot(self, deadline: Deadline) -> Iterator[None]:
        if not self._slots.acquire(blocking=False) and not self._wait_for_slot(deadline):
            meters.acted("query.seconds")
            raise TimedOut(
                f"all {self._settings.concurrent} query slots were taken for {deadline.seconds:g} s: "
                "try again later, or raise query.concurrent"
            )
        self._taken += 1
        try:
            yield
        finally:
            self._taken -= 1
            self._slots.release()

    def _page(self, question: Question, deadline: Deadline) -> _Found:
        """Answer from the start, or from behind the row a cursor names."""
        if question.table is CANDLES:
            return self._candle_page(question, deadline)
        cursor = question.after
        if cursor is None or (question.start_ns is not None and cursor.time_ns < question.start_ns):
            return self._rows(question, deadline)
        # Rows of the cursor's own nanosecond are read whole, as the page before may have ended among them.
        time_ns = cursor.time_ns
        moment_end = time_ns + 1 if question.end_ns is None else min(time_ns + 1, question.end_ns)
        moment = replace(question, start_ns=time_ns, end_ns=moment_end, limit=0)
        same = behind(self._rows(moment, deadline).rows, cursor, question.table)
        rest = self._rows(replace(question, start_ns=time_ns + 1), deadline)
        rows = pa.concat_tables([shaped(part, question.table) for part in (same, rest.rows)])
        return replace(rest, rows=rows.slice(0, question.limit) if question.limit else rows)

    def _rows(self, question: Question, deadline: Deadline) -> _Found:
        """Return rows of a table that is not candles."""
        selection = question.selection()
        table = question.table
        if question.snapshot_id is not None:
            return self._cold_rows(table, selection, question.snapshot_id, deadline)
        if question.tier == COLD or not table.hot or (question.tier == ALL and self._hot is None):
            return self._cold_rows(table, selection, None, deadline)
        if question.tier == HOT:
            return self._hot_rows(table, selection, deadline)
        return self._union(table, selection, deadline)

    def _cold_rows(self, table: Table, selection: Selection, snapshot_id: int | None, deadline: Deadline) -> _Found:
        pin = self._cold.pin(table.name, snapshot_id=snapshot_id)
        rows = self._read_cold(pin, table, selection, deadline)
        return _Found(cut(table, [rows], selection), (COLD,), dict(pin.watermark), pin.snapshot_id)

    def _read_cold(self, pin: Pin, table: Table, selection: Selection, deadline: Deadline) -> pa.Table:
        if pin.snapshot_id is None:
            return arrow_schema(table).empty_table()
        known = self._pinned.get(pin, selection)
        if known is not None:
            return known
        rows = fitted(self._cold.read(pin, selection, timeout_seconds=deadline.left(), coded=True), table)
        return self._pinned.put(pin, selection, rows)

    def _hot_rows(self, table: Table, selection: Selection, deadline: Deadline) -> _Found:
        """Steps 1, 3 and 5 without cold: all that hot has, and what is on its way there."""
        hot = self._need_hot("tier 'hot'")
        flushed, fresh = self._snapshot(table)
        rows = hot.read(selection, end=flushed, timeout_seconds=deadline.left(), coded=True)
        parts = [fitted(rows, table), from_offsets(select(fresh, table, selection), flushed)]
        return _Found(cut(table, parts, selection), self._hot_tiers(), {})

    def _union(self, table: Table, selection: Selection, deadline: Deadline) -> _Found:
        """The steps described at the head of this module."""
        hot = self._need_hot("tier 'all'")
        flushed, fresh = self._snapshot(table)
        before = self._cold.pin(table.name).watermark
        rows = hot.read(selection, start=before, end=flushed, timeout_seconds=deadline.left(), coded=True)
        pin = self._cold.pin(table.name)
        fresh = from_offsets(select(fresh, table, selection), flushed)
        newer = [from_offsets(part, pin.watermark) for part in (fitted(rows, table), fresh)]
        narrowed = narrow(selection, table, newer)
        old = self._read_cold(pin, table, narrowed, deadline)
        return _Found(
            cut(table, [old, *newer], selection), (COLD, *self._hot_tiers()), dict(pin.watermark), pin.snapshot_id
        )

    def _snapshot(self, table: Table) -> tuple[Positions | None, pa.Table]:
        if self._tail is None:
            return None, arrow_schema(table).empty_table()
        flushed, rows = self._tail.snapshot(table.name)
        return flushed, rows

    def _hot_tiers(self) -> tuple[str, ...]:
        return (HOT,) if self._tail is None else (HOT, TAIL)

    def _need_hot(self, what: str) -> Hot:
        if self._hot is None:
            raise StoreDown(
                f"{what}: the hot tier is not open here{self._closed_why} "
                "(start the node with `k2 up`, or ask tier 'cold')"
            )
        return self._hot

    # --- candles

    def _candle_page(self, question: Question, deadline: Deadline) -> _Found:
        """Candles behind a cursor are cut from all of the range.

        Which kind is meant depends on the whole range, so the range must not shrink from page to page.
        """
        if question.after is None:
            return self._candles(question, deadline)
        found = self._candles(replace(question, after=None, limit=0, newest=False), deadline)
        rows = behind(found.rows, question.after, CANDLES)
        return replace(found, rows=rows.slice(0, question.limit) if question.limit else rows)

    def _candles(self, question: Question, deadline: Deadline) -> _Found:
        if question.snapshot_id is not None:
            found = self._snapshot_candles(question, deadline)
        elif question.logged_before_ns is not None:
            found = self._candles_from_rows(question, deadline)
        elif question.tier == COLD or (question.tier == ALL and self._hot is None):
            found = self._stored_candles(question, None, deadline)
        else:
            found = self._live_candles(question, deadline)
        rows = in_order(shaped(found.rows, CANDLES), CANDLES)
        return replace(found, rows=cut(CANDLES, [rows], question.selection()))

    def _stored_candles(self, question: Question, snapshot_id: int | None, deadline: Deadline) -> _Found:
        """Candles as cold keeps them: closed ones, in their highest revision."""
        pin = self._cold.pin(CANDLES.name, snapshot_id=snapshot_id)
        # The limit must not count other timeframes and kinds, which a selection cannot leave out.
        everything = msgspec.structs.replace(question.selection(), limit=0)
        rows = self._read_cold(pin, CANDLES, everything, deadline)
        rows = rows.filter(pc.equal(rows["timeframe"], question.timeframe))
        return _Found(_of_kind(rows, question.kind), (COLD,), dict(pin.watermark), pin.snapshot_id)

    def _snapshot_candles(self, question: Question, deadline: Deadline) -> _Found:
        """Candles made from the trades of a snapshot, or those kept, when it is one of the candles' own."""
        try:
            pin = self._cold.pin(TRADES.name, snapshot_id=question.snapshot_id)
        except UnknownName as error:
            try:
                return self._stored_candles(question, question.snapshot_id, deadline)
            except UnknownName:
                raise error from None
        everything = msgspec.structs.replace(question.selection(), limit=0)
        kind = None if question.kind == AUTO else question.kind
        rows = self._made_candles(pin, question.timeframe, everything, kind, deadline)
        return _Found(_of_kind(rows, question.kind), (COLD,), dict(pin.watermark), pin.snapshot_id)

    def _made_candles(
        self, pin: Pin, timeframe: str, selection: Selection, kind: str | None, deadline: Deadline
    ) -> pa.Table:
        if pin.snapshot_id is None:
            return PARTIAL_SCHEMA.empty_table()
        known = self._pinned.get(pin, selection, timeframe, kind or AUTO)
        if known is not None:
            return known
        rows = self._cold.candles_from_trades(pin, timeframe, selection, kind=kind, timeout_seconds=deadline.left())
        return self._pinned.put(pin, selection, rows, timeframe, kind or AUTO)

    def _candles_from_rows(self, question: Question, deadline: Deadline) -> _Found:
        """Candles from the trades that were known at a time."""
        trades = self._rows(_trades_of(question), deadline)
        rows = from_trades(shaped(trades.rows, TRADES), question.timeframe)
        return replace(trades, rows=_of_kind(rows, question.kind))

    def _live_candles(self, question: Question, deadline: Deadline) -> _Found:
        """Candles of hot with the trades of the tail merged in; hot keeps its candles for ever."""
        hot = self._need_hot("candles")
        flushed, fresh = self._snapshot(TRADES)
        fresh = from_offsets(select(fresh, TRADES, _trades_of(question).selection()), flushed)
        fresh = fresh.filter(pc.invert(fresh["off_market"]))
        if question.exchange is not None and question.symbol is not None:
            pairs = {(question.exchange, question.symbol)}
        else:
            pairs = {pair for pair in {*hot.symbols(), *_pairs_in(fresh)} if _asked(question, pair)}
        parts = [self._one_pair(hot, question, pair, fresh, deadline) for pair in sorted(pairs)]
        rows = pa.concat_tables(parts) if parts else PARTIAL_SCHEMA.empty_table()
        return _Found(rows, self._hot_tiers(), {})

    def _one_pair(
        self, hot: Hot, question: Question, pair: tuple[str, str], fresh: pa.Table, deadline: Deadline
    ) -> pa.Table:
        """Return the candles of one symbol at one exchange, of single trades if there are any."""
        one = replace(question, exchange=pair[0], symbol=pair[1])
        kinds = (TRADE, AGGREGATE) if question.kind == AUTO else (question.kind,)
        for kind in kinds:
            mine = pc.and_(pc.equal(fresh["exchange"], pair[0]), pc.equal(fresh["symbol"], pair[1]))
            rows = self._pair_candles(
                hot, one, kind, fresh.filter(pc.and_(mine, pc.equal(fresh["kind"], kind))), deadline
            )
            if rows.num_rows:
                return rows
        return PARTIAL_SCHEMA.empty_table()

    def _pair_candles(self, hot: Hot, question: Question, kind: str, fresh: pa.Table, deadline: Deadline) -> pa.Table:
        """Return hot's candles with the trades of the tail snapshot that are not in them yet merged in.

        A flush may run between the snapshot and this read, so a candle of hot may already hold some
        of the fresh trades: those up to its `last_offset`. A bucket's trades are of one exchange, hence
        of one partition, and of one UTC day, hence a flush adds all of them in one insert.
        """
        selection = msgspec.structs.replace(question.selection(), logged_before_ns=None)
        stored = hot.candles(question.timeframe, selection, kind=kind, timeout_seconds=deadline.left())
        candles = stored.select(PARTIAL_SCHEMA.names).cast(PARTIAL_SCHEMA)
        if fresh.num_rows == 0:
            return candles
        starts = bucket_starts(fresh["exchange_ns"], question.timeframe)
        known = dict(zip(stored["start_ns"].to_pylist(), stored["last_offset"].to_pylist(), strict=True))
        done = pa.chunked_array([pa.array((known.get(s, -1) for s in starts.to_pylist()), pa.int64())])
        return merge(candles, from_trades(fresh.filter(pc.greater(fresh["log_offset"], done)), question.timeframe))

    # --- names

    def _check_names(self, question: Question, deadline: Deadline) -> None:
        """Tell an empty time range from a symbol or exchange nobody has heard of."""
        if "symbol" not in question.table.column_names or (question.symbol is None and question.exchange is None):
            return
        # In cold names stay for ever; what was found in an older snapshot spares reading the newest one.
        known = {*self._live_pairs(), *(pair for names in self._cold_names.values() for pair in names.pairs)}
        if any(_asked(question, pair) for pair in known):
            return
        pairs = self._pairs(deadline)
        if any(_asked(question, pair) for pair in pairs):
            return
        exchanges = {exchange for exchange, _ in pairs}
        if question.exchange is not None and question.exchange not in exchanges:
            raise UnknownName(f"exchange {question.exchange!r} has no data here{nearest(question.exchange, exchanges)}")
        symbols = {symbol for exchange, symbol in pairs if question.exchange in (None, exchange)}
        where = f" of {question.exchange}" if question.exchange else ""
        raise UnknownName(
            f"symbol {question.symbol!r}{where} has no data here{nearest(question.symbol or '', symbols)}"
        )

    def _pairs(self, deadline: Deadline) -> set[tuple[str, str]]:
        return self._live_pairs().union(*(self._cold_pairs(table.name, deadline) for table in (TRADES, QUOTES)))

    def _live_pairs(self) -> set[tuple[str, str]]:
        pairs = set() if self._hot is None else set(self._hot.symbols())
        return pairs.union(*(_pairs_in(self._snapshot(table)[1]) for table in (TRADES, QUOTES)))

    def _cold_pairs(self, table: str, deadline: Deadline) -> frozenset[tuple[str, str]]:
        """Return the pairs in a cold table; all its rows are read for them, once per snapshot."""
        snapshot_id = self._cold.pin(table).snapshot_id
        if snapshot_id is None:
            return frozenset()
        names = self._cold_names.get(table)
        if names is None or names.snapshot_id != snapshot_id:
            query = f"SELECT DISTINCT exchange, symbol FROM {table}"  # noqa: S608 - a table of ours
            found = self._cold.sql(query, timeout_seconds=deadline.left(), limit=_MOST_SYMBOLS)
            names = self._cold_names[table] = _Names(snapshot_id, frozenset(_pairs_in(found)))
        return names.pairs

    def _note(self, question: Question) -> str:
        if self._hot is None and question.tier == ALL and question.snapshot_id is None and question.table.hot:
            return f"the hot tier is not open here{self._closed_why}: rows not yet moved to the cold tier are missing"
        return ""


def _asked(question: Question, pair: tuple[str, str]) -> bool:
    return question.exchange in (None, pair[0]) and question.symbol in (None, pair[1])


def _pairs_in(rows: pa.Table) -> set[tuple[str, str]]:
    # Not by `group_by`, which takes longer to start its threads than this takes in all.
    joined = pc.unique(pc.binary_join_element_wise(rows["exchange"], rows["symbol"], "\n"))
    return {(pair[0], pair[2]) for pair in (text.partition("\n") for text in joined.to_pylist())}


def _trades_of(question: Question) -> Question:
    """Turn a question for candles into the one for the trades those candles are made of."""
    start_ns, end_ns = trade_bounds(question.timeframe, question.start_ns, question.end_ns)
    return replace(
        question,
        table=TRADES,
        start_ns=start_ns,
        end_ns=end_ns,
        limit=0,
        newest=False,
        timeframe="",
        kind=AUTO,
        after=None,
    )


def _of_kind(candles: pa.Table, kind: str) -> pa.Table:
    """Keep one kind; `auto`: aggregates only where a symbol has no candle of single trades."""
    if kind != AUTO:
        return candles.filter(pc.equal(candles["kind"], kind))
    pair = pc.binary_join_element_wise(candles["exchange"], candles["symbol"], "\n")
    single = pc.equal(candles["kind"], TRADE)
    with_single = pc.is_in(pair, value_set=pc.unique(pair.filter(single)))
    return candles.filter(pc.or_(single, pc.invert(with_single)))


def _next_cursor(question: Question, rows: pa.Table) -> str | None:
    if not question.limit or question.newest or rows.num_rows < question.limit:
        return None
    return Cursor.behind(question.table, rows.slice(rows.num_rows - 1).to_pylist()[0]).encode()
