"""A token whose rows never came, as a death inside the engine leaves it, keeps no insert from being made again."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from k2.hot import OWN, open_hot
from k2.hot.tokens import strike_lost
from k2.model import Selection
from k2.schema import TIMEFRAMES
from k2.settings import Settings, load

sys.path.insert(0, str(Path(__file__).parent))
from hot_rows import table, trade

SECOND = range(50, 90)  # the offsets of the second of two inserts

WRITER = """
import sys
sys.path.insert(0, sys.argv[1])
from hot_rows import table, trade
from k2.hot import OWN, open_hot
from k2.settings import load

hot = open_hot(load({"data": sys.argv[2]}), OWN)
for start, end in ((0, 50), (50, 90)):
    hot.write("trades", table("trades", [trade(offset) for offset in range(start, end)]), f"t:{start}")
hot.close()
"""


@pytest.fixture
def data(tmp_path: Path) -> Settings:
    """A hot tier written by a process of its own: what this one opens is read from the files."""
    folder = str(tmp_path / "data")
    subprocess.run([sys.executable, "-c", WRITER, str(Path(__file__).parent), folder], check=True, timeout=60)
    return load({"data": folder})


@pytest.mark.parametrize("lost", ["trades", "candles_1m", "candles_15m", "candles_1d"])
def test_an_insert_that_lost_the_rows_of_one_table_is_made_whole(data: Settings, lost: str) -> None:
    """The part of one table of the chain is gone, its token is not: the insert made again brings its rows, once."""
    folder = data.data_path / "hot" / "data" / "k2" / lost
    newest = sorted(folder.glob("*_2_2_*"))
    assert newest, sorted(path.name for path in folder.iterdir())
    for part in [*newest, *folder.glob("*_1_2_*")]:
        shutil.rmtree(part)

    hot = open_hot(data, OWN)
    hot.write("trades", table("trades", [trade(offset) for offset in SECOND]), "t:50")
    counts = {
        timeframe: sum(hot.candles(timeframe, Selection(table="candles"), kind="trade")["trade_count"].to_pylist())
        for timeframe in TIMEFRAMES
    }
    rows = hot.counts("trades", {"binance": 0}, {"binance": 90})
    hot.close()
    assert counts == dict.fromkeys(TIMEFRAMES, 90)
    assert rows == 90


def test_tokens_with_their_rows_are_left_alone(data: Settings) -> None:
    """Nothing is struck from what an orderly end left."""
    assert strike_lost(data.data_path / "hot" / "data" / "k2") == []
