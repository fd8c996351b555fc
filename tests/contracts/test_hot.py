"""Every promise of the hot port, on every adapter."""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from k2.errors import Rejected, TimedOut, UnknownName
from k2.hot import open_hot
from k2.hot.base import Hot
from k2.model import Selection
from k2.schema import CANDLES, HOT_ROW_TABLES, TIMEFRAMES, TRADES, arrow_schema
from k2.settings import HotSettings, Settings

sys.path.insert(0, str(Path(__file__).parents[1] / "hot"))
sys.path.insert(0, str(Path(__file__).parent))
from candle_limits import LIMITS
from hot_rows import DAY_NS, MAKERS, MINUTE_NS, START_NS, quote, table, trade

ALL_TRADES = Selection(table="trades")
ALL_CANDLES = Selection(table="candles")
BIG = 1_000_000


@pytest.fixture(params=["memory:", "chdb:", pytest.param("served", marks=pytest.mark.slow)])
def hot(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Hot]:
    """An empty hot tier: in memory, on chDB, and on chDB through the HTTP server of its owner."""
    url = "chdb:" if request.param == "served" else request.param
    chosen = Settings(data=str(tmp_path), hot=HotSettings(url=url, memory_bytes=1 << 30))
    owned = open_hot(chosen, "own")
    opened = open_hot(chosen, "borrow") if request.param == "served" else owned
    yield opened
    opened.close()
    owned.close()


@pytest.fixture
def chdb_hot(tmp_path: Path) -> Iterator[Hot]:
    """An empty hot tier on chDB."""
    opened = open_hot(Settings(data=str(tmp_path)), "own")
    yield opened
    opened.close()


def offsets(rows: pa.Table) -> list[int]:
    return list(rows["log_offset"].to_pylist())


def candles(hot: Hot, timeframe: str = "1m", **changes: Any) -> list[dict[str, Any]]:
    return list(hot.candles(timeframe, Selection(table="candles", **changes)).to_pylist())


@pytest.mark.parametrize("name", [t.name for t in HOT_ROW_TABLES])
def test_written_rows_come_back_equal_in_the_declared_types(hot: Hot, name: str) -> None:
    """Every table gives back just what was written: exact decimals, raw bytes, booleans, no nulls."""
    rows = table(name, [MAKERS[name](offset) for offset in range(3)])
    hot.write(name, rows, "t")

    read = hot.read(Selection(table=name))
    assert read.schema.equals(rows.schema)
    assert read.to_pylist() == rows.to_pylist()
    assert hot.read_range(name, {}, {"binance": 3}).to_pylist() == rows.to_pylist()


def test_an_empty_tier_answers_with_empty_tables_of_the_right_types(hot: Hot) -> None:
    """No rows still have a schema."""
    assert hot.read(ALL_TRADES).schema.equals(arrow_schema(TRADES))
    assert hot.read_range("trades", {}, {"binance": BIG}).num_rows == 0
    keys = ["open_key", "close_key", "quote_exact", "last_offset"]
    assert hot.candles("1d", ALL_CANDLES).schema.names == [*arrow_schema(CANDLES).names, *keys]
    assert hot.closed_candles({}, {}, 0, START_NS).schema.equals(arrow_schema(CANDLES))
    assert hot.counts("trades", {}, {"binance": BIG}) == 0
    assert hot.symbols() == []


def test_writing_no_rows_changes_nothing(hot: Hot) -> None:
    """An empty flush is allowed."""
    hot.write("trades", table("trades", []), "t")

    assert hot.read(ALL_TRADES).num_rows == 0


