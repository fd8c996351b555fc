"""Frames are read by the bytes between their values only when every byte of them is accounted for."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2.feeds.columns import Columns, TradeColumns
from k2.feeds.layouts import LONGEST_LEARNED, MAX_LAYOUTS, MOST_LEARNED, MOST_VALUES, Fields, Layouts, Shape
from k2.feeds.spans import LONGEST_PART, Names, Unusual

TEXT = st.text(st.characters(min_codepoint=32, max_codepoint=126, exclude_characters='"\\'), max_size=12)
NUMBER = st.integers(0, 10**12)


def columns(fields: Fields) -> TradeColumns:
    """Make trades of whatever has an id and a price."""
    count = len(fields.frames)
    return TradeColumns(
        kind="trade",
        frames=fields.frames,
        places=fields.places,
        symbols=fields.names("/who") if fields.has("/who") else Names(np.zeros(count, dtype=np.int64), ["X-Y"]),
        ids=fields.integers("id").astype(np.int64),
        prices=fields.numbers("price", quoted=True),
        amounts=fields.numbers("price", quoted=True),
        sides=Names(np.zeros(count, dtype=np.int64), ["buy"]),
        times=np.zeros(count, dtype=np.int64),
    )


def layouts(rows: str | None = None, absent: tuple[str, ...] = ()) -> Layouts:
    return Layouts([Shape({"kind": "trade"}, columns, rows, absent)], lambda data: b"trade" in data)


def encode(message: object) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode()


def ids(found: Columns) -> list[tuple[int, int]]:
    return [
        (frame, number)
        for group in found.trades
        for frame, number in zip(group.frames.tolist(), group.ids.tolist(), strict=True)
    ]


@given(st.lists(st.tuples(NUMBER, TEXT, NUMBER, st.booleans(), st.booleans()), min_size=1, max_size=20))
def test_messages_without_a_list_are_one_row(values: list[tuple[int, str, int, bool, bool]]):
    """Values of any length at any place, and messages of other kinds between them."""
    frames, wanted = [], []
    for position, (number, note, rest, flag, silent) in enumerate(values):
        message = {"note": note, "kind": "trade", "id": number, "flag": flag, "price": "1.5", "rest": rest}
        frames.append(b'{"event":"silence"}' if silent else encode(message))
        wanted += [] if silent else [(position, number)]
    assert ids(layouts().read(frames)) == wanted


@given(st.lists(st.tuples(TEXT, st.lists(NUMBER, min_size=1, max_size=5), st.booleans()), min_size=1, max_size=12))
def test_messages_with_a_list_have_a_row_an_element(values: list[tuple[str, list[int], bool]]):
    """Whatever stands before and behind the list, and however long it is."""
    frames = []
    for note, numbers, behind in values:
        rows = [{"id": number, "price": f"{number}.25"} for number in numbers]
        beside = {"who": "A-B", "n": len(note)}
        head, tail = ({}, beside) if behind else (beside, {})
        frames.append(encode({"kind": "trade", "note": note, **head, "rows": rows, **tail}))
    found = layouts("rows").read(frames)
    wanted = [(position, number) for position, (_, numbers, _) in enumerate(values) for number in numbers]
    assert sorted(ids(found)) == sorted(wanted)
    for group in found.trades:
        assert list(group.prices) == [f"{number}.25" for number in group.ids.tolist()]
        assert group.places is not None
        assert group.places.tolist() == [
            place for position in dict.fromkeys(group.frames.tolist()) for place in range(len(values[position][1]))
        ]


USUAL: dict[str, Any] = {"kind": "trade", "id": 7, "note": "n", "flag": True, "price": "1.5", "rest": 3, "none": None}


@pytest.mark.parametrize(
    "odd",
    [
        encode({**USUAL, "id": "7"}),
        encode({**USUAL, "id": 7.5}),
        encode({**USUAL, "id": -7}),
        encode({**USUAL, "rest": "3"}),
        encode({**USUAL, "rest": None}),
        encode({**USUAL, "none": 1}),
        encode({**USUAL, "price": 1.5}),
        encode({**USUAL, "note": 'say "hi"'}),
        encode({**USUAL, "note": "\\"}),
        encode({**USUAL, "note": "tab\t"}),
        encode(USUAL).replace(b'"n"', b'"\xc3\xa4"'),
        encode(USUAL).replace(b'"n"', b'"\xff"'),
        encode(USUAL).replace(b'"flag":true', b'"flag":trua'),
        encode(USUAL).replace(b'"id":7', b'"id":07'),
        encode(USUAL).replace(b'"rest":3', b'"rest":03'),
        encode(USUAL).replace(b'"rest":3', b'"rest":3,"id":8'),
        encode(USUAL).replace(b'"rest":3', b'"rest":3 '),
        encode(USUAL).replace(b'"rest":3', b'"rest":'),
        encode(USUAL).replace(b'"rest":3', b'"rest":3]'),
        encode(USUAL) + b"}",
        encode(USUAL) + b" ",
        encode(USUAL)[:-1],
        b"[" + encode(USUAL) + b"]",
        b" " + encode(USUAL),
    ],
)
def test_what_differs_by_a_byte_is_not_taken_for_the_usual(odd: bytes):
    """It is another layout, learned by itself and read in full, or unusual: never rows of what it does not say."""
    usual = [encode({**USUAL, "id": 8}), encode({**USUAL, "id": 9, "flag": False})]
    reader = layouts()
    assert ids(reader.read(usual)) == [(0, 8), (1, 9)]
    try:
        found = reader.read([*usual, odd])
    except (Unusual, ValueError):
        return
    told = json.loads(odd)
    assert sorted(ids(found)) == [(0, 8), (1, 9), (2, told["id"])]
    assert json.loads(odd, object_pairs_hook=len) == len(told), "a key twice"


@given(st.integers(0, 10**6), st.integers(0, 255), st.integers(0, 2))
def test_any_byte_changed_is_another_message_or_none(place: int, octet: int, how: int):
    """One byte put in another's place, between others, or left out."""
    data = bytearray(encode(USUAL))
    place %= len(data)
    data[place : place + (how != 1)] = bytes([octet]) if how < 2 else b""
    try:
        found = layouts().read([encode(USUAL), bytes(data), encode(USUAL)])
    except (Unusual, ValueError):
        return
    if b"trade" not in data:
        assert ids(found) == [(0, 7), (2, 7)]
        return
    told = json.loads(data)
    assert sorted(ids(found)) == [(0, 7), (1, told["id"]), (2, 7)]
    assert told["kind"] == "trade"


