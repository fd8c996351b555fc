"""What cold has let go of, and since when: it stays readable for a grace, and the error after it says what happened.

Expiry keeps metadata small, so it goes by number. Readers need time: somebody who pinned a state, or asks again as of
a snapshot id, must be able to finish. So an expired snapshot can be pinned, and a file nothing refers to any more
stays, until `cold.grace_seconds` after it was let go of.

Kept in `cold/grace.db`, beside the catalog. Losing the file loses no data: files stay for another grace from then on.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

REMEMBERED = 10_000
"""Expired snapshots remembered per table, so that who asks for one learns what happened to it."""

_WAIT_SECONDS = 30.0
_TABLES = """
CREATE TABLE IF NOT EXISTS expired (
  table_name TEXT NOT NULL,
  snapshot_id INTEGER NOT NULL,
  location TEXT NOT NULL,      -- a metadata file that still holds the snapshot
  expired_ns INTEGER NOT NULL,
  PRIMARY KEY (table_name, snapshot_id)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS unreferenced (
  table_name TEXT NOT NULL,
  path TEXT NOT NULL,          -- within the table's folder
  since_ns INTEGER NOT NULL,   -- when it was first found so
  PRIMARY KEY (table_name, path)
) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class Expired:
    """A snapshot that is not kept any more: a metadata file that holds it, and when it expired."""

    location: str
    expired_ns: int


class Grace:
    """The record of one cold tier; any process may use it, nothing is made before something is let go of."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def expire(self, table: str, snapshot_ids: Iterable[int], location: str, now_ns: int) -> None:
        """Note, before the commit that does it, that snapshots held by the metadata file `location` expire."""
        with self._writing() as db:
            db.executemany(
                "INSERT OR REPLACE INTO expired VALUES (?, ?, ?, ?)",
                [(table, snapshot_id, location, now_ns) for snapshot_id in snapshot_ids],
            )
            db.execute(
                "DELETE FROM expired WHERE table_name = ?1 AND expired_ns < (SELECT expired_ns FROM expired"
                " WHERE table_name = ?1 ORDER BY expired_ns DESC LIMIT 1 OFFSET ?2)",
                (table, REMEMBERED),
            )

    def find(self, table: str, snapshot_id: int) -> Expired | None:
        """Return what is known of an expired snapshot."""
        if not self._path.is_file():
            return None
        with closing(sqlite3.connect(self._path, timeout=_WAIT_SECONDS)) as db:
            row = db.execute(
                "SELECT location, expired_ns FROM expired WHERE table_name = ? AND snapshot_id = ?",
                (table, snapshot_id),
            ).fetchone()
        return Expired(*row) if row else None

    def unreferenced(self, table: str, paths: Iterable[str], now_ns: int) -> dict[str, int]:
        """Return since when nothing has referred to each of these files; forget all others of the table."""
        found = set(paths)
        if not found and not self._path.is_file():
            return {}
        with self._writing() as db:
            known: dict[str, int] = dict(
                db.execute("SELECT path, since_ns FROM unreferenced WHERE table_name = ?", (table,)).fetchall()
            )
            db.executemany(
                "DELETE FROM unreferenced WHERE table_name = ? AND path = ?", [(table, p) for p in known.keys() - found]
            )
            db.executemany(
                "INSERT INTO unreferenced VALUES (?, ?, ?)", [(table, p, now_ns) for p in found - known.keys()]
            )
        return {path: known.get(path, now_ns) for path in found}

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self._path, timeout=_WAIT_SECONDS, isolation_level=None)) as db:
            db.executescript(_TABLES)
            db.execute("BEGIN IMMEDIATE")
            with db:
                yield db
