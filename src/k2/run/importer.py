"""Importing: recordings and REST answers appended to the log, each frame once, however often it is asked.

A file is a producer named by its content (`import:<sha256>`), a line's number its sequence, so the
log itself knows how far a file has come; a second run adds nothing and an interrupted one goes on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from k2.errors import BadData, BadFrame, Misconfigured
from k2.feeds.base import Exchange
from k2.feeds.recordings import AUTO, read
from k2.feeds.registry import get
from k2.log.base import Log
from k2.model import ANSWER, FRAME, Frame

BATCH_FRAMES = 5_000
BATCH_BYTES = 8 << 20


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
        BadData: a file is damaged, not of the format, or none of the frames in its first batch is one of
            the exchange's; names file and line. Files and whole lines before it are in the log.
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
        self._result = ImportResult(str(path))
        self._batch: list[Frame] = []
        self._batch_bytes = 0
        self._batch_line = 0
        self._checked = False

    def run(self) -> ImportResult:
        """Read the file to its end, or to its first bad line; what came before is appended either way."""
        producer = f"import:{_sha256(self._path)}"
        stored = self._log.producer_sequence(self._exchange.name, producer) or 0
        try:
            for line, frame in read(self._path, self._exchange, self._format):
                if frame is None:
                    self._count(lines_skipped=1)
                    continue
                self._count_times(frame)
                if line <= stored:
                    self._count(frames_present=1)
                    continue
                self._add(line, frame)
                if len(self._batch) >= BATCH_FRAMES or self._batch_bytes >= BATCH_BYTES:
                    self._append(producer)
        except BadData:
            self._append(producer)
            raise
        self._append(producer)
        return self._result

    def _add(self, line: int, frame: Frame) -> None:
        self._batch.append(frame)
        self._batch_bytes += len(frame.data)
        self._batch_line = line

    def _append(self, producer: str) -> None:
        if not self._batch:
            return
        self._check()
        offset = self._log.append(self._exchange.name, self._batch, producer=producer, sequence=self._batch_line)
        if offset < 0:  # another process imports the same file
            self._count(frames_present=len(self._batch))
        else:
            self._count(frames_added=len(self._batch))
        self._batch, self._batch_bytes = [], 0
        self._progress(self._result)

    def _check(self) -> None:
        """Refuse a file of another exchange before it is in the log for good."""
        if self._checked:
            return
        self._checked = True
        failure: BadFrame | None = None
        for frame in self._batch:
            if frame.kind in (FRAME, ANSWER):
                try:
                    self._exchange.parse(frame)
                    return
                except BadFrame as error:
                    failure = error
        if failure is not None:
            raise BadData(
                f"import {self._path}: none of the first {len(self._batch)} frames is one of the exchange "
                f"{self._exchange.name!r} (is the exchange right?); the last one: {failure}"
            )

    def _count(self, **more: int) -> None:
        changes = {name: getattr(self._result, name) + value for name, value in more.items()}
        self._result = msgspec.structs.replace(self._result, **changes)

    def _count_times(self, frame: Frame) -> None:
        time, first, last = frame.received_ns, self._result.first_received_ns, self._result.last_received_ns
        self._result = msgspec.structs.replace(
            self._result,
            first_received_ns=time if first is None else min(first, time),
            last_received_ns=time if last is None else max(last, time),
        )


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise Misconfigured(
            f"import {path}: cannot be read: {error.strerror} (check the path and its permissions)"
        ) from None
