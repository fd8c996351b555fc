"""Rebuilding hot from cold: afterwards everything is as if nothing had been lost."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pytest
from tests.run.test_ingest import NOW_MS, stream

from k2.cold import open_cold
from k2.errors import Misconfigured
from k2.hot.memory import MemoryHot
from k2.log.memory import MemoryLog
from k2.model import FRAME, LIVE, OPENED, Frame, Selection
from k2.run.ingest import TABLES, Ingest
from k2.run.offload import Offloader
from k2.run.rebuild import rebuild
from k2.run.state import IngestState
from k2.settings import Settings, load


def everything(hot: MemoryHot) -> dict[str, list[dict[str, object]]]:
    found: dict[str, pa.Table] = {t: hot.read(Selection(t)) for t in TABLES}
    found |= {f"candles {t}": hot.candles(t, Selection("candles")) for t in ("1m", "1d")}
    return {name: table.to_pylist() for name, table in found.items()}


def frames(messages: list[bytes], first: int) -> list[Frame]:
    made = [
        Frame(FRAME, LIVE, "c", 0, first + i, (NOW_MS + first + i) * 10**6, data) for i, data in enumerate(messages)
    ]
    return [Frame(OPENED, LIVE, "c", 0, 0, NOW_MS * 10**6, b"", "ws://x"), *made]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load({"data": str(tmp_path)}, environment={})


@pytest.mark.parametrize("seed", range(3))
def test_a_rebuilt_hot_equals_the_lost_one_and_goes_on_like_it(settings: Settings, seed: int):
    """Rows, candles, and what is found repeated or missing afterwards; some of it was not in cold yet."""
    messages = stream(seed, 400)
    again = random.Random(seed).sample(messages, 40)  # repeats of what is long in cold
    log, state, cold = MemoryLog(), IngestState(settings.data_path / "state.db"), open_cold(settings)
    kept, lost = MemoryHot(), MemoryHot()
    other = IngestState(settings.data_path / "other.db")
    parts = [messages[:200], messages[200:300], [*messages[300:], *again]]

    for number, part in enumerate(parts):
        log.append("binance", frames(part, 1_000 * number))
        for hot, own in ((kept, other), (lost, state)):
            ingest = Ingest(settings, log, hot, own)
            ingest.recover()
            ingest.drain()
        if number == 0:
            Offloader(settings, log, lost, cold, state.progress).drain()
        if number == 1:
            lost = MemoryHot()
            rebuild(lost, cold, state)
            cold.close()

    assert everything(lost) == everything(kept)
    assert state.ledgers("binance").keys() == other.ledgers("binance").keys()


def test_an_interrupted_rebuild_must_be_done_again(settings: Settings):
    """Ingest would go on with half a hot tier otherwise."""
    state = IngestState(settings.data_path / "state.db")
    state.begin_rebuild()

    with pytest.raises(Misconfigured, match="--rebuild"):
        Ingest(settings, MemoryLog(), MemoryHot(), state).recover()
    cold = open_cold(settings)
    rebuild(MemoryHot(), cold, state)
    cold.close()
    Ingest(settings, MemoryLog(), MemoryHot(), state).recover()
