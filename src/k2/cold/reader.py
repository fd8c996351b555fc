"""Reads cold tables with DuckDB at a pinned metadata file, in a locked engine.

The engine may open files below the warehouse only, loads the Iceberg extension from its wheel
(nothing is downloaded or written to the home folder), and cannot be reconfigured afterwards.
"""

from __future__ import annotations

import importlib
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from k2.cold import readonly
from k2.cold.base import Pin
from k2.cold.rows import KEY_TYPE, candle_schema
from k2.errors import NotInstalled, Rejected, StoreDown, TimedOut, UnknownName, nearest
from k2.model import Selection
from k2.schema import CANDLES, TABLES, TIMEFRAMES, TRADES, Table, arrow_schema

_INTERRUPT_SECONDS = 0.05
_REFUSALS = (duckdb.PermissionException, duckdb.ProgrammingError, duckdb.NotSupportedError, duckdb.DataError)


class Reader:
    """One DuckDB engine per process, one cursor per question; any thread may ask."""

    def __init__(self, folder: Path, memory_bytes: int, concurrent: int) -> None:
        self._folder = folder
        self._memory_bytes = memory_bytes
        self._turns = threading.BoundedSemaphore(max(1, concurrent))
        self._engine: duckdb.DuckDBPyConnection | None = None
        self._lock = threading.Lock()

    def read(self, pin: Pin, selection: Selection, timeout_seconds: float | None) -> pa.Table:
        """Return the selected rows of a pinned table, by time, then the rest of its sort order."""
        table = TABLES[pin.table]
        where, values = conditions(table, selection)
        if pin.snapshot_id is None:
            return arrow_schema(table).empty_table()
        names = ", ".join(table.column_names)
        order = [table.time_column, *(c for c in table.sort if c != table.time_column)]
        query = f"SELECT {names} FROM {source(pin)} WHERE {where}"  # noqa: S608  # values are parameters
        if table is CANDLES:
            query += f" QUALIFY row_number() OVER (PARTITION BY {', '.join(table.key)} ORDER BY revision DESC) = 1"
        query = _ordered(query, order, selection)
        with self.cursor("read cold", timeout_seconds) as cursor:
            return exactly(_arrow(cursor.execute(query, values)), arrow_schema(table))

    def candles(
        self, pin: Pin, timeframe: str, selection: Selection, kind: str | None, timeout_seconds: float | None
    ) -> pa.Table:
        """Return candles computed from pinned trades, sorted by start, exchange, symbol, kind."""
        query, values = candle_query(pin, timeframe, selection, kind)
        if pin.snapshot_id is None:
            return candle_schema().empty_table()
        with self.cursor("compute candles from cold trades", timeout_seconds) as cursor:
            return with_scales(_arrow(cursor.execute(query, values)))

    def sql(self, query: str, tables: Mapping[str, Pin | pa.Table], timeout_seconds: float, limit: int) -> pa.Table:
        """Run one SELECT over views of pinned tables (or rows in memory), at most `limit` rows of it (0: all)."""
        with self.cursor("sql on cold", timeout_seconds) as cursor:
            readonly.check(cursor, query, tables)
            for name, held in tables.items():
                if isinstance(held, Pin):
                    cursor.execute(f"CREATE TEMP VIEW {name} AS {_view(held)}")
                else:
                    cursor.register(name, held)
            text = query.strip().rstrip(";")
            if limit:
                text = f"SELECT * FROM (\n{text}\n) LIMIT {int(limit)}"  # noqa: S608  # judged above
            try:
                return _arrow(cursor.execute(text))
            except _REFUSALS as error:
                raise Rejected(f"sql: {error}") from None

    @contextmanager
    def cursor(self, attempt: str, timeout_seconds: float | None) -> Iterator[duckdb.DuckDBPyConnection]:
        """Yield a cursor of its own; what runs on it is interrupted when the time is up."""
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        if not self._turns.acquire(timeout=timeout_seconds):
            raise TimedOut(f"{attempt}: {timeout_seconds:g} s passed waiting for a free turn; ask less at once")
        try:
            cursor = self._open().cursor()
            done = threading.Event()
            late = threading.Event()
            watch = threading.Thread(target=_interrupt, args=(cursor, done, late, deadline), daemon=True)
            if deadline is not None:
                watch.start()
            try:
                yield cursor
            except duckdb.Error as error:
                if late.is_set():
                    raise TimedOut(
                        f"{attempt}: interrupted after {timeout_seconds:g} s; narrow the question or raise "
                        "query.timeout_seconds"
                    ) from None
                raise StoreDown(f"{attempt}: {error}") from error
            finally:
                done.set()
                if deadline is not None:
                    watch.join()
                cursor.close()
        finally:
            self._turns.release()

    def close(self) -> None:
        """Release the engine and its temporary files."""
        with self._lock:
            if self._engine is not None:
                self._engine.close()
                self._engine = None
                shutil.rmtree(self._temporary, ignore_errors=True)

    @property
    def _temporary(self) -> Path:
        return self._folder / "tmp" / str(os.getpid())

    def _open(self) -> duckdb.DuckDBPyConnection:
        with self._lock:
            if self._engine is None:
                self._engine = self._locked_engine()
            return self._engine

    def _locked_engine(self) -> duckdb.DuckDBPyConnection:
        engine = duckdb.connect(
            ":memory:",
            config={
                "memory_limit": f"{self._memory_bytes}B",
                "temp_directory": str(self._temporary),
                "autoinstall_known_extensions": False,
                "autoload_known_extensions": False,
                "allow_community_extensions": False,
                "python_enable_replacements": False,
                "enable_external_file_cache": False,  # slower with it on local files (docs/decisions/0004)
            },
        )
        for name in ("avro", "iceberg"):
            engine.execute(f"LOAD {_quoted(str(extension_file(name)))}")
        engine.execute("SET GLOBAL TimeZone = 'UTC'")
        engine.execute(f"SET allowed_directories = [{_quoted(str(self._folder / 'warehouse') + '/')}]")
        engine.execute("SET enable_external_access = false")
        engine.execute("SET lock_configuration = true")
        return engine


