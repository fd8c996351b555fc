"""Every promise of the cold port, on every adapter."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from decimal import ROUND_DOWN, Decimal, localcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from k2.candles import PARTIAL_SCHEMA
from k2.cold.base import Cold
from k2.cold.iceberg import IcebergCold
from k2.cold.memory import MemoryCold
from k2.errors import NotSuccessor, Rejected, TimedOut, UnknownName
from k2.model import Selection
from k2.schema import CANDLES, QUOTES, TABLES, TRADES, arrow_schema
from k2.settings import Settings

sys.path.insert(0, str(Path(__file__).parent))
from candle_limits import LIMITS

T0 = 1_700_000_040 * 10**9  # the start of a minute
MINUTE = 60 * 10**9
ALL_TRADES = Selection(table="trades")


@pytest.fixture(params=["memory", "iceberg"])
def cold(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cold]:
    """An empty cold tier."""
    made: Cold = MemoryCold() if request.param == "memory" else IcebergCold(Settings(data=str(tmp_path)))
    yield made
    made.close()


def trade(offset: int, **values: Any) -> dict[str, Any]:
    """One trade row; trade number `offset` + 1 of BTC-USDT on binance, one a second."""
    row = {
        "exchange": "binance",
        "symbol": "BTC-USDT",
        "trade_id": offset + 1,
        "kind": "trade",
        "price": Decimal("100.5"),
        "amount": Decimal("0.25"),
        "side": "buy",
        "off_market": False,
        "occurrence": 0,
        "exchange_ns": T0 + offset * 10**9,
        "received_ns": T0 + offset * 10**9 + 5,
        "source": "live",
        "log_partition": values.get("exchange", "binance"),
        "log_offset": offset,
        "row_in_frame": 0,
        "logged_ns": T0 + offset * 10**9 + 9,
    }
    row.update(values)
    return {"first_id": row["trade_id"], "last_id": row["trade_id"], **row}


def table(rows: list[dict[str, Any]], declared: Any = TRADES) -> pa.Table:
    """Rows as Arrow."""
    return pa.Table.from_pylist(rows, schema=arrow_schema(declared))


def trades(start: int, end: int) -> pa.Table:
    """Trades of offsets start to end."""
    return table([trade(o) for o in range(start, end)])


def candle(start_ns: int, close: str) -> dict[str, Any]:
    """One cold candle row."""
    number = Decimal(close)
    numbers = dict.fromkeys(
        ("open", "high", "low", "close", "volume", "quote_volume", "buy_volume", "vwap"),
        number,
    )
    names = {"exchange": "binance", "symbol": "BTC-USDT", "kind": "trade", "timeframe": "1m"}
    return {**names, "start_ns": start_ns, **numbers, "trade_count": 3, "revision": 0}


# -- progress --------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(TABLES))
def test_pin_of_a_table_without_commits_is_empty(cold: Cold, name: str) -> None:
    """Before the first commit there is a pin: no file, no snapshot, no watermark, no rows."""
    pin = cold.pin(name)

    assert (pin.location, pin.snapshot_id, dict(pin.watermark)) == ("", None, {})
    assert cold.read(pin, Selection(table=name)).equals(arrow_schema(TABLES[name]).empty_table())
    assert cold.properties(name) == {}


def test_append_commits_rows_and_progress_together(cold: Cold) -> None:
    """After an append the pin has the watermark, and reading it gives the rows as they were."""
    rows = trades(0, 5)
    pin = cold.append("trades", rows, start={"binance": 0}, end={"binance": 7})

    assert dict(pin.watermark) == {"binance": 7}
    assert pin == cold.pin("trades")
    assert cold.read(pin, ALL_TRADES).equals(rows)


def test_partitions_not_named_keep_their_watermark(cold: Cold) -> None:
    """A commit of one partition leaves the progress of the others."""
    cold.append("trades", trades(0, 1), start={}, end={"binance": 4, "kraken": 2})
    pin = cold.append("trades", table([trade(2, exchange="kraken")]), start={"kraken": 2}, end={"kraken": 9})

    assert dict(pin.watermark) == {"binance": 4, "kraken": 9}


@pytest.mark.parametrize("start", [{}, {"binance": 4}, {"binance": 6}, {"binance": 5, "kraken": 1}])
def test_append_refuses_what_is_no_successor(cold: Cold, start: dict[str, int]) -> None:
    """A range that does not start at the watermark is refused, and nothing of it is stored."""
    before = cold.append("trades", trades(0, 5), start={}, end={"binance": 5})

    with pytest.raises(NotSuccessor, match="is committed"):
        cold.append("trades", trades(5, 6), start=start, end={"binance": 9, **start})
    assert cold.pin("trades") == before
    assert cold.read(before, ALL_TRADES).num_rows == 5


@pytest.mark.parametrize("rows", [[trade(4)], [trade(9)], [trade(6, exchange="kraken")]])
def test_append_refuses_rows_outside_the_range(cold: Cold, rows: list[dict[str, Any]]) -> None:
    """A row that the committed range does not cover would be doubled or lost later."""
    cold.append("trades", trades(0, 5), start={}, end={"binance": 5})

    with pytest.raises(Rejected, match="outside the range"):
        cold.append("trades", table(rows), start={"binance": 5}, end={"binance": 9})


def test_append_refuses_a_range_that_runs_backwards(cold: Cold) -> None:
    """An end before the start can never work."""
    cold.append("trades", trades(0, 5), start={}, end={"binance": 5})

    with pytest.raises(Rejected):
        cold.append("trades", trades(0, 0), start={"binance": 5}, end={"binance": 4})


def test_empty_append_moves_progress_only(cold: Cold) -> None:
    """Without rows the watermark moves, and the repeat is refused like any other."""
    cold.append("trades", trades(0, 2), start={}, end={"binance": 2})
    pin = cold.append("trades", trades(0, 0), start={"binance": 2}, end={"binance": 8})

    assert dict(pin.watermark) == {"binance": 8}
    assert cold.read(pin, ALL_TRADES).num_rows == 2
    assert len(cold.snapshots("trades")) == 1
    with pytest.raises(NotSuccessor):
        cold.append("trades", trades(0, 0), start={"binance": 2}, end={"binance": 8})


def test_progress_before_any_row(cold: Cold) -> None:
    """The first commit may be without rows."""
    pin = cold.append("trades", trades(0, 0), start={}, end={"binance": 3})

    assert dict(pin.watermark) == {"binance": 3}
    assert cold.read(pin, ALL_TRADES).num_rows == 0
    assert cold.candles_from_trades(pin, "1m", Selection(table="candles")).schema == PARTIAL_SCHEMA


def test_properties_are_stored_with_the_commit(cold: Cold) -> None:
    """Properties given with a commit are read back, stay until given anew, and mix with no other table's."""
    cold.append("candles", table([], CANDLES), start={}, end={"binance": 1}, properties={"k2.closed_before_ns": "5"})
    cold.append("candles", table([], CANDLES), start={"binance": 1}, end={"binance": 2})

    assert cold.properties("candles") == {"k2.closed_before_ns": "5"}
    assert cold.properties("trades") == {}


