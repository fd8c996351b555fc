"""The simulated world: seeded markets with exact integer prices, contiguous trade ids, a book and their own candles.

The same seed, exchange, symbol and start time give the same events for ever; only when they
are told to clients depends on the clock of the run. Prices are counted in ticks and amounts in
units (the last decimal place each market has), so that every sum is exact.
"""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from k2.errors import UnknownName, nearest
from k2.simulator.candles import Candles

HISTORY_TRADES = 50_000
"""Trades kept per market for REST answers by id and for snapshots; older ones are forgotten."""
MIN_LEVELS = 26
MAX_LEVELS = 48
_WARM_UP_EVENTS = 160

EXCHANGES = ("binance", "binance-usdm", "kraken", "coinbase")

# Start price and price decimals of well-known assets in dollars; others start at 100.
_PRICES: dict[str, tuple[str, int]] = {
    "BTC": ("65000", 2),
    "ETH": ("2700", 2),
    "SOL": ("150", 2),
    "BNB": ("600", 2),
    "LTC": ("85", 2),
    "LINK": ("14", 3),
    "DOT": ("5", 4),
    "XRP": ("0.6", 5),
    "ADA": ("0.45", 5),
    "DOGE": ("0.12", 6),
    "SHIB": ("0.00002", 10),
}
_OWN_DECIMALS = {("kraken", "BTC"): 1, ("binance-usdm", "BTC"): 1}


class MarketTrade(msgspec.Struct, frozen=True, gc=False):
    """One trade, or one aggregate of trades of one taker order at one price.

    `price` in ticks, `amount` in units, `buy`: the taker bought. A single trade has
    `first_id == last_id == trade_id`. `mark` is Binance's `X` (MARKET, INSURANCE_FUND...).
    """

    trade_id: int
    price: int
    amount: int
    buy: bool
    ns: int
    first_id: int
    last_id: int
    mark: str = "MARKET"


class Event(msgspec.Struct, frozen=True):
    """What one step of a market did: trades (of one taker), their aggregates, and changed book levels.

    `changes` holds (is bid, price, new amount; 0: removed), numbered `first_update`..`last_update`.
    """

    ns: int
    trades: tuple[MarketTrade, ...]
    aggregates: tuple[MarketTrade, ...]
    changes: tuple[tuple[bool, int, int], ...]
    first_update: int
    last_update: int


@dataclass(frozen=True)
class Instrument:
    """One symbol of one exchange: names, decimals, where its price and ids start."""

    exchange: str
    symbol: str  # canonical
    base: str
    quote: str
    price_decimals: int
    amount_decimals: int
    start_price: int
    first_trade_id: int

    def price(self, ticks: int) -> str:
        """Return a price with all its decimals."""
        return fixed(ticks, self.price_decimals)

    def amount(self, units: int) -> str:
        """Return an amount with all its decimals."""
        return fixed(units, self.amount_decimals)


def fixed(number: int, decimals: int) -> str:
    """Return an integer count of the last decimal place as text: `fixed(51, 4)` is `0.0051`."""
    if not decimals:
        return str(number)
    digits = str(number).zfill(decimals + 1)
    return f"{digits[:-decimals]}.{digits[-decimals:]}"


def trimmed(number: int, decimals: int) -> str:
    """Return the same without zeros at the end, as Coinbase writes numbers."""
    return fixed(number, decimals).rstrip("0").rstrip(".") if decimals else str(number)


