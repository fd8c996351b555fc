"""Counts what the limits of this process do: how often each acted, how long it made somebody wait, what it holds.

The names are those of `limits.toml`; a test compares them. Counting costs a lock, so nothing is counted on the way
of every record: what a limit holds is asked for when somebody wants to know.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec


class Reading(msgspec.Struct):
    """What one process says of one limit: what it holds now, and since its start how often it acted and waited."""

    fill: float | None = None
    acted: int = 0
    waited_seconds: float = 0.0


Measure = Callable[[Any], float]

_lock = threading.Lock()
_readings: dict[str, Reading] = {}
_watched: dict[str, list[tuple[weakref.ref[Any], Measure, Measure | None]]] = {}


def acted(limit: str, times: int = 1, *, waited_seconds: float = 0.0) -> None:
    """Note that a limit dropped, refused, cut or ended something, or made somebody wait; callable from any thread."""
    with _lock:
        reading = _readings.setdefault(limit, Reading())
        reading.acted += times
        reading.waited_seconds += waited_seconds


@contextmanager
def waiting(limit: str) -> Iterator[None]:
    """Note that a limit makes the caller wait, for as long as the block runs."""
    started = time.monotonic()
    acted(limit)
    try:
        yield
    finally:
        acted(limit, 0, waited_seconds=time.monotonic() - started)


def watch(limit: str, owner: Any, fill: Measure, count: Measure | None = None) -> None:
    """Have `fill(owner)` asked for what a limit holds, for as long as `owner` is alive.

    Of several owners the sum is told. `count(owner)` is how often it acted, where the owner knows by itself. Both are
    called from any thread, and must not refer to `owner` on their own.
    """
    with _lock:
        kept = [watched for watched in _watched.get(limit, ()) if watched[0]() is not None]
        _watched[limit] = [*kept, (weakref.ref(owner), fill, count)]


def watch_cache(limit: str, cached: Any) -> None:
    """Watch a function of `functools.lru_cache`: what it holds, and about how often it forgot something."""
    watch(limit, cached, lambda f: f.cache_info().currsize, _forgotten)


def _forgotten(cached: Any) -> int:
    """Count what a full cache missed beyond what it holds; a call that raised is a miss that was never kept."""
    info = cached.cache_info()
    return info.misses - info.currsize if info.currsize == info.maxsize else 0


def read() -> dict[str, Reading]:
    """Return the readings of every limit of this process that has acted or holds something."""
    with _lock:
        found = {name: Reading(None, r.acted, r.waited_seconds) for name, r in _readings.items()}
        watched = {name: list(pairs) for name, pairs in _watched.items()}
    for name, pairs in watched.items():
        living = [(owner, fill, count) for ref, fill, count in pairs if (owner := ref()) is not None]
        if living:
            reading = found.setdefault(name, Reading())
            reading.fill = float(sum(fill(owner) for owner, fill, _ in living))
            reading.acted += sum(int(count(owner)) for owner, _, count in living if count is not None)
    return found
