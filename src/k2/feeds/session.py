"""One WebSocket of an exchange, from connecting to its end, as records for the log.

`connection.py` opens sessions again and again and lets them overlap; a session knows nothing of others.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import math
import struct
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Literal, TypeVar

import aiohttp
import msgspec

from k2 import meters
from k2.feeds.base import Control, Exchange, Request
from k2.feeds.status import ConnectionStatus, State
from k2.model import CLOSED, FRAME, LIVE, OPENED, SUBSCRIBED, Frame
from k2.settings import CaptureSettings, mask

Emit = Callable[[Frame], Awaitable[None] | None]
"""Takes a frame at once, always; returns None, or what to await before the next one is read.

Cancelling that wait loses nothing. It need not be awaited.
"""

EndKind = Literal[
    "connect",  # could not be opened: DNS, refused, TLS, time limit
    "http",  # answered, but with an HTTP status instead of a WebSocket
    "throttled",  # the same with 429 or 418: too much was asked of it
    "closed",  # the exchange closed it
    "broken",  # reset, or the protocol was violated
    "too_large",  # a frame above capture.max_frame_bytes
    "silent",  # no message for limits.silence_seconds
    "pong",  # a ping was not answered
    "refused",  # every subscription was refused
    "unacknowledged",  # a subscription was not answered in time
    "rotated",  # replaced by a newer connection
    "data_silence",  # the same, because heartbeats came but no data for limits.data_silence_seconds
    "stopped",  # K2 stops
    "error",  # a fault of K2 or of the exchange module
]


@dataclass(frozen=True)
class Ending:
    """Why a session ended: `kind` to count, `text` for people, and how long the exchange asks to stay away."""

    kind: EndKind
    text: str
    retry_after_seconds: float = 0.0


STOPPED = Ending("stopped", "capture stops")
ROTATED = Ending("rotated", "replaced by a newer connection before the exchange cuts this one")

CONNECT_ERRORS = (aiohttp.ClientError, OSError, TimeoutError, ValueError)  # the last: an address that is none
# How long to go on reading after our own close, so that what was on its way still arrives.
CLOSE_SECONDS = 2.0
# A refused subscription is tried again on the living connection after this many of the longest
# backoff (5 minutes by default): it may be a symbol that is listed later, but it is mostly a mistake.
REFUSED_RETRY_BACKOFFS = 10
# Data may stay out for this many of the longest gap a session has seen in its data, but for no longer than
# the second (or the exchange's own limit): a replacement an hour for nothing harms nobody.
QUIET_GAPS = 10.0
DATA_SILENCE_MAX_SECONDS = 3_600.0
# Binance bans for up to 3 days (HTTP 418); see "IP Limits" in its REST documentation.
RETRY_AFTER_MAX_SECONDS = 3 * 86_400.0


MarkT = TypeVar("MarkT")


@dataclass(frozen=True)
class Plan:
    """What one connection is for."""

    exchange: Exchange
    name: str
    base_url: str
    symbols: tuple[str, ...]
    channels: tuple[str, ...]

    @property
    def url(self) -> str:
        """Return the address to connect to."""
        return self.exchange.connection_url(self.base_url, self.symbols, self.channels)


class Subscriptions:
    """Which subscription keys of one connection are awaited, acknowledged and refused."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self._requests = list(requests)
        self._sent: list[Request] = []
        self.waiting: set[str] = {key for request in requests for key in request.expects}
        self.acknowledged: set[str] = set()
        self.refused: dict[str, str] = {}
        self.unnamed: set[str] = set()  # those of them the exchange refused without saying which of many it meant
        self.complaint = ""  # a refusal that could not be laid to a key

    def note_sent(self, request: Request) -> None:
        """Take note that a request is on its way: a refusal that names nothing can only mean one of these."""
        self._sent.append(request)

    def apply(self, control: Control) -> bool:
        """Take in an acknowledgement or refusal; returns whether anything changed."""
        before = (len(self.waiting), len(self.acknowledged))
        if control.kind == "acknowledged":
            known = control.acknowledged & (self.waiting | self.refused.keys())
            self.acknowledged |= known
            self.waiting -= known
            for key in known & self.refused.keys():
                del self.refused[key]
        elif control.kind == "refused":
            # A key already acknowledged stays so: the refusal is then "already subscribed".
            named = control.acknowledged
            self._refuse(named or self._oldest_request_waiting(), control.reason, named=bool(named))
        return before != (len(self.waiting), len(self.acknowledged))

    def give_up_waiting(self, reason: str) -> None:
        """Count everything still awaited as refused."""
        self._refuse(frozenset(self.waiting), reason, named=False)

    def to_retry(self, exchange: Exchange, plan: Plan, keys: Collection[str]) -> list[Request]:
        """Return requests for those refused keys: of single symbols where they give the same keys."""
        refused = self.refused.keys() & keys
        single = [r for s in plan.symbols for r in exchange.requests([s], plan.channels) if r.expects & refused]
        covered = {key for request in single for key in request.expects}
        return single + [r for r in self._requests if r.expects & (refused - covered)]

    def record(self) -> bytes:
        """Return the data of a SUBSCRIBED record."""
        return msgspec.json.encode({"acknowledged": sorted(self.acknowledged), "refused": self.refused})

    def _refuse(self, keys: frozenset[str], reason: str, *, named: bool) -> None:
        meant = keys & self.waiting
        if not meant and not keys & (self.acknowledged | self.refused.keys()):
            self.complaint = reason
        self.refused |= dict.fromkeys(sorted(meant), reason)
        self.waiting -= meant
        if not named:
            self.unnamed |= meant

    def _oldest_request_waiting(self) -> frozenset[str]:
        """Return the keys of the request a refusal without keys means, or nothing: answers come in order.

        Where they do not, the acknowledgement that comes yet puts it right, see `apply`.
        """
        return next((r.expects for r in self._sent if r.expects & self.waiting), frozenset())


