"""Logged time: K2's knowledge time, taken from a clock that may be set.

It does not decrease, so that what was known at a moment is a prefix of the log: a clock set back by up
to an hour stands still until it has caught up. Larger steps are errors of a clock, the one before or
the one now, and holding on to the later time would be wrong for as long as the error was large (a
clock once in 2100 would end rotation, retention and `as_of` for good). So after such a step the
logged time follows the clock again, back or forth, and each step is reported and written down. Frames
logged while the clock was wrong keep their wrong time.
"""

from __future__ import annotations

import time

STEP_NS = 3600 * 10**9
EARLIEST_NS = 1_577_836_800 * 10**9  # 2020: before it no K2 existed, so such a clock was never set
_SINCE_BOOT = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # also counts while the machine sleeps


def logged_time(now_ns: int, last_ns: int) -> int:
    """Return the logged time of a batch that follows one of `last_ns`; below it only after a clock error."""
    if EARLIEST_NS <= now_ns < last_ns - STEP_NS:
        return now_ns
    return max(now_ns, last_ns)


class StepWatch:
    """Compares a clock with the time that has really passed since it was last looked at, in this process."""

    def __init__(self) -> None:
        self._seen: tuple[int, int] | None = None

    def ahead(self, now_ns: int) -> int:
        """Return by how many nanoseconds the clock was stepped forward meanwhile; 0 below an hour."""
        elapsed_ns = time.clock_gettime_ns(_SINCE_BOOT)
        before, self._seen = self._seen, (now_ns, elapsed_ns)
        if before is None:
            return 0
        step_ns = (now_ns - before[0]) - (elapsed_ns - before[1])
        return step_ns if step_ns > STEP_NS else 0


def told_step(step_ns: int, logged_ns: int) -> str:
    """Return what is reported of a step: by how much, to which time, and what it means."""
    seconds, moment = abs(step_ns) // 10**9, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(logged_ns // 10**9))
    if step_ns > 0:
        return (
            f"the clock was set forward by {seconds} s, to {moment}; if that is wrong, mend the clock: "
            "logged times follow it then, and frames logged meanwhile keep the wrong time"
        )
    return (
        f"the clock is {seconds} s behind the last logged time, which is taken for a clock error; "
        f"logged times go on from {moment}"
    )
