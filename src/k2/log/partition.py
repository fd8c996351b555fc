"""One partition of the embedded log: a folder of segments, used by several threads and processes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import threading
import time
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import msgspec

from k2 import crash, meters
from k2.durable import make_folder, sync_folder
from k2.errors import Corrupt, Misconfigured, StoreDown
from k2.log import codec, form, reading, segment
from k2.log.failures import is_damage, store_down, told
from k2.log.groupcommit import GroupCommit, Request
from k2.log.limits import check_offset, collect
from k2.log.recovery import Repair, recover, report, suspect_mark
from k2.log.times import STEP_NS, StepWatch, told_step
from k2.model import Frame, LogBatch

T = TypeVar("T")
LOCK_FILE = ".lock"
LOCK_SECONDS = 60.0
ATTEMPTS = 100  # each one more means that another process rotated or trimmed in between


class Options(msgspec.Struct, frozen=True):
    """How a log writes; see `EmbeddedLog`."""

    sync: segment.Sync
    segment_bytes: int
    segment_seconds: float
    queue_frames: int
    queue_bytes: int
    clock: Callable[[], int]


class Partition:
    """The folder of one exchange.

    Every process that uses it holds a shared lock on it for as long. Who can get the lock
    for itself alone is the first, and mends what the last one left behind before SQLite sees it.
    """

    def __init__(
        self,
        folder: Path,
        options: Options,
        connections: reading.Connections,
        committed: Callable[[], None],
        rotated: Callable[[Partition], object] = lambda _: None,
    ) -> None:
        self.folder = folder
        self.name = folder.name
        self.repairs: list[Repair] = []
        self._options = options
        self._connections = connections
        self._committed = committed
        self._rotated = rotated
        self._writer: segment.Writer | None = None
        self._group = GroupCommit(self._commit, max_frames=options.queue_frames, max_bytes=options.queue_bytes)
        self._opening = threading.Lock()
        self._lock_fd: int | None = None
        self._watch = StepWatch()

    def use(self, *, make: bool = False) -> bool:
        """Take part in the partition, as the first one mend it; False when there is none and none was to be made."""
        if self._lock_fd is not None:
            return True
        with self._opening, told("open", self.folder):
            if self._lock_fd is None and (make or self.folder.is_dir()):
                if not self.folder.is_dir():
                    make_folder(self.folder)
                if make:  # also where a kill came between folder and stamp: a new log must not look like an old one
                    form.begin(self.folder.parent)
                self._lock_fd = self._enter()
        return self._lock_fd is not None

    def append(self, frames: Sequence[Frame], producer: str, sequence: int) -> int:
        """Store a batch; see the port."""
        self.use(make=True)
        codec_number, blob = codec.encode(frames)
        return self._group.submit(Request(len(frames), codec_number, blob, zlib.crc32(blob), producer, sequence))

    def producer_sequence(self, producer: str) -> int | None:
        """Return the last stored sequence of a producer."""
        query = "SELECT sequence FROM producers WHERE producer = ?"
        row = self._on_newest(lambda connection, _: connection.execute(query, (producer,)).fetchone(), None)
        return int(row[0]) if row else None

    def start_offset(self) -> int:
        """Return the first offset still held."""
        found = self._bases()
        return found[0] if found else 0

    def end_offset(self) -> int:
        """Return the offset the next frame will get."""
        try:
            return self._on_newest(lambda connection, base: segment.tail_of(connection, base).end_offset, 0)
        except _Damaged as damaged:
            return max(
                (end for _, end, row in reading.salvaged(damaged.path, 0) if row), default=int(damaged.path.stem)
            )

    def read(self, offset: int, max_frames: int, max_bytes: int) -> list[LogBatch]:
        """Return frames from `offset` on; see the port."""
        for attempt in range(1, ATTEMPTS + 1):
            found = self._bases()
            check_offset(self.name, offset, found[0] if found else 0)
            if not found:
                return []
            try:
                return collect(self._batches(found, offset), offset, max_frames, max_bytes)
            except (sqlite3.Error, OSError) as error:
                if attempt == ATTEMPTS or segment.bases(self.folder) == found:
                    raise store_down("read", self.folder, error) from error
        raise AssertionError

    def trim(self, passed: int | None, keep_ns: int) -> int | None:
        """Remove closed segments that end at or below `passed` and are older than that; return the new start offset."""
        found = self._bases()
        now_ns = self._options.clock()
        start_offset = None
        for index, (base_offset, end_offset) in enumerate(pairwise(found)):
            if passed is None or end_offset > passed or self._ended_ns(found[index:], now_ns) >= now_ns - keep_ns:
                break
            self.remove(base_offset)
            start_offset = end_offset
        return start_offset

    def make_durable(self) -> None:
        """Sync what was appended and is not in a synced database yet: the WAL of each segment that has one.

        The databases need nothing: SQLite syncs them itself when it moves a WAL into one. (They must not be opened and
        closed here either, that would drop SQLite's locks.)
        """
        if not self.use():
            return
        for base_offset in self._bases():
            wal = Path(f"{segment.path_of(self.folder, base_offset)}-wal")
            with told("sync", wal), contextlib.suppress(FileNotFoundError):
                descriptor = os.open(wal, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)

    def surplus(self, max_bytes: int) -> list[tuple[int, int]]:
        """Return the oldest closed segments, as (first, end) offsets, without which the rest is within a size.

        The newest one counts, and is never among them.
        """
        found = self._bases()
        with told("look at", self.folder):
            sizes = [segment.size_bytes(segment.path_of(self.folder, base)) for base in found]
        excess, surplus = sum(sizes) - max_bytes, []
        for (base_offset, end_offset), size in zip(pairwise(found), sizes, strict=False):
            if excess <= 0:
                break
            surplus.append((base_offset, end_offset))
            excess -= size
        return surplus

    def remove(self, base_offset: int) -> None:
        """Remove one closed segment, the oldest."""
        path = segment.path_of(self.folder, base_offset)
        crash.point("log.trim.before")
        with told("remove", path):
            path.unlink(missing_ok=True)
            crash.point("log.trim.half")
            segment.remove(path)
            sync_folder(self.folder)
        crash.point("log.trim.after")
        self._connections.forget(path)

    def report_given_up(self, first_offset: int, end_offset: int, what: str) -> None:
        """Warn of frames that are given up, and write it down for later."""
        name = segment.path_of(self.folder, first_offset).name
        report(self.folder, [Repair(self.name, name, what, first_offset, end_offset - first_offset)])

    def close(self) -> None:
        """Finish pending appends and release the files."""
        self._group.close()
        self._close_writer()
        with self._opening:
            if self._lock_fd is not None:
                os.close(self._lock_fd)
                self._lock_fd = None

    def _enter(self) -> int:
        fd = os.open(self.folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if _locked(fd, fcntl.LOCK_EX):
                self.repairs += recover(self.folder)
            deadline = time.monotonic() + LOCK_SECONDS
            while not _locked(fd, fcntl.LOCK_SH):
                if time.monotonic() > deadline:
                    meters.acted("log.lock")
                    raise StoreDown(
                        f"log: open {self.folder}: another process has been mending it for {LOCK_SECONDS} s"
                    )
                time.sleep(0.01)  # flock has no timeout of its own
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _commit(self, group: list[Request]) -> None:
        max_age_ns = int(self._options.segment_seconds * 1e9)
        ahead_ns = 0
        try:
            for _ in range(ATTEMPTS):
                writer = self._writer = self._writer or self._newest_open()
                now_ns = self._options.clock()
                ahead_ns = ahead_ns or self._watch.ahead(now_ns)
                if writer.append(group, now_ns, self._options.segment_bytes, max_age_ns):
                    self._committed()
                    self._report_step(writer, writer.stepped_ns or ahead_ns, now_ns, group)
                    return
                self._close_writer()
        except (sqlite3.Error, OSError) as error:
            path = self._writer.path if self._writer else self.folder
            self._close_writer()  # after an error the next append starts afresh
            if isinstance(error, sqlite3.Error) and is_damage(error):
                suspect_mark(path).touch()
            raise store_down("append to", path, error) from error
        meters.acted("log.attempts")
        raise StoreDown(
            f"log: append to {self.folder}: other processes closed {ATTEMPTS} segments meanwhile; try again"
        )

    def _report_step(self, writer: segment.Writer, step_ns: int, now_ns: int, group: list[Request]) -> None:
        if not step_ns:
            return
        first_offset = min(
            (r.base_offset for r in group if r.base_offset is not None and r.base_offset >= 0), default=-1
        )
        step = Repair(self.name, writer.path.name, told_step(step_ns, now_ns), first_offset, 0)
        with contextlib.suppress(StoreDown):  # the append is stored, whether or not there is room to tell this
            report(self.folder, [step])

    def _newest_open(self) -> segment.Writer:
        """Open the newest segment, or make it."""
        if not segment.bases(self.folder):
            segment.create(self.folder, 0, {}, 0)
        for _ in range(ATTEMPTS):
            base_offset = segment.bases(self.folder)[-1]
            writer = segment.Writer(segment.path_of(self.folder, base_offset), base_offset, self._options.sync)
            try:
                following = writer.successor()
            except BaseException:
                writer.close()
                raise
            if following is None:
                return writer
            segment.create(self.folder, *following)
            writer.close()
            self._rotated(self)
        raise StoreDown(
            f"log: append to {self.folder}: other processes closed {ATTEMPTS} segments meanwhile; try again"
        )

    def _close_writer(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def _on_newest(self, ask: Callable[[sqlite3.Connection, int], T], default: T) -> T:
        for attempt in range(1, ATTEMPTS + 1):
            found = self._bases()
            if not found:
                return default
            path = segment.path_of(self.folder, found[-1])
            try:
                with self._connections.on(path) as connection:
                    return ask(connection, found[-1])
            except sqlite3.Error as error:
                if is_damage(error):
                    raise _Damaged(path, error) from error
                if attempt == ATTEMPTS or path.exists():
                    raise store_down("read", path, error) from error
        raise AssertionError

    def _batches(self, bases: list[int], offset: int) -> Iterator[LogBatch]:
        """Give batches from the one holding `offset` up to the first damage; `Corrupt` when that is at `offset`."""
        position = offset
        first = bisect_right(bases, offset) - 1
        for base_offset, end_offset in zip(bases[first:], [*bases[first + 1 :], None], strict=True):
            path = segment.path_of(self.folder, base_offset)
            damage_end = 0
            for row_offset, row_end, row in reading.rows_from(self._connections, path, position):
                if row is None:
                    if row_end == row_offset and end_offset is None and position > offset:
                        return  # the next read tells how far it goes
                    damage_end = row_end if row_end > row_offset else end_offset or self._end_of_damage(path, position)
                    continue
                if row_offset > position:
                    damage_end = row_offset
                    break
                yield LogBatch(self.name, row_offset, row[2], _decoded(path, row))
                position, damage_end = row_end, 0
            if end_offset is not None and position < end_offset and damage_end <= position:
                damage_end = end_offset
            if damage_end > position:
                if position == offset:
                    raise _corrupt(path, position, damage_end)
                return

    def _end_of_damage(self, path: Path, position: int) -> int:
        """Return where damage ends behind which nothing was readable in the newest segment.

        Never a guess: where a segment ends nobody knows, its offsets may be given out again once it is salvaged.
        """
        end = self.end_offset()  # asked first: what is appended from now on is readable, and found by the search
        with contextlib.closing(reading.salvaged(path, position)) as found:
            end = next((row_offset for row_offset, _, row in found if row is not None), end)
        if end <= position:
            raise StoreDown(
                f"log: read {path}: damaged from offset {position} on, to an unknown end; "
                "stop what uses the log and start again, which salvages it"
            )
        return end

    def _ended_ns(self, bases: list[int], now_ns: int) -> int:
        """Return when the first of these segments ended; by a later one where a clock error put it into the future."""
        logged_ns = 0
        for base_offset in bases:
            logged_ns = self._logged_ns(segment.path_of(self.folder, base_offset), base_offset)
            if logged_ns <= now_ns + STEP_NS:
                break
        return logged_ns

    def _bases(self) -> list[int]:
        if not self.use():
            return []
        with told("list", self.folder):
            return segment.bases(self.folder)

    def _logged_ns(self, path: Path, base_offset: int) -> int:
        try:
            with self._connections.on(path) as connection:
                return segment.tail_of(connection, base_offset).logged_ns
        except sqlite3.Error as error:
            if path.exists() and not is_damage(error):
                raise store_down("read", path, error) from error
            return path.stat().st_mtime_ns if path.exists() else 0


class _Damaged(StoreDown):
    """Raised when SQLite cannot use the newest segment."""

    def __init__(self, path: Path, error: sqlite3.Error) -> None:
        super().__init__(str(store_down("read", path, error)))
        self.path = path


def _locked(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _decoded(path: Path, row: codec.Row) -> list[Frame]:
    try:
        return codec.decode(row[5], row[7])
    except ValueError as error:  # whole by its checksum, so it was written like this
        raise Misconfigured(
            f"log: read {path}: the batch at {row[0]} cannot be decoded ({error}); use the version of K2 that wrote it"
        ) from error


def _corrupt(path: Path, first_offset: int, end_offset: int) -> Corrupt:
    return Corrupt(
        f"log: read {path}: the frames {first_offset}..{end_offset - 1} of {path.parent.name!r} are damaged on disk; "
        f"read on from {end_offset}, and fetch what is missing from the exchange again",
        first_offset=first_offset,
        end_offset=end_offset,
    )
