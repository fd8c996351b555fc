"""What clients of the simulated exchanges receive is what its account says, through K2's own exchange modules."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import time
import zlib
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import aiohttp
import pytest

from k2.errors import InUse, Rejected, UnknownName
from k2.feeds import registry
from k2.model import AGGREGATE, ANSWER, BACKFILL, CLOSED, FRAME, IMPORT, Frame, LogBatch, Trade
from k2.schema import TIMEFRAMES
from k2.simulator.account import Intervals, Tally
from k2.simulator.kraken import checksum
from k2.simulator.market import EXCHANGES
from k2.simulator.recording import frames_of_log
from k2.simulator.server import MAX_SPEED, Options, Simulator, parse_speed, run

START_NS = 1_790_000_000_000_000_000
ALL = ("trades", "quotes", "book")


def ids_of(intervals: Intervals) -> list[int]:
    return [i for first, last in intervals for i in range(first, last + 1)]


def candles_of(trades: Sequence[Trade], length: int) -> dict[int, list[Decimal]]:
    """Compute open, high, low, close, volume, quote volume, buy volume and count by brute force."""
    rows: dict[int, list[Decimal]] = {}
    for trade in sorted(trades, key=lambda t: (t.exchange_ns, t.trade_id)):
        price, amount = Decimal(trade.price), Decimal(trade.amount)
        start = trade.exchange_ns - trade.exchange_ns % length
        row = rows.setdefault(start, [price, price, price, price, *[Decimal(0)] * 4])
        row[1], row[2], row[3] = max(row[1], price), min(row[2], price), price
        row[4] += amount
        row[5] += price * amount
        row[6] += amount if trade.side == "buy" else 0
        row[7] += 1
    return rows


def assert_same(tally: Tally, received: Sequence[Trade]) -> None:
    """Compare what a client received with the account: ids, sums, sides, candles."""
    by_id = {trade.trade_id: trade for trade in received}
    told = tally.describe()
    assert sorted(by_id) == ids_of(tally.announced)
    assert told["count"] == len(by_id)
    assert told["buys"] == sum(t.side == "buy" for t in by_id.values())
    assert Decimal(told["sum_price"]) == sum(Decimal(t.price) for t in by_id.values())
    assert Decimal(told["sum_amount"]) == sum(Decimal(t.amount) for t in by_id.values())
    assert Decimal(told["sum_price_amount"]) == sum(Decimal(t.price) * Decimal(t.amount) for t in by_id.values())
    assert ids_of(tally.off_market) == sorted(i for i, t in by_id.items() if t.off_market)
    for name, length in TIMEFRAMES.items():
        columns = ("open", "high", "low", "close", "volume", "quote_volume", "buy_volume", "trade_count")
        rows = {row["start_ns"]: [Decimal(row[c]) for c in columns] for row in told["candles"][name]}
        assert rows == candles_of([t for t in by_id.values() if not t.off_market], length)


@pytest.mark.parametrize("exchange", EXCHANGES)
async def test_client_receives_what_the_account_tells(clients: Any, exchange: str) -> None:
    """Every frame parses, every announced trade arrives with its values, and is confirmed at an orderly end."""
    simulator = Simulator(exchanges=[exchange], rate=400, seed=5)
    await simulator.start()
    client = await clients.open(simulator, exchange, channels=ALL)
    symbols = registry.get(exchange).default_symbols
    await client.until(lambda c: not c.pending and all(len(c.ids(s)) > 400 for s in symbols))
    await simulator.stop()
    await clients.finish()

    assert client.bad == client.refused == []
    assert {quote.symbol for quote in client.quotes} == set(symbols)
    assert all(Decimal(q.bid_price) < Decimal(q.ask_price) for q in client.quotes)
    for symbol in symbols:
        tally = simulator.account().tally(exchange, symbol)
        assert_same(tally, [t for t in client.trades if t.symbol == symbol])
        assert tally.confirmed == tally.announced
        assert tally.withheld.count() == 0


async def test_trades_before_and_without_listeners_are_unheard(clients: Any) -> None:
    """The exchange trades on while nobody listens: those ids are told apart from announced ones."""
    async with Simulator(exchanges=["binance"], rate=1_000, seed=1) as simulator:
        market, tally = simulator.market("binance", "BTC-USDT"), simulator.account().tally("binance", "BTC-USDT")
        first = await clients.open(simulator, "binance")
        await first.until(lambda c: len(c.ids("BTC-USDT")) > 20)
        await first.socket.close()
        before = market.last_id
        await clients.eventually(lambda: market.last_id >= before + 50)
        again = await clients.open(simulator, "binance")
        await again.until(lambda c: len(c.ids("BTC-USDT")) > 20)

    assert len(list(tally.announced)) == 2
    assert len(list(tally.unheard)) >= 2
    assert tally.unheard.count() + tally.announced.count() == tally.generated.count()


async def test_same_seed_and_start_tell_the_same(clients: Any) -> None:
    """Two runs from one seed and start time tell the same trades under the same ids."""
    told = []
    for _ in range(2):
        async with Simulator(exchanges=["coinbase"], rate=500, seed=9, start_ns=START_NS) as simulator:
            client = await clients.open(simulator, "coinbase", ["BTC-USD"])
            await client.until(lambda c: len(c.trades) > 300)
            told.append({t.trade_id: t for t in client.trades})

    common = told[0].keys() & told[1].keys()
    assert len(common) >= 100
    assert all(told[0][i] == told[1][i] for i in common)


async def test_closed_markets_settle(clients: Any) -> None:
    """After the markets close nothing more is traded, and all that was told is confirmed by its readers."""
    async with Simulator(exchanges=["kraken"], rate=500) as simulator:
        client = await clients.open(simulator, "kraken")
        await client.until(lambda c: len(c.trades) > 300)
        tally = simulator.account().tally("kraken", "BTC-USD")
        assert await simulator.close_markets(10)

        assert tally.confirmed == tally.announced
        assert client.ids("BTC-USD")[-1] == simulator.market("kraken", "BTC-USD").last_id
        assert client.ended is None


async def test_reopened_markets_go_on_where_they_were_left(clients: Any) -> None:
    """No burst of what would have been traded meanwhile: the next trade follows the last one in id and in time."""
    async with Simulator(exchanges=["kraken"], symbols=["BTC-USD"], rate=500) as simulator:
        client = await clients.open(simulator, "kraken", ["BTC-USD"])
        await client.until(lambda c: len(c.trades) > 100)
        assert await simulator.close_markets(10)
        market = simulator.market("kraken", "BTC-USD")
        closed_at_step, told = market.steps, len(client.trades)
        await asyncio.sleep(0.5)
        assert market.steps == closed_at_step
        reopened = time.monotonic()
        simulator.open_markets()
        await client.until(lambda c: len(c.trades) > told)
        steps, seconds = market.steps - closed_at_step, time.monotonic() - reopened

    assert 0 < steps <= 500 * seconds + 10  # the half second would be 250 more


async def test_full_speed_loses_nothing(clients: Any) -> None:
    """At full speed the market waits for its listeners, and all of them receive every trade."""
    simulator = Simulator(exchanges=["kraken"], symbols=["ETH-USD"], speed=MAX_SPEED)
    await simulator.start()
    one, other = [await clients.open(simulator, "kraken", ["ETH-USD"]) for _ in range(2)]
    await one.until(lambda c: len(c.trades) > 6_000)
    await simulator.stop()
    await clients.finish()

    tally = simulator.account().tally("kraken", "ETH-USD")
    assert tally.announced == tally.confirmed
    assert one.ids("ETH-USD")[-1] == other.ids("ETH-USD")[-1]
    assert_same(tally, [*one.trades, *other.trades])


async def test_kraken_snapshot_heartbeat_and_numbers(clients: Any) -> None:
    """Kraken greets, acknowledges, sends 50 trades first, keeps zeros, sometimes writes exponents, and beats."""
    async with Simulator(exchanges=["kraken"], rate=400) as simulator:
        client = await clients.open(simulator, "kraken", ["BTC-USD"])
        await client.until(lambda c: len(c.trades) > 500 and '{"channel":"heartbeat"}' in c.messages)

    text = "".join(client.messages)
    assert client.messages[0].startswith('{"channel":"status"')
    snapshot = json.loads(client.messages[2])
    assert snapshot["type"] == "snapshot"
    assert len(snapshot["data"]) == 50
    assert any(t.price.endswith(".0") for t in client.trades)
    assert any(t.amount.endswith("0") and "." in t.amount for t in client.trades)
    assert "e-0" in text
    assert "E-" in text
    assert client.ids("BTC-USD") == sorted(client.ids("BTC-USD"))


async def test_kraken_book_matches_its_checksums(clients: Any) -> None:
    """A book kept from snapshot and updates, cut to its depth, has the checksum every message tells."""
    async with Simulator(exchanges=["kraken"], rate=500, seed=2) as simulator:
        client = await clients.open(simulator, "kraken", ["BTC-USD"], ["book"])
        await client.until(lambda c: len(c.messages) > 350)

    sides: dict[str, dict[Decimal, str]] = {"bids": {}, "asks": {}}
    checked = 0
    for message in (json.loads(m, parse_float=str) for m in client.messages if m.startswith('{"channel":"book"')):
        (data,) = message["data"]
        for side, levels in sides.items():
            for level in data[side]:
                key = Decimal(level["price"])
                if Decimal(level["qty"]):
                    levels[key] = level["price"].replace(".", "").lstrip("0") + level["qty"].replace(".", "").lstrip(
                        "0"
                    )
                else:
                    levels.pop(key, None)
            best_first = sorted(levels, reverse=side == "bids")
            for price in best_first[100:]:
                del levels[price]
        ten = [sides["asks"][p] for p in sorted(sides["asks"])[:10]]
        ten += [sides["bids"][p] for p in sorted(sides["bids"], reverse=True)[:10]]
        assert zlib.crc32("".join(ten).encode()) == data["checksum"]
        checked += 1
    assert checked > 300


async def test_kraken_book_without_snapshot(clients: Any) -> None:
    """A book subscribed without its snapshot brings updates only, the first with all levels."""
    async with Simulator(exchanges=["kraken"], rate=200) as simulator:
        params = {"channel": "book", "symbol": ["BTC/USD"], "depth": 10, "snapshot": False}
        async with clients.session.ws_connect(simulator.endpoints()["kraken"]["url"]) as ws:
            await ws.send_str(json.dumps({"method": "subscribe", "params": params}))
            messages = [json.loads((await ws.receive(10)).data) for _ in range(4)]

    books = [m for m in messages if m.get("channel") == "book"]
    assert {m["type"] for m in books} == {"update"}
    assert len(books[0]["data"][0]["bids"]) == 10


def test_kraken_checksum_is_the_exchange_s_own(recordings: Any) -> None:
    """Our checksum of a recorded book snapshot is the one Kraken sent with it."""
    lines = (recordings / "kraken/ws_v2/book_20260824.jsonl").read_text().splitlines()
    (data,) = next(json.loads(line, parse_float=str)["data"] for line in lines if '"type":"snapshot"' in line)
    bids, asks = (
        {int(level["price"].replace(".", "")): int(level["qty"].replace(".", "")) for level in data[side]}
        for side in ("bids", "asks")
    )

    assert checksum((bids, asks)) == data["checksum"]


async def test_coinbase_snapshot_sequence_and_heartbeats(clients: Any) -> None:
    """Coinbase numbers a connection's messages, sends 100 trades newest first, tells the maker's side, and beats."""
    async with Simulator(exchanges=["coinbase"], rate=300) as simulator:
        client = await clients.open(simulator, "coinbase", channels=ALL)
        await client.until(lambda c: any(m.startswith('{"channel":"heartbeats"') for m in c.messages))
        market = simulator.market("coinbase", "BTC-USD")

    messages = [json.loads(m) for m in client.messages]
    assert [m["sequence_num"] for m in messages] == list(range(len(messages)))
    snapshot = next(m for m in messages if m["channel"] == "market_trades")["events"][0]
    ids = [int(t["trade_id"]) for t in snapshot["trades"]]
    assert snapshot["type"] == "snapshot"
    assert ids == list(range(ids[0], ids[0] - 100, -1))
    newest, (made,) = snapshot["trades"][0], market.trades(ids[0], 1)
    assert newest["side"] == ("SELL" if made.buy else "BUY")


async def test_binance_single_streams_aggregates_and_answers(clients: Any) -> None:
    """`/ws/<stream>` sends bare events; requests are answered by id; nonsense brings the exchange's errors."""
    async with Simulator(exchanges=["binance"], rate=500) as simulator:
        url = simulator.endpoints()["binance"]["url"]
        async with clients.session.ws_connect(f"{url}/ws/btcusdt@aggTrade") as ws:
            aggregates = [json.loads((await ws.receive(10)).data) for _ in range(50)]
        async with clients.session.ws_connect(f"{url}/ws") as ws:
            answers = []
            for text in (
                '{"method":"SUBSCRIBE","params":["nosuch@trade"],"id":7}',
                '{"method":"LIST_SUBSCRIPTIONS","id":"x"}',
                '{"method":"WRONG","id":8}',
                "nonsense",
            ):
                await ws.send_str(text)
                answers.append(json.loads((await ws.receive(10)).data))
        tally = simulator.account().tally("binance", "BTC-USDT", AGGREGATE)

    assert [a["a"] for a in aggregates] == list(range(aggregates[0]["a"], aggregates[0]["a"] + 50))
    assert aggregates[0]["a"] in tally.announced
    assert all(a["l"] + 1 == b["f"] for a, b in itertools.pairwise(aggregates))
    assert answers[0] == {"result": None, "id": 7}
    assert answers[1] == {"result": [], "id": "x"}
    assert "unknown variant `WRONG`" in answers[2]["error"]["msg"]
    assert answers[3]["code"] == 3


