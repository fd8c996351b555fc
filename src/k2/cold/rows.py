"""What rows must be before they are stored, whatever stores them."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from k2.errors import NotSuccessor, Rejected, UnknownName, nearest
from k2.model import Positions
from k2.schema import TABLES, Table, arrow_schema


def cold_table(name: str) -> Table:
    """Return the declaration of a cold table; UnknownName when there is none of that name."""
    known = {n: t for n, t in TABLES.items() if t.cold}
    if name not in known:
        raise UnknownName(f"cold: no table {name!r}{nearest(name, known)}")
    return known[name]


def arranged(rows: pa.Table, table: Table) -> pa.Table:
    """Return the rows as stored: declared types, derived timestamps by floor division, sorted by `Table.sort`."""
    stored = conforming(rows, table).sort_by([(c, "ascending") for c in table.sort])
    columns = [
        stored[c.name] if not c.derived_from else _floor_to_timestamp(stored[c.derived_from]) for c in table.columns
    ]
    return pa.Table.from_arrays(columns, schema=arrow_schema(table, derived=True))


def conforming(rows: pa.Table, table: Table) -> pa.Table:
    """Return the rows in exactly the declared schema; Rejected when they do not fit it."""
    schema = arrow_schema(table)
    if sorted(rows.column_names) != sorted(schema.names):
        odd = sorted(set(rows.column_names) ^ set(schema.names))
        raise Rejected(f"cold: rows of {table.name!r} do not have its columns: {', '.join(odd)} differ")
    empty = [n for n in schema.names if rows[n].null_count]
    if empty:
        raise Rejected(f"cold: rows of {table.name!r} hold nulls in {', '.join(empty)}; every column is required")
    try:
        return rows.select(schema.names).cast(schema)
    except pa.ArrowException as error:
        raise Rejected(f"cold: rows of {table.name!r} do not fit its types: {error}") from error


def _floor_to_timestamp(ns: pa.ChunkedArray) -> pa.ChunkedArray:
    """Nanoseconds to microseconds, rounding down."""
    return floor_divide(ns, 1000).cast(pa.timestamp("us", tz="UTC"))


def floor_divide(numbers: pa.ChunkedArray, divisor: int) -> pa.ChunkedArray:
    """Divide rounding down, also before 1970 (arrow's division rounds towards zero)."""
    quotient = pc.divide(numbers, divisor)
    below = pc.less(numbers, pc.multiply(quotient, divisor)).cast(pa.int64())
    return pc.subtract(quotient, below)


def check_successor(table: str, watermark: Positions, start: Positions, end: Positions) -> None:
    """Raise NotSuccessor unless every range starts at the watermark, Rejected when one runs backwards."""
    for partition in sorted({*start, *end}):
        committed, given = watermark.get(partition, 0), start.get(partition, 0)
        if given != committed:
            raise NotSuccessor(
                f"append to cold table {table!r}: the range of {partition!r} starts at {given}, "
                f"but {committed} is committed; pin again and go on from there"
            )
        if end.get(partition, given) < given:
            raise Rejected(f"append to cold table {table!r}: {partition!r} ends at {end[partition]}, before {given}")


def check_offsets(rows: pa.Table, table: Table, start: Positions, end: Positions) -> None:
    """Raise Rejected when a row lies outside the range that is committed with it."""
    if "log_offset" not in table.column_names or not rows.num_rows:
        return
    bounds = rows.group_by("log_partition").aggregate([("log_offset", "min"), ("log_offset", "max")])
    for found in bounds.to_pylist():
        partition, low, high = found["log_partition"], found["log_offset_min"], found["log_offset_max"]
        first, last = start.get(partition, 0), end.get(partition, 0) - 1
        if low < first or high > last:
            raise Rejected(
                f"append to cold table {table.name!r}: rows of {partition!r} have offsets {low} to {high}, "
                f"outside the range {first} to {last} they are committed with"
            )


def with_revision(rows: pa.Table, number: int) -> pa.Table:
    """Return candles carrying the number of the commit that writes them."""
    if "revision" not in rows.column_names:
        return rows
    at = rows.column_names.index("revision")
    return rows.set_column(at, rows.schema.field(at), pa.array([number] * rows.num_rows, pa.int64()))
