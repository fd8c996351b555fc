"""Sorting rows that are nearly sorted: hot gives them so, every file of cold is, commits follow each other in time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from k2 import meters

Key = npt.NDArray[Any]

MOST_PIECES = 1_000  # pieces in order that are put together as they are; more are sorted


def in_order(rows: pa.Table, order: Sequence[str]) -> pa.Table:
    """Return rows sorted by columns without nulls, the first of them an integer.

    Pieces that are in order, and do not overlap, are only put into theirs; nothing is copied for it.
    """
    spans = _spans(rows[order[0]].to_numpy())
    if len(spans) <= MOST_PIECES:
        together = pa.concat_tables([rows.slice(start, end - start) for start, end in spans])
        if _is_sorted(together, order):
            return together
    else:
        meters.acted("cold.pieces")
    return rows.sort_by([(name, "ascending") for name in order])


def _spans(values: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """Return the stretches within which values do not fall, in the order of their first values."""
    starts = [0, *(np.flatnonzero(np.diff(values) < 0) + 1).tolist()]
    spans = list(zip(starts, [*starts[1:], len(values)], strict=True))
    return sorted(spans, key=lambda span: values[span[0]]) if len(spans) > 1 else spans


def _is_sorted(rows: pa.Table, order: Sequence[str]) -> bool:
    """Whether each row is not before its neighbour; a later column is looked at only where the earlier ones tie."""
    ties: npt.NDArray[np.int64] | None = None  # of all neighbours
    for name in order:
        column = rows[name]
        if ties is None:
            left, right = column.slice(0, max(0, len(column) - 1)), column.slice(1)
        else:
            left, right = column.take(pa.array(ties)), column.take(pa.array(ties + 1))
        if pc.any(pc.less(right, left)).as_py():
            return False
        tied = np.flatnonzero(pc.equal(left, right).to_numpy())
        ties = tied if ties is None else ties[tied]
        if not len(ties):
            break
    return True


def by_keys(rows: pa.Table, order: Sequence[str]) -> pa.Table:
    """Return rows sorted by columns without nulls: integers, and text as a dictionary that all chunks share.

    Rows in order are given back as they are. Equal ones stay in the order they came in.
    """
    keys = [key for name in order if (key := _key(rows[name])) is not None]
    if _rises(keys):
        return rows
    # What came in by time needs its names put together only.
    first = np.argsort(keys[0], kind="stable")
    chosen = first if _rises([key[first] for key in keys]) else np.lexsort(keys[::-1])
    return rows.take(pa.array(chosen))


def _key(column: pa.ChunkedArray) -> Key | None:
    """Return numbers that are in the order of a column's values; None where it has one value only."""
    if not pa.types.is_dictionary(column.type):
        numbers: Key = column.to_numpy()
        return numbers
    if not column.num_chunks or len(names := column.chunk(0).dictionary.to_pylist()) < 2:
        return None
    ranks: Key = np.empty(len(names), np.uint16 if len(names) < 1 << 16 else np.int64)
    ranks[sorted(range(len(names)), key=lambda place: names[place].encode())] = np.arange(len(names))
    places = np.concatenate([chunk.indices.to_numpy() for chunk in column.chunks])
    return cast(Key, ranks[places])


def _rises(keys: Sequence[Key]) -> bool:
    """Whether each row is not before its neighbour; a later key is looked at only where the earlier ones tie."""
    ties: npt.NDArray[np.int64] | None = None  # of all neighbours
    for key in keys:
        left, right = (key[:-1], key[1:]) if ties is None else (key[ties], key[ties + 1])
        if (right < left).any():
            return False
        tied = np.flatnonzero(right == left)
        ties = tied if ties is None else ties[tied]
        if not len(ties):
            break
    return True