class Session:
    """One WebSocket: connected, subscribed, watched, read until it ends.

    `subscribed` is done once the subscriptions are settled with at least one acknowledged (or none was
    needed), `rotation_due` when the connection should be replaced soon, with the ending that is then due:
    its age, the exchange's wish, or no data on a socket that is alive.

    Data may stay out for `data_patience_seconds`, or ten of the longest gap between two of this session's
    data frames, where that is more. Only the session as a whole is judged: one quiet symbol among busy ones
    is not told from a dead one here.
    """

    def __init__(
        self,
        plan: Plan,
        settings: CaptureSettings,
        emit: Emit,
        status: ConnectionStatus,
        epochs: Iterator[int],
        *,
        rotate_seconds: float,
        data_patience_seconds: float,
        settle_missing: bool,
        clock_ns: Callable[[], int],
    ) -> None:
        """Store the parts. `settle_missing`: count unanswered subscriptions as refused instead of ending."""
        self.state: State = "connecting"
        loop = asyncio.get_running_loop()
        self.subscribed: asyncio.Future[None] = loop.create_future()
        self.rotation_due: asyncio.Future[Ending] = loop.create_future()
        self.subscribed_at = math.inf  # loop time
        self.data_seconds = 0.0  # from being subscribed to the newest data
        self._plan = plan
        self._exchange = plan.exchange
        self._settings = settings
        self._emit = emit
        self._status = status
        self._epochs = epochs
        self._rotate_seconds = rotate_seconds
        self._data_patience_seconds = data_patience_seconds
        self._settle_missing = settle_missing
        self._clock_ns = clock_ns
        self._requests = plan.exchange.requests(plan.symbols, plan.channels)
        self._subscriptions = Subscriptions(self._requests)
        self._settled = asyncio.Event()
        self._retired: asyncio.Future[Ending] = loop.create_future()
        self._monotonic = loop.time
        self._next_send = 0.0
        self._epoch = -1
        self._counter = 0
        self._read_at = 0.0  # loop time of the last message
        self._data_at = math.inf  # of the last data, or of being subscribed
        self._longest_data_gap = 0.0
        self._ping_at: float | None = None  # loop time of the ping that waits for its answer
        self._blocked = False  # not reading because the buffer is full

    def retire(self, ending: Ending) -> None:
        """Close in an orderly way: nothing more is expected of this session, but what arrives is kept."""
        if not self._retired.done():
            self._retired.set_result(ending)

    async def run(self, http: aiohttp.ClientSession) -> Ending:
        """Connect, subscribe and read until the session ends for whatever reason; returns the reason."""
        url = self._plan.url
        shown = str(mask("url", url))
        try:
            async with asyncio.timeout(self._settings.connect_seconds):
                self._socket = await open_socket(http, url, self._settings.max_frame_bytes)
        except CONNECT_ERRORS as error:
            return explain(error, self._exchange.name, shown, self._settings.connect_seconds)
        self._epoch = next(self._epochs)
        self.state = "opened"
        self._status.epoch, self._status.since_ns = self._epoch, self._clock_ns()
        self._record(OPENED, b"", origin=shown)
        ending = Ending("error", "capture failed; its log tells why")
        try:
            ending = await self._live()
        except asyncio.CancelledError:
            ending = STOPPED
            raise
        finally:
            self._record(CLOSED, ending.text.encode())
            await self._hang_up()
        return ending

    def _record(self, kind: str, data: bytes, *, at_ns: int = 0, origin: str = "") -> Awaitable[None] | None:
        """Hand one record of this connection on; every record of an epoch has the next counter."""
        at_ns = at_ns or self._clock_ns()
        frame = Frame(kind, LIVE, self._plan.name, self._epoch, self._counter, at_ns, data, origin)
        self._counter += 1
        return self._emit(frame)

    async def _live(self) -> Ending:
        self._read_at = opened_at = self._monotonic()
        if not self._subscriptions.waiting:
            self._settle()
        reader = asyncio.create_task(self._read())
        tasks = {
            reader,
            asyncio.create_task(self._subscribe()),
            asyncio.create_task(self._watch(opened_at)),
            asyncio.create_task(self._keep_pinging()),
            asyncio.create_task(self._retire(reader)),
        }
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return await self._outcome(reader, tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _outcome(self, reader: asyncio.Task[Ending], tasks: set[asyncio.Task[Ending]]) -> Ending:
        """Return why the first of the tasks ended."""
        if self._retired.done():
            return self._retired.result()
        if not reader.done() and any(task.done() and task.exception() for task in tasks):
            await asyncio.wait({reader}, timeout=CLOSE_SECONDS)  # sending failed: the reader learns why
        first = reader if reader.done() else next(task for task in tasks if task.done())
        try:
            return first.result()
        except (aiohttp.ClientError, OSError) as error:
            return _broken(error)

    async def _retire(self, reader: asyncio.Task[Ending]) -> Ending:
        """Wait until the session is retired, then close and let the reader take what is on its way."""
        ending = await asyncio.shield(self._retired)
        # Whatever fails here: it is given up anyway, and what could be read has been read.
        with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError), _counted_close():
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._socket.send_frame(struct.pack("!H", aiohttp.WSCloseCode.OK), aiohttp.WSMsgType.CLOSE)
                await asyncio.wait({reader})
        return ending

    async def _hang_up(self) -> None:
        """Release the socket, politely if that is quick; a dead peer is not waited for."""
        with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError), _counted_close():  # it is dropped anyway
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._socket.close()

    # --- reading ---------------------------------------------------------------------------------

    async def _read(self) -> Ending:
        text, binary = aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY  # looked up once, not per frame
        receive = self._socket.receive
        while True:
            message = await receive()
            kind = message.type
            if kind is text or kind is binary:
                full = self._take(message.data)
                if full is not None:
                    await self._wait_for_room(full)
            elif kind is aiohttp.WSMsgType.PONG:
                self._ping_at = None
            elif kind is aiohttp.WSMsgType.PING:
                await self._socket.pong(message.data)
            else:
                return self._ending_of(kind, message.data, message.extra)

    def _take(self, data: bytes) -> Awaitable[None] | None:
        now_ns = self._clock_ns()
        full = self._record(FRAME, data, at_ns=now_ns)
        self._read_at = self._monotonic()
        status = self._status
        status.frames += 1
        status.bytes += len(data)
        status.last_frame_ns = now_ns
        control = self._exchange.control(data)
        if control.kind == "data":
            status.last_data_ns = now_ns
            self._note_data()
        elif control.kind != "heartbeat":
            self._obey(control)
        return full

    def _note_data(self) -> None:
        if self._read_at > self._data_at:
            self._longest_data_gap = max(self._longest_data_gap, self._read_at - self._data_at)
            self._data_at = self._read_at
            self.data_seconds = self._read_at - self.subscribed_at

    def _obey(self, control: Control) -> None:
        if control.kind == "reconnect":
            _mark(self.rotation_due, ROTATED)
        elif self._subscriptions.apply(control) and not self._subscriptions.waiting:
            self._settle()

    def _settle(self) -> None:
        """Nothing is awaited any more: say in the log what is subscribed, if anything is."""
        subscriptions, status = self._subscriptions, self._status
        status.acknowledged, status.refused = len(subscriptions.acknowledged), dict(subscriptions.refused)
        self._settled.set()
        if subscriptions.acknowledged or not subscriptions.refused:
            self._record(SUBSCRIBED, subscriptions.record())
            self.state = "subscribed"
            if self.subscribed_at == math.inf:
                self.subscribed_at = self._data_at = self._monotonic()
            _mark(self.subscribed, None)

    async def _wait_for_room(self, full: Awaitable[None]) -> None:
        """Leave the socket unread while the buffer is full; the silence is ours then, so no clock may run."""
        self._blocked = True
        try:
            await full
        finally:
            self._blocked = False
            self._read_at = self._monotonic()
            if self._data_at < math.inf:
                self._data_at = self._read_at
            self._ping_at = None

    def _ending_of(self, kind: aiohttp.WSMsgType, data: object, words: object) -> Ending:
        """Tell the reason from the message that aiohttp ends a stream with."""
        error = data if isinstance(data, BaseException) else self._socket.exception()
        if isinstance(error, aiohttp.WebSocketError) and error.code == aiohttp.WSCloseCode.MESSAGE_TOO_BIG:
            limit = self._settings.max_frame_bytes
            return Ending("too_large", f"a frame is larger than capture.max_frame_bytes = {limit}: {error}")
        if error is not None:
            return _broken(error)
        if kind is aiohttp.WSMsgType.CLOSE:
            said = f", {words!r}" if words else ""
            return Ending("closed", f"closed by the exchange (code {data or 'none'}{said})")
        return Ending("broken", "the exchange dropped the connection without closing it")

    # --- sending ---------------------------------------------------------------------------------

    async def _subscribe(self) -> Ending:
        """Send the subscriptions, judge the answers, and try refused ones again for ever, slowly."""
        for request in self._requests:
            self._subscriptions.note_sent(request)
            await self._send(request.text)
        try:
            async with asyncio.timeout(self._settings.subscribe_seconds):
                await self._settled.wait()
        except TimeoutError:
            unanswered = self._unanswered()
            if not (self._settle_missing and self._subscriptions.acknowledged):
                return Ending("unacknowledged", unanswered)
            self._subscriptions.give_up_waiting(unanswered)
            self._settle()
        if self._subscriptions.unnamed and len(self._plan.symbols) > 1:
            await self._ask_one_by_one()
        if not self.subscribed.done():
            return Ending("refused", f"every subscription was refused: {_first(self._subscriptions.refused)}")
        while True:
            await asyncio.sleep(REFUSED_RETRY_BACKOFFS * max(self._settings.backoff_max_seconds, 0.01))
            await self._retry(self._subscriptions.refused)

    async def _ask_one_by_one(self) -> None:
        """Ask at once for each symbol alone where one among many may have spoilt the request for all."""
        await self._retry(self._subscriptions.unnamed)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.subscribe_seconds):
                await asyncio.shield(self.subscribed)

    async def _retry(self, keys: Collection[str]) -> None:
        for request in self._subscriptions.to_retry(self._exchange, self._plan, keys):
            await self._send(request.text)

    def _unanswered(self) -> str:
        waiting = sorted(self._subscriptions.waiting)
        shown = ", ".join(waiting[:5]) + (f" and {len(waiting) - 5} more" if len(waiting) > 5 else "")
        said = f" (the exchange said: {self._subscriptions.complaint})" if self._subscriptions.complaint else ""
        return f"no acknowledgement of {shown} within {self._settings.subscribe_seconds:g} s{said}"

    async def _send(self, text: str) -> None:
        """Send one message, no sooner than the exchange's pace allows."""
        wait = self._next_send - self._monotonic()
        if wait > 0:
            await asyncio.sleep(wait)
        self._next_send = self._monotonic() + 1 / self._exchange.limits.requests_per_second
        await self._socket.send_str(text)

    async def _keep_pinging(self) -> Ending:
        interval = self._settings.ping_seconds
        while True:
            await asyncio.sleep(interval or 3600.0)
            if self._blocked or self._ping_at is not None or not interval:
                continue
            self._ping_at = self._monotonic()
            own = self._exchange.ping()
            await (self._socket.ping() if own is None else self._send(own))

    # --- watching --------------------------------------------------------------------------------

    async def _watch(self, opened_at: float) -> Ending:
        """End the session when it is dead, and ask for its replacement when it is old."""
        while True:
            now = self._monotonic()
            ending, wait = self._judge(now)
            if ending is not None:
                return ending
            age = now - opened_at
            if age >= self._rotate_seconds:
                _mark(self.rotation_due, ROTATED)
            else:
                wait = min(wait, self._rotate_seconds - age)
            await asyncio.sleep(min(wait, self._judge_data(now), 60.0))

    def _judge(self, now: float) -> tuple[Ending | None, float]:
        """Return the ending if the socket is dead at `now`, and when to look again at the latest, in seconds."""
        silence, patience = self._exchange.limits.silence_seconds, self._settings.pong_seconds
        if self._ping_at is not None and self._exchange.ping() is not None and self._read_at > self._ping_at:
            self._ping_at = None  # an application's ping is answered by a message of its own: any one proves life
        if self._blocked:
            return None, min(silence, patience)
        if now - self._read_at >= silence:
            return Ending("silent", f"no message for {silence:g} s on an open connection"), 0.0
        wait = silence - (now - self._read_at)
        if self._ping_at is None:
            return None, min(wait, patience)
        if now - self._ping_at >= patience:
            return Ending("pong", f"a ping was not answered within {patience:g} s"), 0.0
        return None, min(wait, patience - (now - self._ping_at))

    def _judge_data(self, now: float) -> float:
        """Ask for a replacement when data stays out on a living socket; returns when to look again, in seconds."""
        patience = max(self._data_patience_seconds, min(QUIET_GAPS * self._longest_data_gap, DATA_SILENCE_MAX_SECONDS))
        if self._blocked or self._data_at == math.inf or self.rotation_due.done():
            return patience
        wait = patience - (now - self._data_at)
        if wait > 0:
            return wait
        text = f"alive, but no data for {patience:.3g} s: replaced by a newer connection"
        _mark(self.rotation_due, Ending("data_silence", text))
        return patience


