"""Points in time as people write them."""

from datetime import UTC, date, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2.errors import Rejected
from k2.query.times import format_ns, parse_time

DAY = 1_723_075_200_000_000_000  # 2024-08-08T00:00:00Z


@pytest.mark.parametrize(
    ("text", "after_day_start"),
    [
        ("2024-08-08", 0),
        ("2024-08-08T00:00", 0),
        ("2024-08-08 00:00:00.5", 500_000_000),
        ("2024-08-08T00:00:00.123456789Z", 123_456_789),
        ("2024-08-08T02:00:00+02:00", 0),
        ("2024-08-07T22:30:00-0130", 0),
        ("2024-08-08 01:00:00+00", 3_600 * 10**9),
        (f"{DAY + 7}", 7),
        ("-1h30m", -5_400 * 10**9),
        ("-250ms", -250 * 10**6),
        ("now", 0),
    ],
)
def test_text_is_read_to_the_nanosecond(text: str, after_day_start: int) -> None:
    """Every way to write a time gives its exact nanosecond; relative ones count from now."""

    assert parse_time(text, now_ns=DAY) == DAY + after_day_start


def test_python_times_are_read_exactly() -> None:
    """Dates, aware and naive datetimes and integers mean what they say; naive is UTC."""
    berlin = timezone(timedelta(hours=2))

    assert parse_time(date(2024, 8, 8)) == DAY
    assert parse_time(datetime(2024, 8, 8, 2, 0, 0, 1, tzinfo=berlin)) == DAY + 1_000
    assert parse_time(datetime(2024, 8, 8)) == DAY  # noqa: DTZ001 - naive on purpose
    assert parse_time(DAY + 1) == DAY + 1


def test_nanoseconds_of_a_pandas_timestamp_are_kept() -> None:
    """A pandas Timestamp is a datetime with three more digits; they count."""
    pandas = pytest.importorskip("pandas")

    assert parse_time(pandas.Timestamp("2024-08-08T00:00:00.123456789Z")) == DAY + 123_456_789


@pytest.mark.parametrize(
    "value",
    ["", "yesterday", "2024-13-01", "2024-08-08T25:00", "2024-08-08T00:00:00.1234567891", "1723075200", "1723075200000",
     "2024-08-08T00:00:00+25:00", "2024-08-08Z", "1h", "-1y", 1.5, True, None, -1, "1969-12-31", "2300-01-01"],
)  # fmt: skip
def test_what_is_no_time_is_refused(value: object) -> None:
    """Nothing is guessed: seconds and milliseconds as bare digits are refused too."""

    with pytest.raises(Rejected, match="time"):
        parse_time(value)  # type: ignore[arg-type]


@given(st.integers(0, 2**63 - 1))
def test_formatted_time_reads_back(time_ns: int) -> None:
    """Formatting and parsing again gives the same nanosecond."""

    assert parse_time(format_ns(time_ns)) == time_ns


@given(st.datetimes(datetime(1970, 1, 1), datetime(2261, 1, 1), timezones=st.just(UTC)))  # noqa: DTZ001 - hypothesis wants naive bounds
def test_iso_text_and_datetime_agree(moment: datetime) -> None:
    """A datetime and its ISO text are the same point in time."""

    assert parse_time(moment) == parse_time(moment.isoformat())
