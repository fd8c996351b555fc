"""Every recorded frame of the three exchanges, against a second, plain reading of the same files."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from k2.feeds.recordings import read
from k2.feeds.registry import get
from k2.model import AGGREGATE, ANSWER, FRAME, TRADE, Quote, Trade

Row = tuple[str, int, Decimal, Decimal, str, int]
"""Symbol, id, price, amount, taker side, nanoseconds."""


def _parse(recordings: Path, name: str, file: str) -> tuple[list[Trade], list[Quote], int]:
    """Parse a recording; return trades, quotes and the number of messages."""
    exchange = get(name)
    trades: list[Trade] = []
    quotes: list[Quote] = []
    messages = 0
    for _, frame in read(recordings / file, exchange):
        if frame is not None and frame.kind in (FRAME, ANSWER):
            parsed = exchange.parse(frame)
            trades += parsed.trades
            quotes += parsed.quotes
            messages += frame.kind == FRAME
    return trades, quotes, messages


def _row(trade: Trade) -> Row:
    return trade.symbol, trade.trade_id, Decimal(trade.price), Decimal(trade.amount), trade.side, trade.exchange_ns


def _load(text: str) -> Any:
    return json.loads(text, parse_float=Decimal)


def _text(path: Path) -> Iterator[str]:
    data = path.read_bytes()
    yield from (gzip.decompress(data) if path.suffix == ".gz" else data).decode().splitlines()


def _stamped(path: Path) -> Iterator[Any]:
    return (_load(line.split(" ", 1)[1]) for line in _text(path))


def _capture(path: Path) -> Iterator[Any]:
    for line in _text(path):
        if path.name.endswith(".jsonl.gz"):
            entry = _load(line)
            if entry["t"] == "recv":
                yield _load(entry["data"])
        elif line[:1].isdigit():
            yield _load(line.split(": ", 1)[1])


SYMBOLS = {
    "BTCUSDT": "BTC-USDT",
    "ETHUSDT": "ETH-USDT",
    "DOTUSDT": "DOT-USDT",
    "NKNUSDT": "NKN-USDT",
    "LRCBTC": "LRC-BTC",
    "SUSHIUSDT": "SUSHI-USDT",
    "AKROUSDT": "AKRO-USDT",
    "KEEPUSDT": "KEEP-USDT",
    "CTKUSDT": "CTK-USDT",
}


def _binance_rows(messages: Iterator[Any], suffix: str) -> Iterator[Row]:
    for message in messages:
        event = message.get("data", {})
        if event.get("e") in ("trade", "aggTrade"):
            symbol, side = SYMBOLS[event["s"]] + suffix, "sell" if event["m"] else "buy"
            number = event["t"] if event["e"] == "trade" else event["a"]
            yield symbol, number, Decimal(event["p"]), Decimal(event["q"]), side, event["T"] * 1_000_000


def _without_holes(trades: list[Trade]) -> dict[str, tuple[int, int, int]]:
    """First id, last id and count of each symbol; fails where an id is missing or twice."""
    ids: dict[str, list[int]] = {}
    for trade in trades:
        ids.setdefault(trade.symbol, []).append(trade.trade_id)
    for symbol, numbers in ids.items():
        assert sorted(numbers) == list(range(min(numbers), max(numbers) + 1)), symbol
    return {symbol: (min(numbers), max(numbers), len(numbers)) for symbol, numbers in ids.items()}


@pytest.mark.parametrize(
    ("name", "file", "messages", "quotes", "ids"),
    [
        ("binance", "spot_ws/btcusdt_20240808.gz", 41_249, 28_040, (3735683259, 3735693015)),
        ("binance", "spot_ws/btcusdt_20240809.gz", 58_325, 45_134, (3735693016, 3735703162)),
        ("binance-usdm", "usdm_ws/btcusdt_20240718.gz", 11_414, None, (5182005737, 5182006710)),
        ("binance-usdm", "usdm_ws/btcusdt_20240719.gz", 60_570, 45_147, (5182006711, 5182016437)),
        ("binance-usdm", "usdm_ws/ethusdt_20240718.gz", 14_003, None, (4217896584, 4217898223)),
        ("binance-usdm", "usdm_ws/ethusdt_20240719.gz", 55_910, None, (4217898224, 4217910238)),
    ],
)
def test_binance_stamped_feed(
    recordings: Path, name: str, file: str, messages: int, quotes: int | None, ids: tuple[int, int]
) -> None:
    """Each trade of a stamped feed comes out once, with the digits, side and time of the message."""
    path = f"binance/{file}"
    trades, found_quotes, found = _parse(recordings, name, path)

    assert found == messages
    assert quotes is None or len(found_quotes) == quotes
    assert list(_without_holes(trades).values()) == [(*ids, ids[1] - ids[0] + 1)]
    assert all(t.kind == TRADE and t.first_id == t.last_id == t.trade_id and not t.off_market for t in trades)
    suffix = "-PERP" if name == "binance-usdm" else ""
    assert [_row(t) for t in trades] == list(_binance_rows(_stamped(recordings / path), suffix))


def test_binance_quotes_keep_digits_ids_and_times(recordings: Path) -> None:
    """Quotes hold the texts of the message; USD-M the engine's time, spot none."""
    for name, file, timed in (
        ("binance", "binance/spot_ws/btcusdt_20240808.gz", False),
        ("binance-usdm", "binance/usdm_ws/btcusdt_20240718.gz", True),
    ):
        _, quotes, _ = _parse(recordings, name, file)
        told = [m["data"] for m in _stamped(recordings / file) if m.get("stream", "").endswith("@bookTicker")]

        assert [(q.bid_price, q.bid_amount, q.ask_price, q.ask_amount, q.update_id) for q in quotes] == [
            (m["b"], m["B"], m["a"], m["A"], m["u"]) for m in told
        ]
        assert [q.exchange_ns for q in quotes] == [m["T"] * 10**6 if timed else 0 for m in told]


