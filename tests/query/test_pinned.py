"""Answers kept of cold snapshots are those the snapshot gives, within a limit."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from k2.cold.base import Pin
from k2.model import Selection
from k2.query.pinned import ENTRY_BYTES, PinnedAnswers
from k2.schema import TRADES, arrow_schema

EMPTY = arrow_schema(TRADES).empty_table()


def pin(snapshot_id: int, table: str = "trades") -> Pin:
    """A state of a table."""
    return Pin(table, f"/{snapshot_id}.json", snapshot_id, 0, {})


def rows(times: list[int]) -> pa.Table:
    """Rows that are nothing but their times."""
    return pa.table({"exchange_ns": pa.array(times, pa.int64())})


def newest(**changes: Any) -> Selection:
    """The three newest rows of a symbol."""
    return Selection(table="trades", symbol="BTC-USD", limit=3, newest=True, **changes)


def test_another_snapshot_selection_or_kind_of_candles_is_another_answer() -> None:
    """Only the very same question to the very same state is answered from what is kept."""
    kept = PinnedAnswers()
    one = Selection(table="trades", symbol="BTC-USD", start_ns=5)
    kept.put(pin(1), one, EMPTY)
    kept.put(pin(1), one, rows([1]), "1m", "auto")

    assert kept.get(pin(1), one) is EMPTY
    assert kept.get(pin(2), one) is None
    assert kept.get(pin(1, "quotes"), one) is None
    assert kept.get(pin(1), Selection(table="trades", symbol="BTC-USD", start_ns=6)) is None
    assert kept.get(pin(1), one, "5m", "auto") is None
    assert kept.get(pin(1), one, "1m", "trade") is None


def test_newest_rows_from_a_later_time_on_are_among_those_from_an_earlier() -> None:
    """The bound rises as newer tiers grow; a lower one than was asked for is asked for again."""
    kept = PinnedAnswers()
    kept.put(pin(1), newest(start_ns=10), rows([10, 12, 14]))

    later = kept.get(pin(1), newest(start_ns=12))
    assert later is not None
    assert later["exchange_ns"].to_pylist() == [12, 14]
    assert kept.get(pin(1), newest(start_ns=9)) is None
    assert kept.get(pin(1), newest()) is None
    assert kept.get(pin(1), newest(start_ns=12, end_ns=13)) is None

    kept.put(pin(1), newest(), rows([10, 12, 14]))
    assert kept.get(pin(1), newest(start_ns=9)) is not None


def test_what_is_kept_has_a_limit() -> None:
    """The answers not asked for the longest make room; a large one is never kept."""
    kept = PinnedAnswers(max_bytes=4 * ENTRY_BYTES, max_answer_bytes=2 * ENTRY_BYTES)
    questions = [Selection(table="trades", symbol=f"S{n}") for n in range(6)]
    for number, question in enumerate(questions):
        kept.put(pin(1), question, EMPTY)
        if number >= 3:
            kept.get(pin(1), questions[0])
    kept.put(pin(1), Selection(table="trades"), rows(list(range(1000))))

    found = [n for n, question in enumerate(questions) if kept.get(pin(1), question) is not None]
    assert found == [0, 3, 4, 5]
    assert kept.get(pin(1), Selection(table="trades")) is None
