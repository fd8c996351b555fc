"""REST trade answers of any size in files, cut into answers of about 1,000 rows while they are read.

Every row keeps its exact text. Trades without an id are told from equal ones by how many their answer holds, so
rows of one moment stay in one answer.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import msgspec

from k2 import symbols as symbol_names
from k2.errors import UnknownName
from k2.feeds.base import Exchange

ROWS_PER_ANSWER = 1_000
LARGEST_ANSWER_BYTES = 16 << 20
_FULL_ANSWER_BYTES = 4 << 20  # fewer rows than 1,000 when they are this large
_PIECE_BYTES = 1 << 20  # read at once; also the most that one row, the head or the tail may take


def _nested(depth: int) -> bytes:
    """Return a pattern for one JSON array or object; possessive, so a broken one costs no backtracking."""
    parts = rb'"(?:[^"\\]++|\\.)*+"|[^][{}"]++'
    inner = parts
    for _ in range(depth):
        value = rb"[\[{](?:" + inner + rb")*+[\]}]"
        inner = parts + rb"|" + value
    return value


_ROW = _nested(4)
_FIRST_ROW = re.compile(rb"\s*(" + _ROW + rb")", re.DOTALL)
_NEXT_ROW = re.compile(rb"\s*,\s*(" + _ROW + rb")", re.DOTALL)
_LIST_HEAD = re.compile(rb"\s*\[")
_LIST_TAIL = re.compile(rb"\s*\]\s*")
# Kraken: {"error":[],"result":{"XXBTZUSD":[[...],[...]],"last":"..."}}, the fields in any order.
_ERROR = rb'"error"\s*:\s*\[\s*\]'
_LAST = rb'"last"\s*:\s*(?:"[0-9.]*"|[0-9.]+)'
_RESULT_HEAD = re.compile(
    rb"\s*\{\s*(?:" + _ERROR + rb'\s*,\s*)?"result"\s*:\s*\{\s*(?:' + _LAST + rb'\s*,\s*)?"([^"\\]+)"\s*:\s*\['
)
_RESULT_TAIL = re.compile(rb"\s*\]\s*(?:,\s*" + _LAST + rb"\s*)?\}\s*(?:,\s*" + _ERROR + rb"\s*)?\}\s*")
_KRAKEN_TIME = re.compile(rb'\[\s*"[^"]*"\s*,\s*"[^"]*"\s*,\s*([^,\s]+)')


class _Wrapped(msgspec.Struct, gc=False):
    """A row as ccxt gives it: `info` is the exchange's own."""

    info: msgspec.Raw = msgspec.Raw(b"")
    symbol: str = ""


_decode_wrapped = msgspec.json.Decoder(_Wrapped).decode
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class Answer(NamedTuple):
    """One answer, and the address it would come from; `first_row` counts the file's rows from 1."""

    origin: str
    data: bytes
    first_row: int


def cut(file_name: str, stream: io.BufferedReader, exchange: Exchange) -> Iterator[Answer]:
    """Yield the answers that make up a file, in its order; about one answer is in memory.

    Raises ValueError, saying why, where the file is no REST answer with trades; and what reading raises.
    """
    text = _Text(stream)
    if text.match(_LIST_HEAD):
        return _binance(file_name, text, exchange)
    return _kraken(text, exchange)


