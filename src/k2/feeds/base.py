"""The exchange port: what K2 has to know of an exchange, as pure functions without I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from k2.model import Frame, Parsed

TRADES = "trades"
QUOTES = "quotes"
BOOK = "book"
CHANNELS = (TRADES, QUOTES, BOOK)


@dataclass(frozen=True)
class Limits:
    """What an exchange allows and how its silence is judged; durations in seconds."""

    symbols_per_connection: int
    requests_per_second: float  # messages we may send on one connection
    connection_seconds: float  # the exchange cuts a connection at this age; inf: never
    silence_seconds: float  # no frame at all for this long: the connection is dead
    connections_per_minute: float = 60.0  # new connections we may open
    # Heartbeats but no data for this long: the connection is replaced, with an overlap. It is for busy markets;
    # quiet ones are given longer, as they show themselves to be quiet (see `Session`). inf: never replaced so.
    data_silence_seconds: float = 120.0


@dataclass(frozen=True)
class Request:
    """One message to send after connecting, and the acknowledgements it must bring.

    `expects` are opaque keys; `Exchange.control` reports the same keys as `acknowledged`.
    """

    text: str
    expects: frozenset[str]


@dataclass(frozen=True)
class Control:
    """What a frame means to the connection that received it.

    `data`: market data. `heartbeat`: a sign of life only. `acknowledged`: subscriptions
    confirmed (`acknowledged` holds their keys). `refused`: a subscription was refused
    (`acknowledged` holds the keys if known, `reason` the exchange's words). `reconnect`: the
    exchange asks to connect anew.
    """

    kind: Literal["data", "heartbeat", "acknowledged", "refused", "reconnect"]
    acknowledged: frozenset[str] = frozenset()
    reason: str = ""


DATA = Control("data")
HEARTBEAT = Control("heartbeat")


class Exchange(Protocol):
    """One exchange. Every method is pure: same arguments, same answer, nothing touched.

    An exchange is one module; its instance is named in `feeds/registry.py`, or in the entry
    point group `k2.exchanges` of another distribution. `k2.feeds.conformance` checks one.
    """

    name: str  # "kraken": also the log partition and the value of the `exchange` column
    url: str  # WebSocket address, e.g. "wss://ws.kraken.com/v2"; settings may replace it
    rest_url: str  # base of the REST interface, without a trailing slash
    limits: Limits
    default_symbols: tuple[str, ...]  # canonical
    contiguous_ids: bool  # trade ids of a symbol count up by one, so that a jump means missing trades

    def connection_url(self, url: str, symbols: Sequence[str], channels: Sequence[str]) -> str:
        """Return the address to connect to, from the base `url` (the exchange's or the settings')."""

    def requests(self, symbols: Sequence[str], channels: Sequence[str]) -> list[Request]:
        """Return the messages that subscribe canonical `symbols` to `channels`, in sending order."""

    def control(self, data: bytes) -> Control:
        """Tell what a frame means to its connection; never raises (what it cannot read is data)."""

    def ping(self) -> str | None:
        """Return the application's own ping message, or None when protocol pings are used."""

    def parse(self, frame: Frame) -> Parsed:
        """Turn one frame (kind FRAME or ANSWER) into trades and quotes, in the order sent.

        Frames that hold neither (acknowledgements, heartbeats, order books, candles)
        give an empty result.

        Raises:
            BadFrame: not readable, a field is missing or of the wrong kind, or a message
                of a kind this exchange is not known to send.
        """

    def to_canonical(self, native: str) -> str:
        """Turn the exchange's symbol, in any of its spellings, into the canonical one.

        Raises UnknownName when it cannot be split.
        """

    def to_native(self, canonical: str) -> str:
        """Turn a canonical symbol into the spelling used to subscribe; raises UnknownName."""
