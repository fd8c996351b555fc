"""Ingest: the same rows however the stream is cut, repeated, replayed or interrupted."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from k2.errors import Corrupt
from k2.hot.memory import MemoryHot
from k2.log.memory import MemoryLog
from k2.model import FRAME, LIVE, Frame, Selection
from k2.run.ingest import TABLES, Ingest
from k2.run.state import IngestState
from k2.settings import load

NOW_MS = 1_750_000_000_000
SYMBOLS = ("BTCUSDT", "ETHUSDT")


def stream(seed: int, count: int) -> list[bytes]:
    """A stream of trades and quotes of two symbols with holes, late and repeated messages, and rubbish."""
    chance = random.Random(seed)
    ids = dict.fromkeys(SYMBOLS, 100)
    frames: list[bytes] = []
    for _ in range(count):
        symbol = chance.choice(SYMBOLS)
        kind = chance.random()
        if kind < 0.05:
            frames.append(b'{"e":"trade","s":"BTC')
        elif kind < 0.1 and frames:
            frames.append(chance.choice(frames))
        elif kind < 0.3:
            update = {"u": len(frames) + 1, "s": symbol, "b": "1.0", "B": "2", "a": "1.1", "A": "3"}
            frames.append(json.dumps(update).encode())
        else:
            ids[symbol] += chance.choice((1, 1, 1, 1, 2, -3))
            price = f"{chance.randrange(1, 10**6)}.{chance.randrange(10**8):08d}"
            frames.append(
                json.dumps(
                    {
                        "e": "trade", "E": NOW_MS, "s": symbol, "t": ids[symbol], "p": price,
                        "q": f"0.{chance.randrange(1, 10**8):08d}", "T": NOW_MS + 997 * len(frames),
                        "m": chance.random() < 0.5, "M": True,
                    }
                ).encode()
            )  # fmt: skip
    return frames


def fill(log: MemoryLog, messages: list[bytes], sizes: list[int]) -> None:
    """Append the messages in batches of the given sizes, over and over."""
    at = turn = 0
    while at < len(messages):
        size = sizes[turn % len(sizes)]
        batch = [
            Frame(FRAME, LIVE, "c", 0, at + i, (NOW_MS + at + i) * 10**6, data)
            for i, data in enumerate(messages[at : at + size])
        ]
        log.append("binance", batch)
        at, turn = at + size, turn + 1


def tables(hot: MemoryHot) -> dict[str, list[dict[str, object]]]:
    """Everything hot holds, without the time of logging, which differs from run to run."""
    found: dict[str, pa.Table] = {t: hot.read(Selection(t)) for t in TABLES}
    found["candles"] = hot.candles("1m", Selection("candles"))
    return {
        name: table.drop_columns([c for c in ("logged_ns",) if c in table.column_names]).to_pylist()
        for name, table in found.items()
    }


def ingest(tmp: Path, log: MemoryLog, hot: MemoryHot, flush_rows: int = 50_000) -> Ingest:
    made = Ingest(
        load({"data": str(tmp), "hot.flush_rows": flush_rows, "hot.tail_rows": flush_rows}, environment={}),
        log,
        hot,
        IngestState(tmp / "state.db"),
    )
    made.recover()
    return made


def expected(tmp: Path, messages: list[bytes]) -> dict[str, list[dict[str, object]]]:
    log, hot = MemoryLog(), MemoryHot()
    fill(log, messages, [len(messages)])
    ingest(tmp, log, hot).drain()
    return tables(hot)


@given(seed=st.integers(0, 10**6), sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5), rows=st.integers(1, 60))
@hypothesis_settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_split_into_batches_gives_the_same_tables(
    tmp_path_factory: pytest.TempPathFactory, seed: int, sizes: list[int], rows: int
):
    """Where the log's batches and the flushes are cut changes nothing in what comes out."""
    messages = stream(seed, 150)
    log, hot = MemoryLog(), MemoryHot()
    fill(log, messages, sizes)
    ingest(tmp_path_factory.mktemp("split"), log, hot, flush_rows=rows).drain()

    assert tables(hot) == expected(tmp_path_factory.mktemp("whole"), messages)


