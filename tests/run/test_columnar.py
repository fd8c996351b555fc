"""Runs of frames taken as columns give the rows, and leave the memory, of frames taken one by one."""

from __future__ import annotations

from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import msgspec
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2.feeds import registry
from k2.feeds.recordings import read
from k2.model import ANSWER, CLOSED, FRAME, IMPORT, LIVE, OPENED, Frame, LogBatch
from k2.run.columnar import runs
from k2.run.ingest import TABLES
from k2.run.normalise import Normaliser, PartitionState, Row, to_arrow

EXCHANGES = ("binance", "binance-usdm", "kraken", "coinbase")
CORPUS = {
    exchange: [
        path.read_bytes()
        for path in sorted((Path(__file__).parents[1] / "frames" / exchange).glob("*.json"))
        if not path.name.endswith(".expected.json") and "rest_" not in path.name
    ]
    for exchange in EXCHANGES
}
PRICES = ("100.10", "61685.99000000", "0.00001", "7", "12.5")
ODD_NUMBERS = (
    *("5.", ".5", "1e3", "-1", "0", "0.0", "1,5", "", " 1", "٣", "0001.5", "00000000000000000.5", "1.2.3"),
    *("1" * 12, "1" * 15, "1" * 18, "1" * 27, "0.0000000000001", "1.0000000000000"),
)
START_MS = 1_723_161_600_000
TIME_STEPS = (0, 1, 250, -3_000, 60_000)


class Stream:
    """Makes the messages of one exchange; ids go on from one to the next but for what `skip` says."""

    def __init__(self, exchange: str) -> None:
        self.exchange = exchange
        self.ids: Counter[str] = Counter()
        self.time_ms = START_MS

    def trade(self, symbol: str, skip: int, price: str, amount: str, step: int, sells: bool) -> bytes:
        self.ids[symbol] += 1 + skip
        self.time_ms += step
        number, time = 1_000 + self.ids[symbol], self.time_ms
        if self.exchange == "kraken":
            row = f'{{"symbol":"{symbol}/USD","side":"{"sell" if sells else "buy"}","price":{price},"qty":{amount},'
            row += f'"ord_type":"limit","trade_id":{number},"timestamp":"{_rfc3339(time)}"}}'
            return f'{{"channel":"trade","type":"update","data":[{row}]}}'.encode()
        if self.exchange == "coinbase":
            row = f'{{"trade_id":"{number}","product_id":"{symbol}-USD","price":"{price}","size":"{amount}",'
            row += f'"side":"{"BUY" if sells else "SELL"}","time":"{_rfc3339(time)}"}}'
            events = f'[{{"type":"update","trades":[{row}]}}]'
            return f'{{"channel":"market_trades","timestamp":"{_rfc3339(time)}","events":{events}}}'.encode()
        mark = '"M":true' if self.exchange == "binance" else f'"X":"{"NA" if skip < 0 else "MARKET"}"'
        event = f'"e":"trade","E":{time},"s":"{symbol}USDT","t":{number},"p":"{price}","q":"{amount}",'
        event += f'"T":{time},"m":{str(sells).lower()},{mark}'
        return f'{{"stream":"{symbol.lower()}usdt@trade","data":{{{event}}}}}'.encode()

    def quote(self, symbol: str, skip: int, price: str, amount: str, step: int, sells: bool) -> bytes:
        self.ids["quotes"] += 1 + skip
        self.time_ms += step
        time = _rfc3339(self.time_ms)
        if self.exchange == "kraken":
            row = f'{{"symbol":"{symbol}/USD","bid":{price},"bid_qty":{amount},"ask":{price},"ask_qty":{amount},'
            return f'{{"channel":"ticker","type":"update","data":[{row}"timestamp":"{time}"}}]}}'.encode()
        if self.exchange == "coinbase":
            row = f'{{"type":"ticker","product_id":"{symbol}-USD","best_bid":"{price}","best_ask":"{price}",'
            row += f'"best_bid_quantity":"{amount}","best_ask_quantity":"{"" if skip < 0 else amount}"}}'
            events = f'[{{"type":"update","tickers":[{row}]}}]'
            return f'{{"channel":"ticker","timestamp":"{time}","events":{events}}}'.encode()
        event = f'"u":{5_000 + self.ids["quotes"]},"s":"{symbol}USDT",'
        event += f'"b":"{price}","B":"{amount}","a":"{price}","A":"{amount}"'
        if self.exchange == "binance-usdm":
            event = f'"e":"bookTicker",{event},"T":{self.time_ms},"E":{self.time_ms}'
        return f'{{"stream":"{symbol.lower()}usdt@bookTicker","data":{{{event}}}}}'.encode()


