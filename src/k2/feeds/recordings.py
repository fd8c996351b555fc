"""Recordings other programs made, read as frames: stamped feeds, captures, bare messages, REST trade answers.

Four formats, plain or gzip-compressed:

`hftbacktest`: `<receive time> <message>` a line.
`cryptofeed`: captures, as text (`<receive time>: <message>`, with notes about connections and REST
    answers between) or as JSON Lines (`t`, `ts`, `conn`, `data`). What the recorder sent and its other
    notes are skipped; connections opened and REST answers are kept as frames of their own kinds.
`jsonl`: one message a line without a receive time. A message's own `time_out` or `timestamp` stands for
    it, and the line before where there is none; times never step back. Lines before the first time get that.
`rest`: one REST answer with trades: Binance aggTrades or trades (also as the `info` that ccxt wraps),
    Kraken Trades. Cut in answers of about 1,000 rows; the newest trade's time stands for the receive time.

The unit of a receive time (s, ms, µs, ns) follows from its magnitude.
"""

from __future__ import annotations

import gzip
import io
import re
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, cast

import msgspec

from k2.errors import BadData, BadFrame, Misconfigured, Rejected, nearest
from k2.feeds import answers
from k2.feeds.base import Exchange
from k2.feeds.times import from_decimal, from_integer, from_rfc3339
from k2.model import ANSWER, BACKFILL, FRAME, IMPORT, OPENED, Frame

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

AUTO = "auto"
HFTBACKTEST = "hftbacktest"
CRYPTOFEED = "cryptofeed"
JSONL = "jsonl"
REST = "rest"
FORMATS = (HFTBACKTEST, CRYPTOFEED, JSONL, REST)

_LARGEST_FRAME_BYTES = 16 << 20  # as capture takes them by default
_LONGEST_LINE_BYTES = 2 * _LARGEST_FRAME_BYTES  # JSON in a JSON string grows
_SNIFF_BYTES = 64 << 10
_LINES_WITHOUT_TIME = 1_000
_BYTES_WITHOUT_TIME = 2 * _LARGEST_FRAME_BYTES

_STAMPED = re.compile(rb"([0-9]{10,19}(?:\.[0-9]{1,9})?) (.+)", re.DOTALL)
_RECEIVED = re.compile(rb"([0-9]{9,12}(?:\.[0-9]{1,9})?): ?(.*)", re.DOTALL)
_CONNECTED = re.compile(rb"(wss?://\S+) <-> ([0-9.]+)")
_ANSWERED = re.compile(rb"(https?://\S+) -> ([0-9.]+): ?(.*)", re.DOTALL)
_NOTE = re.compile(rb"(?:wss?|https?)://\S+ <-|configuration:")
_CAPTURE_BEGINNING = re.compile(rb'\{\s*"t"\s*:\s*"(?:header|http|connect|send|recv)"')
# Rows as objects, Kraken's `{"error":[`, or a first line with only a bracket: pretty-printed.
_REST_BEGINNING = re.compile(rb'\[\s*\{|\{\s*"error"\s*:\s*\[|[\[{]\s*$')
_ZSTANDARD_MAGIC = b"\x28\xb5\x2f\xfd"
_GZIP_MAGIC = b"\x1f\x8b"


class Recorded(NamedTuple):
    """One line (of a REST answer: one part) of a recording; `frame` is None where it holds none."""

    line: int
    frame: Frame | None


class _CaptureLine(msgspec.Struct, gc=False):
    t: str
    ts: msgspec.Raw = msgspec.Raw(b"")
    conn: str = ""
    url: str = ""
    addr: str = ""
    data: str | None = None


class _Times(msgspec.Struct, gc=False, rename={"event_time": "E"}):
    """Where messages carry a time of their own."""

    time_out: str | None = None
    timestamp: str | None = None
    time: str | None = None
    event_time: int | None = None
    data: msgspec.Raw = msgspec.Raw(b"")


