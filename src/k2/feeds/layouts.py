"""Messages of one layout, read as columns: learned from the first, recognised by the bytes between values.

An exchange writes its messages by program, so that those of a kind are the same bytes but for their values. `Layouts`
takes a message apart once, remembers what stands between the values, and finds the values of all others that have the
same bytes in the same order. A frame is taken so only when every byte of it is accounted for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise

import msgspec
import numpy as np

from k2 import meters
from k2.feeds import spans
from k2.feeds.columns import Columns, QuoteColumns, TradeColumns
from k2.feeds.spans import Flags, Ints, Names, Numbers, Spans, Text, Unusual, Words

MAX_LAYOUTS = 64
"""Most layouts of one exchange that are remembered: those used last."""

MOST_LEARNED = 16
"""Most layouts learned from one run of frames: what changes more often is no message written by program."""

MOST_VALUES = 256
"""Most values of a message a layout is learned from."""

LONGEST_LEARNED = 65_536
"""Bytes of the longest message a layout is learned from."""


@dataclass(frozen=True)
class Shape:
    """A kind of message and what it is made into.

    `fixed` are the texts that tell the kind, by their paths (`data.e`; elements of lists by number). `absent` are paths
    that must not be there. `rows` is the path of the list whose elements are the rows; without one, a message is a row.
    `build` makes the columns.
    """

    fixed: Mapping[str, str]
    build: Callable[[Fields], TradeColumns | QuoteColumns]
    rows: str | None = None
    absent: tuple[str, ...] = ()


class Fields:
    """The values of matching messages, a row each: `frames` are positions in the run, `places` those in the frame.

    A value is named by its path, in a row by the path from there; `/path` is one beside the rows. Every method raises
    Unusual for a name that is not there, or not written as it is asked for.
    """

    def __init__(self, frames: Ints, places: Ints | None, values: Mapping[str, tuple[_Value, Spans]], of: Ints) -> None:
        self.frames = frames
        self.places = places
        self._values = values
        self._of = of  # which of the frames each row is of: values beside the rows are there once a frame
        self._unread = {name for name, (value, _) in values.items() if not value.quoted}

    def has(self, name: str) -> bool:
        """Whether the messages have the value, and not `null` for it."""
        return name in self._values

    def spans(self, name: str, *, quoted: bool) -> Spans:
        """Return where the values stand."""
        value, found = self._values.get(name, (None, None))
        if value is None or found is None or value.quoted != quoted:
            raise Unusual
        self._unread.discard(name)
        return found.at(self._of) if name.startswith("/") else found

    def integers(self, name: str, *, quoted: bool = False) -> Words:
        """Return integers of at most 18 digits."""
        found = self.spans(name, quoted=quoted)
        if quoted and (found.lengths < 1).any():
            raise Unusual
        return spans.integers(found) if quoted else spans.json_integers(found)

    def numbers(self, name: str, *, quoted: bool) -> Numbers:
        """Return decimals from 0."""
        return spans.numbers(self.spans(name, quoted=quoted), json=not quoted)

    def names(self, name: str) -> Names:
        """Return short texts."""
        return spans.names(self.spans(name, quoted=True))

    def flags(self, name: str) -> Flags:
        """Return booleans."""
        return spans.flags(self.spans(name, quoted=False))

    def check_unread(self) -> None:
        """Raise Unusual when a value nobody has read is not JSON: a message is read as a whole or not at all."""
        for name in self._unread:
            value, found = self._values[name]
            if value.is_flag:
                spans.flags(found)
            else:
                spans.check_json_numbers(found)


class Layouts:
    """The layouts of one exchange's messages, learned as they come."""

    def __init__(self, shapes: Sequence[Shape], has_rows: Callable[[bytes], bool]) -> None:
        """`has_rows` tells of any message whether there is anything in it, and raises for what cannot be read."""
        self._shapes = shapes
        self._has_rows = has_rows
        self._known: list[_Layout] = []  # the one used last comes first

    def read(self, frames: Sequence[bytes]) -> Columns:
        """Return what is in a run of frames; raises Unusual, or what `has_rows` raises."""
        if not frames:
            return Columns()
        text = Text(frames)
        plain = text.plain()
        done = ~plain
        found = Columns()
        for layout in list(self._known):
            self._take(layout, text, done, found)
            if done.all():
                break
        learned = 0
        for position in np.flatnonzero(~(plain & done)).tolist():
            if (done[position] and plain[position]) or not self._has_rows(frames[position]):
                continue
            learned += 1
            if not plain[position] or learned > MOST_LEARNED:
                raise Unusual
            self._take(self._learn(frames[position]), text, done, found)
            if not done[position]:
                raise Unusual
        return found

    def _take(self, layout: _Layout, text: Text, done: Flags, found: Columns) -> None:
        """Read the frames of this layout among those not done yet."""
        fields = layout.match(text, np.flatnonzero(~done))
        if fields is None:
            return
        columns = layout.shape.build(fields)
        fields.check_unread()
        (found.trades if isinstance(columns, TradeColumns) else found.quotes).append(columns)  # type: ignore[arg-type]
        done[fields.frames] = True
        if self._known[0] is not layout:
            self._known.remove(layout)
            self._known.insert(0, layout)

    def _learn(self, data: bytes) -> _Layout:
        if len(data) > LONGEST_LEARNED:
            raise Unusual
        msgspec.json.decode(data)
        for shape in self._shapes:
            try:
                layout = _Layout(shape, data)
            except Unusual:
                continue
            if len(self._known) >= MAX_LAYOUTS:
                meters.acted("feeds.layouts")
                self._known.pop()
            self._known.insert(0, layout)
            return layout
        raise Unusual