def extension_file(name: str) -> Path:
    """Return the signed DuckDB extension inside its installed wheel."""
    package = f"duckdb_extension_{name}"
    try:
        folder = Path(next(iter(importlib.import_module(package).__path__)))
    except ModuleNotFoundError:
        raise NotInstalled(f"cold needs the package {package.replace('_', '-')}=={duckdb.__version__}") from None
    file = folder / "extensions" / f"v{duckdb.__version__}" / f"{name}.duckdb_extension"
    if not file.is_file():
        raise NotInstalled(
            f"the {name} extension of DuckDB {duckdb.__version__} is not in {folder}: "
            f"install {package.replace('_', '-')}=={duckdb.__version__}, the versions must be equal"
        )
    return file


def source(pin: Pin) -> str:
    """Return the FROM clause of a pinned state."""
    snapshot = "" if pin.snapshot_id is None else f", snapshot_from_id = {int(pin.snapshot_id)}"
    return f"iceberg_scan({_quoted(pin.location)}{snapshot})"


def conditions(table: Table, selection: Selection) -> tuple[str, list[Any]]:
    """Return the WHERE clause of a selection, and its values.

    The derived timestamp is bounded beside the nanoseconds: files are partitioned by its day.
    """
    where: list[str] = ["true"]
    values: list[Any] = []
    for column, wanted in (("exchange", selection.exchange), ("symbol", selection.symbol)):
        if wanted is not None:
            if column not in table.column_names:
                raise Rejected(f"read cold: table {table.name!r} has no column {column!r}; leave the {column} out")
            where.append(f"{column} = ?")
            values.append(wanted)
    if selection.logged_before_ns is not None:
        if "logged_ns" not in table.column_names:
            raise Rejected(f"read cold: rows of {table.name!r} carry no logged_ns; compute them from trades instead")
        where.append("logged_ns < ?")
        values.append(selection.logged_before_ns)
    derived = next(c.name for c in table.columns if c.derived_from == table.time_column)
    for ns, sign, loose in ((selection.start_ns, ">=", ">="), (selection.end_ns, "<", "<=")):
        if ns is not None:
            where += [f"{table.time_column} {sign} ?", f"{derived} {loose} ?"]
            values += [ns, _moment(ns)]
    return " AND ".join(where), values


