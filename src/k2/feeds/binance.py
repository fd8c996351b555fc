"""Binance spot (`binance`) and USD-M futures (`binance-usdm`).

Sources: the WebSocket and REST market data pages of developers.binance.com for spot and for
derivatives/usds-margined-futures (with its "Important WebSocket Change Notice" of 2026-03-06),
read 2026-11-21, and recordings of 2021 to 2024. What is not in the pages, from recordings:
the USD-M `trade` stream, and its field `X`, the kind of the trade.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import msgspec
import numpy as np

from k2 import meters
from k2 import symbols as symbol_names
from k2.errors import UnknownName
from k2.feeds.base import BOOK, DATA, QUOTES, TRADES, Control, Limits, Request
from k2.feeds.columns import Columns, QuoteColumns, TradeColumns
from k2.feeds.layouts import Fields, Layouts, Shape
from k2.feeds.spans import Names, Unusual, integer_times
from k2.feeds.times import from_integer
from k2.feeds.wire import Id, endpoint, number, parse_frame
from k2.model import AGGREGATE, BUY, NOTHING, SELL, TRADE, Frame, Parsed, Quote, Trade

# A subscribe message holds at most this many streams, so that it stays small.
_STREAMS_PER_REQUEST = 100
_STREAMS = {TRADES: "trade", QUOTES: "bookTicker", BOOK: "depth@100ms"}

# Beginnings of stream names and of event types (`e`) that hold neither a trade nor a quote.
_WITHOUT_ROWS = (
    *("depth", "rpiDepth", "kline", "continuous", "miniTicker", "ticker", "24hr", "1hTicker", "4hTicker", "1dTicker"),
    *("avgPrice", "markPrice", "forceOrder", "indexPrice", "compositeIndex", "contractInfo", "assetIndex", "arr"),
    *("!contractInfo", "tradingSession", "referencePrice", "blockTrade"),
)
_SHUTDOWN = "serverShutdown"

_EXPIRY = re.compile(r"([A-Z0-9.]+)_([0-9]{6})")
_LONGEST_CONTROL = 4_096


class _Envelope(msgspec.Struct, gc=False):
    """A combined stream's wrapper; of a single stream's message only the event type."""

    stream: str = ""
    data: msgspec.Raw = msgspec.Raw(b"")
    e: str = ""


class _TradeEvent(msgspec.Struct, gc=False, tag_field="e", tag="trade"):
    s: str
    t: Id
    p: str
    q: str
    T: int
    m: bool
    X: str | None = None  # futures only
    M: bool | None = None  # spot only


class _AggregateEvent(msgspec.Struct, gc=False, tag_field="e", tag="aggTrade"):
    s: str
    a: Id
    p: str
    q: str
    f: Id
    l: Id  # noqa: E741 - the exchange's name
    T: int
    m: bool
    M: bool | None = None  # spot only


class _TickerEvent(msgspec.Struct, gc=False):
    """`bookTicker`: USD-M names itself in `e` and has times, spot does neither."""

    s: str
    u: Id
    b: str
    B: str
    a: str
    A: str
    T: int = 0
    E: int = 0


class _AggregateRow(msgspec.Struct, gc=False):
    """A row of the REST answer aggTrades."""

    a: Id
    p: str
    q: str
    f: Id
    l: Id  # noqa: E741 - the exchange's name
    T: int
    m: bool


class _TradeRow(msgspec.Struct, gc=False, rename="camel"):
    """A row of the REST answers trades and historicalTrades."""

    id: Id
    price: str
    qty: str
    time: int
    is_buyer_maker: bool


class _RestError(msgspec.Struct, gc=False):
    code: int
    msg: str = ""


class _Answer(msgspec.Struct, gc=False):
    """The answer to a message of ours; errors come with and without a wrapper."""

    id: int | str | None = None
    error: _RestError | None = None
    code: int | None = None
    msg: str = ""
    result: msgspec.Raw = msgspec.Raw(b"")


_decode_envelope = msgspec.json.Decoder(_Envelope).decode
_decode_trade = msgspec.json.Decoder(_TradeEvent).decode
_decode_aggregate = msgspec.json.Decoder(_AggregateEvent).decode
_decode_ticker = msgspec.json.Decoder(_TickerEvent).decode
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_answer = msgspec.json.Decoder(_Answer).decode
_decode_aggregate_rows = msgspec.json.Decoder(list[_AggregateRow] | _RestError).decode
_decode_trade_rows = msgspec.json.Decoder(list[_TradeRow] | _RestError).decode


class Binance:
    """Spot. Quotes carry no time of the exchange, only the book's update id.

    The buyer being the maker (`m`) makes the seller the taker. Live times are asked for in
    microseconds (`timeUnit`); milliseconds of recordings and REST answers are told by their magnitude.
    A stream of an unknown symbol is acknowledged like any other and stays silent.
    """

    _spot = True
    name = "binance"
    url = "wss://stream.binance.com:9443"
    rest_url = "https://api.binance.com"
    default_symbols: tuple[str, ...] = ("BTC-USDT", "ETH-USDT")
    contiguous_ids: bool = True
    # 5 messages/s with our pongs among them; 1,024 streams a connection, of which a symbol takes up
    # to 3; cut at 24 h; 300 connections in 5 minutes. A pair that trades moves its bookTicker every
    # few seconds.
    limits = Limits(
        symbols_per_connection=200,
        requests_per_second=4.0,
        connection_seconds=86_400.0,
        silence_seconds=60.0,
        connections_per_minute=60.0,
    )

    def __init__(self) -> None:
        self._readers: dict[str, Callable[[bytes | msgspec.Raw], Parsed]] = {
            "trade": self._trade,
            "aggTrade": self._aggregate,
            "bookTicker": self._ticker,
            "!bookTicker": self._ticker,
        }
        self._canonical = lru_cache(maxsize=symbol_names.CACHED_SYMBOLS)(self.to_canonical)
        meters.watch_cache("feeds.symbols", self._canonical)
        self._layouts = Layouts(list(self._shapes()), lambda data: self._message(data).has_rows)

    def connection_url(self, url: str, symbols: Sequence[str], channels: Sequence[str]) -> str:
        """Return the combined-stream address, which names the stream in every message."""
        return f"{_combined(url)}?timeUnit=microsecond"

    def requests(self, symbols: Sequence[str], channels: Sequence[str]) -> list[Request]:
        """Return SUBSCRIBE messages; an acknowledgement is known by the message's id."""
        streams = [
            f"{self.to_native(symbol).lower()}@{_STREAMS[channel]}" for channel in channels for symbol in symbols
        ]
        chunks = [streams[i : i + _STREAMS_PER_REQUEST] for i in range(0, len(streams), _STREAMS_PER_REQUEST)]
        return [
            Request(_encode({"method": "SUBSCRIBE", "params": chunk, "id": number}), frozenset({str(number)}))
            for number, chunk in enumerate(chunks, start=1)
        ]

    def control(self, data: bytes) -> Control:
        """Recognise answers to SUBSCRIBE and the announcement of a shutdown."""
        if b'"e":"serverShutdown"' in data[:200]:
            return Control("reconnect", reason=f"the exchange announced {_SHUTDOWN}")
        if data.startswith((b'{"stream"', b'{"e"')) or len(data) > _LONGEST_CONTROL:
            return DATA
        try:
            answer = _decode_answer(data)
        except (ValueError, RecursionError):
            return DATA
        keys = frozenset() if answer.id is None else frozenset({str(answer.id)})
        if answer.error is not None:
            return Control("refused", keys, f"{answer.error.msg} (code {answer.error.code})")
        if answer.code is not None:
            return Control("refused", keys, f"{answer.msg} (code {answer.code})")
        return Control("acknowledged", keys) if bytes(answer.result) == b"null" and keys else DATA

    def ping(self) -> str | None:
        """Return None: Binance pings by protocol frames and answers ours."""
        return None

    def parse(self, frame: Frame) -> Parsed:
        """Read `trade`, `aggTrade` and `bookTicker` messages, and the REST trade answers."""
        return parse_frame(self.name, frame, self._message, self._rest)

    def parse_many(self, frames: Sequence[bytes]) -> Columns:
        """Read runs of trades and quotes; see `columns.ParsesMany`."""
        return self._layouts.read(frames)

    def _shapes(self) -> Iterator[Shape]:
        """Return the messages with rows, of combined streams and of single ones."""
        for at, absent in (("data.", ()), ("", ("stream",))):
            yield Shape({f"{at}e": "trade"}, partial(self._trade_columns, at), absent=absent)
            yield Shape({f"{at}e": "aggTrade"}, partial(self._aggregate_columns, at), absent=absent)
            yield Shape({f"{at}e": "bookTicker"}, partial(self._ticker_columns, at), absent=absent)
            if self._spot:
                yield Shape({}, partial(self._ticker_columns, at), absent=(*absent, "e"))

    def _trade_columns(self, at: str, fields: Fields) -> TradeColumns:
        _check_stream(at, fields, "trade")
        marks = fields.names(f"{at}X") if fields.has(f"{at}X") else None
        self._check_market(spot=fields.has(f"{at}M"), futures=marks is not None)
        return TradeColumns(
            kind=TRADE,
            ids=fields.integers(f"{at}t").astype(np.int64),
            off_market=None if marks is None else np.array([mark != "MARKET" for mark in marks.distinct])[marks.codes],
            **self._common(at, fields),
        )

    def _aggregate_columns(self, at: str, fields: Fields) -> TradeColumns:
        _check_stream(at, fields, "aggTrade")
        self._check_market(spot=fields.has(f"{at}M"), futures=False)
        return TradeColumns(
            kind=AGGREGATE,
            ids=fields.integers(f"{at}a").astype(np.int64),
            first_ids=fields.integers(f"{at}f").astype(np.int64),
            last_ids=fields.integers(f"{at}l").astype(np.int64),
            **self._common(at, fields),
        )

    def _common(self, at: str, fields: Fields) -> dict[str, Any]:
        """Return what trades and aggregates have alike."""
        return {
            "frames": fields.frames,
            "places": None,
            "symbols": fields.names(f"{at}s").map(self._canonical),
            "prices": fields.numbers(f"{at}p", quoted=True),
            "amounts": fields.numbers(f"{at}q", quoted=True),
            "sides": Names(fields.flags(f"{at}m").astype(np.int64), [BUY, SELL]),
            "times": integer_times(fields.integers(f"{at}T")),
        }

    def _ticker_columns(self, at: str, fields: Fields) -> QuoteColumns:
        times = [fields.integers(f"{at}{name}") for name in ("T", "E") if fields.has(f"{at}{name}")]
        _check_stream(at, fields, "bookTicker", "!bookTicker")
        self._check_market(spot=not times, futures=bool(times))
        return QuoteColumns(
            frames=fields.frames,
            places=None,
            symbols=fields.names(f"{at}s").map(self._canonical),
            bid_prices=fields.numbers(f"{at}b", quoted=True),
            bid_amounts=fields.numbers(f"{at}B", quoted=True),
            ask_prices=fields.numbers(f"{at}a", quoted=True),
            ask_amounts=fields.numbers(f"{at}A", quoted=True),
            update_ids=fields.integers(f"{at}u").astype(np.int64),
            times=integer_times(times[0]) if times else None,
        )

    def to_canonical(self, native: str) -> str:
        """`BTCUSDT` -> `BTC-USDT`."""
        return symbol_names.canonical(native)

    def to_native(self, canonical: str) -> str:
        """`BTC-USDT` -> `BTCUSDT`."""
        parts = symbol_names.canonical(canonical).split("-")
        if len(parts) != 2:
            raise UnknownName(f"symbol {canonical!r} is a future; Binance spot has none (exchange 'binance-usdm' does)")
        return "".join(parts)

    def _message(self, data: bytes) -> Parsed:
        envelope = _decode_envelope(data)
        if envelope.stream:
            name, _, kind = envelope.stream.partition("@")
            return self._read(kind or name, envelope.data)
        if envelope.e:
            return self._read(envelope.e, data)
        return self._nameless(data)

    def _read(self, kind: str, data: bytes | msgspec.Raw) -> Parsed:
        reader = self._readers.get(kind)
        if reader is not None:
            return reader(data)
        if kind.startswith(_WITHOUT_ROWS) or _decode_envelope(data).e == _SHUTDOWN:
            return NOTHING
        raise ValueError(f"message of an unknown kind {kind[:40]!r}")

    def _nameless(self, data: bytes) -> Parsed:
        """Messages without a type: spot's single bookTicker stream, book snapshots, answers to us."""
        fields = _decode_fields(data).keys()
        if fields >= {"u", "s", "b", "B", "a", "A"}:
            return self._ticker(data)
        if fields & {"lastUpdateId", "id", "error", "code", "result"}:
            return NOTHING
        raise ValueError(f"message of an unknown kind with the fields {sorted(fields)[:12]}")

    def _trade(self, data: bytes | msgspec.Raw) -> Parsed:
        event = _decode_trade(data)
        self._check_market(spot=event.M is not None, futures=event.X is not None)
        trade = Trade(
            symbol=self._canonical(event.s),
            trade_id=event.t,
            price=number(event.p),
            amount=number(event.q),
            side=SELL if event.m else BUY,
            exchange_ns=from_integer(event.T),
            first_id=event.t,
            last_id=event.t,
            off_market=event.X not in (None, "MARKET"),
        )
        return Parsed([trade])

    def _aggregate(self, data: bytes | msgspec.Raw) -> Parsed:
        event = _decode_aggregate(data)
        self._check_market(spot=event.M is not None, futures=False)
        return Parsed([_aggregate_trade(self._canonical(event.s), event)])

    def _ticker(self, data: bytes | msgspec.Raw) -> Parsed:
        event = _decode_ticker(data)
        time = event.T or event.E
        self._check_market(spot=not time, futures=bool(time))
        quote = Quote(
            symbol=self._canonical(event.s),
            bid_price=number(event.b),
            bid_amount=number(event.B),
            ask_price=number(event.a),
            ask_amount=number(event.A),
            exchange_ns=from_integer(time) if time else 0,
            update_id=event.u,
        )
        return Parsed([], [quote])

    def _check_market(self, *, spot: bool, futures: bool) -> None:
        """Refuse a message of the other market: both use the same symbols, ids would be mixed up for good."""
        if (futures and not spot) if self._spot else spot:
            raise ValueError(f"a message of Binance's {'futures' if self._spot else 'spot market'}, not of {self.name}")

    def _rest(self, origin: str, data: bytes) -> Parsed:
        """Trades of aggTrades, trades and historicalTrades; every other answer holds none."""
        path, parameters = endpoint(origin)
        what = path.rpartition("/")[2]
        if what not in ("aggTrades", "trades", "historicalTrades"):
            return NOTHING
        if not parameters.get("symbol"):
            raise ValueError(f"the address {origin!r} of the answer does not name its symbol")
        symbol = self._canonical(parameters["symbol"])
        if what == "aggTrades":
            aggregates = _decode_aggregate_rows(data)
            rows = [] if isinstance(aggregates, _RestError) else [_aggregate_trade(symbol, row) for row in aggregates]
        else:
            trades = _decode_trade_rows(data)
            rows = [] if isinstance(trades, _RestError) else [_single_trade(symbol, row) for row in trades]
        return Parsed(rows)


