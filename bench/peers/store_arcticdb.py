"""ArcticDB on LMDB: one symbol's trades written as a frame by time, read back as a frame."""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pandas as pd
import pyarrow.parquet as pq
from arcticdb import Arctic
from serving import serve

_opened = {}


def write(folder, parquet, symbols):
    """Write each symbol's trades as users do, times as the index, prices as floats; return the bytes on disk.

    `symbols` are (exchange, symbol) pairs; what is constant for a symbol is its name.
    """
    Path(folder).mkdir(parents=True)
    library = Arctic(f"lmdb://{folder}").create_library("trades")
    _opened["library"] = library
    rows = pq.read_table(parquet).to_pandas()
    for exchange, symbol in symbols:
        mine = rows[(rows["exchange"] == exchange) & (rows["symbol"] == symbol)].drop(columns=["exchange", "symbol"])
        mine = mine.astype({"price": "float64", "amount": "float64"})
        mine.index = pd.to_datetime(mine.pop("exchange_ns"), unit="ns")
        mine["received_ns"] = pd.to_datetime(mine["received_ns"], unit="ns")
        library.write(f"{exchange}/{symbol}", mine.sort_index())
    # LMDB's map is a sparse file: what counts is the blocks it has.
    return sum(file.stat().st_blocks * 512 for file in Path(folder).rglob("*") if file.is_file())


def read(symbol, start_ns, end_ns, form, touch):
    """Read one symbol's time range as a pandas or Polars frame; return milliseconds, rows, and a sum of it all."""
    bounds = (pd.Timestamp(start_ns), pd.Timestamp(end_ns - 1))
    begin = time.perf_counter()
    frame = _opened["library"].read(symbol, date_range=bounds, output_format=form.upper()).data
    took = (time.perf_counter() - begin) * 1e3
    return {"ms": took, "rows": len(frame), "ids": int(frame["trade_id"].sum()) if touch else 0}


serve(write=write, read=read)
