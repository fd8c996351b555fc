"""The hot tier on ClickHouse: chDB inside the owner's process, its HTTP interface for all others."""

# ruff: noqa: S608 - names come from schema.py; every value is a query parameter

from __future__ import annotations

import threading
from collections.abc import Mapping
from datetime import date, timedelta
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from k2 import crash, meters
from k2.errors import Rejected
from k2.hot import ddl, migrations, moments, readonly
from k2.hot.engine import Engine, EngineError
from k2.hot.memo import NEWEST_ROWS, Memo
from k2.hot.rows import CANDLE_SCHEMA, KEYED_CANDLE_SCHEMA, check_candle_question, conformed, hot_table, require_column
from k2.model import Positions, Selection
from k2.schema import CANDLES, HOT_ROW_TABLES, TIMEFRAMES, Table, arrow_schema, coded_schema
from k2.sorting import in_order

DAY_NS = 86_400_000_000_000
# One insert is one block in memory, about 300 bytes a row; a larger write becomes several. More than
# the rows ingest ever holds by default (`hot.tail_rows`), so that candles take in a flush whole.
MAX_INSERT_ROWS = 750_000

# ClickHouse error codes that mean the rows themselves can never be stored: CANNOT_PARSE_TEXT,
# CANNOT_PARSE_NUMBER, TYPE_MISMATCH, ARGUMENT_OUT_OF_BOUND, CANNOT_CONVERT_TYPE,
# CANNOT_INSERT_NULL_IN_ORDINARY_COLUMN, DECIMAL_OVERFLOW.
BAD_ROWS = frozenset({6, 27, 53, 69, 70, 349, 407})
# Codes that are the store's fault, not the question's: NETWORK_ERROR, NOT_ENOUGH_SPACE, and no code at all.
STORE_FAULTS = frozenset({0, 210, 243})


_CODED = "output_format_arrow_low_cardinality_as_dictionary"

# The engine's names for what takes memory, and ours.
MEMORY_PARTS = {
    "MemoryTracking": "tracked",
    "MarkCacheBytes": "mark_cache",
    "PrimaryIndexCacheBytes": "primary_index_cache",
    "IndexMarkCacheBytes": "index_mark_cache",
    "QueryConditionCacheBytes": "condition_cache",
    "CompiledExpressionCacheBytes": "compiled_cache",
}


