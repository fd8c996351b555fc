"""Keeps cold tables quick to read: merges small files, forgets old snapshots, removes files nobody refers to.

Nothing in here changes what a reader sees. Each step is a commit of its own that fails whole when
somebody else commits first, and is then left for the next run.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlparse

import duckdb
import pyarrow as pa
from pyiceberg.exceptions import CommitFailedException, ValidationException
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table as IcebergTable
from pyiceberg.table.snapshots import Snapshot
from pyiceberg.typedef import Record

from k2 import crash
from k2.cold.base import Maintenance
from k2.cold.catalog import Catalog, reported
from k2.cold.commit import AssertCommit, LeanTransaction, forget, surplus
from k2.cold.datafiles import COMPACT_LEVEL, GROUP_ROWS, DataFileWriter, data_file, file_schema
from k2.cold.grace import Grace
from k2.cold.lease import Lease
from k2.cold.metadata import CLEANED, COMMIT, END, OPERATION, START, commit_number
from k2.cold.reader import Reader
from k2.errors import Corrupt
from k2.schema import TABLES, Table
from k2.settings import ColdSettings

_log = logging.getLogger(__name__)

FULL = 0.75  # a file of this share of file_bytes is left as it is
RUNNING_DAY_FILES = 8  # a day still being written is compacted from this many small files on, not at every run
MOST_GROUPS = 64  # groups of files rewritten for a table in one run; the rest waits for the next
IN_FLIGHT_SECONDS = 3600  # age below which a file may belong to another process's unfinished commit
_NS = 10**9
_DAY_NS = 86_400 * _NS


class Tables(Protocol):
    """What maintenance needs of the cold tier it works on; a table's lock is held by whoever commits to it."""

    folder: Path
    grace: Grace
    lease: Lease
    reader: Reader
    commit_locks: Mapping[str, threading.RLock]

    @property
    def catalog(self) -> Catalog:
        """The catalog, for writing."""


@dataclass(frozen=True)
class Group:
    """Small files of one day and exchange that together make about one file."""

    partition: Record
    files: tuple[DataFile, ...]


def maintain(cold: Tables, settings: ColdSettings, now_ns: int) -> list[Maintenance]:
    """Compact, expire and clean every table that exists.

    What a run lets go of stays readable for `cold.grace_seconds` (`k2.cold.grace`). All candle revisions are kept.

    Raises:
        InUse: another maintenance is running on this folder.
    """
    turn = Lease(cold.folder / "maintenance.lock", "maintain cold")
    if not (cold.folder / "catalog.db").is_file():
        return []
    turn.acquire()
    try:
        return [done for name in cold.commit_locks if (done := _maintain(cold, name, settings, now_ns)) is not None]
    finally:
        turn.release()


def _maintain(cold: Tables, name: str, settings: ColdSettings, now_ns: int) -> Maintenance | None:
    with reported(f"maintain cold table {name!r}"):
        before = cold.catalog.load(name)
        if before is None:
            return None
        removed, freed = remove_orphans(cold, name, settings, now_ns)
        compact(cold, TABLES[name], settings, now_ns)
        expired = expire(cold, name, settings.keep_snapshots, now_ns)
        after = cold.catalog.load(name)
        assert after is not None
        return Maintenance(name, _file_count(before), _file_count(after), expired, removed, freed)


def _file_count(table: IcebergTable) -> int:
    snapshot = table.current_snapshot()
    return (
        int(snapshot.summary.additional_properties.get("total-data-files", 0)) if snapshot and snapshot.summary else 0
    )


# -- compaction ------------------------------------------------------------------------


def compact(cold: Tables, table: Table, settings: ColdSettings, now_ns: int) -> int:
    """Rewrite small files into larger sorted ones, in one commit; return how many files it replaced."""
    loaded = cold.catalog.load(table.name)
    if loaded is None or loaded.current_snapshot() is None:
        return 0
    groups = plan([task.file for task in loaded.scan().plan_files()], settings.file_bytes, now_ns)[:MOST_GROUPS]
    made: list[DataFile] = []
    try:
        for group in groups:
            made.append(_rewrite(cold, loaded, table, group))
            crash.point("cold.compact.written")
        if made:
            _replace(cold, table.name, [f for g in groups for f in g.files], made)
    except (CommitFailedException, ValidationException) as error:
        _log.info("compaction of cold table %s is left for the next run: %s", table.name, error)
        for file in made:
            local(file.file_path).unlink(missing_ok=True)
        return 0
    return sum(len(g.files) for g in groups)


