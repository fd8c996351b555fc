"""Runs questions and writes what was measured: one file of this folder is one question.

A file declares `FIGURES` and a function `measure(run)`, and ends with `main(__file__)`. See README.md.
Run as a program, this module runs every file, or those named.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import importlib.util
import itertools
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
RESULTS = FOLDER / "results"
SUBJECT = "k2"

MEDIAN = "median"
HIGHER: Literal["higher"] = "higher"
LOWER: Literal["lower"] = "lower"

_NOT_QUESTIONS = frozenset({"cores", "deployment", "harness", "inputs", "page"})
_DEFAULT_PACKAGES = ("k2-market-data", "chdb-core", "duckdb", "polars", "pyarrow", "pyiceberg", "msgspec")
_ANSWER_SECONDS = 600.0

Samples = float | Sequence[float]
Measured = Mapping[str, Samples]
"""Figure name -> one value (a rate, a size) or many (latencies)."""


@dataclass(frozen=True)
class Bar:
    """What is asked of a figure: of its value, or of how many times better it is than a peer's."""

    value: float
    strict: bool = False
    peer: str | None = None
    text: str = ""


def at_least(value: float) -> Bar:
    """The value is this or more."""
    return Bar(value, text=f">= {number(value)}")


def below(value: float) -> Bar:
    """The value is less than this."""
    return Bar(value, strict=True, text=f"< {number(value)}")


def times(factor: float, peer: str) -> Bar:
    """Better than the peer by this factor or more, in the direction of the figure."""
    return Bar(factor, peer=peer, text=f">= {number(factor)}x {peer}")


def better_than(peer: str) -> Bar:
    """Better than the peer, by whatever."""
    return Bar(1.0, strict=True, peer=peer, text=f"better than {peer}")


def within(factor: float, peer: str) -> Bar:
    """At most this many times as costly as the peer."""
    return Bar(1 / factor, peer=peer, text=f"within {number(factor)}x of {peer}")


@dataclass(frozen=True)
class Figure:
    """One measured quantity. The samples of all rounds make one value: their median, or a percentile.

    `why` is shown beside a missed bar: the cause a profile gave, and what it would take.
    """

    unit: str
    better: Literal["higher", "lower"] = HIGHER
    bars: tuple[Bar, ...] = ()
    statistic: str = MEDIAN  # or p50, p99, p99.9, max
    what: str = ""  # beside the name on the page, where the name does not say it
    why: str = ""