class _Text:
    """What was read and not yet used of a file; patterns match at the place reached."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream = stream
        self._text = b""
        self._at = 0
        self._ended = False

    def match(self, pattern: re.Pattern[bytes]) -> re.Match[bytes] | None:
        """Step over what the pattern matches here, reading on while more text may change the answer."""
        while True:
            found = pattern.match(self._text, self._at)
            if found is not None and (self._ended or found.end() < len(self._text)):
                self._at = found.end()
                return found
            if self._ended or len(self._text) - self._at > _PIECE_BYTES:
                return None
            self._read_on()

    def rows(self) -> Iterator[bytes]:
        """Yield rows until something else comes."""
        pattern = _FIRST_ROW
        while found := self.match(pattern):
            yield found[1]
            pattern = _NEXT_ROW

    def end(self, pattern: re.Pattern[bytes], rows: int) -> bytes:
        """Return the rest of the file, which the pattern must match."""
        found = self.match(pattern)
        if found is None or self._at < len(self._text):
            raise ValueError(f"what follows its row {rows} is neither a row nor the end of the answer")
        return found[0]

    def _read_on(self) -> None:
        piece = self._stream.read(_PIECE_BYTES)
        self._ended = not piece
        self._text, self._at = self._text[self._at :] + piece, 0


def _kraken(text: _Text, exchange: Exchange) -> Iterator[Answer]:
    head = text.match(_RESULT_HEAD)
    if head is None:
        raise ValueError("one pair's trades were expected in its result")
    origin = f"{exchange.rest_url}/0/public/Trades?pair={head[1].decode()}"
    rows = 0
    held: list[bytes] = []
    for chunk in _chunks(text.rows(), _kraken_time):
        if held:
            yield Answer(origin, head[0] + b",".join(held) + b"]}}", rows - len(held) + 1)
        held = chunk
        rows += len(chunk)
    tail = text.end(_RESULT_TAIL, rows)
    yield Answer(origin, head[0] + b",".join(held) + tail, rows - len(held) + 1)


def _kraken_time(row: bytes) -> bytes:
    found = _KRAKEN_TIME.match(row)
    return found[1] if found else b""


def _binance(file_name: str, text: _Text, exchange: Exchange) -> Iterator[Answer]:
    native = ""
    rows = 0
    for chunk in _chunks(text.rows(), None):
        wrapped = _decode_wrapped(chunk[0])
        native = native or _native(file_name, exchange, wrapped.symbol)
        own = [bytes(_decode_wrapped(row).info) for row in chunk] if wrapped.info else chunk
        yield Answer(_binance_address(exchange, native, own[0]), b"[" + b",".join(own) + b"]", rows + 1)
        rows += len(chunk)
    text.end(_LIST_TAIL, rows)
    if not rows:
        raise ValueError("it is empty")


def _chunks(rows: Iterator[bytes], time_of: Callable[[bytes], bytes] | None) -> Iterator[list[bytes]]:
    """Group rows into answers; with `time_of`, never between two rows of one time."""
    chunk: list[bytes] = []
    size = 0
    for row in rows:
        full = len(chunk) >= ROWS_PER_ANSWER or size >= _FULL_ANSWER_BYTES
        if full and (time_of is None or time_of(row) != time_of(chunk[-1])):
            yield chunk
            chunk, size = [], 0
        chunk.append(row)
        size += len(row)
        if size > LARGEST_ANSWER_BYTES:
            raise ValueError(f"more than {LARGEST_ANSWER_BYTES} bytes of rows have the time of row {row[:60]!r}")
    if chunk:
        yield chunk


def _binance_address(exchange: Exchange, native: str, row: bytes) -> str:
    fields = _decode_fields(row)
    base = f"{exchange.rest_url}/{'fapi/v1' if 'fapi' in exchange.rest_url else 'api/v3'}"
    if fields.keys() >= {"a", "p", "q", "T", "m"}:
        return f"{base}/aggTrades?symbol={native}&fromId={bytes(fields['a']).decode()}&limit={ROWS_PER_ANSWER}"
    if fields.keys() >= {"id", "price", "qty", "time", "isBuyerMaker"}:
        return f"{base}/historicalTrades?symbol={native}&fromId={bytes(fields['id']).decode()}&limit={ROWS_PER_ANSWER}"
    raise ValueError(f"its rows have the fields {sorted(fields)[:12]}")


def _native(file_name: str, exchange: Exchange, told: str) -> str:
    """Return the exchange's symbol: as the rows tell it, or from the file's name (`aggTrades_XRPETH_2019.json`)."""
    if told:
        return exchange.to_native(symbol_names.canonical(told))
    for part in re.split(r"[_.\s]", file_name):
        if part.isalnum() and not part.isdigit():
            try:
                return exchange.to_native(exchange.to_canonical(part))
            except UnknownName:
                continue
    raise ValueError("neither its rows nor the file's name tell the symbol (name it like aggTrades_XRPETH.json)")
