"""How long does it take to get one symbol's day of trades as a data frame?

1.5 million made trades of one symbol and day on the local disk. K2 answers `client.trades(symbol, start, end)` with the
whole day in cold (three commits), then with the whole day in hot, which the answering process does not own. ArcticDB
(LMDB) reads the same rows and columns by date range, times as index, prices as floats (K2's are exact decimals), and,
beside it, only the columns its users would keep: id, price, amount, side, time of receipt. Each store in a process of
its own, opened once, the files in the page cache.
"""

from __future__ import annotations

from functools import partial

import pyarrow.parquet as pq

import inputs
from harness import LOWER, Figure, Measured, Process, Run, better_than, main

_BARS = (better_than("arcticdb"),)
_WHY = (
    "Profile: two thirds of the time read 18 columns of the Parquet files, half of that for two exact decimals of 16 "
    "bytes, where the peer reads floats of 8; a tenth checks the order, a seventh hands the columns over."
)
_WHY_HOT = (
    "Profile: the engine's own reading is a quarter of the time; half of it writes 190 MB of Arrow into one growing "
    "buffer and copies it once, as chDB cannot stream a format with a header. It would take an engine that hands out "
    "its columns where they are."
)
FIGURES = {
    "pandas": Figure("ms", LOWER, _BARS, what="from cold", why=_WHY),
    "polars": Figure("ms", LOWER, _BARS, what="from cold", why=_WHY),
    "pandas_hot": Figure("ms", LOWER, _BARS, what="from hot", why=_WHY_HOT),
    "polars_hot": Figure("ms", LOWER, _BARS, what="from hot", why=_WHY_HOT),
}

_SYMBOLS = [("binance", "BTC-USDT")]
_USUAL = ["exchange", "symbol", "trade_id", "price", "amount", "side", "exchange_ns", "received_ns"]
_DAY_NS = 86_400 * 10**9


def measure(run: Run) -> None:
    """All stores in turns, and every answer has the same rows."""
    rows = inputs.trades(5_000 if run.quick else 1_500_000)
    parquet = run.folder / "trades.parquet"
    pq.write_table(rows, parquet)
    run.used(parquet, source="made", name=f"{rows.num_rows} trades of one symbol and day")
    run.version("pandas")
    ids = sum(rows["trade_id"].to_pylist())
    contenders: dict[str, list[tuple[str, Process]]] = {"k2": []}
    for tier, suffix in (("cold", ""), ("hot", "_hot")):
        process = run.process("store_k2.py")
        assert process is not None
        process.ask("write", folder=str(run.folder / tier), parquet=str(parquet), tier=tier)
        contenders["k2"].append((suffix, process))
    arctic = run.process("store_arcticdb.py", environment="arcticdb")
    if arctic is not None:
        arctic.ask("write", folder=str(run.folder / "arctic"), parquet=str(parquet), symbols=_SYMBOLS)
        contenders["arcticdb"] = [("", arctic), ("_hot", arctic)]
        few = run.process("store_arcticdb.py", environment="arcticdb")
        assert few is not None
        pq.write_table(rows.select(_USUAL), run.folder / "usual.parquet")
        few.ask("write", folder=str(run.folder / "few"), parquet=str(run.folder / "usual.parquet"), symbols=_SYMBOLS)
        contenders["arcticdb, fewer columns"] = [("", few), ("_hot", few)]
    for processes in contenders.values():
        for _, process in processes:
            for form in ("pandas", "polars"):
                told = _read(process, form, touch=True)
                if (told["rows"], told["ids"]) != (rows.num_rows, ids):
                    raise SystemExit(f"{process.name} gave {told['rows']} of {rows.num_rows} rows, or others")
    run.interleave({of: partial(_all, processes) for of, processes in contenders.items()}, rounds=7)


def _read(process: Process, form: str, *, touch: bool) -> dict[str, float]:
    symbol = "binance/BTC-USDT" if "arctic" in process.name else "BTC-USDT"
    start = inputs.START_NS
    found: dict[str, float] = process.ask(
        "read", symbol=symbol, start_ns=start, end_ns=start + _DAY_NS, form=form, touch=touch
    )
    return found


def _all(processes: list[tuple[str, Process]]) -> Measured:
    return {
        form + suffix: _read(process, form, touch=False)["ms"]
        for suffix, process in processes
        for form in ("pandas", "polars")
    }


if __name__ == "__main__":
    main(__file__)
