"""Reading batches from segment files, also from damaged ones, while others append to them."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

from k2 import meters
from k2.log.codec import Row, is_whole
from k2.log.failures import is_damage
from k2.log.segment import COLUMNS, connect


class Connections:
    """Read-only connections to segments, kept open for the next read; each used by one thread at a time."""

    MOST_IDLE = 16

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: OrderedDict[sqlite3.Connection, Path] = OrderedDict()  # least recently used first
        self._closed = False
        meters.watch("log.idle_connections", self, lambda kept: len(kept._idle))

    @contextmanager
    def on(self, path: Path) -> Iterator[sqlite3.Connection]:
        """Give a connection that nobody else uses."""
        with self._lock:
            connection = next((kept for kept, of in reversed(self._idle.items()) if of == path), None)
            if connection is not None:
                del self._idle[connection]
        connection = connection or connect(path, "ro")
        try:
            yield connection
        except sqlite3.Error:
            connection.close()
            raise
        except BaseException:
            self._keep(connection, path)
            raise
        self._keep(connection, path)

    def _keep(self, connection: sqlite3.Connection, path: Path) -> None:
        with self._lock:
            self._idle[connection] = path
            surplus = [] if not self._closed else list(self._idle)
            if not surplus and len(self._idle) > self.MOST_IDLE:
                surplus = [next(iter(self._idle))]
                meters.acted("log.idle_connections")
            for old in surplus:
                del self._idle[old]
        for old in surplus:
            old.close()

    def forget(self, path: Path | None = None) -> None:
        """Close idle connections to a removed file; without a path all, and keep none from now on."""
        with self._lock:
            self._closed = self._closed or path is None
            unwanted = [kept for kept, of in self._idle.items() if path in (of, None)]
            for connection in unwanted:
                del self._idle[connection]
        for connection in unwanted:
            connection.close()


Stored = tuple[int, int, Row | None]
"""base_offset, end_offset (exclusive), and the row.

The row is None where it is damaged; equal offsets then mean that nothing behind them can be read in this segment.
"""

_FROM = f"""
SELECT {COLUMNS} FROM batches
WHERE base_offset >= coalesce((SELECT max(base_offset) FROM batches WHERE base_offset <= ?1), ?1)
  AND base_offset + count > ?1
ORDER BY base_offset
"""  # noqa: S608


def rows_from(connections: Connections, path: Path, position: int) -> Iterator[Stored]:
    """Give the stored batches from the one that holds `position` on, in order.

    Where SQLite finds the file damaged, the readable rows on both sides of the damage are given.
    The caller sees what is missing by the offsets.
    """
    try:
        # Closed inside `on`: an open cursor pins its snapshot, and the next user would read stale rows.
        with connections.on(path) as connection, contextlib.closing(_scan(connection, position)) as found:
            for stored in found:
                yield stored
                position = _behind(stored, position)
    except sqlite3.Error as error:
        if not is_damage(error):
            raise
        yield from salvaged(path, position)


def salvaged(path: Path, position: int) -> Generator[Stored, None, None]:
    """Give every batch that can still be read from a damaged file, in order, from `position` on."""
    connection = connect(path, "ro")
    try:
        connection.execute("PRAGMA writable_schema = ON")  # else a file with missing pages is refused outright
        while True:
            try:
                for stored in _scan(connection, position):
                    yield stored
                    position = _behind(stored, position)
                return
            except sqlite3.Error as error:
                if not is_damage(error):
                    raise
            following = _next_readable(connection, position)
            yield position, following or position, None
            if following is None:
                return
            position = following
    finally:
        connection.close()


def _scan(connection: sqlite3.Connection, position: int) -> Generator[Stored, None, None]:
    cursor = connection.execute(_FROM, (position,))
    try:
        for row in cursor:
            if is_whole(row):
                if row[0] + row[1] > position:  # a damaged tree may give a row twice
                    yield row[0], row[0] + row[1], row
                    position = row[0] + row[1]
            elif isinstance(row[0], int) and isinstance(row[1], int):
                yield row[0], row[0] + row[1], None
    finally:
        cursor.close()


def _behind(stored: Stored, position: int) -> int:
    # The count of a row that fails its checksum may be anything.
    return max(position, stored[1] if stored[2] else min(stored[0] + 1, 1 << 62))


def _next_readable(connection: sqlite3.Connection, position: int) -> int | None:
    """Return the lowest offset above `position` where a search in the tree succeeds and finds a row."""

    def probe(offset: int) -> bool:
        try:
            connection.execute(_FROM + "LIMIT 1", (offset,)).fetchone()
        except sqlite3.Error as error:
            if not is_damage(error):
                raise
            return False
        return True

    low, step = position, 1
    while not probe(low + step):
        low, step = low + step, step * 2
        if step > 1 << 61:
            return None
    high = low + step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if probe(middle) else (middle, high)
    return high if connection.execute(_FROM + "LIMIT 1", (high,)).fetchone() else None
