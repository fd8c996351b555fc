"""The Iceberg catalog of one data folder, and how K2's tables are declared in it.

Every commit carries, in the snapshot summary and in the table properties alike, the offset
range it moved (`k2.start`), the watermark after it (`k2.end`, JSON, all partitions) and its
number (`k2.commit`). The commit is accepted only while the table still has the number before
it, checked inside the catalog's own compare-and-swap: see `commit.AssertCommit`.
"""

from __future__ import annotations

import fcntl
import logging
import os
import sqlite3
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pyiceberg.catalog.sql import IcebergTables
from pyiceberg.exceptions import (
    CommitStateUnknownException,
    NoSuchNamespaceError,
    NoSuchTableError,
    TableAlreadyExistsError,
    ValidationError,
)
from pyiceberg.partitioning import PartitionField, PartitionSpec
from pyiceberg.schema import Schema
from pyiceberg.table import Table as IcebergTable
from pyiceberg.table.sorting import SortField, SortOrder
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
from sqlalchemy import URL, event, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from k2 import crash
from k2.cold.commit import CachedCatalog
from k2.cold.metadata import BUSY_SECONDS, NAMESPACE, check_locations, table_properties
from k2.durable import make_folder, sync_folder
from k2.errors import Corrupt, Rejected, StoreDown
from k2.schema import Table, Type

_log = logging.getLogger(__name__)

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


class Catalog:
    """The Iceberg catalog of one data folder: a SQLite file, and the tables' folders beside it.

    For those who write; `metadata.CatalogFile` is for those who read. Nothing is made before the first write.
    """

    def __init__(self, folder: Path, file_bytes: int) -> None:
        self.folder = folder
        self.warehouse = folder / "warehouse"
        self._file_bytes = file_bytes
        self._catalog: CachedCatalog | None = None
        self._lock = threading.Lock()

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
        schema = iceberg_schema(table)
        try:
            made = catalog.create_table(
                (NAMESPACE, table.name),
                schema=schema,
                location=str(self.warehouse / NAMESPACE / table.name),
                partition_spec=partition_spec(table, schema),
                sort_order=sort_order(table, schema),
                properties=table_properties(self._file_bytes),
            )
        except TableAlreadyExistsError:
            return catalog.load_table((NAMESPACE, table.name))
        crash.point("cold.table.created")
        return made

    def close(self) -> None:
        """Release the connections."""
        with self._lock:
            if self._catalog is not None:
                self._catalog.engine.dispose()
                self._catalog = None

    def _open(self, *, create: bool) -> CachedCatalog | None:
        with self._lock:
            path = self.folder / "catalog.db"
            if create and not path.is_file():
                self._make(path)
            if self._catalog is None and path.is_file():
                catalog = self._connect(path)
                try:
                    self._check_locations(catalog)
                except BaseException:
                    catalog.engine.dispose()
                    raise
                self._catalog = catalog
            return self._catalog

    def _check_locations(self, catalog: CachedCatalog) -> None:
        question = select(IcebergTables.metadata_location).where(IcebergTables.catalog_name == catalog.name)
        with Session(catalog.engine) as session:
            locations = [str(location) for location in session.execute(question).scalars()]
        check_locations(self.folder, locations)

    def _make(self, path: Path) -> None:
        """Make the catalog beside its place and put it there complete: no reader sees half."""
        make_folder(self.warehouse)
        self._remove_drafts()
        draft = self.folder / f"catalog-{uuid.uuid4()}.tmp"
        with draft.open("xb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            made = self._connect(draft)
            made.create_namespace(NAMESPACE)
            made.engine.dispose()
            crash.point("cold.catalog.drafted")
            try:
                if os.fstat(file.fileno()).st_nlink:  # another maker may have removed it before it was locked
                    os.link(draft, path)
            except FileExistsError:
                _log.debug("the catalog was made by another process meanwhile")
            finally:
                draft.unlink(missing_ok=True)
        sync_folder(self.folder)

    def _remove_drafts(self) -> None:
        """Remove what the dead have left: drafts nobody holds a lock of, and their journals."""
        for left in self.folder.glob("catalog-*.tmp"):
            with suppress(FileNotFoundError, BlockingIOError), left.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for name in self.folder.glob(f"{left.name}*"):
                    name.unlink(missing_ok=True)

    def _connect(self, path: Path) -> CachedCatalog:
        uri = URL.create("sqlite", database=str(path), query={"timeout": f"{BUSY_SECONDS:g}"})
        catalog = CachedCatalog(
            NAMESPACE,
            uri=uri.render_as_string(hide_password=False),
            warehouse=str(self.warehouse),
            **{"py-io-impl": "k2.cold.durable.DurableFileIO", "schema_version": "v1"},
        )
        catalog.engine.dispose()  # connections made before the next line
        event.listen(catalog.engine, "connect", _sync_all)
        return catalog


def _sync_all(connection: sqlite3.Connection, _record: object) -> None:
    """Have a commit survive a power cut: with less, its journal may come back and undo it."""
    connection.execute("PRAGMA synchronous = EXTRA").close()


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
    """Turn what disks and the catalog raise into StoreDown, damaged metadata into Corrupt; say what was attempted."""
    try:
        yield
    except CommitStateUnknownException as error:
        raise StoreDown(f"{attempt}: whether it was committed is unknown: {error}; pin again to find out") from error
    except (ValidationError, NoSuchNamespaceError) as error:
        raise Corrupt(f"{attempt}: its metadata is damaged: {error}; put the files back from a copy") from error
    except (OSError, SQLAlchemyError, sqlite3.Error) as error:
        # SQLAlchemy adds the statement, its parameters and a link; what went wrong is the driver's own error.
        what = getattr(error, "orig", None) or error
        raise StoreDown(f"{attempt}: {what}; check space and permissions of the data folder") from error
