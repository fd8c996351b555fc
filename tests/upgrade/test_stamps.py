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
from k2.run.state import IngestState
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
