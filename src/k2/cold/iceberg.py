"""The cold port on Apache Iceberg: pyiceberg writes, DuckDB reads, progress is part of each commit."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
from pyiceberg.exceptions import CommitFailedException, ValidationException
from pyiceberg.table import Table as IcebergTable
from pyiceberg.table.snapshots import Snapshot as IcebergSnapshot

from k2 import crash
from k2.cold.base import Maintenance, Pin, Snapshot
from k2.cold.catalog import Catalog, State, reported, table_properties, to_json, vector
from k2.cold.commit import COMMIT, END, OPERATION, RESERVED, START, AssertCommit, LeanTransaction
from k2.cold.lease import Lease
from k2.cold.maintenance import maintain
from k2.cold.reader import Reader
from k2.cold.rows import arranged, check_offsets, check_successor, cold_table, with_revision
from k2.errors import NotSuccessor, Rejected, UnknownName
from k2.model import Positions, Selection
from k2.schema import CANDLES, TABLES
from k2.settings import Settings


class IcebergCold:
    """Cold tables in Iceberg under one folder. Any thread may call it; commits to one table take turns."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.folder = settings.data_path / "cold"
        self.catalog = Catalog(self.folder, settings.cold.file_bytes)
        self.lease = Lease(self.folder / "writer.lock", "write to cold")
        self.reader = Reader(self.folder, settings.query.memory_bytes, settings.query.concurrent)
        self.commit_locks: Mapping[str, threading.RLock] = {
            name: threading.RLock() for name, t in TABLES.items() if t.cold
        }

    def acquire_lease(self) -> None:
        """Become the one writer. See `Cold.acquire_lease`.

        Raises Misconfigured when the data folder was moved.
        """
        self.catalog.check_place()
        self.lease.acquire()

    def pin(self, table: str, *, snapshot_id: int | None = None) -> Pin:
        """Return the current state of a table, or the one of a snapshot. See `Cold.pin`."""
        cold_table(table)
        state = self.catalog.state(table)
        if snapshot_id is not None:
            return _snapshot_pin(table, state, snapshot_id)
        if state is None or not state.commit:
            return Pin(table, "", None, 0, {})
        return Pin(
            table,
            state.location,
            state.metadata.current_snapshot_id,
            state.metadata.last_updated_ms * 1_000_000,
            state.watermark,
        )

    def append(
        self, table: str, rows: pa.Table, *, start: Positions, end: Positions, properties: dict[str, str] | None = None
    ) -> Pin:
        """Commit rows and progress in one atomic step. See `Cold.append`. Takes the lease when it is not held yet."""
        declared = cold_table(table)
        own = RESERVED & set(properties or {})
        if own:
            raise Rejected(
                f"append to cold table {table!r}: properties {', '.join(sorted(own))} are kept by cold itself"
            )
        self.lease.acquire()
        with self.commit_locks[table], reported(f"append {rows.num_rows} rows to cold table {table!r}"):
            loaded = self.catalog.load_or_create(declared)
            state = State(loaded.metadata_location, loaded.metadata)
            check_successor(table, state.watermark, start, end)
            check_offsets(rows, declared, start, end)
            marks = {
                START: to_json({p: start.get(p, 0) for p in end}),
                END: to_json({**state.watermark, **end}),
                COMMIT: str(state.commit + 1),
            }
            if table == CANDLES.name:
                rows = with_revision(rows, state.commit + 1)
            _commit(loaded, table, arranged(rows, declared), state.commit, marks, properties or {})
            crash.point("cold.append.committed")
        return self.pin(table)

    def properties(self, table: str) -> dict[str, str]:
        """Return what was last stored through `append(properties=...)`."""
        cold_table(table)
        state = self.catalog.state(table)
        own = RESERVED | set(table_properties(0))
        return {k: v for k, v in state.metadata.properties.items() if k not in own} if state else {}

    def read(self, pin: Pin, selection: Selection, *, timeout_seconds: float | None = None) -> pa.Table:
        """Return rows of the pinned state. See `Cold.read`."""
        return self.reader.read(self._readable(pin), selection, timeout_seconds)

    def candles_from_trades(
        self,
        pin: Pin,
        timeframe: str,
        selection: Selection,
        *,
        kind: str | None = None,
        timeout_seconds: float | None = None,
    ) -> pa.Table:
        """Compute candles from the trades of a pinned state. See `Cold.candles_from_trades`."""
        return self.reader.candles(self._readable(pin), timeframe, selection, kind, timeout_seconds)

    def sql(self, query: str, *, timeout_seconds: float, limit: int) -> pa.Table:
        """Run one read-only SELECT over the current tables. See `Cold.sql`."""
        return self.reader.sql(query, {name: self.pin(name) for name in self.commit_locks}, timeout_seconds, limit)

    def snapshots(self, table: str | None = None) -> list[Snapshot]:
        """Return the retained commits, oldest first. See `Cold.snapshots`."""
        names = [cold_table(table).name] if table else list(self.commit_locks)
        found: list[Snapshot] = []
        for name in names:
            state = self.catalog.state(name)
            found += [_snapshot(name, s) for s in state.metadata.snapshots] if state else []
        return sorted(found, key=lambda s: s.committed_ns)

    def snapshot_at(self, table: str, time_ns: int) -> int | None:
        """Return the id of the last snapshot committed at or before a time (milliseconds count), or None."""
        before = [s for s in self.snapshots(table) if s.committed_ns <= time_ns]
        return before[-1].snapshot_id if before else None

    def maintain(self, *, now_ns: int) -> list[Maintenance]:
        """Compact, expire, remove orphans. See `Cold.maintain` and `k2.cold.maintenance`."""
        return maintain(self, self._settings.cold, now_ns)

    def close(self) -> None:
        """Give the lease back and release everything."""
        self.reader.close()
        self.catalog.close()
        self.lease.release()

    def _readable(self, pin: Pin) -> Pin:
        """Point a pin whose metadata file was cleaned up at the newest one, which still holds its snapshot."""
        if not pin.location or Path(pin.location).is_file():
            return pin
        state = self.catalog.state(pin.table)
        kept = {s.snapshot_id for s in state.metadata.snapshots} if state else set()
        if state is None or (pin.snapshot_id is not None and pin.snapshot_id not in kept):
            raise UnknownName(
                f"read cold table {pin.table!r}: snapshot {pin.snapshot_id} is not retained any more; pin again"
            )
        return Pin(pin.table, state.location, pin.snapshot_id, pin.committed_ns, pin.watermark)


