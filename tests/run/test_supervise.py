"""Supervision with real processes, killed, stopped and hung for real."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from k2 import crash, meters
from k2.errors import InUse, Misconfigured
from k2.run.echo import Echo
from k2.run.folder import data_folder_holder, hold, hold_data_folder, holder, publish, run_folder
from k2.run.supervise import ChildSpec, ChildStatus, Supervisor, read_supervisor
from k2.run.up import children
from k2.settings import CaptureSettings, NodeSettings, Settings

# A child whose main loop beats. What it does besides: note its start, wait for SIGTERM, note its end.
CHILD = """
import os, signal, sys, time
from k2.run.supervise import attach
name, folder, hang_after, on_term = sys.argv[1], sys.argv[2], float(sys.argv[3]), sys.argv[4]
heartbeat = attach()
def note(what):
    with open(os.path.join(folder, "notes"), "a") as file:
        file.write(f"{what} {name} {os.getpid()}\\n")
stopping = []
signal.signal(signal.SIGTERM, lambda *_: stopping.append(1))
note("start")
print("hello from", name, flush=True)
begun = time.monotonic()
while not (stopping and on_term == "end"):
    if time.monotonic() - begun < hang_after:
        heartbeat.beat()
    time.sleep(0.01)
note("end")
"""


def child(name: str, folder: Path, *, hang_after: float = 1e9, on_term: str = "end", **spec: float) -> ChildSpec:
    argv = (sys.executable, "-c", CHILD, name, str(folder), str(hang_after), on_term)
    return ChildSpec(name, argv, **{"stall_seconds": 3.0, "start_seconds": 30.0, **spec})  # type: ignore[arg-type]


def notes(folder: Path) -> list[list[str]]:
    path = folder / "notes"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def children_of(folder: Path) -> dict[str, ChildStatus]:
    status = read_supervisor(folder)
    return {each.name: each for each in status.children} if status else {}


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended but was not collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


async def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 (conditions of other processes)
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def supervised(folder: Path, *children: ChildSpec) -> AsyncIterator[asyncio.Task[int]]:
    supervisor = Supervisor(children, folder)
    task = asyncio.create_task(supervisor.run())
    try:
        yield task
    finally:
        supervisor.stop()
        await asyncio.wait({task})


async def all_running(folder: Path, *names: str) -> dict[str, ChildStatus]:
    await until(lambda: {c.name for c in children_of(folder).values() if c.state == "running"} == set(names))
    return children_of(folder)


async def test_killed_child_is_replaced_and_no_other_is_touched(tmp_path: Path) -> None:
    """kill -9 of one: it is started again with a new pid, counted; the other keeps its pid."""
    async with supervised(tmp_path, child("a", tmp_path), child("b", tmp_path)):
        before = await all_running(tmp_path, "a", "b")
        os.kill(before["a"].pid, signal.SIGKILL)
        await until(lambda: children_of(tmp_path)["a"].restarts == 1)
        after = await all_running(tmp_path, "a", "b")

    assert after["a"].pid != before["a"].pid
    assert after["a"].last_end == "killed by SIGKILL"
    assert (after["b"].pid, after["b"].restarts) == (before["b"].pid, 0)


GREEDY = """
import os, sys, time
from k2.run.supervise import attach
heartbeat, folder, first = attach(), sys.argv[2], not os.path.exists(os.path.join(sys.argv[2], "greedy"))
open(os.path.join(folder, "greedy"), "w").close()
held = b""
for turn in range(10**9):
    heartbeat.beat()
    held = bytearray(120 << 20) if first and turn % 40 < int(sys.argv[3]) else b""  # every page of it is touched
    for at in range(0, len(held), 4096):
        held[at] = 1
    time.sleep(0.01)
