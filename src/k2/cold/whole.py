"""Reads what a selection takes whole straight from the Parquet files, several times as fast as through an engine.

A file is in order, so a large selection is mostly made of whole row groups, and their statistics say so. Those are
read as they are; only rows of the groups at its ends are looked at one by one.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from k2.cold.base import Pin
from k2.cold.rows import NAMES
from k2.errors import StoreDown, TimedOut
from k2.model import Selection
from k2.schema import Table, Type, arrow_schema

MOST_FILES = 64  # more are left to the engine, which opens them side by side

_DAY = re.compile(r"/day=(\d{4}-\d{2}-\d{2})/")
_DAY_NS = 86_400 * 10**9
_EPOCH = date(1970, 1, 1)


@dataclass(frozen=True)
class _Piece:
    """Row groups of one file of which a selection takes all rows, or perhaps some."""

    file: pq.ParquetFile
    groups: list[int]
    is_whole: bool
    rows: int


def read_whole(
    cursor: duckdb.DuckDBPyConnection, pin: Pin, table: Table, selection: Selection, warehouse: Path, deadline: float
) -> pa.Table | None:
    """Return the rows of a selection without limit, in no order, names as dictionaries; None: an engine is faster.

    `deadline` is on the monotonic clock.

    Raises:
        StoreDown: a file is gone or damaged.
        TimedOut: the deadline has passed.
    """
    files = _files(cursor, pin, selection, warehouse)
    if files is None:
        return None
    names = [c.name for c in table.columns if c.type is Type.NAME]
    try:
        pieces = [
            piece for path in files for piece in _pieces(pq.ParquetFile(path, read_dictionary=names), table, selection)
        ]
        whole = sum(piece.rows for piece in pieces if piece.is_whole)
        if whole == 0 or whole < sum(piece.rows for piece in pieces if not piece.is_whole):
            return None
        parts = [_read(piece, table, selection, deadline) for piece in pieces]
    except (OSError, pa.ArrowException) as error:
        raise StoreDown(f"read cold table {pin.table!r}: {error}") from error
    fields = [field.with_type(NAMES) if field.name in names else field for field in arrow_schema(table)]
    return pa.concat_tables(parts).cast(pa.schema(fields)).unify_dictionaries()


def _files(cursor: duckdb.DuckDBPyConnection, pin: Pin, selection: Selection, warehouse: Path) -> list[str] | None:
    """Return the files of the snapshot that may hold rows; None where it is not of plain data files alone."""
    location = pin.location.replace("'", "''")
    entries = f"iceberg_metadata('{location}', snapshot_from_id = {int(pin.snapshot_id or 0)})"
    query = f"SELECT manifest_content, content, file_path FROM {entries} WHERE status != 'DELETED'"  # noqa: S608
    found = []
    for kind, content, location in cursor.execute(query).fetchall():
        path = Path(location.removeprefix("file://"))
        if (kind, content) != ("DATA", "EXISTING") or not path.is_relative_to(warehouse):
            return None
        if _may_hold(str(path), selection):
            found.append(str(path))
    return found if len(found) <= MOST_FILES else None


def _may_hold(path: str, selection: Selection) -> bool:
    """Whether the day a file's folder names reaches into the selection."""
    day = _DAY.search(path)
    if day is None:
        return True
    start_ns = (date.fromisoformat(day[1]) - _EPOCH).days * _DAY_NS
    return (selection.end_ns is None or start_ns < selection.end_ns) and (
        selection.start_ns is None or start_ns + _DAY_NS > selection.start_ns
    )


def _pieces(file: pq.ParquetFile, table: Table, selection: Selection) -> Iterator[_Piece]:
    """Give the row groups of a file that may hold rows of the selection, those it takes whole together."""
    kept: dict[bool, list[int]] = {True: [], False: []}
    places = {file.metadata.schema.column(i).name: i for i in range(file.metadata.num_columns)}
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        taken = [_takes(group.column(places[name]).statistics, *bounds) for name, *bounds in _bounds(table, selection)]
        if False not in taken:
            kept[None not in taken].append(number)
    for is_whole, groups in kept.items():
        if groups:
            rows = sum(file.metadata.row_group(number).num_rows for number in groups)
            yield _Piece(file, groups, is_whole, rows)


def _bounds(table: Table, selection: Selection) -> Iterator[tuple[str, Any, Any, bool]]:
    """Give what a selection asks of columns: least value, largest value or None, and whether that one is excluded."""
    for name in ("exchange", "symbol"):
        value = getattr(selection, name)
        if value is not None:
            yield name, value, value, False
    if selection.start_ns is not None or selection.end_ns is not None:
        yield table.time_column, selection.start_ns, selection.end_ns, True
    if selection.logged_before_ns is not None:
        yield "logged_ns", None, selection.logged_before_ns, True


def _takes(statistics: pq.Statistics | None, least: Any, most: Any, is_exclusive: bool) -> bool | None:
    """Whether all values of a column are within bounds: None if some may be, or nobody can say."""
    if statistics is None or not statistics.has_min_max:
        return None
    low, high = statistics.min, statistics.max
    is_below = most is not None and (low >= most if is_exclusive else low > most)
    if is_below or (least is not None and high < least):
        return False
    fits = (least is None or low >= least) and (most is None or (high < most if is_exclusive else high <= most))
    return True if fits else None


def _read(piece: _Piece, table: Table, selection: Selection, deadline: float) -> pa.Table:
    if time.monotonic() > deadline:
        raise TimedOut("read cold: interrupted; narrow the question or raise query.timeout_seconds")
    rows = piece.file.read_row_groups(piece.groups, columns=list(table.column_names))
    return rows if piece.is_whole else _filtered(rows, list(_bounds(table, selection)))


def _filtered(rows: pa.Table, bounds: Sequence[tuple[str, Any, Any, bool]]) -> pa.Table:
    for name, least, most, is_exclusive in bounds:
        if least is not None:
            rows = rows.filter(pc.greater_equal(rows[name], least))
        if most is not None:
            rows = rows.filter((pc.less if is_exclusive else pc.less_equal)(rows[name], most))
    return rows
