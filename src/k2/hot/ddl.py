"""The ClickHouse tables, views and candle expressions of the hot tier, derived from `schema.py`.

Row tables are plain MergeTree tables. Candles are tables of aggregate states, one per
timeframe, filled by a chain of materialized views: trades -> 1m -> 5m -> ... -> 1d.

Exactly once: every table of the chain has a deduplication window, so an insert that was
killed between two tables is completed, and never counted twice, when it is sent again
with the same token. Candle tables have no partitions: one insert makes one part in each,
which is stored whole or not at all.
"""

# ruff: noqa: S608 - the text comes from the declarations in schema.py

from __future__ import annotations

import itertools

from k2.candles import EXACT_TYPE, LARGEST_COUNT, largest
from k2.schema import (
    ARROW,
    CANDLES,
    FRAME_ROWS,
    HOT_ROW_TABLES,
    KEY_SHIFT,
    QUOTES,
    TIMEFRAMES,
    TRADES,
    Column,
    Table,
    Type,
)

DATABASE = "k2"

# A flush of the ingest makes one insert per table and day; only the last flush is ever sent
# again. The window must hold every insert of one flush: 10,000 days of one imported recording.
DEDUPLICATION_WINDOW = 10_000

# Merged parts stay this long. The default, 480 s, is a precaution against power cuts, for which K2 has the
# log; with a flush every second it holds thousands of parts in memory (about 100 MB more, measured).
OLD_PARTS_SECONDS = 60

# A partition is a day. An hour after the last insert into it, its parts become one: a question over the past
# then opens one part a day and table, where merging by size alone would leave about ten for ever.
CLOSED_DAY_SECONDS = 3_600
CLOSED_DAY = f"min_age_to_force_merge_seconds = {CLOSED_DAY_SECONDS}, min_age_to_force_merge_on_partition_only = 1"

CLICKHOUSE: dict[Type, str] = {
    Type.NAME: "LowCardinality(String)",
    Type.TEXT: "String",
    Type.BYTES: "String",
    Type.BOOL: "Bool",
    Type.INT: "Int64",
    Type.NS: "Int64",
    Type.DECIMAL: "Decimal(38, 12)",
    Type.WIDE: "Decimal(38, 18)",
}

# Measured on 41,646 recorded Binance trades (four files, spot and USD-M): 7.9 bytes a trade,
# against 35.8 with default codecs and 11.7 with Delta, ZSTD(1) alone. GCD takes out the
# constant factor (10^10 of a price with two decimals, 10^6 of a time in milliseconds).
CODECS: dict[Type, str] = {
    Type.NAME: "ZSTD(1)",
    Type.TEXT: "ZSTD(1)",
    Type.BYTES: "ZSTD(3)",
    Type.BOOL: "ZSTD(1)",
    Type.INT: "Delta, ZSTD(3)",
    Type.NS: "GCD, Delta, ZSTD(3)",
    Type.DECIMAL: "GCD, ZSTD(1)",
    Type.WIDE: "GCD, ZSTD(1)",
}

# Sums are kept wider than candles show them, and fitted on reading: see `k2.candles`.
_WIDE_AMOUNT = f"Decimal(76, {ARROW[Type.DECIMAL].scale})"
_WIDE_QUOTE = f"Decimal(76, {EXACT_TYPE.scale})"

_STATE_COLUMNS = (
    ("open", "AggregateFunction(argMin, Decimal(38, 12), Int128)"),
    ("close", "AggregateFunction(argMax, Decimal(38, 12), Int128)"),
    ("high", "SimpleAggregateFunction(max, Decimal(38, 12))"),
    ("low", "SimpleAggregateFunction(min, Decimal(38, 12))"),
    ("volume", f"SimpleAggregateFunction(sum, {_WIDE_AMOUNT})"),
    ("quote_volume", f"SimpleAggregateFunction(sum, {_WIDE_QUOTE})"),
    ("buy_volume", f"SimpleAggregateFunction(sum, {_WIDE_AMOUNT})"),
    ("trade_count", "SimpleAggregateFunction(sum, Int128)"),
    ("open_key", "SimpleAggregateFunction(min, Int128)"),
    ("close_key", "SimpleAggregateFunction(max, Int128)"),
    ("last_offset", "SimpleAggregateFunction(max, Int64)"),
)

_KEY = (
    f"toInt128(exchange_ns) * toInt128('{KEY_SHIFT}')"
    f" + if(trade_id != 0, toInt128(trade_id), toInt128(log_offset) * {FRAME_ROWS} + row_in_frame)"
)

