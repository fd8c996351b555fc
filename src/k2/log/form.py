"""The form of the log on disk, by number, and how a log of an older form is brought to the newest.

1. As the first release wrote it.
2. Each segment says in its own header that it is one of K2's, and of which form (`file` shows both):
   SQLite's `application_id` and `user_version`. A segment that was copied out of its log can so still be told.
"""

from __future__ import annotations

import fcntl
import logging
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from k2 import crash, stamp
from k2.errors import InUse
from k2.log import segment
from k2.log.failures import is_damage, told
from k2.log.limits import PARTITION_NAME
from k2.log.recovery import recover

_log = logging.getLogger(__name__)

NEWEST = segment.FORM
LOCK_FILE = ".lock"
LOCK_SECONDS = 10.0  # another process may be looking into the log for a moment


def partitions(folder: Path) -> list[Path]:
    """Return the folders of the partitions there are."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if PARTITION_NAME.fullmatch(p.name) and segment.bases(p))


def form(folder: Path) -> int | None:
    """Return the form of the log in a folder, None where there is no log."""
    return stamp.read(folder) if partitions(folder) else None


def begin(folder: Path) -> None:
    """Stamp a log that is being made; one that is there already keeps its stamp."""
    if not partitions(folder) and not (folder / stamp.FILE).is_file():
        stamp.write(folder, NEWEST)


def upgrade(folder: Path) -> None:
    """Bring a log to the newest form. May be killed anywhere, and is then run again from its start.

    Raises:
        InUse: another process has a partition open.
        StoreDown: the disk is full or cannot be written.
    """
    for partition in partitions(folder):
        with told("upgrade", partition), _alone(partition):
            recover(partition)
            for base_offset in segment.bases(partition):
                _identify(segment.path_of(partition, base_offset))
                crash.point("log.upgrade.half")
    with told("stamp", folder):
        stamp.write(folder, NEWEST)


def _identify(path: Path) -> None:
    """Give a segment its identity. What is damaged stays as it is: reading tells of it, and goes on behind."""
    with closing(segment.connect(path, "rw")) as connection:
        try:
            connection.executescript(segment.IDENTITY)
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        except sqlite3.Error as error:
            if not is_damage(error):
                raise
            _log.warning("upgrade: segment %s is damaged and stays as it is: %s", path, error)


@contextmanager
def _alone(partition: Path) -> Iterator[None]:
    """Hold a partition for this process alone."""
    descriptor = os.open(partition / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        deadline = time.monotonic() + LOCK_SECONDS
        while not _locked(descriptor):
            if time.monotonic() >= deadline:
                raise InUse(f"upgrade the log: another process has {partition} open; stop it first")
            time.sleep(0.01)  # flock has no timeout of its own
        yield
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
