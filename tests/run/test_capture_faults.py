"""Faults between a real exchange module and the rows: the simulator speaks, its account is compared."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from k2.feeds import registry
from k2.feeds.base import Exchange
from k2.log.memory import MemoryLog
from k2.model import CLOSED, FRAME, OPENED, SUBSCRIBED, Frame
from k2.run.capture import Capture
from k2.run.normalise import Normaliser, PartitionState, Row
from k2.schema import TRADES
from k2.settings import CaptureSettings, ExchangeSettings, LogSettings, Settings
from k2.simulator.account import Tally
from k2.simulator.faults import parse_fault
from k2.simulator.server import Simulator

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "feeds"))
from hostile_server import frame, raw_server, until_closed, upgrade
from toy_exchange import until

EXCHANGES = sorted(registry.OWN)
# Where they differ little from each other, the others' turn comes with the long tests.
FIRST_TWO = [
    pytest.param(name, marks=() if name in ("binance", "kraken") else pytest.mark.slow) for name in EXCHANGES
]  # fmt: skip
QUICK = CaptureSettings(
    connect_seconds=5.0,
    subscribe_seconds=5.0,
    backoff_first_seconds=0.01,
    backoff_max_seconds=0.1,
    ping_seconds=0.1,
    pong_seconds=5.0,
    rotate_overlap_seconds=0.2,
)


def exchange_with(name: str, **limits: float) -> Exchange:
    """Return an exchange of the product under limits of the test."""
    changed: Any = copy.copy(registry.get(name))
    changed.limits = dataclasses.replace(changed.limits, **limits)
    return changed  # type: ignore[no-any-return]


def settings_for(
    name: str, url: str, symbols: Sequence[str], channels: Sequence[str] = ("trades",), **capture: Any
) -> Settings:
    own = ExchangeSettings(symbols=tuple(symbols), channels=tuple(channels), url=url)
    return Settings(
        capture=msgspec.structs.replace(QUICK, **capture),
        log=LogSettings(linger_ms=1.0),
        exchanges={name: own},
    )


class Captured:
    """A capture at work, its log, and what becomes of the frames."""

    def __init__(self, exchange: Exchange, settings: Settings) -> None:
        self.exchange = exchange
        self.log = MemoryLog()
        self.capture = Capture(exchange, settings, self.log)

    def frames(self) -> list[Frame]:
        """Return everything in the log."""
        if not self.log.partitions():
            return []
        batches = self.log.read(self.exchange.name, 0, max_frames=10_000_000, max_bytes=1 << 32)
        return [frame for batch in batches for frame in batch.frames]

    def of(self, kind: str) -> list[Frame]:
        """Return the records of a kind."""
        return [frame for frame in self.frames() if frame.kind == kind]

    def status(self) -> Any:
        """Return the state of the first connection."""
        return self.capture.status().connections[0]

    def ended(self) -> dict[str, int]:
        """Return how often connections ended, by reason."""
        total: dict[str, int] = defaultdict(int)
        for connection in self.capture.status().connections:
            for reason, count in connection.ended.items():
                total[reason] += count
        return dict(total)

    def rows(self) -> dict[str, list[Row]]:
        """Return the rows of everything in the log."""
        rows: dict[str, list[Row]] = defaultdict(list)
        normaliser = Normaliser(self.exchange, {}, PartitionState())
        for batch in self.log.read(self.exchange.name, 0, max_frames=10_000_000, max_bytes=1 << 32):
            normaliser.normalise(batch, rows)
        return rows

    def trade_ids(self) -> dict[str, list[int]]:
        """Return the ids of the trade rows, by symbol, sorted."""
        symbol, trade_id = TRADES.column_names.index("symbol"), TRADES.column_names.index("trade_id")
        found: dict[str, list[int]] = defaultdict(list)
        for row in self.rows()["trades"]:
            found[row[symbol]].append(row[trade_id])
        return {symbol: sorted(ids) for symbol, ids in found.items()}


@contextlib.asynccontextmanager
async def capturing(exchange: Exchange, settings: Settings) -> AsyncIterator[Captured]:
    captured = Captured(exchange, settings)
    stop = asyncio.Event()
    task = asyncio.create_task(captured.capture.run(stop))
    try:
        yield captured
    finally:
        stop.set()
        await task


def told_ids(simulator: Simulator) -> dict[str, list[int]]:
    """Return the ids the simulator told, by symbol."""
    return {
        tally.instrument.symbol: [number for first, last in tally.announced for number in range(first, last + 1)]
        for tally in _of_trades(simulator)
        if tally.announced.count()
    }


def _of_trades(simulator: Simulator) -> list[Tally]:
    return [tally for tally in simulator.account() if tally.kind == "trade"]


@pytest.mark.parametrize("name", FIRST_TWO)
async def test_rotation_loses_and_doubles_no_trade(name: str) -> None:
    """Connections of a second's life, replaced in time and side by side for a while: each trade told is one row."""
    symbols = registry.get(name).default_symbols
    exchange = exchange_with(name, connection_seconds=1.0, connections_per_minute=6_000.0)
    simulator = Simulator(exchanges=[name], symbols={name: symbols}, rate=300.0)
    async with simulator:
        settings = settings_for(name, simulator.endpoints()[name]["url"], symbols)
        async with capturing(exchange, settings) as captured:
            await until(lambda: captured.capture.status().connections and captured.ended().get("rotated", 0) >= 2)
            await simulator.close_markets(2)
            await until(lambda: captured.trade_ids() == told_ids(simulator))
            ended = captured.ended()

    assert set(ended) == {"rotated"}
    assert captured.trade_ids() == told_ids(simulator)
    assert len(captured.trade_ids()) == len(symbols)
    assert captured.rows()["gaps"] == []
    assert captured.rows()["dead_letters"] == []


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("half-open:for=60", "pong"),
        ("silence:for=60", "silent"),
        ("silence:for=60,heartbeats=true", "data_silence"),
        ("disconnect", "closed"),
        ("disconnect:abrupt=true", "broken"),
    ],
)
@pytest.mark.parametrize("name", FIRST_TWO)
async def test_fault_of_a_connection_is_seen_and_mended(name: str, fault: str, reason: str) -> None:
    """The simulator's connections go bad one way or another: CLOSED says how, it is counted, and data flows again."""
    if name.startswith("binance") and "heartbeats" in fault:
        pytest.skip("Binance sends no heartbeats: its silence is one of the socket")
    symbol = registry.get(name).default_symbols[0]
    quick = {"silence_seconds": 0.7, "connections_per_minute": 6_000.0}
    ping_seconds = 30.0 if reason == "silent" else 0.1  # Kraken's pong is a message, so its pings end the silence
    if reason == "pong":
        quick["silence_seconds"] = 30.0
    if reason == "data_silence":
        quick |= {"silence_seconds": 30.0, "data_silence_seconds": 0.5}
    exchange = exchange_with(name, **quick)
    simulator = Simulator(exchanges=[name], symbols={name: [symbol]}, rate=200.0)
    async with simulator:
        url = simulator.endpoints()[name]["url"]
        async with capturing(
            exchange, settings_for(name, url, [symbol], pong_seconds=0.5, ping_seconds=ping_seconds)
        ) as captured:
            await until(lambda: captured.of(SUBSCRIBED) and captured.trade_ids())
            simulator.faults.add(parse_fault(fault), asyncio.get_running_loop().time())
            await until(lambda: captured.ended())
            ended = captured.ended()
            await until(lambda: len(captured.of(SUBSCRIBED)) == 2 and captured.status().state == "subscribed")
            counted = captured.status().frames
            await until(lambda: captured.status().frames > counted + 20)

    assert ended == {reason: 1}
    assert len(captured.of(OPENED)) == 2
    closed = captured.of(CLOSED)[0]
    assert closed.data
    assert closed.epoch == 0


