"""Candles from trades, and the merging of two parts of one candle: pure functions, exact decimals."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from k2.candles import EXACT, PARTIAL_SCHEMA, totals
from k2.model import BUY
from k2.schema import FRAME_ROWS, KEY_SHIFT, TIMEFRAMES

KEY = ("exchange", "symbol", "kind", "start_ns")
"""What tells candles of one timeframe apart."""

# The product of a price and an amount has 24 decimals and 76 digits; arrow's sums have no more.
_PRICE = pa.decimal256(37, 12)
_AMOUNT = pa.decimal256(38, 12)
_ID = pa.decimal128(19, 0)  # differences and sums of ids need not fit int64
_ONE = pa.scalar(Decimal(1), pa.decimal128(1, 0))


def from_trades(trades: pa.Table, timeframe: str) -> pa.Table:
    """Compute the candles of some trades, in `PARTIAL_SCHEMA`, in no particular order.

    Trades marked `off_market` are left out. Each kind of trade makes its own candles.
    """
    trades = trades.filter(pc.invert(trades["off_market"]))
    if trades.num_rows == 0:
        return PARTIAL_SCHEMA.empty_table()
    trades = _with_columns(trades, timeframe)
    groups = trades.group_by(list(KEY), use_threads=False).aggregate(
        [
            ("position", "first"),
            ("position", "last"),
            ("price", "max"),
            ("price", "min"),
            ("wide_amount", "sum"),
            ("quote", "sum"),
            ("bought", "sum"),
            ("count", "sum"),
        ]
    )
    return _candles(trades, groups, timeframe)


def bucket_starts(times_ns: pa.ChunkedArray, timeframe: str) -> pa.ChunkedArray:
    """Return the start of the bucket each time falls into (times are not before 1970)."""
    length_ns = TIMEFRAMES[timeframe]
    return pc.multiply(pc.divide(times_ns, length_ns), length_ns)


def merge(candles: pa.Table, partial: pa.Table) -> pa.Table:
    """Put two sets of candles together, both in `PARTIAL_SCHEMA`, made from trades none of which is in both."""
    if partial.num_rows == 0 or candles.num_rows == 0:
        return candles if partial.num_rows == 0 else partial
    parts = {_key(row): row for row in partial.to_pylist()}
    near = pc.is_in(candles["start_ns"], value_set=partial["start_ns"].combine_chunks())
    untouched = candles.filter(pc.invert(near))
    met: list[dict[str, Any]] = []
    for row in candles.filter(near).to_pylist():
        part = parts.pop(_key(row), None)
        met.append(row if part is None else _merge_rows(row, part))
    met.extend(parts.values())
    return pa.concat_tables([untouched, pa.Table.from_pylist(met, schema=PARTIAL_SCHEMA)])


def _with_columns(trades: pa.Table, timeframe: str) -> pa.Table:
    """Sort trades by their key (`candles.candle_key`) and add what the sums are made of."""
    tie = pc.if_else(
        pc.equal(trades["trade_id"], 0),
        pc.add(pc.multiply(trades["log_offset"], FRAME_ROWS), trades["row_in_frame"]),
        trades["trade_id"],
    )
    trades = trades.append_column("tie", tie).sort_by([("exchange_ns", "ascending"), ("tie", "ascending")])
    wide = trades["amount"].cast(_AMOUNT)
    nothing = pa.scalar(Decimal(0), _AMOUNT)
    columns = {
        "start_ns": bucket_starts(trades["exchange_ns"], timeframe),
        "position": pa.array(range(trades.num_rows), pa.int64()),
        "wide_amount": wide,
        "bought": pc.if_else(pc.equal(trades["side"], BUY), wide, nothing),
        "quote": pc.multiply(trades["price"].cast(_PRICE), wide),
        "count": pc.add(pc.subtract(trades["last_id"].cast(_ID), trades["first_id"].cast(_ID)), _ONE),
    }
    for name, values in columns.items():
        trades = trades.append_column(name, values)
    return trades


def _candles(trades: pa.Table, groups: pa.Table, timeframe: str) -> pa.Table:
    first = trades.take(groups["position_first"])
    last = trades.take(groups["position_last"])
    count = groups.num_rows
    columns: dict[str, Any] = {
        "exchange": groups["exchange"],
        "symbol": groups["symbol"],
        "kind": groups["kind"],
        "timeframe": pa.repeat(timeframe, count),
        "start_ns": groups["start_ns"],
        "open": first["price"],
        "high": groups["price_max"],
        "low": groups["price_min"],
        "close": last["price"],
        **_totals(groups),
        "revision": pa.repeat(pa.scalar(0, pa.int64()), count),
        "open_key": _keys(first),
        "close_key": _keys(last),
    }
    return pa.table([_typed(columns[field.name], field.type) for field in PARTIAL_SCHEMA], schema=PARTIAL_SCHEMA)


def _totals(groups: pa.Table) -> dict[str, list[Any]]:
    sums = (groups[f"{name}_sum"].to_pylist() for name in ("wide_amount", "bought", "quote", "count"))
    rows = [totals(*values) for values in zip(*sums, strict=True)]
    return {name: [row[name] for row in rows] for name in rows[0]}


def _typed(values: Any, type_: pa.DataType) -> Any:
    return pa.array(values, type_) if isinstance(values, list) else values.cast(type_)


def _keys(trades: pa.Table) -> list[Decimal]:
    pairs = zip(trades["exchange_ns"].to_pylist(), trades["tie"].to_pylist(), strict=True)
    return [Decimal(time_ns * KEY_SHIFT + tie) for time_ns, tie in pairs]


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)


def _merge_rows(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    first = min(one, other, key=lambda row: row["open_key"])
    last = max(one, other, key=lambda row: row["close_key"])
    volume, bought, quote = (EXACT.add(one[name], other[name]) for name in ("volume", "buy_volume", "quote_exact"))
    return {
        **one,
        **totals(volume, bought, quote, one["trade_count"] + other["trade_count"]),
        "open": first["open"],
        "open_key": first["open_key"],
        "close": last["close"],
        "close_key": last["close_key"],
        "high": max(one["high"], other["high"]),
        "low": min(one["low"], other["low"]),
    }
