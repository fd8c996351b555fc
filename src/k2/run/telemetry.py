"""What the node tells of itself: metrics, readiness and status, read when asked for."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from k2 import limits
from k2.cold.base import Cold
from k2.errors import K2Error
from k2.hot.base import Hot
from k2.log.base import Log
from k2.run.captured import CaptureCollector, read_captures
from k2.run.folder import run_folder
from k2.run.ingest import Ingest
from k2.run.metrics import family, per_label, single
from k2.run.offload import COLD_TABLES, Offloader
from k2.run.readings import Readings, measure, read_readings
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
        process: str = "node",
    ) -> None:
        """Store the parts; `process` is the name under which this process tells of its limits."""
        self._process = process
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
        self.registry.register(_ProcessesCollector(settings, process))

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
        yield per_label("k2_log_start_offset", {p: self._log.start_offset(p) for p in ends})
        yield per_label("k2_log_end_offset", ends)
        yield per_label("k2_log_given_up_frames", {p: self._given_up(p) for p in ends})
        yield per_label("k2_ingest_offset", read_to)
        yield per_label("k2_hot_offset", stored)
        yield per_label("k2_ingest_lag_frames", {p: end - read_to.get(p, 0) for p, end in ends.items()})
        statistics = self._hot.statistics()
        for field in ("rows", "bytes", "parts"):
            yield per_label(f"k2_hot_{field}", {table: values[field] for table, values in statistics.items()})
        yield per_label("k2_hot_memory_bytes", dict(self._hot.memory()))
        yield from self._of_cold()
        if self._ingest:
            yield single("k2_tail_rows", self._ingest.tail.row_count)
            yield per_label("k2_ingest_total", dict(self._ingest.counters))
        if self._offload:
            yield per_label("k2_offload_lag_offsets", self._offload.lag())
            yield single("k2_offload_parked", bool(self._offload.parked))
            yield per_label("k2_cold_commits_total", self._offload.totals.commits)
            yield per_label("k2_cold_rows_total", self._offload.totals.rows)

    def _given_up(self, partition: str) -> int:
        return sum(part.end_offset - part.first_offset for part in self._log.given_up(partition))

    def _of_cold(self) -> Iterable[Metric]:
        offsets = family("k2_cold_offset")
        for table, watermark in self._watermarks().items():
            for partition, offset in watermark.items():
                offsets.add_metric([table, partition], offset)
        yield offsets
        kept = {table: self._cold.snapshots(table) for table in COLD_TABLES}
        yield per_label("k2_cold_snapshots", {table: len(snapshots) for table, snapshots in kept.items()})
        files = {table: snapshots[-1].files_total for table, snapshots in kept.items() if snapshots}
        yield per_label("k2_cold_files", files)


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
        yield single("k2_scrape_failed", failed)
        yield single("k2_scrape_timestamp_seconds", time.time())


class _ProcessesCollector(Collector):
    """What every process of the installation does at its limits, and the memory it takes; this one is asked itself."""

    def __init__(self, settings: Settings, process: str) -> None:
        self._settings = settings
        self._process = process
        self._limits = limits.all_limits()

    def describe(self) -> Iterable[Metric]:
        """Return nothing: families are made at each scrape."""
        return []

    def collect(self) -> Iterable[Metric]:
        """Return the families of limits, memory and restarts."""
        others = read_readings(run_folder(self._settings))
        told = [measure(self._process), *(readings for readings in others if readings.process != self._process)]
        yield per_label("k2_process_resident_bytes", {r.process: r.resident_bytes for r in told})
        yield per_label("k2_process_peak_resident_bytes", {r.process: r.peak_resident_bytes for r in told})
        yield from self._of_limits(told)
        if supervisor := read_supervisor(run_folder(self._settings)):
            yield per_label("k2_supervisor_restarts_total", {c.name: c.restarts for c in supervisor.children})

    def _of_limits(self, told: Iterable[Readings]) -> Iterable[Metric]:
        fill, most = family(limits.FILL), family(limits.MAX)
        acted, waited = family(limits.ACTED), family(limits.WAITED)
        for readings in told:
            for name, limit in self._limits.items():
                reading = readings.limits.get(name)
                labels = [readings.process, name]
                if reading is None:
                    continue
                acted.add_metric(labels, reading.acted)
                waited.add_metric(labels, reading.waited_seconds)
                if reading.fill is not None:
                    fill.add_metric(labels, reading.fill)
                    most.add_metric(labels, limit.value(self._settings))
        return [fill, most, acted, waited]


def processes(settings: Settings) -> dict[str, Any]:
    """Return what the supervisor and the captures last told of themselves."""
    captures = [{**_fields(status), "alive": status.fresh} for status in read_captures(settings)]
    supervisor = read_supervisor(run_folder(settings))
    return {"captures": captures, "supervisor": _fields(supervisor) if supervisor else None}


def _fields(record: msgspec.Struct) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(record)
    return plain