def test_append_refuses_rows_that_do_not_fit(cold: Cold) -> None:
    """Missing columns, nulls and unknown tables are refused before anything is written."""
    with pytest.raises(Rejected, match="price"):
        cold.append("trades", trades(0, 2).drop_columns(["price"]), start={}, end={"binance": 2})
    nulls = trades(0, 2).set_column(6, "price", pa.array([None, None], pa.decimal128(38, 12)))
    with pytest.raises(Rejected, match="price"):
        cold.append("trades", nulls, start={}, end={"binance": 2})
    with pytest.raises(UnknownName, match="trades"):
        cold.append("trade", trades(0, 2), start={}, end={"binance": 2})
    assert cold.pin("trades").location == ""


# -- reading ---------------------------------------------------------------------------


def test_rows_come_back_by_time_whatever_order_they_came_in(cold: Cold) -> None:
    """Sorted by time, then the rest of the table's sort order, over several commits."""
    cold.append("trades", table([trade(3), trade(1)]), start={}, end={"binance": 4})
    cold.append(
        "trades",
        table([trade(0, exchange="kraken"), trade(1, exchange="kraken"), trade(2, exchange="kraken")]),
        start={},
        end={"kraken": 3},
    )
    read = cold.read(cold.pin("trades"), ALL_TRADES).select(["log_offset", "exchange"]).to_pylist()

    assert [(r["log_offset"], r["exchange"]) for r in read] == [
        (0, "kraken"),
        (1, "binance"),
        (1, "kraken"),
        (2, "kraken"),
        (3, "binance"),
    ]


