"""Numbers, names and times read from places in many frames at once, exactly, eight bytes at a time.

All of it is integer arithmetic on the bytes themselves. What is not written the plain way (a sign, an exponent, a zero
too many) raises `Unusual`: whoever asked then reads the frames one by one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Context, Decimal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from k2.feeds.times import EARLIEST_NS, LATEST_NS, from_integer, from_rfc3339, integer_scale

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
Flags = npt.NDArray[np.bool_]

MOST_DIGITS = 18  # of an integer, and of a number before its point: they fit 64 bits
MOST_DECIMALS = 12
LONGEST_NAME = 64
LONGEST_PART = 1_024  # bytes of the longest stretch that is compared

_PADDING = bytes(LONGEST_PART + 64)  # so that what stands around any place in a frame can be read
_WORD = 8


class Unusual(Exception):
    """Raised when a run of frames holds something that only `parse` decides about."""


class Text:
    """Frames joined to one text; `starts` (inclusive) and `ends` (exclusive) are where each of them lies."""

    def __init__(self, frames: Sequence[bytes]) -> None:
        self.data = b"".join((_PADDING, *frames, _PADDING))
        self.ends: Ints = np.fromiter(map(len, frames), np.int64, len(frames)).cumsum() + len(_PADDING)
        self.starts: Ints = np.append(len(_PADDING), self.ends[:-1])
        self.octets = np.frombuffer(self.data, np.uint8)
        # The eight bytes that begin at each place, the first one lowest.
        self.words: Words = np.ndarray((len(self.data) - _WORD + 1,), "<u8", self.data, strides=(1,))
        # Where the quotes stand, and which of them are a frame's: from `quote_starts` up to, without, `quote_ends`.
        self.quotes: Ints = np.flatnonzero(self.octets == ord('"'))
        self.quote_starts: Ints = np.searchsorted(self.quotes, self.starts)
        self.quote_ends: Ints = np.append(self.quote_starts[1:], len(self.quotes))

    def plain(self) -> Flags:
        """Return for each frame whether it is printable ASCII without escapes."""
        body = self.octets[len(_PADDING) : -len(_PADDING)]
        if body.min(initial=0xFF) >= _SPACE and body.max(initial=0) < _DELETE and b"\\" not in self.data:
            return np.ones(len(self.starts), dtype=bool)
        odd = (body < _SPACE) | (body >= _DELETE) | (body == ord("\\"))
        before = np.append(0, odd.cumsum())
        plain: Flags = before[self.ends - len(_PADDING)] == before[self.starts - len(_PADDING)]
        return plain

    def holds(self, part: bytes, places: Ints) -> Flags:
        """Return for each place within the frames whether `part`, of at most LONGEST_PART bytes, stands there."""
        if len(part) < _WORD:
            return self._equals(part, places)
        found = self._equals(part[:_WORD], places)
        for at in range(_WORD, len(part), _WORD):
            at = min(at, len(part) - _WORD)  # the last word overlaps the one before
            found &= self._equals(part[at : at + _WORD], places, at)
        return found

    def _equals(self, piece: bytes, places: Ints, at: int = 0) -> Flags:
        words = self.words[at:][places]
        if len(piece) < _WORD:
            words &= _LOW[len(piece)]
        equal: Flags = words == np.uint64(int.from_bytes(piece, "little"))
        return equal


@dataclass(frozen=True)
class Texts:
    """Texts one behind the other; `ends` (exclusive) are where they end."""

    data: bytes
    ends: Ints

    def __iter__(self) -> Iterator[str]:
        start = 0
        for end in self.ends.tolist():
            yield self.data[start:end].decode("ascii")
            start = end


@dataclass(frozen=True)
class Spans:
    """One stretch of the text a row: `starts` inclusive, `ends` exclusive, never negative."""

    text: Text
    starts: Ints
    ends: Ints

    @property
    def lengths(self) -> Ints:
        """How many bytes each has."""
        return self.ends - self.starts

    def texts(self) -> list[str]:
        """Return them as they stand."""
        data = self.text.data
        pairs = zip(self.starts.tolist(), self.ends.tolist(), strict=True)
        return [data[start:end].decode("ascii") for start, end in pairs]

    def packed(self) -> Texts:
        """Return them as they stand, without the frames around them."""
        lengths = self.lengths
        ends: Ints = lengths.cumsum()
        places = np.arange(int(lengths.sum())) + np.repeat(self.starts - (ends - lengths), lengths)
        return Texts(self.text.octets[places].tobytes(), ends)

    def at(self, rows: Ints) -> Spans:
        """Return those of some rows."""
        return Spans(self.text, self.starts[rows], self.ends[rows])

    def begins_with(self, octet: bytes) -> Flags:
        """Return whether each one's first byte is this one; not meant for empty ones."""
        found: Flags = self.text.octets[self.starts] == ord(octet)
        return found


