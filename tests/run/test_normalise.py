"""Normalising: rows, repeats, holes and dead letters of one partition."""

from __future__ import annotations

import json

import pytest

from k2.feeds import registry
from k2.model import FRAME, IMPORT, LIVE, OPENED, Frame, LogBatch
from k2.run.accounting import IdLedger
from k2.run.ingest import TABLES
from k2.run.normalise import BadValue, Normaliser, PartitionState, Row, decimal_text, to_arrow
from k2.schema import TABLES as SCHEMAS
from k2.schema import arrow_schema

NOW_MS = 1_750_000_000_000


def trade(trade_id: int, price: str = "100.10", amount: str = "0.5", maker: bool = False, **other: object) -> bytes:
    """A Binance spot trade message, after the exchange's documentation."""
    message = {
        "e": "trade", "E": NOW_MS, "s": "BTCUSDT", "t": trade_id, "p": price, "q": amount,
        "T": NOW_MS + trade_id, "m": maker, "M": True, **other,
    }  # fmt: skip
    return json.dumps(message).encode()


def quote(update_id: int, bid: str = "100.0", ask: str = "100.2") -> bytes:
    return json.dumps({"u": update_id, "s": "BTCUSDT", "b": bid, "B": "1", "a": ask, "A": "2"}).encode()


def frame(data: bytes, *, connection: str = "c1", epoch: int = 0, source: str = LIVE, kind: str = FRAME) -> Frame:
    return Frame(kind, source, connection, epoch, 0, NOW_MS * 10**6, data)


def normalise(frames: list[Frame], ledgers: dict[tuple[str, str], IdLedger] | None = None) -> dict[str, list[Row]]:
    rows: dict[str, list[Row]] = {table: [] for table in TABLES}
    normaliser = Normaliser(registry.get("binance"), {} if ledgers is None else ledgers, PartitionState())
    normaliser.normalise(LogBatch("binance", 0, 7, frames), rows)
    return rows


def columns(rows: dict[str, list[Row]], table: str, *names: str) -> list[tuple[object, ...]]:
    order = [field.name for field in arrow_schema(SCHEMAS[table])]
    return [tuple(row[order.index(name)] for name in names) for row in rows[table]]


def test_a_trade_becomes_a_row_with_the_takers_side():
    """The buyer being the maker means that the taker sold."""
    rows = normalise([frame(trade(1, maker=True)), frame(trade(2))])

    assert columns(rows, "trades", "symbol", "trade_id", "price", "side", "log_offset", "logged_ns") == [
        ("BTC-USDT", 1, "100.10", "sell", 0, 7),
        ("BTC-USDT", 2, "100.10", "buy", 1, 7),
    ]


def test_a_repeated_trade_is_dropped_and_counted():
    """Overlapping connections send a trade twice; it is stored once."""
    ledgers: dict[tuple[str, str], IdLedger] = {}
    rows = normalise([frame(trade(1)), frame(trade(2)), frame(trade(2), connection="c2")], ledgers)

    assert columns(rows, "trades", "trade_id") == [(1,), (2,)]
    assert ledgers["BTC-USDT", "trade"].repeats == 1


@pytest.mark.parametrize(
    ("between", "source", "cause"),
    [([], LIVE, "skipped"), ([frame(b"", kind=OPENED)], LIVE, "reconnect"), ([], IMPORT, "import")],
)
def test_a_hole_is_a_gap_row_with_its_cause(between: list[Frame], source: str, cause: str):
    """Ids 2 and 3 are missing; what stands between the neighbours tells why."""
    rows = normalise([frame(trade(1)), *between, frame(trade(4), source=source)])

    assert columns(rows, "gaps", "status", "first_id", "last_id", "missing", "cause") == [("open", 2, 3, 2, cause)]


def test_a_frame_that_cannot_be_parsed_is_parked_and_the_rest_goes_on():
    """The dead letter holds the bytes, the reason and the offset."""
    rows = normalise([frame(trade(1)), frame(b'{"e":"trade","s":'), frame(trade(2))])

    assert columns(rows, "trades", "trade_id") == [(1,), (2,)]
    assert columns(rows, "dead_letters", "reason", "frame", "log_offset") == [("bad_frame", b'{"e":"trade","s":', 1)]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (trade(2, price="0"), "bad_price"),
        (trade(2, price="-1"), "bad_price"),
        (trade(2, price="NaN"), "bad_frame"),
        (trade(2, price="0.1234567890123"), "bad_price"),
        (trade(2, amount="1" + "0" * 26), "bad_amount"),
        (trade(2, T=1), "bad_frame"),
    ],
)
def test_a_row_that_fails_validation_is_parked_and_its_id_stays_missing(message: bytes, reason: str):
    """A bad value never becomes a row, and the ledger does not count its id as seen."""
    rows = normalise([frame(trade(1)), frame(message), frame(trade(3))])

    assert columns(rows, "dead_letters", "reason") == [(reason,)]
    assert columns(rows, "gaps", "first_id", "last_id") == [(2, 2)]


def test_quotes_repeat_across_connections_only():
    """One connection's updates are kept, a second connection's copies dropped."""
    rows = normalise([frame(quote(5)), frame(quote(6)), frame(quote(5), connection="c2"), frame(quote(6), epoch=1)])

    assert columns(rows, "quotes", "update_id") == [(5,), (6,)]


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("0.00005100", "0.00005100"), ("2.5e-05", "0.000025"), ("3.844E-5", "0.00003844"), ("1e-12", "0.000000000001"),
        ("0.0000000000010000", "0.000000000001"), ("1e25", "1" + "0" * 25), (".5", "0.5"), ("0e-99999", "0"),
    ],
)  # fmt: skip
def test_every_way_to_write_a_number_keeps_its_value(text: str, plain: str):
    """Plain text passes unchanged; exponents are written out exactly."""
    assert decimal_text(text, "price") == plain


@pytest.mark.parametrize("text", ["", "NaN", "inf", "-1", "1_0", "1e26", "1e999999", "1e-13", "1" * 27, "0x1", "١"])
def test_what_is_no_number_of_this_size_is_refused(text: str):
    """The message names the value."""
    with pytest.raises(BadValue):
        decimal_text(text, "amount")


def test_rows_become_exact_decimals():
    """No digit of the exchange's text is lost on the way to Arrow."""
    rows = normalise([frame(trade(1, price="61837.630000000001", amount="0.00000001"))])
    table = to_arrow("trades", rows["trades"])

    assert table.schema == arrow_schema(SCHEMAS["trades"])
    assert [str(value) for value in table.column("price").to_pylist()] == ["61837.630000000001"]
    assert [str(value) for value in table.column("amount").to_pylist()] == ["1.0000E-8"]
