"""The one connection loop of all exchanges: keeps every symbol of an exchange connected, for ever.

Symbols are split over connections. Each connection reconnects with backoff (full jitter, a ceiling, no end) and
is replaced before the exchange cuts it: the new socket is subscribed before the old one closes, and both run side
by side for a while, so the same trade may arrive twice but none is missed. Sockets of one connection share its
name and differ in `epoch`; at a rotation the records of two epochs interleave. A socket that is alive but brings
no data any more is replaced in the same way.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import random
import ssl
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import aiohttp
import msgspec

from k2 import meters
from k2.errors import FeedDown
from k2.feeds.base import Exchange
from k2.feeds.names import Names
from k2.feeds.session import (
    CLOSE_SECONDS,
    CONNECT_ERRORS,
    DATA_SILENCE_MAX_SECONDS,
    STOPPED,
    Emit,
    Ending,
    Plan,
    Session,
    explain,
    open_socket,
)
from k2.feeds.status import ConnectionStatus, State
from k2.settings import CaptureSettings, Settings, mask
from k2.symbols import canonical

__all__ = ["Emit", "Feed", "probe"]

logger = logging.getLogger("k2.feeds")

# A connection is replaced at a random age within this share of the exchange's limit (21.6 to 22.8 hours
# of 24): early enough for many attempts, and not all connections at the same moment.
ROTATE_FROM, ROTATE_TO = 0.90, 0.95
# When the same subscriptions stay unanswered on this many connections in a row while others are
# acknowledged, they count as refused: one dead symbol must not hold up the rest.
UNANSWERED_CONNECTIONS = 3
STATES_BEST_FIRST: tuple[State, ...] = ("subscribed", "opened", "connecting")
STOP_SECONDS = 3 * CLOSE_SECONDS  # most a session may take to end when told to
# The same failure is told again after this long, seconds.
REPEAT_SECONDS = 600.0


class Gate:
    """When the next connection to one exchange may be opened: its pace, and its `Retry-After`."""

    def __init__(self, per_minute: float, clock: Callable[[], float]) -> None:
        """Store the parts; `clock` gives seconds, monotonic."""
        self._interval = 60.0 / per_minute
        self._clock = clock
        self._next = -math.inf
        self._closed_until = -math.inf

    def reserve(self) -> float:
        """Take the next free turn and return how many seconds away it is."""
        now = self._clock()
        turn = max(now, self._next, self._closed_until)
        self._next = turn + self._interval
        return turn - now

    def close_for(self, seconds: float) -> None:
        """Let nobody through for so long, those with a turn included."""
        self._closed_until = max(self._closed_until, self._clock() + seconds)

    async def pass_through(self) -> None:
        """Wait for a turn."""
        turn = self.reserve()
        if turn > 0:
            meters.acted("feeds.pace", waited_seconds=turn)
        await asyncio.sleep(turn)
        while (wait := self._closed_until - self._clock()) > 0:
            await asyncio.sleep(wait)
            await asyncio.sleep(self.reserve())


class Backoff:
    """Waits that double from `first` to `ceiling` seconds, each drawn at random between zero and that (full jitter).

    Source: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """

    def __init__(self, first: float, ceiling: float, draw: Callable[[float, float], float]) -> None:
        self._first, self._ceiling, self._draw = first, ceiling, draw
        self._failures = 0

    def next(self) -> float:
        """Return the next wait in seconds."""
        span = min(self._ceiling, self._first * 2 ** min(self._failures, 32))
        self._failures += 1
        return self._draw(0.0, span)

    def reset(self) -> None:
        """Begin again at the first wait."""
        self._failures = 0


def shard(symbols: Sequence[str], per_connection: int) -> list[tuple[str, ...]]:
    """Split symbols over as few connections as allowed, evenly, in order."""
    count = math.ceil(len(symbols) / per_connection)
    bounds = [len(symbols) * i // count for i in range(count + 1)]
    return [tuple(symbols[a:b]) for a, b in itertools.pairwise(bounds)]


def plans(exchange: Exchange, settings: Settings) -> list[Plan]:
    """Return what each connection of an exchange is for, after the settings.

    Raises UnknownName when a symbol is not understood by K2 or by the exchange module.
    """
    own = settings.exchange(exchange.name)
    symbols = list(dict.fromkeys(canonical(symbol) for symbol in own.symbols or exchange.default_symbols))
    for symbol in symbols:
        exchange.to_native(symbol)
    limit = exchange.limits.symbols_per_connection
    size = min(limit, own.symbols_per_connection or limit)
    url = own.url or exchange.url
    return [
        Plan(exchange, str(index), url, part, tuple(own.channels)) for index, part in enumerate(shard(symbols, size))
    ]


class Feed:
    """All connections of one exchange.

    `run` gives every record to `emit` in the order received, per connection; it goes on until it is
    cancelled, then closes the sockets in an orderly way, takes what is still on its way, and ends.
    Nothing it has read is ever dropped.
    """

    def __init__(
        self,
        exchange: Exchange,
        settings: Settings,
        emit: Emit,
        *,
        clock_ns: Callable[[], int] = time.time_ns,
        draw: Callable[[float, float], float] = random.uniform,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Store the parts; raises UnknownName for a symbol that is not understood.

        `draw(low, high)` gives a random number; `tls` replaces the machine's trusted certificates.
        """
        self._exchange = exchange
        self._settings = settings.capture
        self._emit = emit
        self._clock_ns = clock_ns
        self._draw = draw
        self._tls = tls
        self._plans = plans(exchange, settings)
        self._connections: list[Connection] = []

    def status(self) -> list[ConnectionStatus]:
        """Return the present state of every connection."""
        return [connection.status() for connection in self._connections]

    async def run(self, first_epoch: int = 0) -> None:
        """Connect everything and keep it so; ends only by cancellation (or a fault in an exchange module).

        Every connection counts its epochs from `first_epoch`.
        """
        gate = Gate(self._exchange.limits.connections_per_minute, asyncio.get_running_loop().time)
        async with client(self._tls) as http, asyncio.TaskGroup() as group:
            self._connections = [
                Connection(
                    *(plan, self._settings, self._emit, gate, http),
                    first_epoch=first_epoch,
                    clock_ns=self._clock_ns,
                    draw=self._draw,
                )
                for plan in self._plans
            ]
            for connection in self._connections:
                group.create_task(connection.run())


