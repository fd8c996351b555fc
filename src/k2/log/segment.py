"""Segment files: a SQLite database for a range of offsets, one row a batch.

The name of a file is its first offset. Only the newest file of a partition is appended to; when it
is full, its end is written into it (which every later append, of any process, sees in its own
transaction and refuses) and the next file is made, starting there. So offsets have no hole and no
overlap, whoever dies in between.
"""

from __future__ import annotations

import contextlib
import os
import random
import sqlite3
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import msgspec

from k2 import crash, meters
from k2.durable import sync_folder
from k2.log.checkpoint import Checkpoints
from k2.log.codec import Row, checksum
from k2.log.groupcommit import Request
from k2.log.times import logged_time

Sync = Literal["full", "normal"]

PAGE_BYTES = 4096
PAGES_BESIDE = 3  # written by a commit beside those of its blobs
BUSY_SECONDS = 30.0
BUSY_PAUSE_SECONDS = (0.0002, 0.002)
SUFFIX = ".db"  # another format gets another suffix: an older K2 must not take it for damage
COLUMNS = "base_offset, count, logged_ns, producer, sequence, codec, crc32, blob"

FORM = 2
"""The form of the log; see `form.py`."""
APPLICATION_ID = int.from_bytes(b"K2Lg")
IDENTITY = f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {FORM};"

_SCHEMA = f"""
PRAGMA page_size = {PAGE_BYTES};
PRAGMA journal_mode = WAL;
BEGIN;
{IDENTITY}
CREATE TABLE batches (
  base_offset INTEGER PRIMARY KEY,
  count INTEGER NOT NULL,      -- frames; the next batch starts at base_offset + count
  logged_ns INTEGER NOT NULL,
  producer TEXT NOT NULL,
  sequence INTEGER NOT NULL,
  codec INTEGER NOT NULL,      -- 0: msgpack, 1: msgpack in zstd
  crc32 INTEGER NOT NULL,      -- over the blob and every column before
  blob BLOB NOT NULL
);
CREATE TABLE producers (
  producer TEXT PRIMARY KEY,
  sequence INTEGER NOT NULL,   -- the last one stored, in this segment or before
  carried INTEGER              -- the last one stored before this segment
) WITHOUT ROWID;
CREATE TABLE segment (
  carried_ns INTEGER NOT NULL, -- logged_ns of the last batch before this segment
  end_offset INTEGER           -- set when the segment is closed: nothing is appended after that
);
"""


class Tail(msgspec.Struct, frozen=True):
    """Where a segment ends: the next offset and the logged time of its last batch."""

    end_offset: int
    logged_ns: int
    is_closed: bool


def path_of(folder: Path, base_offset: int) -> Path:
    """Return the file of the segment that starts at an offset."""
    return folder / f"{base_offset:020d}{SUFFIX}"


def bases(folder: Path) -> list[int]:
    """Return the first offsets of all segments, sorted; empty when there is no such folder."""
    try:
        names = os.listdir(folder)  # noqa: PTH208 - called by every read
    except FileNotFoundError:
        return []
    return sorted(int(name[:20]) for name in names if len(name) == 23 and name.endswith(SUFFIX) and name[:20].isdigit())


def remove(path: Path) -> None:
    """Remove a segment; its side files last, for a database without its WAL would look damaged."""
    for name in (path, Path(f"{path}-wal"), Path(f"{path}-shm")):
        name.unlink(missing_ok=True)


def size_bytes(path: Path) -> int:
    """Return what a segment takes on the disk, its WAL included; 0 when it is gone."""
    size = 0
    for name in (path, Path(f"{path}-wal")):
        with contextlib.suppress(FileNotFoundError):
            size += name.stat().st_size
    return size


def create(folder: Path, base_offset: int, producers: Mapping[str, int], carried_ns: int) -> None:
    """Make an empty segment, whole or not at all; nothing happens when another process was first."""
    with drafted(folder) as draft:
        fill(draft, (), producers, carried_ns)
        crash.point("log.rotate.drafted")
        with contextlib.suppress(FileExistsError):
            os.link(draft, path_of(folder, base_offset))
        crash.point("log.rotate.linked")
    sync_folder(folder)


