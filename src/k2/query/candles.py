"""Candles from trades, and the merging of two parts of one candle: pure functions, exact decimals."""

from __future__ import annotations

from decimal import Decimal, localcontext
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from k2.model import BUY, TRADE
from k2.schema import CANDLES, TIMEFRAMES, arrow_schema

KEY = ("exchange", "symbol", "kind", "start_ns")
"""What tells candles of one timeframe apart."""

PARTIAL_SCHEMA: pa.Schema = (
    arrow_schema(CANDLES)
    .append(pa.field("open_key", pa.decimal128(38, 0), nullable=False))
    .append(pa.field("close_key", pa.decimal128(38, 0), nullable=False))
)
"""Columns of `Hot.candles`: a candle and the keys of its first and last trade, so that it can be merged."""

_KEY_SHIFT = 2**63  # a key is exchange_ns * 2**63 + trade_id, see `hot.base.Hot.candles`
_OFFSET_SHIFT = 2**16
# price x amount has 24 decimals; 76 digits hold the product and its sum.
_FACTOR = pa.decimal256(37, 12)
_AMOUNT = pa.decimal256(38, 12)
_DIGITS = 100  # more than any sum, product or shifted value here needs; the default 28 would round


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
    """Sort trades by (exchange_ns, trade_id) and add what the sums are made of."""
    tie = pc.if_else(
        pc.equal(trades["trade_id"], 0),
        pc.add(pc.multiply(trades["log_offset"], _OFFSET_SHIFT), trades["row_in_frame"]),
        trades["trade_id"],
    )
    trades = trades.append_column("tie", tie).sort_by([("exchange_ns", "ascending"), ("tie", "ascending")])
    wide = trades["amount"].cast(_AMOUNT)
    nothing = pa.scalar(Decimal(0), _AMOUNT)
    covered = pc.add(pc.subtract(trades["last_id"], trades["first_id"]), 1)
    columns = {
        "start_ns": bucket_starts(trades["exchange_ns"], timeframe),
        "position": pa.array(range(trades.num_rows), pa.int64()),
        "wide_amount": wide,
        "bought": pc.if_else(pc.equal(trades["side"], BUY), wide, nothing),
        "quote": pc.multiply(trades["price"].cast(_FACTOR), wide),
        "count": pc.if_else(pc.equal(trades["kind"], TRADE), 1, covered),
    }
    for name, values in columns.items():
        trades = trades.append_column(name, values)
    return trades


def _candles(trades: pa.Table, groups: pa.Table, timeframe: str) -> pa.Table:
    first = trades.take(groups["position_first"])
    last = trades.take(groups["position_last"])
    volume = groups["wide_amount_sum"].cast(pa.decimal128(38, 12))
    quote_volume = groups["quote_sum"].cast(pa.decimal128(38, 18), safe=False)  # unsafe: cuts digits, as hot does
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
        "volume": volume,
        "quote_volume": quote_volume,
        "buy_volume": groups["bought_sum"].cast(pa.decimal128(38, 12)),
        "vwap": [vwap(q, v) for q, v in zip(quote_volume.to_pylist(), volume.to_pylist(), strict=True)],
        "trade_count": groups["count_sum"],
        "revision": pa.repeat(pa.scalar(0, pa.int64()), count),
        "open_key": _keys(first),
        "close_key": _keys(last),
    }
    return pa.table([_typed(columns[field.name], field.type) for field in PARTIAL_SCHEMA], schema=PARTIAL_SCHEMA)


def _typed(values: Any, type_: pa.DataType) -> Any:
    return pa.array(values, type_) if isinstance(values, list) else values.cast(type_)


def _keys(trades: pa.Table) -> list[Decimal]:
    pairs = zip(trades["exchange_ns"].to_pylist(), trades["tie"].to_pylist(), strict=True)
    return [Decimal(time_ns * _KEY_SHIFT + tie) for time_ns, tie in pairs]


def vwap(quote_volume: Decimal, volume: Decimal) -> Decimal:
    """Return quote_volume / volume, cut at 18 decimals; 0 where nothing was traded."""
    if not volume:
        return Decimal(0)
    with localcontext(prec=_DIGITS):
        return Decimal(int(quote_volume.scaleb(30)) // int(volume.scaleb(12))).scaleb(-18)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)


def _merge_rows(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    first = min(one, other, key=lambda row: row["open_key"])
    last = max(one, other, key=lambda row: row["close_key"])
    with localcontext(prec=_DIGITS):
        sums = {name: one[name] + other[name] for name in ("volume", "quote_volume", "buy_volume", "trade_count")}
    return {
        **{name: one[name] for name in PARTIAL_SCHEMA.names},
        **sums,
        "open": first["open"],
        "open_key": first["open_key"],
        "close": last["close"],
        "close_key": last["close_key"],
        "high": max(one["high"], other["high"]),
        "low": min(one["low"], other["low"]),
        "vwap": vwap(sums["quote_volume"], sums["volume"]),
    }
