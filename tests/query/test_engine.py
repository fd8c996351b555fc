"""The union of cold, hot and tail, whatever goes on between the steps of a query."""

from __future__ import annotations

import threading
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2.candles import make_candles
from k2.cold.memory import MemoryCold
from k2.errors import Rejected, StoreDown, TimedOut, UnknownName
from k2.hot.memory import MemoryHot
from k2.hot.tail import Generation, Tail
from k2.query.engine import Deadline, Engine
from k2.query.plan import Question, ask, order
from k2.schema import CANDLES, HOT_ROW_TABLES, TRADES, arrow_schema
from k2.settings import QuerySettings, Settings

Row = dict[str, Any]
DAY_NS = 86_400 * 10**9
PARTITIONS = ("binance", "kraken")
SCHEMA = arrow_schema(TRADES)


def trade(partition: str, offset: int, index: int, time_ns: int, **changes: Any) -> Row:
    """Return one row of trades; its id, price and amount follow from its place."""
    identity = offset * 10 + index + 1
    values: Row = {
        "exchange": partition,
        "symbol": "BTC-USD",
        "trade_id": identity,
        "kind": "trade",
        "first_id": identity,
        "last_id": identity,
        "price": Decimal(100 + identity * 7919 % 101) + Decimal("0.01"),
        "amount": Decimal(identity) / 1000,
        "side": "buy" if identity % 3 else "sell",
        "off_market": identity % 11 == 0,
        "occurrence": 0,
        "exchange_ns": time_ns,
        "received_ns": time_ns + 5,
        "source": "live",
        "log_partition": partition,
        "log_offset": offset,
        "row_in_frame": index,
        "logged_ns": 1_000 + offset,
    }
    return {**values, **changes}