class Process:
    """A contender in a process (and environment) of its own: a JSON object a line in, one out."""

    def __init__(self, command: Sequence[str], name: str, environment: Mapping[str, str]) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, env=dict(environment)
        )

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def ask(self, call: str, **arguments: Any) -> Any:
        """Call a function of the script's; raises RuntimeError with its own words when it failed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"call": call, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            self._errors.seek(0)
            told = self._errors.read().decode(errors="replace")[-2_000:]
            raise RuntimeError(f"{self.name} ended while it was asked to {call}:\n{told}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self.name} failed to {call}: {answer['error']}")
        return answer["result"]

    def close(self) -> None:
        """End it: its input ends, so it does."""
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate(timeout=30)
        self._errors.close()


@dataclass
class Run:
    """What `measure` is given: a folder, the rounds, the contenders, and where the samples go.

    `quick` asks for the smallest sizes that still exercise everything: a few seconds in all.
    """

    name: str
    quick: bool
    folder: Path
    versions: dict[str, str] = field(default_factory=dict)
    inputs: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    skipped: set[str] = field(default_factory=set)
    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    _closing: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def add(self, measured: Measured, of: str = SUBJECT) -> None:
        """Keep samples of a contender, by figure name."""
        for figure, values in measured.items():
            kept = self.samples.setdefault(figure, {}).setdefault(of, [])
            kept.extend([float(values)] if isinstance(values, int | float) else map(float, values))

    def interleave(self, contenders: Mapping[str, Callable[[], Measured]], *, rounds: int = 5, warm: int = 1) -> None:
        """Measure all contenders in each round, each round beginning with another one; warm rounds are dropped."""
        order = list(contenders)
        rounds, warm = (1, 0) if self.quick else (rounds, warm)
        for number_ in range(warm + rounds):
            turn = number_ % len(order)
            for name in order[turn:] + order[:turn]:
                measured = contenders[name]()
                if number_ >= warm:
                    self.add(measured, name)

    def process(self, script: str, *, environment: str = SUBJECT, core: int | None = None) -> Process | None:
        """Start a contender's script from `peers/`; None (and a remark in the result) where it is not installed.

        `environment` is K2's own, or a peer's of `peers/install.py`. With `core` it is bound to that one.
        """
        from peers import install

        command = install.interpreter(environment)
        if command is None:
            self.missing[environment] = "not installed (make bench-peers)"
            return None
        bound: list[str] = []
        if core is not None and shutil.which("taskset"):
            bound = ["taskset", "-c", str(_cores()[core % len(_cores())])]
        elif core is not None:
            self.notes.append("taskset is not here: contenders were not bound to one core")
        process = Process([*bound, *command, str(FOLDER / "peers" / script)], script, os.environ)
        self._closing.callback(process.close)
        self.versions.update(install.versions(environment))
        return process

    def version(self, *packages: str) -> None:
        """Note the versions of packages of K2's own environment beside the usual ones."""
        for package in packages:
            with contextlib.suppress(PackageNotFoundError):
                self.versions[package] = version(package)

    def used(self, path: Path, *, source: Literal["recorded", "made"], name: str = "") -> Path:
        """Note an input file with its checksum."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.inputs.append(
            {"name": name or path.name, "source": source, "bytes": path.stat().st_size, "sha256": digest}
        )
        return path

    def note(self, text: str) -> None:
        """Say something the reader of the result must know."""
        self.notes.append(text)

    def skip(self, figure: str, why: str) -> None:
        """Leave a declared figure out, and say why."""
        self.skipped.add(figure)
        self.note(f"{figure} was not measured: {why}")

    def detail(self, **values: Any) -> None:
        """Keep anything else worth having (counts, breakdowns) in the result file."""
        self.details.update(values)


# -- one question ----------------------------------------------------------------------------


def main(file: str) -> None:
    """Run the question of this file and write `results/<name>.json`; `--quick` writes nothing."""
    arguments = argparse.ArgumentParser(description=question(Path(file)))
    arguments.add_argument("--quick", action="store_true", help="the smallest sizes: does it work at all?")
    arguments.add_argument("--out", type=Path, help="folder for the result (default: bench/results; none with --quick)")
    arguments.add_argument("--scratch", type=Path, help="folder for scratch data (default: .bench/scratch)")
    given = arguments.parse_args()
    path = Path(file).resolve()
    module = sys.modules["__main__"]
    result = execute(path, module, quick=given.quick, scratch=given.scratch)
    print(report(result, module.FIGURES))
    out = given.out or (None if given.quick else RESULTS)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{path.stem}.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")


def execute(path: Path, module: ModuleType, *, quick: bool, scratch: Path | None = None) -> dict[str, Any]:
    """Measure, and return the result as it is written."""
    below_ = scratch or ROOT / ".bench" / "scratch"
    below_.mkdir(parents=True, exist_ok=True)
    load, begin, commit = os.getloadavg()[0], time.monotonic(), _commit()
    with tempfile.TemporaryDirectory(prefix=f"{path.stem}-", dir=below_) as folder:
        run = Run(path.stem, quick, Path(folder))
        run.version(*_DEFAULT_PACKAGES)
        with run._closing:
            module.measure(run)
    _check(run, module.FIGURES)
    return {
        "question": question(path),
        "name": path.stem,
        "command": f"make bench ARGS={path.stem}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - begin, 1),
        "quick": quick,
        "commit": commit,
        "machine": {**machine(), "load_before": round(load, 2)},
        "versions": dict(sorted(run.versions.items())),
        "inputs": run.inputs,
        "notes": list(dict.fromkeys(run.notes)),
        "missing": run.missing,
        "figures": {
            name: {of: summary(run.samples[name][of]) for of in sorted(run.samples[name], key=_subject_first)}
            for name in module.FIGURES
            if name in run.samples
        },
        "ratios": {
            name: _ratios(module.FIGURES[name], run.samples[name]) for name in module.FIGURES if name in run.samples
        },
        "details": run.details,
    }


def _subject_first(name: str) -> tuple[bool, str]:
    return name != SUBJECT, name


def _check(run: Run, figures: Mapping[str, Figure]) -> None:
    unknown = set(run.samples) - set(figures)
    unmeasured = [name for name in figures if SUBJECT not in run.samples.get(name, {}) and name not in run.skipped]
    if unknown or unmeasured:
        raise SystemExit(
            f"{run.name}: measured but not declared: {sorted(unknown)}; declared but not measured: {unmeasured}"
        )


def question(path: Path) -> str:
    """Return the first line of a file's docstring."""
    told = ast.get_docstring(ast.parse(path.read_text())) or path.stem
    return told.splitlines()[0]


def summary(values: Sequence[float]) -> dict[str, float | int]:
    """Return count, least, median, most; for a hundred samples or more the percentiles too."""
    found: dict[str, float | int] = {
        "samples": len(values),
        "min": _short(min(values)),
        "median": _short(statistics.median(values)),
        "max": _short(max(values)),
    }
    if len(values) >= 20:
        found |= {name: _short(percentile(values, share)) for name, share in _PERCENTILES.items()}
    return found


_PERCENTILES = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999}


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def value_of(figure: Figure, measured: Mapping[str, float | int]) -> float:
    """Return the value of a figure that its bars are held against."""
    if figure.statistic in measured:
        return float(measured[figure.statistic])
    return float(measured["max" if figure.better == LOWER else "median"])  # too few samples for a percentile


