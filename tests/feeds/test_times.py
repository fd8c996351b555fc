"""Exact times from every spelling exchanges and recorders use."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2.feeds.times import from_decimal, from_integer, from_rfc3339

# 2000-01-01 to 2099-12-31, nanoseconds
MOMENTS = st.integers(946_684_800 * 10**9, 4_102_444_799 * 10**9)


@given(MOMENTS)
def test_unit_of_an_integer_follows_from_its_magnitude(ns: int) -> None:
    """Seconds, milliseconds, microseconds and nanoseconds of one moment are told apart."""
    for divisor in (10**9, 10**6, 10**3, 1):
        assert from_integer(ns // divisor) == ns // divisor * divisor


@given(MOMENTS, st.integers(0, 9))
def test_decimal_seconds_keep_every_digit(ns: int, digits: int) -> None:
    """A decimal text is read without a float, whatever its number of digits."""
    kept = ns // 10 ** (9 - digits) * 10 ** (9 - digits)
    fraction = f"{ns % 10**9:09d}"[:digits]
    text = f"{ns // 10**9}.{fraction}" if fraction else str(ns // 10**9)

    assert from_decimal(text) == kept


@given(MOMENTS, st.sampled_from(["Z", "z", "+00:00", "-00:00"]))
def test_rfc3339_reads_back_what_was_written(ns: int, zone: str) -> None:
    """Writing a moment with nine digits and reading it gives the same nanoseconds."""
    import datetime

    moment = datetime.datetime.fromtimestamp(ns // 10**9, datetime.UTC)
    text = f"{moment:%Y-%m-%dT%H:%M:%S}.{ns % 10**9:09d}{zone}"

    assert from_rfc3339(text) == ns


def test_rfc3339_offset_is_subtracted() -> None:
    """A time with an offset east of Greenwich is earlier in UTC."""
    assert from_rfc3339("2026-01-01T05:30:00.5+05:30") == from_rfc3339("2026-01-01T00:00:00.5Z")


@pytest.mark.parametrize(
    "text",
    ["", "1", "-5", "1e9", "1618678142.", ".5", "1618678142.1234567891", "١٦١٨٦٧٨١٤٢", "nan", "4102444800", "9" * 30],
)
def test_decimal_refuses_what_is_no_plausible_time(text: str) -> None:
    """Anything that is not an exact time between 2000 and 2100 is an error."""
    with pytest.raises(ValueError):
        from_decimal(text)


@pytest.mark.parametrize(
    "text",
    [
        *("", "2026-01-01", "2026-01-01T00:00:00", "2026-02-30T00:00:00Z", "2026-01-01T24:00:00Z"),
        *(
            "2026-01-01T00:00:60Z",
            "2026-01-01T00:00:00.1234567890Z",
            "1999-12-31T23:59:59Z",
            "2026-01-01T00:00:00+99:00",
        ),
    ],
)
def test_rfc3339_refuses_what_is_no_plausible_time(text: str) -> None:
    """Days that do not exist, missing zones and too many digits are errors."""
    with pytest.raises(ValueError):
        from_rfc3339(text)
