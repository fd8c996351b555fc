"""Routes for those who watch the node: live, ready, metrics."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response

from k2 import __version__
from k2.api.market import On, Using
from k2.api.models import Live, Ready

router = APIRouter(tags=["health"])

NAME = "k2"


@router.get("/health/live", response_model=Live, summary="The process answers")
async def live() -> Live:
    """Nothing is looked at: who gets an answer should not restart the process."""
    return Live(status="live", name=NAME, version=__version__)


@router.get(
    "/health/ready",
    response_model=Ready,
    responses={503: {"model": Ready, "description": "Not ready; the reasons say why"}},
    summary="The node can do its work",
)
async def ready(using: Using, on: On) -> Response:
    """Log, hot and cold are usable and ingest keeps up; else 503, with the reasons."""
    reasons = await on.check(using.readiness)
    body = Ready(status="not ready" if reasons else "ready", reasons=reasons)
    return Response(msgspec.json.encode(body.model_dump()), 503 if reasons else 200, media_type="application/json")


@router.get("/metrics", summary="Metrics in the format of Prometheus")
async def metrics(using: Using, on: On) -> Response:
    """Everything the process counts and measures."""
    text = await on.check(lambda: generate_latest(using.registry))
    return Response(text, media_type=CONTENT_TYPE_LATEST)