def _rfc3339(time_ms: int) -> str:
    seconds, milliseconds = divmod(time_ms - START_MS + 3_600_000, 1_000)
    return f"2024-08-09T{seconds // 3_600 % 24:02}:{seconds // 60 % 60:02}:{seconds % 60:02}.{milliseconds:03}Z"


NUMBER = st.sampled_from(PRICES * 20 + ODD_NUMBERS)

RARE = ("corpus", "opened", "closed", "answer", "cut", "twisted")
STEP = st.tuples(
    st.sampled_from(
        ["trade", "quote"] * 12 + ["again"] * 4 + ["corpus", "opened", "closed", "answer", "cut", "twisted"]
    ),
    st.sampled_from(["BTC", "ETH"]),
    st.sampled_from([0] * 40 + [1, 2, -1, -2]),
    NUMBER,
    NUMBER,
    st.sampled_from(TIME_STEPS),
    st.booleans(),
    st.sampled_from(["a"] * 8 + ["b"]),
    st.integers(0, 10_000),
)
MOST = st.sampled_from([1, 2, 3, 5, 20, 60])

STEPS = st.lists(STEP, min_size=1, max_size=120)
CUTS = st.lists(st.integers(0, 10_000), max_size=12)


def frames_of(exchange: str, steps: list[tuple[str, str, int, str, str, int, bool, str, int]]) -> list[Frame]:
    """Return the frames that the steps describe."""
    stream, frames, epoch = Stream(exchange), [], 0
    for kind, symbol, skip, price, amount, step, sells, connection, chosen in steps:
        epoch += kind == "opened"
        source = IMPORT if chosen % 50 == 0 else LIVE
        make = {"trade": stream.trade, "quote": stream.quote}.get(kind)
        if make is not None:
            data = make(symbol, skip, price, amount, step, sells)
        elif kind == "again" and frames:
            data = frames[-1 - chosen % min(3, len(frames))].data
        elif kind == "twisted":  # the last of two equal fields counts
            fresh = stream.trade(symbol, skip, price, amount, step, sells)
            data = fresh.replace(b",", b',"stream":"btcusdt@depth@100ms","channel":"book",', 1)
        elif kind == "cut" and frames:
            data = frames[-1].data[: chosen % 200]
        else:
            data = CORPUS[exchange][chosen % len(CORPUS[exchange])]
        frame_kind = {"opened": OPENED, "closed": CLOSED, "answer": ANSWER}.get(kind, FRAME)
        frames.append(
            Frame(frame_kind, source, connection, epoch, len(frames), 10**18 + len(frames), data, "https://x/y")
        )
    return frames


def batches_of(frames: list[Frame], cuts: list[int]) -> list[LogBatch]:
    """Return the frames as batches of the log, cut at these places."""
    places = sorted({0, len(frames), *(cut % (len(frames) + 1) for cut in cuts)})
    return [LogBatch("p", start, 7_000 + start, frames[start:end]) for start, end in pairwise(places)]


