"""The cold port: exactly-once history in open tables, with time travel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa

from k2.model import Positions, Selection


@dataclass(frozen=True)
class Pin:
    """One state of one cold table; reading it gives the same rows for as long as it is retained.

    `watermark` is the offset (exclusive end) per partition up to which the table holds everything.
    `location` is the metadata file; empty for a table without any commit.
    """

    table: str
    location: str
    snapshot_id: int | None
    committed_ns: int
    watermark: Positions


@dataclass(frozen=True)
class Snapshot:
    """One commit of one cold table, for people and time travel."""

    table: str
    snapshot_id: int
    committed_ns: int
    operation: str  # append | compact | ...
    rows_added: int
    rows_total: int
    files_total: int
    bytes_total: int
    start: Positions
    end: Positions


@dataclass(frozen=True)
class Maintenance:
    """What one maintenance run did to one table."""

    table: str
    files_before: int
    files_after: int
    snapshots_expired: int
    orphans_removed: int
    bytes_removed: int


class Cold(Protocol):
    """Append-only tables whose progress is part of each commit. Rows as `schema.arrow_schema(table)`.

    One writer at a time holds the lease; any number of readers, in any process, at any time.
    """

    def acquire_lease(self) -> None:
        """Become the one writer, until `close` or the death of the process.

        Raises InUse naming the holder.
        """

    def pin(self, table: str, *, snapshot_id: int | None = None) -> Pin:
        """Return the current state of a table, or the one of a snapshot.

        Raises UnknownName when that snapshot does not exist (any more).
        """

    def append(
        self, table: str, rows: pa.Table, *, start: Positions, end: Positions, properties: dict[str, str] | None = None
    ) -> Pin:
        """Commit rows and the progress `start` -> `end` in one atomic step, sorted, partitioned by day and exchange.

        Partitions not named keep their watermark. `rows` may be empty: progress alone is committed.
        `properties` are stored with the table in the same step (see `properties`).
        Nothing in here retries.

        Raises:
            NotSuccessor: start[p] is not the committed watermark of a partition (0 when new),
                or another writer committed meanwhile; nothing is committed. Pin again and decide.
            StoreDown: committed or not is unknown; pin again to find out.
        """

    def properties(self, table: str) -> dict[str, str]:
        """Return what was last stored through `append(properties=...)`, empty without any commit."""

    def read(
        self, pin: Pin, selection: Selection, *, timeout_seconds: float | None = None, coded: bool = False
    ) -> pa.Table:
        """Return rows of the pinned state, sorted by time, then the rest of `Table.sort`.

        For `candles` only the highest revision of each key. The stored columns only (no derived
        timestamps); with `coded` names may come as dictionaries, which is faster. Raises TimedOut when
        interrupted at `timeout_seconds`.
        """

    def candles_from_trades(
        self,
        pin: Pin,
        timeframe: str,
        selection: Selection,
        *,
        kind: str | None = None,
        timeout_seconds: float | None = None,
    ) -> pa.Table:
        """Compute candles from the trades of a pinned state; the columns of `Hot.candles` but `last_offset`."""

    def sql(self, query: str, *, timeout_seconds: float, limit: int) -> pa.Table:
        """Run one read-only SELECT over views named like the tables, each pinned to its current state.

        Raises:
            Rejected: not a single read-only statement, or a file or network function.
            TimedOut: interrupted at `timeout_seconds`.
        """

    def snapshots(self, table: str | None = None) -> list[Snapshot]:
        """Return the retained commits, oldest first."""

    def snapshot_at(self, table: str, time_ns: int) -> int | None:
        """Return the id of the last snapshot committed at or before a time, or None."""

    def maintain(self, *, now_ns: int) -> list[Maintenance]:
        """Compact small files, expire old snapshots, remove orphans; safe twice and while appending."""

    def close(self) -> None:
        """Give the lease back and release everything."""
