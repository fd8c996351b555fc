"""What the catalog and the tables' metadata files say, read without the library that writes them.

A reader needs a few of their facts only. Loading the library for them would cost each command a
second, and each start of the node as much.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import msgspec

from k2 import stamp
from k2.errors import Corrupt, Misconfigured, StoreDown
from k2.model import Positions

NAMESPACE = "k2"
START, END, COMMIT, OPERATION = "k2.start", "k2.end", "k2.commit", "k2.operation"
FORMAT = "k2.format"
CLEANED = "k2.cleaned"
"""When files were last removed: a commit begun before may have written one of them, and is refused."""
NEWEST = 2
"""The form of cold tables. 1: as the first release made them. 2: old metadata files are left to maintenance, which
removes them when the grace is over, as they are what readers have pinned."""
RESERVED = frozenset({START, END, COMMIT, OPERATION, FORMAT, CLEANED})

BUSY_SECONDS = 30.0  # a catalog another process is writing to is waited for so long


class SnapshotFacts(msgspec.Struct, frozen=True, rename="kebab"):
    """One snapshot, as the Iceberg specification writes it; times in milliseconds."""

    snapshot_id: int
    timestamp_ms: int
    summary: dict[str, str] = {}

    @property
    def facts(self) -> dict[str, str]:
        """The summary, with what snapshots of others lack."""
        return {START: "{}", END: "{}", OPERATION: "append", **self.summary}


class Metadata(msgspec.Struct, frozen=True, rename="kebab"):
    """The parts of a table's metadata file that readers use."""

    last_updated_ms: int
    current_snapshot_id: int | None = None
    properties: dict[str, str] = {}
    snapshots: list[SnapshotFacts] = []

    def snapshot(self, snapshot_id: int) -> SnapshotFacts | None:
        """Return a retained snapshot."""
        return next((s for s in self.snapshots if s.snapshot_id == snapshot_id), None)


@dataclass(frozen=True)
class State:
    """The current metadata of one table, and the file it was read from."""

    location: str
    metadata: Metadata

    @property
    def watermark(self) -> dict[str, int]:
        """Offset per partition up to which the table holds everything."""
        return watermark(self.metadata.properties)

    @property
    def commit(self) -> int:
        """Number of the last progress commit; 0 before the first."""
        return commit_number(self.metadata.properties)

    @property
    def snapshot_id(self) -> int | None:
        """The current snapshot; None before the first (the specification also writes -1)."""
        current = self.metadata.current_snapshot_id
        return None if current == -1 else current


def table_properties(file_bytes: int) -> dict[str, str]:
    """Return the properties a new table gets; the reasons are in docs/decisions/0004-cold-on-iceberg.md."""
    return {
        FORMAT: str(NEWEST),
        "format-version": "2",
        "commit.retry.num-retries": "0",
        "commit.manifest-merge.enabled": "true",
        "commit.manifest.min-count-to-merge": "50",
        "write.isolation-level": "snapshot",
        "write.update.isolation-level": "snapshot",
        # Old metadata files are readers' pins: maintenance removes them, after the grace.
        "write.metadata.delete-after-commit.enabled": "false",
        "write.metadata.previous-versions-max": "10",
        "write.parquet.compression-codec": "zstd",
        "write.parquet.row-group-limit": "131072",
        # The library counts bytes in memory here, several times those on disk.
        "write.target-file-size-bytes": str(max(1, file_bytes) * 8),
    }


def read_state(location: str) -> State:
    """Return what a metadata file says."""
    path = location.removeprefix("file://")
    return State(location, msgspec.json.decode(Path(path).read_bytes(), type=Metadata))


def watermark(properties: Mapping[str, str]) -> dict[str, int]:
    """Return the watermark among a table's properties."""
    return vector(properties.get(END))


def commit_number(properties: Mapping[str, str]) -> int:
    """Return the number of the last progress commit among a table's properties; 0 before the first."""
    return int(properties.get(COMMIT, "0"))


def vector(text: str | None) -> dict[str, int]:
    """Read an offset vector back from the text kept with a commit."""
    return {str(k): int(v) for k, v in json.loads(text or "{}").items()}


def to_json(positions: Positions) -> str:
    """Write an offset vector as text."""
    return json.dumps(dict(sorted(positions.items())), separators=(",", ":"))


def forms(folder: Path) -> dict[str, int]:
    """Return the form of each cold table of a folder, also of one that was moved.

    Raises Corrupt or StoreDown when the catalog, or a metadata file, cannot be read.
    """
    with reading(f"read the form of the cold tables in {folder}"):
        states = {table: read_state(_within(folder, location)) for table, location in _locations(folder).items()}
        return {table: int(state.metadata.properties.get(FORMAT, stamp.FIRST)) for table, state in states.items()}


