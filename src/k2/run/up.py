"""What `k2 up` starts: one capture per exchange, and the node."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from k2.errors import FeedDown
from k2.feeds import registry
from k2.run.capture import probe
from k2.run.supervise import ChildSpec
from k2.settings import Settings

_NODE_STOP_SECONDS = 120.0  # it drains the log and makes a last commit
_NODE_START_SECONDS = 600.0  # it may have a large flush to finish before its first beat


def plan(settings: Settings) -> list[str]:
    """Return the exchanges to capture by their own names; raises UnknownName, also for a symbol none can have."""
    names = []
    for name in settings.capture.exchanges:
        exchange = registry.get(name)
        for symbol in settings.exchange(exchange.name).symbols:
            exchange.to_native(symbol)
        names.append(exchange.name)
    return list(dict.fromkeys(names))


def check_reachable(settings: Settings, names: Sequence[str], tell: Callable[[str], None]) -> None:
    """Try every exchange once and tell which cannot be reached and why; capturing goes on trying.

    Raises FeedDown when none can be reached.
    """

    def why_not(name: str) -> str | None:
        try:
            probe(registry.get(name), settings)
        except FeedDown as error:
            return str(error)
        return None

    with ThreadPoolExecutor(max(1, len(names))) as pool:
        reasons = dict(zip(names, pool.map(why_not, names), strict=True))
    failed = {name: reason for name, reason in reasons.items() if reason}
    if failed and len(failed) == len(reasons):
        lines = "\n".join(f"  {reason}" for reason in failed.values())
        raise FeedDown(
            f"no exchange can be reached:\n{lines}\n  Without network, `k2 demo` runs on simulated exchanges."
        )
    for name, reason in failed.items():
        tell(f"warning: {reason}; capture of {name} goes on trying")


def children(settings: Settings, names: Sequence[str], config: str | None) -> list[ChildSpec]:
    """Return the processes to supervise; captures stop first, then the node, which works off the log."""
    common = ["--data", str(settings.data_path), *(["--config", config] if config else [])]
    program = (sys.executable, "-m", "k2.cli")
    captures = [
        ChildSpec(f"capture-{name}", (*program, "capture", name, *common), memory_bytes=settings.capture.memory_bytes)
        for name in names
    ]
    node = ChildSpec(
        "node",
        (*program, "node", "--port", str(settings.api.port), *common),
        stage=1,
        stop_seconds=_NODE_STOP_SECONDS,
        start_seconds=_NODE_START_SECONDS,
        memory_bytes=settings.node.memory_bytes,
    )
    return [*captures, node]
