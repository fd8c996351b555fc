"""What holds for every request: an id, a bounded body, a count and a duration."""

from __future__ import annotations

import re
import time
import uuid

from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from k2 import meters
from k2.api.problems import problem
from k2.run.metrics import METRICS

MAX_BODY_BYTES = 64 << 10  # the longest body is an SQL statement

_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class BodyTooLarge(HTTPException):
    """Raised inside the application when a body passes the limit while it is read."""

    def __init__(self) -> None:
        meters.acted("api.body")
        super().__init__(413, f"the body is larger than {MAX_BODY_BYTES} bytes")


class RequestBounds:
    """Gives each request an id (the caller's X-Request-Id, if it is a plain one) and bounds its body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", "")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        scope["k2_request_id"] = request_id
        read = 0

        async def bounded_receive() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > MAX_BODY_BYTES:
                raise BodyTooLarge
            return message

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        length = headers.get(b"content-length", "0")
        if length.isdecimal() and int(length) > MAX_BODY_BYTES:
            await problem(413, "too-large", BodyTooLarge().detail, request_id)(scope, receive, send_with_id)
            return
        await self._app(scope, bounded_receive, send_with_id)


class Counted:
    """Counts requests and measures them, per route and status."""

    def __init__(self, app: ASGIApp, registry: CollectorRegistry) -> None:
        self._app = app
        requests, seconds = METRICS["k2_api_requests_total"], METRICS["k2_api_request_seconds"]
        self._requests = Counter(requests.name, requests.text, requests.labels, registry=registry)
        self._seconds = Histogram(
            seconds.name,
            seconds.text,
            seconds.labels,
            registry=registry,
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500
        started = time.perf_counter()

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            # The route's pattern, not the path: paths of strangers must not make new series.
            route = scope.get("k2_route", "none")
            self._requests.labels(route, str(status)).inc()
            self._seconds.labels(route).observe(time.perf_counter() - started)