@pytest.mark.parametrize(
    ("exchange", "told"),
    [("kraken", "Currency pair not supported NOSUCH/USD"), ("coinbase", "NOSUCH-USD is not a valid product")],
)
async def test_unknown_symbol_is_refused_in_the_exchange_words(clients: Any, exchange: str, told: str) -> None:
    """A subscription to a symbol that is not listed brings the exchange's own error."""
    async with Simulator(exchanges=[exchange]) as simulator:
        client = await clients.open(simulator, exchange, ["NOSUCH-USD"])
        await client.until(lambda c: bool(c.refused))

    assert told in client.refused[0]


@pytest.mark.parametrize(
    ("exchange", "path", "pages"),
    [
        ("binance", "/api/v3/historicalTrades?symbol=BTCUSDT&limit=40&fromId={first}", 1),
        ("binance", "/api/v3/aggTrades?symbol=BTCUSDT&limit=40", 1),
        ("binance-usdm", "/fapi/v1/trades?symbol=BTCUSDT&limit=40", 1),
        ("kraken", "/0/public/Trades?pair=XBTUSD&count=40&since={since}", 1),
        ("coinbase", "/products/BTC-USD/trades?limit=40&after={last}", 1),
    ],
)
async def test_rest_trades_are_those_of_the_market(clients: Any, exchange: str, path: str, pages: int) -> None:
    """REST answers parse with K2's own module and hold the market's trades; `since` and ids page as documented."""
    symbol = "BTC-USDT-PERP" if exchange == "binance-usdm" else "BTC-USDT" if exchange == "binance" else "BTC-USD"
    async with Simulator(exchanges=[exchange], start_ns=START_NS) as simulator:
        market = simulator.market(exchange, symbol)
        kept = market.trades(0, 60)
        url = simulator.endpoints()[exchange]["rest_url"] + path.format(
            first=kept[10].trade_id, since=kept[9].ns, last=kept[50].trade_id
        )
        async with clients.session.get(url) as response:
            body = await response.read()
        parsed = registry.get(exchange).parse(Frame(ANSWER, BACKFILL, "test", 0, 0, 1, body, url))
        aggregates = {
            t.trade_id: t for t in (market.aggregates(0, 10**6) if "agg" in path else market.trades(0, 10**6))
        }

    assert len(parsed.trades) == 40
    for trade in parsed.trades:
        made = aggregates[trade.trade_id]
        assert Decimal(trade.price) == Decimal(market.instrument.price(made.price))
        assert Decimal(trade.amount) == Decimal(market.instrument.amount(made.amount))
        assert (trade.side == "buy", trade.exchange_ns) == (made.buy, made.ns)
    ids = sorted(t.trade_id for t in parsed.trades)
    assert ids == list(range(ids[0], ids[0] + 40))
    if "{" in path:
        assert ids[0] == kept[10].trade_id


