"""Reads cold tables with DuckDB at a pinned metadata file, in a locked engine.

The engine may open files below the warehouse only, loads the Iceberg extension from its wheel
(nothing is downloaded or written to the home folder), and cannot be reconfigured afterwards.
"""

from __future__ import annotations

import importlib
import math
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from k2 import meters
from k2.candles import DIGITS, EXACT_TYPE, LARGEST_COUNT, PARTIAL_SCHEMA, trade_bounds, vwap
from k2.cold import readonly
from k2.cold.base import Pin
from k2.cold.whole import read_whole
from k2.errors import NotInstalled, Rejected, StoreDown, TimedOut, UnknownName, nearest
from k2.model import Selection
from k2.schema import CANDLES, FRAME_ROWS, KEY_SHIFT, TABLES, TIMEFRAMES, TRADES, Table, arrow_schema
from k2.sorting import in_order

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

    def read(self, pin: Pin, selection: Selection, timeout_seconds: float | None, *, coded: bool = False) -> pa.Table:
        """Return the selected rows of a pinned table, by time, then the rest of its sort order.

        With `coded` names may come as dictionaries.
        """
        table = TABLES[pin.table]
        where = conditions(table, selection)
        if pin.snapshot_id is None:
            return arrow_schema(table).empty_table()
        order = [table.time_column, *(c for c in table.sort if c != table.time_column)]
        if table is not CANDLES and not selection.limit:
            rows = self._read_all(pin, table, where, order, selection, timeout_seconds)
            return rows if coded else exactly(rows, arrow_schema(table))
        names = ", ".join(table.column_names)
        query = f"SELECT {names} FROM {source(pin)} WHERE {where}"  # noqa: S608  # see `conditions`
        if table is CANDLES:
            query += f" QUALIFY row_number() OVER (PARTITION BY {', '.join(table.key)} ORDER BY revision DESC) = 1"
        query = _ordered(query, order, selection)
        with self.cursor("read cold", timeout_seconds) as cursor:
            return exactly(_arrow(cursor.execute(query)), arrow_schema(table))

    def _read_all(
        self,
        pin: Pin,
        table: Table,
        where: str,
        order: Sequence[str],
        selection: Selection,
        timeout_seconds: float | None,
    ) -> pa.Table:
        """Return every row of a selection, as the files hold them: mostly in order, sorted only if not.

        Names may come as dictionaries.
        """
        deadline = math.inf if timeout_seconds is None else time.monotonic() + timeout_seconds
        asked = {"exchange": selection.exchange, "symbol": selection.symbol}
        fixed = {name: value for name, value in asked.items() if value is not None}
        names = ", ".join(name for name in table.column_names if name not in fixed)
        query = f"SELECT {names} FROM {source(pin)} WHERE {where}"  # noqa: S608  # see `conditions`
        with self.cursor("read cold", timeout_seconds) as cursor:
            rows = read_whole(cursor, pin, table, selection, self._folder / "warehouse", deadline)
            if rows is not None:
                return in_order(rows, order)
            rows = _arrow(cursor.execute(query))
        for name, value in fixed.items():
            rows = rows.append_column(name, pa.repeat(value, rows.num_rows))
        return in_order(exactly(rows, arrow_schema(table)), order)

    def candles(
        self, pin: Pin, timeframe: str, selection: Selection, kind: str | None, timeout_seconds: float | None
    ) -> pa.Table:
        """Return candles computed from pinned trades, sorted by start, exchange, symbol, kind."""
        usual, wide = (candle_query(pin, timeframe, selection, kind, form) for form in (_USUAL, _WIDE))
        if pin.snapshot_id is None:
            return PARTIAL_SCHEMA.empty_table()
        with self.cursor("compute candles from cold trades", timeout_seconds) as cursor:
            try:
                rows = _arrow(cursor.execute(usual))
            except duckdb.OutOfRangeException:  # a product or sum of more than 38 digits
                rows = None
            if rows is not None and not pc.any(rows["is_large"]).as_py():
                return usually_finished(rows)
            return finished(_arrow(cursor.execute(wide)))

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
                if str(error).startswith("INTERRUPT"):  # some functions tell of it in their own way
                    raise
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
                    meters.acted("cold.interrupt")
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
                try:
                    self._engine = self._locked_engine()
                except duckdb.Error as error:
                    raise StoreDown(f"start the engine that reads cold: {error}; it is tried again") from None
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


