"""Importing: recordings and REST answers appended to the log, each frame once, however often it is asked.

A file is a producer named by its content (`import:<sha256>`), a line's number its sequence, so the
log itself knows how far a file has come; a second run adds nothing and an interrupted one goes on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import TypeGuard

import msgspec

from k2.errors import BadData, BadFrame, Misconfigured
from k2.feeds.base import Exchange
from k2.feeds.recordings import AUTO, read
from k2.feeds.registry import get
from k2.log.base import Log
from k2.model import ANSWER, FRAME, Frame

BATCH_FRAMES = 5_000
BATCH_BYTES = 8 << 20
# A file is taken for one of another exchange when none of this many messages can be parsed.
CHECKED_FRAMES = 100


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
        self._batch_line = 0

    def run(self) -> ImportResult:
        """Read the file to its end, or to its first bad line; what came before is appended either way."""
        producer = f"import:{_sha256(self._path)}"
        stored = self._log.producer_sequence(self._exchange.name, producer) or 0
        if stored == 0:
            self._check()
        try:
            for line, frame in read(self._path, self._exchange, self._format):
                if frame is None:
                    self._skipped += 1
                    continue
                self._take_time(frame.received_ns)
                if line <= stored:
                    self._present += 1
                else:
                    self._add(line, frame, producer)
        except BadData:
            self._append(producer)
            raise
        self._append(producer)
        return self._result()

    def _check(self) -> None:
        """Refuse a file of another exchange before it is in the log for good."""
        failure: BadFrame | None = None
        messages = (frame for _, frame in read(self._path, self._exchange, self._format) if _is_message(frame))
        for frame in islice(messages, CHECKED_FRAMES):
            try:
                self._exchange.parse(frame)
                return
            except BadFrame as error:
                failure = error
        if failure is not None:
            raise BadData(
                f"import {self._path}: its first messages are not of the exchange {self._exchange.name!r} "
                f"(is the exchange right?): {failure}"
            )

    def _add(self, line: int, frame: Frame, producer: str) -> None:
        self._batch.append(frame)
        self._batch_bytes += len(frame.data)
        self._batch_line = line
        if len(self._batch) >= BATCH_FRAMES or self._batch_bytes >= BATCH_BYTES:
            self._append(producer)

    def _append(self, producer: str) -> None:
        if not self._batch:
            return
        offset = self._log.append(self._exchange.name, self._batch, producer=producer, sequence=self._batch_line)
        if offset < 0:  # another process imports the same file
            self._present += len(self._batch)
        else:
            self._added += len(self._batch)
        self._batch, self._batch_bytes = [], 0
        self._progress(self._result())

    def _take_time(self, received_ns: int) -> None:
        if self._first_ns is None or received_ns < self._first_ns:
            self._first_ns = received_ns
        if self._last_ns is None or received_ns > self._last_ns:
            self._last_ns = received_ns

    def _result(self) -> ImportResult:
        return ImportResult(str(self._path), self._added, self._present, self._first_ns, self._last_ns, self._skipped)


def _is_message(frame: Frame | None) -> TypeGuard[Frame]:
    return frame is not None and frame.kind in (FRAME, ANSWER)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise Misconfigured(
            f"import {path}: cannot be read: {error.strerror} (check the path and its permissions)"
        ) from None
