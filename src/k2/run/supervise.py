"""Keeps the processes of an installation running: one capture per exchange, and the node.

A child that dies, whose main loop stops turning (it was stopped, or hangs), or that takes more memory than it may, is
replaced; no other child is touched. Children never outlive the supervisor (`heartbeat.py` is their side of it). They
are stopped in stages: first those that bring data in, then the node that works it off.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from k2 import meters
from k2.errors import Misconfigured, Rejected
from k2.run.echo import Echo, log_through_echo
from k2.run.folder import data_folder_holder, hold_data_folder, publish, read_status
from k2.run.heartbeat import VARIABLE, Heartbeat, attach
from k2.run.readings import TELL_SECONDS, resident, tell

__all__ = [
    "ChildSpec",
    "ChildStatus",
    "Heartbeat",
    "Supervisor",
    "SupervisorStatus",
    "attach",
    "data_folder_holder",
    "hold_data_folder",
    "read_supervisor",
]

logger = logging.getLogger("k2.supervise")

RESTART_FIRST_SECONDS = 0.2
RESTART_MAX_SECONDS = 10.0
HEALTHY_SECONDS = 60.0  # a run as long as this makes the next restart quick again
LOG_BYTES = 4 << 20  # of a child's output; one older file of this size is kept
OUTPUT_SECONDS = 1.0  # the output of a process that has ended is waited for so long
LINE_BYTES = 64 << 10  # a longer line of a child's output is broken
# What a process ends with when starting it again cannot help.
HOPELESS = (Misconfigured.exit_code, Rejected.exit_code)
# glibc gives each thread an arena of its own (up to eight a core) and keeps what was freed in it. Two are enough, and
# hold less: 110 instead of 118 MB after 300 commits to cold. What the environment says goes before.
_ALLOCATOR = {"MALLOC_ARENA_MAX": "2"}
INTERRUPTED = 130  # the shell's convention for Ctrl-C


@dataclass(frozen=True)
class ChildSpec:
    """One process to keep running. Durations in seconds.

    `stage`: at a stop, lower stages end before higher ones are told. `stop_seconds`: from SIGTERM to
    SIGKILL. `stall_seconds`: longest time without a heartbeat; `start_seconds`: the same for the first one.
    `restart_max_seconds`: ceiling of the wait before it is started again, which doubles from 0.2.
    `memory_bytes`: resident memory above which, for `memory_seconds` without a break, it is killed; 0: no limit.
    """

    name: str
    argv: tuple[str, ...]
    stage: int = 0
    stop_seconds: float = 20.0
    stall_seconds: float = 8.0
    start_seconds: float = 60.0
    restart_max_seconds: float = RESTART_MAX_SECONDS
    memory_bytes: int = 0
    memory_seconds: float = 10.0


class ChildStatus(msgspec.Struct):
    """One child as others may see it; `since_ns` is when it entered its state."""

    name: str
    state: Literal["starting", "running", "waiting", "stopped"]
    pid: int
    restarts: int
    since_ns: int
    last_end: str = ""


class SupervisorStatus(msgspec.Struct):
    """What `<data>/run/supervisor.json` holds."""

    pid: int
    since_ns: int
    children: list[ChildStatus]


def read_supervisor(run_folder: Path) -> SupervisorStatus | None:
    """Return what the last supervisor wrote; whether it still runs is told by `data_folder_holder`."""
    return read_status(run_folder / "supervisor.json", SupervisorStatus)


class Supervisor:
    """Runs children until it is told to stop.

    The output of each goes to `<run_folder>/<name>.log` (bounded) and, with its name in front, to `echo`,
    which drops what nobody reads: whoever watches can never hold up supervision, nor a child.
    """

    def __init__(self, children: Sequence[ChildSpec], run_folder: Path, *, echo: Echo | None = None) -> None:
        """Store the parts; nothing starts before `run`."""
        self._children = [_Child(spec, run_folder / f"{spec.name}.log", echo) for spec in children]
        self._path = run_folder / "supervisor.json"
        self._since_ns = time.time_ns()
        self._stopping = asyncio.Event()
        self._news = asyncio.Event()  # something has changed that others may see
        self._exit_code = 0
        self._failure: Misconfigured | None = None

    async def run(self) -> int:
        """Keep the children running until SIGTERM or SIGINT; returns the exit code.

        0 after an orderly stop, 130 when it was cut short by a second signal, or the code of a child
        that cannot be started at all because of a setting (the rest is stopped then, too).
        Must run in the main thread (signals; and on Linux the children are bound to the thread's life).

        Raises Misconfigured when a child's program cannot be started at all.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._interrupt)
        life_read, life_write = os.pipe()
        watcher = asyncio.create_task(self._watch())
        teller = asyncio.create_task(self._tell_for_ever())
        publisher = asyncio.create_task(self._publish_news())
        try:
            async with asyncio.TaskGroup() as group:
                for child in self._children:
                    group.create_task(self._keep(child, life_read))
                group.create_task(self._stop_in_order())
        finally:
            self._kill_all()
            watcher.cancel()
            teller.cancel()
            os.close(life_write)
            os.close(life_read)
            publisher.cancel()
            await asyncio.gather(publisher, teller, watcher, return_exceptions=True)
            self._write_status(self._status())
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
        if self._failure is not None:
            raise self._failure
        return self._exit_code

    def stop(self) -> None:
        """Begin an orderly stop."""
        self._stopping.set()

    def _interrupt(self) -> None:
        if self._stopping.is_set():
            logger.warning("interrupted again: killing what still runs")
            self._exit_code = INTERRUPTED
            self._kill_all()
        else:
            logger.info("stopping in order (interrupt again to kill)")
            self.stop()

    def _kill_all(self) -> None:
        for child in self._children:
            child.kill()

    async def _keep(self, child: _Child, life: int) -> None:
        """Start a child again whenever it ends."""
        while not self._stopping.is_set():
            try:
                await child.start(life)
            except Misconfigured as error:
                self._failure = self._failure or error
                self.stop()
                break
            self._news.set()
            if self._stopping.is_set():
                await asyncio.gather(child.wait(), child.stop())  # the stop has passed it by
                break
            ended = await child.wait()
            if self._stopping.is_set():
                break
            if ended in HOPELESS and child.restarts == 0 and not child.has_beaten:
                logger.error("%s cannot run (exit code %d, see its message); stopping", child.spec.name, ended)
                self._exit_code = ended
                self.stop()
                break
            delay = child.restart_delay()
            logger.warning("%s ended (%s); starting it again in %.1f s", child.spec.name, child.last_end, delay)
            self._news.set()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay)
        child.state = "stopped"
        self._news.set()

    async def _watch(self) -> None:
        """Kill children whose main loop does not turn; `_keep` then starts them again."""
        interval = min([0.5, *(child.spec.stall_seconds / 8 for child in self._children)])
        previous = time.monotonic()
        while True:
            await asyncio.sleep(interval)
            now = time.monotonic()
            held_up = now - previous > 2 * interval + 1.0  # this process itself was stopped: judge nobody by it
            previous = now
            for child in self._children:
                if child.read_beats(now, forgive=held_up):
                    self._news.set()
                if not self._stopping.is_set() and (stalled := child.stalled_seconds(now)):
                    meters.acted("supervise.stall" if child.has_beaten else "supervise.start")
                    logger.error("%s: no sign of life for %.1f s; killing it", child.spec.name, stalled)
                    child.kill()
                elif not self._stopping.is_set() and (taken := child.memory_taken(now)):
                    meters.acted("supervise.memory")
                    name, allowed, seconds = child.spec.name, child.spec.memory_bytes, child.spec.memory_seconds
                    logger.error(
                        "%s: %d MiB of memory for more than %g s, allowed are %d MiB (%s.memory_bytes); killing it",
                        *(name, taken >> 20, seconds, allowed >> 20, name.partition("-")[0]),
                    )
                    child.kill()

    async def _tell_for_ever(self) -> None:
        while True:
            await asyncio.to_thread(tell, self._path.parent, "supervisor")
            await asyncio.sleep(TELL_SECONDS)

    async def _stop_in_order(self) -> None:
        await self._stopping.wait()
        for stage in sorted({child.spec.stage for child in self._children}):
            await asyncio.gather(*(child.stop() for child in self._children if child.spec.stage == stage))

    async def _publish_news(self) -> None:
        """Write the status whenever something has changed, in a thread: a disk that hangs holds up nobody."""
        while True:
            await self._news.wait()
            self._news.clear()
            await asyncio.to_thread(self._write_status, self._status())

    def _status(self) -> bytes:
        children = [child.status() for child in self._children]
        return msgspec.json.encode(SupervisorStatus(os.getpid(), self._since_ns, children))

    def _write_status(self, status: bytes) -> None:
        with contextlib.suppress(OSError):  # a full disk must not end supervision
            publish(self._path, status)