def test_decimals_keep_every_digit(hot: Hot) -> None:
    """The smallest and largest prices, and amounts with 12 decimals, survive and multiply exactly."""
    tiny, large = Decimal("0.000000000001"), Decimal("98765432109876.123456789012")
    rows = [trade(0, price=tiny, amount=large), trade(1, price=large, amount=tiny)]
    hot.write("trades", table("trades", rows), "t")

    assert hot.read(ALL_TRADES)["price"].to_pylist() == [tiny, large]
    exact = 2 * (98765432109876123456789012 * 1)  # in units of 10^-24
    assert candles(hot)[0]["quote_volume"] == Decimal(exact // 10**6).scaleb(-18)


def test_the_same_token_stores_rows_once(hot: Hot) -> None:
    """A write sent again changes neither rows nor candles; another token adds."""
    rows = table("trades", [trade(offset) for offset in range(10)])
    for _ in range(3):
        hot.write("trades", rows, "a")
    once = candles(hot)
    hot.write("trades", rows, "b")

    assert once[0]["trade_count"] == 10
    assert hot.counts("trades", {}, {"binance": BIG}) == 20
    assert candles(hot)[0]["trade_count"] == 20


def test_a_token_is_a_table_s_own(hot: Hot) -> None:
    """One flush writes several tables under the same token."""
    hot.write("trades", table("trades", [trade(0)]), "flush-1")
    hot.write("quotes", table("quotes", [quote(0)]), "flush-1")

    assert hot.counts("quotes", {}, {"binance": BIG}) == 1


def test_rows_of_many_days_under_one_token_are_stored_once(hot: Hot) -> None:
    """A late trade shares a write with today's."""
    rows = table("trades", [trade(n, exchange_ns=START_NS - n * DAY_NS) for n in range(5)])
    hot.write("trades", rows, "t")
    hot.write("trades", rows, "t")

    assert hot.counts("trades", {}, {"binance": BIG}) == 5
    assert [c["trade_count"] for c in candles(hot, "1d")] == [1] * 5


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda rows: rows.drop_columns(["price"]), id="a column is missing"),
        pytest.param(lambda rows: rows.append_column("more", pa.array([1] * rows.num_rows)), id="a column too many"),
        pytest.param(
            lambda rows: rows.set_column(6, "price", rows["price"].cast(pa.float64())), id="a price is a float"
        ),
        pytest.param(
            lambda rows: rows.set_column(8, pa.field("side", pa.string()), pa.nulls(rows.num_rows, pa.string())),
            id="a side is null",
        ),
    ],
)
def test_rows_of_another_shape_are_rejected_whole(hot: Hot, spoil: Any) -> None:
    """What does not fit the schema is refused before anything is stored."""
    with pytest.raises(Rejected, match="trades"):
        hot.write("trades", spoil(table("trades", [trade(0)])), "t")

    assert hot.read(ALL_TRADES).num_rows == 0


def test_an_unknown_table_is_refused_with_the_nearest_name(hot: Hot) -> None:
    """`frames` is cold's; `trade` is a slip."""
    with pytest.raises(UnknownName, match="frames"):
        hot.read(Selection(table="frames"))
    with pytest.raises(UnknownName, match="did you mean 'trades'"):
        hot.write("trade", table("trades", []), "t")
    with pytest.raises(UnknownName, match="2m"):
        hot.candles("2m", ALL_CANDLES)


def test_reading_selects_by_exchange_symbol_time_and_knowledge(hot: Hot) -> None:
    """Starts are inclusive, ends exclusive."""
    rows = [trade(n) for n in range(6)] + [
        trade(6, symbol="ETH-USDT", exchange_ns=START_NS),
        trade(7, exchange="kraken", exchange_ns=START_NS),
    ]
    hot.write("trades", table("trades", rows), "t")

    def read(**by: Any) -> list[int]:
        return offsets(hot.read(Selection(table="trades", **by)))

    assert read(symbol="ETH-USDT") == [6]
    assert read(exchange="kraken") == [7]
    assert read(exchange="kraken", symbol="ETH-USDT") == []
    between = {"start_ns": rows[1]["exchange_ns"], "end_ns": rows[4]["exchange_ns"]}
    assert read(exchange="binance", symbol="BTC-USDT", **between) == [1, 2, 3]
    assert read(exchange="binance", symbol="BTC-USDT", logged_before_ns=rows[2]["logged_ns"]) == [0, 1]


