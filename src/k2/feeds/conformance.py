"""The rules every exchange module keeps, as a suite its author runs: `python -m k2.feeds.conformance NAME FOLDER`.

FOLDER holds cases of two files each: `NAME.json`, the frame's bytes as the exchange sends them, and
`NAME.expected.json`, what they mean (see `Expected`). docs/add-an-exchange.md shows one.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from k2 import symbols as symbol_names
from k2.errors import BadFrame, K2Error, Misconfigured
from k2.feeds.base import CHANNELS, Control, Exchange
from k2.feeds.columns import Columns, ParsesMany
from k2.feeds.registry import get
from k2.feeds.times import EARLIEST_NS, LATEST_NS
from k2.model import AGGREGATE, ANSWER, BUY, FRAME, LIVE, SELL, TRADE, Frame, Parsed, Quote, Trade

_RECEIVED_NS = 1_700_000_000 * 10**9
_LARGEST = 2**63 - 1
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_PLAIN = re.compile(r"[0-9]+(\.[0-9]+)?")
_MUTATIONS_PER_CASE = 120
_SHOWN = 300


class Expected(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a frame means. `source` says where the frame comes from: documentation page and date, or recording.

    `bad`: parsing must raise BadFrame. `control` is the kind of `Exchange.control`'s answer, and
    `acknowledged` its keys. An ANSWER needs `origin`, the address asked.
    """

    source: str
    kind: str = FRAME
    origin: str = ""
    trades: list[Trade] = []
    quotes: list[Quote] = []
    bad: bool = False
    control: str = "data"
    acknowledged: list[str] = []
    reason: str = ""


class Case(NamedTuple):
    """A frame and its meaning."""

    name: str
    data: bytes
    expected: Expected

    def frame(self, data: bytes | None = None) -> Frame:
        """Return the frame, or one of the same kind with other data."""
        expected = self.expected
        return Frame(
            expected.kind, LIVE, "case", 0, 0, _RECEIVED_NS, self.data if data is None else data, expected.origin
        )


def cases(folder: Path) -> list[Case]:
    """Read the cases of a folder, sorted by name.

    Raises:
        Misconfigured: a file is missing or unreadable, or there is no case at all.
    """
    found = []
    for path in sorted(folder.glob("*.expected.json")):
        frame = path.with_name(path.name.replace(".expected.json", ".json"))
        try:
            expected = msgspec.json.decode(path.read_bytes(), type=Expected)
            found.append(Case(frame.stem, frame.read_bytes().removesuffix(b"\n"), expected))
        except (OSError, ValueError) as error:
            raise Misconfigured(f"case {path}: cannot be read: {error}") from None
    if not found:
        raise Misconfigured(f"{folder} holds no case (NAME.json with NAME.expected.json; see docs/add-an-exchange.md)")
    return found


def check(exchange: Exchange, frames: Path) -> list[str]:
    """Return what an exchange does against the rules, a sentence each; empty when it conforms."""
    found = cases(frames)
    violations = [*_declaration(exchange), *_subscriptions(exchange, found), *_coverage(found)]
    for case in found:
        violations += [f"{case.name}: {violation}" for violation in _case(exchange, case)]
    if isinstance(exchange, ParsesMany):
        violations += _many(exchange, found)
    return violations


def parsed_or_bad(exchange: Exchange, frame: Frame) -> Parsed | None:
    """Parse a frame that may be anything; None for BadFrame, every other exception is let through."""
    try:
        return exchange.parse(frame)
    except BadFrame:
        return None


def mutations(data: bytes, seed: int, count: int = _MUTATIONS_PER_CASE) -> Iterator[bytes]:
    """Yield damaged versions of a frame: cut, bytes changed, values replaced, nested; the same ones for a seed."""
    dice = random.Random(seed)  # noqa: S311 - reproducible damage, no secret
    values = [match.span() for match in re.finditer(rb'"[^"]*"|-?[0-9][0-9.eE+-]*|true|false|null', data)]
    replacements = (
        *(b"null", b'""', b"-1", b"0", b"0.1", b"-16000000000", b"4611686018427387904", b"99999999999999999999"),
        *(b"1e400", b'"\xff"', b"[]", b"{}", b'"NaN"', b'"1999-12-31T23:59:59Z"'),
    )
    yield from (b"", b"{}", b"[]", b"null", b"0", b'"x"', b"\x00", b"\xff\xfe", data + data, b"[" * 100_000)
    for _ in range(count):
        position = dice.randrange(len(data) + 1)
        action = dice.randrange(3)
        if action == 0:
            yield data[:position]
        elif action == 1 or not values:
            yield data[:position] + bytes([dice.randrange(256)]) + data[position + 1 :]
        else:
            start, end = dice.choice(values)
            yield data[:start] + dice.choice(replacements) + data[end:]


