"""Every table, declared once: columns with type, unit and meaning, keys and sort order.

The ClickHouse DDL (`hot/ddl.py`), the Iceberg schema (`cold/iceberg.py`), the Arrow schema
(here) and the data dictionary page (here) are derived from these declarations.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import pyarrow as pa


class Type(Enum):
    """Logical column types. DECIMAL holds prices and amounts, WIDE products and quotients of them."""

    NAME = "name"  # short repeated text: exchange, symbol, side
    TEXT = "text"
    BYTES = "bytes"
    BOOL = "bool"
    INT = "int"  # signed 64 bit
    NS = "ns"  # signed 64 bit, nanoseconds UTC since 1970
    TIMESTAMP = "timestamp"  # microseconds UTC, derived from an NS column by floor division
    DECIMAL = "decimal"  # decimal(38,12)
    WIDE = "wide"  # decimal(38,18)


ARROW: dict[Type, pa.DataType] = {
    Type.NAME: pa.string(),
    Type.TEXT: pa.string(),
    Type.BYTES: pa.binary(),
    Type.BOOL: pa.bool_(),
    Type.INT: pa.int64(),
    Type.NS: pa.int64(),
    Type.TIMESTAMP: pa.timestamp("us", tz="UTC"),
    Type.DECIMAL: pa.decimal128(38, 12),
    Type.WIDE: pa.decimal128(38, 18),
}


@dataclass(frozen=True)
class Column:
    """One column. `derived_from` names the NS column a TIMESTAMP is computed from (never stored in hot)."""

    name: str
    type: Type
    doc: str
    derived_from: str = ""


@dataclass(frozen=True)
class Table:
    """One table. `key` identifies a row for its users, `sort` is the physical order in both tiers.

    `time_column` is the NS column time bounds apply to and both tiers partition by (its day).
    """

    name: str
    doc: str
    columns: tuple[Column, ...]
    key: tuple[str, ...]
    sort: tuple[str, ...]
    time_column: str
    hot: bool = True
    cold: bool = True

    @property
    def column_names(self) -> tuple[str, ...]:
        """Names of the stored columns, without derived ones."""
        return tuple(c.name for c in self.columns if not c.derived_from)


_LINEAGE = (
    Column("log_partition", Type.NAME, "Partition of the log the row was made from"),
    Column("log_offset", Type.INT, "Offset of the frame in that partition; the unit of progress everywhere"),
    Column("row_in_frame", Type.INT, "Position of the row within the rows of its frame, from 0"),
    Column("logged_ns", Type.NS, "When the log made the frame durable: K2's knowledge time, used by `as_of`"),
)
_SOURCE = Column("source", Type.NAME, "live | import | backfill: how the frame came to K2")
_EXCHANGE = Column("exchange", Type.NAME, "binance, binance-usdm, kraken, coinbase, or a plugin's name")
_SYMBOL = Column("symbol", Type.NAME, "Canonical symbol, BASE-QUOTE; perpetual futures end in -PERP")
_RECEIVED = Column("received_ns", Type.NS, "When the frame was received, by the receiver's clock")

TRADES = Table(
    name="trades",
    doc="Every trade the exchanges reported, each once.",
    columns=(
        _EXCHANGE,
        _SYMBOL,
        Column("trade_id", Type.INT, "The exchange's own id of the trade (of the aggregate); 0 where it gives none"),
        Column("kind", Type.NAME, "trade (a single trade) | aggregate (several, see first_id and last_id)"),
        Column("first_id", Type.INT, "First single trade covered, inclusive; equals trade_id for a single trade"),
        Column("last_id", Type.INT, "Last single trade covered, inclusive; equals trade_id for a single trade"),
        Column("price", Type.DECIMAL, "Price in quote currency, exact"),
        Column("amount", Type.DECIMAL, "Amount in base currency, exact"),
        Column("side", Type.NAME, "buy | sell: the side of the taker"),
        Column("off_market", Type.BOOL, "The exchange marks it as outside the market; left out of candles"),
        Column("occurrence", Type.INT, "Counts equal trades without id in one frame, from 0"),
        Column("exchange_ns", Type.NS, "When the trade happened, by the exchange's clock, to its full precision"),
        Column("exchange_time", Type.TIMESTAMP, "exchange_ns in microseconds", derived_from="exchange_ns"),
        _RECEIVED,
        _SOURCE,
        *_LINEAGE,
    ),
    key=("exchange", "symbol", "kind", "trade_id", "exchange_ns", "price", "amount", "side", "occurrence"),
    sort=("exchange", "symbol", "exchange_ns", "trade_id", "log_offset", "row_in_frame"),
    time_column="exchange_ns",
)

QUOTES = Table(
    name="quotes",
    doc="Best bid and best ask, one row per change the exchanges reported.",
    columns=(
        _EXCHANGE,
        _SYMBOL,
        Column("bid_price", Type.DECIMAL, "Best bid, exact"),
        Column("bid_amount", Type.DECIMAL, "Amount at the best bid, in base currency, exact"),
        Column("ask_price", Type.DECIMAL, "Best ask, exact"),
        Column("ask_amount", Type.DECIMAL, "Amount at the best ask, in base currency, exact"),
        Column("update_id", Type.INT, "The exchange's number of the update; 0 where it gives none"),
        Column("exchange_ns", Type.NS, "The exchange's time of the update; 0 where it gives none"),
        _RECEIVED,
        Column("received_time", Type.TIMESTAMP, "received_ns in microseconds", derived_from="received_ns"),
        _SOURCE,
        *_LINEAGE,
    ),
    key=("log_partition", "log_offset", "row_in_frame"),
    sort=("exchange", "symbol", "received_ns", "log_offset", "row_in_frame"),
    time_column="received_ns",
)

GAPS = Table(
    name="gaps",
    doc="Holes in the trade ids of a symbol: a row when ids turn out missing, a row for each part filled later.",
    columns=(
        _EXCHANGE,
        _SYMBOL,
        Column("kind", Type.NAME, "trade | aggregate: whose ids"),
        Column(
            "status",
            Type.NAME,
            "open (these ids are missing) | filled (these arrived after all) | given_up (too many holes to follow)",
        ),
        Column("first_id", Type.INT, "First id concerned, inclusive"),
        Column("last_id", Type.INT, "Last id concerned, inclusive"),
        Column("missing", Type.INT, "Number of ids concerned: last_id - first_id + 1"),
        Column(
            "cause", Type.NAME, "reconnect | skipped | import | backfill: what stood between the neighbours in the log"
        ),
        Column("received_ns", Type.NS, "When the frame that showed it was received"),
        Column("received_time", Type.TIMESTAMP, "received_ns in microseconds", derived_from="received_ns"),
        *_LINEAGE,
    ),
    key=("log_partition", "log_offset", "row_in_frame"),
    sort=("exchange", "symbol", "received_ns", "log_offset", "row_in_frame"),
    time_column="received_ns",
)

DEAD_LETTERS = Table(
    name="dead_letters",
    doc="Frames, or rows of frames, that could not be used: kept whole, with the reason.",
    columns=(
        _EXCHANGE,
        Column(
            "reason",
            Type.NAME,
            "bad_frame, parser_failed, corrupt_log, given_up_log, id_reused, "
            "bad_price, bad_amount, bad_side or bad_time",
        ),
        Column("detail", Type.TEXT, "What was wrong, with the value"),
        Column("frame", Type.BYTES, "The frame as received, on the first dead letter of the frame"),
        _RECEIVED,
        Column("received_time", Type.TIMESTAMP, "received_ns in microseconds", derived_from="received_ns"),
        _SOURCE,
        *_LINEAGE,
    ),
    key=("log_partition", "log_offset", "row_in_frame"),
    sort=("exchange", "received_ns", "log_offset", "row_in_frame"),
    time_column="received_ns",
)

FRAMES = Table(
    name="frames",
    doc="Every record of the log, as received: the evidence everything else can be made from again.",
    columns=(
        _EXCHANGE,
        Column("kind", Type.NAME, "frame | answer | opened | subscribed | closed"),
        Column("connection", Type.NAME, "The socket, named within its capture process"),
        Column("epoch", Type.INT, "Rises with each opening of the connection, also over restarts"),
        Column("counter", Type.INT, "Counts the frames within one epoch, from 0"),
        Column("data", Type.BYTES, "The bytes as received"),
        Column("origin", Type.TEXT, "URL, on opened and answer records"),
        _RECEIVED,
        Column("received_time", Type.TIMESTAMP, "received_ns in microseconds", derived_from="received_ns"),
        _SOURCE,
        *_LINEAGE,
    ),
    key=("log_partition", "log_offset"),
    sort=("exchange", "log_offset"),
    time_column="received_ns",
    hot=False,
)

CANDLES = Table(
    name="candles",
    doc=(
        "Candles of all timeframes. Hot keeps one table of aggregate states per timeframe (candles_1m ... candles_1d); "
        "cold keeps closed candles, the highest revision of a bucket being the valid one."
    ),
    columns=(
        _EXCHANGE,
        _SYMBOL,
        Column("kind", Type.NAME, "trade | aggregate: made from single trades or from aggregates, never mixed"),
        Column("timeframe", Type.NAME, "1m | 5m | 15m | 30m | 1h | 1d"),
        Column("start_ns", Type.NS, "Start of the bucket, inclusive"),
        Column("start_time", Type.TIMESTAMP, "start_ns in microseconds", derived_from="start_ns"),
        Column("open", Type.DECIMAL, "Price of the first trade by (exchange_ns, trade_id)"),
        Column("high", Type.DECIMAL, "Highest price"),
        Column("low", Type.DECIMAL, "Lowest price"),
        Column("close", Type.DECIMAL, "Price of the last trade by (exchange_ns, trade_id)"),
        Column("volume", Type.DECIMAL, "Sum of amounts, base currency"),
        Column("quote_volume", Type.WIDE, "Sum of price x amount, quote currency, exact to 18 decimals"),
        Column("buy_volume", Type.DECIMAL, "Sum of amounts whose taker bought"),
        Column("vwap", Type.WIDE, "quote_volume / volume, cut (not rounded) at 18 decimals"),
        Column("trade_count", Type.INT, "Number of single trades; an aggregate counts last_id - first_id + 1"),
        Column("revision", Type.INT, "0 in hot; in cold the number of the commit that wrote the row"),
    ),
    key=("exchange", "symbol", "kind", "timeframe", "start_ns"),
    sort=("exchange", "symbol", "timeframe", "kind", "start_ns", "revision"),
    time_column="start_ns",
)

TABLES: dict[str, Table] = {t.name: t for t in (TRADES, QUOTES, GAPS, DEAD_LETTERS, FRAMES, CANDLES)}

HOT_ROW_TABLES = (TRADES, QUOTES, GAPS, DEAD_LETTERS)
"""Tables ingest writes to hot row by row, and offload moves to cold by log offset."""

_MINUTE_NS = 60 * 1_000_000_000
TIMEFRAMES: dict[str, int] = {
    "1m": _MINUTE_NS,
    "5m": 5 * _MINUTE_NS,
    "15m": 15 * _MINUTE_NS,
    "30m": 30 * _MINUTE_NS,
    "1h": 60 * _MINUTE_NS,
    "1d": 1440 * _MINUTE_NS,
}
"""Timeframe -> length in nanoseconds; each is a multiple of the one before, so views can be chained."""

KEY_SHIFT = 2**63
"""A candle's trades are ordered by exchange_ns * KEY_SHIFT + (trade_id, or where there is none, place in the log)."""

