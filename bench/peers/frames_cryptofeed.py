"""cryptofeed: the frames through its message handlers, as its connection loop calls them, to an empty callback."""

import asyncio
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from cryptofeed.defines import TICKER, TRADES
from cryptofeed.exchanges import EXCHANGE_MAP
from cryptofeed.symbols import Symbols
from serving import serve

_FEEDS = {"binance": "BINANCE", "binance-usdm": "BINANCE_FUTURES", "kraken": "KRAKEN", "coinbase": "COINBASE"}
_SYMBOLS = {  # what the exchange's list of symbols would say
    "BINANCE": {"BTC-USDT": "BTCUSDT", "ETH-USDT": "ETHUSDT", "DOT-USDT": "DOTUSDT"},
    "BINANCE_FUTURES": {"BTC-USDT-PERP": "BTCUSDT", "ETH-USDT-PERP": "ETHUSDT"},
    "KRAKEN": {"XMR-USD": "XMR/USD", "SC-EUR": "SC/EUR"},
    "COINBASE": {"BTC-USD": "BTC-USD", "ETH-USD": "ETH-USD"},
}
_loaded = {}
_count = 0


async def _take(obj, receipt_timestamp):
    global _count
    _count += 1


def load(path, exchange, name):
    """Make the feed without asking the exchange for its symbols; return the objects it makes of the frames."""
    feed_id = _FEEDS[exchange]
    Symbols.set(feed_id, _SYMBOLS[feed_id], {"instrument_type": {}, "tick_size": {}})
    channel = TICKER if name.endswith("quotes") else TRADES
    subscription = {channel: list(_SYMBOLS[feed_id])}
    config = {"log": {"filename": str(Path(path).with_suffix(".log")), "level": "WARNING"}}
    _loaded["feed"] = EXCHANGE_MAP[feed_id](config=config, subscription=subscription, callbacks={channel: _take})
    lines = [line.split(" ", 1) for line in Path(path).read_text().splitlines()]
    _loaded["frames"] = [(int(ns) / 1e9, data) for ns, data in lines]
    return asyncio.run(_handled(0.0))["rows"]


async def _handled(seconds):
    global _count
    _count, handler, frames = 0, _loaded["feed"].message_handler, _loaded["frames"]
    begin = time.process_time()
    while True:
        for received, data in frames:
            await handler(data, None, received)
        if (spent := time.process_time() - begin) >= seconds:
            return {"rows": _count, "seconds": spent}


serve(load=load, run=lambda seconds: asyncio.run(_handled(seconds)))
