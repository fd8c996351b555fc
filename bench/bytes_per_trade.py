"""How many bytes does a trade take on disk: in the log, in hot, in cold, in ArcticDB, in plain Parquet?

Recorded trades of Binance spot and USD-M as frames, through `k2 import`, `k2 ingest` and `k2 offload`. The log is
measured apart, in batches of 100 as a busy capture appends them. ArcticDB (LMDB) gets the same trades a symbol, as its
users would: time as index, price and amount as floats, id, side, time of receipt. Parquet (zstd, written by pyarrow)
gets the same columns with exact decimals, and once all columns K2 keeps (lineage, kind, ids covered).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

import inputs
import k2
from harness import LOWER, SUBJECT, Figure, Run, below, main
from k2.feeds import recordings, registry
from k2.log.embedded import EmbeddedLog
from k2.model import FRAME, Frame

FIGURES = {
    "log": Figure("bytes/trade", LOWER, what="frames as received, 100 an append"),
    "hot": Figure("bytes/trade", LOWER, (below(18),), what="every column"),
    "cold": Figure("bytes/trade", LOWER, (below(8),), what="every column"),
    "candles_in_hot": Figure("bytes/trade", LOWER, what="six timeframes; few trades a minute cost more a trade"),
}

_RECORDED = {
    "binance": ("binance/spot_ws/btcusdt_20240808.gz", "binance/spot_ws/btcusdt_20240809.gz"),
    "binance-usdm": ("binance/usdm_ws/btcusdt_20240719.gz", "binance/usdm_ws/ethusdt_20240719.gz"),
}
_COLUMNS = ["exchange", "symbol", "trade_id", "price", "amount", "side", "exchange_ns", "received_ns"]
_LOG_BATCH = 100


def measure(run: Run) -> None:
    """One pass: sizes do not change from run to run."""
    data = run.folder / "data"
    frames = {exchange: _trade_frames(run, exchange) for exchange in _RECORDED}
    count = sum(map(len, frames.values()))
    run.detail(trades=count, frame_bytes=round(sum(len(f.data) for many in frames.values() for f in many) / count, 1))
    for exchange, many in frames.items():
        file = run.folder / f"{exchange}.txt"
        file.write_bytes(b"".join(b"%d %s\n" % (frame.received_ns, frame.data) for frame in many))
        _k2(data, "import", str(file), "--exchange", exchange)
    _k2(data, "ingest", "--drain")
    hot = _k2(data, "status")["hot"]
    _k2(data, "offload", "--drain")
    with k2.connect(data) as client:
        cold = client.snapshots("trades")[-1]
        rows = client.trades(tier="cold").arrow()
    if not hot["trades"]["rows"] == cold["rows_total"] == rows.num_rows == count:
        raise SystemExit(f"{count} trades went in: hot has {hot['trades']['rows']}, cold {cold['rows_total']}")
    candles = sum(told["bytes"] for table, told in hot.items() if table.startswith("candles"))
    run.add(
        {
            "log": _log_bytes(run.folder / "log", frames) / count,
            "hot": hot["trades"]["bytes"] / count,
            "cold": cold["bytes_total"] / count,
            "candles_in_hot": candles / count,
        },
        SUBJECT,
    )
    run.detail(cold_files=cold["files_total"], hot_parts=hot["trades"]["parts"])
    _peers(run, rows, count)


def _trade_frames(run: Run, exchange: str) -> list[Frame]:
    folder = inputs.recordings_folder()
    if folder is None:
        run.note("the recordings are not present (K2_TEST_DATA): the simulator's frames were used")
        return inputs.simulated_frames(exchange, 1_000 if run.quick else 20_000, channels=("trades",))
    found = []
    for file in _RECORDED[exchange]:
        path = run.used(folder / file, source="recorded", name=file)
        for one in recordings.read(path, registry.get(exchange)):
            if one.frame is not None and one.frame.kind == FRAME and b'"e":"trade"' in one.frame.data:
                found.append(one.frame)
    return found[:1_000] if run.quick else found


def _k2(data: Path, *command: str) -> Any:
    """Run a command of K2's in a process of its own: the embedded engine holds its folder until its process ends."""
    done = subprocess.run(
        [sys.executable, "-m", "k2.cli", *command, "--data", str(data), "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"k2 {' '.join(command)}: {done.stderr}")
    return json.loads(done.stdout)


def _log_bytes(folder: Path, frames: dict[str, list[Frame]]) -> int:
    log = EmbeddedLog(folder)
    for exchange, many in frames.items():
        for start in range(0, len(many), _LOG_BATCH):
            log.append(exchange, many[start : start + _LOG_BATCH])
    log.close()
    return _on_disk(folder)


def _on_disk(folder: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in folder.rglob("*") if file.is_file())


def _peers(run: Run, rows: pa.Table, count: int) -> None:
    usual, every = run.folder / "usual.parquet", run.folder / "every.parquet"
    rows = rows.drop_columns(["exchange_time"]).sort_by(
        [("exchange", "ascending"), ("symbol", "ascending"), ("exchange_ns", "ascending")]
    )
    pq.write_table(rows.select(_COLUMNS), usual, compression="zstd")
    pq.write_table(rows, every, compression="zstd")
    parquet = {"parquet": usual.stat().st_size / count, "parquet, every column": every.stat().st_size / count}
    for figure in ("hot", "cold"):
        for name, size in parquet.items():
            run.add({figure: size}, name)
    arctic = run.process("store_arcticdb.py", environment="arcticdb")
    if arctic is not None:
        size = arctic.ask("write", folder=str(run.folder / "arctic"), parquet=str(usual), symbols=_symbols(rows))
        for figure in ("hot", "cold"):
            run.add({figure: size / count}, "arcticdb")


def _symbols(rows: pa.Table) -> Sequence[tuple[str, str]]:
    pairs = rows.select(["exchange", "symbol"]).group_by(["exchange", "symbol"]).aggregate([])
    return sorted((row["exchange"], row["symbol"]) for row in pairs.to_pylist())


if __name__ == "__main__":
    main(__file__)