def instrument(exchange: str, symbol: str, seed: int) -> Instrument:
    """Describe a canonical symbol as the simulated exchange lists it.

    Raises UnknownName for an exchange the simulator does not speak for, or a symbol of the wrong form.
    """
    if exchange not in EXCHANGES:
        raise UnknownName(f"simulate exchange {exchange!r}: not simulated{nearest(exchange, EXCHANGES)}")
    parts = symbol.split("-")
    perpetual = exchange == "binance-usdm"
    if len(parts) != 2 + perpetual or (perpetual and parts[2] != "PERP") or not all(parts):
        form = "BASE-QUOTE-PERP" if perpetual else "BASE-QUOTE"
        raise UnknownName(f"simulate symbol {symbol!r} on {exchange}: not of the form {form}")
    base, quote = parts[0], parts[1]
    price, decimals = _PRICES.get(base, ("100", 3))
    decimals = _OWN_DECIMALS.get((exchange, base), decimals)
    whole, _, fraction = price.partition(".")
    ticks = int(whole + fraction.ljust(decimals, "0")[:decimals])
    return Instrument(
        exchange=exchange,
        symbol=symbol,
        base=base,
        quote=quote,
        price_decimals=decimals,
        amount_decimals=3 if perpetual else 8,
        start_price=ticks,
        first_trade_id=1_000_000 + random.Random(f"{seed}/{exchange}/{symbol}/ids").randrange(8_000_000),  # noqa: S311 a world by seed, not a secret
    )


class Book:
    """Both sides of an order book; every change is noted until `take_changes`."""

    def __init__(self) -> None:
        self.bids: dict[int, int] = {}
        self.asks: dict[int, int] = {}
        self._bid_prices: list[int] = []
        self._ask_prices: list[int] = []
        self._changes: list[tuple[bool, int, int]] = []

    def set(self, is_bid: bool, price: int, amount: int) -> None:
        """Put a level at a price, or remove it with amount 0."""
        levels, prices = (self.bids, self._bid_prices) if is_bid else (self.asks, self._ask_prices)
        if amount:
            if price not in levels:
                insort(prices, price)
            levels[price] = amount
        else:
            del levels[price]
            del prices[bisect_left(prices, price)]
        self._changes.append((is_bid, price, amount))

    def best(self, is_bid: bool) -> int:
        """Return the best price of a side."""
        return self._bid_prices[-1] if is_bid else self._ask_prices[0]

    def prices(self, is_bid: bool) -> list[int]:
        """Return the prices of a side, best first."""
        return self._bid_prices[::-1] if is_bid else self._ask_prices

    def side(self, is_bid: bool) -> dict[int, int]:
        """Return price -> amount of a side."""
        return self.bids if is_bid else self.asks

    def top(self, is_bid: bool, depth: int) -> list[tuple[int, int]]:
        """Return the best levels of a side as (price, amount), best first."""
        levels = self.side(is_bid)
        return [(price, levels[price]) for price in self.prices(is_bid)[:depth]]

    def take_changes(self) -> tuple[tuple[bool, int, int], ...]:
        """Return what changed since the last call."""
        changes = tuple(self._changes)
        self._changes.clear()
        return changes


@dataclass
class Totals:
    """Running sums of a market, for tickers."""

    open: int = 0
    high: int = 0
    low: int = 0
    last: int = 0
    last_amount: int = 0
    amount: int = 0
    quote: int = 0
    count: int = 0


