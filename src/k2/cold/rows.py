"""What rows must be before they are stored, whatever stores them."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from k2.errors import NotSuccessor, Rejected, UnknownName, nearest
from k2.model import Positions
from k2.schema import ARROW, TABLES, Column, Table, Type, arrow_schema
from k2.sorting import by_keys

NAMES = pa.dictionary(pa.int32(), pa.string())
"""How names are held on their way into a file; the file itself knows text only."""


def cold_table(name: str) -> Table:
    """Return the declaration of a cold table; UnknownName when there is none of that name."""
    known = {n: t for n, t in TABLES.items() if t.cold}
    if name not in known:
        raise UnknownName(f"cold: no table {name!r}{nearest(name, known)}")
    return known[name]


def arranged(rows: pa.Table, table: Table) -> pa.Table:
    """Return the rows as stored: declared types, names as dictionaries, derived timestamps, sorted by `Table.sort`.

    Timestamps are rounded down. Rows that come in their order are not copied.
    """
    stored = by_keys(conforming(rows, table), table.sort)
    columns = [
        stored[c.name] if not c.derived_from else _floor_to_timestamp(stored[c.derived_from]) for c in table.columns
    ]
    fields = [pa.field(c.name, _stored_type(c), nullable=False) for c in table.columns]
    return pa.Table.from_arrays(columns, schema=pa.schema(fields))


def conforming(rows: pa.Table, table: Table) -> pa.Table:
    """Return the rows in the declared columns, names as dictionaries; Rejected when they do not fit."""
    schema = arrow_schema(table)
    if sorted(rows.column_names) != sorted(schema.names):
        odd = sorted(set(rows.column_names) ^ set(schema.names))
        raise Rejected(f"cold: rows of {table.name!r} do not have its columns: {', '.join(odd)} differ")
    declared = [c for c in table.columns if not c.derived_from]
    empty = [c.name for c in declared if _has_nulls(rows[c.name])]
    if empty:
        raise Rejected(f"cold: rows of {table.name!r} hold nulls in {', '.join(empty)}; every column is required")
    try:
        columns = [_names(rows[c.name]) if c.type is Type.NAME else rows[c.name].cast(ARROW[c.type]) for c in declared]
    except pa.ArrowException as error:
        raise Rejected(f"cold: rows of {table.name!r} do not fit its types: {error}") from error
    fields = [pa.field(c.name, _stored_type(c), nullable=False) for c in declared]
    return pa.Table.from_arrays(columns, schema=pa.schema(fields))


def spelled(rows: pa.Table, table: Table) -> pa.Table:
    """Return rows as stored in the types of `schema.arrow_schema`: names as text, without derived timestamps."""
    schema = arrow_schema(table)
    return rows.select(schema.names).cast(schema)


def _stored_type(column: Column) -> pa.DataType:
    return NAMES if column.type is Type.NAME else ARROW[column.type]


def _has_nulls(column: pa.ChunkedArray) -> bool:
    is_coded = pa.types.is_dictionary(column.type)
    return bool(column.null_count) or (is_coded and any(chunk.dictionary.null_count for chunk in column.chunks))


def _names(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return names as one dictionary for all chunks: sorting and writing compare numbers then, not text."""
    coded = column if pa.types.is_dictionary(column.type) else column.cast(pa.string()).dictionary_encode()
    return coded.cast(NAMES).unify_dictionaries()


def _floor_to_timestamp(ns: pa.ChunkedArray) -> pa.ChunkedArray:
    """Nanoseconds to microseconds, rounding down."""
    return pa.chunked_array([pa.array(ns.to_numpy() // 1000).cast(pa.timestamp("us", tz="UTC"))])


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
    offsets, names = rows["log_offset"], rows["log_partition"]
    partitions = pc.unique(names).to_pylist()
    for partition in partitions:
        own = offsets if len(partitions) == 1 else offsets.filter(pc.equal(names, partition))
        found = pc.min_max(own).as_py()
        first, last = start.get(partition, 0), end.get(partition, 0) - 1
        if found["min"] < first or found["max"] > last:
            raise Rejected(
                f"append to cold table {table.name!r}: rows of {partition!r} have offsets {found['min']} to "
                f"{found['max']}, outside the range {first} to {last} they are committed with"
            )


def with_revision(rows: pa.Table, number: int) -> pa.Table:
    """Return candles carrying the number of the commit that writes them."""
    if "revision" not in rows.column_names:
        return rows
    at = rows.column_names.index("revision")
    return rows.set_column(at, rows.schema.field(at), pa.array([number] * rows.num_rows, pa.int64()))
