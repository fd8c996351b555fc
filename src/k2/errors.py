"""The error tree: each branch says what the caller should do.

    K2Error
    ├─ Unavailable        try again later
    │  ├─ FeedDown          an exchange cannot be reached or has gone silent
    │  ├─ StoreDown         a log, hot or cold store cannot be reached
    │  └─ TimedOut          a query was interrupted at its time limit
    ├─ BadData            park the record, count it, go on
    │  ├─ BadFrame          a frame cannot be parsed
    │  └─ Corrupt           stored bytes fail their checksum
    ├─ Misconfigured      stop at start-up; the message names the setting and the mend
    │  ├─ NotInstalled      an optional driver is missing; names the extra
    │  └─ InUse             a folder or port is held by someone else
    └─ Rejected           this request can never work
       ├─ UnknownName       no such exchange, symbol, table...; suggests the nearest
       └─ NotSuccessor      an offset range that does not follow the committed one

A message says what was attempted, on what, what came back, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class K2Error(Exception):
    """Raised when K2 cannot do what was asked; every error of the package derives from it.

    `exit_code` is what the command line ends with.
    """

    exit_code = 1


class Unavailable(K2Error):
    """Raised when trying again later may work."""

    exit_code = 75  # EX_TEMPFAIL


class FeedDown(Unavailable):
    """Raised when an exchange cannot be reached, refuses, or has gone silent."""


class StoreDown(Unavailable):
    """Raised when a log, hot or cold store cannot be reached or is out of space."""


class TimedOut(Unavailable):
    """Raised when a query was interrupted at its time limit."""


class BadData(K2Error):
    """Raised when a record must be parked while the rest goes on."""

    exit_code = 65  # EX_DATAERR


class BadFrame(BadData):
    """Raised when a frame of an exchange cannot be turned into rows."""


class Corrupt(BadData):
    """Raised when stored bytes fail their checksum; the message names the range.

    From the log: `first_offset`..`end_offset` (exclusive) is the damage; what lies behind is readable.
    """

    def __init__(self, message: str = "", *, first_offset: int = 0, end_offset: int = 0) -> None:
        super().__init__(message)
        self.first_offset = first_offset
        self.end_offset = end_offset


class Misconfigured(K2Error):
    """Raised when a setting or the environment is wrong; the message names it and the mend."""

    exit_code = 78  # EX_CONFIG


class NotInstalled(Misconfigured):
    """Raised when a driver is missing; the message names the extra to install."""


class InUse(Misconfigured):
    """Raised when a folder or a port is already held by another process."""

    exit_code = 75  # EX_TEMPFAIL: the other process may end


class Rejected(K2Error):
    """Raised when a request can never work as it stands."""

    exit_code = 64  # EX_USAGE


class UnknownName(Rejected):
    """Raised when a name is not one of those known; the message suggests the nearest."""


class NotSuccessor(Rejected):
    """Raised when an offset range does not start where the committed one ends."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint such as `; did you mean 'kraken'?`, or the known names, or nothing."""
    names = sorted(set(known))
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(names)}" if 0 < len(names) <= 12 else ""
