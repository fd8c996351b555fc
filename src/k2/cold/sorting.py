"""Sorting rows that are nearly sorted: every file of cold is in order, and commits follow each other in time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from k2 import meters

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
