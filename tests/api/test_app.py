"""The REST interface over a real connection."""

from __future__ import annotations

import csv
import io
import json
import queue
import socket
import threading
from dataclasses import replace
from typing import Any

import httpx
import pyarrow as pa
import pytest
from prometheus_client import CollectorRegistry, Gauge

from k2.api.app import create_app
from k2.api.middleware import MAX_BODY_BYTES
from k2.api.server import ApiServer
from k2.api.services import Services
from k2.cold.memory import MemoryCold
from k2.hot.memory import MemoryHot
from k2.query.engine import Engine
from k2.schema import TRADES
from k2.settings import QuerySettings, Settings

ARROW = "application/vnd.apache.arrow.stream"


def test_trades_come_exact_and_say_what_they_are_made_from(http: httpx.Client) -> None:
    """Decimals are text with every digit; tiers and watermark stand beside the rows."""
    answer = http.get("/v1/trades", params={"symbol": "xbt/usd", "start": "2024-08-08", "limit": 1})
    body = answer.json()

    assert answer.status_code == 200
    assert body["data"][0]["price"] == "61837.63"
    assert body["data"][0]["amount"] == "0.000000000001"
    assert body["data"][0]["exchange_time"] == "2024-08-08T00:00:00.000000000Z"
    assert body["tiers"] == ["cold", "hot"]
    assert body["watermark"] == {"kraken": 10}
    assert answer.headers["K2-Tiers"] == "cold,hot"


def test_next_links_lead_through_every_row_once(http: httpx.Client) -> None:
    """Pages that end within a nanosecond lose and repeat nothing; the last has no next."""
    ids: list[int] = []
    path: str | None = "/v1/trades?symbol=BTC-USD&start=2024-08-08&limit=4"
    while path:
        body = http.get(path).json()
        ids += [row["trade_id"] for row in body["data"]]
        path = body["next"]

    assert ids == list(range(1, 21))


def test_without_a_start_the_newest_are_given(http: httpx.Client) -> None:
    """The configured number of newest rows, in time order."""
    body = http.get("/v1/trades", params={"symbol": "BTC-USD"}).json()

    assert [row["trade_id"] for row in body["data"]] == [16, 17, 18, 19, 20]
    assert body["next"] is None


def test_formats_by_parameter_and_accept_header_agree(http: httpx.Client) -> None:
    """JSON, NDJSON, CSV and Arrow hold the same rows."""
    asked = {"symbol": "BTC-USD", "start": "2024-08-08", "limit": "20"}
    rows = http.get("/v1/trades", params=asked).json()["data"]

    lines = http.get("/v1/trades", params=asked, headers={"Accept": "application/x-ndjson"}).text.splitlines()
    cells = list(csv.DictReader(io.StringIO(http.get("/v1/trades", params=asked | {"format": "csv"}).text)))
    stream = http.get("/v1/trades", params=asked, headers={"Accept": ARROW})
    arrow = pa.ipc.open_stream(stream.content).read_all()

    assert [json.loads(line) for line in lines] == rows
    assert [cell["price"] for cell in cells] == [row["price"] for row in rows]
    assert stream.headers["content-type"] == ARROW
    assert arrow.column_names == list(TRADES.column_names)
    assert [str(price.normalize()) for price in arrow["price"].to_pylist()] == [row["price"] for row in rows]


def test_candles_are_counted_over_both_tiers(http: httpx.Client) -> None:
    """One candle of all twenty trades."""
    (candle,) = http.get("/v1/candles/1m", params={"symbol": "BTCUSD"}).json()["data"]

    assert (candle["open"], candle["close"], candle["trade_count"]) == ("61837.63", "61856.63", 20)
    assert candle["volume"] == "0.00000000002"


def test_all_rows_at_once_are_for_arrow_callers_of_this_machine(http: httpx.Client) -> None:
    """limit=0 streams everything locally; through a proxy, and in text formats, it is refused."""
    asked = {"symbol": "BTC-USD", "limit": "0"}

    assert (
        pa.ipc.open_stream(http.get("/v1/trades", params=asked | {"format": "arrow"}).content).read_all().num_rows == 20
    )
    assert http.get("/v1/trades", params=asked).status_code == 400
    proxied = http.get("/v1/trades", params=asked | {"format": "arrow"}, headers={"X-Forwarded-For": "192.0.2.1"})
    assert proxied.status_code == 400


