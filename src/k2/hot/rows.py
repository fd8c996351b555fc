"""What every hot adapter checks and returns: declared tables, conforming rows, the schema of candles."""

from __future__ import annotations

import pyarrow as pa

from k2.candles import PARTIAL_SCHEMA
from k2.errors import Rejected, UnknownName, nearest
from k2.model import Selection
from k2.schema import CANDLES, HOT_ROW_TABLES, TIMEFRAMES, Table, arrow_schema

CANDLE_SCHEMA = arrow_schema(CANDLES)
KEYED_CANDLE_SCHEMA: pa.Schema = PARTIAL_SCHEMA.append(pa.field("last_offset", pa.int64(), nullable=False))


def hot_table(name: str) -> Table:
    """Return the declaration of a table of rows that hot keeps; raises UnknownName."""
    known = {table.name: table for table in HOT_ROW_TABLES}
    if name not in known:
        raise UnknownName(f"hot keeps no table {name!r} of rows{nearest(name, known)}")
    return known[name]


def require_column(table: Table, name: str) -> None:
    """Refuse a selection by a column the table does not have."""
    if name not in table.column_names:
        raise Rejected(f"table {table.name!r} has no column {name!r} to select by")


def check_candle_question(timeframe: str, selection: Selection) -> None:
    """Refuse a timeframe that is not kept, and a knowledge time, which the states do not remember."""
    if timeframe not in TIMEFRAMES:
        raise UnknownName(f"there is no timeframe {timeframe!r}{nearest(timeframe, TIMEFRAMES)}")
    if selection.table != CANDLES.name:
        raise Rejected(f"candles: selection of table {selection.table!r}, expected 'candles'")
    if selection.logged_before_ns is not None:
        raise Rejected("candles in hot cannot be cut by knowledge time; make them from the trades logged before it")


def conformed(table: Table, rows: pa.Table) -> pa.Table:
    """Return the rows with exactly the table's columns and types, or raise Rejected."""
    schema = arrow_schema(table)
    if set(rows.schema.names) != set(schema.names):
        differing = sorted(set(rows.schema.names) ^ set(schema.names))
        raise Rejected(f"rows for hot table {table.name!r}: columns {differing} are missing or too many")
    rows = rows.select(schema.names)
    for field, column in zip(schema, rows.columns, strict=True):
        if column.type != field.type:
            raise Rejected(
                f"rows for hot table {table.name!r}: column {field.name!r} is {column.type}, expected {field.type}"
            )
        if column.null_count:
            raise Rejected(f"rows for hot table {table.name!r}: column {field.name!r} has {column.null_count} nulls")
    return rows.cast(schema)