def test_a_selection_is_never_taken_for_sql(hot: Hot) -> None:
    """Quotes, backslashes and braces in a name are just characters."""
    hot.write("trades", table("trades", [trade(0), trade(1, symbol="a'b\\c{x:String}\t")]), "t")

    assert offsets(hot.read(Selection(table="trades", symbol="a'b\\c{x:String}\t"))) == [1]
    assert hot.read(Selection(table="trades", symbol="' OR 1=1 --")).num_rows == 0


def test_a_table_without_symbols_refuses_one(hot: Hot) -> None:
    """Dead letters belong to an exchange only."""
    with pytest.raises(Rejected, match="symbol"):
        hot.read(Selection(table="dead_letters", symbol="BTC-USDT"))


def test_rows_come_sorted_by_time_then_the_rest_of_the_sort_order(hot: Hot) -> None:
    """Two exchanges are interleaved by time; equal times fall back to exchange, symbol, id."""
    rows = [
        trade(0, exchange="kraken", exchange_ns=START_NS + 1),
        trade(1, exchange="binance", exchange_ns=START_NS + 2),
        trade(2, exchange="kraken", exchange_ns=START_NS),
        trade(3, exchange="binance", exchange_ns=START_NS, trade_id=9),
        trade(4, exchange="binance", exchange_ns=START_NS, trade_id=8),
    ]
    hot.write("trades", table("trades", rows), "t")

    assert offsets(hot.read(ALL_TRADES)) == [4, 3, 2, 0, 1]
    assert offsets(hot.read_range("trades", {}, {"binance": BIG})) == [4, 3, 1, 2, 0]


def test_rows_with_names_as_dictionaries_are_the_same_in_the_same_order(hot: Hot) -> None:
    """Of several writes that overlap in time, over two days and exchanges; cut by offsets and time, too."""
    for first in (6, 0, 3):
        rows = [
            trade(offset + 20 * which, exchange=exchange, log_partition=exchange, exchange_ns=START_NS + ns)
            for which, exchange in enumerate(("kraken", "binance"))
            for offset, ns in ((first, DAY_NS), (first + 1, 5), (first + 2, first))
        ]
        hot.write("trades", table("trades", rows), f"t{first}")

    for changes in ({}, {"exchange": "kraken"}, {"start_ns": START_NS + 4, "end_ns": START_NS + DAY_NS}):
        asked = Selection(table="trades", symbol="BTC-USDT", **changes)
        for bounds in ({}, {"start": {"kraken": 2}, "end": {"binance": 26, "kraken": 8}}):
            plain = hot.read(asked, **bounds)
            assert plain.num_rows >= 2
            assert hot.read(asked, **bounds, coded=True).cast(plain.schema).equals(plain)
    assert hot.read(Selection(table="trades", symbol="none"), coded=True).num_rows == 0


def test_a_limit_takes_the_first_rows_or_with_newest_the_last(hot: Hot) -> None:
    """Either way they come back oldest first."""
    hot.write("trades", table("trades", [trade(n) for n in range(10)]), "t")

    for where in ({}, {"exchange": "binance", "symbol": "BTC-USDT"}):
        assert offsets(hot.read(Selection(table="trades", limit=3, **where))) == [0, 1, 2]
        assert offsets(hot.read(Selection(table="trades", limit=3, newest=True, **where))) == [7, 8, 9]
        assert offsets(hot.read(Selection(table="trades", newest=True, **where))) == list(range(10))


def test_reading_cuts_by_log_offset(hot: Hot) -> None:
    """A partition that is not named counts from 0 and has no end."""
    rows = [trade(n) for n in range(4)] + [
        trade(n, exchange="kraken", log_partition="kraken", exchange_ns=START_NS + DAY_NS) for n in range(4)
    ]
    hot.write("trades", table("trades", rows), "t")

    def cut(start: dict[str, int] | None, end: dict[str, int] | None) -> list[int]:
        return offsets(hot.read(ALL_TRADES, start=start, end=end))

    assert cut({"binance": 2}, None) == [2, 3, 0, 1, 2, 3]
    assert cut(None, {"kraken": 1}) == [0, 1, 2, 3, 0]
    assert cut({"binance": 1, "kraken": 3}, {"binance": 2, "kraken": 3}) == [1]
    assert cut({}, {}) == [0, 1, 2, 3, 0, 1, 2, 3]


