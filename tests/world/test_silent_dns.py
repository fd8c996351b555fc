"""DNS that never answers: who needs it waits and tries again, nobody else notices, and the process can end."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from flow import Flow, flow
from installation import Installation

from k2.run.captured import CaptureStatus, read_captures

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "feeds"))
from name_server import NAME, asking, name_server, why_not

CONNECT_SECONDS = 1.0
END_SECONDS = 12.0  # far below the minutes for which a lookup hangs


@dataclass
class Asking(Installation):
    """An installation whose commands ask the name server of the test."""

    folder: Path
    before: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        Installation.__init__(self, self.folder)

    def argv(self, *arguments: object) -> list[str]:
        return [*self.before, *super().argv(*arguments)]


def capture_of(flowing: Flow) -> CaptureStatus:
    """Return what the capture says of itself."""
    (status,) = read_captures(flowing.settings)
    return status


def failed(flowing: Flow) -> int:
    """Return how often the capture could not connect."""
    return sum(each.ended.get("connect", 0) for each in capture_of(flowing).connections)


def subscribed(flowing: Flow) -> int:
    """Return how many of its connections work."""
    return sum(each.state == "subscribed" for each in capture_of(flowing).connections)


def start(flowing: Flow, folder: Path) -> None:
    """Start the node as ever, and the capture where names are asked of the test."""
    flowing.node = flowing.running.start("node", "node", "--port", "0")
    flowing.running.installation = Asking(flowing.running.installation.folder, asking(folder))
    flowing.captures = [flowing.running.start("capture-coinbase", "capture", "coinbase")]


def settings() -> dict[str, dict[str, object]]:
    return {"capture": {"connect_seconds": CONNECT_SECONDS}, "exchanges.coinbase": {"symbols_per_connection": 1}}


@contextlib.contextmanager
def by_name(flowing: Flow) -> Iterator[None]:
    """Have the exchange's address in the settings be a name."""
    file = flowing.running.installation.folder / "k2.toml"
    url = flowing.settings.exchange("coinbase").url
    assert "127.0.0.1" in url
    file.write_text(file.read_text().replace(url, url.replace("127.0.0.1", NAME)))
    yield


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_lookups_that_hang_hold_up_only_who_needs_them(tmp_path: Path) -> None:
    """One of two connections breaks while DNS is silent: it tries again at its limit, the other flows; nothing lost."""
    if reason := why_not():
        pytest.skip(reason)
    async with name_server() as names, flow(tmp_path, rate=4.0, settings=settings()) as flowing:
        with by_name(flowing):
            start(flowing, tmp_path)
        await flowing.works("with DNS")
        await flowing.until("both are subscribed", lambda: subscribed(flowing) == 2)
        names.silent = True
        flowing.simulator._connections("coinbase")[0].abort()
        began, before = time.monotonic(), failed(flowing)
        # More lookups hang now than a small pool of threads has.
        await flowing.until("it has been tried again and again", lambda: failed(flowing) >= before + 8)
        took = time.monotonic() - began
        (broken,) = [each for each in capture_of(flowing).connections if each.state != "subscribed"]
        await flowing.works("beside hung lookups")
        names.silent = False
        await flowing.until("both are subscribed again", lambda: subscribed(flowing) == 2)

        assert names.swallowed >= 8
        assert took >= 8 * CONNECT_SECONDS  # each lasted until its limit
        assert f"no answer within {CONNECT_SECONDS:g} s (DNS has not found {NAME} yet)" in broken.last_error
        assert await flowing.end() == []


@pytest.mark.timeout(120)
async def test_capture_ends_while_lookups_hang(tmp_path: Path) -> None:
    """Told to stop while every lookup hangs: it ends in good order, at once, and does not wait for DNS."""
    if reason := why_not():
        pytest.skip(reason)
    async with name_server() as names, flow(tmp_path, settings=settings()) as flowing:
        names.silent = True
        with by_name(flowing):
            start(flowing, tmp_path)
        await flowing.until("it was tried", lambda: bool(read_captures(flowing.settings)) and failed(flowing) >= 3)
        began = time.monotonic()
        await asyncio.to_thread(flowing.captures[0].stop)

        assert time.monotonic() - began < END_SECONDS
        assert names.swallowed >= 3
