"""Any sequence of appends, reads, rotations, reopenings and trims equals a plain list."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from k2.log.base import Log
from k2.log.embedded import EmbeddedLog
from k2.log.memory import MemoryLog
from k2.model import FRAME, LIVE, Frame

PARTITIONS = st.sampled_from(["kraken", "binance-usdm"])
BATCHES = st.lists(st.binary(max_size=1500), min_size=1, max_size=6)


class LogEqualsList(RuleBasedStateMachine):
    """Two adapters against a model: per partition a list of (base offset, frames)."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.now_ns = 10**18
        self.stored: dict[str, list[list[Frame]]] = {}
        self.sequences: dict[tuple[str, str], int] = {}
        self.positions: dict[str, int] = {}

    @initialize(segment_bytes=st.sampled_from([25_000, 40_000, 1 << 20]))
    def open(self, segment_bytes: int) -> None:
        self.segment_bytes = segment_bytes
        self.memory = MemoryLog(clock=lambda: self.now_ns)
        self.embedded = self._embedded()

    def _embedded(self) -> EmbeddedLog:
        return EmbeddedLog(
            self.folder,
            sync="normal",
            segment_bytes=self.segment_bytes,
            segment_seconds=100,
            clock=lambda: self.now_ns,
        )

    @property
    def logs(self) -> list[Log]:
        return [self.memory, self.embedded]

    @rule(partition=PARTITIONS, data=BATCHES, producer=st.sampled_from(["", "p", "q"]), sequence=st.integers(-3, 20))
    def append(self, partition: str, data: list[bytes], producer: str, sequence: int) -> None:
        frames = [Frame(FRAME, LIVE, "c", 1, i, self.now_ns, datum) for i, datum in enumerate(data)]
        batches = self.stored.setdefault(partition, [])
        expected = sum(map(len, batches))
        if producer:
            if sequence <= self.sequences.get((partition, producer), sequence - 1):
                expected = -1
            else:
                self.sequences[partition, producer] = sequence
        assert [log.append(partition, frames, producer=producer, sequence=sequence) for log in self.logs] == [
            expected,
            expected,
        ]
        if expected >= 0:
            batches.append(frames)

    @rule(partition=PARTITIONS, place=st.floats(0, 1), max_frames=st.integers(1, 30), max_bytes=st.integers(1, 9000))
    def read(self, partition: str, place: float, max_frames: int, max_bytes: int) -> None:
        flat = [frame for batch in self.stored.get(partition, []) for frame in batch]
        for log in self.logs:
            start = log.start_offset(partition)
            offset = start + round(place * (len(flat) - start))
            batches = log.read(partition, offset, max_frames=max_frames, max_bytes=max_bytes)
            got = [frame for batch in batches for frame in batch.frames]
            assert got == flat[offset : offset + len(got)]
            assert len(got) <= max_frames
            assert bool(got) == (offset < len(flat))
            assert len(got) <= 1 or sum(len(frame.data) for frame in got) <= max_bytes
            assert all(batch.frames for batch in batches)

    @rule(seconds=st.integers(-50, 200))
    def let_time_pass(self, seconds: int) -> None:
        self.now_ns += seconds * 10**9

    @rule(crash=st.booleans())
    def reopen(self, crash: bool) -> None:
        old = self.embedded
        if crash:  # the newcomer finds the files in use and unfinished, as beside a hung process
            self.embedded = self._embedded()
            self.embedded.partitions()
        old.close()
        if not crash:
            self.embedded = self._embedded()
            assert self.embedded.recover() == []

    @precondition(lambda self: self.stored)
    @rule(partition=PARTITIONS, place=st.floats(0, 1), keep_seconds=st.integers(0, 100))
    def trim(self, partition: str, place: float, keep_seconds: int) -> None:
        end = sum(map(len, self.stored.get(partition, [])))
        position = max(self.positions.get(partition, 0), round(place * end))
        self.positions[partition] = position
        for log in self.logs:
            log.commit_reader("r", {partition: position})
            log.trim(keep_seconds=keep_seconds)
            assert log.start_offset(partition) <= position
            assert log.reader_position("r", partition) == position

    @invariant()
    def ends_agree(self) -> None:
        if not hasattr(self, "memory"):
            return
        for log in self.logs:
            assert log.partitions() == sorted(self.stored)
            for partition, batches in self.stored.items():
                end = sum(map(len, batches))
                assert log.end_offset(partition) == end
                assert log.wait({**dict.fromkeys(self.stored, 10**9), partition: end - 1}, 0)
                assert not log.wait(dict.fromkeys(self.stored, 10**9) | {partition: end}, 0)

    def teardown(self) -> None:
        for log in self.logs if hasattr(self, "memory") else []:
            log.close()
        shutil.rmtree(self.folder)


LogEqualsList.TestCase.settings = settings(
    max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
TestLogEqualsList = LogEqualsList.TestCase
