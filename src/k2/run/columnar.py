"""The fast way through normalising: a run of frames at once, as columns, while nothing about it is unusual.

What is usual: every value is valid, every trade id follows the one before, no quote can be a repeat. Such a run is
turned into rows without looking at each one. Everything else raises `Unusual` before anything has changed, and the
frames are normalised one by one (`normalise.py`), which decides; so both ways give the same rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from k2 import schema
from k2.feeds.columns import Columns, Ints, QuoteColumns, TradeColumns, Unusual
from k2.feeds.times import LATEST_NS
from k2.log.damage import Damage
from k2.model import ANSWER, FRAME, OPENED, Frame, LogBatch
from k2.run.accounting import MAX_LEDGERS, IdLedger, RepeatWindow

# What a valid trade is; `normalise.py` says what it is not.
EARLIEST_NS = 1_230_768_000 * 10**9  # 2009-01-01: before the first block of bitcoin
# Digits before the point, so that the sums of a day's candle fit their columns.
PRICE_DIGITS, AMOUNT_DIGITS, PRODUCT_DIGITS = 14, 17, 17
MOST_COVERED = 10**9

RUN_FRAMES = 5_000  # most frames taken together
FEW_FRAMES = 64  # below, columns cost more than they save
PIECE_FRAMES = 500  # what is unusual is looked for in pieces of so many, so that one bad frame slows few others

Halves = npt.NDArray[np.uint64]

_DECIMAL = schema.ARROW[schema.Type.DECIMAL]
_UNIT = 10**12  # of decimal(38,12)


class Run:
    """The frames of consecutive batches of one partition; connection events are left out."""

    def __init__(self, batches: Sequence[LogBatch]) -> None:
        frames = [frame for batch in batches for frame in batch.frames]
        offsets = np.concatenate([np.arange(batch.base_offset, batch.end_offset, dtype=np.int64) for batch in batches])
        logged = np.repeat([batch.logged_ns for batch in batches], [len(batch.frames) for batch in batches])
        self.last_opened = -1
        kinds = [frame.kind for frame in frames]
        if kinds.count(FRAME) < len(kinds):
            if ANSWER in kinds:
                raise Unusual
            opened = [offset for offset, kind in zip(offsets, kinds, strict=True) if kind == OPENED]
            self.last_opened = int(opened[-1]) if opened else -1
            kept = np.array([position for position, kind in enumerate(kinds) if kind == FRAME], dtype=np.int64)
            frames, offsets, logged = [frames[position] for position in kept], offsets[kept], logged[kept]
        self.partition = batches[0].partition
        self.frames: list[Frame] = frames
        self.offsets = offsets
        self.logged = logged

    @property
    def data(self) -> list[bytes]:
        """The bytes of the frames."""
        return [frame.data for frame in self.frames]

    def received(self, positions: Ints) -> pa.Array:
        """Return when the frames at these positions were received."""
        return pa.array(np.array([frame.received_ns for frame in self.frames], dtype=np.int64)[positions])

    def sources(self, positions: Ints) -> pa.Array:
        """Return how the frames at these positions came to K2."""
        sources = [frame.source for frame in self.frames]
        if sources.count(sources[0]) == len(sources):
            return pa.repeat(sources[0], len(positions))
        return pa.array(sources, pa.string()).take(pa.array(positions))

    def origins(self, positions: Sequence[int]) -> list[tuple[str, int]]:
        """Return the connection and epoch of the frames at these positions."""
        known: dict[tuple[str, int], tuple[str, int]] = {}
        pairs = [(self.frames[position].connection, self.frames[position].epoch) for position in positions]
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


def ledger_steps(run: Run, columns: Columns, ledgers: Mapping[tuple[str, str], IdLedger]) -> list[Step]:
    """Return how the ledgers go on when every trade's id follows the one before; raises Unusual when one does not."""
    steps = [step for group in columns.trades for step in _steps(run, group, ledgers)]
    if len({step.key for step in steps}) < len(steps):
        raise Unusual
    if len(ledgers) + sum(step.key not in ledgers for step in steps) > MAX_LEDGERS:
        raise Unusual
    return steps


