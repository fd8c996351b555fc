"""Many frames at once are read as each by itself, whatever is wrong with one of them."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

import pytest

from k2.feeds import registry
from k2.feeds.recordings import read
from k2.model import FRAME, LIVE, NOTHING, Frame, LogBatch
from k2.run.ingest import TABLES

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "run"))
import hostile
import runs
from test_columnar import Stream, Taken, batches_of, normaliser

EXCHANGES = sorted(registry.OWN)
SAMPLE = 300  # damages of each frame in the default run
MOST = 8_000  # of some 20,000 in the long run
ROUNDS = 40
IN_SHORT = (("binance", "quote"), ("kraken", "trade"))
RUN = 90  # frames, more than are worth columns
RECORDED = {
    "binance": "binance/spot_ws/btcusdt_20240809.gz",
    "binance-usdm": "binance/usdm_ws/btcusdt_20240719.gz",
}


def read_as_columns(name: str) -> dict[str, bytes]:
    """Return the known frames with rows that are read as columns, by name: every dialect's."""
    exchange = registry.get(name)
    found = {
        case.name: case.data
        for case in hostile.known_frames(name)
        if case.expected.kind == FRAME and not case.expected.bad and runs.read_one(exchange, case.data) != NOTHING
    }
    return {known: data for known, data in found.items() if runs.read_many(exchange, [data]) is not None}


KNOWN = [(name, known, data) for name in EXCHANGES for known, data in read_as_columns(name).items()]
frames_that_are_read = pytest.mark.parametrize(
    ("name", "data"), [(n, d) for n, _, d in KNOWN], ids=[k for _, k, _ in KNOWN]
)


def placed(data: bytes, damaged: bytes, turn: int) -> list[bytes]:
    """Return a run with the damaged frame in it: first, so that all else is learned from it, within, or last."""
    good = [data] * 3
    return [*good[:turn], damaged, *good[turn:]]


@frames_that_are_read
def test_a_damaged_frame_in_a_run_is_read_as_by_itself(name: str, data: bytes) -> None:
    """Some of all damages of a byte or a value, at each place of a run of the same message."""
    exchange = registry.get(name)
    every = list(runs.damages(data))
    choose = random.Random(len(data))
    read = sum(
        runs.check_run(exchange, placed(data, damaged, turn))
        for damaged, turn in zip(choose.sample(every, SAMPLE), cycle(range(4)), strict=False)
    )

    assert runs.check_run(exchange, [data] * 4)
    assert read >= 1  # else nothing was compared


@pytest.mark.slow
@pytest.mark.timeout(400)
@frames_that_are_read
def test_thousands_of_damaged_frames_in_runs_are_read_as_by_themselves(name: str, data: bytes) -> None:
    """Nearly all damages of a byte or a value, each at some place, by a reader that has seen those before."""
    exchange = registry.get(name)
    every = list(runs.damages(data))
    for number, damaged in enumerate(random.Random(1).sample(every, min(MOST, len(every)))):
        runs.check_run(exchange, placed(data, damaged, number % 4))


def stream(name: str, choose: random.Random) -> Iterator[bytes]:
    """Yield messages as an exchange sends them, with ids that go on."""
    made = Stream(name)
    while True:
        make = choose.choice((made.trade, made.trade, made.quote))
        symbol, step = choose.choice(("BTC", "ETH")), choose.randrange(0, 300)
        price, amount = (
            f"{choose.randrange(1, 90_000)}.{choose.randrange(100):02}",
            f"0.{choose.randrange(1, 10**8):08}",
        )
        yield make(symbol, 0, price, amount, step, bool(choose.randrange(2)))


def check_ingest(name: str, frames: list[bytes], most: int) -> int:
    """Take frames in as ingest does and one by one: rows, dead letters, ledgers and repeats must be the same.

    Returns how many were taken as columns.
    """
    records = [Frame(FRAME, LIVE, "a", 1, n, 10**18 + n, data) for n, data in enumerate(frames)]
    batches: list[LogBatch] = batches_of(records, [len(records) // 3])
    single, columns = Taken(normaliser(name)), Taken(normaliser(name))
    single.one_by_one(batches)
    columns.take(batches, most)
    for table in TABLES:
        assert columns.rows(table) == single.rows(table), table
    assert columns.memory() == single.memory()
    return columns.as_columns


@pytest.mark.parametrize("name", EXCHANGES)
def test_damaged_frames_become_the_same_rows_in_any_run(name: str) -> None:
    """Streams with a few damaged frames, in runs of several lengths: what is stored and remembered is the same."""
    choose = random.Random(name)
    as_columns = 0
    for number in range(ROUNDS):
        frames = list(islice(stream(name, choose), RUN))
        for _ in range(number % 4):
            at = choose.randrange(RUN)
            frames[at] = runs.damage(frames[at], choose)
        as_columns += check_ingest(name, frames, choose.choice((10, 30, RUN)))

    assert as_columns >= RUN  # else nothing was compared


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=() if (name, kind) in IN_SHORT else pytest.mark.slow)
        for name in EXCHANGES
        for kind in ("trade", "quote")
    ],
)
def test_values_spelt_otherwise_become_the_same_rows_in_a_run(name: str, kind: str) -> None:
    """Each value of a message in each spelling, between two usual ones: taken as columns or not, the same is stored."""
    made = Stream(name)
    frames = [getattr(made, kind)("BTC", 0, price, "0.25", 5, False) for price in ("61685.99", "61686.5", "7")]
    assert check_ingest(name, frames, len(frames)) == len(frames)
    for other in runs.respelt(frames[1]):
        check_ingest(name, [frames[0], other, frames[2]], len(frames))


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", RECORDED)
def test_recorded_runs_with_a_damaged_frame_become_the_same_rows(name: str, recordings: Path) -> None:
    """Real feeds, hundreds of messages at a time, one damaged: the same rows, dead letters, ledgers and repeats."""
    choose = random.Random(7)
    source = (found.frame.data for found in read(recordings / RECORDED[name], registry.get(name)) if found.frame)
    for number in range(60):
        frames = list(islice(source, 300))
        if number % 6:
            at = choose.randrange(len(frames))
            frames[at] = runs.damage(frames[at], choose)
        check_ingest(name, frames, 100)
