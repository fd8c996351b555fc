"""When hot is not trusted at a start, and that it is then made again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.run.test_ingest import stream
from tests.run.test_rebuild import everything, frames

from k2.cold import open_cold
from k2.cold.base import Cold
from k2.errors import Corrupt
from k2.hot.memory import MemoryHot
from k2.log.memory import MemoryLog
from k2.run import doubt
from k2.run.ingest import Ingest
from k2.run.offload import Offloader
from k2.run.rebuild import rebuild
from k2.run.state import IngestState, MachineRun
from k2.settings import load


class Parts:
    """A log, a hot and a cold tier with some of the log in each."""

    def __init__(self, folder: Path, cold: Cold) -> None:
        self.settings = load({"data": str(folder)}, environment={})
        self.log, self.hot, self.cold = MemoryLog(), MemoryHot(), cold
        self.state = IngestState(folder / "state.db")
        for number in range(3):
            self.log.append("binance", frames(stream(1, 200), 1_000 * number))
            self.ingest()
            if number == 0:
                self.offloader().drain()

    def ingest(self) -> None:
        ingest = Ingest(self.settings, self.log, self.hot, self.state)
        ingest.recover()
        ingest.drain()

    def offloader(self, generation: Callable[[], tuple[str, bool]] | None = None) -> Offloader:
        state = self.state
        return Offloader(
            self.settings, self.log, self.hot, self.cold, state.progress, state.expected_rows,
            boundaries=state.boundaries, generation=generation or state.generation,
        )  # fmt: skip


@pytest.fixture
def parts(tmp_path: Path):
    cold = open_cold(load({"data": str(tmp_path)}, environment={}))
    made = Parts(tmp_path, cold)
    yield made
    made.state.close()
    cold.close()


def test_only_a_machine_that_went_down_raises_doubt(parts: Parts) -> None:
    """Nothing noted, the same run, or files synced at the end: trusted. Another run without that: not."""
    state, now = parts.state, doubt.boot_id()

    assert doubt.of_machine(state) == ""
    for run, trusted in (
        (MachineRun(now, False), True),
        (MachineRun("other", True), True),
        (MachineRun("", False), True),
    ):
        state.note_machine(run)
        assert (doubt.of_machine(state) == "") is trusted
    state.note_machine(MachineRun("other", False))
    assert ("the machine went down" in doubt.of_machine(state)) is bool(now)


def test_interrupted_making_raises_doubt(parts: Parts) -> None:
    """Half a hot tier is never taken for a whole one."""
    parts.state.begin_rebuild()

    assert "is not finished" in doubt.of_machine(parts.state)


def test_rows_gone_from_hot_are_noticed_and_made_again(parts: Parts) -> None:
    """A hot tier that lost what cold does not hold yet: the counts differ, and afterwards everything is as before."""
    before = everything(parts.hot)
    assert doubt.of_rows(parts.log, parts.hot, parts.state) == ""
    parts.hot.reset()

    assert "it holds 0 rows of" in doubt.of_rows(parts.log, parts.hot, parts.state)
    doubt.check_makeable(parts.log, parts.cold, parts.state)
    rebuild(parts.hot, parts.cold, parts.state)
    parts.ingest()
    assert everything(parts.hot) == before
    assert doubt.of_rows(parts.log, parts.hot, parts.state) == ""


def test_hot_that_cannot_be_made_again_is_kept(parts: Parts) -> None:
    """Where the log has removed what cold does not hold, a doubtful hot is more than nothing: refused."""
    end = parts.log.end_offset("binance")
    for reader in ("ingest", "offload"):
        parts.log.commit_reader(reader, {"binance": end})
    parts.log.trim(keep_seconds=-1)
    mark, start = parts.cold.pin("trades").watermark["binance"], parts.log.start_offset("binance")
    assert start > mark

    with pytest.raises(Corrupt, match=f"cold ends at offset {mark}, and the log begins at {start}"):
        doubt.check_makeable(parts.log, parts.cold, parts.state)


def test_offload_commits_nothing_of_a_hot_that_was_made_anew_meanwhile(parts: Parts) -> None:
    """Rows counted in one hot tier and read from another never reach cold."""
    marks = dict(parts.cold.pin("trades").watermark)

    def made_anew_after_a_look() -> tuple[str, bool]:
        seen = parts.state.generation()
        if not seen[1]:
            parts.state.begin_rebuild()
        return seen

    with pytest.raises(Exception, match="hot is being made anew"):
        parts.offloader(made_anew_after_a_look).drain()
    assert dict(parts.cold.pin("trades").watermark) == marks