@pytest.mark.parametrize(
    ("selection", "offsets"),
    [
        (Selection(table="trades", symbol="ETH-USDT"), [1, 3, 5, 7, 9]),
        (Selection(table="trades", exchange="kraken"), []),
        (Selection(table="trades", exchange="binance", limit=3), [0, 1, 2]),
        (Selection(table="trades", limit=3, newest=True), [7, 8, 9]),
        (Selection(table="trades", start_ns=T0 + 4 * 10**9), [4, 5, 6, 7, 8, 9]),
        (Selection(table="trades", start_ns=T0 + 4 * 10**9 + 1, end_ns=T0 + 6 * 10**9), [5]),
        (Selection(table="trades", end_ns=T0 + 2 * 10**9 + 1), [0, 1, 2]),
        (Selection(table="trades", logged_before_ns=T0 + 2 * 10**9 + 9), [0, 1]),
        (Selection(table="trades", symbol="ETH-USDT", limit=2, newest=True), [7, 9]),
    ],
)
def test_selection(cold: Cold, selection: Selection, offsets: list[int]) -> None:
    """Symbol, exchange, times (start inclusive, end exclusive), knowledge time and limits choose rows."""
    rows = [trade(o, symbol="ETH-USDT" if o % 2 else "BTC-USDT") for o in range(10)]
    pin = cold.append("trades", table(rows), start={}, end={"binance": 10})

    assert cold.read(pin, selection)["log_offset"].to_pylist() == offsets


def test_selection_of_a_column_the_table_has_not_is_refused(cold: Cold) -> None:
    """A symbol cannot be asked of frames; that is said, not ignored."""
    with pytest.raises(Rejected, match="symbol"):
        cold.read(cold.pin("frames"), Selection(table="frames", symbol="BTC-USDT"))


def test_odd_values_come_back_as_they_were(cold: Cold) -> None:
    """Quotes in texts, the widest decimals, times before 1970 and bytes are kept exactly."""
    widest = Decimal("9" * 26 + "." + "9" * 12)
    rows = table([trade(0, symbol="O'Brien\";--", price=widest, amount=Decimal("1e-12"), exchange_ns=-1)])
    cold.append("trades", rows, start={}, end={"binance": 1})
    frame = {
        "exchange": "kraken",
        "kind": "frame",
        "connection": "c",
        "epoch": 1,
        "counter": 2,
        "data": bytes(range(256)),
        "origin": "",
        "received_ns": T0,
        "source": "live",
        "log_partition": "kraken",
        "log_offset": 0,
        "row_in_frame": 0,
        "logged_ns": T0,
    }
    frames = table([frame], TABLES["frames"])
    cold.append("frames", frames, start={}, end={"kraken": 1})

    assert cold.read(cold.pin("trades"), Selection(table="trades", symbol="O'Brien\";--")).equals(rows)
    assert cold.read(cold.pin("frames"), Selection(table="frames")).equals(frames)


def test_a_pin_does_not_move(cold: Cold) -> None:
    """Reading an old pin gives the old rows after any later commits, its snapshot id too."""
    first = cold.append("trades", trades(0, 3), start={}, end={"binance": 3})
    for o in range(3, 18):
        cold.append("trades", trades(o, o + 1), start={"binance": o}, end={"binance": o + 1})

    assert first.snapshot_id is not None
    again = cold.pin("trades", snapshot_id=first.snapshot_id)
    assert cold.read(first, ALL_TRADES).num_rows == 3
    assert cold.read(again, ALL_TRADES).num_rows == 3
    assert dict(again.watermark) == {"binance": 3}
    assert again.committed_ns // 10**6 == first.committed_ns // 10**6