@dataclass(frozen=True)
class Names:
    """Short texts that repeat: row i has `distinct[codes[i]]`."""

    codes: Ints
    distinct: list[str]

    def map(self, function: Callable[[str], str]) -> Names:
        """Return them translated; two that become equal share one code."""
        made = [function(name) for name in self.distinct]
        places = {name: code for code, name in enumerate(dict.fromkeys(made))}
        if len(places) == len(made):
            return Names(self.codes, made)
        return Names(np.array([places[name] for name in made], dtype=np.int64)[self.codes], list(places))

    def arrow(self) -> pa.Array:
        """Return them as strings."""
        if len(self.distinct) == 1:
            return pa.repeat(self.distinct[0], len(self.codes))
        return pa.array(self.distinct, pa.string()).take(pa.array(self.codes))

    def __iter__(self) -> Iterator[str]:
        return map(self.distinct.__getitem__, self.codes.tolist())

    def __len__(self) -> int:
        return len(self.codes)


@dataclass(frozen=True)
class Numbers:
    """Decimal numbers from 0 with at most 12 decimals: as written, and as exact values.

    `whole` is what stands before the point, `units` the number in units of 10^-12 as 128 bits: (n, 2), low half first.
    """

    spans: Spans
    whole: Words
    units: Words

    def arrow(self) -> pa.Array:
        """Return them as decimal(38,12)."""
        return pa.Array.from_buffers(_DECIMAL, len(self.units), [None, pa.py_buffer(self.units)])

    def __iter__(self) -> Iterator[str]:
        return iter(self.spans.texts())

    def __len__(self) -> int:
        return len(self.units)


def integers(spans: Spans) -> Words:
    """Return integers of at most 18 digits, none for an empty span (which is 0)."""
    found, odd = _integers(spans)
    if odd.any():
        raise Unusual
    return found


def json_integers(spans: Spans) -> Words:
    """Return integers as JSON writes them: at least one digit, no zero before others."""
    lengths = spans.lengths
    if (lengths < 1).any() or (spans.begins_with(b"0") & (lengths > 1)).any():
        raise Unusual
    return integers(spans)


def numbers(spans: Spans, *, json: bool = False) -> Numbers:
    """Return decimals from 0 with at most 12 digits behind the point and 18 before it.

    With `json` no zero stands before other digits, and a few may be written with an exponent.
    """
    found, odd = _parts(spans, json)
    fraction = found.fraction * _POWERS[MOST_DECIMALS - found.decimals]
    units: Words = np.empty((len(fraction), 2), dtype=np.uint64)
    if int(found.whole.max(initial=0)) < _SMALL:
        units[:, 0] = found.whole * _UNIT + fraction
        units[:, 1] = 0
    else:
        _wide(found.whole, fraction, units)
    if odd.any():
        if not json:
            raise Unusual
        _put_exponents(spans, np.flatnonzero(odd), found.whole, units)
    return Numbers(spans, found.whole, units)


