"""kill -9 at random moments while data flows: nothing is lost, nothing is there twice, candles are exact."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from installation import toml
from processes import Cluster, cluster, ingested, logged, reading

from k2.client import Client, connect
from k2.cold import open_cold
from k2.run.reconcile import check_candles, reconcile
from k2.schema import TIMEFRAMES
from k2.settings import Settings
from k2.simulator.server import DEFAULT_SYMBOLS, Simulator

KILLS = 20
START_NS = 1_709_250_000 * 10**9  # 2024-02-29T23:40:00Z: the run crosses midnight and the end of a month
MARKET_SPEED = 60.0  # a minute of the markets in a second of ours: many candles, all of them closed
TIERS = ("hot", "cold", "all")


def settings_of(simulator: Simulator, exchanges: tuple[str, ...] = tuple(DEFAULT_SYMBOLS)) -> str:
    """Return the text of k2.toml: small flushes and commits, so that many kills hit one."""
    endpoints = simulator.endpoints()
    return toml(
        {
            "hot": {"flush_seconds": 0.3},
            "cold": {"commit_seconds": 1.0},
            "capture": {"backoff_first_seconds": 0.1, "backoff_max_seconds": 1.0},
            **{f"exchanges.{e}": {"symbols": DEFAULT_SYMBOLS[e], **endpoints[e]} for e in exchanges},
        }
    )


def watermark(settings: Settings) -> Callable[[], int]:
    """Return a function that tells how many offsets the cold trades are up to, over all partitions."""
    cold = open_cold(settings)
    return lambda: sum(cold.pin("trades").watermark.values())


@pytest.mark.timeout(400)
@pytest.mark.parametrize("seed", [1])
async def test_ingest_and_offload_killed_at_random(tmp_path: Path, seed: int) -> None:
    """Twenty kills of ingest (owner of the hot tier) and offload while four exchanges are captured."""
    draw = random.Random(seed)
    async with Simulator(
        symbols=DEFAULT_SYMBOLS, seed=seed, rate=0.5, speed=MARKET_SPEED, start_ns=START_NS
    ) as simulator:
        with cluster(tmp_path, settings_of(simulator)) as running:
            captures = [running.start(f"capture-{exchange}", "capture", exchange) for exchange in DEFAULT_SYMBOLS]
            await _listened_to(running, simulator)
            await _kill_at_random(running, draw)
            settled = await simulator.close_markets(30)
            account = simulator.account().describe()
            await asyncio.gather(*(asyncio.to_thread(capture.stop) for capture in captures))
            running.runners.clear()
            await asyncio.to_thread(running.installation.k2, "ingest", "--drain")
            await asyncio.to_thread(running.installation.k2, "offload", "--drain")

            assert settled, "a capture has not read all it was told"
            _assert_equal_to_account(running.settings, account)


async def _listened_to(running: Cluster, simulator: Simulator) -> None:
    """Wait until every market was told to somebody, so that the first trades are in the log."""
    tallies = [tally for tally in simulator.account() if tally.kind == "trade"]
    await running.until("all captures subscribed", lambda: all(tally.announced.count() for tally in tallies))


async def _kill_at_random(running: Cluster, draw: random.Random) -> None:
    """Kill one of the two again and again; at the end both are dead.

    Every other kill waits until its victim has finished something since its last start, so that the work
    goes on; all wait for a random number of further records, which is a random moment for the victim.
    """
    settings = running.settings
    roles = {role: running.start(role, role) for role in ("ingest", "offload")}
    await running.until("ingest finished a flush", lambda: ingested(settings) > 0)
    progress = {"ingest": lambda: ingested(settings), "offload": watermark(settings)}
    since = dict.fromkeys(roles, 0)
    victims = [role for role in roles for _ in range(KILLS // 2)]
    draw.shuffle(victims)
    with reading(settings) as log:
        for number, role in enumerate(victims):
            if number % 2 == 0:
                await running.until(f"{role} moved on", lambda r=role: progress[r]() > since[r])
            target = logged(log) + draw.randrange(400)
            await running.until("data flows", lambda t=target: logged(log) >= t)
            roles[role].kill()
            since[role] = progress[role]()
            roles[role].start()
    for runner in roles.values():
        runner.kill()


def _assert_equal_to_account(settings: Settings, account: dict[str, Any]) -> None:
    with connect(settings=settings) as client:
        checks = reconcile(account, _rows(client), _candles(client, "all"))
        for tier in ("hot", "cold"):
            candles = _candles(client, tier)
            checks += [
                check_candles(market, timeframe, candles(market["exchange"], market["symbol"], timeframe, "trade"))
                for market in account["markets"]
                if market["count"]
                for timeframe in TIMEFRAMES
            ]
        gaps = client.gaps().arrow()
        dead = client.rows("dead_letters").arrow()
    markets = [market for market in account["markets"] if market["count"]]

    assert [check for check in checks if not check.passed] == [], settings.data_path
    assert len(markets) == 8
    # Per market: three tiers of rows, and six timeframes in the union, in hot and in cold.
    assert len(checks) == len(markets) * (3 + 3 * len(TIMEFRAMES))
    assert sum(market["count"] for market in markets) > 3_000
    assert (gaps.num_rows, dead.num_rows) == (0, 0)


def _rows(client: Client) -> Callable[[str, str, str], pa.Table]:
    return lambda exchange, symbol, tier: client.trades(symbol, exchange=exchange, tier=tier, limit=0).arrow()


def _candles(client: Client, tier: str) -> Callable[[str, str, str, str], pa.Table]:
    def candles(exchange: str, symbol: str, timeframe: str, kind: str) -> pa.Table:
        return client.candles(symbol, timeframe, exchange=exchange, kind=kind, tier=tier, limit=0).arrow()

    return candles
