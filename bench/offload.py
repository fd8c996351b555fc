"""How many rows a second move into Iceberg: trades from the hot tier, frames from the log?

Made trades of 100 symbols and a day, in hot as ingest's flushes leave them; recorded Binance frames, over and over, in
the log. Each round moves all of them into a new, empty cold tier: read, checked against the counts, sorted,
written as Parquet (zstd), synced, committed in steps of `cold.commit_rows` (500,000).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import inputs
from harness import Figure, Measured, Run, at_least, main
from k2.cold import open_cold
from k2.hot import OWN, open_hot
from k2.hot.base import Hot
from k2.log.base import Log
from k2.log.embedded import EmbeddedLog
from k2.model import Frame, Positions
from k2.run.offload import Offloader
from k2.settings import load

_WHY = (
    "Reading a slice from hot and writing the one before as Parquet run beside each other; each takes about 0.4 us of "
    "a core a row, and both cores are full."
)
_WHY_FRAMES = (
    "Decoding a batch of the log (0.65 us a frame) and taking it apart into columns (0.25) hold the interpreter. It "
    "would take batches that are stored by column."
)
FIGURES = {
    "trades": Figure("rows/s", bars=(at_least(1_000_000),), what="hot to Iceberg", why=_WHY),
    "frames": Figure("rows/s", bars=(at_least(1_000_000),), what="log to Iceberg", why=_WHY_FRAMES),
}

_PARTITION = "binance"
_FLUSH_ROWS = 50_000
_BATCH_FRAMES = 500


def measure(run: Run) -> None:
    """Hot and log are filled once; cold is another folder each round."""
    count = 20_000 if run.quick else 3_000_000
    hot = open_hot(load({"data": str(run.folder / "hot")}, environment={}), OWN)
    log = EmbeddedLog(run.folder / "log", sync="normal")
    empty = EmbeddedLog(run.folder / "empty", sync="normal")
    folders = (run.folder / f"cold-{number}" for number in range(100))
    try:
        rows = inputs.trades(count, 100)
        for start in range(0, count, _FLUSH_ROWS):
            hot.write("trades", rows.slice(start, _FLUSH_ROWS), f"made:{start}")
        _fill(log, inputs.frames(run, _PARTITION, 20_000), count)

        def one_round() -> Measured:
            return {
                "trades": _moved(next(folders), hot, empty, {_PARTITION: count}, "trades", count),
                "frames": _moved(next(folders), hot, log, {}, "frames", count),
            }

        run.interleave({"k2": one_round}, rounds=3)
        run.detail(rows=count, symbols=100, cold_bytes=_cold_bytes(run.folder, count))
    finally:
        hot.close()
        log.close()
        empty.close()


def _fill(log: Log, frames: list[Frame], count: int) -> None:
    batches = [frames[i : i + _BATCH_FRAMES] for i in range(0, len(frames) - _BATCH_FRAMES + 1, _BATCH_FRAMES)]
    for number in range(count // _BATCH_FRAMES):
        log.append(_PARTITION, batches[number % len(batches)])


def _moved(folder: Path, hot: Hot, log: Log, progress: Positions, table: str, count: int) -> float:
    """Move everything into a new cold tier, and return the rows a second."""
    settings = load({"data": str(folder)}, environment={})
    cold = open_cold(settings)
    try:
        cold.acquire_lease()
        began = time.perf_counter()
        done = Offloader(settings, log, hot, cold, lambda: progress).run_once(force=True)
        seconds = time.perf_counter() - began
    finally:
        cold.close()
    if done.rows.get(table) != count:
        raise SystemExit(f"{count} rows of {table} were to be moved: {done.rows}")
    return count / seconds


def _cold_bytes(folder: Path, count: int) -> dict[str, float]:
    """Return the bytes a row of the last round takes, by table."""
    files: Iterator[Path] = folder.glob("cold-*/cold/warehouse/k2/*/data/**/*.parquet")
    sizes: dict[str, list[int]] = {}
    rounds: dict[str, set[str]] = {}
    for file in files:
        parts = file.relative_to(folder).parts
        sizes.setdefault(parts[4], []).append(file.stat().st_size)
        rounds.setdefault(parts[4], set()).add(parts[0])
    return {table: round(sum(sizes[table]) / len(rounds[table]) / count, 2) for table in sizes}


if __name__ == "__main__":
    main(__file__)
