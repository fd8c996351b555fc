"""Writes rows the way people and programs want them: table, CSV, JSON, Parquet, Arrow.

Decimals in text are exact, plain (never `1E-7`) and without trailing zeros: `61837.63`. Text
formats carry an ISO 8601 time with all nine decimals beside each table's time in nanoseconds.
"""

from __future__ import annotations

import base64
import csv
import io
import os
import sys
from collections.abc import Callable, Iterator
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from k2.cold.base import Snapshot
from k2.errors import Rejected, StoreDown, UnknownName, nearest
from k2.query.times import format_ns
from k2.schema import ARROW, TABLES, Table, Type, arrow_schema

if TYPE_CHECKING:
    from rich.console import Console

FORMATS = ("table", "csv", "json", "ndjson", "parquet", "arrow")
BINARY = ("parquet", "arrow")

TABLE_METADATA = b"k2.table"
"""Key of the schema metadata that names the declared table rows belong to."""

_CHUNK_ROWS = 10_000
_FEW_ROWS = 20  # from there on columns are quicker than rows
_JOINED_BYTES = 64 << 20  # Arrow's text ends at 2 GiB, and escaping makes six letters of one
_ESCAPED = r'["\\\x00-\x1f]'  # what JSON text must not hold as it is
ARROW_ROWS = 65_536  # of one batch of a stream
_WIDE = 10_000  # columns of a console that is not a terminal: nothing is folded or cut

# What a person looks at first; the other columns are in the other formats.
_SHOWN = {
    "trades": ("exchange_time", "exchange", "symbol", "side", "price", "amount", "trade_id", "kind", "source"),
    "quotes": ("received_time", "exchange", "symbol", "bid_price", "bid_amount", "ask_price", "ask_amount", "source"),
    "candles": (
        *("start_time", "exchange", "symbol", "open", "high", "low", "close"),
        *("volume", "vwap", "trade_count", "kind"),
    ),
    "gaps": ("received_time", "exchange", "symbol", "kind", "status", "first_id", "last_id", "missing", "cause"),
    "dead_letters": ("received_time", "exchange", "reason", "detail", "log_partition", "log_offset"),
    "frames": ("received_time", "exchange", "kind", "connection", "epoch", "counter", "log_offset", "data"),
}


def write(
    rows: pa.Table, fmt: str, destination: str | Path | BinaryIO | None = None, *, table: Table | None = None
) -> None:
    """Write rows to a file, a binary stream, or (None, or "-") standard output.

    `table` is the declaration the rows belong to; without it, the one their metadata names, if any
    (free SQL has its own columns). A file appears whole or not at all.

    Raises:
        UnknownName: no such format.
        Rejected: the file cannot be made, or a binary format would go to a terminal.
        StoreDown: writing failed midway (disk full...).
    """
    if fmt not in FORMATS:
        raise UnknownName(f"format {fmt!r} is unknown{nearest(fmt, FORMATS)}")
    table = table or TABLES.get((rows.schema.metadata or {}).get(TABLE_METADATA, b"").decode())
    if destination is None or str(destination) == "-":
        if fmt in BINARY and sys.stdout.isatty():
            raise Rejected(f"{fmt} is not for a terminal: write it to a file with -o FILE, or pipe it on")
        sys.stdout.flush()
        _write(rows, fmt, sys.stdout.buffer, table)
        sys.stdout.buffer.flush()
    elif isinstance(destination, str | Path):
        _write_file(rows, fmt, Path(destination), table)
    else:
        _write(rows, fmt, destination, table)


def with_times(rows: pa.Table, table: Table) -> pa.Table:
    """Add the derived timestamps (microseconds UTC) at their declared places; names stay text or dictionaries."""
    columns, fields = [], []
    for field, column in zip(arrow_schema(table, derived=True), table.columns, strict=True):
        if column.derived_from:
            micros = pc.divide(rows[column.derived_from], 1_000)
            columns.append(micros.cast(ARROW[column.type]))
        else:
            columns.append(rows[column.name])
        is_coded = pa.types.is_dictionary(columns[-1].type)
        fields.append(field.with_type(columns[-1].type) if is_coded else field)
    return pa.table(columns, schema=pa.schema(fields))


