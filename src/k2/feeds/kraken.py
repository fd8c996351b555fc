"""Kraken spot: API v2 live; v1 messages of recordings and REST trade answers are parsed too.

Sources: docs.kraken.com/api, WebSocket v2 (`trade`, `ticker`, `book`, `status`, `heartbeat`, `ping`),
WebSocket v1 (`trade`, `ticker`, `spread`, `subscriptionStatus`) and REST "Get Recent Trades", read 2026-11-21.
`side` is the taker's everywhere ("The side of the taker order").
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import msgspec
import numpy as np

from k2 import meters
from k2 import symbols as symbol_names
from k2.errors import UnknownName
from k2.feeds.base import BOOK, DATA, HEARTBEAT, QUOTES, TRADES, Control, Limits, Request
from k2.feeds.columns import Columns, QuoteColumns, TradeColumns
from k2.feeds.layouts import Fields, Layouts, Shape
from k2.feeds.spans import decimal_times, rfc3339_times
from k2.feeds.times import from_decimal, from_rfc3339
from k2.feeds.wire import Id, endpoint, number, parse_frame, raw_number, taker_side
from k2.model import NOTHING, TRADE, Frame, Parsed, Quote, Trade

_CHANNELS = {TRADES: "trade", QUOTES: "ticker", BOOK: "book"}
# A refusal tells the request's number but not its channel; these tell the channel by the number.
_REQUEST_IDS = {"trade": 1, "ticker": 2, "book": 3}
_CHANNEL_OF_REQUEST = {number: channel for channel, number in _REQUEST_IDS.items()}
_BOOK_DEPTH = 100

_V2_WITHOUT_ROWS = frozenset({"book", "level3", "ohlc", "instrument", "status", "heartbeat"})
_V1_WITHOUT_ROWS = ("book-", "ohlc-")
_CONTROL_BYTES = 4_096

# Codes of assets listed before 2016 carry a letter, X for coins and Z for money, in REST pair names.
_LEGACY = {
    **{f"X{code}": code for code in ("XBT", "XDG", "XLM", "XMR", "XRP", "ETC", "ETH", "LTC", "MLN", "REP", "ZEC")},
    **{f"Z{code}": code for code in ("AUD", "CAD", "EUR", "GBP", "JPY", "USD")},
}
# Quote assets of Kraken's own pairs, longest first. The common list would split DOTUSD as DO-TUSD.
_QUOTES = (
    *("PYUSD", "RLUSD", "USDT", "USDC", "USDG", "USDQ", "USDR", "EURC", "EURQ", "EURR", "EURT"),
    *("USD", "EUR", "XBT", "BTC", "ETH", "GBP", "JPY", "AUD", "CAD", "CHF", "AED", "DAI", "DOT", "SOL"),
)


class _Envelope(msgspec.Struct, gc=False):
    """What tells the messages apart: v2 has `channel` or `method`, v1 `event`."""

    channel: str = ""
    method: str = ""
    event: str = ""
    error: str | None = None
    data: msgspec.Raw = msgspec.Raw(b"")


class _TradeRow(msgspec.Struct, gc=False):
    symbol: str
    side: str
    price: msgspec.Raw
    qty: msgspec.Raw
    trade_id: Id
    timestamp: str


class _TickerRow(msgspec.Struct, gc=False):
    symbol: str
    bid: msgspec.Raw
    bid_qty: msgspec.Raw
    ask: msgspec.Raw
    ask_qty: msgspec.Raw
    timestamp: str = ""


class _V1Trade(msgspec.Struct, gc=False, array_like=True):
    price: str
    volume: str
    time: str
    side: str


class _V1Ticker(msgspec.Struct, gc=False):
    """Best ask and bid: price, whole lots, amount."""

    a: tuple[str, msgspec.Raw, str]
    b: tuple[str, msgspec.Raw, str]


class _V1Spread(msgspec.Struct, gc=False, array_like=True):
    bid: str
    ask: str
    timestamp: str
    bid_volume: str
    ask_volume: str


class _RestTrade(msgspec.Struct, gc=False, array_like=True):
    """A row of the REST answer Trades; answers before 2022 have no trade id."""

    price: str
    volume: str
    time: msgspec.Raw
    side: str
    order_type: str
    misc: str
    trade_id: Id = 0


class _Rest(msgspec.Struct, gc=False):
    error: list[str] = []
    result: dict[str, msgspec.Raw] = {}


class _Acknowledged(msgspec.Struct, gc=False):
    channel: str = ""
    symbol: str = ""


class _MethodAnswer(msgspec.Struct, gc=False):
    channel: str = ""
    method: str = ""
    event: str = ""
    success: bool | None = None
    result: _Acknowledged | None = None
    error: str = ""
    symbol: str = ""
    req_id: int = 0


_decode_envelope = msgspec.json.Decoder(_Envelope).decode
_decode_trades = msgspec.json.Decoder(list[_TradeRow]).decode
_decode_tickers = msgspec.json.Decoder(list[_TickerRow]).decode
_decode_array = msgspec.json.Decoder(list[msgspec.Raw]).decode
_decode_text = msgspec.json.Decoder(str).decode
_decode_v1_trades = msgspec.json.Decoder(list[_V1Trade]).decode
_decode_v1_ticker = msgspec.json.Decoder(_V1Ticker).decode
_decode_v1_spread = msgspec.json.Decoder(_V1Spread).decode
_decode_rest = msgspec.json.Decoder(_Rest).decode
_decode_rest_trades = msgspec.json.Decoder(list[_RestTrade]).decode
_decode_method_answer = msgspec.json.Decoder(_MethodAnswer).decode


class Kraken:
    """API v2 sends prices and amounts as JSON numbers; their digits are kept as sent.

    A subscription to `trade` begins with the last 50 trades, which fills a short disconnection.
    `ticker` is asked for on every change of the best price, not only on trades. v1 trades have no
    number: `trade_id` 0, equal ones in one message are told apart by `occurrence`.
    """

    name = "kraken"
    url = "wss://ws.kraken.com/v2"
    rest_url = "https://api.kraken.com"
    default_symbols: tuple[str, ...] = ("BTC-USD", "ETH-USD")
    contiguous_ids: bool = True
    # A heartbeat comes every second when nothing else does. 150 connections in 10 minutes from one
    # address; no number of symbols is stated, the messages' size asks for a bound.
    limits = Limits(
        symbols_per_connection=200,
        requests_per_second=10.0,
        connection_seconds=float("inf"),
        silence_seconds=10.0,
        connections_per_minute=15.0,
    )

    def __init__(self) -> None:
        self._canonical = lru_cache(maxsize=symbol_names.CACHED_SYMBOLS)(self.to_canonical)
        meters.watch_cache("feeds.symbols", self._canonical)
        shapes = (
            Shape({"channel": "trade"}, self._trade_columns, rows="data"),
            Shape({"channel": "ticker"}, self._ticker_columns, rows="data"),
            Shape({"2": "trade"}, self._v1_trade_columns, rows="1", absent=("4",)),
        )
        self._layouts = Layouts(shapes, lambda data: self._message(data).has_rows)

    def connection_url(self, url: str, symbols: Sequence[str], channels: Sequence[str]) -> str:
        """Return the address unchanged."""
        return url

    def requests(self, symbols: Sequence[str], channels: Sequence[str]) -> list[Request]:
        """Return one message a channel; every symbol of it is acknowledged on its own."""
        natives = [self.to_native(symbol) for symbol in symbols]
        return [_subscribe(_CHANNELS[channel], natives) for channel in channels]

    def control(self, data: bytes) -> Control:
        """Recognise heartbeats, pongs, and the answers to subscriptions."""
        if len(data) > _CONTROL_BYTES or data.startswith((b'{"channel":"t', b'{"channel":"b', b"[")):
            return DATA
        try:
            answer = _decode_method_answer(data)
        except (ValueError, RecursionError):
            return DATA
        if answer.channel in ("heartbeat", "status") or answer.event == "heartbeat" or answer.method == "pong":
            return HEARTBEAT
        if answer.method == "subscribe" and answer.success and answer.result is not None:
            return Control("acknowledged", _keys(answer.result.channel, [answer.result.symbol]))
        if answer.success is False:
            channel = _CHANNEL_OF_REQUEST.get(answer.req_id, "")
            keys = _keys(channel, [answer.symbol]) if channel and answer.symbol else frozenset[str]()
            return Control("refused", keys, answer.error)
        return DATA

    def ping(self) -> str | None:
        """Return the application's ping, which keeps an idle connection open."""
        return '{"method":"ping"}'

    def parse(self, frame: Frame) -> Parsed:
        """Read v2 `trade` and `ticker`, v1 `trade`, `ticker` and `spread`, and the REST answer Trades."""
        return parse_frame(self.name, frame, self._message, self._rest)

    def parse_many(self, frames: Sequence[bytes]) -> Columns:
        """Read runs of v2 `trade` and `ticker` messages and of v1 `trade` messages; see `columns.ParsesMany`."""
        return self._layouts.read(frames)

    def _trade_columns(self, fields: Fields) -> TradeColumns:
        return TradeColumns(
            kind=TRADE,
            frames=fields.frames,
            places=fields.places,
            symbols=fields.names("symbol").map(self._canonical),
            ids=fields.integers("trade_id").astype(np.int64),
            prices=fields.numbers("price", quoted=False),
            amounts=fields.numbers("qty", quoted=False),
            sides=fields.names("side").map(taker_side),
            times=rfc3339_times(fields.spans("timestamp", quoted=True)),
        )

    def _ticker_columns(self, fields: Fields) -> QuoteColumns:
        has_times = fields.has("timestamp")
        return QuoteColumns(
            frames=fields.frames,
            places=fields.places,
            symbols=fields.names("symbol").map(self._canonical),
            bid_prices=fields.numbers("bid", quoted=False),
            bid_amounts=fields.numbers("bid_qty", quoted=False),
            ask_prices=fields.numbers("ask", quoted=False),
            ask_amounts=fields.numbers("ask_qty", quoted=False),
            update_ids=None,
            times=rfc3339_times(fields.spans("timestamp", quoted=True)) if has_times else None,
        )

    def _v1_trade_columns(self, fields: Fields) -> TradeColumns:
        columns = TradeColumns(
            kind=TRADE,
            frames=fields.frames,
            places=fields.places,
            symbols=fields.names("/3").map(self._canonical),
            ids=np.zeros(len(fields.frames), dtype=np.int64),
            prices=fields.numbers("0", quoted=True),
            amounts=fields.numbers("1", quoted=True),
            sides=fields.names("3").map(taker_side),
            times=decimal_times(fields.spans("2", quoted=True)),
        )
        columns.check_twins()
        return columns

    def to_canonical(self, native: str) -> str:
        """`BTC/USD`, `XBT/USD`, `XBTUSD`, `XXBTZUSD` -> `BTC-USD`."""
        if any(separator in native for separator in "/-_"):
            return symbol_names.canonical(native)
        name = symbol_names.legible(native).upper()
        base, quote = _LEGACY.get(name[:-4]), _LEGACY.get(name[-4:])
        if base and quote:
            return symbol_names.join(base, quote)
        if name == "USDTZUSD":  # the one new coin whose pair kept a letter
            return "USDT-USD"
        symbol = symbol_names.join(*symbol_names.split_unseparated(name, _QUOTES))
        if not symbol_names.is_canonical(symbol):
            raise UnknownName(f"symbol {native!r} is not understood (Kraken writes BASE/QUOTE, e.g. BTC/USD)")
        return symbol

    def to_native(self, canonical: str) -> str:
        """`BTC-USD` -> `BTC/USD`; v2 writes BTC and DOGE, not XBT and XDG."""
        parts = symbol_names.canonical(canonical).split("-")
        if len(parts) != 2:
            raise UnknownName(f"symbol {canonical!r} is a future; Kraken spot has none")
        return "/".join(parts)

    def _message(self, data: bytes) -> Parsed:
        if data.lstrip()[:1] == b"[":
            return self._v1(data)
        envelope = _decode_envelope(data)
        if envelope.channel == "trade":
            return Parsed([self._trade(row) for row in _decode_trades(envelope.data)])
        if envelope.channel == "ticker":
            return Parsed([], [self._ticker(row) for row in _decode_tickers(envelope.data)])
        if envelope.channel in _V2_WITHOUT_ROWS or envelope.method or envelope.event or envelope.error:
            return NOTHING
        raise ValueError(f"message of an unknown channel {envelope.channel[:40]!r}")

    def _trade(self, row: _TradeRow) -> Trade:
        return Trade(
            symbol=self._canonical(row.symbol),
            trade_id=row.trade_id,
            price=raw_number(row.price),
            amount=raw_number(row.qty),
            side=taker_side(row.side),
            exchange_ns=from_rfc3339(row.timestamp),
            first_id=row.trade_id,
            last_id=row.trade_id,
        )

    def _ticker(self, row: _TickerRow) -> Quote:
        return Quote(
            symbol=self._canonical(row.symbol),
            bid_price=raw_number(row.bid),
            bid_amount=raw_number(row.bid_qty),
            ask_price=raw_number(row.ask),
            ask_amount=raw_number(row.ask_qty),
            exchange_ns=from_rfc3339(row.timestamp) if row.timestamp else 0,
        )

    def _v1(self, data: bytes) -> Parsed:
        """Arrays `[channel id, payload..., channel name, pair]`."""
        parts = _decode_array(data)
        if len(parts) < 4:
            raise ValueError(f"an array of {len(parts)} instead of channel id, payload, channel name and pair")
        channel, pair = _decode_text(parts[-2]), _decode_text(parts[-1])
        if channel == "trade":
            rows = [(row.price, row.volume, from_decimal(row.time), row.side, 0) for row in _decode_v1_trades(parts[1])]
            return Parsed(_trades(self._canonical(pair), rows))
        if channel == "ticker":
            return Parsed([], [_v1_ticker(self._canonical(pair), _decode_v1_ticker(parts[1]))])
        if channel == "spread":
            return Parsed([], [_v1_spread(self._canonical(pair), _decode_v1_spread(parts[1]))])
        if channel.startswith(_V1_WITHOUT_ROWS):
            return NOTHING
        raise ValueError(f"message of an unknown channel {channel[:40]!r}")

    def _rest(self, origin: str, data: bytes) -> Parsed:
        """Trades of the answer Trades, under the pair's name; every other answer holds none."""
        if not endpoint(origin)[0].endswith("/Trades"):
            return NOTHING
        trades: list[Trade] = []
        for pair, value in _decode_rest(data).result.items():
            if pair == "last":
                continue
            rows = [
                (row.price, row.volume, from_decimal(bytes(row.time).decode("ascii")), row.side, row.trade_id)
                for row in _decode_rest_trades(value)
            ]
            trades += _trades(self._canonical(pair), rows)
        return Parsed(trades)


