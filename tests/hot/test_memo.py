"""What is kept of the hot tier in memory answers as the hot tier itself does, whatever is written when."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2.hot import memo as limits
from k2.hot.memo import Memo
from k2.hot.memory import MemoryHot
from k2.model import Positions, Selection
from k2.schema import TABLES, TRADES, Table

sys.path.insert(0, str(Path(__file__).parent))
from hot_rows import DAY_NS, MINUTE_NS, START_NS, table, trade


class Asked:
    """Asks the hot tier in memory, and counts; `during` runs in the middle of each question."""

    seconds: float | None = 5.0

    def __init__(self, hot: MemoryHot) -> None:
        self.hot = hot
        self.count = 0
        self.during: Callable[[], None] = lambda: None

    def candles(self, timeframe: str, symbol: tuple[str, ...], start_ns: int | None, end_ns: int | None) -> pa.Table:
        exchange, name, kind = symbol
        self.count += 1
        wanted = Selection(table="candles", exchange=exchange, symbol=name, start_ns=start_ns, end_ns=end_ns)
        found = self.hot.candles(timeframe, wanted, kind=kind)
        self.during()
        return found

    def newest(self, table: Table, exchange: str, symbol: str, start: Positions, count: int) -> pa.Table:
        self.count += 1
        wanted = Selection(table=table.name, exchange=exchange or None, symbol=symbol, limit=count, newest=True)
        found = self.hot.read(wanted, start=start)
        self.during()
        return found


class Kept:
    """A hot tier in memory, and a memo that is told of its writes as the adapter tells it."""

    def __init__(self) -> None:
        self.hot = MemoryHot()
        self.memo = Memo()
        self.ask = Asked(self.hot)

    def write(self, name: str, rows: list[dict[str, Any]], token: str) -> None:
        made = table(name, rows)
        self.hot.write(name, made, token)
        self.memo.wrote(TABLES[name], made)

    def check_candles(self, timeframe: str = "1m", kind: str = "trade", **changes: Any) -> pa.Table:
        wanted = Selection(table="candles", exchange="binance", symbol="BTC-USDT", **changes)
        found = self.memo.candles(timeframe, wanted, kind, self.ask)
        assert found is not None
        assert found.to_pylist() == self.hot.candles(timeframe, wanted, kind=kind).to_pylist()
        return found

    def check_newest(
        self, limit: int, start: Positions | None = None, end: Positions | None = None, **changes: Any
    ) -> pa.Table | None:
        wanted = Selection(
            **{"table": "trades", "exchange": "binance", "symbol": "BTC-USDT", **changes}, limit=limit, newest=True
        )
        found = self.memo.newest(TABLES[wanted.table], wanted, start, end, self.ask)
        if found is not None:
            assert found.to_pylist() == self.hot.read(wanted, start=start, end=end).to_pylist()
        return found


@pytest.fixture
def kept() -> Kept:
    """An empty hot tier and its memo."""
    return Kept()


def at(offset: int, time_ns: int, **changes: Any) -> dict[str, Any]:
    """A trade of one offset at a time."""
    return trade(offset, exchange_ns=START_NS + time_ns, **changes)


def test_candles_are_asked_for_once_and_again_from_where_a_write_touched_them(kept: Kept) -> None:
    """What is kept needs no question; after a write only what it touched, and what lies behind, is asked for."""
    kept.write("trades", [at(n, n * MINUTE_NS) for n in range(5)], "1")
    kept.check_candles()
    asked = kept.ask.count
    for _ in range(3):
        kept.check_candles()
    assert kept.ask.count == asked

    kept.write("trades", [at(9, 3 * MINUTE_NS + 1, price=Decimal(7))], "2")

    changed = kept.check_candles()
    assert kept.ask.count == asked + 1
    assert str(changed["close"][3].as_py()) == "7.000000000000"


def test_a_late_trade_of_an_earlier_day_is_seen(kept: Kept) -> None:
    """A day nobody traded on gets candles when a trade of it arrives after all."""
    kept.write("trades", [at(0, 0)], "1")
    kept.check_candles()
    kept.write("trades", [at(1, -5 * DAY_NS)], "2")

    assert kept.check_candles().num_rows == 2
    assert kept.check_candles(start_ns=START_NS - 6 * DAY_NS, end_ns=START_NS).num_rows == 1


@pytest.mark.parametrize("question", [1, 2, 3])
def test_a_write_that_ends_while_the_engine_is_asked_is_in_the_next_answer(kept: Kept, question: int) -> None:
    """What the engine answered before the write is not taken for the state after it."""
    kept.write("trades", [at(0, 0)], "1")
    first = kept.ask.count

    def write() -> None:
        if kept.ask.count == first + question:
            kept.write("trades", [at(1, 1), at(2, DAY_NS)], "2")

    kept.ask.during = write
    wanted = Selection(table="candles", exchange="binance", symbol="BTC-USDT")
    kept.memo.candles("1m", wanted, "trade", kept.ask)
    kept.memo.newest(TRADES, Selection(table="trades", symbol="BTC-USDT", limit=9, newest=True), {}, {}, kept.ask)

    kept.check_candles()
    kept.check_newest(9, exchange=None)
    kept.check_newest(9)


def test_a_failed_write_leaves_nothing_that_was_kept(kept: Kept) -> None:
    """After `clear` everything is asked for again, also what was being asked for meanwhile."""
    kept.write("trades", [at(0, 0)], "1")
    kept.check_candles()
    kept.check_newest(5)
    kept.hot.write("trades", table("trades", [at(1, 1)]), "stored, and then the connection broke")
    kept.ask.during = kept.memo.clear
    wanted = Selection(table="candles", exchange="binance", symbol="BTC-USDT")
    kept.memo.clear()
    kept.memo.candles("5m", wanted, "trade", kept.ask)
    kept.hot.write("trades", table("trades", [at(2, 2)]), "another one")

    kept.check_candles()
    kept.check_candles("5m")
    kept.check_newest(5)


def test_deleted_rows_are_gone_and_candles_stay(kept: Kept) -> None:
    """Retention takes rows, never candles."""
    kept.write("trades", [at(n, n) for n in range(5)], "1")
    kept.check_newest(3)
    kept.check_candles()
    asked = kept.ask.count
    kept.hot.delete({"binance": 4}, 2**62)
    kept.memo.deleted()

    kept.check_candles()
    assert kept.ask.count == asked
    assert [row["log_offset"] for row in kept.check_newest(3).to_pylist()] == [4]  # type: ignore[union-attr]


def test_newest_rows_are_asked_for_once_through_commits_and_flushes(kept: Kept) -> None:
    """The cut may rise with each commit, and rows come with each flush: what is kept goes on answering."""
    kept.write("trades", [at(n, n) for n in range(20)], "1")
    kept.check_newest(5, {"binance": 3})
    for number in range(20, 60):
        kept.write("trades", [at(number, number)], str(number))
        assert kept.check_newest(5, {"binance": number - 10}) is not None

    assert kept.ask.count == 1


def test_a_lower_cut_than_before_is_asked_for_again(kept: Kept) -> None:
    """Rows below the cut of the first question are not among those kept."""
    kept.write("trades", [at(n, n) for n in range(20)], "1")
    kept.check_newest(5, {"binance": 18})

    found = kept.check_newest(5, {"binance": 3})
    assert found is not None
    assert found.num_rows == 5


def test_more_rows_than_are_kept_are_still_exact(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the rows kept do not reach back far enough, the engine is asked."""
    monkeypatch.setattr(limits, "NEWEST_ROWS", 8)
    kept.write("trades", [at(n, n) for n in range(20)], "1")
    for number in range(20, 40):
        kept.write("trades", [at(number, 100 - number)], str(number))
        kept.check_newest(8)
        kept.check_newest(3, {}, {"binance": 15})

    assert kept.check_newest(3, {}, {"binance": 10}) is None


