"""What only the Iceberg adapter promises: the files, other readers, races, maintenance."""

from __future__ import annotations

import cProfile
import json
import os
import pstats
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from k2.cold import open_cold
from k2.cold.catalog import reported
from k2.cold.commit import AssertCommit, commit
from k2.cold.iceberg import IcebergCold
from k2.cold.maintenance import compact
from k2.cold.memory import MemoryCold
from k2.cold.metadata import commit_number
from k2.cold.rows import arranged
from k2.errors import Corrupt, InUse, Misconfigured, NotSuccessor, Rejected, StoreDown, UnknownName
from k2.model import Selection
from k2.schema import TABLES, TRADES, arrow_schema
from k2.settings import ColdSettings, Settings

DAY = 86_400 * 10**9
T0 = 1_700_006_400 * 10**9  # the start of a day
LATER = T0 + 90 * DAY
ALL = Selection(table="trades")


def configured(data: Path, **cold: Any) -> Settings:
    """Settings of a data folder."""
    return Settings(data=str(data), cold=ColdSettings(**cold))


@pytest.fixture
def cold(tmp_path: Path) -> Iterator[IcebergCold]:
    """An empty cold tier."""
    made = IcebergCold(configured(tmp_path))
    yield made
    made.close()


def trades(start: int, end: int, *, day: int = 0, exchange: str = "binance") -> pa.Table:
    """Trades of offsets start to end, one a second, newest first, of two symbols."""
    rows = [
        {
            "exchange": exchange,
            "symbol": ("ETH-USDT", "BTC-USDT")[o % 2],
            "trade_id": o + 1,
            "kind": "trade",
            "first_id": o + 1,
            "last_id": o + 1,
            "price": Decimal(o + 1).scaleb(-12) + 70_000,
            "amount": Decimal("0.25"),
            "side": "buy" if o % 3 else "sell",
            "off_market": False,
            "occurrence": 0,
            "exchange_ns": T0 + day * DAY + o * 10**9 + 123_456_789,
            "received_ns": T0 + o,
            "source": "live",
            "log_partition": exchange,
            "log_offset": o,
            "row_in_frame": 0,
            "logged_ns": T0 + o,
        }
        for o in reversed(range(start, end))
    ]
    return pa.Table.from_pylist(rows, schema=arrow_schema(TRADES))


