"""Two offloaders at once, one of them asleep for an hour in the middle of a commit: cold holds each row once."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from installation import toml
from processes import Cluster, cluster, ingested
from traded import fill

from k2.cold.iceberg import IcebergCold
from k2.hot import FOLLOW, open_hot
from k2.log.embedded import EmbeddedLog
from k2.run.offload import Offloader
from k2.run.state import IngestState
from k2.settings import Settings

COUNT = 6_000
HOUR_NS = 3_600 * 10**9 + 10**9
DEADLINE_SECONDS = 120.0


@pytest.mark.timeout(300)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("meanwhile", "commits"),
    # With fewer than two files nothing is compacted: no commit but that of the cleaning comes between.
    [("all is moved", 1), ("all is moved", 3), ("all is moved", 5), ("cold is cleaned", 0), ("cold is cleaned", 1)],
)
async def test_offloader_that_wakes_an_hour_later_commits_nothing_twice(
    tmp_path: Path, meanwhile: str, commits: int
) -> None:
    """Stopped in a commit, its locks taken away, the world two hours on, then woken: refused, and each row once."""
    log = EmbeddedLog(tmp_path / "data/log", segment_bytes=50_000)
    fill(log, COUNT)
    log.close()
    sections = {
        "cold": {"commit_seconds": 0.0, "commit_rows": 300, "grace_seconds": 60},
        "hot": {"retention_seconds": 600},
        "log": {"retention_seconds": 600},
    }
    with cluster(tmp_path, toml(sections)) as running:
        running.start("ingest", "ingest")  # owns hot, so that both offloaders can read it
        await running.until("all is in hot", lambda: ingested(running.settings) == COUNT)
        await asyncio.to_thread(check_sleeper, running, tmp_path, commits, meanwhile)


def check_sleeper(running: Cluster, folder: Path, commits: int, meanwhile: str) -> None:
    installation = running.installation
    sleeper = installation.start("offload", "--drain", log=folder / "sleeper.log")
    data_file = stop_in_a_commit(sleeper, installation.folder, commits)
    refused = installation.run("offload", "--drain")
    for lock in ("run/offload.lock", "cold/writer.lock"):
        (installation.folder / lock).unlink()  # what an operator does who takes the sleeper for dead
    if meanwhile == "all is moved":
        assert 0 < installation.k2("offload", "--drain", "--json").json()["trades"] < COUNT
    for hours in (1, 2):
        live_through(running.settings, time.time_ns() + hours * HOUR_NS, all_of_it=meanwhile == "all is moved")
    assert not data_file.exists()  # what the sleeper had written is gone
    sleeper.send_signal(signal.SIGCONT)
    code = sleeper.wait(DEADLINE_SECONDS)
    said = (folder / "sleeper.log").read_text()

    assert refused.code == 75
    assert "is already done by" in refused.err
    if meanwhile == "all is moved":
        assert (code, "nothing was committed" in said or "does not start where" in said) == (64, True), said
    else:
        assert code == 0, said  # refused, it has begun again, with files that are there
    ids = installation.query(folder / "cold.arrow", "query", "trades", "BTC-USDT", "--tier", "cold", "--limit", "0")
    assert ids["trade_id"].to_pylist() == list(range(1, COUNT + 1))
    raw = installation.query(
        folder / "raw.arrow", "sql", "SELECT log_offset FROM frames ORDER BY 1", "--tier", "cold", "--limit", "50000"
    )
    assert raw["log_offset"].to_pylist() == list(range(COUNT))


def live_through(settings: Settings, now_ns: int, *, all_of_it: bool) -> None:
    """Do what an offloader does at a time to come: maintenance of cold; retention of hot and log, too."""
    with ExitStack() as closing:
        cold = closing.enter_context(contextlib.closing(IcebergCold(settings, clock=lambda: now_ns)))
        cold.acquire_lease()
        if all_of_it:
            log = EmbeddedLog(settings.data_path / "log", clock=lambda: now_ns)
            closing.callback(log.close)
            state = closing.enter_context(contextlib.closing(IngestState(settings.data_path / "state.db")))
            hot = closing.enter_context(contextlib.closing(open_hot(settings, FOLLOW)))
            done = Offloader(settings, log, hot, cold, progress=state.progress, clock=lambda: now_ns).run_once(True)
            assert not done.rows.get("trades")
            assert hot.counts("trades", {}, {"binance": COUNT}) == 0
        cold.maintain(now_ns=now_ns)


def stop_in_a_commit(process: subprocess.Popen[bytes], data: Path, commits: int) -> Path:
    """Stop a process when all files of a commit of trades are written, but none that makes it one, after so many.

    Returns its data file.
    """
    table = data / "cold/warehouse/k2/trades"
    deadline = time.monotonic() + DEADLINE_SECONDS
    while True:
        assert process.poll() is None, "it ended before it could be stopped"
        assert time.monotonic() < deadline
        if len(list(table.rglob("*.parquet"))) > commits:
            process.send_signal(signal.SIGSTOP)
            if in_a_commit(table):
                return max(table.rglob("*.parquet"), key=lambda file: file.stat().st_mtime_ns)
            process.send_signal(signal.SIGCONT)
        time.sleep(0.001)


def in_a_commit(table: Path) -> bool:
    """Return whether the manifest list of a snapshot is newer than every metadata file."""
    lists = max((file.stat().st_mtime_ns for file in table.rglob("snap-*.avro")), default=0)
    made = max((file.stat().st_mtime_ns for file in table.rglob("*.metadata.json")), default=0)
    return lists > made
