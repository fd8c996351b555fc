"""The simulated world is the same for the same seed, exact, and never absurd."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from decimal import Decimal

import pytest

from k2.errors import UnknownName
from k2.schema import TIMEFRAMES
from k2.simulator.market import EXCHANGES, HISTORY_TRADES, Event, Market, fixed, instrument, trimmed

START_NS = 1_790_000_000_000_000_000
SYMBOLS = {"binance": "BTC-USDT", "binance-usdm": "BTC-USDT-PERP", "kraken": "BTC-USD", "coinbase": "BTC-USD"}


def make(exchange: str = "kraken", symbol: str = "", seed: int = 1, step_ns: int = 20_000_000) -> Market:
    symbol = symbol or SYMBOLS[exchange]
    return Market(instrument(exchange, symbol, seed), seed, START_NS, step_ns)


def events(market: Market, count: int) -> Iterator[Event]:
    for _ in range(count):
        yield market.step()


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_market_same_seed_same_events(exchange: str) -> None:
    """Two markets of one seed do exactly the same; another seed does something else."""
    first, second, other = make(exchange), make(exchange), make(exchange, seed=2)

    assert list(events(first, 500)) == list(events(second, 500))
    assert list(events(make(exchange), 500)) != list(events(other, 500))


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_market_trade_ids_contiguous_and_times_rise(exchange: str) -> None:
    """Trade ids have no hole, both sides trade, several trades come at once, times never fall."""
    market = make(exchange)
    first = market.next_id

    made = [event.trades for event in events(market, 2_000)]

    trades = [trade for group in made for trade in group]
    assert [t.trade_id for t in trades] == list(range(first, first + len(trades)))
    assert {t.buy for t in trades} == {True, False}
    assert max(len(group) for group in made) > 1
    assert all(a.ns <= b.ns for a, b in itertools.pairwise(trades))


def test_market_marks_some_futures_trades_as_outside() -> None:
    """Only USD-M has trades outside the market; they keep their place in the ids and stay out of aggregates."""
    marks = {t.mark for event in events(make("binance"), 3_000) for t in event.trades}
    futures = list(events(make("binance-usdm"), 3_000))

    outside = [t.trade_id for event in futures for t in event.trades if t.mark != "MARKET"]
    covered = {i for event in futures for t in event.aggregates for i in range(t.first_id, t.last_id + 1)}
    assert marks == {"MARKET"}
    assert outside
    assert covered.isdisjoint(outside)


def test_market_aggregates_cover_every_trade_once() -> None:
    """Spot aggregates cover all trades without overlap, at their price and with their sums."""
    for event in events(make("binance"), 2_000):
        covered = [i for t in event.aggregates for i in range(t.first_id, t.last_id + 1)]
        assert covered == [t.trade_id for t in event.trades]
        assert sum(t.amount for t in event.aggregates) == sum(t.amount for t in event.trades)


@pytest.mark.parametrize("symbol", ["BTC-USD", "SHIB-USD", "WHATEVER-USD"])
def test_market_book_never_crosses(symbol: str) -> None:
    """Best bid stays below best ask, amounts and prices stay positive, the book stays of bounded size."""
    market = make("kraken", symbol)

    for event in events(market, 5_000):
        assert 0 < market.book.best(True) < market.book.best(False)
        assert all(t.price > 0 and t.amount > 0 for t in event.trades)
        assert 3 < len(market.book.bids) <= 48
        assert 3 < len(market.book.asks) <= 48


def test_market_changes_rebuild_the_book() -> None:
    """Applying every event's changes to a copy of the book gives the book; update numbers have no hole."""
    market = make("binance")
    copy = {True: dict(market.book.bids), False: dict(market.book.asks)}
    last = market.update_id

    for event in events(market, 2_000):
        assert event.first_update == last + 1
        last = event.last_update
        for is_bid, price, amount in event.changes:
            if amount:
                copy[is_bid][price] = amount
            else:
                del copy[is_bid][price]

    assert copy == {True: market.book.bids, False: market.book.asks}


def test_market_candles_equal_brute_force() -> None:
    """The market's candles equal candles computed from its trades with decimals, in every timeframe."""
    market = make("binance-usdm", step_ns=700_000_000)
    list(events(market, 4_000))
    trades = [t for t in market.trades(0, HISTORY_TRADES) if t.mark == "MARKET"]

    for length in TIMEFRAMES.values():
        expected: dict[int, list[Decimal]] = {}
        for t in trades:
            price = Decimal(market.instrument.price(t.price))
            row = expected.setdefault(t.ns - t.ns % length, [price, price, price, price, Decimal(0), Decimal(0)])
            row[1], row[2], row[3] = max(row[1], price), min(row[2], price), price
            row[4] += Decimal(market.instrument.amount(t.amount))
            row[5] += 1
        got = {
            start: [
                *(Decimal(market.instrument.price(p)) for p in (c.open, c.high, c.low, c.close)),
                Decimal(market.instrument.amount(c.amount)),
                Decimal(c.count),
            ]
            for start, c in market.candles.timeframe(length).items()
        }
        assert got == expected


def test_market_forgets_old_trades() -> None:
    """Only the newest trades are kept, and paging by id and by time walks over all of those."""
    market = make("kraken")
    while market.next_id - market.instrument.first_trade_id < HISTORY_TRADES + 1_000:
        market.step()

    kept = market.trades(0, 10**9)
    by_time, since = [], 0
    while page := market.trades_after(since, 1_000):
        by_time += page
        since = page[-1].ns
    assert len(kept) == HISTORY_TRADES
    assert kept[-1].trade_id == market.last_id
    assert by_time == kept


def test_instrument_unknown_exchange_or_symbol_is_refused() -> None:
    """A wrong name brings a message with the nearest or the right form."""
    with pytest.raises(UnknownName, match="kraken"):
        instrument("krakn", "BTC-USD", 1)
    with pytest.raises(UnknownName, match="BASE-QUOTE-PERP"):
        instrument("binance-usdm", "BTC-USDT", 1)


def test_fixed_and_trimmed_write_exact_decimals() -> None:
    """Integers of the last place become text with all, or only the needed, decimals."""
    assert fixed(51, 4) == "0.0051"
    assert fixed(5_100, 8) == "0.00005100"
    assert fixed(7, 0) == "7"
    assert trimmed(5_100, 8) == "0.000051"
    assert trimmed(1_200, 2) == "12"
