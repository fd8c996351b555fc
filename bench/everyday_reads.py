"""How long do everyday questions take: a day of candles, the last trades, the latest quote?

Made trades and quotes of many symbols over one day, all in hot, the older half in cold too, written in pieces as large
as flushes and commits. Asked in Python of the folder itself (`k2.connect(folder)`), in Python of a running `k2 serve`,
and of the same over REST as JSON, each answer read whole. One question at a time, in turns; the first is not counted.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pyarrow as pa

import inputs
import k2
from harness import LOWER, Figure, Run, below, main
from k2.cold import open_cold
from k2.hot import OWN, open_hot
from k2.schema import QUOTES, arrow_schema
from k2.settings import load

_COMMIT_ROWS, _FLUSH_ROWS = 500_000, 50_000
_DAY_NS = 86_400 * 10**9


def _p99(limit: float, what: str) -> Figure:
    return Figure("ms", LOWER, (below(limit),), statistic="p99", what=what)


FIGURES = {
    "candles": _p99(5, "1m of one symbol and day, in Python from the folder"),
    "candles_node": _p99(5, "the same, in Python from a node"),
    "candles_rest": _p99(10, "the same, over REST as JSON"),
    "candles_cold": _p99(5, "the same from cold alone, in Python"),
    "trades": _p99(5, "the last 100 of one symbol, in Python from the folder"),
    "trades_node": _p99(5, "the same, in Python from a node"),
    "trades_rest": _p99(10, "the same, over REST as JSON"),
    "quote": _p99(5, "the latest of one symbol, in Python from the folder"),
    "quote_node": _p99(5, "the same, in Python from a node"),
}


def measure(run: Run) -> None:
    """Ask the folder while nothing runs on it, then the node."""
    folder = run.folder / "data"
    folder.mkdir()
    rows = 20_000 if run.quick else 10_000_000
    symbol = _fill(folder, rows, symbols=3 if run.quick else 50)
    run.note(f"{rows:,} trades and {rows // 10:,} quotes in hot")
    rounds = 1 if run.quick else 500
    day = {"start": inputs.START_NS, "end": inputs.START_NS + _DAY_NS}
    with k2.connect(folder) as client:
        _ask(run, rounds, {
            "candles": lambda: len(client.candles(symbol, "1m", **day)),
            "candles_cold": lambda: len(client.candles(symbol, "1m", **day, tier="cold")),
            "trades": lambda: len(client.trades(symbol, limit=100)),
            "quote": lambda: len(client.quotes(symbol, limit=1)),
        })  # fmt: skip
    range_ = f"start={day['start']}&end={day['end']}&limit=2000"
    with ExitStack() as closing:
        url = _serve(folder, closing)
        client = closing.enter_context(k2.connect(url=url))
        get = partial(_get, url)
        _ask(run, rounds, {
            "candles_node": lambda: len(client.candles(symbol, "1m", **day)),
            "trades_node": lambda: len(client.trades(symbol, limit=100)),
            "quote_node": lambda: len(client.quotes(symbol, limit=1)),
            "candles_rest": lambda: get(f"/v1/candles/1m?symbol={symbol}&{range_}"),
            "trades_rest": lambda: get(f"/v1/trades?symbol={symbol}&limit=100"),
        })  # fmt: skip


def _fill(folder: Path, rows: int, symbols: int) -> str:
    """Write trades and quotes to hot, half of them, and the closed candles, to cold; return a symbol."""
    settings = load({"data": str(folder)})
    trades = inputs.trades(rows, symbols)
    hot, cold = open_hot(settings, OWN), open_cold(settings)
    for start in range(0, rows, _FLUSH_ROWS):
        part = trades.slice(start, _FLUSH_ROWS)
        hot.write("trades", part, f"trades:{start}")
        hot.write("quotes", _quotes(part), f"quotes:{start}")
    for start in range(0, rows // 2, _COMMIT_ROWS):
        end = min(start + _COMMIT_ROWS, rows // 2)
        cold.append("trades", trades.slice(start, end - start), start={"binance": start}, end={"binance": end})
    closed = hot.closed_candles({}, {"binance": rows}, 0, inputs.START_NS + _DAY_NS)
    cold.append("candles", closed, start={}, end={"binance": rows})
    hot.close()
    cold.close()
    return str(trades["symbol"][0])


def _quotes(trades: pa.Table) -> pa.Table:
    """Every tenth trade as a quote of its symbol."""
    rows = trades.take(pa.array(range(0, trades.num_rows, 10)))
    columns = {
        **{name: rows[name] for name in QUOTES.column_names if name in rows.column_names},
        **dict.fromkeys(("bid_price", "ask_price"), rows["price"]),
        **dict.fromkeys(("bid_amount", "ask_amount"), rows["amount"]),
        "update_id": rows["trade_id"],
    }
    schema = arrow_schema(QUOTES)
    return pa.table([columns[name] for name in schema.names], schema=schema)


def _ask(run: Run, rounds: int, questions: dict[str, Callable[[], int]]) -> None:
    for question in questions.values():
        if question() < 1:
            raise SystemExit("a question found nothing")
    for _ in range(rounds):
        for name, question in questions.items():
            begin = time.perf_counter()
            question()
            run.add({name: (time.perf_counter() - begin) * 1e3})


def _serve(folder: Path, closing: ExitStack) -> str:
    """Start `k2 serve` on the folder and return its address."""
    command = [sys.executable, "-m", "k2.cli", "serve", "--data", str(folder), "--port", "0"]
    process = closing.enter_context(subprocess.Popen(command, stderr=subprocess.DEVNULL))
    closing.callback(process.terminate)
    said, deadline = folder / "run" / "node.json", time.monotonic() + 60
    while not said.is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    return str(json.loads(said.read_text())["url"])


def _get(url: str, path: str) -> int:
    """Get one answer over a connection of its own, as a page would; return the rows in it."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"))
    connection.request("GET", path)
    body = connection.getresponse().read()
    connection.close()
    return body.count(b'"exchange"')


if __name__ == "__main__":
    main(__file__)