def _moment(ns: int) -> datetime:
    """Nanoseconds as a time DuckDB takes, rounded down, held within what a datetime can say."""
    microseconds = min(max(ns // 1000, -62_135_596_800_000_000), 253_402_300_799_999_999)
    seconds, rest = divmod(microseconds, 1_000_000)
    return datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest)


def _ordered(query: str, order: Sequence[str], selection: Selection) -> str:
    """Return the query sorted, cut to the first rows or the newest; sorted upwards in every case."""
    up, down = ", ".join(order), ", ".join(f"{c} DESC" for c in order)
    if selection.limit and selection.newest:
        query = f"SELECT * FROM ({query} ORDER BY {down} LIMIT {int(selection.limit)})"  # noqa: S608
        return f"{query} ORDER BY {up}"
    return f"{query} ORDER BY {up}" + (f" LIMIT {int(selection.limit)}" if selection.limit else "")


def candle_query(pin: Pin, timeframe: str, selection: Selection, kind: str | None) -> tuple[str, list[Any]]:
    """Return the query that makes candles out of trades, and its values.

    Sums are exact in 128-bit integers: price and amount (38,12) are split into whole and
    fraction, because their product at scale 24 needs up to 252 bits. With price = P + p/10^12 and
    amount = A + a/10^12 the sum in units of 10^-18 is
    sum(P*A)*10^18 + sum(P*a + p*A)*10^6 + sum(p*a) // 10^6, and every term fits as long as the
    result fits decimal(38,18); DuckDB raises on overflow otherwise. vwap is a long division in
    four steps of three digits for the same reason.
    """
    if timeframe not in TIMEFRAMES:
        raise UnknownName(f"candles: no timeframe {timeframe!r}{nearest(timeframe, TIMEFRAMES)}")
    length = TIMEFRAMES[timeframe]
    if selection.start_ns is not None or selection.end_ns is not None:
        selection = _whole_buckets(selection, length)
    where, values = conditions(TRADES, selection)
    if kind is not None:
        where += " AND kind = ?"
        values.append(kind)
    query = _CANDLES.format(source=source(pin), where=where, length=length, timeframe=timeframe)
    return _ordered(query, ("start_ns", "exchange", "symbol", "kind"), selection), values


def _whole_buckets(selection: Selection, length: int) -> Selection:
    """Move time bounds on start_ns of a candle to bounds on its trades: a bucket is in or out as a whole."""

    def up(ns: int | None) -> int | None:
        return None if ns is None else -(-ns // length) * length

    return Selection(
        table="trades",
        symbol=selection.symbol,
        exchange=selection.exchange,
        start_ns=up(selection.start_ns),
        end_ns=up(selection.end_ns),
        logged_before_ns=selection.logged_before_ns,
        limit=selection.limit,
        newest=selection.newest,
    )


_CANDLES = """
WITH split AS (
  SELECT exchange, symbol, kind, exchange_ns - (exchange_ns % {length} + {length}) % {length} AS start_ns,
    price, amount, side, last_id - first_id + 1 AS singles,
    exchange_ns::HUGEINT * 9223372036854775808::HUGEINT
      + if(trade_id <> 0, trade_id::HUGEINT, log_offset::HUGEINT * 65536 + row_in_frame) AS key,
    trunc(price)::DECIMAL(38,12) AS price_whole, trunc(amount)::DECIMAL(38,12) AS amount_whole
  FROM {source} WHERE NOT off_market AND {where}
), parts AS (
  SELECT * EXCLUDE (price_whole, amount_whole),
    price_whole::HUGEINT AS pw, ((price - price_whole) * 1000000000000::DECIMAL(13,0))::HUGEINT AS pf,
    amount_whole::HUGEINT AS aw, ((amount - amount_whole) * 1000000000000::DECIMAL(13,0))::HUGEINT AS af
  FROM split
), sums AS (
  SELECT exchange, symbol, kind, start_ns,
    arg_min(price, key) AS open, max(price) AS high, min(price) AS low, arg_max(price, key) AS close,
    sum(aw) + sum(af) // 1000000000000 AS volume_whole, sum(af) % 1000000000000 AS volume_rest,
    coalesce(sum(aw) FILTER (side = 'buy'), 0) AS buy_whole, coalesce(sum(af) FILTER (side = 'buy'), 0) AS buy_rest,
    sum(pw * aw) * 1000000000000000000::HUGEINT + sum(pw * af + pf * aw) * 1000000 + sum(pf * af) // 1000000 AS quote,
    sum(singles)::BIGINT AS trade_count, min(key) AS open_key, max(key) AS close_key
  FROM parts GROUP BY ALL
), volumes AS (
  SELECT *, volume_whole * 1000000000000::HUGEINT + volume_rest AS volume,
    buy_whole * 1000000000000::HUGEINT + buy_rest AS buy_volume
  FROM sums
), step0 AS (SELECT *, quote // volume AS q0, (quote % volume) * 1000 AS r0 FROM volumes),
step1 AS (SELECT *, q0 * 1000 + r0 // volume AS q1, (r0 % volume) * 1000 AS r1 FROM step0),
step2 AS (SELECT *, q1 * 1000 + r1 // volume AS q2, (r1 % volume) * 1000 AS r2 FROM step1),
step3 AS (SELECT *, q2 * 1000 + r2 // volume AS q3, (r2 % volume) * 1000 AS r3 FROM step2),
step4 AS (SELECT *, q3 * 1000 + r3 // volume AS vwap FROM step3)
SELECT exchange, symbol, kind, '{timeframe}' AS timeframe, start_ns, open, high, low, close,
  volume::DECIMAL(38,0) AS volume, quote::DECIMAL(38,0) AS quote_volume, buy_volume::DECIMAL(38,0) AS buy_volume,
  coalesce(vwap, 0)::DECIMAL(38,0) AS vwap, trade_count, 0::BIGINT AS revision,
  open_key::DECIMAL(38,0) AS open_key, close_key::DECIMAL(38,0) AS close_key
FROM step4
"""


def with_scales(rows: pa.Table) -> pa.Table:
    """Give integers that count 10^-12 or 10^-18 their decimal type: the bytes stay, only the scale is said."""
    schema = candle_schema()
    columns = []
    for field in schema:
        column = rows[field.name]
        if pa.types.is_decimal(field.type) and column.type == KEY_TYPE and field.type != KEY_TYPE:
            chunks = [
                pa.Array.from_buffers(field.type, len(c), c.buffers(), c.null_count, c.offset) for c in column.chunks
            ]
            column = pa.chunked_array(chunks, field.type)
        columns.append(column)
    return exactly(pa.Table.from_arrays(columns, names=schema.names), schema)


def _rescaled(numbers: pa.Array, type_: pa.DataType) -> pa.Array:
    return pa.Array.from_buffers(type_, len(numbers), numbers.buffers(), numbers.null_count, numbers.offset)


def exactly(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return rows in a schema that says what the engine does not: no column holds nulls."""
    return rows.select(schema.names).cast(schema)


def _arrow(result: duckdb.DuckDBPyConnection) -> pa.Table:
    return result.to_arrow_table()


def _view(pin: Pin) -> str:
    table = TABLES[pin.table]
    if pin.snapshot_id is not None:
        return f"SELECT * FROM {source(pin)}"  # noqa: S608  # a path of our own
    nothing = ", ".join(f"NULL::{_SQL_TYPES[str(f.type)]} AS {f.name}" for f in arrow_schema(table, derived=True))
    return f"SELECT {nothing} WHERE false"


_SQL_TYPES = {
    "string": "VARCHAR",
    "binary": "BLOB",
    "bool": "BOOLEAN",
    "int64": "BIGINT",
    "timestamp[us, tz=UTC]": "TIMESTAMPTZ",
    "decimal128(38, 12)": "DECIMAL(38,12)",
    "decimal128(38, 18)": "DECIMAL(38,18)",
}


def _interrupt(
    cursor: duckdb.DuckDBPyConnection, done: threading.Event, late: threading.Event, deadline: float
) -> None:
    """Interrupt again and again until the question is over: an interrupt between two statements is lost."""
    if done.wait(max(0.0, deadline - time.monotonic())):
        return
    late.set()
    while not done.wait(_INTERRUPT_SECONDS):
        cursor.interrupt()


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
