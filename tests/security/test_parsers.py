"""Every parser takes the exchange as hostile: rows or BadFrame, never another exception, a hang or unbounded memory."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import msgspec
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from k2.cold import open_cold
from k2.feeds import registry
from k2.hot import open_hot
from k2.model import ANSWER, FRAME, Frame, Selection
from k2.settings import Settings

sys.path.insert(0, str(Path(__file__).parent))
import hostile
import properties

EXCHANGES = sorted(registry.OWN)
FRAMES = {name: hostile.known_frames(name) for name in EXCHANGES}
QUICK = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))

numbers = st.integers(0, 2**31)
edits = st.lists(st.tuples(numbers, numbers, numbers), min_size=1, max_size=6)


@st.composite
def damaged(draw: st.DrawFn, exchange: str) -> Frame:
    """A real frame of the exchange after some edits."""
    cases = FRAMES[exchange]
    case, other = draw(st.sampled_from(cases)), draw(st.sampled_from(cases))
    return case.frame(hostile.damage(case.data, draw(edits), other.data))


@pytest.mark.parametrize("name", EXCHANGES)
@QUICK
@given(data=st.data())
def test_damaged_frame_is_rows_or_bad_frame(name: str, data: st.DataObject) -> None:
    """Real frames with bits flipped, types swapped, keys said twice, huge numbers and deep nesting in them."""
    properties.parse(registry.get(name), data.draw(damaged(name)))


@pytest.mark.parametrize("name", EXCHANGES)
@QUICK
@given(data=st.binary(max_size=300), kind=st.sampled_from((FRAME, ANSWER)), origin=st.text(max_size=80))
def test_any_bytes_from_any_address_are_rows_or_bad_frame(name: str, data: bytes, kind: str, origin: str) -> None:
    """Frames and REST answers of nothing but noise, under addresses of nothing but noise."""
    properties.parse(registry.get(name), Frame(kind, "live", "0", 0, 0, 1, data, origin))


@pytest.mark.parametrize("name", EXCHANGES)
@QUICK
@given(data=st.data())
def test_damaged_frames_become_exact_rows_or_dead_letters(name: str, data: st.DataObject) -> None:
    """A batch of damaged and whole frames: each row exact, in the schema of its table; the rest dead letters."""
    frames = [
        msgspec.structs.replace(frame, counter=number)
        for number, frame in enumerate(data.draw(st.lists(damaged(name), min_size=1, max_size=4)))
    ]
    properties.normalise(registry.get(name), frames)


@pytest.mark.parametrize("name", EXCHANGES)
@QUICK
@given(data=st.data())
def test_damaged_frames_are_the_same_as_columns_and_one_by_one(name: str, data: st.DataObject) -> None:
    """The fast way gives up, or gives the very rows of the exact way: hostile frames do not tell them apart."""
    cases = [case.data for case in FRAMES[name] if case.expected.kind == FRAME and not case.expected.bad]
    frames = data.draw(st.lists(st.sampled_from(cases), min_size=1, max_size=3))
    at = data.draw(st.integers(0, len(frames) - 1))
    frames[at] = hostile.damage(frames[at], data.draw(edits), data.draw(st.sampled_from(cases)))
    properties.normalise_as_a_run(
        registry.get(name), [Frame(FRAME, "live", "0", 0, n, 1, frame) for n, frame in enumerate(frames)]
    )


@pytest.mark.slow
def test_rows_of_damaged_frames_can_be_written(tmp_path: Path) -> None:
    """Hundreds of damaged frames of every exchange: what is left of them goes into hot and cold, none is lost."""
    chosen = Settings(data=str(tmp_path))
    choose = random.Random(7)
    rows: dict[str, list[pa.Table]] = defaultdict(list)
    for name in EXCHANGES:
        frames = [case.frame() for case in FRAMES[name]]
        for number in range(400):
            case, other = choose.choice(FRAMES[name]), choose.choice(FRAMES[name])
            edits = [tuple(choose.randrange(2**31) for _ in range(3)) for _ in range(1 + number % 3)]
            frames.append(case.frame(hostile.damage(case.data, edits, other.data)))
        for table, found in properties.tables(properties.normalise(registry.get(name), frames)).items():
            rows[table].append(found)
    hot, cold = open_hot(chosen, "own"), open_cold(chosen)
    try:
        written: Counter[str] = Counter()
        for table, parts in rows.items():
            together = pa.concat_tables(parts)
            hot.write(table, together, table)
            cold.append(table, together, start={}, end=dict.fromkeys(EXCHANGES, 10_000))
            written[table] = together.num_rows
        counts = {
            table: (
                hot.counts(table, {}, dict.fromkeys(EXCHANGES, 10_000)),
                cold.read(cold.pin(table), Selection(table)).num_rows,
            )
            for table in written
        }
    finally:
        hot.close()
        cold.close()

    assert counts == {table: (count, count) for table, count in written.items()}
    assert written["trades"] > 20
    assert written["dead_letters"] > 500


@pytest.mark.parametrize("name", EXCHANGES)
def test_bomb_is_rows_or_bad_frame(name: str) -> None:
    """Half a megabyte of brackets, digits, blanks, fields or trades, as frame and as REST answer."""
    exchange = registry.get(name)
    origins = {case.expected.origin for case in FRAMES[name] if case.expected.kind == ANSWER}
    for _, bomb in hostile.bombs(1 << 19):
        properties.parse(exchange, Frame(FRAME, "live", "0", 0, 0, 1, bomb))
        for origin in origins:
            properties.parse(exchange, Frame(ANSWER, "backfill", "0", 0, 0, 1, bomb, origin))


BOMBARD = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import hostile, properties
from k2.feeds import registry
from k2.model import FRAME, Frame
with open("/proc/self/statm") as statm:
    now = int(statm.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + int(sys.argv[2]), now + int(sys.argv[2])))
for what, bomb in hostile.bombs(15 << 20):
    for name in registry.OWN:
        properties.parse(registry.get(name), Frame(FRAME, "live", "0", 0, 0, 1, bomb))
        print(what, name, flush=True)
"""


@pytest.mark.slow
def test_largest_bomb_takes_bounded_memory() -> None:
    """Every bomb of nearly the largest size capture takes, parsed with half a GiB of memory beyond the start.

    A bomb is 15 MiB itself, so parsing takes at most 33 times the size of what it reads.
    """
    argv = [sys.executable, "-c", BOMBARD, str(Path(__file__).parent), str(512 << 20)]
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=110, check=False)

    assert ended.returncode == 0, (ended.stdout.splitlines()[-1:], ended.stderr[-2_000:])
    assert len(ended.stdout.splitlines()) == len(EXCHANGES) * len(list(hostile.bombs(100)))
