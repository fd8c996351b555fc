"""HTTP as uvicorn speaks it, with a deadline for the request: who sends it slowly does not keep others out."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from k2 import meters

REQUEST_SECONDS = 15.0  # from being connected, or the answer before, until a request is there whole, body and all


class DeadlineProtocol(H11Protocol):
    """Closes a connection that has not sent a whole request in time.

    By the clock, not by silence: a stranger might send a letter now and then, and places are few.
    An idle connection that is kept alive is closed sooner, by uvicorn.
    """

    request_seconds = REQUEST_SECONDS
    _due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request."""
        super().connection_made(transport)
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
