"""The package as a whole: public names, derived pages, the command line's manners, what no file may hold."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import k2
from k2.schema import TABLES, TIMEFRAMES, arrow_schema

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "k2.cli", *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def test_the_public_names_are_these():
    """Everything else may move freely."""
    assert k2.__all__ == ["K2Error", "connect"]
    assert all(hasattr(k2, name) for name in k2.__all__)


def test_derived_pages_are_up_to_date():
    """Data dictionary, settings, command line and benchmarks in docs/ say what the code and the results say."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "derive.py"), "--check"], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr


def test_every_link_in_the_pages_leads_somewhere():
    """Relative links of README and docs/ point at files that exist."""
    broken = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.name} -> {target}")

    assert not broken


def test_locks_hold_no_address():
    """They install through any mirror."""
    peers = ROOT / "bench" / "peers"
    for lock in [*(ROOT / "locks").iterdir(), *peers.glob("*.lock"), *peers.glob("*/package-lock.json")]:
        assert "://" not in lock.read_text(), lock


@pytest.mark.parametrize("table", TABLES.values(), ids=lambda t: t.name)
def test_tables_are_declared_soundly(table: object):
    """Keys, sort order and time column name stored columns; derived ones name their source."""
    names = table.column_names

    assert set(table.key) <= set(names)
    assert set(table.sort) <= set(names)
    assert table.time_column in names
    assert all(column.derived_from in names for column in table.columns if column.derived_from)
    assert arrow_schema(table).names == list(names)


def test_each_timeframe_is_a_multiple_of_the_one_before():
    """Views are chained from one to the next."""
    lengths = list(TIMEFRAMES.values())

    assert all(longer % shorter == 0 for shorter, longer in itertools.pairwise(lengths))


def test_a_wrong_command_says_so_in_one_line():
    """No traceback, a code that means usage, a hint."""
    done = run("qery")

    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "qery" in done.stderr


def test_errors_are_json_with_json(tmp_path: Path):
    """Programs read errors, too."""
    done = run("status", "--json", "--data", str(tmp_path / "none"))

    assert done.returncode == 78
    assert json.loads(done.stderr)["exit_code"] == 78


def test_config_show_gives_every_setting(tmp_path: Path):
    """Names as they are written in the file, dotted."""
    done = run("config", "show", "--json", "--data", str(tmp_path))

    assert json.loads(done.stdout)["log.sync"] == "full"
