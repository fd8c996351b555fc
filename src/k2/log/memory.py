"""The log in memory: for tests and for trying things; nothing survives the process."""

from __future__ import annotations

import logging
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence

import msgspec

from k2.errors import Rejected
from k2.log.base import GivenUp
from k2.log.limits import READ_BYTES, READ_FRAMES, check_frames, check_offset, check_partition, collect, slowest
from k2.log.times import STEP_NS, StepWatch, logged_time, told_step
from k2.model import Frame, LogBatch, Positions

logger = logging.getLogger(__name__)


class _Partition(msgspec.Struct):
    batches: list[LogBatch] = msgspec.field(default_factory=list)
    bases: list[int] = msgspec.field(default_factory=list)
    producers: dict[str, int] = msgspec.field(default_factory=dict)
    watch: StepWatch = msgspec.field(default_factory=StepWatch)

    @property
    def start_offset(self) -> int:
        return self.bases[0] if self.bases else 0

    @property
    def end_offset(self) -> int:
        return self.batches[-1].end_offset if self.batches else 0


class MemoryLog:
    """Keeps every promise of `base.Log` except those that need a disk: gone with the process, one process only.

    Every batch is a segment of its own; the newest one counts as the one being written and is never trimmed.
    """

    def __init__(self, *, clock: Callable[[], int] = time.time_ns) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._partitions: dict[str, _Partition] = {}
        self._readers: dict[str, dict[str, int]] = {}
        self._closed = False

    def partitions(self) -> list[str]:
        """Return the names of the partitions that exist, sorted."""
        with self._changed:
            self._check_open()
            return sorted(self._partitions)

    def append(self, partition: str, frames: Sequence[Frame], *, producer: str = "", sequence: int = 0) -> int:
        """Store frames together as one batch and return the offset of the first, or -1 for a repeat."""
        check_partition(partition)
        check_frames(partition, frames)
        with self._changed:
            self._check_open()
            kept = self._partitions.setdefault(partition, _Partition())
            if producer and sequence <= kept.producers.get(producer, sequence - 1):
                return -1
            base_offset = kept.end_offset
            logged_ns = self._logged_ns(partition, kept)
            kept.batches.append(LogBatch(partition, base_offset, logged_ns, list(frames)))
            kept.bases.append(base_offset)
            if producer:
                kept.producers[producer] = sequence
            self._changed.notify_all()
            return base_offset

    def producer_sequence(self, partition: str, producer: str) -> int | None:
        """Return the last stored sequence of a producer, or None when it never appended."""
        with self._changed:
            return self._partition(partition).producers.get(producer)

    def start_offset(self, partition: str) -> int:
        """Return the first offset still held."""
        with self._changed:
            return self._partition(partition).start_offset

    def end_offset(self, partition: str) -> int:
        """Return the offset the next frame will get."""
        with self._changed:
            return self._partition(partition).end_offset

    def read(
        self, partition: str, offset: int, *, max_frames: int = READ_FRAMES, max_bytes: int = READ_BYTES
    ) -> list[LogBatch]:
        """Return frames from `offset` on, within the limits."""
        with self._changed:
            kept = self._partition(partition)
            check_offset(partition, offset, kept.start_offset)
            if offset >= kept.end_offset:
                return []
            first = bisect_right(kept.bases, offset) - 1
            following = (kept.batches[index] for index in range(first, len(kept.batches)))
            return collect(following, offset, max_frames, max_bytes)

    def wait(self, positions: Positions, timeout_seconds: float) -> bool:
        """Block until some partition holds frames at or after its position, or the time is up."""
        with self._changed:
            return self._changed.wait_for(lambda: self._is_ahead_of(positions), timeout_seconds)

    def make_durable(self, positions: Positions) -> None:
        """Do nothing: this log is gone with its process."""

    def reader_position(self, reader: str, partition: str) -> int:
        """Return the position of a named reader; 0 when it never committed."""
        check_partition(partition)
        with self._changed:
            self._check_open()
            return self._readers.get(reader, {}).get(partition, 0)

    def commit_reader(self, reader: str, positions: Positions) -> None:
        """Record that a named reader needs nothing below these offsets; they never go back.

        A partition it never named counts as 0 for it. `{}` registers the reader: it then holds back `trim`.
        """
        for partition in positions:
            check_partition(partition)
        with self._changed:
            self._check_open()
            kept = self._readers.setdefault(reader, {})
            kept.update({name: max(offset, kept.get(name, 0)) for name, offset in positions.items()})

    def trim(self, *, keep_seconds: float) -> dict[str, int]:
        """Remove old batches that every named reader has passed; never the newest."""
        with self._changed:
            self._check_open()
            now_ns = self._clock()
            removed = {}
            for name, kept in self._partitions.items():
                passed = slowest(positions.get(name, 0) for positions in self._readers.values())
                count = 0
                for batch in kept.batches[:-1]:
                    if passed is None or batch.end_offset > passed:
                        break
                    if _ended_ns(kept.batches[count:], now_ns) >= now_ns - int(keep_seconds * 1e9):
                        break
                    count += 1
                if count:
                    del kept.batches[:count], kept.bases[:count]
                    removed[name] = kept.start_offset
            return removed

    def given_up(self, partition: str) -> list[GivenUp]:
        """Return nothing: this log has no size limit."""
        check_partition(partition)
        return []

    def close(self) -> None:
        """Forget everything and wake who waits; further calls fail."""
        with self._changed:
            self._closed = True
            self._partitions.clear()
            self._changed.notify_all()

    def _logged_ns(self, name: str, kept: _Partition) -> int:
        now_ns, last_ns = self._clock(), kept.batches[-1].logged_ns if kept.batches else 0
        logged_ns = logged_time(now_ns, last_ns)
        step_ns = min(0, logged_ns - last_ns) or kept.watch.ahead(now_ns)
        if step_ns:
            logger.warning("log: %s: %s", name, told_step(step_ns, now_ns))
        return logged_ns

    def _partition(self, name: str) -> _Partition:
        check_partition(name)
        self._check_open()
        return self._partitions.get(name) or _Partition()

    def _is_ahead_of(self, positions: Positions) -> bool:
        self._check_open()
        return any(kept.end_offset > positions.get(name, 0) for name, kept in self._partitions.items())

    def _check_open(self) -> None:
        if self._closed:
            raise Rejected("log: it was closed; open a new one")


def _ended_ns(batches: Sequence[LogBatch], now_ns: int) -> int:
    """Return when the first batch was logged; by a later one where a clock error put it into the future."""
    return next((b.logged_ns for b in batches if b.logged_ns <= now_ns + STEP_NS), batches[-1].logged_ns)
