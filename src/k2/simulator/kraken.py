"""Kraken as it is on the wire: WebSocket API v2 and the public REST interface, after docs.kraken.com (read 2026-11)."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import msgspec
from aiohttp import web

from k2.simulator.candles import MINUTE_NS, Candle
from k2.simulator.connection import DATA, HEARTBEAT, Connection, Message
from k2.simulator.market import Event, Instrument, Market, MarketTrade, fixed
from k2.simulator.wire import BOOK, QUOTES, TRADES, Stream, Wire, answer, from_json, iso, number

_CHANNELS = {"trade": TRADES, "ticker": QUOTES, "book": BOOK}
_SNAPSHOT_TRADES = 50
_BOOK_DEPTHS = (10, 25, 100, 500, 1000)
_CHECKSUM_LEVELS = 10
# Kraken's REST names of assets: BTC is XBT, DOGE is XDG, and old assets carry an X or Z before them.
_REST_ASSETS = {"BTC": "XBT", "DOGE": "XDG"}
_LETTERED = {"XBT", "XDG", "ETH", "LTC", "XRP", "XLM", "XMR", "ETC", "ZEC"}
_MONEY = {"USD", "EUR", "GBP", "CAD", "JPY", "AUD"}
_OHLC_MINUTES = (1, 5, 15, 30, 60, 240, 1440, 10080, 21600)
_OHLC_ROWS = 720


class _Recorded(msgspec.Struct):
    """The fields by which a recorded v2 message is assigned to its stream."""

    channel: str = ""
    data: list[dict[str, Any]] | None = None


_decode_recorded = msgspec.json.Decoder(_Recorded).decode
_decode_array = msgspec.json.Decoder(list[msgspec.Raw]).decode


class KrakenWire(Wire):
    """Spot. `trade` and `book` start with a snapshot, `ticker` too; every book message carries its checksum."""

    exchange = "kraken"
    paths = ("/kraken/v2", "/kraken/v2/")
    socket_path = "/v2"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._views: dict[tuple[str, int], tuple[dict[int, int], dict[int, int]]] = {}
        self._connections_made = 0

    def names(self, told: Instrument) -> tuple[str, ...]:
        """BTC-USD is BTC/USD on the socket; REST takes XXBTZUSD, XBTUSD and XBT/USD."""
        base, quote = _asset(told.base), _asset(told.quote)
        return (
            f"{told.base}/{told.quote}",
            self.pair(told),
            base + quote,
            f"{base}/{quote}",
            told.base + told.quote,
        )

    def pair(self, told: Instrument) -> str:
        """Return the REST interface's own name of a pair, such as XXBTZUSD."""
        base, quote = _asset(told.base), _asset(told.quote)
        return _lettered(base) + _lettered(quote) if base in _LETTERED and quote in _MONEY else base + quote

    # Connections.

    def opened(self, connection: Connection, request: web.Request) -> None:
        """Greet with the status, as the exchange does."""
        self._connections_made += 1
        connection.send(
            '{"channel":"status","type":"update","data":[{"version":"2.0.10","system":"online","api_version":"v2",'
            f'"connection_id":{11_000_000_000_000_000_000 + self._connections_made}}}]}}'
        )

    def received(self, connection: Connection, text: str) -> None:
        """Answer subscribe, unsubscribe and ping."""
        request = from_json(text)
        if not isinstance(request, dict) or "method" not in request:
            connection.send('{"error":"Malformed request","success":false}')
            return
        req_id = f',"req_id":{int(request["req_id"])}' if isinstance(request.get("req_id"), int) else ""
        method, params = request["method"], request.get("params") or {}
        if method == "ping":
            now = iso(self._now_ns())
            connection.send(f'{{"method":"pong"{req_id},"time_in":"{now}","time_out":"{now}"}}')
        elif method in ("subscribe", "unsubscribe") and isinstance(params, dict):
            self._subscription(connection, method, params, req_id)
        else:
            connection.send(self._refusal(str(method), "Unsupported method", "", req_id))

    def _now_ns(self) -> int:
        return max((market.next_ns() for market in self.markets.values()), default=0)

    def _refusal(self, method: str, error: str, symbol: str, req_id: str) -> str:
        now = iso(self._now_ns())
        named = f',"symbol":"{symbol}"' if symbol else ""
        return (
            f'{{"error":"{error}","method":"{method}"{req_id},"success":false{named},'
            f'"time_in":"{now}","time_out":"{now}"}}'
        )

    def _subscription(self, connection: Connection, method: str, params: dict[str, Any], req_id: str) -> None:
        name = str(params.get("channel", ""))
        channel = _CHANNELS.get(name)
        symbols = params.get("symbol")
        if channel is None:
            connection.send(self._refusal(method, f"Subscription {name} not supported", "", req_id))
            return
        if not isinstance(symbols, list) or not symbols:
            connection.send(self._refusal(method, "Symbol(s) not found", "", req_id))
            return
        depth = params.get("depth", 10) if channel == BOOK else 0
        if channel == BOOK and depth not in _BOOK_DEPTHS:
            connection.send(self._refusal(method, "Depth must be one of 10, 25, 100, 500, 1000", "", req_id))
            return
        accepted = [
            (str(native), symbol)
            for native in symbols
            if (symbol := self._accept(connection, method, channel, str(native), depth, name, req_id, params))
        ]
        if method == "subscribe" and params.get("snapshot", True) and not self.recorded:
            for _, symbol in accepted:
                self._snapshot(connection, channel, self.markets[symbol], depth)

    def _accept(
        self,
        connection: Connection,
        method: str,
        channel: str,
        native: str,
        depth: int,
        name: str,
        req_id: str,
        params: dict[str, Any],
    ) -> str | None:
        """Answer for one symbol; returns it when the subscription was made or ended."""
        symbol = self.symbol_of(native) if "/" in native else None
        if self.refuses() or symbol is None:
            connection.send(self._refusal(method, f"Currency pair not supported {native}", native, req_id))
            return None
        subscribed = connection in self.listening(channel, symbol)
        if method == "subscribe" and subscribed:
            connection.send(self._refusal(method, "Already subscribed", native, req_id))
            return None
        if method == "unsubscribe" and not subscribed:
            connection.send(self._refusal(method, "Subscription Not Found", native, req_id))
            return None
        details = f'"channel":"{name}"' + (f',"depth":{depth}' if depth else "")
        if method == "subscribe":
            snapshot = "true" if params.get("snapshot", True) else "false"
            if channel == QUOTES:
                details += f',"event_trigger":"{params.get("event_trigger", "trades")}"'
            details += f',"snapshot":{snapshot}'
        now = iso(self._now_ns())
        connection.send(
            f'{{"method":"{method}"{req_id},"result":{{{details},"symbol":"{native}"}},"success":true,'
            f'"time_in":"{now}","time_out":"{now}"}}'
        )
        if method == "subscribe":
            self.subscribe(connection, channel, symbol, depth or int(params.get("event_trigger") == "bbo"))
        else:
            self.unsubscribe(connection, channel, symbol)
        return symbol

    def _snapshot(self, connection: Connection, channel: str, market: Market, depth: int) -> None:
        if channel == TRADES:
            trades = market.last_trades(_SNAPSHOT_TRADES)
            self.tell(connection, self._trades_text(market, trades, "snapshot"), market.symbol, trades)
        elif channel == QUOTES:
            self.tell(connection, self._ticker_text(market, market.next_ns(), "snapshot"))
        else:
            view = self._view(market, depth)
            self._views[market.symbol, depth] = view
            self.tell(connection, self._book_text(market, view, view, depth, "snapshot", market.next_ns()))

    # Messages.

    def publish(self, market: Market, event: Event) -> None:
        """Tell the trades of one event together, the ticker, and the differences of the book."""
        symbol = market.symbol
        if event.trades and (listening := self.listening(TRADES, symbol)):
            text = self._trades_text(market, event.trades, "update")
            message = Message(text, DATA, self.tally(symbol), event.trades)
            for connection in listening:
                connection.put(message)
        if listening := self.listening(QUOTES, symbol):
            message = Message(self._ticker_text(market, event.ns, "update"), DATA)
            for connection, on_quotes in listening.items():
                if event.trades or on_quotes:
                    connection.put(message)
        if event.changes and (listening := self.listening(BOOK, symbol)):
            self._publish_book(market, event, listening)

    def _publish_book(self, market: Market, event: Event, listening: dict[Connection, int]) -> None:
        for depth in set(listening.values()):
            now = self._view(market, depth)
            before = self._views.get((market.symbol, depth), ({}, {}))  # subscribed without a snapshot: all is new
            if before == now:
                continue
            self._views[market.symbol, depth] = now
            changes = tuple(
                _differences(old, new, market.book.side(is_bid))
                for old, new, is_bid in ((before[0], now[0], True), (before[1], now[1], False))
            )
            message = Message(self._book_text(market, (changes[0], changes[1]), now, depth, "update", event.ns), DATA)
            for connection, wanted in listening.items():
                if wanted == depth:
                    connection.put(message)

    def _trades_text(self, market: Market, trades: Sequence[MarketTrade], kind: str) -> str:
        told, symbol = market.instrument, self.names(market.instrument)[0]
        rows = ",".join(
            f'{{"symbol":"{symbol}","side":"{"buy" if t.buy else "sell"}","price":{told.price(t.price)},'
            f'"qty":{_quantity(told, t)},"ord_type":"{"market" if t.trade_id % 3 else "limit"}",'
            f'"trade_id":{t.trade_id},"timestamp":"{iso(t.ns)}"}}'
            for t in trades
        )
        return f'{{"channel":"trade","type":"{kind}","data":[{rows}]}}'

    def _ticker_text(self, market: Market, ns: int, kind: str) -> str:
        told, book, totals = market.instrument, market.book, market.totals
        bid, ask = book.best(True), book.best(False)
        vwap = totals.quote // totals.amount if totals.amount else 0
        return (
            f'{{"channel":"ticker","type":"{kind}","data":[{{"symbol":"{self.names(told)[0]}",'
            f'"bid":{told.price(bid)},"bid_qty":{told.amount(book.bids[bid])},'
            f'"ask":{told.price(ask)},"ask_qty":{told.amount(book.asks[ask])},"last":{told.price(totals.last)},'
            f'"volume":{told.amount(totals.amount)},"vwap":{told.price(vwap)},"low":{told.price(totals.low)},'
            f'"high":{told.price(totals.high)},"change":{_signed(told, totals.last - totals.open)},'
            f'"change_pct":0.00,"timestamp":"{iso(ns)}"}}]}}'
        )

    def _view(self, market: Market, depth: int) -> tuple[dict[int, int], dict[int, int]]:
        return dict(market.book.top(True, depth)), dict(market.book.top(False, depth))

    def _book_text(
        self,
        market: Market,
        levels: tuple[dict[int, int], dict[int, int]],
        view: tuple[dict[int, int], dict[int, int]],
        depth: int,
        kind: str,
        ns: int,
    ) -> str:
        told = market.instrument
        sides = [
            ",".join(f'{{"price":{told.price(p)},"qty":{told.amount(a)}}}' for p, a in side.items()) for side in levels
        ]
        return (
            f'{{"channel":"book","type":"{kind}","data":[{{"symbol":"{self.names(told)[0]}","bids":[{sides[0]}],'
            f'"asks":[{sides[1]}],"checksum":{checksum(view)},"timestamp":"{iso(ns)}"}}]}}'
        )

    def every_second(self, connection: Connection) -> None:
        """Send a heartbeat to a subscribed client."""
        if self.subscribed(connection):
            connection.send('{"channel":"heartbeat"}', HEARTBEAT)

    def unknown_message(self, connection: Connection) -> str:
        """A channel that does not exist."""
        return '{"channel":"zz_new","type":"update","data":[{"symbol":"BTC/USD","zz":1}]}'

    def stream_of(self, data: bytes) -> Stream | None:
        """Tell a recorded message by channel and symbol; v1 arrays end in channel name and pair."""
        try:
            if data.lstrip()[:1] == b"[":
                *_, name, pair = (msgspec.json.decode(part) for part in _decode_array(data)[-2:])
                channel = {"spread": QUOTES}.get(name) or _CHANNELS.get(str(name).partition("-")[0])
            else:
                recorded = _decode_recorded(data)
                channel = _CHANNELS.get(recorded.channel)
                pair = recorded.data[0].get("symbol", "") if recorded.data else ""
        except (msgspec.DecodeError, ValueError):
            return None
        symbol = self.symbol_of(str(pair)) if channel and pair else None
        return (channel, symbol) if channel and symbol else None

    # REST.

    def too_many(self) -> str:
        """Return the body of a 429 answer."""
        return '{"error":["EAPI:Rate limit exceeded"]}'

    def routes(self) -> list[web.RouteDef]:
        """Return the public resources."""
        resources = {
            "Time": self._time,
            "SystemStatus": self._status,
            "Assets": self._assets,
            "AssetPairs": self._pairs,
            "Ticker": self._tickers,
            "OHLC": self._candles,
            "Trades": self._trades,
            "Depth": self._depth,
        }
        return [web.get(f"/kraken/0/public/{name}", handler) for name, handler in resources.items()]

    def _market(self, request: web.Request) -> Market:
        market = self.find(request.query.get("pair", ""))
        if market is None:
            raise web.HTTPOk(text='{"error":["EQuery:Unknown asset pair"]}', content_type="application/json")
        return market

    async def _time(self, request: web.Request) -> web.Response:
        seconds = self._now_ns() // 1_000_000_000
        return _result({"unixtime": seconds, "rfc1123": iso(self._now_ns())})

    async def _status(self, request: web.Request) -> web.Response:
        return _result({"status": "online", "timestamp": iso(self._now_ns())})

    async def _assets(self, request: web.Request) -> web.Response:
        assets = {_asset(a) for m in self.markets.values() for a in (m.instrument.base, m.instrument.quote)}
        return _result(
            {
                _lettered(asset): {
                    "aclass": "currency",
                    "altname": asset,
                    "decimals": 4 if asset in _MONEY else 10,
                    "display_decimals": 2 if asset in _MONEY else 5,
                    "status": "enabled",
                }
                for asset in sorted(assets)
            }
        )

    async def _pairs(self, request: web.Request) -> web.Response:
        return _result({self.pair(m.instrument): self._pair_info(m.instrument) for m in self.markets.values()})

    def _pair_info(self, told: Instrument) -> dict[str, Any]:
        base, quote = _asset(told.base), _asset(told.quote)
        return {
            "altname": base + quote,
            "wsname": f"{base}/{quote}",
            "aclass_base": "currency",
            "base": _lettered(base),
            "aclass_quote": "currency",
            "quote": _lettered(quote),
            "lot": "unit",
            "pair_decimals": told.price_decimals,
            "lot_decimals": told.amount_decimals,
            "cost_decimals": 5,
            "lot_multiplier": 1,
            "leverage_buy": [],
            "leverage_sell": [],
            "fees": [[0, 0.4]],
            "fees_maker": [[0, 0.25]],
            "fee_volume_currency": "ZUSD",
            "margin_call": 80,
            "margin_stop": 40,
            "ordermin": "0.00005",
            "costmin": "0.5",
            "tick_size": told.price(1),
            "status": "online",
        }

    async def _tickers(self, request: web.Request) -> web.Response:
        markets = list(self.markets.values()) if "pair" not in request.query else [self._market(request)]
        return _result({self.pair(m.instrument): self._ticker_row(m) for m in markets})

    def _ticker_row(self, market: Market) -> dict[str, Any]:
        told, book, totals = market.instrument, market.book, market.totals
        bid, ask = book.best(True), book.best(False)
        amount, vwap = told.amount(totals.amount), told.price(totals.quote // totals.amount if totals.amount else 0)
        return {
            "a": [told.price(ask), "1", told.amount(book.asks[ask])],
            "b": [told.price(bid), "1", told.amount(book.bids[bid])],
            "c": [told.price(totals.last), told.amount(totals.last_amount)],
            "v": [amount, amount],
            "p": [vwap, vwap],
            "t": [totals.count, totals.count],
            "l": [told.price(totals.low)] * 2,
            "h": [told.price(totals.high)] * 2,
            "o": told.price(totals.open),
        }

    async def _candles(self, request: web.Request) -> web.Response:
        market, minutes = self._market(request), number(request, "interval", 1)
        if minutes not in _OHLC_MINUTES:
            return answer({"error": ["EGeneral:Invalid arguments"]})
        length = minutes * MINUTE_NS
        rows = _candle_rows(market, length, number(request, "since", 0))
        last = rows[-2][0] if len(rows) > 1 else 0
        return _result({self.pair(market.instrument): rows, "last": last})

    async def _trades(self, request: web.Request) -> web.Response:
        market, count = self._market(request), min(max(1, number(request, "count", 1000)), 1000)
        since = number(request, "since", 0)
        if since < 10**11:  # seconds are accepted too
            since *= 10**9
        trades = market.trades_after(since, count) if "since" in request.query else market.last_trades(count)
        told = market.instrument
        rows = ",".join(
            f'["{told.price(t.price)}","{told.amount(t.amount)}",{t.ns // 10**9}.{t.ns % 10**9 // 1000:06d},'
            f'"{"b" if t.buy else "s"}","{"m" if t.trade_id % 3 else "l"}","",{t.trade_id}]'
            for t in trades
        )
        last = trades[-1].ns if trades else since
        return answer(f'{{"error":[],"result":{{"{self.pair(told)}":[{rows}],"last":"{last}"}}}}')

    async def _depth(self, request: web.Request) -> web.Response:
        market, depth = self._market(request), min(number(request, "count", 100), 500)
        told, second = market.instrument, self._now_ns() // 10**9
        sides = {
            name: [[told.price(p), told.amount(a), second] for p, a in market.book.top(is_bid, depth)]
            for name, is_bid in (("asks", False), ("bids", True))
        }
        return _result({self.pair(told): sides})


def _asset(asset: str) -> str:
    return _REST_ASSETS.get(asset, asset)


def _lettered(asset: str) -> str:
    return f"X{asset}" if asset in _LETTERED else f"Z{asset}" if asset in _MONEY else asset


def _result(value: dict[str, Any]) -> web.Response:
    return answer({"error": [], "result": value})


def _signed(told: Instrument, ticks: int) -> str:
    return f"-{told.price(-ticks)}" if ticks < 0 else told.price(ticks)


def _quantity(told: Instrument, trade: MarketTrade) -> str:
    """Write an amount; small ones now and then with an exponent, in both of its spellings."""
    if trade.amount < 10 ** (told.amount_decimals - 4) and trade.trade_id % 3 == 0:
        digits = str(trade.amount)
        exponent = told.amount_decimals - len(digits) + 1
        mantissa = digits if len(digits) == 1 else f"{digits[0]}.{digits[1:]}"
        return f"{mantissa}e-{exponent:02d}" if trade.trade_id % 2 else f"{mantissa}E-{exponent}"
    return told.amount(trade.amount)


def _differences(old: dict[int, int], new: dict[int, int], whole: dict[int, int]) -> dict[int, int]:
    """Return the levels that changed in the view, and with 0 those gone from the book.

    A level only pushed out of the view by a better one is not told: the reader cuts its book to the depth.
    """
    changed = {price: amount for price, amount in new.items() if old.get(price) != amount}
    changed.update({price: 0 for price in old if price not in new and price not in whole})
    return changed


def checksum(view: tuple[dict[int, int], dict[int, int]]) -> int:
    """Return the CRC32 of the ten best levels of both sides, asks first (docs.kraken.com, "Book Checksum")."""
    bids, asks = view
    rows = [*list(asks.items())[:_CHECKSUM_LEVELS], *list(bids.items())[:_CHECKSUM_LEVELS]]
    return zlib.crc32("".join(f"{price}{amount}" for price, amount in rows).encode())


def _candle_rows(market: Market, length: int, since: int) -> list[list[Any]]:
    """Return the newest candles; a bucket without a trade has count 0 and repeats the last price."""
    told, candles = market.instrument, market.candles.timeframe(length)
    if not candles:
        return []
    rows: list[list[Any]] = []
    close = 0
    for start in range(min(candles), max(candles) + 1, length):
        candle = candles.get(start)
        close = candle.close if candle else close
        if start // 10**9 >= since:
            rows.append(_candle_row(told, start, candle, close))
    return rows[-_OHLC_ROWS:]


def _candle_row(told: Instrument, start: int, candle: Candle | None, close: int) -> list[Any]:
    if candle is None:
        price = told.price(close)
        return [start // 10**9, price, price, price, price, told.price(0), fixed(0, 8), 0]
    prices = [told.price(p) for p in (candle.open, candle.high, candle.low, candle.close)]
    vwap = told.price(candle.quote // candle.amount)
    return [start // 10**9, *prices, vwap, told.amount(candle.amount), candle.count]
