# ruff: noqa: T201 - its standard output is how it talks
"""A process that owns a hot folder and writes fixed batches until it is killed: `hot_writer.py FOLDER`.

It loads everything, then waits for the number of its first batch on standard input.
"""

from __future__ import annotations

import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

from k2.hot import open_hot
from k2.settings import Settings

sys.path.insert(0, str(Path(__file__).parent))
from hot_rows import MINUTE_NS, START_NS, table, trade

import k2.hot.owner  # noqa: F401 - loads the drivers

BATCH = 200


def batch(number: int) -> list[dict[str, Any]]:
    """Return the rows of one batch: always the same, some of them late, spread over an hour and a half."""
    first = number * BATCH
    return [
        trade(
            offset,
            symbol=("BTC-USDT", "ETH-USDT")[offset % 2],
            price=Decimal(60_000_00 + offset * 7919 % 100_000).scaleb(-2),
            amount=Decimal(1 + offset * 31 % 1000).scaleb(-5),
            side=("buy", "sell")[offset % 3 % 2],
            off_market=offset % 50 == 49,
            exchange_ns=START_NS + offset * 7_919_000_000_000 % (90 * MINUTE_NS),
        )
        for offset in range(first, first + BATCH)
    ]


def write(folder: str, first: int) -> None:
    """Write batches from `first` on, saying `begin N` and `end N` around each."""
    hot = open_hot(Settings(data=folder), "own")
    number = first
    while True:
        print("begin", number, flush=True)
        hot.write("trades", table("trades", batch(number)), f"batch:{number}")
        print("end", number, flush=True)
        number += 1


if __name__ == "__main__":
    write(sys.argv[1], int(sys.stdin.readline()))
