"""The same steps forward over real recordings, in folders put back to the form of the first release."""

from __future__ import annotations

import json
import signal
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from first_release import command, rows_said, settings_of

import k2
from k2 import crash, stamp
from k2.cold.catalog import Catalog
from k2.cold.commit import LeanTransaction
from k2.cold.metadata import FORMAT, forms
from k2.hot import OWN, open_hot
from k2.log import form as log_form
from k2.run.upgrade import STORES
from k2.run.upgrade import forms as found_forms

FILES = {
    "binance": "binance/spot_ws/btcusdt_20240808.gz",
    "kraken": "kraken/ws_v1/capture_20210417.jsonl.gz",
}
TABLES = ("trades", "quotes", "dead_letters")
DEATHS = ("state.upgrade.half", "log.upgrade.half", "hot.migrate.half", "cold.upgrade.half")


def as_first_release(folder: Path) -> None:
    """Take from every store what later forms added, so that it is as the first release would have left it."""
    for partition in log_form.partitions(folder / "log"):
        for path in partition.glob("*.db"):
            with closing(sqlite3.connect(path)) as db:
                db.executescript("PRAGMA application_id = 0; PRAGMA user_version = 0;")
    (folder / "log" / stamp.FILE).unlink()
    with closing(sqlite3.connect(folder / "state.db")) as db, db:
        for statement in ("DROP TABLE upgrades", "DROP INDEX unfinished_flushes", "UPDATE version SET number = 1"):
            db.execute(statement)
    with closing(open_hot(settings_of(folder), OWN)) as hot:
        for table in ("trades", "quotes", "gaps", "dead_letters"):
            names = "min_age_to_force_merge_seconds, min_age_to_force_merge_on_partition_only"
            hot.engine.command(f"ALTER TABLE {table} RESET SETTING {names}")
        hot.engine.command("ALTER TABLE migrations DELETE WHERE number > 1 SETTINGS mutations_sync = 1")
    (folder / "hot" / stamp.FILE).unlink()
    with closing(Catalog(folder / "cold", 1 << 20)) as catalog:
        for table in forms(folder / "cold"):
            loaded = catalog.load(table)
            assert loaded is not None
            with LeanTransaction(loaded) as transaction:
                transaction.remove_properties(FORMAT)


def said(folder: Path) -> dict[str, object]:
    with k2.connect(settings=settings_of(folder)) as client:
        return {
            f"{table} {tier}": rows_said(client.rows(table, tier=tier, limit=0).arrow())
            for table in TABLES
            for tier in ("all", "hot", "cold")
        }


@pytest.mark.slow
def test_recordings_are_brought_on_with_every_row(recordings: Path, tmp_path: Path) -> None:
    """Real frames through the whole pipeline, then every step forward, killed once in the middle of each store."""
    folder, file = tmp_path / "data", tmp_path / "crash"
    for exchange, name in FILES.items():
        imported = command(
            folder, "import", str(recordings / name), "--exchange", exchange, K2_LOG_SEGMENT_BYTES="2000000"
        )
        assert imported.returncode == 0, imported.stderr
    for role in ("ingest", "offload"):
        assert command(folder, role, "--drain").returncode == 0
    before = said(folder)
    as_first_release(folder)
    assert {form.found for form in found_forms(settings_of(folder))} == {1}
    for label in DEATHS:
        crash.arm(file, label)
        assert command(folder, "upgrade", K2CRASH=str(file)).returncode == -signal.SIGKILL
    done = command(folder, "upgrade", "--json")

    assert {row["store"]: row["found"] for row in json.loads(done.stdout)} == {s.name: s.newest for s in STORES}
    assert said(folder) == before
    assert before["trades all"]["rows"] == 9_757 + 10  # type: ignore[index]  # different ids in the two recordings
