"""Rows for tests of the hot tier."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pyarrow as pa

from k2.schema import TABLES, arrow_schema

DAY_NS = 86_400_000_000_000
MINUTE_NS = 60_000_000_000
START_NS = 1_723_161_600_000_000_000  # 2024-08-09 00:00:00 UTC, the start of a bucket of every timeframe


def table(name: str, rows: list[dict[str, Any]]) -> pa.Table:
    """Return rows as an Arrow table in the declared schema."""
    return pa.Table.from_pylist(rows, schema=arrow_schema(TABLES[name]))


def trade(offset: int, **changes: Any) -> dict[str, Any]:
    """Return one trade, found in frame `offset`, one second after the trade of the frame before."""
    row: dict[str, Any] = {
        "exchange": "binance",
        "symbol": "BTC-USDT",
        "trade_id": offset + 1,
        "kind": "trade",
        "price": Decimal("61000.12"),
        "amount": Decimal("0.00500000"),
        "side": "buy",
        "off_market": False,
        "occurrence": 0,
        "exchange_ns": START_NS + offset * 1_000_000_000,
        "received_ns": START_NS + offset * 1_000_000_000 + 5_000_000,
        "source": "live",
        "log_partition": "binance",
        "log_offset": offset,
        "row_in_frame": 0,
        "logged_ns": START_NS + offset * 1_000_000_000 + 9_000_000,
        **changes,
    }
    return {"first_id": row["trade_id"], "last_id": row["trade_id"], **row}


def quote(offset: int, **changes: Any) -> dict[str, Any]:
    """Return one quote, found in frame `offset`."""
    return {
        "exchange": "binance",
        "symbol": "BTC-USDT",
        "bid_price": Decimal("61000.11"),
        "bid_amount": Decimal("1.5"),
        "ask_price": Decimal("61000.12"),
        "ask_amount": Decimal("0.000000000001"),
        "update_id": offset,
        "exchange_ns": 0,
        "received_ns": START_NS + offset * 1_000_000_000,
        "source": "live",
        "log_partition": "binance",
        "log_offset": offset,
        "row_in_frame": 0,
        "logged_ns": START_NS + offset * 1_000_000_000 + 9_000_000,
        **changes,
    }


def gap(offset: int, **changes: Any) -> dict[str, Any]:
    """Return one gap of ids, found in frame `offset`."""
    return {
        "exchange": "binance",
        "symbol": "BTC-USDT",
        "kind": "trade",
        "status": "open",
        "first_id": 10,
        "last_id": 12,
        "missing": 3,
        "cause": "reconnect",
        "received_ns": START_NS + offset,
        "log_partition": "binance",
        "log_offset": offset,
        "row_in_frame": 0,
        "logged_ns": START_NS + offset,
        **changes,
    }


def dead_letter(offset: int, **changes: Any) -> dict[str, Any]:
    """Return one dead letter, whose frame is not text."""
    return {
        "exchange": "binance",
        "reason": "bad_frame",
        "detail": "unexpected end; it's cut \\ off",
        "frame": b"\x00\xff{broken'\n",
        "received_ns": START_NS + offset,
        "source": "live",
        "log_partition": "binance",
        "log_offset": offset,
        "row_in_frame": 0,
        "logged_ns": START_NS + offset,
        **changes,
    }


MAKERS = {"trades": trade, "quotes": quote, "gaps": gap, "dead_letters": dead_letter}
