"""kill -9 of capture, again and again: what was appended is kept once, what was never received is told."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from installation import toml
from processes import Appended, Cluster, Runner, cluster, reading

from k2.client import Client, connect
from k2.log import Log
from k2.simulator.server import DEFAULT_SYMBOLS, Simulator

ROUNDS = 4
EXCHANGES = ("binance", "kraken", "coinbase")
# Kraken's snapshot tells the last 50 trades, Coinbase's 100: at this rate they reach over any restart.
EVENTS_A_SECOND = 6.0


@pytest.mark.timeout(300)
async def test_capture_killed_again_and_again(tmp_path: Path) -> None:
    """Twelve kills of three captures; afterwards log, rows and gaps agree to the last id."""
    async with Simulator(exchanges=EXCHANGES, symbols=DEFAULT_SYMBOLS, seed=3, rate=EVENTS_A_SECOND) as simulator:
        endpoints = simulator.endpoints()
        sections = {f"exchanges.{e}": {"symbols": DEFAULT_SYMBOLS[e], **endpoints[e]} for e in EXCHANGES}
        with cluster(tmp_path, toml(sections)) as running, reading(running.settings) as log:
            captures = {exchange: running.start(f"capture-{exchange}", "capture", exchange) for exchange in EXCHANGES}
            appended = {exchange: Appended(log, exchange) for exchange in EXCHANGES}
            await _kill_in_rounds(running, log, captures, appended)
            await _end(running, simulator, captures, appended)
            account = simulator.account().describe()
            await asyncio.to_thread(running.installation.k2, "ingest", "--drain")
            await asyncio.to_thread(running.installation.k2, "offload", "--drain")
            with connect(settings=running.settings) as client:
                for market in account["markets"]:
                    if market["count"] and market["kind"] == "trade":
                        _check_market(client, market, appended[market["exchange"]])


async def _kill_in_rounds(
    running: Cluster, log: Log, captures: dict[str, Runner], appended: dict[str, Appended]
) -> None:
    """Kill each capture some trades after it came back, at a random moment."""
    draw = random.Random(7)
    for _ in range(ROUNDS):
        for exchange, capture in captures.items():
            trades = appended[exchange]
            wanted = {symbol: trades.last(symbol) + draw.randint(1, 12) for symbol in DEFAULT_SYMBOLS[exchange]}
            await running.until(
                f"{exchange} is captured again", lambda t=trades, w=wanted: all(t.last(s) >= i for s, i in w.items())
            )
            before, end = list(trades.look()), log.end_offset(exchange)
            capture.kill()
            # A reader that begins anew finds what was there before the kill, in a log that has not become shorter.
            assert log.end_offset(exchange) >= end
            assert Appended(log, exchange).look()[: len(before)] == before
            capture.start()


async def _end(
    running: Cluster, simulator: Simulator, captures: dict[str, Runner], appended: dict[str, Appended]
) -> None:
    """Let every capture come back once more, end trading, wait until all that was told is in the log, and stop."""
    for exchange, trades in appended.items():
        told = {symbol: trades.last(symbol) for symbol in DEFAULT_SYMBOLS[exchange]}
        await running.until(
            f"{exchange} is captured at the end", lambda t=trades, w=told: all(t.last(s) > i for s, i in w.items())
        )
    await simulator.close_markets(0)
    for tally in simulator.account():
        if tally.kind == "trade":
            trades, symbol = appended[tally.instrument.exchange], tally.instrument.symbol
            last = max(last for _, last in tally.announced)
            await running.until(f"{symbol} {last} is in the log", lambda t=trades, s=symbol, i=last: t.last(s) >= i)
    for capture in captures.values():
        await asyncio.to_thread(capture.stop)
    for trades in appended.values():
        trades.look()


def _check_market(client: Client, market: dict[str, Any], appended: Appended) -> None:
    exchange, symbol = market["exchange"], market["symbol"]
    where = f"{exchange} {symbol}"
    in_log = {t.trade_id: t for t in appended.trades if t.symbol == symbol}
    repeats = len(appended.ids(symbol)) - len(in_log)
    for tier in ("hot", "cold", "all"):
        rows = client.trades(symbol, exchange=exchange, tier=tier, limit=0).arrow().to_pylist()
        counted = Counter(row["trade_id"] for row in rows)

        assert set(counted) == set(in_log), (where, tier)
        assert set(counted.values()) == {1}, (where, tier)
        for row in rows:
            trade = in_log[row["trade_id"]]
            told = (Decimal(trade.price), Decimal(trade.amount), trade.side, trade.exchange_ns)
            assert tuple(row[name] for name in ("price", "amount", "side", "exchange_ns")) == told

    missing = set(range(min(in_log), max(in_log) + 1)) - set(in_log)
    gaps = client.gaps(symbol, exchange=exchange, limit=0).arrow().to_pylist()
    opened, filled = _ids(gaps, "open"), _ids(gaps, "filled")
    assert opened - filled == missing, where
    assert {gap["cause"] for gap in gaps} <= {"reconnect"}, where
    if exchange == "binance":  # sends no snapshot: what was traded while capture was dead is not known
        assert missing, where
        assert repeats == 0, where
    else:
        assert not missing, where
        assert repeats > 0, where


def _ids(gaps: list[dict[str, Any]], status: str) -> set[int]:
    chosen = [gap for gap in gaps if gap["status"] == status]
    assert all(gap["missing"] == gap["last_id"] - gap["first_id"] + 1 for gap in chosen)
    return {number for gap in chosen for number in range(gap["first_id"], gap["last_id"] + 1)}
