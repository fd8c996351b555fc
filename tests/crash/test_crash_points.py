"""The real processes die at every declared crash point while exchanges trade: nothing lost, nothing doubled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from supervised import MARKET_SPEED, START_NS, Exchanges, Supervised, compare, supervised

from k2.client import connect
from k2.crash import POINTS, PROCESSES, CrashPoint
from k2.simulator.server import Simulator

# One of every stage in the default run; the others are `slow`.
DEFAULT = {
    "log.append.after_commit",
    "hot.insert.between_views",
    "cold.metadata.synced",
    "cold.compact.swapped",
}
LIVE = ("capture", "ingest", "offload", "maintenance")

BUSY = {"binance": ("BTC-USDT",)}
# Their snapshots (Kraken 50 trades, Coinbase 100) reach over the death of a capture at this rate.
SLOW = {"kraken": ("BTC-USD",), "coinbase": ("BTC-USD",)}


def exchanges() -> Exchanges:
    """Return the markets: a busy one, whose capture is spared, and slow ones."""
    common = {"speed": MARKET_SPEED, "start_ns": START_NS}
    return Exchanges(
        Simulator(exchanges=list(BUSY), symbols=BUSY, rate=50 / MARKET_SPEED, **common),  # type: ignore[arg-type]
        Simulator(exchanges=list(SLOW), symbols=SLOW, rate=6 / MARKET_SPEED, **common),  # type: ignore[arg-type]
    )


def sections(markets: Exchanges, **changes: dict[str, object]) -> dict[str, dict[str, object]]:
    """Return the settings: everything happens every second or two."""
    symbols = {**BUSY, **SLOW}
    made: dict[str, dict[str, object]] = {
        "log": {"segment_seconds": 1},
        "capture": {"exchanges": list(symbols), "backoff_first_seconds": 0.1, "backoff_max_seconds": 1.0},
        "hot": {"flush_seconds": 0.3},
        "cold": {"commit_seconds": 0.5, "maintain_seconds": 1.0, "keep_snapshots": 5, "orphan_seconds": 2},
        "api": {"port": 0},
    }
    for section, values in changes.items():
        made[section] = {**made[section], **values}
    for exchange, urls in markets.endpoints().items():
        made[f"exchanges.{exchange}"] = {"symbols": symbols[exchange], **urls}
    return made


@dataclass(frozen=True)
class Running:
    """An installation at work, and what it works on."""

    markets: Exchanges
    processes: Supervised


def parameters(*roles: str) -> list[object]:
    """Return the points of some roles, those not in the default run marked."""
    return [
        pytest.param(point, id=point.label, marks=() if point.label in DEFAULT else pytest.mark.slow)
        for point in POINTS
        if point.role in roles
    ]


def check_equal(running: Running, *, hot_forgets: bool = False) -> None:
    """Close the markets, let everything drain, compare with the account, and open them again."""
    account = running.markets.close_markets()
    with connect(settings=running.processes.settings) as client:
        running.processes.await_drained(client)
        checks = compare(client, account, hot_forgets=hot_forgets)
        gaps, dead = client.gaps().arrow(), client.rows("dead_letters").arrow()
    running.markets.open_markets()

    assert [check for check in checks if not check.passed] == [], running.processes.tails()
    assert sum(market["count"] for market in account["markets"]) > 50
    assert (gaps.num_rows, dead.num_rows) == (0, 0)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One installation for many deaths, compared once more when it was stopped in order."""
    with exchanges() as markets:
        folder = tmp_path_factory.mktemp("live")
        with supervised(folder, sections(markets), spared=["capture-binance"]) as processes:
            processes.start()
            processes.until("all processes run", processes.all_run)
            yield Running(markets, processes)
            account = markets.close_markets()
            processes.stop()
            with connect(settings=processes.settings) as client:
                checks = compare(client, account)
            assert [check for check in checks if not check.passed] == []


@pytest.mark.timeout(300)
@pytest.mark.parametrize("point", parameters(*LIVE))
def test_process_dies_at_a_point_while_data_flows(live: Running, point: CrashPoint) -> None:
    """It dies there, is replaced, the work goes on; then every tier equals the exchanges' own account."""
    hit = live.processes.kill_at(point)
    live.processes.await_work()

    assert hit.child.startswith(PROCESSES[point.role])
    check_equal(live)
