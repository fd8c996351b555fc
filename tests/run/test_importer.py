"""Importing recordings: each frame is in the log once, however often and however interrupted."""

from __future__ import annotations

import contextlib
import gzip
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from k2.errors import BadData, Misconfigured, Rejected, StoreDown, UnknownName
from k2.feeds.registry import get
from k2.log.base import Log
from k2.log.memory import MemoryLog
from k2.model import ANSWER, BACKFILL, FRAME, IMPORT, OPENED, Frame
from k2.run.importer import ImportResult, import_files

START_NS = 1_723_161_600 * 10**9


def _message(number: int) -> str:
    return (
        f'{{"stream":"btcusdt@trade","data":{{"e":"trade","s":"BTCUSDT","t":{number},"p":"61837.63","q":"0.02",'
        f'"T":1723161600000,"m":true}}}}'
    )


def _feed(path: Path, count: int) -> Path:
    lines = (f"{START_NS + i} {_message(i)}\n" for i in range(count))
    path.write_bytes(gzip.compress("".join(lines).encode(), 1))
    return path


def _all(log: Log, partition: str) -> list[Frame]:
    frames: list[Frame] = []
    while batches := log.read(partition, len(frames)):
        for batch in batches:
            frames += batch.frames
    return frames


@pytest.fixture(params=["memory", "embedded"])
def log(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Log]:
    """A log of each kind that works inside one process."""
    if request.param == "memory":
        yield MemoryLog()
        return
    embedded = pytest.importorskip("k2.log.embedded", reason="the embedded log is not built")
    opened = embedded.EmbeddedLog(tmp_path / "log")
    yield opened
    opened.close()


class _BreakingLog(MemoryLog):
    """A log that is full after some batches."""

    def __init__(self, batches: int) -> None:
        super().__init__()
        self.batches = batches

    def append(self, partition: str, frames: Sequence[Frame], *, producer: str = "", sequence: int = 0) -> int:
        """Store a batch while there is room."""
        if self.batches == 0:
            raise StoreDown("log: no space left")
        self.batches -= 1
        return super().append(partition, frames, producer=producer, sequence=sequence)


def test_frames_arrive_in_order_with_their_receive_times(log: Log, tmp_path: Path) -> None:
    """All lines of a file are in the log, in order, with the recorder's times, as imported."""
    path = _feed(tmp_path / "feed.gz", 12_345)

    assert import_files(log, [path], get("binance")) == [
        ImportResult(str(path), 12_345, 0, START_NS, START_NS + 12_344, 0)
    ]
    frames = _all(log, "binance")
    assert [frame.received_ns for frame in frames] == list(range(START_NS, START_NS + 12_345))
    assert {(frame.kind, frame.source, frame.connection) for frame in frames} == {(FRAME, IMPORT, "feed.gz")}
    assert frames[77].data == _message(77).encode()


def test_second_import_adds_nothing(log: Log, tmp_path: Path) -> None:
    """The same content, also under another name and by the exchange's name, is known."""
    path = _feed(tmp_path / "feed.gz", 6_000)
    import_files(log, [path], "binance")
    path = path.rename(tmp_path / "renamed.gz")

    (again,) = import_files(log, [path], "binance")

    assert (again.frames_added, again.frames_present) == (0, 6_000)
    assert log.end_offset("binance") == 6_000


def test_interrupted_import_goes_on(tmp_path: Path) -> None:
    """After the log failed in the middle, a second run adds just the rest."""
    log = _BreakingLog(batches=2)
    path = _feed(tmp_path / "feed.gz", 12_000)
    with pytest.raises(StoreDown):
        import_files(log, [path], "binance")
    log.batches = 100

    (result,) = import_files(log, [path], "binance")

    assert (result.frames_added, result.frames_present) == (2_000, 10_000)
    assert [frame.received_ns - START_NS for frame in _all(log, "binance")] == list(range(12_000))


def test_progress_is_told_after_each_batch(tmp_path: Path) -> None:
    """The caller hears of every batch, with the counts so far."""
    told: list[int] = []
    import_files(
        MemoryLog(),
        [_feed(tmp_path / "feed.gz", 12_000)],
        "binance",
        progress=lambda result: told.append(result.frames_added),
    )

    assert told == [5_000, 10_000, 12_000]


def test_large_messages_make_small_batches(tmp_path: Path) -> None:
    """A batch is bounded in bytes too."""
    path = tmp_path / "feed"
    book = '{"lastUpdateId":1,"bids":[' + ",".join(['["1","2"]'] * 100_000) + '],"asks":[]}'
    path.write_text("".join(f"{START_NS + i} {book}\n" for i in range(20)))
    told: list[int] = []
    import_files(MemoryLog(), [path], "binance", progress=lambda result: told.append(result.frames_added))

    assert told == [9, 18, 20]


