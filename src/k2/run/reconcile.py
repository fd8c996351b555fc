"""Compares what K2 answers with the simulator's own account: ids, counts, sums, sides, candles.

Pure: rows in, checks out. A surplus fails as loudly as a deficit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from k2.schema import TIMEFRAMES

CANDLE_VALUES = ("open", "high", "low", "close", "volume", "quote_volume", "buy_volume")


class Check(msgspec.Struct, frozen=True):
    """One comparison; `detail` says what was compared, or what differs."""

    name: str
    passed: bool
    detail: str


def check_trades(market: Mapping[str, Any], tier: str, rows: pa.Table) -> Check:
    """Compare the trades of one market (an entry of the account) with what one tier answers.

    `rows` are of that exchange, symbol and kind. Lost are ids a client has confirmed to have
    read; ids merely announced may have died in a connection that was cut.
    """
    name = f"{market['exchange']} {market['symbol']} {market['kind']}s, {tier}"
    ids = rows.column("trade_id").to_pylist()
    stored = set(ids)
    announced, confirmed = _ids(market["announced"]), _ids(market["confirmed"])
    faults = {
        "lost": len(confirmed - stored),
        "doubled": len(ids) - len(stored),
        "invented": len(stored - announced),
    }
    if any(faults.values()):
        return Check(name, False, ", ".join(f"{count:,} {what}" for what, count in faults.items()))
    if stored == announced:  # sums are known of all that was announced
        return _check_sums(name, market, rows)
    return Check(
        name, True, f"{len(ids):,} trades, none lost, none doubled ({len(announced - stored):,} never received)"
    )


def _check_sums(name: str, market: Mapping[str, Any], rows: pa.Table) -> Check:
    prices, amounts = rows.column("price").to_pylist(), rows.column("amount").to_pylist()
    found = {
        "sum_price": sum(prices, Decimal(0)),
        "sum_amount": sum(amounts, Decimal(0)),
        "sum_price_amount": sum((p * a for p, a in zip(prices, amounts, strict=True)), Decimal(0)),
        "buys": pc.sum(pc.equal(rows.column("side"), "buy")).as_py() or 0,
    }
    wrong = [
        f"{key} {value} != {market[key]}" for key, value in found.items() if Decimal(value) != Decimal(market[key])
    ]
    if wrong:
        return Check(name, False, "; ".join(wrong))
    return Check(name, True, f"{rows.num_rows:,} trades: ids, sums and sides equal")


def check_candles(market: Mapping[str, Any], timeframe: str, candles: pa.Table) -> Check:
    """Compare the candles of one market with those of the account."""
    name = f"{market['exchange']} {market['symbol']} {market['kind']} candles {timeframe}"
    expected = {row["start_ns"]: row for row in market["candles"][timeframe]}
    found = {row["start_ns"]: row for row in candles.to_pylist()}
    if set(expected) != set(found):
        return Check(
            name, False, f"{len(set(expected) - set(found))} missing, {len(set(found) - set(expected))} too many"
        )
    for start, row in expected.items():
        for value in CANDLE_VALUES:
            if Decimal(row[value]) != found[start][value]:
                return Check(name, False, f"{start}: {value} {found[start][value]} != {row[value]}")
        if row["trade_count"] != found[start]["trade_count"]:
            return Check(name, False, f"{start}: trade_count {found[start]['trade_count']} != {row['trade_count']}")
    return Check(name, True, f"{len(found):,} candles equal to the last digit")


Rows = Callable[[str, str, str], pa.Table]
"""(exchange, symbol, tier) -> all trades; tier is hot, cold or all."""

Candles = Callable[[str, str, str, str], pa.Table]
"""(exchange, symbol, timeframe, kind) -> all candles."""


def reconcile(account: Mapping[str, Any], rows: Rows, candles: Candles) -> list[Check]:
    """Compare everything the account (`Account.describe()`) tells of single trades with every tier."""
    checks = []
    for market in account["markets"]:
        if not market["count"]:
            continue
        exchange, symbol, kind = market["exchange"], market["symbol"], market["kind"]
        stored: set[int] = set()
        for tier in ("hot", "cold", "all"):
            trades = rows(exchange, symbol, tier)
            trades = trades.filter(pc.equal(trades.column("kind"), kind))
            stored = set(trades.column("trade_id").to_pylist())
            checks.append(check_trades(market, tier, trades))
        if stored == _ids(market["announced"]):  # candles of the account are of all that was announced
            checks += [check_candles(market, t, candles(exchange, symbol, t, kind)) for t in TIMEFRAMES]
    return checks


def _ids(intervals: list[list[int]]) -> set[int]:
    return {i for first, last in intervals for i in range(first, last + 1)}
