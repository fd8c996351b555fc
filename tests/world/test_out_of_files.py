"""Processes that may open hardly any file: a clear error, nothing appended is lost, and they go on when they may."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import re
import resource
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from flow import Flow, flow
from processes import Runner, ingested

from k2.api.protocol import RESERVED_DESCRIPTORS
from k2.node import NodeStatus
from k2.run.folder import read_status

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of a running process are set by prlimit")

TRADES = "/v1/trades?symbol=BTC-USD&limit=5"
STRANGERS = 80
ROOM = 30  # connections there is room for


def allow_files(runner: Runner, count: int) -> None:
    """Set how many files a running process may have open."""
    assert runner.process is not None
    _, hard = resource.prlimit(runner.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(runner.process.pid, resource.RLIMIT_NOFILE, (count, hard))


def open_files(runner: Runner) -> int:
    """Return how many files a running process has open."""
    assert runner.process is not None
    return sum(1 for _ in Path(f"/proc/{runner.process.pid}/fd").iterdir())


class Rest:
    """The REST interface of a node, as somebody far away sees it."""

    def __init__(self, flowing: Flow) -> None:
        status = read_status(flowing.settings.data_path / "run/node.json", NodeStatus)
        assert status is not None
        self.port = int(status.url.rpartition(":")[2])

    def ask(self, path: str, seconds: float = 30.0) -> tuple[int, str]:
        """Return status and text of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        with contextlib.closing(connection):
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

    def answers(self, path: str = TRADES) -> bool:
        """Whether a question is answered at once."""
        with contextlib.suppress(OSError, http.client.HTTPException):
            return self.ask(path, 3.0)[0] == 200
        return False

    def acted(self, limit: str) -> float:
        """Return how often a limit of the node acted, as its metrics tell."""
        found = re.search(rf'k2_limit_acted_total{{limit="{limit}",process="node"}} (\S+)', self.ask("/metrics")[1])
        return float(found[1]) if found else 0.0

    @contextlib.contextmanager
    def strangers(self, count: int) -> Iterator[list[socket.socket]]:
        """Hold so many connections open that say nothing."""
        with contextlib.ExitStack() as closing:
            yield [closing.enter_context(socket.create_connection(("127.0.0.1", self.port), 30)) for _ in range(count)]


def is_closed(stranger: socket.socket) -> bool:
    """Whether the other side has closed a connection."""
    stranger.setblocking(False)
    try:
        return stranger.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


@pytest.mark.slow
@pytest.mark.timeout(500)
async def test_no_more_files_and_then_some_again(tmp_path: Path) -> None:
    """Capture and node may open no further file while an exchange trades: they say so, wait, and go on."""
    async with flow(tmp_path, rate=40.0, settings={"log": {"segment_bytes": 100_000}}) as flowing:
        flowing.start()
        await flowing.works("before")
        (capture,), node = flowing.captures, flowing.node
        assert node is not None
        for runner, said in ((capture, "the log is down.*too many open files"), (node, r"waits|goes on in")):
            since = len(flowing.said())
            allow_files(runner, 3)
            await flowing.says(said, since)
            assert runner.process is not None
            allow_files(runner, 4096)
            await flowing.works("with files again")
            await asyncio.to_thread(runner.check)

        assert await flowing.end() == []


@pytest.mark.slow
@pytest.mark.timeout(500)
async def test_connections_without_end_leave_files_to_the_rest_of_the_node(tmp_path: Path) -> None:
    """Strangers hold more connections than the node may open files: they are closed, ingest and offload never wait."""
    async with flow(tmp_path, rate=40.0) as flowing:
        flowing.start()
        await flowing.works("before")
        node, rest = flowing.node, Rest(flowing)
        assert node is not None
        assert await asyncio.to_thread(rest.answers)
        since = len(flowing.said())
        allow_files(node, open_files(node) + RESERVED_DESCRIPTORS + ROOM)
        with rest.strangers(STRANGERS) as strangers:
            await flowing.until("some are closed at once", lambda: sum(map(is_closed, strangers)) >= STRANGERS // 4)
            await flowing.works("beside strangers")
        await flowing.until("there is a place again", rest.answers)
        allow_files(node, 4096)

        assert await asyncio.to_thread(rest.acted, "api.sockets") >= STRANGERS // 4
        assert not re.search("[Tt]oo many open files", flowing.said()[since:])
        assert await flowing.end() == []


@pytest.mark.slow
@pytest.mark.timeout(500)
async def test_rest_without_files_waits_or_says_so(tmp_path: Path) -> None:
    """No file is left: a question gets 503 and the reason, new connections wait; all is well when there are some."""
    async with flow(tmp_path, rate=40.0) as flowing:
        flowing.start()
        await flowing.works("before")
        node, rest = flowing.node, Rest(flowing)
        assert node is not None
        asking = http.client.HTTPConnection("127.0.0.1", rest.port, timeout=60)
        with contextlib.closing(asking):
            await asyncio.to_thread(asking.connect)
            await asyncio.to_thread(asking.request, "GET", "/health/live")
            await asyncio.to_thread(lambda: asking.getresponse().read())
            since = len(flowing.said())
            allow_files(node, 3)
            await asyncio.to_thread(asking.request, "GET", TRADES)
            answer = await asyncio.to_thread(asking.getresponse)
            told = (await asyncio.to_thread(answer.read)).decode()
            with rest.strangers(3) as waiting:
                await flowing.says("connections wait, accepting them is tried again", since)
                assert not any(map(is_closed, waiting))
                at_a_stand = ingested(flowing.settings)
                allow_files(node, 4096)
                await flowing.until("questions are answered again", rest.answers)
        await flowing.works("with files again")

        assert answer.status == 503
        assert "oo many open files" in told
        assert await asyncio.to_thread(rest.acted, "api.accept") >= 1
        assert ingested(flowing.settings) > at_a_stand
        assert await flowing.end() == []