# Widened before they are multiplied, subtracted and added: ClickHouse's sums wrap without a word.
_FROM_TRADES = (
    ("open", "argMinState(price, key)"),
    ("close", "argMaxState(price, key)"),
    ("high", "max(price)"),
    ("low", "min(price)"),
    ("volume", f"sum(CAST(amount, '{_WIDE_AMOUNT}'))"),
    ("quote_volume", f"sum(CAST(price, '{_WIDE_AMOUNT}') * amount)"),
    ("buy_volume", f"sum(CAST(if(side = 'buy', amount, 0), '{_WIDE_AMOUNT}'))"),
    ("trade_count", "sum(toInt128(last_id) - first_id + 1)"),
    ("open_key", "min(key)"),
    ("close_key", "max(key)"),
    ("last_offset", "max(log_offset)"),
)

_FROM_CANDLES = (
    ("open", "argMinMergeState(open)"),
    ("close", "argMaxMergeState(close)"),
    ("high", "max(high)"),
    ("low", "min(low)"),
    *((name, f"sum({name})") for name in ("volume", "quote_volume", "buy_volume", "trade_count")),
    ("open_key", "min(open_key)"),
    ("close_key", "max(close_key)"),
    ("last_offset", "max(last_offset)"),
)


def candle_table(timeframe: str) -> str:
    """Return the name of the table that holds the states of one timeframe."""
    return f"candles_{timeframe}"


QUOTED_SYMBOLS = "quoted_symbols"
CANDLE_TABLES = tuple(candle_table(timeframe) for timeframe in TIMEFRAMES)


def statements() -> list[str]:
    """Return the statements that make the whole hot tier, each harmless when repeated.

    The views come after every table, the last of the chain first, so that a chain which was
    only half made never passes rows into a shorter chain than the finished one.
    """
    timeframes = list(TIMEFRAMES)
    views = [_chained_view(finer, coarser) for finer, coarser in itertools.pairwise(timeframes)]
    return [
        *(row_table(table) for table in HOT_ROW_TABLES),
        *(_states_table(timeframe) for timeframe in timeframes),
        *reversed(views),
        _first_view(timeframes[0]),
        *_quoted_symbols(),
    ]


def dropped() -> list[str]:
    """Return the names of all views and tables, in the order they can be dropped."""
    made = [*CANDLE_TABLES, QUOTED_SYMBOLS]
    return [*(f"{table}_view" for table in made), *made, *(table.name for table in HOT_ROW_TABLES), "migrations"]


def row_table(table: Table) -> str:
    """Return the CREATE TABLE of one table of rows."""
    columns = [_column(column) for column in table.columns]
    columns.append("INDEX log_offset_range log_offset TYPE minmax GRANULARITY 1")
    return (
        f"CREATE TABLE IF NOT EXISTS {table.name}\n(\n    " + ",\n    ".join(columns) + "\n)\n"
        "ENGINE = MergeTree\n"
        f"PARTITION BY toYYYYMMDD(fromUnixTimestamp64Nano({table.time_column}, 'UTC'))\n"
        f"ORDER BY ({', '.join(table.sort)})\n"
        f"SETTINGS {_settings()}, {CLOSED_DAY}"
    )


def _column(column: Column) -> str:
    if column.derived_from:
        # Nanoseconds to microseconds by floor division, shown as a timestamp, stored nowhere.
        micros = f"intDiv({column.derived_from} - positiveModulo({column.derived_from}, 1000), 1000)"
        return f"{column.name} DateTime64(6, 'UTC') ALIAS fromUnixTimestamp64Micro({micros}, 'UTC')"
    return f"{column.name} {CLICKHOUSE[column.type]} CODEC({CODECS[column.type]})"


def _states_table(timeframe: str) -> str:
    columns = [
        *(f"{name} LowCardinality(String)" for name in ("exchange", "symbol", "kind")),
        f"start_ns Int64 CODEC({CODECS[Type.NS]})",
        *(f"{name} {kind}" for name, kind in _STATE_COLUMNS),
        "INDEX start_range start_ns TYPE minmax GRANULARITY 1",
    ]
    return (
        f"CREATE TABLE IF NOT EXISTS {candle_table(timeframe)}\n(\n    " + ",\n    ".join(columns) + "\n)\n"
        "ENGINE = AggregatingMergeTree\n"
        "ORDER BY (exchange, symbol, kind, start_ns)\n"
        f"SETTINGS {_settings()}"
    )


def _quoted_symbols() -> list[str]:
    """A table of the names in quotes, as rows of quotes would all have to be read to find them."""
    names = ("exchange", "symbol")
    columns = ", ".join(f"{name} {CLICKHOUSE[Type.NAME]}" for name in names)
    return [
        f"CREATE TABLE IF NOT EXISTS {QUOTED_SYMBOLS} ({columns}) ENGINE = ReplacingMergeTree\n"
        f"ORDER BY ({', '.join(names)})\nSETTINGS {_settings()}",
        f"CREATE MATERIALIZED VIEW IF NOT EXISTS {QUOTED_SYMBOLS}_view TO {QUOTED_SYMBOLS} AS\n"
        f"SELECT DISTINCT {', '.join(names)} FROM {QUOTES.name}",
    ]


