"""Points in time as people write them, exact to the nanosecond."""

from __future__ import annotations

import re
import time
from datetime import UTC, date, datetime

from k2.errors import Rejected

TimeLike = str | int | date | datetime
"""What a time may be given as: text, nanoseconds UTC since 1970, a date, a datetime (naive means UTC)."""

_SECOND_NS = 1_000_000_000
_UNITS_NS = {
    "ns": 1,
    "us": 1_000,
    "ms": 1_000_000,
    "s": _SECOND_NS,
    "m": 60 * _SECOND_NS,
    "h": 3_600 * _SECOND_NS,
    "d": 86_400 * _SECOND_NS,
    "w": 7 * 86_400 * _SECOND_NS,
}
_ISO = re.compile(
    r"(\d{4}-\d{2}-\d{2})"
    r"(?:[T ](\d{2}):(\d{2})(?::(\d{2})(?:[.,](\d{1,9}))?)?"
    r"\s?(Z|z|UTC|[+-]\d{2}(?::?\d{2})?)?)?"
)
_RELATIVE = re.compile(r"-((?:\d+(?:ns|us|ms|s|m|h|d|w))+)")
_STEP = re.compile(r"(\d+)(ns|us|ms|s|m|h|d|w)")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# Smaller numbers in text are years, days, seconds, milliseconds or microseconds by mistake; as
# nanoseconds they would lie before March 1973.
_LEAST_DIGITS_NS = 10**17
_INT64_MAX = 2**63 - 1


def parse_time(value: TimeLike, *, now_ns: int | None = None) -> int:
    """Return a point in time as nanoseconds UTC since 1970, without rounding.

    Text: ISO 8601 with up to nine decimals (`2024-08-08`, `2024-08-08T10:05:03.123456789Z`,
    `2024-08-08 10:05+02:00`; without an offset it is UTC), `now`, a time before now (`-90s`,
    `-1h30m`, `-2d`), or nanoseconds since 1970 as digits. An int is nanoseconds.

    Raises:
        Rejected: not one of these; the message shows how to write it.
    """
    if isinstance(value, bool):
        raise _not_a_time(value)
    if isinstance(value, int):
        return _in_range(value, value)
    if isinstance(value, datetime):
        return _in_range(_datetime_ns(value), value)
    if isinstance(value, date):
        return _in_range(_datetime_ns(datetime(value.year, value.month, value.day, tzinfo=UTC)), value)
    if isinstance(value, str):
        return _in_range(_text_ns(value.strip(), now_ns), value)
    raise _not_a_time(value)


def format_ns(time_ns: int) -> str:
    """Return ISO 8601 text in UTC with all nine decimals; `parse_time` reads it back exactly."""
    seconds, nanoseconds = divmod(time_ns, _SECOND_NS)
    moment = datetime.fromtimestamp(seconds, UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{nanoseconds:09d}Z"


def _text_ns(text: str, now_ns: int | None) -> int:
    if text.isdecimal() and text.isascii():
        number = int(text)
        if 0 < number < _LEAST_DIGITS_NS:
            raise Rejected(
                f"time {text!r}: digits alone are nanoseconds since 1970, and this would be before 1973; "
                "write a date (2024-08-08), or all digits down to the nanosecond"
            )
        return number
    if text == "now":
        return _now(now_ns)
    if relative := _RELATIVE.fullmatch(text):
        steps = _STEP.findall(relative[1])
        return _now(now_ns) - sum(int(count) * _UNITS_NS[unit] for count, unit in steps)
    if iso := _ISO.fullmatch(text):
        return _iso_ns(text, iso)
    raise _not_a_time(text)


def _iso_ns(text: str, match: re.Match[str]) -> int:
    day, hour, minute, second, fraction, offset = match.groups()
    clock = f"{hour or '00'}:{minute or '00'}:{second or '00'}"
    try:
        whole = datetime.fromisoformat(f"{day}T{clock}+00:00")
    except ValueError as error:
        raise Rejected(f"time {text!r} does not exist: {error}") from None
    return _datetime_ns(whole) + int((fraction or "0").ljust(9, "0")) - _offset_ns(text, offset)


def _offset_ns(text: str, offset: str | None) -> int:
    if offset is None or offset in ("Z", "z", "UTC"):
        return 0
    digits = offset[1:].replace(":", "").ljust(4, "0")
    hours, minutes = int(digits[:2]), int(digits[2:])
    if hours > 23 or minutes > 59:
        raise Rejected(f"time {text!r} does not exist: no such offset from UTC")
    size = hours * _UNITS_NS["h"] + minutes * _UNITS_NS["m"]
    return -size if offset[0] == "-" else size


def _datetime_ns(value: datetime) -> int:
    aware = value if value.tzinfo is not None else value.replace(tzinfo=UTC)
    elapsed = aware - _EPOCH
    whole = (elapsed.days * 86_400 + elapsed.seconds) * _SECOND_NS + elapsed.microseconds * 1_000
    # pandas' Timestamp is a datetime that keeps the last three digits beside it.
    return whole + int(getattr(value, "nanosecond", 0))


def _now(now_ns: int | None) -> int:
    return time.time_ns() if now_ns is None else now_ns


def _in_range(time_ns: int, given: object) -> int:
    if not 0 <= time_ns <= _INT64_MAX:
        raise Rejected(f"time {given!s} is outside 1970 to 2262, the range of 64-bit nanoseconds")
    return time_ns


def _not_a_time(value: object) -> Rejected:
    return Rejected(
        f"time {value!r} is not understood: write 2024-08-08, 2024-08-08T10:05:03.123456789Z, -1h, now, "
        "or whole nanoseconds since 1970"
    )
