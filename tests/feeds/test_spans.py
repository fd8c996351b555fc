"""What is read from places in a text, many at once, is what reading each value by itself gives."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from k2.feeds import spans, times
from k2.feeds.spans import Spans, Text, Unusual

PLAIN = st.from_regex(r"[0-9]{1,20}(\.[0-9]{1,14})?", fullmatch=True)
NEARLY = st.text("0123456789.-+e,/: ", max_size=24)
VALUES = st.lists(st.one_of(PLAIN, PLAIN, NEARLY), min_size=1, max_size=12)
EXPONENT = re.compile(r"(0|[1-9][0-9]{0,17})(\.[0-9]{1,18})?[eE][+-]?[0-9]{1,2}")
SAME_LENGTH = st.integers(1, 18).flatmap(
    lambda length: st.lists(st.text("0123456789", min_size=length, max_size=length), min_size=1, max_size=5)
)


def placed(texts: list[str]) -> Spans:
    """Return texts as the insides of frames, among bytes that look like more of them."""
    text = Text([f'9"{value}"9'.encode() for value in texts])
    return Spans(text, text.starts + 2, text.ends - 2)


def read(function: Callable[[Spans], object], texts: list[str]) -> list[object] | None:
    try:
        found = function(placed(texts))
    except (Unusual, ValueError):
        return None
    return [*(found.tolist() if isinstance(found, np.ndarray) else found)]


@given(st.one_of(VALUES, SAME_LENGTH))
@example(["18446744073709551616"])
@example(["0" * 18, "9" * 18])
@example(["1", ""])
def test_integers_are_those_of_python(texts: list[str]):
    """Up to 18 digits each; anything else, at any place, is unusual."""
    plain = all(text == "" or (text.isdigit() and text.isascii() and len(text) <= 18) for text in texts)
    assert read(spans.integers, texts) == ([int(text or 0) for text in texts] if plain else None)


@given(st.one_of(VALUES, SAME_LENGTH), st.booleans())
@example(["92233720368547.75808", "0.000000000001"], False)
@example(["999999999999999999.999999999999", "1"], False)
@example(["00.1"], True)
@example(["0.1", "0", "10"], True)
@example(["1.", ".1"], False)
@example(["1.2.3"], False)
@example(["1/3"], False)
@example(["0.0000000000001"], False)
@example(["2.5e-05", "1", "1E3", "0.000000000001e0"], True)
@example(["2.5e-05"], False)
@example(["1e-13"], True)
@example(["1e99"], True)
@example(["12345678901234567.25e1", "7"], True)
def test_numbers_are_exact(texts: list[str], as_json: bool):
    """Every value is the decimal that is written, to the last digit, or the run is unusual."""

    def is_plain(text: str) -> bool:
        whole, point, fraction = text.partition(".")
        if as_json and "e" in text.lower():
            units = Fraction(text) * 10**12 if EXPONENT.fullmatch(text) else Fraction(1, 2)
            return units.denominator == 1 and units < 10**30
        digits = whole.isdigit() and len(whole) <= 18 and (not point or (fraction.isdigit() and len(fraction) <= 12))
        return text.isascii() and digits and not (as_json and len(whole) > 1 and whole[0] == "0")

    try:
        found = spans.numbers(placed(texts), json=as_json)
    except Unusual:
        assert not all(map(is_plain, texts))
        return
    assert all(map(is_plain, texts))
    assert found.arrow().to_pylist() == [Decimal(text) for text in texts]
    assert found.whole.tolist() == [int(Decimal(text)) for text in texts]
    assert list(found) == texts


@given(st.lists(st.one_of(PLAIN, NEARLY, st.floats().map(str), st.integers().map(str)), min_size=1, max_size=6))
@example(["-0.5", "1e-7", "00", "1"])
@example(["-"])
def test_numbers_nobody_reads_are_numbers(texts: list[str]):
    """What is skipped is JSON all the same."""
    try:
        spans.check_json_numbers(placed(texts))
    except Unusual:
        assert any(re.fullmatch(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?", text) is None for text in texts)
    else:
        assert [isinstance(json.loads(text), int | float) for text in texts] == [True] * len(texts)


@settings(deadline=None)  # the first one loads parts of Arrow
@given(st.lists(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=30), min_size=1))
@example(["a", "aaaaaaaa", "aaaaaaaaa", "a"])
@example(["x" * 64, "x" * 63])
def test_names_are_told_apart(texts: list[str]):
    """Whatever their lengths; each distinct one is listed once."""
    found = spans.names(placed(texts))
    assert list(found) == list(placed(texts).packed()) == texts
    assert len(placed(texts).packed().data) == sum(map(len, texts))  # nothing of the frames around them
    assert sorted(found.distinct) == sorted(set(texts))
    assert found.arrow().to_pylist() == texts
    upper = found.map(str.upper)
    assert list(upper) == [text.upper() for text in texts]
    assert len(set(upper.distinct)) == len(upper.distinct)


@pytest.mark.parametrize("texts", [["x" * 65], ["", "a"]])
def test_names_have_a_length(texts: list[str]):
    """From 1 byte to 64."""
    assert read(lambda found: spans.names(found), texts) is None


RFC3339 = st.one_of(
    st.from_regex(
        r"20[0-9]{2}-0[1-9]-[0-2][0-9]T[0-2][0-9]:[0-5][0-9]:[0-5][0-9](\.[0-9]{1,9})?Z", fullmatch=True
    ),
    st.from_regex(r"[12][0-9]{3}-[01][0-9]-[0-3][0-9][T ][0-2][0-9]:[0-6][0-9]:[0-6][0-9]([.,][0-9]{0,11})?[Zz+]"),
)  # fmt: skip


def one_by_one(function: Callable[[str], int], texts: list[str]) -> list[int] | None:
    try:
        return [function(text) for text in texts]
    except ValueError:
        return None


@given(st.lists(RFC3339, min_size=1, max_size=6))
@example(["2024-08-09T00:00:00Z", "2024-08-09T00:00:00.1Z", "2024-08-09T23:59:59.999999999Z"])
@example(["2024-08-09T00:00:60Z"])
@example(["2024-08-09T00:00:0:Z"])
@example(["1999-08-09T00:00:00Z"])
def test_times_in_full_are_those_read_one_by_one(texts: list[str]):
    """What is read is what `times.from_rfc3339` reads; what it refuses is unusual."""
    found = read(spans.rfc3339_times, texts)
    assert found is None or found == one_by_one(times.from_rfc3339, texts)


def test_usual_times_are_read():
    """With and without a fraction, of any length."""
    texts = ["2026-08-09T21:05:42Z", "2026-08-09T21:05:42.5Z", "2026-08-09T21:06:02.514318Z"]
    assert read(spans.rfc3339_times, texts) == one_by_one(times.from_rfc3339, texts)
    texts = ["1618678142.557535", "1618678142.5", "1618678142.123456789"]
    assert read(spans.decimal_times, texts) == one_by_one(times.from_decimal, texts)


@given(st.lists(st.from_regex(r"[0-9]{9,11}(\.[0-9]{0,10})?", fullmatch=True), min_size=1, max_size=6))
@example(["946684799.9"])
@example(["4102444800.0"])
def test_decimal_times_are_those_read_one_by_one(texts: list[str]):
    """Seconds with a fraction; without one the unit would follow from the magnitude, which is left to `times`."""
    found = read(spans.decimal_times, texts)
    assert found is None or found == one_by_one(times.from_decimal, texts)


@given(st.lists(st.sampled_from([10**9, 1_723_161_600, 1_723_161_600_000, 1_723_161_600_000_000, 1]), min_size=1))
def test_integer_times_have_one_unit(values: list[int]):
    """Mixed units are unusual, as is a time before 2000."""
    found = read(lambda found: spans.integer_times(spans.integers(found)), [str(value) for value in values])
    assert found is None or found == [times.from_integer(value) for value in values]
    assert (found is not None) == (len({len(str(value)) for value in values}) == 1 and values[0] > 1)


def test_flags_are_two_words():
    """Everything else is unusual."""
    assert read(spans.flags, ["true", "false", "true"]) == [True, False, True]
    assert read(spans.flags, ["true", "falsy"]) is None
    assert read(spans.flags, ["true", "truee"]) is None


def test_odd_bytes_are_seen_in_each_frame():
    """Escapes, control characters and whatever is not ASCII make a frame odd, and no other."""
    frames = [b"plain", b"a\\b", b"", b"tab\t", "ä".encode(), b"\x7f", b"~ "]
    assert Text(frames).plain().tolist() == [True, False, True, False, False, False, True]
    assert Text(frames[:1]).plain().tolist() == [True]
