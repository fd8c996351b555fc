"""The hot port: recent rows and candles, ready to query."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import pyarrow as pa

from k2.model import Positions, Selection


class Hot(Protocol):
    """Recent typed rows, and the candles made from them, for one writer and many readers.

    Rows are Arrow tables in the schema of `schema.arrow_schema(table)`. Nothing in here
    retries. Every method may be called from any thread.
    """

    def write(self, table: str, rows: pa.Table, token: str) -> None:
        """Store rows of one table; the same rows under the same token change nothing.

        Called by one writer, in order, at least once. After it returns the rows, and for
        `trades` the candles of every timeframe, survive the death of the process (not
        necessarily of the machine: the log is what survives that). After a crash the last
        write is sent again, with the same token, and completes whatever was left undone.

        Raises:
            StoreDown: stored or not is unknown; writing again is safe.
            Rejected: these rows can never be stored.
        """

    def read(
        self,
        selection: Selection,
        *,
        start: Positions | None = None,
        end: Positions | None = None,
        timeout_seconds: float | None = None,
        coded: bool = False,
    ) -> pa.Table:
        """Return rows of `selection.table` (not candles), sorted by time, then the rest of `Table.sort`.

        With `coded` names may come as dictionaries, which is faster.

        `start`/`end` cut by log offset: only rows with start[p] <= log_offset < end[p].
        A partition missing in `start` counts from 0; missing in `end` it has no bound
        (in an `end` that is given, too).

        Raises:
            TimedOut: interrupted at `timeout_seconds`.
        """

    def read_range(self, table: str, start: Positions, end: Positions) -> pa.Table:
        """Return all rows with start[p] <= log_offset < end[p] of the partitions in `end`, in `Table.sort` order.

        Names may come as dictionaries of text.
        """

    def counts(self, table: str, start: Positions, end: Positions) -> int:
        """Return how many rows `read_range` would give."""

    def candles(
        self, timeframe: str, selection: Selection, *, kind: str | None = None, timeout_seconds: float | None = None
    ) -> pa.Table:
        """Return candles, sorted by start_ns, exchange, symbol, kind.

        The columns are those of `schema.CANDLES` plus those by which a partial candle of later rows
        can be merged in, each row once: `open_key` and `close_key` (decimal128(38,0), see
        `candles.candle_key`), `quote_exact` (decimal256(76,24): quote_volume before it is cut), and
        `last_offset`, the highest log offset that went into the candle. A write is seen whole or
        not at all in a candle. Sums too large for their type are its largest number (`k2.candles`).
        `selection.table` is "candles"; time bounds apply to start_ns.
        """

    def closed_candles(self, start: Positions, end: Positions, closed_after_ns: int, closed_before_ns: int) -> pa.Table:
        """Return the candles of all timeframes that cold needs next, in the schema of CANDLES.

        Those that end at or before `closed_before_ns` and either end after `closed_after_ns`
        or were touched by a trade with start[p] <= log_offset < end[p].
        """

    def delete(self, below: Positions, before_ns: int) -> dict[str, int]:
        """Delete rows with log_offset < below[p] and logged_ns < `before_ns`; candles stay.

        By the time of logging, not of the trade: an imported recording of last year stays as
        long as anything else that came today.

        Returns the number of rows deleted per table. Called only with offsets cold holds.
        """

    def reset(self) -> None:
        """Forget everything: rows, candles and tokens. Called by the owner only."""

    def sql(self, query: str, *, timeout_seconds: float, limit: int) -> pa.Table:
        """Run one read-only SELECT on the hot tables; no file, network or system functions.

        Raises:
            Rejected: not a single read-only statement, or refused by the engine.
            TimedOut: interrupted at `timeout_seconds`.
        """

    def symbols(self) -> list[tuple[str, str]]:
        """Return the (exchange, symbol) pairs that have candles, or were ever quoted, sorted.

        Cheap, however many rows there are.
        """

    def statistics(self) -> Mapping[str, Mapping[str, int]]:
        """Return per table: `rows`, `bytes` on disk, `parts`."""

    def memory(self) -> Mapping[str, int]:
        """Return what the engine holds in memory, bytes by part: `tracked` is all it knows of; empty: nobody counts."""

    def close(self) -> None:
        """Release the engine and its folder."""