def test_cut_file_keeps_what_came_before(tmp_path: Path) -> None:
    """Lines before the damage are imported; the whole file, imported later, adds the rest."""
    log = MemoryLog()
    text = "".join(f'{START_NS + i} {_message(i)[:-2]},"r":"{os.urandom(60).hex()}"}}}}\n' for i in range(500))
    path = tmp_path / "cut.gz"
    path.write_bytes(gzip.compress(text.encode())[:-1_000])

    with pytest.raises(BadData, match=r"cut\.gz: cannot be read any further at line"):
        import_files(log, [path], "binance")

    assert 400 < log.end_offset("binance") < 500
    path.write_bytes(gzip.compress(text.encode()))
    (whole,) = import_files(log, [path], "binance")
    assert whole.frames_added + whole.frames_present == 500
    assert [frame.received_ns - START_NS for frame in _all(log, "binance")] == list(range(500))


def _text(*numbers: int) -> bytes:
    return "".join(f"{START_NS + i} {_message(i)}\n" for i in numbers).encode()


def test_gzip_and_plain_copy_are_one_file(log: Log, tmp_path: Path) -> None:
    """How a file is compressed and named does not matter."""
    (tmp_path / "feed").write_bytes(_text(*range(100)))
    (tmp_path / "copy.gz").write_bytes(gzip.compress(_text(*range(100)), 9))
    (first, second) = import_files(log, [tmp_path / "feed", tmp_path / "copy.gz"], "binance")

    assert (first.frames_added, second.frames_added, second.frames_present) == (100, 0, 100)
    assert log.end_offset("binance") == 100


def test_grown_file_goes_on_where_it_ended(log: Log, tmp_path: Path) -> None:
    """Only what is new in a file is added, from its first line on, and when it was cut in the middle of a line."""
    path = tmp_path / "feed"
    whole = _text(*range(7_000))
    added = []
    for size in (len(_text(0)), len(_text(*range(5_500))) + 40, len(whole) - 1, len(whole)):
        path.write_bytes(whole[:size])
        before = log.end_offset("binance") if log.partitions() else 0
        with contextlib.suppress(BadData):  # the line that is cut
            import_files(log, [path], "binance")
        added.append(log.end_offset("binance") - before)

    assert added == [1, 5_499, 1_500, 0]
    assert [frame.received_ns - START_NS for frame in _all(log, "binance")] == list(range(7_000))


@pytest.mark.parametrize("numbers", [(0, 1, 3, 4, 5, 6), (0, 1, 2, 3), (0, 1, 2, 3, 5)])
def test_other_file_with_the_same_beginning_is_refused(tmp_path: Path, numbers: tuple[int, ...]) -> None:
    """An edited or shorter copy cannot be told from a doubled import: it is refused, and nothing is added."""
    log = MemoryLog()
    (tmp_path / "feed").write_bytes(_text(0, 1, 2, 3, 4))
    (tmp_path / "copy").write_bytes(_text(*numbers))
    import_files(log, [tmp_path / "feed"], "binance")

    with pytest.raises(Rejected, match="of which 5 lines are in the log, but is not the same up to there"):
        import_files(log, [tmp_path / "copy"], "binance")

    assert log.end_offset("binance") == 5


def test_rest_answer_that_has_grown_is_a_new_file(tmp_path: Path) -> None:
    """A copy of a REST answer adds nothing; with more rows it goes in whole, its repeats are found by their ids."""
    log = MemoryLog()
    rows = [f'{{"a":{i},"p":"1","q":"2","f":{i},"l":{i},"T":1672515782000,"m":true}}' for i in range(2_500)]
    path = tmp_path / "aggTrades_XRPETH.json"
    path.write_text("[" + ",".join(rows[:1_500]) + "]")
    copy = tmp_path / "XRPETH_copy.json.gz"
    copy.write_bytes(gzip.compress(path.read_bytes()))
    import_files(log, [path], "binance")
    (again,) = import_files(log, [copy], "binance")
    path.write_text("[" + ",".join(rows) + "]")
    (grown,) = import_files(log, [path], "binance")

    assert (again.frames_added, again.frames_present) == (0, 2)
    assert (grown.frames_added, grown.frames_present) == (3, 0)


def test_file_of_another_exchange_is_refused(tmp_path: Path) -> None:
    """A recording the exchange cannot read at all leaves the log as it was."""
    log = MemoryLog()
    with pytest.raises(BadData, match="not of the exchange 'kraken'"):
        import_files(log, [_feed(tmp_path / "feed.gz", 10)], "kraken")

    assert log.partitions() == []


