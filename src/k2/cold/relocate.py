"""Makes the cold tables of a data folder that was moved, or copied, at home where it is now.

Iceberg keeps full paths: in the catalog, in each table's metadata, in manifest lists and in manifests. All that the
retained snapshots need is written anew beside the old, with the paths of now; data files stay as they are. Then one
transaction of the catalog lets every table point there. Whoever is killed before it leaves files nobody refers to,
which maintenance removes as it does the old ones.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import uuid
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from pyiceberg.avro.file import AvroFile, AvroOutputFile
from pyiceberg.schema import Schema
from pyiceberg.typedef import Record
from pyiceberg.types import StructType

from k2 import crash
from k2.cold.durable import DurableFileIO
from k2.cold.lease import Lease
from k2.cold.metadata import BUSY_SECONDS, NAMESPACE, made_in, reading
from k2.errors import Corrupt

_log = logging.getLogger(__name__)

Change = Callable[[Schema, Record], None]


def relocate(folder: Path) -> bool:
    """Let every table of a cold folder say that it is there; return whether one did not. May be killed, and run again.

    What was expired before, but in its grace, cannot be read any more.

    Raises:
        InUse: another process writes to cold.
        Corrupt: a file that a table refers to is not in the folder, as in a copy that is not complete.
        StoreDown: a file cannot be read or written. Nothing was changed, by this and by the others.
    """
    made = made_in(folder)
    if made is None or made == folder:
        return False
    lease = Lease(folder / "writer.lock", "relocate cold")
    lease.acquire()
    try:
        with reading(f"make the cold tables of {made} at home in {folder}"):
            _relocate(folder, _Move(f"{made}/warehouse/", f"{folder}/warehouse/"))
    finally:
        lease.release()
    _log.warning("cold: its tables, made in %s, are at home in %s now", made, folder)
    return True


def _relocate(folder: Path, move: _Move) -> None:
    with closing(sqlite3.connect(folder / "catalog.db", timeout=BUSY_SECONDS, isolation_level=None)) as db:
        db.execute("PRAGMA synchronous = EXTRA").close()
        question = "SELECT table_name, metadata_location FROM iceberg_tables WHERE catalog_name = ?"
        moved = []
        for table, location in db.execute(question, (NAMESPACE,)).fetchall():
            moved.append((move.metadata(location), NAMESPACE, table))
            crash.point("cold.relocate.half")
        with db:
            db.execute("BEGIN IMMEDIATE")
            db.executemany(
                "UPDATE iceberg_tables SET metadata_location = ?, previous_metadata_location = NULL"
                " WHERE catalog_name = ? AND table_name = ?",
                moved,
            )
            crash.point("cold.relocate.before_commit")


class _Move:
    """Writes files anew whose paths begin with `old`, for them to begin with `new`."""

    def __init__(self, old: str, new: str) -> None:
        self._old, self._new = old, new
        self._io = DurableFileIO()
        self._manifests: dict[str, tuple[str, int]] = {}  # old path -> new one, and its size

    def metadata(self, location: str) -> str:
        """Write a table's metadata, and all it refers to, anew; return the new path."""
        found: dict[str, Any] = json.loads(Path(self._here(location)).read_bytes())
        found["location"] = self._here(found["location"])
        for snapshot in found.get("snapshots", []):
            snapshot["manifest-list"] = self._manifest_list(snapshot["manifest-list"])
        # Metadata of before says the old paths.
        found |= {"metadata-log": [], "statistics": [], "partition-statistics": []}
        number = int(Path(location).name.partition("-")[0])
        path = Path(self._here(location)).with_name(f"{number + 1:05d}-{uuid.uuid4()}.metadata.json")
        with self._io.new_output(str(path)).create() as file:
            file.write(json.dumps(found, separators=(",", ":")).encode())
        return str(path)

    def _manifest_list(self, location: str) -> str:
        def change(schema: Schema, manifest: Record) -> None:
            path, size = _position(schema, "manifest_path"), _position(schema, "manifest_length")
            manifest[path], manifest[size] = self._manifest(manifest[path])

        return self._rewritten(location, "manifest_file", change, f"snap-{uuid.uuid4()}.avro")[0]

    def _manifest(self, location: str) -> tuple[str, int]:
        def change(schema: Schema, entry: Record) -> None:
            file = entry[_position(schema, "data_file")]
            fields = schema.find_type("data_file")
            assert isinstance(fields, StructType)
            path = _position(Schema(*fields.fields), "file_path")
            file[path] = self._here(file[path], is_there=entry[_position(schema, "status")] != _DELETED)

        if location not in self._manifests:
            self._manifests[location] = self._rewritten(location, "manifest_entry", change, f"{uuid.uuid4()}-m0.avro")
        return self._manifests[location]

    def _rewritten(self, location: str, kind: str, change: Change, name: str) -> tuple[str, int]:
        """Write an Avro file anew with every record changed; return its path and size."""
        path = Path(self._here(location)).with_name(name)
        with AvroFile[Record](self._io.new_input(self._here(location))) as old:
            records = list(old)
        for record in records:
            change(old.schema, record)
        output = self._io.new_output(str(path))
        with AvroOutputFile[Record](output, old.schema, kind, metadata=dict(old.header.meta)) as new:
            new.write_block(records)
        return str(path), path.stat().st_size

    def _here(self, location: str, *, is_there: bool = True) -> str:
        """Return where a file is now."""
        path = self._new + location.removeprefix(self._old)
        if not location.startswith(self._old):
            raise Corrupt(f"relocate cold: {location} lies outside {self._old}; nothing was changed")
        if is_there and not Path(path).exists():
            raise Corrupt(
                f"relocate cold: {path} is missing, which a table refers to; nothing was changed. Was the folder "
                "copied while it was in use, or not whole? Copy it again while nothing runs on it"
            )
        return path


_DELETED = 2  # of a manifest's entries, by the specification of Iceberg: its file may be gone


def _position(schema: Schema, name: str) -> int:
    return [field.name for field in schema.fields].index(name)
