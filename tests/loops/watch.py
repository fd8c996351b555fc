"""Finds what holds up an event loop, and says where in the code that was."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

INTERVAL_SECONDS = 0.005
"""How often the loop beats, and how often it is looked at."""


@dataclass
class Stall:
    """One time the loop did not turn: for how long by what it did itself, and where it was seen."""

    seconds: float = 0.0
    places: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        where = "; ".join(f"{place} ({count} looks)" for place, count in self.places.most_common(3))
        return f"{self.seconds:.3f} s in {where or 'an unknown place'}"


class LoopWatch:
    """Watches the loop it is started on, from a thread.

    What counts is what the loop's thread did: its processor time, and the time it slept or waited for a disk within a
    callback. That a busy machine gave the processor to somebody else does not count.
    """

    def __init__(self) -> None:
        self.longest = Stall()
        self._ending = threading.Event()
        self._beat = (0.0, 0.0)  # when the loop turned last: monotonic, processor time of its thread
        self._thread = threading.Thread(target=self._look, name="loop-watch", daemon=True)

    def start(self) -> None:
        """Begin; called on the loop."""
        self._loop = asyncio.get_running_loop()
        self._ident = threading.get_ident()
        self._clock = time.pthread_getcpuclockid(self._ident)
        self._stat = Path(f"/proc/self/task/{threading.get_native_id()}/stat")
        self._turn()
        self._thread.start()

    def stop(self) -> Stall:
        """End, from any thread, and return the longest stall."""
        self._ending.set()
        self._thread.join(10)
        return self.longest

    def _turn(self) -> None:
        self._beat = (time.monotonic(), time.clock_gettime(self._clock))
        if not self._ending.is_set():
            self._loop.call_later(INTERVAL_SECONDS, self._turn)

    def _look(self) -> None:
        stall, beat, asleep = Stall(), self._beat, 0.0
        before = time.monotonic()
        while not self._ending.wait(INTERVAL_SECONDS):
            now, current = time.monotonic(), self._beat
            if current is not beat:
                stall, beat, asleep = Stall(), current, 0.0
            elif now - beat[0] > 4 * INTERVAL_SECONDS and (frame := self._busy_frame()):
                stall.places[_place(frame)] += 1
                asleep += (now - before) if self._sleeps() else 0.0
                stall.seconds = asleep + self._processor_seconds() - beat[1]
                if stall.seconds > self.longest.seconds:
                    self.longest = stall
            before = now

    def _busy_frame(self) -> FrameType | None:
        """Return where the loop's thread is, unless the loop waits for something to do."""
        frame = sys._current_frames().get(self._ident)
        return None if frame is None or _idle(frame) else frame

    def _processor_seconds(self) -> float:
        try:
            return time.clock_gettime(self._clock)
        except OSError:  # the thread has ended
            return 0.0

    def _sleeps(self) -> bool:
        try:
            return self._stat.read_text().rpartition(")")[2].split()[0] in ("S", "D")
        except OSError:
            return False


def _idle(frame: FrameType) -> bool:
    """Whether the loop waits for something to do."""
    return frame.f_code.co_name == "select" and frame.f_code.co_filename.endswith("selectors.py")


def _place(frame: FrameType) -> str:
    """Return the innermost place in K2, and the innermost of all."""
    stack = traceback.extract_stack(frame)
    ours = [entry for entry in stack if "/k2/" in entry.filename or "/tests/" in entry.filename]
    found = (ours or stack)[-1]
    inner = stack[-1]
    name = f"{Path(found.filename).name}:{found.lineno} {found.name}"
    return name if inner is found else f"{name} -> {Path(inner.filename).name}:{inner.lineno} {inner.name}"
