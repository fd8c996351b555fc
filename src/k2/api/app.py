"""Puts the REST interface together: one router per noun, one form of errors, bounds on everything."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.telemetry import TelemetryConfig

from k2 import __version__
from k2.api import catalog, health, market, problems
from k2.api.middleware import Counted, RequestBounds
from k2.api.services import Services, Workers

_DESCRIPTION = """
Trades, quotes and candles over everything K2 holds, as one: history, recent rows and the newest in memory.

* Decimals are text and exact; times are nanoseconds UTC since 1970, with ISO 8601 text beside them.
* `start` is inclusive, `end` exclusive. With a `start` you get the first rows, without one the newest.
* A full page has a `next` path; following it loses and repeats no row.
* Formats: JSON, NDJSON, CSV, Arrow stream, by `Accept` or `?format=`.
* Errors are `application/problem+json`; `detail` says what to do.
"""

# FastAPI's own telemetry could be switched on by environment variables; /metrics is ours.
_NO_TELEMETRY: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}

_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {
        "description": text,
        "content": {"application/problem+json": {"schema": problems.Problem.model_json_schema()}},
    }
    for status, text in {
        400: "The request can never work as it stands",
        404: "No such symbol, exchange, timeframe, snapshot...; the nearest is suggested",
        503: "Try again later",
        504: "Interrupted at the time limit",
    }.items()
}


def create_app(services: Services) -> FastAPI:
    """Build the application; it holds nothing but its worker threads, which end with it.

    One application per registry: it adds its own metrics there.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.workers = Workers(services.settings.query.concurrent)
        yield
        app.state.workers.close()

    app = FastAPI(
        title="K2 market data",
        version=__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
        telemetry=_NO_TELEMETRY,
    )
    app.state.services = services
    app.include_router(market.router, responses=_PROBLEMS)
    app.include_router(catalog.router, responses=_PROBLEMS)
    app.include_router(health.router)
    problems.install(app)
    app.add_middleware(RequestBounds)
    app.add_middleware(Counted, registry=services.registry)
    return app