@pytest.mark.parametrize("name", EXCHANGES)
async def test_refusals_and_bans_of_an_exchange_are_waited_out(name: str) -> None:
    """First 429, then every subscription refused, then all is well: counted by kind, told in the exchange's words."""
    symbol = registry.get(name).default_symbols[0]
    exchange = exchange_with(name, connections_per_minute=6_000.0)
    simulator = Simulator(exchanges=[name], symbols={name: [symbol]}, rate=100.0)
    async with simulator:
        now = asyncio.get_running_loop().time()
        simulator.faults.add(parse_fault("429:for=0.5"), now)
        simulator.faults.add(parse_fault("refuse:for=60"), now)
        url = simulator.endpoints()[name]["url"]
        async with capturing(exchange, settings_for(name, url, [symbol], subscribe_seconds=0.3)) as captured:
            await until(lambda: captured.capture.status().connections and captured.ended().get("throttled"))
            throttled = captured.status().last_error
            await until(lambda: captured.of(CLOSED) or captured.status().refused)
            said = captured.status().last_error + str(captured.status().refused)
            simulator.faults.clear()
            await until(lambda: captured.of(SUBSCRIBED) and captured.trade_ids())

    assert "HTTP 429" in throttled
    assert any(word in said for word in ("refused", "not supported", "acknowledgement")), said


