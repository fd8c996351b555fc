"""How many bytes does a trade take on disk: in the log, in hot, in cold, in ArcticDB, in plain Parquet?

Recorded trades of Binance spot and USD-M as frames, through import, ingest and offload, in four rounds. Cold is
measured before and after maintenance, which merges the small files of the rounds as it does in a running node. The
log is measured apart, in batches of 100 as a busy capture appends them. ArcticDB (LMDB) gets the same trades a symbol,
as its users would: time as index, price and amount as floats, id, side, time of receipt. Parquet (zstd, written by
pyarrow) gets the same columns with exact decimals, and once all columns K2 keeps (lineage, kind, ids covered).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

import inputs
from harness import LOWER, Figure, Run, below, main
from k2.cold import open_cold
from k2.feeds import recordings, registry
from k2.hot import OWN, open_hot
from k2.log import open_log
from k2.log.embedded import EmbeddedLog
from k2.model import FRAME, Frame, Selection
from k2.node import INGEST, OFFLOAD, drain
from k2.run.importer import import_files
from k2.settings import Settings, load

FIGURES = {
    "log": Figure("bytes/trade", LOWER, what="frames as received, 100 an append"),
    "hot": Figure("bytes/trade", LOWER, (below(18),), what="every column"),
    "cold": Figure("bytes/trade", LOWER, (below(8),), what="every column"),
    "cold_before_maintenance": Figure("bytes/trade", LOWER, what="files of some thousand trades"),
    "candles_in_hot": Figure("bytes/trade", LOWER, what="six timeframes; few trades a minute cost more a trade"),
}

_RECORDED = {
    "binance": ("binance/spot_ws/btcusdt_20240808.gz", "binance/spot_ws/btcusdt_20240809.gz"),
    "binance-usdm": ("binance/usdm_ws/btcusdt_20240719.gz", "binance/usdm_ws/ethusdt_20240719.gz"),
}
_COLUMNS = ["exchange", "symbol", "trade_id", "price", "amount", "side", "exchange_ns", "received_ns"]
_LOG_BATCH = 100
_ROUNDS = 4


def measure(run: Run) -> None:
    """One pass: sizes do not change from run to run."""
    settings = load({"data": str(run.folder / "data")})
    frames = {exchange: _trade_frames(run, exchange) for exchange in _RECORDED}
    count = sum(map(len, frames.values()))
    run.detail(trades=count, frame_bytes=round(sum(len(f.data) for many in frames.values() for f in many) / count, 1))
    for part in range(_ROUNDS):
        for exchange, many in frames.items():
            size = -(-len(many) // _ROUNDS)
            _import(run, settings, exchange, many[part * size : (part + 1) * size], part)
        drain(settings, INGEST)
        if part == _ROUNDS - 1:  # nothing is older than the retention, so hot still holds them all
            hot = _hot(settings)
        drain(settings, OFFLOAD)
    cold = open_cold(settings)
    before = cold.snapshots("trades")[-1]
    cold.maintain(now_ns=time.time_ns())
    after = cold.snapshots("trades")[-1]
    rows = cold.read(cold.pin("trades"), Selection("trades"))
    cold.close()
    if not hot["trades"]["rows"] == after.rows_total == rows.num_rows == count:
        raise SystemExit(f"{count} trades went in: hot has {hot['trades']['rows']}, cold {after.rows_total}")
    candles = sum(told["bytes"] for table, told in hot.items() if table.startswith("candles"))
    run.add(
        {
            "log": _log_bytes(run.folder / "log", frames) / count,
            "hot": hot["trades"]["bytes"] / count,
            "cold": after.bytes_total / count,
            "cold_before_maintenance": before.bytes_total / count,
            "candles_in_hot": candles / count,
        }
    )
    run.detail(cold_files=[before.files_total, after.files_total], hot_parts=hot["trades"]["parts"])
    _peers(run, rows, count)


def _import(run: Run, settings: Settings, exchange: str, frames: Sequence[Frame], part: int) -> None:
    file = run.folder / f"{exchange}-{part}.txt"
    file.write_bytes(b"".join(b"%d %s\n" % (frame.received_ns, frame.data) for frame in frames))
    log = open_log(settings)
    import_files(log, [file], exchange)
    log.close()


def _hot(settings: Settings) -> Mapping[str, Mapping[str, int]]:
    hot = open_hot(settings, OWN)
    try:
        return hot.statistics()
    finally:
        hot.close()


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
    rows = rows.sort_by([("exchange", "ascending"), ("symbol", "ascending"), ("exchange_ns", "ascending")])
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
