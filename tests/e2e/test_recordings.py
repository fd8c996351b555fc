"""Real recordings go in by `k2 import` and come out of every tier as they are, and as the exchanges' own candles.

What must come out is read from the same files a second time, by `plain_reader`, and checked against
the counts and ids of the recordings' README.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from decimal import ROUND_DOWN, Decimal, localcontext
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pytest
from plain_reader import FILES, QuoteRow, Row, quotes, trades
from recorded import FIRST_ROUND, TIERS, Proof

pytestmark = pytest.mark.timeout(400)  # the first test waits for the whole pipeline

# Counts and ids by the README of the recordings; None where it tells no ids, or the exchange gives none.
README: dict[tuple[str, str, str], tuple[int, tuple[int, int] | None]] = {
    ("binance", "BTC-USDT", "trade"): (9_757 + 10_147, (3735683259, 3735703162)),
    ("binance", "BTC-USDT", "aggregate"): (1_227, None),
    ("binance", "ETH-USDT", "aggregate"): (506, None),
    ("binance", "DOT-USDT", "aggregate"): (177, None),
    ("binance", "NKN-USDT", "aggregate"): (1, None),
    ("binance", "LRC-BTC", "aggregate"): (1, None),
    ("binance", "XRP-ETH", "aggregate"): (12_477, (13519807, 13532283)),
    ("binance-usdm", "BTC-USDT-PERP", "trade"): (974 + 9_727, (5182005737, 5182016437)),
    ("binance-usdm", "ETH-USDT-PERP", "trade"): (1_640 + 12_015, (4217896584, 4217910238)),
    ("binance-usdm", "SUSHI-USDT-PERP", "aggregate"): (40, None),
    ("binance-usdm", "CTK-USDT-PERP", "aggregate"): (38, None),
    ("binance-usdm", "AKRO-USDT-PERP", "aggregate"): (8, None),
    ("binance-usdm", "KEEP-USDT-PERP", "aggregate"): (5, None),  # 91 in all four
    ("kraken", "BTC-USDT", "trade"): (1_000, (10218208, 10219207)),
    ("kraken", "BTC-USD", "trade"): (52, (109183836, 109183887)),
    ("kraken", "ETH-USD", "trade"): (50, (66819466, 66819515)),
    ("kraken", "XMR-USD", "trade"): (4, None),
    ("kraken", "SC-EUR", "trade"): (6, None),
    ("coinbase", "BTC-USD", "trade"): (100 + 23, None),
    ("coinbase", "ETH-USD", "trade"): (100 + 17, None),
    ("coinbase", "SKL-USD", "trade"): (52 + 1, None),  # match and last_match
    ("coinbase", "SKL-BTC", "trade"): (8 + 1, None),
    ("coinbase", "NMR-EUR", "trade"): (8 + 1, None),
    ("coinbase", "BAND-GBP", "trade"): (4 + 1, None),
    ("coinbase", "YFI-BTC", "trade"): (1, None),
}
README_QUOTES = {"binance": 28_040 + 45_134 + 84, "kraken": 18, "coinbase": 64 + 77}

Market = tuple[str, str, str]


@cache
def expected_trades(recordings: Path, first_round_only: bool = False) -> tuple[Row, ...]:
    """Return what the plain reader finds in the files."""
    return tuple(
        row
        for exchange, files in FILES.items()
        for file in files
        if not first_round_only or file in FIRST_ROUND
        for row in trades(recordings, exchange, file)
    )


@cache
def expected_quotes(recordings: Path) -> Counter[QuoteRow]:
    """Return what the plain reader finds in the files."""
    return Counter(
        row for exchange, files in FILES.items() for file in files for row in quotes(recordings, exchange, file)
    )


def as_rows(found: pa.Table) -> list[Row]:
    """Return answered rows in the plain reader's form."""
    columns = [found[name].to_pylist() for name in Row._fields]
    backfilled = found["source"].to_pylist()
    rows = [Row(*values) for values in zip(*columns, strict=True)]
    return [
        # An answer of REST, and Kraken's bare messages, tell no time of receipt.
        row._replace(received_ns=0) if source == "backfill" or _timeless(row) else row
        for row, source in zip(rows, backfilled, strict=True)
    ]


