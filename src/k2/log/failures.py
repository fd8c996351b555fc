"""What SQLite and the file system say, told so that an operator knows what to do."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from k2.errors import StoreDown

_DAMAGE = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_TOOBIG, sqlite3.SQLITE_MISMATCH})
_TEXTS = {
    errno.ENOSPC: "the disk is full; free space and append again, no restart is needed",
    errno.EDQUOT: "the disk quota is used up; raise it and append again, no restart is needed",
    errno.EACCES: "no permission; let this user read and write the folder",
    errno.EPERM: "no permission; let this user read and write the folder",
    errno.EROFS: "the file system is read-only; mount it writable",
    errno.EMFILE: "this process has too many open files; raise `ulimit -n`",
    errno.ENFILE: "this machine has too many open files; raise fs.file-max",
    errno.EIO: "the disk fails to read or write; check it, then restart",
}
_ERRNOS = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_READONLY: errno.EROFS,
    sqlite3.SQLITE_PERM: errno.EACCES,
}
LEAST_FREE_BYTES = 1 << 20


def is_damage(error: sqlite3.Error) -> bool:
    """Return whether SQLite complains about the bytes of the file, not about its surroundings."""
    code = getattr(error, "sqlite_errorcode", 0)
    if code & 0xFF == sqlite3.SQLITE_ERROR:
        return "no such" in str(error)  # the schema page is gone
    return code & 0xFF in _DAMAGE or code == sqlite3.SQLITE_IOERR_SHORT_READ


def store_down(action: str, path: Path, error: Exception) -> StoreDown:
    """Return the `StoreDown` that says what was attempted, on what, why it failed and what to do."""
    number = error.errno if isinstance(error, OSError) else _errno_behind(error, path)
    text = _TEXTS.get(number or 0)
    if text is None and isinstance(error, sqlite3.Error):
        if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY:
            text = "another process holds the file locked; look for one that hangs, then append again"
        elif is_damage(error):
            text = "the file is damaged; stop what uses the log and start again, which salvages it"
    return StoreDown(f"log: {action} {path}: {text or 'try again'} ({error})")


@contextmanager
def told(action: str, path: Path) -> Iterator[None]:
    """Turn errors of SQLite and the file system into `StoreDown`."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise store_down(action, path, error) from error


def _errno_behind(error: Exception, path: Path) -> int | None:
    """Find what SQLite does not pass on: its code is often only "unable to open" or "I/O error"."""
    code = getattr(error, "sqlite_errorcode", 0)
    if code & 0xFF in _ERRNOS:
        number = _ERRNOS[code & 0xFF]
        return number if number != errno.EROFS or not _refused(path) else errno.EACCES
    if code & 0xFF not in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR):
        return None
    return _out_of_files() or (errno.EACCES if _refused(path) else None) or _out_of_space(path)


def _out_of_files() -> int | None:
    # Not the file itself: closing it here would drop the locks SQLite holds on it in this process.
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        return error.errno
    return None


def _refused(path: Path) -> bool:
    return not os.access(path.parent, os.W_OK | os.X_OK) or (path.exists() and not os.access(path, os.W_OK))


def _out_of_space(path: Path) -> int | None:
    try:
        status = os.statvfs(path.parent)
    except OSError as error:
        return error.errno
    return errno.ENOSPC if status.f_bavail * status.f_frsize < LEAST_FREE_BYTES else errno.EIO