def table_of(rows: list[Row]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def convert(table: str, rows: list[tuple[Any, ...]]) -> pa.Table:
    schema = arrow_schema(next(t for t in HOT_ROW_TABLES if t.name == table))
    return pa.Table.from_pylist([dict(zip(schema.names, row, strict=True)) for row in rows], schema=schema)


class Pipeline:
    """Ingest, flush, offload and retention in their smallest steps, over memory tiers."""

    def __init__(self, hot: MemoryHot | None = None) -> None:
        self.hot = hot or MemoryHot()
        self.cold = MemoryCold()
        self.tail = Tail(self._generation({}))
        self.rows: list[Row] = []
        self._progress: dict[str, int] = {}
        self._pending: list[tuple[str, pa.Table]] = []
        self._flushes = 0

    @staticmethod
    def _generation(start: dict[str, int]) -> Generation:
        return Generation(start, [t.name for t in HOT_ROW_TABLES], convert)

    def ingest(self, partition: str, times: list[int]) -> None:
        """One frame more, with a trade at each of the times."""
        offset = self.tail.end.get(partition, 0)
        rows = [trade(partition, offset, index, time_ns) for index, time_ns in enumerate(times)]
        self.tail.filling.add({"trades": [tuple(row.values()) for row in rows]}, partition, offset, offset + 1)
        self.rows += rows

    def flush_step(self) -> None:
        """Begin a flush, or write its next day, or end it."""
        if self._pending:
            token, rows = self._pending.pop(0)
            self.hot.write("trades", rows, token)
            if not self._pending:
                self._progress = dict(self._full.end)
                self.tail.flushed()
            return
        self._full = self.tail.turn(self._generation(dict(self.tail.end)))
        self._flushes += 1
        rows = self._full.arrow("trades").to_pylist()
        days = sorted({row["exchange_ns"] // DAY_NS for row in rows}) or [0]
        self._pending = [
            (f"{self._flushes}/{day}", table_of([row for row in rows if row["exchange_ns"] // DAY_NS == day]))
            for day in days
        ]

    def offload(self) -> None:
        """Move what was flushed to cold."""
        start = dict(self.cold.pin("trades").watermark)
        end = dict(self._progress)
        if end:
            self.cold.append("trades", self.hot.read_range("trades", start, end), start=start, end=end)

    def retain(self) -> None:
        """Delete everything from hot that cold holds."""
        self.hot.delete(self.cold.pin("trades").watermark, 10 * DAY_NS)

    def engine(self, between: Callable[[], None] = lambda: None) -> Engine:
        parts = (Between(part, between) for part in (self.hot, self.cold, self.tail))
        return Engine(*parts, Settings())  # type: ignore[arg-type]


class Between:
    """Passes calls on, and lets something happen before and after each."""

    def __init__(self, part: Any, between: Callable[[], None]) -> None:
        self._part = part
        self._between = between

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._part, name)

        def call(*arguments: Any, **named: Any) -> Any:
            self._between()
            result = method(*arguments, **named)
            self._between()
            return result

        return call


# Few distinct times over two days: many rows share a nanosecond, many come late.
TIMES = st.lists(st.sampled_from([5, 6, 60 * 10**9, DAY_NS - 1, DAY_NS, DAY_NS + 7]), max_size=3)
INGEST = st.tuples(st.just("ingest"), st.sampled_from(PARTITIONS), TIMES)
MOVE = st.sampled_from([("flush_step",), ("flush_step",), ("offload",), ("retain",)])
MOVES = st.lists(st.one_of(INGEST, MOVE), max_size=25)
MID_QUERY = st.lists(MOVE, max_size=40)
STARTS = st.none() | st.sampled_from([0, 6, DAY_NS])


def run(pipeline: Pipeline, moves: list[tuple[Any, ...]]) -> None:
    for name, *arguments in moves:
        getattr(pipeline, name)(*arguments)


def stepper(pipeline: Pipeline, moves: list[tuple[Any, ...]]) -> Callable[[], None]:
    waiting = list(moves)

    def step() -> None:
        if waiting:
            run(pipeline, [waiting.pop(0)])

    return step


def in_order(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: tuple(row[column] for column in order(TRADES)))


def asked(start: int | None, limit: int, **changes: Any) -> Question:
    return ask("trades", start=start, limit=limit, **changes)


def expected(rows: list[Row], question: Question) -> list[Row]:
    found = [row for row in in_order(rows) if question.start_ns is None or row["exchange_ns"] >= question.start_ns]
    if not question.limit:
        return found
    return found[-question.limit :] if question.newest else found[: question.limit]


@given(before=MOVES, during=MID_QUERY, start=STARTS, limit=st.integers(0, 6))
def test_union_gives_each_row_once_whatever_moves_meanwhile(
    before: list[Any], during: list[Any], start: int | None, limit: int
) -> None:
    """Flushes, commits and retention before and between the steps of a query change nothing in its answer."""
    pipeline = Pipeline()
    run(pipeline, before)
    question = asked(start, limit)

    answer = pipeline.engine(stepper(pipeline, during)).answer(question)

    assert answer.rows.to_pylist() == expected(pipeline.rows, question)


@pytest.mark.parametrize("step", range(12))
def test_rows_moved_to_cold_and_deleted_from_hot_at_any_step_are_found(step: int) -> None:
    """Commit and retention together, at any one moment of a query, neither hide nor double a row."""
    pipeline = filled()
    calls = iter(range(100))

    def between() -> None:
        if next(calls) == step:
            pipeline.offload()
            pipeline.retain()

    found = pipeline.engine(between).answer(asked(None, 0)).rows.to_pylist()

    assert found == in_order(pipeline.rows)


@given(before=MOVES, during=st.lists(st.one_of(INGEST, MOVE), max_size=40))
def test_rows_that_arrive_meanwhile_neither_hide_nor_double_others(before: list[Any], during: list[Any]) -> None:
    """Whatever was there when the query began comes exactly once; newer rows come at most once."""
    pipeline = Pipeline()
    run(pipeline, before)
    known = in_order(pipeline.rows)

    found = pipeline.engine(stepper(pipeline, during)).answer(asked(None, 0)).rows.to_pylist()

    assert [row for row in found if row in known] == known
    assert len({(row["log_partition"], row["log_offset"], row["row_in_frame"]) for row in found}) == len(found)


@given(before=MOVES, during=MID_QUERY)
def test_hot_alone_gives_what_it_keeps_and_the_tail(before: list[Any], during: list[Any]) -> None:
    """Without retention the hot tier and the tail hold everything, each row once."""
    pipeline = Pipeline()
    run(pipeline, [move for move in before if move != ("retain",)])
    kept = [move for move in during if move != ("retain",)]

    found = pipeline.engine(stepper(pipeline, kept)).answer(asked(None, 0, tier="hot")).rows.to_pylist()

    assert found == in_order(pipeline.rows)


@given(before=MOVES, seen_before=st.integers(1_000, 1_010))
def test_as_of_a_time_gives_what_the_log_held_then(before: list[Any], seen_before: int) -> None:
    """Knowledge time cuts the union by when the log had a row."""
    pipeline = Pipeline()
    run(pipeline, before)
    question = ask("trades", as_of="2024-08-08")
    question = type(question)(**{**vars(question), "logged_before_ns": seen_before})

    found = pipeline.engine().answer(question).rows.to_pylist()

    assert found == in_order([row for row in pipeline.rows if row["logged_ns"] < seen_before])


@given(before=MOVES, size=st.integers(1, 5), end=st.none() | st.just(DAY_NS))
def test_pages_put_together_are_the_whole(before: list[Any], size: int, end: int | None) -> None:
    """Following the cursors loses and repeats no row, also among rows of one nanosecond."""
    pipeline = Pipeline()
    run(pipeline, before)
    engine = pipeline.engine()
    pages: list[Row] = []
    cursor = None
    for _ in range(len(pipeline.rows) + 2):
        answer = engine.answer(ask("trades", start=0, end=end, limit=size, after=cursor))
        pages += answer.rows.to_pylist()
        cursor = answer.next_cursor
        if cursor is None:
            break

    assert cursor is None
    assert pages == in_order([row for row in pipeline.rows if end is None or row["exchange_ns"] < end])


def brute_force(rows: list[Row], timeframe: str) -> list[Row]:
    return [{name: row[name] for name in CANDLES.column_names} for row in make_candles(timeframe, rows)]


@given(before=MOVES, during=MID_QUERY, timeframe=st.sampled_from(["1m", "1h", "1d"]), limit=st.integers(0, 4))
def test_candles_count_each_trade_once_whatever_moves_meanwhile(
    before: list[Any], during: list[Any], timeframe: str, limit: int
) -> None:
    """Candles of hot and tail equal those counted trade by trade, also while a flush is half done."""
    pipeline = Pipeline()
    run(pipeline, before)
    engine = pipeline.engine(stepper(pipeline, during))

    found = engine.answer(ask("candles", timeframe=timeframe, limit=limit)).rows.to_pylist()

    assert found == brute_force(pipeline.rows, timeframe)[-limit if limit else 0 :]


@given(before=MOVES, start=st.sampled_from([0, 1, 60 * 10**9, DAY_NS]), end=st.sampled_from([DAY_NS, DAY_NS + 1]))
def test_candle_bounds_are_about_their_start(before: list[Any], start: int, end: int) -> None:
    """A candle belongs to a range when it starts in it, however its trades reached the tiers."""
    pipeline = Pipeline()
    run(pipeline, before)
    within = [row for row in brute_force(pipeline.rows, "5m") if start <= row["start_ns"] < end]

    live = pipeline.engine().answer(ask("candles", timeframe="5m", start=start, end=end)).rows.to_pylist()
    known = ask("candles", timeframe="5m", start=start, end=end, as_of="2024-08-08")
    counted = pipeline.engine().answer(known).rows.to_pylist()

    assert live == within
    assert counted == within


def filled(kinds: tuple[str, ...] = ("trade",)) -> Pipeline:
    """A pipeline with a handful of trades in every tier."""
    pipeline = Pipeline()
    for index in range(3):
        pipeline.ingest("kraken", [index * 10, index * 10 + 1])
        pipeline.flush_step()
        pipeline.flush_step()
        if index == 0:
            pipeline.offload()
    pipeline.ingest("kraken", [50])
    return pipeline


def test_snapshot_gives_the_same_rows_for_ever() -> None:
    """A snapshot id answers from cold as it was, whatever came later."""
    pipeline = filled()
    engine = pipeline.engine()
    snapshot_id = pipeline.cold.pin("trades").snapshot_id
    assert snapshot_id is not None
    before = engine.answer(ask("trades", as_of=snapshot_id)).rows
    pipeline.offload()

    after = engine.answer(ask("trades", as_of=snapshot_id))
    candles = engine.answer(ask("candles", timeframe="1m", as_of=snapshot_id)).rows.to_pylist()

    assert after.rows.equals(before)
    assert after.rows.num_rows == 2
    assert after.tiers == ("cold",)
    assert candles == brute_force(pipeline.rows[:2], "1m")


def test_unknown_snapshot_is_said() -> None:
    """An id no table has is refused, for rows and for candles."""
    engine = filled().engine()

    with pytest.raises(UnknownName):
        engine.answer(ask("trades", as_of=99))
    with pytest.raises(UnknownName):
        engine.answer(ask("candles", timeframe="1m", as_of=99))


def test_cold_candles_are_the_stored_ones_of_one_timeframe() -> None:
    """Tier cold gives closed candles as they were committed, cut after other timeframes were left out."""
    pipeline = filled()
    stored = pa.Table.from_pylist(
        [row for timeframe in ("1m", "5m") for row in brute_force(pipeline.rows, timeframe)],
        schema=arrow_schema(CANDLES),
    )
    pipeline.cold.append("candles", stored, start={}, end={"kraken": 3})

    rows = pipeline.engine().answer(ask("candles", timeframe="5m", tier="cold", limit=1)).rows.to_pylist()

    assert [row["timeframe"] for row in rows] == ["5m"]
    assert rows[0]["volume"] == brute_force(pipeline.rows, "5m")[0]["volume"]


def test_auto_prefers_single_trades_and_falls_back_to_aggregates() -> None:
    """Kinds are never mixed: aggregates are given only where a symbol has no single trades."""
    hot = MemoryHot()
    both = [
        trade("binance", 0, 0, 5),
        trade("binance", 1, 0, 6, kind="aggregate", first_id=1, last_id=9, off_market=False),
    ]
    only = [trade("kraken", 0, 0, 7, kind="aggregate", first_id=1, last_id=4)]
    hot.write("trades", table_of(both + only), "1")
    engine = Engine(hot, MemoryCold(), None, Settings())

    def kinds(**options: Any) -> list[tuple[str, str, int]]:
        rows = engine.answer(ask("candles", timeframe="1m", **options)).rows.to_pylist()
        return [(row["exchange"], row["kind"], row["trade_count"]) for row in rows]

    assert kinds() == [("binance", "trade", 1), ("kraken", "aggregate", 4)]
    assert kinds(as_of="2024-08-08") == kinds()
    assert kinds(kind="aggregate") == [("binance", "aggregate", 9), ("kraken", "aggregate", 4)]


def test_symbol_without_data_is_named_with_the_nearest() -> None:
    """An unknown symbol or exchange is an error; an empty time range of a known one is not."""
    engine = filled().engine()

    with pytest.raises(UnknownName, match="did you mean 'BTC-USD'"):
        engine.answer(ask("trades", "BTC-USDT"))
    with pytest.raises(UnknownName, match="did you mean 'kraken'"):
        engine.answer(ask("candles", "BTC-USD", timeframe="1m", exchange="kraken2"))
    assert engine.answer(ask("trades", "BTC-USD", start="2024-08-08")).rows.num_rows == 0


def test_without_a_hot_tier_cold_answers_and_says_so() -> None:
    """What cannot be answered for is said, and tier hot is refused."""
    engine = Engine(None, filled().cold, None, Settings())

    answer = engine.answer(ask("trades", "BTC-USD"))

    assert answer.rows.num_rows == 2
    assert "hot tier is not open" in answer.note
    with pytest.raises(StoreDown, match="hot tier is not open"):
        engine.answer(ask("trades", "BTC-USD", tier="hot"))


def test_waiting_for_a_slot_ends_at_the_deadline() -> None:
    """A query that gets no slot in its time says that all were taken."""
    pipeline = filled()
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        inside.set()
        leave.wait(30)

    parts = (Between(part, hold) for part in (pipeline.hot, pipeline.cold, pipeline.tail))
    engine = Engine(*parts, Settings(query=QuerySettings(concurrent=1)))  # type: ignore[arg-type]
    holder = threading.Thread(target=lambda: engine.answer(ask("trades")))
    holder.start()
    try:
        assert inside.wait(30)
        with pytest.raises(TimedOut, match="slots were taken"):
            engine.answer(ask("trades"), engine.deadline(0.01))
    finally:
        leave.set()
        holder.join()


def test_cancelled_query_ends_at_its_next_step() -> None:
    """Who gives a query up does not wait for its remaining steps."""
    pipeline = filled()
    deadline = Deadline(30)
    engine = pipeline.engine(deadline.cancel)

    with pytest.raises(TimedOut, match="given up"):
        engine.answer(ask("trades"), deadline)


def test_time_limit_of_a_question_is_never_longer_than_the_setting() -> None:
    """Callers may shorten the time limit, not extend it."""
    engine = Engine(None, MemoryCold(), None, Settings(query=QuerySettings(timeout_seconds=2)))

    assert engine.deadline(100).seconds == 2
    assert engine.deadline(1).seconds == 1


def test_sql_runs_on_one_tier() -> None:
    """Cold SQL sees the committed rows; an unknown tier is refused."""
    engine = filled().engine()

    assert engine.sql("SELECT count(*) AS n FROM trades", tier="cold").to_pylist() == [{"n": 2}]
    with pytest.raises(UnknownName, match="one tier"):
        engine.sql("SELECT 1", tier="all")
    with pytest.raises(Rejected):
        engine.sql("DROP TABLE trades", tier="cold")


def test_symbols_are_those_of_any_tier() -> None:
    """A symbol is listed as soon as a row of it is in the tail."""
    pipeline = Pipeline()
    assert pipeline.engine().symbols() == []
    pipeline.ingest("kraken", [1])

    assert pipeline.engine().symbols() == [("kraken", "BTC-USD")]


class Counting(MemoryCold):
    """Counts the questions in SQL."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def sql(self, query: str, *, timeout_seconds: float, limit: int) -> pa.Table:
        self.asked += 1
        return super().sql(query, timeout_seconds=timeout_seconds, limit=limit)


def test_names_in_cold_are_read_once_per_snapshot() -> None:
    """Empty answers and lists of symbols do not read all of cold again and again; a commit brings new names."""
    cold = Counting()
    cold.append("trades", table_of([trade("kraken", 0, 0, 1)]), start={}, end={"kraken": 1})
    engine = Engine(None, cold, None, Settings())
    for _ in range(3):
        assert engine.symbols() == [("kraken", "BTC-USD")]
        assert engine.answer(ask("trades", "BTC-USD", start="2024-08-08")).rows.num_rows == 0
        with pytest.raises(UnknownName):
            engine.answer(ask("trades", "ETH-USD"))
    assert cold.asked == 1

    cold.append(
        "trades", table_of([trade("kraken", 1, 0, 1, symbol="ETH-USD")]), start={"kraken": 1}, end={"kraken": 2}
    )
    assert engine.answer(ask("trades", "BTC-USD", start="2024-08-08")).rows.num_rows == 0
    assert cold.asked == 1
    assert engine.answer(ask("trades", "ETH-USD", start="2024-08-08")).rows.num_rows == 0
    assert cold.asked == 2
