"""A new folder carries the newest forms from its first moment on, so that no second process takes it for an old one."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
from first_release import settings_of

from k2 import stamp
from k2.errors import Corrupt
from k2.hot import OWN, open_hot
from k2.log import open_log
from k2.model import Frame
from k2.node import rebuild_hot
from k2.run import doubt
from k2.run.state import IngestState, MachineRun
from k2.run.upgrade import forms, upgrade

FRAME = Frame(kind="frame", connection="c", epoch=1, counter=0, received_ns=1, source="live", data=b"{}")


def behind(folder: Path) -> list[str]:
    return [form.store for form in forms(settings_of(folder)) if form.behind]


def test_a_new_folder_is_never_behind(tmp_path: Path) -> None:
    """Log, state and hot made by themselves, without an upgrade before; also a log killed before its stamp."""
    settings = settings_of(tmp_path)
    assert [form.found for form in forms(settings)] == [None] * 4
    (tmp_path / "log" / "kraken").mkdir(parents=True)
    with closing(open_log(settings)) as log:
        log.append("kraken", [FRAME])
        assert behind(tmp_path) == []
    IngestState(tmp_path / "state.db").close()
    open_hot(settings, OWN).close()

    assert [form.found for form in forms(settings)][:3] == [2, 2, 2]
    assert upgrade(settings) == []


def test_a_damaged_stamp_is_said(tmp_path: Path) -> None:
    """It is not taken for a form."""
    (tmp_path / stamp.FILE).write_text("two\n")

    with pytest.raises(Corrupt, match="should hold the number of the store's form"):
        stamp.read(tmp_path)


def make_old_hot(folder: Path) -> None:
    """Make a hot tier without a stamp, as the first release left it."""
    open_hot(settings_of(folder), OWN).close()
    (folder / "hot" / stamp.FILE).unlink()


def test_a_rebuild_does_not_open_the_old_hot(tmp_path: Path) -> None:
    """The files of a hot tier of the first release are damaged: it is removed and made anew, not upgraded first."""
    make_old_hot(tmp_path)
    descriptions = list((tmp_path / "hot").rglob("trades.sql"))
    assert descriptions
    for path in descriptions:
        path.write_bytes(path.read_bytes()[:40])

    assert rebuild_hot(settings_of(tmp_path))["trades"] == 0
    assert behind(tmp_path) == []


@pytest.mark.skipif(not doubt.boot_id(), reason="this system does not tell its boot id")
def test_a_doubted_hot_is_not_upgraded(tmp_path: Path) -> None:
    """After a power cut an old hot tier is left to be made anew; the stores beside it are brought on."""
    make_old_hot(tmp_path)
    before = MachineRun("other", is_synced=False)
    with closing(IngestState(tmp_path / "state.db")) as state:
        state.note_machine(before)

    assert upgrade(settings_of(tmp_path)) == []
    assert behind(tmp_path) == ["hot"]
    with closing(IngestState(tmp_path / "state.db")) as state:
        assert state.machine() == before


def test_an_upgrade_notes_that_hot_is_unsynced(tmp_path: Path) -> None:
    """Hot was left synced; its migrations are not, so a power cut after them must raise doubt."""
    make_old_hot(tmp_path)
    with closing(IngestState(tmp_path / "state.db")) as state:
        state.note_machine(MachineRun("other", is_synced=True))
        assert [form.store for form in upgrade(settings_of(tmp_path))] == ["hot"]

        assert state.machine() == MachineRun(doubt.boot_id(), is_synced=False)