class ClickHouseHot:
    """`hot.base.Hot` on a ClickHouse engine."""

    def __init__(self, engine: Engine, *, memory_bytes: int, memo: Memo | None = None) -> None:
        """Store the parts; `memo` only where every write to the folder comes through this object."""
        self.engine = engine
        self._memo = memo
        self._memory_bytes = memory_bytes
        self._functions: frozenset[str] | None = None
        self._deleting = threading.Lock()

    def migrate(self, where: str) -> list[int]:
        """Bring the tables to the newest form; see `migrations.migrate`."""
        return migrations.migrate(_Migrating(self.engine), where)

    def write(self, table: str, rows: pa.Table, token: str) -> None:
        """See `Hot.write`. One insert per UTC day, its token `<token>:<YYYYMMDD>`, so that it makes one part."""
        declared = hot_table(table)
        rows = conformed(declared, rows)
        try:
            for day, part in by_day(rows, declared.time_column):
                for number, start in enumerate(range(0, part.num_rows, MAX_INSERT_ROWS)):
                    suffix = f":{number}" if number else ""
                    self._insert(table, part.slice(start, MAX_INSERT_ROWS), f"{token}:{day}{suffix}")
        except BaseException:
            self._forget()
            raise
        if self._memo is not None:
            self._memo.wrote(declared, rows)

    def _forget(self) -> None:
        if self._memo is not None:
            self._memo.clear()

    def _insert(self, table: str, rows: pa.Table, token: str) -> None:
        try:
            with crash.watched("hot.insert.between_views", lambda: moments.views_behind(self.engine, table)):
                self.engine.insert(table, rows.combine_chunks(), token)
        except EngineError as error:
            if error.code in BAD_ROWS:
                raise Rejected(f"write {rows.num_rows} rows into hot table {table!r}: {error}") from error
            raise

    def read(
        self,
        selection: Selection,
        *,
        start: Positions | None = None,
        end: Positions | None = None,
        timeout_seconds: float | None = None,
        coded: bool = False,
    ) -> pa.Table:
        """See `Hot.read`."""
        table = hot_table(selection.table)
        if self._memo is not None and _is_newest(selection):
            rows = self._memo.newest(table, selection, start, end, _Asking(self, timeout_seconds))
            if rows is not None:
                return rows
        if coded and selection.symbol is not None and not selection.limit:
            return self._read_all(table, selection, start, end, timeout_seconds)
        return self.read_rows(table, selection, start, end, timeout_seconds)

    def _read_all(
        self,
        table: Table,
        selection: Selection,
        start: Positions | None,
        end: Positions | None,
        timeout_seconds: float | None,
    ) -> pa.Table:
        """Read all rows of a symbol as the parts hold them, mostly in order: the engine sorts longer than we do."""
        where = _chosen(table, selection, start, end)
        sql = f"SELECT {', '.join(table.column_names)} FROM {table.name} WHERE {where.sql}"
        rows = self.engine.query(sql, where.parameters, timeout_seconds=timeout_seconds, settings={_CODED: 1})
        return in_order(
            _with_codes(rows, table), [table.time_column, *(c for c in table.sort if c != table.time_column)]
        )

    def read_rows(
        self,
        table: Table,
        selection: Selection,
        start: Positions | None,
        end: Positions | None,
        timeout_seconds: float | None,
    ) -> pa.Table:
        """Read rows from the engine itself."""
        where = _chosen(table, selection, start, end)
        fixed = {name for name in ("exchange", "symbol") if getattr(selection, name) is not None}
        order = [table.time_column, *(c for c in table.sort if c != table.time_column and c not in fixed)]
        backwards = selection.newest and selection.limit > 0
        sql = (
            f"SELECT {', '.join(table.column_names)} FROM {table.name} WHERE {where.sql}"
            f" ORDER BY {_ordering(order, backwards)}{where.limit(selection.limit)}"
        )
        rows = self.engine.query(sql, where.parameters, timeout_seconds=timeout_seconds)
        return typed(reversed_rows(rows) if backwards else rows, arrow_schema(table))

    def read_range(self, table: str, start: Positions, end: Positions) -> pa.Table:
        """See `Hot.read_range`."""
        declared = hot_table(table)
        where = _Where()
        where.within(start, end)
        sql = (
            f"SELECT {', '.join(declared.column_names)} FROM {table} WHERE {where.sql}"
            f" ORDER BY {', '.join(declared.sort)}"
        )
        # Names as dictionaries: as text they take half of the time, and whoever stores them wants numbers.
        return _with_codes(self.engine.query(sql, where.parameters, settings={_CODED: 1}), declared)

    def counts(self, table: str, start: Positions, end: Positions) -> int:
        """See `Hot.counts`."""
        where = _Where()
        where.within(start, end)
        return self._count(hot_table(table).name, where)

    def _count(self, table: str, where: _Where) -> int:
        sql = f"SELECT toInt64(count()) AS n FROM {table} WHERE {where.sql}"
        return int(self.engine.query(sql, where.parameters)["n"][0].as_py())

    def candles(
        self, timeframe: str, selection: Selection, *, kind: str | None = None, timeout_seconds: float | None = None
    ) -> pa.Table:
        """See `Hot.candles`. The knowledge time is refused: states do not remember it, trades do."""
        check_candle_question(timeframe, selection)
        if self._memo is not None and kind is not None and selection.exchange and selection.symbol:
            rows = self._memo.candles(timeframe, selection, kind, _Asking(self, timeout_seconds))
            if rows is not None:
                return rows
        return self.read_candles(timeframe, selection, kind, timeout_seconds)

    def read_candles(
        self, timeframe: str, selection: Selection, kind: str | None, timeout_seconds: float | None
    ) -> pa.Table:
        """Read candles from the engine itself."""
        where = _Where()
        where.select(CANDLES, selection)
        if kind is not None:
            where.add("kind = {kind:String}", kind=kind)
        backwards = selection.newest and selection.limit > 0
        if selection.limit:
            where.near_end(timeframe, selection.limit, backwards=backwards)
        sql = (
            ddl.candles_select(timeframe, where.sql, keys=True)
            + f" ORDER BY {_ordering(['start_ns', 'exchange', 'symbol', 'kind'], backwards)}"
            + where.limit(selection.limit)
        )
        rows = self.engine.query(sql, where.parameters, timeout_seconds=timeout_seconds)
        return typed(reversed_rows(rows) if backwards else rows, KEYED_CANDLE_SCHEMA)

    def closed_candles(self, start: Positions, end: Positions, closed_after_ns: int, closed_before_ns: int) -> pa.Table:
        """See `Hot.closed_candles`."""
        parts = [self._closed(frame, start, end, closed_after_ns, closed_before_ns) for frame in TIMEFRAMES]
        ordering = [(name, "ascending") for name in CANDLES.sort]
        return pa.concat_tables(parts).sort_by(ordering).combine_chunks()

    def _closed(self, timeframe: str, start: Positions, end: Positions, after_ns: int, before_ns: int) -> pa.Table:
        where = _Where()
        where.within(start, end)
        touched = (
            f"SELECT exchange, symbol, kind, {ddl.bucket('exchange_ns', timeframe)}"
            f" FROM trades WHERE NOT off_market AND {where.sql}"
        )
        length = TIMEFRAMES[timeframe]
        chosen = (
            "start_ns <= {closed_before:Int64} AND (start_ns > {closed_after:Int64}"
            f" OR (exchange, symbol, kind, start_ns) IN ({touched}))"
        )
        parameters = {**where.parameters, "closed_before": before_ns - length, "closed_after": after_ns - length}
        return typed(self.engine.query(ddl.candles_select(timeframe, chosen, keys=False), parameters), CANDLE_SCHEMA)

    def delete(self, below: Positions, before_ns: int) -> dict[str, int]:
        """See `Hot.delete`.

        By mutation, which returns when it is done: it deletes just the rows asked for, whatever
        is written meanwhile, frees the space of whole days, and keeps the deduplication tokens.
        Dropping a partition would lose both a late row that arrives in it and the tokens.
        """
        try:
            with self._deleting:
                return {table.name: self._delete(table, below, before_ns) for table in HOT_ROW_TABLES}
        finally:
            if self._memo is not None:
                self._memo.deleted()

    def _delete(self, table: Table, below: Positions, before_ns: int) -> int:
        where = _Where()
        where.within({}, below)
        where.add("logged_ns < {before:Int64}", before=before_ns)
        count = self._count(table.name, where)
        if count:
            crash.point("hot.delete.before")
            with crash.watched("hot.delete.mutating", lambda: moments.mutation_begun(self.engine, table.name)):
                self.engine.command(f"ALTER TABLE {table.name} DELETE WHERE {where.sql}", where.parameters)
            crash.point("hot.delete.after")
        return count

    def reset(self) -> None:
        """See `Hot.reset`."""
        try:
            for name in ddl.dropped():
                self.engine.command(f"DROP TABLE IF EXISTS {name} SYNC")
            self.migrate("the emptied folder")
        finally:
            self._forget()

    def sql(self, query: str, *, timeout_seconds: float, limit: int) -> pa.Table:
        """See `Hot.sql`; what may run is decided in `readonly.py`."""
        if len(query) > readonly.MAX_SQL_CHARACTERS:
            meters.acted("hot.sql")
            raise Rejected(f"sql: longer than {readonly.MAX_SQL_CHARACTERS} characters")
        if any("\ud800" <= letter <= "\udfff" for letter in query):
            raise Rejected("sql: holds half a character (a lone surrogate); send UTF-8")
        if limit < 1:
            raise Rejected(f"sql: limit {limit} must be at least 1")
        try:
            canonical = self._canonical(query)
            readonly.check_text(canonical)  # before EXPLAIN AST, which would obey INTO OUTFILE
            readonly.check(canonical, self.engine.lines(f"EXPLAIN AST {canonical}"), self._allowed_functions())
            settings = {"limit": limit, "max_memory_usage": max(self._memory_bytes // 2, 64 << 20)}
            rows = self.engine.query_readonly(canonical, settings, timeout_seconds)
        except EngineError as error:
            if error.code in STORE_FAULTS:
                raise
            raise Rejected(f"sql: {error}") from error
        return rows.slice(0, limit)

    def _canonical(self, query: str) -> str:
        rows = self.engine.query("SELECT formatQuerySingleLine({query:String}) AS text", {"query": query})
        return str(rows["text"][0].as_py())

    def _allowed_functions(self) -> frozenset[str]:
        if self._functions is None:
            rows = self.engine.query("SELECT name, alias_to, toString(categories) AS category FROM system.functions")
            names = [(row["name"], row["alias_to"], row["category"]) for row in rows.to_pylist()]
            self._functions = readonly.allowed_functions(names)
        return self._functions

    def symbols(self) -> list[tuple[str, str]]:
        """See `Hot.symbols`."""
        return self._read_symbols() if self._memo is None else self._memo.names(self._read_symbols)

    def _read_symbols(self) -> list[tuple[str, str]]:
        rows = self.engine.query(
            f"SELECT DISTINCT exchange, symbol FROM (SELECT exchange, symbol FROM {ddl.CANDLE_TABLES[-1]}"
            f" UNION ALL SELECT exchange, symbol FROM {ddl.QUOTED_SYMBOLS}) ORDER BY exchange, symbol"
        )
        return [(row["exchange"], row["symbol"]) for row in rows.to_pylist()]

    def statistics(self) -> Mapping[str, Mapping[str, int]]:
        """See `Hot.statistics`."""
        rows = self.engine.query(
            "SELECT table, toInt64(sum(rows)) AS rows, toInt64(sum(bytes_on_disk)) AS bytes, toInt64(count()) AS parts"
            " FROM system.parts WHERE active AND database = {database:String} GROUP BY table",
            {"database": ddl.DATABASE},
        )
        found = {row.pop("table"): row for row in rows.to_pylist()}
        nothing = {"rows": 0, "bytes": 0, "parts": 0}
        return {name: found.get(name, nothing) for name in sorted(readonly.TABLES)}

    def memory(self) -> Mapping[str, int]:
        """See `Hot.memory`."""
        rows = self.engine.query("SELECT metric, toInt64(value) AS value FROM system.metrics").to_pylist()
        return {MEMORY_PARTS[row["metric"]]: max(0, row["value"]) for row in rows if row["metric"] in MEMORY_PARTS}

    def close(self) -> None:
        """See `Hot.close`."""
        self.engine.close()


def _is_newest(selection: Selection) -> bool:
    """Whether the newest few rows of a symbol are asked for."""
    bounds = (selection.start_ns, selection.end_ns, selection.logged_before_ns)
    return (
        selection.symbol is not None
        and selection.newest
        and 0 < selection.limit <= NEWEST_ROWS
        and bounds == (None, None, None)
    )


class _Asking:
    """How the memo asks; see `memo.Ask`."""

    def __init__(self, hot: ClickHouseHot, seconds: float | None) -> None:
        self._hot = hot
        self.seconds = seconds

    def candles(self, timeframe: str, symbol: tuple[str, ...], start_ns: int | None, end_ns: int | None) -> pa.Table:
        exchange, name, kind = symbol
        selection = Selection(table=CANDLES.name, exchange=exchange, symbol=name, start_ns=start_ns, end_ns=end_ns)
        return self._hot.read_candles(timeframe, selection, kind, self.seconds)

    def newest(self, table: Table, exchange: str, symbol: str, start: Positions, count: int) -> pa.Table:
        selection = Selection(table=table.name, exchange=exchange or None, symbol=symbol, limit=count, newest=True)
        return self._hot.read_rows(table, selection, start, None, self.seconds)


class _Migrating:
    """The engine as migrations see it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def command(self, sql: str) -> None:
        self._engine.command(sql)

    def applied(self) -> dict[int, str]:
        rows = self._engine.query("SELECT number, name FROM migrations")
        return {row["number"]: row["name"] for row in rows.to_pylist()}


class _Where:
    """Conditions of a query, with every value as a parameter."""

    def __init__(self) -> None:
        self._conditions: list[str] = []
        self.parameters: dict[str, Any] = {}

    @property
    def sql(self) -> str:
        return " AND ".join(self._conditions) or "1"

    def add(self, condition: str, **values: Any) -> None:
        self._conditions.append(condition)
        self.parameters.update(values)

    def select(self, table: Table, selection: Selection) -> None:
        for name in ("exchange", "symbol"):
            value = getattr(selection, name)
            if value is not None:
                require_column(table, name)
                self.add(f"{name} = {{{name}:String}}", **{name: value})
        if selection.start_ns is not None:
            self.add(f"{table.time_column} >= {{start_ns:Int64}}", start_ns=selection.start_ns)
        if selection.end_ns is not None:
            self.add(f"{table.time_column} < {{end_ns:Int64}}", end_ns=selection.end_ns)
        if selection.logged_before_ns is not None:
            self.add("logged_ns < {logged_before_ns:Int64}", logged_before_ns=selection.logged_before_ns)

    def cut(self, start: Positions | None, end: Positions | None) -> None:
        """Add start[p] <= log_offset < end[p]; a partition that is not named has no bound."""
        for name, bounds, operator in (("from", start, ">="), ("to", end, "<")):
            for number, (partition, offset) in enumerate(sorted((bounds or {}).items())):
                p, o = f"{name}_partition_{number}", f"{name}_offset_{number}"
                self.add(
                    f"(log_partition != {{{p}:String}} OR log_offset {operator} {{{o}:Int64}})",
                    **{p: partition, o: offset},
                )

    def within(self, start: Positions, end: Positions) -> None:
        """Add start[p] <= log_offset < end[p] for the partitions in `end` only."""
        ranges = []
        for number, (partition, offset) in enumerate(sorted(end.items())):
            p, a, b = f"in_partition_{number}", f"in_from_{number}", f"in_to_{number}"
            ranges.append(
                f"(log_partition = {{{p}:String}} AND log_offset >= {{{a}:Int64}} AND log_offset < {{{b}:Int64}})"
            )
            self.parameters |= {p: partition, a: start.get(partition, 0), b: offset}
        self._conditions.append(f"({' OR '.join(ranges) or '0'})")

    def near_end(self, timeframe: str, limit: int, *, backwards: bool) -> None:
        """Add that the bucket is among the first (last) `limit` ones, so that only their states are read."""
        bound, operator, direction = ("min", ">=", "DESC") if backwards else ("max", "<=", "ASC")
        starts = (
            f"SELECT DISTINCT start_ns FROM {ddl.candle_table(timeframe)} WHERE {self.sql}"
            f" ORDER BY start_ns {direction} LIMIT {limit:d}"
        )
        self._conditions.append(f"start_ns {operator} (SELECT {bound}(start_ns) FROM ({starts}))")

    @staticmethod
    def limit(count: int) -> str:
        return f" LIMIT {count:d}" if count else ""


def by_day(rows: pa.Table, time_column: str) -> list[tuple[str, pa.Table]]:
    """Split rows by the UTC day of a nanosecond column, keeping their order; days as YYYYMMDD, rising."""
    if rows.num_rows == 0:
        return []
    days = pc.divide(rows[time_column], DAY_NS)
    found = sorted(pc.unique(days).to_pylist())
    if len(found) == 1:
        return [(_day_name(found[0]), rows)]
    return [(_day_name(day), rows.filter(pc.equal(days, day))) for day in found]


def _day_name(day: int) -> str:
    return (date(1970, 1, 1) + timedelta(days=day)).strftime("%Y%m%d")


def typed(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return rows as the schema declares them; the engine gives binary columns as strings."""
    return rows.select(schema.names).cast(schema).combine_chunks()


def _chosen(table: Table, selection: Selection, start: Positions | None, end: Positions | None) -> _Where:
    where = _Where()
    where.select(table, selection)
    where.cut(start, end)
    return where


def _with_codes(rows: pa.Table, table: Table) -> pa.Table:
    """Return rows as the schema declares them, but what the engine gives as a dictionary stays one."""
    return rows.select(table.column_names).cast(coded_schema(table, rows.schema))


def reversed_rows(rows: pa.Table) -> pa.Table:
    """Return the rows in reverse order."""
    return rows.take(pa.array(range(rows.num_rows - 1, -1, -1), pa.int64()))


def _ordering(columns: list[str], backwards: bool) -> str:
    return ", ".join(f"{column} DESC" if backwards else column for column in columns)