@pytest.mark.parametrize(
    ("path", "status", "kind", "said"),
    [
        ("/v1/trades?symbol=BTC-USDT", 404, "unknown-name", "did you mean 'BTC-USD'"),
        ("/v1/trades?exchange=krakn", 404, "unknown-name", "did you mean 'kraken'"),
        ("/v1/candles/7m?symbol=BTC-USD", 404, "unknown-name", "timeframe '7m'"),
        ("/v1/candles/1m", 400, "rejected", "symbol"),
        ("/v1/trades?start=soon", 400, "rejected", "not understood"),
        ("/v1/trades?limit=51", 400, "rejected", "at most 50 rows"),
        ("/v1/trades?limit=x", 400, "rejected", "limit"),
        ("/v1/trades?cursor=x", 400, "rejected", "cursor"),
        ("/v1/trades?format=xml", 400, "rejected", "format 'xml'"),
        ("/v1/snapshots?table=trade", 404, "unknown-name", "did you mean 'trades'"),
        ("/v1/nothing", 404, "no-such-page", "/docs"),
    ],
)
def test_errors_are_problems_that_say_what_to_do(
    http: httpx.Client, path: str, status: int, kind: str, said: str
) -> None:
    """Every error has a status, a type, a message and the request's id."""
    answer = http.get(path, headers={"X-Request-Id": "abc-1"})
    body = answer.json()

    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert (body["type"], body["status"], body["instance"]) == (kind, status, "abc-1")
    assert said in body["detail"]
    assert answer.headers["x-request-id"] == "abc-1"


def test_accept_header_nobody_can_serve_is_refused(http: httpx.Client) -> None:
    """A caller who takes only XML is told what there is."""
    answer = http.get("/v1/trades", headers={"Accept": "application/xml"})

    assert answer.status_code == 400
    assert "text/csv" in answer.json()["detail"]