class BinanceUsdm(Binance):
    """USD-M futures: perpetuals are `BTC-USDT-PERP`, dated contracts `BTC-USDT-240927`.

    `T`, the time of the matching engine, is taken for quotes too. Trades whose `X` is not
    MARKET (insurance fund, auto-deleveraging) happen outside the book: kept as `off_market`.
    """

    name = "binance-usdm"
    _spot = False
    # `/public` serves trade, bookTicker and depth; aggTrade is on `/market`, where nothing else of ours is.
    url = "wss://fstream.binance.com/public"
    rest_url = "https://fapi.binance.com"
    default_symbols: tuple[str, ...] = ("BTC-USDT-PERP", "ETH-USDT-PERP")
    contiguous_ids: bool = True
    # 10 messages/s and 200 streams a connection, of which a symbol takes up to 3.
    limits = Limits(
        symbols_per_connection=60,
        requests_per_second=8.0,
        connection_seconds=86_400.0,
        silence_seconds=60.0,
        connections_per_minute=60.0,
    )

    def connection_url(self, url: str, symbols: Sequence[str], channels: Sequence[str]) -> str:
        """Return the combined-stream address; `timeUnit` is not known on futures."""
        return _combined(url)

    def to_canonical(self, native: str) -> str:
        """`BTCUSDT` -> `BTC-USDT-PERP`, `BTCUSDT_240927` -> `BTC-USDT-240927`."""
        dated = _EXPIRY.fullmatch(symbol_names.legible(native).upper())
        if dated:
            return f"{self.to_canonical(dated[1]).removesuffix('-PERP')}-{dated[2]}"
        base, quote, *suffix = symbol_names.canonical(native).split("-")
        if quote in ("PERP", "USD"):
            raise UnknownName(f"symbol {native!r} is of Binance's COIN-M futures, not of {self.name}")
        return "-".join([base, quote, *(suffix or ["PERP"])])

    def to_native(self, canonical: str) -> str:
        """`BTC-USDT-PERP` -> `BTCUSDT`, `BTC-USDT-240927` -> `BTCUSDT_240927`."""
        parts = symbol_names.canonical(canonical).split("-")
        if len(parts) != 3:
            raise UnknownName(
                f"symbol {canonical!r} is not a future (write {canonical}-PERP, or use the exchange 'binance')"
            )
        base, quote, suffix = parts
        return f"{base}{quote}" if suffix == "PERP" else f"{base}{quote}_{suffix}"


