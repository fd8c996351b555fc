"""The hot tier: recent rows and candles.

`open_hot` is how every part of K2 gets it; which adapter is decided by `hot.url`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from k2.errors import Misconfigured, nearest
from k2.hot.tail import RemoteTail, TailSource
from k2.schema import TABLES, arrow_schema
from k2.settings import Settings

if TYPE_CHECKING:
    from k2.hot.base import Hot

TAIL_ROUTE = "/k2/tail"
"""Where the process that ingests serves its memory tail to the others."""


OWN = "own"
FOLLOW = "follow"
BORROW = "borrow"
"""How a process uses the embedded hot tier, see `open_hot`."""


def open_hot(settings: Settings, use: str) -> Hot:
    """Return the hot tier of the data folder. The embedded engine has one owner process at a time.

    OWN: this process becomes it: tables are made or migrated, and other processes are served
    (`ServedHot.server`) until `close`. FOLLOW: whoever owns it is asked over loopback; StoreDown while
    nobody does. BORROW: as FOLLOW, but while nobody owns it each call opens the folder just for itself.

    Raises:
        InUse: another process holds the folder, and serves nobody.
        Misconfigured: `hot.url` is not understood, or the folder was made by a newer K2.
        StoreDown: the engine cannot open the folder.
    """
    scheme = settings.hot.url.partition(":")[0]
    if scheme not in LOADERS:
        raise Misconfigured(f"settings: hot.url = {settings.hot.url!r} is not understood{nearest(scheme, LOADERS)}")
    return LOADERS[scheme](settings, use)


def discard_hot(settings: Settings) -> None:
    """Remove the files of the embedded engine, which nobody may have open; another hot tier is left alone.

    Raises:
        InUse: a process has the folder open.
        StoreDown: they cannot be removed.
    """
    if settings.hot.url.partition(":")[0] == "chdb":
        from k2.hot.owner import discard_chdb

        discard_chdb(settings)


def sync_hot(settings: Settings) -> None:
    """Return when what the embedded engine has written, and was closed after, survives a power cut. Raises OSError."""
    folder = settings.data_path / "hot"
    if settings.hot.url.partition(":")[0] == "chdb" and folder.is_dir():
        from k2.hot.owner import sync_tree

        sync_tree(folder)


def open_tail(settings: Settings) -> TailSource:
    """Return the memory tail of whichever process ingests for this data folder, if one does (see `RemoteTail`)."""
    from k2.hot.server import Endpoint

    def fetch(table: str) -> bytes | None:
        endpoint = Endpoint.load(settings.data_path)
        if endpoint is None or not endpoint.alive():
            return None
        return endpoint.request(TAIL_ROUTE, {"table": table})

    return RemoteTail(fetch, lambda table: arrow_schema(TABLES[table]).empty_table())


def _load_chdb(settings: Settings, use: str) -> Hot:
    from k2.hot.owner import BorrowedHot, follow_chdb, own_chdb

    if use == OWN:
        return own_chdb(settings)
    return follow_chdb(settings) if use == FOLLOW else cast("Hot", BorrowedHot(settings))


def _load_memory(settings: Settings, use: str) -> Hot:
    from k2.hot.memory import MemoryHot

    return MemoryHot()


LOADERS: dict[str, Callable[[Settings, str], Hot]] = {"chdb": _load_chdb, "memory": _load_memory}