def fill(cold: IcebergCold, commits: int, rows: int = 5, *, per_day: int = 100) -> None:
    """Commit trades of binance."""
    for n in range(commits):
        made = trades(n * rows, (n + 1) * rows, day=n // per_day)
        cold.append("trades", made, start={"binance": n * rows}, end={"binance": (n + 1) * rows})


def files(cold: IcebergCold, table: str = "trades") -> list[Path]:
    """Data files of the current state."""
    loaded = cold.catalog.load(table)
    assert loaded is not None
    return sorted(Path(task.file.file_path) for task in loaded.scan().plan_files())


def everything(data: Path) -> set[Path]:
    """Every file of a folder."""
    return {p for p in data.rglob("*") if p.is_file()}


# -- files -----------------------------------------------------------------------------


def test_looking_at_an_empty_installation_leaves_no_trace(tmp_path: Path) -> None:
    """Reading makes no folder and no catalog."""
    cold = open_cold(configured(tmp_path / "data"))
    cold.pin("trades")
    cold.snapshots()
    cold.maintain(now_ns=LATER)
    cold.close()

    assert not (tmp_path / "data").exists()


def test_drafts_of_a_catalog_that_was_never_made_go(tmp_path: Path) -> None:
    """A death while the catalog is made leaves a draft; the next one to make it takes that away."""
    left = tmp_path / "cold" / "catalog-0.tmp"
    left.parent.mkdir()
    left.write_bytes(b"")
    cold = IcebergCold(configured(tmp_path))
    fill(cold, 1)
    cold.close()

    assert not left.exists()
    assert (tmp_path / "cold" / "catalog.db").is_file()


def test_files_are_partitioned_sorted_and_compressed(cold: IcebergCold) -> None:
    """One file per day and exchange, zstd, rows in `Table.sort` order, derived time floored."""
    rows = pa.concat_tables([trades(0, 30), trades(30, 50, day=1), trades(0, 10, exchange="kraken")])
    cold.append("trades", rows, start={}, end={"binance": 50, "kraken": 10})
    found = files(cold)

    assert [f.parent.relative_to(f.parents[2]).as_posix() for f in found] == [
        "day=2023-11-15/exchange=binance",
        "day=2023-11-15/exchange=kraken",
        "day=2023-11-16/exchange=binance",
    ]
    for file in found:
        kept = pq.ParquetFile(file)
        assert kept.metadata.row_group(0).column(0).compression == "ZSTD"
        stored = kept.read().select(list(TRADES.sort)).to_pylist()
        assert stored == sorted(stored, key=lambda r: tuple(r.values()))
    times = pq.ParquetFile(found[0]).read(["exchange_ns", "exchange_time"])
    assert times["exchange_time"].cast(pa.int64()).to_pylist() == [n // 1000 for n in times["exchange_ns"].to_pylist()]


def test_a_column_is_encoded_by_what_it_holds(cold: IcebergCold) -> None:
    """Names by dictionary, numbers and times as differences, in appended and in compacted files."""
    fill(cold, 6, per_day=3)
    appended = files(cold)[0]
    maintained(cold)
    compacted = files(cold)[0]

    for file in (appended, compacted):
        assert pq.read_schema(file).field("symbol").type == pa.string()
        group = pq.ParquetFile(file).metadata.row_group(0)
        columns = {group.column(i).path_in_schema: set(group.column(i).encodings) for i in range(group.num_columns)}
        assert all("RLE_DICTIONARY" in columns[name] for name in ("exchange", "symbol", "side", "log_partition"))
        for name in ("trade_id", "exchange_ns", "exchange_time", "log_offset", "logged_ns"):
            assert "DELTA_BINARY_PACKED" in columns[name]
            assert "RLE_DICTIONARY" not in columns[name]
        assert "RLE_DICTIONARY" not in columns["price"]


def test_every_column_is_required_and_the_sort_order_recorded(cold: IcebergCold) -> None:
    """The declaration in the catalog is that of schema.py, for every table; format version 2."""
    for name, table in TABLES.items():
        loaded = cold.catalog.load_or_create(table)
        assert [f.name for f in loaded.schema().fields] == [c.name for c in table.columns]
        assert [f.field_id for f in loaded.schema().fields] == list(range(1, len(table.columns) + 1))
        assert all(f.required for f in loaded.schema().fields)
        order = [loaded.schema().find_column_name(f.source_id) for f in loaded.sort_order().fields]
        assert (order, loaded.format_version, name) == (list(table.sort), 2, table.name)


def test_pruning_reads_only_the_files_of_the_day(cold: IcebergCold) -> None:
    """Bounds on time reach the files: of five days one is opened."""
    fill(cold, 5, per_day=1)
    pin = cold.pin("trades")
    asked = Selection(table="trades", exchange="binance", start_ns=T0 + 2 * DAY, end_ns=T0 + 3 * DAY)
    others = [f for f in files(cold) if "day=2023-11-17" not in f.as_posix()]
    for file in others:
        file.unlink()

    assert len(others) == 4
    assert cold.read(pin, asked)["log_offset"].to_pylist() == list(range(10, 15))


def test_progress_is_in_the_summary_and_the_properties_of_one_commit(cold: IcebergCold) -> None:
    """Whoever reads the table by other means finds the offsets."""
    fill(cold, 3)
    loaded = cold.catalog.load("trades")
    assert loaded is not None
    snapshot = loaded.current_snapshot()
    assert snapshot is not None
    assert snapshot.summary is not None
    kept = {k: loaded.properties[k] for k in ("k2.start", "k2.end", "k2.commit")}

    assert kept == {"k2.start": '{"binance":10}', "k2.end": '{"binance":15}', "k2.commit": "3"}
    assert {k: snapshot.summary.additional_properties[k] for k in kept} == kept


def test_names_of_folders_may_hold_anything(tmp_path: Path) -> None:
    """Blanks, quotes and the like in the data folder's path are no problem."""
    with_quotes = tmp_path / 'a folder\'s "näme" {x}'
    cold = IcebergCold(configured(with_quotes))
    fill(cold, 2)

    assert cold.read(cold.pin("trades"), ALL).num_rows == 10
    cold.close()


# -- other readers ---------------------------------------------------------------------

CHDB = """
import sys, chdb
folder, metadata, out, *snapshots = sys.argv[1:]
for snapshot in snapshots:
    pinned = f", iceberg_snapshot_id = {snapshot}" if snapshot != "None" else ""
    chdb.query(f"SELECT * EXCEPT (exchange_time) FROM icebergLocal('{folder}', SETTINGS "
               f"iceberg_metadata_file_path = '{metadata}') ORDER BY exchange_ns, log_offset INTO OUTFILE "
               f"'{out}{snapshot}' FORMAT Arrow SETTINGS output_format_arrow_string_as_string = 1{pinned}")
"""


def read_by_chdb(cold: IcebergCold, tmp_path: Path, snapshots: list[int | None]) -> list[pa.Table]:
    """All trades of some snapshots as chDB reads them, in a process of its own."""
    location = Path(cold.pin("trades").location)
    arguments = [str(location.parents[1]), str(location.relative_to(location.parents[1])), str(tmp_path / "read-")]
    # chDB opens local tables below its working folder only.
    subprocess.run([sys.executable, "-c", CHDB, *arguments, *map(str, snapshots)], check=True, timeout=60, cwd=tmp_path)
    tables = []
    for snapshot_id in snapshots:
        with pa.OSFile(f"{tmp_path}/read-{snapshot_id}") as file:
            tables.append(pa.ipc.open_file(file).read_all())
    return tables


@pytest.mark.filterwarnings("ignore:Iceberg scan planning")  # polars would plan faster with one more package
def test_duckdb_polars_and_chdb_read_the_same_rows(cold: IcebergCold, tmp_path: Path) -> None:
    """The current table and an older snapshot, read by three engines, are equal to the rows written."""
    fill(cold, 4, 7)
    first = cold.snapshots("trades")[1].snapshot_id
    loaded = cold.catalog.load("trades")
    assert loaded is not None
    written = {None: trades(0, 28), first: trades(0, 14)}
    order = [("exchange_ns", "ascending"), ("log_offset", "ascending")]
    by_chdb = read_by_chdb(cold, tmp_path, list(written))
    for (snapshot_id, rows), read in zip(written.items(), by_chdb, strict=True):
        expected = rows.sort_by(order)
        by_polars = pl.scan_iceberg(loaded, snapshot_id=snapshot_id).drop("exchange_time").collect().to_arrow()

        assert cold.read(cold.pin("trades", snapshot_id=snapshot_id), ALL).equals(expected)
        assert by_polars.sort_by(order).cast(expected.schema).equals(expected)
        assert read.cast(expected.schema).equals(expected)


READER = """
import sys
from k2.cold import open_cold
from k2.model import Selection
from k2.settings import Settings
cold = open_cold(Settings(data=sys.argv[1]))
print("ready", flush=True)
for line in sys.stdin:
    pin = cold.pin("trades")
    rows = cold.read(pin, Selection(table="trades"))
    assert rows["log_offset"].to_pylist() == list(range(pin.watermark.get("binance", 0))), pin
    print(rows.num_rows, flush=True)
"""


def test_another_process_reads_while_this_one_writes(cold: IcebergCold, tmp_path: Path) -> None:
    """At every moment it sees all rows below the watermark of its pin; its home folder stays empty."""
    home = tmp_path / "home"
    home.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", READER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "HOME": str(home)},
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        for n in range(12):
            child.stdin.write("\n")
            child.stdin.flush()
            cold.append("trades", trades(n, n + 1), start={"binance": n}, end={"binance": n + 1})
            assert int(child.stdout.readline()) in (n, n + 1)
        child.stdin.close()
        assert child.wait() == 0

    assert everything(home) == set()


# -- one writer ------------------------------------------------------------------------


def test_the_lease_names_its_holder_and_ends_with_it(tmp_path: Path) -> None:
    """A second writer is refused by name; a dead holder holds nothing."""
    code = (
        "import sys; from k2.cold import open_cold; from k2.settings import Settings\n"
        "cold = open_cold(Settings(data=sys.argv[1])); cold.acquire_lease(); print('held', flush=True); input()"
    )
    cold = IcebergCold(configured(tmp_path))
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        with pytest.raises(InUse, match=f"process {child.pid} "):
            cold.acquire_lease()
        with pytest.raises(InUse):
            cold.append("trades", trades(0, 1), start={}, end={"binance": 1})
        child.kill()

    cold.acquire_lease()
    cold.close()


@pytest.mark.parametrize("ours", [0, 3])
@pytest.mark.parametrize("theirs", [0, 3])
def test_a_commit_between_check_and_commit_is_noticed(cold: IcebergCold, ours: int, theirs: int) -> None:
    """Another writer's commit, of rows or of progress alone, makes ours fail whole."""
    fill(cold, 1)
    stale = cold.catalog.load("trades")
    assert stale is not None
    base = commit_number(stale.properties)
    cold.append("trades", trades(5, 5 + theirs), start={"binance": 5}, end={"binance": 9})
    marks = {"k2.start": '{"binance":5}', "k2.end": '{"binance":8}', "k2.commit": str(base + 1)}

    with pytest.raises(NotSuccessor, match="nothing was committed"):
        commit(stale, TRADES, arranged(trades(5, 5 + ours), TRADES), AssertCommit(commit=base), marks, {})
    assert dict(cold.pin("trades").watermark) == {"binance": 9}
    assert cold.read(cold.pin("trades"), ALL).num_rows == 5 + theirs


def test_a_folder_that_cannot_be_written_is_store_down(tmp_path: Path) -> None:
    """The message says what was attempted and what to look at."""
    (tmp_path / "cold").mkdir()
    (tmp_path / "cold" / "warehouse").write_text("in the way")
    cold = IcebergCold(configured(tmp_path))

    with pytest.raises(StoreDown, match="append 1 rows to cold table 'trades'"):
        cold.append("trades", trades(0, 1), start={}, end={"binance": 1})
    cold.close()


def test_a_disk_without_space_is_store_down(tmp_path: Path) -> None:
    """Neither the lease nor the catalog raises what only its library knows."""
    (tmp_path / "cold").mkdir()
    (tmp_path / "cold" / "writer.lock").symlink_to("/dev/full")
    cold = IcebergCold(configured(tmp_path))

    with pytest.raises(StoreDown, match=r"write to cold: cannot lock .*writer\.lock"):
        cold.acquire_lease()
    for error in (sqlite3.OperationalError("disk I/O error"), OSError(28, "No space left on device")):
        with pytest.raises(StoreDown, match="try it: "), reported("try it"):
            raise error
    cold.close()


def test_damaged_metadata_is_corrupt(cold: IcebergCold) -> None:
    """It does not pass by itself, so it is told apart from a disk that is full."""
    fill(cold, 1)
    location = Path(cold.pin("trades").location)
    content = location.read_bytes()
    location.write_bytes(content[:-100])
    other = IcebergCold(configured(cold.folder.parent))

    with pytest.raises(Corrupt, match="read the state of cold table 'trades': its metadata is damaged"):
        other.pin("trades")
    location.write_bytes(content)
    assert dict(other.pin("trades").watermark) == {"binance": 5}
    other.close()


def test_a_data_folder_that_was_moved_is_refused(tmp_path: Path) -> None:
    """Nothing is read, written or removed; the message names the command that helps, and moving it back does, too."""
    old, new = tmp_path / "old", tmp_path / "new"
    cold = IcebergCold(configured(old))
    fill(cold, 3)
    cold.close()
    old.rename(new)
    before = {p for p in new.rglob("*") if p.is_file()}
    moved = IcebergCold(configured(new, orphan_seconds=0))
    for attempt in (
        lambda: moved.pin("trades"),
        lambda: moved.acquire_lease(),
        lambda: moved.append("trades", trades(15, 16), start={"binance": 15}, end={"binance": 16}),
        lambda: moved.maintain(now_ns=LATER),
    ):
        with pytest.raises(Misconfigured, match=f"was made as {old}.*k2 upgrade --data {new}"):
            attempt()
    moved.close()
    assert {p for p in new.rglob("*") if p.is_file() and p.suffix != ".lock"} == {
        p for p in before if p.suffix != ".lock"
    }

    new.rename(old)
    goes_on(IcebergCold(configured(old)))


def test_a_data_folder_by_another_name_is_the_same_folder(tmp_path: Path) -> None:
    """Reached by a link, also by one that is at the old place of a folder that was moved: all goes on as ever."""
    old, link = tmp_path / "old", tmp_path / "link"
    cold = IcebergCold(configured(old))
    fill(cold, 3)
    cold.close()
    link.symlink_to(old)

    goes_on(IcebergCold(configured(link)))
    old.rename(tmp_path / "new")
    old.symlink_to(tmp_path / "new")
    for name in (old, tmp_path / "new"):
        cold = IcebergCold(configured(name))
        assert cold.read(cold.pin("trades"), ALL).num_rows == 16
        cold.close()


def goes_on(cold: IcebergCold) -> None:
    """Commit, maintain and read."""
    cold.append("trades", trades(15, 16), start={"binance": 15}, end={"binance": 16})
    cold.maintain(now_ns=LATER)
    assert cold.read(cold.pin("trades"), ALL).num_rows == 16
    cold.close()


def test_other_catalogs_are_not_known_yet(tmp_path: Path) -> None:
    """A wrong setting is named."""
    with pytest.raises(Misconfigured, match=r"cold\.catalog"):
        open_cold(configured(tmp_path, catalog="postgres:"))
    assert isinstance(open_cold(configured(tmp_path, catalog="memory:")), MemoryCold)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 12), max_size=5), st.booleans())