def _timeless(row: Row) -> bool:
    return row.exchange == "kraken" and row.symbol in ("BTC-USD", "ETH-USD")


class Sums(NamedTuple):
    """What a market's trades amount to, exactly."""

    count: int
    first_id: int
    last_id: int
    price: Decimal
    amount: Decimal
    price_amount: Decimal
    buys: int
    covered: int


def sums(rows: Iterable[Row]) -> dict[Market, Sums]:
    """Return exact sums of each market."""
    markets: dict[Market, list[Row]] = {}
    for row in rows:
        markets.setdefault(row[:3], []).append(row)
    with localcontext(prec=60):
        return {market: _sums_of(own) for market, own in markets.items()}


def _sums_of(rows: Sequence[Row]) -> Sums:
    return Sums(
        len(rows),
        min(row.trade_id for row in rows),
        max(row.trade_id for row in rows),
        sum((row.price for row in rows), Decimal(0)),
        sum((row.amount for row in rows), Decimal(0)),
        sum((row.price * row.amount for row in rows), Decimal(0)),
        sum(row.side == "buy" for row in rows),
        sum(row.last_id - row.first_id + 1 for row in rows),
    )


def assert_same(found: Iterable[Row], expected: Iterable[Row]) -> None:
    """Compare two bags of trades: sums first, which say more, then every value of every row."""
    found, expected = list(found), list(expected)
    assert sums(found) == sums(expected)
    surplus, missing = Counter(found) - Counter(expected), Counter(expected) - Counter(found)
    assert (list(surplus)[:3], list(missing)[:3]) == ([], [])


def test_plain_reader_finds_what_the_readme_tells(recordings: Path) -> None:
    """The second reading itself is checked against the README: counts, ids, no hole, no id twice."""
    rows = expected_trades(recordings)
    found = sums(rows)

    assert {market: one.count for market, one in found.items()} == {m: count for m, (count, _) in README.items()}
    for market, (count, ids) in README.items():
        own = {row.trade_id for row in rows if row[:3] == market}
        if ids is not None:
            assert (found[market].first_id, found[market].last_id) == ids
        if found[market].first_id:  # Kraken v1 gives no ids
            assert len(own) == count == found[market].last_id - found[market].first_id + 1


@pytest.mark.parametrize("tier", TIERS)
def test_every_trade_comes_out_of_every_tier(recordings: Path, proof: Proof, tier: str) -> None:
    """Hot, cold and their union hold each trade of each file once, with all its values."""
    found = proof.rows(f"trades_{tier}")

    assert_same(as_rows(found), expected_trades(recordings))
    assert {m: s.count for m, s in sums(as_rows(found)).items()} == {m: count for m, (count, _) in README.items()}
    assert not any(found["off_market"].to_pylist())


@pytest.mark.parametrize(
    ("symbol", "tier"),
    [("BTC-USDT", "hot"), ("BTC-USDT", "cold"), ("BTC-USDT", "all"), ("BTC-USDT-PERP", "all"), ("BTC-USD", "all")],
)
def test_command_gives_every_trade_of_a_symbol(recordings: Path, proof: Proof, symbol: str, tier: str) -> None:
    """`k2 query trades SYMBOL --tier T --limit 0` gives the trades of all exchanges, in time order."""
    found = proof.rows(f"command_{symbol}_{tier}")
    times = found["exchange_ns"].to_pylist()

    assert_same(as_rows(found), [row for row in expected_trades(recordings) if row.symbol == symbol])
    assert times == sorted(times)


@pytest.mark.parametrize("tier", TIERS)
def test_every_quote_comes_out_of_every_tier(recordings: Path, proof: Proof, tier: str) -> None:
    """Best bids and asks, each with its exact values and its own time of receipt."""
    found = proof.rows(f"quotes_{tier}")
    columns = [found[name].to_pylist() for name in QuoteRow._fields]
    rows = Counter(QuoteRow(*values) for values in zip(*columns, strict=True))
    expected = expected_quotes(recordings)

    counts = Counter(row.exchange for row in rows.elements())
    assert {exchange: counts[exchange] for exchange in README_QUOTES} == README_QUOTES
    assert counts == Counter(row.exchange for row in expected.elements())
    assert rows == expected