class Sightings:
    """The quotes of a run, about to be noted in a repeat window that tells that none of them can be a repeat."""

    def __init__(self, run: Run, group: QuoteColumns, window: RepeatWindow) -> None:
        """Raise Unusual when one might be."""
        if not window.has_room(len(group.frames)):
            raise Unusual
        self._window = window
        self._group = group
        self._offsets: list[int] = run.offsets[group.frames].tolist()
        self._lasts: dict[str, int] = {}
        self._origins: list[tuple[str, int]] = []
        if group.update_ids is not None:
            self._check_updates(group.update_ids)
        else:
            self._check_origins(run.origins(group.frames))

    def note(self) -> None:
        """Note them."""
        group = self._group
        if group.update_ids is not None:
            self._window.take_updates(self._offsets, group.symbols, group.update_ids, self._lasts)
            return
        times = [0] * len(group.frames) if group.times is None else group.times.tolist()
        texts = (group.bid_prices, group.bid_amounts, group.ask_prices, group.ask_amounts)
        self._window.take_quotes(self._offsets, (group.symbols, times, *texts), self._origins)

    def _check_updates(self, update_ids: list[int]) -> None:
        ids = np.array(update_ids, dtype=np.int64)
        order, starts = _by_symbol(self._group.symbols)
        ids = ids[order]
        if int(ids.min()) <= 0 or not _rises(ids, starts):
            raise Unusual
        symbols = [self._group.symbols[order[start]] for start in starts]
        if not self._window.are_new_updates(dict(zip(symbols, ids[starts].tolist(), strict=True))):
            raise Unusual
        ends = np.append(starts[1:], len(ids)) - 1
        self._lasts = dict(zip(symbols, ids[ends].tolist(), strict=True))

    def _check_origins(self, origins: list[tuple[str, int]]) -> None:
        shown = set(zip(self._group.symbols, origins, strict=True))
        first = self._offsets[0]
        if len({symbol for symbol, _ in shown}) < len(shown):
            raise Unusual
        if not all(self._window.is_sole_origin(symbol, origin, first) for symbol, origin in shown):
            raise Unusual
        self._origins = origins


def decimals(texts: list[str]) -> pa.Array:
    """Return the exact decimal(38,12) of plain numbers: digits, with at most one point between them.

    Raises Unusual, or Arrow's error for what does not fit.
    """
    joined = f",{','.join(texts)},".encode()
    if (
        joined.translate(None, b"0123456789.,")
        or joined.count(b",") != len(texts) + 1
        or b",." in joined
        or b".," in joined
    ):
        raise Unusual
    return pa.array(texts, pa.string()).cast(_DECIMAL)


def _trades(exchange: str, run: Run, group: TradeColumns) -> dict[str, pa.Array]:
    count = len(group.frames)
    prices, amounts = decimals(group.prices), decimals(group.amounts)
    _check_trades(group, _halves(prices), _halves(amounts))
    ids = pa.array(group.ids, pa.int64())
    firsts = ids if group.first_ids is None else pa.array(group.first_ids, pa.int64())
    lasts = ids if group.last_ids is None else pa.array(group.last_ids, pa.int64())
    return {
        "exchange": pa.repeat(exchange, count),
        "symbol": pa.array(group.symbols, pa.string()),
        "trade_id": ids,
        "kind": pa.repeat(group.kind, count),
        "first_id": firsts,
        "last_id": lasts,
        "price": prices,
        "amount": amounts,
        "side": pa.array(group.sides, pa.string()),
        "off_market": pa.array(group.off_market or np.zeros(count, dtype=bool)),
        "occurrence": pa.array(np.zeros(count, dtype=np.int64)),
        "exchange_ns": pa.array(group.times),
        **_lineage(run, group),
    }


def _quotes(exchange: str, run: Run, group: QuoteColumns) -> dict[str, pa.Array]:
    count = len(group.frames)
    zeros = np.zeros(count, dtype=np.int64)
    return {
        "exchange": pa.repeat(exchange, count),
        "symbol": pa.array(group.symbols, pa.string()),
        "bid_price": decimals(group.bid_prices),
        "bid_amount": decimals(group.bid_amounts),
        "ask_price": decimals(group.ask_prices),
        "ask_amount": decimals(group.ask_amounts),
        "update_id": pa.array(zeros if group.update_ids is None else group.update_ids, pa.int64()),
        "exchange_ns": pa.array(zeros if group.times is None else group.times),
        **_lineage(run, group),
    }


def _lineage(run: Run, group: TradeColumns | QuoteColumns) -> dict[str, pa.Array]:
    positions = np.array(group.frames, dtype=np.int64)
    rows = np.zeros(len(positions), dtype=np.int64) if group.rows is None else np.array(group.rows, dtype=np.int64)
    return {
        "received_ns": run.received(positions),
        "source": run.sources(positions),
        "log_partition": pa.repeat(run.partition, len(positions)),
        "log_offset": pa.array(run.offsets[positions]),
        "row_in_frame": pa.array(rows),
        "logged_ns": pa.array(run.logged[positions]),
    }


