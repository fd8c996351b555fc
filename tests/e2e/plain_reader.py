"""A second, plain reading of the recordings: the standard library alone, nothing of K2, one rule per exchange.

What comes out is what the pipeline must give: every trade with all its exact values.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

TURNED = {"buy": "sell", "sell": "buy"}
BASES_AND_QUOTES = {
    "BTCUSDT": "BTC-USDT",
    "ETHUSDT": "ETH-USDT",
    "DOTUSDT": "DOT-USDT",
    "NKNUSDT": "NKN-USDT",
    "BLZETH": "BLZ-ETH",
    "LRCBTC": "LRC-BTC",
    "RUNEEUR": "RUNE-EUR",
    "SUSHIUSDT": "SUSHI-USDT",
    "AKROUSDT": "AKRO-USDT",
    "KEEPUSDT": "KEEP-USDT",
    "CTKUSDT": "CTK-USDT",
    "XRPETH": "XRP-ETH",
}


class Row(NamedTuple):
    """One trade; `received_ns` is 0 where the recording tells no receive time."""

    exchange: str
    symbol: str
    kind: str
    trade_id: int
    first_id: int
    last_id: int
    price: Decimal
    amount: Decimal
    side: str
    exchange_ns: int
    received_ns: int


class QuoteRow(NamedTuple):
    """One best bid and ask."""

    exchange: str
    symbol: str
    bid_price: Decimal
    bid_amount: Decimal
    ask_price: Decimal
    ask_amount: Decimal
    received_ns: int


FILES: dict[str, dict[str, int]] = {
    # File -> messages or answers it holds, by the README of the recordings (the captures' own notes not counted).
    "binance": {
        "binance/spot_ws/btcusdt_20240808.gz": 41_249,
        "binance/spot_ws/btcusdt_20240809.gz": 58_325,
        "binance/spot_ws/capture_20210404.txt.gz": 4_716,
        "binance/spot_ws/capture_20211012.jsonl.gz": 265,
        "binance/rest/aggTrades_XRPETH_20191011.json.gz": 0,
    },
    "binance-usdm": {
        "binance/usdm_ws/btcusdt_20240718.gz": 11_414,
        "binance/usdm_ws/btcusdt_20240719.gz": 60_570,
        "binance/usdm_ws/ethusdt_20240718.gz": 14_003,
        "binance/usdm_ws/ethusdt_20240719.gz": 55_910,
        "binance/usdm_ws/capture_20210722.jsonl.gz": 1_535,
    },
    "kraken": {
        "kraken/ws_v1/capture_20210417.jsonl.gz": 4_430,
        "kraken/ws_v2/trades_20260926.jsonl": 12,
        "kraken/ws_v2/book_20260824.jsonl": 8,
        "kraken/rest/trades_XBTUSDT_20251110.json.gz": 0,
    },
    "coinbase": {
        "coinbase/advanced_ws/capture_20260809_part1.jsonl.gz": 400,
        "coinbase/exchange_ws/capture_20210417_part1.txt.gz": 5_916,
    },
}


def trades(folder: Path, exchange: str, file: str) -> Iterator[Row]:
    """Yield every trade of one file, in the order told."""
    if file.startswith("binance/rest"):
        yield from _binance_answer(exchange, _load(_text(folder / file)))
    elif file.startswith("kraken/rest"):
        yield from _kraken_answer(exchange, _load(_text(folder / file)))
    else:
        for received_ns, message in messages(folder / file):
            yield from _TRADES[exchange](exchange, message, received_ns)


def quotes(folder: Path, exchange: str, file: str) -> Iterator[QuoteRow]:
    """Yield every best bid and ask of one file, in the order told."""
    if "/rest/" not in file:
        for received_ns, message in messages(folder / file):
            yield from _QUOTES[exchange](exchange, message, received_ns)


def messages(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the WebSocket messages of a file with their receive times (0 where none is told)."""
    for line in _text(path).splitlines():
        if path.name.startswith("capture") and ".jsonl" in path.name:
            entry = _load(line)
            if entry["t"] == "recv":
                yield int(entry["ts"] * 10**9), _load(entry["data"])
        elif path.name.startswith("capture"):
            if line[:1].isdigit():
                seconds, text = line.split(": ", 1)
                yield int(Decimal(seconds) * 10**9), _load(text)
        elif path.name.endswith(".jsonl"):
            yield 0, _load(line)
        else:
            nanoseconds, text = line.split(" ", 1)
            yield int(nanoseconds), _load(text)


def _load(text: str) -> Any:
    return json.loads(text, parse_float=Decimal)


def _text(path: Path) -> str:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode()


def _ns(text: str) -> int:
    """Read RFC 3339 in UTC, to the last digit."""
    whole, _, fraction = text.removesuffix("Z").partition(".")
    second = datetime.fromisoformat(whole).replace(tzinfo=UTC).timestamp()
    return int(second) * 10**9 + int(fraction.ljust(9, "0") or 0)


def _binance_symbol(exchange: str, native: str) -> str:
    return BASES_AND_QUOTES[native] + ("-PERP" if exchange == "binance-usdm" else "")


