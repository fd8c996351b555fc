"""What holds for every frame whatever it is, as plain functions that a test, a fuzzer or a loop may call."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable
from decimal import Decimal

import pyarrow as pa

from k2 import schema
from k2.errors import BadFrame
from k2.feeds.base import Exchange
from k2.model import AGGREGATE, BUY, SELL, TRADE, Frame, LogBatch, Parsed
from k2.run.normalise import Normaliser, PartitionState, Row, to_arrow
from k2.symbols import is_canonical

MOST_SECONDS_PER_MEGABYTE = 2.0
LONGEST_MESSAGE = 2_000
LONGEST_NUMBER = 130  # they are kept, to tell repeats by them, before they are judged
_LOGGED_NS = 1_723_161_700_000_000_000


def parse(exchange: Exchange, frame: Frame) -> Parsed | None:
    """Parse a frame: rows that make sense, or None for BadFrame with a short message, in bounded time."""
    started = time.thread_time()
    try:
        parsed: Parsed | None = exchange.parse(frame)
    except BadFrame as error:
        parsed = None
        check_message(str(error))
    exchange.control(frame.data)
    seconds = time.thread_time() - started
    allowed = MOST_SECONDS_PER_MEGABYTE * max(1.0, len(frame.data) / 2**20)
    assert seconds < allowed, f"{seconds:.1f} s for {len(frame.data)} bytes"
    if parsed is not None:
        check_parsed(parsed)
    return parsed


def check_message(message: str) -> None:
    """What goes to a table and a terminal is short, and can be encoded: no lone surrogates."""
    assert len(message) <= LONGEST_MESSAGE, f"a message of {len(message)} characters"
    message.encode()


def check_parsed(parsed: Parsed) -> None:
    """Whatever a parser returns fits the model: canonical symbols, numbers as text, ids and times in range."""
    for trade in parsed.trades:
        assert is_canonical(trade.symbol), trade
        assert trade.kind in (TRADE, AGGREGATE), trade
        assert trade.side in (BUY, SELL), trade
        assert all(0 <= number < 2**63 for number in (trade.trade_id, trade.first_id, trade.last_id)), trade
        assert 0 < trade.exchange_ns < 2**63, trade
        assert 0 <= trade.occurrence < 2**31, trade
        check_numbers(trade.price, trade.amount)
    for quote in parsed.quotes:
        assert is_canonical(quote.symbol), quote
        assert 0 <= quote.update_id < 2**63, quote
        assert 0 <= quote.exchange_ns < 2**63, quote
        check_numbers(quote.bid_price, quote.bid_amount, quote.ask_price, quote.ask_amount)


def check_numbers(*texts: str) -> None:
    """Each is the ASCII text of a decimal number."""
    for text in texts:
        assert len(text) <= LONGEST_NUMBER, f"a number of {len(text)} characters"
        assert text.isascii(), text
        assert Decimal(text).is_finite(), text


def normalise(exchange: Exchange, frames: Iterable[Frame]) -> dict[str, list[Row]]:
    """Normalise frames: nothing is raised, no parser fails by accident, and every number is exactly the exchange's."""
    sent = list(frames)
    rows: dict[str, list[Row]] = defaultdict(list)
    Normaliser(exchange, {}, PartitionState()).normalise(LogBatch(exchange.name, 0, _LOGGED_NS, sent), rows)
    failed = [row for row in rows["dead_letters"] if row[1] == "parser_failed"]
    assert not failed, failed[0][2]
    for table, found in rows.items():
        to_arrow(table, found)
    columns = schema.TRADES.column_names
    said: dict[int, Parsed] = {}
    for row in rows["trades"]:
        told = dict(zip(columns, row, strict=True))
        offset = told["log_offset"]
        trade = _once(said, offset, exchange, sent).trades[told["row_in_frame"]]
        assert (Decimal(told["price"]), Decimal(told["amount"])) == (Decimal(trade.price), Decimal(trade.amount))
    return rows


def _once(said: dict[int, Parsed], offset: int, exchange: Exchange, sent: list[Frame]) -> Parsed:
    if offset not in said:
        said[offset] = exchange.parse(sent[offset])
    return said[offset]


def normalise_as_a_run(exchange: Exchange, frames: Iterable[Frame]) -> bool:
    """Take frames as columns too: given up, or the same rows and ids as one by one, without a dead letter."""
    batch = LogBatch(exchange.name, 0, _LOGGED_NS, list(frames))
    single, columns = (Normaliser(exchange, {}, PartitionState()) for _ in range(2))
    rows: dict[str, list[Row]] = defaultdict(list)
    found = columns.normalise_run([batch])
    if found is None:
        assert not columns.ledgers, "something was changed by a run that was given up"
        return False
    single.normalise(batch, rows)
    assert not rows["dead_letters"], rows["dead_letters"][0][2]
    assert not rows["gaps"]
    for name in ("trades", "quotes"):
        key = [("log_offset", "ascending"), ("row_in_frame", "ascending")]
        expected = to_arrow(name, rows[name]).sort_by(key)
        assert found[name].cast(expected.schema).sort_by(key).equals(expected), name
    assert {key: (ledger.firsts, ledger.lasts) for key, ledger in columns.ledgers.items()} == {
        key: (ledger.firsts, ledger.lasts) for key, ledger in single.ledgers.items()
    }
    return True


def tables(rows: dict[str, list[Row]]) -> dict[str, pa.Table]:
    """Return rows as they are written to hot and cold."""
    return {name: to_arrow(name, found) for name, found in rows.items() if found}
