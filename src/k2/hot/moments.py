"""Moments inside the engine, seen by the files it makes: for crash points no call of ours can be placed at."""

from __future__ import annotations

from collections.abc import Callable

from k2.hot.ddl import CANDLE_TABLES
from k2.hot.engine import Engine
from k2.schema import TRADES


def views_behind(engine: Engine, table: str) -> Callable[[], bool]:
    """Return whether an insert has stored its trades and the last of the candle views not yet its states.

    Call it before the insert. Of other tables it never holds: nothing is computed from their rows.
    """
    last = CANDLE_TABLES[-1]
    before = {name: _inserted(engine, name) for name in (table, last)}
    return lambda: (
        table == TRADES.name
        and bool(_inserted(engine, table) - before[table] and not _inserted(engine, last) - before[last])
    )


def mutation_begun(engine: Engine, table: str) -> Callable[[], bool]:
    """Return whether the engine has written down a mutation of the table since this call."""
    before = _mutations(engine, table)
    return lambda: bool(_mutations(engine, table) - before)


def _inserted(engine: Engine, table: str) -> frozenset[str]:
    """Return the parts made by inserts (level 0), whole ones only; merged parts have higher levels."""
    return frozenset(name for name in engine.files(table) if name.endswith("_0") and not name.startswith("tmp"))


def _mutations(engine: Engine, table: str) -> frozenset[str]:
    return frozenset(name for name in engine.files(table) if name.startswith("mutation_"))
