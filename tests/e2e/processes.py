"""Real processes of one installation that a test kills and starts again; and how far they have come."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from installation import Installation

from k2.feeds import registry
from k2.log import Log, open_log
from k2.model import FRAME, Frame, Trade
from k2.settings import Settings, load

DEADLINE_SECONDS = 90.0
POLL_SECONDS = 0.02
TAIL_BYTES = 3_000


@dataclass
class Runner:
    """One long-running command. It may end only when the test ends it."""

    installation: Installation
    arguments: Sequence[str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    kills: int = 0

    def start(self) -> None:
        """Start it, again or for the first time."""
        self.process = self.installation.start(*self.arguments, log=self.log)

    def check(self) -> None:
        """Fail when it has ended by itself."""
        assert self.process is not None
        code = self.process.poll()
        assert code is None, f"k2 {' '.join(self.arguments)} ended by itself with {code}:\n{self.tail()}"

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        assert self.process is not None
        self.check()
        self.process.kill()
        self.process.wait()
        self.kills += 1

    def stop(self) -> None:
        """Ask it to end in good order; it must, with exit code 0."""
        assert self.process is not None
        self.check()
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(DEADLINE_SECONDS)
        assert code == 0, f"k2 {' '.join(self.arguments)} ended with {code} when asked to end:\n{self.tail()}"

    def tail(self) -> str:
        """Return the last of what it said."""
        return self.log.read_bytes()[-TAIL_BYTES:].decode(errors="replace")


@dataclass
class Cluster:
    """The commands of one test, stopped at its end, and a look at the log they share."""

    installation: Installation
    runners: dict[str, Runner] = field(default_factory=dict)

    @property
    def settings(self) -> Settings:
        """The settings as the commands see them."""
        return load({"data": str(self.installation.folder)}, environment={})

    def start(self, name: str, *arguments: str) -> Runner:
        """Start a command under a name."""
        runner = Runner(self.installation, arguments, self.installation.folder.parent / f"{name}.log")
        self.runners[name] = runner
        runner.start()
        return runner

    async def until(self, what: str, condition: Callable[[], bool], seconds: float = DEADLINE_SECONDS) -> None:
        """Wait until a condition holds while every command goes on running."""
        deadline = time.monotonic() + seconds
        while not condition():
            for runner in self.runners.values():
                runner.check()
            assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}\n{self.tails()}"
            await asyncio.sleep(POLL_SECONDS)

    def tails(self) -> str:
        """Return the last of what each command said."""
        return "\n".join(f"--- {name}\n{runner.tail()}" for name, runner in self.runners.items())

    def end(self) -> None:
        """Kill what still runs."""
        for runner in self.runners.values():
            if runner.process is not None and runner.process.poll() is None:
                runner.process.kill()
                runner.process.wait()


@contextlib.contextmanager
def cluster(folder: Path, settings_text: str) -> Iterator[Cluster]:
    """Make an installation in `folder`/data; on failure its name is told and it stays."""
    installation = Installation(folder / "data")
    installation.folder.mkdir(exist_ok=True)
    (installation.folder / "k2.toml").write_text(settings_text)
    made = Cluster(installation)
    try:
        yield made
    except BaseException as error:
        error.add_note(f"the data folder is kept: {installation.folder}; what the processes said is beside it")
        raise
    finally:
        made.end()


def ingested(settings: Settings) -> int:
    """Return how many offsets ingest has finished, over all partitions."""
    path = settings.data_path / "state.db"
    if not path.exists():
        return 0
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)) as db:
        try:
            return int(db.execute("SELECT coalesce(sum(end_offset), 0) FROM progress").fetchone()[0])
        except sqlite3.OperationalError:  # a moment before its tables are made
            return 0


@contextlib.contextmanager
def reading(settings: Settings) -> Iterator[Log]:
    """Open the log to look at it."""
    with contextlib.closing(open_log(settings)) as log:
        yield log


def logged(log: Log) -> int:
    """Return how many records the log holds, over all partitions."""
    return sum(log.end_offset(partition) for partition in log.partitions())


class Appended:
    """Every trade the log holds of one exchange, read on from where the last look ended."""

    def __init__(self, log: Log, exchange: str) -> None:
        self._log, self._exchange = log, registry.get(exchange)
        self._offset = 0
        self.trades: list[Trade] = []
        self.quotes = 0

    def look(self) -> list[Trade]:
        """Read what is new and return all trades so far, in the order appended, repeats included."""
        name = self._exchange.name
        if name in self._log.partitions():
            while batches := self._log.read(name, self._offset):
                for batch in batches:
                    self._take(batch.frames)
                    self._offset = batch.end_offset
        return self.trades

    def _take(self, frames: list[Frame]) -> None:
        for frame in frames:
            if frame.kind == FRAME:
                parsed = self._exchange.parse(frame)
                self.trades += parsed.trades
                self.quotes += len(parsed.quotes)

    def ids(self, symbol: str) -> list[int]:
        """Return the ids of one symbol, repeats included."""
        return [trade.trade_id for trade in self.trades if trade.symbol == symbol]

    def last(self, symbol: str) -> int:
        """Return the highest id so far of one symbol."""
        self.look()
        return max(self.ids(symbol), default=0)
