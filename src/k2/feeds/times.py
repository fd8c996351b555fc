"""Times of exchanges and recordings as exact nanoseconds UTC since 1970; never through a float.

Every function raises ValueError for what it cannot read exactly or what no market can have sent.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from functools import lru_cache

from k2 import meters

# A time outside these years is a broken field, not an early market.
EARLIEST_NS = 946_684_800 * 10**9  # 2000-01-01
LATEST_NS = 4_102_444_800 * 10**9  # 2100-01-01

# Upper bounds of a present-day time by unit: seconds have 10 digits, milliseconds 13,
# microseconds 16, nanoseconds 19. Each bound lies past the year 5000 of its unit.
_SECONDS_BELOW = 10**11
_MILLISECONDS_BELOW = 10**14
_MICROSECONDS_BELOW = 10**17

CACHED_MINUTES = 4_096

_DECIMAL = re.compile(r"([0-9]{1,19})(?:\.([0-9]{1,9}))?")
_RFC3339 = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}):([0-5][0-9])(?:\.([0-9]{1,9}))?(Z|z|[+-][0-9]{2}:[0-9]{2})"
)


def from_integer(value: int) -> int:
    """Return nanoseconds of an integer time whose unit (s, ms, µs, ns) follows from its magnitude."""
    return _plausible(value * integer_scale(value), value)


def integer_scale(value: int) -> int:
    """Return the nanoseconds in one unit of an integer time of this magnitude."""
    if value < _SECONDS_BELOW:
        return 1_000_000_000
    if value < _MILLISECONDS_BELOW:
        return 1_000_000
    if value < _MICROSECONDS_BELOW:
        return 1_000
    return 1


def from_decimal(text: str) -> int:
    """Return nanoseconds of a decimal text: `1618678142.557535` (seconds), `1723161253937085768` (ns)...

    Without a fraction the unit follows from the magnitude; a fraction, at most nine digits, means seconds.
    """
    match = _DECIMAL.fullmatch(text)
    if match is None:
        raise ValueError(f"{text[:40]!r} is not a time in seconds, ms, µs or ns")
    whole, fraction = match.groups()
    if fraction is None:
        return from_integer(int(whole))
    return _plausible(int(whole) * 1_000_000_000 + int(fraction.ljust(9, "0")), text)


def from_rfc3339(text: str) -> int:
    """Return nanoseconds of `2026-08-09T21:05:42.514318Z`; up to nine digits, `Z` or an offset."""
    match = _RFC3339.fullmatch(text)
    if match is None:
        raise ValueError(f"{text[:40]!r} is not an RFC 3339 time")
    minute, second, fraction, zone = match.groups()
    nanoseconds = int(fraction.ljust(9, "0")) if fraction else 0
    return _plausible(_minute_ns(minute, zone) + int(second) * 1_000_000_000 + nanoseconds, text)


@lru_cache(maxsize=CACHED_MINUTES)
def _minute_ns(minute: str, zone: str) -> int:
    """Messages of one minute share its date arithmetic, the slow part of reading a time."""
    moment = datetime.fromisoformat(f"{minute.upper()}:00{'+00:00' if zone in 'Zz' else zone}")
    return int((moment - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds()) * 1_000_000_000


meters.watch_cache("feeds.minutes", _minute_ns)


def _plausible(ns: int, told: object) -> int:
    if EARLIEST_NS <= ns < LATEST_NS:
        return ns
    raise ValueError(f"time {told} is not between the years 2000 and 2100")