"""


def greedy(folder: Path, turns: int) -> ChildSpec:
    """Return a child that takes 120 MiB, in so many of 40 turns, in its first run; more than 80 MiB is too much."""
    argv = (sys.executable, "-c", GREEDY, "greedy", str(folder), str(turns))
    return ChildSpec("greedy", argv, stall_seconds=8.0, start_seconds=30.0, memory_bytes=80 << 20, memory_seconds=1.0)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory of another process is read from /proc")
async def test_child_that_takes_too_much_memory_for_too_long_is_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is killed as if it had died, counted and told; its successor, and the child beside it, go on."""
    change = meters.read().get("supervise.memory", meters.Reading()).acted
    async with supervised(tmp_path, greedy(tmp_path, 40), child("b", tmp_path)):
        before = await all_running(tmp_path, "greedy", "b")
        await until(lambda: children_of(tmp_path)["greedy"].restarts == 1)
        after = await all_running(tmp_path, "greedy", "b")
        await asyncio.sleep(2.5)  # as long as the first one was allowed to
        later = children_of(tmp_path)

    assert after["greedy"].last_end == "killed by SIGKILL"
    assert later["greedy"].restarts == 1
    assert (later["b"].pid, later["b"].restarts) == (before["b"].pid, 0)
    assert meters.read()["supervise.memory"].acted == change + 1
    assert "MiB of memory for more than 1 s, allowed are 80 MiB (greedy.memory_bytes); killing it" in caplog.text


def test_memory_of_each_process_is_limited_by_the_settings() -> None:
    """What `k2 up` starts may take what its own setting says."""
    chosen = Settings(capture=CaptureSettings(memory_bytes=1 << 29), node=NodeSettings(memory_bytes=7 << 30))
    allowed = {spec.name: spec.memory_bytes for spec in children(chosen, ["kraken", "coinbase"], None)}

    assert allowed == {"capture-kraken": 1 << 29, "capture-coinbase": 1 << 29, "node": 7 << 30}


async def test_stopped_child_is_killed_and_replaced(tmp_path: Path) -> None:
    """SIGSTOP: no heartbeat for stall_seconds, so the process is killed and another one started."""
    async with supervised(tmp_path, child("a", tmp_path, stall_seconds=1.5), child("b", tmp_path)):
        before = await all_running(tmp_path, "a", "b")
        os.kill(before["a"].pid, signal.SIGSTOP)
        await until(lambda: children_of(tmp_path)["a"].restarts == 1)
        after = await all_running(tmp_path, "a", "b")

    assert not alive(before["a"].pid)
    assert after["b"].pid == before["b"].pid


async def test_hung_main_loop_is_noticed(tmp_path: Path) -> None:
    """A process that lives but whose loop no longer beats is replaced like a stopped one."""
    async with supervised(tmp_path, child("a", tmp_path, hang_after=0.2, stall_seconds=1.5)):
        await until(lambda: "a" in children_of(tmp_path) and children_of(tmp_path)["a"].restarts == 1)


async def test_child_that_never_beats_is_given_its_start_time_only(tmp_path: Path) -> None:
    """Before the first heartbeat start_seconds count."""
    async with supervised(tmp_path, child("a", tmp_path, hang_after=0.0, start_seconds=1.0)):
        await until(lambda: "a" in children_of(tmp_path) and children_of(tmp_path)["a"].restarts == 1)


async def test_stop_is_in_stages(tmp_path: Path) -> None:
    """Both captures have ended before the node is told; everything ends with exit code 0."""
    specs = [child("node", tmp_path, stage=1), child("one", tmp_path), child("two", tmp_path)]
    async with supervised(tmp_path, *specs) as task:
        await all_running(tmp_path, "node", "one", "two")

    ends = [name for what, name, _ in notes(tmp_path) if what == "end"]
    assert set(ends[:2]) == {"one", "two"}
    assert ends[2:] == ["node"]
    assert task.result() == 0
    assert {c.state for c in children_of(tmp_path).values()} == {"stopped"}


async def test_child_that_ignores_the_stop_is_killed(tmp_path: Path) -> None:
    """After stop_seconds SIGKILL follows SIGTERM."""
    async with supervised(tmp_path, child("a", tmp_path, on_term="ignore", stop_seconds=0.3)) as task:
        pid = (await all_running(tmp_path, "a"))["a"].pid

    assert not alive(pid)
    assert task.result() == 0


