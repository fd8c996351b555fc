"""Expiry is by number, readers need time: what was let go of stays readable for the stated grace, and no longer."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest
from cold_rows import DAY, digest, rows_of

import k2
from k2.cold.commit import AssertCommit, commit
from k2.cold.iceberg import IcebergCold
from k2.cold.reader import extension_file
from k2.cold.rows import arranged
from k2.errors import NotSuccessor, UnknownName
from k2.model import Selection
from k2.schema import TABLES
from k2.settings import ColdSettings, Settings

GRACE = 3_600
ALL = Selection(table="trades")
LATER = time.time_ns() + DAY  # every file is a day old


class Clock:
    """A clock that is set by hand, beginning far after every file's own time."""

    def __init__(self) -> None:
        self.now_ns = LATER

    def __call__(self) -> int:
        return self.now_ns

    def advance(self, seconds: float) -> None:
        self.now_ns += int(seconds * 1e9)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def cold(tmp_path: Path, clock: Clock) -> Iterator[IcebergCold]:
    """A cold tier that keeps four snapshots."""
    made = IcebergCold(configured(tmp_path), clock=clock)
    yield made
    made.close()


def configured(data: Path, **cold: Any) -> Settings:
    return Settings(data=str(data), cold=ColdSettings(**{"keep_snapshots": 4, "grace_seconds": GRACE, **cold}))


def fill(cold: IcebergCold, first: int, commits: int) -> None:
    """Commit five trades each."""
    for n in range(first, first + commits):
        rows = rows_of("trades", n * 5, n * 5 + 5)
        cold.append("trades", rows, start={"binance": n * 5}, end={"binance": n * 5 + 5})


def duck(location: str) -> tuple[int, int]:
    """What a DuckDB of its own sees at a metadata file: rows and the sum of their offsets."""
    engine = duckdb.connect(config={"autoinstall_known_extensions": False})
    for name in ("avro", "iceberg"):
        engine.execute(f"LOAD '{extension_file(name)}'")
    found = engine.execute(f"SELECT count(*), sum(log_offset) FROM iceberg_scan('{location}')").fetchone()
    engine.close()
    assert found is not None
    return found


def test_a_pinned_state_is_readable_for_the_grace_whatever_is_committed(cold: IcebergCold, clock: Clock) -> None:
    """Thirty commits, compactions, expiries later a foreign DuckDB, and ours, still read the pinned metadata file."""
    fill(cold, 0, 3)
    pin = cold.pin("trades")
    before = digest([cold.read(pin, ALL)])
    for n in range(3):
        fill(cold, 3 + 10 * n, 10)
        cold.maintain(now_ns=clock())
        clock.advance(GRACE / 3 - 1)
    cold.maintain(now_ns=clock())

    assert pin.snapshot_id not in {s.snapshot_id for s in cold.snapshots("trades")}
    assert duck(pin.location) == (15, sum(range(15)))
    assert digest([cold.read(pin, ALL)]) == before
    assert digest([cold.read(cold.pin("trades", snapshot_id=pin.snapshot_id), ALL)]) == before


def test_after_the_grace_the_files_are_gone_and_the_error_says_what_happened(cold: IcebergCold, clock: Clock) -> None:
    """When it expired, how long the grace was, and which setting makes it longer."""
    fill(cold, 0, 3)
    pin = cold.pin("trades")
    fill(cold, 3, 20)
    cold.maintain(now_ns=clock())
    clock.advance(GRACE - 1)
    assert sum(m.orphans_removed for m in cold.maintain(now_ns=clock())) == 0
    clock.advance(2)
    removed = sum(m.orphans_removed for m in cold.maintain(now_ns=clock()))

    assert removed > 20
    assert not Path(pin.location).exists()
    message = r"expired at \d{4}-\d\d-\d\d .* its grace of 3600 s is over.*cold\.keep_snapshots or cold\.grace_seconds"
    for ask in (lambda: cold.read(pin, ALL), lambda: cold.pin("trades", snapshot_id=pin.snapshot_id)):
        with pytest.raises(UnknownName, match=message):
            ask()
    assert cold.read(cold.pin("trades"), ALL).num_rows == 115


