"""A reader that never comes back: the log keeps to `log.max_bytes` and says what it gives up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from traded import fill

from k2.client import connect
from k2.errors import Rejected
from k2.log.base import GivenUp
from k2.log.damage import GIVEN_UP, Damage, read_on
from k2.log.embedded import EmbeddedLog
from k2.node import drain
from k2.settings import load

MAX_BYTES, SEGMENT_BYTES = 1_000_000, 200_000


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in (folder / "binance").glob("*.db*") if not file.name.endswith("-shm"))


def opened(folder: Path, max_bytes: int = MAX_BYTES) -> EmbeddedLog:
    return EmbeddedLog(folder, segment_bytes=SEGMENT_BYTES, max_bytes=max_bytes)


def test_log_stays_within_its_limit_and_names_what_it_gave_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody trims: who appends keeps the limit. Frames below the reader's position are no loss, those above are."""
    log = opened(tmp_path)
    log.commit_reader("offload", {"binance": 120})
    sizes = []
    for count in range(1_000, 12_000, 500):
        fill(log, count)
        sizes.append(size_of(tmp_path))
    start, given_up = log.start_offset("binance"), log.given_up("binance")
    log.close()

    assert max(sizes) > MAX_BYTES / 2
    assert max(sizes) <= MAX_BYTES + 2 * SEGMENT_BYTES  # the segment being written, and its WAL
    assert start > 4_000
    assert [given_up[0].first_offset, given_up[-1].end_offset] == [120, start]
    assert [r.first_offset for r in given_up[1:]] == [r.end_offset for r in given_up[:-1]]
    assert {r.readers for r in given_up} == {"offload (at 120)"}
    assert f"the frames 120..{given_up[0].end_offset - 1} are given up, not passed by offload (at 120)" in caplog.text
    repairs = [json.loads(line) for line in (tmp_path / "repairs.jsonl").read_text().splitlines()]
    assert [r["first_offset"] for r in repairs] == [r.first_offset for r in given_up]


def test_what_every_reader_has_passed_is_no_loss(tmp_path: Path) -> None:
    """Above the limit, but read: removed without a word; and the limit may be lowered."""
    log = opened(tmp_path, max_bytes=0)
    fill(log, 6_000)
    log.commit_reader("ingest", {"binance": 6_000})
    log.close()
    assert size_of(tmp_path) > MAX_BYTES
    log = opened(tmp_path)

    assert log.trim(keep_seconds=10**6)["binance"] == log.start_offset("binance") > 0
    assert size_of(tmp_path) <= MAX_BYTES
    assert log.given_up("binance") == []
    log.close()


def test_reading_on_gives_the_range_given_up_as_one_record(tmp_path: Path) -> None:
    """A reader that comes back late is told the range, and goes on; a range nobody gave up is refused as before."""
    log = opened(tmp_path)
    log.commit_reader("ingest", {})
    fill(log, 8_000)
    first = log.given_up("binance")[0]

    assert read_on(log, "binance", 10) == [
        Damage("binance", 10, first.end_offset, first.at_ns, read_on(log, "binance", 10)[0].detail, GIVEN_UP)  # type: ignore[union-attr]
    ]
    assert read_on(log, "binance", 10, end=20)[0].end_offset == 20
    assert read_on(log, "binance", log.start_offset("binance"))[0].base_offset == log.start_offset("binance")
    log.close()
    (tmp_path / "readers.db").unlink()
    log = opened(tmp_path)
    with pytest.raises(Rejected, match="retention removed"):
        read_on(log, "binance", 10)
    log.close()


def test_range_is_written_down_before_anything_is_removed(tmp_path: Path) -> None:
    """Where it cannot be written down, nothing is removed and appending goes on."""
    log = opened(tmp_path)
    log.commit_reader("ingest", {})
    log.close()
    (tmp_path / "readers.db").rename(tmp_path / "aside.db")
    (tmp_path / "readers.db").mkdir()
    log = opened(tmp_path)
    fill(log, 8_000)

    assert (log.start_offset("binance"), log.end_offset("binance")) == (0, 8_000)
    (tmp_path / "readers.db").rmdir()
    (tmp_path / "aside.db").rename(tmp_path / "readers.db")
    fill(log, 10_000)
    assert isinstance(log.given_up("binance")[0], GivenUp)
    assert log.start_offset("binance") > 0
    log.close()


def test_pipeline_goes_on_behind_what_was_given_up(tmp_path: Path) -> None:
    """Ingest and offload that were away too long: a dead letter names the range, all that is left gets through."""
    limits = {"log.max_bytes": MAX_BYTES, "log.segment_bytes": SEGMENT_BYTES, "log.retention_seconds": 10**6}
    settings = load({"data": str(tmp_path / "data"), **limits}, environment={})
    log = opened(tmp_path / "data/log")
    fill(log, 500)
    drain(settings, "ingest")
    drain(settings, "offload")
    fill(log, 12_000)
    given_up = log.given_up("binance")
    start = log.start_offset("binance")
    log.close()
    assert given_up[-1].end_offset == start > 600

    drain(settings, "ingest")
    drain(settings, "offload")

    expected = [*range(1, 501), *range(start + 1, 12_001)]  # offset + 1 = id
    with connect(settings=settings) as client:
        for tier in ("hot", "cold", "all"):
            ids = client.trades("BTC-USDT", exchange="binance", tier=tier, limit=0).arrow()["trade_id"].to_pylist()
            assert ids == expected, tier
        letters = client.rows("dead_letters", limit=0).arrow().to_pylist()
        gaps = client.gaps("BTC-USDT", exchange="binance", limit=0).arrow().to_pylist()
    assert {letter["reason"] for letter in letters} == {"given_up_log"}
    told = sorted((letter["log_offset"], letter["detail"]) for letter in letters)
    assert told[0][0] == 500
    assert told[-1][1].endswith(f"(offsets up to {start - 1})")
    assert [(gap["first_id"], gap["last_id"], gap["status"]) for gap in gaps] == [(501, start, "open")]
