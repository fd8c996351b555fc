"""The writer's lease: one process at a time may write cold, and the others can name it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import threading
from pathlib import Path
from typing import IO

from k2.errors import InUse, StoreDown


class Lease:
    """A file locked by the process that holds it; the kernel frees it when that process dies.

    The file keeps the holder's process id and command, for the message of whoever is refused.
    """

    def __init__(self, path: Path, purpose: str) -> None:
        self._path = path
        self._purpose = purpose
        self._file: IO[str] | None = None
        self._lock = threading.Lock()

    @property
    def held(self) -> bool:
        """Whether this object holds the lease."""
        return self._file is not None

    def acquire(self) -> None:
        """Take the lease, or do nothing when it is held already.

        Raises:
            InUse: another process, or another object of this one, holds it.
            StoreDown: the file cannot be made, locked or written.
        """
        with self._lock:
            if self._file is None:
                self._file = self._take()

    def release(self) -> None:
        """Give the lease back; nothing happens when it is not held."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None

    def _take(self) -> IO[str]:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            file = self._path.open("a+", encoding="utf-8")
        except OSError as error:
            raise self._down("open", error) from error
        try:
            self._sign(file)
        except BaseException as error:
            with contextlib.suppress(OSError):  # of what could not be written
                file.close()
            if isinstance(error, OSError):
                raise self._down("lock", error) from error
            raise
        return file

    def _sign(self, file: IO[str]) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(500).strip() or "a process that has not signed yet"
            raise InUse(
                f"{self._purpose}: {self._path} is held by {holder}; stop it first, or use another data folder"
            ) from None
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} ({' '.join(sys.argv)[:400]})\n")
        file.flush()

    def _down(self, action: str, error: OSError) -> StoreDown:
        return StoreDown(f"{self._purpose}: cannot {action} {self._path}: {error}; check space and the folder's owner")
