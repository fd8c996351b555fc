"""The fast way through normalising: a run of frames at once, as columns, while nothing about it is unusual.

What is usual: every value is valid, every trade id follows the one before, no quote can be a repeat. Such a run is
turned into rows without looking at each one. Everything else raises `Unusual` before anything has changed, and the
frames are normalised one by one (`normalise.py`), which decides; so both ways give the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, compress
from typing import overload

import numpy as np
import pyarrow as pa

from k2 import schema
from k2.feeds.columns import QuoteColumns, TradeColumns
from k2.feeds.spans import Ints, Names, Unusual, Words
from k2.feeds.times import LATEST_NS
from k2.log.damage import Damage
from k2.model import ANSWER, FRAME, OPENED, LogBatch
from k2.run.accounting import MAX_LEDGERS, IdLedger, Keys, RepeatWindow

# What a valid trade is; `normalise.py` says what it is not.
EARLIEST_NS = 1_230_768_000 * 10**9  # 2009-01-01: before the first block of bitcoin
# Digits before the point, so that the sums of a day's candle fit their columns.
PRICE_DIGITS, AMOUNT_DIGITS, PRODUCT_DIGITS = 14, 17, 17
MOST_COVERED = 10**9

RUN_FRAMES = 10_000  # most frames taken together
FEW_FRAMES = 256  # below, columns cost more than they save
PIECE_FRAMES = 500  # what is unusual is looked for in pieces of so many, so that one bad frame slows few others


class Run:
    """The frames of consecutive batches of one partition; connection events are left out."""

    def __init__(self, batches: Sequence[LogBatch]) -> None:
        frames = list(chain.from_iterable(batch.frames for batch in batches))
        kinds = [frame.kind for frame in frames]
        self.offsets = np.concatenate(
            [np.arange(batch.base_offset, batch.end_offset, dtype=np.int64) for batch in batches]
        )
        self.logged = np.repeat([batch.logged_ns for batch in batches], [len(batch.frames) for batch in batches])
        self.last_opened = -1
        self.partition = batches[0].partition
        self.frames = frames
        if kinds.count(FRAME) < len(kinds):
            self._leave_out_events(kinds)

    def _leave_out_events(self, kinds: Sequence[str]) -> None:
        if ANSWER in kinds:
            raise Unusual
        opened = [position for position, kind in enumerate(kinds) if kind == OPENED]
        self.last_opened = int(self.offsets[opened[-1]]) if opened else -1
        kept = [kind == FRAME for kind in kinds]
        self.offsets, self.logged = self.offsets[kept], self.logged[kept]
        self.frames = list(compress(self.frames, kept))

    @cached_property
    def data(self) -> list[bytes]:
        """The bytes of the frames."""
        return [frame.data for frame in self.frames]

    @cached_property
    def received(self) -> Ints:
        """When the frames were received."""
        return np.array([frame.received_ns for frame in self.frames], dtype=np.int64)

    @cached_property
    def sources(self) -> list[str]:
        """How the frames came to K2."""
        return [frame.source for frame in self.frames]

    def sources_at(self, positions: Ints) -> pa.Array:
        """Return how the frames at these positions came to K2."""
        if self.sources.count(self.sources[0]) == len(self.sources):
            return pa.repeat(self.sources[0], len(positions))
        return pa.array(self.sources, pa.string()).take(pa.array(positions))

    def origins(self, positions: Ints) -> list[tuple[str, int]]:
        """Return the connection and epoch of the frames at these positions."""
        connections, epochs = [frame.connection for frame in self.frames], [frame.epoch for frame in self.frames]
        if connections.count(connections[0]) == len(connections) and epochs.count(epochs[0]) == len(epochs):
            return [(connections[0], epochs[0])] * len(positions)
        known: dict[tuple[str, int], tuple[str, int]] = {}
        pairs = [(connections[position], epochs[position]) for position in positions.tolist()]
        return [known.setdefault(pair, pair) for pair in pairs]


@overload
def runs(found: Iterable[LogBatch], most: int = ...) -> Iterator[list[LogBatch]]: ...
@overload
def runs(found: Iterable[LogBatch | Damage], most: int = ...) -> Iterator[list[LogBatch] | Damage]: ...
def runs(found: Iterable[LogBatch | Damage], most: int = RUN_FRAMES) -> Iterator[list[LogBatch] | Damage]:
    """Cut what was read into runs of at most `most` frames; damage stands alone between them."""
    run: list[LogBatch] = []
    room = most
    for stretch in found:
        if isinstance(stretch, Damage):
            if run:
                yield run
            yield stretch
            run, room = [], most
            continue
        for piece in _pieces(stretch, room, most):
            run.append(piece)
            room -= len(piece.frames)
            if room <= 0:
                yield run
                run, room = [], most
    if run:
        yield run


def _pieces(batch: LogBatch, room: int, most: int) -> Iterator[LogBatch]:
    """Cut a batch so that its first piece fits `room`, and the others `most`."""
    if len(batch.frames) <= room:
        yield batch
        return
    start, end = 0, room
    while start < len(batch.frames):
        yield LogBatch(batch.partition, batch.base_offset + start, batch.logged_ns, batch.frames[start:end])
        start, end = end, end + most


@dataclass
class Step:
    """How one id ledger goes on: `count` more ids, up to `last_id`."""

    key: tuple[str, str]
    last_id: int
    count: int
    last_offset: int
    newest_ns: int

    def take(self, ledgers: dict[tuple[str, str], IdLedger]) -> None:
        """Change the ledger, or begin it."""
        ledger = ledgers.get(self.key)
        if ledger is None:
            ledger = ledgers[self.key] = IdLedger([self.last_id - self.count + 1], [self.last_id])
        ledger.lasts[-1] = self.last_id
        ledger.trades += self.count
        ledger.last_offset = self.last_offset
        ledger.newest_ns = max(ledger.newest_ns, self.newest_ns)


def trade_table(exchange: str, run: Run, groups: Sequence[TradeColumns]) -> pa.Table:
    """Return the rows of valid trades; raises Unusual, or Arrow's error for a number, when one is not."""
    return _in_order(schema.TRADES, [_trades(exchange, run, group) for group in groups])