@contextlib.contextmanager
def _counted_close() -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        meters.acted("feeds.close")
        raise


async def open_socket(
    http: aiohttp.ClientSession, url: str, max_frame_bytes: int
) -> aiohttp.ClientWebSocketResponse[Literal[False]]:
    """Connect and upgrade to a WebSocket whose text stays bytes, exactly as received."""
    return await http.ws_connect(
        url,
        autoping=False,  # pings and pongs are seen here, in order with the data
        compress=15,  # permessage-deflate is offered; the exchange decides
        max_msg_size=max_frame_bytes,
        decode_text=False,
        timeout=aiohttp.ClientWSTimeout(ws_close=CLOSE_SECONDS),
    )


def explain(error: Exception, exchange: str, url: str, seconds: float) -> Ending:
    """Say why connecting to `url` failed and what to do about it."""
    start = f"{exchange}: cannot connect to {url}: "
    mend = f"check the network, or the address in exchanges.{exchange}.url"
    match error:
        case aiohttp.WSServerHandshakeError():
            return _explain_status(error, start)
        case aiohttp.ClientConnectorDNSError():
            return Ending("connect", f"{start}the host name is not found (DNS); {mend}")
        case aiohttp.ClientConnectorCertificateError():
            return Ending(
                "connect",
                f"{start}TLS: the certificate is not trusted: {error.certificate_error}; "
                "check the clock and the certificates of this machine, and that nothing sits in between",
            )
        case aiohttp.ClientConnectorError() if isinstance(error.os_error, ConnectionRefusedError):
            return Ending("connect", f"{start}the connection was refused; {mend}")
        case aiohttp.ClientSSLError():
            return Ending("connect", f"{start}TLS failed: {error}; {mend}")
        case TimeoutError():
            where = "".join(f" ({note})" for note in getattr(error.__cause__, "__notes__", ()))
            return Ending("connect", f"{start}no answer within {seconds:g} s{where}; {mend}")
        case aiohttp.TooManyRedirects():
            return Ending("connect", f"{start}it sends from one address to the next without end; {mend}")
        case aiohttp.InvalidURL():
            return Ending("connect", f"{start}this is no WebSocket address; set exchanges.{exchange}.url")
        case aiohttp.ClientResponseError():  # its text has the address, secrets and all
            return Ending("connect", f"{start}its answer is not understood: {error.message}; {mend}")
        case _:
            return Ending("connect", f"{start}{type(error).__name__}: {error}; {mend}")