class Taken:
    """A normaliser and all it made."""

    def __init__(self, normaliser: Normaliser) -> None:
        self.normaliser = normaliser
        self.tables: dict[str, list[pa.Table]] = {table: [] for table in TABLES}
        self.as_columns = 0

    def take(self, batches: list[LogBatch], most: int) -> None:
        """Take batches in as ingest does: as columns where that is possible."""
        for run in runs(batches, most):
            tables = self.normaliser.normalise_run(run) if most else None
            if tables is None:
                rows: dict[str, list[Row]] = {table: [] for table in TABLES}
                for batch in run:
                    self.normaliser.normalise(batch, rows)
                tables = {table: to_arrow(table, new) for table, new in rows.items()}
            else:
                self.as_columns += sum(len(batch.frames) for batch in run)
            for table, new in tables.items():
                self.tables[table].append(new)

    def one_by_one(self, batches: list[LogBatch]) -> None:
        """Take batches in frame by frame."""
        rows: dict[str, list[Row]] = {table: [] for table in TABLES}
        for batch in batches:
            self.normaliser.normalise(batch, rows)
        for table, new in rows.items():
            self.tables[table].append(to_arrow(table, new))

    def rows(self, table: str, since: int = 0) -> list[dict[str, object]]:
        """Return the rows from an offset on, in their order."""
        if not self.tables[table]:
            return []
        rows = pa.concat_tables(self.tables[table]).sort_by(
            [("log_offset", "ascending"), ("row_in_frame", "ascending")]
        )
        return [row for row in rows.to_pylist() if row["log_offset"] >= since]

    def memory(self) -> tuple[object, ...]:
        """Return what it carries from one frame to the next, beside the repeat window."""
        ledgers = {key: msgspec.to_builtins(ledger) for key, ledger in self.normaliser.ledgers.items()}
        return ledgers, self.normaliser.state.last_opened, self.normaliser.touched, +self.normaliser.repeats


def normaliser(exchange: str) -> Normaliser:
    return Normaliser(registry.get(exchange), {}, PartitionState())


@pytest.mark.parametrize("exchange", EXCHANGES)
@settings(deadline=None)
@given(STEPS, CUTS, MOST)
def test_columns_and_single_frames_give_the_same_rows(
    exchange: str, steps: list[tuple[str, str, int, str, str, int, bool, str, int]], cuts: list[int], most: int
):
    """Whatever comes, in whatever runs: same rows, same ledgers, same repeats."""
    batches = batches_of(frames_of(exchange, steps), cuts)
    single, columns = Taken(normaliser(exchange)), Taken(normaliser(exchange))
    single.one_by_one(batches)
    columns.take(batches, most)

    for table in TABLES:
        assert columns.rows(table) == single.rows(table)
    assert columns.memory() == single.memory()


@pytest.mark.parametrize("exchange", EXCHANGES)
@settings(deadline=None)
@given(STEPS, CUTS, MOST, st.data())
def test_a_restart_between_runs_changes_nothing(
    exchange: str,
    steps: list[tuple[str, str, int, str, str, int, bool, str, int]],
    cuts: list[int],
    most: int,
    data: st.DataObject,
):
    """A normaliser with the stored ledgers, warmed from the log, goes on as the one before would have."""
    batches = batches_of(frames_of(exchange, steps), cuts)
    stop = data.draw(st.integers(0, len(batches)))
    running, before = Taken(normaliser(exchange)), Taken(normaliser(exchange))
    running.one_by_one(batches)
    before.take(batches[:stop], most)
    ledgers = {
        key: msgspec.convert(msgspec.to_builtins(ledger), type(ledger))
        for key, ledger in before.normaliser.ledgers.items()
    }
    state = PartitionState(before.normaliser.state.last_opened)
    after = Taken(Normaliser(registry.get(exchange), ledgers, state))
    after.normaliser.warm(batches[:stop])
    after.take(batches[stop:], most)

    since = batches[stop].base_offset if stop < len(batches) else 10**9
    for table in TABLES:
        assert after.rows(table, since) == running.rows(table, since)


BINANCE_TRADE = (
    b'{"stream":"btcusdt@trade","data":{"e":"trade","s":"BTCUSDT","t":7,"p":"%s","q":"1",'
    b'"T":1723161600000,"m":true,"M":true}}'
)
KRAKEN_TRADES = b'{"channel":"trade","data":[%s]}'
KRAKEN_TRADE = (
    b'{"symbol":"BTC/USD","side":"buy","price":1.5,"qty":1,"trade_id":0,"timestamp":"2024-08-09T00:00:01.000000Z"}'
)
KRAKEN_V1_TRADE = b'[337,[["5541.20000","0.1","1723161600.321597","s","l",""]],"trade","XBT/USD"]'
USDM_QUOTE = (
    b'{"stream":"btcusdt@bookTicker","data":{"e":"bookTicker","u":5,"s":"BTCUSDT","b":"1","B":"1","a":"2","A":"1",'
    b'"T":%s,"E":1723161600000}}'
)
KRAKEN_QUOTE = (
    b'{"channel":"ticker","data":[{"symbol":"BTC/USD","bid":1.5,"bid_qty":1,"ask":2.5,"ask_qty":1,'
    b'"timestamp":"2024-08-09T00:00:00.000000Z"}]}'
)


