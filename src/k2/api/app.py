"""Puts the REST interface together: one module of routes per noun, one form of errors, bounds on everything."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from k2 import __version__
from k2.api import catalog, health, market, problems
from k2.api.middleware import Counted, RequestBounds
from k2.api.services import Services, Workers

TITLE = "K2 market data"
_DESCRIPTION = """
Trades, quotes and candles over everything K2 holds, as one: history, recent rows and the newest in memory.

* Decimals are text and exact; times are nanoseconds UTC since 1970, with ISO 8601 text beside them.
* `start` is inclusive, `end` exclusive. With a `start` you get the first rows, without one the newest.
* A full page has a `next` path; following it loses and repeats no row.
* Formats: JSON, NDJSON, CSV, Arrow stream, by `Accept` or `?format=`.
* Errors are `application/problem+json`; `detail` says what to do.
"""

ENDPOINTS = (*market.ENDPOINTS, *catalog.ENDPOINTS, *health.ENDPOINTS)


def create_app(services: Services) -> Starlette:
    """Build the application; it holds nothing but its worker threads, which end with it.

    One application per registry: it adds its own metrics there.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        app.state.workers = Workers(services.settings.query.concurrent)
        yield
        app.state.workers.close()

    described = (Route("/openapi.json", _openapi), Route("/docs", _docs))
    app = Starlette(
        routes=[*(endpoint.route() for endpoint in ENDPOINTS), *described],
        middleware=[Middleware(Counted, registry=services.registry), Middleware(RequestBounds)],
        exception_handlers=problems.HANDLERS,
        lifespan=lifespan,
    )
    app.state.services = services
    return app


# What describes is imported when somebody looks: a node has to answer soon after it was started.
async def _openapi(request: Request) -> Response:
    from k2.api.openapi import document

    said = document(TITLE, __version__, _DESCRIPTION, ENDPOINTS)
    return Response(msgspec.json.encode(said), media_type="application/json")


async def _docs(request: Request) -> Response:
    from k2.api.openapi import page

    return HTMLResponse(page(TITLE, _DESCRIPTION, ENDPOINTS))
