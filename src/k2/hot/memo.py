"""Answers of the hot tier kept in memory, exact for as long as every write goes through this process.

The embedded engine has one owner, and a question costs it 10 to 25 ms however few rows it brings. The
process that owns the folder sees every change of it, so it can keep what was asked and knows what to
ask again. Two kinds of question are kept: the candles of one symbol, and its newest rows.

Why an answer is never older than the writes that ended before it was asked:

* What a question needs is registered before the engine is asked for it, so a write that ends while
  the engine works finds it, and marks it: candles are asked for again from the first bucket that was
  touched, newest rows get the rows written, told apart by their place in the log.
* A write marks before it returns, and what it marked stays marked until the engine has been asked
  after that. A write that fails leaves nothing that was kept: what it stored is unknown.
* A write that is under way may be seen or not, as without this; a bucket's trades are all of one write.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from k2 import meters
from k2.errors import TimedOut
from k2.hot.rows import KEYED_CANDLE_SCHEMA
from k2.model import Positions, Selection
from k2.schema import TABLES, TIMEFRAMES, TRADES, Table

MAX_BYTES = 64 << 20
"""Most bytes of rows kept for one folder; the answers not asked for the longest make room."""

MAX_EXTENTS = 10_000
"""Most symbols whose first and last day are kept; they are asked for again."""

NEWEST_ROWS = 1_000
"""Newest rows kept of one symbol; a question for more goes to the engine."""

PENDING_ROWS = 50_000
"""Rows of one symbol written while its newest rows are being asked for; with more the answer is not kept."""

ENTRY_BYTES = 16 << 10
"""What an entry counts for beside its rows, so that there is a limit to empty ones too."""

BLOCK_BUCKETS = 1_440
"""Candles are kept in blocks of so many buckets: a day of 1m. Whole days in each timeframe."""

MAX_BLOCKS = 32
"""A question for candles of more blocks goes to the engine."""

_DAY_NS = TIMEFRAMES["1d"]

Key = tuple[str, ...]


@dataclass
class _Block:
    """The candles of one symbol, kind and timeframe in one stretch of time; stale from `dirty_ns` on."""

    timeframe: str
    symbol: Key
    start_ns: int
    dirty_ns: int | None
    rows: pa.Table = field(default_factory=KEYED_CANDLE_SCHEMA.empty_table)
    asking: threading.Lock = field(default_factory=threading.Lock)

    def stale_from(self, time_ns: int) -> None:
        """Mark the buckets from this one on."""
        self.dirty_ns = time_ns if self.dirty_ns is None else min(time_ns, self.dirty_ns)

    @property
    def size_bytes(self) -> int:
        return int(self.rows.nbytes) + ENTRY_BYTES


@dataclass
class _Newest:
    """The newest rows of one symbol at or above the offsets `floor`; all there are, if `whole`.

    `rows` is None until they were asked for; `pending` was written meanwhile and since.
    """

    floor: dict[str, int]
    rows: pa.Table | None = None
    whole: bool = False
    pending: list[pa.Table] = field(default_factory=list)

    @property
    def size_bytes(self) -> int:
        return ENTRY_BYTES + (int(self.rows.nbytes) if self.rows is not None else 0)


E = TypeVar("E", _Block, _Newest)


class _Kept(Generic[E]):
    """Entries by key, the one longest not used first; callers hold the lock."""

    def __init__(self) -> None:
        self.entries: OrderedDict[Key, E] = OrderedDict()

    def get(self, key: Key) -> E | None:
        entry = self.entries.get(key)
        if entry is not None:
            self.entries.move_to_end(key)
        return entry

    @property
    def size_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self.entries.values())

    def trim(self, most_bytes: int) -> None:
        held = self.size_bytes
        while held > most_bytes and self.entries:
            held -= self.entries.popitem(last=False)[1].size_bytes
            meters.acted("hot.memo")


class Ask(Protocol):
    """How the memo asks the engine for what it does not have."""

    seconds: float | None
    """Time limit of each question."""

    def candles(self, timeframe: str, symbol: Key, start_ns: int | None, end_ns: int | None) -> pa.Table:
        """Return the candles of one (exchange, symbol, kind)."""

    def newest(self, table: Table, exchange: str, symbol: str, start: Positions, count: int) -> pa.Table:
        """Return the newest rows at or above `start`; of all exchanges if it is empty."""


class Memo:
    """What one open folder was asked lately. Any thread may ask; the writer tells what it wrote."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes // 2
        self._lock = threading.Lock()
        self._blocks: _Kept[_Block] = _Kept()
        self._newest: _Kept[_Newest] = _Kept()
        self._extents: dict[Key, tuple[int, int] | None] = {}
        self._names: frozenset[tuple[str, str]] | None = None
        self._changes = 0
        meters.watch("hot.memo", self, lambda memo: memo.size_bytes)

    @property
    def size_bytes(self) -> int:
        """Bytes held at the moment, entries counted with `ENTRY_BYTES`."""
        with self._lock:
            return self._blocks.size_bytes + self._newest.size_bytes

    # -- what changed ------------------------------------------------------------------

    def clear(self) -> None:
        """Forget everything: what the folder holds now is unknown, or known to be something else."""
        with self._lock:
            self._changes += 1
            self._blocks.entries.clear()
            self._newest.entries.clear()
            self._extents.clear()
            self._names = None

    def deleted(self) -> None:
        """Note that rows were deleted; candles and names stay."""
        with self._lock:
            self._changes += 1
            self._newest.entries.clear()

    def wrote(self, table: Table, rows: pa.Table) -> None:
        """Note rows that were stored just now; called before the write returns."""
        if rows.num_rows == 0 or "symbol" not in table.column_names:
            return
        if table is TRADES and pc.min(rows["exchange_ns"]).as_py() < 0:
            self.clear()  # days and buckets are counted from 1970 here
            return
        pairs = rows.group_by(["exchange", "symbol"]).aggregate([])
        named = set(zip(pairs["exchange"].to_pylist(), pairs["symbol"].to_pylist(), strict=True))
        touched = _touched(rows) if table is TRADES else {}
        with self._lock:
            self._changes += 1
            if self._names is not None and not named <= self._names:
                self._names = None
            self._touch(touched)
            symbols = {("", symbol) for _, symbol in named}
            asked = [key for key in self._newest.entries if key[0] == table.name and key[1:] in named | symbols]
        # What is registered from here on is asked of an engine that has these rows already.
        parts = [(key, _of_pair(rows, *key[1:])) for key in asked]
        with self._lock:
            for key, part in parts:
                self._append(key, part)

    def _touch(self, touched: dict[Key, list[int]]) -> None:
        """Mark candles: per symbol and kind, the first time touched of each day."""
        for key, times in touched.items():
            if key in self._extents:
                self._extents[key] = _widened(self._extents[key], times)
        for block in self._blocks.entries.values():
            end_ns = block.start_ns + _block_ns(block.timeframe)
            inside = [t for t in touched.get(block.symbol, ()) if block.start_ns <= t < end_ns]
            if inside:
                block.stale_from(_bucket(min(inside), block.timeframe))

    def _append(self, key: Key, rows: pa.Table) -> None:
        entry = self._newest.entries.get(key)
        if entry is None:
            return
        entry.pending.append(rows)
        if entry.rows is not None:
            if sum(part.num_rows for part in entry.pending) > NEWEST_ROWS:
                _settle(entry, key[0])
        elif sum(part.num_rows for part in entry.pending) > PENDING_ROWS:
            del self._newest.entries[key]
            meters.acted("hot.memo_pending")

    # -- names -------------------------------------------------------------------------

    def names(self, read: Callable[[], list[tuple[str, str]]]) -> list[tuple[str, str]]:
        """Return the (exchange, symbol) pairs; asked for again when a new one was written."""
        with self._lock:
            if self._names is not None:
                return sorted(self._names)
            before = self._changes
        found = read()
        with self._lock:
            if self._changes == before:
                self._names = frozenset(found)
        return found

    # -- candles -----------------------------------------------------------------------

    def candles(self, timeframe: str, selection: Selection, kind: str, ask: Ask) -> pa.Table | None:
        """Return the candles of one exchange's symbol and kind; None: ask the engine, too much is asked for."""
        assert selection.exchange is not None
        assert selection.symbol is not None
        symbol = (selection.exchange, selection.symbol, kind)
        extent = self._extent(symbol, ask)
        if extent is None:
            return KEYED_CANDLE_SCHEMA.empty_table()
        start_ns = extent[0] if selection.start_ns is None else max(extent[0], selection.start_ns)
        end_ns = extent[1] if selection.end_ns is None else min(extent[1], selection.end_ns)
        starts = range(start_ns - start_ns % _block_ns(timeframe), end_ns, _block_ns(timeframe))
        if len(starts) > MAX_BLOCKS:
            meters.acted("hot.memo_blocks")
            return None
        parts: list[pa.Table] = []
        for block_ns in reversed(starts) if selection.newest else starts:
            parts.append(_between(self._block(symbol, timeframe, block_ns, ask), start_ns, end_ns))
            if selection.limit and sum(part.num_rows for part in parts) >= selection.limit:
                break
        return _limited(parts[::-1] if selection.newest else parts, selection)

    def _extent(self, symbol: Key, ask: Ask) -> tuple[int, int] | None:
        """Return bounds of the time of a symbol's candles, whole days; None where there are none."""
        with self._lock:
            if symbol in self._extents:
                return self._extents[symbol]
            before = self._changes
        days = ask.candles("1d", symbol, None, None)["start_ns"]
        extent = (days[0].as_py(), days[-1].as_py() + _DAY_NS) if len(days) else None
        with self._lock:
            if self._changes == before:
                if len(self._extents) >= MAX_EXTENTS:
                    self._extents.clear()
                    meters.acted("hot.memo_extents")
                self._extents[symbol] = extent
        return extent

    def _block(self, symbol: Key, timeframe: str, start_ns: int, ask: Ask) -> pa.Table:
        """Return the candles of one block, asked for from the first stale bucket on, by one caller at a time."""
        key = (*symbol, timeframe, str(start_ns))
        with self._lock:
            block = self._blocks.get(key)
            if block is None:
                block = self._blocks.entries[key] = _Block(timeframe, symbol, start_ns, dirty_ns=start_ns)
        if not block.asking.acquire(timeout=-1 if ask.seconds is None else ask.seconds):
            raise TimedOut(f"hot: {ask.seconds:g} s passed waiting for the same candles to be read; ask again")
        try:
            return self._fresh(block, ask)
        finally:
            block.asking.release()

    def _fresh(self, block: _Block, ask: Ask) -> pa.Table:
        with self._lock:
            dirty_ns, block.dirty_ns = block.dirty_ns, None
        if dirty_ns is None:
            return block.rows
        try:
            rows = ask.candles(block.timeframe, block.symbol, dirty_ns, block.start_ns + _block_ns(block.timeframe))
        except BaseException:
            with self._lock:
                block.stale_from(dirty_ns)
            raise
        clean = _between(block.rows, block.start_ns, dirty_ns)
        block.rows = pa.concat_tables([clean, rows]).combine_chunks() if clean.num_rows else rows
        with self._lock:
            self._blocks.trim(self._max_bytes)
        return block.rows

    # -- newest rows -------------------------------------------------------------------

    def newest(
        self, table: Table, selection: Selection, start: Positions | None, end: Positions | None, ask: Ask
    ) -> pa.Table | None:
        """Return the newest rows of a symbol, of one exchange or all, from `start` to `end`; None: ask the engine."""
        assert selection.symbol is not None
        key = (table.name, selection.exchange or "", selection.symbol)
        floor = dict(start or {})
        held = self._held(key, floor)
        if held is not None:
            rows = _cut(held[0], floor, end)
            if held[1] or rows.num_rows >= selection.limit:
                return rows.slice(max(0, rows.num_rows - selection.limit))
        rows, whole = self._ask_newest(key, table, floor, ask)
        rows = _cut(rows, floor, end)
        if whole or rows.num_rows >= selection.limit:
            return rows.slice(max(0, rows.num_rows - selection.limit))
        return None

    def _held(self, key: Key, floor: Positions) -> tuple[pa.Table, bool] | None:
        """Return the rows kept of a symbol, and whether they are all; what was written since is put in now."""
        with self._lock:
            entry = self._newest.get(key)
            if entry is None or entry.rows is None or any(floor.get(p, 0) < o for p, o in entry.floor.items()):
                return None
            if entry.pending:
                _settle(entry, key[0])
            return entry.rows, entry.whole

    def _ask_newest(self, key: Key, table: Table, floor: dict[str, int], ask: Ask) -> tuple[pa.Table, bool]:
        entry = _Newest(floor)
        with self._lock:
            self._newest.entries[key] = entry
        found = ask.newest(table, key[1], key[2], floor, NEWEST_ROWS)
        with self._lock:
            entry.rows, entry.whole = found, found.num_rows < NEWEST_ROWS
            _settle(entry, table.name)
            self._newest.trim(self._max_bytes)
            return entry.rows, entry.whole


