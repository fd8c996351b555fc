"""Nothing blocks an event loop: the real asyncio parts under load, each loop watched from a thread.

The bound is for a machine that others use too; what is found above it is named by its place in the code.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from watch import LoopWatch, Stall

from k2.api.app import create_app
from k2.api.server import ApiServer
from k2.api.services import Services
from k2.cold.memory import MemoryCold
from k2.feeds import registry
from k2.hot.memory import MemoryHot
from k2.log import open_log
from k2.query.engine import Engine
from k2.run.capture import Capture
from k2.run.supervise import ChildSpec, Supervisor
from k2.settings import QuerySettings, Settings, load
from k2.simulator.server import Simulator

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="a thread's state is read from /proc")

BOUND_SECONDS = 0.25
LOAD_SECONDS = 4.0


def accept(stall: Stall) -> None:
    """Fail when a loop was held up for longer than the bound, naming the place."""
    assert stall.seconds <= BOUND_SECONDS, f"the event loop was held up for {stall}"


async def test_a_callback_that_blocks_is_found_and_named():
    """The watch sees both kinds: a wait, and work."""
    for block in (sleep_in_a_callback, work_in_a_callback):
        watch = LoopWatch()
        watch.start()
        await asyncio.sleep(0.05)
        block()
        await asyncio.sleep(0.05)
        stall = await asyncio.to_thread(watch.stop)

        assert stall.seconds > BOUND_SECONDS
        assert block.__name__ in str(stall)


def sleep_in_a_callback() -> None:
    time.sleep(0.4)


def work_in_a_callback() -> None:
    end = time.thread_time() + 0.35
    while time.thread_time() < end:
        sum(range(1_000))


async def test_a_loop_that_waits_is_not_held_up():
    """Having nothing to do is no stall."""
    watch = LoopWatch()
    watch.start()
    await asyncio.sleep(0.5)

    accept(await asyncio.to_thread(watch.stop))


class Exchanges:
    """The simulator on a loop of its own, watched."""

    def __init__(self, rate: float) -> None:
        self.watch = LoopWatch()
        self._rate = rate
        self._up = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> Exchanges:
        self._thread.start()
        assert self._up.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._ending.set)
        self._thread.join(30)

    async def _run(self) -> None:
        self._loop, self._ending = asyncio.get_running_loop(), asyncio.Event()
        async with Simulator(exchanges=("binance",), rate=self._rate) as simulator:
            self.endpoints = simulator.endpoints()["binance"]
            self.watch.start()
            self._up.set()
            await self._ending.wait()


@pytest.fixture
def exchanges() -> Iterator[Exchanges]:
    """Binance, about 2,000 messages a second and symbol."""
    with Exchanges(rate=1_000) as running:
        yield running


async def test_neither_capture_nor_the_simulator_is_held_up_under_load(tmp_path: Path, exchanges: Exchanges):
    """Thousands of frames a second into the log, synced to the disk with every append."""
    settings = load(
        {
            "data": str(tmp_path),
            "exchanges.binance.url": exchanges.endpoints["url"],
            "exchanges.binance.rest_url": exchanges.endpoints["rest_url"],
            "exchanges.binance.symbols": "BTC-USDT,ETH-USDT",
            "log.sync": "full",
        },
        environment={},
    )
    log = open_log(settings)
    capture = Capture(registry.get("binance"), settings, log)
    stop, watch = asyncio.Event(), LoopWatch()
    running = asyncio.create_task(capture.run(stop))
    watch.start()
    await reached(lambda: capture.status().appended_frames > 5_000)
    await asyncio.sleep(LOAD_SECONDS / 2)
    stop.set()
    await running
    ours, theirs = await asyncio.to_thread(watch.stop), await asyncio.to_thread(exchanges.watch.stop)
    log.close()

    accept(ours)
    accept(theirs)


async def test_a_supervisor_of_talkative_children_is_not_held_up(tmp_path: Path):
    """Three children that say what they can, one of which ends again and again; the log files are rotated meanwhile."""
    talk = "import sys\nwhile True: sys.stdout.write('x' * 200 + '\\n')"
    children = [
        ChildSpec("one", (sys.executable, "-c", talk), stall_seconds=60),
        ChildSpec("two", (sys.executable, "-c", talk), stall_seconds=60),
        ChildSpec("brief", (sys.executable, "-c", "print('bye')"), stall_seconds=60),
    ]
    supervisor, watch = Supervisor(children, tmp_path), LoopWatch()
    running = asyncio.create_task(supervisor.run())
    watch.start()
    await reached(lambda: (tmp_path / "one.log.1").exists())
    await asyncio.sleep(LOAD_SECONDS / 2)
    supervisor.stop()
    await running

    accept(await asyncio.to_thread(watch.stop))


async def test_a_disk_that_hangs_does_not_hold_up_supervision(tmp_path: Path):
    """A child's output that cannot be written down for two seconds: the loop turns on."""
    file = tmp_path / "quiet.log"
    os.mkfifo(file)  # opening it waits for a reader, as a write waits for a disk
    readers: list[int] = []
    works_again = threading.Timer(LOAD_SECONDS / 2, lambda: readers.append(os.open(file, os.O_RDONLY | os.O_NONBLOCK)))
    child = ChildSpec("quiet", (sys.executable, "-c", "print('hello'); import time; time.sleep(60)"), stall_seconds=60)
    supervisor, watch = Supervisor([child], tmp_path), LoopWatch()
    running = asyncio.create_task(supervisor.run())
    watch.start()
    works_again.start()
    await reached(lambda: bool(readers))
    supervisor.stop()
    await running
    os.close(readers[0])

    accept(await asyncio.to_thread(watch.stop))


