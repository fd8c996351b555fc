"""Numbered changes of the hot tier's tables, each recorded when it is done.

A migration may be killed anywhere and is then run again from its start: every statement in
it must be harmless when repeated. A released migration is never edited; a change is a new one.
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


MIGRATIONS = (Migration(1, "tables_and_candle_chain", ddl.statements),)

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
