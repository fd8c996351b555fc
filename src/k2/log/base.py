"""The log port: frames, durable before acknowledged, in order per partition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from k2.log.limits import READ_BYTES, READ_FRAMES
from k2.model import Frame, LogBatch, Positions


class GivenUp(msgspec.Struct, frozen=True):
    """Frames `first_offset` .. `end_offset` (exclusive) removed at the size limit although somebody still needed them.

    `readers` names who had not passed them, empty when no reader was known; `at_ns` is when, UTC. Written down before
    anything is removed, and never changed.
    """

    partition: str
    first_offset: int
    end_offset: int
    readers: str
    at_ns: int


class Log(Protocol):
    """A durable, ordered, append-only log of frames, one partition per exchange.

    Offsets count from 0 per partition without a hole. Every method may be called from any
    thread, and several processes may have the same log open, to read and to append.
    """

    def partitions(self) -> list[str]:
        """Return the names of the partitions that exist, sorted."""

    def append(self, partition: str, frames: Sequence[Frame], *, producer: str = "", sequence: int = 0) -> int:
        """Store frames together as one batch and return the offset of the first.

        When it returns they are durable by the sync policy. Concurrent callers share one
        commit (group commit). The partition is made if missing.

        The logged time of a batch is that of the clock, and never before that of the batch it follows,
        except after an error of the clock of more than an hour; see `times.py`.

        With a `producer`, a batch whose `sequence` is not above the last stored one of that
        producer is not stored again, and -1 is returned; sequences rise by any step.

        Raises:
            StoreDown: no space, no permission...; nothing of the batch is stored, or (after a
                crash of the disk) unknown; appending again is safe with a producer.
        """

    def producer_sequence(self, partition: str, producer: str) -> int | None:
        """Return the last stored sequence of a producer, or None when it never appended."""

    def start_offset(self, partition: str) -> int:
        """Return the first offset still held (retention removes older ones)."""

    def end_offset(self, partition: str) -> int:
        """Return the offset the next frame will get."""

    def read(
        self, partition: str, offset: int, *, max_frames: int = READ_FRAMES, max_bytes: int = READ_BYTES
    ) -> list[LogBatch]:
        """Return frames from `offset` on, at most `max_frames`, and about `max_bytes` of data.

        The first batch is cut so that it starts at `offset` exactly; empty when there is nothing
        yet. At least one frame is returned when there is one, however large.

        Raises:
            Rejected: `offset` is below `start_offset` (removed by retention) or negative.
            Corrupt: a batch fails its checksum; carries `first_offset`, `end_offset`
                (exclusive) of the damage, so that a caller may go on behind it.
        """

    def wait(self, positions: Positions, timeout_seconds: float) -> bool:
        """Block until some partition holds frames at or after its position, or the time is up.

        A partition not named in `positions` counts from 0, so a new one wakes the caller too.
        Woken by the appender, also from another process; no polling faster than once a second.
        Returns whether there is something to read.
        """

    def make_durable(self, positions: Positions) -> None:
        """Return when everything below these offsets survives a power cut, whatever the sync policy.

        To be called before what was made of the log is recorded elsewhere: else, after a power cut, the log could end
        before that record, and give the same offsets to other frames. Partitions not named are left alone.

        Raises:
            StoreDown: the disk refuses; call again.
        """

    def reader_position(self, reader: str, partition: str) -> int:
        """Return the durable position of a named reader; 0 when it never committed."""

    def commit_reader(self, reader: str, positions: Positions) -> None:
        """Durably record that a named reader needs nothing below these offsets."""

    def trim(self, *, keep_seconds: float) -> dict[str, int]:
        """Remove whole old segments that every named reader has passed and that are older than `keep_seconds`.

        Returns the new start offset of each partition something was removed from. With no
        named reader nothing is removed.
        """

    def given_up(self, partition: str) -> list[GivenUp]:
        """Return what the size limit removed although some reader had not passed it, by offset.

        A log that has a limit keeps to it whatever its readers do: else one that never comes back fills the disk.
        """

    def close(self) -> None:
        """Finish pending appends and release files; further calls fail."""