def made_in(folder: Path) -> Path | None:
    """Return as which folder a cold tier knows itself; None before it has a table.

    That is `folder` itself where it was neither moved nor reached by another name: see `home`.
    """
    with reading(f"read where the cold tables of {folder} are"):
        for location in _locations(folder).values():
            return Path(location.rsplit(_TABLES, 1)[0])
    return None


def home(folder: Path) -> Path:
    """Return the name by which a cold tier knows the folder it is in: a link may lead there, too.

    A folder that was moved is returned as it is, and refused by whoever opens it.
    """
    with contextlib.suppress(StoreDown, OSError):
        made = made_in(folder)
        if made is not None and made != folder and made.samefile(folder):
            return made
    return folder


_TABLES = f"/warehouse/{NAMESPACE}/"


def _locations(folder: Path) -> dict[str, str]:
    """Return the metadata file of each table, as the catalog has it."""
    path = folder / "catalog.db"
    if not path.is_file():
        return {}
    uri = f"file:{quote(str(path))}?mode=rw"
    with closing(sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None)) as db:
        query = "SELECT table_name, metadata_location FROM iceberg_tables WHERE catalog_name = ?"
        return {str(table): str(location) for table, location in db.execute(query, (NAMESPACE,)).fetchall()}


def _within(folder: Path, location: str) -> str:
    """Return where in a folder a file is that was there when the folder had another name."""
    return f"{folder}{_TABLES}{location.split(_TABLES)[-1]}"


class CatalogFile:
    """Looks into the catalog of one data folder; makes and changes nothing. Any thread may ask.

    Iceberg keeps full paths, in the catalog and in every file: a folder reached by another path than
    the one its tables were made under is refused, before anything in it is read or taken for an orphan. Links to it
    are followed before (`home`).
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / "catalog.db"
        self._lock = threading.Lock()
        self._db: sqlite3.Connection | None = None
        self._states: dict[str, State] = {}

    def check_place(self) -> None:
        """Raise Misconfigured when the tables were made under another path than they are reached by now."""
        with reading(f"open the cold catalog in {self._folder}"), self._lock:
            self._open()

    def state(self, table: str) -> State | None:
        """Return the current metadata of a table, or None before it is made; cached by its location.

        Raises:
            Corrupt: the metadata file is damaged.
            StoreDown: the catalog or the file cannot be read.
        """
        with reading(f"read the state of cold table {table!r}"):
            location = self._location(table)
            if location is None:
                return None
            cached = self._states.get(table)
            if cached is not None and cached.location == location:
                return cached
            state = self._states[table] = read_state(location)
            return state

    def close(self) -> None:
        """Release the connection."""
        with self._lock:
            if self._db is not None:
                self._db.close()
                self._db = None

    def _location(self, table: str) -> str | None:
        with self._lock:
            db = self._open()
            if db is None:
                return None
            query = (
                "SELECT metadata_location FROM iceberg_tables"
                " WHERE catalog_name = ? AND table_namespace = ? AND table_name = ?"
            )
            row = db.execute(query, (NAMESPACE, NAMESPACE, table)).fetchone()
            return None if row is None else str(row[0])

    def _open(self) -> sqlite3.Connection | None:
        """Return the connection; None before the catalog is made. It may write, to undo what a killed commit left."""
        if self._db is None and self._path.is_file():
            uri = f"file:{quote(str(self._path))}?mode=rw"
            db = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
            try:
                self._check_locations(db)
            except BaseException:
                db.close()
                raise
            self._db = db
        return self._db

    def _check_locations(self, db: sqlite3.Connection) -> None:
        rows = db.execute("SELECT metadata_location FROM iceberg_tables WHERE catalog_name = ?", (NAMESPACE,))
        check_locations(self._folder, [str(location) for (location,) in rows.fetchall()])


def check_locations(folder: Path, locations: list[str]) -> None:
    """Raise Misconfigured when metadata files lie outside the warehouse of this folder."""
    for location in locations:
        if not location.startswith(f"{folder}{_TABLES}"):
            raise moved(folder, Path(location.rsplit(_TABLES, 1)[0]))


def moved(folder: Path, made: Path) -> Misconfigured:
    """Return the error that says what to do about a cold folder that was made as another."""
    here, there = folder.parent, made.parent
    return Misconfigured(
        f"cold: the data folder {here} was made as {there}, and Iceberg keeps full paths. Was it moved or copied? "
        f"Run `k2 upgrade --data {here}`, which makes the tables at home here (rows are not written anew), or move "
        "it back. Nothing was changed"
    )


@contextmanager
def reading(attempt: str) -> Iterator[None]:
    """Turn what disks raise into StoreDown, damaged metadata into Corrupt; say what was attempted."""
    try:
        yield
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise Corrupt(f"{attempt}: its metadata is damaged: {error}; put the files back from a copy") from error
    except (OSError, sqlite3.Error) as error:
        raise StoreDown(f"{attempt}: {error}; check space and permissions of the data folder") from error
