"""How many frames a second does ingest turn into rows again, after the hot tier was lost or a parser was mended?

The log holds a day's frames; hot is emptied (`k2 ingest --rebuild`, with nothing in cold) and filled from the log:
read, parsed, accounted, deduplicated, inserted into hot with all candles. Simulated Binance and Kraken frames of ten
symbols each, trades and quotes; and the recorded Binance frames, each once. Ends when the last flush is in hot.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import inputs
from harness import Figure, Measured, Run, at_least, main
from k2.hot import OWN, open_hot
from k2.log.base import Log
from k2.log.embedded import EmbeddedLog
from k2.model import Frame
from k2.run.ingest import Ingest
from k2.run.state import IngestState
from k2.settings import load

FIGURES = {
    "frames": Figure("frames/s", bars=(at_least(300_000),), what="simulated Binance and Kraken, 20 symbols"),
    "recorded": Figure(
        "frames/s",
        bars=(at_least(300_000),),
        what="recorded Binance, spot",
        why="The recording is 99,574 frames, 0.4 s of work: two flushes, of which nothing runs beside the second.",
    ),
}

_BATCH_FRAMES = 500
_BASES = ("BTC", "ETH", "SOL", "XRP", "ADA", "DOGE", "LTC", "LINK", "DOT", "AVAX")


def measure(run: Run) -> None:
    """A log each; an empty hot tier and state each round."""
    count = 10_000 if run.quick else 1_000_000
    simulated, recorded = EmbeddedLog(run.folder / "simulated"), EmbeddedLog(run.folder / "recorded")
    folders = (run.folder / f"data-{number}" for number in itertools.count())
    try:
        for exchange, quote in (("binance", "USDT"), ("kraken", "USD")):
            symbols = [f"{base}-{quote}" for base in _BASES]
            _fill(simulated, exchange, inputs.simulated_frames(exchange, count // 2, symbols=symbols))
        _fill(recorded, "binance", inputs.frames(run, "binance", 5_000 if run.quick else None))

        def one_round() -> Measured:
            return {"frames": _again(run, folders, simulated), "recorded": _again(run, folders, recorded)}

        run.interleave({"k2": one_round}, rounds=3)
    finally:
        simulated.close()
        recorded.close()


def _fill(log: Log, partition: str, frames: list[Frame]) -> None:
    for start in range(0, len(frames), _BATCH_FRAMES):
        log.append(partition, frames[start : start + _BATCH_FRAMES])


def _again(run: Run, folders: Iterator[Path], log: Log) -> float:
    """Ingest the whole log into an empty hot tier and return the frames a second."""
    settings = load({"data": str(next(folders))}, environment={})
    hot = open_hot(settings, OWN)
    state = IngestState(settings.data_path / "state.db")
    try:
        ingest = Ingest(settings, log, hot, state)
        ingest.recover()
        began = time.perf_counter()
        ingest.drain()
        seconds = time.perf_counter() - began
    finally:
        state.close()
        hot.close()
    frames = sum(log.end_offset(partition) for partition in log.partitions())
    if ingest.counters["frames"] != frames or ingest.counters["dead_letters"]:
        raise SystemExit(f"{frames} frames are in the log; ingest counts {dict(ingest.counters)}")
    run.detail(**{f"{log.partitions()}": dict(ingest.counters)})
    return frames / seconds


if __name__ == "__main__":
    main(__file__)
