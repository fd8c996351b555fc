"""Capture from a real WebSocket server into a real log."""

# ruff: noqa: SIM117 (server outside, capture inside: the order of the ends matters and is seen)
from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import msgspec
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from k2.errors import FeedDown, InUse, StoreDown
from k2.log import Log, open_log
from k2.log.memory import MemoryLog
from k2.model import CLOSED, FRAME, LIVE, OPENED, SUBSCRIBED, Frame
from k2.run.capture import Buffer, Capture, probe, run_capture
from k2.run.captured import CaptureCollector, read_captures
from k2.run.folder import hold, run_folder
from k2.settings import CaptureSettings, ExchangeSettings, LogSettings, Settings

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "feeds"))
from toy_exchange import ToyExchange, ToyServer, serving, until

TOY_FOLDER = Path(__file__).resolve().parents[1] / "feeds"
QUICK = CaptureSettings(backoff_first_seconds=0.01, backoff_max_seconds=0.05)


def settings_for(server: ToyServer, data: Path | str = "unused", **capture: int) -> Settings:
    return Settings(
        data=str(data),
        capture=msgspec.structs.replace(QUICK, **capture),
        log=LogSettings(linger_ms=1.0, batch_frames=50),
        exchanges={"toy": ExchangeSettings(url=server.url)},
    )


def stored(log: Log) -> list[Frame]:
    return [frame for batch in log.read("toy", 0, max_frames=1_000_000, max_bytes=1 << 30) for frame in batch.frames]


def numbers(frames: Sequence[Frame]) -> list[int]:
    return [json.loads(f.data)["n"] for f in frames if f.kind == FRAME and b'"n"' in f.data]


@contextlib.asynccontextmanager
async def capturing(capture: Capture) -> AsyncIterator[None]:
    stop = asyncio.Event()
    task = asyncio.create_task(capture.run(stop))
    try:
        yield
    finally:
        stop.set()
        await task


class StallingLog(MemoryLog):
    """A log whose appends wait, or fail, as long as a test wants."""

    def __init__(self) -> None:
        super().__init__()
        self.open = threading.Event()
        self.open.set()
        self.full = False
        self.refused = 0

    def append(self, partition: str, frames: Sequence[Frame], *, producer: str = "", sequence: int = 0) -> int:
        assert self.open.wait(30)
        if self.full:
            self.refused += 1
            raise StoreDown("log: no space left on the test's device; make room")
        return super().append(partition, frames, producer=producer, sequence=sequence)


async def test_everything_received_is_in_the_log_in_order() -> None:
    """OPENED, SUBSCRIBED, every number once and in order, CLOSED: in the exchange's partition."""
    log = MemoryLog()
    async with serving() as server:
        capture = Capture(ToyExchange(), settings_for(server), log)
        async with capturing(capture):
            await until(lambda: server.sockets and server.sockets[0].subscribed)
            for _ in range(500):
                await server.publish()
            await until(lambda: 500 in numbers(stored(log)))
            status = capture.status()

    frames = stored(log)
    assert numbers(frames) == list(range(1, 501))
    assert [f.kind for f in frames if f.kind != FRAME] == [OPENED, SUBSCRIBED, CLOSED]
    assert [f.counter for f in frames] == list(range(len(frames)))
    assert log.partitions() == ["toy"]
    assert (status.buffer_frames, status.buffer_bytes) == (0, 0)
    assert status.appended_frames == len(frames) - 1


async def test_stalled_log_fills_the_buffer_to_its_limit_and_no_further() -> None:
    """While an append hangs, the socket is left unread at the limit; when it returns, nothing is missing."""
    log = StallingLog()
    async with serving() as server:
        server.compress = False
        capture = Capture(ToyExchange(), settings_for(server, buffer_frames=100), log)
        async with capturing(capture):
            await until(lambda: SUBSCRIBED in [f.kind for f in (stored(log) if log.partitions() else [])])
            log.open.clear()
            sending = asyncio.create_task(_send(server, 3_000))
            await until(lambda: capture.status().buffer_full)
            # The server cannot go on either, once the buffers of TCP are full: that is the back-pressure.
            await until(lambda: server.sockets[0].ws._req.transport.get_write_buffer_size() > 50_000)  # type: ignore[union-attr]
            most = capture.status().buffer_frames
            log.open.set()
            await sending
            await until(lambda: capture.status().appended_frames >= 3_002)

    assert most <= 101
    assert numbers(stored(log)) == list(range(3_000))


async def _send(server: ToyServer, count: int) -> None:
    for number in range(count):
        await server.sockets[0].send(n=number, filler="x" * 10_000)


