"""Many frames of one exchange as columns: the fast way from frames to rows.

`Exchange.parse` reads one frame and says exactly what is wrong with it. `parse_many` reads a run of frames into
columns and gives up at the first thing that is not as usual: whoever asked then takes the frames one by one. So it
never decides about bad input, and whatever it returns is what `parse` says of the same frames.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np

from k2.feeds.spans import Flags, Ints, Names, Numbers, Unusual
from k2.model import Parsed, Quote, Trade


@dataclass
class TradeColumns:
    """Trades of one kind, in the order of their frames; every column has one entry a trade, there is at least one.

    `frames` are positions within the run that was parsed, `places` positions within their frame (None: all 0).
    `ids` are 0 where there are none; `first_ids` and `last_ids` are None for single trades.
    """

    kind: str
    frames: Ints
    places: Ints | None
    symbols: Names
    ids: Ints
    prices: Numbers
    amounts: Numbers
    sides: Names
    times: Ints
    first_ids: Ints | None = None
    last_ids: Ints | None = None
    off_market: Flags | None = None

    def check_twins(self) -> None:
        """Raise Unusual when trades of one message may be equal: without ids, these have to be counted."""
        same_frame, later = np.diff(self.frames) == 0, np.diff(self.times)
        if (same_frame & (later < 0)).any():
            raise Unusual
        together = np.flatnonzero(same_frame & (later == 0))
        rows = np.union1d(together, together + 1)
        texts = [numbers.spans.at(rows).texts() for numbers in (self.prices, self.amounts)]
        keys = (self.frames[rows].tolist(), self.times[rows].tolist(), *texts, self.sides.codes[rows].tolist())
        if len(set(zip(*keys, strict=True))) < len(rows):
            raise Unusual

    def records(self) -> Iterator[Trade]:
        """Return the trades one by one."""
        ids = self.ids.tolist()
        return map(
            Trade,
            self.symbols,
            ids,
            self.prices,
            self.amounts,
            self.sides,
            self.times.tolist(),
            repeat(self.kind),
            ids if self.first_ids is None else self.first_ids.tolist(),
            ids if self.last_ids is None else self.last_ids.tolist(),
            repeat(False) if self.off_market is None else self.off_market.tolist(),
        )


@dataclass
class QuoteColumns:
    """Quotes, as `TradeColumns`. `update_ids` and `times` are None where the exchange gives none."""

    frames: Ints
    places: Ints | None
    symbols: Names
    bid_prices: Numbers
    bid_amounts: Numbers
    ask_prices: Numbers
    ask_amounts: Numbers
    update_ids: Ints | None
    times: Ints | None

    def records(self) -> Iterator[Quote]:
        """Return the quotes one by one."""
        return map(
            Quote,
            self.symbols,
            self.bid_prices,
            self.bid_amounts,
            self.ask_prices,
            self.ask_amounts,
            repeat(0) if self.times is None else self.times.tolist(),
            repeat(0) if self.update_ids is None else self.update_ids.tolist(),
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
            for (frame, place), trade in zip(_numbered(trades), trades.records(), strict=True):
                found[frame][0][place] = trade
        for quotes in self.quotes:
            for (frame, place), quote in zip(_numbered(quotes), quotes.records(), strict=True):
                found[frame][1][place] = quote
        return [Parsed(_by_place(trades), _by_place(quotes)) for trades, quotes in found]


@runtime_checkable
class ParsesMany(Protocol):
    """What an exchange may have beside the port, to be read faster; the conformance suite checks it against `parse`."""

    def parse_many(self, frames: Sequence[bytes]) -> Columns:
        """Read the data of FRAME records into columns, or raise anything: they are then taken one by one.

        Numbers are read where they are plain digits; everything else is left to `parse` by whoever asked.
        """


Record = TypeVar("Record")


def _numbered(columns: TradeColumns | QuoteColumns) -> Iterator[tuple[int, int]]:
    places = np.zeros(len(columns.frames), dtype=np.int64) if columns.places is None else columns.places
    return zip(columns.frames.tolist(), places.tolist(), strict=True)


def _by_place(records: dict[int, Record]) -> list[Record]:
    return [records[place] for place in sorted(records)]
