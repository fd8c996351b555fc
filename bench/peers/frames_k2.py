"""K2: the frames through ingest itself, from a log in memory to Arrow tables; what follows (inserts) is left out."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from serving import serve

from k2.feeds import registry
from k2.hot.memory import MemoryHot
from k2.log.memory import MemoryLog
from k2.model import FRAME, LIVE, Frame
from k2.run.ingest import Ingest
from k2.run.state import IngestState
from k2.settings import load as load_settings

_BATCH = 500  # frames, as capture appends them in a busy market
_log = MemoryLog()
_exchange = ""


def load(path: str, exchange: str, name: str) -> int:
    """Put the frames into a log; return the rows they make."""
    global _log, _exchange
    lines = [line.split(b" ", 1) for line in Path(path).read_bytes().splitlines()]
    frames = [Frame(FRAME, LIVE, "c", 1, number, int(ns), data) for number, (ns, data) in enumerate(lines)]
    _log, _exchange = MemoryLog(), exchange
    for start in range(0, len(frames), _BATCH):
        _log.append(exchange, frames[start : start + _BATCH])
    return _ingested()[0]


def run(seconds: float) -> dict[str, float]:
    """Ingest everything again and again, each time as if for the first time."""
    rows = spent = 0.0
    while spent < seconds:
        made, took = _ingested()
        rows += made
        spent += took
    return {"rows": rows, "seconds": spent}


def _ingested() -> tuple[int, float]:
    settings = load_settings({"hot.flush_rows": 10**9, "hot.tail_rows": 10**9, "hot.flush_seconds": 10**6})
    with tempfile.TemporaryDirectory() as folder:
        state = IngestState(Path(folder) / "state.db")
        ingest = Ingest(settings, _log, MemoryHot(), state)
        ingest.recover()
        begin = time.process_time()
        while ingest.step():
            pass
        tables = {table: ingest.tail.snapshot(table)[1] for table in ("trades", "quotes", "dead_letters")}
        took = time.process_time() - begin
        state.close()
    if tables["dead_letters"].num_rows:
        raise RuntimeError(f"dead letters: {tables['dead_letters'].slice(0, 1).to_pylist()}")
    return tables["trades"].num_rows + tables["quotes"].num_rows, took


def parse_only(seconds: float) -> dict[str, float]:
    """Only parse, to K2's records."""
    exchange = registry.get(_exchange)
    frames = [frame for batch in _log.read(_exchange, 0, max_frames=10**9, max_bytes=1 << 40) for frame in batch.frames]
    rows = 0
    begin = time.process_time()
    while time.process_time() - begin < seconds:
        for frame in frames:
            parsed = exchange.parse(frame)
            rows += len(parsed.trades) + len(parsed.quotes)
    return {"rows": rows, "seconds": time.process_time() - begin}


serve(load=load, run=run, parse_only=parse_only)