def zeros(count: int) -> Numbers:
    """Return so many times "0"."""
    text = Text([b"0"])
    spans = Spans(text, np.repeat(text.starts, count), np.repeat(text.ends, count))
    return Numbers(spans, np.zeros(count, dtype=np.uint64), np.zeros((count, 2), dtype=np.uint64))


def check_json_numbers(spans: Spans) -> None:
    """Raise Unusual when one of them is no number of JSON."""
    signs = spans.begins_with(b"-").astype(np.int64)
    _, odd = _parts(Spans(spans.text, spans.starts + signs, spans.ends), json=True)
    if odd.any() and not all(map(_JSON_NUMBER, spans.at(np.flatnonzero(odd)).texts())):
        raise Unusual


def names(spans: Spans) -> Names:
    """Return texts of at most 64 bytes."""
    lengths = spans.lengths
    longest = int(lengths.max(initial=1))
    if longest > LONGEST_NAME or int(lengths.min(initial=1)) < 1:
        raise Unusual
    columns = [
        spans.text.words[spans.starts + at] & _LOW[np.minimum(np.maximum(lengths - at, 0), _WORD)]
        for at in range(0, longest, _WORD)
    ]  # fmt: skip
    if all((column == column[0]).all() for column in columns if len(column)):
        first = Spans(spans.text, spans.starts[:1], spans.ends[:1]).texts()
        return Names(np.zeros(len(lengths), dtype=np.int64), first)
    packed = np.stack(columns, axis=1)
    kind = pa.binary(_WORD * len(columns))
    found = pa.Array.from_buffers(kind, len(packed), [None, pa.py_buffer(packed)]).dictionary_encode()
    codes = found.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    return Names(codes, [value.rstrip(b"\0").decode("ascii") for value in found.dictionary.to_pylist()])


def flags(spans: Spans) -> Flags:
    """Return `true` and `false`."""
    true: Flags = spans.text.holds(b"true", spans.starts) & (spans.lengths == len(b"true"))
    false: Flags = spans.text.holds(b"false", spans.starts) & (spans.lengths == len(b"false"))
    if not (true | false).all():
        raise Unusual
    return true


def integer_times(values: Words) -> Ints:
    """Return nanoseconds of integer times of one unit (see `times.from_integer`)."""
    if not len(values):
        return values.astype(np.int64)
    first, last = int(values.min()), int(values.max())
    scale = integer_scale(first)
    if scale != integer_scale(last) or not from_integer(first) <= from_integer(last):
        raise Unusual
    return values.astype(np.int64) * scale


def decimal_times(spans: Spans) -> Ints:
    """Return nanoseconds of times in seconds with one to nine decimals (see `times.from_decimal`)."""
    found, odd = _parts(spans, json=False)
    if odd.any() or ((found.decimals < 1) | (found.decimals > _NANO_DIGITS) | (found.whole >= _SECONDS_BELOW)).any():
        raise Unusual
    nanoseconds = found.whole * np.uint64(10**9) + found.fraction * _POWERS[_NANO_DIGITS - found.decimals]
    return _plausible(nanoseconds.astype(np.int64))


def rfc3339_times(spans: Spans) -> Ints:
    """Return nanoseconds of times in full, in UTC (`2026-08-09T21:05:42.514318Z`)."""
    text, lengths = spans.text, spans.lengths
    digits = lengths - len("2026-08-09T21:05:42.Z")
    if ((digits == 0) | (digits < -1) | (digits > _NANO_DIGITS)).any():
        raise Unusual
    whole = digits < 0
    minutes = names(Spans(text, spans.starts, spans.starts + _MINUTE))
    seconds = integers(Spans(text, spans.starts + _MINUTE + 1, spans.starts + _MINUTE + 3))
    fraction = integers(Spans(text, spans.ends - 1 - np.where(whole, 0, digits), spans.ends - 1))
    marks = text.holds(b":", spans.starts + _MINUTE) & text.holds(b"Z", spans.ends - 1)
    if not (marks & (whole | text.holds(b".", spans.starts + _MINUTE + 3))).all() or (seconds > _LAST_SECOND).any():
        raise Unusual
    of_minute = np.array([from_rfc3339(f"{minute}:00Z") for minute in minutes.distinct], dtype=np.int64)
    below = seconds * np.uint64(10**9) + fraction * _POWERS[np.where(whole, 0, _NANO_DIGITS - digits)]
    return _plausible(of_minute[minutes.codes] + below.astype(np.int64))


