"""A data folder under another path: by a link it just works, moved or copied it is refused until `k2 upgrade`."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from first_release import answers, command, settings_of

import k2
from k2 import crash
from k2.cold import open_cold
from k2.cold.catalog import Catalog
from k2.errors import Corrupt, Misconfigured
from k2.run.upgrade import forms, upgrade

DEATHS = (pytest.param("cold.relocate.half", marks=pytest.mark.slow), "cold.relocate.before_commit")


@pytest.fixture
def upgraded(first_release: Path) -> Path:
    """A folder with frames, rows and snapshots in every store."""
    upgrade(settings_of(first_release))
    return first_release


def stores(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all that an upgrade may change."""
    files = [*(folder / "cold").rglob("*"), *(folder / "log").rglob("*.db"), folder / "state.db"]
    return {str(f.relative_to(folder)): f.read_bytes() for f in files if f.is_file() and f.suffix != ".lock"}


def snapshots(folder: Path) -> dict[int, int]:
    """Return the rows of trades as every retained snapshot tells them."""
    with closing(open_cold(settings_of(folder))) as cold, k2.connect(settings=settings_of(folder)) as client:
        ids = [each.snapshot_id for each in cold.snapshots("trades")]
        return {i: client.trades(tier="cold", as_of=i, limit=0).arrow().num_rows for i in ids}


def files_of(folder: Path) -> list[dict[str, Any]]:
    """Return all the library knows of each data file and manifest, with their places within the folder."""
    with closing(Catalog(folder / "cold", 1)) as catalog:
        found = []
        for table in ("trades", "frames"):
            loaded = catalog.load(table)
            assert loaded is not None
            for file in loaded.inspect.files().to_pylist():
                found.append(file | {"file_path": str(Path(file["file_path"]).relative_to(folder))})
            for manifest in loaded.inspect.manifests().to_pylist():
                assert manifest["length"] == Path(manifest["path"]).stat().st_size
                found.append({k: v for k, v in manifest.items() if k not in ("path", "length")})
        return found


def rename(old: Path, new: Path) -> None:
    old.rename(new)


def copy(old: Path, new: Path) -> None:
    shutil.copytree(old, new, symlinks=True)


@pytest.mark.parametrize("how", [rename, pytest.param(copy, marks=pytest.mark.slow)])
def test_a_moved_folder_is_refused_until_it_is_made_at_home(
    upgraded: Path, said: dict[str, Any], tmp_path: Path, how: Callable[[Path, Path], None]
) -> None:
    """The error names the command; after it every answer and snapshot is the same, and work goes on."""
    before, new = snapshots(upgraded), tmp_path / "elsewhere"
    described = files_of(upgraded)
    how(upgraded, new)
    with pytest.raises(Misconfigured, match=f"k2 upgrade --data {new}"), closing(open_cold(settings_of(new))) as cold:
        cold.pin("trades")
    told = {row["store"]: row for row in json.loads(command(new, "upgrade", "--check", "--json").stdout)}
    assert told["cold"]["made_in"] == str(upgraded / "cold")
    assert (told["cold"]["found"], told["log"]["made_in"]) == (2, None)
    done = command(new, "upgrade", "--json")
    assert done.returncode == 0, done.stderr

    if how is copy:
        upgraded.rename(tmp_path / "original")  # nothing of it is read any more
    asked = answers(new, said, ["kraken 1m"])
    assert asked["candles"] == {"kraken 1m": said["candles"]["kraken 1m"]}
    assert {k: v for k, v in asked.items() if k != "candles"} == {k: said[k] for k in asked if k != "candles"}
    assert files_of(new) == described
    assert snapshots(new) == before
    assert str(upgraded) not in "".join(metadata_of(new))
    assert forms(settings_of(new))[3].made_in is None
    if how is copy:
        (tmp_path / "original").rename(upgraded)
        assert snapshots(upgraded) == before