def _commit(
    loaded: IcebergTable, table: str, rows: pa.Table, base: int, marks: dict[str, str], properties: dict[str, str]
) -> None:
    try:
        with LeanTransaction(loaded) as transaction:
            AssertCommit(commit=base).guard(transaction)
            if rows.num_rows:
                transaction.append(rows, snapshot_properties={**marks, OPERATION: "append"})
            transaction.set_properties({**properties, **marks})
    except (CommitFailedException, ValidationException) as error:
        raise NotSuccessor(
            f"append to cold table {table!r}: another commit came between, nothing was committed ({error}); "
            "pin again and decide"
        ) from error


def _snapshot_pin(table: str, state: State | None, snapshot_id: int) -> Pin:
    snapshot = state.metadata.snapshot_by_id(snapshot_id) if state else None
    if state is None or snapshot is None:
        raise UnknownName(
            f"cold table {table!r} has no snapshot {snapshot_id} (any more); `k2 snapshots` lists the retained ones"
        )
    return Pin(table, state.location, snapshot_id, snapshot.timestamp_ms * 1_000_000, vector(_summary(snapshot)[END]))


def _summary(snapshot: IcebergSnapshot) -> dict[str, str]:
    facts = dict(snapshot.summary.additional_properties) if snapshot.summary else {}
    return {START: "{}", END: "{}", OPERATION: "append", **facts}


def _snapshot(table: str, snapshot: IcebergSnapshot) -> Snapshot:
    facts = _summary(snapshot)
    return Snapshot(
        table=table,
        snapshot_id=snapshot.snapshot_id,
        committed_ns=snapshot.timestamp_ms * 1_000_000,
        operation=facts[OPERATION],
        rows_added=int(facts.get("added-records", 0)) if facts[OPERATION] == "append" else 0,
        rows_total=int(facts.get("total-records", 0)),
        files_total=int(facts.get("total-data-files", 0)),
        bytes_total=int(facts.get("total-files-size", 0)),
        start=vector(facts[START]),
        end=vector(facts[END]),
    )