@pytest.mark.parametrize(
    ("name", "file", "messages", "counts"),
    [
        (
            "binance",
            "spot_ws/capture_20210404.txt.gz",
            4_716,
            {"BTC-USDT": 1_227, "ETH-USDT": 506, "DOT-USDT": 177},
        ),
        ("binance", "spot_ws/capture_20211012.jsonl.gz", 265, {"NKN-USDT": 1, "LRC-BTC": 1}),
        (
            "binance-usdm",
            "usdm_ws/capture_20210722.jsonl.gz",
            1_535,
            {"CTK-USDT-PERP": 38, "SUSHI-USDT-PERP": 40, "AKRO-USDT-PERP": 8, "KEEP-USDT-PERP": 5},
        ),
    ],
)
def test_binance_capture_of_aggregates(
    recordings: Path, name: str, file: str, messages: int, counts: dict[str, int]
) -> None:
    """Aggregates come out as what they are, their first and last ids following one another without a hole."""
    path = recordings / "binance" / file
    trades, _, found = _parse(recordings, name, f"binance/{file}")

    assert found == messages
    assert {symbol: count for symbol, (_, _, count) in _without_holes(trades).items()} == counts
    assert all(trade.kind == AGGREGATE for trade in trades)
    suffix = "-PERP" if name == "binance-usdm" else ""
    assert [_row(t) for t in trades] == list(_binance_rows(_capture(path), suffix))
    for symbol in counts:
        own = [trade for trade in trades if trade.symbol == symbol]
        assert all(left.last_id + 1 == right.first_id for left, right in pairwise(own)), symbol


def test_binance_rest_aggregates(recordings: Path) -> None:
    """All 12,477 rows of the REST answers are there, ids and covered ids without a hole."""
    path = recordings / "binance/rest/aggTrades_XRPETH_20191011.json.gz"
    trades, _, _ = _parse(recordings, "binance", "binance/rest/aggTrades_XRPETH_20191011.json.gz")
    told = [row["info"] for row in _load("".join(_text(path)))]

    assert _without_holes(trades) == {"XRP-ETH": (13_519_807, 13_532_283, 12_477)}
    assert [(t.trade_id, t.price, t.amount, t.first_id, t.last_id, t.exchange_ns) for t in trades] == [
        (row["a"], row["p"], row["q"], row["f"], row["l"], row["T"] * 10**6) for row in told
    ]
    assert all(left.last_id + 1 == right.first_id for left, right in pairwise(trades))


def test_kraken_v2_trades(recordings: Path) -> None:
    """102 trades of snapshots and updates, with trailing zeros and exact microseconds."""
    path = recordings / "kraken/ws_v2/trades_20260926.jsonl"
    trades, _, messages = _parse(recordings, "kraken", "kraken/ws_v2/trades_20260926.jsonl")
    told = [row for line in _text(path) for row in _load(line).get("data", []) if "trade_id" in row]

    assert messages == 12
    assert _without_holes(trades) == {
        "BTC-USD": (109_183_836, 109_183_887, 52),
        "ETH-USD": (66_819_466, 66_819_515, 50),
    }
    assert [(t.trade_id, t.side, Decimal(t.price), Decimal(t.amount)) for t in trades] == [
        (row["trade_id"], row["side"], row["price"], row["qty"]) for row in told
    ]
    # Decimal keeps the exponent, so equal texts have equal numbers of digits: trailing zeros survive.
    assert [t.amount for t in trades] == [f"{row['qty']:f}" for row in told]
    assert (trades[0].price, trades[0].exchange_ns) == ("84098.4", 1790446074626190000)