_decode_capture_line = msgspec.json.Decoder(_CaptureLine).decode
_decode_times = msgspec.json.Decoder(_Times).decode
_decode_inner_times = msgspec.json.Decoder(_Times | list[_Times]).decode


def read(path: Path, exchange: Exchange, fmt: str = AUTO) -> Iterator[Recorded]:
    """Yield the lines of a recording in file order, lines counted from 1, without loading it whole.

    Frames of one connection are counted from 0, and its re-openings make epochs. Memory is bounded
    by the largest message allowed, 16 MiB.

    Raises:
        Misconfigured: the file is missing or may not be read.
        Rejected: `fmt` is not a format.
        BadData: compressed data is damaged, a line does not fit the format, or the format is not
            recognised; names the file and the line. Lines before it were yielded.
    """
    if fmt not in (AUTO, *FORMATS):
        raise Rejected(f"format {fmt!r} is not known{nearest(fmt, (AUTO, *FORMATS))}")
    with closing(_open(path)) as stream:
        if fmt == AUTO:
            fmt = _sniff(path, stream)
        if fmt == REST:
            yield from _rest_answer(path, stream, exchange)
        else:
            yield from _lines_as_frames(path, stream, fmt)


def _open(path: Path) -> io.BufferedReader:
    try:
        file = path.open("rb")
    except OSError as error:
        raise Misconfigured(
            f"import {path}: cannot be opened: {error.strerror} (check the path and its permissions)"
        ) from None
    magic = file.peek(4)[:4]
    if magic.startswith(_ZSTANDARD_MAGIC):
        file.close()
        raise BadData(
            f"import {path}: is compressed with zstandard; decompress it first (gzip and plain files are read)"
        )
    if magic.startswith(_GZIP_MAGIC):
        return io.BufferedReader(cast(io.RawIOBase, _Gunzip(file)), 1 << 20)
    return file


