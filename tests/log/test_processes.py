"""The embedded log under several processes, and under kill -9."""

from __future__ import annotations

import importlib.util
import random
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

from k2.log.embedded import EmbeddedLog
from k2.model import Frame

SCRIPT = Path(__file__).with_name("appender.py")
_spec = importlib.util.spec_from_file_location("appender", SCRIPT)
assert _spec is not None
assert _spec.loader is not None
appender = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(appender)


def start(folder: Path, producer: str, count: int, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), str(folder), "kraken", producer, str(count), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def acknowledged(process: subprocess.Popen[str]) -> dict[int, int]:
    """Every whole line the process wrote, after its end: sequence -> offset."""
    assert process.stdout is not None
    out = process.stdout.read()  # not `communicate`: that would skip what `readline` has buffered
    process.stdout.close()
    process.wait(60)
    lines = [line for line in out.splitlines(keepends=True) if line.endswith("\n")]
    return {int(sequence): int(offset) for sequence, offset in (line.split() for line in lines)}


def read_whole(log: EmbeddedLog, offset: int = 0) -> list[tuple[int, Frame]]:
    """Every frame from an offset on with its own offset; checks that reads are contiguous."""
    found: list[tuple[int, Frame]] = []
    while batches := log.read("kraken", offset):
        for batch in batches:
            assert batch.base_offset == offset
            found += enumerate(batch.frames, offset)
            offset = batch.end_offset
    return found


def tail(log: EmbeddedLog, is_enough: Callable[[list[tuple[int, Frame]]], bool]) -> list[tuple[int, Frame]]:
    """Read as a reader does, whatever is there as it comes."""
    found: list[tuple[int, Frame]] = []
    deadline = time.monotonic() + 60
    while not is_enough(found) and time.monotonic() < deadline:
        log.wait({"kraken": len(found)}, 1)
        found += read_whole(log, len(found))
    return found


def check_whole(found: list[tuple[int, Frame]]) -> dict[str, dict[int, int]]:
    """No hole, no overlap, each batch as appended, each producer in order; returns sequence -> offset of each."""
    stored: dict[str, dict[int, int]] = defaultdict(dict)
    offset = 0
    while offset < len(found):
        assert found[offset][0] == offset
        first = found[offset][1]
        batch = appender.batch(first.connection, first.counter)
        assert [frame for _, frame in found[offset : offset + len(batch)]] == batch
        assert first.counter == len(stored[first.connection])
        stored[first.connection][first.counter] = offset
        offset += len(batch)
    return stored


def test_two_appending_processes_and_a_tailing_reader(tmp_path: Path) -> None:
    """Two processes append to one partition while a third tails: no hole, no double, order per producer."""
    log = EmbeddedLog(tmp_path)
    processes = [start(tmp_path, name, 250) for name in ("a", "b")]

    frames_in_all = 2 * sum(len(appender.batch("a", sequence)) for sequence in range(250))
    found = tail(log, lambda found: len(found) >= frames_in_all)

    acks = [acknowledged(process) for process in processes]
    assert check_whole(found) == {"a": acks[0], "b": acks[1]}
    assert len(list((tmp_path / "kraken").glob("*.db"))) > 2
    assert log.recover() == []
    log.close()


@pytest.mark.parametrize(
    ("rounds", "tailed"),
    [
        (6, False),
        (6, True),
        pytest.param(50, False, marks=pytest.mark.slow),
        pytest.param(50, True, marks=pytest.mark.slow),
    ],
)
def test_killed_appender_loses_nothing_acknowledged(tmp_path: Path, rounds: int, tailed: bool) -> None:
    """kill -9 at random moments: every acknowledged batch is there once, and offsets go on without a hole."""
    draw = random.Random(rounds)
    reader = EmbeddedLog(tmp_path) if tailed else None
    seen: dict[int, int] = {}
    for _ in range(rounds):
        process = start(tmp_path, "a", 1_000_000)
        assert process.stdout is not None
        first = process.stdout.readline()  # it is at work
        seen.update([tuple(map(int, first.split()))])  # type: ignore[list-item]
        killer = threading.Timer(draw.uniform(0, 0.15), process.kill)
        killer.start()
        seen.update(acknowledged(process))
        killer.join()
        if reader is not None:
            assert reader.end_offset("kraken") > max(seen.values())

    log = reader or EmbeddedLog(tmp_path)
    log.recover()
    stored = check_whole(read_whole(log))["a"]
    assert seen.items() <= stored.items()
    assert len(stored) <= len(seen) + rounds  # at most the one in flight at each kill is more
    assert list((tmp_path / "kraken").glob("*.damaged")) == []
    log.close()


def test_wait_is_woken_by_another_process(tmp_path: Path) -> None:
    """The ring comes through the FIFO: far sooner than a waiter would look by itself, and every time."""
    log = EmbeddedLog(tmp_path)
    process = start(tmp_path, "a", 40)

    def is_enough(found: list[tuple[int, Frame]]) -> bool:
        return bool(found) and found[-1][1].counter == 39

    assert is_enough(tail(log, is_enough))
    assert len(acknowledged(process)) == 40
    assert [path.suffix for path in (tmp_path / ".waiters").iterdir()] == [".bell"]
    log.close()
    assert list((tmp_path / ".waiters").iterdir()) == []


def test_bell_of_a_dead_waiter_is_taken_down(tmp_path: Path) -> None:
    """A killed waiter leaves its FIFO; the next append removes it."""
    log = EmbeddedLog(tmp_path)
    code = (
        "import sys, pathlib; from k2.log.embedded import EmbeddedLog\n"
        "log = EmbeddedLog(pathlib.Path(sys.argv[1])); log.wait({}, 0.01)\n"
        "print('waited', flush=True); log.wait({}, 60)"
    )
    waiter = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert waiter.stdout is not None
    assert waiter.stdout.readline() == "waited\n"
    assert len(list((tmp_path / ".waiters").glob("*.bell"))) == 1
    waiter.kill()
    waiter.communicate(timeout=20)

    log.append("kraken", appender.batch("a", 0))

    assert list((tmp_path / ".waiters").iterdir()) == []
    log.close()
