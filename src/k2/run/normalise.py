"""Turn log batches of one partition into exact, deduplicated rows.

Deterministic: the same frames after the same state give the same rows, which is what lets a
flush be made again after a crash. Values that change with time (clock, random) have no place here.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

import msgspec
import pyarrow as pa

from k2 import meters, schema
from k2.errors import BadFrame, UnknownName
from k2.feeds.base import Exchange
from k2.feeds.columns import Columns, ParsesMany, QuoteColumns, TradeColumns
from k2.feeds.spans import Unusual
from k2.feeds.times import LATEST_NS
from k2.log.damage import Damage
from k2.model import ANSWER, BUY, FRAME, LIVE, OPENED, SELL, Frame, LogBatch, Parsed, Quote, Trade
from k2.run.accounting import MAX_LEDGERS, Finding, IdLedger, RepeatWindow, join_findings
from k2.run.columnar import (
    AMOUNT_DIGITS,
    EARLIEST_NS,
    MOST_COVERED,
    PRICE_DIGITS,
    PRODUCT_DIGITS,
    Run,
    Sightings,
    ledger_steps,
    quote_table,
    runs,
    trade_table,
)

REPEAT_WINDOW = 65_536
"""Offsets within which repeats without an id are found; as many are read again at a start."""

DETAIL_CHARACTERS = 2_000  # of the text of a dead letter

_LATE_NS = 10**9  # some streams give the same trade's time in ms, others in µs

# Up to 26 digits before and 12 behind the point fit decimal(38,12).
_PLAIN = re.compile(r"[0-9]{1,26}(?:\.[0-9]{1,12})?").fullmatch
_FITTING = Decimal(10) ** 26
_NUMBER = re.compile(r"[+-]?[0-9]{0,60}(?:\.[0-9]{0,60})?(?:[eE][+-]?[0-9]{1,6})?").fullmatch

logger = logging.getLogger(__name__)

Row = tuple[Any, ...]
"""One row, in the column order of its table, decimals as plain text."""


class PartitionState(msgspec.Struct):
    """What normalising a partition carries from one frame to the next, beside the id ledgers."""

    last_opened: int = -1  # offset of the newest OPENED record


class BadValue(Exception):
    """Raised when one row of a frame fails validation; carries the dead letter's reason and detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


