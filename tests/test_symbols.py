"""Symbols: one canonical form for every spelling."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2.errors import UnknownName
from k2.symbols import canonical, is_canonical, join


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("BTC-USDT", "BTC-USDT"), ("btc/usdt", "BTC-USDT"), ("BTCUSDT", "BTC-USDT"), ("BTC_USDT", "BTC-USDT"),
        ("XBT/USD", "BTC-USD"), ("XDG-EUR", "DOGE-EUR"), ("XRPETH", "XRP-ETH"), ("BTC/USDT:USDT", "BTC-USDT-PERP"),
        ("btc-usdt-perp", "BTC-USDT-PERP"), ("BTC_USDT_240927", "BTC-USDT-240927"), (" ethbtc ", "ETH-BTC"),
        ("1000SATSFDUSD", "1000SATS-FDUSD"), ("XBTUSD", "BTC-USD"), ("BTCUSDT-PERP", "BTC-USDT-PERP"),
    ],
)  # fmt: skip
def test_every_spelling_is_understood(text: str, expected: str):
    """As exchanges, ccxt and people write them."""
    assert canonical(text) == expected


@pytest.mark.parametrize(
    "text", ["", "BTC", "USDT", "B T C-USD", "BTC-USD-PERP-X", "'; DROP TABLE trades", "../x-y", "-"]
)
def test_what_is_no_symbol_is_refused(text: str):
    """The message says how to write one."""
    with pytest.raises(UnknownName, match="BASE"):
        canonical(text)


@given(
    st.from_regex(r"[A-Z0-9]{1,10}", fullmatch=True),
    st.from_regex(r"[A-Z0-9]{1,10}", fullmatch=True),
    st.sampled_from(["", "PERP", "240927"]),
)
def test_canonical_symbols_stay_as_they_are(base: str, quote: str, suffix: str):
    """Whatever `join` makes is canonical already."""
    symbol = join(base, quote, suffix)

    assert is_canonical(symbol)
    assert canonical(symbol) == symbol
