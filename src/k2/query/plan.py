"""A question as it was asked, made plain: names known, times in nanoseconds, limits set."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from k2.errors import Rejected, UnknownName, nearest
from k2.model import AGGREGATE, TRADE, Selection
from k2.query.times import TimeLike, parse_time
from k2.schema import CANDLES, TABLES, TIMEFRAMES, Table
from k2.symbols import canonical

ALL = "all"
HOT = "hot"
COLD = "cold"
TIERS = (ALL, HOT, COLD)

AUTO = "auto"
KINDS = (AUTO, TRADE, AGGREGATE)

_MAX_SNAPSHOT_ID = 2**63 - 1


@dataclass(frozen=True)
class Question:
    """What is asked. `ask` builds it from what people write; the engine takes nothing else.

    Times are nanoseconds UTC on the table's time column (for candles the start of the bucket),
    start inclusive, end exclusive. `limit` 0 means all rows; with `newest` the last `limit`
    rows are meant, else the first. `after` continues behind the last row of an earlier answer.
    At most one of `snapshot_id` and `logged_before_ns` is set: the two kinds of `as_of`.
    """

    table: Table
    symbol: str | None = None
    exchange: str | None = None
    start_ns: int | None = None
    end_ns: int | None = None
    tier: str = ALL
    snapshot_id: int | None = None
    logged_before_ns: int | None = None
    limit: int = 0
    newest: bool = False
    timeframe: str = ""
    kind: str = AUTO
    after: Cursor | None = None

    def selection(self) -> Selection:
        """Return what the tiers are asked for; paging (`after`) is the engine's business."""
        return Selection(
            table=self.table.name,
            symbol=self.symbol,
            exchange=self.exchange,
            start_ns=self.start_ns,
            end_ns=self.end_ns,
            logged_before_ns=self.logged_before_ns,
            limit=self.limit,
            newest=self.newest,
        )


def order(table: Table) -> tuple[str, ...]:
    """Return the columns answers are sorted by: time first, then the rest of the table's sort.

    No two rows are equal in all of them, which is what paging rests on.
    """
    if table is CANDLES:
        return ("start_ns", "exchange", "symbol", "kind")
    return (table.time_column, *(name for name in table.sort if name != table.time_column))


@dataclass(frozen=True)
class Cursor:
    """The place behind one row: its values of `order(table)`.

    Not a time: many trades share a nanosecond, and a page may end between them.
    """

    table: str
    key: tuple[int | str, ...]

    @property
    def time_ns(self) -> int:
        """Time of the row."""
        return int(self.key[0])

    def encode(self) -> str:
        """Return it as text that is safe in a URL."""
        return base64.urlsafe_b64encode(msgspec.json.encode([self.table, *self.key])).decode().rstrip("=")

    @classmethod
    def decode(cls, text: str, table: Table) -> Cursor:
        """Read the text back; raises Rejected when it was not made by `encode` for this table."""
        wrong = Rejected(
            f"cursor {text!r} does not belong to {table.name}: pass on the `next` of an answer to the same question"
        )
        try:
            name, *key = msgspec.json.decode(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)), type=list)
        except (binascii.Error, ValueError):
            raise wrong from None
        types = [_key_type(table, column) for column in order(table)]
        if (
            name != table.name
            or len(key) != len(types)
            or any(type(k) is not t for k, t in zip(key, types, strict=True))
        ):
            raise wrong
        return cls(table.name, tuple(key))

    @classmethod
    def behind(cls, table: Table, row: Mapping[str, Any]) -> Cursor:
        """Return the place behind a row."""
        return cls(table.name, tuple(row[column] for column in order(table)))


def _key_type(table: Table, column: str) -> type:
    declared = next(c for c in table.columns if c.name == column)
    return int if declared.type.value in ("int", "ns") else str


def ask(
    table: str,
    symbol: str | None = None,
    *,
    exchange: str | None = None,
    start: TimeLike | None = None,
    end: TimeLike | None = None,
    tier: str = ALL,
    as_of: TimeLike | None = None,
    limit: int = 0,
    timeframe: str = "",
    kind: str = AUTO,
    after: str | None = None,
    now_ns: int | None = None,
) -> Question:
    """Build a question from names and times as people write them.

    `symbol` in any spelling `symbols.canonical` reads. `as_of` is a snapshot id (int, or digits)
    or a time. With a `start` a limit takes the first rows, without one the newest.

    Raises:
        UnknownName: table, timeframe, tier, kind; suggests the nearest.
        Rejected: a time, a cursor or a combination that cannot be answered.
    """
    known = _table(table)
    snapshot_id, logged_before_ns = parse_as_of(as_of, now_ns=now_ns)
    question = Question(
        table=known,
        symbol=None if symbol is None else canonical(symbol),
        exchange=None if exchange is None else exchange.strip().lower(),
        start_ns=None if start is None else parse_time(start, now_ns=now_ns),
        end_ns=None if end is None else parse_time(end, now_ns=now_ns),
        tier=_known("tier", tier, TIERS),
        snapshot_id=snapshot_id,
        logged_before_ns=logged_before_ns,
        limit=limit,
        newest=limit > 0 and start is None and after is None,
        timeframe=_known("timeframe", timeframe, TIMEFRAMES) if known is CANDLES else timeframe,
        kind=_known("kind", kind, KINDS),
        after=None if after is None else Cursor.decode(after, known),
    )
    _check(question)
    return question


def parse_as_of(as_of: TimeLike | None, *, now_ns: int | None = None) -> tuple[int | None, int | None]:
    """Return (snapshot id, None), or (None, nanoseconds): ints and digits are snapshot ids, the rest are times."""
    if as_of is None:
        return None, None
    if isinstance(as_of, str) and as_of.strip().isdecimal():
        as_of = int(as_of)
    if isinstance(as_of, int) and not isinstance(as_of, bool):
        if not 0 <= as_of <= _MAX_SNAPSHOT_ID:
            raise Rejected(f"as_of {as_of}: no snapshot id (see `k2 snapshots`)")
        return as_of, None
    return None, parse_time(as_of, now_ns=now_ns)


def _table(name: str) -> Table:
    return TABLES[_known("table", name, TABLES)]


def _known(what: str, name: str, known: Mapping[str, Any] | tuple[str, ...]) -> str:
    if name in known:
        return name
    raise UnknownName(f"{what} {name!r} is unknown{nearest(name, known)}")


def _check(question: Question) -> None:
    """Refuse what no tier could answer."""
    table = question.table
    if question.limit < 0:
        raise Rejected(f"limit {question.limit} is negative: give the number of rows wanted, 0 for all")
    if question.start_ns is not None and question.end_ns is not None and question.end_ns < question.start_ns:
        raise Rejected("the end lies before the start: nothing can be between them (start is inclusive, end exclusive)")
    if question.timeframe and table is not CANDLES:
        raise Rejected(f"{table.name} have no timeframe: only candles do")
    if question.kind != AUTO and table is not CANDLES:
        raise Rejected(f"kind {question.kind!r} chooses between candles; {table.name} have no such choice")
    if question.symbol is not None and "symbol" not in table.column_names:
        raise Rejected(f"{table.name} are not kept by symbol: ask by exchange and time")
    if question.tier == HOT and question.snapshot_id is not None:
        raise Rejected("a snapshot is a state of the cold tier: leave `tier` away, or give as_of a time")
    if question.tier == HOT and not table.hot:
        raise Rejected(f"{table.name} are kept in the cold tier only: use tier 'cold' or 'all'")
