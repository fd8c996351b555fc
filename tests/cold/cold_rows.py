"""Rows of every cold table, made from a number; a digest of rows that no order of them changes."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable
from decimal import Decimal

import pyarrow as pa

from k2.schema import TABLES, Column, Type, arrow_schema

DAY = 86_400 * 10**9
T0 = 1_700_006_400 * 10**9  # the start of a day


def rows_of(table: str, start: int, end: int, *, day: int = 0, exchange: str = "binance") -> pa.Table:
    """Rows of offsets start to end: every column of every type, decimals to their last digit, times of one day."""
    declared = TABLES[table]
    made = [
        {c.name: _value(c, random.Random(f"{table}/{c.name}/{offset}"), offset) for c in declared.columns}
        for offset in range(start, end)
    ]
    for offset, row in zip(range(start, end), made, strict=True):
        row |= {"exchange": exchange, declared.time_column: T0 + day * DAY + offset % 86_400 * 10**9 + offset % 1000}
        if "log_offset" in row:
            row |= {"log_partition": exchange, "log_offset": offset, "row_in_frame": 0}
    names = arrow_schema(declared).names
    return pa.Table.from_pylist([{n: row[n] for n in names} for row in made], schema=arrow_schema(declared))


def _value(column: Column, chance: random.Random, offset: int) -> object:
    if column.type in (Type.NAME, Type.TEXT):
        return chance.choice(("a", "ÄÖ", "b'c", ""))
    if column.type is Type.BYTES:
        return chance.randbytes(offset % 40)
    if column.type is Type.BOOL:
        return chance.random() < 0.5
    if column.type is Type.DECIMAL:
        return Decimal(chance.randrange(-(10**20), 10**20)).scaleb(-12)
    if column.type is Type.WIDE:
        return Decimal(chance.randrange(-(10**30), 10**30)).scaleb(-18)
    return chance.randrange(-(2**62), 2**62)


def digest(tables: Iterable[pa.Table]) -> tuple[int, str]:
    """Return the number of rows and a hash over every value of every column, whatever order the rows are in."""
    total = count = 0
    for rows in tables:
        for row in rows.select(sorted(rows.column_names)).to_pylist():
            total += int.from_bytes(hashlib.sha256(repr(sorted(row.items())).encode()).digest())
            count += 1
    return count, f"{total % 2**256:064x}"
