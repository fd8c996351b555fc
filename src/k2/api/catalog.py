"""Routes about the data: symbols, snapshots, status, and SQL."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from k2.api.formats import choose, encode_rows
from k2.api.models import SqlRequest
from k2.api.routing import Call, Endpoint, Parameter
from k2.errors import Rejected
from k2.query.output import plain_snapshot


async def symbols(call: Call) -> Response:
    """Every (exchange, symbol) with trades or quotes, in any tier."""
    engine, exchange = call.services.engine, call.values["exchange"]
    deadline = engine.deadline()
    pairs = await call.workers.query(call.request, deadline, lambda: engine.symbols(deadline))
    return _json({"data": [{"exchange": e, "symbol": s} for e, s in pairs if exchange in (None, e)]})


async def snapshots(call: Call) -> Response:
    """Retained commits, oldest first; each `snapshot_id` may be given as `as_of`."""
    engine, table = call.services.engine, call.values["table"]
    deadline = engine.deadline()
    found = await call.workers.query(call.request, deadline, lambda: engine.snapshots(table))
    return _json({"data": [plain_snapshot(snapshot) for snapshot in found]})


async def status(call: Call) -> Response:
    """Progress and size of every stage."""
    return _json(dict(await call.workers.check(call.services.status or call.services.engine.status)))


async def sql(call: Call) -> Response:
    """Runs one SELECT on one tier, in that tier's dialect; files, network and system functions are refused."""
    engine = call.services.engine
    fmt = choose(call.request, call.values["format"])
    asked = await _statement(call.request)
    deadline = engine.deadline()

    def work() -> Response:
        rows = engine.sql(asked.query, tier=asked.tier, limit=asked.limit, deadline=deadline)
        return encode_rows(rows, fmt, None)

    return await call.workers.query(call.request, deadline, work)


_TAG = "about the data"
ENDPOINTS = (
    Endpoint(
        "/v1/symbols", symbols, "Symbols there is data of", _TAG, (Parameter("exchange", "Of one exchange"),),
        model="SymbolList",
    ),
    Endpoint(
        "/v1/snapshots", snapshots, "Commits of the cold tier", _TAG, (Parameter("table", "Of one table"),),
        model="SnapshotList",
    ),
    Endpoint("/v1/status", status, "What this node is doing", _TAG),
    Endpoint(
        "/v1/sql", sql, "One read-only statement", "SQL", (Parameter("format", "json | ndjson | csv | arrow"),),
        method="POST", model="SqlRows", body="SqlRequest", rows=True,
    ),
)  # fmt: skip


async def _statement(request: Request) -> SqlRequest:
    """Read the body; only as JSON, which no page of another origin can send without being asked first."""
    body = await request.body()
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Rejected(f"the body is {kind or 'of no type'}: send JSON, with Content-Type: application/json")
    try:
        return msgspec.json.decode(body, type=SqlRequest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Rejected(f"the body is not understood: {error}") from None


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
