"""The hot tier in plain memory: the simplest thing that keeps every promise, and the yardstick for the others."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from k2.candles import make_candles
from k2.errors import Rejected
from k2.hot.rows import (
    CANDLE_SCHEMA,
    KEYED_CANDLE_SCHEMA,
    check_candle_question,
    conformed,
    hot_table,
    require_column,
)
from k2.model import Positions, Selection
from k2.schema import CANDLES, HOT_ROW_TABLES, QUOTES, TIMEFRAMES, TRADES, arrow_schema

Row = dict[str, Any]


@dataclass
class _Store:
    rows: dict[str, list[Row]] = field(default_factory=lambda: {table.name: [] for table in HOT_ROW_TABLES})
    candle_trades: list[Row] = field(default_factory=list)  # every trade ever written: candles outlive rows
    tokens: set[tuple[str, str]] = field(default_factory=set)
    quoted: set[tuple[str, str]] = field(default_factory=set)  # names of quotes outlive their rows, too


class MemoryHot:
    """`hot.base.Hot` in lists of rows; nothing survives the process, and there is no SQL."""

    def __init__(self) -> None:
        self._store = _Store()
        self._lock = threading.Lock()

    def write(self, table: str, rows: pa.Table, token: str) -> None:
        """See `Hot.write`."""
        declared = hot_table(table)
        fresh = conformed(declared, rows).to_pylist()
        with self._lock:
            if (table, token) in self._store.tokens:
                return
            self._store.tokens.add((table, token))
            self._store.rows[table] += fresh
            if declared is TRADES:
                self._store.candle_trades += fresh
            if declared is QUOTES:
                self._store.quoted |= {(row["exchange"], row["symbol"]) for row in fresh}

    def read(
        self,
        selection: Selection,
        *,
        start: Positions | None = None,
        end: Positions | None = None,
        timeout_seconds: float | None = None,
        coded: bool = False,
    ) -> pa.Table:
        """See `Hot.read`; never interrupted, it is as fast as memory."""
        table = hot_table(selection.table)
        if selection.symbol is not None:
            require_column(table, "symbol")
        order = (table.time_column, *(column for column in table.sort if column != table.time_column))
        found = [
            row
            for row in self._rows(table.name)
            if _selected(row, selection, table.time_column) and _cut(row, start or {}, end or {})
        ]
        return _table(_limited(_sorted(found, order), selection), arrow_schema(table))

    def read_range(self, table: str, start: Positions, end: Positions) -> pa.Table:
        """See `Hot.read_range`."""
        declared = hot_table(table)
        return _table(_sorted(self._range(table, start, end), declared.sort), arrow_schema(declared))

    def counts(self, table: str, start: Positions, end: Positions) -> int:
        """See `Hot.counts`."""
        return len(self._range(hot_table(table).name, start, end))

    def candles(
        self, timeframe: str, selection: Selection, *, kind: str | None = None, timeout_seconds: float | None = None
    ) -> pa.Table:
        """See `Hot.candles`; computed from the trades each time."""
        check_candle_question(timeframe, selection)
        found = [
            row
            for row in make_candles(timeframe, self._candle_trades())
            if _selected(row, selection, "start_ns") and kind in (None, row["kind"])
        ]
        return _table(_limited(found, selection), KEYED_CANDLE_SCHEMA)

    def closed_candles(self, start: Positions, end: Positions, closed_after_ns: int, closed_before_ns: int) -> pa.Table:
        """See `Hot.closed_candles`."""
        names = ("exchange", "symbol", "kind", "start_ns")
        touching = [row for row in self._range(TRADES.name, start, end) if not row["off_market"]]
        found: list[Row] = []
        for timeframe, length in TIMEFRAMES.items():
            touched = {tuple(candle[name] for name in names) for candle in make_candles(timeframe, touching)}
            found += [
                candle
                for candle in make_candles(timeframe, self._candle_trades())
                if candle["start_ns"] + length <= closed_before_ns
                and (candle["start_ns"] + length > closed_after_ns or tuple(candle[name] for name in names) in touched)
            ]
        return _table(_sorted(found, CANDLES.sort), CANDLE_SCHEMA)

    def delete(self, below: Positions, before_ns: int) -> dict[str, int]:
        """See `Hot.delete`."""
        deleted: dict[str, int] = {}
        with self._lock:
            for table in HOT_ROW_TABLES:
                rows = self._store.rows[table.name]
                kept = [row for row in rows if not (_within(row, {}, below) and row["logged_ns"] < before_ns)]
                self._store.rows[table.name] = kept
                deleted[table.name] = len(rows) - len(kept)
        return deleted

    def reset(self) -> None:
        """See `Hot.reset`."""
        with self._lock:
            self._store = _Store()

    def sql(self, query: str, *, timeout_seconds: float, limit: int) -> pa.Table:
        """See `Hot.sql`; refused, as there is no engine."""
        raise Rejected("sql: the memory hot tier has no SQL; set hot.url to 'chdb:'")

    def symbols(self) -> list[tuple[str, str]]:
        """See `Hot.symbols`."""
        traded = {(row["exchange"], row["symbol"]) for row in self._candle_trades() if not row["off_market"]}
        with self._lock:
            return sorted(traded | self._store.quoted)

    def statistics(self) -> Mapping[str, Mapping[str, int]]:
        """See `Hot.statistics`; nothing is on disk."""
        return {table.name: {"rows": len(self._rows(table.name)), "bytes": 0, "parts": 0} for table in HOT_ROW_TABLES}

    def memory(self) -> Mapping[str, int]:
        """See `Hot.memory`; nothing is counted here."""
        return {}

    def close(self) -> None:
        """See `Hot.close`; the rows are forgotten."""
        with self._lock:
            self._store = _Store()

    def _rows(self, table: str) -> list[Row]:
        with self._lock:
            return list(self._store.rows[table])

    def _candle_trades(self) -> list[Row]:
        with self._lock:
            return list(self._store.candle_trades)

    def _range(self, table: str, start: Positions, end: Positions) -> list[Row]:
        return [row for row in self._rows(table) if _within(row, start, end)]


def _within(row: Row, start: Positions, end: Positions) -> bool:
    partition = row["log_partition"]
    return partition in end and start.get(partition, 0) <= row["log_offset"] < end[partition]


def _cut(row: Row, start: Positions, end: Positions) -> bool:
    partition, offset = row["log_partition"], row["log_offset"]
    return start.get(partition, 0) <= offset and (partition not in end or offset < end[partition])


def _selected(row: Row, selection: Selection, time_column: str) -> bool:
    return (
        selection.exchange in (None, row["exchange"])
        and selection.symbol in (None, row.get("symbol"))
        and (selection.start_ns is None or row[time_column] >= selection.start_ns)
        and (selection.end_ns is None or row[time_column] < selection.end_ns)
        and (selection.logged_before_ns is None or row["logged_ns"] < selection.logged_before_ns)
    )


def _sorted(rows: list[Row], columns: tuple[str, ...]) -> list[Row]:
    return sorted(rows, key=lambda row: tuple(row[column] for column in columns))


def _limited(rows: list[Row], selection: Selection) -> list[Row]:
    if not selection.limit:
        return rows
    return rows[-selection.limit :] if selection.newest else rows[: selection.limit]


def _table(rows: list[Row], schema: pa.Schema) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=schema)
