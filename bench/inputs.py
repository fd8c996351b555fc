"""What the questions are measured on: recorded frames where they are present, else those of the simulator's markets."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa

from harness import ROOT, Run
from k2 import schema
from k2.feeds import recordings, registry
from k2.model import FRAME, LIVE, Frame
from k2.simulator.account import Account
from k2.simulator.connection import Connection, Message
from k2.simulator.faults import Faults
from k2.simulator.market import Market, instrument
from k2.simulator.server import WIRES

START_NS = 1_750_032_000 * 10**9
"""2025-06-16 00:00 UTC: where made trades begin."""

RECORDED = {
    "binance": ("binance/spot_ws/btcusdt_20240808.gz", "binance/spot_ws/btcusdt_20240809.gz"),
    "binance-usdm": ("binance/usdm_ws/btcusdt_20240719.gz", "binance/usdm_ws/ethusdt_20240719.gz"),
    "kraken": ("kraken/ws_v2/trades_20260926.jsonl",),
    "coinbase": ("coinbase/advanced_ws/capture_20260809_part1.jsonl.gz",),
}


def recordings_folder() -> Path | None:
    """Return the folder of recorded exchange data: K2_TEST_DATA, or `shared/data` beside the project; else None."""
    candidates = [os.environ.get("K2_TEST_DATA"), ROOT.parent / "shared" / "data"]
    return next((Path(c) for c in candidates if c and (Path(c) / "README.md").is_file()), None)


def frames(run: Run, exchange: str, most: int | None = None) -> list[Frame]:
    """Return an exchange's frames with trades and quotes (and whatever came between), in order; at most `most`.

    They are recorded ones; where there are none the simulator makes some, and the result says so.
    """
    folder = recordings_folder()
    if folder is None:
        run.note("the recordings are not present (K2_TEST_DATA): frames of the simulator were used")
        return simulated_frames(exchange, most or 100_000)
    found: list[Frame] = []
    for file in RECORDED[exchange]:
        path = run.used(folder / file, source="recorded", name=file)
        told = recordings.read(path, registry.get(exchange))
        found += islice(
            (one.frame for one in told if one.frame is not None and one.frame.kind == FRAME),
            None if most is None else most - len(found),
        )
    return found


def simulated_frames(
    exchange: str, count: int, *, symbols: Sequence[str] = (), channels: Sequence[str] = ("trades", "quotes")
) -> list[Frame]:
    """Return this many frames as the simulated exchange sends them, seeded; without a socket in between."""
    chosen = symbols or registry.get(exchange).default_symbols
    markets = [Market(instrument(exchange, symbol, 1), 1, START_NS, 20_000_000) for symbol in chosen]
    wire = WIRES[exchange](markets, Account(markets), Faults(1), time.monotonic, recorded=False)
    listener = _Listener(exchange)
    for request in registry.get(exchange).requests(chosen, channels):
        wire.received(cast(Connection, listener), request.text)
    listener.frames.clear()  # answers and snapshots
    while len(listener.frames) < count:
        for market in markets:
            event = market.step()
            listener.now_ns = event.ns
            wire.publish(market, event)
    return listener.frames[:count]


class _Listener:
    """Stands where the simulator has a client's connection, and keeps what it is told as frames."""

    wrapped, microseconds, sequence = True, False, 0

    def __init__(self, name: str) -> None:
        self.name = name
        self.frames: list[Frame] = []
        self.now_ns = 0

    def send(self, text: str) -> None:
        """Take an answer, which is not kept."""

    def put(self, message: Message) -> None:
        """Take one message."""
        self.frames.append(Frame(FRAME, LIVE, self.name, 1, len(self.frames), self.now_ns, message.text.encode()))


def trades(rows: int, symbols: int = 1, *, seed: int = 1, seconds: int = 86_400) -> pa.Table:
    """Return made trades in K2's schema, by time: `rows` of a walk over `symbols`, within `seconds` from START_NS.

    Ids of a symbol count up by one, offsets by one a row; exchange `binance`, symbols `SYM0-USDT`... (one: `BTC-USDT`).
    """
    draw = np.random.default_rng(seed)
    which = draw.integers(0, symbols, rows)
    ids = np.empty(rows, np.int64)
    cents = np.empty(rows, np.int64)
    for symbol in range(symbols):
        mine = np.flatnonzero(which == symbol)
        ids[mine] = 1_000_000 + np.arange(len(mine))
        cents[mine] = 6_000_000 + 100 * symbol + np.cumsum(draw.integers(-20, 21, len(mine)))
    times = np.sort(draw.integers(0, seconds * 1_000, rows)) * 1_000_000 + START_NS
    names = pa.array(["BTC-USDT"] if symbols == 1 else [f"SYM{i}-USDT" for i in range(symbols)])
    columns = {
        "exchange": _same("binance", rows),
        "symbol": names.take(pa.array(which)),
        "trade_id": pa.array(ids),
        "kind": _same("trade", rows),
        "first_id": pa.array(ids),
        "last_id": pa.array(ids),
        "price": _decimal(np.abs(cents), 2),
        "amount": _decimal(1 + (draw.exponential(20_000, rows)).astype(np.int64), 5),
        "side": pa.array(["buy", "sell"]).take(pa.array(draw.integers(0, 2, rows))),
        "off_market": pa.array(np.zeros(rows, bool)),
        "occurrence": pa.array(np.zeros(rows, np.int64)),
        "exchange_ns": pa.array(times),
        "received_ns": pa.array(times + draw.integers(1_000_000, 40_000_000, rows)),
        "source": _same("live", rows),
        "log_partition": _same("binance", rows),
        "log_offset": pa.array(np.arange(rows)),
        "row_in_frame": pa.array(np.zeros(rows, np.int64)),
        "logged_ns": pa.array(times + 50_000_000),
    }
    told = schema.arrow_schema(schema.TRADES)
    return pa.table([columns[field.name].cast(field.type) for field in told], schema=told)


def _same(value: str, rows: int) -> pa.Array:
    return pa.array([value]).take(pa.array(np.zeros(rows, np.int64)))


def _decimal(units: np.ndarray, decimals: int) -> pa.Array:
    """Return non-negative whole numbers of 10^-decimals as exact decimals: 128 bits, the lower half first."""
    words = np.zeros((len(units), 2), np.int64)
    words[:, 0] = units * 10 ** (12 - decimals)
    return pa.Array.from_buffers(pa.decimal128(38, 12), len(units), [None, pa.py_buffer(words.tobytes())])
