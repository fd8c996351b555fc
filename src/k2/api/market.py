"""Routes of the rows: trades, quotes, candles, gaps, dead letters."""

from __future__ import annotations

import ipaddress

from starlette.requests import Request
from starlette.responses import Response

from k2 import meters
from k2.api.formats import choose, encode_answer
from k2.api.routing import Call, Endpoint, Parameter
from k2.api.services import Services
from k2.errors import Rejected
from k2.query.plan import ask
from k2.schema import TIMEFRAMES

_TIME = "ISO 8601 (UTC unless it says otherwise), -1h, now, or nanoseconds since 1970"
_SPELLING = "Symbol in any usual spelling: BTC-USDT, btc/usdt, BTCUSDT, XBT/USD"
_SYMBOL = Parameter("symbol", _SPELLING)
_SYMBOL_NEEDED = Parameter("symbol", _SPELLING, needed=True)
_EXCHANGE = Parameter("exchange", "Exchange; all when left away")
_TIMEFRAME = Parameter("timeframe", " | ".join(TIMEFRAMES), needed=True)
_KIND = Parameter(
    "kind", "trade | aggregate | auto: of single trades, where there are any, else of aggregates", default="auto"
)
# What all tables share.
_RANGE = (
    Parameter("start", f"From this time on, inclusive: {_TIME}"),
    Parameter("end", f"Up to this time, exclusive: {_TIME}"),
    Parameter("tier", "all | hot | cold", default="all"),
    Parameter("as_of", f"Answer from what was known then: a snapshot id, or a time: {_TIME}"),
    Parameter(
        "limit",
        "Most rows: the first from `start` on, without a start the newest. "
        "0 (Arrow stream, callers on this machine): all",
        kind=int,
    ),
    Parameter("cursor", "Continues behind the last row of an earlier page: taken from its `next`"),
    Parameter("format", "json | ndjson | csv | arrow; goes before the Accept header"),
)


async def trades(call: Call) -> Response:
    """Every trade the exchanges reported, each once, by the exchange's time."""
    return await _answer(call, "trades")


async def quotes(call: Call) -> Response:
    """Best bid and best ask, one row per change reported, by the time of receipt."""
    return await _answer(call, "quotes")


async def candles(call: Call) -> Response:
    """Candles up to the newest trade; `start` and `end` apply to the start of the candle."""
    return await _answer(call, "candles")


async def gaps(call: Call) -> Response:
    """Ids that turned out missing, and those that arrived after all."""
    return await _answer(call, "gaps")


async def dead_letters(call: Call) -> Response:
    """Frames, or rows of frames, that could not be used, with the reason."""
    return await _answer(call, "dead_letters")


async def frames(call: Call) -> Response:
    """What everything else is made from, by the time of receipt; kept in the cold tier."""
    return await _answer(call, "frames")


_TAG = "market data"
ENDPOINTS = (
    Endpoint("/v1/trades", trades, "Trades", _TAG, (_SYMBOL, _EXCHANGE, *_RANGE), model="TradePage", rows=True),
    Endpoint(
        "/v1/quotes", quotes, "Best bid and ask", _TAG, (_SYMBOL, _EXCHANGE, *_RANGE), model="QuotePage", rows=True
    ),
    Endpoint(
        "/v1/candles/{timeframe}", candles, "Candles", _TAG,
        (_TIMEFRAME, _SYMBOL_NEEDED, _EXCHANGE, _KIND, *_RANGE), model="CandlePage", rows=True,
    ),
    Endpoint(
        "/v1/gaps", gaps, "Holes in the trade ids", _TAG, (_SYMBOL, _EXCHANGE, *_RANGE), model="GapPage", rows=True
    ),
    Endpoint(
        "/v1/dead-letters", dead_letters, "Frames that could not be used", _TAG, (_EXCHANGE, *_RANGE),
        model="DeadLetterPage", rows=True,
    ),
    Endpoint(
        "/v1/frames", frames, "Records of the log, as received", _TAG, (_EXCHANGE, *_RANGE), model="FramePage",
        rows=True,
    ),
)  # fmt: skip


async def _answer(call: Call, table: str) -> Response:
    request, engine = call.request, call.services.engine
    named = dict(call.values)
    fmt = choose(request, named.pop("format"))
    limit = _limit(request, named.pop("limit"), fmt, call.services)
    deadline = engine.deadline()
    question = ask(table, limit=limit, after=named.pop("cursor"), **named)

    def work() -> Response:
        answer = engine.answer(question, deadline)
        return encode_answer(answer, fmt, _next_path(request, answer.next_cursor))

    return await call.workers.query(request, deadline, work)


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
