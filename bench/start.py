"""How long does a node take from its start to the first answer, with 10 million rows in hot?

Made trades, in hot. The process is the node of `k2 up` (ingest, offload and REST in one), asked over REST until it
answers with a row of hot. Then it is killed with -9 while frames of a simulated exchange are appended to the log all
the time, started again, and asked until everything that was in the log at the kill can be queried.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import inputs
from harness import LOWER, Figure, Run, below, main
from k2.hot import OWN, open_hot
from k2.log import open_log
from k2.log.base import Log
from k2.settings import load

FIGURES = {
    "start": Figure("s", LOWER, (below(3),), what="to the first answer"),
    "caught_up": Figure("s", LOWER, (below(5),), what="from kill -9, with frames coming in"),
}

_FLUSH_ROWS, _BATCH_FRAMES = 50_000, 100


def measure(run: Run) -> None:
    """Start, kill, start."""
    folder = run.folder / "data"
    folder.mkdir()
    _fill(folder, 20_000 if run.quick else 10_000_000)
    rounds = 1 if run.quick else 5
    for _ in range(rounds):
        node = _Node(folder)
        run.add({"start": node.answered()})
        node.stop()
    node = _Node(folder)
    node.answered()
    flow = _Flow(folder, 1_000 if run.quick else 200_000)
    for _ in range(rounds):
        time.sleep(0.5 if run.quick else 3.0)
        node.kill()
        begin = time.perf_counter()
        target = flow.end
        node = _Node(folder)
        node.reached(target)
        run.add({"caught_up": time.perf_counter() - begin})
    flow.stop()
    node.stop()


def _fill(folder: Path, rows: int) -> None:
    """Put rows into hot, of another partition than the one that is ingested."""
    trades = inputs.trades(rows, symbols=20)
    hot = open_hot(load({"data": str(folder)}), OWN)
    for start in range(0, rows, _FLUSH_ROWS):
        hot.write("trades", trades.slice(start, _FLUSH_ROWS), f"trades:{start}")
    hot.close()


class _Flow:
    """Appends frames to the log until stopped; `end` is the offset behind the last one."""

    def __init__(self, folder: Path, count: int) -> None:
        self._log: Log = open_log(load({"data": str(folder)}))
        self._frames = inputs.simulated_frames("coinbase", count)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def end(self) -> int:
        return self._log.end_offset("coinbase")

    def _run(self) -> None:
        for start in range(0, len(self._frames), _BATCH_FRAMES):
            self._log.append("coinbase", self._frames[start : start + _BATCH_FRAMES])
            if self._stopping.wait(0.02):
                return

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()
        self._log.close()


class _Node:
    """`k2 node`, started now."""

    def __init__(self, folder: Path) -> None:
        self._said = folder / "run" / "node.json"
        self._said.unlink(missing_ok=True)
        self._begin = time.perf_counter()
        command = [sys.executable, "-m", "k2.cli", "node", "--data", str(folder), "--port", "0"]
        self._process = subprocess.Popen(command, stderr=subprocess.DEVNULL)

    def answered(self) -> float:
        """Wait for the first answer with a row of hot; return the seconds since the start."""
        self._wait("/v1/trades?symbol=SYM0-USDT&limit=1", lambda told: bool(told["data"]))
        return time.perf_counter() - self._begin

    def reached(self, offset: int) -> None:
        """Wait until what was in the log up to an offset can be queried."""
        self._wait("/v1/status", lambda told: told["partitions"]["coinbase"]["ingested"] >= offset)

    def _wait(self, path: str, holds: object) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise SystemExit(f"the node ended with {self._process.returncode}")
            try:
                address = urlsplit(json.loads(self._said.read_text())["url"])
                connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=10)
                connection.request("GET", path)
                told = json.loads(connection.getresponse().read())
                connection.close()
                if holds(told):  # type: ignore[operator]
                    return
            except (OSError, ValueError, KeyError):
                pass
            time.sleep(0.01)
        raise SystemExit(f"no answer to {path} within two minutes")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()


if __name__ == "__main__":
    main(__file__)
