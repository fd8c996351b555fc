"""Moves rows from hot, and frames from the log, into cold: each exactly once, by log offset.

What is moved next follows from the watermark inside cold's last commit and nothing else, so a
crash at any point leaves nothing to repair: the next run starts from whatever was committed.
"""

from __future__ import annotations

import logging
import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pyarrow as pa

from k2 import crash, meters
from k2.cold.base import Cold
from k2.errors import Corrupt, InUse, NotSuccessor, Rejected, StoreDown, Unavailable
from k2.hot.base import Hot
from k2.log.base import Log
from k2.log.damage import Damage, read_on
from k2.log.times import STEP_NS
from k2.model import LogBatch, Positions
from k2.run.frames import FrameChunk
from k2.run.normalise import REPEAT_WINDOW
from k2.schema import CANDLES, FRAMES, HOT_ROW_TABLES, arrow_schema
from k2.settings import Settings

READER = "offload"
CLOSED_BEFORE = "k2.closed_before_ns"
COLD_TABLES = (*(t.name for t in HOT_ROW_TABLES), FRAMES.name, CANDLES.name)

CHUNK_BYTES = 64 << 20  # most bytes of frames in one commit
READ_FRAMES = 10_000
CANDLE_LATENESS_NS = 10 * 10**9  # a candle is moved when so much more was logged; later trades make a new revision
PARKED_SECONDS = 60.0  # how often a table that cannot be moved as it stands is tried again
READ_AHEAD = 1  # what the next commit moves is read while one is made: two are in memory
GOOD_SHARE = 0.9  # of `cold.commit_rows`: a commit of so many is large enough not to look for a larger one
COMMIT_ATTEMPTS = 5  # of one commit, when something else than its own range was committed in between
_STEP_SECONDS_MAX = 5.0
_BACKOFF_FIRST_SECONDS, _BACKOFF_MAX_SECONDS = 0.5, 30.0
_NS = 10**9

Chunk = tuple[pa.Table, dict[str, int], dict[str, int]]
"""Rows of one commit, and its range: start and end (exclusive) per partition."""