def test_any_split_into_commits_gives_the_same_table(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], maintained: bool
) -> None:
    """Rows, candles and watermark do not depend on how the rows were cut, nor on maintenance in between."""
    cold = IcebergCold(configured(tmp_path_factory.mktemp("split")))
    whole = MemoryCold()
    at = 0
    for size in [*sizes, 1]:
        cold.append("trades", trades(at, at + size), start={"binance": at}, end={"binance": at + size})
        at += size
        if maintained:
            cold.maintain(now_ns=LATER)
    whole.append("trades", trades(0, at), start={}, end={"binance": at})
    for store in (cold, whole):
        assert dict(store.pin("trades").watermark) == {"binance": at}
    candles = Selection(table="candles")

    assert cold.read(cold.pin("trades"), ALL).equals(whole.read(whole.pin("trades"), ALL))
    assert cold.candles_from_trades(cold.pin("trades"), "1m", candles).equals(
        whole.candles_from_trades(whole.pin("trades"), "1m", candles)
    )
    cold.close()
    whole.close()


# -- maintenance -----------------------------------------------------------------------


def maintained(cold: IcebergCold, now_ns: int = LATER) -> dict[str, Any]:
    """What maintenance did to trades."""
    return next(vars(m) for m in cold.maintain(now_ns=now_ns) if m.table == "trades")


