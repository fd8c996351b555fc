"""Limits at work: each of these is driven to its limit, and both its behaviour and its metric are looked at."""

from __future__ import annotations

import asyncio
import gc
import http.client
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import pytest

from k2 import limits, meters
from k2.api import server as api_server
from k2.api.app import create_app
from k2.api.server import ApiServer
from k2.api.services import Services
from k2.cold.memory import MemoryCold
from k2.errors import TimedOut
from k2.feeds import registry
from k2.hot.memory import MemoryHot
from k2.log.embedded import EmbeddedLog
from k2.log.memory import MemoryLog
from k2.log.recovery import REPAIRS_BYTES, Repair, report
from k2.log.segment import bases, connect, path_of
from k2.meters import Reading
from k2.model import FRAME, LIVE, Frame
from k2.query.engine import Deadline, Engine
from k2.run import readings
from k2.run.accounting import MAX_LEDGERS, IdLedger
from k2.run.capture import Buffer
from k2.run.echo import WAITING_BYTES, Echo
from k2.run.ingest import TABLES, Ingest
from k2.run.normalise import Normaliser, PartitionState
from k2.run.state import IngestState
from k2.run.supervise import LINE_BYTES, LOG_BYTES, ChildSpec, Supervisor
from k2.settings import QuerySettings, Settings, load

NOTHING = Reading()


class Change:
    """What one limit did since this was made."""

    def __init__(self, limit: str) -> None:
        assert limit in limits.all_limits()
        self._limit = limit
        self._before = self._now()

    def _now(self) -> Reading:
        return meters.read().get(self._limit, NOTHING)

    @property
    def acted(self) -> int:
        return self._now().acted - self._before.acted

    @property
    def waited_seconds(self) -> float:
        return self._now().waited_seconds - self._before.waited_seconds

    @property
    def fill(self) -> float:
        return (self._now().fill or 0) - (self._before.fill or 0)


