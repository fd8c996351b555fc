"""Routes about the data: symbols, snapshots, status, and SQL."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from k2.api.formats import choose, encode_rows
from k2.api.market import On, Using
from k2.api.models import SnapshotList, SqlRequest, SqlRows, SymbolList
from k2.query.output import plain_snapshot

router = APIRouter(prefix="/v1")


@router.get("/symbols", response_model=SymbolList, tags=["about the data"], summary="Symbols there is data of")
async def symbols(
    request: Request, using: Using, on: On, exchange: Annotated[str | None, Query(description="Of one exchange")] = None
) -> Response:
    """Every (exchange, symbol) with trades or quotes, in any tier."""
    deadline = using.engine.deadline()
    pairs = await on.query(request, deadline, lambda: using.engine.symbols(deadline))
    return _json({"data": [{"exchange": e, "symbol": s} for e, s in pairs if exchange in (None, e)]})


@router.get("/snapshots", response_model=SnapshotList, tags=["about the data"], summary="Commits of the cold tier")
async def snapshots(
    request: Request, using: Using, on: On, table: Annotated[str | None, Query(description="Of one table")] = None
) -> Response:
    """Retained commits, oldest first; each `snapshot_id` may be given as `as_of`."""
    deadline = using.engine.deadline()
    found = await on.query(request, deadline, lambda: using.engine.snapshots(table))
    return _json({"data": [plain_snapshot(snapshot) for snapshot in found]})


@router.get("/status", tags=["about the data"], summary="What this node is doing")
async def status(using: Using, on: On) -> Response:
    """Progress and size of every stage."""
    return _json(dict(await on.check(using.status or using.engine.status)))


@router.post("/sql", responses={200: {"model": SqlRows}}, tags=["SQL"], summary="One read-only statement")
async def sql(
    request: Request,
    body: SqlRequest,
    using: Using,
    on: On,
    format: Annotated[str | None, Query(description="json | ndjson | csv | arrow")] = None,
) -> Response:
    """Runs one SELECT on one tier, in that tier's dialect; files, network and system functions are refused."""
    fmt = choose(request, format)
    deadline = using.engine.deadline()

    def work() -> Response:
        rows = using.engine.sql(body.query, tier=body.tier, limit=body.limit, deadline=deadline)
        return encode_rows(rows, fmt, None)

    return await on.query(request, deadline, work)


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
