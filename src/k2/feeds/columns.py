"""Many frames of one exchange as columns: the fast way from frames to rows.

`Exchange.parse` reads one frame and says exactly what is wrong with it. `parse_many` reads a run of frames into
columns and gives up at the first thing that is not as usual: whoever asked then takes the frames one by one. So it
never decides about bad input, and whatever it returns is what `parse` says of the same frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from k2.feeds.times import EARLIEST_NS, LATEST_NS, from_integer, integer_scale
from k2.model import Parsed, Quote, Trade

Ints = npt.NDArray[np.int64]


LONGEST_HEAD = 128  # bytes before the first comma by which the kind of a message is guessed


class Unusual(Exception):
    """Raised when a run of frames holds something that only `parse` decides about."""


@dataclass
class TradeColumns:
    """Trades of one kind, in the order of their frames; every list has one entry a trade.

    `frames` are positions within the run that was parsed, `rows` positions within their frame (None: all 0).
    `ids` are above zero. `first_ids` and `last_ids` are None for single trades. Prices and amounts are the texts
    that were sent, whatever they are.
    """

    kind: str
    frames: list[int]
    rows: list[int] | None
    symbols: list[str]
    ids: list[int]
    prices: list[str]
    amounts: list[str]
    sides: list[str]
    times: Ints
    first_ids: list[int] | None = None
    last_ids: list[int] | None = None
    off_market: list[bool] | None = None

    def record(self, index: int) -> Trade:
        """Return one of the trades."""
        trade_id = self.ids[index]
        return Trade(
            symbol=self.symbols[index],
            trade_id=trade_id,
            price=self.prices[index],
            amount=self.amounts[index],
            side=self.sides[index],
            exchange_ns=int(self.times[index]),
            kind=self.kind,
            first_id=self.first_ids[index] if self.first_ids else trade_id,
            last_id=self.last_ids[index] if self.last_ids else trade_id,
            off_market=self.off_market[index] if self.off_market else False,
        )


@dataclass
class QuoteColumns:
    """Quotes, as `TradeColumns`. `update_ids` and `times` are None where the exchange gives none."""

    frames: list[int]
    rows: list[int] | None
    symbols: list[str]
    bid_prices: list[str]
    bid_amounts: list[str]
    ask_prices: list[str]
    ask_amounts: list[str]
    update_ids: list[int] | None
    times: Ints | None

    def record(self, index: int) -> Quote:
        """Return one of the quotes."""
        return Quote(
            symbol=self.symbols[index],
            bid_price=self.bid_prices[index],
            bid_amount=self.bid_amounts[index],
            ask_price=self.ask_prices[index],
            ask_amount=self.ask_amounts[index],
            exchange_ns=0 if self.times is None else int(self.times[index]),
            update_id=self.update_ids[index] if self.update_ids else 0,
        )


@dataclass
class Columns:
    """What a run of frames holds; frames without rows appear nowhere."""

    trades: list[TradeColumns] = field(default_factory=list)
    quotes: list[QuoteColumns] = field(default_factory=list)

    def parsed(self, frames: int) -> list[Parsed]:
        """Return the same as records, one entry for each of so many frames: what `parse` says of them."""
        found: list[tuple[dict[int, Trade], dict[int, Quote]]] = [({}, {}) for _ in range(frames)]
        for trades in self.trades:
            for index, frame in enumerate(trades.frames):
                found[frame][0][trades.rows[index] if trades.rows else 0] = trades.record(index)
        for quotes in self.quotes:
            for index, frame in enumerate(quotes.frames):
                found[frame][1][quotes.rows[index] if quotes.rows else 0] = quotes.record(index)
        return [Parsed(_by_place(trades), _by_place(quotes)) for trades, quotes in found]


@runtime_checkable
class ParsesMany(Protocol):
    """What an exchange may have beside the port, to be read faster; the conformance suite checks it against `parse`."""

    def parse_many(self, frames: Sequence[bytes]) -> Columns:
        """Read the data of FRAME records into columns, or raise anything: they are then taken one by one.

        Numbers need not be looked at: what is not plain digits is left to `parse` by whoever asked.
        """


def group_by_head(frames: Sequence[bytes], kind_of: Callable[[bytes], str | None]) -> dict[str, list[int]]:
    """Return the positions of the frames by kind, as guessed by what stands before a frame's first comma.

    The kind is empty where there is no guess.
    """
    groups: dict[str, list[int]] = {}
    for position, data in enumerate(frames):
        end = data.find(b",", 0, LONGEST_HEAD)
        kind = (kind_of(data[:end]) or "") if end > 0 else ""
        try:
            groups[kind].append(position)
        except KeyError:
            groups[kind] = [position]
    return groups


def canonical_many(natives: list[str], to_canonical: Callable[[str], str]) -> list[str]:
    """Return the canonical symbols, each distinct one looked up once."""
    known = {native: to_canonical(native) for native in set(natives)}
    return [known[native] for native in natives]


def flat(positions: list[int], counts: Iterable[int]) -> tuple[list[int], list[int]]:
    """Return frame position and place in the frame of each row, for frames with so many rows each."""
    places = [(position, row) for position, count in zip(positions, counts, strict=True) for row in range(count)]
    return [position for position, _ in places], [row for _, row in places]


def integer_times(values: list[int]) -> Ints:
    """Return nanoseconds of integer times of one unit; raises Unusual or ValueError (see `times.from_integer`)."""
    if not values:
        return np.array(values, dtype=np.int64)
    first, last = min(values), max(values)
    scale = integer_scale(first)
    if scale != integer_scale(last) or not from_integer(first) <= from_integer(last):
        raise Unusual
    return np.array(values, dtype=np.int64) * scale


def rfc3339_times(texts: list[str]) -> Ints:
    """Return nanoseconds of times in full, in UTC (`2026-08-09T21:05:42.514318Z`); raises Unusual or ValueError."""
    if texts and (min(map(len, texts)) < _SHORTEST_TIME or not all(text.endswith("Z") for text in texts)):
        raise Unusual
    times = np.asarray(pa.array(texts, pa.string()).cast(_TIME).cast(pa.int64()).to_numpy())
    if len(times) and not EARLIEST_NS <= int(times.min()) <= int(times.max()) < LATEST_NS:
        raise Unusual
    return times


Record = TypeVar("Record")


def _by_place(records: dict[int, Record]) -> list[Record]:
    return [records[place] for place in sorted(records)]


_TIME = pa.timestamp("ns", tz="UTC")
_SHORTEST_TIME = len("2026-08-09T21:05:42Z")
