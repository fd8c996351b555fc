"""One client's WebSocket: an outbox in order, the faults that befall it, and what it proved to have read."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from aiohttp import WSMsgType, web

from k2.simulator.account import Intervals, Tally
from k2.simulator.faults import Fault, Faults, add_fields, break_text
from k2.simulator.market import MarketTrade

DATA, CONTROL, HEARTBEAT = 0, 1, 2
OUTBOX_MESSAGES = 200_000
"""A client that is behind by more than this is cut off, as exchanges do."""
_UNANSWERED_PINGS = 60
_DRAIN_SECONDS = 10.0


class Teller(Protocol):
    """Whoever wants to know what became of a message: a tally of the account, or a recording's player."""

    def announce(self, trades: Sequence[MarketTrade]) -> None:
        """Called after the message was written to a connection."""

    def withhold(self, trades: Sequence[MarketTrade]) -> None:
        """Called when a fault dropped the message."""


class Message(NamedTuple):
    """One message for one or more connections."""

    text: str
    kind: int = CONTROL
    teller: Teller | None = None
    trades: Sequence[MarketTrade] = ()


class Connection:
    """The server's side of one client connection.

    `sequence` counts the messages of exchanges that number them. With `lossless` (recordings, full speed)
    data waits while a fault holds the connection; otherwise it is lost to this client, as at an exchange.
    """

    def __init__(
        self,
        exchange: str,
        socket: web.WebSocketResponse,
        request: web.Request,
        faults: Faults,
        clock: Callable[[], float],
        *,
        seed: int,
        unknown: Callable[[Connection], str],
        forget: Callable[[Connection], None],
    ) -> None:
        self.exchange = exchange
        self.sequence = 0
        self.lossless = False
        self.wrapped = False  # Binance: messages carry the name of their stream
        self.microseconds = False  # Binance: times in microseconds
        self._socket = socket
        self._transport = request.transport
        self._faults = faults
        self._clock = clock
        self._random = random.Random(seed)  # noqa: S311 kinds of damage by seed, not a secret
        self._unknown = unknown
        self._forget = forget
        self._outbox: deque[Message] = deque()
        self._wake = asyncio.Event()
        self._drained = asyncio.Event()
        self._drained.set()
        self._held: Message | None = None
        self._frozen_until = self._silent_until = 0.0
        self._silent_heartbeats = False
        self._ping_number = 0
        self._epoch: dict[Tally, Intervals] = {}
        self._pinged: deque[tuple[int, dict[Tally, Intervals]]] = deque()
        self.gone = False
        self._sender = asyncio.create_task(self._send_all())

    def send(self, text: str, kind: int = CONTROL) -> None:
        """Queue a message of the protocol itself."""
        self.put(Message(text, kind))

    def put(self, message: Message) -> None:
        """Queue a message; a client too far behind is cut off."""
        if self.gone:
            return
        self._outbox.append(message)
        self._drained.clear()
        self._wake.set()
        if len(self._outbox) > OUTBOX_MESSAGES:
            asyncio.get_running_loop().call_soon(self.abort)  # not now: the caller goes through the listeners

    async def drained(self) -> None:
        """Wait until everything queued is written, or the connection has ended."""
        await self._drained.wait()

    async def _send_all(self) -> None:
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                while self._outbox:
                    await self._deliver(self._outbox[0])
                    self._outbox.popleft()
                self._drained.set()
        except (ConnectionError, RuntimeError):  # RuntimeError: aiohttp's answer to a write after the close
            self.abort()

    async def _deliver(self, message: Message) -> None:
        now = self._clock()
        if now < self._silent_until or now < self._frozen_until:
            passes = now >= self._frozen_until and (
                message.kind == CONTROL or (message.kind == HEARTBEAT and self._silent_heartbeats)
            )
            if not passes:
                if not (self.lossless and message.kind == DATA):
                    return
                await asyncio.sleep(max(self._silent_until, self._frozen_until) - now)
        if message.kind != DATA:
            await self._write(_bytes(message.text))
            return
        copies = 1
        for fault in self._faults.strikes(self.exchange, now):
            if fault.kind == "drop":
                if message.teller is not None:
                    message.teller.withhold(message.trades)
                return
            if fault.kind == "reorder" and self._held is None:
                self._held = message
                return
            if fault.kind == "repeat":
                copies += 1
            message = await self._disturb(fault, message)
        for _ in range(copies):
            await self._tell(message)
        await self.release()

    async def _disturb(self, fault: Fault, message: Message) -> Message:
        if fault.kind == "malformed":
            await self._write(break_text(message.text, self._random))
        elif fault.kind == "unknown-type":
            await self._write(self._unknown(self).encode())
        elif fault.kind == "unknown-field":
            return message._replace(text=add_fields(message.text))
        return message

    async def release(self) -> None:
        """Send the message held back by a reorder fault."""
        held, self._held = self._held, None
        if held is not None:
            await self._tell(held)

    async def _tell(self, message: Message) -> None:
        try:
            await self._write(_bytes(message.text))
        except asyncio.CancelledError:  # can only come while waiting for room: the message is written already
            self._told(message)
            raise
        self._told(message)

    def _told(self, message: Message) -> None:
        teller, trades = message.teller, message.trades
        if teller is None:
            return
        teller.announce(trades)
        if trades and isinstance(teller, Tally):
            sent = self._epoch.get(teller)
            if sent is None:
                sent = self._epoch[teller] = Intervals()
            sent.add(trades[0].trade_id, trades[-1].trade_id)

    async def _write(self, data: bytes) -> None:
        await self._socket.send_frame(data, WSMsgType.TEXT)

    async def ping(self) -> None:
        """Ask for a sign of life; the answer confirms everything written before."""
        if self.gone or self._clock() < self._frozen_until or len(self._pinged) >= _UNANSWERED_PINGS:
            return
        self._ping_number += 1
        self._pinged.append((self._ping_number, self._epoch))
        self._epoch = {}
        with contextlib.suppress(ConnectionError, RuntimeError):
            await self._socket.ping(str(self._ping_number).encode())

    def ponged(self, data: bytes) -> None:
        """Note the client's answer to a ping."""
        number = int(data) if data.isdigit() else 0
        while self._pinged and self._pinged[0][0] <= number:
            self._confirm(self._pinged.popleft()[1])

    @staticmethod
    def _confirm(epoch: dict[Tally, Intervals]) -> None:
        for tally, sent in epoch.items():
            for first, last in sent:
                tally.confirmed.add(first, last)

    def freeze(self, until: float) -> None:
        """Stop sending and reading without closing (half-open), until a moment; the connection is then reset."""
        self._frozen_until = until

    def silence(self, until: float, *, heartbeats: bool) -> None:
        """Send no data until a moment; pings are answered, heartbeats go on if asked."""
        self._silent_until, self._silent_heartbeats = until, heartbeats

    @property
    def thaw_due(self) -> bool:
        """Whether a half-open time is over and the connection is to be reset."""
        return bool(self._frozen_until) and self._clock() >= self._frozen_until

    async def while_frozen(self) -> None:
        """Wait as long as nothing may be read."""
        while (left := self._frozen_until - self._clock()) > 0 and not self.gone:  # noqa: ASYNC110 a matter of time
            await asyncio.sleep(min(left, 0.5))

    async def close(self) -> None:
        """Close in good order; what the client read up to the closing handshake is confirmed."""
        if self.lossless:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.drained(), _DRAIN_SECONDS)
        self._outbox.clear()
        self.stop()
        with contextlib.suppress(ConnectionError, RuntimeError):
            await self._socket.close(code=1001, message=b"going away")
            if self._socket.close_code not in (None, 1006):
                for _, epoch in self._pinged:
                    self._confirm(epoch)
                self._confirm(self._epoch)

    def abort(self) -> None:
        """Reset the connection without a word."""
        if self._transport is not None:
            self._transport.abort()
        self.stop()

    def stop(self) -> None:
        """Send nothing more; what is queued is not told."""
        self.gone = True
        self._forget(self)
        self._drained.set()
        if self._sender is not asyncio.current_task():
            self._sender.cancel()


def _bytes(text: str) -> bytes:
    """Encode a message; what a recording held that is not UTF-8 comes out as it was."""
    return text.encode("utf-8", "surrogateescape")
