"""What every process of an installation says of its limits and its memory: `<data>/run/limits-<process>.json`.

Only the node answers HTTP; it serves these for all.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import sys
import time
from pathlib import Path

import msgspec

from k2 import limits, meters
from k2.run.folder import publish, read_status

TELL_SECONDS = 2.0
FRESH_SECONDS = 15.0  # what is older is of a process that is gone or hangs

_MEMORY = re.compile(r"^(VmRSS|VmHWM):\s+([0-9]+) kB$", re.MULTILINE)


class Readings(msgspec.Struct):
    """One process: its resident memory now and at most so far, and what its limits did and hold."""

    process: str
    pid: int
    written_ns: int
    resident_bytes: int
    peak_resident_bytes: int
    limits: dict[str, meters.Reading]

    @property
    def fresh(self) -> bool:
        """Whether the process was alive a moment ago."""
        return time.time_ns() - self.written_ns < FRESH_SECONDS * 1e9


def measure(process: str) -> Readings:
    """Return the readings of this process, by the name it goes by: also of limits that have not acted yet."""
    resident, peak = memory(os.getpid())
    readings = {name: meters.Reading() for name in limits.counted_here()} | meters.read()
    return Readings(process, os.getpid(), time.time_ns(), resident, peak, readings)


def resident(pid: int) -> int:
    """Return the resident memory of a process in bytes; 0 where it is gone, or this system does not tell."""
    return _memory(pid)[0]


def memory(pid: int) -> tuple[int, int]:
    """Return the resident memory of a process in bytes, and the most it ever was; elsewhere than on Linux its own."""
    found = _memory(pid)
    if found[0]:
        return found
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak, peak


def _memory(pid: int) -> tuple[int, int]:
    with contextlib.suppress(OSError):
        found = dict(_MEMORY.findall(Path(f"/proc/{pid}/status").read_text("utf-8")))
        if found:
            return int(found["VmRSS"]) << 10, int(found["VmHWM"]) << 10
    return 0, 0


def tell(run_folder: Path, process: str) -> None:
    """Publish the readings of this process; a disk that is full or slow must not end its work."""
    with contextlib.suppress(OSError):
        publish(run_folder / f"limits-{process}.json", msgspec.json.encode(measure(process)))


def read_readings(run_folder: Path) -> list[Readings]:
    """Return what living processes last said of themselves, by name."""
    found = [read_status(path, Readings) for path in sorted(run_folder.glob("limits-*.json"))]
    return [readings for readings in found if readings is not None and readings.fresh]