def _settle(entry: _Newest, table: str) -> None:
    """Put what was written into the newest rows kept, each row once."""
    assert entry.rows is not None
    declared = TABLES[table]
    written = [_cut(part, entry.floor, None) for part in entry.pending]
    entry.pending = []
    parts = [part for part in written if part.num_rows]
    if not parts:
        return
    time = declared.time_column
    order = [(name, "ascending") for name in (time, *(c for c in declared.sort if c != time), "log_partition")]
    rows = pa.concat_tables([entry.rows, *parts]).sort_by(order).combine_chunks()
    rows = rows.filter(_first_of_each(rows))
    # Not all are kept: then those kept are as many as may be, and what is older than the oldest is cut off again.
    if rows.num_rows > NEWEST_ROWS:
        entry.whole = False
        rows = rows.slice(rows.num_rows - NEWEST_ROWS)
    entry.rows = rows.combine_chunks()


def _first_of_each(rows: pa.Table) -> pa.Array:
    """Tell which rows have another place in the log than the row before; equal ones are neighbours when sorted."""
    same = pa.array([True] * (rows.num_rows - 1), pa.bool_())
    for name in ("log_partition", "log_offset", "row_in_frame"):
        column = rows[name].combine_chunks()
        same = pc.and_(same, pc.equal(column.slice(1), column.slice(0, rows.num_rows - 1)))
    return pa.concat_arrays([pa.array([True]), pc.invert(same)])


