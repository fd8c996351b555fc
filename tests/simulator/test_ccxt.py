"""An independent client library, ccxt, works against the simulator and receives the trades its account tells."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from k2.simulator.server import Simulator

DEADLINE_SECONDS = 30.0
# ccxt's name -> ours, the symbols in both notations
CASES = {
    "binance": ("binance", "BTC/USDT", "BTC-USDT"),
    "binanceusdm": ("binance-usdm", "BTC/USDT:USDT", "BTC-USDT-PERP"),
    "kraken": ("kraken", "BTC/USD", "BTC-USD"),
    "coinbase": ("coinbase", "BTC/USD", "BTC-USD"),
}


@asynccontextmanager
async def pointed_at(simulator: Simulator, name: str) -> AsyncIterator[Any]:
    """Open a ccxt client whose addresses are the simulator's; no keys, as none are needed for public data."""
    pro = pytest.importorskip("ccxt.pro")
    client = getattr(pro, name)({"enableRateLimit": False})
    exchange = CASES[name][0]
    ends = simulator.endpoints()[exchange]
    socket, rest, api = ends["url"], ends["rest_url"], client.urls["api"]
    if name == "binance":
        client.options["fetchMarkets"] = {"types": ["spot"]}
        api["public"] = f"{rest}/api/v3"
        api["ws"]["spot"] = f"{socket}/ws"
    elif name == "binanceusdm":
        api["fapiPublic"] = f"{rest}/fapi/v1"
        api["ws"]["future"] = f"{socket}/ws"
    elif name == "kraken":
        api["public"] = rest
        api["ws"]["publicV2"] = socket
    else:
        api["rest"] = rest
        api["ws"] = socket
    try:
        yield client
    finally:
        await client.close()


def expected(simulator: Simulator, name: str, trade_id: int) -> tuple[float, float, str, int]:
    """Return price, amount, side and milliseconds of a trade as ccxt should tell them."""
    exchange, _, symbol = CASES[name]
    market = simulator.market(exchange, symbol)
    (trade,) = market.trades(trade_id, 1)
    # ccxt hands Coinbase's `side` on as it is: the maker's.
    buy = not trade.buy if exchange == "coinbase" else trade.buy
    told = market.instrument
    return (
        float(told.price(trade.price)),
        float(told.amount(trade.amount)),
        "buy" if buy else "sell",
        trade.ns // 1_000_000,
    )


def as_told(trade: dict[str, Any]) -> tuple[float, float, str, int]:
    """Return the same four of a ccxt trade."""
    return trade["price"], trade["amount"], trade["side"], trade["timestamp"]


@pytest.mark.parametrize("name", CASES)
async def test_ccxt_watches_the_trades_the_account_tells(name: str) -> None:
    """`load_markets` and `watch_trades` work, and each trade has the id, price, amount, side and time we told."""
    exchange, ccxt_symbol, symbol = CASES[name]
    received: dict[int, dict[str, Any]] = {}
    async with (
        Simulator(exchanges=[exchange], rate=300, seed=4) as simulator,
        asyncio.timeout(DEADLINE_SECONDS),
        pointed_at(simulator, name) as client,
    ):
        await client.load_markets()
        while len(received) < 150:
            for trade in await client.watch_trades(ccxt_symbol):
                received[int(trade["id"])] = trade
        announced = simulator.account().tally(exchange, symbol).announced

        assert {i: as_told(t) for i, t in received.items()} == {i: expected(simulator, name, i) for i in received}
        assert all(i in announced for i in received)


@pytest.mark.parametrize("name", CASES)
async def test_ccxt_fetches_the_trades_of_the_market(name: str) -> None:
    """`fetch_trades` over REST gives the market's trades (Binance: its aggregates)."""
    exchange, ccxt_symbol, symbol = CASES[name]
    async with (
        Simulator(exchanges=[exchange], rate=50, seed=4) as simulator,
        asyncio.timeout(DEADLINE_SECONDS),
        pointed_at(simulator, name) as client,
    ):
        trades = await client.fetch_trades(ccxt_symbol, limit=50)
        candles = await client.fetch_ohlcv(ccxt_symbol, "1m")
        market = simulator.market(exchange, symbol)
        aggregates = {t.trade_id: t for t in market.aggregates(0, 10**6)} if "binance" in exchange else {}

        assert len(trades) >= 50
        assert candles
        for trade in trades:
            told = aggregates.get(int(trade["id"]))
            if told is None:
                assert as_told(trade) == expected(simulator, name, int(trade["id"]))
            else:
                amount, price = market.instrument.amount(told.amount), market.instrument.price(told.price)
                side = "buy" if told.buy else "sell"
                assert as_told(trade) == (float(price), float(amount), side, told.ns // 1_000_000)


@pytest.mark.parametrize("name", CASES)
async def test_ccxt_keeps_the_book_of_the_market(name: str) -> None:
    """`watch_order_book` joins snapshot and differences to a book that is never crossed and ends at the market's."""
    exchange, ccxt_symbol, symbol = CASES[name]
    async with (
        Simulator(exchanges=[exchange], rate=50, seed=4) as simulator,
        asyncio.timeout(DEADLINE_SECONDS),
        pointed_at(simulator, name) as client,
    ):
        market, same = simulator.market(exchange, symbol), 0
        for _ in range(30):
            book = await client.watch_order_book(ccxt_symbol, 10)
            bids, asks = market.book.top(True, 1), market.book.top(False, 1)
            best = float(market.instrument.price(bids[0][0])), float(market.instrument.price(asks[0][0]))
            assert book["bids"][0][0] < book["asks"][0][0]
            same += (book["bids"][0][0], book["asks"][0][0]) == best

        assert same > 10  # not all: the market may be a step further than what has arrived