def test_a_range_holds_only_the_partitions_of_its_end(hot: Hot) -> None:
    """Offload asks for what lies between its watermark and ingest's progress."""
    rows = [trade(n) for n in range(4)] + [trade(n, exchange="kraken", log_partition="kraken") for n in range(4)]
    hot.write("trades", table("trades", rows), "t")

    assert offsets(hot.read_range("trades", {"binance": 1}, {"binance": 3})) == [1, 2]
    assert hot.counts("trades", {"binance": 1, "kraken": 3}, {"binance": 3, "kraken": 4}) == 3
    assert hot.read_range("trades", {"binance": 1}, {}).num_rows == 0


def test_candles_hold_first_highest_lowest_last_and_exact_sums(hot: Hot) -> None:
    """One minute of four trades, written late and out of order."""
    rows = [
        trade(3, trade_id=4, exchange_ns=START_NS + 30, price=Decimal("7"), amount=Decimal("0.1"), side="sell"),
        trade(1, trade_id=2, exchange_ns=START_NS + 10, price=Decimal("11"), amount=Decimal("0.2")),
        trade(2, trade_id=3, exchange_ns=START_NS + 20, price=Decimal("5"), amount=Decimal("0.3"), side="sell"),
        trade(0, trade_id=1, exchange_ns=START_NS + 10, price=Decimal("10"), amount=Decimal("0.3")),
    ]
    for number, row in enumerate(rows):
        hot.write("trades", table("trades", [row]), f"t{number}")

    assert candles(hot) == [
        {
            "exchange": "binance",
            "symbol": "BTC-USDT",
            "kind": "trade",
            "timeframe": "1m",
            "start_ns": START_NS,
            "open": Decimal("10"),
            "high": Decimal("11"),
            "low": Decimal("5"),
            "close": Decimal("7"),
            "volume": Decimal("0.9"),
            "quote_volume": Decimal("7.4"),
            "buy_volume": Decimal("0.5"),
            "vwap": Decimal("8.222222222222222222"),
            "trade_count": 4,
            "revision": 0,
            "open_key": Decimal((START_NS + 10) * 2**63 + 1),
            "close_key": Decimal((START_NS + 30) * 2**63 + 4),
            "quote_exact": Decimal("7.4"),
            "last_offset": 3,
        }
    ]


@pytest.mark.parametrize("case", LIMITS)
def test_sums_neither_raise_nor_wrap(hot: Hot, case: str) -> None:
    """What is too large becomes the largest number; candles beside it are as they should be, also for cold."""
    limit = LIMITS[case]
    rows = [trade(n, exchange_ns=START_NS, **limit.trade) for n in range(limit.count)]
    hot.write("trades", table("trades", [*rows, trade(2_000, symbol="ETH-USDT", exchange_ns=START_NS)]), "t")

    for timeframe in ("1m", "1d"):
        found, beside = candles(hot, timeframe)
        assert {name: found[name] for name in limit.candle} == limit.candle
        assert beside["trade_count"] == 1
    closed = hot.closed_candles({}, {"binance": BIG}, 0, START_NS + 2 * DAY_NS).to_pylist()
    assert [{name: row[name] for name in limit.candle} for row in closed if row["symbol"] == "BTC-USDT"] == [
        limit.candle
    ] * len(TIMEFRAMES)


def test_trades_without_ids_are_ordered_by_their_place_in_the_log(hot: Hot) -> None:
    """Same time, no id: the later frame closes, and within a frame the later row."""
    same = {"trade_id": 0, "exchange_ns": START_NS}
    rows = [
        trade(7, row_in_frame=1, price=Decimal("3"), **same),
        trade(7, row_in_frame=0, price=Decimal("2"), **same),
        trade(6, row_in_frame=5, price=Decimal("1"), **same),
    ]
    hot.write("trades", table("trades", rows), "t")

    candle = candles(hot)[0]
    assert (candle["open"], candle["close"], candle["trade_count"]) == (Decimal("1"), Decimal("3"), 3)
    assert candle["close_key"] == Decimal(START_NS * 2**63 + 7 * 2**16 + 1)


