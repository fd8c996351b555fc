"""docs/guarantees.md: every sentence that promises something names tests that are there."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "guarantees.md"
PROMISES = (
    "Delivery, hop by hop",
    "Keys that make it exact",
    "What can be lost, and when",
    "How it is seen",
    "Order and time",
)
LINK = re.compile(r"\[(test_\w+)\]\(\.\./(tests/[\w/]+\.py)\)")


def sections(text: str) -> dict[str, str]:
    """Return the text below each heading of the second level."""
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def promises(text: str) -> list[tuple[str, str]]:
    """Return (sentence, proof) of every row of the tables of promises."""
    found = []
    for title in PROMISES:
        for line in sections(text)[title].splitlines():
            if not line or line.startswith(("#", "|---")) or line.endswith("| shown by |"):
                continue
            cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            assert len(cells) == 2, f"a sentence outside of the table, which nothing shows: {line}"
            found.append((cells[0], cells[1]))
    return found


def faults(text: str) -> list[str]:
    """Return what is wrong with a page: a sentence without a proof, two in one row, a proof that is not there."""
    wrong = []
    for sentence, proof in promises(text):
        if not LINK.search(proof):
            wrong.append(f"nothing shows: {sentence}")
        if not sentence.endswith(".") or re.search(r"[.!?] +[A-Z]", sentence):
            wrong.append(f"not one sentence: {sentence}")
        if LINK.sub("", proof).strip(", "):
            wrong.append(f"no link to a test: {proof}")
        wrong += [f"{file}::{name} does not exist" for name, file in LINK.findall(proof) if name not in names_in(file)]
    return wrong


@cache
def names_in(file: str) -> frozenset[str]:
    """Return the names of the tests of a file."""
    path = ROOT / file
    if not path.is_file() or not path.name.startswith("test_"):
        return frozenset()
    body = ast.parse(path.read_text("utf-8")).body
    return frozenset(
        node.name
        for node in body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name[:5] == "test_"
    )


def test_every_guarantee_names_tests_that_exist():
    """One sentence a row, at least one test, and each of them is in its file."""
    text = PAGE.read_text("utf-8")

    assert len(promises(text)) > 40
    assert faults(text) == []


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ("| Nothing is lost. | the tests |", "nothing shows"),
        ("| Nothing is lost. | [test_none](../tests/log/test_embedded.py) |", "does not exist"),
        ("| Nothing is lost. | [test_none](../tests/log/test_none.py) |", "does not exist"),
        (
            "| Nothing is lost. Never. | [test_a](../tests/log/test_embedded.py) |",
            "not one sentence",
        ),
    ],
)
def test_a_promise_that_nothing_shows_is_found(row: str, fault: str):
    """The check can fail, in each of its ways."""
    heading = f"## {PROMISES[0]}\n"
    text = PAGE.read_text("utf-8").replace(heading, f"{heading}\n{row}\n", 1)

    assert any(fault in each for each in faults(text))


@pytest.mark.slow
def test_pytest_collects_every_test_the_guarantees_name():
    """What is linked is run: pytest itself finds each of them."""
    named = {f"{file}::{name}" for _, proof in promises(PAGE.read_text("utf-8")) for name, file in LINK.findall(proof)}
    files = sorted({each.partition("::")[0] for each in named})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:randomly"]
    addopts = ["-o", "addopts=--import-mode=importlib"]  # the marks of the project, without its other options
    done = subprocess.run(
        [*command, *addopts, *files], cwd=ROOT, capture_output=True, text=True, timeout=110, check=False
    )
    collected = {line.partition("[")[0].strip() for line in done.stdout.splitlines() if "::" in line}

    assert named - collected == set()
