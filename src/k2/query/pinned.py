"""Answers of cold snapshots, kept in memory: a snapshot never changes, so what it answered stays right."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from k2 import meters
from k2.cold.base import Pin
from k2.model import Selection
from k2.schema import TABLES

MAX_BYTES = 64 << 20
"""Most bytes of answers kept; those not asked for the longest make room."""

MAX_ANSWER_BYTES = 8 << 20
"""A larger answer is not kept: it takes longer to hand on than to read again, and would push out the others."""

ENTRY_BYTES = 1 << 10
"""What an answer counts for beside its rows, so that there is a limit to empty ones too."""


@dataclass(frozen=True)
class _Key:
    table: str
    snapshot_id: int
    selection: Selection
    made: tuple[str, ...]


@dataclass(frozen=True)
class _Answer:
    start_ns: int | None
    rows: pa.Table

    @property
    def size_bytes(self) -> int:
        return int(self.rows.nbytes) + ENTRY_BYTES


class PinnedAnswers:
    """Keeps the rows cold gave, by snapshot and selection. Any thread may ask.

    `made` tells apart what is made of the same rows (timeframe and kind of candles). Newest rows
    from a time on are kept as such: the newest rows from a later time on are among them.
    """

    def __init__(self, max_bytes: int = MAX_BYTES, max_answer_bytes: int = MAX_ANSWER_BYTES) -> None:
        self._max_bytes = max_bytes
        self._max_answer_bytes = max_answer_bytes
        self._lock = threading.Lock()
        self._answers: OrderedDict[_Key, _Answer] = OrderedDict()
        self._bytes = 0
        meters.watch("query.pinned", self, lambda answers: answers._bytes)

    def get(self, pin: Pin, selection: Selection, *made: str) -> pa.Table | None:
        """Return what the snapshot answers, or None when it has to be asked."""
        key = _key(pin, selection, made)
        with self._lock:
            answer = self._answers.get(key)
            if answer is None:
                return None
            self._answers.move_to_end(key)
        if not _is_newest(selection) or answer.start_ns == selection.start_ns:
            return answer.rows
        if selection.start_ns is None or (answer.start_ns is not None and answer.start_ns > selection.start_ns):
            return None
        return answer.rows.filter(pc.greater_equal(answer.rows[TABLES[pin.table].time_column], selection.start_ns))

    def put(self, pin: Pin, selection: Selection, rows: pa.Table, *made: str) -> pa.Table:
        """Keep what the snapshot answered, and return it."""
        answer = _Answer(selection.start_ns, rows)
        if answer.size_bytes > self._max_answer_bytes:
            meters.acted("query.pinned_answer")
            return rows
        key = _key(pin, selection, made)
        with self._lock:
            replaced = self._answers.pop(key, None)
            self._bytes += answer.size_bytes - (replaced.size_bytes if replaced is not None else 0)
            self._answers[key] = answer
            while self._bytes > self._max_bytes:
                self._bytes -= self._answers.popitem(last=False)[1].size_bytes
                meters.acted("query.pinned")
        return rows


def _is_newest(selection: Selection) -> bool:
    return selection.newest and selection.limit > 0


def _key(pin: Pin, selection: Selection, made: tuple[str, ...]) -> _Key:
    assert pin.snapshot_id is not None
    plain = msgspec.structs.replace(selection, start_ns=None) if _is_newest(selection) else selection
    return _Key(pin.table, pin.snapshot_id, plain, made)