def test_kraken_v2_book_and_silent_messages_hold_no_rows(recordings: Path) -> None:
    """The book recording is read without an error and without a row."""
    assert _parse(recordings, "kraken", "kraken/ws_v2/book_20260824.jsonl") == ([], [], 8)


def test_kraken_v1_capture(recordings: Path) -> None:
    """Ten trades without ids and eighteen quotes among 4,430 messages of three connections."""
    path = recordings / "kraken/ws_v1/capture_20210417.jsonl.gz"
    trades, quotes, messages = _parse(recordings, "kraken", "kraken/ws_v1/capture_20210417.jsonl.gz")
    arrays = [message for message in _capture(path) if isinstance(message, list)]
    told = [(m[3], row) for m in arrays if m[2] == "trade" for row in m[1]]

    assert (messages, len(trades), len(quotes)) == (4_430, 10, 18)
    assert [t.symbol for t in trades].count("XMR-USD") == 4
    assert [(t.symbol.replace("-", "/"), t.price, t.amount, t.side[0]) for t in trades] == [
        (pair, row[0], row[1], row[3]) for pair, row in told
    ]
    assert [t.exchange_ns for t in trades] == [int(Decimal(row[2]) * 10**9) for _, row in told]
    assert all(t.trade_id == 0 for t in trades)
    assert [(q.ask_price, q.ask_amount, q.bid_price, q.bid_amount) for q in quotes] == [
        (m[1]["a"][0], m[1]["a"][2], m[1]["b"][0], m[1]["b"][2]) for m in arrays if m[2] == "ticker"
    ]


def test_kraken_every_pair_name_is_understood(recordings: Path) -> None:
    """Old and new names of the 304 pairs of the exchange's list mean the same symbol, and go back."""
    kraken = get("kraken")
    lines = _text(recordings / "kraken/ws_v1/capture_20210417.jsonl.gz")
    answer = next(entry for entry in map(_load, lines) if entry["t"] == "http")
    pairs = {key: pair for key, pair in _load(answer["data"])["result"].items() if "wsname" in pair}

    assert len(pairs) > 250
    for key, pair in pairs.items():
        symbol = kraken.to_canonical(pair["wsname"])
        assert kraken.to_canonical(key) == kraken.to_canonical(pair["altname"]) == symbol
        assert kraken.to_canonical(kraken.to_native(symbol)) == symbol


def test_kraken_rest_trades(recordings: Path) -> None:
    """1,000 trades of one REST answer, times from the exact text of their numbers."""
    path = recordings / "kraken/rest/trades_XBTUSDT_20251110.json.gz"
    trades, _, _ = _parse(recordings, "kraken", "kraken/rest/trades_XBTUSDT_20251110.json.gz")
    told = _load("".join(_text(path)))["result"]["XBTUSDT"]

    assert _without_holes(trades) == {"BTC-USDT": (10_218_208, 10_219_207, 1_000)}
    assert [(t.price, t.amount, t.side[0], t.trade_id) for t in trades] == [
        (row[0], row[1], row[3], row[6]) for row in told
    ]
    assert [t.exchange_ns for t in trades] == [int(Decimal(row[2]) * 10**9) for row in told]
    assert trades[-1].exchange_ns == 1762820035982277900


def test_coinbase_advanced_trades(recordings: Path) -> None:
    """Snapshots and updates of one connection: newest first as sent, ids without a hole, the side turned."""
    path = recordings / "coinbase/advanced_ws/capture_20260809_part1.jsonl.gz"
    trades, quotes, messages = _parse(recordings, "coinbase", "coinbase/advanced_ws/capture_20260809_part1.jsonl.gz")
    sent = list(_capture(path))
    told = [r for m in sent if m["channel"] == "market_trades" for e in m["events"] for r in e["trades"]]
    turned = {"BUY": "sell", "SELL": "buy"}

    assert (messages, len(quotes)) == (400, 64)
    assert {symbol: found[2] for symbol, found in _without_holes(trades).items()} == {"BTC-USD": 123, "ETH-USD": 117}
    assert [(t.symbol, str(t.trade_id), t.price, t.amount, t.side) for t in trades] == [
        (r["product_id"], r["trade_id"], r["price"], r["size"], turned[r["side"]]) for r in told
    ]
    assert (trades[0].trade_id, trades[0].exchange_ns) == (1068572090, 1786309542514318000)
    assert (quotes[0].bid_price, quotes[0].ask_amount, quotes[0].exchange_ns) == (
        "65083.66",
        "0.24290402",
        1786309548229198328,
    )