def test_names_are_asked_for_again_when_a_new_one_is_written(kept: Kept) -> None:
    """A symbol that was never seen before is listed after its first write."""
    kept.write("trades", [at(0, 0)], "1")
    asked = 0

    def read() -> list[tuple[str, str]]:
        nonlocal asked
        asked += 1
        return kept.hot.symbols()

    for symbol in ("BTC-USDT", "BTC-USDT", "ETH-USDT", "ETH-USDT"):
        kept.write("trades", [at(1, 1, symbol=symbol)], symbol)
        assert kept.memo.names(read) == kept.hot.symbols()
    assert asked == 2


def test_what_is_kept_has_a_limit(kept: Kept) -> None:
    """However many symbols and days are asked for, the bytes kept stay below the limit."""
    memo = Memo(max_bytes=20 * limits.ENTRY_BYTES)
    names = [f"S{n}-USDT" for n in range(100)]
    kept.hot.write("trades", table("trades", [at(n, n, symbol=name) for n, name in enumerate(names)]), "1")
    for name in names:
        wanted = Selection(table="candles", exchange="binance", symbol=name)
        assert memo.candles("1m", wanted, "trade", kept.ask) is not None
        newest = Selection(table="trades", exchange="binance", symbol=name, limit=5, newest=True)
        assert memo.newest(TRADES, newest, {}, {}, kept.ask) is not None

    assert memo.size_bytes <= 20 * limits.ENTRY_BYTES


_TRADES = st.lists(
    st.builds(
        lambda minute, symbol, kind, off: {"minute": minute, "symbol": symbol, "kind": kind, "off_market": off},
        st.integers(-3000, 3000),
        st.sampled_from(["BTC-USDT", "BTC-USDT", "ETH-USDT"]),
        st.sampled_from(["trade", "trade", "aggregate"]),
        st.booleans(),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=40, deadline=None)
@given(writes=st.lists(_TRADES, min_size=1, max_size=8), seed=st.integers(0, 2**32))
def test_any_mix_of_writes_and_questions_gives_the_answers_of_the_tier(
    writes: list[list[dict[str, Any]]], seed: int
) -> None:
    """Late, repeated and mixed writes, deletions, any range, limit and cut: every answer equals the tier's own."""
    kept, chance, offset = Kept(), random.Random(seed), 0
    for number, rows in enumerate(writes):
        made = []
        for row in rows:
            minute = row.pop("minute")
            made.append(at(offset, minute * MINUTE_NS + offset, **row))
            offset += 1
        for _ in range(chance.choice([1, 1, 2])):
            kept.write("trades", made, str(number))
        for _ in range(4):
            low, high = sorted(chance.sample(range(-3001, 3002), 2))
            bounds = chance.choice(
                [{}, {"start_ns": START_NS + low * MINUTE_NS, "end_ns": START_NS + high * MINUTE_NS}]
            )
            cutting = chance.choice([{}, {"limit": chance.randint(1, 4), "newest": chance.random() < 0.5}])
            kept.check_candles(
                chance.choice(["1m", "1h", "1d"]), chance.choice(["trade", "aggregate"]), **bounds, **cutting
            )
            start = {"binance": chance.randint(0, offset)}
            kept.check_newest(
                chance.randint(1, 5),
                chance.choice([None, start]),
                chance.choice([None, {"binance": chance.randint(start["binance"], offset)}]),
                exchange=chance.choice(["binance", None]),
            )
        if chance.random() < 0.2:
            kept.hot.delete({"binance": chance.randint(0, offset)}, 2**62)
            kept.memo.deleted()