def _binance_trades(exchange: str, message: Any, received_ns: int) -> Iterator[Row]:
    event = message.get("data", {})
    if event.get("e") not in ("trade", "aggTrade"):
        return
    single = event["e"] == "trade"
    number = event["t"] if single else event["a"]
    first, last = (number, number) if single else (event["f"], event["l"])
    yield Row(
        exchange, _binance_symbol(exchange, event["s"]), "trade" if single else "aggregate", number, first, last,
        Decimal(event["p"]), Decimal(event["q"]), "sell" if event["m"] else "buy", event["T"] * 10**6, received_ns,
    )  # fmt: skip


def _binance_quotes(exchange: str, message: Any, received_ns: int) -> Iterator[QuoteRow]:
    if message.get("stream", "").endswith("@bookTicker"):
        event = message["data"]
        symbol = _binance_symbol(exchange, event["s"])
        yield QuoteRow(exchange, symbol, *(Decimal(event[key]) for key in "bBaA"), received_ns)


def _binance_answer(exchange: str, answer: Any) -> Iterator[Row]:
    for row in (entry["info"] for entry in answer):
        yield Row(
            exchange, "XRP-ETH", "aggregate", row["a"], row["f"], row["l"], Decimal(row["p"]), Decimal(row["q"]),
            "sell" if row["m"] else "buy", row["T"] * 10**6, 0,
        )  # fmt: skip


def _kraken_symbol(pair: str) -> str:
    return pair.replace("/", "-").replace("XBT", "BTC").replace("XDG", "DOGE")


def _kraken_trades(exchange: str, message: Any, received_ns: int) -> Iterator[Row]:
    if isinstance(message, list) and message[-2] == "trade":  # API v1: no ids, times in seconds
        for price, amount, time, side, *_ in message[1]:
            yield Row(
                exchange, _kraken_symbol(message[-1]), "trade", 0, 0, 0, Decimal(price), Decimal(amount),
                {"b": "buy", "s": "sell"}[side], int(Decimal(time) * 10**9), received_ns,
            )  # fmt: skip
    elif isinstance(message, dict) and message.get("channel") == "trade":
        for row in message["data"]:
            number = row["trade_id"]
            yield Row(
                exchange, _kraken_symbol(row["symbol"]), "trade", number, number, number, Decimal(row["price"]),
                Decimal(row["qty"]), row["side"], _ns(row["timestamp"]), received_ns,
            )  # fmt: skip


def _kraken_quotes(exchange: str, message: Any, received_ns: int) -> Iterator[QuoteRow]:
    if isinstance(message, list) and message[-2] == "ticker":
        (bid, _, bid_amount), (ask, _, ask_amount) = message[1]["b"], message[1]["a"]
        values = (Decimal(bid), Decimal(bid_amount), Decimal(ask), Decimal(ask_amount))
        yield QuoteRow(exchange, _kraken_symbol(message[-1]), *values, received_ns)


def _kraken_answer(exchange: str, answer: Any) -> Iterator[Row]:
    for price, amount, time, side, _, _, number in answer["result"]["XBTUSDT"]:
        yield Row(
            exchange, "BTC-USDT", "trade", number, number, number, Decimal(price), Decimal(amount),
            {"b": "buy", "s": "sell"}[side], int(time * 10**9), 0,
        )  # fmt: skip


def _coinbase_trades(exchange: str, message: Any, received_ns: int) -> Iterator[Row]:
    if message.get("type") in ("match", "last_match"):
        number = message["trade_id"]
        yield Row(
            exchange, message["product_id"], "trade", number, number, number, Decimal(message["price"]),
            Decimal(message["size"]), TURNED[message["side"]], _ns(message["time"]), received_ns,
        )  # fmt: skip
    elif message.get("channel") == "market_trades":
        for row in (row for event in message["events"] for row in event["trades"]):
            number = int(row["trade_id"])
            yield Row(
                exchange, row["product_id"], "trade", number, number, number, Decimal(row["price"]),
                Decimal(row["size"]), TURNED[row["side"].lower()], _ns(row["time"]), received_ns,
            )  # fmt: skip


def _coinbase_quotes(exchange: str, message: Any, received_ns: int) -> Iterator[QuoteRow]:
    if message.get("type") == "ticker":  # this feed tells no amounts
        bid, ask = Decimal(message["best_bid"]), Decimal(message["best_ask"])
        yield QuoteRow(exchange, message["product_id"], bid, Decimal(0), ask, Decimal(0), received_ns)
    elif message.get("channel") == "ticker":
        for row in (row for event in message["events"] for row in event["tickers"]):
            keys = ("best_bid", "best_bid_quantity", "best_ask", "best_ask_quantity")
            yield QuoteRow(exchange, row["product_id"], *(Decimal(row[key]) for key in keys), received_ns)


_TRADES = {
    "binance": _binance_trades,
    "binance-usdm": _binance_trades,
    "kraken": _kraken_trades,
    "coinbase": _coinbase_trades,
}
_QUOTES = {
    "binance": _binance_quotes,
    "binance-usdm": _binance_quotes,
    "kraken": _kraken_quotes,
    "coinbase": _coinbase_quotes,
}