def test_sql_is_read_only_and_bounded(http: httpx.Client) -> None:
    """A SELECT on cold is answered, exact; anything else and too large a body are refused."""
    good = http.post("/v1/sql", json={"query": "SELECT max(price) AS p FROM trades", "tier": "cold"})
    bad = http.post("/v1/sql", json={"query": "DROP TABLE trades", "tier": "cold"})
    extra = http.post("/v1/sql", json={"query": "SELECT 1", "user": "x"})
    long = http.post("/v1/sql", json={"query": " " * MAX_BODY_BYTES, "tier": "cold"})
    chunked = http.post("/v1/sql", content=(b" " * 1024 for _ in range(MAX_BODY_BYTES // 1024 + 1)))

    assert good.json() == {"data": [{"p": "61846.63"}]}
    assert (bad.status_code, extra.status_code) == (400, 400)
    assert (long.status_code, chunked.status_code) == (413, 413)
    assert long.json()["type"] == chunked.json()["type"] == "too-large"


def test_symbols_snapshots_and_status(http: httpx.Client) -> None:
    """What there is data of, what as_of accepts, what the tiers hold."""
    (snapshot,) = http.get("/v1/snapshots").json()["data"]
    as_of = http.get("/v1/trades", params={"symbol": "BTC-USD", "as_of": snapshot["snapshot_id"], "limit": 50}).json()

    assert http.get("/v1/symbols").json() == {"data": [{"exchange": "kraken", "symbol": "BTC-USD"}]}
    assert (snapshot["table"], snapshot["rows_added"], snapshot["end"]) == ("trades", 10, {"kraken": 10})
    assert len(as_of["data"]) == 10
    assert http.get("/v1/status").json()["cold"]["trades"]["watermark"] == {"kraken": 10}


def serve(services: Services) -> ApiServer:
    server = ApiServer(create_app(services), "127.0.0.1", 0)
    server.start()
    return server


def test_readiness_gives_its_reasons(services: Services) -> None:
    """503 with the reasons while something is wrong, 200 when nothing is; liveness does not care."""
    reasons = ["ingest is 90 s behind the log"]
    server = serve(replace(services, readiness=lambda: list(reasons)))
    try:
        with httpx.Client(base_url=server.url) as http:
            before = http.get("/health/ready")
            live = http.get("/health/live")
            reasons.clear()
            after = http.get("/health/ready")
    finally:
        server.stop()

    assert (before.status_code, before.json()) == (
        503,
        {"status": "not ready", "reasons": ["ingest is 90 s behind the log"]},
    )
    assert (live.status_code, live.json()["name"]) == (200, "k2")
    assert (after.status_code, after.json()["status"]) == (200, "ready")


def test_metrics_are_those_of_the_process_and_count_requests(services: Services) -> None:
    """The registry given from outside is shown, with the requests counted by route and not by path."""
    registry = CollectorRegistry()
    Gauge("k2_something", "Of the process", registry=registry).set(3)
    server = serve(replace(services, registry=registry))
    try:
        with httpx.Client(base_url=server.url) as http:
            http.get("/v1/candles/1m?symbol=BTC-USD")
            http.get("/v1/unknown")
            text = http.get("/metrics").text
    finally:
        server.stop()

    assert "k2_something 3.0" in text
    assert 'k2_api_requests_total{route="/v1/candles/{timeframe}",status="200"} 1.0' in text
    assert 'k2_api_requests_total{route="none",status="404"} 1.0' in text


def test_openapi_describes_the_columns(http: httpx.Client) -> None:
    """The models are those of the schema, decimals as text, errors as problems."""
    document = http.get("/openapi.json").json()
    trade = document["components"]["schemas"]["Trade"]["properties"]

    assert set(TRADES.column_names) < set(trade)
    assert trade["price"]["type"] == "string"
    assert trade["side"]["description"].startswith("buy | sell")
    assert "application/problem+json" in document["paths"]["/v1/trades"]["get"]["responses"]["404"]["content"]


def test_the_page_for_people_shows_every_path_and_column_and_loads_nothing(http: httpx.Client) -> None:
    """It works where there is no network: no script, style or picture from elsewhere."""
    page = http.get("/docs").text
    paths = http.get("/openapi.json").json()["paths"]

    assert all(f"<code>{name}</code>" in page for name in TRADES.column_names)
    assert all(path in page for path in paths)
    assert "src=" not in page
    assert "//" not in page


class Held:
    """A cold tier whose reads wait until they are let go."""

    def __init__(self) -> None:
        self._cold = MemoryCold()
        self.entered = threading.Semaphore(0)
        self.leave = threading.Event()
        self.pins = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cold, name)

    def pin(self, table: str, **options: Any) -> Any:
        self.pins += 1
        self.entered.release()
        self.leave.wait(30)
        return self._cold.pin(table, **options)


def test_health_answers_while_every_query_thread_is_busy() -> None:
    """Slow queries hold up neither the event loop nor the health checks."""
    held = Held()
    settings = Settings(query=QuerySettings(concurrent=1))
    server = serve(Services(Engine(MemoryHot(), held, None, settings), settings))  # type: ignore[arg-type]
    try:
        with httpx.Client(base_url=server.url, timeout=30) as http:
            slow = threading.Thread(target=lambda: http.get("/v1/trades"))
            slow.start()
            assert held.entered.acquire(timeout=30)

            assert http.get("/health/live").status_code == 200
            assert http.get("/health/ready").status_code == 200
            assert http.get("/metrics").status_code == 200
            held.leave.set()
            slow.join()
    finally:
        held.leave.set()
        server.stop()


def test_query_of_a_caller_who_left_ends_at_its_next_step() -> None:
    """A closed connection cancels the query: it is not carried on to its end."""
    held = Held()
    settings = Settings(query=QuerySettings(concurrent=1))
    engine = Engine(MemoryHot(), held, None, settings)  # type: ignore[arg-type]
    deadlines = []
    made = engine.deadline
    engine.deadline = lambda seconds=None: deadlines.append(made(seconds)) or deadlines[-1]  # type: ignore[method-assign,func-returns-value]
    server = serve(Services(engine, settings))
    try:
        with socket.create_connection(("127.0.0.1", server.port)) as caller:
            caller.sendall(b"GET /v1/trades?tier=all HTTP/1.1\r\nHost: k2\r\n\r\n")
            assert held.entered.acquire(timeout=30)
        cancelled = deadlines[0]._cancelled.wait(30)
        held.leave.set()
    finally:
        held.leave.set()
        server.stop()

    assert cancelled
    assert held.pins == 1


def test_query_over_its_time_is_a_504(services: Services) -> None:
    """Time that runs out is told as such."""
    settings = Settings(query=QuerySettings(timeout_seconds=0.0))
    server = serve(Services(Engine(MemoryHot(), MemoryCold(), None, settings), settings))
    try:
        answer = httpx.get(f"{server.url}/v1/trades")
    finally:
        server.stop()

    assert answer.status_code == 504
    assert "query.timeout_seconds" in answer.json()["detail"]


def test_too_many_waiting_queries_are_refused() -> None:
    """The queue in front of the query threads is bounded: the next caller is told to come back."""
    held = Held()
    settings = Settings(query=QuerySettings(concurrent=1))
    server = serve(Services(Engine(MemoryHot(), held, None, settings), settings))  # type: ignore[arg-type]
    statuses: queue.Queue[int] = queue.Queue()
    try:
        with httpx.Client(base_url=server.url, timeout=60) as http:

            def call() -> None:
                statuses.put(http.get("/v1/symbols").status_code)

            callers = [threading.Thread(target=call) for _ in range(18)]
            for caller in callers:
                caller.start()
            first = statuses.get(timeout=30)
            held.leave.set()
            for caller in callers:
                caller.join()
    finally:
        held.leave.set()
        server.stop()

    assert first == 503
    assert [statuses.get_nowait() for _ in range(17)] == [200] * 17
