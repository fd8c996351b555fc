"""A client of the simulator built from K2's own exchange modules."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

import aiohttp
import pytest

from k2.errors import BadFrame
from k2.feeds import registry
from k2.model import FRAME, LIVE, Frame, Quote, Trade
from k2.simulator.server import Simulator

DEADLINE_SECONDS = 20.0


@dataclass
class Client:
    """One connection: subscribes as K2 would, keeps and parses everything until the end."""

    exchange: str
    socket: aiohttp.ClientWebSocketResponse
    pending: set[str]
    messages: list[str] = field(default_factory=list)
    trades: list[Trade] = field(default_factory=list)
    quotes: list[Quote] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    ended: aiohttp.WSMsgType | None = None

    async def read(self) -> None:
        """Read until the connection ends."""
        exchange = registry.get(self.exchange)
        while self.ended is None:
            message = await self.socket.receive()
            if message.type != aiohttp.WSMsgType.TEXT:
                self.ended = message.type
                return
            self.messages.append(message.data)
            data = message.data.encode()
            control = exchange.control(data)
            if control.kind == "acknowledged":
                self.pending -= control.acknowledged
            elif control.kind == "refused":
                self.refused.append(control.reason)
            try:
                parsed = exchange.parse(Frame(FRAME, LIVE, "test", 0, len(self.messages), 1, data))
            except BadFrame:
                self.bad.append(message.data)
            else:
                self.trades += parsed.trades
                self.quotes += parsed.quotes

    def ids(self, symbol: str) -> list[int]:
        """Return the ids received of a symbol, in the order they came."""
        return [trade.trade_id for trade in self.trades if trade.symbol == symbol]

    async def until(self, condition: Callable[[Client], bool]) -> None:
        """Wait until a condition holds; fails when it never does."""
        await eventually(lambda: condition(self) or self.ended is not None)
        assert condition(self), f"the connection ended ({self.ended})"

    async def end(self) -> aiohttp.WSMsgType:
        """Wait until the connection has ended, and return how."""
        await eventually(lambda: self.ended is not None)
        assert self.ended is not None
        return self.ended


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds; fails when it does not in time."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not condition():  # noqa: ASYNC110 any condition may be asked for
            await asyncio.sleep(0.01)


class Clients:
    """Opens clients and closes them at the end."""

    eventually = staticmethod(eventually)

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self.session = session
        self._made: list[Client] = []
        self._readers: list[asyncio.Task[None]] = []

    async def open(
        self, simulator: Simulator, exchange: str, symbols: Sequence[str] = (), channels: Sequence[str] = ("trades",)
    ) -> Client:
        """Connect and subscribe; reading goes on by itself."""
        port = registry.get(exchange)
        symbols = symbols or port.default_symbols
        url = port.connection_url(simulator.endpoints()[exchange]["url"], symbols, channels)
        socket = await self.session.ws_connect(url)
        requests = port.requests(symbols, channels)
        client = Client(exchange, socket, {key for request in requests for key in request.expects})
        for request in requests:
            await socket.send_str(request.text)
        self._made.append(client)
        self._readers.append(asyncio.create_task(client.read()))
        return client

    async def close(self) -> None:
        """Close every client and hand on what went wrong in its reader."""
        for client in self._made:
            with contextlib.suppress(ConnectionError):
                await client.socket.close()
        await asyncio.gather(*self._readers)

    async def finish(self) -> None:
        """Wait until every reader has read to the end of its connection."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            await asyncio.gather(*self._readers)


@pytest.fixture
async def clients() -> AsyncIterator[Clients]:
    """Clients of simulators."""
    async with aiohttp.ClientSession() as session:
        made = Clients(session)
        yield made
        await made.close()
