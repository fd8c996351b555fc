"""What every log refuses, and how every log cuts an answer: shared by the adapters, without I/O."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from operator import attrgetter

from k2.errors import Rejected
from k2.model import Frame, LogBatch

READ_FRAMES, READ_BYTES = 10_000, 16 << 20  # of one read, where the caller names no limit
_DATA = attrgetter("data")
PARTITION_NAME = re.compile(r"[a-z0-9-]{1,64}")


def check_partition(partition: str) -> None:
    """Refuse names that are no plain folder name; nothing can point outside the log."""
    if PARTITION_NAME.fullmatch(partition) is None:
        raise Rejected(f"log: {partition!r} is no partition name (1 to 64 of a-z, 0-9 and '-')")


def check_frames(partition: str, frames: Sequence[Frame]) -> None:
    """Refuse an empty batch: it would have no offset."""
    if not frames:
        raise Rejected(f"log: append to {partition!r} without a frame; leave out empty batches")


def check_offset(partition: str, offset: int, start_offset: int) -> None:
    """Refuse to read what cannot exist or was removed."""
    if offset < 0:
        raise Rejected(f"log: read {partition!r} from {offset}: offsets count from 0")
    if offset < start_offset:
        raise Rejected(
            f"log: read {partition!r} from {offset}: retention removed everything below {start_offset}; "
            f"start there, or take older rows from the cold tables"
        )


def collect(batches: Iterable[LogBatch], offset: int, max_frames: int, max_bytes: int) -> list[LogBatch]:
    """Cut consecutive batches to the answer of one read: from `offset`, within both limits, never empty-handed.

    The first batch holds `offset`. Stops pulling `batches` as soon as a limit is reached.
    """
    taken: list[LogBatch] = []
    frames_left, bytes_left = max(1, max_frames), max(1, max_bytes)
    for batch in batches:
        skip = max(0, offset - batch.base_offset)
        frames = batch.frames[skip : skip + frames_left] if skip or len(batch.frames) > frames_left else batch.frames
        size = sum(map(len, map(_DATA, frames)))
        if size > bytes_left:
            frames = _within(frames, bytes_left, at_least=0 if taken else 1)
        if frames is batch.frames:
            taken.append(batch)
        elif frames:
            taken.append(LogBatch(batch.partition, batch.base_offset + skip, batch.logged_ns, list(frames)))
        frames_left -= len(frames)
        bytes_left -= size
        if frames_left <= 0 or bytes_left <= 0:
            break
    return taken


def _within(frames: list[Frame], max_bytes: int, *, at_least: int) -> list[Frame]:
    size = 0
    for index, frame in enumerate(frames):
        size += len(frame.data)
        if size > max_bytes:
            return frames[: max(index, at_least)]
    return frames


def slowest(positions: Iterable[int]) -> int | None:
    """Return the offset every named reader has passed, or None when there is no reader."""
    return min(positions, default=None)