class _Child:
    """One process: its present run and its history."""

    def __init__(self, spec: ChildSpec, log: Path, echo: Echo | None) -> None:
        self.spec = spec
        self.restarts = 0
        self.has_beaten = False  # in the present run
        self.last_end = ""
        self._state: Literal["starting", "running", "waiting", "stopped"] = "waiting"
        self._since_ns = time.time_ns()
        self._process: asyncio.subprocess.Process | None = None
        self._beats = -1
        self._beat_at = 0.0
        self._started_at = 0.0
        self._modest_at = 0.0  # when it last took no more memory than it may
        self._failures = 0
        self._output = _Output(spec.name, log, echo)

    @property
    def state(self) -> Literal["starting", "running", "waiting", "stopped"]:
        """What it is doing."""
        return self._state

    @state.setter
    def state(self, value: Literal["starting", "running", "waiting", "stopped"]) -> None:
        if value != self._state:
            self._state, self._since_ns = value, time.time_ns()

    @property
    def alive(self) -> bool:
        """Whether there is a process that has not been seen to end."""
        return self._process is not None and self._process.returncode is None

    def status(self) -> ChildStatus:
        """Return what others may see."""
        pid = self._process.pid if self._process is not None and self.alive else 0
        return ChildStatus(self.spec.name, self.state, pid, self.restarts, self._since_ns, self.last_end)

    async def start(self, life: int) -> None:
        """Start the process, in a group of its own, so that Ctrl-C in a terminal reaches only the supervisor."""
        self._beats, beat_write = os.pipe()
        os.set_blocking(self._beats, False)
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self.spec.argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                process_group=0,
                pass_fds=(beat_write, life),
                env={**_ALLOCATOR, **os.environ, VARIABLE: f"{beat_write}:{life}:{os.getpid()}"},
            )
        except OSError as error:
            os.close(self._beats)
            self._beats = -1
            raise Misconfigured(f"cannot start {self.spec.name}: {self.spec.argv[0]}: {error.strerror}") from None
        finally:
            os.close(beat_write)
        self.has_beaten = False
        self._started_at = self._beat_at = self._modest_at = time.monotonic()
        self.state = "starting"

    async def wait(self) -> int:
        """Wait for the end of the process, passing its output on; returns its exit code (negative: signal)."""
        assert self._process is not None
        assert self._process.stdout is not None
        output = asyncio.create_task(self._output.pump(self._process.stdout))
        code = await self._process.wait()
        # What it has said is there already; a descendant that keeps the pipe open is not waited for.
        _, late = await asyncio.wait({output}, timeout=OUTPUT_SECONDS)
        if late:
            meters.acted("supervise.last_output")
        output.cancel()
        self.read_beats(time.monotonic(), forgive=False)
        os.close(self._beats)
        self._beats = -1
        self.last_end = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        self.state = "waiting"
        return code

    def restart_delay(self) -> float:
        """Count a restart and return how long to wait before it, seconds."""
        if time.monotonic() - self._started_at >= HEALTHY_SECONDS:
            self._failures = 0
        delay = min(self.spec.restart_max_seconds, RESTART_FIRST_SECONDS * 2 ** min(self._failures, 16))
        self._failures += 1
        self.restarts += 1
        return float(delay)

    def read_beats(self, now: float, *, forgive: bool) -> bool:
        """Take in the heartbeats that have come; returns whether the first one of a run was among them."""
        if self._beats < 0:
            return False
        try:
            beaten = bool(os.read(self._beats, 65_536))
        except BlockingIOError:
            beaten = False
        if beaten or forgive:
            self._beat_at = now
        first = beaten and not self.has_beaten
        if first:
            self.has_beaten, self.state = True, "running"
        return first

    def stalled_seconds(self, now: float) -> float:
        """Return for how long there was no sign of life, if that is too long; else 0."""
        patience = self.spec.stall_seconds if self.has_beaten else self.spec.start_seconds
        silent = now - self._beat_at
        return silent if self.alive and silent >= patience else 0.0

    def memory_taken(self, now: float) -> int:
        """Return the memory the process takes, bytes, if it has been too much for too long; else 0."""
        if not self.spec.memory_bytes or self._process is None or not self.alive:
            return 0
        taken = resident(self._process.pid)
        if taken <= self.spec.memory_bytes:
            self._modest_at = now
        return taken if now - self._modest_at >= self.spec.memory_seconds else 0

    async def stop(self) -> None:
        """Ask the process to end, and kill it when it does not in time."""
        if self._process is None or not self.alive:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), self.spec.stop_seconds)
        except TimeoutError:
            meters.acted("supervise.stop")
            logger.error("%s did not end within %.1f s; killing it", self.spec.name, self.spec.stop_seconds)
            self.kill()
            await self._process.wait()

    def kill(self) -> None:
        """Kill the process and whatever it has started."""
        if self._process is not None and self.alive:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)


