"""How many small records a second does the embedded log make durable, and read back?

    python bench/log_append.py [--sync full|normal] [--seconds 4]

Records of 200 bytes that zstd cannot shrink much; batches of 100 from one thread, then one record a call
from 64 threads, then everything read back, then the delay from an append to a waiter of another process.
"""

from __future__ import annotations

import argparse
import base64
import json
import multiprocessing
import os
import platform
import random
import statistics
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

from k2.log.embedded import EmbeddedLog
from k2.model import FRAME, LIVE, Frame


def main() -> None:
    """Measure and print one line of JSON."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--sync", choices=("full", "normal"), default="full")
    arguments.add_argument("--seconds", type=float, default=4.0)
    given = arguments.parse_args()
    draw = random.Random(1)
    frames = [
        Frame(FRAME, LIVE, "c", 1, i, time.time_ns(), base64.b64encode(draw.randbytes(150))) for i in range(10_000)
    ]
    with tempfile.TemporaryDirectory(dir=".") as folder:
        log = EmbeddedLog(Path(folder), sync=given.sync)
        result = {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "sync": given.sync,
            "record_bytes": 200,
            **batches_of_100(log, frames, given.seconds),
            **one_record_a_call(log, frames, given.seconds),
            **read_back(log),
            **wake_other_process(log, Path(folder), frames),
        }
        log.close()
    print(json.dumps(result, indent=2))


def batches_of_100(log: EmbeddedLog, frames: list[Frame], seconds: float) -> dict[str, float]:
    """One thread, one batch after the other."""
    cuts = [frames[i : i + 100] for i in range(0, len(frames), 100)]
    taken: list[float] = []
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds:
        at = time.perf_counter()
        log.append("batches", cuts[len(taken) % len(cuts)])
        taken.append(time.perf_counter() - at)
    rate = 100 * len(taken) / (time.perf_counter() - begin)
    taken.sort()
    return {
        "batched_records_per_second": round(rate),
        "append_p50_ms": round(taken[len(taken) // 2] * 1e3, 3),
        "append_p99_ms": round(taken[int(len(taken) * 0.99)] * 1e3, 3),
        "append_max_ms": round(taken[-1] * 1e3, 3),
    }


def one_record_a_call(log: EmbeddedLog, frames: list[Frame], seconds: float) -> dict[str, float]:
    """64 threads, each waits for its own record to be durable before the next."""
    counts = [0] * 64
    until = time.perf_counter() + seconds

    def work(index: int) -> None:
        while time.perf_counter() < until:
            log.append("single", [frames[counts[index] % len(frames)]])
            counts[index] += 1

    threads = [threading.Thread(target=work, args=(i,)) for i in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"single_records_per_second": round(sum(counts) / seconds)}


def read_back(log: EmbeddedLog) -> dict[str, float]:
    """Everything of the batched partition, checksums verified, decoded to frames."""
    offset, begin = 0, time.perf_counter()
    while batches := log.read("batches", offset):
        offset = batches[-1].end_offset
    return {"read_records_per_second": round(offset / (time.perf_counter() - begin))}


def wake_other_process(log: EmbeddedLog, folder: Path, frames: list[Frame]) -> dict[str, float]:
    """From the moment `append` is called to the moment a waiting process is awake."""
    here, there = multiprocessing.get_context("spawn").Pipe()
    waiter = multiprocessing.get_context("spawn").Process(target=_waiter, args=(folder, there))
    waiter.start()
    delays = []
    for _ in range(300):
        here.recv()
        time.sleep(0.003)
        at = time.perf_counter()
        log.append("woken", frames[:1])
        durable = time.perf_counter()
        woken_at = here.recv()
        delays.append((woken_at - at, max(0.0, woken_at - durable)))
    waiter.join()
    return {
        "append_to_woken_p50_ms": round(statistics.median(d[0] for d in delays) * 1e3, 3),
        "append_to_woken_p99_ms": round(sorted(d[0] for d in delays)[-3] * 1e3, 3),
        "acknowledged_to_woken_p50_ms": round(statistics.median(d[1] for d in delays) * 1e3, 3),
    }


def _waiter(folder: Path, pipe: Connection) -> None:
    log = EmbeddedLog(folder)
    known = {name: log.end_offset(name) for name in log.partitions()}
    for count in range(300):
        pipe.send("ready")
        log.wait({**known, "woken": count}, 10)
        pipe.send(time.perf_counter())
    log.close()


if __name__ == "__main__":
    main()