class Normaliser:
    """Normalises one partition; `ledgers` and `state` are its memory, changed in place.

    `touched` collects the ledger keys changed since it was last cleared.
    """

    def __init__(self, exchange: Exchange, ledgers: dict[tuple[str, str], IdLedger], state: PartitionState) -> None:
        self.exchange = exchange
        self.ledgers = ledgers
        self.state = state
        self.touched: set[tuple[str, str]] = set()
        self.repeats: Counter[str] = Counter()
        self._window = RepeatWindow(REPEAT_WINDOW)
        self._kept_frame = -1  # offset of the newest frame a dead letter holds the bytes of

    @property
    def sizes(self) -> dict[str, int]:
        """How much it remembers: `ledgers` and `sightings`."""
        return {"ledgers": len(self.ledgers), "sightings": len(self._window)}

    def warm(self, batches: Sequence[LogBatch]) -> None:
        """Fill the repeat window from the frames of consecutive batches, before the first one to be normalised."""
        for run in runs(batches):
            if not self._warm_run(run):
                for batch in run:
                    self._warm_batch(batch)

    def _warm_batch(self, batch: LogBatch) -> None:
        for index, frame in enumerate(batch.frames):
            if frame.kind in (FRAME, ANSWER):
                self._warm_frame(frame, batch.base_offset + index)

    def _warm_run(self, batches: Sequence[LogBatch]) -> bool:
        try:
            *_, sightings = self._read_run(batches)
        except Exception:  # noqa: BLE001 - whatever it is, the frames are read one by one
            return False
        for sighting in sightings:
            sighting.note()
        return True

    def normalise_run(self, batches: Sequence[LogBatch]) -> dict[str, pa.Table] | None:
        """Return the rows of consecutive batches as tables; None, and nothing has changed, if they are not as usual.

        The rows, and what is remembered, are those of `normalise`.
        """
        try:
            run, columns, numbered, sightings = self._read_run(batches)
            steps = ledger_steps(run, numbered, self.ledgers)
            tables = {
                schema.TRADES.name: trade_table(self.exchange.name, run, columns.trades),
                schema.QUOTES.name: quote_table(self.exchange.name, run, columns.quotes),
            }
        except Exception:  # noqa: BLE001 - whatever it is, the frames are judged one by one
            return None
        for sighting in sightings:
            sighting.note()
        for step in steps:
            step.take(self.ledgers)
            self.touched.add(step.key)
        self.state.last_opened = max(self.state.last_opened, run.last_opened)
        return tables

    def _read_run(self, batches: Sequence[LogBatch]) -> tuple[Run, Columns, list[TradeColumns], list[Sightings]]:
        """Parse a run of frames and tell that nothing without a ledger can be a repeat; raises when it is not as usual.

        Returns the frames, what is in them, the trades of it that have ledgers, and what the repeat window follows.
        """
        if not isinstance(self.exchange, ParsesMany):
            raise Unusual
        run = Run(batches)
        columns = self.exchange.parse_many(run.data)
        numbered: list[TradeColumns] = []
        followed: list[TradeColumns | QuoteColumns] = [*columns.quotes]
        for group in columns.trades:
            (numbered if self._have_ledgers(group) else followed).append(group)
        if len(followed) > 1:  # the window takes sightings by offset
            raise Unusual
        return run, columns, numbered, [Sightings(run, group, self._window) for group in followed]

    def _have_ledgers(self, group: TradeColumns) -> bool:
        """Whether all of these trades have a ledger; False when none has."""
        if self.exchange.contiguous_ids and int(group.ids.min()) > 0:
            return True
        if group.ids.any():
            raise Unusual
        return False

    def _warm_frame(self, frame: Frame, offset: int) -> None:
        try:
            parsed = self.exchange.parse(frame)
        except Exception:  # noqa: BLE001 - it became a dead letter when it was normalised
            return
        self._sight(parsed, frame, offset)

    def _sight(self, parsed: Parsed, frame: Frame, offset: int) -> tuple[list[bool], list[bool]]:
        """Note what a frame says, valid or not, and tell which of its trades and quotes repeat by that.

        Records with an id of their own are the same whoever sends them. Quotes without one repeat when
        another connection has said the same: one connection's own equal quotes are all kept.
        """
        origin = (frame.connection, frame.epoch)
        return (
            [not self._has_ledger(trade) and self._window.is_repeated_trade(trade, offset) for trade in parsed.trades],
            [self._window.is_repeated_quote(quote, offset, origin) for quote in parsed.quotes],
        )

    def damaged(self, damage: Damage) -> Row:
        """Return the dead letter that stands for records the log cannot give back."""
        return (
            self.exchange.name, damage.reason, f"{damage.detail} (offsets up to {damage.end_offset - 1})", b"",
            damage.logged_ns, LIVE, damage.partition, damage.base_offset, 0, damage.logged_ns,
        )  # fmt: skip

    def normalise(self, batch: LogBatch, rows: dict[str, list[Row]]) -> None:
        """Append the rows of one batch to `rows[table]`."""
        for index, frame in enumerate(batch.frames):
            offset = batch.base_offset + index
            if frame.kind in (FRAME, ANSWER):
                self._frame(frame, offset, batch, rows)
            elif frame.kind == OPENED:
                self.state.last_opened = offset

    def _frame(self, frame: Frame, offset: int, batch: LogBatch, rows: dict[str, list[Row]]) -> None:
        try:
            parsed = self.exchange.parse(frame)
        except (BadFrame, UnknownName) as error:
            rows["dead_letters"].append(self._dead(frame, offset, 0, batch, "bad_frame", str(error)))
            return
        except Exception as error:
            logger.exception("parse offset %d of %s", offset, batch.partition)
            detail = f"{type(error).__name__}: {error}"
            rows["dead_letters"].append(self._dead(frame, offset, 0, batch, "parser_failed", detail))
            return
        trade_repeats, quote_repeats = self._sight(parsed, frame, offset)
        if parsed.trades:
            self._trades(parsed.trades, trade_repeats, frame, offset, batch, rows)
        if parsed.quotes:
            self._quotes(parsed.quotes, quote_repeats, frame, offset, batch, rows)

    def _trades(
        self,
        trades: list[Trade],
        repeats: list[bool],
        frame: Frame,
        offset: int,
        batch: LogBatch,
        rows: dict[str, list[Row]],
    ) -> None:
        exchange, partition, logged = self.exchange.name, batch.partition, batch.logged_ns
        out = rows["trades"]
        numbered: Iterable[tuple[int, Trade]] = enumerate(trades)
        if len(trades) > 1:  # some exchanges send the newest first: ids are accounted in their own order
            numbered = sorted(numbered, key=lambda pair: (pair[1].trade_id, pair[0]))
        findings: dict[tuple[str, str, str], list[Finding]] = {}
        for index, trade in numbered:
            try:
                # Outside the market an exchange may report a price or amount of zero.
                price = decimal_text(trade.price, "price", positive=not trade.off_market)
                amount = decimal_text(trade.amount, "amount", positive=not trade.off_market)
                _check_trade(trade, price, amount)
                if repeats[index] or (
                    self._has_ledger(trade) and not self._account(trade, offset, frame.source, findings)
                ):
                    self.repeats["trades"] += 1
                    continue
            except BadValue as bad:
                rows["dead_letters"].append(self._dead(frame, offset, index, batch, bad.reason, bad.detail))
                continue
            out.append(
                (
                    exchange, trade.symbol, trade.trade_id, trade.kind, trade.first_id, trade.last_id, price, amount,
                    trade.side, trade.off_market, trade.occurrence, trade.exchange_ns, frame.received_ns,
                    frame.source, partition, offset, index, logged,
                )
            )  # fmt: skip
        number = 0
        for (symbol, kind, cause), found in findings.items():
            for finding in join_findings(found):
                rows["gaps"].append(
                    (
                        exchange, symbol, kind, finding.status, finding.first_id, finding.last_id,
                        finding.last_id - finding.first_id + 1, cause, frame.received_ns,
                        partition, offset, number, logged,
                    )
                )  # fmt: skip
                number += 1

    def _account(
        self, trade: Trade, offset: int, source: str, findings: dict[tuple[str, str, str], list[Finding]]
    ) -> bool:
        """Enter a trade into its ledger; whether it is new. Raises BadValue when its id is used anew."""
        key = (trade.symbol, trade.kind)
        ledger = self.ledgers.get(key)
        if ledger is None:
            if len(self.ledgers) >= MAX_LEDGERS:
                meters.acted("ingest.ledgers")
                raise BadValue("too_many_symbols", f"{trade.symbol} would be more than {MAX_LEDGERS} symbols and kinds")
            ledger = self.ledgers[key] = IdLedger([], [])
        self.touched.add(key)
        changes = ledger.add(trade.trade_id)
        if changes is None:
            if trade.exchange_ns > ledger.newest_ns + _LATE_NS:
                raise BadValue(
                    "id_reused",
                    f"trade {trade.trade_id} of {trade.symbol} was there before, but this one happened at "
                    f"{trade.exchange_ns}, after everything seen: did the exchange start its ids again?",
                )
            return False
        if changes:
            findings.setdefault((*key, self._cause(ledger, source)), []).extend(changes)
        ledger.last_offset = offset
        ledger.newest_ns = max(ledger.newest_ns, trade.exchange_ns)
        return True

    def recall(self, trades: pa.Table) -> None:
        """Enter rows, in order of the log, into the ledgers: trades whose frames cannot be read any more."""
        if not self.exchange.contiguous_ids:
            return
        names = ("symbol", "kind", "trade_id", "log_offset", "exchange_ns")
        for symbol, kind, trade_id, offset, exchange_ns in zip(*(trades[n].to_pylist() for n in names), strict=True):
            if trade_id > 0:
                ledger = self.ledgers.setdefault((symbol, kind), IdLedger([], []))
                ledger.add(trade_id)
                ledger.last_offset = offset
                ledger.newest_ns = max(ledger.newest_ns, exchange_ns)
                self.touched.add((symbol, kind))

    def _has_ledger(self, trade: Trade) -> bool:
        """Only ids that count up by one tell repeats from news for ever; the others are followed for a while."""
        return trade.trade_id > 0 and self.exchange.contiguous_ids

    def _cause(self, ledger: IdLedger, source: str) -> str:
        if source != LIVE:
            return source
        return "reconnect" if self.state.last_opened > ledger.last_offset else "skipped"

    def _quotes(
        self,
        quotes: list[Quote],
        repeats: list[bool],
        frame: Frame,
        offset: int,
        batch: LogBatch,
        rows: dict[str, list[Row]],
    ) -> None:
        for index, quote in enumerate(quotes):
            try:
                bid_price = decimal_text(quote.bid_price, "bid_price")
                bid_amount = decimal_text(quote.bid_amount, "bid_amount")
                ask_price = decimal_text(quote.ask_price, "ask_price")
                ask_amount = decimal_text(quote.ask_amount, "ask_amount")
            except BadValue as bad:
                rows["dead_letters"].append(self._dead(frame, offset, index, batch, bad.reason, bad.detail))
                continue
            if repeats[index]:
                self.repeats["quotes"] += 1
                continue
            rows["quotes"].append(
                (
                    self.exchange.name, quote.symbol, bid_price, bid_amount, ask_price, ask_amount, quote.update_id,
                    quote.exchange_ns, frame.received_ns, frame.source, batch.partition, offset, index,
                    batch.logged_ns,
                )
            )  # fmt: skip

    def _dead(self, frame: Frame, offset: int, row: int, batch: LogBatch, reason: str, detail: str) -> Row:
        """Return a dead letter; of several of one frame the first has the bytes, which may be megabytes."""
        data, self._kept_frame = (b"" if offset == self._kept_frame else frame.data), offset
        return (
            self.exchange.name, reason, detail[:DETAIL_CHARACTERS], data, frame.received_ns, frame.source,
            batch.partition, offset, row, batch.logged_ns,
        )  # fmt: skip


