"""Mending the newest segment of a partition after a crash or a damaged disk, and reporting what was done.

Runs before anything else opens the partition, while no other process has it open. Only what was
being written can be torn, so only the newest segment is looked at. Damage further back is left
as it is: reads report its range (`Corrupt`) and go on behind it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from k2 import meters
from k2.durable import sync_folder
from k2.log import segment, walfile
from k2.log.carve import carve
from k2.log.codec import Row, is_whole
from k2.log.failures import is_damage, told

logger = logging.getLogger(__name__)
REPAIRS_FILE = "repairs.jsonl"
REPAIRS_BYTES = 4 << 20  # of it; one older file is kept
SALVAGED, DAMAGED, SUSPECT = ".salvaged", ".damaged", ".suspect"


def _header(identity: bytes) -> bytes:
    """Return the constant part of a segment's header: WAL, no free pages, schema format 4, UTF-8, identity or none.

    Source: sqlite.org/fileformat2.html, 1.3.
    """
    return (
        b"SQLite format 3\0"
        + segment.PAGE_BYTES.to_bytes(2, "big")
        + b"\x02\x02\x00\x40\x20\x20"
        + bytes(20)
        + b"\0\0\0\x04"
        + bytes(8)
        + b"\0\0\0\x01"
        + identity
        + bytes(20)
    )


# Of the newest form, and of the first, which had no identity and may stand below a WAL that gives it one.
OUR_HEADERS = tuple(
    _header(form.to_bytes(4, "big") + bytes(4) + number.to_bytes(4, "big"))
    for form, number in ((segment.FORM, segment.APPLICATION_ID), (0, 0))
)


class Repair(msgspec.Struct, frozen=True):
    """One mending: what was wrong, from which offset on frames were cut or lost, how many stored bytes that concerns.

    `bytes` of a torn tail are those cut, of a salvaged segment the size of the file set aside; 0 for a
    step of the clock, which is written down in the same way.
    A `first_offset` below the position of a reader means that frames it has read are gone
    from the log, and that their offsets are used again.
    """

    partition: str
    segment: str
    what: str
    first_offset: int
    bytes: int


def suspect_mark(path: Path) -> Path:
    """Return the file an appender leaves beside a segment that SQLite calls damaged: the next one salvages it."""
    return path.with_name(path.name + SUSPECT)


def recover(folder: Path) -> list[Repair]:
    """Make the newest segment of a partition fit to be appended to; return and report what had to be done."""
    with told("recover", folder):
        _tidy(folder)
        found = segment.bases(folder)
        if not found:
            return []
        repairs = _mend(folder.name, segment.path_of(folder, found[-1]), found)
    report(folder, repairs)
    return repairs


def report(folder: Path, repairs: list[Repair]) -> None:
    """Warn of what was found in a partition, and write it down for later."""
    for repair in repairs:
        logger.warning("log: %s/%s: %s", repair.partition, repair.segment, repair.what, extra={"repair": repair})
    _write_down(folder.parent / REPAIRS_FILE, repairs)


def _tidy(folder: Path) -> None:
    """Remove drafts of a process that died, and finish what it had begun to put in place."""
    for draft in folder.glob(".*.draft*"):
        draft.unlink(missing_ok=True)
    for salvaged in folder.glob("*" + SALVAGED):
        _put_in_place(salvaged)
    for side in (*folder.glob("*.db-wal"), *folder.glob("*.db-shm")):  # of a segment whose removal was cut short
        if not Path(str(side)[: -len("-wal")]).exists():
            side.unlink(missing_ok=True)


def _mend(partition: str, path: Path, bases: list[int]) -> list[Repair]:
    """Cut a torn tail; a segment with any other damage is salvaged, for SQLite may make it worse."""
    wal = Path(f"{path}-wal")
    state = walfile.inspect(wal, segment.PAGE_BYTES) if wal.exists() else walfile.WalState(0, 0)
    if state.broken_frames or suspect_mark(path).exists() or not _has_our_header(path):
        return [_salvage(partition, path, bases)]
    if state.torn_bytes:
        os.truncate(wal, state.whole_bytes)
    end_offset = _end_of_fit(path)
    if end_offset is None:
        return [_salvage(partition, path, bases)]
    if not state.torn_bytes:
        return []
    what = f"the last append never finished: {state.torn_bytes} bytes behind the last whole one were cut"
    return [Repair(partition, path.name, what, end_offset, state.torn_bytes)]


def _has_our_header(path: Path) -> bool:
    """Return whether the file has whole pages, and the fields of its header that never change are as we make them.

    SQLite believes the header: another version makes the file read-only, a list of free pages is written to.
    """
    with path.open("rb") as file:
        header = file.read(92)
    is_ours = _constant_fields(header) in map(_constant_fields, OUR_HEADERS)
    return path.stat().st_size % segment.PAGE_BYTES == 0 and is_ours


def _constant_fields(header: bytes) -> tuple[bytes, ...]:
    return header[:24], header[32:40], header[44:92]


def _end_of_fit(path: Path) -> int | None:
    """Return the end offset of a segment that can be appended to, None for one that must be salvaged."""
    with contextlib.closing(segment.connect(path, "ro")) as connection:
        try:
            tail = segment.tail_of(connection, int(path.stem))
            segment.producers_of(connection)
            query = f"SELECT {segment.COLUMNS} FROM batches ORDER BY base_offset DESC LIMIT 1"  # noqa: S608
            last = connection.execute(query).fetchone()
            # Every page of the index, not the blobs: a search may not find what lies behind a damaged one.
            connection.execute("SELECT sum(count) FROM batches").fetchone()
        except sqlite3.Error as error:
            if not is_damage(error):
                raise
            return None
        except TypeError:  # the row of `segment` is gone, or no numbers are in it
            return None
        return tail.end_offset if last is None or is_whole(last) else None


def _salvage(partition: str, path: Path, bases: list[int]) -> Repair:
    """Write what is readable into a new file under the same name; the damaged one is set aside."""
    size = path.stat().st_size
    position, holes = bases[-1], list[str]()

    def rows() -> Iterator[Row]:
        nonlocal position
        for row in carve(path):
            if row[0] < position:
                continue
            if row[0] > position:
                holes.append(f"{position}..{row[0] - 1}")
            position = row[0] + row[1]
            yield row

    producers, carried_ns = _carried(path, bases)
    salvaged = path.with_name(path.name + SALVAGED)
    with segment.drafted(path.parent) as draft:
        segment.fill(draft, rows(), producers, carried_ns)
        draft.rename(salvaged)
    sync_folder(path.parent)
    damaged = _put_in_place(salvaged)
    lost = f", without the frames {', '.join(holes)}" if holes else ""
    what = f"damaged; everything readable up to offset {position} was kept{lost}; the old file is {damaged}"
    return Repair(partition, path.name, what, position, size)


def _carried(path: Path, bases: list[int]) -> tuple[dict[str, int], int]:
    """Return producers and logged time at the start of a damaged segment, from itself or the one before."""
    sources = [(path, segment.carried_by)]
    if len(bases) > 1:
        sources.append((segment.path_of(path.parent, bases[-2]), segment.left_by))
    for source, ask in sources:
        with contextlib.closing(segment.connect(source, "ro")) as connection:
            connection.execute("PRAGMA writable_schema = ON")
            with contextlib.suppress(sqlite3.Error, TypeError, msgspec.ValidationError):
                producers, carried_ns = msgspec.convert(ask(connection), tuple[dict[str, int], int])
                return producers, min(carried_ns, time.time_ns())  # garbage must not send the log into the future
    return {}, 0


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
    for suffix in ("-wal", "-shm", SUSPECT):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    sync_folder(path.parent)
    salvaged.replace(path)
    sync_folder(path.parent)
    return damaged.name


def _write_down(file: Path, repairs: list[Repair]) -> None:
    if not repairs:
        return
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    lines = [msgspec.json.encode({"at": at, **msgspec.structs.asdict(repair)}) + b"\n" for repair in repairs]
    with told("write", file):
        if file.exists() and file.stat().st_size >= REPAIRS_BYTES:
            meters.acted("log.repairs")
            file.replace(file.with_name(f"{file.name}.1"))
        with file.open("ab") as out:
            out.writelines(lines)
