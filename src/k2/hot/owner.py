"""Who opens the embedded engine: the owner of the data folder, or a client of the owner."""

from __future__ import annotations

import os
import shutil
import stat
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from k2.errors import InUse, StoreDown
from k2.hot.base import Hot
from k2.hot.clickhouse import ClickHouseHot
from k2.hot.engine import OPEN_SECONDS, EmbeddedEngine, Engine, HttpEngine
from k2.hot.server import Endpoint, HotServer
from k2.settings import Settings

TRY_SECONDS = 0.2  # between two tries at a folder that is changing hands
OWN_SECONDS = 20.0  # a new owner waits so long for those who have the folder open for one question


class ServedHot(ClickHouseHot):
    """The hot tier in its owner's process; `server` lets other processes use it, and takes routes."""

    def __init__(self, engine: EmbeddedEngine, server: HotServer, *, memory_bytes: int) -> None:
        super().__init__(engine, memory_bytes=memory_bytes)
        self.server = server

    def close(self) -> None:
        """Stop serving, then release the engine and its folder."""
        self.server.stop()
        super().close()


class BorrowedHot:
    """The hot tier for a process that does not own it: each call asks the owner, or opens the folder just for itself.

    So an idle notebook or `k2 serve` never keeps `k2 ingest` from the folder, and an owner that ends and is
    started again is found again. Every method of `hot.base.Hot`; opening costs about 0.1 s where no owner runs.
    """

    def __init__(self, settings: Settings, wait_seconds: float = OPEN_SECONDS) -> None:
        self._settings = settings
        self._wait_seconds = wait_seconds
        self._lock = threading.Lock()
        self._remote = follow_chdb(settings)

    def __getattr__(self, name: str) -> Any:
        """Return a method of the hot tier that borrows it for one call."""
        if name not in _METHODS:
            raise AttributeError(name)

        def borrowed(*arguments: Any, **named: Any) -> Any:
            deadline = time.monotonic() + self._wait_seconds
            while True:
                if _owner_lives(self._settings):
                    return getattr(self._remote, name)(*arguments, **named)
                try:
                    with self._lock, closing(_open(_embedded(self._settings, 0.0), self._settings)) as hot:
                        return getattr(hot, name)(*arguments, **named)
                except InUse:  # it changed hands meanwhile
                    if time.monotonic() >= deadline:
                        raise
                    time.sleep(TRY_SECONDS)

        return borrowed

    def close(self) -> None:
        """Release the connections to the owner."""
        self._remote.close()


_METHODS = frozenset(name for name in vars(Hot) if not name.startswith("_")) - {"close"}


def own_chdb(settings: Settings, wait_seconds: float = OWN_SECONDS) -> ServedHot:
    """Open the folder as its owner, and serve it."""
    engine = _embedded(settings, wait_seconds)
    _open(engine, settings)
    server = HotServer(engine, settings.data_path)
    try:
        server.start()
    except OSError:
        engine.close()
        raise
    return ServedHot(engine, server, memory_bytes=settings.hot.memory_bytes)


def follow_chdb(settings: Settings) -> ClickHouseHot:
    """Return the owner's hot tier, whoever owns it at the moment; StoreDown at each call while nobody does."""
    return _hot(HttpEngine(lambda: _owner_of(settings)), settings)


def discard_chdb(settings: Settings) -> None:
    """Remove the folder of the engine, which may be damaged; see `k2.hot.discard_hot`."""
    engine = _embedded(settings, 0.0)
    deadline = time.monotonic() + OWN_SECONDS
    while engine.is_held():
        if time.monotonic() >= deadline:
            raise InUse(f"hot: {engine.folder} is to be made anew, but a process has it open; stop it first")
        time.sleep(TRY_SECONDS)
    try:
        if engine.folder.exists():
            shutil.rmtree(engine.folder)
    except OSError as error:
        raise StoreDown(f"hot: remove {engine.folder}, to make it anew: {error}; mend its permissions") from error


def sync_tree(folder: Path) -> None:
    """Sync every file and folder below one, and itself. Raises OSError."""
    for parent, _, files in os.walk(folder):
        for path in (*(Path(parent) / name for name in files), Path(parent)):
            if not stat.S_ISREG(path.lstat().st_mode) and path != Path(parent):
                continue  # a link to a folder that is walked by its own name, or a FIFO
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _owner_lives(settings: Settings) -> bool:
    endpoint = Endpoint.load(settings.data_path)
    return endpoint is not None and endpoint.alive()


def _owner_of(settings: Settings) -> tuple[str, int, str]:
    endpoint = Endpoint.load(settings.data_path)
    if endpoint is None:
        raise StoreDown(f"hot: no process owns {settings.data_path}/hot now; is `k2 ingest` or `k2 up` running?")
    return endpoint.host, endpoint.port, endpoint.token


def _embedded(settings: Settings, open_seconds: float) -> EmbeddedEngine:
    return EmbeddedEngine(settings.data_path / "hot", memory_bytes=settings.hot.memory_bytes, open_seconds=open_seconds)


def _open(engine: EmbeddedEngine, settings: Settings) -> ClickHouseHot:
    engine.open()
    hot = _hot(engine, settings)
    try:
        hot.migrate(str(engine.folder))
    except BaseException:
        engine.close()
        raise
    return hot


def _hot(engine: Engine, settings: Settings) -> ClickHouseHot:
    return ClickHouseHot(engine, memory_bytes=settings.hot.memory_bytes)
