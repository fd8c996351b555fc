"""Frames of the log as rows of `schema.FRAMES`, collected for one commit."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa

from k2.log.damage import Damage
from k2.model import LogBatch, Positions
from k2.schema import FRAMES, Type, arrow_schema

_NAMES = pa.dictionary(pa.int32(), pa.string())
_CODED = {column.name for column in FRAMES.columns if column.type is Type.NAME}
_SCHEMA = pa.schema([field.with_type(_NAMES) if field.name in _CODED else field for field in arrow_schema(FRAMES)])


class FrameChunk:
    """Frames collected for one commit, as columns: from offsets `start` up to `end` of each partition read so far."""

    def __init__(self, start: Positions) -> None:
        self._from = dict(start)
        self.end: dict[str, int] = {}
        self.size = self.count = 0
        self._tables: list[pa.Table] = []

    @property
    def start(self) -> dict[str, int]:
        """Where the partitions read so far were begun."""
        return {p: self._from[p] for p in self.end}

    def position(self, partition: str) -> int:
        """Return the offset to read on from."""
        return self.end.get(partition, self._from[partition])

    def following(self) -> FrameChunk:
        """Return an empty chunk that goes on where this one ends."""
        return FrameChunk({**self._from, **self.end})

    def take(self, partition: str, found: Sequence[LogBatch | Damage]) -> None:
        """Add what was read, in order; damage is passed over."""
        batches = [batch for batch in found if isinstance(batch, LogBatch)]
        if batches:
            rows = frame_rows(batches)
            self._tables.append(rows)
            self.size += rows["data"].nbytes
            self.count += rows.num_rows
        self.end[partition] = found[-1].end_offset

    def rows(self) -> pa.Table:
        """Return everything collected."""
        return pa.concat_tables([_SCHEMA.empty_table(), *self._tables])


def frame_rows(batches: Sequence[LogBatch]) -> pa.Table:
    """Return the frames of batches of one partition as rows of `schema.FRAMES`, names as dictionaries.

    Once for all batches of a read: for one of ten frames, making a table takes longer than its frames.
    """
    frames = list(chain.from_iterable([batch.frames for batch in batches]))
    partition = [batches[0].partition] * len(frames)
    columns: dict[str, pa.Array] = {
        "exchange": _column("exchange", partition),
        # A comprehension a column: half the time of `attrgetter`.
        "kind": _column("kind", [frame.kind for frame in frames]),
        "connection": _column("connection", [frame.connection for frame in frames]),
        "epoch": _column("epoch", [frame.epoch for frame in frames]),
        "counter": pa.array([frame.counter for frame in frames], pa.int64()),
        "data": pa.array([frame.data for frame in frames], pa.binary()),
        "origin": _column("origin", [frame.origin for frame in frames]),
        "received_ns": pa.array([frame.received_ns for frame in frames], pa.int64()),
        "source": _column("source", [frame.source for frame in frames]),
        "log_partition": _column("log_partition", partition),
        "log_offset": np.concatenate([np.arange(b.base_offset, b.end_offset, dtype=np.int64) for b in batches]),
        "row_in_frame": np.zeros(len(frames), np.int64),
        "logged_ns": np.repeat([batch.logged_ns for batch in batches], [len(batch.frames) for batch in batches]),
    }
    return pa.table([pa.array(columns[name]) for name in _SCHEMA.names], schema=_SCHEMA)


def _column(name: str, values: list[Any]) -> pa.Array:
    """Make a column; one value for all, which most columns of a socket's frames have, is not converted each time."""
    kind = _SCHEMA.field(name).type
    is_coded = pa.types.is_dictionary(kind)
    if values.count(values[0]) < len(values):
        return pa.array(values, kind)
    if is_coded:
        return pa.DictionaryArray.from_arrays(np.zeros(len(values), np.int32), pa.array(values[:1], kind.value_type))
    return pa.repeat(pa.scalar(values[0], kind), len(values))