def _ratios(figure: Figure, samples: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """How many times better the subject is than each peer: of the values, and of each round."""
    ours = samples.get(SUBJECT, [])
    found = {}
    for peer, theirs in samples.items():
        if peer == SUBJECT or not ours:
            continue
        ratio = _better_by(figure, value_of(figure, summary(ours)), value_of(figure, summary(theirs)))
        rounds = [_better_by(figure, a, b) for a, b in zip(ours, theirs, strict=False)]
        found[peer] = {"ratio": _short(ratio), "min": _short(min(rounds)), "max": _short(max(rounds))}
    return found


def _better_by(figure: Figure, ours: float, theirs: float) -> float:
    over, under = (ours, theirs) if figure.better == HIGHER else (theirs, ours)
    return over / under if under else math.inf


@dataclass(frozen=True)
class Verdict:
    """A bar held against a result; `met` is None where the peer was not there."""

    bar: Bar
    met: bool | None


def judge(name: str, figure: Figure, result: Mapping[str, Any]) -> list[Verdict]:
    """Hold a figure's bars against a written result."""
    return [Verdict(bar, _met(name, figure, bar, result)) for bar in figure.bars]


def _met(name: str, figure: Figure, bar: Bar, result: Mapping[str, Any]) -> bool | None:
    if bar.peer is not None:
        ratio = result["ratios"].get(name, {}).get(bar.peer)
        if ratio is None:
            return None
        return bool(ratio["ratio"] > bar.value if bar.strict else ratio["ratio"] >= bar.value)
    measured = result["figures"].get(name, {}).get(SUBJECT)
    if measured is None:
        return None
    value = value_of(figure, measured)
    return value < bar.value if bar.strict else value >= bar.value


def report(result: Mapping[str, Any], figures: Mapping[str, Figure]) -> str:
    """Return a result for the terminal."""
    lines = [result["question"]]
    for name, figure in figures.items():
        measured = result["figures"].get(name, {})
        told = [f"{of} {number(value_of(figure, found))}" for of, found in measured.items()]
        told += [f"{found['ratio']}x {peer}" for peer, found in result["ratios"].get(name, {}).items()]
        told += [f"[{v.bar.text}: {_WORDS[v.met]}]" for v in judge(name, figure, result)]
        lines.append(f"  {name} ({figure.unit}, {figure.statistic}): " + ", ".join(told))
    lines += [f"  {note}" for note in result["notes"]]
    lines += [f"  {peer}: {why}" for peer, why in result["missing"].items()]
    return "\n".join(lines)


_WORDS = {True: "met", False: "MISSED", None: "not measured"}


def number(value: float) -> str:
    """Return a number with three digits that count, thousands set off."""
    if value == 0 or abs(value) >= 1_000:
        return f"{round(value, -max(0, math.floor(math.log10(abs(value))) - 2)):,.0f}" if value else "0"
    return f"{value:.3g}"


def _short(value: float) -> float:
    return float(f"{value:.6g}") if math.isfinite(value) else 0.0


# -- the surroundings ------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Return what a figure depends on: processor, cores, memory, kernel, Python."""
    return {
        "cpu": _cpu_model(),
        "cores": len(_cores()),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _commit() -> str:
    """Return the commit, with `+` where the tree holds changes to anything but results."""
    told = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if told.returncode:
        return "unknown"
    changed = subprocess.run(
        ["git", "status", "--porcelain", "--", "src", "bench/*.py", "bench/peers"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return told.stdout.strip() + ("+" if changed.stdout.strip() else "")


# -- all questions ---------------------------------------------------------------------------


def questions() -> list[str]:
    """Return the names of all questions."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in _NOT_QUESTIONS)


def load(name: str) -> ModuleType:
    """Import a question's file, for what it declares."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def results() -> Iterator[dict[str, Any]]:
    """Yield the kept results, by name."""
    for path in sorted(RESULTS.glob("*.json")):
        yield json.loads(path.read_text())


def run_all() -> int:
    """Run the named questions, or all; go on after one that fails, and tell at the end."""
    arguments = argparse.ArgumentParser(description="Run the benchmarks, each in a process of its own.")
    arguments.add_argument("names", nargs="*", metavar="NAME", help=", ".join(questions()))
    arguments.add_argument("--quick", action="store_true", help="the smallest sizes: do they work at all?")
    given = arguments.parse_args()
    unknown = set(given.names) - set(questions())
    if unknown:
        arguments.error(f"no question {', '.join(sorted(unknown))}; there are {', '.join(questions())}")
    failed = []
    for name in given.names or questions():
        command = [sys.executable, str(FOLDER / f"{name}.py"), *itertools.repeat("--quick", given.quick)]
        begin = time.monotonic()
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            failed.append(name)
        print(f"  ({time.monotonic() - begin:.0f} s)\n", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run_all())