class Running(NamedTuple):
    """A session and the task that runs it."""

    session: Session
    task: asyncio.Task[None]


class Connection:
    """One share of an exchange's symbols, kept connected by one session after the other."""

    def __init__(
        self,
        plan: Plan,
        settings: CaptureSettings,
        emit: Emit,
        gate: Gate,
        http: aiohttp.ClientSession,
        *,
        first_epoch: int,
        clock_ns: Callable[[], int],
        draw: Callable[[float, float], float],
    ) -> None:
        self._plan = plan
        self._settings = settings
        self._emit = emit
        self._gate = gate
        self._http = http
        self._clock_ns = clock_ns
        self._draw = draw
        self._status = ConnectionStatus(plan.name, len(plan.symbols))
        self._epochs = itertools.count(first_epoch)
        self._backoff = Backoff(settings.backoff_first_seconds, settings.backoff_max_seconds, draw)
        self._delay = 0.0  # seconds to wait before the next attempt
        self._sessions: dict[Session, asyncio.Task[None]] = {}
        self._unanswered = 0  # sessions in a row that ended so
        self._data_patience = plan.exchange.limits.data_silence_seconds
        self._told = ""
        self._told_at = -math.inf

    def status(self) -> ConnectionStatus:
        """Return the present state, as a value of its own; the best one while two sessions overlap."""
        states = {session.state for session in self._sessions}
        status = self._status
        return msgspec.structs.replace(
            status,
            state=next((state for state in STATES_BEST_FIRST if state in states), "waiting"),
            refused=dict(status.refused),
            ended=dict(status.ended),
        )

    async def run(self) -> None:
        """Keep connected until cancelled."""
        try:
            while True:
                await self._turn()
                live: Running | None = self._start()
                while live is not None:
                    live = await self._successor(live)
        finally:
            await self._stop()

    async def _successor(self, live: Running) -> Running | None:
        """Follow a session to its end; return the one that took over from it, or None when there is none."""
        await _first_of(live.task, live.session.rotation_due)
        if live.session.rotation_due.done() and live.session.rotation_due.result().kind == "data_silence":
            self._learn_from_silence(live.session)
        while not _is_over(live.task) and await self._turn_while(live.task):
            new = self._start()
            await _first_of(live.task, new.task, new.session.subscribed)
            if not live.task.done() and not new.task.done():
                await _first_of(live.task, new.task, seconds=self._settings.rotate_overlap_seconds)
            if _is_over(new.task):
                continue  # the new one cannot be had, or did not last: the old one goes on
            live.session.retire(live.session.rotation_due.result())
            await live.task
            return new
        return None

    async def _turn(self) -> None:
        """Wait until backoff and the exchange's pace allow the next connection."""
        await asyncio.sleep(self._delay)
        await self._gate.pass_through()

    async def _turn_while(self, alive: asyncio.Task[None]) -> bool:
        """The same, given up when a session ends meanwhile; returns whether it is our turn."""
        turn = asyncio.create_task(self._turn())
        try:
            await _first_of(turn, alive)
            return turn.done()
        finally:
            turn.cancel()

    def _start(self) -> Running:
        session = Session(
            self._plan,
            self._settings,
            self._emit,
            self._status,
            self._epochs,
            rotate_seconds=self._plan.exchange.limits.connection_seconds * self._draw(ROTATE_FROM, ROTATE_TO),
            data_patience_seconds=self._data_patience,
            settle_missing=self._unanswered >= UNANSWERED_CONNECTIONS - 1,
            clock_ns=self._clock_ns,
        )
        session.subscribed.add_done_callback(lambda _: self._tell_recovery())
        task = self._sessions[session] = asyncio.create_task(self._follow(session))
        return Running(session, task)

    async def _follow(self, session: Session) -> None:
        """Run one session and draw the conclusions of its end."""
        try:
            ending = await session.run(self._http)
        finally:
            del self._sessions[session]
        self._status.ended[ending.kind] = self._status.ended.get(ending.kind, 0) + 1
        if ending.kind in ("rotated", "data_silence", "stopped"):
            return
        self._unanswered = self._unanswered + 1 if ending.kind == "unacknowledged" else 0
        if asyncio.get_running_loop().time() - session.subscribed_at >= self._settings.backoff_max_seconds:
            self._backoff.reset()
        self._delay = self._backoff.next()
        if ending.kind == "throttled" and not ending.retry_after_seconds:
            self._delay = self._settings.backoff_max_seconds
        self._gate.close_for(ending.retry_after_seconds)
        self._tell(ending)

    def _learn_from_silence(self, session: Session) -> None:
        """Be twice as patient after a session that never had data for long: quiet, it seems, and not dead."""
        limit = self._plan.exchange.limits.data_silence_seconds
        had_data = session.data_seconds >= limit
        self._data_patience = max(limit, 0 if had_data else min(2 * self._data_patience, DATA_SILENCE_MAX_SECONDS))
        self._status.last_error = text = session.rotation_due.result().text
        logger.warning("%s connection %s: %s", self._plan.exchange.name, self._plan.name, text)

    async def _stop(self) -> None:
        tasks = list(self._sessions.values())
        for session, task in list(self._sessions.items()):
            if session.state == "connecting":
                task.cancel()
            else:
                session.retire(STOPPED)
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=STOP_SECONDS)
            if late:
                meters.acted("feeds.stop", len(late))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _tell(self, ending: Ending) -> None:
        """Say once why a connection is down, and again after a while if nothing changes."""
        self._status.last_error = ending.text
        now = asyncio.get_running_loop().time()
        if ending.text != self._told or now - self._told_at >= REPEAT_SECONDS:
            self._told, self._told_at = ending.text, now
            where = f"{self._plan.exchange.name} connection {self._plan.name}"
            logger.warning("%s: %s; trying again until it works", where, ending.text)

    def _tell_recovery(self) -> None:
        refused = self._status.refused
        where = f"{self._plan.exchange.name} connection {self._plan.name}"
        if refused:
            logger.warning("%s: refused, tried again later: %s", where, refused)
        if self._told:
            logger.info("%s: connected and subscribed again", where)
            self._told = ""


