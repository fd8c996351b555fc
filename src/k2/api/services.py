"""What the interface needs of the process it runs in, and the threads blocking work runs on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry
from starlette.requests import Request

from k2 import meters
from k2.errors import Unavailable
from k2.query.engine import Deadline, Engine
from k2.settings import Settings

T = TypeVar("T")

# Waiting requests per query slot; one more is refused at once. At most this many rounds of
# queries lie ahead of a request that is let in.
_WAITING_PER_SLOT = 16
_CHECK_THREADS = 2


@dataclass(frozen=True)
class Services:
    """Everything the routes answer from.

    `readiness` returns the reasons why the node is not ready, empty when it is; `status` what
    `/v1/status` shows. Both may block for a moment. `registry` holds the metrics of the process.
    """

    engine: Engine
    settings: Settings
    readiness: Callable[[], list[str]] = list
    status: Callable[[], Mapping[str, Any]] | None = None
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)


class Workers:
    """Bounded threads for the blocking engine, and two of their own for health, status and metrics."""

    def __init__(self, concurrent: int) -> None:
        self._most = concurrent * (1 + _WAITING_PER_SLOT)
        self._running = self._checking = 0
        meters.watch("query.waiting", self, lambda workers: workers._running)
        meters.watch("api.checks", self, lambda workers: workers._checking)
        self._queries = ThreadPoolExecutor(concurrent, "k2-query")
        self._checks = ThreadPoolExecutor(_CHECK_THREADS, "k2-check")

    async def query(self, request: Request, deadline: Deadline, work: Callable[[], T]) -> T:
        """Run a query; when the caller goes away its deadline is cancelled and it ends at its next step.

        Called on the event loop only. Raises Unavailable when too many wait already.
        """
        if self._running >= self._most:
            meters.acted("query.waiting")
            raise Unavailable(f"{self._running} queries are running or waiting, which is the limit: try again later")
        self._running += 1

        def started() -> T:
            deadline.left()  # it may have waited here for longer than it was given
            return work()

        future = asyncio.get_running_loop().run_in_executor(self._queries, started)
        future.add_done_callback(self._finished)
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            both: set[asyncio.Future[Any]] = {future, gone}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not future.done():
                deadline.cancel()
            return await future
        finally:
            gone.cancel()

    async def check(self, work: Callable[[], T]) -> T:
        """Run something short that must answer even while all query threads are busy."""
        self._checking += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._checks, work)
        finally:
            self._checking -= 1

    def close(self) -> None:
        """Let the threads end after what they are doing."""
        self._queries.shutdown(wait=False, cancel_futures=True)
        self._checks.shutdown(wait=False, cancel_futures=True)

    def _finished(self, future: asyncio.Future[Any]) -> None:
        self._running -= 1
        if not future.cancelled():
            future.exception()  # looked at, so that an answer nobody waits for is no warning


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