class _Output:
    """Passes the output of a child on, line by line: to its log file, and to the supervisor's own output."""

    def __init__(self, name: str, path: Path, echo: Echo | None) -> None:
        self._prefix = f"{name} | ".encode()
        self._path = path
        self._echo = echo

    async def pump(self, stream: asyncio.StreamReader) -> None:
        """Pass on everything until the stream ends."""
        rest = b""
        while chunk := await stream.read(LINE_BYTES):
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) >= LINE_BYTES:
                meters.acted("supervise.line")
                lines, rest = [*lines, rest], b""
            await self._write(lines)
        await self._write([rest] if rest else [])

    async def _write(self, lines: list[bytes]) -> None:
        if not lines:
            return
        if self._echo is not None:
            self._echo.put([self._prefix + line for line in lines])
        # Nobody to tell when there is no room for messages; the child goes on. In a thread: a disk that hangs
        # holds up this child's output, and nothing else.
        with contextlib.suppress(OSError):
            await asyncio.to_thread(self._append, b"".join(line + b"\n" for line in lines))

    def _append(self, text: bytes) -> None:
        with contextlib.suppress(FileNotFoundError):
            if self._path.stat().st_size + len(text) > LOG_BYTES:
                meters.acted("supervise.output_file")
                self._path.replace(self._path.with_name(f"{self._path.name}.1"))
        with self._path.open("ab") as file:
            file.write(text)


def supervise(children: Sequence[ChildSpec], run_folder: Path, *, quiet: bool = False) -> int:
    """Run children until Ctrl-C or SIGTERM, and return the exit code; see `Supervisor.run`.

    `quiet` keeps their output out of ours (it is in `<run_folder>/<name>.log`).
    """

    async def main(echo: Echo) -> int:
        return await Supervisor(children, run_folder, echo=None if quiet else echo).run()

    with log_through_echo() as echo:
        return asyncio.run(main(echo))