def quote_table(exchange: str, run: Run, groups: Sequence[QuoteColumns]) -> pa.Table:
    """Return the rows of valid quotes, as `trade_table`."""
    return _in_order(schema.QUOTES, [_quotes(exchange, run, group) for group in groups])


def ledger_steps(run: Run, groups: Sequence[TradeColumns], ledgers: Mapping[tuple[str, str], IdLedger]) -> list[Step]:
    """Return how the ledgers go on when every trade's id follows the one before; raises Unusual when one does not."""
    steps = [step for group in groups for step in _steps(run, group, ledgers)]
    if len({step.key for step in steps}) < len(steps):
        raise Unusual
    if len(ledgers) + sum(step.key not in ledgers for step in steps) > MAX_LEDGERS:
        raise Unusual
    return steps


class Sightings:
    """The records of a run that have no ledger, about to be noted in a repeat window.

    The window tells that none of them can be a repeat, or this raises Unusual.
    """

    def __init__(self, run: Run, group: QuoteColumns | TradeColumns, window: RepeatWindow) -> None:
        if not window.has_room(len(group.frames)):
            raise Unusual
        self._window = window
        self._offsets = run.offsets[group.frames]
        self._symbols = group.symbols
        self._lasts: dict[str, int] = {}
        self._origins: list[tuple[str, int]] = []
        if isinstance(group, TradeColumns):
            group.check_twins()
            self._check_rising(group.times, window.are_new_trades, group.frames)
            texts = (group.prices.spans.packed(), group.amounts.spans.packed())
            self._columns: Keys = (group.symbols, group.times, *texts, group.sides)
        elif group.update_ids is not None:
            if int(group.update_ids.min()) <= 0:
                raise Unusual
            self._check_rising(group.update_ids, window.are_new_updates)
            self._columns = (group.symbols, group.update_ids)
        else:
            self._origins = run.origins(group.frames)
            self._check_origins()
            times = np.zeros(len(group.frames), dtype=np.int64) if group.times is None else group.times
            numbers = (group.bid_prices, group.bid_amounts, group.ask_prices, group.ask_amounts)
            self._columns = (group.symbols, times, *(number.spans.packed() for number in numbers))
        self._is_trades = isinstance(group, TradeColumns)

    def note(self) -> None:
        """Note them."""
        if self._is_trades:
            self._window.take_trades(self._offsets, self._columns, self._lasts)
        elif self._origins:
            self._window.take_quotes(self._offsets, self._columns, self._origins)
        else:
            self._window.take_updates(self._offsets, self._columns, self._lasts)

    def _check_rising(
        self, values: Ints, are_new: Callable[[Mapping[str, int]], bool], frames: Ints | None = None
    ) -> None:
        """Check that values rise from one record of a symbol to the next, or stand still within one of `frames`."""
        order, starts = _by_symbol(self._symbols)
        values = values[order]
        steps = np.diff(values)
        falls = steps <= 0 if frames is None else (steps < 0) | ((steps == 0) & (np.diff(frames[order]) != 0))
        falls[starts[1:] - 1] = False
        if falls.any():
            raise Unusual
        distinct = self._symbols.distinct
        symbols = [distinct[code] for code in self._symbols.codes[order[starts]].tolist()]
        if not are_new(dict(zip(symbols, values[starts].tolist(), strict=True))):
            raise Unusual
        ends = np.append(starts[1:], len(values)) - 1
        self._lasts = dict(zip(symbols, values[ends].tolist(), strict=True))

    def _check_origins(self) -> None:
        shown = set(zip(self._symbols, self._origins, strict=True))
        first = int(self._offsets[0])
        if len({symbol for symbol, _ in shown}) < len(shown):
            raise Unusual
        if not all(self._window.is_sole_origin(symbol, origin, first) for symbol, origin in shown):
            raise Unusual