def test_pin_of_an_unknown_snapshot_is_refused(cold: Cold) -> None:
    """A snapshot that does not exist is named in the error."""
    with pytest.raises(UnknownName, match="12345"):
        cold.pin("trades", snapshot_id=12345)


def test_snapshots_tell_the_commits(cold: Cold) -> None:
    """One line per commit with rows, oldest first, with what it added and moved."""
    cold.append("trades", trades(0, 3), start={}, end={"binance": 3})
    cold.append("trades", trades(3, 5), start={"binance": 3}, end={"binance": 6})
    first, second = cold.snapshots("trades")

    assert (first.rows_added, first.rows_total, dict(first.start), dict(first.end)) == (
        3,
        3,
        {"binance": 0},
        {"binance": 3},
    )
    assert (second.rows_added, second.rows_total, dict(second.end)) == (2, 5, {"binance": 6})
    assert (second.operation, second.table) == ("append", "trades")
    assert cold.snapshots() == [first, second]
    assert cold.snapshot_at("trades", second.committed_ns) == second.snapshot_id
    assert cold.snapshot_at("trades", first.committed_ns - 1) is None


# -- candles ---------------------------------------------------------------------------


def test_only_the_highest_revision_of_a_candle_is_read(cold: Cold) -> None:
    """Revisions carry the commit number; an older pin keeps the older value."""
    first = cold.append("candles", table([candle(T0, "1"), candle(T0 + MINUTE, "2")], CANDLES), start={}, end={"a": 1})
    second = cold.append("candles", table([candle(T0, "7")], CANDLES), start={"a": 1}, end={"a": 2})
    asked = Selection(table="candles")

    assert [(r["close"], r["revision"]) for r in cold.read(second, asked).to_pylist()] == [(7, 2), (2, 1)]
    assert [r["close"] for r in cold.read(first, asked).to_pylist()] == [1, 2]
    assert cold.read(second, Selection(table="candles", limit=1))["close"].to_pylist() == [7]


def test_candles_from_trades(cold: Cold) -> None:
    """First and last by time, then id; off-market trades left out; aggregates apart and counted by their ids."""
    rows = [
        trade(0, exchange_ns=T0 + 5, trade_id=8, price=Decimal("10.1"), amount=Decimal("1")),
        trade(1, exchange_ns=T0 + 5, trade_id=7, price=Decimal("10.2"), amount=Decimal("2"), side="sell"),
        trade(2, exchange_ns=T0 + MINUTE - 1, trade_id=5, price=Decimal("9.9"), amount=Decimal("0.000000000001")),
        trade(3, exchange_ns=T0 + 6, price=Decimal("99"), off_market=True),
        trade(4, exchange_ns=T0 + 7, kind="aggregate", first_id=20, last_id=29, price=Decimal("11")),
        trade(5, exchange_ns=T0 + MINUTE, price=Decimal("12")),
    ]
    pin = cold.append("trades", table(rows), start={}, end={"binance": 6})
    bars = cold.candles_from_trades(pin, "1m", Selection(table="candles"))
    aggregate, first, second = bars.to_pylist()

    assert bars.schema == PARTIAL_SCHEMA
    assert (first["open"], first["high"], first["low"], first["close"]) == tuple(
        map(Decimal, ("10.2", "10.2", "9.9", "9.9"))
    )
    assert (first["volume"], first["buy_volume"]) == (Decimal("3.000000000001"), Decimal("1.000000000001"))
    assert first["quote_volume"] == Decimal("30.5000000000099")
    assert first["vwap"] == Decimal("10.166666666666577777")
    assert (first["trade_count"], aggregate["trade_count"], second["open"]) == (3, 10, 12)
    assert (aggregate["kind"], first["kind"], second["start_ns"]) == ("aggregate", "trade", T0 + MINUTE)
    assert first["open_key"] == Decimal((T0 + 5) * 2**63 + 7)
    only = cold.candles_from_trades(pin, "1m", Selection(table="candles", start_ns=T0 + 1), kind="trade")
    assert only.to_pylist() == [second]


