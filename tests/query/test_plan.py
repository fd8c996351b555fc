"""Questions as people ask them."""

import pytest

from k2.errors import Rejected, UnknownName
from k2.query.plan import Cursor, ask
from k2.schema import CANDLES, TRADES

ROW = {"exchange_ns": 7, "exchange": "kraken", "symbol": "BTC-USD", "trade_id": 3, "log_offset": 2, "row_in_frame": 1}


def test_question_is_made_plain() -> None:
    """Symbols become canonical, times nanoseconds, and a limit without a start means the newest."""
    question = ask("trades", "xbt/usd", exchange=" Kraken ", end="2024-08-08", limit=5)

    assert question.symbol == "BTC-USD"
    assert question.exchange == "kraken"
    assert question.end_ns == 1_723_075_200_000_000_000
    assert question.newest


def test_limit_with_a_start_means_the_first() -> None:
    """Whoever names a start reads forward from there."""

    assert not ask("trades", "BTC-USD", start="2024-08-08", limit=5).newest


def test_as_of_digits_are_a_snapshot_and_the_rest_a_time() -> None:
    """Both kinds of as_of are told apart by how they are written."""

    assert ask("trades", as_of="8120045").snapshot_id == 8_120_045
    assert ask("trades", as_of=8_120_045).snapshot_id == 8_120_045
    assert ask("trades", as_of="2024-08-08").logged_before_ns == 1_723_075_200_000_000_000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"table": "trade"}, "did you mean 'trades'"),
        ({"table": "candles", "timeframe": "60m"}, "timeframe '60m' is unknown"),
        ({"table": "trades", "tier": "warm"}, "tier 'warm' is unknown"),
        ({"table": "candles", "timeframe": "1m", "kind": "aggregated"}, "did you mean 'aggregate'"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(arguments: dict[str, str], said: str) -> None:
    """A name nobody knows is refused, and the nearest known one is suggested."""

    with pytest.raises(UnknownName, match=said):
        ask(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("table", "arguments"),
    [
        ("trades", {"limit": -1}),
        ("trades", {"start": "2024-08-09", "end": "2024-08-08"}),
        ("trades", {"timeframe": "1m"}),
        ("trades", {"kind": "trade"}),
        ("dead_letters", {"symbol": "BTC-USD"}),
        ("frames", {"tier": "hot"}),
        ("trades", {"tier": "hot", "as_of": 1}),
        ("trades", {"as_of": 2**63}),
        ("trades", {"after": "nonsense"}),
    ],
)
def test_what_no_tier_can_answer_is_refused(table: str, arguments: dict[str, object]) -> None:
    """Contradictions are refused before anything is read."""

    with pytest.raises(Rejected):
        ask(table, **arguments)  # type: ignore[arg-type]


def test_cursor_reads_back() -> None:
    """A cursor survives its way through a URL."""
    cursor = Cursor.behind(TRADES, ROW)

    assert Cursor.decode(cursor.encode(), TRADES) == cursor


def test_cursor_of_another_table_is_refused() -> None:
    """A cursor belongs to the question it came from."""

    with pytest.raises(Rejected, match="does not belong to candles"):
        Cursor.decode(Cursor.behind(TRADES, ROW).encode(), CANDLES)
