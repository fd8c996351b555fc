"""Coinbase: Advanced Trade live; messages of the older Exchange feed and its REST trades are parsed too.

Both feeds tell the MAKER's side; K2 turns it into the taker's. The Exchange documentation says so ("The side
field indicates the maker order side", docs.cdp.coinbase.com/exchange/websocket-feed/channels, read 2026-11-21).
That of Advanced Trade does not say; its own data do. In the recording of 2026-08-09 every one of the 23 trades
marked SELL was made at or above the best ask of the `ticker` before it, and of the 17 marked BUY 15 at or below
the best bid and none at the ask (`tests/feeds/test_coinbase.py` counts them): SELL trades lift offers, so SELL is
the resting order. NautilusTrader and bbgo read it the same way.

Other sources: docs.cdp.coinbase.com, Advanced Trade "WebSocket overview", "channels" and "rate limits", read
2026-11-21.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import msgspec
import numpy as np

from k2 import meters
from k2 import symbols as symbol_names
from k2.feeds.base import BOOK, DATA, HEARTBEAT, QUOTES, TRADES, Control, Limits, Request
from k2.feeds.columns import Columns, QuoteColumns, TradeColumns
from k2.feeds.layouts import Fields, Layouts, Shape
from k2.feeds.spans import Numbers, Words, rfc3339_times, zeros
from k2.feeds.times import from_rfc3339
from k2.feeds.wire import Id, endpoint, number, opposite_side, parse_frame
from k2.model import NOTHING, TRADE, Frame, Parsed, Quote, Trade

_CHANNELS = {TRADES: "market_trades", QUOTES: "ticker", BOOK: "level2"}
_HEARTBEATS = "heartbeats"

_ADVANCED_WITHOUT_ROWS = frozenset(
    {"l2_data", "candles", "heartbeats", "subscriptions", "status", "user", "futures_balance_summary"}
)
_EXCHANGE_WITHOUT_ROWS = frozenset(
    {"l2update", "snapshot", "heartbeat", "subscriptions", "error", "status", "received", "open", "done", "change"}
)
_LONGEST_CONTROL = 65_536


class _Envelope(msgspec.Struct, gc=False):
    """What tells the messages apart: Advanced Trade has `channel`, the Exchange feed `type`."""

    channel: str = ""
    type: str = ""


class _AdvancedTrade(msgspec.Struct, gc=False):
    product_id: str
    trade_id: str
    price: str
    size: str
    time: str
    side: str


class _AdvancedTrades(msgspec.Struct, gc=False):
    trades: list[_AdvancedTrade]


class _AdvancedTradesMessage(msgspec.Struct, gc=False):
    events: list[_AdvancedTrades]
    channel: str = ""
    type: str = ""


class _AdvancedTicker(msgspec.Struct, gc=False):
    """Without a best bid and ask in `ticker_batch`; empty for a product nobody quotes."""

    product_id: str
    best_bid: str = ""
    best_ask: str = ""
    best_bid_quantity: str = ""
    best_ask_quantity: str = ""


class _AdvancedTickers(msgspec.Struct, gc=False):
    tickers: list[_AdvancedTicker]


class _AdvancedTickerMessage(msgspec.Struct, gc=False):
    timestamp: str
    events: list[_AdvancedTickers]
    channel: str = ""
    type: str = ""


class _Match(msgspec.Struct, gc=False):
    """`match` and `last_match` of the Exchange feed."""

    product_id: str
    trade_id: Id
    price: str
    size: str
    side: str
    time: str


class _ExchangeTicker(msgspec.Struct, gc=False):
    """The sizes came in 2022; `time` is left out for a product without a trade."""

    product_id: str
    sequence: Id = 0
    best_bid: str = ""
    best_ask: str = ""
    best_bid_size: str = ""
    best_ask_size: str = ""
    time: str = ""


class _RestTrade(msgspec.Struct, gc=False):
    """A row of the Exchange's REST answer /products/{id}/trades."""

    trade_id: Id
    price: str
    size: str
    side: str
    time: str


