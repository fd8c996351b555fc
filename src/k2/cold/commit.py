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
from pyiceberg.table.update import TableRequirement, TableUpdate, ValidatableTableRequirement

from k2.cold.datafiles import write_files
from k2.cold.metadata import COMMIT, OPERATION
from k2.errors import NotSuccessor
from k2.schema import Table


class AssertCommit(ValidatableTableRequirement):
    """The table's last progress commit must be number `commit`.

    The library's own requirement looks at the snapshot only, so a commit of properties alone would
    slip past it. This one is validated on the metadata the catalog then swaps, so no other commit
    can come between.
    """

    type: Literal["assert-k2-commit"] = Field(default="assert-k2-commit")
    commit: int

    def guard(self, transaction: Transaction) -> None:
        """Make the transaction's commit depend on this."""
        transaction._stage((), (self,))  # type: ignore[arg-type]  # the library names its own kinds only

    def validate(self, base_metadata: TableMetadata | None) -> None:  # type: ignore[override]  # as the library's do
        """Raise CommitFailedException when another commit was made."""
        found = int(base_metadata.properties.get(COMMIT, "0")) if base_metadata else -1
        if found != self.commit:
            raise CommitFailedException(f"commit {found} was made by another writer; this one follows {self.commit}")


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
    loaded: IcebergTable, table: Table, rows: pa.Table, base: int, marks: dict[str, str], properties: dict[str, str]
) -> None:
    """Commit rows (none: properties alone) on top of progress commit `base`; NotSuccessor when another came between."""
    files = write_files(loaded, table, rows) if rows.num_rows else []
    try:
        with LeanTransaction(loaded) as transaction:
            AssertCommit(commit=base).guard(transaction)
            if files:
                summary = {**marks, OPERATION: "append"}
                with transaction.update_snapshot(snapshot_properties=summary).merge_append() as append:
                    for file in files:
                        append.append_data_file(file)
            transaction.set_properties({**properties, **marks})
    except (CommitFailedException, ValidationException) as error:
        raise NotSuccessor(
            f"append to cold table {table.name!r}: another commit came between, nothing was committed ({error}); "
            "pin again and decide"
        ) from error
