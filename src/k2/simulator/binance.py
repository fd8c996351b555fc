"""Binance spot and USD-M futures as they are on the wire, after their documentation (read 2026-11).

Web Socket Streams (`/ws`, `/stream`, SUBSCRIBE...) and the market data part of the REST interface, versions
api/v3 and fapi/v1. As at the exchange, subscribing to a symbol that does not exist is acknowledged, and silent.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec
from aiohttp import web

from k2.schema import TIMEFRAMES
from k2.simulator.candles import Candle
from k2.simulator.connection import DATA, Connection, Message
from k2.simulator.market import Event, Instrument, Market, MarketTrade, fixed
from k2.simulator.wire import AGGREGATES, BOOK, QUOTES, TRADES, Stream, Wire, answer, from_json, number

_STREAM = re.compile(r"([a-z0-9_]+)@(trade|aggTrade|bookTicker|depth)(@(?:0|100|250|500|1000)ms)?")
_CHANNELS = {"trade": TRADES, "aggTrade": AGGREGATES, "bookTicker": QUOTES, "depth": BOOK}
_METHODS = "SUBSCRIBE, UNSUBSCRIBE, LIST_SUBSCRIPTIONS, SET_PROPERTY, GET_PROPERTY"
_MAX_STREAMS = 1024


class _RecordedData(msgspec.Struct):
    """The fields by which a recorded message is assigned to its stream."""

    e: str = ""
    s: str = ""
    u: int = 0
    b: Any = None


class _Recorded(_RecordedData):
    stream: str = ""
    data: _RecordedData | None = None


_decode_recorded = msgspec.json.Decoder(_Recorded).decode
_EVENTS = {"trade": TRADES, "aggTrade": AGGREGATES, "bookTicker": QUOTES, "depthUpdate": BOOK}


class BinanceWire(Wire):
    """Spot; `BinanceUsdmWire` differs where the futures do."""

    exchange = "binance"
    paths: tuple[str, ...] = ("/binance/ws{tail:.*}", "/binance/stream{tail:.*}")
    rest = "/binance/api/v3"
    market_flag = ',"M":true'

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stream_names: dict[tuple[Connection, Stream], str] = {}

    def names(self, told: Instrument) -> tuple[str, ...]:
        """BTC-USDT is BTCUSDT."""
        return (told.base + told.quote,)

    def native(self, market: Market) -> str:
        """Return the exchange's name of a market."""
        return self.names(market.instrument)[0]

    def amount(self, told: Instrument, units: int) -> str:
        """Return an amount as this exchange writes it."""
        return told.amount(units)

    def price(self, told: Instrument, ticks: int) -> str:
        """Return a price as this exchange writes it: spot always with eight decimals."""
        return told.price(ticks) + "0" * (8 - told.price_decimals)

    # Connections.

    def opened(self, connection: Connection, request: web.Request) -> None:
        """Subscribe the streams named in the address."""
        connection.wrapped = "/stream" in request.path
        connection.microseconds = request.query.get("timeUnit", "").upper() == "MICROSECOND"
        named = request.query.get("streams", "").split("/") if connection.wrapped else request.path.split("/ws/")[1:]
        for part in named:
            for stream in filter(None, part.split("/")):
                self._listen(connection, stream)

    def received(self, connection: Connection, text: str) -> None:
        """Answer SUBSCRIBE, UNSUBSCRIBE and LIST_SUBSCRIPTIONS, and what is none of them as the exchange does."""
        request = from_json(text)
        if not isinstance(request, dict):
            connection.send('{"code":3,"msg":"Invalid JSON: expected value at line 1 column 1"}')
            return
        request_id = request.get("id")
        if request_id is not None and not isinstance(request_id, int | str):
            connection.send(_error("Invalid request: request ID must be an unsigned integer", "null"))
            return
        told_id = msgspec.json.encode(request_id).decode()
        method, streams = request.get("method"), request.get("params") or []
        if method == "LIST_SUBSCRIPTIONS":
            mine = [name for (owner, _), name in self._stream_names.items() if owner is connection]
            connection.send(f'{{"result":{msgspec.json.encode(mine).decode()},"id":{told_id}}}')
        elif method in ("SUBSCRIBE", "UNSUBSCRIBE"):
            refusal = self._refusal(streams)
            if refusal:
                connection.send(_error(refusal, told_id))
                return
            connection.send(f'{{"result":null,"id":{told_id}}}')
            for stream in streams:
                (self._listen if method == "SUBSCRIBE" else self._leave)(connection, stream)
        elif method == "SET_PROPERTY":
            connection.wrapped = bool(streams[1]) if len(streams) > 1 else connection.wrapped
            connection.send(f'{{"result":null,"id":{told_id}}}')
        else:
            connection.send(_error(f"Invalid request: unknown variant `{method}`, expected one of {_METHODS}", told_id))

    def _refusal(self, streams: Any) -> str:
        if self.refuses():
            return "Invalid request: subscription refused"
        if not isinstance(streams, list) or not all(isinstance(stream, str) for stream in streams):
            return "Invalid request: invalid type, expected a string"
        return "Invalid request: too many parameters" if len(streams) > _MAX_STREAMS else ""

    def _stream(self, name: str) -> Stream | None:
        match = _STREAM.fullmatch(name)
        symbol = self.symbol_of(match[1]) if match else None
        return (_CHANNELS[match[2]], symbol) if match and symbol else None

    def _listen(self, connection: Connection, name: str) -> None:
        stream = self._stream(name)
        if stream is not None:
            self.subscribe(connection, *stream)
            self._stream_names[connection, stream] = name

    def _leave(self, connection: Connection, name: str) -> None:
        stream = self._stream(name)
        if stream is not None:
            self.unsubscribe(connection, *stream)
            self._stream_names.pop((connection, stream), None)

    def forget(self, connection: Connection) -> None:
        """End all subscriptions of a connection."""
        super().forget(connection)
        for key in [key for key in self._stream_names if key[0] is connection]:
            del self._stream_names[key]

    # Messages.

    def publish(self, market: Market, event: Event) -> None:
        """Tell trades one by one, aggregates, the best prices and the differences of the book."""
        symbol = market.symbol
        if listening := self.listening(TRADES, symbol):
            for trade in event.trades:
                self._send(listening, TRADES, market, trade)
        if listening := self.listening(AGGREGATES, symbol):
            for trade in event.aggregates:
                self._send(listening, AGGREGATES, market, trade)
        if event.changes and (listening := self.listening(QUOTES, symbol)):
            text = self.quote_text(market, event.ns)
            self._broadcast(listening, (QUOTES, symbol), text)
        if event.changes and (listening := self.listening(BOOK, symbol)):
            self._broadcast(listening, (BOOK, symbol), self.book_text(market, event))

    def _send(self, listening: dict[Connection, int], channel: str, market: Market, trade: MarketTrade) -> None:
        tally = self.tally(market.symbol, channel)
        write = self.trade_text if channel == TRADES else self.aggregate_text
        text = write(market, trade, trade.ns // 1_000_000)
        for connection in listening:
            told = write(market, trade, trade.ns // 1_000) if connection.microseconds else text
            if connection.wrapped:
                told = self._wrap(connection, (channel, market.symbol), told)
            connection.put(Message(told, DATA, tally, (trade,)))

    def _broadcast(self, listening: dict[Connection, int], stream: Stream, text: str) -> None:
        for connection in listening:
            connection.put(Message(self._wrap(connection, stream, text) if connection.wrapped else text, DATA))

    def _wrap(self, connection: Connection, stream: Stream, text: str) -> str:
        return f'{{"stream":"{self._stream_names[connection, stream]}","data":{text}}}'

    def trade_text(self, market: Market, trade: MarketTrade, time: int) -> str:
        """Write a `trade` event."""
        told = market.instrument
        return (
            f'{{"e":"trade","E":{time},"s":"{self.native(market)}","t":{trade.trade_id},'
            f'"p":"{self.price(told, trade.price)}","q":"{self.amount(told, trade.amount)}",'
            f'"T":{time},"m":{"false" if trade.buy else "true"},"M":true}}'
        )

    def aggregate_text(self, market: Market, trade: MarketTrade, time: int) -> str:
        """Write an `aggTrade` event."""
        told = market.instrument
        return (
            f'{{"e":"aggTrade","E":{time},"s":"{self.native(market)}","a":{trade.trade_id},'
            f'"p":"{self.price(told, trade.price)}","q":"{self.amount(told, trade.amount)}",'
            f'"f":{trade.first_id},"l":{trade.last_id},"T":{time},'
            f'"m":{"false" if trade.buy else "true"}{self.market_flag}}}'
        )

    def quote_text(self, market: Market, ns: int) -> str:
        """Write a `bookTicker` event; spot sends neither its name nor a time."""
        return f'{{"u":{market.update_id},{self._best(market)}}}'

    def _best(self, market: Market) -> str:
        told, book = market.instrument, market.book
        bid, ask = book.best(True), book.best(False)
        return (
            f'"s":"{self.native(market)}","b":"{self.price(told, bid)}","B":"{self.amount(told, book.bids[bid])}",'
            f'"a":"{self.price(told, ask)}","A":"{self.amount(told, book.asks[ask])}"'
        )

    def book_text(self, market: Market, event: Event) -> str:
        """Write a `depthUpdate` event with the levels one event changed."""
        time = event.ns // 1_000_000
        return (
            f'{{"e":"depthUpdate","E":{time},{self.book_extra(market, time)}"s":"{self.native(market)}",'
            f'"U":{event.first_update},"u":{event.last_update},{self.book_previous(event)}'
            f"{self._levels(market, event)}}}"
        )

    def book_extra(self, market: Market, time: int) -> str:
        """Return fields only the futures send."""
        return ""

    def book_previous(self, event: Event) -> str:
        """Return the number of the update before, which only the futures send."""
        return ""

    def _levels(self, market: Market, event: Event) -> str:
        told = market.instrument
        sides = []
        for is_bid in (True, False):
            levels = {price: amount for bid, price, amount in event.changes if bid == is_bid}
            rows = ",".join(f'["{self.price(told, p)}","{self.amount(told, a)}"]' for p, a in levels.items())
            sides.append(f'"{"b" if is_bid else "a"}":[{rows}]')
        return ",".join(sides)

    def unknown_message(self, connection: Connection) -> str:
        """An event type that does not exist."""
        return '{"e":"zzNewEvent","E":1,"s":"BTCUSDT","zz":[1,2]}'

    def stream_of(self, data: bytes) -> Stream | None:
        """Tell a recorded message by its stream's name, else by event and symbol."""
        try:
            recorded = _decode_recorded(data)
        except msgspec.DecodeError:
            return None
        inner = recorded.data or recorded
        channel = _EVENTS.get(inner.e) or (QUOTES if not inner.e and inner.u and isinstance(inner.b, str) else None)
        symbol = self.symbol_of(inner.s) if channel else None
        return (channel, symbol) if channel and symbol else None

    # REST.

    def too_many(self) -> str:
        """Return the body of a 429 answer."""
        return '{"code":-1003,"msg":"Too many requests; please use the websocket for live updates to avoid bans."}'

    def routes(self) -> list[web.RouteDef]:
        """Return the resources of the market data interface."""
        resources = {
            "ping": self._ping,
            "time": self._time,
            "exchangeInfo": self._exchange_info,
            "trades": self._trades,
            "historicalTrades": self._historical_trades,
            "aggTrades": self._aggregates,
            "klines": self._candles,
            "depth": self._depth,
        }
        return [web.get(f"{self.rest}/{name}", handler) for name, handler in resources.items()]

    def _market(self, request: web.Request) -> Market:
        name = request.query.get("symbol")
        if name is None:
            raise _rest_error(-1102, "Mandatory parameter 'symbol' was not sent, was empty/null, or malformed.")
        market = self.find(name)
        if market is None:
            raise _rest_error(-1121, "Invalid symbol.")
        return market

    async def _ping(self, request: web.Request) -> web.Response:
        return answer({})

    async def _time(self, request: web.Request) -> web.Response:
        return answer({"serverTime": self._now_ms()})

    def _now_ms(self) -> int:
        return max((market.next_ns() for market in self.markets.values()), default=0) // 1_000_000

    async def _exchange_info(self, request: web.Request) -> web.Response:
        symbols = [self.symbol_info(market) for market in self.markets.values()]
        return answer(
            {
                "timezone": "UTC",
                "serverTime": self._now_ms(),
                "rateLimits": [
                    {"rateLimitType": "REQUEST_WEIGHT", "interval": "MINUTE", "intervalNum": 1, "limit": 6000}
                ],
                "exchangeFilters": [],
                "symbols": symbols,
            }
        )

    def symbol_info(self, market: Market) -> dict[str, Any]:
        """Describe a market as exchangeInfo does."""
        told = market.instrument
        return {
            "symbol": self.native(market),
            "status": "TRADING",
            "baseAsset": told.base,
            "baseAssetPrecision": 8,
            "quoteAsset": told.quote,
            "quotePrecision": 8,
            "quoteAssetPrecision": 8,
            "orderTypes": ["LIMIT", "LIMIT_MAKER", "MARKET"],
            "icebergAllowed": True,
            "ocoAllowed": True,
            "isSpotTradingAllowed": True,
            "isMarginTradingAllowed": False,
            "filters": self._filters(told),
            "permissions": ["SPOT"],
        }

    def _filters(self, told: Instrument) -> list[dict[str, Any]]:
        tick, step = self.price(told, 1), self.amount(told, 1)
        return [
            {"filterType": "PRICE_FILTER", "minPrice": tick, "maxPrice": "1000000.00000000", "tickSize": tick},
            {"filterType": "LOT_SIZE", "minQty": step, "maxQty": "9000.00000000", "stepSize": step},
            {"filterType": "NOTIONAL", "minNotional": "5.00000000", "maxNotional": "9000000.00000000"},
        ]

    async def _trades(self, request: web.Request) -> web.Response:
        market = self._market(request)
        return self._trade_rows(market, market.last_trades(min(number(request, "limit", 500), 1000)))

    async def _historical_trades(self, request: web.Request) -> web.Response:
        market, limit = self._market(request), min(number(request, "limit", 500), 1000)
        first = number(request, "fromId", -1)
        return self._trade_rows(market, market.trades(first, limit) if first >= 0 else market.last_trades(limit))

    def _trade_rows(self, market: Market, trades: Sequence[MarketTrade]) -> web.Response:
        told = market.instrument
        decimals = told.price_decimals + told.amount_decimals
        rows = [
            {
                "id": t.trade_id,
                "price": self.price(told, t.price),
                "qty": self.amount(told, t.amount),
                "quoteQty": fixed(t.price * t.amount, decimals),
                "time": t.ns // 1_000_000,
                "isBuyerMaker": not t.buy,
                **self.trade_extra(t),
            }
            for t in trades
        ]
        return answer(rows)

    def trade_extra(self, trade: MarketTrade) -> dict[str, Any]:
        """Return fields of a REST trade that spot and futures do not share."""
        return {"isBestMatch": True}

    async def _aggregates(self, request: web.Request) -> web.Response:
        market, limit = self._market(request), min(number(request, "limit", 500), 1000)
        told = market.instrument
        rows = [
            {
                "a": t.trade_id,
                "p": self.price(told, t.price),
                "q": self.amount(told, t.amount),
                "f": t.first_id,
                "l": t.last_id,
                "T": t.ns // 1_000_000,
                "m": not t.buy,
                **({"M": True} if self.market_flag else {}),
            }
            for t in self._some_aggregates(market, request, limit)
        ]
        return answer(rows)

    @staticmethod
    def _some_aggregates(market: Market, request: web.Request, limit: int) -> list[MarketTrade]:
        if "fromId" in request.query:
            return market.aggregates(number(request, "fromId", 0), limit)
        if "startTime" not in request.query and "endTime" not in request.query:
            return market.aggregates(market.next_aggregate_id - limit, limit)
        start, end = number(request, "startTime", 0), number(request, "endTime", 1 << 60)
        kept = market.aggregates(0, market.next_aggregate_id)
        return [t for t in kept if start <= t.ns // 1_000_000 <= end][:limit]

    async def _candles(self, request: web.Request) -> web.Response:
        market, interval = self._market(request), request.query.get("interval", "")
        if interval not in TIMEFRAMES:
            raise _rest_error(-1120, "Invalid interval.")
        length = TIMEFRAMES[interval]
        start, end = number(request, "startTime", 0), number(request, "endTime", 1 << 60)
        limit = min(number(request, "limit", 500), 1000)
        candles = [
            (ns, candle) for ns, candle in market.candles.timeframe(length).items() if start <= ns // 1_000_000 <= end
        ]
        chosen = candles[:limit] if "startTime" in request.query else candles[-limit:]
        return answer([self._candle_row(market.instrument, ns, length, candle) for ns, candle in chosen])

    def _candle_row(self, told: Instrument, ns: int, length: int, candle: Candle) -> list[Any]:
        decimals = told.price_decimals + told.amount_decimals
        return [
            ns // 1_000_000,
            *(self.price(told, p) for p in (candle.open, candle.high, candle.low, candle.close)),
            self.amount(told, candle.amount),
            (ns + length) // 1_000_000 - 1,
            fixed(candle.quote, decimals),
            candle.count,
            self.amount(told, candle.buy_amount),
            fixed(candle.buy_quote, decimals),
            "0",
        ]

    async def _depth(self, request: web.Request) -> web.Response:
        market, depth = self._market(request), min(number(request, "limit", 100), 5000)
        told = market.instrument
        sides = {
            name: [
                [self.price(told, price), self.amount(told, amount)] for price, amount in market.book.top(is_bid, depth)
            ]
            for name, is_bid in (("bids", True), ("asks", False))
        }
        return answer({"lastUpdateId": market.update_id, **self.depth_extra(market), **sides})

    def depth_extra(self, market: Market) -> dict[str, Any]:
        """Return fields of a REST book only the futures send."""
        return {}


class BinanceUsdmWire(BinanceWire):
    """USD-M perpetual futures."""

    exchange = "binance-usdm"
    paths = (
        "/binance-usdm/ws{tail:.*}",
        "/binance-usdm/stream{tail:.*}",
        # Since 2026 the futures also have their streams under public/ and market/.
        "/binance-usdm/{category:public|market}/ws{tail:.*}",
        "/binance-usdm/{category:public|market}/stream{tail:.*}",
    )
    rest = "/binance-usdm/fapi/v1"
    market_flag = ""

    def price(self, told: Instrument, ticks: int) -> str:
        """Return a price with the market's own decimals, at least two."""
        return told.price(ticks) + "0" * max(0, 2 - told.price_decimals)

    def trade_text(self, market: Market, trade: MarketTrade, time: int) -> str:
        """Write a `trade` event; `X` says whether it was made in the market."""
        told = market.instrument
        return (
            f'{{"e":"trade","E":{time},"T":{time},"s":"{self.native(market)}","t":{trade.trade_id},'
            f'"p":"{self.price(told, trade.price)}","q":"{self.amount(told, trade.amount)}",'
            f'"X":"{trade.mark}","m":{"false" if trade.buy else "true"}}}'
        )

    def quote_text(self, market: Market, ns: int) -> str:
        """Write a `bookTicker` event, with its name and times."""
        time = ns // 1_000_000
        return f'{{"e":"bookTicker","u":{market.update_id},{self._best(market)},"T":{time},"E":{time}}}'

    def book_extra(self, market: Market, time: int) -> str:
        """Return the transaction time."""
        return f'"T":{time},'

    def book_previous(self, event: Event) -> str:
        """Return `pu`."""
        return f'"pu":{event.first_update - 1},'

    def trade_extra(self, trade: MarketTrade) -> dict[str, Any]:
        """The futures do not tell isBestMatch."""
        return {}

    def depth_extra(self, market: Market) -> dict[str, Any]:
        """Return message and transaction time."""
        return {"E": self._now_ms(), "T": self._now_ms()}

    def symbol_info(self, market: Market) -> dict[str, Any]:
        """Describe a perpetual contract as exchangeInfo does."""
        told = market.instrument
        return {
            "symbol": self.native(market),
            "pair": self.native(market),
            "contractType": "PERPETUAL",
            "deliveryDate": 4133404800000,
            "onboardDate": 1569398400000,
            "status": "TRADING",
            "baseAsset": told.base,
            "quoteAsset": told.quote,
            "marginAsset": told.quote,
            "pricePrecision": told.price_decimals,
            "quantityPrecision": told.amount_decimals,
            "baseAssetPrecision": 8,
            "quotePrecision": 8,
            "underlyingType": "COIN",
            "filters": self._filters(told),
            "orderTypes": ["LIMIT", "MARKET"],
            "timeInForce": ["GTC", "IOC", "FOK"],
        }


def _error(text: str, told_id: str) -> str:
    return f'{{"error":{{"code":2,"msg":"{text}"}},"id":{told_id}}}'


def _rest_error(code: int, text: str) -> web.HTTPBadRequest:
    return web.HTTPBadRequest(
        text=msgspec.json.encode({"code": code, "msg": text}).decode(), content_type="application/json"
    )
