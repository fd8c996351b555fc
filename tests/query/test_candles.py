"""Candles from trades, and two parts of a candle put together."""

from __future__ import annotations

import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2.candles import PARTIAL_SCHEMA, make_candles, vwap
from k2.query.candles import from_trades, merge
from k2.schema import TIMEFRAMES, TRADES, arrow_schema

sys.path.insert(0, str(Path(__file__).parents[1] / "contracts"))
from candle_limits import LIMITS

UNIT = Decimal("0.000000000001")


@st.composite
def trades(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Trades of two symbols with twelve decimals, with and without ids, in any order of time."""
    rows = []
    for offset in range(draw(st.integers(0, 12))):
        trade_id = draw(st.sampled_from([0, offset + 1]))
        kind = draw(st.sampled_from(["trade", "aggregate"]))
        rows.append(
            any_trade(
                offset,
                symbol=draw(st.sampled_from(["BTC-USD", "SHIB-USD"])),
                trade_id=trade_id,
                kind=kind,
                last_id=trade_id + (draw(st.integers(0, 3)) if kind == "aggregate" else 0),
                price=draw(st.integers(1, 10**18)) * UNIT,
                amount=draw(st.integers(0, 10**18)) * UNIT,
                side=draw(st.sampled_from(["buy", "sell"])),
                off_market=draw(st.booleans()),
                exchange_ns=draw(st.sampled_from([0, 1, 59 * 10**9, 60 * 10**9, 86_400 * 10**9])),
            )
        )
    return rows


def any_trade(offset: int, **changes: Any) -> dict[str, Any]:
    """Return one trade, in frame `offset`."""
    row = {
        "exchange": "kraken",
        "symbol": "BTC-USD",
        "trade_id": offset + 1,
        "kind": "trade",
        "price": Decimal(1),
        "amount": Decimal(1),
        "side": "buy",
        "off_market": False,
        "occurrence": 0,
        "exchange_ns": 0,
        "received_ns": 0,
        "source": "live",
        "log_partition": "kraken",
        "log_offset": offset,
        "row_in_frame": 0,
        "logged_ns": 0,
        **changes,
    }
    return {"first_id": row["trade_id"], "last_id": row["trade_id"], **row}


def table_of(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=arrow_schema(TRADES))


def ordered(candles: pa.Table) -> list[dict[str, Any]]:
    return sorted(candles.to_pylist(), key=lambda c: (c["start_ns"], c["exchange"], c["symbol"], c["kind"]))


@given(rows=trades(), timeframe=st.sampled_from(list(TIMEFRAMES)))
def test_candles_equal_those_counted_trade_by_trade(rows: list[dict[str, Any]], timeframe: str) -> None:
    """The vectorised sums agree with plain arithmetic to the last digit, keys included."""
    counted = [{name: row[name] for name in PARTIAL_SCHEMA.names} for row in make_candles(timeframe, rows)]

    assert ordered(from_trades(table_of(rows), timeframe)) == counted


@given(rows=trades(), mask=st.integers(0, 2**12 - 1), timeframe=st.sampled_from(["1m", "1d"]))
def test_merged_parts_equal_the_whole(rows: list[dict[str, Any]], mask: int, timeframe: str) -> None:
    """However trades are dealt to two parts, merging them gives the candles of all of them."""
    one = [row for index, row in enumerate(rows) if mask >> index & 1]
    other = [row for index, row in enumerate(rows) if not mask >> index & 1]

    merged = merge(from_trades(table_of(one), timeframe), from_trades(table_of(other), timeframe))

    assert ordered(merged) == ordered(from_trades(table_of(rows), timeframe))


@pytest.mark.parametrize("case", LIMITS)
def test_sums_neither_raise_nor_wrap(case: str) -> None:
    """What is too large becomes the largest number, also when each of two merged parts was small enough."""
    limit = LIMITS[case]
    rows = [any_trade(offset, **limit.trade) for offset in range(limit.count)]
    half = limit.count // 2

    whole = from_trades(table_of(rows), "1m")
    parts = [from_trades(table_of(part), "1m") for part in (rows[:half], rows[half:])]

    assert {name: whole[name][0].as_py() for name in limit.candle} == limit.candle
    assert ordered(merge(*parts)) == ordered(whole)


def test_vwap_is_cut_not_rounded() -> None:
    """Two thirds end in a six at the eighteenth decimal; nothing traded gives zero."""

    assert vwap(Decimal(2), Decimal(3)) == Decimal("0.666666666666666666")
    assert vwap(Decimal(0), Decimal(0)) == 0
