"""Brings a data folder that an older K2 wrote to the form this one writes, before anything else opens it.

Each store counts its forms from 1, the first release's, and says in itself which it has: a file `k2.format` in the
folder of log and hot, a row of `state.db`, the property `k2.format` of each cold table. All are looked at first: a
newer one is refused before anything is changed. Then each store that is behind is brought on by its own steps, and is
stamped last, so a process killed in the middle leaves a store that the next start brings on again from its start.

A folder that was moved or copied is made at home in its new place only where that was asked for (`k2 upgrade`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from k2 import crash, stamp
from k2.cold import metadata
from k2.errors import InUse
from k2.hot import OWN, migrations, open_hot
from k2.log import form as log_form
from k2.run import doubt
from k2.run.folder import hold, holder, run_folder
from k2.run.state import FORM, IngestState, MachineRun
from k2.run.state import form as state_form
from k2.settings import Settings
from k2.version import __version__

LOCK_SECONDS = 600.0
"""How long a process waits for another one that is upgrading the same folder."""

HOT = "hot"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Store:
    """One store: the form a folder has it in (None: it is not there), and how it gets to the newest."""

    name: str
    newest: int
    found: Callable[[Settings], int | None]
    upgrade: Callable[[Settings], None]
    made_in: Callable[[Settings], Path | None] = lambda _settings: None


@dataclass(frozen=True)
class Form:
    """The form of one store of a folder, and the newest this version knows."""

    store: str
    found: int | None
    newest: int
    made_in: Path | None = None
    """Where the store was when it was made, if it was moved since and does not know of it."""

    @property
    def behind(self) -> bool:
        """Whether an upgrade is due."""
        return self.found is not None and self.found < self.newest


def forms(settings: Settings) -> list[Form]:
    """Return the form of every store, changing nothing.

    Raises:
        Misconfigured: a store was written by a newer K2.
        Corrupt: a stamp cannot be understood.
        StoreDown: a store cannot be read.
    """
    found = [Form(store.name, store.found(settings), store.newest, store.made_in(settings)) for store in STORES]
    for form in found:
        if form.found is not None:
            stamp.check(form.store, settings.data_path, form.found, form.newest)
    return found


def upgrade(settings: Settings, *, with_hot: bool = True, relocate: bool = False) -> list[Form]:
    """Bring every store to its newest form; return those that were behind, as they were.

    Hot is left alone where its files will be made anew: without `with_hot`, or while it is not to be trusted.
    With `relocate` a folder that was moved or copied is made at home where it is now. Without it, such a folder is
    refused here if a store is behind, and else by whoever opens its cold tier.

    Called before a process opens any store, and before it takes a role: who holds one while a store is
    behind is a process of the older version. Costs milliseconds where nothing is to be done.

    Raises:
        Misconfigured: a store was written by a newer K2, or the folder was moved; nothing was changed.
        Corrupt: a file is missing in a folder that was moved.
        InUse: another process still runs on the folder, or is upgrading it for longer than `LOCK_SECONDS`.
        StoreDown: a store cannot be read or written; run it again.
    """
    if not settings.data_path.is_dir() or not _due(settings, with_hot, relocate):
        return []
    conflict = f"data folder {settings.data_path} is being upgraded by {{owner}}; wait until it is done"
    with hold(run_folder(settings) / "upgrade.lock", "k2 upgrade", conflict, wait_seconds=LOCK_SECONDS):
        due = _due(settings, with_hot, relocate)
        if due:
            _refuse_company(settings)
        for form in due:
            if form.made_in is not None:
                _relocate_cold(settings)  # first: it changes nothing of a folder that is not whole
        for form in due:
            if form.behind:
                _bring_on(settings, form)
        return due


def _due(settings: Settings, with_hot: bool, relocate: bool) -> list[Form]:
    found = forms(settings)
    due = [form for form in found if form.behind or (relocate and form.made_in is not None)]
    for form in found:
        if due and form.made_in is not None and not relocate:
            raise metadata.moved(settings.data_path / form.store, form.made_in)
    if any(form.store == HOT for form in due) and (not with_hot or doubt.of_folder(settings.data_path)):
        return [form for form in due if form.store != HOT]
    return due


def _bring_on(settings: Settings, form: Form) -> None:
    logger.info("upgrading %s of %s from form %s to %s", form.store, settings.data_path, form.found, form.newest)
    next(store for store in STORES if store.name == form.store).upgrade(settings)
    crash.point("upgrade.store.done")
    with closing(IngestState(settings.data_path / "state.db")) as state:
        state.note_upgrade(form.store, form.newest, __version__)


def _refuse_company(settings: Settings) -> None:
    """Raise InUse while another process has a role on the folder: it is of the version that wrote it."""
    for path in sorted(run_folder(settings).glob("*.lock")):
        owner = holder(path) if path.name != "upgrade.lock" else None
        if owner is not None and owner[0] != os.getpid():
            raise InUse(
                f"data folder {settings.data_path} was written by an older K2, and `{owner[1]}` (pid {owner[0]}) of it "
                "still runs: stop it first, then start again"
            )


def _upgrade_log(settings: Settings) -> None:
    log_form.upgrade(settings.data_path / "log")


def _upgrade_state(settings: Settings) -> None:
    IngestState(settings.data_path / "state.db").close()  # opening it does


def _hot_form(settings: Settings) -> int | None:
    folder = settings.data_path / "hot"
    return stamp.read(folder) if (folder / "metadata").is_dir() else None


def _upgrade_hot(settings: Settings) -> None:
    with closing(IngestState(settings.data_path / "state.db")) as state:
        state.note_machine(MachineRun(doubt.boot_id(), is_synced=False))  # nothing of what follows is synced
    open_hot(settings, OWN).close()  # opening it runs its migrations, each recorded in its own table


def _cold_folder(settings: Settings) -> Path:
    return metadata.home(settings.data_path / "cold")


def _cold_made_in(settings: Settings) -> Path | None:
    made = metadata.made_in(settings.data_path / "cold")
    return None if made == _cold_folder(settings) else made


def _relocate_cold(settings: Settings) -> None:
    from k2.cold.relocate import relocate  # loads the library that writes, only now

    relocate(_cold_folder(settings))


def _cold_form(settings: Settings) -> int | None:
    found = metadata.forms(_cold_folder(settings)).values()
    newest = max(found, default=None)
    return newest if newest is None or newest > metadata.NEWEST else min(found)


def _upgrade_cold(settings: Settings) -> None:
    from k2.cold import form as cold_form  # loads the library that writes, only now

    cold_form.upgrade(_cold_folder(settings), settings.cold.file_bytes)


STORES = (
    Store("state", FORM, lambda settings: state_form(settings.data_path / "state.db"), _upgrade_state),
    Store("log", log_form.NEWEST, lambda settings: log_form.form(settings.data_path / "log"), _upgrade_log),
    Store(HOT, migrations.NEWEST, _hot_form, _upgrade_hot),
    Store("cold", metadata.NEWEST, _cold_form, _upgrade_cold, _cold_made_in),
)
"""The stores in the order they are upgraded: state first, as it keeps what was done."""
