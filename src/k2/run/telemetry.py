"""What the node tells of itself: metrics, readiness and status, read when asked for."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from k2.cold.base import Cold
from k2.errors import K2Error
from k2.hot.base import Hot
from k2.log.base import Log
from k2.run.capture import CaptureCollector, read_captures
from k2.run.folder import run_folder
from k2.run.ingest import Ingest
from k2.run.offload import Offloader
from k2.run.state import IngestState
from k2.run.supervise import read_supervisor
from k2.schema import TABLES
from k2.settings import Settings

READY_LAG_FRAMES = 100_000
"""Frames ingest may be behind the log and the node still call itself ready."""

_COLD_TABLES = tuple(table.name for table in TABLES.values() if table.cold)


class Telemetry:
    """Reads the parts of one node. `ingest` and `offload` are None where this process does not do that."""

    def __init__(
        self,
        settings: Settings,
        log: Log,
        hot: Hot,
        cold: Cold,
        state: IngestState,
        ingest: Ingest | None,
        offload: Offloader | None,
    ) -> None:
        self._settings = settings
        self._log = log
        self._hot = hot
        self._cold = cold
        self._state = state
        self._ingest = ingest
        self._offload = offload
        self.registry = CollectorRegistry()
        for make in (ProcessCollector, PlatformCollector, GCCollector):
            make(registry=self.registry)
        self.registry.register(CaptureCollector(settings))
        self.registry.register(_NodeCollector(self))

    def ends(self) -> dict[str, int]:
        """Return the log's end offset per partition."""
        return {partition: self._log.end_offset(partition) for partition in self._log.partitions()}

    def read_to(self) -> dict[str, int]:
        """Return per partition the offset up to which rows can be queried, the memory tail included."""
        return dict(self._ingest.tail.end) if self._ingest else self._state.progress()

    def readiness(self) -> list[str]:
        """Return why the node is not ready, empty when it is: each tier answers, and ingest keeps up."""
        reasons = []
        if self._offload is not None and self._offload.parked:
            reasons.append(f"offload: {self._offload.parked}")
        for name, look in (("log", self.ends), ("hot", self._hot.statistics), ("cold", self._watermarks)):
            try:
                look()
            except K2Error as error:
                reasons.append(f"{name}: {error}")
        if not reasons:
            read_to = self.read_to()
            for partition, end in self.ends().items():
                behind = end - read_to.get(partition, 0)
                if behind > READY_LAG_FRAMES:
                    reasons.append(f"ingest: {behind} frames of {partition} wait (more than {READY_LAG_FRAMES})")
        return reasons

    def _watermarks(self) -> dict[str, dict[str, int]]:
        return {name: dict(self._cold.pin(name).watermark) for name in _COLD_TABLES}

    def status(self) -> dict[str, Any]:
        """Return what `k2 status` shows: every stage's progress, captures and processes."""
        read_to, stored = self.read_to(), self._state.progress()
        partitions = {
            partition: {
                "log_start": self._log.start_offset(partition),
                "log_end": end,
                "ingested": read_to.get(partition, 0),
                "in_hot": stored.get(partition, 0),
            }
            for partition, end in self.ends().items()
        }
        return {
            "data": str(self._settings.data_path),
            "partitions": partitions,
            "cold_watermarks": self._watermarks(),
            "hot": {name: dict(values) for name, values in self._hot.statistics().items()},
            "tail_rows": self._ingest.tail.row_count if self._ingest else None,
            "counters": dict(self._ingest.counters) if self._ingest else {},
            **processes(self._settings),
        }

    def families(self) -> Iterable[Metric]:
        """Return the node's own metric families, measured now."""
        read_to, stored, ends = self.read_to(), self._state.progress(), self.ends()
        yield _per("k2_log_end_offset", "Offset the next frame will get.", "exchange", ends)
        yield _per("k2_ingest_offset", "Offset up to which rows can be queried.", "exchange", read_to)
        yield _per("k2_hot_offset", "Offset up to which hot holds all rows.", "exchange", stored)
        given_up = {p: sum(r.end_offset - r.first_offset for r in self._log.given_up(p)) for p in ends}
        yield _per(
            "k2_log_given_up_frames", "Frames removed at log.max_bytes before all had read them.", "exchange", given_up
        )
        lag = {partition: end - read_to.get(partition, 0) for partition, end in ends.items()}
        yield _per("k2_ingest_lag_frames", "Frames in the log that are not yet rows.", "exchange", lag)
        statistics = self._hot.statistics()
        for field, text in (("rows", "Rows in hot."), ("bytes", "Bytes on disk in hot."), ("parts", "Parts in hot.")):
            yield _per(f"k2_hot_{field}", text, "table", {t: values[field] for t, values in statistics.items()})
        yield self._cold_offsets()
        if self._ingest:
            yield GaugeMetricFamily("k2_tail_rows", "Rows in the memory tail.", value=self._ingest.tail.row_count)
            counters = CounterMetricFamily("k2_ingest", "What ingest did since it started.", labels=["what"])
            for what, count in sorted(self._ingest.counters.items()):
                counters.add_metric([what], count)
            yield counters

    def _cold_offsets(self) -> Metric:
        family = GaugeMetricFamily("k2_cold_offset", "Offset up to which cold holds all.", labels=["table", "exchange"])
        for table, watermark in self._watermarks().items():
            for partition, offset in watermark.items():
                family.add_metric([table, partition], offset)
        return family


class _NodeCollector(Collector):
    """Measures at each scrape; a tier that is down leaves its own families out and says so in one."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry

    def describe(self) -> Iterable[Metric]:
        """Return nothing: families are made at each scrape."""
        return []

    def collect(self) -> Iterable[Metric]:
        """Return the families that can be measured."""
        failed = 0
        try:
            yield from self._telemetry.families()
        except K2Error:
            failed = 1
        yield GaugeMetricFamily("k2_scrape_failed", "Whether a tier could not be read at this scrape.", value=failed)
        yield GaugeMetricFamily("k2_scrape_timestamp_seconds", "When this was measured.", value=time.time())


def _per(name: str, text: str, label: str, values: dict[str, int]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=[label])
    for key, value in sorted(values.items()):
        family.add_metric([key], value)
    return family


def processes(settings: Settings) -> dict[str, Any]:
    """Return what the supervisor and the captures last told of themselves."""
    captures = [{**_fields(status), "alive": status.fresh} for status in read_captures(settings)]
    supervisor = read_supervisor(run_folder(settings))
    return {"captures": captures, "supervisor": _fields(supervisor) if supervisor else None}


def _fields(record: msgspec.Struct) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(record)
    return plain
