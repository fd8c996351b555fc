"""The simulator: exchanges on one loopback port, driven by a generator or recordings, with an account and faults."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import math
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiohttp import WSMsgType, web
from aiohttp.typedefs import Handler

from k2.errors import InUse, K2Error, Misconfigured, Rejected, UnknownName, nearest
from k2.model import Frame
from k2.simulator.account import Account
from k2.simulator.binance import BinanceUsdmWire, BinanceWire
from k2.simulator.coinbase import CoinbaseWire
from k2.simulator.connection import Connection
from k2.simulator.faults import Fault, Faults, make_fault, parse_fault
from k2.simulator.kraken import KrakenWire
from k2.simulator.market import EXCHANGES, Market, instrument
from k2.simulator.recording import Player
from k2.simulator.wire import Wire, answer

WIRES: dict[str, type[Wire]] = {w.exchange: w for w in (BinanceWire, BinanceUsdmWire, KrakenWire, CoinbaseWire)}
DEFAULT_SYMBOLS = {
    "binance": ("BTC-USDT", "ETH-USDT"),
    "binance-usdm": ("BTC-USDT-PERP", "ETH-USDT-PERP"),
    "kraken": ("BTC-USD", "ETH-USD"),
    "coinbase": ("BTC-USD", "ETH-USD"),
}
MAX_SPEED = math.inf
TICK_SECONDS = 0.005
MAX_CONNECTIONS = 500
_MAX_SYMBOLS = 2_000
_CATCH_UP_EVENTS = 2_000  # of one market in one tick, after the process was stopped for a while
_FULL_SPEED_EVENTS = 50
_MAX_REQUEST_BYTES = 1 << 20
_CLOSE_SECONDS, _SHUTDOWN_SECONDS = 5.0, 1.0


class Simulator:
    """Simulated exchanges on one port.

    `symbols` (canonical) apply to every exchange that lists their kind; empty: each exchange's defaults; or a
    mapping from exchange to symbols. `rate` is events a second and symbol (an event is one taker's trades or a
    change of the book), in the markets' own time, which runs `speed` times as fast as ours and starts
    at `start_ns` (None: now). With `speed` `MAX_SPEED` events are made as fast as clients read, and only while
    somebody listens. `recordings` (exchange -> frames) replace the generator for those exchanges.
    """

    def __init__(
        self,
        *,
        exchanges: Sequence[str] = EXCHANGES,
        symbols: Sequence[str] | Mapping[str, Sequence[str]] = (),
        seed: int = 1,
        rate: float = 50.0,
        speed: float = 1.0,
        recordings: Mapping[str, Iterable[Frame]] | None = None,
        faults: Sequence[Fault] = (),
        host: str = "127.0.0.1",
        port: int = 0,
        start_ns: int | None = None,
    ) -> None:
        self._recordings = dict(recordings or {})
        self._exchanges = tuple(dict.fromkeys([*exchanges, *self._recordings]))
        _check(self._exchanges, rate, speed)
        self._host, self._port = host, port
        self._seed, self._rate, self._speed = seed, rate, speed
        self._start_ns = time.time_ns() if start_ns is None else start_ns
        self._first_faults = tuple(faults)
        self._clock = time.monotonic
        self.faults = Faults(seed)
        markets = [
            self._market(exchange, symbol) for exchange in self._exchanges for symbol in _symbols_of(exchange, symbols)
        ]
        self._account = Account(m for m in markets if m.instrument.exchange not in self._recordings)
        self._wires = {
            exchange: WIRES[exchange](
                [m for m in markets if m.instrument.exchange == exchange],
                self._account,
                self.faults,
                self._clock,
                recorded=exchange in self._recordings,
            )
            for exchange in self._exchanges
        }
        self._players = {
            exchange: Player(self._wires[exchange], frames, self._account, speed)
            for exchange, frames in self._recordings.items()
        }
        self._live = [
            (wire, market) for wire in self._wires.values() if not wire.recorded for market in wire.markets.values()
        ]
        self._tasks: list[asyncio.Task[None]] = []
        self._endings: set[asyncio.Task[None]] = set()
        self._runner: web.AppRunner | None = None
        self._opened = 0
        self._open_for_trade = True

    def _market(self, exchange: str, symbol: str) -> Market:
        step_ns = max(1, round(1e9 / self._rate))
        return Market(instrument(exchange, symbol, self._seed), self._seed, self._start_ns, step_ns)

    async def __aenter__(self) -> Simulator:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> int:
        """Listen, begin trading, and return the port.

        Raises InUse when the port is taken.
        """
        app = web.Application(middlewares=[self._throttled], client_max_size=_MAX_REQUEST_BYTES)
        app.add_routes(self._routes())
        self._runner = web.AppRunner(app, shutdown_timeout=_SHUTDOWN_SECONDS, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, self._port)
        try:
            await site.start()
        except OSError as error:
            await self._runner.cleanup()
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                raise InUse(
                    f"simulate: {self._host}:{self._port} cannot be used: {error} (choose another --port)"
                ) from None
            raise Misconfigured(f"simulate: cannot listen on {self._host}:{self._port}: {error}") from None
        self._port = self._runner.addresses[0][1]
        for fault in self._first_faults:
            self.faults.add(fault, self._clock())
        drive = self._at_full_speed() if self._speed == MAX_SPEED else self._by_the_clock()
        self._tasks = [asyncio.create_task(work) for work in (drive, self._every_second(), self._fault_work())]
        self._tasks += [asyncio.create_task(player.run()) for player in self._players.values()]
        return self._port

    async def stop(self) -> None:
        """Close every connection in good order and stop listening."""
        for task in self._tasks:
            task.cancel()
        outcomes = await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        connections = [c for wire in self._wires.values() for c in list(wire.connections)]
        await asyncio.gather(
            *(asyncio.wait_for(c.close(), _CLOSE_SECONDS) for c in connections), *self._endings, return_exceptions=True
        )
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome

    def failure(self) -> BaseException | None:
        """Return what ended one of the simulator's own tasks, if anything did."""
        ended = [task for task in self._tasks if task.done() and not task.cancelled()]
        return next((error for task in ended if (error := task.exception())), None)

    def endpoints(self) -> dict[str, dict[str, str]]:
        """Return exchange -> {url, rest_url}, as the settings `exchanges.<name>` take them."""
        base = f"{self._host}:{self._port}"
        return {
            exchange: {
                "url": f"ws://{base}/{exchange}{wire.socket_path}",
                "rest_url": f"http://{base}/{exchange}",
            }
            for exchange, wire in self._wires.items()
        }

    @property
    def address(self) -> str:
        """The base address, where /account and /faults are."""
        return f"http://{self._host}:{self._port}"

    def account(self) -> Account:
        """Return the account, which goes on changing while the simulator runs."""
        return self._account

    def market(self, exchange: str, symbol: str) -> Market:
        """Return one market, to look at its trades; symbols are canonical."""
        return self._wires[exchange].markets[symbol]

    async def played(self) -> None:
        """Wait until all recordings are played to their ends."""
        for player in self._players.values():
            await player.finished.wait()

    def set_rate(self, rate: float) -> None:
        """Go on with so many events a second and symbol; 0 is a pause. Nothing changes at speed MAX_SPEED."""
        self._rate = rate

    async def close_markets(self, timeout_seconds: float) -> bool:
        """Stop trading, and wait until clients have read all they were told.

        Returns whether they had within the time; what was told to connections that are gone never is.
        """
        self._open_for_trade = False
        deadline = self._clock() + timeout_seconds
        while not (settled := all(tally.announced == tally.confirmed for tally in self._account)):
            if self._clock() >= deadline:
                break
            for wire in self._wires.values():
                for connection in list(wire.connections):
                    await connection.ping()
            await asyncio.sleep(0.1)
        return settled

    def open_markets(self) -> None:
        """Go on trading after `close_markets`, where it was left: in the markets' own time nothing happened between."""
        self._open_for_trade = True

    # Driving.

    async def _by_the_clock(self) -> None:
        owed, looked = 0.0, self._clock()  # events a market should have had by now
        while True:
            now = self._clock()
            owed += (now - looked) * self._open_for_trade * self._speed * self._rate
            looked = now
            for wire, market in self._live:
                due = min(int(owed) - market.steps, _CATCH_UP_EVENTS)
                for _ in range(due):
                    wire.publish(market, market.step())
            await asyncio.sleep(TICK_SECONDS)

    async def _at_full_speed(self) -> None:
        while True:
            busy = False
            for wire, market in self._live if self._open_for_trade else ():
                if not any(listening and stream[1] == market.symbol for stream, listening in wire.listeners.items()):
                    continue
                busy = True
                for _ in range(_FULL_SPEED_EVENTS):
                    wire.publish(market, market.step())
            for wire in self._wires.values():
                for connection in list(wire.connections):
                    await connection.drained()
            await asyncio.sleep(0 if busy else TICK_SECONDS)

    async def _every_second(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            for wire in self._wires.values():
                for connection in list(wire.connections):
                    wire.every_second(connection)
                    with contextlib.suppress(ConnectionError, RuntimeError):
                        await connection.release()
                    await connection.ping()

    async def _fault_work(self) -> None:
        while True:
            self._begin_faults()
            for connection in self._connections(""):
                if connection.thaw_due:
                    connection.abort()
            await asyncio.sleep(TICK_SECONDS)

    def _begin_faults(self) -> None:
        """Let the timed faults that are due befall the connections there are now; later ones are spared."""
        for fault in self.faults.advance(self._clock()):
            for connection in self._connections(fault.exchange):
                self._befall(connection, fault)

    def _connections(self, exchange: str) -> list[Connection]:
        return [c for name, wire in self._wires.items() if exchange in ("", name) for c in list(wire.connections)]

    def _befall(self, connection: Connection, fault: Fault) -> None:
        until = self._clock() + (fault.for_seconds or 10.0)
        if fault.kind == "half-open":
            connection.freeze(until)
        elif fault.kind == "silence":
            connection.silence(until, heartbeats=fault.heartbeats)
        elif fault.kind == "disconnect" and fault.abrupt:
            connection.abort()
        elif fault.kind == "disconnect":
            ending = asyncio.create_task(connection.close())
            self._endings.add(ending)
            ending.add_done_callback(self._endings.discard)

    # Serving.

    def _routes(self) -> list[web.RouteDef]:
        routes = [
            web.get("/account", self._get_account),
            web.get("/endpoints", self._get_endpoints),
            web.get("/faults", self._get_faults),
            web.post("/faults", self._post_faults),
            web.delete("/faults", self._delete_faults),
        ]
        for wire in self._wires.values():
            routes += [web.get(path, self._socket_handler(wire)) for path in wire.paths]
            routes += wire.routes()
        return routes

    @web.middleware
    async def _throttled(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        wire = self._wires.get(request.path.split("/")[1])
        force = self.faults.force("429", wire.exchange, self._clock()) if wire else None
        if wire is None or force is None:
            return await handler(request)
        response = answer(wire.too_many(), 429)
        response.headers["Retry-After"] = str(max(1, math.ceil(force.ends() - self._clock())))
        return response

    def _socket_handler(self, wire: Wire) -> Handler:
        async def serve(request: web.Request) -> web.StreamResponse:
            if sum(len(w.connections) for w in self._wires.values()) >= MAX_CONNECTIONS:
                return answer('{"error":"too many connections"}', 503)
            socket = web.WebSocketResponse(autoping=False, compress=False, max_msg_size=_MAX_REQUEST_BYTES)
            await socket.prepare(request)
            connection = self._open(wire, socket, request)
            try:
                await _listen(wire, connection, socket)
            finally:
                connection.stop()
            return socket

        return serve

    def _open(self, wire: Wire, socket: web.WebSocketResponse, request: web.Request) -> Connection:
        self._opened += 1
        connection = Connection(
            wire.exchange,
            socket,
            request,
            self.faults,
            self._clock,
            seed=self._seed + self._opened,
            unknown=wire.unknown_message,
            forget=wire.forget,
        )
        connection.lossless = wire.recorded or self._speed == MAX_SPEED
        wire.connections.add(connection)
        wire.opened(connection, request)
        return connection

    async def _get_account(self, request: web.Request) -> web.Response:
        return answer(self._account.describe())

    async def _get_endpoints(self, request: web.Request) -> web.Response:
        return answer(self.endpoints())

    async def _get_faults(self, request: web.Request) -> web.Response:
        return answer(self.faults.describe())

    async def _post_faults(self, request: web.Request) -> web.Response:
        try:
            asked = json.loads(await request.text())
            faults = [_fault_of(one) for one in (asked if isinstance(asked, list) else [asked])]
            numbers = [self.faults.add(fault, self._clock()) for fault in faults]
        except (ValueError, K2Error) as error:
            return answer({"error": str(error)}, 400)
        self._begin_faults()
        return answer({"numbers": numbers})

    async def _delete_faults(self, request: web.Request) -> web.Response:
        self.faults.clear()
        return answer([])


async def _listen(wire: Wire, connection: Connection, socket: web.WebSocketResponse) -> None:
    """Read what a client sends until it leaves."""
    while True:
        message = await socket.receive()
        await connection.while_frozen()
        if message.type == WSMsgType.TEXT:
            wire.received(connection, message.data)
        elif message.type == WSMsgType.PING:
            with contextlib.suppress(ConnectionError):
                await socket.pong(message.data)
        elif message.type == WSMsgType.PONG:
            connection.ponged(bytes(message.data))
        elif message.type in (WSMsgType.CLOSE, WSMsgType.CLOSED, WSMsgType.CLOSING, WSMsgType.ERROR):
            return


def _fault_of(asked: Any) -> Fault:
    if isinstance(asked, str):
        return parse_fault(asked)
    if isinstance(asked, dict):
        return make_fault(asked)
    raise Rejected(f"fault {asked!r}: must be an object, or text such as 'drop:every=50'")


def _check(exchanges: Sequence[str], rate: float, speed: float) -> None:
    for exchange in exchanges:
        if exchange not in WIRES:
            raise UnknownName(f"simulate exchange {exchange!r}: not simulated{nearest(exchange, WIRES)}")
    if not exchanges:
        raise Rejected("simulate: no exchange is named")
    if not 0 < rate <= 1_000_000:
        raise Rejected(f"simulate: rate {rate} must be above 0 and at most 1,000,000 events a second and symbol")
    if not speed > 0:
        raise Rejected(f"simulate: speed {speed} must be above 0, or max")


def _symbols_of(exchange: str, symbols: Sequence[str] | Mapping[str, Sequence[str]]) -> Sequence[str]:
    """Return the symbols of one exchange; of a common list those it lists (perpetuals only on futures)."""
    if isinstance(symbols, Mapping):
        chosen: Sequence[str] = symbols.get(exchange, ()) or DEFAULT_SYMBOLS[exchange]
    else:
        fitting = [s for s in symbols if s.endswith("-PERP") == (exchange == "binance-usdm")]
        chosen = fitting or DEFAULT_SYMBOLS[exchange]
    if len(chosen) > _MAX_SYMBOLS:
        raise Rejected(f"simulate {exchange}: {len(chosen)} symbols are more than {_MAX_SYMBOLS}")
    return list(dict.fromkeys(chosen))


@dataclass(frozen=True)
class Options:
    """What `k2 simulate` was asked for; see `Simulator` for the fields of the same name.

    `faults` are texts as `parse_fault` reads them; `for_seconds` None runs until interrupted.
    """

    exchanges: Sequence[str] = EXCHANGES
    symbols: Sequence[str] = ()
    rate: float = 50.0
    speed: float = 1.0
    seed: int = 1
    recordings: Mapping[str, Iterable[Frame]] = field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int = 8700
    faults: Sequence[str] = ()
    for_seconds: float | None = None


def parse_speed(text: str) -> float:
    """Return a speed: a number above 0, or `max`; raises Rejected."""
    if text.strip().lower() == "max":
        return MAX_SPEED
    try:
        speed = float(text.strip().rstrip("x"))
    except ValueError:
        speed = 0.0
    if not 0 < speed < math.inf:
        raise Rejected(f"speed {text!r}: must be a number above 0, or 'max'")
    return speed


def run(options: Options, show: Callable[[dict[str, Any]], None]) -> int:
    """Run a simulator in the foreground until interrupted or `for_seconds` are over; returns the exit code.

    `show` is called once with {address, endpoints} when it listens, and once with {account} at the end.

    Raises K2Error where an option cannot work or the port is taken.
    """
    simulator = Simulator(
        exchanges=options.exchanges,
        symbols=options.symbols,
        seed=options.seed,
        rate=options.rate,
        speed=options.speed,
        recordings=options.recordings,
        faults=[parse_fault(text) for text in options.faults],
        host=options.host,
        port=options.port,
    )
    asyncio.run(_run(simulator, options.for_seconds, show))
    return 0


async def _run(simulator: Simulator, for_seconds: float | None, show: Callable[[dict[str, Any]], None]) -> None:
    ending = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(name, ending.set)
    async with simulator:
        show({"address": simulator.address, "endpoints": simulator.endpoints()})
        deadline = math.inf if for_seconds is None else time.monotonic() + for_seconds
        while not ending.is_set() and simulator.failure() is None and time.monotonic() < deadline:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ending.wait(), min(0.5, max(0.0, deadline - time.monotonic())))
    show({"account": simulator.account().describe()})
