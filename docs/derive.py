"""Derive the pages that are derived: those named in `pages`. `make docs` writes them.

With --check nothing is written; the exit code is 1 when a page is out of date.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from k2 import crash, limits, schema, settings
from k2.cli.main import root
from k2.run.metrics import METRICS

DOCS = Path(__file__).resolve().parent
NOTE = "Derived by `make docs`; do not edit.\n"


def settings_page() -> str:
    """Return docs/settings.md."""
    lines = [
        "# Settings",
        "",
        NOTE,
        "File `k2.toml` (in the data folder or the working folder, or named by `K2_CONFIG`), then",
        "environment, then arguments; the later wins. An unknown name is refused. `k2 config show` prints what holds.",
        "",
        "| setting | default | environment | meaning |",
        "|---|---|---|---|",
    ]
    example = settings.Settings(exchanges={"NAME": settings.ExchangeSettings()})
    for name, value, doc in settings.describe(example):
        shown = ", ".join(value) if isinstance(value, tuple) else value
        variable = "K2_" + name.replace(".", "_").replace("-", "_").upper()
        lines.append(f"| `{name}` | `{shown}` | `{variable}` | {doc} |")
    return "\n".join(lines) + "\n"


def cli_page() -> str:
    """Return docs/cli.md."""
    lines = [
        "# Command line",
        "",
        NOTE,
        "Every command takes `--data DIR` (or `K2_DATA`), `--config FILE` and `--json`.",
        "Exit codes: 0 done, 1 a check failed, 2 and 64 wrong usage, 65 bad data, 70 a fault of K2, 74 input/output,",
        "75 try again later, 78 wrong settings, 130 interrupted.",
        "",
    ]
    for name, command in _commands(root, "k2"):
        context = click.Context(command, info_name=name, max_content_width=100, terminal_width=100)
        lines += [f"## {name}", "", "```text", command.get_help(context), "```", ""]
    return "\n".join(lines)


def benchmarks_page() -> str:
    """Return docs/benchmarks.md."""
    sys.path.insert(0, str(DOCS.parent / "bench"))
    try:
        return str(importlib.import_module("page").markdown())
    finally:
        sys.path.pop(0)


def crash_points_page() -> str:
    """Return docs/crash-points.md."""
    lines = [
        "# Crash points",
        "",
        NOTE,
        "Moments at which a death could lose or double something if K2 were wrong. The tests kill the real process",
        "at each of them while simulated exchanges trade, let the supervisor start it again, and compare what hot,",
        "cold and their union then hold with the exchanges' own account (`tests/crash/test_crash_points.py`;",
        "`make crash-test` does it for all of them but those of upgrades, which `tests/upgrade` kills at, and",
        "200 times at random).",
        "",
        "To see one: `echo log.append.after_commit > /tmp/crash`, then `K2CRASH=/tmp/crash k2 demo`. The process that",
        "passes the point takes the file away and dies by SIGKILL; `label:3` means the third passing.",
        "",
        "| label | process | what has happened | what has not | what recovery does |",
        "|---|---|---|---|---|",
    ]
    for point in crash.POINTS:
        process = crash.PROCESSES[point.role]
        lines.append(f"| `{point.label}` | {process} | {point.done} | {point.missing} | {point.recovery} |")
    return "\n".join(lines) + "\n"


def limits_page() -> str:
    """Return docs/limits.md."""
    lines = [
        "# Limits",
        "",
        NOTE,
        "Everything that can grow, or take long, ends somewhere: here, with what happens then and where it is seen.",
        "Values are those of the constants named, or the defaults of the settings named (they are what to change).",
        "",
        f"*fill* is the metric `{limits.FILL}{{limit=...}}`, *acted* `{limits.ACTED}` and *waited*",
        f"`{limits.WAITED}`, each per process. Pages, batches and intervals act all the time: they show in the",
        "metric of the work they cut. `-`: a command that ends with an error, or the simulator, which is no part of an",
        "installation.",
        "",
    ]
    default = settings.Settings()
    for group, declared in limits.groups().items():
        lines += [f"## {group}", "", "| limit | value | at the limit | shown by |", "|---|---|---|---|"]
        for limit in declared:
            where = f"`{limit.setting or limit.of.replace(':', '.')}`"
            shown = ", ".join(_metric(metric, limit.name) for metric in limit.shown) or "-"
            value = f"{_number(limit.value(default), limit.unit)} ({where})"
            lines.append(f"| `{limit.name}` | {value} | {limit.then} | {shown} |")
        lines.append("")
    return "\n".join(lines)


def metrics_page() -> str:
    """Return docs/metrics.md."""
    lines = [
        "# Metrics",
        "",
        NOTE,
        "`GET /metrics` of the node, in the format of Prometheus, tells of all processes: captures, the",
        "supervisor and roles on their own leave what they count in files, which the node reads at each scrape.",
        "",
        f"One rule watches every limit that has a fill: `{limits.FILL} / {limits.MAX} > 0.8`. A counter of",
        f"`{limits.ACTED}` appears when its limit acts for the first time: alert on it being above what it was,",
        "or newly there. What each means is in [limits](limits.md). Beside these there are the `process_*` and",
        "`python_*` of the Prometheus client, for the node's own process.",
        "",
        "| metric | kind | labels | meaning |",
        "|---|---|---|---|",
    ]
    for metric in METRICS.values():
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        lines.append(f"| `{metric.name}` | {metric.kind} | {labels} | {metric.text} |")
    return "\n".join(lines) + "\n"


def _metric(metric: str, limit: str) -> str:
    general = {limits.FILL: "*fill*", limits.ACTED: "*acted*", limits.WAITED: "*waited*"}
    name, _, label = metric.partition("{")
    if name not in general:
        return f"`{metric}`"
    return general[name] if f'"{limit}"' in label else f"{general[name]} of `{label.split(chr(34))[1]}`"


def _number(value: float, unit: str) -> str:
    if unit == "bytes" and value >= 1 << 20 and value % (1 << 20) == 0:
        return f"{int(value) >> 20:,} MiB"
    return f"{value:,.15g} {unit}"


def _commands(group: click.Group, prefix: str) -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in sorted(group.list_commands(context)):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from _commands(command, f"{prefix} {name}")
        elif not command.hidden:
            yield f"{prefix} {name}", command


def pages() -> dict[str, str]:
    """Return file name -> text of every derived page."""
    return {
        "data-dictionary.md": schema.dictionary_markdown(),
        "settings.md": settings_page(),
        "cli.md": cli_page(),
        "benchmarks.md": benchmarks_page(),
        "crash-points.md": crash_points_page(),
        "limits.md": limits_page(),
        "metrics.md": metrics_page(),
    }


def main() -> int:
    """Write the pages, or compare them with --check."""
    stale = [name for name, text in pages().items() if not (DOCS / name).is_file() or (DOCS / name).read_text() != text]
    if "--check" not in sys.argv:
        for name in stale:
            (DOCS / name).write_text(pages()[name])
        return 0
    for name in stale:
        sys.stderr.write(f"docs/{name} is out of date: run `make docs`\n")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
