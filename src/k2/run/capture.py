"""Captures one exchange: its connections' records into its partition of the log, and nothing else.

What can be wrong in a frame is found later, from the log. A record is in memory only until the append that
makes it durable; the memory has a limit, and at the limit the sockets are not read (TCP then holds the
exchange back). Nothing is dropped here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import signal
import ssl
import time
from collections import deque
from collections.abc import Awaitable, Callable, Generator
from pathlib import Path
from typing import Any

import msgspec

from k2 import meters
from k2.errors import StoreDown
from k2.feeds import connection, registry
from k2.feeds.base import Exchange
from k2.feeds.connection import Feed
from k2.log import Log, open_log
from k2.model import Frame
from k2.run.captured import CaptureStatus, status_path
from k2.run.echo import log_through_echo
from k2.run.folder import LOCK_WAIT_SECONDS, hold, publish, run_folder
from k2.run.heartbeat import attach
from k2.run.readings import TELL_SECONDS, tell
from k2.run.upgrade import upgrade
from k2.settings import CaptureSettings, LogSettings, Settings

logger = logging.getLogger("k2.capture")

# Name under which capture appends: with it an append whose outcome is unknown can be made again safely.
PRODUCER = "capture"
BATCH_BYTES = 8 << 20  # an append is not much larger than this
STATUS_SECONDS = 1.0
# After a stop the buffer is worked off for at most this long; a log that is down longer loses it (said loudly).
DRAIN_SECONDS = 10.0
# A supervised capture waits so long for a dying one (of a supervisor killed a moment ago) to let go.
LOCK_SECONDS = 3.0
PROBE_SECONDS = 5.0
APPEND_RETRY_FIRST_SECONDS = 0.1
APPEND_RETRY_MAX_SECONDS = 5.0


class Buffer:
    """Records on their way to the log, at most so many and so many bytes (one more per connection).

    A record counts until it is durable, so the limit bounds the memory used.
    """

    def __init__(self, max_frames: int, max_bytes: int) -> None:
        """Store the limits."""
        self.frames = 0
        self.bytes = 0
        self.full_count = 0
        self._max_frames = max_frames
        self._max_bytes = max_bytes
        self._waiting: deque[Frame] = deque()
        self._arrived = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._full_at = 0.0  # when it became full, monotonic
        self._closed = False
        self._taken_at = -math.inf

    def put(self, frame: Frame) -> Awaitable[None] | None:
        """Take a record, always; returns what to await for room when the limit is reached (see `Emit`)."""
        self._waiting.append(frame)
        self.frames += 1
        self.bytes += len(frame.data)
        self._arrived.set()
        if self.frames < self._max_frames and self.bytes < self._max_bytes:
            return None
        if self._room.is_set():
            self._room.clear()
            self._full_at = time.monotonic()
        self.full_count += 1
        return _Room(self._room)

    async def take(self, most: int, linger_seconds: float) -> list[Frame]:
        """Wait for records and return the oldest; empty only at the end.

        At once where the last were taken `linger_seconds` ago or longer, else then: a lone record does not wait, and
        many share an append.
        """
        await self._arrived.wait()
        early = self._taken_at + linger_seconds - time.monotonic()
        if early > 0 and len(self._waiting) < most and not self._closed:
            await asyncio.sleep(early)
        self._taken_at = time.monotonic()
        taken: list[Frame] = []
        size = 0
        while self._waiting and len(taken) < most and size < BATCH_BYTES:
            taken.append(self._waiting.popleft())
            size += len(taken[-1].data)
        if not self._waiting and not self._closed:
            self._arrived.clear()
        return taken

    def release(self, frames: list[Frame]) -> None:
        """Forget records that are durable."""
        self.frames -= len(frames)
        self.bytes -= sum(len(frame.data) for frame in frames)
        if self.frames < self._max_frames and self.bytes < self._max_bytes and not self._room.is_set():
            self._room.set()
            meters.acted("capture.buffer_frames", waited_seconds=time.monotonic() - self._full_at)

    def close(self) -> None:
        """No more will come: `take` gives what is left, then nothing."""
        self._closed = True
        self._arrived.set()


class _Room:
    """Awaitable that may be left unawaited, unlike a coroutine."""

    def __init__(self, room: asyncio.Event) -> None:
        self._room = room

    def __await__(self) -> Generator[Any, None, None]:
        yield from self._room.wait().__await__()


class Capture:
    """One exchange into one log partition until it is stopped."""

    def __init__(
        self,
        exchange: Exchange,
        settings: Settings,
        log: Log,
        *,
        clock_ns: Callable[[], int] = time.time_ns,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Store the parts; raises UnknownName for a symbol in the settings that is not understood."""
        self._partition = exchange.name
        self._log = log
        self._log_settings: LogSettings = settings.log
        limits: CaptureSettings = settings.capture
        self._buffer = Buffer(limits.buffer_frames, limits.buffer_bytes)
        self._feed = Feed(exchange, settings, self._buffer.put, clock_ns=clock_ns, tls=tls)
        self._sequence = 0
        self._status = CaptureStatus(exchange.name, os.getpid(), time.time_ns(), 0)

    def status(self) -> CaptureStatus:
        """Return the present state, as a value of its own."""
        buffer = self._buffer
        return msgspec.structs.replace(
            self._status,
            written_ns=time.time_ns(),
            buffer_frames=buffer.frames,
            buffer_bytes=buffer.bytes,
            buffer_full=buffer.full_count,
            connections=self._feed.status(),
        )

    async def run(self, stop: asyncio.Event, *, drain_seconds: float = DRAIN_SECONDS) -> None:
        """Capture until `stop` is set, then close the sockets and make durable what was taken.

        While the log is down (StoreDown) the append is tried again for ever, and the buffer fills; nothing is
        connected before the log could be asked how far it is.

        Raises:
            StoreDown: the log was still down `drain_seconds` after the stop; says how much is lost.
        """
        feed = asyncio.create_task(self._run_feed())
        appender = asyncio.create_task(self._append_all())
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait({feed, appender, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        feed.cancel()
        await asyncio.wait({feed})
        self._buffer.close()
        await asyncio.wait({appender}, timeout=drain_seconds)
        for task in (appender, feed):
            if task.done() and not task.cancelled():
                task.result()  # a fault ends the process; its supervisor starts it anew
        if not appender.done():
            appender.cancel()
            meters.acted("capture.drain")
            raise StoreDown(
                f"capture {self._partition}: stopped with {self._buffer.frames} frames not in the log, which is down: "
                f"{self._status.last_error}"
            )

    async def _run_feed(self) -> None:
        """Run the feed with epochs that no earlier capture process has used.

        Every epoch has a record of its own in the log, so there are never more epochs than offsets.
        """
        await self._feed.run(await self._persistently(self._log.end_offset, self._partition))

    async def _append_all(self) -> None:
        """Append what the buffer gives until it is closed and empty."""
        self._sequence = await self._persistently(self._last_sequence) + 1
        linger = self._log_settings.linger_ms / 1_000
        while frames := await self._buffer.take(self._log_settings.batch_frames, linger):
            await self._persistently(self._append, frames)
            self._sequence += 1
            self._buffer.release(frames)
            self._status.appends += 1
            self._status.appended_frames += len(frames)

    def _last_sequence(self) -> int:
        return self._log.producer_sequence(self._partition, PRODUCER) or 0

    def _append(self, frames: list[Frame]) -> int:
        return self._log.append(self._partition, frames, producer=PRODUCER, sequence=self._sequence)

    async def _persistently(self, action: Callable[..., int], *arguments: object) -> int:
        """Do something with the log in a thread; while the log is down, again and again."""
        wait = APPEND_RETRY_FIRST_SECONDS
        while True:
            try:
                done = await asyncio.to_thread(action, *arguments)
            except StoreDown as error:
                self._status.append_failures += 1
                self._status.last_error = str(error)
                logger.error(
                    "%s: the log is down, %d frames wait in memory, trying again in %.1f s: %s",
                    *(self._partition, self._buffer.frames, wait, error),
                )
            else:
                if wait > APPEND_RETRY_FIRST_SECONDS:
                    logger.warning("%s: the log works again, nothing was lost", self._partition)
                return done
            await asyncio.sleep(wait)
            wait = min(2 * wait, APPEND_RETRY_MAX_SECONDS)


def probe(exchange: Exchange, settings: Settings, timeout_seconds: float = PROBE_SECONDS) -> None:
    """Try once to reach an exchange; raises FeedDown saying why it cannot be (see `feeds.connection.probe`)."""
    asyncio.run(connection.probe(exchange, settings, timeout_seconds))


def run_capture(settings: Settings, exchange_name: str) -> None:
    """Capture one exchange until SIGTERM or SIGINT: what `k2 capture EXCHANGE` does.

    Raises:
        UnknownName: no such exchange or symbol.
        InUse: another process captures this exchange into the same data folder.
        StoreDown: stopped while the log was down.
    """
    upgrade(settings)
    heartbeat = attach()  # the first beat comes from the event loop: before it, a wrong setting is hopeless
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    exchange = registry.get(exchange_name)
    lock = run_folder(settings) / f"capture-{exchange.name}.lock"
    role = f"k2 capture {exchange.name}"
    conflict = (
        f"{exchange.name} is already being captured into {settings.data_path} by {{owner}}; "
        "stop it or choose another data folder with --data"
    )
    patience = LOCK_SECONDS if heartbeat.supervised else LOCK_WAIT_SECONDS
    with (
        hold(lock, role, conflict, wait_seconds=patience),
        contextlib.closing(open_log(settings)) as log,
        log_through_echo(),  # a message nobody reads must not keep the sockets waiting
    ):
        asyncio.run(_capture(exchange, settings, log))


async def _capture(exchange: Exchange, settings: Settings, log: Log) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    capture = Capture(exchange, settings, log)
    path = status_path(settings, exchange.name)
    beside = [
        asyncio.create_task(attach().beat_for_ever()),
        asyncio.create_task(_tell_for_ever(capture, path)),
        asyncio.create_task(_tell_of_limits(path.parent, f"capture-{exchange.name}")),
    ]
    try:
        await capture.run(stop)
    finally:
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
        _tell(msgspec.json.encode(capture.status()), path)


async def _tell_for_ever(capture: Capture, path: Path) -> None:
    while True:
        # In a thread: a slow disk must not keep the sockets waiting.
        await asyncio.to_thread(_tell, msgspec.json.encode(capture.status()), path)
        await asyncio.sleep(STATUS_SECONDS)


async def _tell_of_limits(folder: Path, process: str) -> None:
    while True:
        await asyncio.to_thread(tell, folder, process)
        await asyncio.sleep(TELL_SECONDS)


def _tell(status: bytes, path: Path) -> None:
    with contextlib.suppress(OSError):  # the disk is full; the log says so, loudly
        publish(path, status)