async def test_the_rest_server_is_not_held_up_by_large_answers(tmp_path: Path):
    """Pages of 20,000 rows in every format, metrics and status, by eight callers at once."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "api"))
    settings = Settings(data=str(tmp_path), query=QuerySettings(max_limit=20_000))
    hot = MemoryHot()
    hot.write("trades", rows_of_trades(20_000), "1")
    app = create_app(Services(Engine(hot, MemoryCold(), None, settings), settings))
    watch = LoopWatch()

    async def watched(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            watch.start()
        await app(scope, receive, send)

    server = ApiServer(watched, "127.0.0.1", 0)  # type: ignore[arg-type]
    await asyncio.to_thread(server.start)
    paths = [
        *(f"/v1/trades?symbol=BTC-USD&limit=20000&format={name}" for name in ("json", "ndjson", "csv", "arrow")),
        "/metrics",
        "/health/ready",
    ]
    with ThreadPoolExecutor(8) as pool, httpx.Client(base_url=server.url, timeout=60) as http:
        answers = await asyncio.gather(
            *(asyncio.get_running_loop().run_in_executor(pool, http.get, path) for path in paths * 3)
        )
    await asyncio.to_thread(server.stop)

    assert {answer.status_code for answer in answers} == {200}
    accept(await asyncio.to_thread(watch.stop))


def rows_of_trades(count: int) -> Any:
    from decimal import Decimal

    import pyarrow as pa

    from k2.schema import TRADES, arrow_schema

    start = 1_723_075_200_000_000_000
    rows = [
        {
            "exchange": "kraken", "symbol": "BTC-USD", "trade_id": index + 1, "kind": "trade", "first_id": index + 1,
            "last_id": index + 1, "price": Decimal("61837.63"), "amount": Decimal("0.1"), "side": "buy",
            "off_market": False, "occurrence": 0, "exchange_ns": start + index, "received_ns": start, "source": "live",
            "log_partition": "kraken", "log_offset": index, "row_in_frame": 0, "logged_ns": start,
        }
        for index in range(count)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=arrow_schema(TRADES))


async def reached(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not reached"
        await asyncio.sleep(0.02)
