"""An exchange small enough to read at a glance, and a real WebSocket server that plays it as badly as a test asks."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from aiohttp import WSMsgType, web

from k2.feeds.base import DATA, HEARTBEAT, Control, Limits, Request
from k2.model import NOTHING, Frame, Parsed

LIMITS = Limits(
    symbols_per_connection=200,
    requests_per_second=1_000.0,
    connection_seconds=math.inf,
    silence_seconds=30.0,
    connections_per_minute=6_000.0,
)


class ToyExchange:
    """Speaks JSON: subscribe by a list of symbols, get `ack`, `refuse`, `heartbeat`, `reconnect` or `n` (data)."""

    name = "toy"
    rest_url = ""
    default_symbols: tuple[str, ...] = ("BTC-USDT",)
    contiguous_ids: bool = True

    def __init__(self, url: str = "", limits: Limits = LIMITS, own_ping: str | None = None) -> None:
        self.url = url
        self.limits = limits
        self.own_ping = own_ping

    def connection_url(self, url: str, symbols: Sequence[str], channels: Sequence[str]) -> str:
        return url

    def requests(self, symbols: Sequence[str], channels: Sequence[str]) -> list[Request]:
        parts = [symbols[i : i + 100] for i in range(0, len(symbols), 100)]
        return [Request(json.dumps({"subscribe": list(part)}), frozenset(part)) for part in parts]

    def control(self, data: bytes) -> Control:
        try:
            message = json.loads(data)
        except ValueError:
            return DATA
        if "ack" in message:
            return Control("acknowledged", frozenset(message["ack"]))
        if "refuse" in message:
            return Control("refused", frozenset(message["refuse"]), "not listed")
        if "reconnect" in message:
            return Control("reconnect")
        return HEARTBEAT if "heartbeat" in message else DATA

    def ping(self) -> str | None:
        return self.own_ping

    def parse(self, frame: Frame) -> Parsed:
        return NOTHING

    def to_canonical(self, native: str) -> str:
        return native

    def to_native(self, canonical: str) -> str:
        return canonical


class ToySocket:
    """One connection as the server sees it; `number` counts connections from 0."""

    def __init__(self, number: int, ws: web.WebSocketResponse) -> None:
        self.number = number
        self.ws = ws
        self.subscribed: list[str] = []
        self.heard: list[str] = []

    async def send(self, **message: object) -> None:
        await self.ws.send_str(json.dumps(message))

    async def listen(self, *, refuse: Sequence[str] = (), ignore: Sequence[str] = ()) -> None:
        """Answer subscriptions until the client goes; refuse or ignore some symbols."""
        async for message in self.ws:
            self.heard.append(message.data)
            if message.type is WSMsgType.TEXT and "subscribe" in message.data:
                asked = json.loads(message.data)["subscribe"]
                if good := [s for s in asked if s not in refuse and s not in ignore]:
                    self.subscribed += good
                    await self.send(ack=good)
                if bad := [s for s in asked if s in refuse]:
                    await self.send(refuse=bad)


Script = Callable[[ToySocket], Awaitable[None]]


class ToyServer:
    """The server: `script` plays one connection; `answer` may give an HTTP response instead."""

    def __init__(self) -> None:
        self.url = ""
        self.sockets: list[ToySocket] = []
        self.script: Script = ToySocket.listen
        self.answer: Callable[[int], web.Response | None] = lambda number: None
        self.asked = 0
        self.autoping = True
        self.compress = True
        self.published = 0

    async def publish(self) -> int:
        """Send the next number to every open, subscribed connection, and return it."""
        self.published += 1
        for socket in self.sockets:
            if socket.subscribed and not socket.ws.closed:
                with contextlib.suppress(ConnectionError):
                    await socket.send(n=self.published)
        return self.published

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.asked += 1
        refusal = self.answer(self.asked - 1)
        if refusal is not None:
            return refusal
        ws = web.WebSocketResponse(autoping=self.autoping, compress=self.compress, timeout=0.1)
        await ws.prepare(request)
        socket = ToySocket(len(self.sockets), ws)
        self.sockets.append(socket)
        with contextlib.suppress(ConnectionError):
            await self.script(socket)
        return ws


@contextlib.asynccontextmanager
async def serving(**runner_options: object) -> AsyncIterator[ToyServer]:
    """Run a toy server on a free port of loopback; `ssl_context` makes it wss."""
    server = ToyServer()
    app = web.Application()
    app.router.add_get("/ws", server._handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    tls = runner_options.get("ssl_context")
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)  # type: ignore[arg-type]
    await site.start()
    host, port = site._server.sockets[0].getsockname()[:2]  # type: ignore[union-attr]
    server.url = f"{'wss' if tls else 'ws'}://{host}:{port}/ws"
    try:
        yield server
    finally:
        await runner.cleanup()


async def until(condition: Callable[[], object], seconds: float = 45.0) -> None:
    """Wait until a condition holds; fails after the deadline."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 (conditions of any kind, no event to wait for)
            await asyncio.sleep(0.005)
