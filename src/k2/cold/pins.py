"""Pins of Iceberg tables: what can be read, as it is now, as a snapshot left it, and how long after it expired."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from k2.cold.base import Pin
from k2.cold.grace import Grace
from k2.cold.metadata import END, CatalogFile, State, read_state, vector
from k2.cold.metadata import reading as reported
from k2.errors import StoreDown, UnknownName
from k2.settings import ColdSettings

_NS = 10**9


class Pins:
    """Makes pins, and tells why one cannot be read any more."""

    def __init__(self, catalog: CatalogFile, grace: Grace, settings: ColdSettings, clock: Callable[[], int]) -> None:
        self._catalog = catalog
        self._grace = grace
        self._settings = settings
        self._clock = clock

    def current(self, table: str) -> Pin:
        """Return the newest state; one without location when there is no commit."""
        state = self._catalog.state(table)
        if state is None or not state.commit:
            return Pin(table, "", None, 0, {})
        committed_ns = state.metadata.last_updated_ms * 1_000_000
        return Pin(table, state.location, state.snapshot_id, committed_ns, state.watermark)

    def of_snapshot(self, table: str, snapshot_id: int) -> Pin:
        """Return the state a commit left, kept or in its grace; UnknownName says what became of any other."""
        state = self._catalog.state(table)
        found = _pin(table, state, snapshot_id) if state else None
        if found is not None:
            return found
        with reported(f"pin snapshot {snapshot_id} of cold table {table!r}"):
            return self._expired(table, snapshot_id)

    def readable(self, pin: Pin) -> Pin:
        """Return a pin with a metadata file that is there; the one it was made with may have been cleaned up."""
        if not pin.location or Path(pin.location).is_file():
            return pin
        if pin.snapshot_id is None:
            return self.current(pin.table)
        found = self.of_snapshot(pin.table, pin.snapshot_id)
        return Pin(pin.table, found.location, pin.snapshot_id, pin.committed_ns, pin.watermark)

    @contextmanager
    def reading(self, pin: Pin) -> Iterator[None]:
        """Say it when reading fails because the files are gone, the grace of a snapshot being over."""
        try:
            yield
        except StoreDown:
            if pin.snapshot_id is not None:
                self.of_snapshot(pin.table, pin.snapshot_id)
            raise

    def _expired(self, table: str, snapshot_id: int) -> Pin:
        known = self._grace.find(table, snapshot_id)
        if known is None:
            raise UnknownName(
                f"cold table {table!r} has no snapshot {snapshot_id} (any more); `k2 snapshots` lists the retained ones"
            )
        location = Path(known.location)
        if self._clock() - known.expired_ns < self._settings.grace_seconds * _NS and location.is_file():
            found = _pin(table, read_state(known.location), snapshot_id)
            if found is not None:
                return found
        moment = datetime.fromtimestamp(known.expired_ns // _NS, UTC).strftime("%Y-%m-%d %H:%M:%S")
        kept = self._settings.keep_snapshots
        raise UnknownName(
            f"snapshot {snapshot_id} of cold table {table!r} expired at {moment} UTC, the newest {kept} being kept, "
            f"and its grace of {self._settings.grace_seconds} s is over. `k2 snapshots` lists those there are; raise "
            "cold.keep_snapshots or cold.grace_seconds to have more"
        )


def _pin(table: str, state: State, snapshot_id: int) -> Pin | None:
    snapshot = state.metadata.snapshot(snapshot_id)
    if snapshot is None:
        return None
    return Pin(table, state.location, snapshot_id, snapshot.timestamp_ms * 1_000_000, vector(snapshot.facts[END]))
