"""Where the processor time of K2's processes goes: by thread as the system counts it, by function as py-spy samples it.

py-spy looks at Python's threads only; the threads of the engines are counted by the names they give themselves.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness import Run

_TOP = 12
_SAMPLES_A_SECOND = 50
_END_SECONDS = 60


class Sampling:
    """Samples processes, given by name, from when it is made until `end`."""

    def __init__(self, run: Run, pids: Mapping[str, int]) -> None:
        from peers import install

        self._pids = dict(pids)
        self._threads = {name: _thread_seconds(pid) for name, pid in pids.items()}
        self._samplers: dict[str, tuple[subprocess.Popen[bytes], Path]] = {}
        python = install.interpreter("pyspy")
        if python is None:
            run.missing["pyspy"] = "not installed (make bench-peers): functions were not sampled"
            return
        run.versions.update(install.versions("pyspy"))
        for name, pid in pids.items():
            out = run.folder / f"{name}.samples"
            command = [str(Path(python[0]).with_name("py-spy")), "record", "--format", "raw", "--output", str(out)]
            command += ["--rate", str(_SAMPLES_A_SECOND), "--duration", "unlimited", "--pid", str(pid)]
            sampler = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            self._samplers[name] = sampler, out

    def end(self, seconds: float) -> dict[str, Any]:
        """Return per process the cores each kind of thread used, and the functions of K2 its samples were in."""
        told: dict[str, Any] = {}
        for name, pid in self._pids.items():
            used = _thread_seconds(pid) - self._threads[name]
            told[name] = {"cores_by_thread": {thread: round(s / seconds, 3) for thread, s in used.most_common(_TOP)}}
        for name, (sampler, out) in self._samplers.items():
            sampler.send_signal(signal.SIGINT)
            sampler.wait(_END_SECONDS)
            if out.is_file():
                told[name]["samples_by_function"] = _by_function(out.read_text().splitlines())
        return told


def _by_function(lines: list[str]) -> dict[str, float]:
    """Return the share of samples whose innermost function of K2's, or of none the outermost, is each."""
    found: Counter[str] = Counter()
    for line in lines:
        stack, _, count = line.rpartition(" ")
        frames = stack.split(";")
        own = [frame for frame in frames if "(k2/" in frame]
        found[_named(own[-1] if own else frames[0])] += int(count)
    total = found.total() or 1
    return {name: round(count / total, 3) for name, count in found.most_common(_TOP)}


def _named(frame: str) -> str:
    """Turn `decode (k2/log/codec.py:48)` into `k2.log.codec.decode`."""
    function, _, place = frame.partition(" (")
    return f"{place.partition('.py')[0].replace('/', '.')}.{function}"


def _thread_seconds(pid: int) -> Counter[str]:
    """Return the processor time of a process by the names of its threads."""
    used: Counter[str] = Counter()
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            name, _, rest = (task / "stat").read_text().partition("(")[2].rpartition(")")
        except OSError:
            continue
        fields = rest.split()
        used[name.rstrip("0123456789")] += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return used
