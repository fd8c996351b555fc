"""The id ledger: repeats, holes, fillings, against a plain set of ids."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from k2.run.accounting import (
    FILLED,
    GIVEN_UP,
    MAX_INTERVALS,
    OPEN,
    Finding,
    IdLedger,
    RepeatWindow,
    join_findings,
)


def ledger() -> IdLedger:
    return IdLedger([], [])


def test_ids_in_order_find_nothing():
    """A stream without holes is one interval and gives no findings."""
    ids = ledger()

    assert [ids.add(i) for i in range(5, 10)] == [[]] * 5
    assert (ids.firsts, ids.lasts, ids.missing) == ([5], [9], 0)


def test_a_jump_opens_a_hole_and_late_ids_fill_it():
    """Ids 3 and 4 are missing until they arrive."""
    ids = ledger()
    ids.add(2)

    assert ids.add(5) == [Finding(OPEN, 3, 4)]
    assert ids.missing == 2
    assert ids.add(4) == [Finding(FILLED, 4, 4)]
    assert ids.add(3) == [Finding(FILLED, 3, 3)]
    assert (ids.firsts, ids.lasts, ids.missing) == ([2], [5], 0)


def test_an_older_id_opens_the_hole_before_the_first():
    """What lies between an older recording and the live stream is missing."""
    ids = ledger()
    ids.add(100)

    assert ids.add(10) == [Finding(OPEN, 11, 99)]
    assert ids.add(99) == [Finding(FILLED, 99, 99)]


def test_too_many_holes_give_up_the_lowest_visibly():
    """The number of intervals has a limit, and reaching it is reported."""
    ids = ledger()
    for i in range(MAX_INTERVALS):
        ids.add(2 * i)

    assert ids.add(2 * MAX_INTERVALS)[-1] == Finding(GIVEN_UP, 1, 1)
    assert len(ids.firsts) == MAX_INTERVALS


@given(st.lists(st.integers(1, 60), max_size=200))
def test_a_ledger_knows_what_a_set_knows(sequence: list[int]):
    """Repeats are exactly the ids seen before; open minus filled is exactly what is missing."""
    ids, seen, missing = ledger(), set(), set()
    for i in sequence:
        findings = ids.add(i)
        assert (findings is None) == (i in seen)
        seen.add(i)
        for finding in findings or []:
            span = set(range(finding.first_id, finding.last_id + 1))
            missing = missing | span if finding.status == OPEN else missing - span

    assert missing == (set(range(min(seen), max(seen) + 1)) - seen if seen else set())
    assert ids.missing == len(missing)
    assert all(last + 1 < first for last, first in zip(ids.lasts, ids.firsts[1:], strict=False))


def test_neighbouring_fillings_are_joined():
    """A hole filled by one message is one row."""
    found = [Finding(FILLED, 3, 3), Finding(FILLED, 4, 4), Finding(OPEN, 5, 6), Finding(FILLED, 9, 9)]

    assert join_findings(found) == [Finding(FILLED, 3, 4), Finding(OPEN, 5, 6), Finding(FILLED, 9, 9)]


def test_equal_records_of_one_connection_are_kept_and_of_two_are_not():
    """Overlapping connections send the same quote; one connection may repeat itself truly."""
    window = RepeatWindow(10)

    assert not window.is_repeat("q", 0, origin=("a", 1))
    assert not window.is_repeat("q", 1, origin=("a", 1))
    assert window.is_repeat("q", 2, origin=("b", 1))
    assert window.is_repeat("q", 3, origin=("b", 1))
    assert not window.is_repeat("q", 4, origin=("b", 1))
    assert not window.is_repeat("q", 14, origin=("a", 1))


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.sampled_from([None, "a", "b"])), max_size=300),
    st.integers(0, 300),
)
def test_a_window_filled_again_answers_as_the_one_that_ran_on(steps: list[tuple[int, int, str | None]], restart: int):
    """What it answers depends on the last offsets alone, so a restart changes nothing."""
    running, offset, history, answers = RepeatWindow(8, most=20), 0, [], []
    for key, step, origin in steps:
        offset += step
        history.append((key, offset, origin))
        answers.append(running.is_repeat(key, offset, origin))
    again = RepeatWindow(8, most=20)
    start = history[restart][1] if restart < len(history) else offset + 1
    for key, at, origin in history:
        if start - 8 <= at < start:
            again.is_repeat(key, at, origin)

    later = [(entry, answer) for entry, answer in zip(history, answers, strict=True) if entry[1] >= start]
    assert [again.is_repeat(*entry) for entry, _ in later] == [answer for _, answer in later]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=300))
def test_the_window_forgets_by_offset_only(steps: list[tuple[int, int]]):
    """Without origins a key is a repeat exactly when it was sighted less than the span before."""
    window, sighted, offset = RepeatWindow(8), {}, 0
    for key, step in steps:
        offset += step
        assert window.is_repeat(key, offset) == (key in sighted and sighted[key] > offset - 8)
        sighted[key] = offset