def test_compaction_merges_small_files_of_a_day(cold: IcebergCold) -> None:
    """One file per closed day, sorted, the same rows; the state before it stays readable; twice changes nothing."""
    fill(cold, 6, per_day=3)
    before = cold.pin("trades")
    rows = cold.read(before, ALL)
    first, second = maintained(cold), maintained(cold)
    after = cold.pin("trades")

    assert (first["files_before"], first["files_after"]) == (6, 2)
    assert (second["files_before"], second["files_after"], second["orphans_removed"]) == (2, 2, 0)
    assert cold.read(after, ALL).equals(rows)
    assert cold.read(before, ALL).equals(rows)
    assert (dict(after.watermark), cold.snapshots("trades")[-1].operation) == ({"binance": 30}, "compact")
    assert cold.snapshots("trades")[-1].rows_total == 30
    stored = pq.ParquetFile(files(cold)[0]).read().select(list(TRADES.sort)).to_pylist()
    assert stored == sorted(stored, key=lambda r: tuple(r.values()))
    cold.append("trades", trades(30, 31), start={"binance": 30}, end={"binance": 31})
    assert cold.read(cold.pin("trades"), ALL).num_rows == 31


def test_files_stay_about_the_wanted_size(tmp_path: Path) -> None:
    """Full files are left alone, small ones are merged up to about file_bytes."""
    cold = IcebergCold(configured(tmp_path, file_bytes=20_000))
    fill(cold, 8)
    size = files(cold)[0].stat().st_size
    maintained(cold)

    assert 1 < len(files(cold)) < 8
    assert all(f.stat().st_size <= 20_000 + size for f in files(cold))
    assert cold.read(cold.pin("trades"), ALL).num_rows == 40
    cold.close()


