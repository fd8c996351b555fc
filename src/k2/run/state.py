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
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec

from k2 import crash, stamp
from k2.durable import make_folder
from k2.errors import Misconfigured, StoreDown
from k2.model import Positions
from k2.run.accounting import IdLedger
from k2.run.normalise import PartitionState

FORM = 2
"""1: as the first release wrote it. 2: an unfinished flush is found by an index; steps of upgrades are kept."""
BUSY_SECONDS = 30.0
KEPT_FLUSHES = 2_000
"""Flushes whose row counts are kept, for the offload to check against (at least an hour of them)."""

_TABLES = (
    "CREATE TABLE IF NOT EXISTS version"
    " (only INTEGER PRIMARY KEY CHECK (only = 1), number INTEGER NOT NULL, identity TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS progress"
    " (partition TEXT PRIMARY KEY, end_offset INTEGER NOT NULL, state BLOB NOT NULL)",
    "CREATE TABLE IF NOT EXISTS flushes"
    " (number INTEGER PRIMARY KEY, done INTEGER NOT NULL, start TEXT NOT NULL, end TEXT NOT NULL,"
    " counts TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS ledgers"
    " (partition TEXT NOT NULL, symbol TEXT NOT NULL, kind TEXT NOT NULL, state BLOB NOT NULL,"
    " PRIMARY KEY (partition, symbol, kind))",
    "CREATE TABLE IF NOT EXISTS rebuild (only INTEGER PRIMARY KEY CHECK (only = 1))",
    "CREATE TABLE IF NOT EXISTS machine"
    " (only INTEGER PRIMARY KEY CHECK (only = 1), boot_id TEXT NOT NULL, is_synced INTEGER NOT NULL)",
    "CREATE INDEX IF NOT EXISTS unfinished_flushes ON flushes (number) WHERE done = 0",
    "CREATE TABLE IF NOT EXISTS upgrades"
    " (store TEXT NOT NULL, form INTEGER NOT NULL, k2 TEXT NOT NULL, applied_ns INTEGER NOT NULL)",
)

Ledgers = dict[tuple[str, str], IdLedger]


class FlushRecord(msgspec.Struct, frozen=True):
    """One flush: offsets `start[p]` .. `end[p]` (exclusive) of each partition, and its rows per table."""

    number: int
    start: dict[str, int]
    end: dict[str, int]
    counts: dict[str, dict[str, int]] = {}


class MachineRun(msgspec.Struct, frozen=True):
    """The run of the operating system in which hot was last in use; `is_synced`: its files were synced at the end."""

    boot_id: str
    is_synced: bool


def found_form(db: sqlite3.Connection) -> int:
    """Return the form of a state file; 0 before it is made."""
    try:
        row = db.execute("SELECT number FROM version").fetchone()
    except sqlite3.OperationalError as error:
        if "no such table" not in str(error):
            raise
        return 0
    return int(row[0]) if row else 0


def form(path: Path) -> int | None:
    """Return the form of the state file, None where there is none.

    Raises StoreDown when it cannot be read.
    """
    if not path.is_file():
        return None
    try:
        with closing(sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)) as db:
            return found_form(db) or None
    except sqlite3.Error as error:
        raise StoreDown(f"read the form of the ingest state {path}: {error}; check permissions") from error


def last_use(path: Path) -> tuple[MachineRun | None, bool]:
    """Return `IngestState.machine` and `rebuilding` of a file of any form as it is; nothing known where there is none.

    Raises StoreDown when it cannot be read.
    """
    if not path.is_file():
        return None, False
    try:
        with closing(sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)) as db:
            tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master")}
            run = db.execute("SELECT boot_id, is_synced FROM machine").fetchone() if "machine" in tables else None
            rebuilding = db.execute("SELECT only FROM rebuild").fetchone() if "rebuild" in tables else None
            return MachineRun(run[0], bool(run[1])) if run else None, rebuilding is not None
    except sqlite3.Error as error:
        raise StoreDown(f"read the ingest state {path}: {error}; check permissions") from error


