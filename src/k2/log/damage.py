"""Reading on over damage: what a log cannot give back comes as a record of its own, and the rest goes on."""

from __future__ import annotations

import msgspec

from k2.errors import Corrupt, Rejected
from k2.log.base import Log
from k2.log.limits import READ_BYTES, READ_FRAMES
from k2.model import LogBatch

CORRUPT, GIVEN_UP = "corrupt_log", "given_up_log"
DETAIL = "damaged in the log (wrong checksum or unreadable); fetch what is missing from the exchange again"
GIVEN_UP_DETAIL = "removed at log.max_bytes before it was read; fetch what is missing from the exchange again"
_SEARCHED_FRAMES = 1 << 20  # how far before damage a readable batch is looked for


class Damage(msgspec.Struct, frozen=True):
    """Frames the log cannot give back: offsets `base_offset` .. `end_offset` (exclusive).

    `reason` CORRUPT: `logged_ns` is that of the last readable batch before, the best that is known; 0 where there is
    none. GIVEN_UP: the log removed them at its size limit, at `logged_ns`.
    Read again with the same bounds, a damage is the same, also in `detail`: it tells nothing that changes.
    """

    partition: str
    base_offset: int
    end_offset: int
    logged_ns: int
    detail: str = DETAIL
    reason: str = CORRUPT


def read_on(
    log: Log,
    partition: str,
    offset: int,
    *,
    end: int | None = None,
    max_frames: int = READ_FRAMES,
    max_bytes: int = READ_BYTES,
) -> list[LogBatch | Damage]:
    """Return what `Log.read` does, or the one `Damage` that starts at `offset`; nothing reaches beyond `end`.

    Empty at `end` and at the end of the log.

    Raises:
        Rejected: `offset` is negative, or below `start_offset` (removed by retention) without the log having said so.
        StoreDown: the log cannot be read now, or nobody can say where the damage ends.
    """
    if end is not None:
        max_frames = min(max_frames, end - offset)
    if max_frames <= 0:
        return []
    try:
        return list(log.read(partition, offset, max_frames=max_frames, max_bytes=max_bytes))
    except Rejected:
        given_up = _given_up(log, partition, offset, end)
        if given_up is None:
            raise
        return [given_up]
    except Corrupt as error:
        if error.end_offset <= offset:
            raise  # it names no range to go on behind
        if error.first_offset > offset:
            return list(log.read(partition, offset, max_frames=error.first_offset - offset, max_bytes=max_bytes))
        damage_end = error.end_offset if end is None else min(end, error.end_offset)
        return [Damage(partition, offset, damage_end, _logged_before(log, partition, offset))]


def _given_up(log: Log, partition: str, offset: int, end: int | None) -> Damage | None:
    """Return the rest of the range given up that holds an offset, None when none does."""
    for range_ in log.given_up(partition):
        if range_.first_offset <= offset < range_.end_offset:
            last = range_.end_offset if end is None else min(end, range_.end_offset)
            return Damage(partition, offset, last, range_.at_ns, GIVEN_UP_DETAIL, GIVEN_UP)
    return None


def _logged_before(log: Log, partition: str, offset: int) -> int:
    """Return the logged time of the last readable batch before an offset, 0 where there is none near."""
    start_offset = log.start_offset(partition)
    distance = 1
    while distance <= _SEARCHED_FRAMES and offset - distance >= start_offset:
        try:
            return log.read(partition, offset - distance, max_frames=distance)[-1].logged_ns
        except (Corrupt, Rejected):  # damaged there too, or just removed
            distance *= 2
    return 0
