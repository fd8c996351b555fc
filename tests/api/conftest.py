"""A REST server over memory tiers, on a free port."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal

import httpx
import pyarrow as pa
import pytest

from k2.api.app import create_app
from k2.api.server import ApiServer
from k2.api.services import Services
from k2.cold.memory import MemoryCold
from k2.hot.memory import MemoryHot
from k2.query.engine import Engine
from k2.schema import TRADES, arrow_schema
from k2.settings import QuerySettings, Settings

START = 1_723_075_200_000_000_000  # 2024-08-08


def trades(count: int) -> pa.Table:
    """Trades, three to a nanosecond, with a price of many digits."""
    rows = [
        {
            "exchange": "kraken",
            "symbol": "BTC-USD",
            "trade_id": index + 1,
            "kind": "trade",
            "first_id": index + 1,
            "last_id": index + 1,
            "price": Decimal("61837.63") + index,
            "amount": Decimal("0.000000000001"),
            "side": "buy",
            "off_market": False,
            "occurrence": 0,
            "exchange_ns": START + index // 3,
            "received_ns": START,
            "source": "live",
            "log_partition": "kraken",
            "log_offset": index,
            "row_in_frame": 0,
            "logged_ns": START,
        }
        for index in range(count)
    ]
    return pa.Table.from_pylist(rows, schema=arrow_schema(TRADES))


@pytest.fixture
def services() -> Services:
    """Ten trades in cold, ten more in hot; small limits."""
    settings = Settings(query=QuerySettings(limit=5, max_limit=50, timeout_seconds=20))
    hot, cold = MemoryHot(), MemoryCold()
    rows = trades(20)
    hot.write("trades", rows, "1")
    cold.append("trades", rows.slice(0, 10), start={}, end={"kraken": 10})
    return Services(Engine(hot, cold, None, settings), settings)


@pytest.fixture
def server(services: Services) -> Iterator[ApiServer]:
    """The interface, answering."""
    running = ApiServer(create_app(services), "127.0.0.1", 0)
    running.start()
    yield running
    running.stop()


@pytest.fixture
def http(server: ApiServer) -> Iterator[httpx.Client]:
    """A client of it."""
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield client