@dataclass(frozen=True)
class _Value:
    """A value of the message that was learned: its path, and where it stands in it, without its quotes."""

    path: str
    start: int
    end: int
    quoted: bool
    is_flag: bool


@dataclass
class _Message:
    """A message taken apart: its values but `null`, and the elements of its list of rows, as (start, end)."""

    data: bytes
    rows: str | None
    values: list[_Value] = field(default_factory=list)
    elements: list[tuple[int, int]] = field(default_factory=list)

    def read(self, at: int, path: str) -> int:
        """Read the value that begins here; return where it ends."""
        token = _TOKEN.match(self.data, at)
        if token is None:
            raise Unusual
        if token[0] == b"{":
            return self._read_members(token.end(), path)
        if token[0] == b"[":
            return self._read_elements(token.end(), path)
        if token[0] != b"null":
            quoted = token[0].startswith(b'"')
            is_flag = token[0] in (b"true", b"false")
            if len(self.values) >= MOST_VALUES:
                raise Unusual
            self.values.append(_Value(path, at + quoted, token.end() - quoted, quoted, is_flag))
        return token.end()

    def _read_members(self, at: int, path: str) -> int:
        seen: set[str] = set()
        while not self.data.startswith(b"}", at):
            key = _KEY.match(self.data, at)
            if key is None or (name := key[1].decode("ascii")) in seen:
                raise Unusual
            seen.add(name)
            at = self._skip_comma(self.read(key.end(), f"{path}.{name}" if path else name))
        return at + 1

    def _read_elements(self, at: int, path: str) -> int:
        number = 0
        while not self.data.startswith(b"]", at):
            known = len(self.values)
            end = self.read(at, f"{path}.{number}" if path else str(number))
            if path == self.rows:
                self.elements.append((at, end))
                if number:  # rows are alike: the first one's values tell where all others have theirs
                    del self.values[known:]
            at = self._skip_comma(end)
            number += 1
        return at + 1

    def _skip_comma(self, at: int) -> int:
        return at + 1 if self.data.startswith(b",", at) else at


