"""Lines for whoever watches a terminal or a pipe, which never hold up the process that has them to say.

A terminal stopped with Ctrl-S, or a pager nobody scrolls, stops everybody who writes to it. So a thread writes, from
a queue with a limit; what does not fit is dropped, counted, and told of when somebody reads again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from k2 import meters

WAITING_BYTES = 1 << 20
CLOSE_SECONDS = 1.0


class Echo:
    """Writes lines to a stream from a thread of its own.

    It writes to the stream's descriptor, not to its buffer: a thread that hangs inside a buffer keeps the
    interpreter from ending.
    """

    def __init__(self, stream: BinaryIO) -> None:
        """Take over the stream's descriptor (a copy); what is in its buffer is flushed."""
        stream.flush()
        self._descriptor = os.dup(stream.fileno())
        self._changed = threading.Condition()
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._dropped = 0
        self._closed = False
        meters.watch("supervise.echo", self, lambda echo: echo._waiting_bytes)
        self._thread = threading.Thread(target=self._run, name="echo", daemon=True)
        self._thread.start()

    def put(self, lines: Sequence[bytes]) -> None:
        """Show lines (without their line ends) soon, or drop them while nobody reads; returns at once."""
        text = b"".join(line + b"\n" for line in lines)
        with self._changed:
            if self._waiting and self._waiting_bytes + len(text) > WAITING_BYTES:
                self._dropped += len(lines)
                meters.acted("supervise.echo", len(lines))
                return
            self._waiting.append(text)
            self._waiting_bytes += len(text)
            self._changed.notify()

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Let the thread end once all is written; one that nobody reads from is left behind after so long."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(seconds)
        if self._thread.is_alive():
            meters.acted("supervise.echo_close")

    def _run(self) -> None:
        while text := self._take():
            rest = memoryview(text)
            with contextlib.suppress(OSError):  # the reader is gone: nobody is left to tell
                while rest:
                    rest = rest[os.write(self._descriptor, rest) :]
        os.close(self._descriptor)

    def _take(self) -> bytes:
        """Wait for something to write; nothing: closed, and all is written."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            text = b"".join(self._waiting)
            self._waiting.clear()
            self._waiting_bytes = 0
            if self._dropped:
                text += b"%d lines were dropped here: nobody read them\n" % self._dropped
                self._dropped = 0
            return text


class EchoHandler(logging.Handler):
    """Log lines through an echo."""

    def __init__(self, echo: Echo) -> None:
        super().__init__()
        self._echo = echo

    def emit(self, record: logging.LogRecord) -> None:
        """Show one record."""
        try:
            self._echo.put([self.format(record).encode(errors="backslashreplace")])
        except Exception:  # noqa: BLE001 - as every handler does: a bad format must not end the work
            self.handleError(record)


@contextlib.contextmanager
def log_through_echo() -> Iterator[Echo]:
    """Give an echo to stderr; inside the block the log lines that go to stderr go through it, too."""
    echo = Echo(sys.stderr.buffer)
    root = logging.getLogger()
    before = list(root.handlers)
    diverted = [h for h in before if type(h) is logging.StreamHandler and h.stream in (sys.stderr, sys.__stderr__)]
    try:
        for handler in diverted:
            replacement = EchoHandler(echo)
            replacement.setFormatter(handler.formatter)
            replacement.setLevel(handler.level)
            root.removeHandler(handler)
            root.addHandler(replacement)
        yield echo
    finally:
        for ours in [h for h in root.handlers if isinstance(h, EchoHandler)]:
            root.removeHandler(ours)
        for handler in diverted:
            root.addHandler(handler)
        echo.close()
