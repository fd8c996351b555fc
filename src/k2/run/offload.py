"""Moves rows from hot, and frames from the log, into cold: each exactly once, by log offset.

What is moved next follows from the watermark inside cold's last commit and nothing else, so a
crash at any point leaves nothing to repair: the next run starts from whatever was committed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import pyarrow as pa

from k2.cold.base import Cold
from k2.errors import Corrupt, InUse, NotSuccessor, Rejected, Unavailable
from k2.hot.base import Hot
from k2.log.base import Log
from k2.model import LogBatch, Positions
from k2.schema import CANDLES, FRAMES, HOT_ROW_TABLES, arrow_schema
from k2.settings import Settings

READER = "offload"
CLOSED_BEFORE = "k2.closed_before_ns"
COLD_TABLES = (*(t.name for t in HOT_ROW_TABLES), FRAMES.name, CANDLES.name)

CHUNK_BYTES = 64 << 20  # most bytes of frames in one commit
READ_FRAMES = 10_000
CANDLE_LATENESS_NS = 10 * 10**9  # a candle is moved this long after its end; later trades make a new revision
IDLE_COMMIT_SECONDS = 600.0  # how often a table without rows says how far it is, so that others may forget
RETENTION_SECONDS = 600.0
_STEP_SECONDS_MAX = 5.0
_BACKOFF_FIRST_SECONDS, _BACKOFF_MAX_SECONDS = 0.5, 30.0
_NS = 10**9

logger = logging.getLogger(__name__)


@dataclass
class OffloadResult:
    """What one run did. Counts are per table; only tables something happened to are in them."""

    rows: dict[str, int] = field(default_factory=dict)
    commits: dict[str, int] = field(default_factory=dict)
    deleted: dict[str, int] = field(default_factory=dict)
    trimmed: dict[str, int] = field(default_factory=dict)

    def add(self, table: str, rows: int) -> None:
        """Count one commit."""
        self.rows[table] = self.rows.get(table, 0) + rows
        self.commits[table] = self.commits.get(table, 0) + 1


class Offloader:
    """Moves what ingest has finished into cold. Used by one thread; `stop` may be called from any.

    `progress` gives ingest's committed offsets per partition (exclusive end): rows below are in
    hot, all of them. `expected(table, start, end)` says how many rows ingest put into a range, or
    None where it cannot say; a table that holds more or fewer is not moved.
    """

    def __init__(
        self,
        settings: Settings,
        log: Log,
        hot: Hot,
        cold: Cold,
        progress: Callable[[], Positions],
        expected: Callable[[str, Positions, Positions], int | None] | None = None,
        *,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self._settings = settings
        self._log = log
        self._hot = hot
        self._cold = cold
        self._progress = progress
        self._expected = expected or (lambda _table, _start, _end: None)
        self._clock = clock
        self._waiting_since: dict[str, float] = {}
        self._moved_at: dict[str, float] = {}
        self._retained_at = self._maintained_at = time.monotonic()
        self._stopping = threading.Event()
        self.totals = OffloadResult()

    # -- life --------------------------------------------------------------------------

    def run_once(self, force: bool = False) -> OffloadResult:
        """Move what is due, everything there is with `force`; then let log and hot forget what cold holds.

        Raises:
            InUse: somebody else writes to cold.
            NotSuccessor: somebody else did meanwhile; call again.
            Corrupt: hot does not hold the rows ingest accounted for; nothing of the range was moved.
            StoreDown: call again.
        """
        self._cold.acquire_lease()
        done = OffloadResult()
        progress = dict(self._progress())
        for table in HOT_ROW_TABLES:
            self._move_rows(table.name, progress, force, done)
        self._move_frames(force, done)
        self._move_candles(progress, force, done)
        self._let_go(force, done)
        return done

    def drain(self) -> OffloadResult:
        """Move everything there is now."""
        return self.run_once(force=True)

    def run_forever(self, stop: threading.Event | None = None) -> None:
        """Move, wait, maintain, until `stop` is set. What may pass is waited out, everything else is raised."""
        stop = stop or self._stopping
        self._stopping = stop
        backoff = _BACKOFF_FIRST_SECONDS
        while not stop.is_set():
            try:
                self.run_once()
                self._maintain_when_due()
                backoff = _BACKOFF_FIRST_SECONDS
                stop.wait(min(_STEP_SECONDS_MAX, max(0.05, self._settings.cold.commit_seconds / 4)))
            except (Unavailable, NotSuccessor) as error:
                logger.warning("offload goes on in %.1f s: %s", backoff, error)
                stop.wait(backoff)
                backoff = min(backoff * 2, _BACKOFF_MAX_SECONDS)

    def stop(self) -> None:
        """End `run_forever` after the commit it is in."""
        self._stopping.set()

    def watermarks(self) -> dict[str, dict[str, int]]:
        """Return per cold table the offsets it holds everything below of."""
        return {table: dict(self._cold.pin(table).watermark) for table in COLD_TABLES}

    def lag(self) -> dict[str, int]:
        """Return per cold table how many log offsets it is behind what could be moved."""
        progress, log_end = dict(self._progress()), self._log_end()
        return {
            table: sum(
                max(0, end - marks.get(p, 0)) for p, end in (log_end if table == FRAMES.name else progress).items()
            )
            for table, marks in self.watermarks().items()
        }

    # -- rows of hot -------------------------------------------------------------------

    def _move_rows(self, table: str, progress: Positions, force: bool, done: OffloadResult) -> None:
        start, end = self._range(table, progress)
        if not end:
            self._waiting_since.pop(table, None)
            return
        waiting = self._hot.counts(table, start, end)
        self._check(table, start, end, waiting)
        if not waiting:
            self._move_watermark(table, start, end, force, done)
            return
        if not (force or waiting >= self._settings.cold.commit_rows or self._due(table)):
            return
        for chunk_start, chunk_end in self._chunks(table, start, end, waiting):
            rows = self._read(table, chunk_start, chunk_end)
            self._commit(table, rows, chunk_start, chunk_end, done)
            if self._stopping.is_set() and not force:
                return

    def _range(self, table: str, limit: Positions) -> tuple[dict[str, int], dict[str, int]]:
        """Return what lags: start and end of the partitions cold is behind in."""
        marks = self._cold.pin(table).watermark
        end = {p: offset for p, offset in limit.items() if offset > marks.get(p, 0)}
        return {p: marks.get(p, 0) for p in end}, end

    def _due(self, table: str) -> bool:
        """Whether rows of the table were first seen waiting `commit_seconds` ago."""
        since = self._waiting_since.setdefault(table, time.monotonic())
        return time.monotonic() - since >= self._settings.cold.commit_seconds

    def _move_watermark(
        self,
        table: str,
        start: Positions,
        end: Positions,
        force: bool,
        done: OffloadResult,
        properties: dict[str, str] | None = None,
    ) -> None:
        """Commit that a range holds no rows: at once when forced, else now and then."""
        moved = self._moved_at.setdefault(table, time.monotonic())
        if force or time.monotonic() - moved >= IDLE_COMMIT_SECONDS:
            self._commit(table, _no_rows(table), start, end, done, properties)

    def _chunks(
        self, table: str, start: Positions, end: Positions, rows: int
    ) -> Iterator[tuple[dict[str, int], dict[str, int]]]:
        """Cut a range so that each part has at most `commit_rows` rows, or is a single offset per partition."""
        done = dict(start)
        while done != dict(end):
            cut = dict(end)
            if rows > self._settings.cold.commit_rows:
                cut = self._largest(table, done, end)
                rows -= self._hot.counts(table, done, cut)
            moving = [p for p in cut if cut[p] > done[p]]
            yield {p: done[p] for p in moving}, {p: cut[p] for p in moving}
            done = cut

    def _largest(self, table: str, start: Positions, end: Positions) -> dict[str, int]:
        """Return the farthest ends, the same share of every partition's range, that hold few enough rows."""
        span = max(end[p] - start[p] for p in end)
        low, high = 1, span  # in parts of `span`
        while low < high:
            middle = (low + high + 1) // 2
            if self._hot.counts(table, start, _share(start, end, middle, span)) <= self._settings.cold.commit_rows:
                low = middle
            else:
                high = middle - 1
        return _share(start, end, low, span)

    def _read(self, table: str, start: Positions, end: Positions) -> pa.Table:
        rows = self._hot.read_range(table, start, end)
        counted = self._hot.counts(table, start, end)
        if counted != rows.num_rows:
            raise Corrupt(
                f"offload {table!r} {_text(start, end)}: hot counts {counted} rows and hands out {rows.num_rows}; "
                "nothing was moved"
            )
        self._check(table, start, end, counted)
        return rows

    def _check(self, table: str, start: Positions, end: Positions, found: int) -> None:
        """Compare with ingest's own account; a surplus is as wrong as a deficit."""
        expected = self._expected(table, start, end)
        if expected is not None and expected != found:
            raise Corrupt(
                f"offload {table!r} {_text(start, end)}: ingest put {expected} rows there, hot holds {found}: "
                f"{abs(expected - found)} too {'many' if found > expected else 'few'}; nothing was moved"
            )

    def _commit(
        self,
        table: str,
        rows: pa.Table,
        start: Positions,
        end: Positions,
        done: OffloadResult,
        properties: dict[str, str] | None = None,
    ) -> None:
        begun = time.monotonic()
        self._cold.append(table, rows, start=start, end=end, properties=properties)
        self._waiting_since.pop(table, None)
        self._moved_at[table] = time.monotonic()
        done.add(table, rows.num_rows)
        self.totals.add(table, rows.num_rows)
        seconds = time.monotonic() - begun
        logger.info("moved %d rows of %s %s in %.2f s", rows.num_rows, table, _text(start, end), seconds)

    # -- frames of the log -------------------------------------------------------------

    def _move_frames(self, force: bool, done: OffloadResult) -> None:
        table = FRAMES.name
        start, end = self._range(table, self._log_end())
        if not end:
            self._waiting_since.pop(table, None)
            return
        waiting = sum(end[p] - start[p] for p in end)
        if not (force or waiting >= self._settings.cold.commit_rows or self._due(table)):
            return
        chunk = _FrameChunk(start)
        for partition in sorted(end):
            while (position := chunk.position(partition)) < end[partition]:
                most = min(READ_FRAMES, end[partition] - position)
                chunk.take(partition, self._read_frames(partition, position, most))
                if chunk.size >= CHUNK_BYTES or chunk.count >= self._settings.cold.commit_rows:
                    self._commit(table, chunk.rows(), chunk.start, chunk.end, done)
                    chunk = chunk.following()
                    if self._stopping.is_set() and not force:
                        return
        if chunk.end:
            self._commit(table, chunk.rows(), chunk.start, chunk.end, done)

    def _log_end(self) -> dict[str, int]:
        return {p: self._log.end_offset(p) for p in self._log.partitions()}

    def _read_frames(self, partition: str, position: int, most: int) -> list[LogBatch] | int:
        """Read on, or return where a damaged stretch ends: it is reported, and left out of cold."""
        try:
            batches = self._log.read(partition, position, max_frames=most, max_bytes=CHUNK_BYTES // 4)
        except Corrupt as error:
            first, end = getattr(error, "first_offset", None), getattr(error, "end_offset", None)
            if first is None or end is None or end <= position:
                raise
            if first > position:
                return self._read_frames(partition, position, min(most, first - position))
            logger.error(
                "offload: frames %d to %d of %s are damaged in the log: %s", position, end - 1, partition, error
            )
            return int(end)
        except Rejected as error:
            raise Corrupt(
                f"offload frames of {partition!r} from {position}: the log has removed them before cold held them "
                f"({error}); cold cannot go on from there without a hole"
            ) from error
        if not batches:
            raise Corrupt(f"offload frames of {partition!r}: the log ends before {position}, which it said it holds")
        return batches

    # -- candles -----------------------------------------------------------------------

    def _move_candles(self, progress: Positions, force: bool, done: OffloadResult) -> None:
        table = CANDLES.name
        if not (force or self._due(table)):
            return
        self._waiting_since.pop(table, None)
        start, end = self._range(table, progress)
        after_ns = int(self._cold.properties(table).get(CLOSED_BEFORE, "0"))
        before_ns = max(after_ns, self._clock() - CANDLE_LATENESS_NS)
        rows = self._hot.closed_candles(start, end, after_ns, before_ns)
        properties = {CLOSED_BEFORE: str(before_ns)}
        if rows.num_rows:
            self._commit(table, rows, start, end, done, properties)
        elif end:
            self._move_watermark(table, start, end, force, done, properties)

    # -- letting go --------------------------------------------------------------------

    def _let_go(self, force: bool, done: OffloadResult) -> None:
        """Tell the log what is not needed any more, and now and then delete and trim."""
        held = self._held_by_all()
        # Also at 0: only a reader the log knows keeps it from forgetting what cold does not hold.
        self._log.commit_reader(READER, held)
        if not force and time.monotonic() - self._retained_at < RETENTION_SECONDS:
            return
        self._retained_at = time.monotonic()
        below = {p: offset for p, offset in held.items() if offset}
        if below:
            before_ns = self._clock() - self._settings.hot.retention_seconds * _NS
            done.deleted = {t: n for t, n in self._hot.delete(below, before_ns).items() if n}
        done.trimmed = self._log.trim(keep_seconds=self._settings.log.retention_seconds)

    def _held_by_all(self) -> dict[str, int]:
        """Return per partition the offset below which every cold table holds everything."""
        marks = self.watermarks()
        return {p: min(m.get(p, 0) for m in marks.values()) for p in self._log.partitions()}

    def _maintain_when_due(self) -> None:
        if time.monotonic() - self._maintained_at < self._settings.cold.maintain_seconds:
            return
        self._maintained_at = time.monotonic()
        try:
            for table in self._cold.maintain(now_ns=self._clock()):
                logger.info("maintained %s", table)
        except InUse as error:
            logger.info("maintenance is left to the one running: %s", error)


class _FrameChunk:
    """Frames collected for one commit, as columns."""

    def __init__(self, start: Positions) -> None:
        self._from = dict(start)
        self.end: dict[str, int] = {}
        self.size = self.count = 0
        self._tables: list[pa.Table] = []

    @property
    def start(self) -> dict[str, int]:
        return {p: self._from[p] for p in self.end}

    def position(self, partition: str) -> int:
        """Return the offset to read on from."""
        return self.end.get(partition, self._from[partition])

    def following(self) -> _FrameChunk:
        """Return an empty chunk that goes on where this one ends."""
        return _FrameChunk({**self._from, **self.end})

    def take(self, partition: str, batches: list[LogBatch] | int) -> None:
        """Add what was read, or skip to an offset."""
        if isinstance(batches, int):
            self.end[partition] = batches
            return
        for batch in batches:
            self._tables.append(frame_rows(batch))
            self.size += sum(len(f.data) for f in batch.frames)
            self.count += len(batch.frames)
        self.end[partition] = batches[-1].end_offset

    def rows(self) -> pa.Table:
        return pa.concat_tables([_no_rows(FRAMES.name), *self._tables])


def frame_rows(batch: LogBatch) -> pa.Table:
    """Return the frames of a batch as rows of `schema.FRAMES`."""
    frames, count = batch.frames, len(batch.frames)
    columns: Mapping[str, list[object]] = {
        "exchange": [batch.partition] * count,
        "kind": [f.kind for f in frames],
        "connection": [f.connection for f in frames],
        "epoch": [f.epoch for f in frames],
        "counter": [f.counter for f in frames],
        "data": [f.data for f in frames],
        "origin": [f.origin for f in frames],
        "received_ns": [f.received_ns for f in frames],
        "source": [f.source for f in frames],
        "log_partition": [batch.partition] * count,
        "log_offset": list(range(batch.base_offset, batch.end_offset)),
        "row_in_frame": [0] * count,
        "logged_ns": [batch.logged_ns] * count,
    }
    return pa.Table.from_pydict(dict(columns), schema=arrow_schema(FRAMES))


def _no_rows(table: str) -> pa.Table:
    declared = next(t for t in (*HOT_ROW_TABLES, FRAMES, CANDLES) if t.name == table)
    return arrow_schema(declared).empty_table()


def _share(start: Positions, end: Positions, part: int, span: int) -> dict[str, int]:
    """Return the ends after `part` of `span` parts of every partition's range, rounded up; `span` parts are all."""
    return {p: start[p] + -(-(end[p] - start[p]) * part // span) for p in end}


def _text(start: Positions, end: Positions) -> str:
    return ", ".join(f"{p} [{start.get(p, 0)}, {end[p]})" for p in sorted(end)) or "(no new offsets)"
