"""What all simulated exchanges share: who listens to what, names of symbols, and times as text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from aiohttp import web

from k2.errors import UnknownName
from k2.model import AGGREGATE, TRADE
from k2.simulator.account import Account, Tally
from k2.simulator.connection import DATA, Connection, Message
from k2.simulator.faults import Faults
from k2.simulator.market import Event, Instrument, Market, MarketTrade
from k2.symbols import canonical

_CACHED_SECONDS = 64
TRADES, AGGREGATES, QUOTES, BOOK = "trades", "aggregates", "quotes", "book"

Stream = tuple[str, str]
"""(channel, canonical symbol)."""


class Wire:
    """One exchange's protocol over its markets. A subclass says how things are written.

    With `recorded` the exchange tells a recording: any symbol may be subscribed, nothing is generated.
    """

    exchange: str
    paths: tuple[str, ...]  # WebSocket paths, as aiohttp routes
    socket_path = ""  # appended to the base address for `exchanges.<name>.url`

    def __init__(
        self, markets: Iterable[Market], account: Account, faults: Faults, clock: Callable[[], float], *, recorded: bool
    ) -> None:
        self.markets = {market.symbol: market for market in markets}
        self.account = account
        self.faults = faults
        self.clock = clock
        self.recorded = recorded
        self.connections: set[Connection] = set()
        self.listeners: dict[Stream, dict[Connection, int]] = {}
        self.heard: set[Stream] = set()  # streams somebody has ever subscribed
        self.asked_at = 0.0  # when the last subscription came in
        self._by_name = {
            name.upper(): market.symbol for market in self.markets.values() for name in self.names(market.instrument)
        }

    # What a subclass says.

    def names(self, told: Instrument) -> tuple[str, ...]:
        """Return every spelling the exchange accepts for a symbol, the usual one first."""
        raise NotImplementedError

    def opened(self, connection: Connection, request: web.Request) -> None:
        """Greet a client."""

    def received(self, connection: Connection, text: str) -> None:
        """Answer a message of a client."""
        raise NotImplementedError

    def publish(self, market: Market, event: Event) -> None:
        """Tell the listeners what a market did."""
        raise NotImplementedError

    def every_second(self, connection: Connection) -> None:
        """Send what is due by time: heartbeats."""

    def unknown_message(self, connection: Connection) -> str:
        """Return a message of a kind this exchange has never sent."""
        raise NotImplementedError

    def stream_of(self, data: bytes) -> Stream | None:
        """Return the stream a recorded message belongs to, None for control messages."""
        raise NotImplementedError

    def routes(self) -> list[web.RouteDef]:
        """Return the REST resources."""
        raise NotImplementedError

    def too_many(self) -> str:
        """Return the body of a 429 answer."""
        raise NotImplementedError

    # What all share.

    def find(self, name: str) -> Market | None:
        """Return the market a client means by a name."""
        symbol = self._by_name.get(name.upper())
        return self.markets[symbol] if symbol else None

    def symbol_of(self, name: str) -> str | None:
        """Return the canonical symbol for a name; with a recording also of symbols that have no market."""
        market = self.find(name)
        if market is not None:
            return market.symbol
        if not self.recorded:
            return None
        try:
            symbol = canonical(name)
        except UnknownName:
            return None
        return f"{symbol}-PERP" if self.exchange == "binance-usdm" else symbol

    def subscribe(self, connection: Connection, channel: str, symbol: str, option: int = 0) -> None:
        """Let a connection listen to a stream from now on."""
        self.listeners.setdefault((channel, symbol), {})[connection] = option
        self.heard.add((channel, symbol))
        self.asked_at = self.clock()

    def unsubscribe(self, connection: Connection, channel: str, symbol: str) -> None:
        """End a subscription."""
        self.listeners.get((channel, symbol), {}).pop(connection, None)

    def forget(self, connection: Connection) -> None:
        """End all subscriptions of a connection."""
        self.connections.discard(connection)
        for listening in self.listeners.values():
            listening.pop(connection, None)

    def subscribed(self, connection: Connection) -> list[Stream]:
        """Return what a connection listens to."""
        return [stream for stream, listening in self.listeners.items() if connection in listening]

    def listening(self, channel: str, symbol: str) -> dict[Connection, int]:
        """Return who listens to a stream, with the option each asked for."""
        return self.listeners.get((channel, symbol), {})

    def tally(self, symbol: str, channel: str = TRADES) -> Tally:
        """Return the account of a market's trades or aggregates."""
        return self.account.tally(self.exchange, symbol, AGGREGATE if channel == AGGREGATES else TRADE)

    def refuses(self) -> bool:
        """Whether a fault refuses subscriptions now."""
        return self.faults.force("refuse", self.exchange, self.clock()) is not None

    def tell(self, connection: Connection, text: str, symbol: str = "", trades: Sequence[MarketTrade] = ()) -> None:
        """Queue a data message for one connection."""
        connection.put(Message(text, DATA, self.tally(symbol) if trades else None, trades))


def from_json(text: str) -> Any:
    """Return the JSON value of a client's message, None when it is none."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def answer(value: Any, status: int = 200) -> web.Response:
    """Return a JSON answer; text is taken as JSON already written."""
    text = value if isinstance(value, str) else json.dumps(value)
    return web.Response(text=text, status=status, content_type="application/json")


def number(request: web.Request, name: str, default: int) -> int:
    """Return a whole number of the query, or the default when it is missing or none."""
    try:
        return int(float(request.query[name])) if "." in request.query[name] else int(request.query[name])
    except (KeyError, ValueError):
        return default


@lru_cache(maxsize=_CACHED_SECONDS)
def _second_text(second: int) -> str:
    return datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def iso(ns: int) -> str:
    """Return a time to the microsecond, such as 2026-09-26T18:07:54.626190Z."""
    second, rest = divmod(ns, 1_000_000_000)
    return f"{_second_text(second)}.{rest // 1000:06d}Z"


def iso_short(ns: int) -> str:
    """Return a time to the microsecond without zeros at the end, as Coinbase writes trades."""
    second, rest = divmod(ns, 1_000_000_000)
    fraction = f"{rest // 1000:06d}".rstrip("0")
    return f"{_second_text(second)}.{fraction}Z" if fraction else f"{_second_text(second)}Z"


def iso_nanos(ns: int) -> str:
    """Return a time to the nanosecond."""
    second, rest = divmod(ns, 1_000_000_000)
    return f"{_second_text(second)}.{rest:09d}Z"
