"""Servers below the level of WebSockets: raw ones that violate every rule, and a proxy whose network can vanish."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

_MAGIC = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, section 1.3
TEXT, CLOSE, PING = 1, 8, 9

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Script = Callable[[int, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def frame(
    data: bytes, opcode: int = TEXT, *, last: bool = True, compressed: bool = False, told: int | None = None
) -> bytes:
    """Return one frame as a server sends it; `told` is the length it claims to have."""
    length = len(data) if told is None else told
    first = opcode | last << 7 | compressed << 6
    if length < 126:
        return struct.pack("!BB", first, length) + data
    if length < 1 << 16:
        return struct.pack("!BBH", first, 126, length) + data
    return struct.pack("!BBQ", first, 127, length) + data


async def upgrade(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *extensions: str) -> None:
    """Answer the client's handshake as a server should."""
    head = await reader.readuntil(b"\r\n\r\n")
    key = next(
        line.split(b":")[1].strip() for line in head.splitlines() if line.lower().startswith(b"sec-websocket-key")
    )
    accept = base64.b64encode(hashlib.sha1(key + _MAGIC).digest()).decode()
    lines = ["HTTP/1.1 101 Switching Protocols", "Upgrade: websocket", "Connection: Upgrade"]
    lines += [f"Sec-WebSocket-Accept: {accept}", *(f"Sec-WebSocket-Extensions: {name}" for name in extensions)]
    writer.write("\r\n".join([*lines, "", ""]).encode())
    await writer.drain()


async def until_closed(reader: asyncio.StreamReader) -> None:
    """Read what the client says until it closes."""
    while True:
        first, second = await reader.readexactly(2)
        length = second & 127
        if length > 125:
            length = int.from_bytes(await reader.readexactly(2 if length == 126 else 8))
        await reader.readexactly(4 + length)  # the mask goes before
        if first & 15 == CLOSE:
            return


@contextlib.asynccontextmanager
async def raw_server(script: Script) -> AsyncIterator[str]:
    """Run `script(number, reader, writer)` for every TCP connection; yields a ws address."""
    numbers = iter(range(1_000_000))
    running: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        running.add(task)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await script(next(numbers), reader, writer)
        with contextlib.suppress(ConnectionError):
            writer.transport.abort()
        running.discard(task)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/ws"
    finally:
        server.close()
        for task in list(running):
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


class Proxy:
    """Forwards TCP to a server, until its network vanishes: nothing is carried, nothing closed, nobody told."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._there = asyncio.Event()
        self._there.set()
        self._pumps: set[asyncio.Task[None]] = set()
        self.port = 0
        self.delay_seconds = 0.0  # between two pieces, which are then small
        self.dropped = 0

    def vanish(self) -> None:
        """Carry nothing any more, in either direction, of connections there are and to come."""
        self._there.clear()

    def reappear(self) -> None:
        """Carry new connections; what the old ones said meanwhile is lost, and so are they."""
        for pump in self._pumps:
            pump.cancel()
        self._there.set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Join a client's connection with one to the server."""
        theirs, out = await asyncio.open_connection("127.0.0.1", self._port)
        pumps = {asyncio.create_task(self._pump(reader, out)), asyncio.create_task(self._pump(theirs, writer))}
        self._pumps |= pumps
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            self._pumps -= pumps
            writer.transport.abort()
            out.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(16 if self.delay_seconds else 65_536):
                if not self._there.is_set():
                    self.dropped += len(data)
                    continue
                writer.write(data)
                await writer.drain()
                if self.delay_seconds:
                    await asyncio.sleep(self.delay_seconds)
            if not self._there.is_set():
                await asyncio.Event().wait()  # the end is not carried either


@contextlib.asynccontextmanager
async def proxying(url: str) -> AsyncIterator[tuple[Proxy, str]]:
    """Run a proxy before the server of a ws address; yields it and the address through it."""
    scheme, rest = url.split("://")
    host, path = rest.split("/", 1)
    proxy = Proxy(int(host.rsplit(":", 1)[1]))
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy, f"{scheme}://127.0.0.1:{proxy.port}/{path}"
    finally:
        server.close()
        for pump in list(proxy._pumps):
            pump.cancel()
        await asyncio.gather(*proxy._pumps, return_exceptions=True)


def forget_peak() -> None:
    """Let the peak of this process's memory begin anew at what it uses now."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Return the most memory this process has used since `forget_peak`."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10
