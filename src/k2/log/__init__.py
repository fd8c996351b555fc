"""The durable log: every frame, as received, before anything else happens to it."""

from __future__ import annotations

from k2.log.base import Log
from k2.settings import Settings

__all__ = ["Log", "open_log"]


def open_log(settings: Settings) -> Log:
    """Return the log of an installation: the embedded one, in the folder `log` of its data folder.

    Nothing is opened or made before the first call that needs it.
    """
    from k2.log.embedded import EmbeddedLog

    return EmbeddedLog(
        settings.data_path / "log",
        sync=settings.log.sync,
        segment_bytes=settings.log.segment_bytes,
        segment_seconds=settings.log.segment_seconds,
        max_bytes=settings.log.max_bytes,
    )