class IngestState:
    """The state file of one installation; written by ingest only, read by anyone."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        try:
            make_folder(path.parent)
            self._db = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
            self.identity = self._set_up()
        except (sqlite3.Error, OSError) as error:
            raise StoreDown(f"open the ingest state {path}: {error}; check permissions and space") from error

    def _set_up(self) -> str:
        """Make what is missing of the newest form, and return the identity of this file, made with it.

        In one transaction: of several processes that open a new file, one makes the identity, and a form is
        reached whole or not at all.
        """
        try:
            stamp.check("state", self._path, found_form(self._db), FORM)
        except Misconfigured:
            self._db.close()
            raise
        while True:
            try:
                self._db.execute("PRAGMA journal_mode=WAL")
                break
            except sqlite3.OperationalError as error:  # this statement alone does not wait for others
                if "locked" not in str(error):
                    raise
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.execute("BEGIN IMMEDIATE")
        with self._db:
            for statement in _TABLES:
                self._db.execute(statement)
            crash.point("state.upgrade.half")
            self._db.execute("INSERT OR IGNORE INTO version VALUES (1, ?, ?)", (FORM, uuid.uuid4().hex))
            self._db.execute("UPDATE version SET number = ? WHERE number < ?", (FORM, FORM))
            (identity,) = self._db.execute("SELECT identity FROM version").fetchone()
        return str(identity)

    @contextmanager
    def _used(self, what: str) -> Iterator[sqlite3.Connection]:
        """Lend the connection to one caller, in a transaction; what SQLite cannot do now is StoreDown."""
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                with self._db:
                    yield self._db
            except sqlite3.Error as error:
                raise StoreDown(f"{what} in the ingest state {self._path}: {error}; check space") from error

    def progress(self) -> dict[str, int]:
        """Return per partition the offset up to which hot holds everything (exclusive)."""
        with self._used("read progress") as db:
            return dict(db.execute("SELECT partition, end_offset FROM progress").fetchall())

    def partition_states(self) -> dict[str, PartitionState]:
        """Return what normalising carries per partition, as of `progress`."""
        with self._used("read progress") as db:
            rows = db.execute("SELECT partition, state FROM progress").fetchall()
        return {partition: msgspec.msgpack.decode(state, type=PartitionState) for partition, state in rows}

    def ledgers(self, partition: str) -> Ledgers:
        """Return the id ledgers of a partition, as of `progress`."""
        with self._used("read ledgers") as db:
            rows = db.execute("SELECT symbol, kind, state FROM ledgers WHERE partition = ?", (partition,)).fetchall()
        return {(symbol, kind): msgspec.msgpack.decode(state, type=IdLedger) for symbol, kind, state in rows}

    def intended(self) -> FlushRecord | None:
        """Return the flush that was begun and not finished, if any."""
        with self._used("read flushes") as db:
            row = db.execute("SELECT number, start, end FROM flushes WHERE done = 0").fetchone()
        return FlushRecord(row[0], json.loads(row[1]), json.loads(row[2])) if row else None

    def intend(self, start: Positions, end: Positions) -> FlushRecord:
        """Write down the ranges of the next flush, before anything of it is inserted."""
        with self._used("begin a flush") as db:
            db.execute("DELETE FROM flushes WHERE done = 0")  # of an attempt whose outcome was unknown
            number = db.execute("SELECT coalesce(max(number), 0) + 1 FROM flushes").fetchone()[0]
            db.execute(
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
        with self._used("finish a flush") as db:
            db.executemany(
                "INSERT OR REPLACE INTO progress VALUES (?, ?, ?)",
                [(p, end, encode(states[p])) for p, end in flush.end.items() if p in states],
            )
            db.executemany(
                "INSERT OR REPLACE INTO ledgers VALUES (?, ?, ?, ?)", [(*key, state) for key, state in ledgers.items()]
            )
            db.execute("UPDATE flushes SET done = 1, counts = ? WHERE number = ?", (json.dumps(counts), flush.number))
            db.execute("DELETE FROM flushes WHERE number <= ?", (flush.number - KEPT_FLUSHES,))
            crash.point("ingest.progress.before_commit")

    def machine(self) -> MachineRun | None:
        """Return in which run of the machine hot was last in use; None when it never was."""
        with self._used("read") as db:
            row = db.execute("SELECT boot_id, is_synced FROM machine").fetchone()
        return MachineRun(row[0], bool(row[1])) if row else None

    def note_machine(self, run: MachineRun) -> None:
        """Record it: unsynced before hot is written to, synced after its files are."""
        with self._used("note the machine's run") as db:
            db.execute("INSERT OR REPLACE INTO machine VALUES (1, ?, ?)", (run.boot_id, run.is_synced))

    def generation(self) -> tuple[str, bool]:
        """Return what changes when hot is made anew, as any process sees it: its identity, and if it is under way."""
        with self._used("read") as db:
            (identity,) = db.execute("SELECT identity FROM version").fetchone()
            return str(identity), bool(db.execute("SELECT count(*) FROM rebuild").fetchone()[0])

    def note_upgrade(self, store: str, form: int, version: str) -> None:
        """Keep that a store was brought to a form by a version of K2, now."""
        with self._used("note an upgrade") as db:
            db.execute("INSERT INTO upgrades VALUES (?, ?, ?, ?)", (store, form, version, time.time_ns()))

    def upgrades(self) -> list[tuple[str, int, str, int]]:
        """Return (store, form reached, version of K2, when in nanoseconds UTC) of every upgrade, oldest first."""
        with self._used("read upgrades") as db:
            return db.execute("SELECT store, form, k2, applied_ns FROM upgrades ORDER BY rowid").fetchall()

    def begin_rebuild(self) -> None:
        """Note that hot is being rebuilt; see `rebuilding`."""
        with self._used("begin a rebuild") as db:
            db.execute("INSERT OR IGNORE INTO rebuild VALUES (1)")

    @property
    def rebuilding(self) -> bool:
        """Whether a rebuild of hot was begun and not finished: hot is not whole."""
        with self._used("read") as db:
            return bool(db.execute("SELECT count(*) FROM rebuild").fetchone()[0])

    def set_back(
        self, progress: Positions, states: Mapping[str, PartitionState], ledgers: Mapping[str, Ledgers]
    ) -> None:
        """Replace everything remembered, at the end of a rebuild; tokens of before are not used again."""
        encode = msgspec.msgpack.encode
        with self._used("finish a rebuild") as db:
            for table in ("progress", "ledgers", "flushes", "rebuild"):
                db.execute(f"DELETE FROM {table}")  # noqa: S608 - names of ours
            db.execute("UPDATE version SET identity = ?", (uuid.uuid4().hex,))
            db.executemany(
                "INSERT INTO progress VALUES (?, ?, ?)", [(p, end, encode(states[p])) for p, end in progress.items()]
            )
            db.executemany(
                "INSERT INTO ledgers VALUES (?, ?, ?, ?)",
                [(p, *key, encode(ledger)) for p, own in ledgers.items() for key, ledger in own.items()],
            )
            self.identity = db.execute("SELECT identity FROM version").fetchone()[0]

    def boundaries(self, start: Positions, end: Positions) -> list[dict[str, int]]:
        """Return where finished flushes end within start[p] .. end[p], oldest first: good places to cut.

        Each is a full vector over the partitions of `end`, rising, and none below `start`.
        """
        found: list[dict[str, int]] = []
        for _, flush_end, _ in self._flushes(start):
            cut = {p: max(start.get(p, 0), min(flush_end.get(p, start.get(p, 0)), high)) for p, high in end.items()}
            if any(cut[p] > start.get(p, 0) for p in cut) and (not found or cut != found[-1]):
                found.append(cut)
        return found

    def expected_rows(self, table: str, start: Positions, end: Positions) -> int | None:
        """Return how many rows flushes put into start[p] .. end[p]; None where bounds cut through a flush."""
        total = 0
        reached = {p: start.get(p, 0) for p in end}
        for flush_start, flush_end, counts in self._flushes(start):
            for p in end:
                low, high = flush_start.get(p), flush_end.get(p)
                if low is None or high is None or high <= reached[p] or low >= end[p]:
                    continue
                if low != reached[p] or high > end[p]:
                    return None
                reached[p] = high
                total += counts.get(table, {}).get(p, 0)
        return total if reached == dict(end) else None

    def _flushes(self, start: Positions) -> list[tuple[dict[str, int], dict[str, int], dict[str, dict[str, int]]]]:
        """Return (start, end, counts) of the finished flushes that reach beyond `start`, oldest first."""
        with self._used("read flushes") as db:
            # Offsets only rise, so the flushes wanted are the newest ones: read backwards until one is not.
            newest = db.execute("SELECT start, end, counts FROM flushes WHERE done = 1 ORDER BY number DESC")
            found = []
            for texts in newest:
                flush = (json.loads(texts[0]), json.loads(texts[1]), json.loads(texts[2]))
                if all(high <= start.get(p, 0) for p, high in flush[1].items()):
                    break
                found.append(flush)
        return found[::-1]

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()