@dataclass(frozen=True)
class _Parts:
    """Numbers taken apart at their points; `decimals` says how many digits stand behind, 0 without a point."""

    whole: Words
    fraction: Words
    decimals: Ints


def _parts(spans: Spans, json: bool) -> tuple[_Parts, Flags]:
    """Take numbers apart: digits, with at most one point between them; and tell which are written otherwise."""
    decimals, points, odd = _points(spans)
    ends = spans.ends - decimals - points
    odd |= (ends <= spans.starts) | (points > decimals)
    if json:
        odd |= spans.begins_with(b"0") & (ends - spans.starts > 1)
    if odd.any():
        decimals, ends = np.where(odd, 0, decimals), np.where(odd, spans.starts, ends)
    whole, odd_whole = _integers(Spans(spans.text, spans.starts, ends))
    fraction, odd_fraction = _integers(Spans(spans.text, spans.ends - decimals, spans.ends))
    return _Parts(whole, fraction, decimals), odd | odd_whole | odd_fraction


def _integers(spans: Spans) -> tuple[Words, Flags]:
    """Return integers, and which are none, or of more than 18 digits."""
    lengths = spans.lengths
    longest, shortest = int(lengths.max(initial=0)), int(lengths.min(initial=MOST_DIGITS))
    total: Words = np.zeros(len(lengths), dtype=np.uint64)
    odd: Words = np.zeros(len(lengths), dtype=np.uint64)
    scale = 1
    for back in range(_WORD, min(longest, MOST_DIGITS) + _WORD, _WORD):
        digits = (spans.text.words[spans.ends - back] ^ _ZEROS) & _kept(lengths - (back - _WORD), longest == shortest)
        odd |= digits | (digits + _ABOVE_NINE)
        total += _eight_digits(digits) * np.uint64(scale)
        scale *= 10**_WORD
    are_odd: Flags = (odd & _TOPS) != 0
    if longest > MOST_DIGITS or shortest < 0:
        are_odd |= (lengths > MOST_DIGITS) | (lengths < 0)
    return total, are_odd


def _points(spans: Spans) -> tuple[Ints, Ints, Flags]:
    """Look for a point among the last 16 bytes of each.

    Returns how many bytes stand behind it (at most 12), whether there is one (0, 1), and which have several.
    """
    lengths = spans.lengths
    decimals: Ints = np.zeros(len(lengths), dtype=np.int64)
    points: Ints = np.zeros(len(lengths), dtype=np.int64)
    odd: Flags = lengths < 1
    uniform = int(lengths.max(initial=0)) == int(lengths.min(initial=LONGEST_PART))
    for back in (_WORD, 2 * _WORD):
        word = (spans.text.words[spans.ends - back] ^ _POINTS) | ~_kept(lengths - (back - _WORD), uniform)
        # A top bit where the byte is zero, which is where the point was; exact, whatever the other bytes are.
        tops = ~(((word & ~_TOPS) + ~_TOPS) | word | ~_TOPS)
        ones = tops >> np.uint64(7)
        here = ones != 0
        odd |= ((ones & (ones - np.uint64(1))) != 0) | (here & (points > 0))
        decimals += ((ones * _BYTES_ABOVE) >> np.uint64(56)).astype(np.int64) + here * (back - _WORD)
        points += here
    odd |= decimals > MOST_DECIMALS
    if odd.any():
        decimals[odd] = 0
        points[odd] = 0
    return decimals, points, odd


