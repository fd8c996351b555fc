"""Crash points: labelled moments at which a process can be killed, to prove that no death loses or doubles a row.

Unarmed, a point costs the comparison of a name with None. Armed is who starts with `K2CRASH=FILE` in the
environment: whenever the file is there and says `label` or `label:N`, the process that passes that point (for
the N-th time since it saw the file) takes the file away and dies by SIGKILL, with nothing flushed, closed or
finished. As the file is gone, the process that a supervisor starts in its place lives, until somebody writes
it again. Points are passed once a batch or a commit, never once a record.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from k2.errors import Rejected, UnknownName, nearest

_logger = logging.getLogger(__name__)

# Not named K2_...: those are settings, and nobody sets this in an installation they care for.
VARIABLE = "K2CRASH"
LOOK_SECONDS = 0.0001  # between two looks for a moment inside somebody else's code

Role = Literal[
    "status", "capture", "ingest", "offload", "maintenance", "retention", "first start", "rebuild", "import", "upgrade"
]
PROCESSES: dict[Role, str] = {
    "status": "any process",
    "capture": "capture",
    "ingest": "node",
    "offload": "node",
    "maintenance": "node",
    "retention": "node",
    "first start": "node",
    "rebuild": "k2 ingest --rebuild",
    "import": "k2 import",
    "upgrade": "k2 upgrade",
}
"""Which process does what, in an installation run by `k2 up` or by hand."""


@dataclass(frozen=True)
class CrashPoint:
    """One moment: what has happened by then, what has not, and what mends it.

    `after`: the label of a point at which the process must have died before, for moments that only come then.
    """

    label: str
    role: Role
    done: str
    missing: str
    recovery: str
    after: str = ""


POINTS = (
    # -- capture: socket -> log
    CrashPoint(
        "log.append.before_insert",
        "capture",
        "frames were received and taken from the buffer; a write transaction is open",
        "nothing of the batch is in the file",
        "the transaction is rolled back; the exchange's snapshot repeats the trades, or `gaps` names them",
    ),
    CrashPoint(
        "log.append.before_commit",
        "capture",
        "the batch is inserted",
        "it is not committed, nothing is synced",
        "the transaction is rolled back; as above",
    ),
    CrashPoint(
        "log.append.after_commit",
        "capture",
        "the batch is committed and, with `log.sync = full`, on the disk",
        "capture has not been told; no reader was woken",
        "the frames are in the log once; those the exchange repeats are dropped as repeats by their ids",
    ),
    CrashPoint(
        "log.rotate.closed",
        "capture",
        "the end of the segment is written into it",
        "there is no next segment",
        "the next writer finds the newest segment closed and makes the one that follows",
    ),
    CrashPoint(
        "log.rotate.drafted",
        "capture",
        "the next segment is complete under a name nobody reads",
        "it is not in its place",
        "the draft is removed at the next opening, the segment made anew",
    ),
    CrashPoint(
        "log.rotate.linked",
        "capture",
        "the next segment is in its place",
        "the draft's name is still there, nothing was appended",
        "the next writer appends to the new segment; the draft's name is removed at the next opening",
    ),
    CrashPoint(
        "run.publish.drafted",
        "status",
        "a status file is written beside its place",
        "the old one is still there",
        "readers see the old status; the next process of that role replaces it, and removes the draft",
    ),
    # -- ingest: log -> hot
    CrashPoint(
        "ingest.flush.turned",
        "ingest",
        "the memory tail is cut: a full generation waits, a new one is being filled",
        "no intent is written, nothing of it is in hot",
        "the rows are made from the log again, from the last progress on",
    ),
    CrashPoint(
        "ingest.flush.intended",
        "ingest",
        "the offset ranges of the flush are written down",
        "no row of it is in hot",
        "the flush is made again from the same ranges and state, under the same tokens",
    ),
    CrashPoint(
        "ingest.recover.remade",
        "ingest",
        "after a death in a flush, its rows were made again",
        "none of them was sent to hot",
        "as before: the intent is still there",
        after="ingest.flush.intended",
    ),
    CrashPoint(
        "hot.insert.file_written",
        "ingest",
        "the rows of an insert are in a file of the engine's inbox",
        "the engine has not been asked",
        "the inbox is emptied at the next opening; the flush is made again",
    ),
    CrashPoint(
        "hot.insert.between_views",
        "ingest",
        "the engine has stored the trades of an insert",
        "the candle views fed by it have not all stored theirs",
        "the same insert under the same token: the engine fills in what is missing and drops what is there",
    ),
    CrashPoint(
        "hot.insert.stored",
        "ingest",
        "an insert and all its views are stored",
        "ingest has not been told, the inbox still holds the file",
        "the same insert under the same token adds nothing",
    ),
    CrashPoint(
        "ingest.flush.between_tables",
        "ingest",
        "one table of the flush is in hot",
        "the next ones are not",
        "the flush is made again; what is there is recognised by its token",
    ),
    CrashPoint(
        "ingest.flush.inserted",
        "ingest",
        "all rows of the flush are in hot",
        "progress, id ledgers and row counts are not written",
        "the flush is made again and adds nothing; then progress is written",
    ),
    CrashPoint(
        "ingest.progress.before_commit",
        "ingest",
        "progress, id ledgers and row counts are written in a transaction",
        "it is not committed",
        "SQLite rolls back; as above",
    ),
    CrashPoint(
        "ingest.flush.finished",
        "ingest",
        "progress is committed",
        "the log's reader position is that of the flush before; the tail still holds the rows",
        "the log keeps a little more than needed until the next flush; the tail is made anew behind progress",
    ),
    CrashPoint(
        "log.reader.before_commit",
        "ingest",
        "the new position of a reader is written in a transaction",
        "it is not committed",
        "SQLite rolls back; the log keeps a little more than needed",
    ),
    CrashPoint(
        "ingest.flush.reader_committed",
        "ingest",
        "the flush is complete in every store",
        "the tail still shows its rows",
        "nothing to do; queries cut the tail at progress",
    ),
    # -- offload: hot, log -> cold
    CrashPoint(
        "offload.rows.read",
        "offload",
        "rows of a range are read from hot and counted",
        "nothing is written to cold",
        "the range follows from cold's watermark and is read again",
    ),
    CrashPoint(
        "offload.frames.read",
        "offload",
        "frames of a range are read from the log",
        "nothing is written to cold",
        "as for rows",
    ),
    CrashPoint(
        "cold.data_file.synced",
        "offload",
        "a data file is complete and synced",
        "no manifest names it",
        "nobody ever reads it; it is removed as an orphan, and its range written again",
    ),
    CrashPoint(
        "cold.manifest.synced",
        "offload",
        "a manifest names the data files",
        "no manifest list names it",
        "as for data files",
    ),
    CrashPoint(
        "cold.manifest_list.synced",
        "offload",
        "the manifest list of a snapshot is there",
        "no table metadata has the snapshot",
        "as for data files",
    ),
    CrashPoint(
        "cold.metadata.synced",
        "offload",
        "the new table metadata, with snapshot and watermark, is there",
        "the catalog still names the old one",
        "the commit never happened: readers go by the catalog; its range is written again",
    ),
    CrashPoint(
        "cold.append.committed",
        "offload",
        "the catalog names the new metadata: rows and watermark are committed",
        "offload has not noted it",
        "the next start reads the watermark and goes on behind it",
    ),
    CrashPoint(
        "offload.candles.read",
        "offload",
        "closed candles are read from hot",
        "they and their watermark are not committed",
        "they are computed again from where the committed watermark ends",
    ),
    CrashPoint(
        "offload.candles.committed",
        "offload",
        "candles are committed as a new revision",
        "offload has not noted it",
        "the next start goes on behind the committed watermark",
    ),
    CrashPoint(
        "offload.let_go.noted",
        "offload",
        "the log knows what cold holds",
        "hot and log have not let go of it",
        "they do so at the next retention",
    ),
    # -- maintenance of cold
    CrashPoint(
        "cold.compact.written",
        "maintenance",
        "small files are rewritten as one, which was compared with them",
        "no commit names it",
        "the new file is removed as an orphan; the next run rewrites again",
    ),
    CrashPoint(
        "cold.compact.before_swap",
        "maintenance",
        "all rewritten files are there, the replacing snapshot is staged",
        "it is not committed",
        "as above",
    ),
    CrashPoint(
        "cold.compact.swapped",
        "maintenance",
        "the new files have replaced the old ones in one commit",
        "old snapshots are not expired",
        "nothing to do; expiry comes with the next run",
    ),
    CrashPoint(
        "cold.expire.before_commit",
        "maintenance",
        "the snapshots to forget are chosen",
        "they are not forgotten",
        "the next run chooses again",
    ),
    CrashPoint(
        "cold.expire.committed",
        "maintenance",
        "old snapshots are forgotten",
        "their files are still there",
        "a later run removes them as orphans",
    ),
    CrashPoint(
        "cold.orphans.half",
        "maintenance",
        "one unreferenced file is removed",
        "the others are still there",
        "the next run finds and removes them",
    ),
    # -- retention of hot and log
    CrashPoint(
        "hot.delete.before",
        "retention",
        "it is known which rows of a table to delete",
        "none is deleted",
        "the next retention deletes them",
    ),
    CrashPoint(
        "hot.delete.mutating",
        "retention",
        "the engine has written down the deletion",
        "it has not finished it",
        "the engine finishes it after its next start",
    ),
    CrashPoint(
        "hot.delete.after",
        "retention",
        "rows of one table are deleted",
        "those of the next tables are not",
        "the next retention deletes them",
    ),
    CrashPoint(
        "log.trim.before",
        "retention",
        "it is known that a segment can go",
        "it is there",
        "the next retention removes it",
    ),
    CrashPoint(
        "log.trim.half",
        "retention",
        "a segment's database file is removed",
        "its side files are not",
        "readers start at the next segment; the side files are removed at the next opening",
    ),
    CrashPoint(
        "log.trim.after",
        "retention",
        "a segment is removed with its side files",
        "further ones are not",
        "the next retention removes them",
    ),
    # -- first start in an empty data folder
    CrashPoint(
        "hot.migrate.half",
        "first start",
        "some tables and views of hot are made",
        "others are not",
        "the migration is run again from its start; what is there stays",
    ),
    CrashPoint(
        "hot.migrate.unrecorded",
        "first start",
        "all tables and views of a migration are made",
        "it is not recorded",
        "it is run again and recorded",
    ),
    CrashPoint(
        "cold.catalog.drafted",
        "first start",
        "the catalog is complete beside its place",
        "it is not in its place",
        "it is made anew; drafts are removed",
    ),
    CrashPoint(
        "cold.table.created",
        "first start",
        "a table is in the catalog",
        "it has no commit",
        "it is found and committed to",
    ),
    # -- commands
    CrashPoint(
        "rebuild.begun",
        "rebuild",
        "it is noted that hot is being rebuilt",
        "hot is as it was",
        "ingest refuses to start until the rebuild is run again",
    ),
    CrashPoint(
        "rebuild.emptied",
        "rebuild",
        "hot is empty",
        "nothing is filled in",
        "as above",
    ),
    CrashPoint(
        "rebuild.half",
        "rebuild",
        "one day of one table is back in hot",
        "the others are not",
        "as above: the rebuild starts with emptying hot",
    ),
    CrashPoint(
        "rebuild.filled",
        "rebuild",
        "all of cold is back in hot",
        "ingest is not set back to there",
        "as above",
    ),
    CrashPoint(
        "state.upgrade.half",
        "upgrade",
        "what the newest form of `state.db` has more is made, in a transaction",
        "it is not committed",
        "the transaction is rolled back; the next start makes it again",
    ),
    CrashPoint(
        "log.upgrade.half",
        "upgrade",
        "one segment of the log has its identity",
        "the others do not, the log is not stamped",
        "the next start goes through all segments again; a second identity changes nothing",
    ),
    CrashPoint(
        "cold.upgrade.half",
        "upgrade",
        "one cold table has the newest form, in a commit of its own",
        "the others do not",
        "the next start brings on those that are behind",
    ),
    CrashPoint(
        "cold.relocate.half",
        "upgrade",
        "of a folder that was moved, the metadata of one cold table is written with the paths of now",
        "that of the others is not, the catalog names none of it",
        "`k2 upgrade` writes all of it again; what is there is removed as orphans",
    ),
    CrashPoint(
        "cold.relocate.before_commit",
        "upgrade",
        "all metadata is there, the catalog's transaction names it",
        "it is not committed",
        "as above",
    ),
    CrashPoint(
        "upgrade.store.done",
        "upgrade",
        "a store has the newest form and says so",
        "the stores after it do not; what was done is not noted in `state.db`",
        "the next start goes on with the stores that are behind; one step is missing in the notes",
    ),
    CrashPoint(
        "import.batch.appended",
        "import",
        "one batch of a file is in the log",
        "the rest of the file is not",
        "the same command goes on behind what the log holds of the file",
    ),
)  # fmt: skip

BY_LABEL = {point.label: point for point in POINTS}


def point(label: str) -> None:
    """Die here if armed for this label."""
    if _arming is not None:
        _arming.passed(label)


@contextlib.contextmanager
def watched(label: str, moment: Callable[[], Callable[[], bool]]) -> Iterator[None]:
    """Die in the course of the block as soon as something holds, if armed for this label.

    For moments inside a library, which cannot call `point`. `moment` is called before the block and returns the
    condition, which a thread then asks for again and again: it must be quick and must not need what the block holds.
    """
    if _arming is None or not _arming.names(label):
        yield
        return
    with _Watch(_arming, label, moment()):
        yield


def arm(file: Path, label: str, passing: int = 1) -> None:
    """Write the file by which processes started with `K2CRASH=file` die at a point, once.

    Raises:
        UnknownName: there is no such point.
        Rejected: `passing` is below 1.
    """
    _check(label, passing)
    draft = file.with_name(f"{file.name}.draft")
    draft.write_text(f"{label}:{passing}")
    draft.replace(file)


def _check(label: str, passing: int) -> None:
    if label not in BY_LABEL:
        raise UnknownName(f"arm crash point {label!r}: there is none of that name{nearest(label, BY_LABEL)}")
    if passing < 1:
        raise Rejected(f"arm crash point {label!r}: passing {passing} must be at least 1")


class _Arming:
    """What a process knows of its file. Used by any thread."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._order = ""
        self._passings = 0
        self._unknown = ""
        self._read(refuse=True)  # an unknown label stops the process when it starts, not when it gets there

    def names(self, label: str) -> bool:
        """Whether the file is there and names this point."""
        return self._read()[0] == label

    def passed(self, label: str) -> None:
        """Count a passing, and die if it is the one asked for."""
        with self._lock:
            order, passing = self._read()
            if order != label:
                return
            self._passings += 1
            if self._passings >= passing:
                self.die()

    def die(self) -> None:
        """Take the file away and be killed; nothing happens when another process took it first."""
        try:
            self._file.rename(f"{self._file}.{os.getpid()}")
        except FileNotFoundError:
            return
        _kill()

    def _read(self, *, refuse: bool = False) -> tuple[str, int]:
        """Return the label and the passing in the file. What cannot be understood is refused, or told and ignored."""
        try:
            text = self._file.read_text().strip()
        except FileNotFoundError:
            text = ""
        if text != self._order:
            self._order, self._passings = text, 0
        if not text:
            return "", 0
        label, _, number = text.partition(":")
        passing = int(number) if number.isdecimal() else int(not number)
        try:
            _check(label, passing)
        except Rejected as error:
            if refuse:
                raise
            if text != self._unknown:
                self._unknown = text
                _logger.warning("%s is ignored: %s", self._file, error)
            return "", 0
        return label, passing


class _Watch:
    """A thread that waits for a moment in the course of a block."""

    def __init__(self, arming: _Arming, label: str, holds: Callable[[], bool]) -> None:
        self._arming, self._label, self._holds = arming, label, holds
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="crash-watch", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.is_set():
            if self._holds():
                self._arming.die()
                return
            time.sleep(LOOK_SECONDS)


def _kill() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("SIGKILL did not end the process")


def _armed_by(environment: str | None) -> _Arming | None:
    return _Arming(Path(environment)) if environment else None


_arming = _armed_by(os.environ.get(VARIABLE))
