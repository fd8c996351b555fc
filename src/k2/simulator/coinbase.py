"""Coinbase as it is on the wire: Advanced Trade's WebSocket and public REST interface, and the Exchange's REST trades.

After docs.cdp.coinbase.com (read 2026-11). As at the exchange, `side` is the maker's, a `market_trades` message
lists the newest trade first, and `sequence_num` counts all messages of a connection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from aiohttp import web

from k2.schema import TIMEFRAMES
from k2.simulator.candles import Candle
from k2.simulator.connection import CONTROL, DATA, HEARTBEAT, Connection, Message
from k2.simulator.market import Event, Instrument, Market, MarketTrade, trimmed
from k2.simulator.wire import BOOK, QUOTES, TRADES, Stream, Wire, answer, from_json, iso_nanos, iso_short, number

_CHANNELS = {"market_trades": TRADES, "ticker": QUOTES, "level2": BOOK, "heartbeats": "heartbeats"}
_NAMES = {channel: name for name, channel in _CHANNELS.items()}
_SNAPSHOT_TRADES = 100
_GRANULARITIES = {
    "ONE_MINUTE": "1m",
    "FIVE_MINUTE": "5m",
    "FIFTEEN_MINUTE": "15m",
    "THIRTY_MINUTE": "30m",
    "ONE_HOUR": "1h",
    "ONE_DAY": "1d",
}
_CANDLE_ROWS = 350
_RECORDED = {
    "market_trades": TRADES,
    "ticker": QUOTES,
    "ticker_batch": QUOTES,
    "l2_data": BOOK,
    "match": TRADES,
    "last_match": TRADES,
    "l2update": BOOK,
    "snapshot": BOOK,
}


class _RecordedEvent(msgspec.Struct):
    product_id: str = ""
    trades: list[dict[str, Any]] = []
    tickers: list[dict[str, Any]] = []


class _Recorded(msgspec.Struct):
    """The fields by which a recorded message (of either feed) is assigned to its stream."""

    channel: str = ""
    type: str = ""
    product_id: str = ""
    events: list[_RecordedEvent] = []


_decode_recorded = msgspec.json.Decoder(_Recorded).decode


class CoinbaseWire(Wire):
    """Advanced Trade, without a key: market_trades, ticker, level2, heartbeats."""

    exchange = "coinbase"
    paths = ("/coinbase", "/coinbase/")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._beats = 0

    def names(self, told: Instrument) -> tuple[str, ...]:
        """BTC-USD is BTC-USD."""
        return (f"{told.base}-{told.quote}",)

    def price(self, told: Instrument, ticks: int) -> str:
        """Return a price without zeros at the end."""
        return trimmed(ticks, told.price_decimals)

    def amount(self, told: Instrument, units: int) -> str:
        """Return an amount without zeros at the end."""
        return trimmed(units, told.amount_decimals)

    # Connections.

    def received(self, connection: Connection, text: str) -> None:
        """Answer subscribe and unsubscribe: snapshots first, then the list of all subscriptions."""
        request = from_json(text)
        kind = request.get("type") if isinstance(request, dict) else None
        if kind not in ("subscribe", "unsubscribe"):
            connection.send('{"type":"error","message":"unable to parse subscribe message"}')
            return
        channel = _CHANNELS.get(str(request.get("channel", "")))
        products = request.get("product_ids") or []
        if channel is None or not isinstance(products, list):
            connection.send('{"type":"error","message":"unknown channel"}')
        elif channel == "heartbeats":
            (self.subscribe if kind == "subscribe" else self.unsubscribe)(connection, channel, channel)
            self._list_subscriptions(connection)
        else:
            self._products(connection, kind, channel, [str(product) for product in products])

    def _products(self, connection: Connection, kind: str, channel: str, products: list[str]) -> None:
        symbols = [self.symbol_of(product) for product in products]
        if self.refuses() or not products or None in symbols:
            wrong = next((p for p, symbol in zip(products, symbols, strict=True) if symbol is None), "")
            told = f"{wrong} is not a valid product" if wrong else "subscription refused"
            connection.send(f'{{"type":"error","message":"Failed to subscribe","reason":"{told}"}}')
            return
        for symbol in filter(None, symbols):
            if kind == "unsubscribe":
                self.unsubscribe(connection, channel, symbol)
            elif connection not in self.listening(channel, symbol):
                if not self.recorded:
                    self._snapshot(connection, channel, self.markets[symbol])
                self.subscribe(connection, channel, symbol)
        self._list_subscriptions(connection)

    def _list_subscriptions(self, connection: Connection) -> None:
        listed: dict[str, list[str]] = {}
        for channel, symbol in self.subscribed(connection):
            listed.setdefault(_NAMES[channel], []).append(symbol)
        events = msgspec.json.encode([{"subscriptions": listed}]).decode()
        self._number(connection, "subscriptions", self._now_ns(), events, CONTROL)

    def _now_ns(self) -> int:
        return max((market.next_ns() for market in self.markets.values()), default=0)

    def _snapshot(self, connection: Connection, channel: str, market: Market) -> None:
        ns = market.next_ns()
        if channel == TRADES:
            trades = market.last_trades(_SNAPSHOT_TRADES)
            events = self._trades_events(market, trades, "snapshot")
            self._number(connection, "market_trades", ns, events, DATA, market, trades)
        elif channel == QUOTES:
            self._number(connection, "ticker", ns, self._ticker_events(market, "snapshot"), DATA)
        else:
            book = market.book
            levels = [(is_bid, *level) for is_bid in (True, False) for level in book.top(is_bid, 1000)]
            self._number(connection, "l2_data", ns, self._book_events(market, levels, ns, "snapshot"), DATA)

    # Messages.

    def _number(
        self,
        connection: Connection,
        channel: str,
        ns: int,
        events: str,
        kind: int,
        market: Market | None = None,
        trades: Sequence[MarketTrade] = (),
    ) -> None:
        """Queue a message with the connection's next sequence number."""
        sequence = connection.sequence
        connection.sequence = sequence + 1
        text = f'{{"channel":"{channel}","timestamp":"{iso_nanos(ns)}","sequence_num":{sequence},"events":{events}}}'
        teller = self.tally(market.symbol) if market is not None and trades else None
        connection.put(Message(text, kind, teller, trades))

    def publish(self, market: Market, event: Event) -> None:
        """Tell the trades of one event together, the ticker, and the changed levels of the book."""
        symbol, ns = market.symbol, event.ns
        if event.trades and (listening := self.listening(TRADES, symbol)):
            events = self._trades_events(market, event.trades, "update")
            for connection in listening:
                self._number(connection, "market_trades", ns, events, DATA, market, event.trades)
        if event.changes and (listening := self.listening(QUOTES, symbol)):
            events = self._ticker_events(market, "update")
            for connection in listening:
                self._number(connection, "ticker", ns, events, DATA)
        if event.changes and (listening := self.listening(BOOK, symbol)):
            events = self._book_events(market, event.changes, ns, "update")
            for connection in listening:
                self._number(connection, "l2_data", ns, events, DATA)

    def _trades_events(self, market: Market, trades: Sequence[MarketTrade], kind: str) -> str:
        rows = ",".join(self._trade_row(market.instrument, trade) for trade in reversed(trades))
        return f'[{{"type":"{kind}","trades":[{rows}]}}]'

    def _trade_row(self, told: Instrument, trade: MarketTrade, more: str = "") -> str:
        return (
            f'{{"product_id":"{told.symbol}","trade_id":"{trade.trade_id}","price":"{self.price(told, trade.price)}",'
            f'"size":"{self.amount(told, trade.amount)}","time":"{iso_short(trade.ns)}",'
            f'"side":"{"SELL" if trade.buy else "BUY"}"{more}}}'
        )

    def _ticker_events(self, market: Market, kind: str) -> str:
        told, book, totals = market.instrument, market.book, market.totals
        bid, ask = book.best(True), book.best(False)
        low, high = self.price(told, totals.low), self.price(told, totals.high)
        return (
            f'[{{"type":"{kind}","tickers":[{{"type":"ticker","product_id":"{told.symbol}",'
            f'"price":"{self.price(told, totals.last)}","volume_24_h":"{self.amount(told, totals.amount)}",'
            f'"low_24_h":"{low}","high_24_h":"{high}","low_52_w":"{low}","high_52_w":"{high}",'
            f'"price_percent_chg_24_h":"0","best_bid":"{self.price(told, bid)}","best_ask":"{self.price(told, ask)}",'
            f'"best_bid_quantity":"{self.amount(told, book.bids[bid])}",'
            f'"best_ask_quantity":"{self.amount(told, book.asks[ask])}"}}]}}]'
        )

    def _book_events(self, market: Market, levels: Sequence[tuple[bool, int, int]], ns: int, kind: str) -> str:
        told, time = market.instrument, iso_short(ns)
        rows = ",".join(
            f'{{"side":"{"bid" if is_bid else "offer"}","event_time":"{time}",'
            f'"price_level":"{self.price(told, price)}","new_quantity":"{self.amount(told, amount)}"}}'
            for is_bid, price, amount in levels
        )
        return f'[{{"type":"{kind}","product_id":"{told.symbol}","updates":[{rows}]}}]'

    def every_second(self, connection: Connection) -> None:
        """Send a heartbeat to those who subscribed to them."""
        if connection in self.listening("heartbeats", "heartbeats"):
            self._beats += 1
            ns = self._now_ns()
            events = f'[{{"current_time":"{iso_nanos(ns)}","heartbeat_counter":{self._beats}}}]'
            self._number(connection, "heartbeats", ns, events, HEARTBEAT)

    def unknown_message(self, connection: Connection) -> str:
        """A channel that does not exist."""
        return '{"channel":"zz_new","timestamp":"2026-01-01T00:00:00Z","sequence_num":0,"events":[{"type":"zz"}]}'

    def stream_of(self, data: bytes) -> Stream | None:
        """Tell a recorded message of Advanced Trade by channel and product, of the Exchange feed by type."""
        try:
            recorded = _decode_recorded(data)
        except msgspec.DecodeError:
            return None
        channel = _RECORDED.get(recorded.channel or recorded.type)
        product = recorded.product_id
        for event in recorded.events:
            rows = event.trades or event.tickers
            product = product or event.product_id or (str(rows[0].get("product_id", "")) if rows else "")
        symbol = self.symbol_of(product) if channel and product else None
        return (channel, symbol) if channel and symbol else None

    # REST.

    def too_many(self) -> str:
        """Return the body of a 429 answer."""
        return '{"message":"Public rate limit exceeded"}'

    def routes(self) -> list[web.RouteDef]:
        """Return the public resources of Advanced Trade, the old API's currencies, and the Exchange's trades."""
        brokerage = "/coinbase/api/v3/brokerage"
        return [
            web.get(f"{brokerage}/time", self._time),
            web.get(f"{brokerage}/market/products", self._all_products),
            web.get(f"{brokerage}/market/product_book", self._book),
            web.get(f"{brokerage}/market/products/{{product}}", self._product),
            web.get(f"{brokerage}/market/products/{{product}}/ticker", self._ticker),
            web.get(f"{brokerage}/market/products/{{product}}/candles", self._candles),
            web.get("/coinbase/products/{product}/trades", self._exchange_trades),
            web.get("/coinbase/v2/currencies", self._money),
            web.get("/coinbase/v2/currencies/crypto", self._coins),
            web.get("/coinbase/v2/exchange-rates", self._rates),
        ]

    def _market(self, name: str) -> Market:
        market = self.find(name)
        if market is None:
            told = {"error": "NOT_FOUND", "error_details": f"product {name} not found", "message": "product not found"}
            raise web.HTTPNotFound(text=msgspec.json.encode(told).decode(), content_type="application/json")
        return market

    async def _time(self, request: web.Request) -> web.Response:
        ns = self._now_ns()
        return answer({"iso": iso_nanos(ns), "epochSeconds": str(ns // 10**9), "epochMillis": str(ns // 10**6)})

    async def _all_products(self, request: web.Request) -> web.Response:
        products = [self._product_info(market) for market in self.markets.values()]
        if request.query.get("product_type", "SPOT") != "SPOT":
            products = []
        return answer({"products": products, "num_products": len(products), "pagination": None})

    async def _product(self, request: web.Request) -> web.Response:
        return answer(self._product_info(self._market(request.match_info["product"])))

    def _product_info(self, market: Market) -> dict[str, Any]:
        told, totals = market.instrument, market.totals
        flags = ("watched", "is_disabled", "new", "cancel_only", "limit_only", "post_only", "trading_disabled")
        return {
            "product_id": told.symbol,
            "price": self.price(told, totals.last),
            "price_percentage_change_24h": "0",
            "volume_24h": self.amount(told, totals.amount),
            "base_increment": self.amount(told, 1),
            "quote_increment": self.price(told, 1),
            "price_increment": self.price(told, 1),
            "quote_min_size": "1",
            "quote_max_size": "150000000",
            "base_min_size": self.amount(told, 1),
            "base_max_size": "3400",
            "base_name": told.base,
            "quote_name": told.quote,
            "status": "online",
            **dict.fromkeys(flags, False),
            "auction_mode": False,
            "product_type": "SPOT",
            "quote_currency_id": told.quote,
            "base_currency_id": told.base,
            "fcm_trading_session_details": None,
            "mid_market_price": "",
            "alias": "",
            "alias_to": [],
            "base_display_symbol": told.base,
            "quote_display_symbol": told.quote,
            "view_only": False,
            "display_name": told.symbol,
            "product_venue": "CBE",
        }

    async def _ticker(self, request: web.Request) -> web.Response:
        market = self._market(request.match_info["product"])
        start, end = number(request, "start", 0) * 10**9, number(request, "end", 1 << 40) * 10**9
        limit = min(max(1, number(request, "limit", 100)), 1000)
        told, book = market.instrument, market.book
        chosen = [t for t in market.last_trades(50_000 if start else limit) if start <= t.ns < end][-limit:]
        rows = ",".join(self._trade_row(told, trade, ',"bid":"","ask":""') for trade in reversed(chosen))
        bid, ask = self.price(told, book.best(True)), self.price(told, book.best(False))
        return answer(f'{{"trades":[{rows}],"best_bid":"{bid}","best_ask":"{ask}"}}')

    async def _candles(self, request: web.Request) -> web.Response:
        market = self._market(request.match_info["product"])
        timeframe = _GRANULARITIES.get(request.query.get("granularity", ""))
        if timeframe is None:
            return answer({"error": "INVALID_ARGUMENT", "message": "granularity is invalid"}, 400)
        start, end = number(request, "start", 0) * 10**9, number(request, "end", 1 << 40) * 10**9
        candles = market.candles.timeframe(TIMEFRAMES[timeframe]).items()
        chosen = [(ns, candle) for ns, candle in candles if start <= ns <= end][-_CANDLE_ROWS:]
        return answer({"candles": [self._candle_row(market.instrument, *pair) for pair in reversed(chosen)]})

    def _candle_row(self, told: Instrument, start_ns: int, candle: Candle) -> dict[str, str]:
        return {
            "start": str(start_ns // 10**9),
            "low": self.price(told, candle.low),
            "high": self.price(told, candle.high),
            "open": self.price(told, candle.open),
            "close": self.price(told, candle.close),
            "volume": self.amount(told, candle.amount),
        }

    async def _book(self, request: web.Request) -> web.Response:
        market, limit = self._market(request.query.get("product_id", "")), number(request, "limit", 50)
        told = market.instrument
        sides = {
            name: [
                {"price": self.price(told, p), "size": self.amount(told, a)} for p, a in market.book.top(is_bid, limit)
            ]
            for name, is_bid in (("bids", True), ("asks", False))
        }
        return answer({"pricebook": {"product_id": told.symbol, **sides, "time": iso_short(market.next_ns())}})

    async def _exchange_trades(self, request: web.Request) -> web.Response:
        """Page by trade id, newest first: `after` an id means older than it, `before` newer."""
        market = self._market(request.match_info["product"])
        limit = min(max(1, number(request, "limit", 1000)), 1000)
        told = market.instrument
        after, before = number(request, "after", 0), number(request, "before", 0)
        if before:
            trades = market.trades(before + 1, 50_000)[-limit:]
        else:
            end = after or market.next_id
            trades = market.trades(end - limit, limit)
        rows = [
            {
                "trade_id": t.trade_id,
                "side": "sell" if t.buy else "buy",
                "size": told.amount(t.amount),
                "price": told.price(t.price),
                "time": iso_short(t.ns),
            }
            for t in reversed(trades)
        ]
        response = answer(rows)
        if trades:
            response.headers["cb-before"] = str(trades[-1].trade_id)
            response.headers["cb-after"] = str(trades[0].trade_id)
        return response

    def _assets(self, *, money: bool) -> list[str]:
        assets = {a for m in self.markets.values() for a in (m.instrument.base, m.instrument.quote)}
        return sorted(a for a in assets if (a in ("USD", "EUR", "GBP")) == money)

    async def _money(self, request: web.Request) -> web.Response:
        return answer({"data": [{"id": a, "name": a, "min_size": "0.01"} for a in self._assets(money=True)]})

    async def _coins(self, request: web.Request) -> web.Response:
        rows = [
            {"asset_id": a, "code": a, "name": a, "exponent": 8, "type": "crypto"} for a in self._assets(money=False)
        ]
        return answer({"data": rows})

    async def _rates(self, request: web.Request) -> web.Response:
        rates = dict.fromkeys([*self._assets(money=True), *self._assets(money=False)], "1")
        return answer({"data": {"currency": "USD", "rates": rates}})
