"""Strangers at the REST server: whatever they send, however slowly, it is no error of K2, and others are served."""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from k2.api.app import create_app
from k2.api.protocol import DeadlineProtocol
from k2.api.server import MAX_CONNECTIONS, ApiServer
from k2.api.services import Services
from k2.cold.memory import MemoryCold
from k2.hot.memory import MemoryHot
from k2.query.engine import Engine
from k2.settings import QuerySettings, Settings

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "hot"))
from hot_rows import table, trade

PATHS = ("/v1/trades", "/v1/quotes", "/v1/candles/1m", "/v1/gaps", "/v1/dead_letters", "/v1/symbols", "/v1/snapshots")
NAMES = ("symbol", "exchange", "start", "end", "tier", "as_of", "limit", "cursor", "format", "kind", "table", "other")
VALUES = (
    *("", "a", "-1", "0", "99999999999999999999999", "1e999", "nan", "inf", "\0", "../../x", "a'; DROP TABLE trades"),
    *("x" * 5_000, "-1h", "-99999999999999999999h", "9223372036854775807", "9223372036854775808", "1m", "true", "[]"),
    *("9999-12-31T23:59:59Z", "0001-01-01", "0001-01-01T00:00:00+23:59", "2024-02-30", "now", "١", "%", "json"),
    *("arrow", "BTC-USDT", "binance", "all", "hot", "cold", "{}", "\u202e", "-0", "1723161600000000000", "\r\nX: y"),
    "-9223372036854775809",
)  # fmt: skip
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The address of a server over memory tiers."""
    with serving(DeadlineProtocol.request_seconds) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[httpx.Client]:
    """A client of it."""
    with httpx.Client(base_url=url, timeout=30) as made:
        yield made


@contextlib.contextmanager
def serving(request_seconds: float) -> Iterator[str]:
    hot, cold = MemoryHot(), MemoryCold()
    hot.write("trades", table("trades", [trade(n) for n in range(10)]), "1")
    chosen = Settings(query=QuerySettings(limit=5, max_limit=50))
    server = ApiServer(create_app(Services(Engine(hot, cold, None, chosen), chosen)), "127.0.0.1", 0)

    class Protocol(DeadlineProtocol):
        pass

    Protocol.request_seconds = request_seconds
    server._server.config.http = Protocol
    server.start()
    yield server.url
    server.stop()


@QUICK
@given(
    path=st.sampled_from(PATHS),
    parameters=st.dictionaries(st.sampled_from(NAMES), st.sampled_from(VALUES) | st.text(max_size=20), max_size=4),
)
def test_any_parameters_are_an_answer_or_a_clear_refusal(
    client: httpx.Client, path: str, parameters: dict[str, str]
) -> None:
    """Never status 500: rows, or a problem that says what is wrong with the request."""
    try:
        answer = client.get(path, params={"symbol": "BTC-USDT", **parameters})
    except (UnicodeEncodeError, httpx.InvalidURL):  # not even this client would send it
        return

    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        assert answer.json()["detail"]


BODIES: list[bytes] = [
    *(b"", b"{", b"[]", b"null", b"{}", b"[" * 60_000, b'{"query":' + b"[" * 60_000, b'{"query":NaN}', b'{"query":1}'),
    *(b'{"query":"SELECT 1","tier":"x"}', b'{"query":"SELECT 1","tier":"cold","limit":1e999}', b'{"query":"\xff"}'),
    *(b'{"query":"\\ud800","tier":"cold"}', b'{"query":"SELECT 1","limit":99999999999999999999999,"tier":"cold"}'),
    *(b'{"query":"SELECT 1","tier":"cold","limit":-1}', b'{"query":"SELECT \\u0000","tier":"cold"}', b"x" * 70_000),
]  # fmt: skip


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body[:40].decode("latin-1"))
@pytest.mark.parametrize("kind", ["application/json", "text/plain", "application/x-www-form-urlencoded"])
def test_any_body_is_an_answer_or_a_clear_refusal(client: httpx.Client, body: bytes, kind: str) -> None:
    """SQL bodies that are no JSON, no text, too large or too deep."""
    answer = client.post("/v1/sql", content=body, headers={"Content-Type": kind})

    assert answer.status_code in (200, 400, 404, 413, 422), answer.text
    assert answer.json().get("detail") or answer.json()["data"]


@pytest.mark.parametrize(
    "path", ["/v1/candles/%00", "/v1/candles/..%2f..%2fetc", "/../../etc/passwd", "/%ff", "//x", "/" + "x" * 5_000]
)
def test_paths_lead_nowhere(url: str, path: str) -> None:
    """No path of a request is one of the file system."""
    assert httpx.get(url + path, params={"symbol": "BTC-USDT"}).status_code in (400, 404)


def connect(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").rsplit(":", 1)
    return socket.create_connection((host, int(port)), timeout=20)


@pytest.mark.parametrize(
    "beginning",
    [
        b"",
        b"GET /health/live HTTP/1.1\r\nX-Slow: ",
        b"POST /v1/sql HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{",
        b"POST /v1/sql HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n",
        b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\nGET /health/live HTTP/1.1\r\nX-Slow: ",
    ],
    ids=["nothing", "head", "body", "chunks", "second request"],
)
def test_slow_strangers_lose_their_places(beginning: bytes) -> None:
    """As many as there are places, each sending a letter now and then: closed at the deadline, others are served."""
    with serving(request_seconds=1.0) as url, contextlib.ExitStack() as held:
        strangers = [held.enter_context(connect(url)) for _ in range(MAX_CONNECTIONS)]
        for stranger in strangers:
            stranger.sendall(beginning)
        began = time.monotonic()
        status = 0
        while status != 200 and time.monotonic() - began < 15:
            for stranger in strangers[:10]:
                with contextlib.suppress(OSError):
                    stranger.send(b"x" if beginning else b"")
            with contextlib.suppress(httpx.HTTPError):
                status = httpx.get(f"{url}/health/live").status_code
            time.sleep(0.05)

    assert status == 200
    assert time.monotonic() - began < 10


def test_endless_head_is_cut_off(url: str) -> None:
    """Headers without end: closed long before they fill a memory."""
    sent = 0
    with connect(url) as stranger, contextlib.suppress(OSError):
        stranger.sendall(b"GET /health/live HTTP/1.1\r\n")
        while sent < 64 << 20:
            sent += stranger.send(b"X-Filler: " + b"y" * 1_000 + b"\r\n")

    assert sent < 16 << 20
    assert httpx.get(f"{url}/health/live").status_code == 200


def test_slow_but_honest_request_is_answered() -> None:
    """Within the deadline nobody is cut off, and the answer after a long wait is not either."""
    with serving(request_seconds=2.0) as url, connect(url) as client:
        for part in (b"GET /health/live HT", b"TP/1.1\r\nHost: x\r\n", b"\r\n"):
            client.sendall(part)
            time.sleep(0.2)
        first = client.recv(100)
        client.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")

        assert first.startswith(b"HTTP/1.1 200")
        assert client.recv(100).startswith(b"HTTP/1.1 200") or client.recv(100)
