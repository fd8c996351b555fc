"""Importing: recordings and REST answers appended to the log, each frame once, however often it is asked.

A file is a producer named by its first frame (`import:<sha256>`), compressed or not and whatever it is called.
The sequence of an append holds the line reached and a check of all frames up to there, so the log itself knows
how far a file has come: a second run adds nothing, an interrupted one goes on, and a file that has grown goes on
where it ended. Another file with the same first frame is an edited copy, and refused.

A file of REST answers is named by all of its frames instead: one that has grown is cut in other answers, and is
imported anew. Its trades have ids, by which they are found to be repeats (Kraken's before 2022 have none).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import TypeGuard
from urllib.parse import urlsplit

import msgspec

from k2 import crash
from k2.errors import BadData, BadFrame, Rejected
from k2.feeds.base import Exchange
from k2.feeds.recordings import AUTO, read
from k2.feeds.registry import get
from k2.log.base import Log
from k2.model import ANSWER, BACKFILL, FRAME, Frame

BATCH_FRAMES = 5_000
BATCH_BYTES = 8 << 20
# A file is taken for one of another exchange when none of this many messages can be parsed.
CHECKED_LINES = 2_000
# A sequence is the line (32 bits), then bits of the hash of all frames up to it.
CHECK_BITS = 31


class ImportResult(msgspec.Struct, frozen=True):
    """What the import of one file did; times are None where it holds no frame.

    `frames_present` were in the log from an earlier run; `lines_skipped` hold no frame (notes, blanks).
    """

    file: str
    frames_added: int = 0
    frames_present: int = 0
    first_received_ns: int | None = None
    last_received_ns: int | None = None
    lines_skipped: int = 0


def import_files(
    log: Log,
    files: Iterable[Path | str],
    exchange: Exchange | str,
    fmt: str = AUTO,
    *,
    progress: Callable[[ImportResult], None] | None = None,
) -> list[ImportResult]:
    """Append the frames of the files to the exchange's partition, in the given order, and say what was done.

    Frames keep the receive times of their recorder, in file order. `progress` is called after
    every batch with the result so far of its file. Memory is bounded by one batch.

    Raises:
        Misconfigured: a file is missing or may not be read.
        Rejected: a file begins like one in the log but is another, or is shorter; nothing of it is appended.
        BadData: a file is damaged, not of the format, or none of its first 100 messages is one of the
            exchange's; names file and line. Files and whole lines before it are in the log.
        StoreDown: the log cannot be written; calling again goes on where it stopped.
    """
    chosen = get(exchange) if isinstance(exchange, str) else exchange
    return [_FileImport(log, Path(file), chosen, fmt, progress).run() for file in files]


class _FileImport:
    """The import of one file: what is known of it so far, and the batch being filled."""

    def __init__(
        self, log: Log, path: Path, exchange: Exchange, fmt: str, progress: Callable[[ImportResult], None] | None
    ) -> None:
        self._log, self._path, self._exchange, self._format = log, path, exchange, fmt
        self._progress = progress or (lambda _: None)
        self._added = self._present = self._skipped = 0
        self._first_ns: int | None = None
        self._last_ns: int | None = None
        self._batch: list[Frame] = []
        self._batch_bytes = 0
        self._batch_sequence = 0
        self._hash = hashlib.sha256()  # of all frames read

    def run(self) -> ImportResult:
        """Read the file to its end, or to its first bad line; what came before is appended either way."""
        producer = self._producer()
        stored = self._log.producer_sequence(self._exchange.name, producer) or 0
        if stored == 0:
            self._check()
        try:
            self._read(producer, stored)
        except BadData:
            self._append(producer)
            raise
        self._append(producer)
        return self._result()

    def _read(self, producer: str, stored: int) -> None:
        """Skip what is in the log, having made sure that it is the same, and add the rest."""
        reached = stored >> CHECK_BITS
        same = stored == 0
        for line, frame in read(self._path, self._exchange, self._format):
            if frame is None:
                self._skipped += 1
                continue
            self._take(frame)
            if line == reached:
                same = self._sequence(line) == stored
            if line <= reached:
                self._present += 1
            elif same:
                self._add(line, frame, producer)
            else:
                break
        if not same:
            raise Rejected(
                f"import {self._path}: begins like a recording of which {reached} lines are in the log, but is not the "
                "same up to there: it is a part or an edited copy of that one, and importing both would double trades. "
                "Nothing was added; import one of them only"
            )

    def _producer(self) -> str:
        """Return the name that tells the file from others."""
        name = hashlib.sha256()
        with contextlib.suppress(BadData):  # it is told when what comes before it has been appended
            for _, frame in read(self._path, self._exchange, self._format):
                if frame is not None:
                    name.update(_identity(frame))
                    if frame.source != BACKFILL:
                        break
        return f"import:{name.hexdigest()}"

    def _check(self) -> None:
        """Refuse a file of another exchange before it is in the log for good."""
        failure: BadFrame | None = None
        understood = failed = 0
        for frame in self._first_frames():
            self._check_origin(frame)
            if not _is_message(frame):
                continue
            try:
                parsed = self._exchange.parse(frame)
                understood += bool(parsed.trades or parsed.quotes)
            except BadFrame as error:
                failed, failure = failed + 1, error
        if failed > understood:
            raise BadData(
                f"import {self._path}: most of its first messages are not of the exchange {self._exchange.name!r} "
                f"(is the exchange right?): {failure}"
            )

    def _first_frames(self) -> list[Frame]:
        found: list[Frame] = []
        with contextlib.suppress(BadData):  # it is told when what comes before it has been appended
            for _, frame in islice(read(self._path, self._exchange, self._format), CHECKED_LINES):
                if frame is not None:
                    found.append(frame)
        return found

    def _check_origin(self, frame: Frame) -> None:
        """Refuse a recording that says itself that it was made elsewhere."""
        host = urlsplit(frame.origin).hostname or ""
        own = {_domain(urlsplit(url).hostname or "") for url in (self._exchange.url, self._exchange.rest_url)}
        if host and _domain(host) not in own:
            raise BadData(
                f"import {self._path}: it was recorded at {host}, which is not an address of the exchange "
                f"{self._exchange.name!r}: is the exchange right?"
            )

    def _add(self, line: int, frame: Frame, producer: str) -> None:
        self._batch.append(frame)
        self._batch_bytes += len(frame.data)
        self._batch_sequence = self._sequence(line)
        if len(self._batch) >= BATCH_FRAMES or self._batch_bytes >= BATCH_BYTES:
            self._append(producer)

    def _append(self, producer: str) -> None:
        if not self._batch:
            return
        offset = self._log.append(self._exchange.name, self._batch, producer=producer, sequence=self._batch_sequence)
        crash.point("import.batch.appended")
        if offset < 0:  # another process imports the same file
            self._present += len(self._batch)
        else:
            self._added += len(self._batch)
        self._batch, self._batch_bytes = [], 0
        self._progress(self._result())

    def _take(self, frame: Frame) -> None:
        """Note a frame, added now or before."""
        self._hash.update(_identity(frame))
        received_ns = frame.received_ns
        if self._first_ns is None or received_ns < self._first_ns:
            self._first_ns = received_ns
        if self._last_ns is None or received_ns > self._last_ns:
            self._last_ns = received_ns

    def _sequence(self, line: int) -> int:
        """Return the sequence of an append that ends with the line just read."""
        return line << CHECK_BITS | int.from_bytes(self._hash.digest()[:4]) >> 32 - CHECK_BITS

    def _result(self) -> ImportResult:
        return ImportResult(str(self._path), self._added, self._present, self._first_ns, self._last_ns, self._skipped)


def _is_message(frame: Frame | None) -> TypeGuard[Frame]:
    return frame is not None and frame.kind in (FRAME, ANSWER)


def _identity(frame: Frame) -> bytes:
    """Return what makes a frame of a recording the same one, under whatever file name."""
    head = f"{frame.kind} {frame.received_ns} {len(frame.data)} {frame.origin}\n"
    return head.encode() + frame.data


def _domain(host: str) -> str:
    return ".".join(host.split(".")[-2:])
