"""The engine over the real tiers: chDB and Iceberg answer as the memory tiers do."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from k2.cold import open_cold
from k2.cold.memory import MemoryCold
from k2.hot import open_hot
from k2.hot.memory import MemoryHot
from k2.query.engine import Engine
from k2.query.plan import ask
from k2.schema import TRADES, arrow_schema
from k2.settings import Settings

START = 1_723_075_200_000_000_000  # 2024-08-08


def trades(first: int, end: int) -> pa.Table:
    """Trades of two symbols and both kinds, three to a nanosecond, over a day boundary."""
    rows: list[dict[str, Any]] = [
        {
            "exchange": "kraken",
            "symbol": ("BTC-USD", "ETH-USD")[index % 2],
            "trade_id": index + 1,
            "kind": "aggregate" if index % 4 == 3 else "trade",
            "first_id": index + 1,
            "last_id": index + (3 if index % 4 == 3 else 1),
            "price": Decimal("61837.63") + index % 7,
            "amount": Decimal(index + 1) / 10**12,
            "side": "buy" if index % 3 else "sell",
            "off_market": index % 10 == 9,
            "occurrence": 0,
            "exchange_ns": START - 30 + index // 3 * (1 if index % 2 else 40 * 10**9),
            "received_ns": START,
            "source": "import",
            "log_partition": "kraken",
            "log_offset": index,
            "row_in_frame": 0,
            "logged_ns": START + index,
        }
        for index in range(first, end)
    ]
    return pa.Table.from_pylist(rows, schema=arrow_schema(TRADES))


def fill(hot: Any, cold: Any) -> None:
    """Sixty trades: forty in cold, all in hot, the first ten deleted from there."""
    hot.write("trades", trades(0, 40), "1")
    hot.write("trades", trades(40, 60), "2")
    cold.append("trades", trades(0, 40), start={}, end={"kraken": 40})
    hot.delete({"kraken": 10}, START + 10**18)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Engine]]:
    """The engine over real tiers, and over memory ones with the same rows."""
    settings = Settings(data=str(tmp_path_factory.mktemp("data")))
    Path(settings.data).mkdir(exist_ok=True)
    hot, cold = open_hot(settings, "own"), open_cold(settings)
    plain_hot, plain_cold = MemoryHot(), MemoryCold()
    fill(hot, cold)
    fill(plain_hot, plain_cold)
    yield Engine(hot, cold, None, settings), Engine(plain_hot, plain_cold, None, settings)
    hot.close()
    cold.close()


@pytest.mark.parametrize("tier", ["all", "hot", "cold"])
@pytest.mark.parametrize("limit", [0, 7])
@pytest.mark.parametrize("start", [None, START])
@pytest.mark.parametrize("symbol", [None, "ETH-USD"])
def test_rows_are_those_of_the_memory_tiers(
    engines: tuple[Engine, Engine], tier: str, limit: int, start: int | None, symbol: str | None
) -> None:
    """Same rows, same order, same types, from each tier and from the union."""
    question = ask("trades", symbol, tier=tier, limit=limit, start=start)

    real, plain = (engine.answer(question).rows for engine in engines)

    assert real.schema == plain.schema
    assert real.to_pylist() == plain.to_pylist()


@pytest.mark.parametrize("timeframe", ["1m", "1h", "1d"])
@pytest.mark.parametrize("kind", ["auto", "aggregate"])
@pytest.mark.parametrize("as_of", [None, "2024-08-08T00:00:00.000000033Z"])
@pytest.mark.parametrize("limit", [0, 2])
def test_candles_are_those_of_the_memory_tiers(
    engines: tuple[Engine, Engine], timeframe: str, kind: str, as_of: str | None, limit: int
) -> None:
    """Aggregate states, and candles counted from the rows known at a time, agree to the last digit."""
    question = ask("candles", timeframe=timeframe, kind=kind, as_of=as_of, limit=limit)

    real, plain = (engine.answer(question).rows for engine in engines)

    assert real.num_rows > 0
    assert real.to_pylist() == plain.to_pylist()


def test_candles_of_a_snapshot_are_counted_from_its_trades(engines: tuple[Engine, Engine]) -> None:
    """DuckDB over the pinned trades gives what plain arithmetic gives."""
    real, plain = (
        engine.answer(ask("candles", timeframe="1m", as_of=engine.snapshots("trades")[0].snapshot_id)).rows
        for engine in engines
    )

    assert real.to_pylist() == plain.to_pylist()
