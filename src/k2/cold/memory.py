"""The cold tier in memory: every promise of the port, gone with the process. For tests and trying things."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from k2.candles import PARTIAL_SCHEMA, make_candles, trade_bounds
from k2.cold.base import Maintenance, Pin, Snapshot
from k2.cold.reader import Reader
from k2.cold.rows import arranged, check_offsets, check_successor, cold_table, spelled, with_revision
from k2.errors import Rejected, UnknownName, nearest
from k2.model import Positions, Selection
from k2.schema import CANDLES, TABLES, TIMEFRAMES, TRADES, Table, arrow_schema

_MEMORY_BYTES = 1 << 30


@dataclass
class _Kept:
    """One table: the watermark and the rows after each commit."""

    pins: list[Pin] = field(default_factory=list)
    snapshots: list[Snapshot] = field(default_factory=list)
    rows: dict[int, pa.Table] = field(default_factory=dict)
    properties: dict[str, str] = field(default_factory=dict)


class MemoryCold:
    """Keeps every promise of `base.Cold` that does not need a disk; every snapshot is kept."""

    def __init__(self, *, clock: Callable[[], int] = time.time_ns) -> None:
        self._clock = clock
        self._lock = threading.RLock()
        self._kept = {name: _Kept() for name, table in TABLES.items() if table.cold}
        self._reader = Reader(Path(tempfile.gettempdir()) / "k2-memory-cold", _MEMORY_BYTES, 4)

    def acquire_lease(self) -> None:
        """Do nothing: nobody else can reach this memory."""

    def pin(self, table: str, *, snapshot_id: int | None = None) -> Pin:
        """Return the current state of a table, or the one of a snapshot. See `Cold.pin`."""
        with self._lock:
            kept = self._table(table)
            if snapshot_id is None:
                return kept.pins[-1] if kept.pins else Pin(table, "", None, 0, {})
            found = next((p for p in kept.pins if p.snapshot_id == snapshot_id), None)
            if found is None:
                raise UnknownName(f"cold table {table!r} has no snapshot {snapshot_id}")
            return found

    def append(
        self, table: str, rows: pa.Table, *, start: Positions, end: Positions, properties: dict[str, str] | None = None
    ) -> Pin:
        """Commit rows and progress in one atomic step. See `Cold.append`."""
        with self._lock:
            kept = self._table(table)
            before = self.pin(table)
            check_successor(table, before.watermark, start, end)
            check_offsets(rows, TABLES[table], start, end)
            number = len(kept.pins) + 1
            if table == CANDLES.name:
                rows = with_revision(rows, number)
            stored = spelled(arranged(rows, TABLES[table]), TABLES[table])
            committed_ns = max(self._clock(), before.committed_ns + 1)
            snapshot_id = number if stored.num_rows else before.snapshot_id
            watermark = {**before.watermark, **end}
            pin = Pin(table, f"memory:{table}/{number}", snapshot_id, committed_ns, watermark)
            if stored.num_rows:
                held = kept.rows.get(before.snapshot_id or 0, stored.slice(0, 0))
                kept.rows[number] = pa.concat_tables([held, stored])
                kept.snapshots.append(_snapshot(pin, stored, kept.rows[number], {p: start.get(p, 0) for p in end}))
            kept.pins.append(pin)
            kept.properties.update(properties or {})
            return pin

    def properties(self, table: str) -> dict[str, str]:
        """Return what was last stored through `append(properties=...)`."""
        with self._lock:
            return dict(self._table(table).properties)

    def read(
        self, pin: Pin, selection: Selection, *, timeout_seconds: float | None = None, coded: bool = False
    ) -> pa.Table:
        """Return rows of the pinned state. See `Cold.read`; it is quick, the time limit is not looked at."""
        table = TABLES[pin.table]
        rows = _selected(self._rows(pin), table, selection)
        if table is CANDLES:
            rows = _highest_revisions(rows)
        order = [table.time_column, *(c for c in table.sort if c != table.time_column)]
        return _cut(rows.sort_by([(c, "ascending") for c in order]), selection)

    def candles_from_trades(
        self,
        pin: Pin,
        timeframe: str,
        selection: Selection,
        *,
        kind: str | None = None,
        timeout_seconds: float | None = None,
    ) -> pa.Table:
        """Compute candles trade by trade. See `Cold.candles_from_trades`."""
        if timeframe not in TIMEFRAMES:
            raise UnknownName(f"candles: no timeframe {timeframe!r}{nearest(timeframe, TIMEFRAMES)}")
        start_ns, end_ns = trade_bounds(timeframe, selection.start_ns, selection.end_ns)
        bounded = msgspec.structs.replace(selection, table=TRADES.name, start_ns=start_ns, end_ns=end_ns)
        trades = _selected(self._rows(pin), TRADES, bounded).to_pylist()
        made = make_candles(timeframe, (trade for trade in trades if kind in (None, trade["kind"])))
        return _cut(pa.Table.from_pylist(made, schema=PARTIAL_SCHEMA), selection)

    def sql(self, query: str, *, timeout_seconds: float, limit: int) -> pa.Table:
        """Run one read-only SELECT over the current tables. See `Cold.sql`."""
        tables = {name: arranged(self._rows(self.pin(name)), TABLES[name]) for name in self._kept}
        return self._reader.sql(query, tables, timeout_seconds, limit)

    def snapshots(self, table: str | None = None) -> list[Snapshot]:
        """Return the retained commits, oldest first."""
        with self._lock:
            names = [table] if table else list(self._kept)
            return sorted((s for n in names for s in self._table(n).snapshots), key=lambda s: s.committed_ns)

    def snapshot_at(self, table: str, time_ns: int) -> int | None:
        """Return the id of the last snapshot committed at or before a time, or None."""
        before = [s.snapshot_id for s in self.snapshots(table) if s.committed_ns <= time_ns]
        return before[-1] if before else None

    def maintain(self, *, now_ns: int) -> list[Maintenance]:
        """Return what was done for each table with rows: nothing, there are no files."""
        with self._lock:
            return [Maintenance(name, 1, 1, 0, 0, 0) for name, kept in self._kept.items() if kept.snapshots]

    def close(self) -> None:
        """Release the SQL engine; the rows go with the object."""
        self._reader.close()

    def _table(self, name: str) -> _Kept:
        return self._kept[cold_table(name).name]

    def _rows(self, pin: Pin) -> pa.Table:
        with self._lock:
            empty = arrow_schema(TABLES[pin.table]).empty_table()
            return self._table(pin.table).rows.get(pin.snapshot_id or 0, empty)


def _snapshot(pin: Pin, added: pa.Table, total: pa.Table, start: Positions) -> Snapshot:
    assert pin.snapshot_id is not None
    return Snapshot(
        table=pin.table,
        snapshot_id=pin.snapshot_id,
        committed_ns=pin.committed_ns,
        operation="append",
        rows_added=added.num_rows,
        rows_total=total.num_rows,
        files_total=1,
        bytes_total=total.nbytes,
        start=start,
        end=pin.watermark,
    )


def _selected(rows: pa.Table, table: Table, selection: Selection) -> pa.Table:
    for column, wanted in (("exchange", selection.exchange), ("symbol", selection.symbol)):
        if wanted is not None:
            if column not in table.column_names:
                raise Rejected(f"read cold: table {table.name!r} has no column {column!r}; leave the {column} out")
            rows = rows.filter(pc.equal(rows[column], wanted))
    if selection.logged_before_ns is not None:
        if "logged_ns" not in table.column_names:
            raise Rejected(f"read cold: rows of {table.name!r} carry no logged_ns; compute them from trades instead")
        rows = rows.filter(pc.less(rows["logged_ns"], selection.logged_before_ns))
    if selection.start_ns is not None:
        rows = rows.filter(pc.greater_equal(rows[table.time_column], selection.start_ns))
    if selection.end_ns is not None:
        rows = rows.filter(pc.less(rows[table.time_column], selection.end_ns))
    return rows


def _highest_revisions(rows: pa.Table) -> pa.Table:
    best: dict[tuple[Any, ...], tuple[int, int]] = {}
    for at, row in enumerate(rows.select([*CANDLES.key, "revision"]).to_pylist()):
        key = tuple(row[name] for name in CANDLES.key)
        best[key] = max(best.get(key, (-1, -1)), (row["revision"], at))
    return rows.take(pa.array([at for _revision, at in best.values()], pa.int64()))


def _cut(rows: pa.Table, selection: Selection) -> pa.Table:
    if not selection.limit or rows.num_rows <= selection.limit:
        return rows
    return rows.slice(rows.num_rows - selection.limit if selection.newest else 0, selection.limit)