def plain_snapshot(snapshot: Snapshot) -> dict[str, Any]:
    """Return a commit as plain values, its time also as text."""
    row = {name: getattr(snapshot, name) for name in snapshot.__dataclass_fields__}
    times = {"committed_time": format_ns(snapshot.committed_ns)}
    return {**row, "start": dict(snapshot.start), "end": dict(snapshot.end), **times}


def texts(rows: pa.Table, table: Table | None = None) -> pa.Table:
    """Return rows with decimals, times and bytes as text; numbers and booleans stay."""
    if table is None:
        return pa.table({name: _text(rows[name]) for name in rows.column_names})
    return pa.table(
        {
            column.name: _iso(rows[column.derived_from]) if column.derived_from else _text(rows[column.name])
            for column in table.columns
        }
    )


def decimal_texts(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return decimals as exact plain text without trailing zeros."""
    text = pc.cast(values, pa.string())
    if values.type.scale > 0:
        text = pc.ascii_rtrim(pc.ascii_rtrim(text, "0"), ".")
    # Arrow writes zero and numbers below 10^-6 with an exponent: "0E-12", "5.00000E-7".
    scientific = pc.match_substring(text, "E")
    if not pc.any(scientific).as_py():
        return text
    plain = pa.array([plain_decimal(v) for v in values.filter(scientific).to_pylist()], pa.string())
    return pc.replace_with_mask(text.combine_chunks(), scientific.combine_chunks(), plain)


def plain_decimal(value: Decimal) -> str:
    """Return one decimal as exact plain text without trailing zeros."""
    text = format(value, "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text in ("", "-0") else text


def json_lines(rows: pa.Table, table: Table | None = None) -> Iterator[bytes]:
    """Yield rows as JSON objects, one per line, in chunks of lines."""
    for chunk in _chunks(rows):
        yield _json_objects(chunk, table, b"\n") + b"\n"


def json_rows(rows: pa.Table, table: Table | None = None) -> Iterator[bytes]:
    """Yield rows as JSON objects separated by commas: the inside of an array."""
    separator = b""
    for chunk in _chunks(rows):
        yield separator + _json_objects(chunk, table, b",\n")
        separator = b",\n"


def csv_lines(rows: pa.Table, table: Table | None = None) -> Iterator[bytes]:
    """Yield rows as CSV (RFC 4180, UTF-8) with a header line, in chunks of lines."""
    names = texts(rows.slice(0, 0), table).column_names
    yield (",".join(_quoted(name) for name in names) + "\n").encode()
    for chunk in _chunks(rows):
        yield _csv_chunk(_flat(texts(chunk, table)))


def arrow_stream(rows: pa.Table) -> Iterator[bytes]:
    """Yield rows as an Arrow IPC stream, batch by batch."""
    buffer = io.BytesIO()
    with pa.ipc.new_stream(buffer, rows.schema) as writer:
        for batch in rows.to_batches(max_chunksize=ARROW_ROWS):
            writer.write_batch(batch)
            yield buffer.getvalue()
            buffer.seek(0)
            buffer.truncate()
    yield buffer.getvalue()


def show(rows: pa.Table, console: Console, table: Table | None = None) -> None:
    """Print rows as a grid, of a declared table its main columns only."""
    from rich.table import Table as Grid

    readable = texts(rows, table)
    names = _SHOWN[table.name] if table is not None else tuple(readable.column_names)
    grid = Grid(box=None, pad_edge=False, header_style="bold")
    for name in names:
        number = name in rows.column_names and not pa.types.is_string(rows.schema.field(name).type)
        grid.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in zip(*(readable[name].to_pylist() for name in names), strict=True):
        grid.add_row(*("" if value is None else str(value) for value in row))
    console.print(grid)


def _write(rows: pa.Table, fmt: str, stream: BinaryIO, table: Table | None) -> None:
    """Write one format to an open stream."""
    if fmt == "table":
        from rich.console import Console

        text = io.StringIO()
        terminal = stream is getattr(sys.stdout, "buffer", None) and sys.stdout.isatty()
        show(rows, Console() if terminal else Console(file=text, width=_WIDE), table)
        stream.write(text.getvalue().encode())
        return
    for chunk in _WRITERS[fmt](rows, table):
        stream.write(chunk)


def _json_array(rows: pa.Table, table: Table | None) -> Iterator[bytes]:
    yield b"["
    yield from json_rows(rows, table)
    yield b"]\n"


def _arrow(rows: pa.Table, table: Table | None) -> Iterator[bytes]:
    yield from arrow_stream(rows if table is None else with_times(rows, table))


def _parquet(rows: pa.Table, table: Table | None) -> Iterator[bytes]:
    buffer = pa.BufferOutputStream()
    from pyarrow.parquet import write_table

    write_table(rows if table is None else with_times(rows, table), buffer, compression="zstd")
    yield buffer.getvalue()


_WRITERS: dict[str, Callable[[pa.Table, Table | None], Iterator[bytes]]] = {
    "csv": csv_lines,
    "json": _json_array,
    "ndjson": json_lines,
    "parquet": _parquet,
    "arrow": _arrow,
}


def _write_file(rows: pa.Table, fmt: str, path: Path, table: Table | None) -> None:
    # A pipe or device is written as it is; a file is made beside its place and moved there.
    special = path.exists() and not path.is_file()
    target = path if special else path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        stream = target.open("wb")
    except OSError as error:
        raise Rejected(f"write {fmt} to {path}: {error.strerror} (choose another place with -o)") from None
    try:
        with stream:
            _write(rows, fmt, stream, table)
        if not special:
            target.replace(path)
    except OSError as error:
        if not special:
            target.unlink(missing_ok=True)
        raise StoreDown(f"write {fmt} to {path}: {error.strerror}; nothing was left there") from None


def _bytes_text(value: bytes | None) -> str | None:
    """Return what exchanges send as the text it is; bytes that are no text as `base64:...`."""
    if value is None:
        return None
    try:
        return value.decode()
    except UnicodeDecodeError:
        return "base64:" + base64.b64encode(value).decode()


# How the values of a declared column become text, where they are not given as they are.
_PLAIN: dict[pa.DataType, Callable[[Any], Any]] = {
    ARROW[Type.DECIMAL]: plain_decimal,
    ARROW[Type.WIDE]: plain_decimal,
    ARROW[Type.TIMESTAMP]: format_ns,
    ARROW[Type.BYTES]: _bytes_text,
}


def _chunks(rows: pa.Table) -> Iterator[pa.Table]:
    for start in range(0, rows.num_rows, _CHUNK_ROWS):
        yield rows.slice(start, _CHUNK_ROWS)


def _json_objects(rows: pa.Table, table: Table | None, separator: bytes) -> bytes:
    """Return at least one row as JSON objects with a separator in between."""
    if table is not None and rows.num_rows <= _FEW_ROWS:
        return separator.join(_few_objects(rows, table))
    shown = texts(rows, table)
    if not shown.num_columns or shown.nbytes > _JOINED_BYTES or not all(map(_is_plain, shown.schema.types)):
        encode = msgspec.json.Encoder(enc_hook=_encode, decimal_format="string").encode
        return separator.join(map(encode, shown.to_pylist()))
    return _joined_objects(rows, shown, separator)


def _few_objects(rows: pa.Table, table: Table) -> Iterator[bytes]:
    """Yield each row as a JSON object, by way of Python's: each call of Arrow costs more than a few rows do."""
    names = [column.derived_from or column.name for column in table.columns]
    make = [_PLAIN.get(ARROW[column.type], _same) for column in table.columns]
    encode = msgspec.json.Encoder().encode
    for row in rows.to_pylist():
        values = zip(table.columns, make, names, strict=True)
        yield encode({column.name: None if row[name] is None else to(row[name]) for column, to, name in values})


def _same(value: Any) -> Any:
    return value


def _joined_objects(source: pa.Table, shown: pa.Table, separator: bytes) -> bytes:
    """Put JSON objects together a column at a time, from text, integers and booleans.

    As objects of Python they would take twice as long, and hold up every other thread meanwhile.
    """
    parts: list[Any] = ["{"]  # text, the same for every row, and columns in turn
    for name, values in zip(shown.column_names, shown.columns, strict=True):
        is_safe = name not in source.column_names or not _is_free_text(source.schema.field(name).type)
        begin = f"{'' if parts == ['{'] else ','}{msgspec.json.encode(name).decode()}:"
        for part in (begin, *_json_cells(values, is_safe)):
            if isinstance(part, str) and isinstance(parts[-1], str):
                parts[-1] += part
            else:
                parts.append(part)
    if len(parts) == 1:  # all rows are the same
        return separator.join([f"{parts[0]}}}".encode()] * shown.num_rows)
    objects = pc.binary_join_element_wise(*parts, "}", "").combine_chunks()
    lists = pa.ListArray.from_arrays(pa.array([0, len(objects)], pa.int32()), objects)
    return bytes(pc.binary_join(lists, separator.decode())[0].as_buffer())


def _is_plain(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind))