@pytest.mark.parametrize(
    ("exchange", "run"),
    [
        ("binance", [("a", BINANCE_TRADE % b".5")]),
        ("binance", [("a", BINANCE_TRADE % b"5.")]),
        ("binance", [("a", (BINANCE_TRADE % b"5").replace(b'"t":', b'"s":"ETHUSDT","t":'))]),
        ("binance", [("a", (BINANCE_TRADE % b"5").replace(b'"M":true', b'"X":"MARKET"'))]),
        ("binance", [("a", BINANCE_TRADE % b"5"), ("a", (BINANCE_TRADE % b"5").replace(b"btcusdt@", b"!"))]),
        ("binance", [("a", (BINANCE_TRADE % b"5")[:-1] + b',"":{"data":{"e":"trade","s":"ETHUSDT","t":9,"p":"6"}}}')]),
        ("kraken", [("a", KRAKEN_TRADES % (KRAKEN_TRADE + b"," + KRAKEN_TRADE))]),
        ("kraken", [("a", KRAKEN_QUOTE), ("a", KRAKEN_V1_TRADE)]),
        ("kraken", [("a", KRAKEN_QUOTE), ("b", KRAKEN_QUOTE)]),
        ("kraken", [("a", KRAKEN_QUOTE.replace(b"1.5", b'"1.5"'))]),
        ("kraken", [("a", KRAKEN_QUOTE.replace(b"00:00:00.000000Z", b"00:00Z"))]),
        ("kraken", [("a", KRAKEN_QUOTE.replace(b"2024", b"1999"))]),
        ("kraken", [("a", KRAKEN_QUOTE.replace(b"2024", b"2150"))]),
        ("binance", [("a", (BINANCE_TRADE % b"5").replace(b"1723161600000", b"-16000000000"))]),
        ("binance-usdm", [("a", USDM_QUOTE % b"1")]),
        ("binance-usdm", [("a", USDM_QUOTE % b"4611686018427387904")]),
    ],
)
def test_what_only_looks_usual_is_left_to_the_careful_way(exchange: str, run: list[tuple[str, bytes]]):
    """Each of these differs from the usual in one thing that decides about its rows."""
    frames = [Frame(FRAME, LIVE, connection, 1, 0, 10**18, data) for connection, data in run]

    assert normaliser(exchange).normalise_run([LogBatch("p", 0, 7, frames)]) is None


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_the_usual_is_taken_as_columns(exchange: str):
    """Plain trades and quotes of one connection need no look at each frame, from the first one on."""
    prices = (*PRICES[1:], "2.5e-05") if exchange == "kraken" else PRICES  # of JSON's numbers some have an exponent
    steps = [
        (kind, symbol, 0, price, "0.5", 1, sells, "a", 1)
        for price in prices * 5
        for kind in ("trade", "quote", "closed", "trade")
        for symbol in ("BTC", "ETH")
        for sells in (True, False)
    ]
    taken = Taken(normaliser(exchange))
    batches = batches_of(frames_of(exchange, steps), [17, 90])
    taken.take(batches, 50)

    assert taken.as_columns == len(steps)
    assert len(taken.rows("trades")) == 2 * len(taken.rows("quotes")) == len(steps) // 2
    assert not taken.rows("dead_letters")


@pytest.mark.parametrize(
    ("exchange", "file"),
    [("binance", "spot_ws/btcusdt_20240809.gz"), ("binance-usdm", "usdm_ws/btcusdt_20240719.gz")],
)
def test_recorded_frames_are_taken_as_columns(recordings: Path, exchange: str, file: str):
    """Real feeds are usual: nearly all their frames go the fast way."""
    recorded = read(recordings / "binance" / file, registry.get(exchange))
    frames = [found.frame for found in islice(recorded, 30_000)]
    taken, single = Taken(normaliser(exchange)), Taken(normaliser(exchange))
    batches = batches_of(frames, [len(frames) // 2])
    taken.take(batches, 1_000)
    single.one_by_one(batches)

    assert taken.as_columns > 0.9 * len(frames)
    for table in TABLES:
        assert taken.rows(table) == single.rows(table)
