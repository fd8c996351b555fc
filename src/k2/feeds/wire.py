"""Reading what exchanges send: exact numbers, sides, and one error for all that cannot be read."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated
from urllib.parse import parse_qs, urlsplit

import msgspec

from k2.errors import BadFrame, K2Error
from k2.model import ANSWER, BUY, FRAME, NOTHING, SELL, Frame, Parsed

Id = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
"""A number an exchange gives to a trade or an update; it must fit the column."""

# A JSON number of bounded length. `[0-9]`, not `\d`, which takes the digits of every script.
_NUMBER = re.compile(r"-?[0-9]{1,60}(?:\.[0-9]{1,60})?(?:[eE][+-]?[0-9]{1,3})?")
_is_number = _NUMBER.fullmatch

_OPPOSITE = {"buy": SELL, "sell": BUY, "BUY": SELL, "SELL": BUY}
_SIDE = {"buy": BUY, "sell": SELL, "BUY": BUY, "SELL": SELL, "b": BUY, "s": SELL}
_EXCERPT_BYTES = 120
_LONGEST_REASON = 800  # a message quotes what the exchange sent, which may be megabytes


def number(text: str) -> str:
    """Return the text unchanged if it is a decimal number of at most 60 digits each side of the point.

    Raises ValueError.
    """
    if _is_number(text) is None:
        raise ValueError(f"{text[:40]!r} is not a decimal number")
    return text


def raw_number(raw: msgspec.Raw) -> str:
    """Return the digits of a JSON number as sent: `0.00005100`, `2.5e-05`; raises ValueError."""
    return number(str(memoryview(raw), "ascii").strip())


def taker_side(text: str) -> str:
    """Return buy or sell where the exchange tells the taker's side; raises ValueError."""
    side = _SIDE.get(text)
    if side is None:
        raise ValueError(f"side {text[:40]!r} is neither buy nor sell")
    return side


def opposite_side(text: str) -> str:
    """Return the taker's side where the exchange tells the maker's; raises ValueError."""
    side = _OPPOSITE.get(text)
    if side is None:
        raise ValueError(f"side {text[:40]!r} is neither buy nor sell")
    return side


def parse_frame(
    exchange: str,
    frame: Frame,
    message: Callable[[bytes], Parsed],
    answer: Callable[[str, bytes], Parsed],
) -> Parsed:
    """Parse a FRAME with `message(data)`, an ANSWER with `answer(origin, data)`; other kinds hold no rows.

    Raises:
        BadFrame: whatever of bad input went wrong inside; names the exchange, the problem and the data.
    """
    try:
        if frame.kind == FRAME:
            return message(frame.data)
        if frame.kind == ANSWER:
            return answer(frame.origin, frame.data)
    except (msgspec.MsgspecError, ValueError, RecursionError, K2Error) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        if len(what) > _LONGEST_REASON:
            what = f"{what[:_LONGEST_REASON]}..."
        raise BadFrame(f"{exchange}: {frame.kind} cannot be parsed: {what} (in {_excerpt(frame.data)})") from None
    return NOTHING


def endpoint(url: str) -> tuple[str, dict[str, str]]:
    """Split the address of a REST answer into path and parameters (the last of repeated ones)."""
    parts = urlsplit(url)
    return parts.path.rstrip("/"), {name: values[-1] for name, values in parse_qs(parts.query).items()}


def _excerpt(data: bytes) -> str:
    shown = repr(data[:_EXCERPT_BYTES])[1:]
    return f"{shown} and {len(data) - _EXCERPT_BYTES} bytes more" if len(data) > _EXCERPT_BYTES else shown
