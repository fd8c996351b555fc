"""Two offloaders at once, one of them asleep in the middle of a commit: cold holds each row once."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from installation import Installation, toml
from processes import cluster, ingested
from traded import fill

from k2.log.embedded import EmbeddedLog

COUNT = 6_000
DEADLINE_SECONDS = 120.0


@pytest.mark.timeout(300)
@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_offloader_that_wakes_up_later_commits_nothing_twice(tmp_path: Path, seed: int) -> None:
    """Stopped in a commit, its locks taken away, the rest moved by another, then woken: refused, and each row once."""
    draw = random.Random(seed)
    log = EmbeddedLog(tmp_path / "data/log")
    fill(log, COUNT)
    log.close()
    with cluster(tmp_path, toml({"cold": {"commit_seconds": 0.0, "commit_rows": 300}})) as running:
        running.start("ingest", "ingest")  # owns hot, so that both offloaders can read it
        await running.until("all is in hot", lambda: ingested(running.settings) == COUNT)
        await asyncio.to_thread(check_two_offloaders, running.installation, tmp_path, draw)


def check_two_offloaders(installation: Installation, folder: Path, draw: random.Random) -> None:
    sleeper = installation.start("offload", "--drain", log=folder / "sleeper.log")
    stop_in_a_commit(sleeper, installation.folder, commits=draw.randrange(1, 6))
    refused = installation.run("offload", "--drain")
    for lock in ("run/offload.lock", "cold/writer.lock"):
        (installation.folder / lock).unlink()  # what an operator does who takes the sleeper for dead
    moved = installation.k2("offload", "--drain", "--json").json()
    sleeper.send_signal(signal.SIGCONT)
    code = sleeper.wait(DEADLINE_SECONDS)

    assert refused.code == 75
    assert "is already done by" in refused.err
    assert 0 < moved["trades"] < COUNT
    said = (folder / "sleeper.log").read_text()
    assert (code, "nothing was committed" in said or "does not start where" in said) == (64, True), said
    ids = installation.query(folder / "cold.arrow", "query", "trades", "BTC-USDT", "--tier", "cold", "--limit", "0")
    assert ids["trade_id"].to_pylist() == list(range(1, COUNT + 1))
    raw = installation.query(
        folder / "raw.arrow", "sql", "SELECT log_offset FROM frames ORDER BY 1", "--tier", "cold", "--limit", "50000"
    )
    assert raw["log_offset"].to_pylist() == list(range(COUNT))


def stop_in_a_commit(process: subprocess.Popen[bytes], data: Path, commits: int) -> None:
    """Stop a process when it has written a data file of trades that no commit refers to yet, after so many commits."""
    table = data / "cold/warehouse/k2/trades"
    deadline = time.monotonic() + DEADLINE_SECONDS
    while True:
        assert process.poll() is None, "it ended before it could be stopped"
        assert time.monotonic() < deadline
        if len(list(table.rglob("*.parquet"))) > commits:
            process.send_signal(signal.SIGSTOP)
            if in_a_commit(table):
                return
            process.send_signal(signal.SIGCONT)
        time.sleep(0.001)


def in_a_commit(table: Path) -> bool:
    """Return whether a data file is newer than every metadata file."""
    data = max((file.stat().st_mtime_ns for file in table.rglob("*.parquet")), default=0)
    made = max((file.stat().st_mtime_ns for file in table.rglob("*.metadata.json")), default=0)
    return data > made
