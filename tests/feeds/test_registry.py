"""Finding exchanges by name, and what a plugin may and may not do."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from k2.errors import Misconfigured, UnknownName
from k2.feeds import registry


@pytest.fixture
def plugins(tmp_path: Path) -> Iterator[Path]:
    """A folder on the import path where a distribution with two plugins is installed: one works, one breaks."""
    (tmp_path / "good_exchange.py").write_text(
        "from k2.feeds.kraken import Kraken\n\nclass Good(Kraken):\n    name = 'good'\n\nGOOD = Good()\n"
    )
    (tmp_path / "bad_exchange.py").write_text("raise RuntimeError('no licence')\n")
    (tmp_path / "half_exchange.py").write_text("class Half:\n    name = 'half'\n\nHALF = Half()\n")
    info = tmp_path / "k2_plugins-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: k2-plugins\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[k2.exchanges]\ngood = good_exchange:GOOD\nbad = bad_exchange:BAD\nhalf = half_exchange:HALF\n"
        "other = good_exchange:GOOD\nkraken = good_exchange:GOOD\n"
    )
    sys.path.insert(0, str(tmp_path))
    importlib.invalidate_caches()
    yield tmp_path
    sys.path.remove(str(tmp_path))
    for module in ("good_exchange", "half_exchange"):
        sys.modules.pop(module, None)
    importlib.invalidate_caches()


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("binance", "binance"),
        ("Kraken", "kraken"),
        ("binance_usdm", "binance-usdm"),
        ("binanceusdm", "binance-usdm"),
        ("binance-futures", "binance-usdm"),
        ("coinbase-exchange", "coinbase"),
    ],
)
def test_get_understands_names_and_aliases(asked: str, name: str) -> None:
    """An exchange is found by its name in any case, with underscores, and by names others use."""
    assert registry.get(asked).name == name


def test_get_unknown_suggests_the_nearest() -> None:
    """A misspelt name gives an error that names the exchange probably meant."""
    with pytest.raises(UnknownName, match="did you mean 'coinbase'"):
        registry.get("coinbse")


def test_all_own_exchanges_are_listed_and_loaded() -> None:
    """The four feeds of K2 are there under their own names."""
    loaded = registry.exchanges()

    assert set(registry.OWN) <= set(loaded)
    assert all(exchange.name == name for name, exchange in loaded.items())


def test_plugin_is_found_by_its_entry_point(plugins: Path) -> None:
    """An exchange of another distribution is used like K2's own."""
    assert registry.get("good").name == "good"
    assert "good" in registry.names()


@pytest.mark.parametrize(
    ("name", "told"),
    [("bad", "RuntimeError: no licence"), ("half", "lacks url, rest_url"), ("other", "calls itself 'good'")],
)
def test_broken_plugin_gives_a_clear_error(plugins: Path, name: str, told: str) -> None:
    """A plugin that cannot be imported, is no exchange or has another name is refused with the reason."""
    with pytest.raises(Misconfigured, match=told):
        registry.get(name)


def test_broken_plugin_does_not_hurt_the_others(plugins: Path) -> None:
    """All working exchanges are loaded, the broken ones are listed with their reasons."""
    assert set(registry.exchanges()) == {*registry.OWN, "good"}
    assert set(registry.broken()) == {"bad", "half", "other"}


def test_plugin_cannot_take_the_place_of_an_own_exchange(plugins: Path) -> None:
    """An entry point named like a feed of K2 is not heard."""
    assert type(registry.get("kraken")).__name__ == "Kraken"
