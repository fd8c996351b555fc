"""What the embedded log adds to the port: files, reopening, rotation, clear errors."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from k2.errors import Rejected, StoreDown
from k2.log import open_log
from k2.log.checkpoint import MOST_WAL_BYTES, WAL_BYTES
from k2.log.embedded import EmbeddedLog
from k2.model import FRAME, LIVE, Frame
from k2.settings import Settings

SECOND_NS = 1_000_000_000


def frames(count: int = 1, size: int = 100) -> list[Frame]:
    return [Frame(FRAME, LIVE, "c", 1, i, i, os.urandom(size)) for i in range(count)]


def segments(log: EmbeddedLog, partition: str = "kraken") -> list[int]:
    return sorted(int(path.stem) for path in (log.folder / partition).glob("*.db"))


@pytest.fixture
def log(tmp_path: Path) -> Iterator[EmbeddedLog]:
    log = EmbeddedLog(tmp_path / "log")
    yield log
    log.close()


def test_open_log_takes_the_folder_and_options_of_the_settings(tmp_path: Path) -> None:
    """The log of an installation lies in `log` of its data folder; nothing is made before it is needed."""
    log = open_log(Settings(data=str(tmp_path)))

    assert log.partitions() == []
    assert list(tmp_path.iterdir()) == []
    log.append("kraken", frames())
    assert (tmp_path / "log/kraken/00000000000000000000.db").is_file()
    log.close()


@pytest.mark.parametrize("sync", ["full", "normal"])
def test_everything_is_there_after_reopening(tmp_path: Path, sync: str) -> None:
    """Frames, producers and reader positions survive a close, with either sync policy."""
    first = EmbeddedLog(tmp_path, sync=sync)  # type: ignore[arg-type]
    stored = frames(5)
    first.append("kraken", stored, producer="p", sequence=4)
    first.commit_reader("r", {"kraken": 3})
    first.close()

    second = EmbeddedLog(tmp_path, sync=sync)  # type: ignore[arg-type]
    assert second.read("kraken", 0)[0].frames == stored
    assert second.append("kraken", frames(), producer="p", sequence=4) == -1
    assert second.append("kraken", frames(), producer="p", sequence=5) == 5
    assert second.reader_position("r", "kraken") == 3
    second.close()


def test_segment_is_closed_at_its_size(tmp_path: Path) -> None:
    """Files stay near `segment_bytes`; each starts where the one before ends."""
    log = EmbeddedLog(tmp_path, segment_bytes=100_000)
    for _ in range(30):
        log.append("kraken", frames(10, 1000))

    assert len(segments(log)) >= 3
    log.close()
    for base in segments(log):
        assert (tmp_path / f"kraken/{base:020d}.db").stat().st_size <= 120_000


def test_write_ahead_file_stays_small_while_appends_go_on(tmp_path: Path) -> None:
    """What was appended is moved into the database beside the appends, faster than they come if need be."""
    log = EmbeddedLog(tmp_path, sync="normal", segment_bytes=1 << 30)
    stored = frames(1, 1 << 20)
    sizes = []
    for _ in range(60):
        log.append("kraken", stored)
        sizes.append((tmp_path / "kraken/00000000000000000000.db-wal").stat().st_size)
    newest = log.read("kraken", 59)

    assert max(sizes) <= MOST_WAL_BYTES + WAL_BYTES + (2 << 20)
    assert (tmp_path / "kraken/00000000000000000000.db").stat().st_size >= (60 << 20) - max(sizes)
    assert newest[0].frames == stored
    log.close()


def test_append_is_stored_where_no_thread_can_be_started(log: EmbeddedLog) -> None:
    """What was appended is then moved by the appender itself: no append fails, and the write-ahead file stays small."""
    wal = log.folder / "kraken/00000000000000000000.db-wal"
    before = threading.stack_size(1 << 47)  # more than there are addresses
    try:
        with pytest.raises(RuntimeError):
            threading.Thread(target=int).start()
        sizes = []
        for number in range(12):
            assert log.append("kraken", frames(1, 1 << 20)) == number
            sizes.append(wal.stat().st_size)
    finally:
        threading.stack_size(before)

    assert max(sizes) <= WAL_BYTES + (2 << 20)
    log.close()


def test_append_that_closes_a_segment_while_the_log_is_closed_is_stored(tmp_path: Path) -> None:
    """Closing finishes pending appends, also one that removes what is above the size limit."""
    closers: list[threading.Thread] = []

    def clock() -> int:
        if closing.is_set():
            closing.clear()
            closers.append(threading.Thread(target=log.close))
            closers[0].start()
            with contextlib.suppress(Rejected):
                while True:
                    log.partitions()
        return SECOND_NS

    closing = threading.Event()
    log = EmbeddedLog(tmp_path / "log", segment_bytes=20_000, max_bytes=30_000, clock=clock)
    for _ in range(3):
        log.append("kraken", frames(1, 8_000))
    closing.set()
    kept = segments(log)

    assert log.append("kraken", frames(1, 8_000)) == 3
    closers[0].join()
    assert segments(log) != kept
    with contextlib.closing(EmbeddedLog(tmp_path / "log")) as again:
        assert again.end_offset("kraken") == 4


def test_segment_is_closed_at_its_age_by_logged_time(tmp_path: Path) -> None:
    """The first batch `segment_seconds` after the first of the segment starts a new one."""
    now = [10**18]
    log = EmbeddedLog(tmp_path, segment_seconds=60, clock=lambda: now[0])
    for seconds in (0, 30, 29, 2, 58, 60):
        now[0] += seconds * SECOND_NS
        log.append("kraken", frames())

    assert segments(log) == [0, 3, 5]
    log.close()


def test_steps_of_the_clock_are_written_down_and_rotation_goes_on(tmp_path: Path) -> None:
    """A step back starts a segment, whoever made the one before, and segments are closed by age as ever."""
    now = [1_700_000_000 * SECOND_NS]
    log = EmbeddedLog(tmp_path, segment_seconds=60, clock=lambda: now[0])
    log.append("kraken", frames())
    now[0] = 4_102_444_800 * SECOND_NS
    log.append("kraken", frames())
    log.close()
    now[0] = 1_700_000_010 * SECOND_NS
    again = EmbeddedLog(tmp_path, segment_seconds=60, clock=lambda: now[0])
    for seconds in (0, 30, 29, 2):
        now[0] += seconds * SECOND_NS
        again.append("kraken", frames())
    again.close()

    assert segments(again) == [0, 1, 2, 5]
    steps = [json.loads(line) for line in (tmp_path / "repairs.jsonl").read_text().splitlines()]
    assert [(s["partition"], s["first_offset"], "set forward" in s["what"]) for s in steps] == [
        ("kraken", 1, True),
        ("kraken", 2, False),
    ]


def test_two_logs_see_each_others_rotation(tmp_path: Path) -> None:
    """A writer whose segment another one closed goes on in the new one; nothing lands in a closed file."""
    one, two = (EmbeddedLog(tmp_path, segment_bytes=60_000) for _ in range(2))

    offsets = [log.append("kraken", frames(3, 1000)) for _ in range(40) for log in (one, two, two)]

    assert offsets == list(range(0, 360, 3))
    assert len(segments(one)) > 3
    assert sum(len(batch.frames) for batch in two.read("kraken", 0)) == 360
    one.close()
    two.close()


def test_creation_of_a_segment_interrupted_is_made_up(tmp_path: Path) -> None:
    """A process that died after closing a segment, before making the next: the next append makes it."""
    log = EmbeddedLog(tmp_path, segment_bytes=30_000)
    while len(segments(log)) < 3:
        last = log.append("kraken", frames(3, 1000))
    log.close()
    (tmp_path / f"kraken/{last:020d}.db").unlink()
    (tmp_path / "kraken/.0123.draft").write_bytes(b"left over")

    log = EmbeddedLog(tmp_path, segment_bytes=30_000)

    assert log.recover() == []
    assert log.end_offset("kraken") == last
    assert log.append("kraken", frames()) == last
    assert segments(log)[-1] == last
    assert list((tmp_path / "kraken").glob(".*.draft")) == []
    log.close()


def test_other_folders_are_no_partitions(log: EmbeddedLog) -> None:
    """Only folders with a segment count, and a partition may be called `waiters`."""
    log.append("waiters", frames())
    (log.folder / "empty").mkdir()
    (log.folder / "Odd.Name").mkdir()
    log.wait({}, 0.01)
    log.wait({"waiters": 1}, 0.01)

    assert log.partitions() == ["waiters"]


def test_trimmed_files_are_gone(tmp_path: Path) -> None:
    """Retention frees the space, side files included."""
    log = EmbeddedLog(tmp_path, segment_bytes=30_000)
    for _ in range(30):
        log.append("kraken", frames(3, 1000))
    log.read("kraken", 0)
    log.commit_reader("r", {"kraken": log.end_offset("kraken")})

    start = log.trim(keep_seconds=-1)["kraken"]

    assert segments(log) == [start]
    assert {path.name[:20] for path in (tmp_path / "kraken").glob("*.db*")} == {f"{start:020d}"}
    log.close()


def test_reader_elsewhere_survives_trimming(tmp_path: Path) -> None:
    """Another log object learns by its next call that retention removed what it wanted."""
    one, two = (EmbeddedLog(tmp_path, segment_bytes=30_000) for _ in range(2))
    for _ in range(30):
        one.append("kraken", frames(3, 1000))
    assert two.read("kraken", 0, max_frames=1)
    one.commit_reader("r", {"kraken": one.end_offset("kraken")})
    start = one.trim(keep_seconds=-1)["kraken"]

    with pytest.raises(Rejected, match=f"removed everything below {start}"):
        two.read("kraken", 1)
    assert two.start_offset("kraken") == start
    one.close()
    two.close()


def test_queue_limit_holds_callers_back_but_loses_nothing(tmp_path: Path) -> None:
    """With a queue of a few frames many threads still get everything stored, large batches too."""
    log = EmbeddedLog(tmp_path, queue_frames=4, queue_bytes=2_000)
    threads = [
        threading.Thread(target=lambda n=n: [log.append("kraken", frames(1 + n, 500)) for _ in range(10)])
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert log.end_offset("kraken") == 10 * sum(range(1, 9))
    log.close()


def test_log_carried_over_a_fork_is_refused(log: EmbeddedLog) -> None:
    """A child that inherited the object is told to open its own."""
    log.append("kraken", frames())
    child = os.fork()
    if child == 0:
        try:
            log.end_offset("kraken")
        except Rejected as error:
            os._exit(7 if "fork" in str(error) else 1)
        os._exit(1)

    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


_FULL = """
import sys, pathlib, os
from k2.errors import StoreDown
from k2.log.embedded import EmbeddedLog
from k2.model import Frame
folder = pathlib.Path(sys.argv[1])
log = EmbeddedLog(folder / "log", segment_bytes=500_000)
frames = [Frame("frame", "live", "c", 1, 0, 0, os.urandom(20_000))] * 4
ballast = folder / "ballast"
ballast.write_bytes(bytes(3 << 20))
stored = refused = 0
while not refused:
    try:
        log.append("kraken", frames); stored += 1
    except StoreDown as error:
        refused += 1; print(error)
