"""Rows read straight from the files are those an engine would give."""

from __future__ import annotations

import math
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pytest
from cold_rows import DAY, T0, rows_of
from hypothesis import given, settings
from hypothesis import strategies as st

from k2.cold.iceberg import IcebergCold
from k2.cold.whole import read_whole
from k2.errors import StoreDown, TimedOut
from k2.model import Selection
from k2.schema import TRADES, arrow_schema
from k2.settings import Settings

ORDER = [(name, "ascending") for name in ("exchange_ns", "exchange", "symbol", "trade_id", "log_offset")]
ROWS = 40


def filled(folder: Path) -> tuple[IcebergCold, pa.Table]:
    """A cold tier of eight files (two days, two exchanges, each half of one symbol), and all of its rows."""
    cold, made = IcebergCold(Settings(data=str(folder))), []
    for number in range(8):
        exchange, start = ("binance", "kraken")[number % 2], number // 2 * ROWS
        rows = rows_of("trades", start, start + ROWS, day=number // 4, exchange=exchange)
        names = pa.array([("a", "b")[number // 2 % 2]] * ROWS)
        rows = rows.set_column(1, rows.schema.field("symbol"), names)
        rows = rows.set_column(
            rows.column_names.index("logged_ns"), rows.schema.field("logged_ns"), pa.array(range(start, start + ROWS))
        )
        cold.append("trades", rows, start={exchange: start}, end={exchange: start + ROWS})
        made.append(rows)
    return cold, pa.concat_tables(made)


@pytest.fixture(scope="module")
def tier(tmp_path_factory: pytest.TempPathFactory):
    """The tier of `filled`."""
    cold, rows = filled(tmp_path_factory.mktemp("cold"))
    yield cold, rows
    cold.close()


def directly(cold: IcebergCold, selection: Selection, deadline: float = math.inf) -> pa.Table | None:
    """What `read_whole` gives, sorted, names as text."""
    with cold.reader.cursor("test", None) as cursor:
        rows = read_whole(cursor, cold.pin("trades"), TRADES, selection, cold.folder / "warehouse", deadline)
    return None if rows is None else rows.cast(arrow_schema(TRADES)).sort_by(ORDER)


def chosen(rows: pa.Table, selection: Selection) -> list[dict]:
    """The rows of a selection, one by one."""
    least, most = selection.start_ns, selection.end_ns
    return [
        row
        for row in rows.sort_by(ORDER).to_pylist()
        if selection.symbol in (None, row["symbol"])
        and selection.exchange in (None, row["exchange"])
        and (least is None or row["exchange_ns"] >= least)
        and (most is None or row["exchange_ns"] < most)
        and (selection.logged_before_ns is None or row["logged_ns"] < selection.logged_before_ns)
    ]


# On and beside the first and last rows of files, in their middle, and outside of all.
TIMES = st.none() | st.builds(
    lambda day, row, step: T0 + day * DAY + row * 10**9 + row % 1000 + step,
    st.integers(0, 2),
    st.sampled_from([0, 1, 20, 39, 40, 41, 79, 80, 120, 159]),
    st.integers(-1, 1),
)


@settings(max_examples=150, deadline=None)
@given(
    st.builds(
        Selection,
        table=st.just("trades"),
        symbol=st.sampled_from([None, "a", "b", "c"]),
        exchange=st.sampled_from([None, "binance", "kraken", "other"]),
        start_ns=TIMES,
        end_ns=TIMES,
        logged_before_ns=st.sampled_from([None, 0, 20, 40, 41, 160]),
    )
)
def test_a_selection_gives_the_same_rows_both_ways(tier: tuple[IcebergCold, pa.Table], selection: Selection) -> None:
    """Whole files, parts of files, and both; what is mostly parts is left to the engine."""
    cold, rows = tier
    expected = chosen(rows, selection)
    found = directly(cold, selection)

    assert found is None or found.to_pylist() == expected
    assert cold.read(cold.pin("trades"), selection).sort_by(ORDER).to_pylist() == expected


def test_whole_files_are_read_directly_and_parts_of_files_are_not(tier: tuple[IcebergCold, pa.Table]) -> None:
    """The files' own statistics decide."""
    cold, _ = tier

    assert directly(cold, Selection("trades")).num_rows == 8 * ROWS
    assert directly(cold, Selection("trades", symbol="a", exchange="kraken")).num_rows == 2 * ROWS
    assert directly(cold, Selection("trades", start_ns=T0, end_ns=T0 + 50 * 10**9)).num_rows == 2 * 50
    last = T0 + 79 * 10**9 + 79  # of two of the four files
    assert directly(cold, Selection("trades", end_ns=last)).num_rows == 2 * 79
    assert directly(cold, Selection("trades", end_ns=last + 1)).num_rows == 2 * 80
    assert directly(cold, Selection("trades", start_ns=T0, end_ns=last)).num_rows == 2 * 79
    assert directly(cold, Selection("trades", start_ns=T0 + 10**9, end_ns=T0 + 9 * 10**9)) is None


def test_a_reading_ends_at_its_deadline(tier: tuple[IcebergCold, pa.Table]) -> None:
    """Between two files at the latest."""
    cold, _ = tier

    with pytest.raises(TimedOut):
        directly(cold, Selection("trades"), time.monotonic())


def test_a_file_that_is_gone_or_cut_is_told() -> None:
    """Never rows of half of the files."""
    with tempfile.TemporaryDirectory() as folder:
        cold, _ = filled(Path(folder))
        file = next((Path(folder) / "cold" / "warehouse").rglob("*.parquet"))
        data = file.read_bytes()

        for left in (data[: len(data) // 2], None):
            file.write_bytes(left) if left is not None else file.unlink()
            with pytest.raises(StoreDown):
                directly(cold, Selection("trades"))
        cold.close()