def client(tls: ssl.SSLContext | None = None) -> aiohttp.ClientSession:
    """Return an HTTP client that verifies TLS; names are looked up anew for each connection, see `Names`."""
    # Without its cache: beside answers that are cheap it would share one lookup, hung or not, between all who ask.
    connector = aiohttp.TCPConnector(limit=0, ssl=True if tls is None else tls, resolver=Names(), use_dns_cache=False)
    # Time limits are set around each step by its caller.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=None)
    return aiohttp.ClientSession(connector=connector, timeout=timeout, headers={"User-Agent": "k2-market-data"})


async def probe(
    exchange: Exchange, settings: Settings, timeout_seconds: float, *, tls: ssl.SSLContext | None = None
) -> None:
    """Try once to open a WebSocket to an exchange (TCP, TLS, upgrade), and close it again.

    Raises:
        FeedDown: it cannot be reached; the message says why (DNS, refused, TLS, time limit, HTTP status).
        UnknownName: a symbol in the settings is not understood.
    """
    url = plans(exchange, settings)[0].url
    async with client(tls) as http:
        try:
            async with asyncio.timeout(timeout_seconds):
                socket = await open_socket(http, url, settings.capture.max_frame_bytes)
        except CONNECT_ERRORS as error:
            raise FeedDown(explain(error, exchange.name, str(mask("url", url)), timeout_seconds).text) from None
        await socket.close()


async def _first_of(*futures: asyncio.Future[Any], seconds: float | None = None) -> None:
    """Wait until one of them is done, or the time is up; cancels none."""
    await asyncio.wait(futures, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)


def _is_over(task: asyncio.Task[None]) -> bool:
    """Whether a session has ended; a fault of the program surfaces here."""
    if task.done():
        task.result()
    return task.done()