async def test_one_unknown_product_costs_the_others_nothing() -> None:
    """Coinbase refuses a whole request for one product, naming none of ours: each is asked for alone, at once."""
    symbols = [f"A{n}-USD" for n in range(8)]
    exchange = exchange_with("coinbase", connections_per_minute=6_000.0, requests_per_second=20.0)
    simulator = Simulator(exchanges=["coinbase"], symbols={"coinbase": symbols}, rate=20.0)
    async with simulator:
        url = simulator.endpoints()["coinbase"]["url"]
        settings = settings_for("coinbase", url, [*symbols, "NOPE-USD"], ("trades", "quotes"), backoff_max_seconds=30.0)
        async with capturing(exchange, settings) as captured:
            await until(lambda: set(captured.trade_ids() if captured.of(SUBSCRIBED) else ()) == set(symbols))
            await until(lambda: len(captured.status().refused) == 2)
            status = captured.status()
            opened = len(captured.of(OPENED))

    assert sorted(status.refused) == ["market_trades:NOPE-USD", "ticker:NOPE-USD"]
    assert all("NOPE-USD is not a valid product" in reason for reason in status.refused.values())
    assert status.ended == {}
    assert opened == 1


KRAKEN_TRADE = (
    b'{"symbol":"BTC/USD","side":"buy","price":61000.1,"qty":0.00000001,"ord_type":"limit","trade_id":%d,'
    b'"timestamp":"2024-08-09T00:00:00.%06dZ"}'
)


def kraken_trades(first: int, count: int, filler: bytes = b"") -> bytes:
    trades = b",".join(KRAKEN_TRADE % (n, n % 1_000_000) for n in range(first, first + count))
    return b'{"channel":"trade","type":"update","filler":"' + filler + b'","data":[' + trades + b"]}"


ACKNOWLEDGED = b'{"method":"subscribe","success":true,"req_id":1,"result":{"channel":"trade","symbol":"BTC/USD"}}'


