"""Sorting rows that are nearly sorted: hot gives them so, every file of cold is, commits follow each other in time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from k2 import meters

Key = npt.NDArray[Any]

MOST_PIECES = 1_000  # pieces in order that are put together as they are; more are sorted


def in_order(rows: pa.Table, order: Sequence[str]) -> pa.Table:
    """Return rows sorted by columns without nulls, the first of them an integer; names as text or as dictionaries.

    Pieces that are in order, and do not overlap, are only put into theirs; nothing is copied for it.
    """
    spans = _spans(rows[order[0]].to_numpy())
    if len(spans) <= MOST_PIECES:
        together = pa.concat_tables([rows.slice(start, end - start) for start, end in spans])
        if _rises(_key(together[name]) for name in order):
            return together
    else:
        meters.acted("cold.pieces")
    return rows.take(pa.array(np.lexsort([_key(rows[name]) for name in reversed(order)])))


def _spans(values: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """Return the stretches within which values do not fall, in the order of their first values."""
    starts = [0, *(np.flatnonzero(np.diff(values) < 0) + 1).tolist()]
    spans = list(zip(starts, [*starts[1:], len(values)], strict=True))
    return sorted(spans, key=lambda span: values[span[0]]) if len(spans) > 1 else spans


def by_keys(rows: pa.Table, order: Sequence[str]) -> pa.Table:
    """Return rows sorted by columns without nulls: integers, and text as a dictionary that all chunks share.

    Rows in order are given back as they are. Equal ones stay in the order they came in.
    """
    keys = [_key(rows[name]) for name in order]
    if _rises(keys):
        return rows
    # What came in by time needs its names put together only.
    varying = [key for key in keys if key[0] != key[-1] or (key != key[0]).any()]
    first = np.argsort(varying[0], kind="stable")
    chosen = first if _rises(key[first] for key in varying) else np.lexsort(varying[::-1])
    return rows.take(pa.array(chosen))


def _key(column: pa.ChunkedArray) -> Key:
    """Return numbers that are in the order of a column's values."""
    if not pa.types.is_string(column.type) and not pa.types.is_dictionary(column.type):
        numbers: Key = column.to_numpy()
        return numbers
    coded = (column.dictionary_encode() if pa.types.is_string(column.type) else column).unify_dictionaries()
    names = coded.chunk(0).dictionary.to_pylist() if coded.num_chunks else []
    if len(names) == 1:
        return np.zeros(len(column), np.uint16)
    ranks: Key = np.empty(len(names), np.uint16 if len(names) < 1 << 16 else np.int64)
    ranks[sorted(range(len(names)), key=lambda place: names[place].encode())] = np.arange(len(names))
    places = [chunk.indices.to_numpy() for chunk in coded.chunks]
    return cast(Key, ranks[np.concatenate(places)]) if places else ranks


def _rises(keys: Iterable[Key]) -> bool:
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
