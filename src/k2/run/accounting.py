"""Which trade ids have been seen: finds repeats, holes, and holes that are filled later.

Pure: values in, values out. One `IdLedger` per (symbol, kind) of one exchange whose ids count
up without holes; what it has seen is a short list of closed intervals.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import msgspec
import numpy as np

from k2 import meters
from k2.feeds.spans import Ints, Names, Texts
from k2.model import Quote, Trade

MAX_INTERVALS = 10_000
"""Most separate intervals per ledger (so at most that many open holes); see `IdLedger.add`."""

MAX_LEDGERS = 10_000
"""Most ledgers of one exchange: symbols, and kinds of their trades; what is beyond is rubbish it sends.

As many symbols does a repeat window know well enough to take runs as a whole.
"""

T = TypeVar("T")

MAX_SIGHTINGS = 500_000
"""Most records without an id that one partition remembers; see `RepeatWindow`."""

Keys = tuple[Names | Texts | Ints, ...]
"""What tells the records of a run apart, as columns."""

OPEN = "open"
FILLED = "filled"
GIVEN_UP = "given_up"


class Finding(msgspec.Struct, frozen=True):
    """A change of what is known to be missing: ids `first_id`..`last_id`, both inclusive."""

    status: str
    first_id: int
    last_id: int


class IdLedger(msgspec.Struct):
    """The ids seen of one symbol and kind.

    `firsts[i]`..`lasts[i]` (inclusive) are disjoint, ascending and never adjacent.
    `last_offset` is the log offset of the newest trade, by which the cause of a hole is told, and
    `newest_ns` the latest time of a trade, by which a repeat is told from a number used again.
    """

    firsts: list[int] = []
    lasts: list[int] = []
    last_offset: int = -1
    newest_ns: int = 0
    trades: int = 0
    repeats: int = 0

    def add(self, trade_id: int) -> list[Finding] | None:
        """Take note of one id; None if it was seen before, else what changed (mostly nothing: []).

        A hole opens when the id does not touch what is known; it is filled when an id
        arrives inside one. Beyond MAX_INTERVALS the lowest hole is given up: reported once,
        and ids inside it count as seen from then on.
        """
        lasts = self.lasts
        if lasts and trade_id == lasts[-1] + 1:
            lasts[-1] = trade_id
            self.trades += 1
            return []
        return self._add_elsewhere(trade_id)

    def _add_elsewhere(self, trade_id: int) -> list[Finding] | None:
        firsts, lasts = self.firsts, self.lasts
        at = bisect_right(firsts, trade_id)  # the interval before is at - 1
        if at > 0 and trade_id <= lasts[at - 1]:
            self.repeats += 1
            return None
        self.trades += 1
        findings: list[Finding] = []
        if not firsts:
            pass  # the first id ever: nothing is known to be missing
        elif at == len(firsts):
            findings = [Finding(OPEN, lasts[-1] + 1, trade_id - 1)]
        elif at == 0:
            if trade_id + 1 < firsts[0]:
                findings = [Finding(OPEN, trade_id + 1, firsts[0] - 1)]
        else:
            findings = [Finding(FILLED, trade_id, trade_id)]
        self._insert(at, trade_id)
        if len(firsts) > MAX_INTERVALS:
            findings.append(Finding(GIVEN_UP, lasts[0] + 1, firsts[1] - 1))
            del lasts[0], firsts[1]
        return findings

    def _insert(self, at: int, trade_id: int) -> None:
        """Put one id before interval `at`, joining it with the neighbours it touches."""
        firsts, lasts = self.firsts, self.lasts
        touches_before = at > 0 and lasts[at - 1] + 1 == trade_id
        touches_after = at < len(firsts) and trade_id + 1 == firsts[at]
        if touches_before and touches_after:
            lasts[at - 1] = lasts[at]
            del firsts[at], lasts[at]
        elif touches_before:
            lasts[at - 1] = trade_id
        elif touches_after:
            firsts[at] = trade_id
        else:
            firsts.insert(at, trade_id)
            lasts.insert(at, trade_id)

    @property
    def missing(self) -> int:
        """Number of ids missing between the lowest and the highest one seen."""
        return sum(first - last - 1 for first, last in zip(self.firsts[1:], self.lasts[:-1], strict=True))


def join_findings(findings: list[Finding]) -> list[Finding]:
    """Join neighbouring findings of the same status, so that a filled hole is one row, not one per id."""
    joined: list[Finding] = []
    for finding in findings:
        before = joined[-1] if joined else None
        if before and before.status == finding.status and before.last_id + 1 == finding.first_id:
            joined[-1] = Finding(finding.status, before.first_id, finding.last_id)
        else:
            joined.append(finding)
    return joined


class _Run:
    """Sightings of one kind that were taken together, none of them a repeat; spelled out only when one is asked for."""

    __slots__ = ("columns", "offsets", "origins")

    def __init__(self, offsets: Ints, columns: Keys, origins: Sequence[object] | None) -> None:
        self.offsets = offsets
        self.columns = columns
        self.origins = origins

    def __iter__(self) -> Iterator[tuple[int, object, object]]:
        columns = [column.tolist() if isinstance(column, np.ndarray) else column for column in self.columns]
        origins = [None] * len(self.offsets) if self.origins is None else self.origins
        return zip(self.offsets.tolist(), zip(*columns, strict=True), origins, strict=True)


class RepeatWindow:
    """Finds repeats of records without a usable id among the newest offsets of a partition.

    What it answers is a function of the sightings in the last `span` offsets (at most the newest
    `most` of them) and of nothing else, so it can be filled again from the log after a restart.
    """

    def __init__(self, span: int, most: int = MAX_SIGHTINGS) -> None:
        self._span = span
        self._most = most
        self._sightings: deque[tuple[int, object, object]] = deque()  # (offset, key, origin), by offset
        self._counts: dict[object, Counter[object]] = {}  # key -> origin -> sightings in the window
        self._runs: deque[_Run] = deque()  # newer than all sightings
        self._in_runs = 0
        self._knows_all = True  # of every symbol, what follows; else no run is taken as a whole any more
        # What tells without looking that a run holds no repeat: they may know of more than the window.
        self._highest: dict[str, int] = {}  # symbol -> highest update id ever sighted
        self._latest: dict[str, int] = {}  # symbol -> latest time of a trade without an id ever sighted
        self._origins: dict[str, tuple[object, int]] = {}  # symbol -> newest origin, newest offset of another one

    def is_repeat(self, key: object, offset: int, origin: object = None) -> bool:
        """Note a sighting at this offset (offsets never fall) and tell whether it is a repeat.

        Without an `origin`: whether the key was sighted in the window before. With one (a connection):
        whether some other origin has shown the key at least as often as this one now has. So one
        connection may say the same twice, and two that overlap count once.
        """
        self._spell_out()
        self._forget(offset - self._span)
        counts = self._note(offset, key, origin)
        if origin is None:
            return counts[None] > 1
        return any(count >= counts[origin] for other, count in counts.items() if other != origin)

    def is_repeated_quote(self, quote: Quote, offset: int, origin: object) -> bool:
        """Tell it of a quote: by its update id, or where it has none by all it says and the connection `origin`."""
        if quote.update_id:
            self._remember(self._highest, quote.symbol, max(quote.update_id, self._highest.get(quote.symbol, 0)))
            return self.is_repeat((quote.symbol, quote.update_id), offset)
        self._note_origin(quote.symbol, origin, offset)
        prices = (quote.bid_price, quote.bid_amount, quote.ask_price, quote.ask_amount)
        return self.is_repeat((quote.symbol, quote.exchange_ns, *prices), offset, origin)

    def is_repeated_trade(self, trade: Trade, offset: int) -> bool:
        """Tell it of a trade: by its id, or where it has none by all it says."""
        if trade.trade_id:
            return self.is_repeat((trade.symbol, trade.kind, trade.trade_id), offset)
        self._remember(self._latest, trade.symbol, max(trade.exchange_ns, self._latest.get(trade.symbol, 0)))
        said = (trade.symbol, trade.exchange_ns, trade.price, trade.amount, trade.side)
        return self.is_repeat((*said, trade.occurrence) if trade.occurrence else said, offset)

    def are_new_trades(self, firsts: Mapping[str, int]) -> bool:
        """Whether trades without ids, whose times begin with these per symbol and rise, are certainly no repeats."""
        return self._knows_all and all(first > self._latest.get(symbol, 0) for symbol, first in firsts.items())

    def are_new_updates(self, firsts: Mapping[str, int]) -> bool:
        """Whether rising update ids that begin with these, per symbol, are certainly no repeats."""
        return self._knows_all and all(first > self._highest.get(symbol, 0) for symbol, first in firsts.items())

    def is_sole_origin(self, symbol: str, origin: object, offset: int) -> bool:
        """Whether nobody but `origin` can have shown quotes of the symbol in the window of an offset."""
        known = self._origins.get(symbol)
        if known is None:
            return self._knows_all
        return known[0] == origin and known[1] <= offset - self._span

    def has_room(self, count: int) -> bool:
        """Whether a run of this many sightings can be taken in as a whole."""
        return len(self._sightings) + self._in_runs + count <= self._most

    def take_updates(self, offsets: Ints, columns: Keys, lasts: Mapping[str, int]) -> None:
        """Note a run of new updates: symbols and ids; `lasts` are the highest ids per symbol."""
        for symbol, last in lasts.items():
            self._remember(self._highest, symbol, last)
        self._take(_Run(offsets, columns, None))

    def take_trades(self, offsets: Ints, columns: Keys, lasts: Mapping[str, int]) -> None:
        """Note a run of new trades without ids: what tells them apart; `lasts` are the latest times per symbol."""
        for symbol, last in lasts.items():
            self._remember(self._latest, symbol, last)
        self._take(_Run(offsets, columns, None))

    def take_quotes(self, offsets: Ints, columns: Keys, origins: Sequence[object]) -> None:
        """Note a run of quotes without ids: symbols, times and the four texts; none of them is a repeat."""
        for symbol, origin in dict(zip(columns[0], origins, strict=True)).items():
            self._note_origin(str(symbol), origin, int(offsets[-1]))
        self._take(_Run(offsets, columns, origins))

    def _note_origin(self, symbol: str, origin: object, offset: int) -> None:
        known = self._origins.get(symbol)
        if known is None:
            self._remember(self._origins, symbol, (origin, -self._span))
        elif known[0] != origin:  # the one known until now may have been sighted up to this offset
            self._origins[symbol] = (origin, offset)

    def _remember(self, known: dict[str, T], symbol: str, value: T) -> None:
        if symbol in known or len(known) < MAX_LEDGERS:
            known[symbol] = value
        else:
            self._knows_all = False

    def _take(self, run: _Run) -> None:
        self._forget(int(run.offsets[-1]) - self._span)
        self._runs.append(run)
        self._in_runs += len(run.offsets)

    def _spell_out(self) -> None:
        while self._runs:
            for sighting in self._runs.popleft():
                self._note(*sighting)
        self._in_runs = 0

    def _note(self, offset: int, key: object, origin: object) -> Counter[object]:
        counts = self._counts.setdefault(key, Counter())
        counts[origin] += 1
        self._sightings.append((offset, key, origin))
        return counts

    def __len__(self) -> int:
        return len(self._sightings) + self._in_runs

    def _forget(self, up_to: int) -> None:
        sightings = self._sightings
        while sightings and (sightings[0][0] <= up_to or len(sightings) >= self._most):
            if sightings[0][0] > up_to:
                meters.acted("ingest.repeat_sightings")
            _, key, origin = sightings.popleft()
            counts = self._counts[key]
            counts[origin] -= 1
            if not counts[origin]:
                del counts[origin]
                if not counts:
                    del self._counts[key]
        while self._runs and not sightings and self._runs[0].offsets[-1] <= up_to:
            self._in_runs -= len(self._runs.popleft().offsets)