def _is_free_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _json_cells(values: pa.ChunkedArray, is_safe: bool) -> list[str | pa.ChunkedArray]:
    """Return the cells as JSON text with what stands around them; text of a number is text as it is."""
    if not pa.types.is_string(values.type):
        return [values.cast(pa.string()).fill_null("null")]
    if not is_safe:
        different = pc.unique(values)  # names repeat, or are all the same
        if len(different) == 1:
            return [msgspec.json.encode(different[0].as_py()).decode()]
        is_safe = not pc.any(pc.match_substring_regex(different, _ESCAPED)).as_py()
    if values.null_count or not is_safe:
        return [pa.chunked_array([[msgspec.json.encode(v).decode() for v in values.to_pylist()]], pa.string())]
    return ['"', values, '"']


def _iso(times_ns: pa.ChunkedArray) -> pa.ChunkedArray:
    # A twelfth of the time of strftime: Arrow writes "2024-08-08 10:05:03.123456789" by itself.
    text = times_ns.cast(pa.timestamp("ns")).cast(pa.string()).cast(pa.binary())
    return pc.binary_join_element_wise(pc.binary_replace_slice(text, 10, 11, b"T").cast(pa.string()), "Z", "")


def _text(values: pa.ChunkedArray) -> pa.ChunkedArray:
    kind = values.type
    if pa.types.is_decimal(kind):
        return decimal_texts(values)
    if pa.types.is_timestamp(kind):
        return _iso(values.cast(pa.timestamp("ns", kind.tz)).cast(pa.int64()))
    if pa.types.is_date(kind):
        return values.cast(pa.string())
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return pa.chunked_array([pa.array([_bytes_text(v) for v in values.to_pylist()], pa.string())])
    return values


