"""The node: one process that ingests, offloads, maintains and answers; or only some of these."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from typing import Any

import msgspec
import pyarrow as pa

from k2 import meters
from k2.cold import open_cold
from k2.cold.base import Cold
from k2.errors import StoreDown
from k2.hot import BORROW, FOLLOW, OWN, TAIL_ROUTE, discard_hot, open_hot, open_tail, sync_hot
from k2.hot.base import Hot
from k2.hot.tail import TailSource, encode_snapshot
from k2.log import open_log
from k2.log.base import Log
from k2.model import Positions
from k2.run import doubt
from k2.run.folder import hold, publish, run_folder
from k2.run.heartbeat import Heartbeat
from k2.run.ingest import Ingest
from k2.run.offload import Offloader
from k2.run.readings import TELL_SECONDS, tell
from k2.run.rebuild import rebuild
from k2.run.state import IngestState, MachineRun
from k2.run.upgrade import upgrade
from k2.settings import Settings

logger = logging.getLogger(__name__)

INGEST = "ingest"
OFFLOAD = "offload"
SERVE = "serve"
ROLES = (INGEST, OFFLOAD, SERVE)

_STOP_SECONDS = 120.0
_INGEST_STALE_SECONDS = 60.0  # an insert of the largest flush takes seconds
_LOOK_SECONDS = 0.5


class NodeStatus(msgspec.Struct):
    """`<data>/run/node.json`: where the REST interface of this installation is."""

    url: str
    pid: int
    since_ns: int


class Role:
    """A thread doing one job until told to stop; what makes it fail is kept for the main thread."""

    def __init__(self, name: str, run: Callable[[], None], stop: Callable[[], None], stale_seconds: float) -> None:
        """Store the parts; `run` has `alive` called as its work goes on, at least every `stale_seconds`."""
        self.name = name
        self.error: BaseException | None = None
        self._run = run
        self._stop = stop
        self._stale_seconds = stale_seconds
        self._alive_at = time.monotonic()
        self._thread = threading.Thread(target=self._guarded, name=f"k2-{name}", daemon=True)

    def _guarded(self) -> None:
        try:
            self._run()
        except BaseException as error:  # noqa: BLE001 - kept for the main thread, which ends the process with it
            self.error = error

    def alive(self) -> None:
        """Note that the work has got a step further."""
        self._alive_at = time.monotonic()

    def start(self) -> None:
        """Start the thread."""
        self.alive()
        self._thread.start()

    @property
    def hangs(self) -> bool:
        """Whether it has not got a step further for longer than any step should take."""
        return time.monotonic() - self._alive_at > self._stale_seconds

    @property
    def ended(self) -> bool:
        """Whether it is over, by itself or not."""
        return not self._thread.is_alive()

    def finish(self) -> None:
        """Tell it to stop, wait, and raise what made it fail."""
        self._stop()
        self._thread.join(_STOP_SECONDS)
        if self._thread.is_alive():
            meters.acted("node.role_stop")
            raise StoreDown(f"{self.name} did not end within {_STOP_SECONDS:.0f} s of being asked to")
        if self.error is not None:
            raise self.error


class Node:
    """Takes `roles` of one installation; use as a context manager, then `run_until`.

    With INGEST it owns the embedded hot tier and serves it, and the memory tail, to the other
    processes of this machine. OFFLOAD alone waits for an owner, SERVE alone borrows the folder for
    each question while there is none.
    """

    def __init__(self, settings: Settings, roles: Collection[str]) -> None:
        self.settings = settings
        self._names = tuple(roles)
        self.process = "node" if len(self._names) == len(ROLES) else "-".join(self._names)
        self._roles: list[Role] = []
        self._closing = ExitStack()
        self.url: str | None = None
        self.log: Log | None = None
        self.ingest: Ingest | None = None

    def __enter__(self) -> Node:
        try:
            self._open()
        except BaseException:
            self._closing.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    # -- putting it together -----------------------------------------------------------

    def _open(self) -> None:
        settings = self.settings
        upgrade(settings)
        for name in self._names:
            self._closing.enter_context(_only_one(settings, name))
        log = self.log = open_log(settings)
        self._closing.callback(log.close)
        state = IngestState(settings.data_path / "state.db")
        self._closing.callback(state.close)
        cold = open_cold(settings)
        self._closing.callback(cold.close)
        if INGEST in self._names:
            hot = _own_hot(settings, log, cold, state, self._closing)
        else:
            hot = open_hot(settings, FOLLOW if OFFLOAD in self._names else BORROW)
            self._closing.callback(hot.close)
        tail: TailSource = open_tail(settings)
        if INGEST in self._names:
            role = Role(INGEST, lambda: ingest.run(), lambda: ingest.stop(), _INGEST_STALE_SECONDS)
            ingest = self.ingest = Ingest(settings, log, hot, state, role.alive)
            tail = _LateTail(ingest)
            _serve_tail(hot, tail)
            ingest.recover()
            self._roles.append(role)
        moving = offloader(settings, log, hot, cold, state) if OFFLOAD in self._names else None
        if moving is not None:
            self._roles.append(_offload_role(moving))
        if SERVE in self._names:
            self._serve(hot, cold, tail, state, moving)

    def _serve(self, hot: Hot, cold: Cold, tail: TailSource, state: IngestState, moving: Offloader | None) -> None:
        from k2.api.app import create_app
        from k2.api.server import ApiServer
        from k2.api.services import Services
        from k2.query.engine import Engine
        from k2.run.telemetry import Telemetry

        assert self.log is not None
        # Who owns hot trusts it, or has made it anew before it came here.
        doubted = None if INGEST in self._names else lambda: doubt.of_folder(self.settings.data_path)
        engine = Engine(hot, cold, tail, self.settings, doubted)
        telemetry = Telemetry(self.settings, self.log, hot, cold, state, self.ingest, moving, self.process)
        services = Services(
            engine, self.settings, readiness=telemetry.readiness, status=telemetry.status, registry=telemetry.registry
        )
        server = ApiServer(create_app(services), self.settings.api.host, self.settings.api.port)
        server.start()
        self._closing.callback(server.stop)
        self.url = server.url
        path = run_folder(self.settings) / "node.json"
        publish(path, msgspec.json.encode(NodeStatus(server.url, os.getpid(), time.time_ns())))
        self._closing.callback(path.unlink, missing_ok=True)

    # -- running -----------------------------------------------------------------------

    def run_until(self, stopping: threading.Event, heartbeat: Heartbeat) -> None:
        """Work until `stopping` is set or a role fails, then stop in order: ingest first, then offload.

        Raises what made a role fail.
        """
        for role in self._roles:
            role.start()
        told_at = -math.inf
        while not stopping.wait(_LOOK_SECONDS):
            if time.monotonic() - told_at >= TELL_SECONDS:
                told_at = time.monotonic()
                tell(run_folder(self.settings), self.process)
            if not any(role.hangs for role in self._roles):
                heartbeat.beat()  # the supervisor replaces a process whose work stands still
            if any(role.ended for role in self._roles):
                break
        failure: BaseException | None = None
        for role in self._roles:
            try:
                role.finish()
            except BaseException as error:  # noqa: BLE001 - the other roles must be stopped too; raised below
                logger.error("%s failed: %s", role.name, error)
                failure = failure or error
        if failure is not None:
            raise failure


class _LateTail:
    """The tail of an Ingest, which replaces its `tail` while it recovers."""

    def __init__(self, ingest: Ingest) -> None:
        self._ingest = ingest

    def snapshot(self, table: str) -> tuple[Positions, pa.Table]:
        """See TailSource; tables that are not ingested row by row have no tail."""
        return self._ingest.tail.snapshot(table)


def _own_hot(settings: Settings, log: Log, cold: Cold, state: IngestState, closing: ExitStack) -> Hot:
    """Open hot as its owner, until `closing`; made anew first where it cannot be trusted.

    Raises Corrupt where it can neither be trusted nor made anew.
    """
    reason = doubt.of_machine(state)
    if reason:
        doubt.check_makeable(log, cold, state)
        state.begin_rebuild()
        discard_hot(settings)
    closing.callback(_leave_synced, settings, state)  # after hot was closed
    hot = open_hot(settings, OWN)
    closing.callback(hot.close)
    if not reason and (reason := doubt.of_rows(log, hot, state)):
        doubt.check_makeable(log, cold, state)
    state.note_machine(MachineRun(doubt.boot_id(), is_synced=False))
    if reason:
        logger.warning("hot is made anew from cold and the log: %s", reason)
        written = rebuild(hot, cold, state)
        logger.warning("hot was made anew: %s from cold; the log follows", written)
    return hot


def _leave_synced(settings: Settings, state: IngestState) -> None:
    """Note that hot may be trusted whatever happens to the machine, once its files are synced."""
    try:
        sync_hot(settings)
        if not state.rebuilding:
            state.note_machine(MachineRun(doubt.boot_id(), is_synced=True))
    except (OSError, StoreDown) as error:
        logger.warning("hot was left unsynced, a power cut now would have it made anew: %s", error)


def _only_one(settings: Settings, role: str) -> Any:
    conflict = f"{role} of {settings.data_path} is already done by {{owner}}; stop it or choose another with --data"
    return hold(run_folder(settings) / f"{role}.lock", f"k2 {role}", conflict)


def _serve_tail(hot: Hot, tail: TailSource) -> None:
    server = getattr(hot, "server", None)  # only the embedded engine has an owner that serves others
    if server is not None:
        server.route(TAIL_ROUTE, lambda query, _body: encode_snapshot(tail, query["table"]))


def offloader(settings: Settings, log: Log, hot: Hot, cold: Cold, state: IngestState) -> Offloader:
    """Return an offloader that goes up to what ingest has finished, and checks row counts against its records."""
    return Offloader(
        settings,
        log,
        hot,
        cold,
        progress=state.progress,
        expected=state.expected_rows,
        boundaries=state.boundaries,
        generation=state.generation,
    )


def _offload_role(moving: Offloader) -> Role:
    stopping = threading.Event()

    def run() -> None:
        moving.run_forever(stopping)
        moving.drain()  # an orderly stop leaves nothing behind; ingest has ended before

    # Compacting a large day takes minutes: offload is watched by its lag, not by its heartbeat.
    return Role(OFFLOAD, run, stopping.set, math.inf)


def drain(settings: Settings, role: str) -> Mapping[str, int]:
    """Work off what the log holds with one role, and return what was moved."""
    upgrade(settings)
    with ExitStack() as closing:
        closing.enter_context(_only_one(settings, role))
        log = open_log(settings)
        closing.callback(log.close)
        state = IngestState(settings.data_path / "state.db")
        closing.callback(state.close)
        cold = open_cold(settings)
        closing.callback(cold.close)
        if role == INGEST:
            hot = _own_hot(settings, log, cold, state, closing)
            ingest = Ingest(settings, log, hot, state)
            ingest.recover()
            _serve_tail(hot, _LateTail(ingest))
            ingest.drain()
            return dict(ingest.counters)
        if reason := doubt.of_machine(state):
            raise StoreDown(f"offload from hot: {reason}; `k2 ingest --drain` and `k2 up` make it anew, run one first")
        hot = open_hot(settings, BORROW)
        closing.callback(hot.close)
        return offloader(settings, log, hot, cold, state).drain().rows


def rebuild_hot(settings: Settings) -> dict[str, int]:
    """Empty hot and fill it from cold; ingest then goes on from there. Returns the rows written per table."""
    upgrade(settings, with_hot=False)  # it may be too damaged to be opened
    with ExitStack() as closing:
        for role in (INGEST, OFFLOAD):
            closing.enter_context(_only_one(settings, role))
        state = IngestState(settings.data_path / "state.db")
        closing.callback(state.close)
        cold = open_cold(settings)
        closing.callback(cold.close)
        state.begin_rebuild()
        discard_hot(settings)  # not opened first: it may be too damaged for that
        closing.callback(_leave_synced, settings, state)
        hot = open_hot(settings, OWN)
        closing.callback(hot.close)
        state.note_machine(MachineRun(doubt.boot_id(), is_synced=False))
        return rebuild(hot, cold, state)
