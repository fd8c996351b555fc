"""Trades of one Binance symbol in a log, one a frame: the id of each is its offset and one."""

from __future__ import annotations

import json
import random

from k2.log.embedded import EmbeddedLog
from k2.model import FRAME, LIVE, Frame

T0 = 1_750_000_000_000_000_000
PER_BATCH = 50


def frames(first: int) -> list[Frame]:
    """Trades of one symbol with rising ids from `first` on, which zstd cannot shrink away."""
    made = []
    for trade_id in range(first, first + PER_BATCH):
        noise = f"{trade_id * 7_919_993 % 99_999_989:08d}"
        text = json.dumps(
            {"e": "trade", "s": "BTCUSDT", "t": trade_id, "p": f"{noise}.{noise}", "q": f"0.{noise}1",
             "T": T0 // 10**6 + trade_id, "m": False, "M": True, "x": random.Random(trade_id).randbytes(200).hex()}
        )  # fmt: skip
        made.append(Frame(FRAME, LIVE, "c", 1, trade_id, T0 + trade_id * 10**6, text.encode()))
    return made


def fill(log: EmbeddedLog, count: int) -> None:
    """Append trades 1 .. count in batches; offset and id differ by one."""
    for first in range(log.end_offset("binance") + 1, count + 1, PER_BATCH):
        log.append("binance", frames(first))