def _check_stream(at: str, fields: Fields, *kinds: str) -> None:
    """Raise Unusual when a combined stream's message is wrapped as one of another kind."""
    if at:
        for stream in fields.names("stream").distinct:
            name, _, told = stream.partition("@")
            if (told or name) not in kinds:
                raise Unusual


def _aggregate_trade(symbol: str, row: _AggregateEvent | _AggregateRow) -> Trade:
    return Trade(
        symbol=symbol,
        trade_id=row.a,
        price=number(row.p),
        amount=number(row.q),
        side=SELL if row.m else BUY,
        exchange_ns=from_integer(row.T),
        kind=AGGREGATE,
        first_id=row.f,
        last_id=row.l,
    )


def _single_trade(symbol: str, row: _TradeRow) -> Trade:
    return Trade(
        symbol=symbol,
        trade_id=row.id,
        price=number(row.price),
        amount=number(row.qty),
        side=SELL if row.is_buyer_maker else BUY,
        exchange_ns=from_integer(row.time),
        first_id=row.id,
        last_id=row.id,
    )


def _combined(url: str) -> str:
    base = url.rstrip("/")
    return base if base.endswith("/stream") else f"{base}/stream"


def _encode(message: object) -> str:
    return msgspec.json.encode(message).decode()


SPOT = Binance()
USDM = BinanceUsdm()
