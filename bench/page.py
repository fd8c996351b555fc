"""The page docs/benchmarks.md, from the kept results and what the questions declare."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import harness
from harness import SUBJECT, Figure, Verdict, number

_HEAD = """# Benchmarks

Derived by `make docs` from `bench/results/`; do not edit. `make bench-peers` installs the peers, `make bench` measures
everything anew, `make bench ARGS=NAME` one question. K2 and its peers are measured in the same run, in turns; a value
is the median of all rounds, or the percentile that is named. A ratio says how many times better K2 is than the peer,
with the lowest and highest of any round. Where a bar is missed, the cause stands below the table.

Absolute figures are those of the machine named beside them; ratios travel better.
"""


def markdown() -> str:
    """Return the page."""
    parts = [_HEAD]
    for result in harness.results():
        figures: Mapping[str, Figure] = harness.load(result["name"]).FIGURES
        parts += [_question(result, figures)]
    return "\n".join(parts)


def _question(result: Mapping[str, Any], figures: Mapping[str, Figure]) -> str:
    lines = [f"## {result['question']}", "", "| figure | K2 | peers | ratio | bar | |", "|---|---:|---|---|---|---|"]
    lines += [_row(name, figure, result) for name, figure in figures.items() if name in result["figures"]]
    lines.append("")
    for why, names in _causes(result, figures).items():
        lines += [f"**{', '.join(names)}**: bar missed. {why}", ""]
    lines += [
        f"- {note}" for note in (*result["notes"], *(f"{peer}: {why}" for peer, why in result["missing"].items()))
    ]
    lines += [_surroundings(result), ""]
    return "\n".join(lines)


def _causes(result: Mapping[str, Any], figures: Mapping[str, Figure]) -> dict[str, list[str]]:
    """Return why bars were missed, and by which figures."""
    causes: dict[str, list[str]] = {}
    for name, figure in figures.items():
        if figure.why and any(verdict.met is False for verdict in harness.judge(name, figure, result)):
            causes.setdefault(figure.why, []).append(_plain(name))
    return causes


def _row(name: str, figure: Figure, result: Mapping[str, Any]) -> str:
    measured = result["figures"][name]
    title = _plain(name) + (f": {figure.what}" if figure.what else "") + f" ({figure.unit}"
    title += ")" if figure.statistic == harness.MEDIAN else f", {figure.statistic})"
    ours = _value(figure, measured[SUBJECT]) if SUBJECT in measured else ""
    peers = ", ".join(f"{of} {_value(figure, found)}" for of, found in measured.items() if of != SUBJECT)
    ratios = ", ".join(
        f"{number(found['ratio'])}x {peer}" + _range(found) for peer, found in result["ratios"].get(name, {}).items()
    )
    verdicts = harness.judge(name, figure, result)
    bars = ", ".join(verdict.bar.text for verdict in verdicts)
    return f"| {title} | {ours} | {peers} | {ratios} | {bars} | {', '.join(map(_word, verdicts))} |"


def _value(figure: Figure, measured: Mapping[str, float]) -> str:
    value = number(harness.value_of(figure, measured))
    if "p99" not in measured or figure.statistic == harness.MEDIAN:
        return f"{value} ({number(measured['min'])} to {number(measured['max'])})" if measured["samples"] > 1 else value
    return f"{value} (p50 {number(measured['p50'])}, p99.9 {number(measured['p99.9'])}, max {number(measured['max'])})"


def _range(found: Mapping[str, float]) -> str:
    if found["min"] == found["max"]:
        return ""
    return f" ({number(found['min'])} to {number(found['max'])})"


def _word(verdict: Verdict) -> str:
    return {True: "met", False: "**missed**", None: "not measured"}[verdict.met]


def _plain(name: str) -> str:
    return name.replace("_", " ")


def _surroundings(result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    versions = ", ".join(f"{package} {told}" for package, told in result["versions"].items())
    sources = sorted({one["source"] for one in result["inputs"]})
    return (
        f"- {result['date'][:10]}, commit {result['commit']}, {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB, load {machine['load_before']} before, {machine['kernel']}, "
        f"Python {machine['python']}; {versions}"
        + (f"; {' and '.join(sources)} input, checksums in" if sources else "; all samples in")
        + f" [the result](../{_path(result)})"
    )


def _path(result: Mapping[str, Any]) -> str:
    return str((Path("bench") / "results" / f"{result['name']}.json").as_posix())