def test_what_must_be_absent_is():
    """A path, and whatever lies below it."""
    reader = layouts(absent=("stream", "more.1"))
    assert ids(reader.read([encode({**USUAL, "streams": 1, "more": [1]})])) == [(0, 7)]
    for odd in ({"stream": "x"}, {"more": [1, 2]}, {"stream": {"a": 1}}):
        with pytest.raises(Unusual):
            reader.read([encode({**USUAL, **odd})])


def test_lists_without_rows_and_uneven_rows_are_unusual():
    """There is nothing to learn from the one, and no layout in the other."""
    row = {"id": 1, "price": "1"}
    for rows in ([], [row, {**row, "more": 1}], [row, {"price": "1", "id": 1}]):
        with pytest.raises(Unusual):
            layouts("rows").read([encode({"kind": "trade", "rows": rows})])


@pytest.mark.parametrize(
    "odd",
    [
        b'{"kind":"trade","id":7,"price":"1","":{"id":8}}',
        b'{"":{"kind":"trade"},"id":7,"price":"1","trade":1}',
        encode({**USUAL, "many": [1] * MOST_VALUES}),
        encode({**USUAL, "null": [None] * LONGEST_PART}),
        encode({**USUAL, "note": "x" * LONGEST_LEARNED}),
    ],
)
def test_what_is_too_much_or_may_mean_something_else_is_not_learned(odd: bytes):
    """Keys without a name, more values than any message has, long stretches, long messages."""
    with pytest.raises(Unusual):
        layouts().read([odd])


def test_values_beside_the_rows_take_no_room_for_each_row():
    """A message may have many of both, so they are spread over the rows only where they are asked for."""
    beside = {f"field{number}": number for number in range(MOST_VALUES - 10)}
    frame = encode({"kind": "trade", "who": "A-B", **beside, "rows": [{"id": n, "price": "1"} for n in range(20_000)]})
    short = encode({"kind": "trade", "who": "A-B", **beside, "rows": [{"id": n, "price": "1"} for n in range(600)]})
    reader = layouts("rows")
    assert len(ids(reader.read([short]))) == 600
    tracemalloc.start()
    try:
        assert len(ids(reader.read([frame]))) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 40 * len(frame)
    finally:
        tracemalloc.stop()


def test_a_run_of_ever_new_layouts_is_given_up():
    """Each would be looked for in all frames behind it."""
    with pytest.raises(Unusual):
        layouts().read([encode({**USUAL, f"field{number}": 1}) for number in range(MOST_LEARNED + 1)])
    assert len(ids(layouts().read([encode({**USUAL, f"field{number}": 1}) for number in range(MOST_LEARNED)]))) == 16


def test_layouts_are_forgotten_when_there_are_too_many():
    """The ones used last stay; a forgotten one is learned again."""
    reader = layouts()
    for number in range(MAX_LAYOUTS + 10):
        usual, other = encode(USUAL), encode({**USUAL, f"field{number}": 1})
        assert sorted(ids(reader.read([usual, other]))) == [(0, 7), (1, 7)]
    assert len(reader._known) == MAX_LAYOUTS
    assert ids(reader.read([encode({**USUAL, "field0": 1})])) == [(0, 7)]