def conditions(table: Table, selection: Selection) -> str:
    """Return the WHERE clause of a selection.

    The derived timestamp is bounded beside the nanoseconds: files are partitioned by its day. Values
    are literals: DuckDB imports pandas, half a second, for the first value bound to a query.
    """
    where: list[str] = ["true"]
    for column, wanted in (("exchange", selection.exchange), ("symbol", selection.symbol)):
        if wanted is not None:
            if column not in table.column_names:
                raise Rejected(f"read cold: table {table.name!r} has no column {column!r}; leave the {column} out")
            where.append(f"{column} = {_text(wanted)}")
    if selection.logged_before_ns is not None:
        if "logged_ns" not in table.column_names:
            raise Rejected(f"read cold: rows of {table.name!r} carry no logged_ns; compute them from trades instead")
        where.append(f"logged_ns < {int(selection.logged_before_ns)}")
    derived = next(c.name for c in table.columns if c.derived_from == table.time_column)
    for ns, sign, loose in ((selection.start_ns, ">=", ">="), (selection.end_ns, "<", "<=")):
        if ns is not None:
            where += [
                f"{table.time_column} {sign} {int(ns)}",
                f"{derived} {loose} TIMESTAMPTZ {_quoted(_moment(ns).isoformat())}",
            ]
    return " AND ".join(where)


def _text(value: str) -> str:
    """Return text of others as a literal; DuckDB's parser would end at a NUL, and no name holds one."""
    if "\0" in value:
        raise Rejected(f"read cold: {value!r} is no name")
    return _quoted(value)


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


def candle_query(pin: Pin, timeframe: str, selection: Selection, kind: str | None, form: str) -> str:
    """Return the query that makes candles out of trades, in one of two forms that both are exact.

    `_USUAL` adds up decimals of 38 digits: DuckDB raises when a product has more, and `is_large` says that
    a sum is near it. `_WIDE`, twenty times slower, takes what is larger: its sums are in 128-bit integers. Price
    and amount (38,12) are split into whole and fraction, because their product at scale 24 needs up to 252
    bits. With price = P + p/10^12 and amount = A + a/10^12 the sum is sum(P*A) + sum(P*a + p*A) / 10^12 +
    sum(p*a) / 10^24; each of these has room for 10^9 of the largest trades there are (`k2.candles`). What goes
    beyond 12 and 24 decimals is carried, and only then sums are put together, unless they are too large.
    """
    if timeframe not in TIMEFRAMES:
        raise UnknownName(f"candles: no timeframe {timeframe!r}{nearest(timeframe, TIMEFRAMES)}")
    start_ns, end_ns = trade_bounds(timeframe, selection.start_ns, selection.end_ns)
    where = conditions(TRADES, msgspec.structs.replace(selection, start_ns=start_ns, end_ns=end_ns))
    if kind is not None:
        where += f" AND kind = {_text(kind)}"
    query = form.format(source=source(pin), where=where, length=TIMEFRAMES[timeframe], timeframe=timeframe)
    return _ordered(query, ("start_ns", "exchange", "symbol", "kind"), selection)


_E12 = 10**12
_ADDEND = pa.decimal256(EXACT_TYPE.precision - 1, EXACT_TYPE.scale)


def _joined(whole: str, rest: str, scale: int) -> str:
    """Put a sum together in units of 10^-scale, at most the largest number of that scale."""
    units = f"{whole} * {10**scale}::HUGEINT + {rest}"
    return f"if({whole} < {10 ** (DIGITS - scale)}::HUGEINT, {units}, {10**DIGITS - 1}::HUGEINT)::DECIMAL(38,0)"


_WIDE = f"""
WITH split AS (
  SELECT exchange, symbol, kind, exchange_ns - (exchange_ns % {{length}} + {{length}}) % {{length}} AS start_ns,
    price, amount, side, last_id::HUGEINT - first_id + 1 AS singles,
    exchange_ns::HUGEINT * {KEY_SHIFT}::HUGEINT
      + if(trade_id <> 0, trade_id::HUGEINT, log_offset::HUGEINT * {FRAME_ROWS} + row_in_frame) AS key,
    trunc(price)::DECIMAL(38,12) AS price_whole, trunc(amount)::DECIMAL(38,12) AS amount_whole
  FROM {{source}} WHERE NOT off_market AND {{where}}
), parts AS (
  SELECT * EXCLUDE (price_whole, amount_whole),
    price_whole::HUGEINT AS pw, ((price - price_whole) * {_E12}::DECIMAL(13,0))::HUGEINT AS pf,
    amount_whole::HUGEINT AS aw, ((amount - amount_whole) * {_E12}::DECIMAL(13,0))::HUGEINT AS af
  FROM split
), sums AS (
  SELECT exchange, symbol, kind, start_ns,
    arg_min(price, key) AS open, max(price) AS high, min(price) AS low, arg_max(price, key) AS close,
    sum(aw) AS a0, sum(af) AS a1,
    coalesce(sum(aw) FILTER (side = 'buy'), 0) AS b0, coalesce(sum(af) FILTER (side = 'buy'), 0) AS b1,
    sum(pw * aw) AS q0, sum(pw * af + pf * aw) AS q1, sum(pf * af) AS q2,
    sum(singles) AS singles, min(key) AS open_key, max(key) AS close_key
  FROM parts GROUP BY ALL
), carried AS (
  SELECT * REPLACE (a0 + a1 // {_E12} AS a0, a1 % {_E12} AS a1, b0 + b1 // {_E12} AS b0, b1 % {_E12} AS b1,
    q0 + (q1 + q2 // {_E12}) // {_E12} AS q0, (q1 + q2 // {_E12}) % {_E12} AS q1, q2 % {_E12} AS q2)
  FROM sums
)
SELECT exchange, symbol, kind, '{{timeframe}}' AS timeframe, start_ns, open, high, low, close,
  {_joined("a0", "a1", 12)} AS volume, {_joined("q0", "(q1 * 1000000 + q2 // 1000000)", 18)} AS quote_volume,
  {_joined("b0", "b1", 12)} AS buy_volume,
  least(singles, {LARGEST_COUNT})::BIGINT AS trade_count, 0::BIGINT AS revision,
  open_key::DECIMAL(38,0) AS open_key, close_key::DECIMAL(38,0) AS close_key,
  q0::DECIMAL(38,0) AS quote_whole, (q1 * {_E12} + q2)::DECIMAL(38,0) AS quote_rest
FROM carried
"""  # noqa: S608  # numbers of our own


