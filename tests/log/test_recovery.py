"""Torn tails and damaged files: what is whole stays, what is not is reported, nothing wrong is ever read."""

from __future__ import annotations

import json
import logging
import random
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from k2.errors import Corrupt, StoreDown
from k2.log import walfile
from k2.log.embedded import EmbeddedLog
from k2.log.segment import PAGE_BYTES
from k2.model import FRAME, LIVE, Frame

BATCHES = 12
EVERY = [pytest.mark.slow, pytest.mark.timeout(900)]
PER_BATCH = 3


def batch(number: int, size: int = 300) -> list[Frame]:
    draw = random.Random(number)
    return [Frame(FRAME, LIVE, "c", 1, number, place, draw.randbytes(size)) for place in range(PER_BATCH)]


def fill(folder: Path, count: int = BATCHES, first: int = 0, size: int = 300, **options: int) -> EmbeddedLog:
    log = EmbeddedLog(folder, **options)
    for number in range(first, first + count):
        log.append("kraken", batch(number, size), producer="p", sequence=number)
    return log


def crashed_copy(folder: Path, target: Path) -> Path:
    """What a killed process leaves: the files as they are, its WAL included."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*-shm", "*.bell"))
    return target


@pytest.fixture
def crashed(tmp_path: Path) -> Path:
    """A log whose process died with everything still in the WAL."""
    log = fill(tmp_path / "origin")
    copy = crashed_copy(tmp_path / "origin", tmp_path / "crashed")
    log.close()
    return copy


@pytest.fixture
def closed(tmp_path: Path) -> Path:
    """A log that was closed in order: no WAL is left."""
    fill(tmp_path / "closed").close()
    assert [path.name for path in (tmp_path / "closed/kraken").glob("*.db*")] == ["00000000000000000000.db"]
    return tmp_path / "closed"


def newest(folder: Path) -> Path:
    return max((folder / "kraken").glob("*.db"))


def wal_of(folder: Path) -> Path:
    return Path(f"{newest(folder)}-wal")


def overwrite(path: Path, position: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        file.write(data)


def survivors(log: EmbeddedLog) -> list[int]:
    """Numbers of the whole batches that can be read, going on behind damage; none may differ from what was appended."""
    found, offset = [], log.start_offset("kraken")
    while True:
        try:
            batches = log.read("kraken", offset, max_frames=1000)
        except Corrupt as error:
            assert error.first_offset == offset < error.end_offset  # noqa: PT017 - reading goes on
            offset = error.end_offset
            continue
        if not batches:
            return found
        for got in batches:
            assert got.base_offset == offset
            number = got.base_offset // PER_BATCH
            if got.base_offset % PER_BATCH == 0 and len(got.frames) == PER_BATCH:
                found.append(number)
            start = got.base_offset % PER_BATCH
            assert got.frames in (batch(number)[start:], batch(number, 3000)[start:])
            offset = got.end_offset


def check_goes_on(folder: Path, at_least: list[int]) -> list[int]:
    """Recover, read, append, open again: the batches named are there, and so is what is appended now."""
    log = EmbeddedLog(folder)
    log.recover()
    before = survivors(log)
    assert set(at_least) <= set(before)
    end = log.end_offset("kraken")
    assert end % PER_BATCH == 0
    try:
        assert log.append("kraken", batch(end // PER_BATCH), producer="q", sequence=1) == end
    except StoreDown:  # SQLite only found the damage when it wrote: one restart mends it
        log.close()
        return check_goes_on(folder, at_least)
    log.close()
    log = EmbeddedLog(folder)
    assert log.recover() == []
    assert survivors(log) == [*before, end // PER_BATCH]
    log.close()
    return before


def test_clean_log_needs_no_repair(crashed: Path, closed: Path) -> None:
    """Neither an orderly end nor a killed process with whole commits is reported as damage."""
    for folder in (crashed, closed):
        log = EmbeddedLog(folder)

        assert log.recover() == []
        assert survivors(log) == list(range(BATCHES))
        log.close()
        assert not (folder / "repairs.jsonl").exists()


def test_torn_tail_is_cut_reported_and_written_down(crashed: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Half a transaction behind the last whole one: cut, logged, in repairs.jsonl, and not reported twice."""
    wal = wal_of(crashed)
    whole = wal.stat().st_size
    writer = sqlite3.connect(newest(crashed), isolation_level=None)
    writer.execute("PRAGMA wal_autocheckpoint = 0")
    writer.execute("INSERT INTO batches VALUES (1000000, 1, 1, '', 0, 0, 0, zeroblob(20000))")
    content = wal.read_bytes()
    writer.close()
    wal.write_bytes(content[: whole + PAGE_BYTES + 24 + 100])

    with caplog.at_level(logging.WARNING, "k2.log"):
        log = EmbeddedLog(crashed)
        (repair,) = log.recover()

    assert (repair.partition, repair.segment) == ("kraken", "00000000000000000000.db")
    assert (repair.first_offset, repair.bytes) == (BATCHES * PER_BATCH, PAGE_BYTES + 24)
    assert "never finished" in repair.what
    assert repair.what in caplog.text
    (line,) = (crashed / "repairs.jsonl").read_text().splitlines()
    assert json.loads(line)["first_offset"] == BATCHES * PER_BATCH
    assert survivors(log) == list(range(BATCHES))
    log.close()
    assert EmbeddedLog(crashed).recover() == []


