"""Processes that may open hardly any file: a clear error, nothing appended is lost, and they go on when they may."""

from __future__ import annotations

import asyncio
import resource
import sys
from pathlib import Path

import pytest
from flow import flow
from processes import Runner

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of a running process are set by prlimit")


def allow_files(runner: Runner, count: int) -> None:
    """Set how many files a running process may have open."""
    assert runner.process is not None
    _, hard = resource.prlimit(runner.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(runner.process.pid, resource.RLIMIT_NOFILE, (count, hard))


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
