"""How long does a trade take from the exchange's socket to an answer with it, at 1,000, 5,000 and 20,000 a second?

Open loop: a server sends Binance trades by the clock, whoever is slow; among them probes of another symbol, 50 a
second. `k2 capture` and `k2 node` run as they do in production, everything synced (`log.sync = full`). The node is
asked over REST for the newest trade of that symbol, again and again. A probe's latency begins when it was due to be
sent, and ends when an answer with it (or a later one) has come: so the query is part of it, and half of the one before.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from deployment import Installation, wait_for
from harness import LOWER, Figure, Process, Run, below, main, summary

RATES = (1_000, 5_000, 20_000)
FIGURES = {
    f"{name}_{rate}": Figure(
        "ms", LOWER, (below(50),) if (rate, name) == (5_000, "p99") else (), name, f"{name} at {rate:,} msg/s"
    )
    for rate in RATES
    for name in ("p50", "p99", "p99.9")
}

_PROBES = 50  # a second
_WARM_SECONDS = 2.0


def measure(run: Run) -> None:
    """One platform for all rates, from the lowest up."""
    server = run.process("blaster.py")
    assert server is not None
    k2 = Installation(
        run, "data",
        EXCHANGES_BINANCE_URL=f"ws://127.0.0.1:{server.ask('port')}", EXCHANGES_BINANCE_SYMBOLS="BTC-USDT,ETH-USDT",
        EXCHANGES_BINANCE_CHANNELS="trades", CAPTURE_EXCHANGES="binance",
    )  # fmt: skip
    k2.start_node()
    k2.start("capture", "binance")
    wait_for(lambda: bool(server.ask("wait", seconds=1.0)), "capture subscribed")
    server.ask("pace", rate=100, seconds=1.0, probes=_PROBES)
    wait_for(lambda: _newest(k2) > 0, "the first probe was found")
    seconds = 1.5 if run.quick else 20.0
    for rate in RATES:
        server.ask("pace", rate=rate, seconds=_WARM_SECONDS, probes=_PROBES)
        measured = _latencies(run, k2, server, rate, seconds)
        run.add({f"{name}_{rate}": measured for name in ("p50", "p99", "p99.9")})


def _newest(k2: Installation) -> int:
    rows = k2.rest("/v1/trades?symbol=ETH-USDT&limit=1")["data"]
    return int(rows[0]["trade_id"]) if rows else 0


def _latencies(run: Run, k2: Installation, server: Process, rate: int, seconds: float) -> list[float]:
    """Return the latency of each probe, milliseconds."""
    told: dict[str, Any] = {}
    sender = threading.Thread(
        target=lambda: told.update(server.ask("pace", rate=rate, seconds=seconds, probes=_PROBES))
    )
    sender.start()
    seen: list[tuple[int, int]] = []  # newest id, when the answer had come
    queries: list[float] = []
    while sender.is_alive() or not told or seen[-1][0] < told["probes"][-1][0]:
        asked = time.perf_counter()
        newest = _newest(k2)
        queries.append((time.perf_counter() - asked) * 1e3)
        if not seen or newest > seen[-1][0]:
            seen.append((newest, time.time_ns()))
    sender.join()
    latencies, at = [], 0
    for probe, due_ns in told["probes"]:
        while seen[at][0] < probe:
            at += 1
        latencies.append((seen[at][1] - due_ns) / 1e6)
    run.detail(**{f"query_ms_{rate}": summary(queries), f"sender_late_ms_{rate}": told["late_ms"]})
    return latencies


if __name__ == "__main__":
    main(__file__)
