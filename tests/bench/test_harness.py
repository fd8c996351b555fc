"""What the harness makes of samples: values, ratios, verdicts, the page."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(scope="module")
def harness() -> ModuleType:
    """The module, found as the questions find it."""
    sys.path.insert(0, str(BENCH))
    try:
        return importlib.import_module("harness")
    finally:
        sys.path.remove(str(BENCH))


def measured(harness: ModuleType, tmp_path: Path, figures: dict[str, Any], contenders: Any) -> dict[str, Any]:
    path = tmp_path / "one.py"
    path.write_text('"""How fast?"""\n')

    def measure(run: Any) -> None:
        run.interleave(contenders, rounds=4, warm=1)

    module = SimpleNamespace(FIGURES=figures, measure=measure)
    return harness.execute(path, module, quick=False, scratch=tmp_path / "scratch")


def test_rounds_are_interleaved_and_warm_ones_dropped(harness: ModuleType, tmp_path: Path):
    """Every round measures all contenders, each round beginning with another one."""
    order: list[str] = []

    def contender(name: str, value: float) -> Any:
        def one() -> dict[str, float]:
            order.append(name)
            return {"rate": value + len(order)}

        return one

    figures = {"rate": harness.Figure("rows/s")}
    result = measured(harness, tmp_path, figures, {"k2": contender("a", 100), "peer": contender("b", 50)})

    assert order == ["a", "b", "b", "a", "a", "b", "b", "a", "a", "b"]
    assert result["figures"]["rate"]["k2"]["samples"] == 4
    assert result["figures"]["rate"]["k2"]["min"] == 104


@pytest.mark.parametrize(
    ("better", "ours", "bar", "met"),
    [
        ("higher", 500.0, ("times", 5, "peer"), True),
        ("higher", 499.0, ("times", 5, "peer"), False),
        ("lower", 20.0, ("times", 5, "peer"), True),
        ("lower", 21.0, ("times", 5, "peer"), False),
        ("lower", 149.0, ("within", 1.5, "peer"), True),
        ("lower", 151.0, ("within", 1.5, "peer"), False),
        ("lower", 100.0, ("better_than", "peer"), False),
        ("lower", 99.0, ("better_than", "peer"), True),
        ("higher", 100.0, ("at_least", 100), True),
        ("higher", 99.0, ("at_least", 100), False),
        ("lower", 100.0, ("below", 100), False),
        ("lower", 99.0, ("below", 100), True),
        ("lower", 99.0, ("times", 5, "absent"), None),
    ],
)
def test_a_bar_is_met_or_missed(
    harness: ModuleType, tmp_path: Path, better: str, ours: float, bar: tuple[Any, ...], met: bool | None
):
    """In the direction of the figure; the peer measures 100; one that is not there is not judged."""
    kind, *arguments = bar
    figure = harness.Figure("x", better, (getattr(harness, kind)(*arguments),))
    result = measured(harness, tmp_path, {"x": figure}, {"k2": lambda: {"x": ours}, "peer": lambda: {"x": 100.0}})

    [verdict] = harness.judge("x", figure, result)
    assert verdict.met is met


def test_percentiles_are_held_against_the_bar(harness: ModuleType, tmp_path: Path):
    """The 99th percentile of all rounds' samples, not the median."""
    figure = harness.Figure("ms", "lower", (harness.below(50),), "p99")
    samples = [1.0] * 98 + [60.0, 70.0]
    result = measured(harness, tmp_path, {"x": figure}, {"k2": lambda: {"x": samples}})

    found = result["figures"]["x"]["k2"]
    assert (found["samples"], found["p50"], found["p99"], found["max"]) == (400, 1.0, 60.0, 70.0)
    assert harness.judge("x", figure, result)[0].met is False


def test_what_is_declared_must_be_measured(harness: ModuleType, tmp_path: Path):
    """And what is measured must be declared."""
    with pytest.raises(SystemExit, match=r"declared but not measured: \['y'\]"):
        measured(harness, tmp_path, {"x": harness.Figure("s"), "y": harness.Figure("s")}, {"k2": lambda: {"x": 1.0}})
    with pytest.raises(SystemExit, match=r"not declared: \['z'\]"):
        measured(harness, tmp_path, {}, {"k2": lambda: {"z": 1.0}})


def test_a_contender_that_dies_tells_its_last_words(harness: ModuleType, tmp_path: Path):
    """Its standard error is in the message, so a failed benchmark explains itself."""
    script = "import sys; sys.stdin.readline(); sys.exit('no such table')"
    process = harness.Process([sys.executable, "-c", script], "peer", {})

    with pytest.raises(RuntimeError, match="no such table"):
        process.ask("load")
    process.close()


def test_every_kept_result_is_of_a_question_and_whole(harness: ModuleType):
    """Machine, versions, commit, date and command are there; none is of a quick run."""
    for result in harness.results():
        assert result["name"] in harness.questions()
        assert result["question"] == harness.question(BENCH / f"{result['name']}.py")
        assert not result["quick"]
        assert all(result[part] for part in ("machine", "versions", "commit", "date", "command", "figures"))