class _RestError(msgspec.Struct, gc=False):
    message: str


class _Subscriptions(msgspec.Struct, gc=False):
    subscriptions: dict[str, list[str]] = {}


class _ExchangeChannel(msgspec.Struct, gc=False):
    name: str
    product_ids: list[str] = []


class _ControlMessage(msgspec.Struct, gc=False):
    channel: str = ""
    type: str = ""
    message: str = ""
    reason: str = ""
    events: list[_Subscriptions] = []
    channels: list[_ExchangeChannel] = []


_decode_envelope = msgspec.json.Decoder(_Envelope).decode
_decode_advanced_trades = msgspec.json.Decoder(_AdvancedTradesMessage).decode
_decode_advanced_tickers = msgspec.json.Decoder(_AdvancedTickerMessage).decode
_decode_match = msgspec.json.Decoder(_Match).decode
_decode_exchange_ticker = msgspec.json.Decoder(_ExchangeTicker).decode
_decode_rest_trades = msgspec.json.Decoder(list[_RestTrade] | _RestError).decode
_decode_control = msgspec.json.Decoder(_ControlMessage).decode


class Coinbase:
    """Advanced Trade lists the newest trade first inside a message; rows keep that order.

    The first message for a product is a snapshot of its last 100 trades. `heartbeats` is always
    subscribed, because the other channels are closed after 60 to 90 seconds without an update.
    A quote whose feed tells no sizes has the amounts "0".
    """

    name = "coinbase"
    url = "wss://advanced-trade-ws.coinbase.com"
    rest_url = "https://api.coinbase.com"
    default_symbols: tuple[str, ...] = ("BTC-USD", "ETH-USD")
    contiguous_ids: bool = True
    # 8 unauthenticated messages/s from one address, so half of it a connection; a subscription must come
    # within 5 s; heartbeats come every second.
    limits = Limits(
        symbols_per_connection=100,
        requests_per_second=4.0,
        connection_seconds=float("inf"),
        silence_seconds=10.0,
        connections_per_minute=60.0,
    )

    def __init__(self) -> None:
        self._canonical = lru_cache(maxsize=symbol_names.CACHED_SYMBOLS)(self.to_canonical)
        meters.watch_cache("feeds.symbols", self._canonical)
        one_event = ("events.1",)
        shapes = (
            Shape({"channel": "market_trades"}, self._trade_columns, rows="events.0.trades", absent=one_event),
            Shape({"channel": "ticker"}, self._ticker_columns, rows="events.0.tickers", absent=one_event),
            *(Shape({"type": kind}, self._match_columns, absent=("channel",)) for kind in ("match", "last_match")),
            Shape({"type": "ticker"}, self._exchange_ticker_columns, absent=("channel",)),
        )
        self._layouts = Layouts(shapes, lambda data: self._message(data).has_rows)

    def connection_url(self, url: str, symbols: Sequence[str], channels: Sequence[str]) -> str:
        """Return the address unchanged."""
        return url

    def requests(self, symbols: Sequence[str], channels: Sequence[str]) -> list[Request]:
        """Return one message a channel, heartbeats first: a message may name one channel only."""
        products = [self.to_native(symbol) for symbol in symbols]
        heartbeats = Request(_encode({"type": "subscribe", "channel": _HEARTBEATS}), frozenset({_HEARTBEATS}))
        return [heartbeats, *(_subscribe(_CHANNELS[channel], products) for channel in channels)]

    def control(self, data: bytes) -> Control:
        """Recognise heartbeats, errors, and `subscriptions`, which lists everything subscribed so far."""
        if len(data) > _LONGEST_CONTROL or data.startswith((b'{"channel":"m', b'{"channel":"t', b'{"channel":"l')):
            return DATA
        try:
            message = _decode_control(data)
        except (ValueError, RecursionError):
            return DATA
        if message.channel == _HEARTBEATS or message.type == "heartbeat":
            return HEARTBEAT
        if message.type == "error":
            return Control("refused", reason=": ".join(part for part in (message.message, message.reason) if part))
        if "subscriptions" in (message.channel, message.type):
            return Control("acknowledged", _subscribed(message))
        return DATA

    def ping(self) -> str | None:
        """Return None: protocol pings are used."""
        return None

    def parse(self, frame: Frame) -> Parsed:
        """Read `market_trades` and `ticker` of Advanced Trade, `match`, `last_match` and `ticker` of Exchange."""
        return parse_frame(self.name, frame, self._message, self._rest)

    def parse_many(self, frames: Sequence[bytes]) -> Columns:
        """Read runs of `market_trades` and `ticker` of Advanced Trade, those of Exchange; see `ParsesMany`."""
        return self._layouts.read(frames)

    def _trade_columns(self, fields: Fields) -> TradeColumns:
        return self._trades_of(fields, fields.integers("trade_id", quoted=True))

    def _match_columns(self, fields: Fields) -> TradeColumns:
        return self._trades_of(fields, fields.integers("trade_id"))

    def _trades_of(self, fields: Fields, ids: Words) -> TradeColumns:
        return TradeColumns(
            kind=TRADE,
            frames=fields.frames,
            places=fields.places,
            symbols=fields.names("product_id").map(self._canonical),
            ids=ids.astype(np.int64),
            prices=fields.numbers("price", quoted=True),
            amounts=fields.numbers("size", quoted=True),
            sides=fields.names("side").map(opposite_side),
            times=rfc3339_times(fields.spans("time", quoted=True)),
        )

    def _exchange_ticker_columns(self, fields: Fields) -> QuoteColumns:
        return self._quotes_of(fields, "size", "time", fields.integers("sequence"))

    def _ticker_columns(self, fields: Fields) -> QuoteColumns:
        return self._quotes_of(fields, "quantity", "/timestamp", None)

    def _quotes_of(self, fields: Fields, amount: str, time: str, update_ids: Words | None) -> QuoteColumns:
        return QuoteColumns(
            frames=fields.frames,
            places=fields.places,
            symbols=fields.names("product_id").map(self._canonical),
            bid_prices=fields.numbers("best_bid", quoted=True),
            bid_amounts=_amounts(fields, f"best_bid_{amount}"),
            ask_prices=fields.numbers("best_ask", quoted=True),
            ask_amounts=_amounts(fields, f"best_ask_{amount}"),
            update_ids=None if update_ids is None else update_ids.astype(np.int64),
            times=rfc3339_times(fields.spans(time, quoted=True)),
        )

    def to_canonical(self, native: str) -> str:
        """`BTC-USD` -> `BTC-USD`."""
        return symbol_names.canonical(native)

    def to_native(self, canonical: str) -> str:
        """`BTC-USD` -> `BTC-USD`."""
        return symbol_names.canonical(canonical)

    def _message(self, data: bytes) -> Parsed:
        envelope = _decode_envelope(data)
        if envelope.channel:
            return self._advanced(envelope.channel, data)
        return self._exchange(envelope.type, data)

    def _advanced(self, channel: str, data: bytes) -> Parsed:
        if channel == "market_trades":
            events = _decode_advanced_trades(data).events
            return Parsed([self._advanced_trade(row) for event in events for row in event.trades])
        if channel in ("ticker", "ticker_batch"):
            message = _decode_advanced_tickers(data)
            time = from_rfc3339(message.timestamp)
            rows = [row for event in message.events for row in event.tickers if row.best_bid and row.best_ask]
            return Parsed([], [self._advanced_quote(row, time) for row in rows])
        if channel in _ADVANCED_WITHOUT_ROWS:
            return NOTHING
        raise ValueError(f"message of an unknown channel {channel[:40]!r}")

    def _advanced_trade(self, row: _AdvancedTrade) -> Trade:
        trade_id = _number_in_text(row.trade_id)
        return Trade(
            symbol=self._canonical(row.product_id),
            trade_id=trade_id,
            price=number(row.price),
            amount=number(row.size),
            side=opposite_side(row.side),
            exchange_ns=from_rfc3339(row.time),
            first_id=trade_id,
            last_id=trade_id,
        )

    def _advanced_quote(self, row: _AdvancedTicker, exchange_ns: int) -> Quote:
        return Quote(
            symbol=self._canonical(row.product_id),
            bid_price=number(row.best_bid),
            bid_amount=number(row.best_bid_quantity or "0"),
            ask_price=number(row.best_ask),
            ask_amount=number(row.best_ask_quantity or "0"),
            exchange_ns=exchange_ns,
        )

    def _exchange(self, kind: str, data: bytes) -> Parsed:
        if kind in ("match", "last_match"):
            row = _decode_match(data)
            return Parsed([_exchange_trade(self._canonical(row.product_id), row)])
        if kind == "ticker":
            ticker = _decode_exchange_ticker(data)
            return Parsed([], [self._exchange_quote(ticker)] if ticker.best_bid and ticker.best_ask else [])
        if kind in _EXCHANGE_WITHOUT_ROWS:
            return NOTHING
        raise ValueError(f"message of an unknown type {kind[:40]!r}")

    def _exchange_quote(self, row: _ExchangeTicker) -> Quote:
        return Quote(
            symbol=self._canonical(row.product_id),
            bid_price=number(row.best_bid),
            bid_amount=number(row.best_bid_size or "0"),
            ask_price=number(row.best_ask),
            ask_amount=number(row.best_ask_size or "0"),
            exchange_ns=from_rfc3339(row.time) if row.time else 0,
            update_id=row.sequence,
        )

    def _rest(self, origin: str, data: bytes) -> Parsed:
        """Trades of the Exchange's /products/{id}/trades; every other answer holds none."""
        parts = endpoint(origin)[0].split("/")
        if len(parts) < 3 or parts[-1] != "trades" or parts[-3] != "products":
            return NOTHING
        rows = _decode_rest_trades(data)
        if isinstance(rows, _RestError):
            return NOTHING
        symbol = self._canonical(parts[-2])
        return Parsed([_exchange_trade(symbol, row) for row in rows])


