"""Faults on request: what goes wrong, when, how often; seeded, and each with a bound.

Timed faults act on connections: `disconnect`, `half-open` (nothing sent, nothing read, not closed),
`silence` (pings answered, no data), `429` (connects and REST refused), `refuse` (subscriptions refused).
Message faults act on every Nth data message: `repeat`, `drop`, `reorder` (swapped with the next),
`malformed` (a broken copy before the good one), `unknown-field`, `unknown-type` (a message of a new kind before).
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from k2.errors import Rejected, UnknownName, nearest

TIMED = ("disconnect", "half-open", "silence", "429", "refuse")
MESSAGES = ("repeat", "drop", "reorder", "malformed", "unknown-field", "unknown-type")
KINDS = TIMED + MESSAGES
MAX_FAULTS = 100
_EVERY_MESSAGES = 100


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"for_seconds": "for"}):
    """One fault as asked for.

    `exchange`: where, empty for everywhere. `after`: seconds until it starts. `for`: seconds it lasts
    (timed faults except `disconnect`: 0 is 10; message faults: 0 is without end). `every`: a message
    fault strikes every so many data messages (0 is 100), a timed fault comes again after so many seconds
    (0: only once). `count`: most times it strikes, 0 is without limit. `heartbeats`: `silence` goes on
    with them. `abrupt`: `disconnect` resets the connection instead of closing it.
    """

    kind: str
    exchange: str = ""
    after: float = 0.0
    for_seconds: float = 0.0
    every: float = 0.0
    count: int = 0
    heartbeats: bool = False
    abrupt: bool = False


def parse_fault(text: str) -> Fault:
    """Read `drop:every=50,count=3` or `silence:after=5,for=20,exchange=kraken`; blanks separate as well.

    Raises UnknownName or Rejected with what would be right.
    """
    kind, *options = re.split(r"[:,\s]+", text.strip())
    values: dict[str, Any] = {"kind": kind}
    for option in filter(None, options):
        name, _, value = option.partition("=")
        values[name] = value
    return make_fault(values)


def make_fault(values: Mapping[str, Any]) -> Fault:
    """Build a fault from JSON values or texts; raises UnknownName or Rejected."""
    known = [f.encode_name for f in msgspec.structs.fields(Fault)]
    for name in values:
        if name not in known:
            raise UnknownName(f"fault {dict(values)}: no option {name!r}{nearest(name, known)}")
    try:
        fault = msgspec.convert(values, Fault, strict=False)
    except msgspec.ValidationError as error:
        raise Rejected(f"fault {dict(values)}: {error} (options: {', '.join(known)})") from None
    if fault.kind not in KINDS:
        raise UnknownName(f"fault {fault.kind!r}: not known{nearest(fault.kind, KINDS)} (one of {', '.join(KINDS)})")
    if min(fault.after, fault.for_seconds, fault.every, fault.count) < 0:
        raise Rejected(f"fault {dict(values)}: after, for, every and count must not be negative")
    if fault.kind in MESSAGES and fault.every != int(fault.every):
        raise Rejected(f"fault {dict(values)}: every must be a whole number of messages")
    return fault


class Active:
    """A fault at work: when it starts and ends, how often it struck."""

    def __init__(self, number: int, fault: Fault, now: float, seed: int) -> None:
        self.number = number
        self.fault = fault
        self.struck = 0
        self.starts = now + fault.after
        self._every = int(fault.every) or _EVERY_MESSAGES
        self._phase = random.Random(f"{seed}/{number}").randrange(self._every)  # noqa: S311 a schedule by seed, not a secret
        self._seen = 0

    @property
    def spent(self) -> bool:
        """Whether it struck as often as it may."""
        return bool(self.fault.count) and self.struck >= self.fault.count

    @property
    def _lasts(self) -> float:
        fault = self.fault
        if fault.kind in MESSAGES:
            return fault.for_seconds or float("inf")
        return 0.0 if fault.kind == "disconnect" else (fault.for_seconds or 10.0)

    def holds(self, now: float) -> bool:
        """Whether it is in force at a moment."""
        return self.starts <= now < self.starts + self._lasts

    def ends(self) -> float:
        """Return when the present bout is over."""
        return self.starts + self._lasts

    def begin(self, now: float) -> bool:
        """Whether a timed fault begins now; it then counts as a strike and the next bout is set."""
        if now < self.starts or self.spent:
            return False
        self.struck += 1
        return True

    def again(self) -> None:
        """Set the time of the next bout."""
        every = self.fault.every
        self.starts = self.starts + max(every, self._lasts) if every else float("inf")

    def hit(self, now: float) -> bool:
        """Whether a message fault strikes this message."""
        if self.spent or not self.holds(now):
            return False
        self._seen += 1
        if self._seen % self._every != self._phase:
            return False
        self.struck += 1
        return True


class Faults:
    """All faults of a simulator. Times are of one monotonic clock, in seconds."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._made = 0
        self._active: list[Active] = []
        self._running: set[int] = set()

    def add(self, fault: Fault, now: float) -> int:
        """Schedule a fault; returns its number. Raises Rejected when there are too many."""
        if len(self._active) >= MAX_FAULTS:
            raise Rejected(
                f"add fault {fault.kind}: {MAX_FAULTS} faults are active already (DELETE /faults clears them)"
            )
        self._made += 1
        self._active.append(Active(self._made, fault, now, self._seed))
        return self._made

    def clear(self) -> None:
        """End all faults."""
        self._active.clear()
        self._running.clear()

    def advance(self, now: float) -> Iterator[Fault]:
        """Yield the timed faults that begin now, and forget those that are over for good."""
        for active in list(self._active):
            if active.fault.kind in MESSAGES:
                over = active.spent or now >= active.ends()
            else:
                if active.number not in self._running and active.begin(now):
                    self._running.add(active.number)
                    yield active.fault
                if active.number in self._running and now >= active.ends():
                    self._running.discard(active.number)
                    active.again()
                over = active.starts == float("inf") or (active.spent and active.number not in self._running)
            if over:
                self._active.remove(active)

    def force(self, kind: str, exchange: str, now: float) -> Active | None:
        """Return the timed fault of a kind in force for an exchange, if any."""
        for active in self._active:
            fault = active.fault
            if fault.kind == kind and fault.exchange in ("", exchange) and active.holds(now):
                return active
        return None

    def strikes(self, exchange: str, now: float) -> list[Fault]:
        """Return the message faults that strike the next data message of an exchange."""
        if not self._active:
            return []
        return [
            active.fault
            for active in self._active
            if active.fault.kind in MESSAGES and active.fault.exchange in ("", exchange) and active.hit(now)
        ]

    def describe(self) -> list[dict[str, Any]]:
        """Return the active faults as JSON values, with how often each struck."""
        return [
            {"number": a.number, "struck": a.struck, **{k: v for k, v in msgspec.to_builtins(a.fault).items() if v}}
            for a in self._active
        ]


def break_text(text: str, choice: random.Random) -> bytes:
    """Return a broken form of a message: cut short, not JSON, or not UTF-8."""
    data = text.encode()
    way = choice.randrange(3)
    if way == 0:
        return data[: max(1, len(data) // 2)]
    if way == 1:
        return b"<html>502 Bad Gateway</html>"
    return data[:-2] + b"\xff\xfe" + data[-2:]


def add_fields(text: str) -> str:
    """Return the message with fields nobody has heard of, at the top and in its first inner object."""
    extra = '"zz_new":{"a":[1,null],"b":"x"},'
    outer = "{" + extra + text[1:] if text.startswith("{") and len(text) > 2 else text
    for opening in ('"data":{', '"data":[{', '"events":[{'):
        if opening in outer:
            return outer.replace(opening, opening + '"zz_inner":1.50,', 1)
    return outer
