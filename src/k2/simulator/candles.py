"""Exact candles in integers: of a market (the exchange's own) and of what was announced (the account)."""

from __future__ import annotations

from typing import Protocol

from k2.schema import TIMEFRAMES

MINUTE_NS = TIMEFRAMES["1m"]
KEPT_MINUTES = 8 * 1440
"""Minutes kept per market; older ones are forgotten."""


class _Traded(Protocol):
    """What a candle has to know of a trade."""

    @property
    def trade_id(self) -> int: ...
    @property
    def price(self) -> int: ...
    @property
    def amount(self) -> int: ...
    @property
    def buy(self) -> bool: ...
    @property
    def ns(self) -> int: ...
    @property
    def first_id(self) -> int: ...
    @property
    def last_id(self) -> int: ...


class Candle:
    """Open, high, low and close in ticks, volumes in units, quote volumes in ticks x units.

    Open and close belong to the first and last trade by (time, id), whatever order they came in.
    """

    __slots__ = (
        "amount",
        "buy_amount",
        "buy_quote",
        "close",
        "count",
        "first",
        "high",
        "last",
        "low",
        "open",
        "quote",
    )

    def __init__(self, trade: _Traded) -> None:
        self.first = self.last = (trade.ns, trade.trade_id)
        self.open = self.high = self.low = self.close = trade.price
        self.amount = self.quote = self.buy_amount = self.buy_quote = self.count = 0

    def add(self, trade: _Traded) -> None:
        """Take one trade in."""
        key, price = (trade.ns, trade.trade_id), trade.price
        if key >= self.last:
            self.last, self.close = key, price
        elif key < self.first:
            self.first, self.open = key, price
        if price > self.high:
            self.high = price
        elif price < self.low:
            self.low = price
        quote = price * trade.amount
        self.amount += trade.amount
        self.quote += quote
        self.count += trade.last_id - trade.first_id + 1
        if trade.buy:
            self.buy_amount += trade.amount
            self.buy_quote += quote

    def merge(self, other: Candle) -> None:
        """Take in the candle of another part of the same bucket."""
        if other.first < self.first:
            self.first, self.open = other.first, other.open
        if other.last > self.last:
            self.last, self.close = other.last, other.close
        self.high, self.low = max(self.high, other.high), min(self.low, other.low)
        self.amount += other.amount
        self.quote += other.quote
        self.count += other.count
        self.buy_amount += other.buy_amount
        self.buy_quote += other.buy_quote

    def copy(self) -> Candle:
        """Return an independent candle of the same content."""
        twin = object.__new__(Candle)
        for name in Candle.__slots__:
            setattr(twin, name, getattr(self, name))
        return twin


class Candles:
    """Candles of one market by minute; longer ones are joined from minutes when asked for."""

    def __init__(self) -> None:
        self._minutes: dict[int, Candle] = {}

    def add(self, trade: _Traded) -> None:
        """Take one trade in; the oldest minute is forgotten when there are too many."""
        start = trade.ns - trade.ns % MINUTE_NS
        candle = self._minutes.get(start)
        if candle is None:
            if len(self._minutes) >= KEPT_MINUTES:
                del self._minutes[min(self._minutes)]
            candle = self._minutes[start] = Candle(trade)
        candle.add(trade)

    def timeframe(self, length_ns: int) -> dict[int, Candle]:
        """Return start -> candle of a length that is a multiple of a minute, oldest first."""
        joined: dict[int, Candle] = {}
        for minute in sorted(self._minutes):
            start = minute - minute % length_ns
            if start in joined:
                joined[start].merge(self._minutes[minute])
            else:
                joined[start] = self._minutes[minute].copy()
        return joined
