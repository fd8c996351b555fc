"""A file system that turns read-only under a running platform, and is mended: it says so, waits, and goes on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from flow import flow
from power import Machine, missing


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.skipif(bool(missing()), reason=missing() or "-")
async def test_file_system_read_only_and_writable_again(tmp_path: Path) -> None:
    """Every write fails with EROFS while an exchange trades: nothing it told is lost or doubled, no process ends."""
    with Machine(tmp_path, disk=tmp_path / "data") as machine:
        async with flow(tmp_path, rate=20.0) as flowing:
            flowing.start()
            await flowing.works("before")
            since = len(flowing.said())
            machine.order("fail EROFS")
            with pytest.raises(OSError, match=os.strerror(30)):
                (tmp_path / "data/anything").write_text("")
            await flowing.says(r"the log is down, .* the file system is read-only; mount it writable", since)
            await flowing.says(r"(flush \d+|begin a flush) waits", since)
            await flowing.says("offload goes on in", since)
            machine.order("heal")
            await flowing.works("after it was mended")

            assert await flowing.end() == []
