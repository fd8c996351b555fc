"""Errors as `application/problem+json` (RFC 9457), with the status that tells the caller what to do."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from k2.api.models import Problem
from k2.errors import K2Error, Misconfigured, Rejected, TimedOut, Unavailable, UnknownName

_LOGGER = logging.getLogger("k2.api")

# The first class an error is an instance of decides.
_STATUS: tuple[tuple[type[K2Error], int, str], ...] = (
    (UnknownName, 404, "unknown-name"),
    (Rejected, 400, "rejected"),
    (TimedOut, 504, "timed-out"),
    (Unavailable, 503, "unavailable"),
    (Misconfigured, 500, "misconfigured"),
    (K2Error, 500, "failed"),
)


def status_of(error: K2Error) -> tuple[int, str]:
    """Return the HTTP status and the problem type of an error."""
    return next((status, name) for kind, status, name in _STATUS if isinstance(error, kind))


def problem(status: int, name: str, detail: str, request_id: str, headers: Mapping[str, str] | None = None) -> Response:
    """Build the answer that tells a problem."""
    body = Problem(
        type=name, title=name.replace("-", " ").capitalize(), status=status, detail=detail, instance=request_id
    )
    extra = {"Retry-After": "1"} if status == 503 else {}
    return Response(
        msgspec.json.encode(body),
        status,
        {**extra, **(headers or {})},
        media_type="application/problem+json",
    )


async def k2_error(request: Request, error: K2Error) -> Response:
    """Answer what K2 refuses or fails with."""
    status, name = status_of(error)
    return problem(status, name, str(error), request_id(request))


async def http_error(request: Request, error: HTTPException) -> Response:
    """Answer what HTTP itself forbids: no such page, no such method, too large a body."""
    name = {404: "no-such-page", 405: "method-not-allowed", 413: "too-large"}.get(error.status_code, "http-error")
    detail = f"{request.method} {request.url.path}: {error.detail} (see /docs)"
    return problem(error.status_code, name, detail, request_id(request), error.headers)


async def system_error(request: Request, error: OSError) -> Response:
    """Answer a process without file descriptors: it is too busy, not broken."""
    if error.errno not in (errno.EMFILE, errno.ENFILE):
        raise error
    detail = f"{request.method} {request.url.path}: this process has too many open files; raise `ulimit -n`"
    return problem(503, "unavailable", detail, request_id(request))


async def unexpected(request: Request, error: Exception) -> Response:
    """Answer a fault of K2 itself."""
    _LOGGER.error("request %s failed", request_id(request), exc_info=error)
    detail = f"an error of K2 itself ({type(error).__name__}); the log of the server has the details"
    return problem(500, "failed", detail, request_id(request))


HANDLERS: dict[Any, Callable[..., Any]] = {
    K2Error: k2_error,
    HTTPException: http_error,
    OSError: system_error,
    Exception: unexpected,
}
"""Makes every error of the application a problem answer."""


def request_id(request: Request) -> str:
    """Return the id the request was given (see `middleware.RequestBounds`)."""
    return str(request.scope.get("k2_request_id", ""))
