"""Every metric, declared once: its name, kind, labels and meaning. `docs/metrics.md` is made of it.

Prometheus conventions: counters end in `_total` and only rise, units are in the names, seconds and bytes as they are.
"""

from __future__ import annotations

from typing import Literal

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from k2 import limits

Family = CounterMetricFamily | GaugeMetricFamily


class Declared(msgspec.Struct, frozen=True):
    """One metric. Of a histogram Prometheus makes `_bucket`, `_count` and `_sum`."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    text: str
    labels: tuple[str, ...] = ()


def _gauge(name: str, text: str, *labels: str) -> Declared:
    return Declared(name, "gauge", text, labels)


def _counter(name: str, text: str, *labels: str) -> Declared:
    return Declared(name, "counter", text, labels)


_CONNECTION = ("exchange", "connection")

METRICS = {
    declared.name: declared
    for declared in (
        # Capture, told by its status file.
        _gauge("k2_capture_up", "Whether the capture process told of itself within 5 s.", "exchange"),
        _gauge("k2_capture_buffer_frames", "Frames in memory, not yet durable.", "exchange"),
        _gauge("k2_capture_buffer_bytes", "Bytes in memory, not yet durable.", "exchange"),
        _counter("k2_capture_buffer_full_total", "Frames after which a socket was left unread.", "exchange"),
        _counter("k2_capture_appends_total", "Appends made durable.", "exchange"),
        _counter("k2_capture_appended_frames_total", "Records made durable.", "exchange"),
        _counter("k2_capture_append_failures_total", "Appends the log refused.", "exchange"),
        _counter("k2_capture_frames_total", "Frames received.", *_CONNECTION),
        _counter("k2_capture_bytes_total", "Bytes received, uncompressed.", *_CONNECTION),
        _gauge("k2_capture_subscribed", "Whether it is connected and subscribed.", *_CONNECTION),
        _gauge("k2_capture_refused", "Subscriptions the exchange refuses.", *_CONNECTION),
        _gauge("k2_capture_last_frame_timestamp_seconds", "Time of the last frame.", *_CONNECTION),
        _gauge("k2_capture_last_data_timestamp_seconds", "The same without heartbeats.", *_CONNECTION),
        _counter("k2_capture_ended_total", "Connections that ended.", *_CONNECTION, "reason"),
        # The log, ingest and hot.
        _gauge("k2_log_start_offset", "First offset still held.", "exchange"),
        _gauge("k2_log_end_offset", "Offset the next frame will get.", "exchange"),
        _gauge(
            "k2_log_given_up_frames",
            "Frames removed at log.max_bytes though a reader needed them, as far as the log remembers.",
            "exchange",
        ),
        _gauge("k2_ingest_offset", "Offset up to which rows can be queried.", "exchange"),
        _gauge("k2_ingest_lag_frames", "Frames in the log that are not yet rows.", "exchange"),
        _counter("k2_ingest_total", "What ingest did since it started: frames, rows, repeats, flushes, tries.", "what"),
        _gauge("k2_tail_rows", "Rows in the memory tail."),
        _gauge("k2_hot_offset", "Offset up to which hot holds all rows.", "exchange"),
        _gauge("k2_hot_rows", "Rows in hot.", "table"),
        _gauge("k2_hot_bytes", "Bytes on disk in hot.", "table"),
        _gauge("k2_hot_parts", "Parts in hot.", "table"),
        _gauge("k2_hot_memory_bytes", "Memory of the engine: all it tracks, and its caches.", "part"),
        # Offload and cold.
        _gauge("k2_offload_lag_offsets", "Offsets cold is behind what could be moved.", "table"),
        _gauge("k2_offload_parked", "Whether a table cannot be moved as it stands (see /health/ready)."),
        _gauge("k2_cold_offset", "Offset up to which cold holds all.", "table", "exchange"),
        _counter("k2_cold_commits_total", "Commits since the node started.", "table"),
        _counter("k2_cold_rows_total", "Rows committed since the node started.", "table"),
        _gauge("k2_cold_snapshots", "Retained snapshots.", "table"),
        _gauge("k2_cold_files", "Data files of the current snapshot.", "table"),
        # REST.
        _counter("k2_api_requests_total", "Requests answered.", "route", "status"),
        Declared("k2_api_request_seconds", "histogram", "From the request to the end of its answer.", ("route",)),
        # Every process, told by its readings.
        _gauge(limits.FILL, "What a limit holds now, in its unit.", "process", "limit"),
        _gauge(limits.MAX, "The limit of what k2_limit_fill tells.", "process", "limit"),
        _counter(limits.ACTED, "Times a limit dropped, refused, cut, ended or held up something.", "process", "limit"),
        _counter(limits.WAITED, "Seconds a limit made somebody wait (back-pressure).", "process", "limit"),
        _gauge("k2_process_resident_bytes", "Resident memory.", "process"),
        _gauge("k2_process_peak_resident_bytes", "Most resident memory since the process started.", "process"),
        _counter("k2_supervisor_restarts_total", "Starts of a process after its first.", "process"),
        # The scrape itself.
        _gauge("k2_scrape_failed", "Whether a tier could not be read at this scrape; its families are left out."),
        _gauge("k2_scrape_timestamp_seconds", "When this was measured."),
    )
}


def family(name: str) -> Family:
    """Return an empty family of a declared counter or gauge, to be filled at a scrape."""
    declared = METRICS[name]
    make = CounterMetricFamily if declared.kind == "counter" else GaugeMetricFamily
    return make(name, declared.text, labels=declared.labels)


def single(name: str, value: float) -> Family:
    """Return a family of a declared metric without labels, with its value."""
    found = family(name)
    found.add_metric([], value)
    return found


def per_label(name: str, values: dict[str, int] | dict[str, float]) -> Family:
    """Return a family of a declared metric with one label, with its values by that label."""
    found = family(name)
    for label, value in sorted(values.items()):
        found.add_metric([label], value)
    return found
