"""Answers as text and files."""

from __future__ import annotations

import csv
import io
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2.errors import Rejected, UnknownName
from k2.query.output import decimal_texts, write
from k2.query.result import Result
from k2.schema import DEAD_LETTERS, TABLES, TRADES, Type, arrow_schema

TRADE: dict[str, Any] = {
    "exchange": "kraken",
    "symbol": "BTC-USD",
    "trade_id": 9_007_199_254_740_993,
    "kind": "trade",
    "first_id": 1,
    "last_id": 1,
    "price": Decimal("61837.63"),
    "amount": Decimal("0.000000000001"),
    "side": "buy",
    "off_market": False,
    "occurrence": 0,
    "exchange_ns": 1_723_075_200_123_456_789,
    "received_ns": 1_723_075_200_200_000_000,
    "source": "live",
    "log_partition": "kraken",
    "log_offset": 3,
    "row_in_frame": 0,
    "logged_ns": 1_723_075_200_300_000_000,
}
ROWS = pa.Table.from_pylist([TRADE], schema=arrow_schema(TRADES))


def written(rows: pa.Table, fmt: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    write(rows, fmt, stream, **options)
    return stream.getvalue()


def test_json_keeps_every_digit() -> None:
    """Decimals are text without padding or exponent, integers whole, and the time also ISO."""
    (row,) = json.loads(written(ROWS, "json", table=TRADES))

    assert row["price"] == "61837.63"
    assert row["amount"] == "0.000000000001"
    assert row["trade_id"] == 9_007_199_254_740_993
    assert row["exchange_ns"] == 1_723_075_200_123_456_789
    assert row["exchange_time"] == "2024-08-08T00:00:00.123456789Z"


def test_csv_and_ndjson_say_the_same_as_json() -> None:
    """The text formats differ in form only."""
    (row,) = json.loads(written(ROWS, "json", table=TRADES))
    (line,) = csv.DictReader(io.StringIO(written(ROWS, "csv", table=TRADES).decode()))

    assert line == {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in row.items()}
    assert json.loads(written(ROWS, "ndjson", table=TRADES)) == row


CELLS = st.one_of(st.none(), st.text(st.characters(codec="utf-8"), max_size=8))


@given(
    st.lists(st.tuples(CELLS, st.none() | st.integers(-(2**63), 2**63 - 1), st.none() | st.booleans()), min_size=1),
    st.text(st.characters(codec="utf-8"), max_size=5),
)
def test_json_put_together_by_columns_reads_back_the_same(
    cells: list[tuple[str | None, int | None, bool | None]], name: str
) -> None:
    """Quotes, backslashes, control characters and nulls, in cells and in the names of columns of free SQL."""
    kinds = (pa.string(), pa.int64(), pa.bool_())
    names = [name, name + "i", name + "b"]
    columns = [pa.array(values, kind) for values, kind in zip(zip(*cells, strict=True), kinds, strict=True)]
    rows = pa.table(columns, names=names)
    expected = [dict(zip(names, row, strict=True)) for row in cells]

    assert json.loads(written(rows, "json")) == expected
    assert [json.loads(line) for line in written(rows, "ndjson").split(b"\n")[:-1]] == expected


@pytest.mark.parametrize("name", ["trades", "dead_letters", "candles"])
def test_json_of_few_rows_is_that_of_many(name: str) -> None:
    """A row is written the same, to the letter, by itself and among a hundred."""
    table = TABLES[name]
    ugly = {
        Type.NAME: "x\"y", Type.TEXT: "\u2028\n", Type.BYTES: b"\xff", Type.BOOL: True, Type.INT: -(2**63),
        Type.NS: 1, Type.DECIMAL: Decimal("-0.000000000001"), Type.WIDE: Decimal("12000000000000000000"),
    }  # fmt: skip
    row = {column.name: ugly[column.type] for column in table.columns if not column.derived_from}
    many = pa.Table.from_pylist([row] * 100, schema=arrow_schema(table))

    lines = written(many, "ndjson", table=table).splitlines(keepends=True)
    assert len(lines) == 100
    assert set(lines) == {written(many.slice(0, 1), "ndjson", table=table)}


@pytest.mark.parametrize("fmt", ["parquet", "arrow"])
def test_binary_formats_keep_types_and_add_timestamps(fmt: str, tmp_path: Path) -> None:
    """Parquet and Arrow hold decimal128 and int64, and the derived timestamp beside."""
    path = tmp_path / f"trades.{fmt}"

    write(Result(ROWS, TRADES).arrow(), fmt, path)

    read = pyarrow.parquet.read_table(path) if fmt == "parquet" else pa.ipc.open_stream(path.read_bytes()).read_all()
    assert read.select(ROWS.column_names).cast(ROWS.schema).equals(ROWS)
    assert read.schema.field("exchange_time").type == pa.timestamp("us", "UTC")


def test_rows_of_a_result_know_their_table() -> None:
    """Whoever writes `Result.arrow()` need not say again which table it is."""

    assert written(Result(ROWS, TRADES).arrow(), "json") == written(ROWS, "json", table=TRADES)


def test_table_shows_the_main_columns() -> None:
    """People see the time first, and no lineage."""
    text = written(ROWS, "table", table=TRADES).decode()

    assert text.split()[0] == "exchange_time"
    assert "61837.63" in text
    assert "log_offset" not in text


@pytest.mark.parametrize("fmt", ["table", "csv", "json", "ndjson", "parquet", "arrow"])
def test_no_rows_are_written_in_every_format(fmt: str) -> None:
    """An empty answer is a valid file of its format."""
    text = written(ROWS.slice(0, 0), fmt, table=TRADES)

    if fmt == "json":
        assert json.loads(text) == []
    if fmt == "csv":
        assert text.decode().startswith("exchange,symbol,trade_id")


def test_bytes_that_are_no_text_are_marked() -> None:
    """Frames are shown as the text they are; broken ones as base64."""
    letters = [dict.fromkeys(("exchange", "reason", "detail", "source", "log_partition"), "x")] * 2
    numbers = dict.fromkeys(("received_ns", "log_offset", "row_in_frame", "logged_ns"), 1)
    frames = [b'{"a":"b,c"}', b"\xff"]
    rows = [{**letter, **numbers, "frame": frame} for letter, frame in zip(letters, frames, strict=True)]
    table = pa.Table.from_pylist(rows, schema=arrow_schema(DEAD_LETTERS))

    lines = list(csv.DictReader(io.StringIO(written(table, "csv", table=DEAD_LETTERS).decode())))

    assert [line["frame"] for line in lines] == ['{"a":"b,c"}', "base64:/w=="]


def test_free_sql_columns_are_written() -> None:
    """Lists, nulls, floats and timestamps of a statement have a text form."""
    rows = pa.table({"l": [[1, 2], None], "f": [0.5, None], "t": pa.array([1, None], pa.timestamp("us", "UTC"))})

    assert json.loads(written(rows, "json")) == [
        {"l": [1, 2], "f": 0.5, "t": "1970-01-01T00:00:00.000001000Z"},
        {"l": None, "f": None, "t": None},
    ]
    assert written(rows, "csv").decode().splitlines()[1] == '"[1,2]",0.5,1970-01-01T00:00:00.000001000Z'


@given(st.lists(st.decimals(-(10**20), 10**20, places=12) | st.integers(-9, 9).map(lambda i: i * Decimal("1e-12"))))
def test_decimal_text_is_exact_and_plain(values: list[Decimal]) -> None:
    """Text reads back to the same number, without exponent or trailing zeros."""
    texts = decimal_texts(pa.chunked_array([pa.array(values, pa.decimal128(38, 12))])).to_pylist()

    assert [Decimal(text) for text in texts] == values
    assert all("E" not in text and not (("." in text) and text[-1] in "0.") and text != "-0" for text in texts)


def test_file_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    """A missing folder is one clear message, and nothing is left behind."""

    with pytest.raises(Rejected, match="No such file or directory"):
        write(ROWS, "csv", tmp_path / "missing" / "trades.csv", table=TRADES)
    assert list(tmp_path.iterdir()) == []


def test_unknown_format_is_named_with_the_nearest() -> None:
    """A misspelt format is refused."""

    with pytest.raises(UnknownName, match="did you mean 'parquet'"):
        written(ROWS, "parkett")
