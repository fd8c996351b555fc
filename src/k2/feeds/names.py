"""Looks host names up as this machine does (hosts file included), each in a thread of its own.

The machine's lookup can hang for minutes while no DNS server answers, and nobody can call it back. In the threads that
the rest of a capture uses, a few such lookups would hold up its appends to the log, and its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading

from aiohttp.abc import AbstractResolver, ResolveResult

from k2 import meters

MOST_LOOKUPS = 16


class Names(AbstractResolver):
    """Looks names up for one event loop; keeps no answers, the machine does that."""

    def __init__(self) -> None:
        self._places = asyncio.Semaphore(MOST_LOOKUPS)

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Return the addresses of a name. Whoever stops waiting finds a note of it in the error it is told by.

        A lookup that nobody waits for any more runs to its end and keeps its place, of `MOST_LOOKUPS`, until then.

        Raises OSError: there is no such name, or no thread can be started.
        """
        try:
            return await self._look_up(host, port, family)
        except asyncio.CancelledError as error:
            error.add_note(f"DNS has not found {host} yet")
            raise

    async def close(self) -> None:
        """Do nothing: lookups that hang cannot be ended, and hold up no end of the process."""

    async def _look_up(self, host: str, port: int, family: socket.AddressFamily) -> list[ResolveResult]:
        if self._places.locked():
            meters.acted("feeds.lookups")
        await self._places.acquire()
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[list[ResolveResult]] = loop.create_future()

        def look() -> None:
            outcome: list[ResolveResult] | Exception
            try:
                outcome = _addresses(host, port, family)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is told to who asked
                outcome = error
            with contextlib.suppress(RuntimeError):  # the loop is over, nobody waits
                loop.call_soon_threadsafe(self._told, answer, outcome)

        try:
            threading.Thread(target=look, name="k2-dns", daemon=True).start()
        except RuntimeError as error:
            self._places.release()
            raise OSError(f"look up {host}: {error}") from None
        return await answer

    def _told(self, answer: asyncio.Future[list[ResolveResult]], outcome: list[ResolveResult] | Exception) -> None:
        self._places.release()
        if answer.done():
            return
        if isinstance(outcome, Exception):
            answer.set_exception(outcome)
        else:
            answer.set_result(outcome)


def _addresses(host: str, port: int, family: socket.AddressFamily) -> list[ResolveResult]:
    found = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    flags = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
    return [
        ResolveResult(hostname=host, host=str(address[0]), port=port, family=kind, proto=proto, flags=flags)
        for kind, _, proto, _, address in found
    ]
