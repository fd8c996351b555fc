"""The memory tail: the newest rows, from the moment they are made until hot has them.

Rows wait here so that hot can be written in large batches while queries are milliseconds fresh.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import pyarrow as pa

from k2.model import Positions

Row = tuple[Any, ...]
Convert = Callable[[str, list[Row]], pa.Table]

_PIECE_ROWS = 32_768  # pieces above are not copied together any more


class TailSource(Protocol):
    """Where the rows that hot does not have yet can be had."""

    def snapshot(self, table: str) -> tuple[Positions, pa.Table]:
        """Return (T, rows): hot has all rows of offsets below T[p]; the rows at or above are given.

        A partition missing in T has nothing in the tail: hot has all there is.
        """


class Generation:
    """The rows of one coming flush: offsets `start` .. `end` (exclusive) of each partition."""

    def __init__(self, start: Positions, tables: Iterable[str], convert: Convert) -> None:
        self.start = dict(start)
        self.end = dict(start)
        self.rows: dict[str, list[Row]] = {table: [] for table in tables}
        self.row_count = 0
        self.byte_count = 0
        self._sealed: dict[str, list[pa.Table]] = {table: [] for table in self.rows}
        self._convert = convert
        self._lock = threading.Lock()

    def add(
        self, rows: dict[str, list[Row]], partition: str, start_offset: int, end_offset: int, size_bytes: int = 0
    ) -> None:
        """Take in the rows made from offsets `start_offset` .. `end_offset` (exclusive); they are visible at once.

        `size_bytes` is what they hold beyond the usual.
        """
        with self._lock:
            self.byte_count += size_bytes
            self.start.setdefault(partition, start_offset)
            for table, new in rows.items():
                self.rows[table].extend(new)
                self.row_count += len(new)
            self.end[partition] = end_offset

    def add_tables(self, tables: Mapping[str, pa.Table], partition: str, start_offset: int, end_offset: int) -> None:
        """Take in rows that are columns already; see `add`."""
        with self._lock:
            self.start.setdefault(partition, start_offset)
            for table, new in tables.items():
                if new.num_rows:
                    self._seal(table, new)
                    self.row_count += new.num_rows
            self.end[partition] = end_offset

    def arrow(self, table: str) -> pa.Table:
        """Return the rows so far; what was converted once is not converted again."""
        with self._lock:
            waiting = self.rows[table]
            if waiting or not self._sealed[table]:
                self._seal(table, self._convert(table, waiting))
                self.rows[table] = []
            return pa.concat_tables(self._sealed[table])

    def _seal(self, table: str, rows: pa.Table) -> None:
        """Keep converted rows, in large pieces mostly: many small ones are slow to read."""
        sealed = self._sealed[table]
        sealed.append(rows)
        while len(sealed) > 1 and sealed[-2].num_rows <= min(sealed[-1].num_rows, _PIECE_ROWS):
            last = sealed.pop()
            sealed[-1] = pa.concat_tables([sealed[-1], last]).combine_chunks()


class Tail:
    """The generations not yet in hot: at most one being flushed and one being filled."""

    def __init__(self, generation: Generation) -> None:
        self._lock = threading.Lock()
        self._flushing: Generation | None = None
        self._filling = generation

    @property
    def row_count(self) -> int:
        """Rows held at the moment."""
        with self._lock:
            return self._filling.row_count + (self._flushing.row_count if self._flushing else 0)

    @property
    def byte_count(self) -> int:
        """Bytes held beyond those usual for the rows."""
        with self._lock:
            return self._filling.byte_count + (self._flushing.byte_count if self._flushing else 0)

    @property
    def filling(self) -> Generation:
        """The generation rows are added to."""
        return self._filling

    @property
    def end(self) -> Positions:
        """Offset per partition up to which rows were made (exclusive)."""
        return self._filling.end

    def turn(self, generation: Generation) -> Generation:
        """Start filling a new generation and return the full one, which stays visible until `flushed`."""
        with self._lock:
            if self._flushing is not None:
                raise RuntimeError("a generation is still being flushed")
            full, self._filling, self._flushing = self._filling, generation, self._filling
        return full

    def flushed(self) -> None:
        """Forget the flushed generation: hot has its rows now."""
        with self._lock:
            self._flushing = None

    def snapshot(self, table: str) -> tuple[Positions, pa.Table]:
        """See TailSource."""
        with self._lock:
            held = [g for g in (self._flushing, self._filling) if g is not None]
        parts = [generation.arrow(table) for generation in held]
        start: dict[str, int] = {}
        for generation in reversed(held):
            start.update(generation.start)
        return start, pa.concat_tables(parts)


_POSITIONS = b"k2.positions"


def encode_snapshot(tail: TailSource, table: str) -> bytes:
    """Return a snapshot as an Arrow IPC stream, its positions in the schema's metadata."""
    start, rows = tail.snapshot(table)
    rows = rows.replace_schema_metadata({_POSITIONS: json.dumps(dict(start)).encode()})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows)
    return bytes(sink.getvalue())


class RemoteTail:
    """The tail of the process that ingests; `fetch(table)` brings its encoded snapshot, None if there is no tail."""

    def __init__(self, fetch: Callable[[str], bytes | None], empty: Callable[[str], pa.Table]) -> None:
        self._fetch = fetch
        self._empty = empty

    def snapshot(self, table: str) -> tuple[Positions, pa.Table]:
        """See TailSource."""
        data = self._fetch(table)
        if data is None:
            return {}, self._empty(table)
        rows = pa.ipc.open_stream(data).read_all()
        return json.loads(rows.schema.metadata[_POSITIONS]), rows.replace_schema_metadata(None)
