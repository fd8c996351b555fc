"""History in open tables: the port, its adapters, and the loader."""

from __future__ import annotations

from typing import TYPE_CHECKING

from k2.errors import Misconfigured

if TYPE_CHECKING:
    from k2.cold.base import Cold
    from k2.settings import Settings


def open_cold(settings: Settings) -> Cold:
    """Return the cold tier the settings name; its engines are loaded only now.

    Nothing is written to the data folder before the first `append` or `acquire_lease`.

    Raises:
        Misconfigured: a catalog or warehouse of an unknown kind.
    """
    for name, value, known in (
        ("cold.catalog", settings.cold.catalog, ("sqlite:", "memory:")),
        ("cold.warehouse", settings.cold.warehouse, ("file:",)),
    ):
        if value not in known:
            raise Misconfigured(f"settings: {name} = {value!r} is not known; known: {', '.join(known)}")
    if settings.cold.catalog == "memory:":
        from k2.cold.memory import MemoryCold

        return MemoryCold()
    from k2.cold.iceberg import IcebergCold

    return IcebergCold(settings)