class _Layout:
    """What stands between the values of messages of one shape: a head, rows that are alike, a tail.

    `leads[i]` are the bytes before value i of head, row or tail, counted from the value before it. A value ends so many
    bytes before the quote that follows it, of which the number within its part is known; see `_Place`.
    """

    def __init__(self, shape: Shape, data: bytes) -> None:
        """Learn it from a message, which is JSON; raises Unusual when it is not of this shape, or cannot be learned."""
        self.shape = shape
        message = _Message(data, shape.rows)
        if message.read(0, "") != len(data):
            raise Unusual
        if len({value.path for value in message.values}) < len(message.values):
            raise Unusual
        texts = {value.path: data[value.start : value.end] for value in message.values if value.quoted}
        if any(texts.get(path) != text.encode("ascii") for path, text in shape.fixed.items()):
            raise Unusual
        if any(f"{value.path}.".startswith(f"{path}.") for path in shape.absent for value in message.values):
            raise Unusual
        self._cut(message, [value for value in message.values if value.path not in shape.fixed])

    def _cut(self, message: _Message, values: list[_Value]) -> None:
        data, repeats = message.data, self.shape.rows is not None
        if repeats and not message.elements:
            raise Unusual
        first, last = message.elements[0] if repeats else (0, len(data))
        end = message.elements[-1][1] if repeats else len(data)
        row = [value for value in values if first <= value.start < last]
        if not row or b'"' not in data[first:last]:
            raise Unusual
        head = [value for value in values if value.start < first]
        tail = [value for value in values if value.start >= end]
        behind = data[row[-1].end : last]
        self.repeats = repeats
        self.head_quotes, self.row_quotes, self.tail_quotes = (
            piece.count(b'"') for piece in (data[:first], data[first:last], data[end:])
        )
        self.between = behind + b"," + data[first : row[0].start]
        self.close = behind + data[end : tail[0].start if tail else len(data)]
        self.finish = data[tail[-1].end :] if tail else b""
        self.head = [_Place.of(value, data, 0) for value in head]
        self.row = [_Place.of(value, data, first) for value in row]
        self.tail = [_Place.of(value, data, None) for value in tail]
        self.lead = data[head[-1].end if head else 0 : row[0].start]
        self.head_leads = _leads(data, 0, head)
        self.row_leads = [b"", *_leads(data, row[0].end, row[1:])]
        self.tail_leads = [b"", *_leads(data, tail[0].end, tail[1:])] if tail else []
        self.prefix = "" if not repeats else f"{self.shape.rows}.0."
        if repeats and b'"' not in self.between:
            raise Unusual
        beside = (self.lead, self.between, self.close, self.finish)
        if max(map(len, (*self.head_leads, *self.row_leads, *self.tail_leads, *beside))) > spans.LONGEST_PART:
            raise Unusual
        _check_located([*head, *row], data)
        _check_located(tail, data)

    def match(self, text: Text, frames: Ints) -> Fields | None:
        """Return the values of those of the frames that have this layout; None if none has."""
        inside = text.quote_ends[frames] - text.quote_starts[frames] - self.head_quotes - self.tail_quotes
        rows = inside // self.row_quotes
        alike = (inside == rows * self.row_quotes) & (rows >= 1 if self.repeats else rows == 1)
        opening = self.head_leads[0] if self.head_leads else self.lead
        alike &= text.holds(opening[:8], text.starts[frames])
        if not alike.all():
            frames, rows = frames[alike], rows[alike]
        with suppress(_Misfit):
            while len(frames):
                fields, fit = _Matching(self, text, frames, rows).run()
                if fit.all():
                    return fields
                frames, rows = frames[fit], rows[fit]
        return None


@dataclass(frozen=True)
class _Place:
    """Where a value ends: `back` bytes before a quote, the one with this number from where its part begins.

    In the tail, quotes are counted from the end of the message, below zero; 0 is the end of the message itself.
    """

    value: _Value
    quote: int
    back: int

    @staticmethod
    def of(value: _Value, data: bytes, begins: int | None) -> _Place:
        """Find it in a message; `begins` is where its part begins, None in the tail."""
        at = data.find(b'"', value.end)
        behind = data[value.end :].count(b'"')
        number = -behind if begins is None else data[begins:].count(b'"') - behind
        return _Place(value, number, (at if at >= 0 else len(data)) - value.end)


class _Misfit(Exception):
    """Raised when a layout is found in none of the frames."""