def _trades(symbol: str, rows: Iterable[tuple[str, str, int, str, int]]) -> list[Trade]:
    """Build trades of one symbol from (price, amount, time, side, id); id 0 is none."""
    seen: dict[tuple[str, str, int, str], int] = {}
    trades = []
    for price, amount, exchange_ns, side, trade_id in rows:
        equal = (price, amount, exchange_ns, side)
        occurrence = 0 if trade_id else seen.get(equal, 0)
        seen[equal] = occurrence + 1
        trades.append(
            Trade(
                symbol=symbol,
                trade_id=trade_id,
                price=number(price),
                amount=number(amount),
                side=taker_side(side),
                exchange_ns=exchange_ns,
                first_id=trade_id,
                last_id=trade_id,
                occurrence=occurrence,
            )
        )
    return trades


def _v1_ticker(symbol: str, row: _V1Ticker) -> Quote:
    return Quote(symbol, number(row.b[0]), number(row.b[2]), number(row.a[0]), number(row.a[2]))


def _v1_spread(symbol: str, row: _V1Spread) -> Quote:
    return Quote(
        symbol=symbol,
        bid_price=number(row.bid),
        bid_amount=number(row.bid_volume),
        ask_price=number(row.ask),
        ask_amount=number(row.ask_volume),
        exchange_ns=from_decimal(row.timestamp),
    )


def _subscribe(channel: str, natives: Sequence[str]) -> Request:
    parameters: dict[str, object] = {"channel": channel, "symbol": list(natives), "snapshot": True}
    if channel == "ticker":
        parameters["event_trigger"] = "bbo"
    if channel == "book":
        parameters["depth"] = _BOOK_DEPTH
    message = {"method": "subscribe", "params": parameters, "req_id": _REQUEST_IDS[channel]}
    return Request(msgspec.json.encode(message).decode(), _keys(channel, natives))


def _keys(channel: str, natives: Iterable[str]) -> frozenset[str]:
    return frozenset(f"{channel}:{native}" for native in natives)


KRAKEN = Kraken()
