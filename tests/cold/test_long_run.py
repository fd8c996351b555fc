"""Thousands of commits, the clock turned on by hand: nothing that a commit or a query must read grows with them."""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pytest
from cold_rows import DAY, T0, rows_of

from k2.cold.iceberg import IcebergCold
from k2.cold.metadata import table_properties
from k2.model import Selection
from k2.settings import ColdSettings, Settings

EXCHANGES = ("binance", "kraken")
MANIFESTS = int(table_properties(1)["commit.manifest.min-count-to-merge"]) + 2  # and what the newest commits add
ROWS = 2  # per exchange and commit


@dataclass
class Quarter:
    """The largest of each figure at the maintenances of a quarter of the run; times are for the report only."""

    metadata_bytes: int = 0
    snapshots: int = 0
    manifests: int = 0
    files_today: int = 0
    files_a_closed_day: int = 0
    files_beside_data: int = 0
    commit_ms: list[float] = field(default_factory=list)
    plan_ms: list[float] = field(default_factory=list)

    def see(self, **figures: int) -> None:
        for name, value in figures.items():
            setattr(self, name, max(getattr(self, name), value))


@pytest.mark.parametrize(
    ("commits", "seconds", "settings"),
    [
        # Time-compressed once more: a commit every twenty minutes, so that grace and expiry turn over several times.
        pytest.param(120, 1200, ColdSettings(keep_snapshots=12), id="120"),
        pytest.param(400, 86_400, ColdSettings(keep_snapshots=12), id="400 days", marks=pytest.mark.slow),
        pytest.param(10_000, 60, ColdSettings(), id="10000", marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
    ],
)
def test_nothing_grows_with_the_number_of_commits(
    tmp_path: Path, commits: int, seconds: int, settings: ColdSettings
) -> None:
    """Metadata, manifests, files and snapshots of the last quarter are no more than of the first; no row is lost."""
    began_ns = time.time_ns() + DAY
    now_ns = began_ns
    cold = IcebergCold(Settings(data=str(tmp_path), cold=settings), clock=lambda: now_ns)
    every = max(1, round(settings.maintain_seconds / seconds)) if commits > 1000 else 10
    quarters = [Quarter() for _ in range(4)]
    pinned = None
    for n in range(commits):
        now_ns = began_ns + n * seconds * 10**9
        quarter = quarters[n * 4 // commits]
        begun = time.perf_counter()
        append(cold, n, n * seconds // 86_400)
        quarter.commit_ms.append((time.perf_counter() - begun) * 1e3)
        if n % every == every - 1:
            cold.maintain(now_ns=now_ns)
            look(cold, quarter, n * seconds // 86_400)
            if pinned is not None:  # a reader of ten commits ago, well within the grace
                assert cold.read(pinned, Selection(table="trades", limit=10)).num_rows == 10
            pinned = cold.pin("trades")
    report(commits, quarters)

    first, last = quarters[0], quarters[-1]
    for name in ("metadata_bytes", "snapshots", "files_today", "files_a_closed_day", "files_beside_data"):
        assert getattr(last, name) <= getattr(first, name) * 1.05 + 2, name
    assert max(quarter.manifests for quarter in quarters) <= MANIFESTS  # one a closed day, until they are merged
    assert last.files_a_closed_day == len(EXCHANGES)
    assert last.snapshots <= settings.keep_snapshots * 1.25 + 1
    total = cold.sql("SELECT count(*), count(DISTINCT (exchange, log_offset)) FROM trades", timeout_seconds=60, limit=0)
    assert [c[0].as_py() for c in total.columns] == [commits * len(EXCHANGES) * ROWS] * 2
    cold.close()


def append(cold: IcebergCold, n: int, day: int) -> None:
    """Commit some rows of each exchange."""
    start, end = dict.fromkeys(EXCHANGES, n * ROWS), dict.fromkeys(EXCHANGES, (n + 1) * ROWS)
    parts = [rows_of("trades", n * ROWS, (n + 1) * ROWS, day=day, exchange=e) for e in EXCHANGES]
    cold.append("trades", pa.concat_tables(parts), start=start, end=end)


def look(cold: IcebergCold, quarter: Quarter, day: int) -> None:
    """Note what a commit and a query now have to read."""
    loaded = cold.catalog.load("trades")
    assert loaded is not None
    snapshot = loaded.current_snapshot()
    assert snapshot is not None
    begun = time.perf_counter()
    tasks = list(loaded.scan().plan_files())
    quarter.plan_ms.append((time.perf_counter() - begun) * 1e3)
    today = T0 // DAY + day
    days = [task.file.partition[0] for task in tasks]
    folder = cold.catalog.warehouse / "k2" / "trades"
    quarter.see(
        metadata_bytes=Path(loaded.metadata_location).stat().st_size,
        snapshots=len(loaded.metadata.snapshots),
        manifests=len(snapshot.manifests(loaded.io)),
        files_today=days.count(today),
        files_a_closed_day=max((days.count(d) for d in set(days) - {today}), default=0),
        files_beside_data=sum(1 for path in folder.rglob("*") if path.is_file()) - len(tasks),
    )


def report(commits: int, quarters: list[Quarter]) -> None:
    """Print the figures (pytest -s shows them)."""
    for number, q in enumerate(quarters, start=1):
        figures = {k: v for k, v in vars(q).items() if not k.endswith("_ms")}
        times = f"commit p50 {statistics.median(q.commit_ms):.0f} ms, plan p50 {statistics.median(q.plan_ms):.0f} ms"
        sys.stdout.write(f"{commits} commits, quarter {number}: {times}, {figures}\n")
