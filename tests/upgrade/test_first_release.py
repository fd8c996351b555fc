"""A folder the first release wrote opens in this one: every answer the same, work goes on, whatever dies on the way."""

from __future__ import annotations

import json
import shutil
import signal
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from first_release import answers, command, settings_of

import k2
from k2 import crash, stamp
from k2.cold import metadata
from k2.hot import migrations
from k2.log import form as log_form
from k2.log import open_log, segment
from k2.run.folder import hold, run_folder
from k2.run.state import FORM, IngestState
from k2.run.upgrade import forms, upgrade

NEWEST = {"state": FORM, "log": log_form.NEWEST, "hot": migrations.NEWEST, "cold": metadata.NEWEST}
DEATHS = (
    "state.upgrade.half",
    "log.upgrade.half",
    "upgrade.store.done",
    "hot.migrate.half",
    "hot.migrate.unrecorded",
    "cold.upgrade.half",
)


def found(folder: Path) -> dict[str, int | None]:
    return {form.store: form.found for form in forms(settings_of(folder))}


def test_every_answer_is_the_same_and_every_store_is_brought_on(first_release: Path, said: dict[str, Any]) -> None:
    """Counts, exact sums, candles, watermarks, snapshots: asked through the client, which upgrades before it asks."""
    assert found(first_release) == dict.fromkeys(NEWEST, 1)
    asked = answers(first_release, said)

    assert {key: asked[key] for key in asked} == {key: said[key] for key in asked}
    assert found(first_release) == NEWEST
    with closing(IngestState(first_release / "state.db")) as state:
        steps = [(store, form, version) for store, form, version, _ in state.upgrades()]
    assert steps == [(store, newest, k2.version.__version__) for store, newest in NEWEST.items()]
    assert upgrade(settings_of(first_release)) == []
    assert not list(first_release.rglob(".k2.format.*"))


def test_work_goes_on_where_the_first_release_stopped(first_release: Path, said: dict[str, Any]) -> None:
    """The frames it left in the log become rows, hot's rows go to cold: each once, none missing, no table rewritten."""
    for role in ("ingest", "offload"):
        done = command(first_release, role, "--drain")
        assert done.returncode == 0, done.stderr
    with closing(open_log(settings_of(first_release))) as log:
        ends = {p: log.end_offset(p) for p in log.partitions()}
    with k2.connect(settings=settings_of(first_release)) as client:
        trades = {tier: client.trades(tier=tier, limit=0).arrow() for tier in ("all", "hot", "cold")}
        frames = client.rows("frames", tier="cold", limit=0).arrow()

    assert any(ends[p] > said["progress"][p] for p in ends)
    assert trades["all"].num_rows > said["tables"]["trades"]["all"]["rows"]
    assert trades["all"].num_rows == trades["hot"].num_rows == trades["cold"].num_rows
    keys = Counter(
        zip(*(trades["cold"][n].to_pylist() for n in ("exchange", "symbol", "kind", "trade_id")), strict=True)
    )
    assert max(keys.values()) == 1
    offsets = Counter(zip(frames["log_partition"].to_pylist(), frames["log_offset"].to_pylist(), strict=True))
    assert offsets == Counter((p, o) for p, end in ends.items() for o in range(end))


@pytest.mark.slow
def test_rebuilding_hot_from_what_the_first_release_wrote_gives_the_same_rows(
    first_release: Path, said: dict[str, Any]
) -> None:
    """Cold and log of the first release are enough: a folder whose hot tier is lost comes back with every row."""
    shutil.rmtree(first_release / "hot")
    done = command(first_release, "ingest", "--rebuild", "--drain")
    assert done.returncode == 0, done.stderr
    with k2.connect(settings=settings_of(first_release)) as client:
        rows = {table: client.rows(table, tier="hot", limit=0).arrow().num_rows for table in ("trades", "quotes")}

    assert all(rows[table] > said["tables"][table]["hot"]["rows"] for table in rows)  # and the log's last frames


