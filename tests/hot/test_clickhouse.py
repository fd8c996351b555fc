"""ClickHouse adapter: exactly once through kill -9, owner and clients, space, time limits."""

from __future__ import annotations

import json
import os
import random
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from k2.candles import make_candles
from k2.errors import InUse, Misconfigured, StoreDown, TimedOut
from k2.hot import open_hot
from k2.hot.base import Hot
from k2.hot.owner import ServedHot, own_chdb
from k2.hot.server import Endpoint
from k2.model import Selection
from k2.schema import CANDLES, TIMEFRAMES
from k2.settings import HotSettings, Settings

sys.path.insert(0, str(Path(__file__).parent))
from hot_rows import DAY_NS, START_NS, quote, table, trade
from hot_writer import BATCH, batch

BIG = 1_000_000_000
WRITER = Path(__file__).parent / "hot_writer.py"


@pytest.fixture
def data(tmp_path: Path) -> Settings:
    """Settings of an empty data folder."""
    return Settings(data=str(tmp_path))


@pytest.fixture
def hot(data: Settings) -> Iterator[ServedHot]:
    """An empty hot tier on chDB, owned and served by this process."""
    opened = open_hot(data, "own")
    assert isinstance(opened, ServedHot)
    yield opened
    opened.close()


def eventually(condition: Callable[[], bool], *, seconds: float = 30.0) -> None:
    """Wait until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.005)


class Writers:
    """Processes that own the folder, one after the other; the next one loads while one writes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._spare = self._load()

    def _load(self) -> subprocess.Popen[str]:
        command = [sys.executable, str(WRITER), str(self._folder)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    def start(self, first: int) -> subprocess.Popen[str]:
        """Start a writer from batch `first` on."""
        writer, self._spare = self._spare, self._load()
        assert writer.stdin is not None
        writer.stdin.write(f"{first}\n")
        return writer

    def close(self) -> None:
        """End the one that is left over."""
        kill(self._spare)


def wait_for(writer: subprocess.Popen[str], wanted: str) -> None:
    """Read on until the writer says these words."""
    assert writer.stdout is not None
    for line in writer.stdout:
        if line.strip() == wanted:
            return
    raise AssertionError(f"the writer died before it said {wanted!r}")


def kill(writer: subprocess.Popen[str]) -> list[str]:
    """Kill a process and return what it had still said."""
    writer.kill()
    return writer.communicate()[0].splitlines()


@pytest.fixture
def writers(data: Settings) -> Iterator[Writers]:
    """Writers on the test's data folder."""
    made = Writers(data.data_path)
    yield made
    made.close()


def kill_in_the_middle(writers: Writers, first: int, chance: random.Random) -> int:
    """Let a writer write a few batches, kill it at a random moment of one, and return the one to send again."""
    writer = writers.start(first)
    begun = first + chance.randint(0, 3)
    wait_for(writer, f"begin {begun}")
    time.sleep(chance.uniform(0, 0.15))  # not a wait: the random moment of the kill
    said = kill(writer)
    return max([begun, *(int(line.split()[1]) for line in said if line.startswith("begin "))])


def assert_equal_to_brute_force(hot: Hot, batches: int) -> None:
    """Silver holds each row once, and every timeframe equals candles computed trade by trade."""
    expected = [row for number in range(batches) for row in batch(number)]
    rows = hot.read_range("trades", {}, {"binance": BIG}).to_pylist()
    assert sorted(row["log_offset"] for row in rows) == sorted(row["log_offset"] for row in expected)
    for timeframe in TIMEFRAMES:
        assert hot.candles(timeframe, Selection(table="candles")).to_pylist() == make_candles_like(timeframe, expected)


def make_candles_like(timeframe: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = [*CANDLES.column_names, "open_key", "close_key", "quote_exact", "last_offset"]
    return [{name: candle[name] for name in names} for candle in make_candles(timeframe, rows)]


def kill_rounds(data: Settings, writers: Writers, rounds: int, seed: int) -> None:
    chance = random.Random(seed)
    next_batch = 0
    for _ in range(rounds):
        next_batch = kill_in_the_middle(writers, next_batch, chance)
    hot = open_hot(data, "own")
    try:
        hot.write("trades", table("trades", batch(next_batch)), f"batch:{next_batch}")
        assert_equal_to_brute_force(hot, next_batch + 1)
        assert list((data.data_path / "hot-inbox").iterdir()) == []
    finally:
        hot.close()


def test_kill_9_during_inserts_loses_and_doubles_nothing(data: Settings, writers: Writers) -> None:
    """Five writers killed at random moments; each next one sends the last batch again."""
    kill_rounds(data, writers, 5, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kill_9_twenty_times_loses_and_doubles_nothing(data: Settings, writers: Writers) -> None:
    """The same, twenty kills."""
    kill_rounds(data, writers, 20, seed=2)


def test_a_write_makes_one_part_in_every_table_of_the_chain(hot: ServedHot) -> None:
    """A part is stored whole or not at all, which is what makes an insert safe to repeat."""
    hot.write("trades", table("trades", [row for number in range(20) for row in batch(number)]), "t")

    parts = {name: stats["parts"] for name, stats in hot.statistics().items() if stats["rows"]}
    assert parts == {"trades": 1, **{f"candles_{timeframe}": 1 for timeframe in TIMEFRAMES}}


def test_deleting_frees_the_space_of_whole_days(hot: ServedHot) -> None:
    """A day with nothing left has no parts."""
    rows = [trade(n, exchange_ns=START_NS + n % 2 * DAY_NS, logged_ns=START_NS + n % 2 * DAY_NS) for n in range(100)]
    hot.write("trades", table("trades", rows), "t")
    hot.delete({"binance": 100}, START_NS + DAY_NS)

    # The engine removes the empty part itself in a minute or two.
    parts = hot.engine.query("SELECT partition, rows FROM system.parts WHERE active AND table = 'trades' AND rows > 0")
    assert parts.to_pylist() == [{"partition": "20240810", "rows": 50}]


def test_rows_survive_closing_and_opening_again(data: Settings) -> None:
    """The folder is the store, and the token is remembered in it."""
    for _ in range(2):
        hot = open_hot(data, "own")
        hot.write("trades", table("trades", [trade(0)]), "t")
        assert hot.counts("trades", {}, {"binance": 1}) == 1
        hot.close()


def test_a_second_owner_is_refused_with_the_holder_s_process_id(data: Settings, writers: Writers) -> None:
    """One process owns the folder; the message says which, and its death frees the folder."""
    writer = writers.start(0)
    wait_for(writer, "begin 0")
    with pytest.raises(InUse, match=str(writer.pid)):
        own_chdb(data, wait_seconds=0.1)
    kill(writer)
    open_hot(data, "own").close()


def test_other_processes_ask_the_owner_and_write_through_it(data: Settings, writers: Writers) -> None:
    """A living owner is found by the endpoint file."""
    writer = writers.start(0)
    wait_for(writer, "end 1")
    client = open_hot(data, "borrow")
    client.write("quotes", table("quotes", [quote(0)]), "q")

    assert client.counts("trades", {}, {"binance": 2 * BATCH}) == 2 * BATCH
    assert client.counts("quotes", {}, {"binance": 1}) == 1
    client.close()
    kill(writer)


def test_without_an_owner_the_folder_is_opened_for_the_moment(data: Settings) -> None:
    """A dead owner's endpoint is not believed, and none is left behind."""
    Endpoint("127.0.0.1", 1, "t", 1).save(data.data_path)
    hot = open_hot(data, "borrow")
    hot.write("trades", table("trades", [trade(0)]), "t")

    assert hot.counts("trades", {}, {"binance": 1}) == 1
    hot.close()


def test_who_borrows_the_folder_does_not_keep_it_from_an_owner(data: Settings) -> None:
    """Between two questions an owner can have the folder; it is asked from then on."""
    borrowed = open_hot(data, "borrow")
    borrowed.write("trades", table("trades", [trade(0)]), "t")
    owner = own_chdb(data)
    owner.write("trades", table("trades", [trade(1)]), "u")

    assert borrowed.counts("trades", {}, {"binance": 2}) == 2
    owner.close()
    assert borrowed.counts("trades", {}, {"binance": 2}) == 2
    borrowed.close()


def test_who_follows_waits_for_an_owner_and_finds_the_next_one(data: Settings) -> None:
    """Without an owner it is down, never opened; a new owner listens elsewhere and is found."""
    follower = open_hot(data, "follow")
    with pytest.raises(StoreDown, match="k2 ingest"):
        follower.symbols()
    for number in range(2):
        owner = own_chdb(data)
        owner.write("trades", table("trades", [trade(number)]), str(number))
        assert follower.counts("trades", {}, {"binance": 2}) == number + 1
        owner.close()
        with pytest.raises(StoreDown):
            follower.symbols()
    follower.close()


def test_the_endpoint_file_is_private_and_goes_with_the_owner(data: Settings) -> None:
    """It holds a token with all rights."""
    hot = open_hot(data, "own")
    file = Endpoint.file(data.data_path)

    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert json.loads(file.read_text())["pid"] == os.getpid()
    hot.close()
    assert not file.exists()


def test_a_closed_tier_says_so(data: Settings) -> None:
    """Use after close is no crash."""
    hot = open_hot(data, "own")
    hot.close()
    hot.close()

    with pytest.raises(StoreDown, match="closed"):
        hot.symbols()


def test_a_slow_read_is_interrupted_and_the_connection_is_clean_afterwards(hot: ServedHot) -> None:
    """What the failed query had already written never shows up in the next answer."""
    slow = "SELECT number, sleepEachRow(0.01) FROM numbers(100000) SETTINGS max_block_size = 10"
    with pytest.raises(TimedOut):
        hot.engine.query(slow, timeout_seconds=0.3)
    for _ in range(3):
        assert hot.engine.query("SELECT 1 AS one").to_pylist() == [{"one": 1}]


def test_a_query_that_ignores_its_limit_is_killed(hot: ServedHot) -> None:
    """The guard does not rely on the engine's own clock."""
    ignoring = "SELECT count() FROM numbers(1000000000000)"
    engine = hot.engine

    with pytest.raises(TimedOut, match="limit"):
        engine._guarded(lambda text: engine._with_client(text, None), ignoring, 0.1)


def test_an_unknown_url_is_refused() -> None:
    """With the nearest known one."""
    with pytest.raises(Misconfigured, match="did you mean 'chdb'"):
        open_hot(Settings(hot=HotSettings(url="chbd:")), "own")


def test_recorded_trades_take_less_than_nine_bytes(hot: ServedHot, recordings: Path) -> None:
    """41,646 recorded Binance trades, id for id, in the parts the engine wrote and in those it merges."""
    rows = recorded_trades(recordings)
    hot.write("trades", table("trades", rows), "t")

    for _ in range(2):
        stats = hot.statistics()["trades"]
        assert stats["rows"] == len(rows) == 41_646
        assert stats["bytes"] / stats["rows"] < 9
        hot.engine.command("OPTIMIZE TABLE trades FINAL")


def recorded_trades(folder: Path) -> list[dict[str, Any]]:
    import gzip
    from decimal import Decimal

    rows: list[dict[str, Any]] = []
    files = {
        "spot_ws/btcusdt_20240808.gz": ("binance", "BTC-USDT"),
        "spot_ws/btcusdt_20240809.gz": ("binance", "BTC-USDT"),
        "usdm_ws/btcusdt_20240719.gz": ("binance-usdm", "BTC-USDT-PERP"),
        "usdm_ws/ethusdt_20240719.gz": ("binance-usdm", "ETH-USDT-PERP"),
    }
    offset = 0
    for name, (exchange, symbol) in files.items():
        with gzip.open(folder / "binance" / name) as lines:
            for line in lines:
                offset += 1
                received, _, text = line.partition(b" ")
                event = json.loads(text).get("data", {})
                if event.get("e") == "trade":
                    rows.append(
                        trade(
                            offset,
                            exchange=exchange,
                            symbol=symbol,
                            trade_id=event["t"],
                            price=Decimal(event["p"]),
                            amount=Decimal(event["q"]),
                            side="sell" if event["m"] else "buy",
                            off_market=event.get("X", "MARKET") != "MARKET",
                            exchange_ns=event["T"] * 10**6,
                            received_ns=int(received),
                            logged_ns=int(received) + 5_000_000,
                            log_partition=exchange,
                            source="import",
                        )
                    )
    return rows


_OWNER = """
import sys
sys.path.insert(0, sys.argv[1])
from hot_rows import table, trade
from k2.hot import open_hot
from k2.settings import Settings
hot = open_hot(Settings(data=sys.argv[2]), "own")
hot.write("trades", table("trades", [trade(1)]), "2")
hot.close()
"""


def test_a_folder_that_is_asked_again_and_again_is_given_up_to_who_waits_for_it(data: Settings) -> None:
    """An owner gets the folder at once from one who keeps it open to ask more, who then sees what the owner wrote."""
    borrowed = open_hot(data, "borrow")
    borrowed.write("trades", table("trades", [trade(0)]), "1")
    newest = Selection(table="trades", exchange="binance", symbol="BTC-USDT", limit=5, newest=True)
    candle = Selection(table="candles", exchange="binance", symbol="BTC-USDT")
    arguments = [sys.executable, "-c", _OWNER, str(Path(__file__).parent), str(data.data_path)]
    deadline = time.monotonic() + 30
    with subprocess.Popen(arguments) as owner:
        while owner.poll() is None and time.monotonic() < deadline:
            assert borrowed.candles("1m", candle, kind="trade").num_rows == 1
            assert borrowed.read(newest).num_rows >= 1
        owner.kill()

    assert owner.returncode == 0
    assert borrowed.read(newest)["log_offset"].to_pylist() == [0, 1]
    assert borrowed.candles("1m", candle, kind="trade")["trade_count"].to_pylist() == [2]
    borrowed.close()


def test_a_folder_kept_open_does_not_keep_this_process_from_another(data: Settings, tmp_path: Path) -> None:
    """chDB has one folder open in a process: asking another closes the first, and asking the first works again."""
    other = open_hot(Settings(data=str(tmp_path / "other")), "borrow")
    first = open_hot(data, "borrow")
    for hot in (first, other, first):
        assert hot.counts("trades", {}, {"binance": 9}) == 0
    first.close()
    other.close()


def test_rows_written_by_another_process_are_in_the_next_answer(data: Settings) -> None:
    """The owner keeps answers in memory; what a client of its server wrote is in the next one all the same."""
    owner = own_chdb(data)
    client = open_hot(data, "borrow")
    newest = Selection(table="trades", exchange="binance", symbol="BTC-USDT", limit=5, newest=True)
    candle = Selection(table="candles", exchange="binance", symbol="BTC-USDT")
    for offset in range(3):
        client.write("trades", table("trades", [trade(offset)]), str(offset))

        assert owner.read(newest).num_rows == offset + 1
        assert owner.candles("1m", candle, kind="trade")["trade_count"].to_pylist() == [offset + 1]
        assert owner.symbols() == [("binance", "BTC-USDT")]
    client.delete({"binance": 2}, 2**62)
    assert owner.read(newest)["log_offset"].to_pylist() == [2]
    client.close()
    owner.close()