def _in_order(table: schema.Table, groups: Sequence[dict[str, pa.Array]]) -> pa.Table:
    """Return the groups' rows as one table, by offset and row."""
    arrow_schema = schema.arrow_schema(table)
    tables = [
        pa.Table.from_arrays([group[name] for name in arrow_schema.names], schema=arrow_schema) for group in groups
    ]
    rows = pa.concat_tables(tables, promote_options="none") if tables else arrow_schema.empty_table()
    offsets, numbers = (rows.column(name).to_numpy() for name in ("log_offset", "row_in_frame"))
    places = offsets * schema.FRAME_ROWS + numbers
    if (np.diff(places) < 0).any():
        return rows.take(pa.array(np.argsort(places, kind="stable")))
    return rows


def _check_trades(group: TradeColumns, prices: Halves, amounts: Halves) -> None:
    if int(group.times.min()) < EARLIEST_NS or int(group.times.max()) >= LATEST_NS:
        raise Unusual
    zero = ~(prices.any(axis=1) & amounts.any(axis=1))
    if group.off_market is not None:  # outside the market an exchange may report a price or amount of zero
        zero &= ~np.array(group.off_market, dtype=bool)
    if zero.any():
        raise Unusual
    if group.first_ids is not None and group.last_ids is not None:
        covered = np.array(group.last_ids, dtype=np.int64) - np.array(group.first_ids, dtype=np.int64)
        if int(covered.min()) < 0 or int(covered.max()) >= MOST_COVERED:
            raise Unusual
    _check_digits(group, prices, amounts)


def _check_digits(group: TradeColumns, prices: Halves, amounts: Halves) -> None:
    price_digits, amount_digits = _most_digits(prices), _most_digits(amounts)
    if price_digits > PRICE_DIGITS or amount_digits > AMOUNT_DIGITS:
        raise Unusual
    if price_digits + amount_digits <= PRODUCT_DIGITS:
        return
    for price, amount in zip(group.prices, group.amounts, strict=True):
        if whole_digits(price) + whole_digits(amount) > PRODUCT_DIGITS:
            raise Unusual


def whole_digits(text: str) -> int:
    """Return how many digits a plain number has before its point, leading zeros apart; at least 1."""
    return len(text.partition(".")[0].lstrip("0")) or 1


def _halves(decimal: pa.Array) -> Halves:
    """Return the low and high 64 bits of non-negative decimals: shape (n, 2)."""
    return np.frombuffer(decimal.buffers()[1], dtype=np.uint64)[: 2 * len(decimal)].reshape(-1, 2)


def _most_digits(halves: Halves) -> int:
    high = halves[:, 1].max()
    low = halves[:, 0][halves[:, 1] == high].max()
    return len(str(((int(high) << 64) | int(low)) // _UNIT))


def _steps(run: Run, group: TradeColumns, ledgers: Mapping[tuple[str, str], IdLedger]) -> Iterator[Step]:
    ids = np.array(group.ids, dtype=np.int64)
    offsets = run.offsets[group.frames]
    order, starts = _by_symbol(group.symbols, () if group.rows is None else (ids, offsets))
    ids = ids[order]
    if not _rises(ids, starts, by=1):
        raise Unusual
    counts = np.diff(np.append(starts, len(ids)))
    newest, last_offsets = np.maximum.reduceat(group.times[order], starts), np.maximum.reduceat(offsets[order], starts)
    for start, count, newest_ns, last_offset in zip(
        starts.tolist(), counts.tolist(), newest.tolist(), last_offsets.tolist(), strict=True
    ):
        key = (group.symbols[order[start]], group.kind)
        ledger = ledgers.get(key)
        first = int(ids[start])
        if ledger is not None and (not ledger.lasts or first != ledger.lasts[-1] + 1):
            raise Unusual
        yield Step(key, first + count - 1, count, last_offset, newest_ns)


def _by_symbol(symbols: list[str], within: tuple[Ints, ...] = ()) -> tuple[Ints, Ints]:
    """Return the order by symbol (and `within`, least important first, else as given), and where each symbol starts."""
    if symbols.count(symbols[0]) == len(symbols):
        return np.lexsort(within) if within else np.arange(len(symbols)), np.zeros(1, dtype=np.int64)
    codes_of = {symbol: code for code, symbol in enumerate(dict.fromkeys(symbols))}
    codes = np.array([codes_of[symbol] for symbol in symbols], dtype=np.int64)
    order = np.lexsort((*within, codes))
    return order, np.append(0, np.flatnonzero(np.diff(codes[order])) + 1)


def _rises(values: Ints, starts: Ints, by: int = 0) -> bool:
    """Whether values rise within each group that begins at `starts`; with `by`, by just so much."""
    steps = np.diff(values)
    falls = steps != by if by else steps <= 0
    falls[starts[1:] - 1] = False
    return not falls.any()