def _cut(rows: pa.Table, start: Positions, end: Positions | None) -> pa.Table:
    """Keep the rows of start[p] <= log_offset < end[p]; a partition that is not named has no bound."""
    for bounds, outside in ((start, pc.less), (end or {}, pc.greater_equal)):
        for partition, offset in bounds.items():
            if rows.num_rows:
                out = pc.and_(pc.equal(rows["log_partition"], partition), outside(rows["log_offset"], offset))
                rows = rows.filter(pc.invert(out))
    return rows


def _between(candles: pa.Table, start_ns: int, end_ns: int) -> pa.Table:
    """Keep the candles of start_ns <= start < end_ns; they are sorted."""
    if candles.num_rows == 0:
        return candles
    times = candles["start_ns"]
    if times[0].as_py() >= start_ns and times[-1].as_py() < end_ns:
        return candles
    inside = pc.and_(pc.greater_equal(times, start_ns), pc.less(times, end_ns))
    return candles.filter(inside)


def _limited(parts: list[pa.Table], selection: Selection) -> pa.Table:
    rows = pa.concat_tables(parts) if parts else KEYED_CANDLE_SCHEMA.empty_table()
    if not selection.limit or rows.num_rows <= selection.limit:
        return rows
    return rows.slice(rows.num_rows - selection.limit if selection.newest else 0, selection.limit)


