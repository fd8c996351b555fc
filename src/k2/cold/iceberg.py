"""The cold port on Apache Iceberg: pyiceberg writes, DuckDB reads, progress is part of each commit.

Every commit carries, in the snapshot summary and in the table properties alike, the offset
range it moved (`k2.start`), the watermark after it (`k2.end`, JSON, all partitions) and its
number (`k2.commit`). The commit is accepted only while the table still has the number before
it, checked inside the catalog's own compare-and-swap: see `AssertCommit`.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
from pyiceberg.catalog.sql import IcebergTables, SqlCatalog
from pyiceberg.exceptions import (
    CommitFailedException,
    CommitStateUnknownException,
    NamespaceAlreadyExistsError,
    NoSuchTableError,
    TableAlreadyExistsError,
    ValidationException,
)
from pyiceberg.partitioning import PartitionField, PartitionSpec
from pyiceberg.schema import Schema
from pyiceberg.table import Table as IcebergTable
from pyiceberg.table.metadata import TableMetadata
from pyiceberg.table.snapshots import Snapshot as IcebergSnapshot
from pyiceberg.table.sorting import SortField, SortOrder
from pyiceberg.table.update import ValidatableTableRequirement
from pyiceberg.transforms import DayTransform, IdentityTransform
from pyiceberg.types import (
    BinaryType,
    BooleanType,
    DecimalType,
    IcebergType,
    LongType,
    NestedField,
    StringType,
    TimestamptzType,
)
from pydantic import Field
from sqlalchemy import URL, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from k2.cold.base import Maintenance, Pin, Snapshot
from k2.cold.lease import Lease
from k2.cold.reader import Reader
from k2.errors import NotSuccessor, Rejected, StoreDown, UnknownName, nearest
from k2.model import Positions, Selection
from k2.schema import CANDLES, TABLES, Table, Type, arrow_schema
from k2.settings import Settings

_log = logging.getLogger(__name__)

NAMESPACE = "k2"
START, END, COMMIT, OPERATION = "k2.start", "k2.end", "k2.commit", "k2.operation"
RESERVED = frozenset({START, END, COMMIT, OPERATION})

ICEBERG: dict[Type, IcebergType] = {
    Type.NAME: StringType(),
    Type.TEXT: StringType(),
    Type.BYTES: BinaryType(),
    Type.BOOL: BooleanType(),
    Type.INT: LongType(),
    Type.NS: LongType(),
    Type.TIMESTAMP: TimestamptzType(),
    Type.DECIMAL: DecimalType(38, 12),
    Type.WIDE: DecimalType(38, 18),
}


def cold_table(name: str) -> Table:
    """Return the declaration of a cold table; UnknownName when there is none of that name."""
    known = {n: t for n, t in TABLES.items() if t.cold}
    if name not in known:
        raise UnknownName(f"cold: no table {name!r}{nearest(name, known)}")
    return known[name]


def iceberg_schema(table: Table) -> Schema:
    """Return the Iceberg schema: every column required, derived timestamps stored too.

    Field ids count the declared columns from 1. They are fixed when a table is made, and readers
    go by the ids in its metadata, so a column declared later gets its id from the table.
    """
    return Schema(
        *[
            NestedField(field_id=i, name=c.name, field_type=ICEBERG[c.type], required=True, doc=c.doc)
            for i, c in enumerate(table.columns, start=1)
        ]
    )


def day_column(table: Table) -> str:
    """Return the derived timestamp of the table's time column, by whose day it is partitioned."""
    return next(c.name for c in table.columns if c.derived_from == table.time_column)


def partition_spec(table: Table, schema: Schema) -> PartitionSpec:
    """Return day(derived time) and exchange."""
    return PartitionSpec(
        PartitionField(schema.find_field(day_column(table)).field_id, 1000, DayTransform(), "day"),
        PartitionField(schema.find_field("exchange").field_id, 1001, IdentityTransform(), "exchange"),
    )


def sort_order(table: Table, schema: Schema) -> SortOrder:
    """Return `Table.sort`; the library only records it, `arranged` really sorts."""
    return SortOrder(
        *[SortField(source_id=schema.find_field(c).field_id, transform=IdentityTransform()) for c in table.sort]
    )