def _settings() -> str:
    """Settings of every table. Statistics of columns, 29 kB in each merged part of trades, would serve no query."""
    return (
        f"non_replicated_deduplication_window = {DEDUPLICATION_WINDOW}, old_parts_lifetime = {OLD_PARTS_SECONDS},"
        " auto_statistics_types = ''"
    )


def bucket(column: str, timeframe: str) -> str:
    """Return the expression of the start of the bucket a time falls into."""
    return f"({column} - positiveModulo({column}, {TIMEFRAMES[timeframe]}))"


def _first_view(timeframe: str) -> str:
    return (
        _view_head(timeframe)
        + f"SELECT exchange, symbol, kind, start_ns, {_aliased(_FROM_TRADES)}\n"
        + f"FROM (SELECT *, {bucket('exchange_ns', timeframe)} AS start_ns, {_KEY} AS key"
        + f" FROM {TRADES.name} WHERE NOT off_market)\n"
        + "GROUP BY exchange, symbol, kind, start_ns"
    )


def _chained_view(finer: str, coarser: str) -> str:
    return (
        _view_head(coarser)
        + f"SELECT exchange, symbol, kind, {bucket('c.start_ns', coarser)} AS start_ns, "
        + ", ".join(f"{_of_source(expression)} AS {name}" for name, expression in _FROM_CANDLES)
        + f"\nFROM {candle_table(finer)} AS c\n"
        + "GROUP BY exchange, symbol, kind, start_ns"
    )


def _of_source(expression: str) -> str:
    """Name the source in `max(high)`: without it, `high` would be the column being made."""
    function, _, column = expression.partition("(")
    return f"{function}(c.{column}"


def _view_head(timeframe: str) -> str:
    return f"CREATE MATERIALIZED VIEW IF NOT EXISTS {candle_table(timeframe)}_view TO {candle_table(timeframe)} AS\n"


def _aliased(pairs: tuple[tuple[str, str], ...]) -> str:
    return ", ".join(f"{expression} AS {name}" for name, expression in pairs)


# Finished values of the states, under short names: ClickHouse would take an alias equal to
# the column's name for the argument of the next aggregate.
_FINISHED = (
    "argMinMerge(open) AS o, argMaxMerge(close) AS c, max(high) AS h, min(low) AS l, sum(volume) AS v,"
    " sum(quote_volume) AS q, sum(buy_volume) AS b, sum(trade_count) AS n, min(open_key) AS ok, max(close_key) AS ck,"
    " max(last_offset) AS lo"
)


def _fitted(expression: str, scale: int, type_: Type) -> str:
    """Cut a wide decimal of that scale to the digits of a column, at most its largest number."""
    most = f"toDecimal256('{largest(type_):f}', {scale})"
    return f"CAST(least({expression}, {most}), '{CLICKHOUSE[type_]}')"


_VOLUME = _fitted("v", ARROW[Type.DECIMAL].scale, Type.DECIMAL)
_QUOTE_VOLUME = _fitted("q", EXACT_TYPE.scale, Type.WIDE)
_NO_DIVISOR = f"CAST(1, '{CLICKHOUSE[Type.DECIMAL]}')"  # both branches of an if are computed
_VWAP_SCALE = ARROW[Type.WIDE].scale

_VALUES = {
    "open": "o",
    "high": "h",
    "low": "l",
    "close": "c",
    "volume": _VOLUME,
    "quote_volume": _QUOTE_VOLUME,
    "buy_volume": _fitted("b", ARROW[Type.DECIMAL].scale, Type.DECIMAL),
    "vwap": _fitted(
        f"divideDecimal({_QUOTE_VOLUME}, if(v = 0, {_NO_DIVISOR}, {_VOLUME}), {_VWAP_SCALE})", _VWAP_SCALE, Type.WIDE
    ),
    "trade_count": f"toInt64(least(n, toInt128('{LARGEST_COUNT}')))",
    "revision": "toInt64(0)",
}


def candles_select(timeframe: str, where: str, *, keys: bool) -> str:
    """Return the SELECT of finished candles of one timeframe; `keys` adds what merging needs (`Hot.candles`).

    The states are finished in a subquery, so that every column of `schema.CANDLES` can be
    named as it is declared there.
    """
    values = {**_VALUES, "timeframe": f"'{timeframe}'"}
    columns = [f"{values.get(name, name)} AS {name}" for name in CANDLES.column_names]
    if keys:
        columns += [f"reinterpret({short}, 'Decimal(38, 0)') AS {name}" for short, name in _KEYS]
        columns += ["q AS quote_exact", "lo AS last_offset"]
    return (
        f"SELECT {', '.join(columns)} FROM (SELECT exchange, symbol, kind, start_ns, {_FINISHED}"
        f" FROM {candle_table(timeframe)} WHERE {where} GROUP BY exchange, symbol, kind, start_ns)"
    )


_KEYS = (("ok", "open_key"), ("ck", "close_key"))