def _declaration(exchange: Exchange) -> Iterator[str]:
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", exchange.name):
        yield f"name {exchange.name!r} is not lower case letters and digits joined by '-'"
    if not exchange.url.startswith(("ws://", "wss://")):
        yield f"url {exchange.url!r} is no WebSocket address"
    if not exchange.rest_url.startswith(("http://", "https://")) or exchange.rest_url.endswith("/"):
        yield f"rest_url {exchange.rest_url!r} is no HTTP address without a trailing slash"
    limits = exchange.limits
    if min(limits.symbols_per_connection, limits.requests_per_second, limits.connection_seconds) <= 0:
        yield "limits: symbols_per_connection, requests_per_second and connection_seconds must be above 0"
    if min(limits.silence_seconds, limits.connections_per_minute) <= 0:
        yield "limits: silence_seconds and connections_per_minute must be above 0"
    if not exchange.default_symbols:
        yield "default_symbols is empty"
    for symbol in exchange.default_symbols:
        yield from _symbol(exchange, symbol)


def _symbol(exchange: Exchange, symbol: str) -> Iterator[str]:
    if not symbol_names.is_canonical(symbol):
        yield f"symbol {symbol!r} is not canonical"
        return
    try:
        back = exchange.to_canonical(exchange.to_native(symbol))
    except K2Error as error:
        yield f"symbol {symbol!r} cannot be turned into the exchange's and back: {error}"
        return
    if back != symbol:
        yield f"symbol {symbol!r} becomes {back!r} on the way to the exchange's and back"


def _subscriptions(exchange: Exchange, found: Sequence[Case]) -> Iterator[str]:
    expected: set[str] = set()
    for channel in CHANNELS:
        requests = exchange.requests(exchange.default_symbols, [channel])
        if requests != exchange.requests(exchange.default_symbols, [channel]):
            yield f"requests: two calls for {channel!r} differ"
    for request in exchange.requests(exchange.default_symbols, CHANNELS):
        if not request.expects:
            yield f"requests: nothing acknowledges {request.text[:80]!r}"
        if repeated := expected & request.expects:
            yield f"requests: two messages expect the same keys {sorted(repeated)}"
        expected |= request.expects
    url = exchange.connection_url(exchange.url, exchange.default_symbols, CHANNELS)
    if not url.startswith(("ws://", "wss://")):
        yield f"connection_url gives {url!r}, no WebSocket address"
    told = {key for case in found if case.expected.control == "acknowledged" for key in case.expected.acknowledged}
    if expected and not expected & told:
        yield "no case acknowledges what requests() expects for the default symbols (their keys must be the same)"


def _coverage(found: Sequence[Case]) -> Iterator[str]:
    for what, present in (
        ("a trade", any(case.expected.trades for case in found)),
        ("a quote", any(case.expected.quotes for case in found)),
        ("a frame that is neither", any(_is_silent(case.expected) for case in found)),
        ("a refusal", any(case.expected.control == "refused" for case in found)),
        ("a bad frame", any(case.expected.bad for case in found)),
    ):
        if not present:
            yield f"the folder has no case of {what}"


def _is_silent(expected: Expected) -> bool:
    return not (expected.trades or expected.quotes or expected.bad)


def _case(exchange: Exchange, case: Case) -> Iterator[str]:
    yield from _control(exchange, case)
    try:
        parsed = parsed_or_bad(exchange, case.frame())
    except Exception as error:  # noqa: BLE001 - any exception of the module is a finding
        yield f"parse raised {type(error).__name__}: {error} (only BadFrame may be raised)"
        return
    if parsed is None:
        if not case.expected.bad:
            yield "parse raised BadFrame"
    elif case.expected.bad:
        yield "parse did not raise BadFrame"
    else:
        yield from _rows(exchange, case, parsed)
    yield from _damaged(exchange, case)


def _rows(exchange: Exchange, case: Case, parsed: Parsed) -> Iterator[str]:
    wanted = Parsed(case.expected.trades, case.expected.quotes)
    if parsed != wanted:
        yield f"parse gives {_shorten(parsed)}, expected {_shorten(wanted)}"
    elsewhere = msgspec.structs.replace(case.frame(), received_ns=1, connection="other", epoch=9, counter=9)
    if exchange.parse(elsewhere) != parsed or exchange.parse(case.frame()) != parsed:
        yield "parse is not pure: the same data gave another answer"
    for trade in parsed.trades:
        yield from _trade(trade, case.data)
    for quote in parsed.quotes:
        yield from _quote(quote, case.data)
    traded, quoted = {trade.symbol for trade in parsed.trades}, {quote.symbol for quote in parsed.quotes}
    for symbol in sorted(traded | quoted):
        yield from _symbol(exchange, symbol)


def _trade(trade: Trade, data: bytes) -> Iterator[str]:
    yield from _digits({"price": trade.price, "amount": trade.amount}, data)
    if trade.side not in (BUY, SELL):
        yield f"side {trade.side!r} is neither buy nor sell"
    if trade.kind not in (TRADE, AGGREGATE):
        yield f"kind {trade.kind!r} is neither trade nor aggregate"
    if not 0 <= trade.first_id <= trade.last_id <= _LARGEST or not 0 <= trade.trade_id <= _LARGEST:
        yield f"ids {trade.trade_id}, {trade.first_id}..{trade.last_id} are not in order or too large"
    if trade.kind == TRADE and not trade.first_id == trade.last_id == trade.trade_id:
        yield f"a single trade must have first_id = last_id = trade_id, not {trade.first_id}..{trade.last_id}"
    if not EARLIEST_NS <= trade.exchange_ns < LATEST_NS:
        yield f"exchange_ns {trade.exchange_ns} is not between the years 2000 and 2100 (nanoseconds?)"


