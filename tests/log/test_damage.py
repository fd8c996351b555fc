"""Reading on over damage: the same bounds give the same records, whatever was appended since."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from k2.errors import Rejected, StoreDown
from k2.log.base import Log
from k2.log.damage import DETAIL, Damage, read_on
from k2.log.embedded import EmbeddedLog
from k2.log.memory import MemoryLog
from k2.log.segment import PAGE_BYTES
from k2.model import FRAME, LIVE, Frame, LogBatch

PER_BATCH = 3
T0 = 1_700_000_000 * 10**9


def batch(number: int) -> list[Frame]:
    draw = random.Random(number)
    return [Frame(FRAME, LIVE, "c", 1, number, place, draw.randbytes(3000)) for place in range(PER_BATCH)]


def filled(folder: Path, count: int = 20) -> Path:
    """A log of batches of three frames, a second apart, closed in order; return its only segment."""
    now = iter(range(T0, T0 + count * 10**9, 10**9))
    log = EmbeddedLog(folder, clock=lambda: next(now))
    for number in range(count):
        log.append("kraken", batch(number))
    log.close()
    return next((folder / "kraken").glob("*.db"))


def spoil(segment: Path, *numbers: int, page: bool = False) -> None:
    """Write over a batch, or over a whole page of it, so that the tree of the file is broken there."""
    content = bytearray(segment.read_bytes())
    for number in numbers:
        at = content.find(batch(number)[1].data[:50])
        assert at > 0
        if page:
            at = at // PAGE_BYTES * PAGE_BYTES
            content[at : at + PAGE_BYTES] = bytes(PAGE_BYTES)
        else:
            content[at : at + 5] = b"wrong"
    segment.write_bytes(content)


def read_all(log: Log, start: int = 0, end: int | None = None) -> list[LogBatch | Damage]:
    found: list[LogBatch | Damage] = []
    while some := read_on(log, "kraken", start, end=end):
        found += some
        start = some[-1].end_offset
    return found


def test_damage_is_one_record_between_the_batches(tmp_path: Path) -> None:
    """What is whole is read; the damage names its range, and the time of the batch before it."""
    spoil(filled(tmp_path), 5, 6)
    log = EmbeddedLog(tmp_path)
    found = read_all(log)
    log.close()

    assert [(f.base_offset, f.end_offset) for f in found if isinstance(f, Damage)] == [(15, 21)]
    assert next(f for f in found if isinstance(f, Damage)) == Damage("kraken", 15, 21, T0 + 4 * 10**9, DETAIL)
    assert [o for f in found for o in range(f.base_offset, f.end_offset)] == list(range(60))


def test_nothing_reaches_beyond_the_end_asked_for(tmp_path: Path) -> None:
    """A range read again gives the same records when the damage, or the log, goes on behind it."""
    spoil(filled(tmp_path), 5, 6)
    log = EmbeddedLog(tmp_path)
    before = read_all(log, 3, 17)
    log.append("kraken", batch(20))

    assert read_all(log, 3, 17) == before
    assert before[-1] == Damage("kraken", 15, 17, T0 + 4 * 10**9)
    assert read_all(log, 17, 19) == [Damage("kraken", 17, 19, T0 + 4 * 10**9)]
    assert read_on(log, "kraken", 3, end=3) == []
    log.close()


def test_damage_at_the_start_has_no_time(tmp_path: Path) -> None:
    """Nothing is before it, so nothing is known: 0."""
    spoil(filled(tmp_path), 0)
    log = EmbeddedLog(tmp_path)

    assert read_on(log, "kraken", 0) == [Damage("kraken", 0, 3, 0)]
    log.close()


def test_damage_at_the_newest_end_does_not_grow_with_the_log(tmp_path: Path) -> None:
    """Pages lost up to the end of the newest segment: what is appended behind them is no part of the damage."""
    segment = filled(tmp_path)
    log = EmbeddedLog(tmp_path)
    assert log.recover() == []
    spoil(segment, 19, page=True)
    first = read_all(log)
    log.append("kraken", batch(20))

    assert isinstance(first[-1], Damage)
    assert (first[-1].base_offset >= 51, first[-1].end_offset) == (True, 60)
    assert read_all(log) == [*first, *log.read("kraken", 60)]
    log.close()


def test_a_newest_segment_without_a_known_end_is_no_endless_damage(tmp_path: Path) -> None:
    """Offsets nobody knows to exist are not told as damaged: the log is down until the segment is salvaged."""
    segment = filled(tmp_path)
    log = EmbeddedLog(tmp_path)
    assert log.recover() == []
    kept = segment.stat().st_size - 3 * PAGE_BYTES
    with segment.open("r+b") as file:
        file.truncate(kept)
    whole = read_on(log, "kraken", 0)
    position = whole[-1].end_offset
    with pytest.raises(StoreDown, match="salvages it"):
        read_on(log, "kraken", position)
    log.close()

    assert not any(isinstance(f, Damage) for f in whole)
    assert 50 <= position < 60
    log = EmbeddedLog(tmp_path)
    (repair,) = log.recover()
    assert position <= repair.first_offset < 60
    assert read_all(log)[-1].end_offset == repair.first_offset
    assert not any(isinstance(f, Damage) for f in read_all(log))
    log.close()


def test_without_damage_it_reads_like_the_log() -> None:
    """Limits and refusals are those of the log."""
    log = MemoryLog(clock=lambda: T0)
    log.append("kraken", batch(0))
    log.append("kraken", batch(1))

    assert read_on(log, "kraken", 1) == log.read("kraken", 1)
    assert [f.end_offset for f in read_on(log, "kraken", 0, max_frames=4)] == [3, 4]
    assert read_on(log, "kraken", 6) == []
    with pytest.raises(Rejected, match="count from 0"):
        read_on(log, "kraken", -1)