@contextmanager
def drafted(folder: Path) -> Iterator[Path]:
    """Give a name nobody reads, and remove what was put there."""
    draft = folder / f".{uuid.uuid4().hex}.draft"
    try:
        yield draft
    finally:
        remove(draft)


def fill(path: Path, rows: Sequence[Row] | Iterator[Row], producers: Mapping[str, int], carried_ns: int) -> None:
    """Write a new segment file with these rows and make its content durable."""
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.executescript(_SCHEMA)
        connection.execute("INSERT INTO segment VALUES (?, NULL)", (carried_ns,))
        connection.executemany(
            "INSERT INTO producers VALUES (?, ?, ?)", [(*kept, kept[1]) for kept in producers.items()]
        )
        for row in rows:
            _insert(connection, [row])
            if row[3]:
                _note_producers(connection, {row[3]: row[4]})
        connection.execute("COMMIT")
    finally:
        connection.close()
    fd = os.open(path, os.O_RDWR)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def tail_of(connection: sqlite3.Connection, base_offset: int) -> Tail:
    """Return where a segment ends, from its last row alone."""
    carried_ns, closed_at = connection.execute("SELECT carried_ns, end_offset FROM segment").fetchone()
    last = connection.execute(
        "SELECT base_offset + count, logged_ns FROM batches ORDER BY base_offset DESC LIMIT 1"
    ).fetchone()
    end_offset, logged_ns = last or (base_offset, carried_ns)
    return Tail(end_offset, logged_ns, closed_at is not None)


def producers_of(connection: sqlite3.Connection) -> dict[str, int]:
    """Return the last stored sequence of every producer."""
    return dict(connection.execute("SELECT producer, sequence FROM producers"))


def carried_by(connection: sqlite3.Connection) -> tuple[dict[str, int], int]:
    """Return what a segment took over from the one before: producers, logged time of its last batch."""
    (carried_ns,) = connection.execute("SELECT carried_ns FROM segment").fetchone()
    query = "SELECT producer, carried FROM producers WHERE carried IS NOT NULL"
    return dict(connection.execute(query)), carried_ns


def left_by(connection: sqlite3.Connection) -> tuple[dict[str, int], int]:
    """Return what the segment after this one takes over."""
    return producers_of(connection), tail_of(connection, 0).logged_ns