def plan(files: Iterable[DataFile], file_bytes: int, now_ns: int) -> list[Group]:
    """Choose which files to merge: per day and exchange, smallest first, up to about `file_bytes` together."""
    small: dict[Record, list[DataFile]] = defaultdict(list)
    for file in files:
        if file.file_size_in_bytes < FULL * file_bytes:
            small[file.partition].append(file)
    groups: list[Group] = []
    for partition, candidates in sorted(small.items(), key=lambda item: str(item[0])):
        running = (partition[0] + 1) * _DAY_NS > now_ns
        if len(candidates) >= (RUNNING_DAY_FILES if running else 2):
            groups += [Group(partition, bin_) for bin_ in _bins(candidates, file_bytes) if len(bin_) > 1]
    return groups


def _bins(files: Sequence[DataFile], file_bytes: int) -> list[tuple[DataFile, ...]]:
    bins: list[list[DataFile]] = [[]]
    filled = 0
    for file in sorted(files, key=lambda f: (f.file_size_in_bytes, f.file_path)):
        if bins[-1] and filled + file.file_size_in_bytes > file_bytes:
            bins.append([])
            filled = 0
        bins[-1].append(file)
        filled += file.file_size_in_bytes
    return [tuple(b) for b in bins]


def _rewrite(cold: Tables, loaded: IcebergTable, table: Table, group: Group) -> DataFile:
    """Write the rows of a group, sorted, into one new file, and make sure they are the same rows."""
    paths = [str(local(f.file_path)) for f in group.files]
    name = f"00000-compacted-{uuid.uuid4()}.parquet"
    folder = Path(paths[0]).parent
    output = loaded.io.new_output(str(folder / name))
    schema = file_schema(loaded, table)
    writer = DataFileWriter(output, loaded, table, COMPACT_LEVEL)
    try:
        with cold.reader.cursor(f"compact cold table {table.name!r}", None) as cursor, writer:
            query = f"SELECT {', '.join(schema.names)} FROM {_files(1)} ORDER BY {', '.join(table.sort)}"  # noqa: S608
            for batch in cursor.execute(query, [paths]).to_arrow_reader(GROUP_ROWS):
                writer.write(pa.Table.from_batches([batch]).cast(schema))
        with cold.reader.cursor(f"check the compaction of cold table {table.name!r}", None) as cursor:
            _check_same(cursor, schema.names, paths, str(folder / name), table.name)
    except BaseException:
        (folder / name).unlink(missing_ok=True)
        raise
    return data_file(loaded, writer, output, group.partition)


def _files(parameter: int) -> str:
    # The folders look like Hive partitions, but every column is in the files.
    return f"read_parquet(${parameter}::VARCHAR[], hive_partitioning = false)"


def _check_same(
    cursor: duckdb.DuckDBPyConnection, columns: Sequence[str], old: Sequence[str], new: str, table: str
) -> None:
    query = f"SELECT count(*), sum(hash({', '.join(columns)})::HUGEINT) FROM {_files(1)}"  # noqa: S608
    before = cursor.execute(query, [list(old)]).fetchone()
    after = cursor.execute(query, [[new]]).fetchone()
    if before != after:
        raise Corrupt(
            f"compact cold table {table!r}: the rewritten file holds other rows than the {len(old)} it was made from "
            f"(count and sum of hashes {after}, not {before}); nothing was changed"
        )


def _replace(cold: Tables, name: str, old: Sequence[DataFile], new: Sequence[DataFile]) -> None:
    with cold.commit_locks[name]:
        loaded = cold.catalog.load(name)
        assert loaded is not None
        commit = commit_number(loaded.properties)
        mark = loaded.properties.get(END, "{}")
        marks = {START: mark, END: mark, COMMIT: str(commit), OPERATION: "compact"}
        with LeanTransaction(loaded) as transaction:
            AssertCommit.as_loaded(loaded).guard(transaction)
            with transaction.update_snapshot(snapshot_properties=marks).overwrite() as overwrite:
                for file in old:
                    overwrite.delete_data_file(file)
                for file in new:
                    overwrite.append_data_file(file)
            crash.point("cold.compact.before_swap")
        crash.point("cold.compact.swapped")


# -- expiry ----------------------------------------------------------------------------


