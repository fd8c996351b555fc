"""Durable positions of named readers: what retention must not remove, and what it had to all the same."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

from k2 import crash
from k2.durable import make_folder
from k2.log.base import GivenUp
from k2.log.failures import told
from k2.log.segment import BUSY_SECONDS
from k2.model import Positions

_SCHEMA = """
CREATE TABLE IF NOT EXISTS readers (reader TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS positions (
  reader TEXT NOT NULL REFERENCES readers,
  log_partition TEXT NOT NULL,
  position INTEGER NOT NULL,  -- the reader needs nothing below
  PRIMARY KEY (reader, log_partition)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS given_up (
  log_partition TEXT NOT NULL,
  first_offset INTEGER NOT NULL,
  end_offset INTEGER NOT NULL, -- exclusive
  readers TEXT NOT NULL,       -- who had not passed them
  at_ns INTEGER NOT NULL,
  PRIMARY KEY (log_partition, first_offset)
) WITHOUT ROWID;
"""


class ReaderPositions:
    """A small SQLite database beside the partitions, made at the first commit; always durable when a call returns."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None

    def position(self, reader: str, partition: str) -> int:
        """Return the position of a reader; 0 when it never committed one for this partition."""
        with self._lock, told("read reader positions in", self._path):
            connection = self._open(make=False)
            if connection is None:
                return 0
            query = "SELECT position FROM positions WHERE reader = ? AND log_partition = ?"
            row = connection.execute(query, (reader, partition)).fetchone()
            return int(row[0]) if row else 0

    def commit(self, reader: str, positions: Positions) -> None:
        """Record positions; they never go back."""
        with self._lock, told("commit reader positions to", self._path):
            connection = self._open(make=True)
            assert connection is not None
            with connection:  # commits, or rolls back
                connection.execute("BEGIN IMMEDIATE")
                connection.execute("INSERT OR IGNORE INTO readers VALUES (?)", (reader,))
                connection.executemany(
                    "INSERT INTO positions VALUES (?, ?, ?) "
                    "ON CONFLICT DO UPDATE SET position = max(position, excluded.position)",
                    [(reader, partition, position) for partition, position in positions.items()],
                )
                crash.point("log.reader.before_commit")

    def all(self, partition: str) -> list[int]:
        """Return the position of every named reader in a partition, 0 for those that never committed one."""
        with self._lock, told("read reader positions in", self._path):
            connection = self._open(make=False)
            if connection is None:
                return []
            query = (
                "SELECT coalesce(position, 0) FROM readers "
                "LEFT JOIN positions ON positions.reader = readers.reader AND log_partition = ?"
            )
            return [int(row[0]) for row in connection.execute(query, (partition,))]

    def behind(self, partition: str, offset: int) -> dict[str, int] | None:
        """Return the position of every named reader that has not passed an offset; None when there is no reader."""
        with self._lock, told("read reader positions in", self._path):
            connection = self._open(make=False)
            query = (
                "SELECT readers.reader, coalesce(position, 0) FROM readers "
                "LEFT JOIN positions ON positions.reader = readers.reader AND log_partition = ?"
            )
            positions = dict(connection.execute(query, (partition,))) if connection is not None else {}
            return {name: at for name, at in positions.items() if at < offset} if positions else None

    def give_up(self, range_: GivenUp) -> None:
        """Write down what is about to be removed; the same again changes nothing."""
        with self._lock, told("write what is given up to", self._path):
            connection = self._open(make=True)
            assert connection is not None
            connection.execute(
                "INSERT OR IGNORE INTO given_up VALUES (?, ?, ?, ?, ?)",
                (range_.partition, range_.first_offset, range_.end_offset, range_.readers, range_.at_ns),
            )

    def given_up(self, partition: str) -> list[GivenUp]:
        """Return what was given up of a partition, by offset."""
        with self._lock, told("read what was given up in", self._path):
            connection = self._open(make=False)
            if connection is None:
                return []
            query = "SELECT * FROM given_up WHERE log_partition = ? ORDER BY first_offset"
            return [GivenUp(*row) for row in connection.execute(query, (partition,))]

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _open(self, *, make: bool) -> sqlite3.Connection | None:
        if self._connection is None:
            if not make and not self._path.exists():
                return None
            make_folder(self._path.parent)
            connection = sqlite3.connect(
                self._path, isolation_level=None, timeout=BUSY_SECONDS, check_same_thread=False
            )
            try:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = FULL")
                connection.executescript(_SCHEMA)
            except sqlite3.Error:
                connection.close()
                raise
            self._connection = connection
        return self._connection