async def test_full_disk_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    """A log that refuses is asked again until it works; it is said loudly, and each frame is stored once."""
    log = StallingLog()
    async with serving() as server:
        capture = Capture(ToyExchange(), settings_for(server), log)
        async with capturing(capture):
            await until(lambda: server.sockets and server.sockets[0].subscribed)
            log.full = True
            await server.publish()
            await until(lambda: log.refused >= 2)
            failures = capture.status().append_failures
            log.full = False
            await until(lambda: 1 in numbers(stored(log)))

    assert numbers(stored(log)) == [1]
    assert failures >= 1
    assert "the log is down" in caplog.text
    assert "the log works again" in caplog.text


async def test_stop_with_the_log_down_says_what_is_lost() -> None:
    """The drain has a limit; beyond it the stop is an error that counts the frames."""
    log = StallingLog()
    log.full = True
    stop = asyncio.Event()
    async with serving() as server:
        capture = Capture(ToyExchange(), settings_for(server), log)
        task = asyncio.create_task(capture.run(stop, drain_seconds=0.1))
        await until(lambda: log.refused)
        stop.set()
        with pytest.raises(StoreDown, match=r"\d+ frames not in the log.*no space"):
            await task


async def test_repeated_append_is_stored_once() -> None:
    """An append that was stored but reported as failed (outcome unknown) is made again without doubling."""

    class Forgetful(StallingLog):
        def append(self, partition: str, frames: Sequence[Frame], *, producer: str = "", sequence: int = 0) -> int:
            offset = super().append(partition, frames, producer=producer, sequence=sequence)
            if not self.refused:
                self.refused += 1
                raise StoreDown("log: stored, but the answer was lost")
            return offset

    log = Forgetful()
    async with serving() as server:
        async with capturing(Capture(ToyExchange(), settings_for(server), log)):
            await until(lambda: server.sockets and server.sockets[0].subscribed)
            await server.publish()
            await until(lambda: 1 in numbers(stored(log)))

    frames = stored(log)
    assert [f.counter for f in frames] == list(range(len(frames)))


async def test_epochs_are_new_in_every_process() -> None:
    """A capture started on the log of another never names a socket of its own like one of that one's."""
    log = MemoryLog()
    async with serving() as server:
        for started in range(3):
            async with capturing(Capture(ToyExchange(), settings_for(server), log)):
                await until(lambda n=started: len(server.sockets) > 2 * n and server.sockets[-1].subscribed)
                await server.sockets[-1].ws.close()
                await until(lambda n=started: len(server.sockets) == 2 * n + 2 and server.sockets[-1].subscribed)

    epochs = [frame.epoch for frame in stored(log) if frame.kind == OPENED]
    assert epochs == sorted(set(epochs))
    assert len(epochs) == 6


async def test_unreachable_exchange_is_told_once_and_tried_again(
    unused_tcp_port: int, caplog: pytest.LogCaptureFixture
) -> None:
    """One clear message, however often it fails; the capture goes on trying."""
    settings = Settings(capture=QUICK, exchanges={"toy": ExchangeSettings(url=f"ws://127.0.0.1:{unused_tcp_port}/ws")})
    capture = Capture(ToyExchange(), settings, MemoryLog())
    async with capturing(capture):
        await until(
            lambda: (connections := capture.status().connections) and connections[0].ended.get("connect", 0) > 3
        )

    assert caplog.text.count("the connection was refused") == 1
    assert "exchanges.toy.url" in caplog.text


def test_probe_is_for_callers_without_an_event_loop(unused_tcp_port: int) -> None:
    """`k2 up` asks before it starts anything."""
    with pytest.raises(FeedDown, match="refused"):
        probe(ToyExchange(f"ws://127.0.0.1:{unused_tcp_port}/ws"), Settings())


async def test_buffer_counts_until_released() -> None:
    """Records count while they are being appended; both limits hold; the end is an empty batch."""
    buffer = Buffer(3, 1_000)
    frame = Frame(FRAME, LIVE, "0", 0, 0, 0, b"x" * 100)
    waits = [buffer.put(frame) for _ in range(3)]
    taken = await buffer.take(2, 0.0)
    still_full = buffer.put(frame)
    buffer.release(taken)
    buffer.close()
    rest = [await buffer.take(10, 0.0), await buffer.take(10, 0.0)]

    assert [wait is None for wait in waits] == [True, True, False]
    assert still_full is not None
    await still_full
    assert [len(part) for part in (taken, *rest)] == [2, 2, 0]
    assert (buffer.frames, buffer.bytes) == (2, 200)
    assert Buffer(10, 150).put(frame) is None
    assert Buffer(10, 100).put(frame) is not None


