"""K2 as it is run: its own processes on a data folder of the run, and what they use of the machine."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from harness import Run

READY_SECONDS = 60.0


class Refused(RuntimeError):
    """Raised when the node answers with anything but 200."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Installation:
    """Commands of one data folder, ended at the end of the run; `rest` asks the node."""

    def __init__(self, run: Run, name: str, **settings: str) -> None:
        """Settings as environment variables without their `K2_`."""
        self.data = run.folder / name
        self.port = _free_port()
        self._environment = {**os.environ, **{f"K2_{key}": value for key, value in settings.items()}}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._log = (run.folder / f"{name}.log").open("wb")
        self._connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        run._closing.callback(self.close)

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start `k2 ...` on the folder."""
        process = subprocess.Popen(
            [sys.executable, "-m", "k2.cli", *arguments, "--data", str(self.data)],
            env=self._environment, stdout=self._log, stderr=self._log,
        )  # fmt: skip
        self._processes.append(process)
        return process

    def start_node(self, *arguments: str) -> None:
        """Start what serves, `k2 node` or as told, and wait until it is alive."""
        self.start(*(arguments or ("node",)), "--port", str(self.port))
        wait_for(lambda: self._is_alive(), "the node serves")

    def rest(self, path: str) -> Any:
        """Return the JSON answer of the node."""
        try:
            self._connection.request("GET", path)
            answer = self._connection.getresponse()
        except (http.client.RemoteDisconnected, ConnectionError):  # an idle connection was closed meanwhile
            self._connection.close()
            self._connection.request("GET", path)
            answer = self._connection.getresponse()
        body = answer.read()
        if answer.status != 200:
            raise Refused(f"GET {path}: {answer.status} {body[:500]!r}", answer.status)
        return json.loads(body)

    def close(self) -> None:
        """End everything, the last started first."""
        self._connection.close()
        for process in reversed(self._processes):
            process.terminate()
        for process in self._processes:
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._log.close()

    def _is_alive(self) -> bool:
        try:
            self._connection.request("GET", "/health/live")
            answer = self._connection.getresponse()
            answer.read()
        except (OSError, http.client.HTTPException):
            self._connection.close()
            return False
        return answer.status == 200

    def processes(self) -> dict[str, int]:
        """Return the process ids by what was started: `node`, `capture`."""
        return {str(list(process.args)[3]): process.pid for process in self._processes}  # type: ignore[arg-type]

    def pids(self) -> list[int]:
        """Return every process of the installation, children of children too."""
        parents = {int(p.name): _parent(p) for p in Path("/proc").iterdir() if p.name.isdigit()}
        found = {process.pid for process in self._processes}
        while more := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= more
        return sorted(found)


def wait_for(condition: Callable[[], bool], what: str, seconds: float = READY_SECONDS) -> None:
    """Wait until a condition holds; SystemExit saying what did not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"gave up after {seconds:.0f} s of waiting until {what}")
        time.sleep(0.02)


def cpu_seconds(pids: Sequence[int]) -> dict[str, float]:
    """Return the processor time of processes so far, by the name of their command."""
    used: dict[str, float] = {}
    for pid in pids:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        name = next((w.decode() for w in words if w in (b"up", b"node", b"capture")), "other")
        used[name] = used.get(name, 0.0) + (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return used


def memory_bytes(pids: Sequence[int]) -> int:
    """Return the memory of processes: shared pages are split among those that share them (PSS)."""
    total = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    return total


def _parent(process: Path) -> int:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
