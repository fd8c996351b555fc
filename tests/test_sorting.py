"""Nearly sorted rows come out as if they had been sorted."""

from __future__ import annotations

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from k2 import sorting
from k2.sorting import by_keys, in_order

KEYS = st.tuples(st.integers(0, 6), st.sampled_from("ab"), st.integers(0, 3))
ORDER = ("time", "name", "number")


def table(rows: list[tuple[int, str, int]], pieces: list[int]) -> pa.Table:
    """Return rows as a table in chunks, each numbered by its place."""
    columns = list(zip(*rows, strict=True)) if rows else [(), (), ()]
    whole = pa.table(
        {
            "time": pa.array(columns[0], pa.int64()),
            "name": pa.array(columns[1], pa.string()),
            "number": pa.array(columns[2], pa.int64()),
        }
    )
    cuts = sorted({0, whole.num_rows, *(piece % (whole.num_rows + 1) for piece in pieces)})
    return pa.concat_tables([whole.slice(a, b - a) for a, b in zip(cuts, cuts[1:] or cuts, strict=False)])


@settings(deadline=None)
@given(
    st.lists(st.lists(KEYS, max_size=12).map(sorted), max_size=6),
    st.lists(KEYS, max_size=4),
    st.lists(st.integers(0, 99), max_size=4),
)
def test_pieces_in_order_and_what_overlaps_are_sorted(
    pieces: list[list[tuple[int, str, int]]], loose: list, cuts: list
):
    """Sorted pieces in any order, overlapping or not, and rows out of any order."""
    rows = [row for piece in pieces for row in piece] + loose

    found = in_order(table(rows, cuts), ORDER)

    assert list(zip(*(found[name].to_pylist() for name in ORDER), strict=True)) == sorted(rows)


def test_more_pieces_than_are_put_together_are_sorted():
    """Rows that fall again and again are sorted as a whole."""
    rows = [(-number, "a", 0) for number in range(sorting.MOST_PIECES + 10)]

    found = in_order(table(rows, []), ORDER)

    assert found["time"].to_pylist() == sorted(row[0] for row in rows)


NAMED = st.tuples(st.sampled_from(["b", "a", "\u00e9", "\U0001f600", "\uffee"]), st.integers(0, 6), st.integers(0, 3))


@settings(deadline=None)
@given(
    st.lists(NAMED, max_size=40), st.sampled_from(["none", "all", "by time"]), st.lists(st.integers(0, 99), max_size=4)
)
def test_rows_are_sorted_by_names_held_as_dictionaries(rows: list[tuple[str, int, int]], before: str, cuts: list[int]):
    """Names in the order of their bytes, whatever order their dictionary has; equal rows stay as they came."""
    if before != "none":
        rows.sort(key=lambda row: row[1:] if before == "by time" else (row[0].encode(), *row[1:]))
    given_rows = table([(time, name, number) for name, time, number in rows], cuts)
    given_rows = given_rows.append_column("place", pa.array(range(len(rows)), pa.int64()))
    coded = given_rows.set_column(1, "name", given_rows["name"].dictionary_encode().unify_dictionaries())

    found = by_keys(coded, ("name", "time", "number"))

    expected = sorted(range(len(rows)), key=lambda place: (rows[place][0].encode(), *rows[place][1:]))
    assert found["place"].to_pylist() == expected


def test_rows_in_order_are_not_copied():
    """What hot hands out in order is written as it is."""
    rows = table([(1, "a", 1), (2, "a", 0)], [])
    coded = rows.set_column(1, "name", rows["name"].dictionary_encode())

    assert by_keys(coded, ("name", "time", "number")) is coded
