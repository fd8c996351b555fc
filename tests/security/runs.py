"""Runs of frames that look alike, one of them damaged a little: where a reader of many frames at once would be fooled.

A reader that knows the layout of a message looks at few of its bytes. So damage is small here, and everywhere: each
byte of a real frame removed, doubled, replaced and preceded by each byte that means something; each value spelt as no
exchange does; cut at each length; with more behind it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence

from k2.errors import BadFrame, UnknownName
from k2.feeds.base import Exchange
from k2.feeds.columns import Columns, ParsesMany
from k2.model import FRAME, LIVE, NOTHING, Frame, Parsed

# What means something to a reader of JSON or of numbers, beside what looks like it: neighbours of the digits, blanks of
# other alphabets, bytes that are no text.
BYTES = (
    *(bytes([value]) for value in b'"\\{}[],: \n\x00+-.eE019/;atT_\x7f\x80\xb2\xc3\xff'),
    *("٣".encode(), "１".encode(), "\u00a0".encode(), "\u2028".encode(), b"\\u0031", b'\\"', b'","', b'":"'),
)
TRAILING = (b"\x00", b" ", b"\n", b"}", b"]", b",", b"{}", b"null", b"0", b'"', b"\\", b"\xff")
PLAIN = re.compile(r"[0-9]+(\.[0-9]+)?")

_VALUES = re.compile(rb'"(?:[^"\\]|\\.)*"(?!\s*:)|-?[0-9][0-9.eE+-]*|true|false|null')
_MEMBERS = re.compile(rb'("[^"]*"):("(?:[^"\\]|\\.)*"|-?[0-9][0-9.eE+-]*|true|false|null)')


def spellings(value: bytes) -> Iterator[bytes]:
    """Yield ways to write a value, with its quotes if it has some, that are wrong, or right but unheard of."""
    quote = value[:1] if value.startswith(b'"') else b""
    bare = value.strip(b'"')
    for other in (
        *(b"0" + bare, b"000" + bare, b"+" + bare, b"-" + bare, b"-0", b" " + bare, bare + b" ", bare + b"\x00"),
        *(bare + b"e0", bare + b"E+1", bare + b"e-1", bare + b".", b"." + bare, bare + b".0", bare + b".0.0"),
        *(bare + b"0" * 40, b"0" * 40 + bare, bare * 30, b"9" * 17, b"9" * 18, b"9" * 19, b"9" * 20, b"9" * 39),
        *(
            b"9223372036854775807",
            b"9223372036854775808",
            b"18446744073709551616",
            b"0",
            b"0.000",
            b"",
            b"1_0",
            b"1,0",
            b"0x1",
        ),
        *(b"0." + b"0" * 11 + b"1", b"0." + b"0" * 12 + b"1", b"1." + b"9" * 30, b"NaN", b"Infinity", b"null", b"true"),
        *(bare + b"\\", bare + b'\\"', b"\\u0031" + bare, bare + b"\\n", bare[:-1], bare[1:], bare + bare[-1:]),
        *("٣".encode() + bare, bare + "３".encode(), bare + b"\xff", bare + b"\xc3"),
        bare + b'","x":"1',
        bare + b',"x":1',
        bare + b"],[" + bare,
        bare + b"},{" + bare,
    ):
        yield quote + other + quote
    yield b'"' + bare + b'"' if not quote else bare
    yield from (b"null", b"true", b"false", b"{}", b"[]", b'""', b"[" + value + b"]", b'{"p":' + value + b"}")


def respelt(data: bytes) -> Iterator[bytes]:
    """Yield a frame with each of its values spelt in each way."""
    for found in _VALUES.finditer(data):
        for other in spellings(found[0]):
            yield data[: found.start()] + other + data[found.end() :]


def damages(data: bytes) -> Iterator[bytes]:
    """Yield every small damage of a frame, the frame itself among them."""
    for at in range(len(data)):
        yield data[:at]
        yield data[:at] + data[at + 1 :]
        yield data[: at + 1] + data[at:]
        for byte in BYTES:
            yield data[:at] + byte + data[at + 1 :]
            yield data[:at] + byte + data[at:]
    for trailing in (*TRAILING, data):
        yield data + trailing
        yield trailing + data
    yield from respelt(data)
    for found in _MEMBERS.finditer(data):
        for again in (found[2], b"1", b'"1"', b"null"):
            yield data[: found.end()] + b"," + found[1] + b":" + again + data[found.end() :]
            yield data[: found.start()] + found[1] + b":" + again + b"," + data[found.start() :]
        yield data[: found.start()] + found[2] + b":" + found[1] + data[found.end() :]


def damage(data: bytes, choose: random.Random) -> bytes:
    """Return one small damage of a frame, by chance; each kind is as likely, wherever it is."""
    at = choose.randrange(len(data))
    byte = choose.choice(BYTES)
    match choose.randrange(7):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + data[at + choose.randrange(1, 4) :]
        case 2:
            return data[: at + choose.randrange(1, 4)] + data[at:]
        case 3:
            return data[:at] + byte + data[at + 1 :]
        case 4:
            return data[:at] + byte + data[at:]
        case 5:
            trailing = choose.choice(TRAILING)
            return data + trailing if at % 2 else trailing + data
        case _:
            found = choose.choice(list(_VALUES.finditer(data)))
            return data[: found.start()] + choose.choice(list(spellings(found[0]))) + data[found.end() :]


def read_one(exchange: Exchange, data: bytes) -> Parsed | None:
    """Return what `parse` says of a frame; None for a bad one."""
    try:
        return exchange.parse(Frame(FRAME, LIVE, "c", 1, 0, 1, data))
    except (BadFrame, UnknownName):
        return None


def read_many(exchange: Exchange, frames: Sequence[bytes]) -> list[Parsed] | None:
    """Return what `parse_many` says of each frame; None where it gives up."""
    assert isinstance(exchange, ParsesMany)
    try:
        columns: Columns = exchange.parse_many(frames)
        return columns.parsed(len(frames))
    except Exception:  # noqa: BLE001 - it may give up in any way
        return None


def check_run(exchange: Exchange, frames: Sequence[bytes]) -> bool:
    """Whatever `parse_many` says of a run is what `parse` says of each of its frames; return whether it said anything.

    Numbers that are not plain are left for later, by both.
    """
    found = read_many(exchange, frames)
    if found is None:
        return False
    for number, (data, read) in enumerate(zip(frames, found, strict=True)):
        one = read_one(exchange, data)
        if one is None and read == NOTHING:
            raise AssertionError(f"frame {number}, {data!r}, is bad, and in a run it vanishes")
        if one != read and all(PLAIN.fullmatch(text) for text in _numbers(read)):
            raise AssertionError(f"frame {number}, {data!r}: parse gives {one}, parse_many {read}, in {list(frames)!r}")
    return True


def _numbers(parsed: Parsed) -> Iterator[str]:
    for trade in parsed.trades:
        yield from (trade.price, trade.amount)
    for quote in parsed.quotes:
        yield from (quote.bid_price, quote.bid_amount, quote.ask_price, quote.ask_amount)