def table_properties(file_bytes: int) -> dict[str, str]:
    """Return the properties a new table gets; the reasons are in docs/decisions/0004-cold-on-iceberg.md."""
    return {
        "format-version": "2",
        "commit.retry.num-retries": "0",
        "commit.manifest-merge.enabled": "true",
        "commit.manifest.min-count-to-merge": "50",
        "write.isolation-level": "snapshot",
        "write.update.isolation-level": "snapshot",
        "write.metadata.delete-after-commit.enabled": "true",
        "write.metadata.previous-versions-max": "10",
        "write.parquet.compression-codec": "zstd",
        "write.parquet.row-group-limit": "131072",
        # The library counts bytes in memory here, several times those on disk.
        "write.target-file-size-bytes": str(max(1, file_bytes) * 8),
    }


def arranged(rows: pa.Table, table: Table) -> pa.Table:
    """Return the rows as stored: declared types, derived timestamps by floor division, sorted by `Table.sort`."""
    stored = conforming(rows, table).sort_by([(c, "ascending") for c in table.sort])
    columns = [
        stored[c.name] if not c.derived_from else _floor_to_timestamp(stored[c.derived_from]) for c in table.columns
    ]
    return pa.Table.from_arrays(columns, schema=arrow_schema(table, derived=True))


def conforming(rows: pa.Table, table: Table) -> pa.Table:
    """Return the rows in exactly the declared schema; Rejected when they do not fit it."""
    schema = arrow_schema(table)
    if sorted(rows.column_names) != sorted(schema.names):
        odd = sorted(set(rows.column_names) ^ set(schema.names))
        raise Rejected(f"cold: rows of {table.name!r} do not have its columns: {', '.join(odd)} differ")
    empty = [n for n in schema.names if rows[n].null_count]
    if empty:
        raise Rejected(f"cold: rows of {table.name!r} hold nulls in {', '.join(empty)}; every column is required")
    try:
        return rows.select(schema.names).cast(schema)
    except pa.ArrowException as error:
        raise Rejected(f"cold: rows of {table.name!r} do not fit its types: {error}") from error


def _floor_to_timestamp(ns: pa.ChunkedArray) -> pa.ChunkedArray:
    """Nanoseconds to microseconds, rounding down also before 1970 (arrow's division rounds towards zero)."""
    quotient = pc.divide(ns, 1000)
    below = pc.less(ns, pc.multiply(quotient, 1000)).cast(pa.int64())
    return pc.subtract(quotient, below).cast(pa.timestamp("us", tz="UTC"))


class AssertCommit(ValidatableTableRequirement):
    """The table's last progress commit must be number `commit`.

    The library's own requirement looks at the snapshot only, so a commit of properties alone would
    slip past it. This one is validated on the metadata the catalog then swaps, so no other commit
    can come between.
    """

    type: Literal["assert-k2-commit"] = Field(default="assert-k2-commit")
    commit: int

    def validate(self, base_metadata: TableMetadata | None) -> None:
        """Raise CommitFailedException when another commit was made."""
        found = int(base_metadata.properties.get(COMMIT, "0")) if base_metadata else -1
        if found != self.commit:
            raise CommitFailedException(f"commit {found} was made by another writer; this one follows {self.commit}")


@dataclass(frozen=True)
class State:
    """The current metadata of one table, as read from its file."""

    location: str
    metadata: TableMetadata

    @property
    def watermark(self) -> dict[str, int]:
        """Offset per partition up to which the table holds everything."""
        return _vector(self.metadata.properties.get(END))

    @property
    def commit(self) -> int:
        """Number of the last progress commit; 0 before the first."""
        return int(self.metadata.properties.get(COMMIT, "0"))


def _vector(text: str | None) -> dict[str, int]:
    return {str(k): int(v) for k, v in json.loads(text or "{}").items()}


def _json(vector: Positions) -> str:
    return json.dumps(dict(sorted(vector.items())), separators=(",", ":"))