_USUAL = f"""
WITH keyed AS (
  SELECT exchange, symbol, kind, exchange_ns - (exchange_ns % {{length}} + {{length}}) % {{length}} AS start_ns,
    price, amount, side, last_id::HUGEINT - first_id + 1 AS singles,
    exchange_ns::HUGEINT * {KEY_SHIFT}::HUGEINT
      + if(trade_id <> 0, trade_id::HUGEINT, log_offset::HUGEINT * {FRAME_ROWS} + row_in_frame) AS key
  FROM {{source}} WHERE NOT off_market AND {{where}}
), sums AS (
  SELECT exchange, symbol, kind, start_ns,
    arg_min(price, key) AS open, max(price) AS high, min(price) AS low, arg_max(price, key) AS close,
    sum(amount) AS volume, coalesce(sum(amount) FILTER (side = 'buy'), 0) AS buy_volume,
    sum(price * amount) AS quote_exact, sum(singles) AS singles, min(key) AS open_key, max(key) AS close_key
  FROM keyed GROUP BY ALL
)
SELECT exchange, symbol, kind, '{{timeframe}}' AS timeframe, start_ns, open, high, low, close,
  volume, buy_volume, quote_exact, least(singles, {LARGEST_COUNT})::BIGINT AS trade_count, 0::BIGINT AS revision,
  open_key::DECIMAL(38,0) AS open_key, close_key::DECIMAL(38,0) AS close_key,
  volume > {10**25} OR quote_exact > {10**13} AS is_large
FROM sums
"""  # noqa: S608  # numbers of our own


def usually_finished(rows: pa.Table) -> pa.Table:
    """Make candles of what `_USUAL` gives: quote volume, cut at its scale, and vwap are missing."""
    exact = rows["quote_exact"]
    cut = exact.cast(PARTIAL_SCHEMA.field("quote_volume").type, safe=False)
    sums = zip(cut.to_pylist(), rows["volume"].to_pylist(), strict=True)
    added = {
        "quote_volume": cut,
        "vwap": pa.array([vwap(*pair) for pair in sums], PARTIAL_SCHEMA.field("vwap").type),
        "quote_exact": exact.cast(EXACT_TYPE),
    }
    columns = {**{name: rows[name] for name in rows.column_names}, **added}
    return exactly(pa.table(columns), PARTIAL_SCHEMA)


def finished(rows: pa.Table) -> pa.Table:
    """Make candles of what `_WIDE` gives: sums are integers in units of their last place, vwap is missing.

    `quote_whole` and `quote_rest` are `quote_exact` before and after the point.
    """
    columns = {name: rows[name] for name in rows.column_names}
    for name in ("volume", "quote_volume", "buy_volume"):
        columns[name] = _rescaled(columns[name], PARTIAL_SCHEMA.field(name).type)
    sums = zip(columns["quote_volume"].to_pylist(), columns["volume"].to_pylist(), strict=True)
    columns["vwap"] = pa.array([vwap(*pair) for pair in sums], PARTIAL_SCHEMA.field("vwap").type)
    rest = _rescaled(columns["quote_rest"], pa.decimal128(DIGITS, EXACT_TYPE.scale))
    columns["quote_exact"] = pc.add(columns["quote_whole"].cast(_ADDEND), rest.cast(_ADDEND))
    return exactly(pa.table(columns), PARTIAL_SCHEMA)


def _rescaled(numbers: pa.ChunkedArray, type_: pa.DataType) -> pa.ChunkedArray:
    """Say that integers count 10^-12 or 10^-18: the bytes stay."""
    return pa.chunked_array(
        [pa.Array.from_buffers(type_, len(c), c.buffers(), c.null_count, c.offset) for c in numbers.chunks], type_
    )


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
