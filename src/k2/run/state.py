"""What ingest must remember across a crash: intents, progress, id ledgers. One SQLite file.

A flush is *intended* (its offset ranges are written down) before the first insert and *done*
(progress, ledgers and row counts, in one transaction) after the last. A flush found intended
at a start is made again from the same ranges and the same ledgers, so its rows and its
deduplication tokens are the same.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path

import msgspec

from k2.errors import Misconfigured, StoreDown
from k2.model import Positions
from k2.run.accounting import IdLedger
from k2.run.normalise import PartitionState

VERSION = 1
KEPT_FLUSHES = 2_000
"""Flushes whose row counts are kept, for the offload to check against (at least an hour of them)."""

_TABLES = """
CREATE TABLE IF NOT EXISTS version (number INTEGER NOT NULL, identity TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS progress (partition TEXT PRIMARY KEY, end_offset INTEGER NOT NULL, state BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS flushes (
    number INTEGER PRIMARY KEY, done INTEGER NOT NULL, start TEXT NOT NULL, end TEXT NOT NULL, counts TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS ledgers (
    partition TEXT NOT NULL, symbol TEXT NOT NULL, kind TEXT NOT NULL, state BLOB NOT NULL,
    PRIMARY KEY (partition, symbol, kind));
"""

Ledgers = dict[tuple[str, str], IdLedger]


class FlushRecord(msgspec.Struct, frozen=True):
    """One flush: offsets `start[p]` .. `end[p]` (exclusive) of each partition, and its rows per table."""

    number: int
    start: dict[str, int]
    end: dict[str, int]
    counts: dict[str, dict[str, int]] = {}


class IngestState:
    """The state file of one installation; written by ingest only, read by anyone."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=10.0, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(_TABLES)
            self.identity = self._check_version()
        except (sqlite3.Error, OSError) as error:
            raise StoreDown(
                f"open the ingest state {path}: {error}; check the folder's permissions and space"
            ) from error

    def _check_version(self) -> str:
        """Return the identity of this file, made with it; refuse a newer layout."""
        row = self._db.execute("SELECT number, identity FROM version").fetchone()
        if row is None:
            row = (VERSION, uuid.uuid4().hex)
            self._db.execute("INSERT INTO version VALUES (?, ?)", row)
        elif row[0] > VERSION:
            raise Misconfigured(
                f"the data folder was written by a newer K2 (state {row[0]}, this one knows {VERSION}): upgrade k2"
            )
        return str(row[1])

    def progress(self) -> dict[str, int]:
        """Return per partition the offset up to which hot holds everything (exclusive)."""
        with self._lock:
            return dict(self._db.execute("SELECT partition, end_offset FROM progress").fetchall())

    def partition_states(self) -> dict[str, PartitionState]:
        """Return what normalising carries per partition, as of `progress`."""
        with self._lock:
            rows = self._db.execute("SELECT partition, state FROM progress").fetchall()
        return {partition: msgspec.msgpack.decode(state, type=PartitionState) for partition, state in rows}

    def ledgers(self, partition: str) -> Ledgers:
        """Return the id ledgers of a partition, as of `progress`."""
        with self._lock:
            rows = self._db.execute(
                "SELECT symbol, kind, state FROM ledgers WHERE partition = ?", (partition,)
            ).fetchall()
        return {(symbol, kind): msgspec.msgpack.decode(state, type=IdLedger) for symbol, kind, state in rows}

    def intended(self) -> FlushRecord | None:
        """Return the flush that was begun and not finished, if any."""
        with self._lock:
            row = self._db.execute("SELECT number, start, end FROM flushes WHERE done = 0").fetchone()
        return FlushRecord(row[0], json.loads(row[1]), json.loads(row[2])) if row else None

    def intend(self, start: Positions, end: Positions) -> FlushRecord:
        """Write down the ranges of the next flush, before anything of it is inserted."""
        with self._lock, self._db:
            number = self._db.execute("SELECT coalesce(max(number), 0) + 1 FROM flushes").fetchone()[0]
            self._db.execute(
                "INSERT INTO flushes VALUES (?, 0, ?, ?, '{}')",
                (number, json.dumps(dict(start)), json.dumps(dict(end))),
            )
        return FlushRecord(number, dict(start), dict(end))

    def finish(
        self,
        flush: FlushRecord,
        counts: Mapping[str, Mapping[str, int]],
        states: Mapping[str, PartitionState],
        ledgers: Mapping[tuple[str, str, str], bytes],
    ) -> None:
        """Record, in one transaction, that hot has a flush: progress, changed ledgers, row counts."""
        encode = msgspec.msgpack.encode
        with self._lock, self._db:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany(
                "INSERT OR REPLACE INTO progress VALUES (?, ?, ?)",
                [(p, end, encode(states[p])) for p, end in flush.end.items() if p in states],
            )
            self._db.executemany(
                "INSERT OR REPLACE INTO ledgers VALUES (?, ?, ?, ?)", [(*key, state) for key, state in ledgers.items()]
            )
            self._db.execute(
                "UPDATE flushes SET done = 1, counts = ? WHERE number = ?", (json.dumps(counts), flush.number)
            )
            self._db.execute("DELETE FROM flushes WHERE number <= ?", (flush.number - KEPT_FLUSHES,))

    def expected_rows(self, table: str, start: Positions, end: Positions) -> int | None:
        """Return how many rows flushes put into start[p] .. end[p]; None where bounds cut through a flush."""
        with self._lock:
            rows = self._db.execute("SELECT start, end, counts FROM flushes WHERE done = 1 ORDER BY number").fetchall()
        total = 0
        reached = {p: start.get(p, 0) for p in end}
        for start_text, end_text, counts_text in rows:
            flush_start, flush_end = json.loads(start_text), json.loads(end_text)
            counts = json.loads(counts_text).get(table, {})
            for p in end:
                low, high = flush_start.get(p), flush_end.get(p)
                if low is None or high <= reached[p] or low >= end[p]:
                    continue
                if low != reached[p] or high > end[p]:
                    return None
                reached[p] = high
                total += counts.get(p, 0)
        return total if reached == dict(end) else None

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()
