"""Numbered changes of the hot tier's tables, each recorded when it is done.

A migration may be killed anywhere and is then run again from its start: every statement in
it must be harmless when repeated. A released migration is never edited; a change is a new one.

So whoever changes the DDL in `ddl.py` (or the schema behind it) adds a migration here that brings the tables of a
released K2 to the same: migration 1 makes new tables as declared, all others run on them too and must change nothing
there. `tests/upgrade/test_hot_ddl.py` fails when a folder of the first release and a new one would differ.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from k2 import crash
from k2.errors import Misconfigured
from k2.hot import ddl


class Commands(Protocol):
    """What a migration needs of an engine."""

    def command(self, sql: str) -> None:
        """Run one statement that returns nothing."""

    def applied(self) -> dict[int, str]:
        """Return number -> name of the migrations recorded as applied."""


@dataclass(frozen=True)
class Migration:
    """One step: its number (rising by 1 from 1), its name, and the statements that make it."""

    number: int
    name: str
    statements: Callable[[], list[str]]


def _one_part_a_closed_day() -> list[str]:
    return [
        f"ALTER TABLE {table} MODIFY SETTING min_age_to_force_merge_seconds = 3600,"
        " min_age_to_force_merge_on_partition_only = 1"
        for table in ("trades", "quotes", "gaps", "dead_letters")
    ]


MIGRATIONS = (
    Migration(1, "tables_and_candle_chain", ddl.statements),
    Migration(2, "one_part_a_closed_day", _one_part_a_closed_day),
)
NEWEST = MIGRATIONS[-1].number

RECORD = (
    "CREATE TABLE IF NOT EXISTS migrations (number Int64, name String, applied_ns Int64)"
    " ENGINE = MergeTree ORDER BY number"
)


def migrate(
    engine: Commands,
    where: str,
    *,
    migrations: tuple[Migration, ...] = MIGRATIONS,
    now_ns: Callable[[], int] = time.time_ns,
) -> list[int]:
    """Bring the tables to the newest form and return the numbers of the migrations run now.

    `where` names the store in messages.

    Raises:
        Misconfigured: the store was made by a newer K2.
    """
    engine.command(RECORD)
    applied = engine.applied()
    newest = migrations[-1].number
    unknown = sorted(number for number in applied if number > newest)
    if unknown:
        raise Misconfigured(
            f"hot: {where} was made by a newer K2 (migration {unknown[-1]} {applied[unknown[-1]]!r};"
            f" this version knows up to {newest}). Use that version of K2, or another data folder"
        )
    pending = [migration for migration in migrations if migration.number not in applied]
    for migration in pending:
        for statement in migration.statements():
            engine.command(statement)
            crash.point("hot.migrate.half")
        crash.point("hot.migrate.unrecorded")
        engine.command(
            f"INSERT INTO migrations VALUES ({migration.number}, '{migration.name}', {now_ns()})"  # noqa: S608 - our own numbers and names
        )
    return [migration.number for migration in pending]