def _last_transaction(wal: Path) -> range:
    """Byte positions of the last transaction in a WAL."""
    content = wal.read_bytes()
    frame_bytes = PAGE_BYTES + 24
    starts = range(32, len(content), frame_bytes)
    ends = [start + frame_bytes for start in starts if content[start + 4 : start + 8] != bytes(4)]
    return range(ends[-2], ends[-1])


def _every(positions: range, count: int) -> Iterator[int]:
    draw = random.Random(7)
    # the headers of the two frames always: that is where the fields are
    yield from (positions[i] for i in range(24))
    yield from sorted(draw.sample(positions, count))


@pytest.mark.parametrize("count", [60, pytest.param(10**9, marks=EVERY)])
def test_wal_cut_anywhere_in_the_last_append(crashed: Path, tmp_path: Path, count: int) -> None:
    """A WAL that ends anywhere in its last transaction loses that one only, and says so."""
    positions = _last_transaction(wal_of(crashed))
    content = wal_of(crashed).read_bytes()
    for position in _every(positions, min(count, len(positions))):
        folder = crashed_copy(crashed, tmp_path / "cut")
        wal_of(folder).write_bytes(content[:position])

        log = EmbeddedLog(folder)
        repairs = log.recover()
        log.close()

        # Cut at the very border it is the state before that append: nothing is torn.
        assert [r.first_offset for r in repairs] == [(BATCHES - 1) * PER_BATCH] * (position > positions.start)
        assert check_goes_on(folder, list(range(BATCHES - 1))) == list(range(BATCHES - 1))
        shutil.rmtree(folder)


@pytest.mark.parametrize("count", [60, pytest.param(10**9, marks=EVERY)])
def test_wal_overwritten_anywhere_in_the_last_append(crashed: Path, tmp_path: Path, count: int) -> None:
    """A wrong byte anywhere in the last transaction of the WAL loses at most that one, and is reported."""
    positions = _last_transaction(wal_of(crashed))
    content = wal_of(crashed).read_bytes()
    for position in _every(positions, min(count, len(positions))):
        folder = crashed_copy(crashed, tmp_path / "wrong")
        overwrite(wal_of(folder), position, bytes([content[position] ^ 0x5A]))

        log = EmbeddedLog(folder)
        repairs = log.recover()
        log.close()

        assert len(repairs) == 1
        left = check_goes_on(folder, list(range(BATCHES - 1)))
        assert repairs[0].first_offset == len(left) * PER_BATCH
        shutil.rmtree(folder)


@pytest.mark.parametrize("count", [60, pytest.param(3000, marks=EVERY)])
def test_wal_overwritten_before_the_last_append(crashed: Path, tmp_path: Path, count: int) -> None:
    """A wrong byte earlier in the WAL, where SQLite alone would forget all behind it, keeps the appends behind it."""
    content = wal_of(crashed).read_bytes()
    draw = random.Random(3)
    last = _last_transaction(wal_of(crashed)).start
    for position in [*range(0, 56, 3), *draw.sample(range(56, last - 2 * (PAGE_BYTES + 24)), count)]:
        folder = crashed_copy(crashed, tmp_path / "wrong")
        overwrite(wal_of(folder), position, bytes([content[position] ^ 0x5A]))

        log = EmbeddedLog(folder)
        assert len(log.recover()) == 1
        log.close()

        # At most the batches whose only copy of a page was hit are gone; the last one never.
        left = check_goes_on(folder, [BATCHES - 1])
        assert len(left) >= BATCHES - 2
        shutil.rmtree(folder)