@given(seed=st.integers(0, 10**6), copies=st.lists(st.integers(0, 119), max_size=60))
@hypothesis_settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_interleaving_of_repeats_gives_the_same_trades(
    tmp_path_factory: pytest.TempPathFactory, seed: int, copies: list[int]
):
    """Messages that come again, any time later, add no trade and change no candle."""
    messages = stream(seed, 120)
    repeated = list(messages)
    chance = random.Random(seed)
    for copy in copies:
        at = repeated.index(messages[copy])
        repeated.insert(chance.randrange(at + 1, len(repeated) + 1), messages[copy])
    names = ("exchange", "symbol", "trade_id", "price", "amount", "side", "exchange_ns")
    kept = [
        sorted(tuple(row[n] for n in names) for row in expected(tmp_path_factory.mktemp("rows"), m)["trades"])
        for m in (messages, repeated)
    ]

    assert kept[0] == kept[1]


class Crash(BaseException):
    """The death of the process."""


class CrashingHot(MemoryHot):
    """Dies at the n-th write, before or after it is stored."""

    def __init__(self, at: int, stored: bool) -> None:
        super().__init__()
        self.writes_left = at
        self.stored = stored

    def write(self, table: str, rows: pa.Table, token: str) -> None:
        self.writes_left -= 1
        if self.writes_left == 0 and not self.stored:
            raise Crash
        super().write(table, rows, token)
        if self.writes_left == 0:
            raise Crash


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("at", [1, 2, 3, 5, 8, 13])
def test_a_death_at_any_write_loses_and_doubles_nothing(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, at: int, stored: bool
):
    """The interrupted flush is made again identically, and its token tells hot so."""
    messages = stream(at, 300)
    log, hot = MemoryLog(), CrashingHot(at, stored)
    fill(log, messages, [7])
    with pytest.raises(Crash):
        ingest(tmp_path, log, hot, flush_rows=25).drain()
    ingest(tmp_path, log, hot, flush_rows=40).drain()

    assert tables(hot) == expected(tmp_path_factory.mktemp("whole"), messages)


def kraken_v1(seed: int, count: int) -> list[bytes]:
    """Trades without ids and quotes without numbers, many of them equal, after Kraken's v1 documentation."""
    chance = random.Random(seed)
    messages = []
    for number in range(count):
        time = f"{1_700_000_000 + number // 4}.{chance.randrange(3):06d}"
        if chance.random() < 0.5:
            trades = [["5541.2", f"0.{chance.randrange(1, 4)}", time, chance.choice("bs"), "l", ""]] * chance.choice(
                [1, 2]
            )
            messages.append(json.dumps([0, trades, "trade", "XBT/USD"]).encode())
        else:
            ask, bid = ["5525.4", 1, f"{chance.randrange(1, 3)}.000"], ["5525.1", 1, "1.000"]
            messages.append(json.dumps([0, {"a": ask, "b": bid}, "ticker", "XBT/USD"]).encode())
    return messages


@given(seed=st.integers(0, 10**6), stops=st.lists(st.integers(1, 119), max_size=4))
@hypothesis_settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_restarts_change_nothing_in_what_is_found_repeated(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, seed: int, stops: list[int]
):
    """Records without ids are told from repeats by the last offsets alone, read again at a start."""
    monkeypatch.setattr("k2.run.normalise.REPEAT_WINDOW", 16)
    monkeypatch.setattr("k2.run.ingest.REPEAT_WINDOW", 16)
    chance = random.Random(seed)
    streams = {"kraken": kraken_v1(seed, 120), "binance": stream(seed, 120)}
    frames = {
        partition: [
            Frame(FRAME, LIVE, chance.choice("ab"), 0, i, (NOW_MS + i) * 10**6, data) for i, data in enumerate(messages)
        ]
        for partition, messages in streams.items()
    }

    def run(tmp: Path, cuts: list[int]) -> dict[str, list[dict[str, object]]]:
        log, hot = MemoryLog(), MemoryHot()
        for start, end in zip([0, *cuts], [*cuts, 120], strict=True):
            for partition in frames:
                if frames[partition][start:end]:
                    log.append(partition, frames[partition][start:end])
            ingest(tmp, log, hot, flush_rows=9).drain()  # a new process each time
        return tables(hot)

    whole = run(tmp_path_factory.mktemp("whole"), [])
    assert run(tmp_path_factory.mktemp("stopped"), sorted(stops)) == whole


