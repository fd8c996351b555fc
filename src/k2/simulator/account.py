"""The simulator's own account: which trades it told to whom, with exact sums and candles, to check others against.

Every trade id of a market is in exactly one of three sets:
`announced` (sent on at least one connection), `withheld` (only dropped on purpose, by a fault), or
`unheard` (made while nobody listened). `confirmed`, a part of `announced`, were read by a client's process: it
answered a ping sent after them. What was announced but never confirmed may have died in a cut connection.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from k2.model import AGGREGATE, TRADE
from k2.schema import TIMEFRAMES
from k2.simulator.candles import Candle, Candles
from k2.simulator.market import Instrument, Market, MarketTrade, fixed


class Intervals:
    """A set of whole numbers as sorted, disjoint, not touching ranges; both ends inclusive."""

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        for first, last in ranges:
            self.add(first, last)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(list(zip(self._starts, self._ends, strict=True)))

    def __contains__(self, number: int) -> bool:
        i = bisect_right(self._starts, number) - 1
        return i >= 0 and number <= self._ends[i]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Intervals) and self._starts == other._starts and self._ends == other._ends

    __hash__ = None  # type: ignore[assignment]  # it changes

    def __repr__(self) -> str:
        return f"Intervals({list(self)})"

    def count(self) -> int:
        """Return how many numbers are in the set."""
        return sum(self._ends) - sum(self._starts) + len(self._starts)

    def add(self, first: int, last: int) -> None:
        """Add every number from `first` to `last`, both inclusive."""
        if self._ends and first == self._ends[-1] + 1:
            self._ends[-1] = last
            return
        i = bisect_right(self._starts, first) - 1
        low = i if i >= 0 and self._ends[i] >= first - 1 else i + 1
        high = bisect_right(self._starts, last + 1)
        if low < high:
            first, last = min(first, self._starts[low]), max(last, self._ends[high - 1])
        self._starts[low:high] = [first]
        self._ends[low:high] = [last]

    def minus(self, other: Intervals) -> Intervals:
        """Return the numbers that are not in `other`."""
        left = Intervals()
        cuts = list(other)
        for first, last in self:
            for cut_first, cut_last in cuts:
                if cut_last < first or cut_first > last:
                    continue
                if cut_first > first:
                    left.add(first, cut_first - 1)
                first = cut_last + 1
                if first > last:
                    break
            if first <= last:
                left.add(first, last)
        return left


class Tally:
    """What was told of one market: its single trades, or its aggregates (never mixed)."""

    def __init__(self, market: Market, kind: str) -> None:
        self.market = market
        self.kind = kind
        self.announced = Intervals()
        self.confirmed = Intervals()
        self.dropped = Intervals()
        self.deliveries = 0
        self.off_market = Intervals()
        self.buys = 0
        self.sum_price = self.sum_amount = self.sum_quote = 0
        self.candles = Candles()

    @property
    def instrument(self) -> Instrument:
        """The instrument told of."""
        return self.market.instrument

    def announce(self, trades: Sequence[MarketTrade]) -> None:
        """Note that trades were written to one connection; a trade told before changes only `deliveries`."""
        self.deliveries += len(trades)
        for trade in trades:
            if trade.trade_id in self.announced:
                continue
            self.announced.add(trade.trade_id, trade.trade_id)
            self.buys += trade.buy
            self.sum_price += trade.price
            self.sum_amount += trade.amount
            self.sum_quote += trade.price * trade.amount
            if trade.mark == "MARKET":
                self.candles.add(trade)
            else:
                self.off_market.add(trade.trade_id, trade.trade_id)

    def withhold(self, trades: Sequence[MarketTrade]) -> None:
        """Note that a fault kept trades from one connection."""
        for trade in trades:
            self.dropped.add(trade.trade_id, trade.trade_id)

    @property
    def withheld(self) -> Intervals:
        """Ids dropped on purpose and never announced on any connection."""
        return self.dropped.minus(self.announced)

    @property
    def generated(self) -> Intervals:
        """Ids the market has made, from before the first client on."""
        market = self.market
        if self.kind == TRADE:
            return Intervals([(market.instrument.first_trade_id, market.next_id - 1)])
        if market.next_aggregate_id == market.first_aggregate_id:
            return Intervals()
        return Intervals([(market.first_aggregate_id, market.next_aggregate_id - 1)])

    @property
    def unheard(self) -> Intervals:
        """Ids made while nobody who listened was connected; no socket ever carried them."""
        return self.generated.minus(self.announced).minus(self.dropped)

    def describe(self) -> dict[str, Any]:
        """Return everything as JSON values: decimals as exact text, ids as [first, last] intervals."""
        told, quote_decimals = self.instrument, self.instrument.price_decimals + self.instrument.amount_decimals
        return {
            "exchange": told.exchange,
            "symbol": told.symbol,
            "kind": self.kind,
            "count": self.announced.count(),
            "buys": self.buys,
            "sum_price": fixed(self.sum_price, told.price_decimals),
            "sum_amount": fixed(self.sum_amount, told.amount_decimals),
            "sum_price_amount": fixed(self.sum_quote, quote_decimals),
            "deliveries": self.deliveries,
            **{
                name: [list(pair) for pair in getattr(self, name)]
                for name in ("announced", "confirmed", "withheld", "unheard", "off_market")
            },
            "candles": {name: self.candle_rows(name) for name in TIMEFRAMES},
        }

    def candle_rows(self, timeframe: str) -> list[dict[str, Any]]:
        """Return the candles of what was announced, named as the `candles` table names its columns."""
        candles = self.candles.timeframe(TIMEFRAMES[timeframe])
        return [candle_row(self.instrument, start, candle) for start, candle in candles.items()]


def candle_row(told: Instrument, start_ns: int, candle: Candle) -> dict[str, Any]:
    """Return one candle with decimals as exact text."""
    quote_decimals = told.price_decimals + told.amount_decimals
    return {
        "start_ns": start_ns,
        "open": told.price(candle.open),
        "high": told.price(candle.high),
        "low": told.price(candle.low),
        "close": told.price(candle.close),
        "volume": told.amount(candle.amount),
        "quote_volume": fixed(candle.quote, quote_decimals),
        "buy_volume": told.amount(candle.buy_amount),
        "trade_count": candle.count,
    }


class Account:
    """Tallies of all markets, and what was sent of recordings.

    `frames` counts, per exchange, the recorded frames `sent` and those `skipped` because no client
    subscribed to their stream.
    """

    def __init__(self, markets: Iterable[Market]) -> None:
        self._tallies: dict[tuple[str, str, str], Tally] = {}
        self.frames: dict[str, dict[str, int]] = {}
        for market in markets:
            exchange = market.instrument.exchange
            kinds = (TRADE, AGGREGATE) if exchange.startswith("binance") else (TRADE,)
            for kind in kinds:
                self._tallies[exchange, market.symbol, kind] = Tally(market, kind)

    def __iter__(self) -> Iterator[Tally]:
        return iter(self._tallies.values())

    def tally(self, exchange: str, symbol: str, kind: str = TRADE) -> Tally:
        """Return what was told of one market; `kind` is trade or aggregate."""
        return self._tallies[exchange, symbol, kind]

    def note_frame(self, exchange: str, sent: bool) -> None:
        """Count one recorded frame."""
        counts = self.frames.setdefault(exchange, {"sent": 0, "skipped": 0})
        counts["sent" if sent else "skipped"] += 1

    def describe(self) -> dict[str, Any]:
        """Return the account as JSON values; what `/account` answers."""
        return {"markets": [tally.describe() for tally in self], "frames": self.frames}
