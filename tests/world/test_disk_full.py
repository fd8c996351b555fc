"""Disks that fill up under a running platform: it says so, waits, and goes on by itself when there is space."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from flow import flow

PLACES = {"log": "log", "hot": "hot", "catalog": "cold", "warehouse": "cold/warehouse", "state": ""}
MIB = {"log": 96, "hot": 256, "catalog": 32, "warehouse": 96, "state": 64}
SAID = {
    "log": r"the log is down.*the disk is full",
    "hot": r"flush \d+ waits.*(No space left|NOT_ENOUGH_SPACE|space)",
    "catalog": r"offload goes on in.*(disk is full|No space left|unable to open|disk I/O|check space)",
    "warehouse": r"offload goes on in.*No space left",
    "state": r"(begin a flush|flush \d+) waits.*(full|check space)",
}


@pytest.fixture
def mounts(tmp_path: Path) -> Iterator[dict[str, Path]]:
    """A data folder whose parts lie on small disks of their own."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount")
    data = tmp_path / "data"
    data.mkdir()
    mounted: list[Path] = []
    try:
        for name in ("state", "log", "hot", "catalog", "warehouse"):
            place = data / PLACES[name]
            place.mkdir(parents=True, exist_ok=True)
            done = subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={MIB[name]}m", "tmpfs", str(place)],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                pytest.skip(f"cannot mount a tmpfs: {done.stderr.strip()}")
            mounted.append(place)
        yield {name: data / PLACES[name] for name in PLACES}
    finally:
        for place in reversed(mounted):
            subprocess.run(["umount", "--lazy", str(place)], check=False)


@contextlib.contextmanager
def full(place: Path) -> Iterator[None]:
    """Leave not a byte on a disk."""
    ballast = place / "ballast.tmp"
    with ballast.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
    try:
        with pytest.raises(OSError, match="No space") as caught:
            (place / "one-more.tmp").write_bytes(b"x")
        assert caught.value.errno == errno.ENOSPC
        yield
    finally:
        ballast.unlink()
        (place / "one-more.tmp").unlink(missing_ok=True)


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_every_disk_full_and_free_again(mounts: dict[str, Path], tmp_path: Path) -> None:
    """Log, hot, warehouse, catalog and state one after the other, while an exchange trades: exact at the end."""
    limits = {"log": {"segment_bytes": 1 << 20, "retention_seconds": 0}, "capture": {"buffer_frames": 100_000}}
    async with flow(tmp_path, settings=limits, rate=40.0) as flowing:
        flowing.start()
        await flowing.works("before")
        for name, place in mounts.items():
            since = len(flowing.said())
            with full(place):
                await flowing.says(SAID[name], since)
            await flowing.works(f"after a full {name}")

        assert await flowing.end() == []