def test_single_bad_messages_are_imported(tmp_path: Path) -> None:
    """A message that cannot be parsed is kept for the dead letters; the file goes in."""
    path = tmp_path / "feed"
    path.write_text(f"{START_NS} {{broken\n{START_NS + 1} {_message(1)}\n")

    assert import_files(MemoryLog(), [path], "binance")[0].frames_added == 2


def test_unreadable_file_and_unknown_exchange(tmp_path: Path) -> None:
    """What cannot be read and who is not known gives one clear error."""
    with pytest.raises(Misconfigured, match=r"absent: cannot be opened: No such file or directory \(check the path"):
        import_files(MemoryLog(), [tmp_path / "absent"], "binance")
    with pytest.raises(UnknownName, match="did you mean 'kraken'"):
        import_files(MemoryLog(), [], "krakn")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_file_without_permission(tmp_path: Path) -> None:
    """A file that may not be read is named."""
    path = _feed(tmp_path / "feed.gz", 1)
    path.chmod(0)
    with pytest.raises(Misconfigured, match="Permission denied"):
        import_files(MemoryLog(), [path], "binance")


RECORDINGS = [
    ("binance", "binance/spot_ws/capture_20210404.txt.gz", {OPENED: 1, FRAME: 4_716, ANSWER: 3}),
    ("binance", "binance/spot_ws/capture_20211012.jsonl.gz", {OPENED: 1, FRAME: 265, ANSWER: 5}),
    ("binance", "binance/spot_ws/btcusdt_20240808.gz", {FRAME: 41_249}),
    ("binance", "binance/rest/aggTrades_XRPETH_20191011.json.gz", {ANSWER: 13}),
    ("binance-usdm", "binance/usdm_ws/capture_20210722.jsonl.gz", {OPENED: 1, FRAME: 1_535, ANSWER: 5}),
    ("kraken", "kraken/ws_v1/capture_20210417.jsonl.gz", {OPENED: 3, FRAME: 4_430, ANSWER: 1}),
    ("kraken", "kraken/ws_v2/trades_20260926.jsonl", {FRAME: 12}),
    ("kraken", "kraken/ws_v2/book_20260824.jsonl", {FRAME: 8}),
    ("kraken", "kraken/rest/trades_XBTUSDT_20251110.json.gz", {ANSWER: 1}),
    ("coinbase", "coinbase/advanced_ws/capture_20260809_part1.jsonl.gz", {OPENED: 1, FRAME: 400, ANSWER: 1}),
    ("coinbase", "coinbase/exchange_ws/capture_20210417_part1.txt.gz", {OPENED: 1, FRAME: 5_916}),
    ("coinbase", "coinbase/rest/products_20210417.txt.gz", {ANSWER: 1}),
]


@pytest.mark.parametrize(("exchange", "file", "kinds"), RECORDINGS)
def test_recording_goes_in_once(recordings: Path, exchange: str, file: str, kinds: dict[str, int]) -> None:
    """Every frame of a real recording is in the log, and a second import adds none."""
    log = MemoryLog()
    (first,) = import_files(log, [recordings / file], exchange)
    (second,) = import_files(log, [recordings / file], exchange)
    frames = _all(log, exchange)

    assert {kind: sum(frame.kind == kind for frame in frames) for kind in kinds} == kinds
    assert len(frames) == first.frames_added == second.frames_present == sum(kinds.values())
    assert second.frames_added == 0
    assert {frame.source for frame in frames} == {BACKFILL if "/rest/" in file and "trades" in file.lower() else IMPORT}


def test_klines_are_no_recording_of_trades(recordings: Path) -> None:
    """A REST answer without trades is refused."""
    with pytest.raises(BadData):
        import_files(MemoryLog(), [recordings / "kraken/rest/ohlc_1m_XBTUSDT_20251110.json.gz"], "kraken")


@pytest.mark.parametrize(
    ("file", "exchange"),
    [
        ("binance/usdm_ws/btcusdt_20240718.gz", "binance"),
        ("binance/usdm_ws/capture_20210722.jsonl.gz", "binance"),
        ("binance/spot_ws/btcusdt_20240808.gz", "binance-usdm"),
        ("binance/coinm_ws/capture_20210722.jsonl.gz", "binance-usdm"),
        ("binance_us/ws/capture_20211012.jsonl.gz", "binance"),
        ("bitstamp/ws/capture_20220105.jsonl.gz", "kraken"),
        ("kraken/ws_v2/trades_20260926.jsonl", "binance"),
    ],
)
def test_recording_of_another_exchange_is_refused(recordings: Path, file: str, exchange: str):
    """Futures and spot use the same symbols; once in the log, their ids would be mixed up for good."""
    log = MemoryLog()
    with pytest.raises(BadData, match=r"is the exchange right\?"):
        import_files(log, [recordings / file], exchange)

    assert log.partitions() == []
