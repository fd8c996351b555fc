"""What a connection tells of itself, for those who only read it: nothing here needs a network library."""

from __future__ import annotations

from typing import Literal

import msgspec

State = Literal["waiting", "connecting", "opened", "subscribed"]


class ConnectionStatus(msgspec.Struct):
    """What an operator may see of one connection; times in nanoseconds UTC, 0: never yet."""

    name: str
    symbols: int
    state: State = "waiting"
    epoch: int = -1
    since_ns: int = 0
    frames: int = 0
    bytes: int = 0
    last_frame_ns: int = 0
    last_data_ns: int = 0  # older than last_frame_ns by much: heartbeats only
    acknowledged: int = 0
    refused: dict[str, str] = {}
    ended: dict[str, int] = {}  # Ending.kind -> how often
    last_error: str = ""
