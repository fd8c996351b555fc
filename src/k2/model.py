"""The records every stage speaks: frames, trades, quotes, gaps, dead letters, selections.

Frozen values without I/O. Prices and amounts are the exact decimal text of the exchange
(`"0.00005100"`, `"2.5e-05"`); they become `decimal128` once per batch, never a float.
Times are integers: nanoseconds UTC since 1970. `side` is always the taker's.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

# Frame.kind
FRAME = "frame"  # one WebSocket message as received
ANSWER = "answer"  # one REST answer; `origin` is the URL asked
OPENED = "opened"  # a connection was opened; `origin` is its URL
SUBSCRIBED = "subscribed"  # every subscription of the connection was acknowledged
CLOSED = "closed"  # a connection ended; `data` says why

# Frame.source, and the `source` column of every row made from the frame
LIVE = "live"  # from the exchange's stream, by K2 itself
IMPORT = "import"  # from a recording somebody made
BACKFILL = "backfill"  # from the exchange's REST interface, after the fact

# Trade.kind
TRADE = "trade"
AGGREGATE = "aggregate"

BUY = "buy"
SELL = "sell"

Positions = Mapping[str, int]
"""Log partition -> offset. As a start it is inclusive, as an end exclusive."""


class Frame(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """One record of the log: a frame exactly as received, or a connection event.

    `connection` names the socket within its capture process, `epoch` rises with each of its
    openings (not by one where the process was started again), `counter` counts the frames within
    one epoch, from 0. `origin` is the URL, given on OPENED and ANSWER only.
    """

    kind: str
    source: str
    connection: str
    epoch: int
    counter: int
    received_ns: int
    data: bytes
    origin: str = ""


class LogBatch(msgspec.Struct, frozen=True):
    """Frames appended together: offsets `base_offset` .. `base_offset + len(frames) - 1`.

    `logged_ns` is when the log made them durable: K2's knowledge time.
    """

    partition: str
    base_offset: int
    logged_ns: int
    frames: list[Frame]

    @property
    def end_offset(self) -> int:
        """Offset after the last frame (exclusive end)."""
        return self.base_offset + len(self.frames)


class Trade(msgspec.Struct, frozen=True, gc=False):
    """One trade, or one aggregate of trades, as the exchange told it.

    `trade_id` is the exchange's own number (0: it gives none, see `occurrence`).
    A single trade has `first_id == last_id == trade_id`; an aggregate covers
    `first_id`..`last_id`, both inclusive. `occurrence` counts equal id-less trades
    (same time, price, amount, side) within one frame, from 0.
    """

    symbol: str
    trade_id: int
    price: str
    amount: str
    side: str
    exchange_ns: int
    kind: str = TRADE
    first_id: int = 0
    last_id: int = 0
    off_market: bool = False
    occurrence: int = 0


class Quote(msgspec.Struct, frozen=True, gc=False):
    """Best bid and best ask of one symbol at one moment.

    `exchange_ns` is 0 where the exchange sends no time, `update_id` 0 where it sends no number.
    """

    symbol: str
    bid_price: str
    bid_amount: str
    ask_price: str
    ask_amount: str
    exchange_ns: int = 0
    update_id: int = 0


class Parsed(msgspec.Struct, frozen=True):
    """What one frame holds, in the order the exchange sent it; both empty for control frames."""

    trades: list[Trade] = []
    quotes: list[Quote] = []

    @property
    def has_rows(self) -> bool:
        """Whether there is any trade or quote in it."""
        return bool(self.trades or self.quotes)


NOTHING = Parsed()


class Selection(msgspec.Struct, frozen=True):
    """Which rows a query asks for; the same value is understood by every tier.

    Time bounds are nanoseconds UTC on the table's time column (`schema.Table.time_column`),
    start inclusive, end exclusive. `logged_before_ns` keeps only what the log held before that
    moment (exclusive): the knowledge time. `limit` 0 means all; with `newest` the last
    `limit` rows are taken instead of the first. Rows come back in the table's sort order
    by time either way.
    """

    table: str
    symbol: str | None = None
    exchange: str | None = None
    start_ns: int | None = None
    end_ns: int | None = None
    logged_before_ns: int | None = None
    limit: int = 0
    newest: bool = False
