"""How long does it take to make one minute candles from 5 million trades of one symbol?

Made trades of one day, on the local disk, the files in the page cache. K2 makes candles of a snapshot of the cold tier
(what `as_of` a snapshot asks; not the answer it then keeps): every sum exact, volume bought and quote volume too. The
others read their own usual storage (chDB a MergeTree table, DuckDB a table of a database file, Polars a Parquet file)
and make open, high, low, close, volume and count, prices and amounts as decimals.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import chdb
import duckdb
import polars
import pyarrow.parquet as pq

import inputs
from harness import LOWER, Figure, Measured, Run, better_than, main, within
from k2.cold import open_cold
from k2.model import Selection
from k2.settings import load

FIGURES = {
    "candles": Figure(
        "ms",
        LOWER,
        (within(1.5, "chdb"), better_than("duckdb"), better_than("polars")),
        why="trades are ordered by a 128-bit key of time and id, and every sum has 38 digits; the peers do neither",
    )
}

_MINUTE_NS = 60 * 10**9
_COMMIT_ROWS = 500_000
_BUCKET = f"exchange_ns - exchange_ns % {_MINUTE_NS}"


def measure(run: Run) -> None:
    """All in turns, and every one gives the same candles."""
    trades = inputs.trades(20_000 if run.quick else 5_000_000)
    parquet = run.folder / "trades.parquet"
    pq.write_table(trades, parquet, compression="zstd")
    run.used(parquet, source="made", name=f"{trades.num_rows} trades of one symbol and day")
    contenders = {"k2": _k2(run, trades), "chdb": _chdb(run), "duckdb": _duckdb(run), "polars": _polars(run)}
    answers = {name: sorted(map(tuple, make())) for name, make in contenders.items()}
    for name, answer in answers.items():
        if answer != answers["k2"]:
            raise SystemExit(f"{name} made other candles than K2")
    run.detail(candles=len(answers["k2"]))
    run.interleave({name: _timed(make) for name, make in contenders.items()}, rounds=5)


def _timed(make: Callable[[], Any]) -> Callable[[], Measured]:
    def timed() -> Measured:
        begin = time.perf_counter()
        make()
        return {"candles": (time.perf_counter() - begin) * 1e3}

    return timed


def _k2(run: Run, trades: Any) -> Callable[[], list[tuple[Any, ...]]]:
    cold = open_cold(load({"data": str(run.folder / "k2")}))
    run._closing.callback(cold.close)
    for start in range(0, trades.num_rows, _COMMIT_ROWS):
        end = min(start + _COMMIT_ROWS, trades.num_rows)
        cold.append("trades", trades.slice(start, end - start), start={"binance": start}, end={"binance": end})
    wanted = Selection(table="candles", exchange="binance", symbol="BTC-USDT")

    def make() -> list[tuple[Any, ...]]:
        rows = cold.candles_from_trades(cold.pin("trades"), "1m", wanted)
        names = ("start_ns", "open", "high", "low", "close", "volume", "trade_count")
        return list(zip(*(rows[name].to_pylist() for name in names), strict=True))

    return make


def _chdb(run: Run) -> Callable[[], list[tuple[Any, ...]]]:
    connection = chdb.connect(str(run.folder / "chdb"))
    run._closing.callback(connection.close)
    connection.query(
        "CREATE TABLE trades (exchange LowCardinality(String), symbol LowCardinality(String), trade_id Int64,"
        " price Decimal(38, 12), amount Decimal(38, 12), exchange_ns Int64)"
        " ENGINE = MergeTree ORDER BY (exchange, symbol, exchange_ns)"
    )
    columns = "exchange, symbol, trade_id, price, amount, exchange_ns"
    connection.query(f"INSERT INTO trades SELECT {columns} FROM file('{run.folder / 'trades.parquet'}', Parquet)")
    query = (
        f"SELECT {_BUCKET} AS start_ns, argMin(price, (exchange_ns, trade_id)) AS o, max(price) AS h, min(price) AS l,"
        " argMax(price, (exchange_ns, trade_id)) AS c, sum(amount) AS v, toInt64(count()) AS n"
        " FROM trades WHERE exchange = 'binance' AND symbol = 'BTC-USDT' GROUP BY start_ns"
    )

    def make() -> list[tuple[Any, ...]]:
        rows = connection.query(query, "ArrowTable")
        return list(zip(*(column.to_pylist() for column in rows.columns), strict=True))

    return make


def _duckdb(run: Run) -> Callable[[], list[tuple[Any, ...]]]:
    database = duckdb.connect(str(run.folder / "trades.duckdb"))
    run._closing.callback(database.close)
    columns = "exchange, symbol, trade_id, price, amount, exchange_ns"
    database.execute(f"CREATE TABLE trades AS SELECT {columns} FROM read_parquet('{run.folder / 'trades.parquet'}')")
    query = (
        f"SELECT {_BUCKET} AS start_ns, arg_min(price, (exchange_ns, trade_id)), max(price), min(price),"
        " arg_max(price, (exchange_ns, trade_id)), sum(amount), count(*)"
        " FROM trades WHERE exchange = 'binance' AND symbol = 'BTC-USDT' GROUP BY start_ns"
    )
    return lambda: database.execute(query).fetchall()


def _polars(run: Run) -> Callable[[], list[tuple[Any, ...]]]:
    named = (polars.col("exchange") == "binance") & (polars.col("symbol") == "BTC-USDT")
    query = (
        polars.scan_parquet(run.folder / "trades.parquet")
        .filter(named)
        .sort("exchange_ns", "trade_id")
        .group_by((polars.col("exchange_ns") - polars.col("exchange_ns") % _MINUTE_NS).alias("start_ns"))
        .agg(
            polars.col("price").first().alias("open"),
            polars.col("price").max().alias("high"),
            polars.col("price").min().alias("low"),
            polars.col("price").last().alias("close"),
            polars.col("amount").sum().alias("volume"),
            polars.len().alias("trade_count"),
        )
    )
    return lambda: query.collect().rows()


if __name__ == "__main__":
    main(__file__)