@dataclass
class Market:
    """One market: a seeded walk of its book and the trades it makes."""

    instrument: Instrument
    seed: int
    start_ns: int
    step_ns: int
    book: Book = field(default_factory=Book)
    candles: Candles = field(default_factory=Candles)
    totals: Totals = field(default_factory=Totals)

    def __post_init__(self) -> None:
        name = f"{self.seed}/{self.instrument.exchange}/{self.instrument.symbol}"
        self._random = random.Random(name)  # noqa: S311 a world by seed, not a secret
        self._binance = self.instrument.exchange.startswith("binance")
        self.next_id = self.instrument.first_trade_id
        self.next_aggregate_id = self.instrument.first_trade_id // 2
        self.first_aggregate_id = self.next_aggregate_id
        self.update_id = 10 * self.instrument.first_trade_id
        self._ring: list[MarketTrade | None] = [None] * HISTORY_TRADES
        self._aggregate_ring: list[MarketTrade | None] = [None] * (HISTORY_TRADES if self._binance else 0)
        self._last_ns = 0
        # Exchanges stamp to the millisecond (Binance) or microsecond; equal times are told apart where paging needs it.
        self._grain = 1_000_000 if self._binance else 1_000
        smallest = self.instrument.amount_decimals - 6
        self._least = 10 ** max(0, smallest)
        self._spread = 5 * 10**self.instrument.amount_decimals / self._least
        self._steps = 0
        self._fill_book()
        for i in range(_WARM_UP_EVENTS):
            self._step(self.start_ns - (_WARM_UP_EVENTS - i) * self.step_ns)

    @property
    def symbol(self) -> str:
        """The canonical symbol."""
        return self.instrument.symbol

    @property
    def last_id(self) -> int:
        """The id of the newest trade."""
        return self.next_id - 1

    @property
    def steps(self) -> int:
        """Events made since the start."""
        return self._steps

    def next_ns(self) -> int:
        """Return the time of the next event."""
        return self.start_ns + self._steps * self.step_ns

    def step(self) -> Event:
        """Make the next event, at its time."""
        ns = self.next_ns()
        self._steps += 1
        return self._step(ns)

    def _step(self, ns: int) -> Event:
        first_update = self.update_id + 1
        trades: tuple[MarketTrade, ...] = ()
        draw = self._random.random()
        if draw < 0.6:
            trades = self._trade(ns)
        else:
            self._quote(draw)
        self._tidy()
        changes = self.book.take_changes()
        self.update_id += len(changes)
        aggregates = self._aggregate(trades) if self._binance and trades else ()
        return Event(ns, trades, aggregates, changes, first_update, self.update_id)

    def _trade(self, ns: int) -> tuple[MarketTrade, ...]:
        """One taker order hitting one to four resting orders; rarely, on futures, one outside the market."""
        rnd = self._random.random
        if self.instrument.exchange == "binance-usdm" and rnd() < 0.01:
            price = self.book.best(rnd() < 0.5)
            return (self._record(ns, price, self._some_amount(), rnd() < 0.5, "INSURANCE_FUND"),)
        buy = rnd() < self._buy_chance()
        book, made = self.book, []
        for _ in range((1, 1, 1, 1, 1, 2, 2, 3, 4)[int(rnd() * 9)]):
            price = book.best(not buy)
            resting = book.side(not buy)[price]
            amount = min(resting, self._some_amount())
            book.set(not buy, price, resting - amount)
            made.append(self._record(ns, price, amount, buy, "MARKET"))
            if len(book.side(not buy)) < 3:
                break
        return tuple(made)

    def _buy_chance(self) -> float:
        """Lean towards the start price, so that a run of days stays between half and double of it."""
        drift = self.book.best(True) / self.instrument.start_price
        return 0.5 if 0.7 < drift < 1.5 else (0.6 if drift <= 0.7 else 0.4)

    def _record(self, ns: int, price: int, amount: int, buy: bool, mark: str) -> MarketTrade:
        ns -= ns % self._grain
        if ns <= self._last_ns:
            ns = self._last_ns if self._binance else self._last_ns + self._grain
        self._last_ns = ns
        trade_id = self.next_id
        self.next_id += 1
        trade = MarketTrade(trade_id, price, amount, buy, ns, trade_id, trade_id, mark)
        self._ring[trade_id % HISTORY_TRADES] = trade
        if mark == "MARKET":
            self.candles.add(trade)
            self._total(price, amount)
        return trade

    def _total(self, price: int, amount: int) -> None:
        totals = self.totals
        if not totals.count:
            totals.open = totals.high = totals.low = price
        totals.high, totals.low = max(totals.high, price), min(totals.low, price)
        totals.last, totals.last_amount = price, amount
        totals.amount += amount
        totals.quote += price * amount
        totals.count += 1

    def _aggregate(self, trades: Sequence[MarketTrade]) -> tuple[MarketTrade, ...]:
        """Join neighbours of one price, as Binance does; trades outside the market are in no aggregate."""
        made: list[MarketTrade] = []
        for trade in trades:
            if trade.mark != "MARKET":
                continue
            if made and made[-1].price == trade.price:
                last = made[-1]
                made[-1] = MarketTrade(
                    last.trade_id,
                    last.price,
                    last.amount + trade.amount,
                    last.buy,
                    last.ns,
                    last.first_id,
                    trade.last_id,
                )
            else:
                made.append(
                    MarketTrade(
                        self.next_aggregate_id + len(made),
                        trade.price,
                        trade.amount,
                        trade.buy,
                        trade.ns,
                        trade.trade_id,
                        trade.trade_id,
                    )
                )
        for aggregate in made:
            self._aggregate_ring[aggregate.trade_id % HISTORY_TRADES] = aggregate
        self.next_aggregate_id += len(made)
        return tuple(made)

    def _quote(self, draw: float) -> None:
        """Change the book without a trade: improve, resize, add or cancel a level."""
        rnd, book = self._random.random, self.book
        is_bid = rnd() < 0.5
        bid, ask = book.best(True), book.best(False)
        prices = book.prices(is_bid)
        if ask - bid > 3 and draw < 0.95:
            book.set(is_bid, bid + 1 + int(rnd() * (ask - bid - 1)), self._some_amount())
        elif draw < 0.8:
            book.set(is_bid, prices[int(rnd() * 5)], self._some_amount())
        elif draw < 0.9 and len(prices) > MIN_LEVELS:
            book.set(is_bid, prices[int(rnd() * 8)], 0)
        else:
            price = prices[0] - int(rnd() * 12) if is_bid else prices[0] + int(rnd() * 12)
            if price > 0:
                book.set(is_bid, price, self._some_amount())

    def _tidy(self) -> None:
        """Keep the number of levels between its bounds."""
        for is_bid in (True, False):
            levels = self.book.side(is_bid)
            while len(levels) < MIN_LEVELS:
                self._deepen(is_bid)
            while len(levels) > MAX_LEVELS:
                self.book.set(is_bid, self.book.prices(is_bid)[-1], 0)

    def _deepen(self, is_bid: bool) -> None:
        worst = self.book.prices(is_bid)[-1]
        step = 1 + int(self._random.random() * 5)
        price = max(1, worst - step) if is_bid else worst + step
        if price not in self.book.side(is_bid):
            self.book.set(is_bid, price, self._some_amount())
        else:  # a bid cannot go below one tick: make room on top instead
            self.book.set(is_bid, self.book.best(True) + 1, self._some_amount())

    def _fill_book(self) -> None:
        self.book.set(True, self.instrument.start_price - 1, self._some_amount())
        self.book.set(False, self.instrument.start_price, self._some_amount())
        self._tidy()
        self.book.take_changes()

    def _some_amount(self) -> int:
        """Draw an amount between the smallest and about five, small ones as often as large ones."""
        return max(1, int(self._least * self._spread ** self._random.random()))

    def trades(self, first_id: int, count: int) -> list[MarketTrade]:
        """Return at most `count` trades from `first_id` on, as far as they are still kept."""
        start = max(first_id, self.instrument.first_trade_id, self.next_id - HISTORY_TRADES)
        ids = range(start, min(start + count, self.next_id))
        return [trade for i in ids if (trade := self._ring[i % HISTORY_TRADES]) is not None]

    def last_trades(self, count: int) -> list[MarketTrade]:
        """Return the newest trades, oldest first."""
        return self.trades(self.next_id - count, count)

    def aggregates(self, first_id: int, count: int) -> list[MarketTrade]:
        """Return at most `count` aggregates from an aggregate id on, as far as they are still kept."""
        start = max(first_id, self.first_aggregate_id, self.next_aggregate_id - HISTORY_TRADES)
        ids = range(start, min(start + count, self.next_aggregate_id))
        return [trade for i in ids if (trade := self._aggregate_ring[i % HISTORY_TRADES]) is not None]

    def trades_after(self, ns: int, count: int) -> list[MarketTrade]:
        """Return at most `count` of the kept trades later than a time (exclusive), oldest first."""
        return self._after(ns, count, max(self.instrument.first_trade_id, self.next_id - HISTORY_TRADES), self.next_id)

    def _after(self, ns: int, count: int, low: int, end: int) -> list[MarketTrade]:
        high = end
        while low < high:  # times rise with the ids
            middle = (low + high) // 2
            trade = self._ring[middle % HISTORY_TRADES]
            if trade is not None and trade.ns > ns:
                high = middle
            else:
                low = middle + 1
        return self.trades(low, count)
