"""Moves what was appended from SQLite's write-ahead file into the database, beside the appends instead of in them.

SQLite's own checkpoint runs inside every appender's two-hundredth commit or so and takes 5 to 10 ms, most of it
waiting for the disk: that was the 99th percentile of an append of 500 records.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable

from k2 import meters

WAL_BYTES = 4 << 20  # about so much is appended between two checkpoints; a crash leaves so much to be looked through
MOST_WAL_BYTES = 16 << 20
_PASSES = 2  # the second one moves what was appended during the first, so that little is left for the appender
_PASSIVE = "PRAGMA wal_checkpoint(PASSIVE)"


class Checkpoints:
    """Of one segment and the connection that appends to it; used by one thread at a time.

    A thread moves the bulk. The rest, some commits at most, is moved by the appender between two of its own:
    only a file that is moved to its end is begun anew, else it would grow for as long as appends go on.
    What fails is tried again after as many more bytes; nothing is lost by it, for the bytes stay where they are.
    """

    def __init__(self, connection: sqlite3.Connection, connect: Callable[[], sqlite3.Connection]) -> None:
        """Store the appender's connection, and how the thread gets one of its own."""
        self._connection = connection
        self._connect = connect
        self._bytes = 0  # estimated; since the file was begun anew, or the last try
        self._mover: threading.Thread | None = None

    def appended(self, size: int) -> None:
        """Count bytes committed, and do what is due; waits when the thread is `MOST_WAL_BYTES` behind."""
        self._bytes += size
        if self._mover is None:
            if self._bytes >= WAL_BYTES:
                self._begin()
            return
        if self._mover.is_alive():
            if self._bytes < MOST_WAL_BYTES:
                return
            began = time.monotonic()
            self._mover.join()
            meters.acted("log.wal", waited_seconds=time.monotonic() - began)
        self._mover = None
        self._move_rest()

    def finish(self) -> None:
        """Wait for the thread, if it is at work."""
        if self._mover is not None:
            self._mover.join()
            self._mover = None

    def _begin(self) -> None:
        mover = threading.Thread(target=self._move, name="k2-checkpoint", daemon=True)
        try:
            mover.start()
        except RuntimeError:  # the machine has no thread to give: what was appended is stored all the same
            self._move_rest()
        else:
            self._mover = mover

    def _move_rest(self) -> None:
        self._bytes = 0
        with contextlib.suppress(sqlite3.Error):
            self._connection.execute(_PASSIVE).fetchall()

    def _move(self) -> None:
        with contextlib.suppress(sqlite3.Error), contextlib.closing(self._connect()) as connection:
            for _ in range(_PASSES):
                connection.execute(_PASSIVE).fetchall()
