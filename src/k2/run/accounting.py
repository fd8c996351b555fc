"""Which trade ids have been seen: finds repeats, holes, and holes that are filled later.

Pure: values in, values out. One `IdLedger` per (symbol, kind) of one exchange whose ids count
up without holes; what it has seen is a short list of closed intervals.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, deque

import msgspec

MAX_INTERVALS = 10_000
"""Most separate intervals per ledger (so at most that many open holes); see `IdLedger.add`."""

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


class RepeatWindow:
    """Finds repeats of records without a usable id among the newest offsets of a partition.

    What it answers is a function of the sightings in the last `span` offsets (at most the newest
    `most` of them) and of nothing else, so it can be filled again from the log after a restart.
    """

    def __init__(self, span: int, most: int = 500_000) -> None:
        self._span = span
        self._most = most
        self._sightings: deque[tuple[int, object, object]] = deque()  # (offset, key, origin), by offset
        self._counts: dict[object, Counter[object]] = {}  # key -> origin -> sightings in the window

    def is_repeat(self, key: object, offset: int, origin: object = None) -> bool:
        """Note a sighting at this offset (offsets never fall) and tell whether it is a repeat.

        Without an `origin`: whether the key was sighted in the window before. With one (a connection):
        whether some other origin has shown the key at least as often as this one now has. So one
        connection may say the same twice, and two that overlap count once.
        """
        self._forget(offset - self._span)
        counts = self._counts.setdefault(key, Counter())
        counts[origin] += 1
        self._sightings.append((offset, key, origin))
        if origin is None:
            return counts[None] > 1
        return any(count >= counts[origin] for other, count in counts.items() if other != origin)

    def _forget(self, up_to: int) -> None:
        sightings = self._sightings
        while sightings and (sightings[0][0] <= up_to or len(sightings) >= self._most):
            _, key, origin = sightings.popleft()
            counts = self._counts[key]
            counts[origin] -= 1
            if not counts[origin]:
                del counts[origin]
                if not counts:
                    del self._counts[key]
