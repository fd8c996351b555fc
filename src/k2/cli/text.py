"""What commands print for people."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from k2.cold.base import Maintenance
from k2.query.times import format_ns
from k2.run.importer import ImportResult


def table(headings: Sequence[str], rows: Iterable[Sequence[Any]], *, right: Iterable[int] = ()) -> str:
    """Return a plain aligned table; `right` are the positions of columns of numbers."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    numbers = set(right)
    for position, heading in enumerate(headings):
        made.add_column(heading, justify="right" if position in numbers else "left", no_wrap=True)
    for row in rows:
        made.add_row(*(str(value) for value in row))
    out = io.StringIO()
    Console(file=out, width=200, color_system=None).print(made)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def imports_text(results: Sequence[ImportResult]) -> str:
    """Return what an import did, a line a file."""
    return table(
        ("file", "added", "already there", "skipped lines", "first received", "last received"),
        [
            (
                result.file, f"{result.frames_added:,}", f"{result.frames_present:,}", f"{result.lines_skipped:,}",
                _time(result.first_received_ns), _time(result.last_received_ns),
            )
            for result in results
        ],
        right=(1, 2, 3),
    )  # fmt: skip


def snapshots_text(snapshots: Sequence[dict[str, Any]]) -> str:
    """Return the commits of cold, a line each."""
    if not snapshots:
        return "cold holds no commit yet (`k2 offload --drain` makes one)"
    return table(
        ("table", "snapshot", "committed", "operation", "rows added", "rows", "files", "bytes"),
        [
            (
                one["table"], one["snapshot_id"], _time(one["committed_ns"]), one["operation"],
                f"{one['rows_added']:,}", f"{one['rows_total']:,}", one["files_total"], f"{one['bytes_total']:,}",
            )
            for one in snapshots
        ],
        right=(4, 5, 6, 7),
    )  # fmt: skip


def maintenance_text(done: Sequence[Maintenance]) -> str:
    """Return what maintenance did, a line a table."""
    return table(
        ("table", "files before", "files after", "snapshots expired", "orphans removed", "bytes removed"),
        [
            (
                one.table, one.files_before, one.files_after, one.snapshots_expired, one.orphans_removed,
                f"{one.bytes_removed:,}",
            )
            for one in done
        ],
        right=(1, 2, 3, 4, 5),
    )  # fmt: skip


def _time(time_ns: int | None) -> str:
    return "" if time_ns is None else format_ns(time_ns)
