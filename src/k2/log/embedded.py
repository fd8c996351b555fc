"""The log on local disk: SQLite files in WAL mode, one row a batch."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from k2.errors import Rejected, StoreDown
from k2.log.base import GivenUp
from k2.log.doorbell import Bell, ring_all
from k2.log.failures import told
from k2.log.limits import PARTITION_NAME, READ_BYTES, READ_FRAMES, check_frames, check_partition, slowest
from k2.log.partition import Options, Partition
from k2.log.readers import ReaderPositions
from k2.log.reading import Connections
from k2.log.recovery import Repair
from k2.log.segment import Sync, bases
from k2.model import Frame, LogBatch, Positions
from k2.settings import LogSettings

logger = logging.getLogger(__name__)

_DEFAULT = LogSettings()
QUEUE_FRAMES, QUEUE_BYTES = 100_000, 64 << 20
LONGEST_LISTEN_SECONDS = 1.0  # waiters look for themselves this often, should a ring be lost


class EmbeddedLog:
    """A `base.Log` in a folder; no server, any number of threads and processes.

    `sync` "full": an append returns when its bytes are on the disk; a power cut loses nothing
    acknowledged. "normal": it returns when they are in the operating system's memory. Killed
    processes lose nothing either way; a power cut (or a crash of the operating system) then loses the
    appends since the last checkpoint, a few megabytes, or since `make_durable`, always from the end. Readers may
    have seen them, and their offsets are given out again: only for data that can be fetched again.

    A segment file is closed at about `segment_bytes`, or when the next batch comes `segment_seconds`
    after its first. Appends wait while `queue_frames` or `queue_bytes` are queued in front of the disk.

    A partition above `max_bytes` (0: no limit) loses its oldest closed segments, whether or not every reader has passed
    them: that is looked at whenever a segment is closed, by whoever closes it, and by `trim`. What somebody still
    needed is written down first, see `given_up`.

    Logged times follow the clock as `times.py` says; steps of the clock are kept in `repairs.jsonl`.

    Nothing is opened before it is needed. The first user of a partition mends what a crash left,
    see `recover`. Not to be carried over a `fork`: SQLite's locks are not; open a new one in the child.

    Files: `<partition>/<first offset>.db` (`segment.py`), `readers.db`, `repairs.jsonl`, `.waiters/`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        sync: Sync = "full",
        segment_bytes: int = _DEFAULT.segment_bytes,
        segment_seconds: float = _DEFAULT.segment_seconds,
        max_bytes: int = 0,
        queue_frames: int = QUEUE_FRAMES,
        queue_bytes: int = QUEUE_BYTES,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self.folder = Path(folder).absolute()
        self._options = Options(sync, segment_bytes, segment_seconds, queue_frames, queue_bytes, clock)
        self._max_bytes = max_bytes
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._partitions: dict[str, Partition] = {}
        self._connections = Connections()
        self._readers = ReaderPositions(self.folder / "readers.db")
        self._waiters = self.folder / ".waiters"  # the dot keeps it apart from partitions
        self._bells: set[Bell] = set()
        self._idle_bells: list[Bell] = []
        self._closed = threading.Event()

    def partitions(self) -> list[str]:
        """Return the names of the partitions that exist, sorted."""
        self._check_open()
        with told("list", self.folder):
            try:
                names = os.listdir(self.folder)  # noqa: PTH208 - called by every look of a waiter
            except FileNotFoundError:
                return []
            return sorted(name for name in names if PARTITION_NAME.fullmatch(name) and bases(self.folder / name))

    def append(self, partition: str, frames: Sequence[Frame], *, producer: str = "", sequence: int = 0) -> int:
        """Store frames together as one batch and return the offset of the first, or -1 for a repeat."""
        check_frames(partition, frames)
        return self._partition(partition).append(frames, producer, sequence)

    def producer_sequence(self, partition: str, producer: str) -> int | None:
        """Return the last stored sequence of a producer, or None when it never appended."""
        return self._partition(partition).producer_sequence(producer)

    def start_offset(self, partition: str) -> int:
        """Return the first offset still held."""
        return self._partition(partition).start_offset()

    def end_offset(self, partition: str) -> int:
        """Return the offset the next frame will get."""
        return self._partition(partition).end_offset()

    def read(
        self, partition: str, offset: int, *, max_frames: int = READ_FRAMES, max_bytes: int = READ_BYTES
    ) -> list[LogBatch]:
        """Return frames from `offset` on, within the limits; stops in front of damage, which the next read reports."""
        return self._partition(partition).read(offset, max_frames, max_bytes)

    def wait(self, positions: Positions, timeout_seconds: float) -> bool:
        """Block until some partition holds frames at or after its position, or the time is up."""
        self._check_open()
        deadline = time.monotonic() + timeout_seconds
        bell = self._take_bell()
        try:
            while True:
                if bell is not None:
                    bell.silence()
                if self._is_ahead_of(positions):
                    return True
                seconds = min(deadline - time.monotonic(), LONGEST_LISTEN_SECONDS)
                if seconds <= 0:
                    return False
                if bell is not None:
                    bell.listen(seconds)
                else:
                    self._closed.wait(seconds)
        finally:
            self._return_bell(bell)

    def make_durable(self, positions: Positions) -> None:
        """Return when everything below these offsets survives a power cut; at once with `sync` "full"."""
        for name in positions:
            partition = self._partition(name)
            if self._options.sync != "full":
                partition.make_durable()

    def reader_position(self, reader: str, partition: str) -> int:
        """Return the durable position of a named reader; 0 when it never committed."""
        check_partition(partition)
        self._check_open()
        return self._readers.position(reader, partition)

    def commit_reader(self, reader: str, positions: Positions) -> None:
        """Durably record that a named reader needs nothing below these offsets; they never go back.

        A partition it never named counts as 0 for it. `{}` registers the reader: it then holds back `trim`.
        """
        for partition in positions:
            check_partition(partition)
        self._check_open()
        self._readers.commit(reader, positions)

    def trim(self, *, keep_seconds: float) -> dict[str, int]:
        """Remove whole old segments that every named reader has passed; never the newest of a partition."""
        removed = {}
        for name in self.partitions():
            partition = self._partition(name)
            start_offset = partition.trim(slowest(self._readers.all(name)), int(keep_seconds * 1e9))
            start_offset = self._keep_within_limit(partition) or start_offset
            if start_offset is not None:
                removed[name] = start_offset
        return removed

    def given_up(self, partition: str) -> list[GivenUp]:
        """Return what the size limit removed although some reader had not passed it, by offset."""
        check_partition(partition)
        self._check_open()
        return self._readers.given_up(partition)

    def recover(self) -> list[Repair]:
        """Check every partition now instead of at its first use; return all repairs made since this log was opened.

        A torn tail is cut. A damaged newest segment is set aside and replaced by what is
        readable of it. Each repair is also logged, and kept in `repairs.jsonl`. A partition that another
        process is using was checked by that one, and is left alone.
        """
        repairs = []
        for name in self.partitions():
            partition = self._partition(name)
            partition.use()
            repairs += partition.repairs
        return repairs

    def close(self) -> None:
        """Finish pending appends, end waits, release files; further calls fail."""
        if self._closed.is_set():
            return
        self._closed.set()
        with self._lock:
            for bell in self._bells:
                bell.ring()
            for bell in self._idle_bells:
                self._bells.discard(bell)
                bell.close()
            self._idle_bells.clear()
        for partition in self._partitions.values():
            partition.close()
        self._connections.forget()
        self._readers.close()

    def _partition(self, name: str) -> Partition:
        check_partition(name)
        self._check_open()
        with self._lock:
            if name not in self._partitions:
                folder = self.folder / name
                self._partitions[name] = Partition(folder, self._options, self._connections, self._ring, self._rotated)
            return self._partitions[name]

    def _rotated(self, partition: Partition) -> None:
        """Keep to the size limit when a segment was closed; the append that closed it must not fail by it.

        That append may be one that `close` waits for.
        """
        try:
            self._keep_within_limit(partition)
        except StoreDown as error:
            logger.error("log: %s stays above max_bytes until its next segment is closed: %s", partition.name, error)

    def _keep_within_limit(self, partition: Partition) -> int | None:
        """Remove the oldest segments of a partition above the limit; return the new start offset, None if unchanged."""
        if not self._max_bytes:
            return None
        start_offset = None
        for first_offset, end_offset in partition.surplus(self._max_bytes):
            behind = self._readers.behind(partition.name, end_offset)
            if behind is None or behind:
                self._give_up(partition, first_offset, end_offset, behind or {})
            partition.remove(first_offset)
            start_offset = end_offset
        return start_offset

    def _give_up(self, partition: Partition, first_offset: int, end_offset: int, behind: dict[str, int]) -> None:
        first_needed = max(first_offset, min(behind.values(), default=0))
        who = ", ".join(f"{name} (at {at})" for name, at in sorted(behind.items()))
        self._readers.give_up(GivenUp(partition.name, first_needed, end_offset, who, self._options.clock()))
        unread = f"not passed by {who}" if who else "and nobody has ever read this log"
        what = (
            f"above log.max_bytes = {self._max_bytes}: the frames {first_needed}..{end_offset - 1} are given up, "
            f"{unread}; see why nobody reads on, or raise log.max_bytes"
        )
        partition.report_given_up(first_needed, end_offset, what)

    def _is_ahead_of(self, positions: Positions) -> bool:
        # Listing what there is takes as long as asking one: mostly it is a partition known already that goes on.
        if any(self.end_offset(name) > offset for name, offset in positions.items()):
            return True
        return any(self.end_offset(name) > 0 for name in self.partitions() if name not in positions)

    def _ring(self) -> None:
        ring_all(self._waiters)

    def _take_bell(self) -> Bell | None:
        with self._lock:
            if self._idle_bells:
                return self._idle_bells.pop()
            try:
                bell = Bell(self._waiters)
            except OSError:  # read-only, or a file system without FIFOs: look once a second
                return None
            self._bells.add(bell)
            return bell

    def _return_bell(self, bell: Bell | None) -> None:
        if bell is None:
            return
        with self._lock:
            if self._closed.is_set():
                self._bells.discard(bell)
                bell.close()
            else:
                self._idle_bells.append(bell)

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise Rejected("log: it was closed; open a new one")
        if os.getpid() != self._pid:
            raise Rejected("log: it was opened before a fork; open a new one in the child")