def _insert(connection: sqlite3.Connection, rows: list[Row]) -> None:
    connection.executemany(f"INSERT INTO batches ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)  # noqa: S608


def _note_producers(connection: sqlite3.Connection, sequences: Mapping[str, int]) -> None:
    connection.executemany(
        "INSERT INTO producers VALUES (?, ?, NULL) ON CONFLICT DO UPDATE SET sequence = excluded.sequence",
        sequences.items(),
    )


def connect(path: Path, mode: Literal["ro", "rw"]) -> sqlite3.Connection:
    """Open an existing segment; any thread may use the connection, one at a time."""
    connection = sqlite3.connect(
        f"{path.as_uri()}?mode={mode}", uri=True, isolation_level=None, timeout=BUSY_SECONDS, check_same_thread=False
    )
    # Garbage must reach the checksum instead of failing in the decoder.
    connection.text_factory = lambda data: data.decode("utf-8", "surrogateescape")
    return connection


class Writer:
    """The newest segment of a partition, open for appending; used by one thread at a time."""

    def __init__(self, path: Path, base_offset: int, sync: Sync) -> None:
        self.base_offset = base_offset
        self.path = path
        self._connection = connect(path, "rw")
        self._connection.execute(f"PRAGMA synchronous = {sync.upper()}")
        self._connection.execute("PRAGMA busy_timeout = 0")  # `_begin` waits instead
        self._connection.execute("PRAGMA wal_autocheckpoint = 0")
        self._checkpoints = Checkpoints(self._connection, lambda: connect(path, "rw"))
        self._first_ns: int | None = None
        self.stepped_ns = 0  # below 0: the last append was logged so much before the one it follows

    def append(self, requests: Sequence[Request], now_ns: int, max_bytes: int, max_age_ns: int) -> bool:
        """Store all requests in one transaction, or none and return False: the segment is closed (now).

        Within a segment the logged time never decreases: one that steps back starts a new segment.

        Raises:
            sqlite3.Error: nothing is stored, or (a failed sync) it is unknown.
        """
        connection = self._connection
        self._begin()
        try:
            tail = tail_of(connection, self.base_offset)
            logged_ns = logged_time(now_ns, tail.logged_ns)
            if tail.is_closed:
                connection.execute("ROLLBACK")
                return False
            stepped_ns = min(0, logged_ns - tail.logged_ns)
            is_begun = tail.end_offset > self.base_offset
            if is_begun and (stepped_ns or self._is_full(logged_ns, max_bytes, max_age_ns)):
                connection.execute("UPDATE segment SET end_offset = ?", (tail.end_offset,))
                connection.execute("COMMIT")
                crash.point("log.rotate.closed")
                return False
            crash.point("log.append.before_insert")
            offsets = self._store(requests, tail.end_offset, logged_ns)
            crash.point("log.append.before_commit")
            connection.execute("COMMIT")
            crash.point("log.append.after_commit")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")  # fails when SQLite already did it
            raise
        for request, offset in zip(requests, offsets, strict=True):
            request.base_offset = offset
        self._checkpoints.appended(PAGES_BESIDE * PAGE_BYTES + sum([len(request.blob) for request in requests]))
        self.stepped_ns = stepped_ns if max(offsets) >= 0 else 0
        return True

    def _begin(self) -> None:
        """Wait for the write lock, which other processes hold for about a millisecond at a time.

        SQLite's own waiting doubles its pauses up to 100 ms: beside a busy process it hardly ever gets a turn.
        """
        started = time.monotonic()
        while True:
            try:
                self._connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                waited = time.monotonic() - started
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                    raise
                if waited > BUSY_SECONDS:
                    meters.acted("log.busy", waited_seconds=waited)
                    raise
            else:
                return
            time.sleep(random.uniform(*BUSY_PAUSE_SECONDS))  # noqa: S311 - no secret

    def _is_full(self, now_ns: int, max_bytes: int, max_age_ns: int) -> bool:
        if self._first_ns is None:
            query = "SELECT logged_ns FROM batches ORDER BY base_offset LIMIT 1"
            self._first_ns = int(self._connection.execute(query).fetchone()[0])
        (pages,) = self._connection.execute("PRAGMA page_count").fetchone()
        return bool(pages * PAGE_BYTES >= max_bytes) or now_ns - self._first_ns >= max_age_ns

    def _store(self, requests: Sequence[Request], end_offset: int, logged_ns: int) -> list[int]:
        offsets: list[int] = []
        rows: list[Row] = []
        sequences: dict[str, int] = {}
        for r in requests:
            if r.producer and self._is_repeat(r, sequences):
                offsets.append(-1)
                continue
            crc32 = checksum(end_offset, r.count, logged_ns, r.producer, r.sequence, r.codec, r.blob_crc32)
            rows.append((end_offset, r.count, logged_ns, r.producer, r.sequence, r.codec, crc32, r.blob))
            if r.producer:
                sequences[r.producer] = r.sequence
            offsets.append(end_offset)
            end_offset += r.count
        _insert(self._connection, rows)
        if sequences:
            _note_producers(self._connection, sequences)
        return offsets

    def _is_repeat(self, request: Request, sequences: Mapping[str, int]) -> bool:
        stored = sequences.get(request.producer)
        if stored is None:
            query = "SELECT sequence FROM producers WHERE producer = ?"
            row = self._connection.execute(query, (request.producer,)).fetchone()
            stored = row[0] if row else None
        return stored is not None and request.sequence <= stored

    def successor(self) -> tuple[int, dict[str, int], int] | None:
        """Return what the next segment starts with (offset, producers, logged time), or None while this one is open."""
        tail = tail_of(self._connection, self.base_offset)
        return (tail.end_offset, producers_of(self._connection), tail.logged_ns) if tail.is_closed else None

    def close(self) -> None:
        """Close the file; what is in the WAL goes into the database first where no reader is in the way."""
        self._checkpoints.finish()
        with contextlib.suppress(sqlite3.Error):
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        self._connection.close()
