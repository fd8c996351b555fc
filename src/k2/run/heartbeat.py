"""The supervised side of supervision: a process proves that its main loop turns, and ends with its supervisor."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from functools import cache

# How a supervisor tells its child: `<beat descriptor>:<life descriptor>:<supervisor's pid>`. Not named
# K2_...: those are settings, and a person never sets this.
VARIABLE = "K2SUPERVISED"
BEAT_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Heartbeat:
    """Tells the supervisor that a main loop turns; without a supervisor it does nothing.

    Call `beat` from the loop that does the work, never from a thread of its own: a thread goes on
    beating while the work hangs.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        """Store the pipe's writing end, if there is one."""
        self._descriptor = descriptor
        self._next = 0.0

    @property
    def supervised(self) -> bool:
        """Whether there is a supervisor."""
        return self._descriptor is not None

    def beat(self) -> None:
        """Report life; cheap, to be called as often as convenient (one report a second is sent)."""
        if self._descriptor is None or (now := time.monotonic()) < self._next:
            return
        self._next = now + BEAT_SECONDS
        # A full pipe holds 18 hours of beats the supervisor has not read; a broken one is noticed elsewhere.
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self._descriptor, b".")

    async def beat_for_ever(self) -> None:
        """Beat from an event loop: run it as a task of the loop that does the work."""
        while True:
            self.beat()
            await asyncio.sleep(BEAT_SECONDS / 2)


@cache
def attach() -> Heartbeat:
    """Bind this process to its supervisor, if it has one, and return its heartbeat.

    To be called first thing in every role's main thread. From then on the process is killed when the
    supervisor dies, however that dies: by the kernel on Linux, by a closed pipe elsewhere.
    """
    told = os.environ.pop(VARIABLE, None)
    if told is None:
        return Heartbeat()
    beat, life, parent = (int(part) for part in told.split(":"))
    for descriptor in (beat, life):
        os.set_inheritable(descriptor, False)
    os.set_blocking(beat, False)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the line above
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Thread(target=_die_with, args=(life,), name="life-line", daemon=True).start()
    return Heartbeat(beat)


def _die_with(life: int) -> None:
    """Wait for the end of a pipe that only the supervisor holds open for writing."""
    while os.read(life, 1):
        pass
    os.kill(os.getpid(), signal.SIGKILL)
