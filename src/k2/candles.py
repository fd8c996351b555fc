"""What a candle is, the same in every tier: its columns, its keys, and how its sums end.

Sums neither raise nor wrap. Ingest keeps out trades too large to add up: what is stored has a price
below 10^14, an amount and a price x amount below 10^17, and covers at most 10^9 single trades. The
tiers add these up in wider numbers than candles show, with room for 10^9 of the largest trades at
least, and bring them into the declared types once, at the end: cut, never rounded, and a sum that
is too large becomes the largest number of its type, all nines. Volumes get there at 10^26, which is
10^9 of the largest trades; quote volumes at 10^20, a thousand of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import ROUND_DOWN, Context, Decimal
from typing import Any

import pyarrow as pa

from k2.model import BUY
from k2.schema import ARROW, CANDLES, FRAME_ROWS, KEY_SHIFT, TIMEFRAMES, Type, arrow_schema

Row = dict[str, Any]

KEY_TYPE = pa.decimal128(38, 0)
EXACT_TYPE = pa.decimal256(76, 24)
"""Of a sum of products of two decimal(38,12): all of their 24 decimals."""

PARTIAL_SCHEMA: pa.Schema = pa.schema(
    [
        *arrow_schema(CANDLES),
        pa.field("open_key", KEY_TYPE, nullable=False),
        pa.field("close_key", KEY_TYPE, nullable=False),
        pa.field("quote_exact", EXACT_TYPE, nullable=False),
    ]
)
"""A candle and what is needed to merge it with another part of itself: see `hot.base.Hot.candles`."""

EXACT = Context(prec=120, rounding=ROUND_DOWN)
"""More digits than any sum, product or quotient here needs; Python's default of 28 would round."""

DIGITS = 38
LARGEST_COUNT = 2**63 - 1
_IDENTITY = ("start_ns", "exchange", "symbol", "kind")


def largest(type_: Type) -> Decimal:
    """Return the largest number of a decimal column."""
    return EXACT.scaleb(Decimal(10**DIGITS - 1), -ARROW[type_].scale)


_LARGEST = {type_: largest(type_) for type_ in (Type.DECIMAL, Type.WIDE)}
_LAST_PLACE = {type_: Decimal(1).scaleb(-ARROW[type_].scale) for type_ in _LARGEST}


def fitted(value: Decimal, type_: Type) -> Decimal:
    """Return a number of zero or more as a column of this type shows it: cut, and at most its largest."""
    return min(value.quantize(_LAST_PLACE[type_], context=EXACT), _LARGEST[type_])


def vwap(quote_volume: Decimal, volume: Decimal) -> Decimal:
    """Return quote_volume / volume as candles show it; 0 where nothing was traded."""
    return fitted(EXACT.divide(quote_volume, volume), Type.WIDE) if volume else Decimal(0)


def totals(volume: Decimal, buy_volume: Decimal, quote_exact: Decimal, trade_count: int) -> Row:
    """Return the columns of a candle that follow from its exact sums."""
    shown, quote_volume = fitted(volume, Type.DECIMAL), fitted(quote_exact, Type.WIDE)
    return {
        "volume": shown,
        "quote_volume": quote_volume,
        "buy_volume": fitted(buy_volume, Type.DECIMAL),
        "vwap": vwap(quote_volume, shown),
        "trade_count": min(int(trade_count), LARGEST_COUNT),
        "quote_exact": quote_exact,
    }


def candle_key(trade: Mapping[str, Any]) -> int:
    """Return the number trades are ordered by within a candle: by time, then id, then place in the log."""
    tie = trade["trade_id"] or trade["log_offset"] * FRAME_ROWS + trade["row_in_frame"]
    return int(trade["exchange_ns"] * KEY_SHIFT + tie)


def trade_bounds(timeframe: str, start_ns: int | None, end_ns: int | None) -> tuple[int | None, int | None]:
    """Turn bounds on `start_ns` of candles into those of their trades: a bucket is in or out as a whole."""
    length_ns = TIMEFRAMES[timeframe]

    def next_bucket(time_ns: int | None) -> int | None:
        return None if time_ns is None else -(-time_ns // length_ns) * length_ns

    return next_bucket(start_ns), next_bucket(end_ns)


def make_candles(timeframe: str, trades: Iterable[Row]) -> list[Row]:
    """Return candles made trade by trade: the slow way, easy to check by eye, which all others must equal.

    Rows of `PARTIAL_SCHEMA` plus `last_offset`, sorted by start_ns, exchange, symbol, kind.
    """
    length = TIMEFRAMES[timeframe]
    candles: dict[tuple[int, str, str, str], _Candle] = {}
    for trade in trades:
        if trade["off_market"]:
            continue
        bucket = (trade["exchange_ns"] // length * length, trade["exchange"], trade["symbol"], trade["kind"])
        if bucket not in candles:
            candles[bucket] = _Candle(trade, trade, trade["price"], trade["price"])
        candles[bucket].add(trade)
    return [
        {**dict(zip(_IDENTITY, bucket, strict=True)), "timeframe": timeframe, **candle.row()}
        for bucket, candle in sorted(candles.items(), key=lambda item: item[0])
    ]


@dataclass
class _Candle:
    """One candle while it is being made."""

    first: Row
    last: Row
    high: Decimal
    low: Decimal
    volume: Decimal = Decimal(0)
    quote_volume: Decimal = Decimal(0)
    buy_volume: Decimal = Decimal(0)
    trade_count: int = 0
    last_offset: int = -1

    def add(self, trade: Row) -> None:
        price, amount = trade["price"], trade["amount"]
        self.first = min(self.first, trade, key=candle_key)
        self.last = max(self.last, trade, key=candle_key)
        self.high = max(self.high, price)
        self.low = min(self.low, price)
        self.volume = EXACT.add(self.volume, amount)
        self.quote_volume = EXACT.add(self.quote_volume, EXACT.multiply(price, amount))
        if trade["side"] == BUY:
            self.buy_volume = EXACT.add(self.buy_volume, amount)
        self.trade_count += trade["last_id"] - trade["first_id"] + 1
        self.last_offset = max(self.last_offset, trade["log_offset"])

    def row(self) -> Row:
        return {
            "open": self.first["price"],
            "high": self.high,
            "low": self.low,
            "close": self.last["price"],
            **totals(self.volume, self.buy_volume, self.quote_volume, self.trade_count),
            "revision": 0,
            "open_key": Decimal(candle_key(self.first)),
            "close_key": Decimal(candle_key(self.last)),
            "last_offset": self.last_offset,
        }
