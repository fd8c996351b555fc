"""A DNS server on loopback that knows one name, or keeps silent."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import struct
import subprocess
from collections.abc import AsyncIterator
from functools import cache
from pathlib import Path

ADDRESS = "127.0.0.53"
NAME = "exchange.test"
_A = 1
_HEADER_BYTES = 12


class NameServer(asyncio.DatagramProtocol):
    """Answers every question with 127.0.0.1 (of IPv6: with nothing) unless it is `silent`."""

    def __init__(self) -> None:
        self.silent = False
        self.answered = self.swallowed = 0
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def datagram_received(self, data: bytes, sender: tuple[str, int]) -> None:
        if self.silent:
            self.swallowed += 1
            return
        assert self._transport is not None
        self.answered += 1
        self._transport.sendto(answer(data), sender)


def answer(question: bytes) -> bytes:
    """Return the answer to a question, as RFC 1035 has it."""
    end = question.index(0, _HEADER_BYTES) + 5  # the name, its type, its class
    (asked,) = struct.unpack("!H", question[end - 4 : end - 2])
    addresses = [socket.inet_aton("127.0.0.1")] if asked == _A else []
    head = question[:2] + struct.pack("!HHHHH", 0x8180, 1, len(addresses), 0, 0)
    return (
        head
        + question[_HEADER_BYTES:end]
        + b"".join(struct.pack("!HHHIH", 0xC00C, _A, 1, 0, len(address)) + address for address in addresses)
    )


@contextlib.asynccontextmanager
async def name_server() -> AsyncIterator[NameServer]:
    """Run the server on port 53."""
    transport, protocol = await asyncio.get_running_loop().create_datagram_endpoint(
        NameServer, local_addr=(ADDRESS, 53)
    )
    try:
        yield protocol
    finally:
        transport.close()


def asking(folder: Path) -> list[str]:
    """Return what to put before a command, so that it asks this server, and waits for it for minutes."""
    file = folder / "resolv.conf"
    file.write_text(f"nameserver {ADDRESS}\noptions timeout:30 attempts:5\n")
    return ["unshare", "--mount", "sh", "-c", f'mount --bind {file} /etc/resolv.conf && exec "$@"', "sh"]


@cache
def why_not() -> str:
    """Return why this machine cannot do it, empty when it can: needs root, and to mount in a namespace."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return "needs root and unshare: port 53, and a resolv.conf of its own"
    tried = subprocess.run(
        ["unshare", "--mount", "sh", "-c", "mount --bind /etc/hosts /etc/resolv.conf"], capture_output=True, check=False
    )
    return "" if tried.returncode == 0 else "this machine lets nobody mount in a namespace"
