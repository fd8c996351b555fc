"""K2: trades written into one tier of a data folder, read back through its client."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import pyarrow.parquet as pq
from serving import serve

import k2
from k2.cold import open_cold
from k2.hot import OWN, open_hot
from k2.settings import load

_COMMIT_ROWS, _FLUSH_ROWS = 500_000, 50_000  # the defaults of cold.commit_rows and hot.flush_rows
_opened: dict[str, Any] = {}


def write(folder: str, parquet: str, tier: str) -> None:
    """Fill the tier in pieces as large as the pipeline's."""
    Path(folder).mkdir(parents=True)
    settings = load({"data": folder})
    rows = pq.read_table(parquet)
    if tier == "cold":
        with_end = open_cold(settings)
        for start in range(0, rows.num_rows, _COMMIT_ROWS):
            end = min(start + _COMMIT_ROWS, rows.num_rows)
            with_end.append("trades", rows.slice(start, end - start), start={"binance": start}, end={"binance": end})
        with_end.close()
    else:
        hot = open_hot(settings, OWN)
        for start in range(0, rows.num_rows, _FLUSH_ROWS):
            hot.write("trades", rows.slice(start, _FLUSH_ROWS), f"trades:{start}")
        hot.close()
    _opened.update(client=k2.connect(folder), tier=tier)


def read(symbol: str, start_ns: int, end_ns: int, form: str, touch: bool) -> dict[str, float]:
    """Read one symbol's time range as a frame; return milliseconds, rows, and the sum of the ids."""
    begin = time.perf_counter()
    found = _opened["client"].trades(symbol, start=start_ns, end=end_ns, tier=_opened["tier"])
    frame = found.pandas() if form == "pandas" else found.polars()
    took = (time.perf_counter() - begin) * 1e3
    return {"ms": took, "rows": len(frame), "ids": int(frame["trade_id"].sum()) if touch else 0}


serve(write=write, read=read)
