"""How many messages a second do all stages keep up with on this machine, and where does the processor time go?

A server sends Binance trades of one connection as fast as they are taken: capture stops reading when its buffer is
full, so what is measured is the slowest stage. `k2 capture` and `k2 node` (ingest, hot with all candles, offload every
5 s, REST) run as in production, everything synced. It ends when the last trade sent is in an answer over
REST; then every trade must be there once, without a gap. A second, shorter flood is only looked at: which threads and
which functions the processor time goes to is in the result.
"""

from __future__ import annotations

import os
import time
from http import HTTPStatus
from typing import Any

from cores import Sampling
from deployment import Installation, Refused, cpu_seconds, wait_for
from harness import Figure, Process, Run, at_least, main

FIGURES = {
    "messages": Figure("msg/s", bars=(at_least(100_000),), what="socket to query, all stages, nothing lost"),
    "captured": Figure("msg/s", what="taken from the socket meanwhile"),
}

_LIMIT_SECONDS = 300.0


def measure(run: Run) -> None:
    """One long run; processor time is that of its processes from the first to the last message."""
    count = 20_000 if run.quick else 2_000_000
    server = run.process("blaster.py")
    assert server is not None
    k2 = Installation(
        run, "data",
        EXCHANGES_BINANCE_URL=f"ws://127.0.0.1:{server.ask('port')}", EXCHANGES_BINANCE_SYMBOLS="BTC-USDT,ETH-USDT",
        EXCHANGES_BINANCE_CHANNELS="trades", CAPTURE_EXCHANGES="binance", COLD_COMMIT_SECONDS="5",
    )  # fmt: skip
    k2.start_node()
    k2.start("capture", "binance")
    wait_for(lambda: bool(server.ask("wait", seconds=1.0)), "capture subscribed")
    sent_bytes = server.ask("prepare", frames=count)
    before = {**cpu_seconds(k2.pids()), "sender": cpu_seconds([server.pid])["other"]}
    count, seconds, sent_seconds = _flood(k2, server, 0)
    after = {**cpu_seconds(k2.pids()), "sender": cpu_seconds([server.pid])["other"]}
    _check(k2, count)
    run.add({"messages": count / seconds, "captured": count / sent_seconds})
    cores = {name: round((after[name] - before.get(name, 0.0)) / seconds, 3) for name in after}
    run.detail(messages=count, bytes_a_message=round(sent_bytes / count, 1), cores=os.cpu_count(), cores_used=cores)
    run.note("cores used, of " + f"{os.cpu_count()}: " + ", ".join(f"{n} {c:.2f}" for n, c in sorted(cores.items())))
    run.detail(profile=_profile(run, k2, server, count))


def _flood(k2: Installation, server: Process, already: int) -> tuple[int, float, float]:
    """Send what was prepared; return all messages so far, the seconds until they were found, and those of sending."""
    told = server.ask("flood")
    count = already + told["frames"]
    wait_for(lambda: _newest(k2) == count, f"trade {count} was found", _LIMIT_SECONDS)
    return count, (time.time_ns() - told["began_ns"]) / 1e9, told["seconds"]


def _profile(run: Run, k2: Installation, server: Process, already: int) -> dict[str, Any]:
    server.ask("prepare", frames=20_000 if run.quick else 1_000_000)
    sampling = Sampling(run, k2.processes())
    _, seconds, _ = _flood(k2, server, already)
    return sampling.end(seconds)


def _newest(k2: Installation) -> int:
    time.sleep(0.05)
    try:
        rows = k2.rest("/v1/trades?symbol=BTC-USDT&limit=1")["data"]
    except Refused as refused:
        if refused.status != HTTPStatus.NOT_FOUND:  # before the first trade there is no such symbol
            raise
        return 0
    return int(rows[0]["trade_id"]) if rows else 0


def _check(k2: Installation, count: int) -> None:
    """Every trade once: candles count them, and the ledger of ids knows of no hole."""
    candles = k2.rest("/v1/candles/1d?symbol=BTC-USDT")["data"]
    gaps = k2.rest("/v1/gaps")["data"]
    found = sum(int(candle["trade_count"]) for candle in candles)
    if found != count or gaps:
        raise SystemExit(f"{count} trades were sent; the candles count {found}, and there are {len(gaps)} gaps")


if __name__ == "__main__":
    main(__file__)