def test_a_running_day_is_compacted_less_often(cold: IcebergCold) -> None:
    """A day still being written waits for eight small files, so that its rows are not rewritten at every run."""
    fill(cold, 7)
    assert maintained(cold, T0 + DAY // 2)["files_after"] == 7
    cold.append("trades", trades(35, 36), start={"binance": 35}, end={"binance": 36})

    assert maintained(cold, T0 + DAY // 2)["files_after"] == 1


def test_appends_go_on_during_compaction(cold: IcebergCold) -> None:
    """Compaction in one thread, commits in another: nothing is lost, no commit is refused."""
    fill(cold, 6)
    rewriting = threading.Thread(target=lambda: [cold.maintain(now_ns=LATER) for _ in range(4)])
    rewriting.start()
    for n in range(6, 26):
        cold.append("trades", trades(n * 5, n * 5 + 5), start={"binance": n * 5}, end={"binance": n * 5 + 5})
    rewriting.join()

    read = cold.read(cold.pin("trades"), ALL)
    assert read["log_offset"].to_pylist() == list(range(130))
    assert dict(cold.pin("trades").watermark) == {"binance": 130}


def test_compaction_that_loses_a_race_leaves_everything_as_it_was(cold: IcebergCold, tmp_path: Path) -> None:
    """When the files were already replaced by somebody else, nothing is committed and nothing left behind."""
    fill(cold, 4)
    other = IcebergCold(configured(tmp_path))
    ours = other.reader.cursor

    def later(*arguments: Any) -> Any:
        if len(files(cold)) == 4:
            compact(cold, TRADES, ColdSettings(), LATER)  # somebody else is quicker
        return ours(*arguments)

    other.reader.cursor = later
    snapshots = len(cold.snapshots("trades"))

    assert compact(other, TRADES, ColdSettings(), LATER) == 0
    assert len(cold.snapshots("trades")) == snapshots + 1
    assert cold.read(cold.pin("trades"), ALL).num_rows == 20
    assert set(files(cold)) == {p for p in everything(tmp_path) if "compacted" in p.name}
    other.close()


def test_expiry_keeps_the_newest_snapshots_and_all_progress(tmp_path: Path) -> None:
    """Older snapshots cannot be pinned any more; properties and watermark stay."""
    cold = IcebergCold(configured(tmp_path, keep_snapshots=8))
    fill(cold, 7)
    cold.close()
    cold = IcebergCold(configured(tmp_path, keep_snapshots=3, grace_seconds=0))
    cold.append("trades", trades(0, 0), start={"binance": 35}, end={"binance": 40}, properties={"x": "y"})
    ids = [s.snapshot_id for s in cold.snapshots("trades")]
    done = maintained(cold, T0)

    assert done["snapshots_expired"] == 4
    assert [s.snapshot_id for s in cold.snapshots("trades")] == ids[-3:]
    assert (dict(cold.pin("trades").watermark), cold.properties("trades")) == ({"binance": 40}, {"x": "y"})
    assert cold.read(cold.pin("trades", snapshot_id=ids[-3]), ALL).num_rows == 25
    with pytest.raises(
        UnknownName, match=f"snapshot {ids[0]} of cold table 'trades' expired at 2023-11-15 00:00:00 UTC"
    ):
        cold.pin("trades", snapshot_id=ids[0])
    cold.close()


def test_orphans_are_removed_when_old_and_nothing_else_is(tmp_path: Path) -> None:
    """What no retained metadata refers to goes at its age; everything referred to stays readable."""
    cold = IcebergCold(configured(tmp_path, orphan_seconds=3600, grace_seconds=0, keep_snapshots=2))
    fill(cold, 6)
    stray = files(cold)[0].with_name("00000-0-stray.parquet")
    stray.write_bytes(b"left by a crash")
    now_ns = stray.stat().st_mtime_ns
    maintained(cold, T0)  # forgets four snapshots
    assert maintained(cold, now_ns + 3000 * 10**9)["orphans_removed"] == 0  # the others are some seconds older
    done = maintained(cold, now_ns + 3700 * 10**9)

    assert not stray.exists()
    assert done["orphans_removed"] > 4
    assert done["bytes_removed"] > 0
    for snapshot in cold.snapshots("trades"):
        assert cold.read(cold.pin("trades", snapshot_id=snapshot.snapshot_id), ALL).num_rows == snapshot.rows_total
    assert (
        maintained(cold, now_ns + 3700 * 10**9)["files_after"] == maintained(cold, now_ns + 3800 * 10**9)["files_after"]
    )
    cold.close()


def test_files_that_may_be_in_flight_elsewhere_stay(tmp_path: Path) -> None:
    """Without the lease another process may be writing: files younger than an hour stay whatever is set."""
    writer, keeper = (IcebergCold(configured(tmp_path, orphan_seconds=0, grace_seconds=0)) for _ in range(2))
    fill(writer, 2)
    stray = files(writer)[0].with_name("00000-0-stray.parquet")
    stray.write_bytes(b"about to be committed")
    now_ns = stray.stat().st_mtime_ns + 60 * 10**9
    assert maintained(keeper, now_ns)["orphans_removed"] == 0

    assert stray.exists()
    maintained(writer, now_ns)
    assert not stray.exists()
    assert writer.read(writer.pin("trades"), ALL).num_rows == 10
    writer.close()
    keeper.close()


def test_two_maintenances_at_once_are_refused(cold: IcebergCold, tmp_path: Path) -> None:
    """The second is told who runs the first."""
    fill(cold, 1)
    with (tmp_path / "cold" / "maintenance.lock").open("w") as file:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InUse, match="maintain cold"):
            cold.maintain(now_ns=LATER)


def test_summaries_are_plain_json(cold: IcebergCold) -> None:
    """The offset vectors can be read by anything."""
    cold.append("trades", trades(0, 2), start={}, end={"kraken": 3, "binance": 2})
    loaded = cold.catalog.load("trades")
    assert loaded is not None

    assert json.loads(loaded.properties["k2.end"]) == {"binance": 2, "kraken": 3}


def test_a_commit_neither_copies_nor_parses_the_history_again(cold: IcebergCold) -> None:
    """The library would copy every retained snapshot about twenty times, and parse them three times."""
    fill(cold, 3)
    made = trades(15, 20)
    with cProfile.Profile() as profile:
        cold.append("trades", made, start={"binance": 15}, end={"binance": 20})
    calls = {name: entry[1] for (_, _, name), entry in pstats.Stats(profile).stats.items()}  # type: ignore[attr-defined]

    assert calls["update_table_metadata"] <= 2
    assert calls.get("model_validate_json", 0) == 0


@pytest.mark.parametrize("name", ["O'BRIEN", "x' OR true --", "\\' OR true --", "''", "x'); DROP TABLE trades; --"])
def test_names_given_by_others_are_compared_and_never_obeyed(cold: IcebergCold, name: str) -> None:
    """A name is looked for as it is written, whatever it would mean in SQL."""
    rows = trades(0, 4)
    at = rows.schema.get_field_index("symbol")
    cold.append(
        "trades",
        rows.set_column(at, rows.schema.field(at), pa.array(["A", name, "B", "C"])),
        start={},
        end={"binance": 4},
    )
    pin = cold.pin("trades")

    found = cold.read(pin, Selection(table="trades", symbol=name))

    assert found["symbol"].to_pylist() == [name]
    assert cold.read(pin, Selection(table="trades", exchange=name)).num_rows == 0
    assert cold.candles_from_trades(pin, "1m", Selection(table="candles", symbol=name)).num_rows == 1
    with pytest.raises(Rejected, match="is no name"):
        cold.read(pin, Selection(table="trades", symbol=f"{name}\0"))
