"""The account's sets of ids, and its sums."""

from __future__ import annotations

import itertools
from decimal import Decimal

from hypothesis import given
from hypothesis import strategies as st

from k2.simulator.account import Account, Intervals
from k2.simulator.market import Market, instrument

_RANGES = st.lists(
    st.tuples(st.integers(0, 60), st.integers(0, 8)).map(lambda pair: (pair[0], pair[0] + pair[1])), max_size=25
)


def _numbers(ranges: list[tuple[int, int]]) -> set[int]:
    return {i for first, last in ranges for i in range(first, last + 1)}


@given(_RANGES, _RANGES)
def test_intervals_are_the_set_of_what_was_added(left: list[tuple[int, int]], right: list[tuple[int, int]]) -> None:
    """Whatever is added in whatever order: same numbers as a plain set, in the fewest ranges."""
    one, other = Intervals(left), Intervals(right)

    ranges = list(one)
    assert _numbers(ranges) == _numbers(left)
    assert one.count() == len(_numbers(left))
    assert all(a[1] + 1 < b[0] for a, b in itertools.pairwise(ranges))
    assert [n for n in range(80) if n in one] == sorted(_numbers(left))
    assert _numbers(list(one.minus(other))) == _numbers(left) - _numbers(right)


def _account() -> tuple[Account, Market]:
    market = Market(instrument("kraken", "BTC-USD", 1), 1, 1_790_000_000_000_000_000, 20_000_000)
    return Account([market]), market


def test_tally_every_id_is_announced_withheld_or_unheard() -> None:
    """The three sets are disjoint and together all ids; a withheld id told elsewhere counts as announced."""
    account, market = _account()
    tally = account.tally("kraken", "BTC-USD")
    for number in range(300):
        trades = market.step().trades
        if number % 3 == 0:
            tally.withhold(trades)
        if number % 4 == 0:
            tally.announce(trades)

    sets = [_numbers(list(s)) for s in (tally.announced, tally.withheld, tally.unheard)]
    assert sum(len(s) for s in sets) == len(set().union(*sets)) == tally.generated.count()
    assert all(sets)


def test_tally_counts_a_trade_once_however_often_it_is_told() -> None:
    """Sums and candles hold each trade once; deliveries count every telling."""
    account, market = _account()
    tally = account.tally("kraken", "BTC-USD")
    trades = market.last_trades(50)
    tally.announce(trades[20:])
    tally.announce(trades)

    told = tally.describe()
    amounts = [Decimal(market.instrument.amount(t.amount)) for t in trades]
    prices = [Decimal(market.instrument.price(t.price)) for t in trades]
    assert told["count"] == 50
    assert told["deliveries"] == 80
    assert Decimal(told["sum_amount"]) == sum(amounts)
    assert Decimal(told["sum_price"]) == sum(prices)
    assert Decimal(told["sum_price_amount"]) == sum(p * a for p, a in zip(prices, amounts, strict=True))
    assert sum(row["trade_count"] for row in told["candles"]["1m"]) == 50
    assert told["candles"]["1d"][0]["open"] == market.instrument.price(trades[0].price)