class _Gunzip(gzip.GzipFile):
    """A gzip stream that gives what it has before it tells of damage, and closes the file below it."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(fileobj=file, mode="rb")
        self._below = file

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Read one piece. The inherited one fills the buffer, and damage takes the lines already in it along."""
        target = memoryview(buffer)
        piece = self.read1(len(target))
        target[: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        super().close()
        self._below.close()


def _sniff(path: Path, stream: io.BufferedReader) -> str:
    """Tell the format by the first line that is not blank."""
    try:
        head = stream.peek(_SNIFF_BYTES).lstrip()
    except (EOFError, OSError, zlib.error) as error:
        raise _damaged(path, 1, error) from None
    if not head:
        raise BadData(f"import {path}: is empty")
    first = head.split(b"\n", 1)[0].strip()
    if _STAMPED.fullmatch(first):
        return HFTBACKTEST
    if (
        _CAPTURE_BEGINNING.match(first)
        or _RECEIVED.fullmatch(first)
        or _CONNECTED.match(first)
        or _ANSWERED.match(first)
        or _NOTE.match(first)
    ):
        return CRYPTOFEED
    if _REST_BEGINNING.match(first):
        return REST
    if first.startswith((b"{", b"[")):
        return JSONL
    raise BadData(
        f"import {path}: the format is not recognised from its first line {first[:60]!r} "
        f"(if it is one of {', '.join(FORMATS)}, name it)"
    )


def _lines_as_frames(path: Path, stream: io.BufferedReader, fmt: str) -> Iterator[Recorded]:
    if fmt == HFTBACKTEST:
        reader: _Reader = _StampedReader(path.name)
    elif fmt == CRYPTOFEED:
        reader = _CaptureReader(path.name)
    else:
        reader = _BareReader(path.name)
    number = 0
    for number, line in _lines(path, stream):
        try:
            for recorded in reader.line(number, line.rstrip(b"\r\n")):
                _check_size(recorded)
                if recorded.line == number and not line.endswith(b"\n"):
                    _check_whole(recorded)
                yield recorded
        except (ValueError, RecursionError) as error:
            raise BadData(f"import {path}: line {number} does not fit the format {fmt!r}: {error}") from None
    try:
        yield from reader.end()
    except ValueError as error:
        raise BadData(f"import {path}: line {number}: {error}") from None


def _check_size(recorded: Recorded) -> None:
    if recorded.frame is not None and len(recorded.frame.data) > _LARGEST_FRAME_BYTES:
        size = len(recorded.frame.data)
        raise ValueError(f"its message has {size} bytes, more than {_LARGEST_FRAME_BYTES} are no message of a feed")


def _check_whole(recorded: Recorded) -> None:
    """Refuse a message cut off by the end of the file: its whole would later not be known as the same."""
    if recorded.frame is not None and recorded.frame.kind in (FRAME, ANSWER):
        try:
            msgspec.json.decode(recorded.frame.data, type=msgspec.Raw)
        except (ValueError, RecursionError):
            raise ValueError("it is the last and cut off; what came before it was read") from None


def _lines(path: Path, stream: io.BufferedReader) -> Iterator[tuple[int, bytes]]:
    number = 0
    while True:
        number += 1
        try:
            line = stream.readline(_LONGEST_LINE_BYTES)
        except (EOFError, OSError, zlib.error) as error:
            raise _damaged(path, number, error) from None
        if not line:
            return
        if len(line) == _LONGEST_LINE_BYTES and not line.endswith(b"\n"):
            raise BadData(f"import {path}: line {number} is longer than {_LONGEST_LINE_BYTES} bytes")
        yield number, line


def _damaged(path: Path, line: int, error: Exception) -> BadData:
    return BadData(
        f"import {path}: cannot be read any further at line {line}: {error} "
        "(the file is damaged or cut off; what came before it was read)"
    )


class _Reader:
    """Turns lines into frames; counts the frames of every connection."""

    def __init__(self, connection: str) -> None:
        self.connection = connection
        self._epochs: dict[str, int] = {}
        self._counters: dict[str, int] = {}

    def line(self, number: int, line: bytes) -> Iterator[Recorded]:
        """Yield what can be told after this line; raises ValueError where it does not fit."""
        raise NotImplementedError

    def end(self) -> Iterator[Recorded]:
        """Yield what was held back."""
        return iter(())

    def opened(self, connection: str, time: str, url: str) -> Frame:
        """Begin the next epoch of a connection."""
        self._epochs[connection] = self._epochs.get(connection, -1) + 1
        self._counters[connection] = 0
        return self.frame(OPENED, connection, from_decimal(time), b"", url)

    def frame(self, kind: str, connection: str, received_ns: int, data: bytes, origin: str = "") -> Frame:
        """Build the next frame of a connection."""
        counter = self._counters.get(connection, 0)
        self._counters[connection] = counter + 1
        return Frame(kind, IMPORT, connection, self._epochs.get(connection, 0), counter, received_ns, data, origin)


class _StampedReader(_Reader):
    def line(self, number: int, line: bytes) -> Iterator[Recorded]:
        if not line.strip():
            yield Recorded(number, None)
            return
        match = _STAMPED.fullmatch(line)
        if match is None:
            raise ValueError(f"{line[:40]!r} is not a receive time and a message")
        time, message = match.groups()
        yield Recorded(number, self.frame(FRAME, self.connection, from_decimal(time.decode()), message))


class _CaptureReader(_Reader):
    def line(self, number: int, line: bytes) -> Iterator[Recorded]:
        read = self._json if line.startswith(b"{") else self._text
        yield Recorded(number, read(line) if line.strip() else None)

    def _text(self, line: bytes) -> Frame | None:
        received = _RECEIVED.fullmatch(line)
        if received:
            time, message = received.groups()
            return self.frame(FRAME, self.connection, from_decimal(time.decode()), message)
        connected = _CONNECTED.fullmatch(line)
        if connected:
            url, time = connected.groups()
            return self.opened(self.connection, time.decode(), url.decode())
        answered = _ANSWERED.fullmatch(line)
        if answered:
            url, time, body = answered.groups()
            return self.frame(ANSWER, f"{self.connection}.http", from_decimal(time.decode()), body, url.decode())
        if _NOTE.match(line):
            return None
        raise ValueError(f"{line[:40]!r} is neither a message nor a note")

    def _json(self, line: bytes) -> Frame | None:
        read = _decode_capture_line(line)
        if read.t in ("header", "send"):
            return None
        time = bytes(read.ts).decode()
        if read.t == "connect":
            return self.opened(read.conn, time, read.addr)
        if read.t not in ("recv", "http") or read.data is None:
            raise ValueError(f"an entry of type {read.t[:40]!r} {'without' if read.data is None else 'with'} data")
        if read.t == "recv":
            return self.frame(FRAME, read.conn, from_decimal(time), read.data.encode())
        return self.frame(ANSWER, read.conn, from_decimal(time), read.data.encode(), read.url)


class _BareReader(_Reader):
    def __init__(self, connection: str) -> None:
        super().__init__(connection)
        self._time = 0
        self._waiting: list[tuple[int, bytes]] = []
        self._waiting_bytes = 0

    def line(self, number: int, line: bytes) -> Iterator[Recorded]:
        self._waiting.append((number, line))
        self._waiting_bytes += len(line)
        self._time = max(self._time, _own_time(line))
        if self._time:
            yield from self._release()
        elif len(self._waiting) > _LINES_WITHOUT_TIME or self._waiting_bytes > _BYTES_WITHOUT_TIME:
            raise ValueError(f"the first {len(self._waiting)} messages tell no time, so none can be given to them")

    def end(self) -> Iterator[Recorded]:
        if any(line.strip() for _, line in self._waiting):
            raise ValueError("no message tells a time (time_out, timestamp, time, E), so none can be given to them")
        yield from self._release()

    def _release(self) -> Iterator[Recorded]:
        for number, line in self._waiting:
            yield Recorded(number, self.frame(FRAME, self.connection, self._time, line) if line.strip() else None)
        self._waiting.clear()
        self._waiting_bytes = 0


def _own_time(line: bytes) -> int:
    """Return the time a message tells of itself, 0 if none or if it cannot be read."""
    try:
        times = _decode_times(line)
        told = _told(times)
        if told or not bytes(times.data):
            return told
        inner = _decode_inner_times(times.data)
        return max(map(_told, inner), default=0) if isinstance(inner, list) else _told(inner)
    except (ValueError, RecursionError):
        return 0


def _told(times: _Times) -> int:
    text = times.time_out or times.timestamp or times.time
    if text:
        return from_rfc3339(text)
    return from_integer(times.event_time) if times.event_time else 0


def _rest_answer(path: Path, stream: io.BufferedReader, exchange: Exchange) -> Iterator[Recorded]:
    number = 0
    try:
        for number, answer in enumerate(answers.cut(path.name, stream, exchange), start=1):
            frame = Frame(ANSWER, BACKFILL, path.name, 0, number - 1, 0, answer.data, answer.origin)
            newest = _newest(path, exchange, frame, answer.first_row)
            yield Recorded(number, msgspec.structs.replace(frame, received_ns=newest))
    except (EOFError, OSError, zlib.error) as error:
        raise _damaged(path, number + 1, error) from None
    except (ValueError, RecursionError) as error:
        raise BadData(f"import {path}: is not a REST answer with trades: {error}") from None


def _newest(path: Path, exchange: Exchange, frame: Frame, first_row: int) -> int:
    try:
        times = [trade.exchange_ns for trade in exchange.parse(frame).trades]
    except BadFrame as error:
        where = f" (in the answer that begins at row {first_row})" if first_row > 1 else ""
        raise BadData(f"import {path}: is not a REST answer with trades: {error}{where}") from None
    if not times:
        raise BadData(f"import {path}: holds no trades of the exchange {exchange.name!r} (is the exchange right?)")
    return max(times)