def test_aggregates_and_single_trades_make_candles_apart(hot: Hot) -> None:
    """An aggregate counts the trades it covers; kinds are never added up."""
    rows = [trade(0), trade(1, kind="aggregate", trade_id=5, first_id=100, last_id=104)]
    hot.write("trades", table("trades", rows), "t")

    assert [(c["kind"], c["trade_count"]) for c in candles(hot)] == [("aggregate", 5), ("trade", 1)]
    only = hot.candles("1m", ALL_CANDLES, kind="trade").to_pylist()
    assert [c["kind"] for c in only] == ["trade"]


def test_off_market_trades_are_rows_but_in_no_candle(hot: Hot) -> None:
    """As the exchange leaves them out of its own."""
    hot.write("trades", table("trades", [trade(0, off_market=True, price=Decimal("1"))]), "t1")
    hot.write("trades", table("trades", [trade(1), trade(2, off_market=True)]), "t2")

    assert hot.counts("trades", {}, {"binance": BIG}) == 3
    assert [(c["trade_count"], c["low"]) for c in candles(hot)] == [(1, Decimal("61000.12"))]


@pytest.mark.parametrize("timeframe", TIMEFRAMES)
def test_every_timeframe_adds_up_its_trades(hot: Hot, timeframe: str) -> None:
    """Trades at the first and last nanosecond of two buckets."""
    length = TIMEFRAMES[timeframe]
    times = [START_NS, START_NS + length - 1, START_NS + length, START_NS + 2 * length - 1]
    rows = [trade(n, exchange_ns=time, price=Decimal(n + 1)) for n, time in enumerate(times)]
    hot.write("trades", table("trades", rows), "t")

    made = candles(hot, timeframe)
    assert [(c["timeframe"], c["start_ns"]) for c in made] == [(timeframe, START_NS), (timeframe, START_NS + length)]
    assert [(c["open"], c["close"], c["trade_count"]) for c in made] == [(1, 2, 2), (3, 4, 2)]


