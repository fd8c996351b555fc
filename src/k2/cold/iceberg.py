"""The cold port on Apache Iceberg: pyiceberg writes, DuckDB reads, progress is part of each commit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import pyarrow as pa

from k2 import crash
from k2.cold.base import Maintenance, Pin, Snapshot
from k2.cold.grace import Grace
from k2.cold.lease import Lease
from k2.cold.metadata import (
    COMMIT,
    END,
    OPERATION,
    RESERVED,
    START,
    CatalogFile,
    SnapshotFacts,
    commit_number,
    home,
    table_properties,
    to_json,
    vector,
    watermark,
)
from k2.cold.pins import Pins
from k2.cold.reader import Reader
from k2.cold.rows import arranged, check_offsets, check_successor, cold_table, with_revision
from k2.errors import Rejected
from k2.model import Positions, Selection
from k2.schema import CANDLES, TABLES
from k2.settings import Settings

if TYPE_CHECKING:
    from pyiceberg.table import Table as IcebergTable

    from k2.cold.catalog import Catalog


SLACK = 4
"""Commits expire snapshots once there are a quarter more than `cold.keep_snapshots`; maintenance does it exactly."""


class IcebergCold:
    """Cold tables in Iceberg under one folder. Any thread may call it; commits to one table take turns.

    The library that writes (`catalog`, `maintenance`) takes a second to load, and is only loaded to write.
    """

    def __init__(self, settings: Settings, *, clock: Callable[[], int] = time.time_ns) -> None:
        self._settings = settings
        self._clock = clock
        self.folder = home(settings.data_path / "cold")
        self._file = CatalogFile(self.folder)
        self._catalog: Catalog | None = None
        self._catalog_lock = threading.Lock()
        self.grace = Grace(self.folder / "grace.db")
        self.pins = Pins(self._file, self.grace, settings.cold, clock)
        self.lease = Lease(self.folder / "writer.lock", "write to cold")
        self.reader = Reader(self.folder, settings.query.memory_bytes, settings.query.concurrent)
        self.commit_locks: Mapping[str, threading.RLock] = {
            name: threading.RLock() for name, t in TABLES.items() if t.cold
        }

    @property
    def catalog(self) -> Catalog:
        """The catalog, for writing."""
        from k2.cold.catalog import Catalog

        with self._catalog_lock:
            if self._catalog is None:
                self._catalog = Catalog(self.folder, self._settings.cold.file_bytes)
            return self._catalog

    def acquire_lease(self) -> None:
        """Become the one writer. See `Cold.acquire_lease`.

        Raises Misconfigured when the data folder was moved.
        """
        self._file.check_place()
        self.lease.acquire()

    def pin(self, table: str, *, snapshot_id: int | None = None) -> Pin:
        """Return the current state of a table, or the one of a snapshot. See `Cold.pin`."""
        cold_table(table)
        return self.pins.current(table) if snapshot_id is None else self.pins.of_snapshot(table, snapshot_id)

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
        from k2.cold.catalog import reported
        from k2.cold.commit import AssertCommit, commit

        self.lease.acquire()
        with self.commit_locks[table], reported(f"append {rows.num_rows} rows to cold table {table!r}"):
            loaded = self.catalog.load_or_create(declared)
            committed, base = watermark(loaded.properties), commit_number(loaded.properties)
            check_successor(table, committed, start, end)
            check_offsets(rows, declared, start, end)
            marks = {
                START: to_json({p: start.get(p, 0) for p in end}),
                END: to_json({**committed, **end}),
                COMMIT: str(base + 1),
            }
            if table == CANDLES.name:
                rows = with_revision(rows, base + 1)
            guard = AssertCommit.as_loaded(loaded, expiring=self._surplus(loaded, rows.num_rows))
            commit(loaded, declared, arranged(rows, declared), guard, marks, properties or {})
            crash.point("cold.append.committed")
        return self.pin(table)

    def properties(self, table: str) -> dict[str, str]:
        """Return what was last stored through `append(properties=...)`."""
        cold_table(table)
        state = self._file.state(table)
        own = RESERVED | set(table_properties(0))
        return {k: v for k, v in state.metadata.properties.items() if k not in own} if state else {}

    def read(
        self, pin: Pin, selection: Selection, *, timeout_seconds: float | None = None, coded: bool = False
    ) -> pa.Table:
        """Return rows of the pinned state. See `Cold.read`."""
        with self.pins.reading(pin):
            return self.reader.read(self.pins.readable(pin), selection, timeout_seconds, coded=coded)

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
        with self.pins.reading(pin):
            return self.reader.candles(self.pins.readable(pin), timeframe, selection, kind, timeout_seconds)

    def sql(self, query: str, *, timeout_seconds: float, limit: int) -> pa.Table:
        """Run one read-only SELECT over the current tables. See `Cold.sql`."""
        return self.reader.sql(query, {name: self.pin(name) for name in self.commit_locks}, timeout_seconds, limit)

    def snapshots(self, table: str | None = None) -> list[Snapshot]:
        """Return the retained commits, oldest first. See `Cold.snapshots`."""
        names = [cold_table(table).name] if table else list(self.commit_locks)
        found: list[Snapshot] = []
        for name in names:
            state = self._file.state(name)
            found += [_snapshot(name, s) for s in state.metadata.snapshots] if state else []
        return sorted(found, key=lambda s: s.committed_ns)

    def snapshot_at(self, table: str, time_ns: int) -> int | None:
        """Return the id of the last snapshot committed at or before a time (milliseconds count), or None."""
        before = [s for s in self.snapshots(table) if s.committed_ns <= time_ns]
        return before[-1].snapshot_id if before else None

    def maintain(self, *, now_ns: int) -> list[Maintenance]:
        """Compact, expire, remove orphans. See `Cold.maintain` and `k2.cold.maintenance`."""
        from k2.cold.maintenance import maintain

        return maintain(self, self._settings.cold, now_ns)

    def close(self) -> None:
        """Give the lease back and release everything."""
        self.reader.close()
        self._file.close()
        if self._catalog is not None:
            self._catalog.close()
        self.lease.release()

    def _surplus(self, loaded: IcebergTable, rows: int) -> tuple[int, ...]:
        """Choose the snapshots that expire with this commit, so that not even a long drain makes commits slow."""
        from k2.cold.commit import surplus

        keep = self._settings.cold.keep_snapshots
        if not rows or len(loaded.metadata.snapshots) < keep + max(1, keep // SLACK):
            return ()
        old = surplus(loaded.metadata, keep - 1)
        self.grace.expire(loaded.name()[-1], old, loaded.metadata_location, self._clock())
        return old


def _snapshot(table: str, snapshot: SnapshotFacts) -> Snapshot:
    facts = snapshot.facts
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
