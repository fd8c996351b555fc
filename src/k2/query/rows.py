"""Selecting, ordering and cutting rows in memory: pure functions on Arrow tables."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from k2 import sorting
from k2.errors import Rejected
from k2.model import Positions, Selection
from k2.query.plan import Cursor, order
from k2.schema import Table, arrow_schema, coded_schema


def shaped(rows: pa.Table, table: Table) -> pa.Table:
    """Give rows exactly the declared columns and types, whatever an engine made of them."""
    schema = arrow_schema(table)
    return rows if rows.schema.equals(schema) else rows.select(schema.names).cast(schema)


def fitted(rows: pa.Table, table: Table) -> pa.Table:
    """Give rows exactly the declared columns and types, but leave names that are dictionaries as they are."""
    schema = coded_schema(table, rows.schema)
    return rows if rows.schema.equals(schema) else rows.select(schema.names).cast(schema)


def from_offsets(rows: pa.Table, start: Positions | None) -> pa.Table:
    """Keep the rows at or after an offset, per partition."""
    if rows.num_rows == 0 or not start:
        return rows
    for partition, offset in start.items():
        below = pc.and_(pc.equal(rows["log_partition"], partition), pc.less(rows["log_offset"], offset))
        rows = rows.filter(pc.invert(below))
    return rows


def select(rows: pa.Table, table: Table, selection: Selection) -> pa.Table:
    """Apply a selection, without its limit, to rows in memory, and sort them."""
    bounds = [
        (selection.symbol, "symbol", pc.equal),
        (selection.exchange, "exchange", pc.equal),
        (selection.start_ns, table.time_column, pc.greater_equal),
        (selection.end_ns, table.time_column, pc.less),
        (selection.logged_before_ns, "logged_ns", pc.less),
    ]
    for value, column, holds in bounds:
        if value is not None and rows.num_rows:
            rows = rows.filter(holds(rows[column], value))
    return in_order(shaped(rows, table), table)


def cut(table: Table, parts: Sequence[pa.Table], selection: Selection) -> pa.Table:
    """Put sorted parts together in `order(table)`, and keep the first or the newest `limit` rows."""
    rows = _joined(table, [part for part in parts if part.num_rows])
    if not selection.limit or rows.num_rows <= selection.limit:
        return rows
    return rows.slice(rows.num_rows - selection.limit if selection.newest else 0, selection.limit)


def _joined(table: Table, parts: list[pa.Table]) -> pa.Table:
    """Put sorted parts into one order; mostly one part ends before the next begins."""
    if not parts:
        return arrow_schema(table).empty_table()
    spans = [(part[table.time_column][0].as_py(), part[table.time_column][-1].as_py()) for part in parts]
    if any(not part.schema.equals(parts[0].schema) for part in parts):  # names as text, and as dictionaries
        parts = [shaped(part, table) for part in parts]
    ranked = sorted(range(len(parts)), key=lambda i: spans[i])
    rows = pa.concat_tables([parts[i] for i in ranked])
    apart = all(spans[a][1] < spans[b][0] for a, b in pairwise(ranked))
    return rows if apart else in_order(rows, table)


def in_order(rows: pa.Table, table: Table) -> pa.Table:
    """Sort rows by `order(table)`."""
    if any(pa.types.is_dictionary(kind) for kind in rows.schema.types):  # which Arrow does not sort by
        return sorting.in_order(rows, order(table))
    return rows.sort_by([(column, "ascending") for column in order(table)])


def narrow(selection: Selection, table: Table, newer: Sequence[pa.Table]) -> Selection:
    """Tighten the time bounds for cold when the newer tiers alone already fill the limit.

    A row of cold that belongs to the answer is then no further out than the last one of theirs.
    """
    times = pa.chunked_array([chunk for part in newer for chunk in part[table.time_column].chunks], pa.int64())
    if not selection.limit or len(times) < selection.limit:
        return selection
    direction = "descending" if selection.newest else "ascending"
    ranked = times.take(pc.array_sort_indices(times, order=direction).slice(0, selection.limit))
    outermost = ranked[-1].as_py()
    if selection.newest:
        return msgspec.structs.replace(selection, start_ns=outermost)
    return msgspec.structs.replace(selection, end_ns=outermost + 1)


def behind(rows: pa.Table, cursor: Cursor, table: Table) -> pa.Table:
    """Keep the rows behind a cursor; rows are sorted by `order(table)`."""
    if cursor.table != table.name:
        raise Rejected(f"cursor of {cursor.table} given for {table.name}")
    columns = order(table)
    not_before = rows.filter(pc.greater_equal(rows[columns[0]], cursor.time_ns))
    keys = zip(*(not_before[column].to_pylist() for column in columns), strict=True)
    first = next((i for i, key in enumerate(keys) if key > cursor.key), not_before.num_rows)
    return not_before.slice(first)
