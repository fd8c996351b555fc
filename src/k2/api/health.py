"""Routes for those who watch the node: live, ready, metrics."""

from __future__ import annotations

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response

from k2 import __version__
from k2.api.models import Live, Ready
from k2.api.routing import Call, Endpoint

NAME = "k2"


async def live(call: Call) -> Response:
    """Nothing is looked at: who gets an answer should not restart the process."""
    return _json(Live(status="live", name=NAME, version=__version__), 200)


async def ready(call: Call) -> Response:
    """Log, hot and cold are usable and ingest keeps up; else 503, with the reasons."""
    reasons = await call.workers.check(call.services.readiness)
    return _json(Ready(status="not ready" if reasons else "ready", reasons=reasons), 503 if reasons else 200)


async def metrics(call: Call) -> Response:
    """Everything the process counts and measures."""
    text = await call.workers.check(lambda: generate_latest(call.services.registry))
    return Response(text, media_type=CONTENT_TYPE_LATEST)


_TAG = "health"
ENDPOINTS = (
    Endpoint("/health/live", live, "The process answers", _TAG, model="Live", may_fail=False),
    Endpoint("/health/ready", ready, "The node can do its work", _TAG, model="Ready", may_fail=False),
    Endpoint("/metrics", metrics, "Metrics in the format of Prometheus", _TAG, may_fail=False),
)


def _json(value: msgspec.Struct, status: int) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")