def test_a_reader_whose_files_go_meanwhile_is_told_why(cold: IcebergCold, clock: Clock) -> None:
    """The metadata file was opened in time, the data files were not: it is not the disk's fault."""
    fill(cold, 0, 2)
    pin = cold.pin("trades")
    loaded = cold.catalog.load("trades")
    assert loaded is not None
    paths = [Path(task.file.file_path) for task in loaded.scan().plan_files()]
    fill(cold, 2, 10)
    clock.advance(GRACE + 1)
    for path in paths:
        path.unlink()

    with pytest.raises(UnknownName, match="its grace of 3600 s is over"):
        cold.read(pin, ALL)


def test_as_of_an_expired_snapshot_answers_within_the_grace(tmp_path: Path) -> None:
    """The client, asked again as of an id it was given, gives the same rows; after the grace it says so."""
    cold = IcebergCold(configured(tmp_path))
    fill(cold, 0, 2)
    snapshot_id = cold.pin("trades").snapshot_id
    fill(cold, 2, 12)
    cold.maintain(now_ns=LATER)
    cold.close()
    with k2.connect(settings=configured(tmp_path)) as client:
        found = client.rows("trades", as_of=snapshot_id, limit=0).arrow()

    assert sorted(found["log_offset"].to_pylist()) == list(range(10))
    with (
        k2.connect(settings=configured(tmp_path, grace_seconds=0)) as client,
        pytest.raises(UnknownName, match=f"snapshot {snapshot_id} .* expired at"),
    ):
        client.rows("trades", as_of=snapshot_id, limit=0)


def test_commits_alone_keep_the_number_of_snapshots_bounded(cold: IcebergCold) -> None:
    """A drain of any length never runs maintenance, and its commits must not slow down for it."""
    seen = set()
    for n in range(15):
        fill(cold, n, 1)
        seen.add(len(cold.snapshots("trades")))

    assert max(seen) == 5  # four, and a quarter
    assert cold.read(cold.pin("trades"), ALL).num_rows == 75


def test_a_snapshot_somebody_tagged_stays(cold: IcebergCold) -> None:
    """A tag made with any Iceberg tool is a wish to keep that state."""
    fill(cold, 0, 2)
    tagged = cold.pin("trades").snapshot_id
    loaded = cold.catalog.load("trades")
    assert loaded is not None
    assert tagged is not None
    loaded.manage_snapshots().create_tag(tagged, "audit").commit()
    fill(cold, 2, 12)
    cold.maintain(now_ns=LATER)

    assert tagged in {s.snapshot_id for s in cold.snapshots("trades")}
    assert len(cold.snapshots("trades")) == 4
    assert cold.read(cold.pin("trades", snapshot_id=tagged), ALL).num_rows == 10


def test_two_processes_that_expire_the_same_snapshots_do_not_break_a_commit(cold: IcebergCold, tmp_path: Path) -> None:
    """`k2 maintain` between load and commit makes the append fail whole; the offloader then makes it again."""
    fill(cold, 0, 4)
    other = IcebergCold(configured(tmp_path, keep_snapshots=1))
    stale = cold.catalog.load("trades")
    assert stale is not None
    expiring = tuple(s.snapshot_id for s in stale.snapshots()[:2])
    other.maintain(now_ns=LATER)
    other.close()
    rows = arranged(rows_of("trades", 20, 25), TABLES["trades"])
    with pytest.raises(NotSuccessor, match="expired meanwhile"):
        commit(stale, TABLES["trades"], rows, AssertCommit(commit=4, expiring=expiring), {}, {})
    fill(cold, 4, 1)
    assert cold.read(cold.pin("trades"), ALL).num_rows == 25