async def test_second_interrupt_kills_at_once(tmp_path: Path) -> None:
    """A second signal does not wait for anybody."""
    task = asyncio.create_task(Supervisor([child("a", tmp_path, on_term="ignore", stop_seconds=600)], tmp_path).run())
    pid = (await all_running(tmp_path, "a"))["a"].pid
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
    code = await asyncio.wait_for(task, 30)

    assert code == 130
    assert not alive(pid)


async def test_child_that_can_never_run_ends_everything(tmp_path: Path) -> None:
    """A wrong setting (exit code 78) before the first heartbeat stops the rest in order and is the exit code."""
    wrong = ChildSpec("wrong", (sys.executable, "-c", "raise SystemExit(78)"))
    code = await asyncio.wait_for(Supervisor([child("a", tmp_path), wrong], tmp_path).run(), 60)

    assert code == 78
    assert not any(alive(int(pid)) for _, _, pid in notes(tmp_path))


WRONG_CAPTURE = """
import sys
from k2.errors import K2Error
from k2.run.capture import run_capture
from k2.run.up import children
from k2.settings import CaptureSettings, NodeSettings, Settings
try:
    run_capture(Settings(data=sys.argv[1]), sys.argv[2])
except K2Error as error:
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize(("data", "exchange", "code"), [("data", "krakn", 64), ("file", "kraken", 78)])
async def test_capture_that_can_never_run_ends_everything(tmp_path: Path, data: str, exchange: str, code: int) -> None:
    """A capture is not started again and again with a wrong name or an unusable folder."""
    (tmp_path / "file").touch()
    wrong = ChildSpec("wrong", (sys.executable, "-c", WRONG_CAPTURE, str(tmp_path / data), exchange))

    assert await asyncio.wait_for(Supervisor([wrong], tmp_path).run(), 60) == code


TAKEN_AT_FIRST = """
import os, sys
from k2.errors import InUse
if not os.path.exists(sys.argv[1]):
    open(sys.argv[1], "w").close()
    sys.exit(InUse.exit_code)
from k2.run.supervise import attach
heartbeat = attach()
while True:
    heartbeat.beat()
"""


async def test_child_whose_place_is_taken_is_tried_again(tmp_path: Path) -> None:
    """A folder or port held by another process may become free: no reason to stop, before the first heartbeat too."""
    argv = (sys.executable, "-c", TAKEN_AT_FIRST, str(tmp_path / "been here"))
    async with supervised(tmp_path, ChildSpec("a", argv, start_seconds=30.0, stop_seconds=0.3)) as task:
        after = await all_running(tmp_path, "a")

    assert (after["a"].restarts, after["a"].last_end) == (1, "exit code 75")
    assert task.result() == 0


async def test_missing_program_is_told(tmp_path: Path) -> None:
    """A program that does not exist is a clear error, and the others are stopped."""
    missing = ChildSpec("ghost", (str(tmp_path / "nothing"),))
    with pytest.raises(Misconfigured, match="cannot start ghost"):
        await asyncio.wait_for(Supervisor([child("a", tmp_path), missing], tmp_path).run(), 60)

    assert not any(alive(int(pid)) for _, _, pid in notes(tmp_path))


async def test_output_is_kept_and_echoed(tmp_path: Path) -> None:
    """Each line goes to the child's log file, and with its name in front to the supervisor's output."""
    with (tmp_path / "echo").open("wb") as echo:
        shown = Echo(echo)
        supervisor = Supervisor([child("a", tmp_path)], tmp_path, echo=shown)
        task = asyncio.create_task(supervisor.run())
        await until(lambda: (tmp_path / "echo").read_bytes())
        supervisor.stop()
        await task
        shown.close()

    assert (tmp_path / "echo").read_text() == "a | hello from a\n"
    assert (tmp_path / "a.log").read_text() == "hello from a\n"


async def test_output_is_bounded(tmp_path: Path) -> None:
    """A chatty child's log is rotated once: at most two files of 4 MiB, lines without end included."""
    chatty = "import sys\nfor _ in range(400): sys.stdout.write('x' * 50_000 + '\\n' * (_ % 2))\nraise SystemExit(78)"
    await Supervisor([ChildSpec("a", (sys.executable, "-c", chatty))], tmp_path).run()

    sizes = [path.stat().st_size for path in tmp_path.glob("a.log*")]
    assert len(sizes) == 2
    assert max(sizes) <= 4 << 20