def test_candles_are_selected_by_their_start_and_limited_like_rows(hot: Hot) -> None:
    """A minute a trade, two symbols; the newest come back oldest first."""
    rows = [
        trade(2 * n + s, symbol=symbol, exchange_ns=START_NS + n * MINUTE_NS)
        for n in range(5)
        for s, symbol in enumerate(("BTC-USDT", "ETH-USDT"))
    ]
    hot.write("trades", table("trades", rows), "t")

    def minutes(**by: Any) -> list[tuple[int, str]]:
        return [((c["start_ns"] - START_NS) // MINUTE_NS, c["symbol"][:3]) for c in candles(hot, **by)]

    assert minutes(start_ns=START_NS + MINUTE_NS, end_ns=START_NS + 2 * MINUTE_NS) == [(1, "BTC"), (1, "ETH")]
    assert minutes(symbol="ETH-USDT", limit=2) == [(0, "ETH"), (1, "ETH")]
    assert minutes(symbol="ETH-USDT", limit=2, newest=True) == [(3, "ETH"), (4, "ETH")]
    assert minutes(limit=3) == [(0, "BTC"), (0, "ETH"), (1, "BTC")]
    assert minutes(limit=3, newest=True) == [(3, "ETH"), (4, "BTC"), (4, "ETH")]
    assert minutes(exchange="kraken") == []


def test_candles_by_knowledge_time_are_refused(hot: Hot) -> None:
    """States do not remember when they were known."""
    with pytest.raises(Rejected, match="knowledge time"):
        hot.candles("1m", Selection(table="candles", logged_before_ns=START_NS))


def test_closed_candles_are_those_newly_closed_and_those_touched_again(hot: Hot) -> None:
    """A bucket is closed when it ends at or before the bound; a late trade brings an old one back."""
    rows = [trade(n, exchange_ns=START_NS + n * MINUTE_NS) for n in range(4)]
    hot.write("trades", table("trades", rows), "t1")
    late = trade(4, trade_id=50, exchange_ns=START_NS + 1, off_market=False)
    hidden = trade(5, trade_id=51, exchange_ns=START_NS + MINUTE_NS, off_market=True)
    hot.write("trades", table("trades", [late, hidden]), "t2")

    def closed(start: int, end: int, after: int, before: int) -> list[tuple[str, int, int]]:
        found = hot.closed_candles(
            {"binance": start}, {"binance": end}, START_NS + after * MINUTE_NS, START_NS + before * MINUTE_NS
        )
        return [(c["timeframe"], (c["start_ns"] - START_NS) // MINUTE_NS, c["trade_count"]) for c in found.to_pylist()]

    assert closed(0, 0, 0, 2) == [("1m", 0, 2), ("1m", 1, 1)]
    assert closed(0, 0, 1, 2) == [("1m", 1, 1)]
    assert closed(4, 6, 2, 3) == [("1m", 0, 2), ("1m", 2, 1)]
    assert closed(4, 6, 5, 5) == [("1m", 0, 2), ("5m", 0, 5)]
    assert closed(4, 6, 5, 4) == [("1m", 0, 2)]


def test_deleting_takes_only_old_rows_below_the_offsets_and_leaves_candles(hot: Hot) -> None:
    """Both bounds are exclusive; the time is that of logging; a partition that is not named keeps everything."""
    rows = [trade(n, exchange_ns=START_NS - n * DAY_NS, logged_ns=START_NS + n * DAY_NS // 4) for n in range(8)]
    other = [trade(n, exchange="kraken", log_partition="kraken") for n in range(2)]
    hot.write("trades", table("trades", rows + other), "t")
    hot.write("quotes", table("quotes", [quote(n) for n in range(3)]), "t")
    before = candles(hot, "1d")

    assert hot.delete({"binance": 6}, START_NS + DAY_NS + 1) == {
        "trades": 5,
        "quotes": 3,
        "gaps": 0,
        "dead_letters": 0,
    }
    assert offsets(hot.read_range("trades", {}, {"binance": BIG})) == [7, 6, 5]
    assert hot.counts("trades", {}, {"kraken": BIG}) == 2
    assert candles(hot, "1d") == before
    assert hot.delete({"binance": 6}, START_NS + DAY_NS + 1)["trades"] == 0


def test_a_token_is_remembered_when_its_rows_are_deleted(hot: Hot) -> None:
    """A flush sent again after retention does not come back."""
    rows = table("trades", [trade(0)])
    hot.write("trades", rows, "t")
    hot.delete({"binance": 1}, START_NS + DAY_NS)
    hot.write("trades", rows, "t")

    assert hot.counts("trades", {}, {"binance": BIG}) == 0
    assert candles(hot)[0]["trade_count"] == 1


def test_symbols_have_candles_or_quotes(hot: Hot) -> None:
    """Sorted pairs, each once, also when the rows are long deleted."""
    hot.write("trades", table("trades", [trade(0, exchange="kraken"), trade(1, symbol="ETH-USDT")]), "t")
    for token in ("t1", "t2"):
        hot.write("quotes", table("quotes", [quote(0, symbol="DOGE-USD"), quote(1, symbol="DOGE-USD")]), token)
    hot.delete({"binance": 2}, START_NS + DAY_NS)

    assert hot.counts("quotes", {}, {"binance": BIG}) == 0
    assert hot.symbols() == [("binance", "DOGE-USD"), ("binance", "ETH-USDT"), ("kraken", "BTC-USDT")]


def test_statistics_count_rows_of_every_table(hot: Hot) -> None:
    """Rows, bytes and parts, also of empty tables."""
    hot.write("trades", table("trades", [trade(n) for n in range(3)]), "t")

    statistics = hot.statistics()
    assert statistics["trades"]["rows"] == 3
    assert statistics["gaps"] == {"rows": 0, "bytes": 0, "parts": 0}


def test_a_reset_forgets_rows_candles_names_and_tokens(hot: Hot) -> None:
    """What was written before is gone, and may be written again under the same token."""
    rows, quoted = table("trades", [trade(0)]), table("quotes", [quote(0, symbol="DOGE-USD")])
    for _ in range(2):
        hot.write("trades", rows, "t")
        hot.write("quotes", quoted, "t")
        assert hot.symbols() == [("binance", "BTC-USDT"), ("binance", "DOGE-USD")]
        assert candles(hot)[0]["trade_count"] == 1
        hot.reset()

    assert hot.symbols() == []
    assert hot.counts("trades", {}, {"binance": BIG}) == 0
    assert candles(hot) == []


def test_sql_reads_the_tables(hot: Hot) -> None:
    """A SELECT with a WITH, a function and a limit; the memory adapter says that it has no SQL."""
    hot.write("trades", table("trades", [trade(n) for n in range(5)]), "t")
    query = "WITH t AS (SELECT log_offset AS n FROM trades) SELECT n, n * 2 AS twice FROM t ORDER BY n DESC -- all"

    if type(hot).__name__ == "MemoryHot":
        with pytest.raises(Rejected, match="no SQL"):
            hot.sql(query, timeout_seconds=5, limit=2)
        return
    assert hot.sql(query, timeout_seconds=5, limit=2).to_pylist() == [{"n": 4, "twice": 8}, {"n": 3, "twice": 6}]


def test_a_query_is_interrupted_at_its_limit(hot: Hot) -> None:
    """An endless question ends with TimedOut, and the next one is answered rightly."""
    if type(hot).__name__ == "MemoryHot":
        pytest.skip("the memory adapter has no SQL to be slow with")
    with pytest.raises(TimedOut, match=r"0\.3 s"):
        hot.sql("SELECT count() FROM numbers(1000000000000)", timeout_seconds=0.3, limit=1)

    assert hot.sql("SELECT 7 AS seven", timeout_seconds=5, limit=1).to_pylist() == [{"seven": 7}]


_EXAMPLES = itertools.count()
_PRICES = st.integers(1, 10**14).map(lambda n: Decimal(n).scaleb(-12))


@st.composite
def _trades(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Trades of a few symbols over two days, some without id, aggregates, off the market, at equal times."""
    made = []
    for offset in range(draw(st.integers(1, 25))):
        kind = draw(st.sampled_from(["trade", "trade", "aggregate"]))
        trade_id = draw(st.sampled_from([0, offset + 1]))
        covered = draw(st.integers(0, 9)) if kind == "aggregate" else 0
        made.append(
            trade(
                offset,
                symbol=draw(st.sampled_from(["BTC-USDT", "ETH-USDT"])),
                trade_id=trade_id,
                kind=kind,
                first_id=trade_id,
                last_id=trade_id + covered,
                price=draw(_PRICES),
                amount=draw(_PRICES),
                side=draw(st.sampled_from(["buy", "sell"])),
                off_market=draw(st.sampled_from([False, False, False, True])),
                exchange_ns=START_NS + draw(st.integers(0, 2_000)) * (DAY_NS // 1_000),
            )
        )
    return made


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(rows=_trades(), seed=st.integers(0, 10**6))
def test_any_split_in_any_order_makes_the_candles_of_brute_force(
    chdb_hot: Hot, rows: list[dict[str, Any]], seed: int
) -> None:
    """However trades are cut into writes, mixed, and repeated, all six timeframes equal MemoryHot's."""
    shuffled = random.Random(seed)
    name = f"run-{next(_EXAMPLES)}"
    rows = [{**row, "exchange": name} for row in rows]  # the folder is kept from one example to the next
    oracle = open_hot(Settings(hot=HotSettings(url="memory:")), "own")
    oracle.write("trades", table("trades", rows), "all")
    shuffled.shuffle(rows)
    while rows:
        size = shuffled.randint(1, len(rows))
        part, rows = table("trades", rows[:size]), rows[size:]
        for _ in range(shuffled.choice([1, 1, 2])):
            chdb_hot.write("trades", part, f"{name}:{len(rows)}")

    for timeframe in TIMEFRAMES:
        wanted = Selection(table="candles", exchange=name)
        assert chdb_hot.candles(timeframe, wanted).equals(oracle.candles(timeframe, wanted))
