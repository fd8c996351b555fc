"""HTTP as uvicorn speaks it, with a deadline for the request: who sends it slowly does not keep others out.

Nor do those who send nothing take the descriptors of this process, which may also ingest and offload.
"""

from __future__ import annotations

import asyncio
import resource

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from k2 import meters

MAX_SOCKETS = 320  # above `server.MAX_CONNECTIONS`, so that who comes a little too late is answered 503
# Of the descriptors this process may have, connections leave so many to the rest of it: hot, cold and log.
RESERVED_DESCRIPTORS = 128
REQUEST_SECONDS = 15.0  # from being connected, or the answer before, until a request is there whole, body and all


class DeadlineProtocol(H11Protocol):
    """Closes a connection that has not sent a whole request in time.

    By the clock, not by silence: a stranger might send a letter now and then, and places are few.
    An idle connection that is kept alive is closed sooner, by uvicorn.
    """

    request_seconds = REQUEST_SECONDS
    _due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request; without a place for it the connection is closed at once."""
        super().connection_made(transport)
        if len(self.connections) > MAX_SOCKETS or _is_reserved(transport):
            meters.acted("api.sockets")
            transport.abort()
            return
        self._wait_for_request()

    def data_received(self, data: bytes) -> None:
        """Stop the clock once the request is there whole."""
        super().data_received(data)
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._stop_waiting()

    def on_response_complete(self) -> None:
        """Begin to wait for the next request."""
        self._wait_for_request()
        super().on_response_complete()
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):  # it was here already
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the clock."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait_for_request(self) -> None:
        self._stop_waiting()
        self._due = self.loop.call_later(self.request_seconds, self._give_up)

    def _stop_waiting(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None

    def _give_up(self) -> None:
        meters.acted("api.request")
        self.transport.abort()


def _is_reserved(transport: asyncio.Transport) -> bool:
    """Whether a connection has one of the last descriptors there are: a new one gets the lowest that is free."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    number: int = transport.get_extra_info("socket").fileno()
    return allowed != resource.RLIM_INFINITY and number >= allowed - RESERVED_DESCRIPTORS