async def test_rest_candles_are_those_of_the_market(clients: Any) -> None:
    """The candles of all exchanges' REST interfaces equal brute force over the market's trades."""
    paths = {
        "binance": "/api/v3/klines?symbol=BTCUSDT&interval=1m",
        "binance-usdm": "/fapi/v1/klines?symbol=BTCUSDT&interval=1m",
        "kraken": "/0/public/OHLC?pair=XBTUSD&interval=1",
        "coinbase": "/api/v3/brokerage/market/products/BTC-USD/candles?granularity=ONE_MINUTE",
    }
    async with Simulator(rate=1, start_ns=START_NS) as simulator:  # one event a second: candles of minutes at once
        for exchange, path in paths.items():
            symbol = "BTC-USD" + ("T" if "binance" in exchange else "") + ("-PERP" if "usdm" in exchange else "")
            market = simulator.market(exchange, symbol)
            async with clients.session.get(simulator.endpoints()[exchange]["rest_url"] + path) as response:
                body = await response.json()
            rows = (
                body if isinstance(body, list) else body["candles"] if "candles" in body else body["result"]["XXBTZUSD"]
            )
            opens = [row[1] if isinstance(row, list) else row["open"] for row in rows]
            volumes = [
                (row[5 if "binance" in exchange else 6]) if isinstance(row, list) else row["volume"] for row in rows
            ]
            expected: dict[int, list[int]] = {}
            for trade in market.trades(0, 10**6):
                if trade.mark == "MARKET":
                    row = expected.setdefault(trade.ns // 60_000_000_000, [trade.price, 0])
                    row[1] += trade.amount
            if exchange == "coinbase":
                opens, volumes = opens[::-1], volumes[::-1]
            assert [Decimal(v) for v in opens] == [Decimal(market.instrument.price(p)) for p, _ in expected.values()]
            assert [Decimal(v) for v in volumes] == [Decimal(market.instrument.amount(a)) for _, a in expected.values()]


async def test_rest_errors_are_those_of_the_exchange(clients: Any) -> None:
    """Unknown symbols bring each exchange's own error."""
    async with Simulator() as simulator:
        base = simulator.address
        async with clients.session.get(f"{base}/binance/api/v3/trades?symbol=NO") as response:
            assert response.status == 400
            assert await response.json() == {"code": -1121, "msg": "Invalid symbol."}
        async with clients.session.get(f"{base}/kraken/0/public/Trades?pair=NO") as response:
            assert await response.json() == {"error": ["EQuery:Unknown asset pair"]}
        async with clients.session.get(f"{base}/coinbase/api/v3/brokerage/market/products/NO") as response:
            assert response.status == 404
        async with clients.session.get(f"{base}/account") as response:
            account = await response.json()
        assert {m["exchange"] for m in account["markets"]} == set(EXCHANGES)


# Faults.


async def post_fault(clients: Any, simulator: Simulator, fault: Any, status: int = 200) -> Any:
    async with clients.session.post(f"{simulator.address}/faults", json=fault) as response:
        assert response.status == status
        return await response.json()


async def test_fault_drop_is_listed_as_withheld(clients: Any) -> None:
    """Dropped messages never arrive, their ids are withheld and not announced."""
    simulator = Simulator(exchanges=["kraken"], symbols=["BTC-USD"], rate=500)
    await simulator.start()
    client = await clients.open(simulator, "kraken", ["BTC-USD"])
    await client.until(lambda c: len(c.trades) > 60)
    await post_fault(clients, simulator, {"kind": "drop", "every": 10, "count": 5})
    tally = simulator.account().tally("kraken", "BTC-USD")
    await client.until(lambda c: tally.withheld.count() > 0 and len(c.trades) > 500)
    await simulator.stop()
    await clients.finish()

    missing = set(range(client.ids("BTC-USD")[0], client.ids("BTC-USD")[-1] + 1)) - set(client.ids("BTC-USD"))
    assert missing == set(ids_of(tally.withheld))
    assert_same(tally, client.trades)


async def test_faults_in_messages_hurt_no_trade(clients: Any) -> None:
    """Repeats, swaps, broken copies, unknown fields and types: each trade still arrives, and once in the account."""
    faults = [f"{kind}:every=7" for kind in ("repeat", "reorder", "unknown-field", "unknown-type")]
    simulator = Simulator(exchanges=["binance"], symbols=["BTC-USDT"], rate=500)
    await simulator.start()
    for fault in faults:
        await post_fault(clients, simulator, fault)
    client = await clients.open(simulator, "binance", ["BTC-USDT"])
    await client.until(lambda c: len(c.trades) > 400 and bool(c.bad))
    struck = {f["kind"]: f["struck"] for f in simulator.faults.describe()}
    await simulator.stop()
    await clients.finish()

    ids = client.ids("BTC-USDT")
    assert all(count > 3 for count in struck.values())
    assert all("zzNewEvent" in text for text in client.bad)
    assert any("zz_inner" in text for text in client.messages)
    assert len(ids) > len(set(ids))
    assert ids != sorted(ids)
    held_back = simulator.account().tally("binance", "BTC-USDT")
    assert_same(held_back, client.trades)


async def test_fault_malformed_is_seen_as_such(clients: Any) -> None:
    """Broken copies come as text that cannot be parsed, or end the connection where a client checks UTF-8."""
    async with Simulator(exchanges=["coinbase"], rate=500) as simulator:
        await post_fault(clients, simulator, {"kind": "malformed", "every": 5})
        client = await clients.open(simulator, "coinbase")
        await clients.eventually(lambda: client.bad or client.ended is not None)

    assert client.bad or client.ended == aiohttp.WSMsgType.ERROR


@pytest.mark.parametrize("abrupt", [False, True])
async def test_fault_disconnect_ends_connections(clients: Any, abrupt: bool) -> None:
    """A disconnection ends the connection, orderly or by a reset; a new one works."""
    async with Simulator(exchanges=["binance"], rate=200) as simulator:
        client = await clients.open(simulator, "binance")
        await client.until(lambda c: bool(c.trades))
        await post_fault(clients, simulator, {"kind": "disconnect", "abrupt": abrupt})
        await client.end()
        again = await clients.open(simulator, "binance")
        await again.until(lambda c: bool(c.trades))

    assert client.ended == (aiohttp.WSMsgType.CLOSED if abrupt else aiohttp.WSMsgType.CLOSE)


async def test_fault_silence_answers_pings_but_sends_nothing(clients: Any) -> None:
    """A silent connection answers pings and goes on afterwards; a new connection is not silent."""
    async with Simulator(exchanges=["binance"], rate=200) as simulator:
        client = await clients.open(simulator, "binance", ["BTC-USDT"])
        await client.until(lambda c: bool(c.trades))
        await post_fault(clients, simulator, {"kind": "silence", "for": 1.0})
        other = await clients.open(simulator, "binance", ["BTC-USDT"])
        await other.until(lambda c: len(c.trades) > 50)
        before = len(client.trades)
        await other.until(lambda c: len(c.trades) > 100)
        assert len(client.trades) == before
        await client.socket.ping(b"there?")
        await client.until(lambda c: len(c.trades) > before)

    ids = client.ids("BTC-USDT")
    assert max(b - a for a, b in itertools.pairwise(ids)) > 20


async def test_fault_half_open_neither_sends_nor_reads(clients: Any) -> None:
    """A half-open connection gives no sign of life, then is reset; what it was not told is not confirmed."""
    async with Simulator(exchanges=["kraken"], symbols=["BTC-USD"], rate=200) as simulator:
        client = await clients.open(simulator, "kraken", ["BTC-USD"])
        await client.until(lambda c: len(c.trades) > 60)
        await post_fault(clients, simulator, {"kind": "half-open", "for": 1.0})
        other = await clients.open(simulator, "kraken", ["BTC-USD"])
        await other.until(lambda c: len(c.trades) > 60)
        before = len(client.messages)
        await client.socket.send_str('{"method":"ping"}')
        await other.until(lambda c: len(c.trades) > 120)
        assert len(client.messages) == before
        await client.end()

    assert client.ended == aiohttp.WSMsgType.CLOSED


async def test_fault_429_refuses_connections_and_rest(clients: Any) -> None:
    """While it lasts everything of that exchange answers 429 with Retry-After; others are not touched."""
    async with Simulator(faults=[]) as simulator:
        await post_fault(clients, simulator, {"kind": "429", "for": 1.0, "exchange": "kraken"})
        ends = simulator.endpoints()
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await clients.session.ws_connect(ends["kraken"]["url"])
        async with clients.session.get(ends["kraken"]["rest_url"] + "/0/public/Time") as response:
            assert response.status == 429
            assert int(response.headers["Retry-After"]) == 1
        async with clients.session.get(ends["binance"]["rest_url"] + "/api/v3/time") as response:
            assert response.status == 200
        await clients.eventually(lambda: not simulator.faults.describe())
        async with clients.session.ws_connect(ends["kraken"]["url"]) as ws:
            assert (await ws.receive(10)).type == aiohttp.WSMsgType.TEXT

    assert refused.value.status == 429
    assert refused.value.headers is not None
    assert "Retry-After" in refused.value.headers


@pytest.mark.parametrize("exchange", EXCHANGES)
async def test_fault_refuse_refuses_subscriptions(clients: Any, exchange: str) -> None:
    """A refused subscription is answered with an error K2's module understands, and no data comes."""
    async with Simulator(exchanges=[exchange], rate=500) as simulator:
        await post_fault(clients, simulator, "refuse:for=30")
        client = await clients.open(simulator, exchange)
        await client.until(lambda c: bool(c.refused))

    assert not client.trades


async def test_faults_resource_lists_refuses_and_clears(clients: Any) -> None:
    """GET lists faults at work, a wrong one is refused with a hint, DELETE ends all."""
    async with Simulator(exchanges=["kraken"]) as simulator:
        assert await post_fault(clients, simulator, [{"kind": "drop"}, "repeat:every=3"]) == {"numbers": [1, 2]}
        assert "did you mean" in (await post_fault(clients, simulator, {"kind": "dorp"}, 400))["error"]
        async with clients.session.get(f"{simulator.address}/faults") as response:
            assert [f["kind"] for f in await response.json()] == ["drop", "repeat"]
        async with clients.session.delete(f"{simulator.address}/faults") as response:
            assert await response.json() == []
        assert simulator.faults.describe() == []


# Recordings.


def kraken_frames(count: int) -> list[Frame]:
    """Frames in the form docs.kraken.com shows for API v2 `trade` (read 2026-11), between control messages."""
    frames = [Frame(FRAME, IMPORT, "c", 0, 0, START_NS, b'{"channel":"heartbeat"}')]
    for i in range(count):
        symbol = "BTC/USD" if i % 3 else "ETH/USD"
        data = (
            f'{{"channel":"trade","type":"update","data":[{{"symbol":"{symbol}","side":"sell","price":4136.4{i % 10},'
            f'"qty":0.23374249,"ord_type":"limit","trade_id":{i + 1},"timestamp":"2026-09-21T14:13:20.124498Z"}}]}}'
        )
        frames.append(Frame(FRAME, IMPORT, "c", 0, i + 1, START_NS + i * 1_000_000, data.encode()))
    return [*frames, Frame(CLOSED, IMPORT, "c", 0, count + 1, START_NS, b"end")]


@pytest.mark.parametrize("speed", [MAX_SPEED, 2.0])
async def test_recording_is_played_once_in_order_byte_by_byte(clients: Any, speed: float) -> None:
    """Each frame of a subscribed stream arrives as recorded, once, in order; control frames are left out."""
    frames = kraken_frames(600)
    async with Simulator(exchanges=["kraken"], recordings={"kraken": frames}, speed=speed) as simulator:
        client = await clients.open(simulator, "kraken", ["BTC-USD", "ETH-USD"])
        async with asyncio.timeout(20):
            await simulator.played()
        await client.until(lambda c: len(c.trades) >= 600)
        counts = simulator.account().frames["kraken"]

    played = [m for m in client.messages if m.startswith('{"channel":"trade"')]
    assert played == [f.data.decode() for f in frames[1:-1]]
    assert counts == {"sent": 600, "skipped": 1}


async def test_recording_waits_for_a_client_that_comes_back(clients: Any) -> None:
    """When the client is cut off in the middle, the rest waits for its return; nothing is left out."""
    frames = kraken_frames(15_000)
    async with Simulator(exchanges=["kraken"], recordings={"kraken": frames}, speed=MAX_SPEED) as simulator:
        client = await clients.open(simulator, "kraken", ["BTC-USD", "ETH-USD"])
        await client.until(lambda c: len(c.trades) > 500)
        await post_fault(clients, simulator, {"kind": "disconnect"})
        await client.end()
        first = client.trades
        assert len(first) < 15_000
        again = await clients.open(simulator, "kraken", ["BTC-USD", "ETH-USD"])
        async with asyncio.timeout(30):
            await simulator.played()
        await again.until(lambda c: len(first) + len(c.trades) >= 15_000)

    assert [t.trade_id for t in [*first, *again.trades]] == list(range(1, 15_001))


async def test_recording_skips_streams_nobody_asked_for(clients: Any) -> None:
    """Frames of a symbol without subscriber are skipped and counted."""
    async with Simulator(exchanges=["kraken"], recordings={"kraken": kraken_frames(300)}, speed=MAX_SPEED) as simulator:
        client = await clients.open(simulator, "kraken", ["ETH-USD"])
        async with asyncio.timeout(20):
            await simulator.played()
        await client.until(lambda c: len(c.trades) == 100)

    assert simulator.account().frames["kraken"] == {"sent": 100, "skipped": 201}


def test_frames_of_log_reads_a_partition_to_its_end() -> None:
    """Frames of K2's own log come in order over all its batches."""
    frames = kraken_frames(25)

    class Log:
        def read(self, partition: str, offset: int, *, max_frames: int = 10, max_bytes: int = 0) -> list[LogBatch]:
            part = frames[offset : offset + 10]
            return [LogBatch(partition, offset, 0, part)] if part else []

    assert list(frames_of_log(Log(), "kraken")) == frames


@pytest.mark.parametrize(
    ("exchange", "file", "symbols", "count", "frames"),
    [
        ("kraken", "kraken/ws_v2/trades_20260926.jsonl", ["BTC-USD", "ETH-USD"], 102, 4),
        ("kraken", "kraken/ws_v1/capture_20210417.jsonl.gz", ["XMR-USD", "SC-EUR"], 10, 8),
        ("coinbase", "coinbase/advanced_ws/capture_20260809_part1.jsonl.gz", ["BTC-USD", "ETH-USD"], 240, 29),
        (
            "coinbase",
            "coinbase/exchange_ws/capture_20210417_part1.txt.gz",
            ["SKL-USD", "SKL-BTC", "NMR-EUR", "BAND-GBP", "YFI-BTC"],
            77,
            77,
        ),
        ("binance", "binance/spot_ws/btcusdt_20240808.gz", ["BTC-USDT"], 9_757, 9_757),
        ("binance-usdm", "binance/usdm_ws/capture_20210722.jsonl.gz", (), 91, 91),
    ],
)
async def test_recordings_of_real_exchanges_arrive_whole(
    clients: Any, recordings: Any, exchange: str, file: str, symbols: Sequence[str], count: int, frames: int
) -> None:
    """Played at full speed, a recording's trades all arrive: as many as its description counts."""
    from k2.feeds.recordings import read

    port = registry.get(exchange)
    recorded = [r.frame for r in read(recordings / file, port) if r.frame is not None]
    if not symbols:
        parsed = [port.parse(f) for f in recorded if f.kind == FRAME]
        symbols = sorted({t.symbol for p in parsed for t in p.trades})
    async with Simulator(exchanges=[exchange], recordings={exchange: recorded}, speed=MAX_SPEED) as simulator:
        client = await clients.open(simulator, exchange, symbols)
        async with asyncio.timeout(30):
            await simulator.played()
        await client.until(lambda c: len(c.trades) >= count)

    wanted = {f.data for f in recorded}
    assert len(client.trades) == count
    assert (
        sum(m.encode() in wanted for m in client.messages if registry.get(exchange).control(m.encode()).kind == "data")
        == frames
    )
    assert client.bad == []


# Running it.


def test_run_shows_endpoints_and_ends() -> None:
    """The command's function shows where to connect, runs for its time, and ends with the account."""
    shown: list[dict[str, Any]] = []

    code = run(Options(exchanges=["kraken"], port=0, for_seconds=0.2, rate=100), shown.append)

    assert code == 0
    assert shown[0]["endpoints"]["kraken"]["url"].startswith("ws://127.0.0.1:")
    assert [m["symbol"] for m in shown[1]["account"]["markets"]] == ["BTC-USD", "ETH-USD"]


async def test_port_taken_is_one_clear_message() -> None:
    """A taken port is named, with what to do."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InUse, match=f"{taken.getsockname()[1]}.*--port"):
            await Simulator(port=taken.getsockname()[1]).start()


def test_wrong_options_are_refused() -> None:
    """Unknown exchanges, speeds and rates are refused with what would be right."""
    with pytest.raises(UnknownName, match="kraken"):
        Simulator(exchanges=["krakken"])
    with pytest.raises(Rejected, match="rate"):
        Simulator(rate=0)
    with pytest.raises(Rejected, match="max"):
        parse_speed("fast")
    assert parse_speed("10x") == 10.0
    assert parse_speed("max") == MAX_SPEED


def test_symbols_go_to_the_exchanges_that_list_their_kind() -> None:
    """Perpetuals are for the futures, the others for spot; a mapping says it exactly."""
    simulator = Simulator(symbols=["SOL-USDT", "SOL-USDT-PERP"])
    exact = Simulator(symbols={"kraken": ["DOGE-EUR"]}, exchanges=["kraken", "coinbase"])

    assert {(t.instrument.exchange, t.instrument.symbol) for t in simulator.account()} == {
        ("binance", "SOL-USDT"),
        ("binance-usdm", "SOL-USDT-PERP"),
        ("kraken", "SOL-USDT"),
        ("coinbase", "SOL-USDT"),
    }
    assert {t.instrument.symbol for t in exact.account()} == {"DOGE-EUR", "BTC-USD", "ETH-USD"}
