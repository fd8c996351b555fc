"""How many small records a second does the embedded log make durable, how fast is one, and how fast is it read back?

Records of 200 bytes that zstd cannot shrink much, synced to disk before they are acknowledged (`log.sync = full`):
from one thread batches of 500, as capture appends them at 100,000 messages a second, and of 100; one record a call
from 64 threads; everything read back; and the delay from an append to a waiting reader of another process. Beside it,
in turns, what the disk itself does: the same bytes, packed beforehand, written and synced (fdatasync) without a log, at
the end of a growing file, and over bytes that are there already.
"""

from __future__ import annotations

import base64
import multiprocessing
import os
import random
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from harness import LOWER, Figure, Measured, Run, at_least, below, main
from k2.log.codec import encode
from k2.log.embedded import EmbeddedLog
from k2.model import FRAME, LIVE, Frame

_WHY = (
    "The disk alone, in the same run, says how much of it a sync takes; packing a batch takes 0.2 ms of a processor. "
    "What is beyond both is waiting for a processor, and for the checkpoint beside the appends, which syncs the same "
    "disk every 4 MiB."
)
FIGURES = {
    "batched": Figure("records/s", bars=(at_least(500_000),), what="batches of 500, one caller"),
    "batched_100": Figure("records/s", what="batches of 100, one caller"),
    "single": Figure("records/s", bars=(at_least(20_000),), what="one record a call, 64 callers"),
    "append": Figure("ms", LOWER, (below(5),), "p99", "one batch of 500, until it is durable", _WHY),
    "append_100": Figure("ms", LOWER, (below(5),), "p99", "one batch of 100", _WHY),
    "read": Figure("records/s", what="read back, checksums verified"),
    "woken": Figure("ms", LOWER, statistic="p99", what="from append to a waiting reader of another process"),
}

_CALLERS = 64


def measure(run: Run) -> None:
    """Each round on a log of its own."""
    draw = random.Random(1)
    frames = [
        Frame(FRAME, LIVE, "c", 1, i, time.time_ns(), base64.b64encode(draw.randbytes(150))) for i in range(10_000)
    ]
    seconds = 0.2 if run.quick else 2.0
    folders: Iterator[Path] = (run.folder / str(number) for number in range(100))

    def one_round() -> Measured:
        folder = next(folders)
        log = EmbeddedLog(folder, sync="full")
        try:
            return {
                **_batches(log, frames, seconds, 500, ""),
                **_batches(log, frames, seconds, 100, "_100"),
                "single": _one_a_call(log, frames, seconds),
                "read": _read_back(log),
                "woken": _wake_other_process(log, folder, frames, 20 if run.quick else 300),
            }
        finally:
            log.close()

    def disk_alone(size: int, is_growing: bool) -> Measured:
        blobs = [encode(frames[i : i + size])[1] for i in range(0, len(frames), size)]
        return _synced_writes(next(folders), blobs, seconds / 2, is_growing)

    def both_sizes(is_growing: bool) -> Measured:
        return {"append": disk_alone(500, is_growing), "append_100": disk_alone(100, is_growing)}

    run.interleave(
        {
            "k2": one_round,
            "disk, growing file": lambda: both_sizes(True),
            "disk, in place": lambda: both_sizes(False),
        },
        rounds=3,
        warm=0,
    )


def _synced_writes(path: Path, blobs: Sequence[bytes], seconds: float, is_growing: bool) -> list[float]:
    """Write and sync one after the other; return how long each took, in ms."""
    taken: list[float] = []
    file = os.open(path, os.O_CREAT | os.O_RDWR)
    try:
        if not is_growing:
            os.write(file, b"".join(blobs))
            os.fsync(file)
        begin, place = time.perf_counter(), 0
        while time.perf_counter() - begin < seconds:
            number = len(taken) % len(blobs)
            if number == 0 and not is_growing:
                place = 0
            at = time.perf_counter()
            os.pwrite(file, blobs[number], place)
            os.fdatasync(file)
            taken.append((time.perf_counter() - at) * 1e3)
            place += len(blobs[number])
    finally:
        os.close(file)
    return taken


def _batches(log: EmbeddedLog, frames: list[Frame], seconds: float, size: int, name: str) -> Measured:
    """One thread, one batch after the other."""
    cuts = [frames[i : i + size] for i in range(0, len(frames), size)]
    taken: list[float] = []
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds:
        at = time.perf_counter()
        log.append("batches", cuts[len(taken) % len(cuts)])
        taken.append((time.perf_counter() - at) * 1e3)
    rate = size * len(taken) / (time.perf_counter() - begin)
    return {f"batched{name}": rate, f"append{name}": taken}


def _one_a_call(log: EmbeddedLog, frames: list[Frame], seconds: float) -> float:
    """Each thread waits for its own record to be durable before the next."""
    counts = [0] * _CALLERS
    until = time.perf_counter() + seconds

    def work(index: int) -> None:
        while time.perf_counter() < until:
            log.append("single", [frames[counts[index] % len(frames)]])
            counts[index] += 1

    threads = [threading.Thread(target=work, args=(i,)) for i in range(_CALLERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / seconds


def _read_back(log: EmbeddedLog) -> float:
    offset, begin = 0, time.perf_counter()
    while batches := log.read("batches", offset):
        offset = batches[-1].end_offset
    return offset / (time.perf_counter() - begin)


def _wake_other_process(log: EmbeddedLog, folder: Path, frames: list[Frame], count: int) -> list[float]:
    """From the moment `append` is called to the moment a waiting process is awake, in ms."""
    here, there = multiprocessing.get_context("spawn").Pipe()
    waiter = multiprocessing.get_context("spawn").Process(target=_waiter, args=(folder, there, count))
    waiter.start()
    delays = []
    for _ in range(count):
        here.recv()
        time.sleep(0.003)  # it says it is ready just before it waits
        at = time.perf_counter()
        log.append("woken", frames[:1])
        delays.append((here.recv() - at) * 1e3)
    waiter.join()
    return delays


def _waiter(folder: Path, pipe: Connection, count: int) -> None:
    log = EmbeddedLog(folder)
    known = {name: log.end_offset(name) for name in log.partitions()}
    for number in range(count):
        pipe.send("ready")
        log.wait({**known, "woken": number}, 10)
        pipe.send(time.perf_counter())
    log.close()


if __name__ == "__main__":
    main(__file__)
