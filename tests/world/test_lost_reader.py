"""A reader that never comes back: the log keeps to `log.max_bytes` and says what it gives up."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pytest
from traded import PER_BATCH, T0, fill

from k2.client import connect
from k2.cold.memory import MemoryCold
from k2.errors import Rejected
from k2.hot.memory import MemoryHot
from k2.log.base import GivenUp
from k2.log.damage import GIVEN_UP, Damage, read_on
from k2.log.embedded import EmbeddedLog
from k2.model import FRAME, LIVE, Frame, Selection
from k2.node import drain
from k2.run.doubt import of_rows
from k2.run.ingest import Ingest
from k2.run.offload import Offloader
from k2.run.state import IngestState
from k2.settings import Settings, load

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


class Killed(BaseException):
    """The death of the process."""


class KilledHot(MemoryHot):
    """Dies once, when it has stored rows of a table, without a name before it stores any; its rows stay."""

    def __init__(self, after: str) -> None:
        super().__init__()
        self.after = after
        self.is_killed = False

    def write(self, table: str, rows: pa.Table, token: str) -> None:
        """Store, and die when it is time."""
        if self.after or self.is_killed:
            super().write(table, rows, token)
        if not self.is_killed and self.after in ("", table):
            self.is_killed = True
            raise Killed


@pytest.mark.parametrize("after", ["", "trades", "dead_letters"])
@pytest.mark.parametrize("lost", ["part", "all"])
def test_interrupted_flush_is_finished_when_its_frames_were_given_up(tmp_path: Path, after: str, lost: str) -> None:
    """Hot, state and cold agree on what was stored before: each trade is there once, and moving goes on."""
    settings = load({"data": str(tmp_path)}, environment={})
    log, hot, state = opened(tmp_path / "log"), KilledHot(after), IngestState(tmp_path / "state.db")
    fill(log, 2_000)
    log.append("binance", [Frame(FRAME, LIVE, "c", 1, 2_001, T0, b"no trade")])
    with pytest.raises(Killed):
        begun(settings, log, hot, state).drain()
    log.commit_reader("ingest", {})
    while log.start_offset("binance") < (500 if lost == "part" else 2_500):
        fill(log, log.end_offset("binance") + PER_BATCH)
    start, end = log.start_offset("binance"), log.end_offset("binance")
    assert (start < 2_000) == (lost == "part")

    begun(settings, log, hot, state).drain()
    assert of_rows(log, hot, state) == ""
    cold = MemoryCold()
    expected = {"expected": state.expected_rows, "boundaries": state.boundaries, "generation": state.generation}
    Offloader(settings, log, hot, cold, state.progress, **expected).drain()  # type: ignore[arg-type]

    known = set(range(1, 2_001 if after else 1))
    ids = sorted(known | set(range(start + 1, end + 1)) - {2_001})
    for rows in (hot.read(Selection("trades")), cold.read(cold.pin("trades"), Selection("trades"))):
        assert sorted(rows["trade_id"].to_pylist()) == ids
    reasons = set(hot.read(Selection("dead_letters"))["reason"].to_pylist())
    assert ("bad_frame" in reasons) == (lost == "part" or after == "dead_letters")
    assert (GIVEN_UP in reasons) == (lost == "all" or after != "dead_letters")  # else nothing was lost
    gaps = hot.read(Selection("gaps"))
    holes = [(low + 1, high - 1) for low, high in pairwise(ids) if high - low > 1]
    assert list(zip(gaps["first_id"].to_pylist(), gaps["last_id"].to_pylist(), strict=True)) == holes
    log.close()
    state.close()


def begun(settings: Settings, log: EmbeddedLog, hot: MemoryHot, state: IngestState) -> Ingest:
    made = Ingest(settings, log, hot, state)
    made.recover()
    return made