def _flat(rows: pa.Table) -> pa.Table:
    """Turn columns CSV has no form for (lists, structs of free SQL) into JSON text."""
    encode = msgspec.json.Encoder(enc_hook=_encode, decimal_format="string").encode
    for index, field in enumerate(rows.schema):
        if pa.types.is_nested(field.type):
            cells = [None if v is None else encode(v).decode() for v in rows[field.name].to_pylist()]
            rows = rows.set_column(index, field.name, pa.array(cells, pa.string()))
    return rows


def _encode(value: Any) -> Any:
    if isinstance(value, date | datetime):
        return value.isoformat()
    return str(value)


def _csv_chunk(rows: pa.Table) -> bytes:
    """Quote only what must be; Arrow's fast writer quotes every text or none."""
    if any(_needs_quotes(rows[name]) for name in rows.column_names):
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows(zip(*(_cells(rows[name]) for name in rows.column_names), strict=True))
        return text.getvalue().encode()
    buffer = io.BytesIO()
    from pyarrow.csv import WriteOptions, write_csv

    write_csv(rows, buffer, WriteOptions(include_header=False, quoting_style="none"))
    return buffer.getvalue()


def _needs_quotes(values: pa.ChunkedArray) -> bool:
    return pa.types.is_string(values.type) and bool(pc.any(pc.match_substring_regex(values, '[",\r\n]')).as_py())


def _cells(values: pa.ChunkedArray) -> list[Any]:
    # Booleans as Arrow's writer has them: true, false.
    cells: list[Any] = (values.cast(pa.string()) if pa.types.is_boolean(values.type) else values).to_pylist()
    return cells


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"' if any(c in name for c in ',"\r\n') else name