@pytest.mark.parametrize("step", [211, pytest.param(7, marks=pytest.mark.slow)])
def test_database_cut_anywhere_keeps_what_is_readable(closed: Path, tmp_path: Path, step: int) -> None:
    """A database file with its end missing is salvaged; the old one is set aside, and appends go on."""
    size = newest(closed).stat().st_size
    for length in range(0, size, max(step, size // (150 if step < 100 else 25))):
        folder = crashed_copy(closed, tmp_path / "cut")
        with newest(folder).open("r+b") as file:
            file.truncate(length)

        log = EmbeddedLog(folder)
        (repair,) = log.recover()
        log.close()

        assert "the old file is 00000000000000000000.db.damaged" in repair.what
        assert (folder / "kraken/00000000000000000000.db.damaged").stat().st_size == length
        check_goes_on(folder, [])
        shutil.rmtree(folder)


def test_database_without_its_last_pages_keeps_the_batches_before(tmp_path: Path) -> None:
    """Of many batches only those on the missing pages are gone."""
    fill(tmp_path / "log", 200, size=3000).close()
    path = newest(tmp_path / "log")
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 3 * PAGE_BYTES)

    log = EmbeddedLog(tmp_path / "log")
    (repair,) = log.recover()
    assert repair.first_offset >= 197 * PER_BATCH
    assert survivors(log) == list(range(repair.first_offset // PER_BATCH))
    assert log.producer_sequence("kraken", "p") == repair.first_offset // PER_BATCH - 1
    log.close()


def _cell_of_last_batch(path: Path) -> list[int]:
    """Byte positions in the database where the blob of the last batch lies."""
    content = path.read_bytes()
    needle = batch(BATCHES - 1)[-1].data
    at = content.find(needle[:100])
    assert at > 0
    return list(range(at, at + 100))


@pytest.mark.parametrize("count", [12, pytest.param(100, marks=pytest.mark.slow)])
def test_database_overwritten_in_the_last_batch(closed: Path, tmp_path: Path, count: int) -> None:
    """A wrong byte in the last batch cuts that batch, and no other."""
    for position in random.Random(5).sample(_cell_of_last_batch(newest(closed)), count):
        folder = crashed_copy(closed, tmp_path / "wrong")
        overwrite(newest(folder), position, b"\x00\xff\x00\xff")

        log = EmbeddedLog(folder)
        (repair,) = log.recover()

        assert repair.first_offset == (BATCHES - 1) * PER_BATCH
        assert log.producer_sequence("kraken", "p") == BATCHES - 2
        log.close()
        assert check_goes_on(folder, list(range(BATCHES - 1))) == list(range(BATCHES - 1))
        shutil.rmtree(folder)


@pytest.mark.parametrize("count", [80, pytest.param(3000, marks=EVERY)])
def test_database_overwritten_anywhere_never_gives_wrong_frames(tmp_path: Path, count: int) -> None:
    """Whatever byte is wrong, what is read is what was appended, or a damaged range; appends go on."""
    fill(tmp_path / "log", size=3000).close()
    size = newest(tmp_path / "log").stat().st_size
    draw = random.Random(11)
    for position in [*range(100), *draw.sample(range(size), count)][:: 1 if count > 100 else 3]:
        folder = crashed_copy(tmp_path / "log", tmp_path / "wrong")
        overwrite(newest(folder), position, draw.randbytes(1 + position % 9))

        check_goes_on(folder, [])
        shutil.rmtree(folder)


def test_damage_in_the_middle_is_reported_by_reads_and_never_cut(tmp_path: Path) -> None:
    """A bad batch between good ones: reads stop before it, name its range, and go on behind it."""
    fill(tmp_path / "log", size=3000).close()
    path = newest(tmp_path / "log")
    at = path.read_bytes().find(batch(5, 3000)[1].data[:50])
    overwrite(path, at, b"wrong")

    log = EmbeddedLog(tmp_path / "log")

    assert log.recover() == []
    assert log.read("kraken", 0)[-1].end_offset == 15
    with pytest.raises(Corrupt, match=r"frames 15\.\.17 of 'kraken' are damaged") as caught:
        log.read("kraken", 15)
    assert (caught.value.first_offset, caught.value.end_offset) == (15, 18)
    with pytest.raises(Corrupt, match=r"frames 16\.\.17 ") as caught:
        log.read("kraken", 16)
    assert survivors(log) == [n for n in range(BATCHES) if n != 5]
    assert log.append("kraken", batch(BATCHES)) == BATCHES * PER_BATCH
    log.close()


@pytest.mark.parametrize("kind", ["page", "cut"])
def test_damaged_pages_of_a_closed_segment_leave_the_rest_readable(tmp_path: Path, kind: str) -> None:
    """Where SQLite calls an old segment malformed, batches before and behind the damage are still read."""
    fill(tmp_path / "log", 120, size=3000, segment_bytes=500_000).close()
    path = min((tmp_path / "log/kraken").glob("*.db"))
    if kind == "page":
        at = path.read_bytes().find(batch(20, 3000)[0].data[:50])
        overwrite(path, at // PAGE_BYTES * PAGE_BYTES, bytes(PAGE_BYTES))
    else:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - 20 * PAGE_BYTES)

    log = EmbeddedLog(tmp_path / "log")
    found = survivors(log)

    assert log.recover() == []
    assert 0 < 120 - len(found) <= 15
    assert {0, 119} <= set(found)
    log.close()


def test_missing_segment_is_a_damaged_range(tmp_path: Path) -> None:
    """A segment file that somebody removed is a hole with a name, not an endless wait."""
    fill(tmp_path / "log", 120, size=3000, segment_bytes=300_000).close()
    paths = sorted((tmp_path / "log/kraken").glob("*.db"))
    paths[1].unlink()

    log = EmbeddedLog(tmp_path / "log")
    with pytest.raises(Corrupt) as caught:
        log.read("kraken", int(paths[1].stem))

    assert caught.value.end_offset == int(paths[2].stem)
    assert {0, 119} <= set(survivors(log))
    log.close()


@pytest.mark.parametrize("step", ["salvaged", "linked", "without-wal"])
def test_salvage_interrupted_anywhere_is_finished(closed: Path, step: str) -> None:
    """A process killed while it put a salvaged segment in place: the next one ends the same way."""
    path = newest(closed)
    reference = path.read_bytes()
    path.rename(f"{path}.salvaged")  # what was salvaged, whole
    path.write_bytes(reference[:5000])
    wal = Path(f"{path}-wal")
    wal.write_bytes(b"old")
    if step != "salvaged":
        Path(f"{path}.damaged").hardlink_to(path)
    if step == "without-wal":
        wal.unlink()

    log = EmbeddedLog(closed)

    assert survivors(log) == list(range(BATCHES))
    log.close()
    assert Path(f"{path}.damaged").read_bytes() == reference[:5000]
    assert not Path(f"{path}.salvaged").exists()


def test_wal_inspection_agrees_with_sqlite(tmp_path: Path) -> None:
    """The checksums computed here are SQLite's, through checkpoints that start the file anew."""
    path = tmp_path / "a.db"
    wal = tmp_path / "a.db-wal"
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("CREATE TABLE t (x BLOB)")
    for count in (30, 3):
        for number in range(count):
            connection.execute("INSERT INTO t VALUES (?)", (random.Random(number).randbytes(9000),))
        connection.execute("PRAGMA wal_checkpoint(FULL)").fetchall()
    connection.execute("INSERT INTO t VALUES (1)")
    size = wal.stat().st_size

    state = walfile.inspect(wal, PAGE_BYTES)

    assert state.broken_frames == state.torn_bytes == 0
    assert 32 < state.whole_bytes < size  # behind it lie frames of the file's former life
    connection.close()


def test_side_files_of_a_segment_half_removed_go(tmp_path: Path) -> None:
    """A death between the removal of a segment and of its side files leaves nothing for ever; others keep theirs."""
    fill(tmp_path / "log").close()
    folder = tmp_path / "log" / "kraken"
    (newest,) = folder.glob("*.db")
    left = [folder / f"{BATCHES:020d}.db{suffix}" for suffix in ("-wal", "-shm")]
    for path in left:
        path.write_bytes(b"left behind")
    log = EmbeddedLog(tmp_path / "log")
    log.recover()

    assert not any(path.exists() for path in left)
    assert newest.exists()
    assert log.end_offset("kraken") == BATCHES * PER_BATCH
    log.close()