def test_a_commit_begun_before_files_were_removed_is_refused(cold: IcebergCold, clock: Clock) -> None:
    """It may have written one of them, however old they were: its process can have been stopped for hours."""
    fill(cold, 0, 1)
    stale = cold.catalog.load("trades")
    assert stale is not None
    guard = AssertCommit.as_loaded(stale)
    orphan = cold.folder / "warehouse/k2/trades/data/written-by-a-sleeper.parquet"
    orphan.write_bytes(b"")
    cold.maintain(now_ns=clock())
    assert orphan.exists()
    clock.advance(GRACE)
    cold.maintain(now_ns=clock())
    rows = arranged(rows_of("trades", 5, 10), TABLES["trades"])

    assert not orphan.exists()
    with pytest.raises(NotSuccessor, match="unreferenced files were removed meanwhile"):
        commit(stale, TABLES["trades"], rows, guard, {}, {})
    fill(cold, 1, 1)
    assert cold.read(cold.pin("trades"), ALL).num_rows == 10


def test_a_file_seen_before_its_commit_has_its_grace_afterwards(cold: IcebergCold, clock: Clock) -> None:
    """Listed while it was young, as if its commit was under way, and unreferenced later: the grace counts from then."""
    clock.now_ns = time.time_ns() + 10**9
    fill(cold, 0, 1)
    (file,) = (Path(path) for path in files(cold, "trades"))
    hidden = file.with_suffix(".hidden")
    shutil.copyfile(file, hidden)  # what another process is about to commit
    cold.maintain(now_ns=clock())
    clock.advance(2 * GRACE)
    cold.maintain(now_ns=clock())
    assert hidden.exists()
    clock.advance(GRACE - 1)
    cold.maintain(now_ns=clock())
    assert hidden.exists()
    clock.advance(2)
    cold.maintain(now_ns=clock())

    assert not hidden.exists()


@pytest.mark.parametrize("table", [t.name for t in TABLES.values() if t.cold])
def test_compaction_never_changes_a_row(tmp_path: Path, table: str) -> None:
    """A hash over all rows of all columns is the same before and after, with appends going on, in every snapshot."""
    cold = IcebergCold(configured(tmp_path, keep_snapshots=100))
    at = {"binance": 0, "kraken": 0}
    put = []

    def put_in(exchange: str, day: int, rows: int = 20) -> None:
        made = rows_of(table, at[exchange], at[exchange] + rows, day=day, exchange=exchange)
        end = {exchange: at[exchange] + rows}
        cold.append(table, made, start={exchange: at[exchange]}, end=end)
        at[exchange] += rows
        put.append(made)

    for n in range(12):
        put_in(("binance", "kraken")[n % 2], day=n // 6)
    before = digest(stored(cold, table))
    each = {s.snapshot_id: digest(stored(cold, table, s.snapshot_id)) for s in cold.snapshots(table)}
    appending = threading.Thread(target=lambda: [put_in("kraken", day=1) for _ in range(6)])
    appending.start()
    done = next(m for m in cold.maintain(now_ns=LATER) if m.table == table)
    appending.join()
    cold.maintain(now_ns=LATER)

    kept = [rows.remove_column(rows.column_names.index("revision")) if table == "candles" else rows for rows in put]
    assert done.files_before >= 12
    assert before == digest(kept[:12])
    assert digest(stored(cold, table)) == digest(kept)
    assert len(list(files(cold, table))) == 4  # a day and an exchange each
    assert {s: digest(stored(cold, table, s)) for s in each} == each
    cold.close()


def stored(cold: IcebergCold, table: str, snapshot_id: int | None = None) -> Iterator[Any]:
    """Every row a snapshot holds, by the library's own reader; without what the commit itself gives it."""
    loaded = cold.catalog.load(table)
    assert loaded is not None
    names = [n for n in TABLES[table].column_names if n != "revision"]
    yield loaded.scan(snapshot_id=snapshot_id, selected_fields=tuple(names)).to_arrow()


def files(cold: IcebergCold, table: str) -> Iterator[str]:
    loaded = cold.catalog.load(table)
    assert loaded is not None
    yield from (task.file.file_path for task in loaded.scan().plan_files())