def test_candle_of_trades_without_ids_goes_by_offset(cold: Cold) -> None:
    """Where the exchange gives no ids, the place in the log orders trades of one moment."""
    rows = [
        trade(o, trade_id=0, row_in_frame=r, exchange_ns=T0, price=Decimal(o * 10 + r), occurrence=r)
        for o, r in ((2, 1), (1, 1), (2, 0), (1, 0))
    ]
    pin = cold.append("trades", table(rows), start={}, end={"binance": 3})
    (bar,) = cold.candles_from_trades(pin, "1h", Selection(table="candles")).to_pylist()

    assert (bar["open"], bar["close"]) == (10, 21)
    assert bar["open_key"] == Decimal(T0 * 2**63 + 65536)


def test_candles_of_huge_and_tiny_numbers_are_exact(cold: Cold) -> None:
    """price x amount of more than 38 digits neither overflows nor rounds: 19 whole digits and 18 decimals."""
    rows = [
        trade(0, price=Decimal("98765432101.123456789012"), amount=Decimal("12345678.987654321098")),
        trade(1, price=Decimal("0.000000000003"), amount=Decimal("45000000000000.000000000001")),
        trade(2, price=Decimal("0.000000000001"), amount=Decimal("0.000000000001")),
    ]
    pin = cold.append("trades", table(rows), start={}, end={"binance": 3})
    (bar,) = cold.candles_from_trades(pin, "1d", Selection(table="candles")).to_pylist()
    with localcontext(prec=100):
        exact = sum(r["price"] * r["amount"] for r in rows).quantize(Decimal("1e-18"), ROUND_DOWN)
        vwap = (exact / sum(r["amount"] for r in rows)).quantize(Decimal("1e-18"), ROUND_DOWN)

    assert bar["quote_volume"] == exact
    assert bar["vwap"] == vwap


@pytest.mark.parametrize("case", LIMITS)
def test_sums_of_candles_neither_raise_nor_wrap(cold: Cold, case: str) -> None:
    """What is too large becomes the largest number; the candle beside it is as it should be."""
    limit = LIMITS[case]
    rows = [trade(n, exchange_ns=T0, **limit.trade) for n in range(limit.count)]
    pin = cold.append("trades", table([*rows, trade(2_000, symbol="ETH-USDT")]), start={}, end={"binance": 2_001})
    found, beside = cold.candles_from_trades(pin, "1d", Selection(table="candles")).to_pylist()

    assert {name: found[name] for name in limit.candle} == limit.candle
    assert beside["trade_count"] == 1


def test_unknown_timeframe_is_named(cold: Cold) -> None:
    """A wrong timeframe suggests the nearest."""
    with pytest.raises(UnknownName, match="1m"):
        cold.candles_from_trades(cold.pin("trades"), "1min", Selection(table="candles"))


# -- sql -------------------------------------------------------------------------------


def sql(cold: Cold, query: str, limit: int = 100) -> list[dict[str, Any]]:
    """Rows of a query."""
    return cold.sql(query, timeout_seconds=20, limit=limit).to_pylist()


def test_sql_reads_every_table(cold: Cold) -> None:
    """Views carry the tables' names, with rows or without, joins and common table expressions included."""
    cold.append("trades", trades(0, 5), start={}, end={"binance": 5})

    assert sql(cold, "WITH x AS (SELECT symbol, count(*) AS n FROM trades GROUP BY 1) SELECT n FROM x;") == [{"n": 5}]
    for name in TABLES:
        assert len(sql(cold, f"SELECT * FROM {name}")) == (5 if name == "trades" else 0)
    assert len(sql(cold, "SELECT * FROM trades ORDER BY log_offset", limit=2)) == 2
    assert sql(cold, "SELECT min(exchange_time)::VARCHAR AS t FROM trades") == [{"t": "2023-11-14 22:14:00+00"}]