@pytest.mark.parametrize("table", ["gaps", "dead_letters"])
def test_no_hole_and_nothing_unreadable(proof: Proof, table: str) -> None:
    """The README tells of no hole in the ids; and every message is understood."""
    found = [proof.rows(f"{table}_{tier}").to_pylist() for tier in TIERS]

    assert found == [[], [], []]


def test_every_message_is_kept_as_received(proof: Proof) -> None:
    """Cold `frames` holds the README's number of messages of each exchange, and the REST answers."""
    messages = {row["exchange"]: int(row["frames"]) for row in proof.told("frames") if row["kind"] == "frame"}
    answers = sum(int(row["frames"]) for row in proof.told("frames") if row["source"] == "backfill")

    assert messages == {exchange: sum(files.values()) for exchange, files in FILES.items()}
    assert answers == 13 + 1  # 12,477 aggregates by 1,000, and Kraken's one


def test_second_import_adds_nothing(proof: Proof) -> None:
    """Every file again: no frame added, nothing to ingest, nothing to move."""
    first = {one["file"]: one["frames_added"] for n in (1, 2) for one in proof.told(f"import_{n}")}
    again = {one["file"]: (one["frames_added"], one["frames_present"]) for one in proof.told("import_again")}

    assert again == {file: (0, added) for file, added in first.items()}
    assert not any(proof.told("ingest_again").values())
    assert not any(proof.told("offload_again").values())


def test_stages_count_what_they_move(recordings: Path, proof: Proof) -> None:
    """What ingest and offload say they moved in two rounds is what there is."""
    for stage in ("ingest", "offload"):
        moved = Counter(proof.told(f"{stage}_1")) + Counter(proof.told(f"{stage}_2"))
        assert moved["trades"] == len(expected_trades(recordings))
        assert moved["quotes"] == proof.rows("quotes_all").num_rows
        assert moved["frames"] == sum(int(row["frames"]) for row in proof.told("frames"))


def test_as_of_a_snapshot_is_what_was_known_then(recordings: Path, proof: Proof) -> None:
    """The snapshot of the first round gives the first round's trades, by command and by client; the last all."""
    early = expected_trades(recordings, first_round_only=True)

    assert_same(as_rows(proof.rows("trades_first")), early)
    assert_same(as_rows(proof.rows("command_as_of")), [row for row in early if row.symbol == "BTC-USDT"])
    assert_same(as_rows(proof.rows("trades_last")), expected_trades(recordings))


def test_symbols_are_those_of_the_recordings(proof: Proof) -> None:
    """Every market of the README is listed."""
    assert {(exchange, symbol) for exchange, symbol, _ in README} <= {tuple(pair) for pair in proof.told("symbols")}


# Candles.

EVERYWHERE = (*TIERS, "last")  # the tiers, and as of the last snapshot of trades