class Catalog:
    """The Iceberg catalog of one data folder: a SQLite file, and the tables' folders beside it.

    Nothing is made before the first write, so looking at an empty installation leaves no trace.
    """

    def __init__(self, folder: Path, file_bytes: int) -> None:
        self.folder = folder
        self.warehouse = folder / "warehouse"
        self._file_bytes = file_bytes
        self._catalog: SqlCatalog | None = None
        self._states: dict[str, State] = {}
        self._lock = threading.Lock()

    def state(self, table: str) -> State | None:
        """Return the current metadata of a table, or None before it is made; cached by its location."""
        with reported(f"read the state of cold table {table!r}"):
            catalog = self._open(create=False)
            location = self._location(catalog, table) if catalog else None
            if catalog is None or location is None:
                return None
            cached = self._states.get(table)
            if cached is not None and cached.location == location:
                return cached
            loaded = catalog.load_table((NAMESPACE, table))
            state = State(loaded.metadata_location, loaded.metadata)
            self._states[table] = state
            return state

    def load(self, table: str) -> IcebergTable | None:
        """Return a table freshly loaded, to commit to it; None before it is made."""
        catalog = self._open(create=False)
        try:
            return catalog.load_table((NAMESPACE, table)) if catalog else None
        except NoSuchTableError:
            return None

    def load_or_create(self, table: Table) -> IcebergTable:
        """Return a table freshly loaded, made first if missing."""
        loaded = self.load(table.name)
        if loaded is not None:
            return _same_columns(loaded, table)
        catalog = self._open(create=True)
        assert catalog is not None
        try:
            catalog.create_namespace_if_not_exists(NAMESPACE)
        except NamespaceAlreadyExistsError:
            _log.debug("the namespace was made by another process meanwhile")
        schema = iceberg_schema(table)
        try:
            return catalog.create_table(
                (NAMESPACE, table.name),
                schema=schema,
                location=str(self.warehouse / NAMESPACE / table.name),
                partition_spec=partition_spec(table, schema),
                sort_order=sort_order(table, schema),
                properties=table_properties(self._file_bytes),
            )
        except TableAlreadyExistsError:
            return catalog.load_table((NAMESPACE, table.name))

    def close(self) -> None:
        """Release the connections."""
        with self._lock:
            if self._catalog is not None:
                self._catalog.engine.dispose()
                self._catalog = None

    def _open(self, *, create: bool) -> SqlCatalog | None:
        with self._lock:
            path = self.folder / "catalog.db"
            if self._catalog is None and (create or path.is_file()):
                self.warehouse.mkdir(parents=True, exist_ok=True)
                uri = URL.create("sqlite", database=str(path), query={"timeout": "30"})
                self._catalog = SqlCatalog(
                    NAMESPACE,
                    uri=uri.render_as_string(hide_password=False),
                    warehouse=str(self.warehouse),
                    **{"py-io-impl": "k2.cold.durable.DurableFileIO", "schema_version": "v1"},
                )
            return self._catalog

    def _location(self, catalog: SqlCatalog, table: str) -> str | None:
        question = select(IcebergTables.metadata_location).where(
            IcebergTables.catalog_name == catalog.name,
            IcebergTables.table_namespace == NAMESPACE,
            IcebergTables.table_name == table,
        )
        with Session(catalog.engine) as session:
            return session.execute(question).scalar_one_or_none()


def _same_columns(loaded: IcebergTable, table: Table) -> IcebergTable:
    stored, declared = set(loaded.schema().column_names), {c.name for c in table.columns}
    if stored != declared:
        raise Rejected(
            f"cold: table {table.name!r} has other columns than this version of K2 writes: "
            f"{', '.join(sorted(stored ^ declared))}; use the version that made it, or another data folder"
        )
    return loaded


@contextmanager
def reported(attempt: str) -> Iterator[None]:
    """Turn what disks and the catalog raise into StoreDown, saying what was attempted."""
    try:
        yield
    except CommitStateUnknownException as error:
        raise StoreDown(f"{attempt}: whether it was committed is unknown: {error}; pin again to find out") from error
    except (OSError, SQLAlchemyError) as error:
        raise StoreDown(f"{attempt}: {error}; check space and permissions of the data folder") from error