def expire(cold: Tables, name: str, keep: int, now_ns: int) -> int:
    """Forget all but the newest snapshots; the table's properties stay. Return how many were forgotten."""
    with cold.commit_locks[name]:
        loaded = cold.catalog.load(name)
        old = surplus(loaded.metadata, keep) if loaded else ()
        if loaded is None or not old:
            return 0
        cold.grace.expire(name, old, loaded.metadata_location, now_ns)
        crash.point("cold.expire.before_commit")
        try:
            with LeanTransaction(loaded) as transaction:
                AssertCommit.as_loaded(loaded, expiring=old).guard(transaction)
                forget(transaction, old)
        except (CommitFailedException, ValidationException) as error:
            _log.info("expiry of cold table %s is left for the next run: %s", name, error)
            return 0
        crash.point("cold.expire.committed")
        return len(old)


# -- orphans ---------------------------------------------------------------------------


def remove_orphans(cold: Tables, name: str, settings: ColdSettings, now_ns: int) -> tuple[int, int]:
    """Remove files of a table that nothing has referred to for the grace; return their number and bytes.

    The folder is listed before the references are read: what is committed in between is then
    referred to. Without the writer's lease another process may be about to commit files it wrote,
    so those younger than an hour stay, whatever the setting says; one that takes longer is refused.
    """
    least_age = settings.orphan_seconds if cold.lease.held else max(settings.orphan_seconds, IN_FLIGHT_SECONDS)
    folder = cold.catalog.warehouse / "k2" / name
    with cold.commit_locks[name]:  # no commit of this process is half-written while listing
        listed = [path for path in folder.rglob("*") if path.is_file()]
    loaded = cold.catalog.load(name)
    if loaded is None:
        return 0, 0
    used = referenced(loaded)
    sizes: dict[str, int] = {}
    for path in listed:
        if path in used:
            continue
        facts = path.stat()
        # A younger one may be in a commit under way: noted now, it would have no grace when that is let go of again.
        if now_ns - facts.st_mtime_ns >= least_age * _NS:
            sizes[str(path.relative_to(folder))] = facts.st_size
    known = cold.grace.unreferenced(name, sizes, now_ns)
    gone = [relative for relative, since_ns in known.items() if now_ns - since_ns >= settings.grace_seconds * _NS]
    if not gone or not _fenced(cold, name, loaded, now_ns):
        return 0, 0
    for relative in gone:
        (folder / relative).unlink(missing_ok=True)
        crash.point("cold.orphans.half")
    return len(gone), sum(sizes[relative] for relative in gone)


def _fenced(cold: Tables, name: str, loaded: IcebergTable, now_ns: int) -> bool:
    """Have every commit refused that was begun before; return whether that could be committed.

    Files may be those of a commit under way, however old: its process may have been stopped for hours. One that begins
    after this commit writes files that were not listed.
    """
    with cold.commit_locks[name]:
        try:
            with LeanTransaction(loaded) as transaction:
                AssertCommit.as_loaded(loaded).guard(transaction)
                transaction.set_properties({CLEANED: str(now_ns)})
        except (CommitFailedException, ValidationException) as error:
            _log.info("removing files of cold table %s is left for the next run: %s", name, error)
            return False
    return True


def referenced(loaded: IcebergTable) -> set[Path]:
    """Return every file that retained metadata refers to: metadata, manifest lists, manifests, data."""
    used = {local(loaded.metadata_location), *(local(entry.metadata_file) for entry in loaded.metadata.metadata_log)}
    seen: set[str] = set()
    for snapshot in loaded.snapshots():
        used.add(local(snapshot.manifest_list))
        used |= _of_snapshot(loaded, snapshot, seen)
    return used


def _of_snapshot(loaded: IcebergTable, snapshot: Snapshot, seen: set[str]) -> set[Path]:
    used: set[Path] = set()
    for manifest in snapshot.manifests(loaded.io):
        if manifest.manifest_path in seen:
            continue
        seen.add(manifest.manifest_path)
        used.add(local(manifest.manifest_path))
        entries = manifest.fetch_manifest_entry(loaded.io, discard_deleted=True)
        used |= {local(entry.data_file.file_path) for entry in entries}
    return used


def local(location: str) -> Path:
    """Return the path behind a location, with or without `file:`."""
    return Path(unquote(urlparse(location).path)) if location.startswith("file:") else Path(location)
