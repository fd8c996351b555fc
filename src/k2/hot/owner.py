"""Who opens the embedded engine: the owner of the data folder, or a client of the owner."""

from __future__ import annotations

import time

from k2.errors import InUse, StoreDown
from k2.hot.clickhouse import ClickHouseHot
from k2.hot.engine import OPEN_SECONDS, EmbeddedEngine, Engine, HttpEngine
from k2.hot.server import Endpoint, HotServer
from k2.settings import Settings

TRY_SECONDS = 0.2  # between two looks at the endpoint


class ServedHot(ClickHouseHot):
    """The hot tier in its owner's process; `server` lets other processes use it, and takes routes."""

    def __init__(self, engine: EmbeddedEngine, server: HotServer, *, memory_bytes: int) -> None:
        super().__init__(engine, memory_bytes=memory_bytes)
        self.server = server

    def close(self) -> None:
        """Stop serving, then release the engine and its folder."""
        self.server.stop()
        super().close()


def open_chdb(settings: Settings, *, owner: bool, wait_seconds: float = OPEN_SECONDS) -> ClickHouseHot:
    """Open the folder as its owner, or find the owner; see `hot.open_hot`."""
    if owner:
        return _own(settings, wait_seconds)
    deadline = time.monotonic() + wait_seconds
    while True:
        # The folder may change hands between a look at the endpoint and a try at the lock.
        endpoint = Endpoint.load(settings.data_path)
        if endpoint is not None and endpoint.alive():
            return _hot(HttpEngine(lambda: _owner_of(settings)), settings)
        try:
            return _open(_embedded(settings, TRY_SECONDS), settings)
        except InUse:
            if time.monotonic() >= deadline:
                raise


def _owner_of(settings: Settings) -> tuple[str, int, str]:
    endpoint = Endpoint.load(settings.data_path)
    if endpoint is None:
        raise StoreDown(f"hot: no process owns {settings.data_path}/hot now; is `k2 ingest` or `k2 up` running?")
    return endpoint.host, endpoint.port, endpoint.token


def _own(settings: Settings, wait_seconds: float) -> ServedHot:
    engine = _embedded(settings, wait_seconds)
    _open(engine, settings)
    server = HotServer(engine, settings.data_path)
    try:
        server.start()
    except OSError:
        engine.close()
        raise
    return ServedHot(engine, server, memory_bytes=settings.hot.memory_bytes)


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
