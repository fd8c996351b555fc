"""Every promise of the log port, on every adapter."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from k2.errors import Rejected
from k2.log.base import Log
from k2.log.embedded import EmbeddedLog
from k2.log.memory import MemoryLog
from k2.model import FRAME, LIVE, Frame, LogBatch

SECOND_NS = 1_000_000_000


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now_ns = 1_700_000_000 * SECOND_NS

    def __call__(self) -> int:
        return self.now_ns


def frames(count: int, first: int = 0, size: int = 20) -> list[Frame]:
    return [
        Frame(FRAME, LIVE, "c1", 1, first + i, 10**18 + first + i, b"%0*d" % (size, first + i)) for i in range(count)
    ]


def flat(batches: list[LogBatch]) -> list[tuple[int, Frame]]:
    return [(batch.base_offset + i, frame) for batch in batches for i, frame in enumerate(batch.frames)]


def read_all(log: Log, partition: str, offset: int = 0, **limits: int) -> list[tuple[int, Frame]]:
    found: list[tuple[int, Frame]] = []
    while batches := log.read(partition, offset, **limits):
        found += flat(batches)
        offset = batches[-1].end_offset
    return found


Make = Callable[[Path, Clock], Log]
ADAPTERS: dict[str, Make] = {
    "memory": lambda folder, clock: MemoryLog(clock=clock),
    # Small segments, so that every promise is also tried across their borders.
    "embedded": lambda folder, clock: EmbeddedLog(folder, segment_bytes=20_000, segment_seconds=60, clock=clock),
}


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=ADAPTERS)
def log(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> Iterator[Log]:
    log = ADAPTERS[request.param](tmp_path / "log", clock)
    yield log
    log.close()


def test_log_is_empty_at_first(log: Log) -> None:
    """A new log has no partition, and one never written to is empty, not an error."""

    assert log.partitions() == []
    assert (log.start_offset("kraken"), log.end_offset("kraken")) == (0, 0)
    assert log.read("kraken", 0) == []
    assert log.read("kraken", 5) == []
    assert log.producer_sequence("kraken", "p") is None
    assert log.partitions() == []


def test_append_returns_the_offset_of_the_first_frame(log: Log) -> None:
    """Offsets count from 0 per partition without a hole."""

    assert [log.append("kraken", frames(n)) for n in (3, 1, 5)] == [0, 3, 4]
    assert log.append("binance", frames(2)) == 0
    assert (log.end_offset("kraken"), log.end_offset("binance")) == (9, 2)
    assert log.partitions() == ["binance", "kraken"]


def test_append_without_a_frame_is_refused(log: Log) -> None:
    """An empty batch would have no offset."""

    with pytest.raises(Rejected, match="without a frame"):
        log.append("kraken", [])


@pytest.mark.parametrize("name", ["", "../up", "a/b", "UP", "a.b", "x" * 65, "a\n", "ä"])
def test_partition_name_that_is_no_plain_name_is_refused(log: Log, name: str) -> None:
    """No partition name leads out of the folder of the log."""

    with pytest.raises(Rejected, match="is no partition name"):
        log.append(name, frames(1))
    with pytest.raises(Rejected, match="is no partition name"):
        log.read(name, 0)
    with pytest.raises(Rejected, match="is no partition name"):
        log.commit_reader("r", {name: 1})


def test_read_gives_back_what_was_appended(log: Log) -> None:
    """Every field of every frame, in order, with one logged time a batch."""
    odd = [
        Frame("opened", LIVE, "c1", 2, 0, 1, b"", "wss://example.org/é"),
        Frame(FRAME, "import", "c1", 2, 1, 2**62, bytes(range(256)) * 50),
    ]

    log.append("kraken", odd)
    log.append("kraken", frames(3))

    first, second = log.read("kraken", 0)
    assert (first.partition, first.base_offset, first.frames) == ("kraken", 0, odd)
    assert (second.base_offset, second.end_offset, second.frames) == (2, 5, frames(3))


def test_read_starts_exactly_at_the_offset(log: Log) -> None:
    """The first batch is cut, from every offset, also across segments."""
    for first in range(0, 400, 8):
        log.append("kraken", frames(8, first, size=700))

    for offset in range(0, 401, 7):
        assert flat(log.read("kraken", offset, max_frames=20)) == [
            (n, frames(1, n, size=700)[0]) for n in range(offset, min(offset + 20, 400))
        ]


def test_read_keeps_to_the_frame_limit(log: Log) -> None:
    """At most `max_frames`, cutting the last batch; reading on from its end gives the rest."""
    log.append("kraken", frames(10))
    log.append("kraken", frames(10, 10))

    assert [len(b.frames) for b in log.read("kraken", 3, max_frames=12)] == [7, 5]
    assert [offset for offset, _ in read_all(log, "kraken", max_frames=3)] == list(range(20))


def test_read_keeps_to_the_byte_limit(log: Log) -> None:
    """About `max_bytes` of data; at least one frame, however large."""
    log.append("kraken", frames(10, size=1000))
    log.append("kraken", frames(1, size=50_000))
    log.append("kraken", frames(1))

    assert sum(len(b.frames) for b in log.read("kraken", 0, max_bytes=3500)) == 3
    assert [len(b.frames) for b in log.read("kraken", 10, max_bytes=10)] == [1]
    assert [offset for offset, _ in read_all(log, "kraken", max_bytes=1)] == list(range(12))


def test_read_below_the_start_is_refused(log: Log, clock: Clock) -> None:
    """A negative offset, and one that retention removed, are errors that say so."""
    _fill_segments(log, clock)
    log.commit_reader("r", {"kraken": log.end_offset("kraken")})
    start = log.trim(keep_seconds=0)["kraken"]

    with pytest.raises(Rejected, match="count from 0"):
        log.read("kraken", -1)
    with pytest.raises(Rejected, match=f"removed everything below {start}"):
        log.read("kraken", start - 1)
    assert log.read("kraken", start, max_frames=1)[0].base_offset == start


def test_logged_time_is_the_clock_and_never_goes_back(log: Log, clock: Clock) -> None:
    """A clock set back by less than an hour does not make later frames known earlier, also in the next segment."""
    times = []
    for step in (0, 5, -100, 200, -300, 1):
        clock.now_ns += step * SECOND_NS
        log.append("kraken", frames(1))
        times.append(clock.now_ns)

    logged = [batch.logged_ns for batch in log.read("kraken", 0)]
    assert logged == [max(times[: i + 1]) for i in range(len(times))]


def test_logged_time_comes_back_from_a_clock_error(log: Log, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """A clock once in 2100 does not pin the logged time: both steps are told, then it goes on from the real clock."""
    right_ns = clock.now_ns
    log.append("kraken", frames(1))
    clock.now_ns = 4_102_444_800 * SECOND_NS
    log.append("kraken", frames(2))
    clock.now_ns = right_ns + 5 * SECOND_NS
    log.append("kraken", frames(1))
    clock.now_ns -= SECOND_NS
    log.append("kraken", frames(1))

    logged = [batch.logged_ns for batch in log.read("kraken", 0)]
    assert logged == [right_ns, 4_102_444_800 * SECOND_NS, right_ns + 5 * SECOND_NS, right_ns + 5 * SECOND_NS]
    assert [offset for offset, _ in read_all(log, "kraken")] == list(range(5))
    told = [r.getMessage() for r in caplog.records if "clock" in r.getMessage()]
    assert ["set forward" in text for text in told] == [True, False]


def test_a_clock_that_was_never_set_does_not_take_the_logged_time_back(log: Log, clock: Clock) -> None:
    """After a boot without a clock, in 1970, frames are not known before all the others."""
    log.append("kraken", frames(1))
    last_ns, clock.now_ns = clock.now_ns, 100 * SECOND_NS
    log.append("kraken", frames(1))

    assert [batch.logged_ns for batch in log.read("kraken", 0)] == [last_ns, last_ns]


def test_trim_goes_on_after_a_clock_error(log: Log, clock: Clock) -> None:
    """What was logged in 2100 is as old as what came right behind it."""
    right_ns = clock.now_ns
    clock.now_ns = 4_102_444_800 * SECOND_NS
    log.append("kraken", frames(5))
    clock.now_ns = right_ns
    end = _fill_segments(log, clock)
    log.commit_reader("r", {"kraken": end})
    assert log.trim(keep_seconds=3000) == {}
    clock.now_ns += 3001 * SECOND_NS

    assert log.trim(keep_seconds=3000)["kraken"] > 5


def test_repeated_sequence_of_a_producer_is_not_stored_again(log: Log) -> None:
    """A batch sent again, or an older one, gives -1; sequences rise by any step."""

    assert log.append("kraken", frames(2), producer="p", sequence=0) == 0
    assert log.append("kraken", frames(2), producer="p", sequence=0) == -1
    assert log.append("kraken", frames(2), producer="p", sequence=7) == 2
    assert log.append("kraken", frames(2), producer="p", sequence=5) == -1
    assert log.append("kraken", frames(2), producer="q", sequence=5) == 4
    assert log.append("binance", frames(2), producer="p", sequence=1) == 0
    assert log.append("kraken", frames(1)) == 6
    assert [log.producer_sequence("kraken", name) for name in "pqr"] == [7, 5, None]
    assert log.end_offset("kraken") == 7


def test_sequence_of_a_producer_outlives_segments_and_retention(log: Log, clock: Clock) -> None:
    """A repeat is known also when the segment with the original is gone."""
    log.append("kraken", frames(1), producer="p", sequence=3)
    _fill_segments(log, clock)
    log.commit_reader("r", {"kraken": log.end_offset("kraken")})
    log.trim(keep_seconds=0)

    assert log.start_offset("kraken") > 0
    assert log.append("kraken", frames(1), producer="p", sequence=3) == -1
    assert log.producer_sequence("kraken", "p") == 3


def test_concurrent_appends_get_offsets_without_hole_or_overlap(log: Log) -> None:
    """Callers on many threads each get their own range, and find their frames there."""
    taken: list[tuple[int, list[Frame]]] = []

    def work(index: int) -> None:
        for turn in range(15):
            batch = frames(1 + (index + turn) % 4, index * 1000 + turn * 10)
            taken.append((log.append("kraken", batch, producer=f"p{index}", sequence=turn), batch))

    _run_threads(8, work)

    expected = sorted((base + i, frame.counter) for base, batch in taken for i, frame in enumerate(batch))
    assert [offset for offset, _ in expected] == list(range(len(expected)))
    assert [(offset, frame.counter) for offset, frame in read_all(log, "kraken")] == expected


def test_wait_returns_at_once_when_there_is_something(log: Log) -> None:
    """Frames at the position, or in a partition not named, need no waiting."""
    log.append("kraken", frames(3))

    assert log.wait({"kraken": 2}, 0)
    assert log.wait({}, 0)
    assert not log.wait({"kraken": 3}, 0)
    assert not log.wait({"kraken": 3, "binance": 0}, 0.01)


@pytest.mark.parametrize("partition", ["kraken", "binance"])
def test_wait_is_woken_by_an_append(log: Log, partition: str) -> None:
    """An append by another thread ends the wait, also one that makes a partition."""
    log.append("kraken", frames(3))
    answers: list[bool] = []
    waiter = threading.Thread(target=lambda: answers.append(log.wait({"kraken": 3}, 30)))
    waiter.start()

    log.append(partition, frames(1, 3))
    waiter.join(20)

    assert answers == [True]


def test_reader_position_is_kept_and_never_goes_back(log: Log) -> None:
    """Positions are per reader and partition, 0 at first."""

    assert log.reader_position("ingest", "kraken") == 0
    log.commit_reader("ingest", {"kraken": 5, "binance": 7})
    log.commit_reader("ingest", {"kraken": 3})
    assert log.reader_position("ingest", "kraken") == 5
    assert log.reader_position("ingest", "binance") == 7
    assert log.reader_position("offload", "kraken") == 0


def test_trim_removes_nothing_without_a_reader(log: Log, clock: Clock) -> None:
    """Without a named reader nobody has said that frames are not needed."""
    _fill_segments(log, clock)

    assert log.trim(keep_seconds=0) == {}
    assert log.start_offset("kraken") == 0


def test_trim_is_held_back_by_the_slowest_reader(log: Log, clock: Clock) -> None:
    """What some reader still needs stays, and is readable from its position."""
    end = _fill_segments(log, clock)
    log.commit_reader("fast", {"kraken": end})
    log.commit_reader("slow", {"kraken": end // 2})

    start = log.trim(keep_seconds=0)["kraken"]

    assert 0 < start <= end // 2
    assert log.start_offset("kraken") == start
    assert [offset for offset, _ in read_all(log, "kraken", end // 2)] == list(range(end // 2, end))
    assert log.trim(keep_seconds=0) == {}


def test_trim_is_held_back_by_a_reader_that_never_read_the_partition(log: Log, clock: Clock) -> None:
    """A registered reader counts as 0 in every partition it has not committed."""
    end = _fill_segments(log, clock)
    log.commit_reader("fast", {"kraken": end})
    log.commit_reader("new", {})
    log.commit_reader("other", {"binance": 10})

    assert log.trim(keep_seconds=0) == {}


def test_trim_keeps_what_is_young(log: Log, clock: Clock) -> None:
    """Segments stay for `keep_seconds` after their last frame."""
    end = _fill_segments(log, clock)
    log.commit_reader("r", {"kraken": end})

    assert log.trim(keep_seconds=10_000) == {}
    clock.now_ns += 10_001 * SECOND_NS
    assert log.trim(keep_seconds=10_000)["kraken"] > 0


def test_trim_never_removes_the_newest_segment(log: Log, clock: Clock) -> None:
    """Offsets go on where they were, however much is trimmed."""
    end = _fill_segments(log, clock)
    log.commit_reader("r", {"kraken": end})
    clock.now_ns += 10_000 * SECOND_NS

    start = log.trim(keep_seconds=0)["kraken"]

    assert start < end
    assert log.end_offset("kraken") == end
    assert log.append("kraken", frames(1)) == end


def test_closed_log_refuses_everything(log: Log) -> None:
    """After close every call fails, and closing again does nothing."""
    log.append("kraken", frames(1))
    log.close()
    log.close()

    for call in (
        lambda: log.append("kraken", frames(1)),
        lambda: log.read("kraken", 0),
        lambda: log.end_offset("kraken"),
        lambda: log.partitions(),
        lambda: log.wait({}, 1),
        lambda: log.commit_reader("r", {}),
        lambda: log.trim(keep_seconds=0),
    ):
        with pytest.raises(Rejected, match="closed"):
            call()


def test_close_ends_a_wait(log: Log) -> None:
    """Who waits is told that the log is closed."""
    ended = threading.Event()

    def wait() -> None:
        with pytest.raises(Rejected, match="closed"):
            log.wait({}, 60)
        ended.set()

    waiter = threading.Thread(target=wait)
    waiter.start()
    log.close()
    waiter.join(20)

    assert ended.is_set()


def _fill_segments(log: Log, clock: Clock) -> int:
    """Append over several segments, a minute and a bit apart; return the end offset."""
    for _ in range(8):
        clock.now_ns += 61 * SECOND_NS
        log.append("kraken", frames(5))
    clock.now_ns += SECOND_NS
    return log.end_offset("kraken")


def _run_threads(count: int, work: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=work, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
