"""Brings the cold tables of an older K2 to the newest form; see `metadata.NEWEST` for what the forms are."""

from __future__ import annotations

from pathlib import Path

from k2 import crash
from k2.cold.catalog import Catalog, reported
from k2.cold.commit import AssertCommit, LeanTransaction
from k2.cold.lease import Lease
from k2.cold.metadata import NEWEST, forms, table_properties


def upgrade(folder: Path, file_bytes: int) -> None:
    """Bring every table to the newest form, each in a commit of its own. May be killed anywhere, and run again.

    Raises:
        InUse: another process writes to cold.
        StoreDown: the disk is full or cannot be written.
    """
    lease = Lease(folder / "writer.lock", "upgrade cold")
    lease.acquire()
    catalog = Catalog(folder, file_bytes)
    try:
        for table, form in sorted(forms(folder).items()):
            if form < NEWEST:
                with reported(f"upgrade cold table {table!r}"):
                    _upgrade(catalog, table, file_bytes)
                crash.point("cold.upgrade.half")
    finally:
        catalog.close()
        lease.release()


def _upgrade(catalog: Catalog, table: str, file_bytes: int) -> None:
    loaded = catalog.load(table)
    assert loaded is not None
    with LeanTransaction(loaded) as transaction:
        AssertCommit.as_loaded(loaded).guard(transaction)
        transaction.set_properties(table_properties(file_bytes))