async def kraken_saying(*messages: bytes) -> Captured:
    """Capture a Kraken that says these messages on its first connection, until they are in the log, or refused."""

    async def script(number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await upgrade(reader, writer)
        writer.write(frame(ACKNOWLEDGED))
        for message in messages if number == 0 else ():
            writer.write(frame(message))
            await writer.drain()
        await until_closed(reader)

    exchange = exchange_with("kraken", connections_per_minute=6_000.0)
    async with raw_server(script) as url, capturing(exchange, settings_for("kraken", url, ["BTC-USD"])) as captured:
        await until(lambda: len(captured.of(FRAME)) == 1 + len(messages) or len(captured.of(SUBSCRIBED)) == 2, 60)
    return captured


async def test_frame_of_8_megabytes_becomes_its_rows() -> None:
    """Sixty thousand trades in one message of 8 MB: one record, each trade one exact row."""
    message = kraken_trades(1, 60_000)
    captured = await kraken_saying(message)

    assert len(message) > 8_000_000
    assert captured.of(FRAME)[1].data == message
    assert captured.trade_ids() == {"BTC-USD": list(range(1, 60_001))}
    assert len(captured.of(OPENED)) == 1


async def test_frame_above_the_limit_is_refused_where_all_can_see() -> None:
    """17 MiB is more than capture.max_frame_bytes: CLOSED, status and count say so, and the next connection works."""
    captured = await kraken_saying(kraken_trades(1, 1, b"x" * (17 << 20)))

    assert captured.of(CLOSED)[0].data.startswith(b"a frame is larger than capture.max_frame_bytes = 16777216")
    assert captured.ended() == {"too_large": 1, "stopped": 1}
    assert captured.status().last_error.startswith("a frame is larger")
    assert [f.epoch for f in captured.of(SUBSCRIBED)] == [0, 1]


async def test_text_that_is_not_utf8_is_a_dead_letter_and_nothing_more() -> None:
    """Broken bytes between two good messages: one dead letter with them, both trades, one connection."""
    broken = kraken_trades(2, 1).replace(b"BTC/", b"BTC\xff\xfe\xc0/")
    captured = await kraken_saying(kraken_trades(1, 1), broken, kraken_trades(3, 1))
    rows = captured.rows()

    assert captured.trade_ids() == {"BTC-USD": [1, 3]}
    assert [(row[1], row[3]) for row in rows["dead_letters"]] == [("bad_frame", broken)]
    assert [row[4:6] for row in rows["gaps"]] == [(2, 2)]
    assert len(captured.of(OPENED)) == 1


async def _thousand_symbols(name: str, **limits: float) -> tuple[Captured, Simulator, list[str], list[Any]]:
    """Capture 1,000 symbols of an exchange for a moment."""
    quote = {"kraken": "USD", "coinbase": "USD", "binance": "USDT", "binance-usdm": "USDT-PERP"}[name]
    symbols = [f"A{n}X-{quote}" for n in range(1_000)]
    exchange = exchange_with(name, **limits)
    simulator = Simulator(exchanges=[name], symbols={name: symbols}, rate=0.5)
    async with simulator:
        url = simulator.endpoints()[name]["url"]
        settings = settings_for(name, url, symbols, subscribe_seconds=30.0)
        async with capturing(exchange, settings) as captured:
            size = exchange.limits.symbols_per_connection
            count = -(-1_000 // size)
            await until(lambda: len(captured.of(SUBSCRIBED)) == count, 100)
            await until(lambda: all(tally.announced.count() for tally in _of_trades(simulator)), 60)
            assert await simulator.close_markets(20)
            connections = captured.capture.status().connections
    return captured, simulator, symbols, connections


@pytest.mark.slow
@pytest.mark.parametrize("name", EXCHANGES)
async def test_thousand_symbols_over_sharded_connections_all_arrive(name: str) -> None:
    """No connection has more symbols than its exchange allows, all are acknowledged, every trade told is a row."""
    captured, simulator, symbols, connections = await _thousand_symbols(name, connections_per_minute=6_000.0)
    most = registry.get(name).limits.symbols_per_connection

    assert sum(connection.symbols for connection in connections) == 1_000
    assert all(connection.symbols <= most for connection in connections)
    assert all(connection.state == "subscribed" and not connection.refused for connection in connections)
    assert captured.trade_ids() == told_ids(simulator)
    assert set(captured.trade_ids()) == set(symbols)
    assert captured.ended().keys() <= {"stopped"}
