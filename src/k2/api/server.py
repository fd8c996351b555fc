"""Serves the application from a thread of its own."""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import socket
import threading
from asyncio.constants import ACCEPT_RETRY_DELAY
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from k2 import meters
from k2.api.protocol import DeadlineProtocol
from k2.errors import InUse, Misconfigured, Unavailable

_logger = logging.getLogger(__name__)

BACKLOG = 128
MAX_CONNECTIONS = 256  # further ones are refused with 503
ACCEPT_RETRY_SECONDS = float(ACCEPT_RETRY_DELAY)
_START_SECONDS = 30.0
_GRACE_SECONDS = 5  # answers being sent at a stop get this long


class ApiServer:
    """An HTTP server in a thread. `start` returns when it answers, `stop` when it is gone.

    Nothing is written to the terminal; uvicorn's messages go to the standard `logging`.
    """

    def __init__(self, app: ASGIApp, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self._up = threading.Event()
        config = uvicorn.Config(
            app,
            http=DeadlineProtocol,
            log_config=None,
            access_log=False,
            lifespan="on",
            timeout_graceful_shutdown=_GRACE_SECONDS,
            limit_concurrency=MAX_CONNECTIONS,
            backlog=BACKLOG,
        )
        self._server = _Server(config, self._up)
        meters.watch("api.connections", self._server, lambda server: len(server.server_state.connections))
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def port(self) -> int:
        """The port listened on: the one asked for, or the free one taken for 0."""
        return self._port

    @property
    def url(self) -> str:
        """Base address, without a trailing slash."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self._port}"

    @property
    def running(self) -> bool:
        """Whether the server's thread is alive."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Listen and serve.

        Raises:
            InUse: the port is taken.
            Misconfigured: the address is not one of this machine, or the port is not allowed.
            Unavailable: the server did not come up.
        """
        logging.getLogger("uvicorn.error").addFilter(_count_refusal)
        listener = _listen(self._host, self._port)
        self._port = listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, args=(listener,), name="k2-api", daemon=True)
        self._thread.start()
        if not self._up.wait(_START_SECONDS) or self._error is not None or not self._server.started:
            self.stop()
            listener.close()
            raise Unavailable(f"the REST server on {self.url} did not start: {self._error or 'no answer'}")

    def stop(self) -> None:
        """Finish the answers being sent, then end; safe to call twice and before `start`."""
        if self._thread is None:
            return
        self._server.should_exit = True
        self._thread.join(_GRACE_SECONDS + 5)
        if self._thread.is_alive():
            meters.acted("api.grace")
            self._server.force_exit = True
            self._thread.join(_GRACE_SECONDS)

    def _serve(self, listener: socket.socket) -> None:
        try:
            with listener:
                self._server.run(sockets=[listener])
        except BaseException as error:  # noqa: BLE001 - the thread's last words, told by `start`
            self._error = error
        finally:
            self._up.set()


def _count_refusal(record: logging.LogRecord) -> bool:
    """Count a connection above the limit: uvicorn refuses it without asking anybody, and writes this line."""
    if "concurrency limit" in record.getMessage():
        meters.acted("api.connections")
    return True


class _Server(uvicorn.Server):
    """Says when it is up, so that nobody has to ask again and again."""

    def __init__(self, config: uvicorn.Config, up: threading.Event) -> None:
        super().__init__(config)
        self._up = up

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(_Exhaustion().note)
        await super().startup(sockets)
        self._up.set()


class _Exhaustion:
    """Tells, once a try, that connections could not be taken: the loop tries again, and they wait in its queue."""

    def __init__(self) -> None:
        self._told_at = -math.inf

    def note(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Take what an event loop says of a failure nobody waits for; it tells of one try up to `BACKLOG` times."""
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in (errno.EMFILE, errno.ENFILE):
            loop.default_exception_handler(context)
        elif loop.time() - self._told_at > ACCEPT_RETRY_SECONDS / 2:
            self._told_at = loop.time()
            meters.acted("api.accept")
            _logger.error(
                "REST: connections wait, accepting them is tried again in %g s: %s (raise `ulimit -n`)",
                *(ACCEPT_RETRY_SECONDS, error.strerror),
            )


def check_free(host: str, port: int) -> None:
    """Raise InUse when the port is taken, Misconfigured when it cannot be listened on."""
    _listen(host, port).close()


def _listen(host: str, port: int) -> socket.socket:
    """Bind and listen, so that a taken port is known before a thread is started."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    except (socket.gaierror, OverflowError) as error:
        raise Misconfigured(f"address {host}:{port} cannot be listened on: {error} (set api.host, --host)") from None
    # asyncio sends small packets at once on sockets that say TCP, and only on those: without it each answer on a
    # connection that is kept waits 40 ms for an acknowledgement, as head and body go out separately.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        # Lets a restart take the port of connections that are still winding down, not of a listener.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise InUse(
                f"port {port} on {host} is taken by another process: "
                "choose another with --port or api.port (0: any free one)"
            ) from None
        raise Misconfigured(f"address {host}:{port} cannot be listened on: {error.strerror}") from None
    return listener
