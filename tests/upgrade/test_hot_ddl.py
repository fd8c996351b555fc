"""Tables of the first release, migrated, are those a new folder gets: whoever changes the DDL adds a migration."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path

import pyarrow as pa
from first_release import settings_of

from k2.hot import OWN, open_hot
from k2.hot.owner import ServedHot
from k2.hot.readonly import TABLES
from k2.run.upgrade import upgrade

MERGED_SECONDS = 60.0


def opened(folder: Path) -> ServedHot:
    hot = open_hot(settings_of(folder), OWN)
    assert isinstance(hot, ServedHot)
    return hot


def ask(hot: ServedHot, query: str) -> pa.Table:
    return hot.engine.query(query)


def declared(folder: Path) -> dict[str, tuple[str, ...]]:
    """How the engine itself would make each table and view of a folder again."""
    with closing(opened(folder)) as hot:
        rows = ask(hot, "SELECT name, create_table_query AS made FROM system.tables WHERE database = 'k2'").to_pylist()
    return {row["name"]: _in_order(row["made"]) for row in rows}


def _in_order(made: str) -> tuple[str, ...]:
    """The statement and its settings, sorted: the engine keeps them in the order they came."""
    statement, _, settings = made.partition(" SETTINGS ")
    return (statement, *sorted(settings.split(", ")))


def test_migrated_tables_are_those_of_a_new_folder(first_release: Path, tmp_path: Path) -> None:
    """Every column, codec, index, key, setting and view; a difference wants a migration in `hot/migrations.py`."""
    upgrade(settings_of(first_release))
    migrated, new = declared(first_release), declared(tmp_path)

    assert set(TABLES) <= set(new)
    assert migrated == new


def test_a_closed_day_becomes_one_part(first_release: Path) -> None:
    """What the second migration is for: the parts of a day long past are merged, and no row is lost by it."""
    upgrade(settings_of(first_release))
    query = (
        "SELECT toInt64(max(parts)) AS most, toInt64(sum(rows)) AS rows FROM"
        " (SELECT count() AS parts, sum(rows) AS rows FROM system.parts WHERE active AND database = 'k2'"
        " AND table IN ('trades', 'quotes', 'gaps', 'dead_letters') GROUP BY table, partition)"
    )
    with closing(opened(first_release)) as hot:
        before = ask(hot, query).to_pylist()[0]
        deadline = time.monotonic() + MERGED_SECONDS
        while (now := ask(hot, query).to_pylist()[0])["most"] > 1 and time.monotonic() < deadline:
            time.sleep(0.2)

    assert now == {"most": 1, "rows": before["rows"]}
