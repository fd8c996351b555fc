"""Plays recorded frames to the clients subscribed to their streams: all of them, once, in order, never dropped."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Protocol

from k2.model import FRAME, Frame, LogBatch
from k2.simulator.account import Account
from k2.simulator.connection import DATA, Connection, Message
from k2.simulator.market import MarketTrade
from k2.simulator.wire import AGGREGATES, TRADES, Stream, Wire

BATCH_FRAMES = 200
SETTLE_SECONDS = 0.5
"""The recording starts when the last subscription is this old, so that a client can make all of its own first."""
_POLL_SECONDS = 0.02


class ReadableLog(Protocol):
    """What is needed of `k2.log.base.Log` to play from it."""

    def read(self, partition: str, offset: int, *, max_frames: int = ..., max_bytes: int = ...) -> list[LogBatch]:
        """Return frames from `offset` on."""


def frames_of_log(log: ReadableLog, partition: str, start: int = 0) -> Iterator[Frame]:
    """Yield the frames of one partition of K2's own log, up to its present end."""
    offset = start
    while batches := log.read(partition, offset):
        for batch in batches:
            yield from batch.frames
            offset = batch.end_offset


class _Ticket:
    """What became of one frame."""

    def __init__(self) -> None:
        self.done = False

    def announce(self, trades: Sequence[MarketTrade]) -> None:
        """The frame was written to a connection."""
        self.done = True

    def withhold(self, trades: Sequence[MarketTrade]) -> None:
        """A fault dropped the frame."""
        self.done = True


class Player:
    """Plays one exchange's recording once, at `speed` times its own pace, or as fast as clients read (inf).

    A frame goes to every connection subscribed to its stream at that moment. Where a stream had a
    listener that left, the player waits for it to come back. Frames of streams nobody has ever subscribed
    are skipped and counted. Aggregates go to those who listen to trades when nobody asks for aggregates.
    """

    def __init__(self, wire: Wire, frames: Iterable[Frame], account: Account, speed: float) -> None:
        self._wire = wire
        self._frames = (frame for frame in frames if frame.kind == FRAME)
        self._account = account
        self._speed = speed
        self._started_at = 0.0
        self._first_ns = 0
        self.finished = asyncio.Event()

    async def run(self) -> None:
        """Play to the end."""
        await self._first_client()
        self._started_at = self._wire.clock()
        while batch := self._next_batch():
            await self._play(batch)
        self.finished.set()

    async def _first_client(self) -> None:
        wire = self._wire
        while not (  # noqa: ASYNC110 a matter of time
            wire.heard and wire.connections and wire.clock() - wire.asked_at >= SETTLE_SECONDS
        ):
            await asyncio.sleep(_POLL_SECONDS)

    def _next_batch(self) -> list[Frame]:
        if self._speed == float("inf"):
            return list(islice(self._frames, BATCH_FRAMES))
        return list(islice(self._frames, 1))

    async def _play(self, batch: list[Frame]) -> None:
        await self._pace(batch[0].received_ns)
        queue = []
        for frame in batch:
            stream = self._listened(frame.data)
            if stream is None:
                self._account.note_frame(self._wire.exchange, sent=False)
            else:
                queue.append((stream, frame.data.decode("utf-8", "surrogateescape"), _Ticket()))
        while queue:
            await self._send(queue)
            left = [entry for entry in queue if not entry[2].done]
            for _ in range(len(queue) - len(left)):
                self._account.note_frame(self._wire.exchange, sent=True)
            queue = left
            await asyncio.sleep(0)

    async def _pace(self, received_ns: int) -> None:
        if self._speed == float("inf"):
            return
        self._first_ns = self._first_ns or received_ns
        due = self._started_at + (received_ns - self._first_ns) / 1e9 / self._speed
        wait = due - self._wire.clock()
        if wait > 0:
            await asyncio.sleep(wait)

    def _listened(self, data: bytes) -> Stream | None:
        """Return the stream by which a frame is heard; None for control messages and streams never asked for."""
        stream = self._wire.stream_of(data)
        if stream is None or stream in self._wire.heard:
            return stream
        other = (TRADES, stream[1])
        return other if stream[0] == AGGREGATES and other in self._wire.heard else None

    async def _send(self, queue: list[tuple[Stream, str, _Ticket]]) -> None:
        """Give all frames to their listeners and wait until they are written, or the connections ended."""
        told: set[Connection] = set()
        for stream, text, ticket in queue:
            listening = self._wire.listening(*stream)
            while not listening:  # it was subscribed once and will be again
                await _drain(told)
                await asyncio.sleep(_POLL_SECONDS)
                listening = self._wire.listening(*stream)
            for connection in list(listening):
                connection.put(Message(text, DATA, ticket))
                told.add(connection)
        await _drain(told)


async def _drain(connections: set[Connection]) -> None:
    for connection in connections:
        await connection.drained()
