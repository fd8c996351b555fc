"""Ingest: log -> exact rows -> memory tail -> hot, each row once, whatever dies when.

One thread reads the log, normalises and fills the tail; another flushes. A flush covers a
contiguous offset range of every partition, fixed before its first insert (see `state.py`).
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from k2 import crash, meters, schema
from k2.errors import Corrupt, Misconfigured, StoreDown, UnknownName
from k2.feeds import registry
from k2.hot.base import Hot
from k2.hot.tail import Generation, Tail
from k2.log.base import Log
from k2.log.damage import CORRUPT, GIVEN_UP, Damage, read_on
from k2.model import LogBatch
from k2.run.columnar import FEW_FRAMES, PIECE_FRAMES, RUN_FRAMES, runs
from k2.run.normalise import REPEAT_WINDOW, Normaliser, PartitionState, Row, to_arrow
from k2.run.state import FlushRecord, IngestState
from k2.settings import Settings

READER = "ingest"
TABLES = tuple(table.name for table in schema.HOT_ROW_TABLES)
_FRAME_COLUMN = schema.DEAD_LETTERS.column_names.index("frame")
_READ_FRAMES = 10_000
_NO_END = 2**62
_FLUSH_BYTES = 64 << 20  # of dead letters' frames, in one generation
_DRAIN_SECONDS = 60.0  # an orderly stop works off what the log holds for at most this long
_ORDER = [("log_partition", "ascending"), ("log_offset", "ascending"), ("row_in_frame", "ascending")]
_RETRY_FIRST_SECONDS, _RETRY_MAX_SECONDS = 0.5, 30.0

logger = logging.getLogger(__name__)


T = TypeVar("T")


class Ingest:
    """Moves the log into hot. `tail` answers for what is on its way.

    Used by one thread through `run` or `drain`; `stop` may be called from any.
    """

    def __init__(
        self, settings: Settings, log: Log, hot: Hot, state: IngestState, alive: Callable[[], None] = lambda: None
    ) -> None:
        """Store the parts; `alive` is called, by any thread, whenever work has gone on a step."""
        self._settings = settings
        self._log = log
        self._hot = hot
        self._state = state
        self._alive = alive
        self._normalisers: dict[str, Normaliser] = {}
        self._unknown: set[str] = set()
        self._stopping = threading.Event()
        self._flusher: threading.Thread | None = None
        self._flush_error: BaseException | None = None
        self._flushed_at = time.monotonic()
        self._partitions: list[str] = []
        self._flush_rows = min(settings.hot.flush_rows, settings.hot.tail_rows)
        self.counters: Counter[str] = Counter(dict.fromkeys(TABLES, 0))
        self.tail = Tail(self._generation(state.progress()))
        meters.watch("ingest.tail_rows", self, lambda ingest: ingest.tail.row_count)
        meters.watch("ingest.tail_bytes", self, lambda ingest: ingest.tail.byte_count)
        meters.watch("ingest.ledgers", self, lambda ingest: ingest.largest("ledgers"))
        meters.watch("ingest.repeat_sightings", self, lambda ingest: ingest.largest("sightings"))

    @staticmethod
    def _generation(start: Mapping[str, int]) -> Generation:
        return Generation(start, TABLES, to_arrow)

    def largest(self, what: str) -> int:
        """Return the most ledgers, or the most remembered sightings, that any one partition holds."""
        held = [n.sizes[what] for n in list(self._normalisers.values())]
        return max(held, default=0)

    # -- life --------------------------------------------------------------------------

    def recover(self) -> None:
        """Finish the flush a crash interrupted, from the same ranges and the same state; call once, first."""
        if self._state.rebuilding:
            raise Misconfigured("a rebuild of hot was interrupted: run `k2 ingest --rebuild` again")
        progress = self._state.progress()
        states = self._state.partition_states()
        flush = self._state.intended()
        self._check_hot(progress, flush)
        if flush is not None:
            self._check_known(flush)
        for partition in sorted(set(progress) | set(flush.start if flush else ())):
            start = flush.start.get(partition, 0) if flush else progress[partition]
            self._open_partition(partition, start, states.get(partition))
        if flush is None:
            return
        logger.warning("finishing flush %d, which was interrupted", flush.number)
        generation = self._generation(flush.start)
        damaged = False
        for partition, end in flush.end.items():
            normaliser = self._normalisers[partition]
            for found in self._read_range(partition, flush.start.get(partition, 0), end):
                for damage in found:
                    if isinstance(damage, Damage):
                        self._take_kept(generation, normaliser, damage)
                        damaged = True
                self._take_all(generation, normaliser, found)
        crash.point("ingest.recover.remade")
        self._write(flush, generation, self._take_touched(), counted_by_hot=damaged)
        self.tail = Tail(self._generation(self._state.progress()))

    def _take_kept(self, generation: Generation, normaliser: Normaliser, damage: Damage) -> None:
        """Take in what hot already holds of frames that cannot be read any more: the interrupted flush put it there.

        With it what is made again is, where hot holds it, the same as before; and the ledgers know of those trades.
        """
        start, end = {damage.partition: damage.base_offset}, {damage.partition: damage.end_offset}
        kept = {
            table.name: self._hot.read_range(table.name, start, end).cast(schema.arrow_schema(table)).sort_by(_ORDER)
            for table in schema.HOT_ROW_TABLES
        }
        letters = kept["dead_letters"]  # without those of damage, which is told anew
        kept["dead_letters"] = letters.filter(pc.invert(pc.is_in(letters["reason"], pa.array([CORRUPT, GIVEN_UP]))))
        normaliser.recall(kept["trades"])
        generation.add_tables(kept, damage.partition, damage.base_offset, damage.end_offset)

    def _check_known(self, flush: FlushRecord) -> None:
        """Refuse to finish a flush without one of its exchanges: its rows would not be the same again."""
        for partition, end in flush.end.items():
            if end > flush.start.get(partition, 0):
                try:
                    registry.get(partition)
                except UnknownName as error:
                    raise Misconfigured(
                        f"the interrupted flush {flush.number} holds rows of {partition!r}, which is not installed any "
                        f"more ({error}): install its plugin again"
                    ) from None

    def _check_hot(self, progress: Mapping[str, int], intended: FlushRecord | None) -> None:
        """Refuse to go on where log, state and hot are not of one piece: rows would be lost or doubled."""
        for partition, offset in {**progress, **(intended.end if intended else {})}.items():
            if (end := self._log.end_offset(partition)) < offset:
                raise Corrupt(
                    f"log partition {partition!r} ends at {end}, but was turned into rows up to {offset}: appends were "
                    "lost (a power cut with log.sync = normal?) or the log was replaced; start a new data folder"
                )
        if intended is not None:
            return
        for table in TABLES:
            extra = self._hot.counts(table, progress, dict.fromkeys(self._log.partitions(), _NO_END))
            if extra:
                raise Corrupt(
                    f"hot holds {extra} rows of {table!r} beyond the progress in {self._settings.data_path}/state.db; "
                    "was that file replaced? Put it back, or rebuild hot with `k2 ingest --rebuild`"
                )

    def _open_partition(self, partition: str, start: int, state: PartitionState | None) -> Normaliser | None:
        try:
            exchange = registry.get(partition)
        except UnknownName as error:
            if partition not in self._unknown:
                self._unknown.add(partition)
                logger.error("log partition %r is left alone: %s", partition, error)
            return None
        normaliser = Normaliser(exchange, self._state.ledgers(partition), state or PartitionState())
        before = max(start - REPEAT_WINDOW, self._log.start_offset(partition))
        for found in self._read_range(partition, before, start):
            normaliser.warm([batch for batch in found if not isinstance(batch, Damage)])
        self._normalisers[partition] = normaliser
        return normaliser

    def _read(self, partition: str, offset: int, frames: int, end: int | None = None) -> list[LogBatch | Damage]:
        """Read on from `offset`; a damaged stretch comes as one Damage, so that the rest goes on."""
        found = read_on(self._log, partition, offset, end=end, max_frames=frames)
        for damage in found:
            if isinstance(damage, Damage):
                first, last = damage.base_offset, damage.end_offset - 1
                logger.error("log partition %s: offsets %d to %d: %s", partition, first, last, damage.detail)
        return found

    def _read_range(self, partition: str, start: int, end: int) -> Iterable[list[LogBatch | Damage]]:
        """Yield the log from `start` to `end` (exclusive), cut exactly."""
        while start < end:
            batches = self._read(partition, start, _READ_FRAMES, end)
            if not batches:
                raise Corrupt(f"log partition {partition!r} ends at {start}, but was read up to {end} before")
            yield batches
            start = batches[-1].end_offset

    def run(self) -> None:
        """Move the log into hot until `stop`, then what is left; a store that is down is waited out."""
        wait = _RETRY_FIRST_SECONDS
        while not self._stopping.is_set():
            try:
                if self.step() < _READ_FRAMES:  # else there is more, surely
                    self._log.wait(self._positions(), self._idle_seconds())
                wait = _RETRY_FIRST_SECONDS
            except StoreDown as error:
                self.counters["read_retries"] += 1
                logger.error("ingest goes on in %.1f s: %s", wait, error)
                self._stopping.wait(wait)
                wait = min(wait * 2, _RETRY_MAX_SECONDS)
            self._alive()
        self.drain(_DRAIN_SECONDS)

    def drain(self, seconds: float = math.inf) -> None:
        """Move everything the log holds now into hot, or what can be moved in this time."""
        target = {p: self._log.end_offset(p) for p in self._log.partitions()}
        until = time.monotonic() + seconds
        while any(self.tail.end.get(p, 0) < end for p, end in target.items() if p not in self._unknown):
            self.step()
            self._alive()
            if time.monotonic() >= until:
                meters.acted("ingest.drain")
                logger.warning("stopped with frames left in the log; the next start goes on there")
                break
        self.flush_all()

    def _positions(self) -> dict[str, int]:
        """Return what has been read, for waiting; a partition left alone never has news."""
        return {**self.tail.end, **dict.fromkeys(self._unknown, _NO_END)}

    def stop(self) -> None:
        """Make `run` return soon."""
        self._stopping.set()

    def _idle_seconds(self) -> float:
        waiting = self.tail.row_count > 0
        return min(0.5, self._settings.hot.flush_seconds) if waiting else 0.5

    # -- one step ----------------------------------------------------------------------

    def step(self) -> int:
        """Read once from every partition, start a flush if one is due; return the frames taken.

        New partitions are looked for when those known have nothing new, and at each flush.
        """
        taken = self._read_partitions()
        if not taken:
            self._partitions = self._log.partitions()
            taken = self._read_partitions()
        self._flush_if_due()
        return taken

    def _read_partitions(self) -> int:
        return sum(self._read_partition(partition) for partition in self._partitions)

    def _read_partition(self, partition: str) -> int:
        normaliser = self._normalisers.get(partition)
        position = self.tail.end.get(partition, 0)
        if normaliser is None:
            if partition in self._unknown:
                return 0
            normaliser = self._open_partition(partition, position, None)
            if normaliser is None:
                return 0
        found = self._read(partition, position, _READ_FRAMES)
        self._take_all(None, normaliser, found)
        return sum(batch.end_offset - batch.base_offset for batch in found)

    def _take_all(
        self, generation: Generation | None, normaliser: Normaliser, found: Sequence[LogBatch | Damage]
    ) -> None:
        """Take in what was read: into `generation`, or the one being filled, starting flushes as they are due."""
        most = min(RUN_FRAMES, self._flush_rows)
        for run in runs(found, most):
            into = generation or self.tail.filling
            if isinstance(run, Damage):
                self._take_rows(into, normaliser, run)
            else:
                self._take_run(into, normaliser, run)
            if generation is None:
                self._flush_if_due()

    def _take_run(self, generation: Generation, normaliser: Normaliser, run: Sequence[LogBatch]) -> None:
        """Take in consecutive batches as columns; where something is unusual, in ever smaller parts."""
        frames = sum(len(batch.frames) for batch in run)
        tables = normaliser.normalise_run(run) if frames >= FEW_FRAMES else None
        if tables is not None:
            generation.add_tables(tables, run[0].partition, run[0].base_offset, run[-1].end_offset)
            self._count(frames, {table: rows.num_rows for table, rows in tables.items()})
        elif frames > PIECE_FRAMES:
            for piece in runs(run, PIECE_FRAMES):
                self._take_run(generation, normaliser, piece)
        else:
            for batch in run:
                self._take_rows(generation, normaliser, batch)

    def _take_rows(self, generation: Generation, normaliser: Normaliser, batch: LogBatch | Damage) -> None:
        rows: dict[str, list[Row]] = {table: [] for table in TABLES}
        if isinstance(batch, Damage):
            rows["dead_letters"].append(normaliser.damaged(batch))
        else:
            normaliser.normalise(batch, rows)
            self.counters["frames_one_by_one"] += len(batch.frames)
        size = sum(len(row[_FRAME_COLUMN]) for row in rows["dead_letters"])
        generation.add(rows, batch.partition, batch.base_offset, batch.end_offset, size)
        for kind, count in normaliser.repeats.items():
            self.counters[f"repeated_{kind}"] += count
        normaliser.repeats.clear()
        self._count(batch.end_offset - batch.base_offset, {table: len(new) for table, new in rows.items()})

    def _count(self, frames: int, rows: Mapping[str, int]) -> None:
        self._alive()
        self.counters["frames"] += frames
        for table, count in rows.items():
            self.counters[table] += count

    # -- flushing ----------------------------------------------------------------------

    def _flush_if_due(self) -> None:
        if self._flush_due():
            self._start_flush()
        too_many_bytes = self.tail.byte_count >= 2 * _FLUSH_BYTES
        if self.tail.row_count >= self._settings.hot.tail_rows or too_many_bytes:
            with meters.waiting("ingest.tail_bytes" if too_many_bytes else "ingest.tail_rows"):
                self._await_flush()  # back-pressure: the log waits on disk, memory stays bounded

    def _flush_due(self) -> bool:
        self._raise_flush_error()
        if self._flusher is not None and self._flusher.is_alive():
            return False
        filling = self.tail.filling
        if filling.end == filling.start:
            return False
        waited = time.monotonic() - self._flushed_at
        return (
            filling.row_count >= self._flush_rows
            or filling.byte_count >= _FLUSH_BYTES
            or waited >= self._settings.hot.flush_seconds
        )

    def _start_flush(self) -> None:
        self._await_flush()
        self._partitions = self._log.partitions()
        filling = self.tail.filling
        touched = self._take_touched()
        generation = self.tail.turn(self._generation(filling.end))
        self._flushed_at = time.monotonic()
        self._flusher = threading.Thread(target=self._flush, args=(generation, touched), name="k2-flush", daemon=True)
        self._flusher.start()

    def _flush(self, generation: Generation, touched: _Touched) -> None:
        try:
            crash.point("ingest.flush.turned")
            flush = self._until_done("begin a flush", lambda: self._state.intend(generation.start, generation.end))
            crash.point("ingest.flush.intended")
            self._until_done(f"flush {flush.number}", lambda: self._write(flush, generation, touched))
            self.tail.flushed()
        except BaseException as error:  # noqa: BLE001 - handed to the thread that runs ingest, which raises it
            self._flush_error = error

    def _until_done(self, what: str, work: Callable[[], T]) -> T:
        """Do something that may be done twice, trying again while a store is down; the tail keeps the rows."""
        wait = _RETRY_FIRST_SECONDS
        while True:
            try:
                return work()
            except StoreDown as error:
                if self._stopping.is_set():
                    raise
                self.counters["flush_retries"] += 1
                logger.error("%s waits %.1f s: %s", what, wait, error)
                self._alive()
                self._stopping.wait(wait)
                wait = min(wait * 2, _RETRY_MAX_SECONDS)

    def _write(
        self, flush: FlushRecord, generation: Generation, touched: _Touched, *, counted_by_hot: bool = False
    ) -> None:
        """Store a flush. `counted_by_hot`: hot may hold it with other rows, and goes on doing so; account for those."""
        counts: dict[str, dict[str, int]] = {}
        for table in TABLES:
            rows = generation.arrow(table).sort_by(_ORDER)  # the same rows in the same order, however they were read
            self._alive()
            if rows.num_rows:
                self._hot.write(table, rows, f"{table}:{self._state.identity}:{flush.number}")
                counts[table] = _count_by_partition(rows)
                crash.point("ingest.flush.between_tables")
        crash.point("ingest.flush.inserted")
        if counted_by_hot:
            counts = {
                t: {p: self._hot.counts(t, flush.start, {p: end}) for p, end in flush.end.items()} for t in TABLES
            }
        self._log.make_durable(flush.end)  # the log must never end before what was made of it
        self._state.finish(flush, counts, touched.states, touched.ledgers)
        crash.point("ingest.flush.finished")
        self._log.commit_reader(READER, {p: max(0, end - REPEAT_WINDOW) for p, end in flush.end.items()})
        crash.point("ingest.flush.reader_committed")
        self.counters["flushes"] += 1

    def _take_touched(self) -> _Touched:
        """Serialise what normalising changed since the last flush; the ledgers go on changing afterwards."""
        encode = msgspec.msgpack.encode
        states, ledgers = {}, {}
        for partition, normaliser in self._normalisers.items():
            states[partition] = PartitionState(normaliser.state.last_opened)
            for key in normaliser.touched:
                ledgers[(partition, *key)] = encode(normaliser.ledgers[key])
            normaliser.touched.clear()
        return _Touched(states, ledgers)

    def _await_flush(self) -> None:
        if self._flusher is not None:
            self._flusher.join()
        self._raise_flush_error()

    def _raise_flush_error(self) -> None:
        if self._flush_error is not None:
            raise self._flush_error

    def flush_all(self) -> None:
        """Flush everything taken so far and wait until it is stored."""
        self._await_flush()
        if self.tail.filling.end != self.tail.filling.start:
            self._start_flush()
            self._await_flush()


class _Touched(msgspec.Struct, frozen=True):
    states: dict[str, PartitionState]
    ledgers: dict[tuple[str, str, str], bytes]


def _count_by_partition(rows: pa.Table) -> dict[str, int]:
    counted = pc.value_counts(rows.column("log_partition").combine_chunks())
    return {entry["values"]: entry["counts"] for entry in counted.to_pylist()}