@pytest.mark.parametrize(
    "deaths", [DEATHS, *(pytest.param((label,) * 2, marks=pytest.mark.slow) for label in DEATHS)], ids=lambda d: d[-1]
)
def test_an_upgrade_killed_at_any_step_is_made_again(
    first_release: Path, said: dict[str, Any], tmp_path: Path, deaths: tuple[str, ...]
) -> None:
    """kill -9 in the middle of each store's steps, one start after the other; then it opens, with every row."""
    file = tmp_path / "crash"
    killed = 0
    for label in deaths:
        crash.arm(file, label)
        died = command(first_release, "upgrade", K2CRASH=str(file))
        killed += died.returncode == -signal.SIGKILL
        file.unlink(missing_ok=True)
    done = command(first_release, "upgrade", "--json")

    assert killed == len(deaths)
    assert done.returncode == 0, done.stderr
    assert {row["store"]: row["found"] for row in json.loads(done.stdout)} == NEWEST
    asked = answers(first_release, said, candles=("binance 1m", "kraken 1d"))
    assert asked.pop("candles") == {name: said["candles"][name] for name in ("binance 1m", "kraken 1d")}
    assert asked == {key: said[key] for key in asked}


def newer_state(folder: Path) -> None:
    with closing(sqlite3.connect(folder / "state.db")) as db, db:
        db.execute("UPDATE version SET number = ?", (FORM + 1,))


def newer_cold(folder: Path) -> None:
    with closing(sqlite3.connect(folder / "cold" / "catalog.db")) as db:
        (location,) = db.execute("SELECT metadata_location FROM iceberg_tables WHERE table_name = 'gaps'").fetchone()
    content = json.loads(Path(location).read_text())
    content["properties"][metadata.FORMAT] = str(metadata.NEWEST + 1)
    Path(location).write_text(json.dumps(content))


NEWER = {
    "state": newer_state,
    "log": lambda folder: stamp.write(folder / "log", NEWEST["log"] + 1),
    "hot": lambda folder: stamp.write(folder / "hot", NEWEST["hot"] + 1),
    "cold": newer_cold,
}


@pytest.mark.parametrize("store", NEWER)
def test_a_newer_folder_is_refused_before_anything_is_changed(first_release: Path, store: str) -> None:
    """One store a form ahead, the others old: the message names store, forms and what to do; no byte differs."""
    NEWER[store](first_release)
    before = contents(first_release)
    done = command(first_release, "ingest", "--drain")

    assert done.returncode == 78
    assert f"{store}: {first_release} was written by a newer K2: it has form {NEWEST[store] + 1}" in done.stderr
    assert f"knows forms up to {NEWEST[store]}. Nothing was changed. Install the newer K2" in done.stderr
    assert contents(first_release) == before


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the locks of processes."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.parts[len(folder.parts)] != "run")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files if not p.name.endswith(("-shm", "-wal"))}


def test_a_process_of_the_older_version_keeps_the_folder_from_being_upgraded(first_release: Path) -> None:
    """It is named; its stores are left as they are."""
    settings = settings_of(first_release)
    with hold(run_folder(settings) / "ingest.lock", "k2 ingest", "{owner}"):
        done = command(first_release, "upgrade")

    assert done.returncode == 75
    assert "`k2 ingest` (pid" in done.stderr
    assert "still runs: stop it first" in done.stderr
    assert found(first_release) == dict.fromkeys(NEWEST, 1)


def test_check_tells_and_changes_nothing(first_release: Path) -> None:
    """`k2 upgrade --check` is for looking."""
    before = contents(first_release)
    done = command(first_release, "upgrade", "--check")

    assert done.returncode == 0
    assert done.stdout.count("to be upgraded") == 4
    assert contents(first_release) == before


def test_every_segment_says_what_it_is(first_release: Path) -> None:
    """After the upgrade, and on what is appended from then on."""
    upgrade(settings_of(first_release))
    paths = [p for p in (first_release / "log").rglob("*.db") if p.name != "readers.db"]

    assert len(paths) >= 11
    for path in paths:
        with closing(sqlite3.connect(path)) as db:
            assert db.execute("PRAGMA user_version").fetchone() == (segment.FORM,)
            assert db.execute("PRAGMA application_id").fetchone() == (segment.APPLICATION_ID,)


def test_a_damaged_segment_does_not_keep_the_folder_from_opening(first_release: Path) -> None:
    """What is damaged stays as it is, is read around and reported as before; all else is brought on."""
    first = sorted((first_release / "log" / "kraken").glob("*.db"))[0]
    content = bytearray(first.read_bytes())
    content[:64] = bytes(64)
    first.write_bytes(content)
    upgrade(settings_of(first_release))

    assert found(first_release) == NEWEST
    assert first.read_bytes()[:64] == bytes(64)
