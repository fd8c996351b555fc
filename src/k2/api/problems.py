"""Errors as `application/problem+json` (RFC 9457), with the status that tells the caller what to do."""

from __future__ import annotations

import errno
import logging
from collections.abc import Mapping

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import Response

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


class Problem(BaseModel):
    """What went wrong, and what to do."""

    type: str = Field(description="unknown-name | rejected | timed-out | unavailable | misconfigured | failed | ...")
    title: str = Field(description="The same in words")
    status: int = Field(description="The HTTP status")
    detail: str = Field(description="What was attempted, on what, what came back, what to do")
    instance: str = Field(description="The request's id, also in the header X-Request-Id; quote it in a report")


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
        msgspec.json.encode(body.model_dump()),
        status,
        {**extra, **(headers or {})},
        media_type="application/problem+json",
    )


def install(app: FastAPI) -> None:
    """Make every error of the application a problem answer."""

    @app.exception_handler(K2Error)
    async def k2_error(request: Request, error: K2Error) -> Response:
        status, name = status_of(error)
        return problem(status, name, str(error), request_id(request))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        found = "; ".join(f"{'.'.join(str(part) for part in e['loc'])}: {e['msg']}" for e in error.errors())
        return problem(400, "rejected", f"the request is not understood: {found}", request_id(request))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        name = {404: "no-such-page", 405: "method-not-allowed", 413: "too-large"}.get(error.status_code, "http-error")
        detail = f"{request.method} {request.url.path}: {error.detail} (see /docs)"
        return problem(error.status_code, name, detail, request_id(request), error.headers)

    @app.exception_handler(OSError)
    async def system_error(request: Request, error: OSError) -> Response:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise error
        detail = f"{request.method} {request.url.path}: this process has too many open files; raise `ulimit -n`"
        return problem(503, "unavailable", detail, request_id(request))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        _LOGGER.error("request %s failed", request_id(request), exc_info=error)
        detail = f"an error of K2 itself ({type(error).__name__}); the log of the server has the details"
        return problem(500, "failed", detail, request_id(request))


def request_id(request: Request) -> str:
    """Return the id the request was given (see `middleware.RequestBounds`)."""
    return str(request.scope.get("k2_request_id", ""))