ATTACKS = [
    "SELECT * FROM read_csv('/etc/passwd')",
    "SELECT * FROM '/etc/passwd'",
    "SELECT * FROM read_text('/etc/passwd')",
    "SELECT * FROM glob('/*')",
    "SELECT * FROM trades, read_parquet('/x.parquet')",
    "SELECT (SELECT content FROM read_text('/etc/passwd'))",
    "SELECT * FROM trades WHERE symbol IN (SELECT content FROM read_text('/etc/passwd'))",
    "SELECT * FROM query('SELECT 1')",
    "SELECT * FROM query_table('trades')",
    "SELECT * FROM iceberg_scan('/x')",
    "SELECT * FROM 'https://localhost/x.parquet'",
    "SELECT * FROM duckdb_settings()",
    "SELECT * FROM information_schema.tables",
    "SELECT current_setting('allowed_directories')",
    "COPY trades TO '/tmp/k2-stolen.csv'",
    "COPY (SELECT 1) TO '/tmp/k2-stolen.csv'",
    "EXPORT DATABASE '/tmp/k2-stolen'",
    "ATTACH '/tmp/k2-stolen.db'",
    "INSTALL httpfs",
    "LOAD httpfs",
    "PRAGMA database_list",
    "SET memory_limit = '99GB'",
    "CREATE TABLE x AS SELECT 1",
    "DROP VIEW trades",
    "INSERT INTO trades SELECT * FROM trades",
    "SELECT 1; SELECT 2",
    "SELECT 1; COPY (SELECT 1) TO '/tmp/k2-stolen.csv'",
    "SELECT 1) ; DROP VIEW trades; (SELECT 1",
    "CALL duckdb_settings()",
    "EXPLAIN ANALYZE SELECT 1",
    "SELECT * FROM trade",
    "SELECT nothing FROM trades",
    "SELECT CAST('x' AS INTEGER)",
    "SELEC 1",
    "",
]


def test_sql_refuses_everything_but_one_select(cold: Cold) -> None:
    """No files, network, settings, writes or second statements; wrong queries are refused the same way."""
    for query in ATTACKS:
        with pytest.raises(Rejected):
            raise AssertionError(f"{query} gave {sql(cold, query)}")
    assert not Path("/tmp/k2-stolen.csv").exists()
    assert sql(cold, "SELECT 1 AS one") == [{"one": 1}]


def test_sql_is_interrupted_at_its_time_limit(cold: Cold) -> None:
    """A query without end stops with TimedOut, and the next one works."""
    endless = "SELECT count(*) FROM range(100000000000) a, range(1000000) b WHERE a.range % 7 = b.range % 5"
    with pytest.raises(TimedOut, match="interrupted"):
        cold.sql(endless, timeout_seconds=0.2, limit=1)
    assert sql(cold, "SELECT 1 AS one") == [{"one": 1}]


def test_maintenance_changes_no_row(cold: Cold) -> None:
    """Rows, watermark and properties are the same after it, however often it runs."""
    for o in range(4):
        cold.append("trades", trades(o, o + 1), start={"binance": o}, end={"binance": o + 1}, properties={"x": str(o)})
    before = cold.read(cold.pin("trades"), ALL_TRADES)
    for _ in range(2):
        cold.maintain(now_ns=T0 + 90 * 86_400 * 10**9)

    assert cold.read(cold.pin("trades"), ALL_TRADES).equals(before)
    assert dict(cold.pin("trades").watermark) == {"binance": 4}
    assert cold.properties("trades") == {"x": "3"}
    assert len({s.snapshot_id for s in cold.snapshots("trades")}) == len(cold.snapshots("trades"))


def test_every_table_takes_its_rows(cold: Cold) -> None:
    """Quotes, too, come back as they were; each table has its own progress."""
    quote = {
        "exchange": "binance",
        "symbol": "BTC-USDT",
        "bid_price": Decimal("1.000000000001"),
        "bid_amount": Decimal("2"),
        "ask_price": Decimal("3"),
        "ask_amount": Decimal("4"),
        "update_id": 9,
        "exchange_ns": 0,
        "received_ns": T0,
        "source": "live",
        "log_partition": "binance",
        "log_offset": 0,
        "row_in_frame": 0,
        "logged_ns": T0,
    }
    rows = table([quote], QUOTES)
    pin = cold.append("quotes", rows, start={}, end={"binance": 1})

    assert cold.read(pin, Selection(table="quotes")).equals(rows)
    assert dict(cold.pin("trades").watermark) == {}