@pytest.mark.parametrize("at", range(1, 9))
def test_a_flush_made_again_is_the_same_row_for_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int):
    """What is sent after a crash equals what was sent before it: same rows, same order, same tokens."""
    monkeypatch.setattr("k2.run.normalise.REPEAT_WINDOW", 16)
    monkeypatch.setattr("k2.run.ingest.REPEAT_WINDOW", 16)

    class Recording(CrashingHot):
        def write(self, table: str, rows: pa.Table, token: str) -> None:
            sent.append((table, token, rows.to_pylist()))
            super().write(table, rows, token)

    sent: list[tuple[str, str, list[dict[str, object]]]] = []
    log, hot = MemoryLog(), Recording(at, stored=False)
    fill(log, stream(at, 60), [7])
    log.append("kraken", [Frame(FRAME, LIVE, "k", 0, i, NOW_MS * 10**6, m) for i, m in enumerate(kraken_v1(at, 60))])
    with pytest.raises(Crash):
        ingest(tmp_path, log, hot, flush_rows=25).drain()
    interrupted = sent[-1]
    sent.clear()
    ingest(tmp_path, log, hot, flush_rows=40)

    assert interrupted in sent


def test_many_bad_rows_of_one_frame_hold_its_bytes_once(tmp_path: Path):
    """A large message full of zero prices must not be stored a thousand times."""
    trades = [["0", "1", "1700000000.000000", "b", "l", ""]] * 500
    log, hot = MemoryLog(), MemoryHot()
    log.append("kraken", [Frame(FRAME, LIVE, "k", 0, 0, 1, json.dumps([0, trades, "trade", "XBT/USD"]).encode())])
    ingest(tmp_path, log, hot).drain()
    letters = hot.read(Selection("dead_letters")).to_pylist()

    assert len(letters) == 500
    assert sum(len(letter["frame"]) > 0 for letter in letters) == 1


def test_an_id_used_again_later_is_parked_not_dropped(tmp_path: Path):
    """An exchange that starts its ids again must be noticed."""
    first = {"e": "trade", "E": 1, "s": "BTCUSDT", "t": 7, "p": "1", "q": "1", "T": NOW_MS, "m": True, "M": True}
    log, hot = MemoryLog(), MemoryHot()
    fill(log, [json.dumps(first).encode(), json.dumps({**first, "T": NOW_MS + 5_000}).encode()], [2])
    ingest(tmp_path, log, hot).drain()

    assert hot.read(Selection("trades")).num_rows == 1
    assert hot.read(Selection("dead_letters"))["reason"].to_pylist() == ["id_reused"]


def test_a_partition_without_its_exchange_is_left_alone_and_costs_nothing(tmp_path: Path):
    """A plugin that was removed stops nothing else, and waiting for news does not return at once."""
    log, hot = MemoryLog(), MemoryHot()
    log.append("gone", [Frame(FRAME, LIVE, "c", 0, 0, 1, b"x")])
    fill(log, stream(1, 20), [20])
    made = ingest(tmp_path, log, hot)
    made.drain()

    assert hot.read(Selection("trades")).num_rows > 0
    assert not log.wait(made._positions(), 0.01)


def test_rows_are_visible_in_the_tail_before_any_flush(tmp_path: Path):
    """A query sees a trade as soon as its frame was read."""
    log, hot = MemoryLog(), MemoryHot()
    fill(log, stream(1, 20), [20])
    made = ingest(tmp_path, log, hot)
    made.step()

    start, rows = made.tail.snapshot("trades")
    assert start == {"binance": 0}
    assert rows.num_rows > 0
    assert hot.read(Selection("trades")).num_rows == 0


def test_progress_that_does_not_fit_hot_is_refused(tmp_path: Path):
    """A state file of another time would double rows; ingest says so and stops."""
    log, hot = MemoryLog(), MemoryHot()
    fill(log, stream(1, 50), [50])
    ingest(tmp_path, log, hot).drain()

    with pytest.raises(Corrupt, match=r"state\.db"):
        ingest(tmp_path / "other", log, hot)
