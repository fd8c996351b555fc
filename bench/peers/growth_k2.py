"""K2: one data folder that grows day by day, and what a row and an answer cost at each size."""

from __future__ import annotations

import os
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

import pyarrow as pa
import pyarrow.compute as pc
from serving import serve

import inputs
from k2.cold import open_cold
from k2.hot import OWN, open_hot
from k2.query.engine import Engine
from k2.query.plan import ask
from k2.settings import load

_INSERT_ROWS, _COMMIT_ROWS = 250_000, 500_000
_DAY_NS, _HOUR_NS = 86_400 * 10**9, 3_600 * 10**9
_store: dict[str, Any] = {}


def start(folder: str, day_rows: int, symbols: int, answers: int) -> None:
    """Open an empty folder, make its tables, and the day that is written again and again, later each time."""
    Path(folder).mkdir(parents=True)
    settings = load({"data": folder})
    hot, cold = open_hot(settings, OWN), open_cold(settings)
    day = inputs.trades(day_rows, symbols)
    symbol = day["symbol"][0].as_py()
    first = day.slice(0, 1_000)
    for column in ("exchange", "log_partition"):
        index = first.schema.get_field_index(column)
        first = first.set_column(index, first.schema.field(index), pa.array(["kraken"] * len(first)))
    hot.write("trades", first, "first")
    cold.append("trades", first, start={}, end={"kraken": len(first)})
    _store.update(
        hot=hot, cold=cold, engine=Engine(hot, cold, None, settings), day=day, symbol=symbol, days=0, answers=answers
    )


def grow(days: int) -> dict[str, Any]:
    """Write until there are so many days; return what the newest cost, and the delay of answers."""
    while _store["days"] < days:
        insert, commit = _write(_later(_store["day"], _store["days"]), _store["days"])
        _store["days"] += 1
    newest = inputs.START_NS + (days - 1) * _DAY_NS + 12 * _HOUR_NS
    hour = {"start": newest, "end": newest + _HOUR_NS}
    day = {"start": newest - 12 * _HOUR_NS, "end": newest + 12 * _HOUR_NS, "timeframe": "1m"}
    answers = {
        "hour_hot": _delay("trades", tier="hot", **hour),
        "hour_cold": _delay("trades", tier="cold", **hour),
        "candles": _delay("candles", tier="hot", **day),
        "last": _delay("trades", tier="hot", limit=100),
    }
    statistics_ = _store["hot"].statistics()
    snapshot = _store["cold"].snapshots("trades")[-1]
    facts = {
        "rows": statistics_["trades"]["rows"],
        "hot_bytes": statistics_["trades"]["bytes"],
        "hot_parts": statistics_["trades"]["parts"],
        "cold_bytes": snapshot.bytes_total,
        "cold_files": snapshot.files_total,
        "answer_rows": {name: rows for name, (_, rows) in answers.items()},
    }
    return {
        "insert": insert,
        "commit": commit,
        **{name: delay for name, (delay, _) in answers.items()},
        "memory_mib": _memory_mib(),
        "facts": facts,
    }


def _write(rows: pa.Table, number: int) -> tuple[float, float]:
    """Write one day into both tiers; return microseconds a row."""
    begin = time.perf_counter()
    for start_ in range(0, rows.num_rows, _INSERT_ROWS):
        _store["hot"].write("trades", rows.slice(start_, _INSERT_ROWS), f"trades:{number}:{start_}")
    inserted = time.perf_counter()
    for start_ in range(0, rows.num_rows, _COMMIT_ROWS):
        piece = rows.slice(start_, _COMMIT_ROWS)
        first = number * rows.num_rows + start_
        bounds = {"start": {"binance": first}, "end": {"binance": first + piece.num_rows}}
        _store["cold"].append("trades", piece, **bounds)
    committed = time.perf_counter()
    return (inserted - begin) * 1e6 / rows.num_rows, (committed - inserted) * 1e6 / rows.num_rows


def _later(day: pa.Table, days: int) -> pa.Table:
    """Return the same trades some days later, ids and offsets counted on."""
    steps = {"exchange_ns": _DAY_NS, "received_ns": _DAY_NS, "logged_ns": _DAY_NS}
    steps |= dict.fromkeys(("trade_id", "first_id", "last_id", "log_offset"), day.num_rows)
    for name, step in steps.items():
        index = day.schema.get_field_index(name)
        day = day.set_column(index, day.schema.field(index), pc.add(day[name], days * step))
    return day


def _delay(table: str, **options: Any) -> tuple[float, int]:
    """Return the median delay of an answer in milliseconds, after one that is not counted, and its rows.

    Rows of cold are asked for from a nanosecond later each time: an answer of a snapshot is kept for the next who asks.
    """
    limit = options.pop("limit", 0)
    delays = []
    for _ in range(_store["answers"] + 1):
        if options["tier"] == "cold":
            options["start"] += 1
        begin = time.perf_counter()
        answer = _store["engine"].answer(ask(table, _store["symbol"], limit=limit, **options))
        delays.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(delays[1:]), answer.rows.num_rows


def _memory_mib() -> float:
    status = Path(f"/proc/{os.getpid()}/status")
    if status.is_file():
        [line] = [line for line in status.read_text().splitlines() if line.startswith("VmRSS")]
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


serve(start=start, grow=grow)
