"""How long does a trade take from the exchange's socket to an answer with it, at 1,000, 5,000 and 20,000 a second?

Open loop: a server sends Binance trades by the clock, whoever is slow; among them probes of another symbol, 50 a
second. `k2 capture` and `k2 node` run as they do in production, everything synced (`log.sync = full`). The node is
asked over REST for the newest trade of that symbol, again and again. A probe's latency begins when it was due to be
sent, and ends when an answer with it (or a later one) has come: so the query is part of it, and half of the one before.
"""

from __future__ import annotations

import threading
import time
from typing import Any, NamedTuple

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
    wait_for(lambda: _newest(k2)[0] > 0, "the first probe was found")
    seconds = 1.5 if run.quick else 20.0
    for rate in RATES:
        server.ask("pace", rate=rate, seconds=_WARM_SECONDS, probes=_PROBES)
        measured = _latencies(run, k2, server, rate, seconds)
        run.add({f"{name}_{rate}": measured for name in ("p50", "p99", "p99.9")})


def _newest(k2: Installation) -> tuple[int, int, int]:
    """Return the newest probe: its id, when capture received it, when the log had it."""
    rows = k2.rest("/v1/trades?symbol=ETH-USDT&limit=1")["data"]
    return (rows[0]["trade_id"], rows[0]["received_ns"], rows[0]["logged_ns"]) if rows else (0, 0, 0)


def _latencies(run: Run, k2: Installation, server: Process, rate: int, seconds: float) -> list[float]:
    """Return the latency of each probe, milliseconds."""
    told: dict[str, Any] = {}
    sender = threading.Thread(
        target=lambda: told.update(server.ask("pace", rate=rate, seconds=seconds, probes=_PROBES))
    )
    sender.start()
    seen: list[_Seen] = []
    queries: list[float] = []
    while sender.is_alive() or not told or seen[-1].probe < told["probes"][-1][0]:
        asked = time.perf_counter()
        newest, received_ns, logged_ns = _newest(k2)
        queries.append((time.perf_counter() - asked) * 1e3)
        if not seen or newest > seen[-1].probe:
            seen.append(_Seen(newest, received_ns, logged_ns, time.time_ns()))
    sender.join()
    latencies, at = [], 0
    for probe, due_ns in told["probes"]:
        while seen[at].probe < probe:
            at += 1
        latencies.append((seen[at].answered_ns - due_ns) / 1e6)
    run.detail(**{f"query_ms_{rate}": summary(queries), f"sender_late_ms_{rate}": told["late_ms"]})
    run.detail(**{f"where_ms_{rate}": _where(dict(told["probes"]), seen)})
    return latencies


class _Seen(NamedTuple):
    """A probe that was the newest in an answer, and its way there (times in nanoseconds UTC)."""

    probe: int
    received_ns: int
    logged_ns: int
    answered_ns: int


def _where(due_ns: dict[int, int], seen: list[_Seen]) -> dict[str, Any]:
    """Return the time each hop took, in milliseconds."""
    found = [one for one in seen if one.probe in due_ns]
    hops = {
        "to capture": [one.received_ns - due_ns[one.probe] for one in found],
        "to the log": [one.logged_ns - one.received_ns for one in found],
        "to the answer": [one.answered_ns - one.logged_ns for one in found],
    }
    return {hop: summary([ns / 1e6 for ns in spent]) for hop, spent in hops.items()}


if __name__ == "__main__":
    main(__file__)