def _quote(quote: Quote, data: bytes) -> Iterator[str]:
    yield from _digits({"bid_price": quote.bid_price, "ask_price": quote.ask_price}, data)
    amounts = {"bid_amount": quote.bid_amount, "ask_amount": quote.ask_amount}
    yield from _digits({name: text for name, text in amounts.items() if text != "0"}, data)
    if quote.exchange_ns and not EARLIEST_NS <= quote.exchange_ns < LATEST_NS:
        yield f"exchange_ns {quote.exchange_ns} is not between the years 2000 and 2100 (nanoseconds?)"
    if not 0 <= quote.update_id <= _LARGEST:
        yield f"update_id {quote.update_id} is negative or too large"


def _digits(numbers: dict[str, str], data: bytes) -> Iterator[str]:
    for name, text in numbers.items():
        if not isinstance(text, str) or _NUMBER.fullmatch(text) is None:
            yield f"{name} {text!r} is not the text of a decimal number"
        elif text.encode() not in data:
            yield f"{name} {text!r} does not stand in the frame with these digits"


def _control(exchange: Exchange, case: Case) -> Iterator[str]:
    expected = case.expected
    if expected.kind == ANSWER:
        return
    try:
        told = exchange.control(case.data)
    except Exception as error:  # noqa: BLE001 - any exception of the module is a finding
        yield f"control raised {type(error).__name__}: {error} (it must never raise)"
        return
    wanted = Control(expected.control, frozenset(expected.acknowledged), expected.reason)  # type: ignore[arg-type]
    if told != wanted:
        yield f"control gives {told}, expected {wanted}"


def _damaged(exchange: Exchange, case: Case) -> Iterator[str]:
    for data in mutations(case.data, seed=len(case.data)):
        try:
            parsed_or_bad(exchange, case.frame(data))
        except Exception as error:  # noqa: BLE001 - any exception of the module is a finding
            yield f"parse raised {type(error).__name__}: {error} on damaged data {_shorten(data)}"
            return
        try:
            exchange.control(data)
        except Exception as error:  # noqa: BLE001 - any exception of the module is a finding
            yield f"control raised {type(error).__name__}: {error} on damaged data {_shorten(data)}"
            return


def _many(exchange: Exchange, found: Sequence[Case]) -> Iterator[str]:
    """Whatever `parse_many` reads, of single frames, damaged ones and all together, is what `parse` says."""
    frames = [case.data for case in found if case.expected.kind == FRAME]
    for data in frames:
        for version in (data, *mutations(data, seed=len(data))):
            yield from _columns(exchange, [version])
    usual = [data for data in frames if _read_many(exchange, [data]) is not None]
    if not usual:
        yield "parse_many reads none of the cases"
    yield from _columns(exchange, usual)


def _columns(exchange: Exchange, frames: Sequence[bytes]) -> Iterator[str]:
    columns = _read_many(exchange, frames)
    if columns is None:
        return
    for data, read in zip(frames, columns.parsed(len(frames)), strict=True):
        if _is_decided_later(read):
            continue
        parsed = parsed_or_bad(exchange, Frame(FRAME, LIVE, "case", 0, 0, _RECEIVED_NS, data))
        if parsed != read:
            told = "BadFrame" if parsed is None else _shorten(parsed)
            yield f"parse_many gives {_shorten(read)} for {_shorten(data)}, parse gives {told}"


def _read_many(exchange: Exchange, frames: Sequence[bytes]) -> Columns | None:
    assert isinstance(exchange, ParsesMany)
    try:
        return exchange.parse_many(frames)
    except Exception:  # noqa: BLE001 - it may give up in any way
        return None


def _is_decided_later(parsed: Parsed) -> bool:
    """Whether it holds numbers that the normaliser leaves to `parse`."""
    numbers = [text for trade in parsed.trades for text in (trade.price, trade.amount)]
    for quote in parsed.quotes:
        numbers += [quote.bid_price, quote.bid_amount, quote.ask_price, quote.ask_amount]
    return not all(_PLAIN.fullmatch(text) for text in numbers)


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def main(arguments: Sequence[str]) -> int:
    """Run the suite from the command line; return the exit code."""
    if len(arguments) != 2:
        sys.stderr.write("usage: python -m k2.feeds.conformance NAME FOLDER\n")
        return 64
    name, folder = arguments
    try:
        violations = check(get(name), Path(folder))
    except K2Error as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    for violation in violations:
        sys.stdout.write(f"{violation}\n")
    sys.stdout.write(f"{name}: {len(violations)} violations in {len(cases(Path(folder)))} cases\n")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