def _trades(exchange: str, run: Run, group: TradeColumns) -> dict[str, pa.Array]:
    count = len(group.frames)
    _check_trades(group)
    ids = pa.array(group.ids)
    return {
        "exchange": pa.repeat(exchange, count),
        "symbol": group.symbols.arrow(),
        "trade_id": ids,
        "kind": pa.repeat(group.kind, count),
        "first_id": ids if group.first_ids is None else pa.array(group.first_ids),
        "last_id": ids if group.last_ids is None else pa.array(group.last_ids),
        "price": group.prices.arrow(),
        "amount": group.amounts.arrow(),
        "side": group.sides.arrow(),
        "off_market": pa.repeat(False, count) if group.off_market is None else pa.array(group.off_market),
        "occurrence": _zeros(count),
        "exchange_ns": pa.array(group.times),
        **_lineage(run, group),
    }


def _quotes(exchange: str, run: Run, group: QuoteColumns) -> dict[str, pa.Array]:
    count = len(group.frames)
    return {
        "exchange": pa.repeat(exchange, count),
        "symbol": group.symbols.arrow(),
        "bid_price": group.bid_prices.arrow(),
        "bid_amount": group.bid_amounts.arrow(),
        "ask_price": group.ask_prices.arrow(),
        "ask_amount": group.ask_amounts.arrow(),
        "update_id": _zeros(count) if group.update_ids is None else pa.array(group.update_ids),
        "exchange_ns": _zeros(count) if group.times is None else pa.array(group.times),
        **_lineage(run, group),
    }


def _lineage(run: Run, group: TradeColumns | QuoteColumns) -> dict[str, pa.Array]:
    return {
        "received_ns": pa.array(run.received[group.frames]),
        "source": run.sources_at(group.frames),
        "log_partition": pa.repeat(run.partition, len(group.frames)),
        "log_offset": pa.array(run.offsets[group.frames]),
        "row_in_frame": _zeros(len(group.frames)) if group.places is None else pa.array(group.places),
        "logged_ns": pa.array(run.logged[group.frames]),
    }