def _check_trade(trade: Trade, price: str, amount: str) -> None:
    if trade.side != BUY and trade.side != SELL:
        raise BadValue("bad_side", f"side {trade.side!r} is neither buy nor sell")
    if not EARLIEST_NS <= trade.exchange_ns < LATEST_NS:
        raise BadValue("bad_time", f"exchange_ns {trade.exchange_ns} lies outside the years 2009 to 2099")
    if not 0 <= trade.last_id - trade.first_id < MOST_COVERED:
        raise BadValue("bad_frame", f"ids {trade.first_id} to {trade.last_id} cannot be those of one aggregate")
    price_digits, amount_digits = _whole_digits(price), _whole_digits(amount)
    if price_digits > PRICE_DIGITS:
        raise BadValue("bad_price", f"price {price} is not below 10^{PRICE_DIGITS}")
    if amount_digits > AMOUNT_DIGITS or price_digits + amount_digits > PRODUCT_DIGITS:
        raise BadValue("bad_amount", f"amount {amount} at price {price} is more than can be summed in a candle")


def _whole_digits(text: str) -> int:
    """Return how many digits a plain number has before its point, leading zeros apart; at least 1."""
    return len(text.partition(".")[0].lstrip("0")) or 1


def decimal_text(text: str, what: str, *, positive: bool = False) -> str:
    """Return a non-negative decimal as plain digits that fit decimal(38,12), unchanged where it already is.

    Raises BadValue naming `what`: not a number, negative (or zero, with `positive`), too large,
    or more than 12 digits behind the point.
    """
    if _PLAIN(text) is None:
        text = _unusual_decimal(text, what)
    if positive and not text.strip("0."):
        raise BadValue(f"bad_{what}", f"{what} {text!r} is not above zero")
    return text