FRAME_ROWS = 2**16
"""Place in the log = log_offset * FRAME_ROWS + row_in_frame."""


def arrow_schema(table: Table, *, derived: bool = False) -> pa.Schema:
    """Return the Arrow schema of a table, all columns non-nullable; with `derived` the timestamps too."""
    return pa.schema(
        [pa.field(c.name, ARROW[c.type], nullable=False) for c in table.columns if derived or not c.derived_from]
    )


def coded_schema(table: Table, given: pa.Schema) -> pa.Schema:
    """Return `arrow_schema(table)`, but columns that are dictionaries in `given` have its type."""
    types = {field.name: field.type for field in given if pa.types.is_dictionary(field.type)}
    return pa.schema([field.with_type(types.get(field.name, field.type)) for field in arrow_schema(table)])


_UNITS = {Type.NS: "nanoseconds UTC since 1970", Type.TIMESTAMP: "microseconds UTC"}


def dictionary_markdown() -> str:
    """Return the data dictionary page, `docs/data-dictionary.md`."""
    lines = ["# Data dictionary", "", "Derived from `src/k2/schema.py` by `make docs`; do not edit.", ""]
    for table in TABLES.values():
        tiers = " and ".join(name for name, on in (("hot", table.hot), ("cold", table.cold)) if on)
        lines += [f"## {table.name}", "", f"{table.doc} Kept in {tiers}.", ""]
        lines += [
            f"Key: `{', '.join(table.key)}`. Sorted by `{', '.join(table.sort)}`. "
            f"Time bounds apply to `{table.time_column}`.",
            "",
        ]
        lines += ["| column | type | unit | meaning |", "|---|---|---|---|"]
        for c in table.columns:
            lines.append(f"| `{c.name}` | {ARROW[c.type]} | {_UNITS.get(c.type, '')} | {c.doc.replace('|', '/')} |")
        lines.append("")
    return "\n".join(lines)
