"""Many frames of one exchange as columns: the fast way from frames to rows.

`Exchange.parse` reads one frame and says exactly what is wrong with it. `parse_many` reads a run of frames into
columns and gives up at the first thing that is not as usual: whoever asked then takes the frames one by one. So it
never decides about bad input, and whatever it returns is what `parse` says of the same frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from k2.feeds.times import integer_scale

Ints = npt.NDArray[np.int64]


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


@dataclass
class Columns:
    """What a run of frames holds; frames without rows appear nowhere."""

    trades: list[TradeColumns] = field(default_factory=list)
    quotes: list[QuoteColumns] = field(default_factory=list)


@runtime_checkable
class ParsesMany(Protocol):
    """What an exchange may have beside the port, to be read faster."""

    def parse_many(self, frames: Sequence[bytes]) -> Columns:
        """Read the data of FRAME records into columns, or raise anything: they are then taken one by one."""


def group_by_head(frames: Sequence[bytes], kind_of: Callable[[bytes], str]) -> dict[str, list[int]]:
    """Return the positions of the frames by kind, as guessed by what stands before a frame's first comma."""
    groups: dict[str, list[int]] = {}
    for position, data in enumerate(frames):
        kind = kind_of(data[: data.find(b",")])
        try:
            groups[kind].append(position)
        except KeyError:
            groups[kind] = [position]
    return groups


def flat(positions: list[int], counts: Iterable[int]) -> tuple[list[int], list[int]]:
    """Return frame position and place in the frame of each row, for frames with so many rows each."""
    places = [(position, row) for position, count in zip(positions, counts, strict=True) for row in range(count)]
    return [position for position, _ in places], [row for _, row in places]


def integer_times(values: list[int]) -> Ints:
    """Return nanoseconds of integer times that are all of one unit (see `times.from_integer`)."""
    times = np.array(values, dtype=np.int64)
    if not len(times):
        return times
    scale = integer_scale(int(times.min()))
    if scale != integer_scale(int(times.max())):
        raise Unusual
    return times * scale


def rfc3339_times(texts: list[str]) -> Ints:
    """Return nanoseconds of times in full, in UTC (`2026-08-09T21:05:42.514318Z`)."""
    if texts and (min(map(len, texts)) < _SHORTEST_TIME or not all(text.endswith("Z") for text in texts)):
        raise Unusual
    parsed = pa.array(texts, pa.string()).cast(_TIME).cast(pa.int64())
    return np.asarray(parsed.to_numpy())


_TIME = pa.timestamp("ns", tz="UTC")
_SHORTEST_TIME = len("2026-08-09T21:05:42Z")