def test_coinbase_advanced_side_is_the_makers(recordings: Path) -> None:
    """Trades sent as SELL are made at the ask or above, those sent as BUY not: the side sent is the maker's."""
    exchange = get("coinbase")
    best: dict[str, Quote] = {}
    places = {"buy": [0, 0, 0], "sell": [0, 0, 0]}  # at the bid or below, between, at the ask or above
    for _, frame in read(recordings / "coinbase/advanced_ws/capture_20260809_part1.jsonl.gz", exchange):
        if frame is None or frame.kind != FRAME:
            continue
        parsed = exchange.parse(frame)
        best.update({quote.symbol: quote for quote in parsed.quotes})
        for trade in parsed.trades:
            quote = best.get(trade.symbol)
            if quote is not None and b'"update"' in frame.data:
                price = Decimal(trade.price)
                place = 0 if price <= Decimal(quote.bid_price) else 2 if price >= Decimal(quote.ask_price) else 1
                places[trade.side][place] += 1

    assert places == {"buy": [0, 0, 23], "sell": [15, 2, 0]}


def test_coinbase_exchange_feed(recordings: Path) -> None:
    """Matches and last matches of five products, the maker's side turned to the taker's."""
    path = recordings / "coinbase/exchange_ws/capture_20210417_part1.txt.gz"
    trades, quotes, messages = _parse(recordings, "coinbase", "coinbase/exchange_ws/capture_20210417_part1.txt.gz")
    sent = list(_capture(path))
    told = [m for m in sent if m["type"] in ("match", "last_match")]
    turned = {"buy": "sell", "sell": "buy"}

    assert (messages, len(quotes)) == (5_916, 77)
    assert {symbol: found[2] for symbol, found in _without_holes(trades).items()} == {
        "SKL-USD": 53,
        "SKL-BTC": 9,
        "NMR-EUR": 9,
        "BAND-GBP": 5,
        "YFI-BTC": 1,
    }
    assert [(t.symbol, t.trade_id, t.price, t.amount, t.side) for t in trades] == [
        (m["product_id"], m["trade_id"], m["price"], m["size"], turned[m["side"]]) for m in told
    ]
    assert {(q.bid_amount, q.ask_amount) for q in quotes} == {("0", "0")}


def test_coinbase_exchange_side_agrees_with_its_ticker(recordings: Path) -> None:
    """The ticker of this feed tells the taker's side of the same trade: it equals the side made from the match."""
    tickers = {}
    lines = recordings / "coinbase/exchange_ws/capture_20210417_part1.txt.gz"
    for message in _capture(lines):
        if message["type"] == "ticker":
            tickers[message["product_id"], message["trade_id"]] = message["side"]
    trades, _, _ = _parse(recordings, "coinbase", "coinbase/exchange_ws/capture_20210417_part1.txt.gz")
    both = [(trade.side, tickers[key]) for trade in trades if (key := (trade.symbol, trade.trade_id)) in tickers]

    assert len(both) > 50
    assert all(left == right for left, right in both)


CONTROLS: list[tuple[str, str, dict[str, int]]] = [
    ("binance", "binance/spot_ws/btcusdt_20240808.gz", {"data": 41_249}),
    ("kraken", "kraken/ws_v1/capture_20210417.jsonl.gz", {"data": 4_338, "heartbeat": 92}),
    (
        "coinbase",
        "coinbase/advanced_ws/capture_20260809_part1.jsonl.gz",
        {"data": 386, "heartbeat": 9, "acknowledged": 5},
    ),
]


@pytest.mark.parametrize(("name", "file", "kinds"), CONTROLS)
def test_control_of_a_recorded_connection(recordings: Path, name: str, file: str, kinds: dict[str, int]) -> None:
    """Heartbeats and acknowledgements of a whole recording are told from its data."""
    exchange = get(name)
    found: dict[str, int] = {}
    for _, frame in read(recordings / file, exchange):
        if frame is not None and frame.kind == FRAME:
            kind = exchange.control(frame.data).kind
            found[kind] = found.get(kind, 0) + 1

    assert found == kinds


def test_coinbase_recorded_subscription_is_acknowledged(recordings: Path) -> None:
    """The keys the recorded connection's answers bring are those the requests expect."""
    exchange = get("coinbase")
    expected = frozenset[str]().union(
        *(r.expects for r in exchange.requests(["BTC-USD", "ETH-USD"], ["trades", "quotes", "book"]))
    )
    told: set[str] = set()
    for _, frame in read(recordings / "coinbase/advanced_ws/capture_20260809_part1.jsonl.gz", exchange):
        if frame is not None and frame.kind == FRAME:
            told |= exchange.control(frame.data).acknowledged

    assert expected <= told
