"""Power cuts under the log: what an append acknowledged with `log.sync = full` is there afterwards, bit for bit."""

from __future__ import annotations

import importlib.util
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from power import Machine, missing

from k2.log.embedded import EmbeddedLog

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "-")

APPENDER = Path(__file__).resolve().parents[1] / "log" / "appender.py"
SEGMENT_BYTES = 150_000  # a few dozen batches: rotations are as frequent as anything else
PRODUCERS = ("left", "right")
DEADLINE_SECONDS = 60.0


def _batch_of() -> Callable[[str, int], list[Any]]:
    spec = importlib.util.spec_from_file_location("appender", APPENDER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.batch  # type: ignore[no-any-return]


batch = _batch_of()


class Appenders:
    """Two processes that append side by side; `acknowledged` is what they were told is stored: sequence -> offset."""

    def __init__(self, machine: Machine, sync: str) -> None:
        self.acknowledged: dict[str, dict[int, int]] = {producer: {} for producer in PRODUCERS}
        self._threads = []
        for producer in PRODUCERS:
            argv = [sys.executable, str(APPENDER), str(machine.disk / "log"), "kraken", producer, "1000000", sync]
            process = machine.run([*argv, str(SEGMENT_BYTES if sync == "full" else 1 << 30)], output=subprocess.PIPE)
            thread = threading.Thread(target=self._listen, args=(producer, process))
            thread.start()
            self._threads.append(thread)

    def _listen(self, producer: str, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout as told:
            for line in told:
                if line.endswith("\n"):
                    sequence, offset = line.split()
                    self.acknowledged[producer][int(sequence)] = int(offset)

    def wait_for(self, count: int) -> None:
        """Wait until both were told of so many appends."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while min(len(told) for told in self.acknowledged.values()) < count:
            assert time.monotonic() < deadline, self.acknowledged
            time.sleep(0.001)

    def dead(self) -> None:
        """Wait until all that was said before the cut was heard."""
        for thread in self._threads:
            thread.join(DEADLINE_SECONDS)


def stored(folder: Path) -> dict[tuple[str, int], int]:
    """Read the whole log after a cut, every frame as it was appended: (producer, sequence) -> offset."""
    log = EmbeddedLog(folder)
    found: dict[tuple[str, int], int] = {}
    offset, end = 0, log.end_offset("kraken")
    while offset < end:
        for got in log.read("kraken", offset, max_frames=10**6, max_bytes=1 << 30):  # a limit would cut a batch
            assert got.base_offset == offset
            producer, sequence = got.frames[0].connection, got.frames[0].counter
            assert got.frames == batch(producer, sequence)
            assert (producer, sequence) not in found
            found[producer, sequence] = offset
            offset = got.end_offset
    log.close()
    return found


def run_cuts(tmp_path: Path, cuts: int, *, sync: str, entries: str, torn: int | None, seed: int) -> list[int]:
    """Append, cut at a random moment, look, go on; returns how many acknowledged appends each cut took."""
    draw = random.Random(seed)
    lost = []
    with Machine(tmp_path, entries=entries, torn=torn) as machine:
        expected: dict[tuple[str, int], int] = {}
        for number in range(cuts):
            if number:
                machine.switch_on()
            appenders = Appenders(machine, sync)
            appenders.wait_for(draw.randrange(2, 60))
            time.sleep(draw.random() * 0.01)
            machine.cut()
            appenders.dead()
            machine.switch_on()
            found = stored(machine.disk / "log")
            told = {(p, s): o for p, own in appenders.acknowledged.items() for s, o in own.items()}
            missing_now = {key for key in {**expected, **told} if found.get(key) != {**expected, **told}[key]}
            if sync == "full":
                assert missing_now == set(), f"cut {number} took acknowledged appends"
            lost.append(len(missing_now))
            expected = found
            machine.cut()  # the look itself (mending, a closed file) is subject to the next one
    return lost


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("entries", "torn"), [("strict", None), ("strict", 5), pytest.param("journal", 6, marks=pytest.mark.slow)]
)
def test_acknowledged_appends_survive_power_cuts(tmp_path: Path, entries: str, torn: int | None) -> None:
    """Two appending processes, cuts at random moments, also inside rotations: nothing acknowledged is gone or moved."""
    cuts = 3
    assert run_cuts(tmp_path, cuts, sync="full", entries=entries, torn=torn, seed=11) == [0] * cuts


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("seed", range(4))
def test_acknowledged_appends_survive_many_power_cuts(tmp_path: Path, seed: int) -> None:
    """A hundred cuts in all, half of them on disks that tear what they write."""
    assert run_cuts(tmp_path, 25, sync="full", entries="strict", torn=seed if seed % 2 else None, seed=seed) == [0] * 25


@pytest.mark.timeout(300)
def test_without_sync_a_power_cut_takes_acknowledged_appends(tmp_path: Path) -> None:
    """`log.sync = normal` loses what it says: so this file system really forgets, and the tests above can fail."""
    lost = run_cuts(tmp_path, 2, sync="normal", entries="journal", torn=None, seed=1)

    assert max(lost) > 0
