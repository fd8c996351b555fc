"""Mending the newest segment of a partition after a crash or a damaged disk, and reporting what was done.

Runs before anything else opens the partition, while no other process has it open. Only what was
being written can be torn, so only the newest segment is looked at. Damage further back is left
as it is: reads report its range (`Corrupt`) and go on behind it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from k2.log import segment, walfile
from k2.log.codec import Row, is_whole
from k2.log.failures import is_damage, told

logger = logging.getLogger(__name__)
REPAIRS_FILE = "repairs.jsonl"
SALVAGED, DAMAGED = ".salvaged", ".damaged"


class Repair(msgspec.Struct, frozen=True):
    """One mending: what was wrong, from which offset on frames were cut or lost, how many stored bytes that concerns.

    A `first_offset` below the position of a reader means that frames it has read are gone
    from the log, and that their offsets are used again.
    """

    partition: str
    segment: str
    what: str
    first_offset: int
    bytes: int


def recover(folder: Path) -> list[Repair]:
    """Make the newest segment of a partition fit to be appended to; return and report what had to be done."""
    with told("recover", folder):
        _tidy(folder)
        found = segment.bases(folder)
        if not found:
            return []
        repairs = _mend(folder.name, segment.path_of(folder, found[-1]), found)
    for repair in repairs:
        logger.warning("log: %s/%s: %s", repair.partition, repair.segment, repair.what, extra={"repair": repair})
    _write_down(folder.parent / REPAIRS_FILE, repairs)
    return repairs


def _tidy(folder: Path) -> None:
    """Remove drafts of a process that died, and finish what it had begun to put in place."""
    for draft in folder.glob(".*.draft*"):
        draft.unlink(missing_ok=True)
    for salvaged in folder.glob("*" + SALVAGED):
        _put_in_place(salvaged)


def _mend(partition: str, path: Path, bases: list[int]) -> list[Repair]:
    torn_bytes, whats = _mend_wal(path)
    end_offset = _end_of_fit(path)
    if end_offset is None:
        return [_salvage(partition, path, bases)]
    return [Repair(partition, path.name, what, end_offset, torn_bytes) for what in whats]


def _mend_wal(path: Path) -> tuple[int, list[str]]:
    """Cut what is torn at the end of the WAL, seal what is broken before it."""
    wal = Path(f"{path}-wal")
    if not wal.exists() or wal.stat().st_size == 0:
        return 0, []
    state = walfile.inspect(wal, segment.PAGE_BYTES)
    if not state.torn_bytes and not state.broken_frames:
        return 0, []
    whats = []
    if state.torn_bytes:
        whats.append(f"the last append never finished: {state.torn_bytes} bytes behind the last whole one were cut")
    if state.broken_frames:
        whats.append(
            f"{state.broken_frames} pages of the write-ahead file are damaged; all appends behind them were kept"
        )
        shutil.copyfile(wal, f"{wal}{DAMAGED}")
        with segment.drafted(path.parent) as draft:
            walfile.seal(wal, segment.PAGE_BYTES, draft)
            draft.replace(wal)
    else:
        os.truncate(wal, state.whole_bytes)
    segment.sync_folder(path.parent)
    return state.torn_bytes, whats


def _end_of_fit(path: Path) -> int | None:
    """Return the end offset of a segment that can be appended to, None for one that must be salvaged."""
    with contextlib.closing(segment.connect(path, "ro")) as connection:
        try:
            tail = segment.tail_of(connection, int(path.stem))
            segment.producers_of(connection)
            query = f"SELECT {segment.COLUMNS} FROM batches ORDER BY base_offset DESC LIMIT 1"  # noqa: S608
            last = connection.execute(query).fetchone()
        except sqlite3.Error as error:
            if not is_damage(error):
                raise
            return None
        except TypeError:  # the row of `segment` is gone
            return None
        return tail.end_offset if last is None or is_whole(last) else None


def _salvage(partition: str, path: Path, bases: list[int]) -> Repair:
    """Write what is readable into a new file under the same name; the damaged one is set aside."""
    size = path.stat().st_size
    position, holes = bases[-1], list[str]()

    def rows(source: Path) -> Iterator[Row]:
        nonlocal position
        for base_offset, end_offset, row in segment.salvaged(source, position):
            if row is None:
                continue
            if base_offset > position:
                holes.append(f"{position}..{base_offset - 1}")
            position = end_offset
            yield row

    producers, carried_ns = _carried(path, bases)
    salvaged = path.with_name(path.name + SALVAGED)
    with _with_schema(path) as source, segment.drafted(path.parent) as draft:
        segment.fill(draft, rows(source), producers, carried_ns)
        draft.rename(salvaged)
    segment.sync_folder(path.parent)
    damaged = _put_in_place(salvaged)
    lost = f", without the frames {', '.join(holes)}" if holes else ""
    what = f"damaged; everything readable up to offset {position} was kept{lost}; the old file is {damaged}"
    return Repair(partition, path.name, what, position, size)


def _carried(path: Path, bases: list[int]) -> tuple[dict[str, int], int]:
    """Return producers and logged time at the start of a damaged segment, from itself or the one before."""
    with contextlib.closing(segment.connect(path, "ro")) as connection, contextlib.suppress(sqlite3.Error, TypeError):
        connection.execute("PRAGMA writable_schema = ON")
        return segment.carried_by(connection)
    if len(bases) > 1:
        before = segment.path_of(path.parent, bases[-2])
        with (
            contextlib.closing(segment.connect(before, "ro")) as connection,
            contextlib.suppress(sqlite3.Error, TypeError),
        ):
            return segment.producers_of(connection), segment.tail_of(connection, bases[-2]).logged_ns
    return {}, 0


@contextlib.contextmanager
def _with_schema(path: Path) -> Iterator[Path]:
    """Give a file whose tables can be named: the segment, or a copy with the first page of a new one.

    Every segment is made by the same statements, so its tables have their roots on the same pages.
    """
    with contextlib.closing(segment.connect(path, "ro")) as connection, contextlib.suppress(sqlite3.Error):
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute("SELECT base_offset FROM batches WHERE base_offset < 0").fetchone()
        yield path
        return
    with segment.drafted(path.parent) as copy, segment.drafted(path.parent) as new:
        segment.fill(new, (), {}, 0)
        shutil.copyfile(path, copy)
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(f"{path}-wal", f"{copy}-wal")
        first = bytearray(new.read_bytes()[: segment.PAGE_BYTES])
        pages = max(copy.stat().st_size, new.stat().st_size) // segment.PAGE_BYTES
        first[28:32] = pages.to_bytes(4, "big")
        with copy.open("r+b") as file:
            file.write(first)
        yield copy


def _put_in_place(salvaged: Path) -> str:
    """Replace a damaged segment by the salvaged one; done again from any point after a crash it ends the same."""
    path = salvaged.with_name(salvaged.name.removesuffix(SALVAGED))
    damaged = path.with_name(path.name + DAMAGED)
    number = 1
    while damaged.exists() and not damaged.samefile(path):
        damaged, number = path.with_name(f"{path.name}{DAMAGED}-{number}"), number + 1
    for name, aside in ((path, damaged), (Path(f"{path}-wal"), Path(f"{damaged}-wal"))):
        with contextlib.suppress(FileExistsError, FileNotFoundError):
            os.link(name, aside)
    # Before the new file has the name: SQLite would apply the old WAL to it.
    for suffix in ("-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    segment.sync_folder(path.parent)
    salvaged.replace(path)
    segment.sync_folder(path.parent)
    return damaged.name


def _write_down(file: Path, repairs: list[Repair]) -> None:
    if not repairs:
        return
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    lines = [msgspec.json.encode({"at": at, **msgspec.structs.asdict(repair)}) + b"\n" for repair in repairs]
    with told("write", file), file.open("ab") as out:
        out.writelines(lines)