def _explain_status(error: aiohttp.WSServerHandshakeError, start: str) -> Ending:
    after = retry_after_seconds(error.headers.get("Retry-After", "") if error.headers else "")
    asked = f"; it asks to wait {after:g} s" if after else ""
    if error.status in (429, 418):
        text = "too many connections or requests from this address"
        return Ending("throttled", f"{start}HTTP {error.status}: {text}{asked}", after)
    if error.status in (403, 451):
        text = "this address or country is not served"
    else:
        text = f"no WebSocket there ({error.message}); is the address right?"
    return Ending("http", f"{start}HTTP {error.status}: {text}{asked}", after)


def retry_after_seconds(value: str) -> float:
    """Return the seconds a `Retry-After` header asks for (a number or an HTTP date), 0 if it cannot be read."""
    value = value.strip()
    if value.isdecimal():
        return _at_most(float(value))
    try:
        when = parsedate_to_datetime(value)
    except (ValueError, OverflowError):  # the second: a year or an offset no date can have
        return 0.0
    if when.tzinfo is None:  # "-0000": UTC of unknown origin
        when = when.replace(tzinfo=datetime.UTC)
    return _at_most(max((when - datetime.datetime.now(datetime.UTC)).total_seconds(), 0.0))


def _at_most(seconds: float) -> float:
    if seconds > RETRY_AFTER_MAX_SECONDS:
        meters.acted("feeds.retry_after")
    return min(seconds, RETRY_AFTER_MAX_SECONDS)


def _mark(future: asyncio.Future[MarkT], value: MarkT) -> None:
    if not future.done():
        future.set_result(value)


def _broken(error: BaseException) -> Ending:
    return Ending("broken", f"the connection broke: {type(error).__name__}: {error}")


def _first(refused: dict[str, str]) -> str:
    key, reason = next(iter(refused.items()))
    return f"{key}: {reason}" + (f" (and {len(refused) - 1} more)" if len(refused) > 1 else "")