SUPERVISOR = """
import logging, sys
from pathlib import Path
import msgspec
from k2.run.supervise import ChildSpec, hold_data_folder, supervise
from k2.run.up import children
from k2.settings import CaptureSettings, NodeSettings, Settings
logging.basicConfig()
children = msgspec.json.decode(sys.argv[2], type=list[ChildSpec])
with hold_data_folder(Settings(data=sys.argv[1])):
    sys.exit(supervise(children, Path(sys.argv[1]) / "run"))
"""


@contextlib.contextmanager
def supervisor_process(
    data: Path, *children: ChildSpec, stderr: int = subprocess.DEVNULL
) -> Iterator[subprocess.Popen[bytes]]:
    (data / "run").mkdir()
    specs = msgspec.json.encode(children).decode()
    with subprocess.Popen([sys.executable, "-c", SUPERVISOR, str(data), specs], stderr=stderr) as process:
        try:
            yield process
        finally:
            process.kill()


async def test_children_die_with_their_supervisor(tmp_path: Path) -> None:
    """kill -9 of the supervisor: its children are gone, a stopped one too, and the folder is free again."""
    run = tmp_path / "run"
    with supervisor_process(tmp_path, child("a", tmp_path), child("b", tmp_path)) as process:
        pids = [each.pid for each in (await all_running(run, "a", "b")).values()]
        held_by = data_folder_holder(Settings(data=str(tmp_path)))
        os.kill(pids[1], signal.SIGSTOP)
        process.kill()
        await until(lambda: not any(alive(pid) for pid in pids))

    assert held_by == (process.pid, "k2 up")
    assert data_folder_holder(Settings(data=str(tmp_path))) is None


CHATTY = """
import time
from k2.run.supervise import attach
heartbeat = attach()
while True:
    heartbeat.beat()
    for _ in range(100):
        print("x" * 1_000, flush=True)
    time.sleep(0.01)
"""


async def test_output_nobody_reads_holds_up_nobody(tmp_path: Path) -> None:
    """With stderr full (Ctrl-S, a pager): children go on talking, a killed one is replaced, the stop is in order."""
    run, log = tmp_path / "run", tmp_path / "run" / "chatty.log"
    unread, full = os.pipe()
    chatty = ChildSpec("chatty", (sys.executable, "-c", CHATTY), start_seconds=30.0)
    with supervisor_process(tmp_path, chatty, child("a", tmp_path), stderr=full) as process:
        os.close(full)
        before = await all_running(run, "chatty", "a")
        await until(lambda: log.exists() and log.stat().st_size > 3 << 20)  # far more than pipe and queue hold
        os.kill(before["a"].pid, signal.SIGKILL)
        await until(lambda: children_of(run)["a"].restarts == 1)
        after = await all_running(run, "chatty", "a")
        process.send_signal(signal.SIGTERM)
        code = await asyncio.to_thread(process.wait, 60)
    os.close(unread)

    assert code == 0
    assert (after["chatty"].pid, after["chatty"].restarts) == (before["chatty"].pid, 0)


def test_dropped_lines_are_counted_where_they_are_missing() -> None:
    """A reader who comes back reads the oldest lines, how many were dropped, and what was said after."""
    read_end, write_end = os.pipe()
    with os.fdopen(write_end, "wb") as stream, os.fdopen(read_end, "rb") as reader:
        echo = Echo(stream)
        for number in range(5_000):
            echo.put([b"%d %s" % (number, b"x" * 1_000)])
        stream.close()
        kept: list[int] = []
        dropped = 0
        for line in reader:
            words = line.split()
            if b"dropped" in words:
                dropped += int(words[0])
            elif words == [b"later"]:
                break
            else:
                kept.append(int(words[0]))
            if len(kept) + dropped == 5_000:
                echo.put([b"later"])
        echo.close()

    assert dropped > 2_000
    assert kept == sorted(set(kept))
    assert kept[:50] == list(range(50))