def _amounts(fields: Fields, name: str) -> Numbers:
    return fields.numbers(name, quoted=True) if fields.has(name) else zeros(len(fields.frames))


def _exchange_trade(symbol: str, row: _Match | _RestTrade) -> Trade:
    return Trade(
        symbol=symbol,
        trade_id=row.trade_id,
        price=number(row.price),
        amount=number(row.size),
        side=opposite_side(row.side),
        exchange_ns=from_rfc3339(row.time),
        first_id=row.trade_id,
        last_id=row.trade_id,
    )


def _number_in_text(text: str) -> int:
    """Advanced Trade writes its ids as text."""
    if not (text.isascii() and text.isdigit()) or len(text) > 18:
        raise ValueError(f"trade_id {text[:40]!r} is not a number of at most 18 digits")
    return int(text)


def _subscribe(channel: str, products: Sequence[str]) -> Request:
    message = {"type": "subscribe", "product_ids": list(products), "channel": channel}
    return Request(_encode(message), frozenset(_keys(channel, products)))


def _subscribed(message: _ControlMessage) -> frozenset[str]:
    keys: set[str] = set()
    for event in message.events:
        for channel, products in event.subscriptions.items():
            keys.update({_HEARTBEATS} if channel == _HEARTBEATS else _keys(channel, products))
    for listed in message.channels:
        keys.update(_keys(listed.name, listed.product_ids))
    return frozenset(keys)


def _keys(channel: str, products: Iterable[str]) -> set[str]:
    return {f"{channel}:{product}" for product in products}


def _encode(message: object) -> str:
    return msgspec.json.encode(message).decode()


COINBASE = Coinbase()
