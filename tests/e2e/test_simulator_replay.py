"""The WebSocket recordings once more, as a live exchange: simulator at full speed -> `k2 capture` -> ... -> query."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from plain_reader import FILES, QuoteRow, Row, quotes, trades
from processes import Appended, Cluster, cluster, reading

from k2.feeds import recordings as recorded
from k2.feeds import registry
from k2.model import Frame
from k2.simulator.server import MAX_SPEED, Simulator

pytestmark = pytest.mark.timeout(300)

SOCKET_FILES = {exchange: [file for file in files if "/rest/" not in file] for exchange, files in FILES.items()}


def frames(folder: Path, exchange: str) -> Iterator[Frame]:
    """Yield the frames of all recordings of an exchange, one file after the other."""
    for file in SOCKET_FILES[exchange]:
        for line in recorded.read(folder / file, registry.get(exchange)):
            if line.frame is not None:
                yield line.frame


def expected_trades(folder: Path, exchange: str) -> Counter[Row]:
    """Return the trades of the files; times of receipt are not the recorder's this time."""
    rows = (row for file in SOCKET_FILES[exchange] for row in trades(folder, exchange, file))
    return Counter(row._replace(received_ns=0) for row in rows)


def expected_quotes(folder: Path, exchange: str) -> Counter[QuoteRow]:
    """Return the best bids and asks of the files."""
    rows = (row for file in SOCKET_FILES[exchange] for row in quotes(folder, exchange, file))
    return Counter(row._replace(received_ns=0) for row in rows)


async def test_recordings_played_at_full_speed(recordings: Path, tmp_path: Path) -> None:
    """Four exchanges at once: each trade and quote of each recording comes out once, from every tier."""
    told = {exchange: expected_trades(recordings, exchange) for exchange in FILES}
    told_quotes = {exchange: expected_quotes(recordings, exchange) for exchange in FILES}
    played = {exchange: frames(recordings, exchange) for exchange in FILES}
    async with Simulator(exchanges=(), recordings=played, speed=MAX_SPEED) as simulator:
        with cluster(tmp_path, "") as running:
            _choose(running, simulator, told, told_quotes)
            for exchange in FILES:
                running.start(f"capture-{exchange}", "capture", exchange)
            await _everything_in_the_log(running, simulator, told, told_quotes)
            for runner in running.runners.values():
                await asyncio.to_thread(runner.stop)
            running.runners.clear()
            await asyncio.to_thread(running.installation.k2, "ingest", "--drain")
            await asyncio.to_thread(running.installation.k2, "offload", "--drain")

            _assert_all_there(running, told, told_quotes)


def _choose(
    running: Cluster,
    simulator: Simulator,
    told: dict[str, Counter[Row]],
    told_quotes: dict[str, Counter[QuoteRow]],
) -> None:
    """Set addresses and symbols by the environment: every symbol a recording tells of."""
    for exchange, endpoints in simulator.endpoints().items():
        prefix = f"K2_EXCHANGES_{exchange.upper().replace('-', '_')}"
        symbols = {row.symbol for row in told[exchange]} | {row.symbol for row in told_quotes[exchange]}
        running.installation.environment |= {
            f"{prefix}_URL": endpoints["url"],
            f"{prefix}_SYMBOLS": ",".join(sorted(symbols)),
            f"{prefix}_CHANNELS": "trades,quotes",
        }


async def _everything_in_the_log(
    running: Cluster,
    simulator: Simulator,
    told: dict[str, Counter[Row]],
    told_quotes: dict[str, Counter[QuoteRow]],
) -> None:
    """Wait until the recordings are played, and what was sent is appended."""
    playing = asyncio.create_task(simulator.played())
    await running.until("the recordings are played", playing.done, seconds=150)
    with reading(running.settings) as log:
        for exchange in FILES:
            found = Appended(log, exchange)
            wanted = (told[exchange].total(), told_quotes[exchange].total())
            await running.until(
                f"{wanted} trades and quotes of {exchange} are in the log",
                lambda f=found, w=wanted: (len(f.look()), f.quotes) >= w,
                seconds=30,
            )
            assert (len(found.trades), found.quotes) == wanted


def _assert_all_there(
    running: Cluster, told: dict[str, Counter[Row]], told_quotes: dict[str, Counter[QuoteRow]]
) -> None:
    with running.installation.client() as client:
        for tier in ("hot", "cold", "all"):
            for exchange in FILES:
                rows = client.trades(exchange=exchange, tier=tier, limit=0).arrow()
                columns = [rows[name].to_pylist() for name in Row._fields[:-1]]
                found = Counter(Row(*values, 0) for values in zip(*columns, strict=True))
                assert found == told[exchange], (exchange, tier, running.settings.data_path)
                assert set(rows["source"].to_pylist()) == {"live"}

                best = client.quotes(exchange=exchange, tier=tier, limit=0).arrow()
                columns = [best[name].to_pylist() for name in QuoteRow._fields[:-1]]
                assert Counter(QuoteRow(*values, 0) for values in zip(*columns, strict=True)) == told_quotes[exchange]
        assert client.gaps(limit=0).arrow().num_rows == 0
        assert client.rows("dead_letters", limit=0).arrow().num_rows == 0