async def test_child_dies_by_the_pipe_alone(tmp_path: Path) -> None:
    """Where the kernel does not kill with the parent, the end of the life line does."""
    life_read, life_write = os.pipe()
    beat_read, beat_write = os.pipe()
    environment = {**os.environ, "K2SUPERVISED": f"{beat_write}:{life_read}:{os.getpid()}"}
    with subprocess.Popen(
        child("a", tmp_path).argv, pass_fds=(life_read, beat_write), env=environment, stdout=subprocess.DEVNULL
    ) as process:
        for descriptor in (life_read, beat_write):
            os.close(descriptor)
        beaten = await asyncio.to_thread(os.read, beat_read, 1)
        os.close(life_write)
        code = await asyncio.to_thread(process.wait, 30)
    os.close(beat_read)

    assert beaten == b"."
    assert code == -signal.SIGKILL


async def test_terminated_supervisor_stops_its_children_in_order(tmp_path: Path) -> None:
    """SIGTERM to the supervisor ends everything with exit code 0."""
    with supervisor_process(tmp_path, child("a", tmp_path)) as process:
        await all_running(tmp_path / "run", "a")
        process.send_signal(signal.SIGTERM)
        code = await asyncio.to_thread(process.wait, 30)

    assert code == 0
    assert notes(tmp_path)[-1][0] == "end"


def test_second_holder_of_a_data_folder_is_refused(tmp_path: Path) -> None:
    """The message names the folder, the process that has it, and what to do; afterwards it is free."""
    settings = Settings(data=str(tmp_path))
    with (
        hold_data_folder(settings),
        pytest.raises(InUse, match=rf"{tmp_path} is already in use by `k2 up` \(pid {os.getpid()}\).*--data"),
        hold_data_folder(settings),
    ):
        pass

    with hold_data_folder(settings):
        assert data_folder_holder(settings) == (os.getpid(), "k2 up")


def test_looking_at_a_holder_disturbs_nobody(tmp_path: Path) -> None:
    """Looking makes no file, and a free lock stays free."""
    path = tmp_path / "lock"
    nobody = holder(path)
    with hold(path, "x", "{owner}", wait_seconds=0):
        somebody = holder(path)

    assert (nobody, somebody, holder(path)) == (None, (os.getpid(), "x"), None)


def test_unusable_data_folder_is_told(tmp_path: Path) -> None:
    """A data folder that is a file is a clear error."""
    (tmp_path / "file").touch()

    with pytest.raises(Misconfigured, match=r"cannot be used.*--data"):
        run_folder(Settings(data=str(tmp_path / "file")))


def test_restart_waits_grow_to_a_ceiling(tmp_path: Path) -> None:
    """0.2 s doubling to 10 s."""
    from k2.run.supervise import _Child

    fresh = _Child(child("a", tmp_path), tmp_path / "a.log", None)
    fresh._started_at = time.monotonic()
    delays = [fresh.restart_delay() for _ in range(8)]

    assert delays == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0]
    assert fresh.restarts == 8


def test_status_drafts_of_the_dead_are_written_over(tmp_path: Path) -> None:
    """However many processes die with a status half written, no file more is left."""
    code = "import sys; from pathlib import Path; from k2.run.folder import publish; publish(Path(sys.argv[1]), b'{}')"
    file, status = tmp_path / "crash", tmp_path / "run" / "status.json"
    status.parent.mkdir()
    for _ in range(2):
        crash.arm(file, "run.publish.drafted")
        environment = {**os.environ, crash.VARIABLE: str(file)}
        done = subprocess.run([sys.executable, "-c", code, str(status)], env=environment, check=False)
        assert done.returncode == -signal.SIGKILL
    assert not status.exists()
    publish(status, b"{}")

    assert [path.name for path in status.parent.iterdir()] == ["status.json"]
