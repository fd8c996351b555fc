"""What captures tell of themselves: files beside the data, read by the node for status and metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from k2.feeds.status import ConnectionStatus
from k2.run.folder import read_status
from k2.run.metrics import family
from k2.settings import Settings

FRESH_SECONDS = 5.0  # a status older than this is of a process that is gone or hangs


class CaptureStatus(msgspec.Struct):
    """What `<data>/run/capture-<exchange>.json` holds; times in nanoseconds UTC, 0: never yet."""

    exchange: str
    pid: int
    since_ns: int
    written_ns: int
    appended_frames: int = 0
    appends: int = 0
    append_failures: int = 0
    buffer_frames: int = 0
    buffer_bytes: int = 0
    buffer_full: int = 0  # how often the sockets were left unread
    last_error: str = ""
    connections: list[ConnectionStatus] = []

    @property
    def fresh(self) -> bool:
        """Whether the capture that wrote this was alive a moment ago."""
        return time.time_ns() - self.written_ns < FRESH_SECONDS * 1e9


def status_path(settings: Settings, exchange: str) -> Path:
    """Return where a capture tells of itself."""
    return settings.data_path / "run" / f"capture-{exchange}.json"


def read_captures(settings: Settings) -> list[CaptureStatus]:
    """Return what the captures of an installation last said of themselves, by exchange; see `fresh`."""
    paths = sorted((settings.data_path / "run").glob("capture-*.json"))
    return [status for path in paths if (status := read_status(path, CaptureStatus)) is not None]


class CaptureCollector(Collector):
    """Metrics of all captures of an installation, read from their status files at each scrape.

    Captures are processes of their own and open no port; the node serves their metrics with
    `REGISTRY.register(CaptureCollector(settings))`.
    """

    def __init__(self, settings: Settings) -> None:
        """Store the settings; nothing is read before a scrape."""
        self._settings = settings

    def describe(self) -> Iterable[Metric]:
        """Return nothing: names are not fixed before the first scrape."""
        return []

    def collect(self) -> Iterable[Metric]:
        """Return every family with one sample per exchange, or per connection or reason."""
        statuses = read_captures(self._settings)
        for name, value in _OF_CAPTURE.items():
            found = family(name)
            for status in statuses:
                found.add_metric([status.exchange], value(status))
            yield found
        yield from _of_connections(statuses)


_OF_CAPTURE: dict[str, Callable[[CaptureStatus], float]] = {
    "k2_capture_up": lambda status: status.fresh,
    "k2_capture_buffer_frames": lambda status: status.buffer_frames,
    "k2_capture_buffer_bytes": lambda status: status.buffer_bytes,
    "k2_capture_buffer_full_total": lambda status: status.buffer_full,
    "k2_capture_appends_total": lambda status: status.appends,
    "k2_capture_appended_frames_total": lambda status: status.appended_frames,
    "k2_capture_append_failures_total": lambda status: status.append_failures,
}


def _of_connections(statuses: list[CaptureStatus]) -> Iterable[Metric]:
    frames, size = family("k2_capture_frames_total"), family("k2_capture_bytes_total")
    subscribed, refused = family("k2_capture_subscribed"), family("k2_capture_refused")
    seen = family("k2_capture_last_frame_timestamp_seconds")
    data = family("k2_capture_last_data_timestamp_seconds")
    ended = family("k2_capture_ended_total")
    for status in statuses:
        for each in status.connections:
            values = [status.exchange, each.name]
            frames.add_metric(values, each.frames)
            size.add_metric(values, each.bytes)
            subscribed.add_metric(values, float(each.state == "subscribed" and status.fresh))
            refused.add_metric(values, len(each.refused))
            seen.add_metric(values, each.last_frame_ns / 1e9)
            data.add_metric(values, each.last_data_ns / 1e9)
            for reason, count in each.ended.items():
                ended.add_metric([*values, reason], count)
    return [frames, size, subscribed, refused, seen, data, ended]