try:
    log.append("kraken", frames); stored += 1
except StoreDown as error:
    print(error)
ballast.unlink()
for _ in range(5):
    log.append("kraken", frames); stored += 1
offset = 0
while batches := log.read("kraken", offset):
    assert all(b.frames == frames[:len(b.frames)] for b in batches)
    offset = batches[-1].end_offset
assert offset == 4 * stored, (offset, stored)
log.close()
log = EmbeddedLog(folder / "log")
log.recover()
assert log.end_offset("kraken") == 4 * stored
log.close()
print("went on")
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB of its own; only root may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here (needs root)")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_full_disk_is_said_and_appends_go_on_when_there_is_space(small_disk: Path) -> None:
    """A full disk raises StoreDown and says so; nothing half is kept; no restart is needed."""
    done = subprocess.run([sys.executable, "-c", _FULL, str(small_disk)], capture_output=True, text=True, timeout=60)

    assert done.returncode == 0, done.stderr
    assert "the disk is full; free space and append again" in done.stdout.splitlines()[0]
    assert done.stdout.splitlines()[-1] == "went on"


def test_read_only_disk_is_said(small_disk: Path) -> None:
    """On a file system remounted read-only an append says what to do, and works when it is writable again."""
    log = EmbeddedLog(small_disk / "log")
    try:
        subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
        with pytest.raises(StoreDown, match="the file system is read-only"):
            log.append("kraken", frames())
        subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
        assert log.append("kraken", frames()) == 0
    finally:
        log.close()


_NOT_ALLOWED = """
import os, pathlib, sys
from k2.errors import StoreDown
from k2.log.embedded import EmbeddedLog
from k2.model import Frame
folder = pathlib.Path(sys.argv[1])
folder.chmod(0o555)
if os.getuid() == 0:
    os.seteuid(65534)  # permissions do not bind root
log = EmbeddedLog(folder / "log")
try:
    log.append("kraken", [Frame("frame", "live", "c", 1, 0, 0, b"")])
except StoreDown as error:
    print(error)
"""


def test_missing_permission_is_said(tmp_path: Path) -> None:
    """A folder this user may not write gives the reason and the mend."""
    done = subprocess.run([sys.executable, "-c", _NOT_ALLOWED, str(tmp_path)], capture_output=True, text=True)

    assert "no permission; let this user read and write the folder" in done.stdout, done.stderr


def test_too_many_open_files_is_said_and_passes(log: EmbeddedLog) -> None:
    """Without a free file descriptor an append says so, and works when there is one again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    taken: list[int] = []
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        with pytest.raises(StoreDown, match="too many open files; raise `ulimit -n`"):
            log.append("kraken", frames())
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    assert log.append("kraken", frames()) == 0