def metadata_of(folder: Path) -> list[str]:
    """Return the metadata of each table as it is now."""
    with closing(open_cold(settings_of(folder))) as cold:
        return [Path(cold.pin(t).location).read_text() for t in ("trades", "quotes", "frames", "candles")]


@pytest.mark.slow
def test_work_goes_on_in_a_folder_made_at_home(upgraded: Path, tmp_path: Path) -> None:
    """Commits, compaction, expiry and orphans go on there; nothing reaches for the old path, which is gone."""
    new = tmp_path / "elsewhere"
    upgraded.rename(new)
    for arguments in (("upgrade",), ("ingest", "--drain"), ("offload", "--drain")):
        done = command(new, *arguments)
        assert done.returncode == 0, done.stderr
    with closing(open_cold(settings_of(new))) as cold:
        cold.acquire_lease()
        for hours in (0, 200, 400):
            cold.maintain(now_ns=cold.snapshots("trades")[-1].committed_ns + hours * 3_600 * 10**9)
    with k2.connect(settings=settings_of(new)) as client:
        rows = {tier: client.trades(tier=tier, limit=0).arrow().num_rows for tier in ("hot", "cold", "all")}

    assert rows["all"] == rows["hot"] == rows["cold"] > 0
    assert not upgraded.exists()


@pytest.mark.parametrize("label", DEATHS)
def test_a_move_killed_anywhere_is_made_again(upgraded: Path, tmp_path: Path, label: str) -> None:
    """kill -9 while it is made at home: it is at home nowhere, the old path would do; then it is made again."""
    before, new, file = snapshots(upgraded), tmp_path / "elsewhere", tmp_path / "crash"
    upgraded.rename(new)
    crash.arm(file, label)
    died = command(new, "upgrade", K2CRASH=str(file))
    new.rename(upgraded)
    unharmed = snapshots(upgraded)
    upgraded.rename(new)
    done = command(new, "upgrade")

    assert died.returncode == -signal.SIGKILL
    assert done.returncode == 0, done.stderr
    assert unharmed == before == snapshots(new)


def test_a_copy_that_is_not_whole_changes_nothing(first_release: Path, tmp_path: Path) -> None:
    """A data file is missing, and stores are behind: it is named, and no store is touched."""
    new = tmp_path / "elsewhere"
    first_release.rename(new)
    lost = sorted((new / "cold/warehouse/k2/trades/data").rglob("*.parquet"))[0]
    lost.unlink()
    before = stores(new)

    with pytest.raises(Corrupt, match=f"{lost.name} is missing"):
        upgrade(settings_of(new), relocate=True)
    after = stores(new)
    assert {name: after[name] for name in before} == before
    assert [form.found for form in forms(settings_of(new))] == [1, 1, 1, 1]


def test_a_moved_folder_of_an_older_release_is_left_alone(first_release: Path, tmp_path: Path) -> None:
    """Whatever command comes first: it is refused before the stores that could be upgraded are."""
    new = tmp_path / "elsewhere"
    first_release.rename(new)
    before = stores(new)

    with pytest.raises(Misconfigured, match="k2 upgrade --data"):
        upgrade(settings_of(new))
    assert stores(new) == before


@pytest.mark.slow
def test_a_link_to_a_folder_is_as_good_as_the_folder(first_release: Path, said: dict[str, Any], tmp_path: Path) -> None:
    """Upgraded, asked and worked on by another name: the tables keep the name they have."""
    link = tmp_path / "link"
    link.symlink_to(first_release)
    assert [form.found for form in forms(settings_of(link))] == [1, 1, 1, 1]
    upgrade(settings_of(link))
    asked = answers(link, said, [])

    assert asked["tables"] == said["tables"]
    done = command(link, "offload", "--drain")
    assert done.returncode == 0, done.stderr
    assert snapshots(link) == snapshots(first_release)
    assert str(link) not in "".join(metadata_of(first_release))
