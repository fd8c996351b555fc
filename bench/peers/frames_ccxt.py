"""ccxt: the frames through its WebSocket client's handler, which decodes them and hands them to the exchange's own."""

import asyncio
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import ccxt.pro
from serving import serve

_EXCHANGES = {
    "binance": (ccxt.pro.binance, "wss://stream.binance.com:9443/stream", "spot"),
    "binance-usdm": (ccxt.pro.binanceusdm, "wss://fstream.binance.com/public/ws", "swap"),
    "kraken": (ccxt.pro.kraken, "wss://ws.kraken.com/v2", "spot"),
    "coinbase": (ccxt.pro.coinbase, "wss://advanced-trade-ws.coinbase.com", "spot"),
}
_PAIRS = ("BTC/USDT", "ETH/USDT", "DOT/USDT", "BTC/USD", "ETH/USD")
_loaded = {}


def _markets(exchange, kind, native):
    """Return what the exchange's list of markets would say."""
    swap = kind == "swap"
    for pair in _PAIRS:
        base, quote = pair.split("/")
        yield exchange.safe_market_structure(
            {
                "id": native(base, quote),
                "symbol": f"{pair}:{quote}" if swap else pair,
                "base": base,
                "quote": quote,
                "settle": quote if swap else None,
                "baseId": base,
                "quoteId": quote,
                "type": kind,
                "spot": not swap,
                "swap": swap,
                "contract": swap,
                "linear": swap or None,
                "active": True,
                "precision": {"price": 0.01, "amount": 0.00000001},
                "info": {},
            }
        )


async def _opened(name):
    make, url, kind = _EXCHANGES[name]
    exchange = make()
    native = {"kraken": "{}/{}".format, "coinbase": "{}-{}".format}.get(name, "{}{}".format)
    exchange.set_markets(list(_markets(exchange, kind, native)))
    return exchange, exchange.client(url)


def load(path, exchange, name):
    """Make the exchange without asking it for its markets; return the rows it parses of the frames, each counted."""
    _loaded.update(name=exchange, frames=[line.split(" ", 1)[1] for line in Path(path).read_text().splitlines()])
    return asyncio.run(_handled(0.0, count=True))["rows"]


async def _handled(seconds, count=False):
    exchange, client = await _opened(_loaded["name"])
    try:
        if count:
            return {"rows": _counted(exchange, client)}
        begin, passes = time.process_time(), 0
        while True:
            for data in _loaded["frames"]:
                client.handle_text_or_binary_message(data)
            passes += 1
            if (spent := time.process_time() - begin) >= seconds:
                return {"rows": passes * _loaded["rows"], "seconds": spent}
    finally:
        await exchange.close()


def _counted(exchange, client):
    """Count what is parsed, once, with the parsers wrapped; the timed passes run them as they are."""
    rows = 0
    for method in ("parse_ws_trade", "parse_ws_ticker") if _loaded["name"].startswith("binance") else ("parse_trade",):
        parser = getattr(exchange, method)

        def counting(*arguments, _parser=parser, **named):
            nonlocal rows
            rows += 1
            return _parser(*arguments, **named)

        setattr(exchange, method, counting)
    for data in _loaded["frames"]:
        client.handle_text_or_binary_message(data)
    _loaded["rows"] = rows
    return rows


serve(load=load, run=lambda seconds: asyncio.run(_handled(seconds)))
