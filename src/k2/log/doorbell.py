"""Waking waiting readers in other processes: one FIFO a waiter, one byte a commit."""

from __future__ import annotations

import contextlib
import os
import select
import uuid
from pathlib import Path

SUFFIX = ".bell"


class Bell:
    """A FIFO that appenders write to; owned by one waiting thread at a time.

    Opened for reading *and* writing, so that it never sees an end of file and a byte rung
    between two waits is kept: nothing is missed.
    """

    def __init__(self, folder: Path) -> None:
        """Make the FIFO and hang it up.

        Raises:
            OSError: the folder cannot be written, or its file system knows no FIFOs.
        """
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{os.getpid()}-{uuid.uuid4().hex}"
        self._path = folder / (name + SUFFIX)
        hidden = folder / ("." + name)
        os.mkfifo(hidden)
        # Opened before it gets its name: an appender that finds nobody at a bell takes it down.
        try:
            self._fd = os.open(hidden, os.O_RDWR | os.O_NONBLOCK)
            hidden.rename(self._path)
        except OSError:
            hidden.unlink(missing_ok=True)
            raise
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLIN)

    def silence(self) -> None:
        """Forget the rings so far; look at the log after this, not before."""
        with contextlib.suppress(BlockingIOError):
            while len(os.read(self._fd, 4096)) == 4096:
                pass

    def listen(self, timeout_seconds: float) -> None:
        """Block until somebody rings, or the time is up."""
        self._poll.poll(max(0, timeout_seconds * 1000))

    def ring(self) -> None:
        """Wake the own waiter, to end its wait."""
        with contextlib.suppress(BlockingIOError):
            os.write(self._fd, b"!")

    def close(self) -> None:
        """Take the bell down."""
        self._path.unlink(missing_ok=True)
        os.close(self._fd)


def ring_all(folder: Path) -> None:
    """Wake every waiter; bells whose owner died are taken down. Never fails: waiters also look once a second."""
    try:
        names = os.listdir(folder)  # noqa: PTH208 - once a commit: Paths cost more than the rings
    except OSError:
        return
    for name in names:
        if name.endswith(SUFFIX):
            _ring(os.path.join(folder, name))  # noqa: PTH118


def _ring(path: str) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        return
    except OSError:  # ENXIO: nobody holds the other end
        with contextlib.suppress(OSError):
            os.unlink(path)  # noqa: PTH108
        return
    try:
        os.write(fd, b"!")
    except OSError:
        pass  # full: its owner has rings enough; or just gone
    finally:
        os.close(fd)