PLUGIN = "from toy_exchange import ToyExchange\nTOY = ToyExchange()\n"
RUN = """
import sys
from k2.errors import K2Error
from k2.run.capture import run_capture
from k2.settings import load
try:
    run_capture(load({"data": sys.argv[1]}), "toy")
except K2Error as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


@pytest.fixture
def start_capture(tmp_path: Path) -> Callable[[str], subprocess.Popen[str]]:
    """Start a capture process of the toy exchange, brought by an entry point as a plugin would be."""
    site = tmp_path / "site"
    (site / "toy-1.dist-info").mkdir(parents=True)
    (site / "toy-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1\n")
    (site / "toy-1.dist-info" / "entry_points.txt").write_text("[k2.exchanges]\ntoy = toy_plugin:TOY\n")
    (site / "toy_plugin.py").write_text(PLUGIN)

    def start(url: str) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            "PYTHONPATH": f"{site}{os.pathsep}{TOY_FOLDER}",
            "K2_EXCHANGES_TOY_URL": url,
            "K2_CAPTURE_BACKOFF_FIRST_SECONDS": "0.05",
        }
        argv = [sys.executable, "-c", RUN, str(tmp_path / "data")]
        return subprocess.Popen(argv, env=environment, stderr=subprocess.PIPE, text=True)

    return start


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_terminated_capture_drains_and_ends_well(
    number: signal.Signals, start_capture: Callable[[str], subprocess.Popen[str]], tmp_path: Path
) -> None:
    """A signal in mid-stream: exit code 0, CLOSED is the last record, and before it a whole stream."""
    async with serving() as server:
        with start_capture(server.url) as process:
            await until(lambda: server.sockets and server.sockets[0].subscribed, 60)
            for _ in range(300):
                await server.publish()
            process.send_signal(number)
            while process.poll() is None:
                await server.publish()
                await asyncio.sleep(0.001)
            errors = process.stderr.read() if process.stderr else ""

    log = open_log(Settings(data=str(tmp_path / "data")))
    with contextlib.closing(log):
        frames = stored(log)
    got = numbers(frames)
    assert process.returncode == 0, errors
    assert frames[-1].kind == CLOSED
    assert got == list(range(1, len(got) + 1))
    assert len(got) >= 300


async def test_killed_capture_keeps_what_was_acknowledged_and_goes_on(
    start_capture: Callable[[str], subprocess.Popen[str]], tmp_path: Path
) -> None:
    """After kill -9 the log has a whole beginning, and the next capture appends behind it."""
    settings = Settings(data=str(tmp_path / "data"))
    async with serving() as server:
        with start_capture(server.url) as process:
            await until(lambda: server.sockets and server.sockets[0].subscribed, 60)
            with contextlib.closing(open_log(settings)) as log:
                while len(numbers(stored(log) if log.partitions() else [])) < 50:
                    await server.publish()
                    await asyncio.sleep(0.001)
            process.kill()
        with start_capture(server.url) as process:
            await until(lambda: len(server.sockets) == 2 and server.sockets[1].subscribed, 60)
            last = await server.publish()
            with contextlib.closing(open_log(settings)) as log:
                await until(lambda: last in numbers(stored(log)), 60)
                frames = stored(log)
            process.terminate()

    opened = [(f.connection, f.epoch) for f in frames if f.kind == OPENED]
    assert len(set(opened)) == len(opened) == 2
    first = frames[: [f.kind for f in frames].index(OPENED, 1)]
    assert [f.counter for f in first] == list(range(len(first)))
    assert process.returncode == 0


async def test_running_capture_tells_of_itself_and_refuses_a_second(
    start_capture: Callable[[str], subprocess.Popen[str]], tmp_path: Path
) -> None:
    """The status file and the metrics made of it; a second capture of the exchange is refused with the owner's pid."""
    settings = Settings(data=str(tmp_path / "data"))
    async with serving() as server:
        with start_capture(server.url) as process:
            await until(
                lambda: (told := read_captures(settings)) and [c.state for c in told[0].connections] == ["subscribed"],
                60,
            )
            await server.publish()
            await until(lambda: read_captures(settings)[0].connections[0].frames == 2)
            registry = CollectorRegistry()
            registry.register(CaptureCollector(settings))
            metrics = generate_latest(registry).decode()
            with start_capture(server.url) as second:
                refusal = await asyncio.to_thread(second.communicate)
            status = read_captures(settings)[0]
            process.terminate()

    assert second.returncode == 75
    assert (
        f"toy is already being captured into {tmp_path / 'data'} by `k2 capture toy` (pid {process.pid})" in refusal[1]
    )
    assert (status.exchange, status.pid, status.fresh) == ("toy", process.pid, True)
    assert 'k2_capture_up{exchange="toy"} 1.0' in metrics
    assert 'k2_capture_frames_total{connection="0",exchange="toy"} 2.0' in metrics
    assert 'k2_capture_subscribed{connection="0",exchange="toy"} 1.0' in metrics


def test_capture_of_a_held_exchange_is_refused_before_connecting(tmp_path: Path) -> None:
    """The lock comes first: nothing is opened or sent."""
    settings = Settings(data=str(tmp_path))
    lock = run_folder(settings) / "capture-kraken.lock"
    with hold(lock, "k2 capture kraken", ""), pytest.raises(InUse, match=r"kraken is already being captured.*--data"):
        run_capture(settings, "kraken")

    assert not (tmp_path / "log").exists()