class IcebergCold:
    """Cold tables in Iceberg under one folder. Any thread may call it; commits to one table take turns."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.folder = settings.data_path / "cold"
        self.catalog = Catalog(self.folder, settings.cold.file_bytes)
        self.lease = Lease(self.folder / "writer.lock", "write to cold")
        self._reader = Reader(self.folder, settings.query.memory_bytes, settings.query.concurrent)
        self.commit_locks = {name: threading.RLock() for name, t in TABLES.items() if t.cold}

    def acquire_lease(self) -> None:
        """Become the one writer. See `Cold.acquire_lease`."""
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
            raise Rejected(f"append to cold table {table!r}: properties {', '.join(sorted(own))} are kept by cold itself")
        self.lease.acquire()
        with self.commit_locks[table], reported(f"append {rows.num_rows} rows to cold table {table!r}"):
            loaded = self.catalog.load_or_create(declared)
            state = State(loaded.metadata_location, loaded.metadata)
            check_successor(table, state.watermark, start, end)
            marks = {
                START: _json({p: start.get(p, 0) for p in end}),
                END: _json({**state.watermark, **end}),
                COMMIT: str(state.commit + 1),
            }
            if table == CANDLES.name:
                rows = with_revision(rows, state.commit + 1)
            _commit(loaded, table, arranged(rows, declared), state.commit, marks, properties or {})
        return self.pin(table)

    def properties(self, table: str) -> dict[str, str]:
        """Return what was last stored through `append(properties=...)`."""
        cold_table(table)
        state = self.catalog.state(table)
        own = RESERVED | set(table_properties(0))
        return {k: v for k, v in state.metadata.properties.items() if k not in own} if state else {}

    def read(self, pin: Pin, selection: Selection, *, timeout_seconds: float | None = None) -> pa.Table:
        """Return rows of the pinned state. See `Cold.read`."""
        return self._reader.read(self._readable(pin), selection, timeout_seconds)

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
        return self._reader.candles(self._readable(pin), timeframe, selection, kind, timeout_seconds)

    def sql(self, query: str, *, timeout_seconds: float, limit: int) -> pa.Table:
        """Run one read-only SELECT over the current tables. See `Cold.sql`."""
        pins = [self.pin(name) for name in self.commit_locks]
        return self._reader.sql(query, pins, timeout_seconds, limit)

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
        from k2.cold.maintenance import maintain  # it needs this module

        return maintain(self, self._settings.cold, now_ns)

    def close(self) -> None:
        """Give the lease back and release everything."""
        self._reader.close()
        self.catalog.close()
        self.lease.release()

    @property
    def reader(self) -> Reader:
        """The DuckDB side, also used to rewrite files."""
        return self._reader

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


def check_successor(table: str, watermark: Positions, start: Positions, end: Positions) -> None:
    """Raise NotSuccessor unless every range starts at the watermark, Rejected when one runs backwards."""
    for partition in sorted({*start, *end}):
        committed, given = watermark.get(partition, 0), start.get(partition, 0)
        if given != committed:
            raise NotSuccessor(
                f"append to cold table {table!r}: the range of {partition!r} starts at {given}, "
                f"but {committed} is committed; pin again and go on from there"
            )
        if end.get(partition, given) < given:
            raise Rejected(f"append to cold table {table!r}: {partition!r} ends at {end[partition]}, before {given}")


def with_revision(rows: pa.Table, number: int) -> pa.Table:
    """Return candles carrying the number of the commit that writes them."""
    if "revision" not in rows.column_names:
        return rows
    at = rows.column_names.index("revision")
    return rows.set_column(at, rows.schema.field(at), pa.array([number] * rows.num_rows, pa.int64()))


def _commit(
    loaded: IcebergTable, table: str, rows: pa.Table, base: int, marks: dict[str, str], properties: dict[str, str]
) -> None:
    try:
        with loaded.transaction() as transaction:
            transaction._stage((), (AssertCommit(commit=base),))
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
    return Pin(table, state.location, snapshot_id, snapshot.timestamp_ms * 1_000_000, _vector(_summary(snapshot)[END]))


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
        start=_vector(facts[START]),
        end=_vector(facts[END]),
    )

