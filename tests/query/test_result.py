"""Frames hold what the rows hold."""

from __future__ import annotations

import sys
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest

from k2.query.result import Result
from k2.schema import TRADES, arrow_schema

sys.path.insert(0, str(Path(__file__).parents[1] / "cold"))
from cold_rows import rows_of


@pytest.mark.parametrize("symbols", [1, 2, 127, 128, 300])
@pytest.mark.parametrize("coded", [False, True])
def test_names_of_frames_are_categories_of_the_same_text(symbols: int, coded: bool) -> None:
    """However many names there are, in however many pieces, as text or as dictionaries of their own."""
    names = [f"S{number * 7 % symbols}" for number in range(400)]
    rows = rows_of("trades", 0, 400)
    rows = rows.set_column(1, rows.schema.field("symbol"), pa.array(names))
    pieces = [rows.slice(0, 150), rows.slice(150)]
    if coded:
        field = pa.field("symbol", pa.dictionary(pa.int32(), pa.string()), nullable=False)
        pieces = [piece.set_column(1, field, piece["symbol"].combine_chunks().dictionary_encode()) for piece in pieces]
    found = Result(pa.concat_tables(pieces), TRADES)

    pandas, polars = found.pandas(), found.polars()
    assert pandas["symbol"].dtype == "category"
    assert pandas["symbol"].tolist() == polars["symbol"].to_list() == names
    assert polars["symbol"].dtype == pl.Categorical
    assert pandas["price"].tolist() == polars["price"].to_list() == rows["price"].to_pylist()
    assert found.arrow().select(arrow_schema(TRADES).names).to_pylist() == rows.to_pylist()
    assert found.arrow().schema.field("symbol").type == pa.string()


def test_no_rows_make_an_empty_frame_of_the_same_columns() -> None:
    """Also where names are dictionaries without any name."""
    found = Result(rows_of("trades", 0, 0), TRADES)

    assert (len(found.pandas()), len(found.polars())) == (0, 0)
    assert found.polars().columns == found.arrow().column_names
