"""The crash points themselves: declared once, placed once, armed by a file, fired once."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from k2 import crash
from k2.errors import Rejected, UnknownName

SOURCE = Path(crash.__file__).parent
LABELS = [point.label for point in crash.POINTS]
PLACE = re.compile(r'crash\.(?:point|watched)\("([^"]+)"')

PASSING = """
import sys
from k2 import crash
for label in sys.argv[1:]:
    crash.point(label)
print("alive")
"""


def passing(file: Path, *labels: str) -> subprocess.CompletedProcess[str]:
    """Run a process that passes these points one after the other."""
    environment = {**os.environ, crash.VARIABLE: str(file)}
    return subprocess.run(
        [sys.executable, "-c", PASSING, *labels], env=environment, capture_output=True, text=True, check=False
    )


def test_every_point_is_placed_once_and_declared() -> None:
    """The labels in the code, but for the declaration, are those declared, each at one place."""
    sources = "".join(path.read_text() for path in SOURCE.rglob("*.py") if path.name != "crash.py")
    passed = set(PLACE.findall(sources))
    counted = Counter(label for label in LABELS for _ in range(sources.count(f'"{label}"')))

    assert passed <= set(LABELS)
    assert counted == Counter(LABELS)
    assert {point.after for point in crash.POINTS} - {""} <= set(crash.BY_LABEL)


def test_armed_point_kills_once(tmp_path: Path) -> None:
    """The process that passes it dies by SIGKILL and takes the file away; the next one lives."""
    file = tmp_path / "crash"
    crash.arm(file, "log.append.after_commit")
    first = passing(file, "log.append.before_commit", "log.append.after_commit")
    second = passing(file, "log.append.before_commit", "log.append.after_commit")

    assert (first.returncode, first.stdout) == (-signal.SIGKILL, "")
    assert (second.returncode, second.stdout) == (0, "alive\n")
    assert len(list(tmp_path.glob("crash.*"))) == 1


def test_nth_passing_is_counted(tmp_path: Path) -> None:
    """label:3 lets two pass."""
    file = tmp_path / "crash"
    crash.arm(file, "log.trim.before", 3)

    assert passing(file, *["log.trim.before"] * 2).returncode == 0
    assert passing(file, *["log.trim.before"] * 3).returncode == -signal.SIGKILL


def test_process_is_armed_while_it_runs(tmp_path: Path) -> None:
    """The file may come later than the process."""
    file = tmp_path / "crash"
    code = "from k2 import crash\nprint('running', flush=True)\nwhile True: crash.point('log.trim.before')"
    environment = {**os.environ, crash.VARIABLE: str(file)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        crash.arm(file, "log.trim.before")

        assert process.wait(30) == -signal.SIGKILL
        assert Path(f"{file}.{process.pid}").exists()


def test_moment_in_a_block_kills(tmp_path: Path) -> None:
    """Inside code that passes no point: as soon as the condition holds."""
    file, begun = tmp_path / "crash", tmp_path / "begun"
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom k2 import crash\nbegun = Path(sys.argv[1])\n"
        "with crash.watched('hot.insert.between_views', lambda: begun.exists):\n"
        "    time.sleep(0.05); begun.touch(); time.sleep(20)\n"
    )
    crash.arm(file, "hot.insert.between_views")
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, str(begun)], env={**os.environ, crash.VARIABLE: str(file)}, check=False
    )

    assert done.returncode == -signal.SIGKILL
    assert begun.exists()
    assert time.monotonic() - started < 15


def test_unknown_label_is_refused(tmp_path: Path) -> None:
    """When it is armed, and at the start of a process whose file was written by hand."""
    with pytest.raises(UnknownName, match=r"did you mean 'log\.append\.before_commit'"):
        crash.arm(tmp_path / "crash", "log.append.before_comit")
    with pytest.raises(Rejected, match="passing 0"):
        crash.arm(tmp_path / "crash", "log.append.before_commit", 0)
    (tmp_path / "crash").write_text("log.append.before_comit\n")
    done = passing(tmp_path / "crash", "log.append.before_commit")

    assert done.returncode == 1
    assert "did you mean 'log.append.before_commit'" in done.stderr


def test_unknown_label_written_while_a_process_runs_is_ignored(tmp_path: Path) -> None:
    """It says so once, goes on, and dies at the next one that is known."""
    file = tmp_path / "crash"
    code = "from k2 import crash\nprint('running', flush=True)\nwhile True: crash.point('log.trim.before')"
    environment = {**os.environ, crash.VARIABLE: str(file)}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        file.write_text("log.trim.bevore")
        told = process.stderr.readline()
        crash.arm(file, "log.trim.before")
        code = process.wait(30)
        later = process.stderr.read()

    assert code == -signal.SIGKILL
    assert b"is ignored: arm crash point 'log.trim.bevore': there is none of that name" in told
    assert later == b""


def test_unarmed_point_costs_nothing() -> None:
    """Less than a microsecond, at places passed once a batch."""
    passings = 100_000
    started = time.process_time()
    for _ in range(passings):
        crash.point("log.append.before_commit")

    assert (time.process_time() - started) / passings < 1e-6