def until(condition: Callable[[], object], what: str, seconds: float = 20.0) -> None:
    """Wait for a condition, which somebody else makes true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.005)


def frame(data: bytes = b"x" * 100, counter: int = 0) -> Frame:
    return Frame(FRAME, LIVE, "0", 0, counter, 1_750_000_000_000_000_000, data, "")


def trade(symbol: str, trade_id: int) -> bytes:
    return b'{"e":"trade","E":1750000000000,"s":"%s","t":%d,"p":"1.5","q":"2","T":1750000000000,"m":true,"M":true}' % (
        symbol.encode(),
        trade_id,
    )


def test_a_full_queue_in_front_of_the_log_makes_appends_wait(tmp_path: Path):
    """While another process holds the segment, one append is under way, one is queued, and a third waits for room."""
    change, size = Change("log.queue_frames"), Change("log.queue_bytes")
    log = EmbeddedLog(tmp_path / "log", queue_frames=10, queue_bytes=1 << 20)
    log.append("kraken", [frame()])
    folder = tmp_path / "log" / "kraken"
    other = connect(path_of(folder, bases(folder)[-1]), "rw")
    other.execute("BEGIN IMMEDIATE")
    threads = [threading.Thread(target=log.append, args=("kraken", [frame()] * 8)) for _ in range(3)]
    for thread in threads:
        thread.start()
    until(lambda: change.acted, "an append waits for room")

    assert change.fill == 8
    assert size.fill > 0

    other.execute("ROLLBACK")
    other.close()
    for thread in threads:
        thread.join(30)
    assert log.end_offset("kraken") == 25
    assert change.waited_seconds > 0
    assert change.fill == 0
    log.close()


async def test_a_full_buffer_tells_how_long_the_sockets_were_not_read():
    """Back-pressure is counted once from full to room again, however many frames came in between."""
    change = Change("capture.buffer_frames")
    buffer = Buffer(3, 1 << 20)
    waits = [buffer.put(frame()) for _ in range(5)]

    assert [wait is not None for wait in waits] == [False, False, True, True, True]

    await asyncio.sleep(0.05)
    buffer.release(await buffer.take(3, 0))
    assert change.acted == 1
    assert change.waited_seconds >= 0.05


class SlowHot(MemoryHot):
    """A hot tier whose writes take until somebody lets them."""

    def __init__(self) -> None:
        super().__init__()
        self.may_write = threading.Event()

    def write(self, table: str, rows: object, token: str) -> None:
        self.may_write.wait(30)
        super().write(table, rows, token)


def test_a_full_tail_stops_reading_the_log_until_hot_has_caught_up(tmp_path: Path):
    """Memory holds at most the tail; the rest waits in the log, and all of it arrives."""
    change = Change("ingest.tail_rows")
    log, hot = MemoryLog(), SlowHot()
    for batch in range(20):
        log.append("binance", [frame(trade("BTCUSDT", 1 + 10 * batch + i)) for i in range(10)])
    settings = load({"data": str(tmp_path), "hot.tail_rows": 50, "hot.flush_rows": 20}, environment={})
    state = IngestState(tmp_path / "state.db")
    ingest = Ingest(settings, log, hot, state)
    ingest.recover()
    working = threading.Thread(target=ingest.drain)
    working.start()
    until(lambda: change.acted, "ingest waits for hot")

    assert ingest.tail.row_count <= 250
    assert change.fill >= 50

    hot.may_write.set()
    working.join(30)
    assert hot.counts("trades", {}, {"binance": 200}) == 200
    assert change.waited_seconds > 0
    state.close()


def test_symbols_without_end_become_dead_letters():
    """An exchange that invents symbols fills no memory: beyond the limit its trades are parked, and counted."""
    change = Change("ingest.ledgers")
    ledgers = {(f"A{number}-USDT", "trade"): IdLedger([1], [1]) for number in range(MAX_LEDGERS - 1)}
    log = MemoryLog()
    log.append("binance", [frame(trade(symbol, 7)) for symbol in ("AUSDT", "BUSDT", "A1USDT", "CUSDT")])
    normaliser = Normaliser(registry.get("binance"), ledgers, PartitionState())
    rows = {table: [] for table in TABLES}
    for batch in log.read("binance", 0):
        normaliser.normalise(batch, rows)

    assert len(ledgers) == MAX_LEDGERS
    assert [row[1] for row in rows["trades"]] == ["A-USDT", "A1-USDT"]
    assert [row[1] for row in rows["dead_letters"]] == ["too_many_symbols", "too_many_symbols"]
    assert change.acted == 2


def test_a_query_waits_for_a_slot_and_then_is_told_that_its_time_is_up():
    """With one slot, taken, the next query waits; both the wait and its end are counted."""
    waited, ended = Change("query.concurrent"), Change("query.seconds")
    engine = Engine(MemoryHot(), MemoryCold(), None, Settings(query=QuerySettings(concurrent=1)))

    with engine._slot(Deadline(10)):
        assert waited.fill == 1
        with pytest.raises(TimedOut, match=r"query\.concurrent"):
            engine.symbols(Deadline(0.05))

    assert (waited.acted, ended.acted) == (1, 1)
    assert waited.waited_seconds >= 0.04
    assert waited.fill == 0


@pytest.fixture
def http_server() -> Iterator[ApiServer]:
    """The REST interface over nothing."""
    settings = Settings()
    running = ApiServer(
        create_app(Services(Engine(MemoryHot(), MemoryCold(), None, settings), settings)), "127.0.0.1", 0
    )
    running.start()
    yield running
    running.stop()


def test_one_connection_too_many_is_refused_and_the_others_live(http_server: ApiServer):
    """With every place taken the next one gets 503 at once; when one leaves there is room again."""
    change = Change("api.connections")
    with ExitStack() as closing:
        held = [
            socket.create_connection(("127.0.0.1", http_server.port), 10) for _ in range(api_server.MAX_CONNECTIONS)
        ]
        for each in held:
            closing.callback(each.close)
        until(lambda: change.fill >= api_server.MAX_CONNECTIONS, "all connections are there")
        assert _live(http_server) == 503
        assert change.acted == 1
        for each in held[:10]:
            each.close()
        until(lambda: change.fill < api_server.MAX_CONNECTIONS - 5, "some have left")
        assert _live(http_server) == 200


def _live(running: ApiServer) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=10)
    try:
        connection.request("GET", "/health/live")
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("limit", "path", "body", "status"),
    [
        ("api.body", "/v1/sql", b"x" * (64 << 10) + b"x", 413),
        ("query.max_rows", "/v1/trades?symbol=BTC-USD&limit=100001", None, 400),
    ],
)
def test_a_request_that_is_too_large_is_refused_and_counted(
    http_server: ApiServer, limit: str, path: str, body: bytes | None, status: int
):
    """The answer names the limit."""
    change = Change(limit)
    connection = http.client.HTTPConnection("127.0.0.1", http_server.port, timeout=10)
    connection.request("GET" if body is None else "POST", path, body)
    answer = connection.getresponse()
    answer.read()
    connection.close()

    assert answer.status == status
    assert change.acted == 1


def test_lines_nobody_reads_are_dropped_and_counted():
    """Who says something is never held up."""
    change = Change("supervise.echo")
    read, write = os.pipe()
    stream: BinaryIO = os.fdopen(write, "wb")
    echo = Echo(stream)
    line = b"x" * (64 << 10)
    for _ in range(2 * WAITING_BYTES // len(line) + 10):
        echo.put([line])

    assert change.acted > 0
    assert 0 < change.fill <= WAITING_BYTES

    drained = threading.Thread(target=_read_all, args=(read,))
    drained.start()
    echo.close(10)
    stream.close()
    drained.join(10)


def _read_all(descriptor: int) -> None:
    with os.fdopen(descriptor, "rb") as stream:
        while stream.read(1 << 16):
            pass


def test_a_child_that_says_too_much_fills_no_disk(tmp_path: Path):
    """Its output goes on in a new file, of which one older is kept; a line without end is broken."""
    files, lines = Change("supervise.output_file"), Change("supervise.line")
    count = 3 * LOG_BYTES // LINE_BYTES // 4
    text = f"import sys; [sys.stdout.write('x' * {4 * LINE_BYTES} + '\\n') for _ in range({count})]"
    supervisor = Supervisor([ChildSpec("talker", (sys.executable, "-c", text), start_seconds=30)], tmp_path)

    async def run() -> None:
        running = asyncio.create_task(supervisor.run())
        while files.acted < 2:  # noqa: ASYNC110 - it is counted, not told
            await asyncio.sleep(0.01)
        supervisor.stop()
        await running

    asyncio.run(asyncio.wait_for(run(), 60))

    assert sum(path.stat().st_size for path in tmp_path.glob("talker.log*")) <= 2 * (LOG_BYTES + 2 * LINE_BYTES)
    assert lines.acted > 0


def test_a_disk_that_needs_repair_again_and_again_fills_no_file(tmp_path: Path):
    """The list of repairs goes on in a new file at its size; one older one is kept."""
    change = Change("log.repairs")
    folder = tmp_path / "log" / "kraken"
    folder.mkdir(parents=True)
    many = [Repair("kraken", "0.db", "y" * (REPAIRS_BYTES // 4), number, 1) for number in range(5)]
    for _ in range(4):
        report(folder, many)

    files = list((tmp_path / "log").glob("*.jsonl*"))
    assert {file.name for file in files} == {"repairs.jsonl", "repairs.jsonl.1"}
    assert sum(file.stat().st_size for file in files) < 3 * REPAIRS_BYTES
    assert change.acted == 3


def test_what_is_watched_does_not_keep_its_owner():
    """A closed part is forgotten, and its fill with it."""
    change = Change("log.queue_frames")
    log = EmbeddedLog(Path("/nowhere"))
    del log
    gc.collect()

    assert change.fill == 0


def test_a_process_tells_of_its_memory_and_its_limits(tmp_path: Path):
    """What was told is read back; what is old is left out."""
    meters.acted("feeds.retry_after", 3)
    readings.tell(tmp_path, "capture-kraken")
    (told,) = readings.read_readings(tmp_path)

    assert told.process == "capture-kraken"
    assert told.limits["feeds.retry_after"].acted >= 3
    assert 10 << 20 < told.resident_bytes <= told.peak_resident_bytes
