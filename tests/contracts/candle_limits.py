"""Trades whose sums reach, and pass, the largest numbers of a candle; what every tier must make of them."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Any

AMOUNT_MOST = Decimal("9" * 26 + "." + "9" * 12)
QUOTE_MOST = Decimal("9" * 20 + "." + "9" * 18)
PRICE_MOST = Decimal("9" * 14 + "." + "9" * 12)  # the highest that ingest lets in
MANY_IDS = {"kind": "aggregate", "trade_id": 7, "first_id": 0, "last_id": 2**63 - 1}


@dataclass(frozen=True)
class Limit:
    """`count` equal trades of a minute, in what they differ from any trade; some columns of their candle."""

    count: int
    trade: dict[str, Any]
    candle: dict[str, Any]


LIMITS = {
    "a thousand of the largest trades just fit": Limit(
        1000,
        {"price": PRICE_MOST, "amount": Decimal(1000)},
        {"volume": Decimal(10**6), "quote_volume": Decimal("9" * 20 + "." + "9" * 6), "vwap": PRICE_MOST},
    ),
    "one more does not": Limit(
        1001,
        {"price": PRICE_MOST, "amount": Decimal(1000)},
        {
            "volume": Decimal(1_001_000),
            "quote_volume": QUOTE_MOST,
            "vwap": Decimal("99900099900099.900099900099900099"),
        },
    ),
    "a single trade beyond what ingest lets in": Limit(
        1,
        {"price": Decimal(10**15), "amount": Decimal(10**6)},
        {"volume": Decimal(10**6), "quote_volume": QUOTE_MOST, "vwap": Decimal("9" * 14 + "." + "9" * 18)},
    ),
    "two amounts that would wrap": Limit(
        2,
        {"price": Decimal(1), "amount": Decimal(9 * 10**25), "side": "buy"},
        {"volume": AMOUNT_MOST, "buy_volume": AMOUNT_MOST, "quote_volume": QUOTE_MOST, "vwap": Decimal("0.000001")},
    ),
    "all ids there are": Limit(1, MANY_IDS, {"trade_count": 2**63 - 1}),
    "all ids there are, twice": Limit(2, MANY_IDS, {"trade_count": 2**63 - 1}),
}
