"""The hot tier: recent rows and candles.

`open_hot` is how every part of K2 gets it; which adapter is decided by `hot.url`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from k2.errors import Misconfigured, nearest
from k2.hot.tail import RemoteTail, TailSource
from k2.schema import TABLES, arrow_schema
from k2.settings import Settings

if TYPE_CHECKING:
    from k2.hot.base import Hot

TAIL_ROUTE = "/k2/tail"
"""Where the process that ingests serves its memory tail to the others."""


def open_hot(settings: Settings, *, owner: bool) -> Hot:
    """Open the hot tier of the data folder.

    The embedded engine has one owner process. With `owner` this process becomes it: tables are
    made or migrated, and other processes are served (`ServedHot.server`) until `close`. Without,
    the owner is asked over loopback if one is alive; else the folder is opened for the
    moment, without serving.

    Raises:
        InUse: another process holds the folder, and serves nobody.
        Misconfigured: `hot.url` is not understood, or the folder was made by a newer K2.
        StoreDown: the engine cannot open the folder.
    """
    scheme = settings.hot.url.partition(":")[0]
    if scheme not in LOADERS:
        raise Misconfigured(f"settings: hot.url = {settings.hot.url!r} is not understood{nearest(scheme, LOADERS)}")
    return LOADERS[scheme](settings, owner)


def open_tail(settings: Settings) -> TailSource:
    """Return the memory tail of whichever process ingests for this data folder, if one does (see `RemoteTail`)."""
    from k2.hot.server import Endpoint

    def fetch(table: str) -> bytes | None:
        endpoint = Endpoint.load(settings.data_path)
        if endpoint is None or not endpoint.alive():
            return None
        return endpoint.request(TAIL_ROUTE, {"table": table})

    return RemoteTail(fetch, lambda table: arrow_schema(TABLES[table]).empty_table())


def _load_chdb(settings: Settings, owner: bool) -> Hot:
    from k2.hot.owner import open_chdb

    return open_chdb(settings, owner=owner)


def _load_memory(settings: Settings, owner: bool) -> Hot:
    from k2.hot.memory import MemoryHot

    return MemoryHot()


LOADERS: dict[str, Callable[[Settings, bool], Hot]] = {"chdb": _load_chdb, "memory": _load_memory}
