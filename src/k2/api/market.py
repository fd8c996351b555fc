"""Routes of the rows: trades, quotes, candles, gaps, dead letters."""

from __future__ import annotations

import ipaddress
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request
from starlette.responses import Response

from k2 import meters
from k2.api.formats import choose, encode_answer
from k2.api.models import CandlePage, DeadLetterPage, FramePage, GapPage, QuotePage, TradePage
from k2.api.services import Services, Workers, services, workers
from k2.errors import Rejected
from k2.query.plan import ask
from k2.schema import TIMEFRAMES

router = APIRouter(prefix="/v1", tags=["market data"])

Symbol = Annotated[str | None, Query(description="Symbol in any usual spelling: BTC-USDT, btc/usdt, BTCUSDT, XBT/USD")]
SymbolNeeded = Annotated[str, Query(description="Symbol in any usual spelling: BTC-USDT, btc/usdt, BTCUSDT, XBT/USD")]
Exchange = Annotated[str | None, Query(description="Exchange; all when left away")]
TIME = "ISO 8601 (UTC unless it says otherwise), -1h, now, or nanoseconds since 1970"


class Range:
    """The parameters all tables share."""

    def __init__(
        self,
        start: Annotated[str | None, Query(description=f"From this time on, inclusive: {TIME}")] = None,
        end: Annotated[str | None, Query(description=f"Up to this time, exclusive: {TIME}")] = None,
        tier: Annotated[str, Query(description="all | hot | cold")] = "all",
        as_of: Annotated[
            str | None, Query(description=f"Answer from what was known then: a snapshot id, or a time: {TIME}")
        ] = None,
        limit: Annotated[
            int | None,
            Query(
                ge=0,
                description="Most rows: the first from `start` on, without a start the newest. "
                "0 (Arrow stream, callers on this machine): all",
            ),
        ] = None,
        cursor: Annotated[
            str | None, Query(description="Continues behind the last row of an earlier page: taken from its `next`")
        ] = None,
        format: Annotated[
            str | None, Query(description="json | ndjson | csv | arrow; goes before the Accept header")
        ] = None,
    ) -> None:
        self.start = start
        self.end = end
        self.tier = tier
        self.as_of = as_of
        self.limit = limit
        self.cursor = cursor
        self.format = format


Ranged = Annotated[Range, Depends()]
Using = Annotated[Services, Depends(services)]
On = Annotated[Workers, Depends(workers)]


def _also(page: Any) -> dict[int | str, dict[str, Any]]:
    """Describe the formats beside JSON for OpenAPI."""
    content: dict[str, Any] = {"application/x-ndjson": {}, "text/csv": {}, "application/vnd.apache.arrow.stream": {}}
    return {200: {"model": page, "content": content}}


@router.get("/trades", responses=_also(TradePage), summary="Trades")
async def trades(
    request: Request, range_: Ranged, using: Using, on: On, symbol: Symbol = None, exchange: Exchange = None
) -> Response:
    """Every trade the exchanges reported, each once, by the exchange's time."""
    return await _answer(request, using, on, range_, "trades", symbol=symbol, exchange=exchange)


@router.get("/quotes", responses=_also(QuotePage), summary="Best bid and ask")
async def quotes(
    request: Request, range_: Ranged, using: Using, on: On, symbol: Symbol = None, exchange: Exchange = None
) -> Response:
    """Best bid and best ask, one row per change reported, by the time of receipt."""
    return await _answer(request, using, on, range_, "quotes", symbol=symbol, exchange=exchange)


@router.get("/candles/{timeframe}", responses=_also(CandlePage), summary="Candles")
async def candles(
    request: Request,
    range_: Ranged,
    using: Using,
    on: On,
    timeframe: Annotated[str, Path(description=" | ".join(TIMEFRAMES))],
    symbol: SymbolNeeded,
    exchange: Exchange = None,
    kind: Annotated[
        str, Query(description="trade | aggregate | auto: of single trades, where there are any, else of aggregates")
    ] = "auto",
) -> Response:
    """Candles up to the newest trade; `start` and `end` apply to the start of the candle."""
    named = {"symbol": symbol, "exchange": exchange, "timeframe": timeframe, "kind": kind}
    return await _answer(request, using, on, range_, "candles", **named)


@router.get("/gaps", responses=_also(GapPage), summary="Holes in the trade ids")
async def gaps(
    request: Request, range_: Ranged, using: Using, on: On, symbol: Symbol = None, exchange: Exchange = None
) -> Response:
    """Ids that turned out missing, and those that arrived after all."""
    return await _answer(request, using, on, range_, "gaps", symbol=symbol, exchange=exchange)


@router.get("/dead-letters", responses=_also(DeadLetterPage), summary="Frames that could not be used")
async def dead_letters(request: Request, range_: Ranged, using: Using, on: On, exchange: Exchange = None) -> Response:
    """Frames, or rows of frames, that could not be used, with the reason."""
    return await _answer(request, using, on, range_, "dead_letters", exchange=exchange)


@router.get("/frames", responses=_also(FramePage), summary="Records of the log, as received")
async def frames(request: Request, range_: Ranged, using: Using, on: On, exchange: Exchange = None) -> Response:
    """What everything else is made from, by the time of receipt; kept in the cold tier."""
    return await _answer(request, using, on, range_, "frames", exchange=exchange)


async def _answer(
    request: Request, using: Services, on: Workers, range_: Range, table: str, **named: str | None
) -> Response:
    fmt = choose(request, range_.format)
    limit = _limit(request, range_.limit, fmt, using)
    deadline = using.engine.deadline()
    question = ask(
        table,
        start=range_.start,
        end=range_.end,
        tier=range_.tier,
        as_of=range_.as_of,
        after=range_.cursor,
        limit=limit,
        **named,  # type: ignore[arg-type]
    )

    def work() -> Response:
        answer = using.engine.answer(question, deadline)
        return encode_answer(answer, fmt, _next_path(request, answer.next_cursor))

    return await on.query(request, deadline, work)


def _limit(request: Request, given: int | None, fmt: str, using: Services) -> int:
    """Return how many rows may be given; `query.max_limit` bounds what others can make this process hold."""
    settings = using.settings.query
    if given is None:
        return min(settings.limit, settings.max_limit)
    if given == 0 and fmt == "arrow" and _is_local(request):
        return 0
    if given == 0 or given > settings.max_limit:
        meters.acted("query.max_rows")
        raise Rejected(
            f"limit {given}: one answer gives at most {settings.max_limit} rows; ask for that many and follow `next`"
        )
    return given


def _is_local(request: Request) -> bool:
    """Tell whether the caller is on this machine, and not a proxy speaking for others."""
    if request.client is None or "forwarded" in request.headers or "x-forwarded-for" in request.headers:
        return False
    try:
        return ipaddress.ip_address(request.client.host).is_loopback
    except ValueError:
        return False


def _next_path(request: Request, cursor: str | None) -> str | None:
    if cursor is None:
        return None
    url = request.url.include_query_params(cursor=cursor)
    return f"{url.path}?{url.query}"
