"""Deduplication tokens whose rows never came: what a death between the two leaves in the engine's files.

ClickHouse notes the token of an insert before the part with the rows gets its name (seen in 26.9: a table's
deduplication log named a part that no file held, after kill -9). The insert made again would then be taken for a
repeat by that table, and its rows would be missing there for good. So whoever becomes the owner strikes such tokens.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

_LOGS = "deduplication_logs"
_LOG_NAME = re.compile(r"deduplication_log_([0-9]+)\.txt")
_PART = re.compile(r"([^_]+)_([0-9]+)_([0-9]+)_[0-9]+(?:_[0-9]+)?")
_ADDED = b"1"

logger = logging.getLogger(__name__)


def strike_lost(database: Path) -> list[str]:
    """Strike the newest token of each table of a database folder if no part holds its rows; return the parts' names.

    Only the newest can be without rows: the process died there. Nobody may have the engine open. Raises OSError.
    """
    struck = []
    for table in sorted(database.iterdir()) if database.is_dir() else []:
        part = _strike(table)
        if part:
            logger.warning("hot: %s: the token of part %s is struck: its rows never came", table.name, part)
            struck.append(f"{table.name}/{part}")
    return struck


def _strike(table: Path) -> str:
    log = _newest_log(table / _LOGS)
    if log is None:
        return ""
    data = log.read_bytes()
    start = data.rstrip(b"\n").rfind(b"\n") + 1
    operation, _, rest = data[start:].partition(b"\t")
    part = rest.partition(b"\t")[0].decode("utf-8", "replace")
    if operation != _ADDED or not _PART.fullmatch(part) or _is_held(table, part):
        return ""
    with log.open("r+b") as file:
        file.truncate(start)
    return part


def _newest_log(folder: Path) -> Path | None:
    """Return the newest log that says anything; they are numbered."""
    logs = [(int(match[1]), path) for path in folder.glob("*.txt") if (match := _LOG_NAME.fullmatch(path.name))]
    return next((path for _, path in sorted(logs, reverse=True) if path.stat().st_size), None)


def _is_held(table: Path, part: str) -> bool:
    """Whether the blocks of a part are in one there is, itself or what it was merged or mutated into."""
    wanted = _PART.fullmatch(part)
    assert wanted is not None
    for path in table.iterdir():
        found = _PART.fullmatch(path.name)
        if found and found[1] == wanted[1] and int(found[2]) <= int(wanted[2]) and int(wanted[3]) <= int(found[3]):
            return True
    return False