def candles(proof: Proof, name: str) -> dict[int, dict[str, Any]]:
    """Return kept candles by their start in seconds; fails where one is twice."""
    rows = proof.rows(name).to_pylist()
    by_start = {row["start_ns"] // 10**9: row for row in rows}
    assert len(by_start) == len(rows)
    return by_start


def assert_equal(found: dict[str, Any], own: dict[str, str], names: Sequence[str] = ()) -> None:
    """Compare one candle with the exchange's own in open, high, low, close, volume and further columns."""
    ours = {name: found[name] for name in ("open", "high", "low", "close", "volume", *names)}
    assert ours == {name: Decimal(own[name]) for name in ours}, found["start_time"]


def vwap(found: dict[str, Any]) -> Decimal:
    with localcontext(prec=80):
        exact = Decimal(found["quote_volume"]) / found["volume"]
        return exact.quantize(Decimal(1).scaleb(-18), rounding=ROUND_DOWN)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("how", EVERYWHERE)
def test_spot_candles_are_the_exchanges_own(recordings: Path, proof: Proof, how: str) -> None:
    """BTCUSDT, five minutes from 23:55 and from 00:00: open, high, low, close and volume to the last digit."""
    own = {
        int(row["open_time"]) // 1_000: row
        for row in read_csv(recordings / "binance/official_candles/spot_BTCUSDT_5m_20240808.csv")
    }
    found = candles(proof, f"candles_spot_{how}")

    for start in (1723161300, 1723161600):
        assert_equal(found[start], own[start])


@pytest.mark.parametrize("tier", ["hot", "cold"])
def test_command_gives_the_same_candles(proof: Proof, tier: str) -> None:
    """`k2 candles` prints what the client returns."""
    assert proof.rows(f"command_candles_{tier}").equals(proof.rows(f"candles_spot_{tier}"))


@pytest.mark.parametrize("how", EVERYWHERE)
def test_usdm_candles_are_the_exchanges_own(recordings: Path, proof: Proof, how: str) -> None:
    """Seven whole minutes of USD-M BTCUSDT in all fields: quote volume, taker buy volume and count too."""
    own = {
        int(row["open_time"]) // 1_000: row
        for row in read_csv(recordings / "binance/official_candles/usdm_BTCUSDT_1m_20240718.csv")
    }
    found = candles(proof, f"candles_usdm_{how}")

    for minute in range(7):  # 23:58 to 00:04
        start = 1721347080 + 60 * minute
        names = {**own[start], "buy_volume": own[start]["taker_buy_volume"], "trade_count": own[start]["count"]}
        assert_equal(found[start], names, ("quote_volume", "buy_volume", "trade_count"))
        assert found[start]["vwap"] == vwap(found[start])


@pytest.mark.parametrize("how", EVERYWHERE)
def test_kraken_candles_are_the_exchanges_own(recordings: Path, proof: Proof, how: str) -> None:
    """All 272 minutes with trades equal the exchange's; in its other 137 minutes there is no candle."""
    text = gzip.decompress((recordings / "kraken/rest/ohlc_1m_XBTUSDT_20251110.json.gz").read_bytes())
    columns = ("start", "open", "high", "low", "close", "vwap", "volume", "trade_count")
    own = {row[0]: dict(zip(columns, row, strict=True)) for row in json.loads(text)["result"]["XBTUSDT"]}
    found = candles(proof, f"candles_kraken_{how}")
    inside = range(min(found) + 60, max(found), 60)  # the first and the last minute are cut

    with_trades = [start for start in inside if own[start]["trade_count"]]
    assert len(with_trades) == 272
    assert len(inside) - len(with_trades) == 137
    assert [start for start in inside if start in found] == with_trades
    for start in with_trades:
        assert_equal(found[start], own[start], ("trade_count",))


@pytest.mark.parametrize("how", EVERYWHERE)
def test_xrpeth_candles_equal_those_other_software_made(recordings: Path, proof: Proof, how: str) -> None:
    """Candles of aggregates: 2,469 minutes equal freqtrade's, no more and no less."""
    path = recordings / "binance/rest/candles_1m_XRPETH_20191011_by_freqtrade.csv"
    own = {int(row["open_time"]) // 1_000: row for row in read_csv(path)}
    found = candles(proof, f"candles_xrpeth_{how}")

    assert len(own) == 2_469
    assert list(found) == list(own)
    for start, row in own.items():
        assert_equal(found[start], row)


@pytest.mark.parametrize("name", ["spot", "usdm", "kraken", "xrpeth"])
def test_tiers_and_snapshot_give_the_same_candles(proof: Proof, name: str) -> None:
    """Hot, cold, union and the snapshot of trades agree in every column but the revision."""
    tables = [proof.rows(f"candles_{name}_{how}").drop_columns("revision") for how in EVERYWHERE]

    assert all(table.equals(tables[0]) for table in tables[1:])


def test_candle_that_grew_has_a_later_revision(proof: Proof) -> None:
    """The first round held one second of the candle from 00:00; the second round revised it in cold."""
    midnight = 1723161600
    early, late = candles(proof, "candles_spot_first"), candles(proof, "candles_spot_cold")
    revisions = {start: candle["revision"] for start, candle in late.items()}

    assert 0 < early[midnight]["trade_count"] < late[midnight]["trade_count"]
    assert revisions[midnight] > revisions[midnight - 300]