class _Matching:
    """One attempt to find a layout in frames that have its number of quotes."""

    def __init__(self, layout: _Layout, text: Text, frames: Ints, rows: Ints) -> None:
        self.layout, self.text, self.frames = layout, text, frames
        self.frame_ends = text.ends[frames]
        self.fit: Flags = np.ones(len(frames), dtype=bool)
        self.values: dict[str, tuple[_Value, Spans]] = {}
        self.of_row: Ints = np.repeat(np.arange(len(frames)), rows) if layout.repeats else np.arange(len(frames))
        self.last: Ints = rows.cumsum() - 1
        self.first: Ints = self.last - rows + 1
        self.rows_fit: Flags = np.ones(len(self.of_row), dtype=bool)
        self.number: Ints = np.arange(len(self.of_row)) - self.first[self.of_row]

    def run(self) -> tuple[Fields, Flags]:
        """Return the values, and which frames have the layout: the values are right if all have it."""
        layout, text = self.layout, self.text
        at = text.starts[self.frames]
        quotes = text.quote_starts[self.frames]
        for lead, place in zip(layout.head_leads, layout.head, strict=True):
            at = self._beside(at, lead, place, self._quote(quotes + place.quote) - place.back)
        at = self._rows(at)
        self.fit &= text.holds(layout.close, at)
        at += len(layout.close)
        quotes = text.quote_ends[self.frames]
        for lead, place in zip(layout.tail_leads, layout.tail, strict=True):
            end = self._quote(quotes + place.quote) if place.quote else self.frame_ends
            at = self._beside(at, lead, place, end - place.back)
        if layout.finish:
            self.fit &= text.holds(layout.finish, at)
        self.fit &= at + len(layout.finish) == self.frame_ends
        if layout.repeats:
            self.fit &= np.logical_and.reduceat(self.rows_fit, self.first)
        else:
            self.fit &= self.rows_fit
        places = self.number if layout.repeats else None
        return Fields(self.frames[self.of_row], places, self.values, self.of_row), self.fit

    def _rows(self, at: Ints) -> Ints:
        """Find the values of the rows; return where the last value of each frame's last row ends."""
        layout, text = self.layout, self.text
        quotes = text.quote_starts[self.frames][self.of_row] + layout.head_quotes + self.number * layout.row_quotes
        ends = [self._quote(quotes + place.quote) - place.back for place in layout.row[:-1]]
        ends.append(self._last_ends(quotes))
        self.fit &= text.holds(layout.lead, at)
        self._check_any()
        starts: Ints = np.empty(len(quotes), dtype=np.int64)
        if len(starts) > len(self.first):
            before = np.append(0, ends[-1][:-1])
            self.rows_fit &= (self.number == 0) | text.holds(layout.between, before)
            starts = before + len(layout.between)
        starts[self.first] = at + len(layout.lead)
        for lead, place, end in zip(layout.row_leads, layout.row, ends, strict=True):
            if lead:
                self.rows_fit &= text.holds(lead, starts)
                self._check_any()
                starts = starts + len(lead)
            self.rows_fit &= starts <= end
            name = place.value.path.removeprefix(layout.prefix)
            self.values[name] = (place.value, Spans(text, starts, end))
            starts = end
        return ends[-1][self.last]

    def _last_ends(self, quotes: Ints) -> Ints:
        """Return where the last value of each row ends: what follows it differs after a frame's last row."""
        layout, place = self.layout, self.layout.row[-1]
        if place.value.quoted:
            return self._quote(quotes + place.quote)
        following = self._quote(quotes + place.quote)
        ends = following - layout.between.find(b'"')
        close = layout.close.find(b'"')
        ends[self.last] = following[self.last] - close if close >= 0 else self.frame_ends - len(layout.close)
        return ends

    def _beside(self, at: Ints, lead: bytes, place: _Place, end: Ints) -> Ints:
        """Find a value beside the rows; return where it ends."""
        starts = at + len(lead)
        self.fit &= self.text.holds(lead, at) & (starts <= end)
        self._check_any()
        self.values[f"/{place.value.path}"] = (place.value, Spans(self.text, starts, end))
        return end

    def _check_any(self) -> None:
        if not (self.fit.any() and self.rows_fit.any()):
            raise _Misfit

    def _quote(self, numbers: Ints) -> Ints:
        """Return where the quotes of these numbers stand; there is always one, if perhaps of a frame behind."""
        return self.text.quotes[np.minimum(numbers, len(self.text.quotes) - 1)]


def _leads(data: bytes, at: int, values: Sequence[_Value]) -> list[bytes]:
    """Return what stands before each of the values, from the end of the one before it."""
    leads = []
    for value in values:
        leads.append(data[at : value.start])
        at = value.end
    return leads


def _check_located(values: Sequence[_Value], data: bytes) -> None:
    """Raise Unusual when two values follow each other without a quote between them: none would tell where one ends."""
    for value, following in pairwise(values):
        if b'"' not in data[value.end : following.start]:
            raise Unusual


_TOKEN = re.compile(rb'"[^"\\]*"|[{\[]|-?[0-9][-+.0-9eE]*|true|false|null')
_KEY = re.compile(rb'"([^"\\./*]+)":')
