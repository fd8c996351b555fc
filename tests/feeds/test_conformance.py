"""Every exchange keeps the rules of the port, and the suite notices when one does not."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2.errors import BadFrame, Misconfigured
from k2.feeds.base import Control, Request
from k2.feeds.conformance import Case, cases, check, main, parsed_or_bad
from k2.feeds.kraken import Kraken
from k2.feeds.registry import OWN, get
from k2.model import FRAME, LIVE, OPENED, Frame, Parsed

FRAMES = Path(__file__).parents[1] / "frames"
KEYS = ["stream", "data", "e", "s", "t", "p", "q", "T", "m", "channel", "type", "events", "trades"]
CASES = [(name, case) for name in sorted(OWN) for case in cases(FRAMES / name)]


@pytest.mark.parametrize("name", sorted(OWN))
def test_exchange_conforms(name: str) -> None:
    """Each exchange gives the written meaning of each of its frames and keeps every rule."""
    assert check(get(name), FRAMES / name) == []


@given(st.sampled_from(CASES), st.data())
@settings(max_examples=400, deadline=None)
def test_damaged_frame_is_bad_or_rows(pair: tuple[str, Case], data: st.DataObject) -> None:
    """However a frame is damaged, parsing gives rows or BadFrame, and control an answer."""
    name, case = pair
    start = data.draw(st.integers(0, len(case.data)))
    end = data.draw(st.integers(start, len(case.data)))
    damaged = case.data[:start] + data.draw(st.binary(max_size=20)) + case.data[end:]

    parsed_or_bad(get(name), case.frame(damaged))
    assert isinstance(get(name).control(damaged), Control)


@given(
    st.sampled_from(sorted(OWN)),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(KEYS), inner),
        max_leaves=20,
    ),
)
@settings(max_examples=200, deadline=None)
def test_any_json_is_bad_or_rows(name: str, value: object) -> None:
    """A well-formed message of any shape gives rows or BadFrame."""
    data = msgspec.json.encode(value)

    parsed_or_bad(get(name), Frame(FRAME, LIVE, "c", 0, 0, 1, data))
    assert isinstance(get(name).control(data), Control)


@pytest.mark.parametrize("name", sorted(OWN))
def test_bad_frame_names_exchange_and_data(name: str) -> None:
    """The error of a bad frame says whose it was, what was wrong, and shows the data cut short."""
    with pytest.raises(BadFrame, match=rf"^{name}: frame cannot be parsed: .*\(in .*bytes more\)"):
        get(name).parse(Frame(FRAME, LIVE, "c", 0, 0, 1, b"x" * 1_000))


@pytest.mark.parametrize("name", sorted(OWN))
def test_connection_events_hold_no_rows(name: str) -> None:
    """Frames that record the connection itself are parsed to nothing."""
    assert get(name).parse(Frame(OPENED, LIVE, "c", 0, 0, 1, b"", "wss://x")) == Parsed()


@pytest.mark.parametrize("name", sorted(OWN))
def test_requests_split_many_symbols_without_losing_one(name: str) -> None:
    """All streams of many symbols are asked for, each acknowledgement key once."""
    exchange = get(name)
    suffix = "-PERP" if name == "binance-usdm" else ""
    symbols = [f"A{i}-USDT{suffix}" for i in range(exchange.limits.symbols_per_connection)]
    texts = "".join(request.text.lower() for request in exchange.requests(symbols, ["trades", "quotes", "book"]))

    for symbol in symbols:
        assert texts.count(f'"{exchange.to_native(symbol).lower()}') == 3


class _Rounding(Kraken):
    """Turns prices into floats on the way."""

    def parse(self, frame: Frame) -> Parsed:
        parsed = super().parse(frame)
        trades = [msgspec.structs.replace(trade, price=str(float(trade.price))) for trade in parsed.trades]
        return Parsed(trades, parsed.quotes)


class _Fragile(Kraken):
    """Lets other exceptions out of parse."""

    def parse(self, frame: Frame) -> Parsed:
        if b"{" not in frame.data:
            raise KeyError("channel")
        return super().parse(frame)


class _Nervous(Kraken):
    """Its control raises."""

    def control(self, data: bytes) -> Control:
        msgspec.json.decode(data)
        return super().control(data)


class _Counting(Kraken):
    """Gives another answer at every call."""

    def parse(self, frame: Frame) -> Parsed:
        self.calls = getattr(self, "calls", 0) + 1
        parsed = super().parse(frame)
        return Parsed([msgspec.structs.replace(trade, occurrence=self.calls) for trade in parsed.trades], parsed.quotes)


class _Deaf(Kraken):
    """Expects acknowledgements that never come."""

    def requests(self, symbols: object, channels: object) -> list[Request]:
        return [Request("{}", frozenset({"nobody-sends-this"}))]


@pytest.mark.parametrize(
    ("exchange", "told"),
    [
        (_Rounding(), "does not stand in the frame with these digits"),
        (_Fragile(), "parse raised KeyError"),
        (_Nervous(), "control raised DecodeError"),
        (_Counting(), "parse is not pure"),
        (_Deaf(), "no case acknowledges what requests"),
    ],
)
def test_suite_notices_a_broken_exchange(exchange: Kraken, told: str) -> None:
    """Each rule broken on purpose gives a violation that names it."""
    violations = check(exchange, FRAMES / "kraken")

    assert any(told in violation for violation in violations), violations[:3]


def test_suite_notices_a_folder_with_too_few_cases(tmp_path: Path) -> None:
    """A folder without trades, quotes, refusals and bad frames is not enough to conform."""
    (tmp_path / "beat.json").write_text('{"channel":"heartbeat"}')
    (tmp_path / "beat.expected.json").write_text('{"source":"test","control":"heartbeat"}')

    violations = check(get("kraken"), tmp_path)

    assert {"the folder has no case of a trade", "the folder has no case of a bad frame"} <= set(violations)


def test_empty_folder_and_unreadable_case_are_refused(tmp_path: Path) -> None:
    """A folder without a case, and a case that does not fit, give one clear error."""
    with pytest.raises(Misconfigured, match="holds no case"):
        cases(tmp_path)
    (tmp_path / "x.expected.json").write_text('{"source":"test","tradse":[]}')
    with pytest.raises(Misconfigured, match="tradse"):
        cases(tmp_path)


def test_command_reports_and_exits(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The command ends with 0 for an exchange that conforms, otherwise with the reason."""
    assert main(["kraken", str(FRAMES / "kraken")]) == 0
    assert "kraken: 0 violations" in capsys.readouterr().out
    assert main(["krakn", str(tmp_path)]) == 64
    assert "did you mean 'kraken'" in capsys.readouterr().err
    assert main([]) == 64
