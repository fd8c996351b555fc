"""Hostile versions of real frames: what a broken or malicious exchange, proxy or file could send.

`damage` is a pure function of a frame and a list of edits, so that Hypothesis, a coverage-guided fuzzer and a plain
random loop all explore the same space, and a finding is a short list of numbers.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from k2.feeds.conformance import Case, cases

FRAMES = Path(__file__).resolve().parents[1] / "frames"

Edit = tuple[int, int, int]
"""What is done, where, and with what; each number is taken modulo what there is to choose from."""

_TOKENS = re.compile(rb'"(?:[^"\\]|\\.)*"|-?[0-9][0-9.eE+-]*|true|false|null|[\[\]{},:]')
_VALUES = re.compile(rb'"(?:[^"\\]|\\.)*"|-?[0-9][0-9.eE+-]*|true|false|null')
_MEMBERS = re.compile(rb'"[^"]*"\s*:\s*("(?:[^"\\]|\\.)*"|-?[0-9][0-9.eE+-]*|true|false|null)')

DEEP = 3_000  # deeper than any decoder's stack should go; a hundred thousand levels are in `bombs`

# What a value is replaced by: other types, numbers no machine word holds, text no decoder likes.
VALUES: tuple[bytes, ...] = (
    *(b"null", b"true", b"false", b"{}", b"[]", b'""', b'" "', b"0", b"-0", b"-1", b"0.1", b"1e5", b'"1e5"'),
    *(b"NaN", b"Infinity", b"-Infinity", b'"NaN"', b'"Infinity"', b'"-inf"', b'"sNaN"', b'"0x10"', b'"1_000"'),
    *(b"1e999999", b"-1e999999", b"1e-999999", b'"1e999999"', b'"1e-999999"', b'"1E+99"', b"0e999999999999"),
    *(b"9223372036854775807", b"9223372036854775808", b"-9223372036854775808", b"18446744073709551616", b"9" * 400),
    *(b"9" * 5_000, b'"' + b"9" * 5_000 + b'"', b"0." + b"0" * 500 + b"1", b'"0.' + b"0" * 500 + b'1"'),
    *(b'"' + b"0" * 300 + b'1.5"', b'"99999999999999999999999999.999999999999"', b'"1.0000000000001"'),
    *(b'"\\ud800"', b'"\\udc00\\ud800"', b'"\\ud83d\\ude00"', b'"\\u0000"', b'"\x00"', b'"\xff\xfe"', b'"\xc0\x80"'),
    *(b'"\xed\xa0\x80"', b'"\xf4\x90\x80\x80"', b'"\\u0031.5"', '"١٢"'.encode(), '"２"'.encode(), b'"\\x"'),
    *(b"01", b"1.", b".5", b"+1", b'"+1"', b'" 1.5"', b'"1.5\\n"', b"--1", b"1e", b"0x1F", b'"1,5"', b'"-1.5"'),
    *(b"[" * DEEP, b'{"a":' * DEEP, b"[" * DEEP + b"]" * DEEP, b'{"a":' * DEEP + b"1" + b"}" * DEEP),
    *(b'"../../x"', b"\"a'; DROP TABLE trades; --\"", b'"BTC-USDT' + b" " * 2_000 + b'"'),
    *(b'"BTC/USDT:' + b"x" * 2_000 + b'"', b'"A-B\\n"', b'"A-B-C-D"'),
    *('"ßTC-USDT"'.encode(), '"ıNJUSDT"'.encode(), b'"' + b"A" * 3_000 + b'USDT"', b'"-"', b'"/"', b'"PERP-USDT-PERP"'),
    *(b'"buy"', b'"SELL"', b'"b"', b'"trade"', b'"bookTicker"', b'"aggTrade"', b'"btcusdt@trade"', b'"ticker"'),
    *(b'"0000-00-00T00:00:00Z"', b'"9999-12-31T23:59:59.999999999-23:59"', b'"2024-02-30T00:00:00Z"'),
    *(b'"2024-01-01T00:00:60Z"', b'"0001-01-01T00:00:00+23:59"', b'"2024-01-01T00:00:00+99:99"', b"1723161600000"),
    *(b"253402300800000000000", b'"1723161600.1234567891"', b"1723161600.0000000001", b'"' + b"\\u0041" * 1_000 + b'"'),
)  # fmt: skip

# What is put between two bytes.
PIECES: tuple[bytes, ...] = (
    *(b"\x00", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\n"),
    *(b" " * 100, b"null", b"/* x */", b"//", b"\x1b[2J", b"\x1f\x8b\x08\x00", b"\x28\xb5\x2f\xfd", b"[" * DEEP),
    *(b'{"data":' * DEEP, b'"e":"trade",'),
    b'"channel":"trade",', b'"type":"match",', b'"stream":"x@trade",', b'"p":"1",', b'"data":[],',
)  # fmt: skip


def known_frames(exchange: str) -> list[Case]:
    """Return the documented and recorded frames of an exchange, which damage begins with."""
    return cases(FRAMES / exchange)


def damage(data: bytes, edits: Sequence[Edit], other: bytes = b"") -> bytes:
    """Return the frame after the edits; `other` is a frame to splice parts of into it."""
    for what, where, value in edits:
        data = _EDITS[what % len(_EDITS)](data, where, value, other)
    return data


def _flip(data: bytes, where: int, value: int, other: bytes) -> bytes:
    if not data:
        return data
    at = where % len(data)
    return data[:at] + bytes([data[at] ^ (1 << value % 8)]) + data[at + 1 :]


def _replace_value(data: bytes, where: int, value: int, other: bytes) -> bytes:
    spans = [match.span() for match in _VALUES.finditer(data[:100_000])]
    if not spans:
        return VALUES[value % len(VALUES)]
    start, end = spans[where % len(spans)]
    return data[:start] + VALUES[value % len(VALUES)] + data[end:]


def _cut(data: bytes, where: int, value: int, other: bytes) -> bytes:
    return data[: where % (len(data) + 1)]


def _insert(data: bytes, where: int, value: int, other: bytes) -> bytes:
    at = where % (len(data) + 1)
    return data[:at] + PIECES[value % len(PIECES)] + data[at:]


def _remove_token(data: bytes, where: int, value: int, other: bytes) -> bytes:
    spans = [match.span() for match in _TOKENS.finditer(data[:100_000])]
    if not spans:
        return data
    start, end = spans[where % len(spans)]
    return data[:start] + data[end:]


def _repeat_member(data: bytes, where: int, value: int, other: bytes) -> bytes:
    """Say a key twice, the second time with something else."""
    members = list(_MEMBERS.finditer(data[:100_000]))
    if not members:
        return data + data
    member = members[where % len(members)]
    key = member[0][: member.start(1) - member.start()]
    return data[: member.end()] + b"," + key + VALUES[value % len(VALUES)] + data[member.end() :]


def _swap_values(data: bytes, where: int, value: int, other: bytes) -> bytes:
    spans = [match.span() for match in _VALUES.finditer(data[:100_000])]
    if len(spans) < 2:
        return data
    first, second = sorted((spans[where % len(spans)], spans[value % len(spans)]))
    if first == second:
        return data
    return (
        data[: first[0]] + data[slice(*second)] + data[first[1] : second[0]] + data[slice(*first)] + data[second[1] :]
    )


def _splice(data: bytes, where: int, value: int, other: bytes) -> bytes:
    return data[: where % (len(data) + 1)] + other[value % (len(other) + 1) :]


def _nest(data: bytes, where: int, value: int, other: bytes) -> bytes:
    """Put a value, with what it holds, into many arrays or objects."""
    spans = [match.span() for match in _VALUES.finditer(data[:100_000])]
    start, end = spans[where % len(spans)] if spans else (0, len(data))
    opening, closing = ((b"[", b"]"), (b'{"a":', b"}"))[value % 2]
    depth = 1 + value // 2 % DEEP
    return data[:start] + opening * depth + data[start:end] + closing * depth + data[end:]


def _repeat_part(data: bytes, where: int, value: int, other: bytes) -> bytes:
    start = where % (len(data) + 1)
    return data[: start + value % 64] + data[start:]


_EDITS = (
    *(_replace_value, _replace_value, _replace_value, _flip, _repeat_member, _swap_values),
    *(_insert, _remove_token, _cut, _splice, _nest, _repeat_part),
)

_TRADE = b'{"symbol":"BTC/USD","side":"buy","price":1,"qty":1,"trade_id":1,"timestamp":"2024-08-09T00:00:00Z"}'


def bombs(size: int) -> Iterator[tuple[str, bytes]]:
    """Yield messages of about so many bytes, each made to hurt, with a name."""
    yield "arrays in arrays", b"[" * size
    yield "objects in objects", b'{"data":' * (size // 8)
    yield "arrays in arrays, closed", b"[" * (size // 2) + b"]" * (size // 2)
    yield "nested under an unknown key", b'{"x":' + b"[" * (size // 2) + b"]" * (size // 2) + b',"e":"trade"}'
    yield "an id without end", b'{"e":"trade","t":' + b"9" * size + b"}"
    yield (
        "a price without end of Binance",
        b'{"stream":"btcusdt@trade","data":{"e":"trade","E":1723161600001,"s":"BTCUSDT","t":1,"p":"%s","q":"1",'
        b'"T":1723161600000,"m":true,"M":true}}' % (b"9" * size),
    )
    yield "a price without end of Kraken", _kraken(_TRADE.replace(b'"price":1', b'"price":' + b"9" * size))
    yield (
        "a price without end of Kraken v1",
        b'[1,[["%s","1","1700000000","b","m",""]],"trade","XBT/USD"]' % (b"9" * size),
    )
    yield "a symbol without end", _kraken(_TRADE.replace(b"BTC/", b"A" * size + b"/"))
    yield (
        "blanks around a symbol",
        b'{"type":"match","trade_id":1,"price":"1","size":"1","side":"buy","time":"2024-08-09T00:00:00Z",'
        b'"product_id":"BTC-USD%s"}' % (b" " * size),
    )
    yield "many short fields", b"{" + b",".join(b'"%d":0' % n for n in range(size // 10)) + b"}"
    yield "many empty objects", b"[" + b"{}," * (size // 3) + b"{}]"
    yield "one field again and again", b"{" + b'"e":"trade",' * (size // 12) + b'"e":1}'
    yield "blanks", b" " * size
    yield "escapes", b'{"channel":"' + b"\\u0041" * (size // 6) + b'"}'
    yield "a text that does not end", b'{"channel":"' + b"x" * size
    yield "bytes that are no text", b"\xff" * size
    yield (
        "the smallest trades of Kraken v1",
        b'[1,[%s],"trade","XBT/USD"]' % b",".join([b'["1","1","1700000000","b","m",""]'] * (size // 34)),
    )
    yield "many trades", _kraken(b",".join([_TRADE] * (size // len(_TRADE))))


def _kraken(trades: bytes) -> bytes:
    return b'{"channel":"trade","type":"update","data":[' + trades + b"]}"


SETTINGS_FILE = b"""data = "k2-data"
[log]
sync = "full"
linger_ms = 5.0
[hot]
flush_rows = 50000
[capture]
exchanges = ["kraken", "binance"]
[exchanges.kraken]
symbols = ["BTC-USD"]
channels = "trades,quotes"
url = "wss://user:secret@host/x?token=y"
[api]
port = 8642
"""

_TRADE_OF_BINANCE = (
    b'{"stream":"btcusdt@trade","data":{"e":"trade","E":1723161600001,"s":"BTCUSDT","t":1,"p":"1.5","q":"1",'
    b'"T":1723161600000,"m":true,"M":true}}'
)
RECORDINGS: tuple[bytes, ...] = (
    b"".join(b"%d %s\n" % (1_723_161_600_000_000_000 + n, _TRADE_OF_BINANCE) for n in range(5)),
    b"configuration: x\nwss://x/y <-> 1723161600.5\n1723161600.6: " + _TRADE_OF_BINANCE + b"\nhttps://x/y -> 1.5: {}\n",
    b'{"t":"header"}\n{"t":"connect","ts":1723161600.1,"conn":"a","addr":"wss://x"}\n'
    b'{"t":"recv","ts":1723161600.2,"conn":"a","data":"{}"}\n{"t":"http","ts":1723161600.3,"conn":"b","url":"x","data":"[]"}\n',
    b'{"channel":"trade","time":"2024-08-09T00:00:00Z","data":[]}\n' + _kraken(_TRADE) + b"\n",
    b'{"error":[],"result":{"XXBTZUSD":[["1.5","1","1723161600.1","b","m","",1],["1.5","1","1723161600.2","s","l","",2]],'
    b'"last":"1723161600200000000"}}',
    b'[{"a":1,"p":"1.5","q":"1","f":1,"l":2,"T":1723161600000,"m":true},{"a":2,"p":"1","q":"1","f":3,"l":3,"T":1723161600001,'
    b'"m":false}]',
)  # fmt: skip


def recording(number: int, edits: Sequence[Edit], rest: bytes) -> bytes:
    """Return a damaged recording of one of the formats, plain, packed, packed and damaged, or only the rest."""
    text = RECORDINGS[number % len(RECORDINGS)]
    match number // len(RECORDINGS) % 4:
        case 0:
            return damage(text, edits) + rest
        case 1:
            return gzip.compress(damage(text, edits) + rest, 1)
        case 2:
            return damage(gzip.compress(text, 1), edits) + rest
        case _:
            return rest
