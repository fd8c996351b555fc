"""Migrations: in order, once, again after a kill, never backwards."""

from __future__ import annotations

from pathlib import Path

import pytest

from k2.errors import Misconfigured
from k2.hot import ddl, open_hot
from k2.hot.migrations import MIGRATIONS, Migration, migrate
from k2.hot.owner import ServedHot
from k2.settings import Settings


class Recorder:
    """An engine that only remembers, and dies at a chosen statement."""

    def __init__(self, *, die_at: int = -1) -> None:
        self.statements: list[str] = []
        self.done: dict[int, str] = {}
        self.die_at = die_at

    def command(self, sql: str) -> None:
        if len(self.statements) == self.die_at:
            raise KeyboardInterrupt
        self.statements.append(sql)
        if sql.startswith("INSERT INTO migrations"):
            number = int(sql.split("(")[1].split(",")[0])
            self.done[number] = f"m{number}"

    def applied(self) -> dict[int, str]:
        return dict(self.done)


STEPS = tuple(Migration(n, f"m{n}", lambda n=n: [f"step {n} a", f"step {n} b"]) for n in (1, 2))


def test_pending_migrations_run_in_order_and_once() -> None:
    """What is recorded is not run again."""
    engine = Recorder()

    assert migrate(engine, "here", migrations=STEPS) == [1, 2]
    assert [s for s in engine.statements if s.startswith("step")] == ["step 1 a", "step 1 b", "step 2 a", "step 2 b"]
    assert migrate(engine, "here", migrations=STEPS) == []


@pytest.mark.parametrize("die_at", range(7))
def test_a_migration_killed_anywhere_is_run_again_from_its_start(die_at: int) -> None:
    """A step counts only when it is recorded, and it is recorded last."""
    engine = Recorder(die_at=die_at)
    with pytest.raises(KeyboardInterrupt):
        migrate(engine, "here", migrations=STEPS)
    engine.die_at = -1
    migrate(engine, "here", migrations=STEPS)

    assert engine.done == {1: "m1", 2: "m2"}


def test_a_newer_store_is_refused() -> None:
    """The message names the store, the migration and what to do."""
    engine = Recorder()
    engine.done = {3: "later"}

    with pytest.raises(Misconfigured, match=r"here was made by a newer K2 \(migration 3 'later'"):
        migrate(engine, "here", migrations=STEPS)


def test_numbers_rise_by_one_without_a_hole() -> None:
    """So that the newest known number says it all."""
    assert [m.number for m in MIGRATIONS] == list(range(1, len(MIGRATIONS) + 1))


def test_every_statement_may_be_repeated_on_the_real_engine(tmp_path: Path) -> None:
    """Half of them, then all of them twice; and a recorded newer number closes the folder."""
    settings = Settings(data=str(tmp_path))
    hot = open_hot(settings, "own")
    assert isinstance(hot, ServedHot)
    for statement in ddl.statements():
        hot.engine.command(statement)
    hot.engine.command("INSERT INTO migrations VALUES (99, 'later', 0)")
    hot.close()

    for use in ("own", "borrow"):
        with pytest.raises(Misconfigured, match="newer K2"):
            open_hot(settings, use).symbols()