_PASSING = (Unavailable, NotSuccessor, Corrupt)

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
    None where it cannot say; a table that holds more or fewer is parked. `boundaries(start, end)`
    gives the offsets within a range, rising, at which `expected` can say: commits end there if they can.
    `generation` says which hot this is, and whether it is being made anew: rows read from another one, or from half
    of one, are not committed.
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
        boundaries: Callable[[Positions, Positions], Sequence[Positions]] | None = None,
        generation: Callable[[], tuple[str, bool]] = lambda: ("", False),
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self._settings = settings
        self._log = log
        self._hot = hot
        self._cold = cold
        self._progress = progress
        self._expected = expected or (lambda _table, _start, _end: None)
        self._boundaries = boundaries or (lambda _start, _end: ())
        self._generation = generation
        self._of_generation = ""
        self._clock = clock
        self._parked: dict[str, _Parked] = {}
        self._waiting_since: dict[str, float] = {}
        self._moved_at: dict[str, float] = {}
        self._retained_at = self._maintained_at = time.monotonic()
        self._stopping = threading.Event()
        self.totals = OffloadResult()

    # -- life --------------------------------------------------------------------------

    @property
    def parked(self) -> str:
        """Which tables are not moved until somebody looks, and why; empty when all is well."""
        return "; ".join(f"{table}: {parked.reason}" for table, parked in sorted(self._parked.copy().items()))

    def run_once(self, force: bool = False) -> OffloadResult:
        """Move what is due, everything there is with `force`; then let log and hot forget what cold holds.

        What fails for one table keeps no other from moving. It is raised at the end, the first
        that does not pass by itself before the others.

        Raises:
            InUse: somebody else writes to cold.
            NotSuccessor: somebody else did meanwhile; call again.
            Corrupt: hot does not hold the rows ingest accounted for; nothing of the range was moved. The
                table is parked: without `force` it is left out for a minute.
            StoreDown: call again.
        """
        self._cold.acquire_lease()
        done = OffloadResult()
        self._of_generation = generation = self._settled_generation()
        progress = dict(self._progress())
        self._check_generation(generation)
        failures: list[Exception] = []
        for table in COLD_TABLES:
            if force or not self._rests(table):
                self._try(lambda table=table: self._move(table, progress, force, done), failures, table)  # type: ignore[misc]
            if self._stopping.is_set() and not force:
                break
        self._try(lambda: self._let_go(force, done), failures)
        if failures:
            raise next((f for f in failures if not isinstance(f, _PASSING)), failures[0])
        return done

    def _move(self, table: str, progress: Positions, force: bool, done: OffloadResult) -> None:
        if table == FRAMES.name:
            self._move_frames(force, done)
        elif table == CANDLES.name:
            self._move_candles(progress, force, done)
        else:
            self._move_rows(table, progress, force, done)

    def _try(self, step: Callable[[], None], failures: list[Exception], table: str = "") -> None:
        try:
            step()
        except Corrupt as error:
            self._park(table or "retention", str(error))
            failures.append(error)
        except Exception as error:  # noqa: BLE001 - raised when the other tables had their turn
            failures.append(error)
        else:
            if self._parked.pop(table or "retention", None):
                logger.warning("offload: %s is moved again", table or "retention")

    def _park(self, table: str, reason: str) -> None:
        before = self._parked.get(table)
        self._parked[table] = _Parked(reason, time.monotonic() + PARKED_SECONDS)
        if before is None or before.reason != reason:
            logger.error("offload: %s is parked, and tried again every %d s: %s", table, PARKED_SECONDS, reason)

    def _rests(self, table: str) -> bool:
        parked = self._parked.get(table)
        return parked is not None and time.monotonic() < parked.until

    def drain(self) -> OffloadResult:
        """Move everything there is now, also what was parked."""
        return self.run_once(force=True)

    def run_forever(self, stop: threading.Event | None = None) -> None:
        """Move, wait, maintain, until `stop` is set. What may pass is waited out, what is parked left out for a while.

        Raises what neither passes nor concerns one table alone, such as InUse.
        """
        stop = stop or self._stopping
        self._stopping = stop
        backoff = _BACKOFF_FIRST_SECONDS
        while not stop.is_set():
            wait = min(_STEP_SECONDS_MAX, max(0.05, self._settings.cold.commit_seconds / 4))
            try:
                self.run_once()
                backoff = _BACKOFF_FIRST_SECONDS
            except Corrupt as error:  # reported when it was parked
                logger.debug("offload goes on with the other tables: %s", error)
            except (Unavailable, NotSuccessor) as error:
                wait, backoff = backoff, min(backoff * 2, _BACKOFF_MAX_SECONDS)
                meters.acted("cold.retry", waited_seconds=wait)
                logger.warning("offload goes on in %.1f s: %s", wait, error)
            self._maintain_when_due()
            stop.wait(wait)

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

    def _settled_generation(self) -> str:
        """Return which hot this is; raises StoreDown while it is being made anew."""
        identity, is_rebuilding = self._generation()
        if is_rebuilding:
            raise StoreDown("offload waits: hot is being made anew")
        return identity

    def _check_generation(self, identity: str) -> None:
        """Raise StoreDown when hot was made anew since: what was read of it may be half of it."""
        if self._settled_generation() != identity:
            raise StoreDown("offload starts again: hot was made anew meanwhile")

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
        for rows, chunk_start, chunk_end in read_ahead(self._read_chunks(table, start, end, waiting)):
            crash.point("offload.rows.read")
            self._commit(table, rows, chunk_start, chunk_end, done)
            if self._stopping.is_set() and not force:
                return

    def _read_chunks(self, table: str, start: Positions, end: Positions, waiting: int) -> Iterator[Chunk]:
        for chunk_start, chunk_end in self._chunks(table, start, end, waiting):
            yield self._read(table, chunk_start, chunk_end), chunk_start, chunk_end

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
        """Commit that a range holds no rows: at once when forced, else now and then, so that others may forget."""
        moved = self._moved_at.setdefault(table, time.monotonic())
        if force or time.monotonic() - moved >= self._settings.cold.maintain_seconds:
            self._commit(table, _no_rows(table), start, end, done, properties)

    def _chunks(
        self, table: str, start: Positions, end: Positions, rows: int
    ) -> Iterator[tuple[dict[str, int], dict[str, int]]]:
        """Cut a range so that each part has at most `commit_rows` rows, or is a single offset per partition.

        Cuts are at boundaries; inside only where the rows between two do not fit.
        """
        done = dict(start)
        bounds = [dict(b) for b in self._boundaries(start, end)] if rows > self._settings.cold.commit_rows else []
        while done != dict(end):
            cut = dict(end)
            if rows > self._settings.cold.commit_rows:
                bounds = [b for b in bounds if b != done and all(b[p] >= done[p] for p in done)]
                cut = self._farthest(table, done, bounds) or self._largest(table, done, bounds[0] if bounds else end)
                rows -= self._count(table, done, cut)
            moving = [p for p in cut if cut[p] > done[p]]
            yield {p: done[p] for p in moving}, {p: cut[p] for p in moving}
            done = cut

    def _farthest(self, table: str, start: Positions, bounds: Sequence[dict[str, int]]) -> dict[str, int] | None:
        """Return the last of rising bounds up to which few enough rows are, or None when there is none."""
        most = self._settings.cold.commit_rows
        fitting = bisect_right(bounds, most, key=lambda bound: self._count(table, start, bound))
        return bounds[fitting - 1] if fitting else None

    def _largest(self, table: str, start: Positions, end: Positions) -> dict[str, int]:
        """Return far ends, the same share of every partition's range, that hold few enough rows.

        Mostly rows are spread evenly, and the first guess will do; a count of many takes as long as moving some.
        """
        most = self._settings.cold.commit_rows
        span = max(end[p] - start[p] for p in end)
        low, low_rows = 0, 0  # in parts of `span`
        high, high_rows = span, self._count(table, start, end)
        if high_rows <= most:
            return dict(end)
        guesses = 0
        while high - low > 1 and low_rows < GOOD_SHARE * most:
            wanted = most * (1 + GOOD_SHARE) / 2 if guesses else most
            part = (wanted - low_rows) / (high_rows - low_rows) if guesses % 2 == 0 else 0.5
            guess = min(max(low + int((high - low) * part), low + 1), high - 1)
            rows = self._count(table, start, _share(start, end, guess, span))
            if rows <= most:
                low, low_rows = guess, rows
            else:
                high, high_rows = guess, rows
            guesses += 1
        return _share(start, end, max(1, low), span)

    def _count(self, table: str, start: Positions, end: Positions) -> int:
        """Return the rows of a range by ingest's account, which is quick, or by hot's own where that cannot say."""
        expected = self._expected(table, start, end)
        return self._hot.counts(table, start, end) if expected is None else expected

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
        if expected is None or expected == found:
            return
        first, last = self._first_wrong(table, start, end)
        narrow = self._expected(table, first, last)
        if narrow is not None:
            start, end, expected, found = first, last, narrow, self._hot.counts(table, first, last)
        raise Corrupt(
            f"offload {table!r} {_text(start, end)}: ingest put {expected} rows there, hot holds {found}: "
            f"{abs(expected - found)} too {'many' if found > expected else 'few'}; nothing was moved"
        )

    def _first_wrong(self, table: str, start: Positions, end: Positions) -> tuple[Positions, Positions]:
        """Return the part between two boundaries where counts begin to differ, so that the report does not grow."""
        bounds = list(self._boundaries(start, end))

        def is_wrong(bound: Positions) -> bool:
            return self._expected(table, start, bound) not in (None, self._hot.counts(table, start, bound))

        wrong = bisect_left(bounds, True, key=is_wrong)
        return bounds[wrong - 1] if wrong else start, bounds[wrong] if wrong < len(bounds) else end

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
        self._check_generation(self._of_generation)
        self._log.make_durable(end)
        self._append(table, rows, start, end, properties)
        self._waiting_since.pop(table, None)
        self._moved_at[table] = time.monotonic()
        done.add(table, rows.num_rows)
        self.totals.add(table, rows.num_rows)
        seconds = time.monotonic() - begun
        logger.info("moved %d rows of %s %s in %.2f s", rows.num_rows, table, _text(start, end), seconds)

    def _append(
        self, table: str, rows: pa.Table, start: Positions, end: Positions, properties: dict[str, str] | None
    ) -> None:
        """Append, at once again where somebody merely maintained the table: who does that often must not starve us."""
        for attempt in range(1, COMMIT_ATTEMPTS + 1):
            try:
                self._cold.append(table, rows, start=start, end=end, properties=properties)
                return
            except NotSuccessor:
                marks = self._cold.pin(table).watermark
                if attempt == COMMIT_ATTEMPTS or any(marks.get(p, 0) != start.get(p, 0) for p in end):
                    meters.acted("cold.commit_attempts")
                    raise

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
        for rows, chunk_start, chunk_end in read_ahead(self._frame_chunks(start, end)):
            self._commit(table, rows, chunk_start, chunk_end, done)
            if self._stopping.is_set() and not force:
                return

    def _frame_chunks(self, start: Positions, end: Positions) -> Iterator[Chunk]:
        chunk = FrameChunk(start)
        for partition in sorted(end):
            while (position := chunk.position(partition)) < end[partition]:
                most = min(READ_FRAMES, end[partition] - position)
                chunk.take(partition, self._read_frames(partition, position, most))
                crash.point("offload.frames.read")
                if chunk.size >= CHUNK_BYTES or chunk.count >= self._settings.cold.commit_rows:
                    yield chunk.rows(), chunk.start, chunk.end
                    chunk = chunk.following()
        if chunk.end:
            yield chunk.rows(), chunk.start, chunk.end

    def _log_end(self) -> dict[str, int]:
        return {p: self._log.end_offset(p) for p in self._log.partitions()}

    def _read_frames(self, partition: str, position: int, most: int) -> list[LogBatch | Damage]:
        """Read on; a damaged stretch is reported, and left out of cold."""
        try:
            found = read_on(self._log, partition, position, max_frames=most, max_bytes=CHUNK_BYTES // 4)
        except Rejected as error:
            raise Corrupt(
                f"offload frames of {partition!r} from {position}: the log has removed them before cold held them "
                f"({error}); cold cannot go on from there without a hole"
            ) from error
        if not found:
            raise Corrupt(f"offload frames of {partition!r}: the log ends before {position}, which it said it holds")
        for damage in found:
            if isinstance(damage, Damage):
                logger.error(
                    "offload: frames %d to %d of %s are %s", position, damage.end_offset - 1, partition, damage.detail
                )
        return found

    # -- candles -----------------------------------------------------------------------

    def _move_candles(self, progress: Positions, force: bool, done: OffloadResult) -> None:
        table = CANDLES.name
        if not (force or self._due(table)):
            return
        start, end = self._range(table, progress)
        after_ns = int(self._cold.properties(table).get(CLOSED_BEFORE, "0"))
        before_ns = self._closed_before(progress, after_ns)
        rows = self._hot.closed_candles(start, end, after_ns, before_ns)
        properties = {CLOSED_BEFORE: str(before_ns)}
        if rows.num_rows:
            crash.point("offload.candles.read")
            self._commit(table, rows, start, end, done, properties)
            crash.point("offload.candles.committed")
        elif end:
            self._move_watermark(table, start, end, force, done, properties)
        self._waiting_since.pop(table, None)

    def _closed_before(self, progress: Positions, after_ns: int) -> int:
        """Return the time before which candles are closed: shortly before the newest frame turned into rows was logged.

        Not by the clock of this process: what was logged later may still hold trades of an earlier time,
        and nothing but the log then says how far the data goes. It does not go back, unless the logged time
        did by more than its own clock errors allow (see `k2.log.times`): what was taken for
        closed meanwhile then gets a new revision when it is.
        """
        latest_ns = self._clock() + STEP_NS  # beyond it a frame was logged by a wrong clock
        logged = [self._logged_ns(p, offset - 1) for p, offset in progress.items() if offset]
        newest_ns = max((ns for ns in logged if ns <= latest_ns), default=0)
        before_ns = newest_ns - CANDLE_LATENESS_NS
        return before_ns if 0 < newest_ns < after_ns - STEP_NS else max(after_ns, before_ns)

    def _logged_ns(self, partition: str, offset: int) -> int:
        """Return when a frame was logged; 0 where the log does not tell."""
        try:
            found = read_on(self._log, partition, offset, end=offset + 1)
        except Rejected:
            return 0
        return found[0].logged_ns if found else 0

    # -- letting go --------------------------------------------------------------------

    def _let_go(self, force: bool, done: OffloadResult) -> None:
        """Tell the log what is not needed any more, and now and then delete and trim."""
        held = self._held_by_all()
        # Also at 0: only a reader the log knows keeps it from forgetting what cold does not hold.
        # A hot tier made anew from cold begins there, and what came just before tells it what is a repeat.
        self._log.commit_reader(READER, {p: max(0, offset - REPEAT_WINDOW) for p, offset in held.items()})
        crash.point("offload.let_go.noted")
        if not force and time.monotonic() - self._retained_at < self._settings.cold.maintain_seconds:
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
        except (Unavailable, NotSuccessor, Corrupt) as error:
            logger.error("maintenance is left for the next time: %s", error)


def read_ahead(chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """Give what `chunks` gives; the next one, never more, is read while the caller works on the last."""
    with ThreadPoolExecutor(READ_AHEAD, thread_name_prefix="k2-read-ahead") as pool:
        following = pool.submit(next, chunks, None)
        while (found := following.result()) is not None:
            following = pool.submit(next, chunks, None)
            yield found


@dataclass(frozen=True)
class _Parked:
    reason: str
    until: float  # monotonic


def _no_rows(table: str) -> pa.Table:
    declared = next(t for t in (*HOT_ROW_TABLES, FRAMES, CANDLES) if t.name == table)
    return arrow_schema(declared).empty_table()


def _share(start: Positions, end: Positions, part: int, span: int) -> dict[str, int]:
    """Return the ends after `part` of `span` parts of every partition's range, rounded up; `span` parts are all."""
    return {p: start[p] + -(-(end[p] - start[p]) * part // span) for p in end}


def _text(start: Positions, end: Positions) -> str:
    return ", ".join(f"{p} [{start.get(p, 0)}, {end[p]})" for p in sorted(end)) or "(no new offsets)"