def _put_exponents(spans: Spans, rows: Ints, whole: Words, units: Words) -> None:
    """Read the numbers of these rows one by one, and put them in their places; raise Unusual for anything else."""
    for row, text in zip(rows.tolist(), spans.at(rows).texts(), strict=True):
        if _EXPONENT(text) is None:
            raise Unusual
        value = Decimal(text).scaleb(MOST_DECIMALS, _EXACT)
        unit = int(value)
        if unit != value or unit >= 10 ** (MOST_DIGITS + MOST_DECIMALS):
            raise Unusual
        whole[row] = unit // 10**MOST_DECIMALS
        units[row] = unit & (2**64 - 1), unit >> 64


def _kept(lengths: Ints, uniform: bool) -> Words:
    """Return masks of the last bytes of a word, as many as are within the span; one for all if they are uniform."""
    masks: Words = _HIGH[np.minimum(np.maximum(lengths[:1] if uniform else lengths, 0), _WORD)]
    return masks


def _eight_digits(digits: Words) -> Words:
    """Return the number that eight digits make, the first one in the lowest byte."""
    pairs = (digits * np.uint64(10) + (digits >> np.uint64(8))) & np.uint64(0x00FF00FF00FF00FF)
    fours = (pairs * np.uint64(100) + (pairs >> np.uint64(16))) & np.uint64(0x0000FFFF0000FFFF)
    return (fours * np.uint64(10_000) + (fours >> np.uint64(32))) & np.uint64(0xFFFFFFFF)


def _wide(whole: Words, fraction: Words, units: Words) -> None:
    """Put whole * 10^12 + fraction into `units`, in 128 bits: 10^12 is 5^12 * 2^12, and 5^12 has 28 bits."""
    five, bits = np.uint64(5**12), np.uint64(28)
    low = (whole & np.uint64(2**28 - 1)) * five
    upper = (whole >> bits) * five + (low >> bits)
    rest = low & np.uint64(2**28 - 1)
    units[:, 0] = (upper << np.uint64(40)) | (rest << np.uint64(12))
    units[:, 1] = upper >> np.uint64(24)
    units[:, 0] += fraction
    units[:, 1] += units[:, 0] < fraction


def _plausible(times: Ints) -> Ints:
    if len(times) and not EARLIEST_NS <= int(times.min()) <= int(times.max()) < LATEST_NS:
        raise Unusual
    return times


_DECIMAL = pa.decimal128(38, MOST_DECIMALS)
_EXPONENT = re.compile(r"(?:0|[1-9][0-9]{0,17})(?:\.[0-9]{1,18})?[eE][+-]?[0-9]{1,2}").fullmatch
_EXACT = Context(prec=60)
_JSON_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?").fullmatch
_SPACE, _DELETE = 0x20, 0x7F
_UNIT = np.uint64(10**MOST_DECIMALS)
_SMALL = 2**63 // 10**MOST_DECIMALS
_POWERS: Words = np.array([10**power for power in range(MOST_DIGITS + 1)], dtype=np.uint64)
_NANO_DIGITS = 9
_SECONDS_BELOW = np.uint64(10**10)
_MINUTE = len("2026-08-09T21:05")
_LAST_SECOND = np.uint64(59)

_ZEROS = np.uint64(0x3030303030303030)
_POINTS = np.uint64(0x2E2E2E2E2E2E2E2E)
_TOPS = np.uint64(0x8080808080808080)
_ABOVE_NINE = np.uint64(0x7676767676767676)  # takes a byte above 9 to its top bit
_BYTES_ABOVE = np.uint64(0x0706050403020100)  # times 256^i: how many bytes stand above byte i, in the top byte
_LOW: Words = np.array([(1 << 8 * count) - 1 for count in range(_WORD + 1)], dtype=np.uint64)  # the first bytes
_HIGH: Words = np.array([((1 << 8 * count) - 1) << 8 * (_WORD - count) for count in range(_WORD + 1)], dtype=np.uint64)
