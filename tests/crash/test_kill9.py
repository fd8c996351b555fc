"""kill -9 of any process at random moments while data flows: nothing is lost, nothing doubled, candles are exact.

`make crash-test` runs 200 rounds of it; CRASH_ROUNDS (kills in each test) and CRASH_SEED choose others.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import pytest
from installation import toml
from processes import Cluster, Runner, cluster, logged, reading
from supervised import all_subscribed, compare, exchanges, ingested, sections, supervised

from k2.client import connect
from k2.cold import open_cold
from k2.node import NodeStatus
from k2.run.captured import read_captures
from k2.run.folder import read_status
from k2.settings import Settings

ROUNDS = int(os.environ.get("CRASH_ROUNDS", "20"))
SEED = int(os.environ.get("CRASH_SEED", "1"))
TIMEOUT = 300 + 30 * ROUNDS
MOST_RECORDS = 150  # between two kills

CAPTURES = ("capture-binance", "capture-kraken", "capture-coinbase")
# What a dead capture of Binance had received and not appended is gone: it sends no snapshot. So it is spared.
KILLED_CAPTURES = CAPTURES[1:]


class Processes(Protocol):
    """What is killed."""

    def kill(self, name: str) -> None:
        """kill -9 of one process; another one takes its place."""

    def until(self, what: str, condition: Callable[[], bool]) -> object:
        """Wait until something holds; fail when a process ends by itself."""


class Roles:
    """Every role a process of its own, started by hand."""

    def __init__(self, running: Cluster) -> None:
        self.runners: dict[str, Runner] = {}
        self._running = running

    def start(self) -> None:
        """Start all of them; those that look into the data folder after those who make it."""
        for name in (*CAPTURES, "ingest", "offload", "serve"):
            self.runners[name] = self._running.start(name, *name.split("-"))

    def kill(self, name: str) -> None:
        """kill -9, and start it again."""
        self.runners[name].kill()
        self.runners[name].start()

    def until(self, what: str, condition: Callable[[], bool]) -> object:
        """Wait until something holds."""
        deadline = time.monotonic() + 120
        while not condition():
            for runner in self.runners.values():
                runner.check()
            assert time.monotonic() < deadline, f"not within 120 s: {what}\n{self._running.tails()}"
            time.sleep(0.05)
        return None

    def subscribed(self) -> bool:
        """Whether the captures, as they run now, listen."""
        running = {name: self.runners[name].process for name in CAPTURES}
        return all_subscribed(self._running.settings, {n: p.pid for n, p in running.items() if p is not None})

    def stop(self) -> None:
        """Stop captures in order, kill the others, and let them be worked off by commands."""
        for name, runner in self.runners.items():
            runner.stop() if name in CAPTURES else runner.kill()
        self._running.runners.clear()
        self._running.installation.k2("ingest", "--drain")
        self._running.installation.k2("offload", "--drain")


@pytest.mark.timeout(TIMEOUT)
def test_any_role_killed_at_random(tmp_path: Path) -> None:
    """Captures, ingest, offload and serve, each a process of its own."""
    with exchanges() as markets, cluster(tmp_path, toml(sections(markets))) as running:
        roles = Roles(running)
        roles.start()
        kill_at_random(roles, running.settings, ("ingest", "offload", "serve", *KILLED_CAPTURES))
        roles.until("all captures are subscribed", roles.subscribed)
        account = markets.close_markets()
        roles.stop()

        assert sum(runner.kills for runner in roles.runners.values()) == ROUNDS + 3
        check_equal(running.settings, account)


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT)
def test_any_process_of_up_killed_at_random(tmp_path: Path) -> None:
    """The captures and the node of `k2 up`, which its supervisor starts again."""
    with exchanges() as markets, supervised(tmp_path, sections(markets)) as processes:
        processes.start()
        processes.until("all processes run", processes.all_run)
        kill_at_random(processes, processes.settings, ("node", *KILLED_CAPTURES))
        processes.until("all processes run", processes.all_run)
        processes.await_subscribed()
        account = markets.close_markets()
        restarts = sum(child.restarts for child in processes.children().values())
        processes.stop()

        assert restarts == ROUNDS
        check_equal(processes.settings, account)


def kill_at_random(processes: Processes, settings: Settings, victims: tuple[str, ...]) -> None:
    """Kill one of the victims again and again.

    Every other kill waits until its victim has got something done since its last death, so that the work
    goes on, and a capture is left to listen again each time, as snapshots reach back only so far. All wait for a
    random number of further records, which is a random moment for the victim.
    """
    draw = random.Random(SEED)
    progress = progress_of(settings)
    chosen = [victims[number % len(victims)] for number in range(ROUNDS)]
    draw.shuffle(chosen)
    since = dict.fromkeys(victims, 0)
    processes.until("a flush was finished", lambda: sum(ingested(settings).values()) > 0)
    for number, name in enumerate(chosen):
        if number % 2 == 0 or name in CAPTURES:
            processes.until(f"{name} got something done", lambda n=name: progress[n]() > since[n])  # type: ignore[misc]
        target = records(settings) + draw.randrange(MOST_RECORDS)
        processes.until("data flows", lambda t=target: records(settings) >= t)  # type: ignore[misc]
        processes.kill(name)
        since[name] = progress[name]()


def progress_of(settings: Settings) -> Mapping[str, Callable[[], int]]:
    """Return, by process, a number that rises when it gets something done."""
    cold = open_cold(settings)
    flushed = lambda: sum(ingested(settings).values())  # noqa: E731
    return {
        "ingest": flushed,
        "node": flushed,
        "offload": lambda: sum(cold.pin("trades").watermark.values()),
        "serve": lambda: served_since(settings),
        **{name: lambda name=name: subscribed_since(settings, name) for name in KILLED_CAPTURES},  # type: ignore[misc]
    }


def served_since(settings: Settings) -> int:
    """Return when the process began that answers REST."""
    status = read_status(settings.data_path / "run" / "node.json", NodeStatus)
    return status.since_ns if status else 0


def subscribed_since(settings: Settings, name: str) -> int:
    """Return when the capture process began that listens to all it wants; 0 while none does."""
    told = {f"capture-{status.exchange}": status for status in read_captures(settings)}
    listens = name in told and [each.state for each in told[name].connections] == ["subscribed"]
    return told[name].since_ns if listens else 0


def records(settings: Settings) -> int:
    """Return how many records the log holds."""
    with reading(settings) as log:
        return logged(log)


def check_equal(settings: Settings, account: dict[str, object]) -> None:
    """Compare the stopped installation with the account."""
    with connect(settings=settings) as client:
        checks = compare(client, account)
        gaps, dead = client.gaps().arrow(), client.rows("dead_letters").arrow()

    assert [check for check in checks if not check.passed] == [], settings.data_path
    assert len(checks) == 3 * 21 + 8
    assert (gaps.num_rows, dead.num_rows) == (0, 0)