def _unusual_decimal(text: str, what: str) -> str:
    """Handle signs, exponents and many digits, by the digits themselves (no rounding context is involved)."""
    reason = f"bad_{'price' if 'price' in what else 'amount'}"
    try:
        value = Decimal(text) if _NUMBER(text) else Decimal("NaN")
    except InvalidOperation:
        value = Decimal("NaN")
    if not value.is_finite() or value < 0 or value >= _FITTING:
        raise BadValue(reason, f"{what} {text[:100]!r} is not a number from 0 to 10^26")
    if not value:
        return "0"
    _, digits, exponent = value.as_tuple()
    while digits[-1] == 0:
        digits, exponent = digits[:-1], int(exponent) + 1
    if int(exponent) < -12:
        raise BadValue(reason, f"{what} {text[:100]!r} has more than 12 decimals")
    return f"{Decimal((0, digits, int(exponent))):f}"


def to_arrow(table: str, rows: list[Row]) -> pa.Table:
    """Return rows as an Arrow table in the table's schema; decimals are cast from their text, exactly."""
    arrow_schema = schema.arrow_schema(schema.TABLES[table])
    if not rows:
        return arrow_schema.empty_table()
    columns = list(zip(*rows, strict=True))
    arrays = [
        pa.array(column, pa.string()).cast(field.type)
        if pa.types.is_decimal(field.type)
        else pa.array(column, field.type)
        for column, field in zip(columns, arrow_schema, strict=True)
    ]
    return pa.Table.from_arrays(arrays, schema=arrow_schema)
