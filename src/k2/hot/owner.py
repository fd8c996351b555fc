"""Who opens the embedded engine: the owner of the data folder, or a client of the owner."""

from __future__ import annotations

import atexit
import os
import shutil
import stat
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from k2 import stamp
from k2.errors import InUse, StoreDown
from k2.hot import migrations
from k2.hot.base import Hot
from k2.hot.clickhouse import ClickHouseHot
from k2.hot.engine import OPEN_SECONDS, WAIT_SECONDS, EmbeddedEngine, Engine, HttpEngine, Wanted
from k2.hot.memo import Memo
from k2.hot.server import Endpoint, HotServer
from k2.settings import Settings

TRY_SECONDS = 0.2  # between two tries at a folder that is changing hands
LINGER_SECONDS = 10.0  # a folder opened for a question is closed when nobody has asked for so long
LOOK_SECONDS = 0.05  # between two looks whether another process waits for it
OWN_SECONDS = 20.0  # a new owner waits so long for those who have the folder open for one question


class ServedHot(ClickHouseHot):
    """The hot tier in its owner's process; `server` lets other processes use it, and takes routes."""

    def __init__(self, engine: EmbeddedEngine, server: HotServer, *, memory_bytes: int) -> None:
        memo = Memo()
        super().__init__(engine, memory_bytes=memory_bytes, memo=memo)
        self.server = server
        server.changed = memo.clear

    def close(self) -> None:
        """Stop serving, then release the engine and its folder."""
        self.server.stop()
        super().close()


class BorrowedHot:
    """The hot tier for a process that does not own it: each call asks the owner, or opens the folder itself.

    What it opened stays open for a moment, as questions come in rows, and is given up as soon as
    another process wants it. So an idle notebook or `k2 serve` never keeps `k2 ingest` from the
    folder, and an owner that ends and is started again is found again. Every method of `hot.base.Hot`.
    """

    def __init__(self, settings: Settings, wait_seconds: float = OPEN_SECONDS) -> None:
        self._settings = settings
        self._wait_seconds = wait_seconds
        self._remote = follow_chdb(settings)
        self._own = Lingering(settings)

    def __getattr__(self, name: str) -> Any:
        """Return a method of the hot tier that borrows it for one call."""
        if name not in _METHODS:
            raise AttributeError(name)

        def borrowed(*arguments: Any, **named: Any) -> Any:
            deadline = time.monotonic() + self._wait_seconds
            while True:
                owned = not self._own.is_open and _owner_lives(self._settings)
                try:
                    if owned:
                        return getattr(self._remote, name)(*arguments, **named)
                    with self._own.use() as hot:
                        return getattr(hot, name)(*arguments, **named)
                except (InUse, StoreDown) as error:  # it changed hands meanwhile, or its owner just ended
                    ended = owned and not _owner_lives(self._settings)
                    if not (isinstance(error, InUse) or ended) or time.monotonic() >= deadline:
                        raise
                    time.sleep(TRY_SECONDS)

        return borrowed

    def close(self) -> None:
        """Release the folder, and the connections to the owner."""
        self._own.close()
        self._remote.close()


class Lingering:
    """The embedded engine of a folder nobody owns, kept open between questions that follow each other.

    Any thread may use it. It is closed when nobody used it for `LINGER_SECONDS`, when another process
    waits for the folder, when this one opens another folder (chDB has one at a time), or forks.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._changed = threading.Condition()
        self._hot: ClickHouseHot | None = None
        self._users = 0
        self._used_at = 0.0
        self._wanted = Wanted(settings.data_path)
        _LINGERING.add(self)

    @property
    def is_open(self) -> bool:
        """Whether this process has the folder open."""
        return self._hot is not None

    @contextmanager
    def use(self) -> Iterator[ClickHouseHot]:
        """Lend the open engine; raises InUse when another process has the folder, or waits for it."""
        with self._changed:
            if self._hot is not None and self._wanted.seen():
                self._close(WAIT_SECONDS)
                raise InUse(f"hot: {self._settings.data_path}/hot was given up to another process that waits for it")
            if self._hot is None:
                self._hot = self._opened()
            hot = self._hot
            self._users += 1
        try:
            yield hot
        finally:
            with self._changed:
                self._users -= 1
                self._used_at = time.monotonic()
                self._changed.notify_all()

    def close(self) -> None:
        """Close it when those who use it at the moment are done; the next use opens it again."""
        with self._changed:
            self._close(WAIT_SECONDS)

    def _opened(self) -> ClickHouseHot:
        hot = _open(_embedded(self._settings, 0.0), self._settings, Memo())
        self._used_at = time.monotonic()
        threading.Thread(target=self._watch, args=(hot,), name="hot-lingering", daemon=True).start()
        return hot

    def _close(self, seconds: float) -> None:
        """Close it once it is unused; the caller holds the condition."""
        if self._changed.wait_for(lambda: self._users == 0, timeout=seconds) and self._hot is not None:
            hot, self._hot = self._hot, None
            self._changed.notify_all()
            hot.close()

    def _watch(self, hot: ClickHouseHot) -> None:
        with self._changed:
            while self._hot is hot:
                self._changed.wait(LOOK_SECONDS)
                idle = self._users == 0 and self._hot is hot
                if idle and (time.monotonic() - self._used_at >= LINGER_SECONDS or self._wanted.seen()):
                    self._close(0.0)


_LINGERING: weakref.WeakSet[Lingering] = weakref.WeakSet()


def _close_lingering() -> None:
    for lingering in list(_LINGERING):
        if lingering.is_open:
            lingering.close()


# The engine does not survive a fork (see `EmbeddedEngine`), and ends in order before the interpreter does.
os.register_at_fork(before=_close_lingering)
atexit.register(_close_lingering)


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
    _close_lingering()
    wanted = Wanted(settings.data_path)
    deadline = time.monotonic() + OWN_SECONDS
    try:
        while engine.is_held():
            if time.monotonic() >= deadline:
                raise InUse(f"hot: {engine.folder} is to be made anew, but a process has it open; stop it first")
            wanted.say()
            time.sleep(TRY_SECONDS)
    finally:
        wanted.withdraw()
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


def _open(engine: EmbeddedEngine, settings: Settings, memo: Memo | None = None) -> ClickHouseHot:
    _close_lingering()
    if not (engine.folder / "metadata").is_dir():  # a new one must at no moment look like one of the first release
        engine.folder.mkdir(parents=True, exist_ok=True)
        stamp.write(engine.folder, migrations.NEWEST)
    engine.open()
    hot = _hot(engine, settings, memo)
    try:
        hot.migrate(str(engine.folder))
        if stamp.read(engine.folder) != migrations.NEWEST:  # what can be read without opening the engine
            stamp.write(engine.folder, migrations.NEWEST)
    except BaseException:
        engine.close()
        raise
    return hot


def _hot(engine: Engine, settings: Settings, memo: Memo | None = None) -> ClickHouseHot:
    return ClickHouseHot(engine, memory_bytes=settings.hot.memory_bytes, memo=memo)