def _block_ns(timeframe: str) -> int:
    return BLOCK_BUCKETS * TIMEFRAMES[timeframe]


def _bucket(time_ns: int, timeframe: str) -> int:
    return time_ns // TIMEFRAMES[timeframe] * TIMEFRAMES[timeframe]


def _widened(extent: tuple[int, int] | None, times_ns: list[int]) -> tuple[int, int]:
    first, last = _bucket(min(times_ns), "1d"), _bucket(max(times_ns), "1d") + _DAY_NS
    return (first, last) if extent is None else (min(extent[0], first), max(extent[1], last))


def _touched(trades: pa.Table) -> dict[Key, list[int]]:
    """Return per (exchange, symbol, kind) the first time of each day with trades."""
    days = trades.append_column("day", pc.divide(trades["exchange_ns"], _DAY_NS))
    groups = days.group_by(["exchange", "symbol", "kind", "day"]).aggregate([("exchange_ns", "min")])
    touched: dict[Key, list[int]] = {}
    columns = (groups[name].to_pylist() for name in ("exchange", "symbol", "kind", "exchange_ns_min"))
    for exchange, symbol, kind, time_ns in zip(*columns, strict=True):
        touched.setdefault((exchange, symbol, kind), []).append(time_ns)
    return touched


def _of_pair(rows: pa.Table, exchange: str, symbol: str) -> pa.Table:
    mine = pc.equal(rows["symbol"], symbol)
    return rows.filter(pc.and_(mine, pc.equal(rows["exchange"], exchange)) if exchange else mine)
