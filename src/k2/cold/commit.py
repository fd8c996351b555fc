"""One commit of a cold table: guarded by its number, made with few copies of the table's metadata."""

from __future__ import annotations

from typing import Literal

import pyarrow as pa
from pydantic import Field
from pyiceberg.catalog.sql import IcebergTables, SqlCatalog
from pyiceberg.exceptions import CommitFailedException, ValidationException
from pyiceberg.table import CommitTableResponse, Transaction
from pyiceberg.table import Table as IcebergTable
from pyiceberg.table.metadata import TableMetadata
from pyiceberg.table.update import RemoveSnapshotsUpdate, TableRequirement, TableUpdate, ValidatableTableRequirement

from k2.cold.datafiles import write_files
from k2.cold.metadata import CLEANED, COMMIT, OPERATION, commit_number
from k2.errors import NotSuccessor
from k2.schema import Table


class AssertCommit(ValidatableTableRequirement):
    """The table's last progress commit must be number `commit`, and it must still hold the snapshots `expiring`.

    Nor may files have been removed since `cleaned`: those of a commit that took very long are nobody's yet.

    The library's own requirement looks at the newest snapshot only, so a commit of properties alone, or
    somebody else's expiry, would slip past it. This one is validated on the metadata the catalog then swaps,
    so no other commit can come between.
    """

    type: Literal["assert-k2-commit"] = Field(default="assert-k2-commit")
    commit: int
    cleaned: str = ""
    expiring: tuple[int, ...] = ()

    @classmethod
    def as_loaded(cls, table: IcebergTable, expiring: tuple[int, ...] = ()) -> AssertCommit:
        """Return the requirement that nothing came between the loading of a table and its commit."""
        properties = table.properties
        return cls(commit=commit_number(properties), cleaned=properties.get(CLEANED, ""), expiring=expiring)

    def guard(self, transaction: Transaction) -> None:
        """Make the transaction's commit depend on this."""
        transaction._stage((), (self,))  # type: ignore[arg-type]  # the library names its own kinds only

    def validate(self, base_metadata: TableMetadata | None) -> None:  # type: ignore[override]  # as the library's do
        """Raise CommitFailedException when another commit was made."""
        found = int(base_metadata.properties.get(COMMIT, "0")) if base_metadata else -1
        if found != self.commit:
            raise CommitFailedException(f"commit {found} was made by another writer; this one follows {self.commit}")
        if base_metadata and base_metadata.properties.get(CLEANED, "") != self.cleaned:
            raise CommitFailedException("unreferenced files were removed meanwhile, maybe those of this commit")
        if (
            self.expiring
            and base_metadata
            and not set(self.expiring) <= {s.snapshot_id for s in base_metadata.snapshots}
        ):
            raise CommitFailedException("snapshots that were to expire with this commit have expired meanwhile")


def surplus(metadata: TableMetadata, keep: int) -> tuple[int, ...]:
    """Return the snapshots beyond the newest `keep`, oldest first; one that somebody tagged stays."""
    tagged = {ref.snapshot_id for ref in metadata.refs.values()}  # the branch points at the current one
    free = [s for s in metadata.snapshots if s.snapshot_id not in tagged]
    oldest_first = sorted(free, key=lambda s: s.sequence_number or 0)
    return tuple(s.snapshot_id for s in oldest_first[: max(0, len(metadata.snapshots) - max(1, keep))])


def forget(transaction: Transaction, snapshot_ids: tuple[int, ...]) -> None:
    """Have a transaction drop snapshots from the metadata; it deletes no file."""
    if snapshot_ids:
        transaction._stage((RemoveSnapshotsUpdate.model_validate({"snapshot-ids": snapshot_ids}),))


class LeanTransaction(Transaction):
    """A transaction that makes its view of the metadata once for each change, not at each look.

    The library copies all of it, every retained snapshot, about 20 times in one append: with 100
    snapshots that was three quarters of the time of a commit. Nobody changes a view in place.
    """

    def __init__(self, table: IcebergTable) -> None:
        super().__init__(table)
        self._view: tuple[int, TableMetadata] = (0, table.metadata)

    @property
    def table_metadata(self) -> TableMetadata:
        """The metadata with the changes staged so far."""
        staged, view = self._view
        if staged != len(self._updates):
            view = super().table_metadata
            self._view = (len(self._updates), view)
        return view


class CachedCatalog(SqlCatalog):
    """The library's catalog, which does not parse a metadata file again that it has just read or written.

    A metadata file is never changed once it has its name, so its location says it all. One is kept per table.
    """

    def __init__(self, name: str, **properties: str) -> None:
        self._parsed: dict[str, tuple[str, TableMetadata]] = {}
        super().__init__(name, **properties)

    def _convert_orm_to_iceberg(self, orm_table: IcebergTables) -> IcebergTable:
        location, metadata = self._parsed.get(orm_table.table_name, ("", None))
        if metadata is None or location != orm_table.metadata_location:
            loaded = super()._convert_orm_to_iceberg(orm_table)
            self._parsed[orm_table.table_name] = (loaded.metadata_location, loaded.metadata)
            return loaded
        return IcebergTable(
            identifier=(orm_table.table_namespace, orm_table.table_name),
            metadata=metadata,
            metadata_location=location,
            io=self._load_file_io(metadata.properties, location),
            catalog=self,
        )

    def commit_table(
        self, table: IcebergTable, requirements: tuple[TableRequirement, ...], updates: tuple[TableUpdate, ...]
    ) -> CommitTableResponse:
        """Commit, and remember what was written."""
        response = super().commit_table(table, requirements, updates)
        self._parsed[table.name()[-1]] = (response.metadata_location, response.metadata)
        return response


def commit(
    loaded: IcebergTable,
    table: Table,
    rows: pa.Table,
    guard: AssertCommit,
    marks: dict[str, str],
    properties: dict[str, str],
) -> None:
    """Commit rows (none: properties alone) if `guard` allows it, forget the snapshots it names.

    Raises NotSuccessor when another commit came between.
    """
    files = write_files(loaded, table, rows) if rows.num_rows else []
    try:
        with LeanTransaction(loaded) as transaction:
            guard.guard(transaction)
            if files:
                summary = {**marks, OPERATION: "append"}
                with transaction.update_snapshot(snapshot_properties=summary).merge_append() as append:
                    for file in files:
                        append.append_data_file(file)
            transaction.set_properties({**properties, **marks})
            forget(transaction, guard.expiring)
    except (CommitFailedException, ValidationException) as error:
        raise NotSuccessor(
            f"append to cold table {table.name!r}: another commit came between, nothing was committed ({error}); "
            "pin again and decide"
        ) from error