def _zeros(count: int) -> pa.Array:
    return pa.array(np.zeros(count, dtype=np.int64))


def _in_order(table: schema.Table, groups: Sequence[dict[str, pa.Array]]) -> pa.Table:
    """Return the groups' rows as one table, by offset and row; those of one group are in this order."""
    arrow_schema = schema.arrow_schema(table)
    if not groups:
        return arrow_schema.empty_table()
    tables = [
        pa.Table.from_arrays([group[name] for name in arrow_schema.names], schema=arrow_schema) for group in groups
    ]
    if len(tables) == 1:
        return tables[0]
    rows = pa.concat_tables(tables, promote_options="none")
    offsets, numbers = (rows.column(name).to_numpy() for name in ("log_offset", "row_in_frame"))
    return rows.take(pa.array(np.argsort(offsets * schema.FRAME_ROWS + numbers, kind="stable")))


def _check_trades(group: TradeColumns) -> None:
    if int(group.times.min()) < EARLIEST_NS or int(group.times.max()) >= LATEST_NS:
        raise Unusual
    zero = ~(group.prices.units.any(axis=1) & group.amounts.units.any(axis=1))
    if group.off_market is not None:  # outside the market an exchange may report a price or amount of zero
        zero &= ~group.off_market
    if zero.any():
        raise Unusual
    if group.first_ids is not None and group.last_ids is not None:
        covered = group.last_ids - group.first_ids
        if int(covered.min()) < 0 or int(covered.max()) >= MOST_COVERED:
            raise Unusual
    _check_digits(group.prices.whole, group.amounts.whole)


def _check_digits(prices: Words, amounts: Words) -> None:
    """Raise Unusual where `normalise.py` might find a number too large: it looks at each pair, this at the largest."""
    price_digits, amount_digits = len(str(int(prices.max()))), len(str(int(amounts.max())))
    if price_digits > PRICE_DIGITS or amount_digits > AMOUNT_DIGITS:
        raise Unusual
    if price_digits + amount_digits <= PRODUCT_DIGITS:
        return
    digits = [np.searchsorted(_TENS, whole, side="right") for whole in (prices, amounts)]
    if (np.maximum(digits[0], 1) + np.maximum(digits[1], 1) > PRODUCT_DIGITS).any():
        raise Unusual


def _steps(run: Run, group: TradeColumns, ledgers: Mapping[tuple[str, str], IdLedger]) -> Iterator[Step]:
    offsets = run.offsets[group.frames]
    order, starts = _by_symbol(group.symbols, () if group.places is None else (group.ids, offsets))
    ids = group.ids[order]
    falls = np.diff(ids) != 1
    falls[starts[1:] - 1] = False
    if falls.any():
        raise Unusual
    counts = np.diff(np.append(starts, len(ids)))
    newest, last_offsets = np.maximum.reduceat(group.times[order], starts), np.maximum.reduceat(offsets[order], starts)
    codes = group.symbols.codes[order[starts]]
    for code, first, count, newest_ns, last_offset in zip(
        codes.tolist(), ids[starts].tolist(), counts.tolist(), newest.tolist(), last_offsets.tolist(), strict=True
    ):
        key = (group.symbols.distinct[code], group.kind)
        ledger = ledgers.get(key)
        if ledger is not None and (not ledger.lasts or first != ledger.lasts[-1] + 1):
            raise Unusual
        yield Step(key, first + count - 1, count, last_offset, newest_ns)


def _by_symbol(symbols: Names, within: tuple[Ints, ...] = ()) -> tuple[Ints, Ints]:
    """Return the order by symbol (and `within`, least important first, else as given), and where each symbol starts."""
    if len(symbols.distinct) == 1:
        return np.lexsort(within) if within else np.arange(len(symbols)), np.zeros(1, dtype=np.int64)
    order = np.lexsort((*within, symbols.codes))
    return order, np.append(0, np.flatnonzero(np.diff(symbols.codes[order])) + 1)


_TENS: Words = np.array([10**power for power in range(19)], dtype=np.uint64)
