"""The ClickHouse HTTP protocol of the owner, met by an ordinary client."""

from __future__ import annotations

import contextlib
import http.client
import socket
import sys
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import clickhouse_connect
import pytest
from clickhouse_connect.driver.exceptions import DatabaseError

from k2.errors import NotSuccessor, StoreDown, TimedOut
from k2.hot import open_hot
from k2.hot.owner import ServedHot
from k2.hot.server import MAX_CONNECTIONS, Endpoint, HotServer
from k2.settings import Settings

sys.path.insert(0, str(Path(__file__).parent))
from hot_rows import table, trade


@pytest.fixture
def hot(tmp_path: Path) -> Iterator[ServedHot]:
    """An empty hot tier, served."""
    opened = open_hot(Settings(data=str(tmp_path)), "own")
    assert isinstance(opened, ServedHot)
    yield opened
    opened.close()


@pytest.fixture
def endpoint(hot: ServedHot) -> Endpoint:
    """Where it is served."""
    assert hot.server.endpoint is not None
    return hot.server.endpoint


def client_of(endpoint: Endpoint, **changes: Any) -> Any:
    options: dict[str, Any] = {
        "host": endpoint.host,
        "port": endpoint.port,
        "username": "anyone",
        "password": endpoint.token,
        "database": "k2",
        "autogenerate_session_id": False,
        "compress": False,
    }
    return clickhouse_connect.get_client(**{**options, **changes})


@pytest.fixture
def client(endpoint: Endpoint) -> Iterator[Any]:
    """An ordinary ClickHouse client."""
    made = client_of(endpoint)
    yield made
    made.close()


def test_a_client_queries_with_parameters_and_settings(client: Any) -> None:
    """Rows and Arrow, values of any characters, a setting for one query only."""
    awkward = "it's \\ a\ttab\n{x:String}"
    answer = client.query("SELECT {x:String} AS x, {n:Int64} AS n", parameters={"x": awkward, "n": -5})

    assert answer.result_rows == [(awkward, -5)]
    arrow = client.query_arrow("SELECT number FROM numbers(10)", settings={"limit": 3})
    assert arrow["number"].to_pylist() == [0, 1, 2]
    assert client.query("SELECT count() FROM numbers(10)").result_rows == [(10,)]
    assert client.command("SELECT 7") == 7


def test_a_client_inserts_arrow_and_rows(client: Any, hot: ServedHot) -> None:
    """Arrow with a token counts once; Native rows, where the statement is in the body, go in too."""
    rows = table("trades", [trade(n) for n in range(5)])
    for _ in range(2):
        client.insert_arrow("trades", rows, settings={"insert_deduplication_token": "x", "async_insert": 0})
    client.insert("migrations", [[-1, "by hand", 0]], column_names=["number", "name", "applied_ns"])

    assert hot.counts("trades", {}, {"binance": 5}) == 5
    assert client.query("SELECT name FROM migrations WHERE number < 0").result_rows == [("by hand",)]


@pytest.mark.parametrize("compression", ["gzip", "zstd", "lz4"])
def test_a_compressed_insert_is_understood(endpoint: Endpoint, hot: ServedHot, compression: str) -> None:
    """As an ordinary client compresses by default."""
    made = client_of(endpoint, compress=compression)
    made.insert_arrow("trades", table("trades", [trade(0, price=Decimal("1.5"))]))
    made.close()

    assert hot.counts("trades", {}, {"binance": 1}) == 1


def test_an_engine_s_error_keeps_its_code(client: Any) -> None:
    """And the connection serves on."""
    with pytest.raises(DatabaseError) as caught:
        client.query("SELECT * FROM nothing_of_this_name")

    assert caught.value.code == 60
    assert client.command("SELECT 1") == 1


def test_a_wrong_token_is_refused(endpoint: Endpoint) -> None:
    """Before anything is read or run, also on routes."""
    with pytest.raises(DatabaseError, match="token is wrong"):
        client_of(endpoint, password="guess")
    stranger = Endpoint(endpoint.host, endpoint.port, "guess", endpoint.pid)
    assert endpoint.alive()
    assert not stranger.alive()


def test_a_route_answers_with_what_its_handler_returns(hot: ServedHot, endpoint: Endpoint) -> None:
    """Query and body arrive as they were sent."""
    hot.server.route("/k2/echo", lambda query, body: query["a"].encode() + b"|" + body)

    assert endpoint.request("/k2/echo", {"a": "b c&d=ä"}, b"\x00\xff" * 100_000) == (
        "b c&d=ä".encode() + b"|" + b"\x00\xff" * 100_000
    )


def test_a_route_s_error_is_raised_again_by_the_caller(hot: ServedHot, endpoint: Endpoint) -> None:
    """With its type and its message; anything unforeseen is StoreDown."""

    def refuse(query: dict[str, str], body: bytes) -> bytes:
        raise NotSuccessor("offsets 5 do not follow 3")

    def stumble(query: dict[str, str], body: bytes) -> bytes:
        raise RuntimeError("stumbled")

    hot.server.route("/k2/refuse", refuse)
    hot.server.route("/k2/stumble", stumble)

    with pytest.raises(NotSuccessor, match="5 do not follow 3"):
        endpoint.request("/k2/refuse")
    with pytest.raises(StoreDown, match="stumbled"):
        endpoint.request("/k2/stumble")
    with pytest.raises(StoreDown, match="/k2/none"):
        endpoint.request("/k2/none")


def test_nobody_listening_is_store_down_and_silence_is_timed_out() -> None:
    """A dead owner, and a stopped one."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(TimedOut):
            Endpoint("127.0.0.1", port, "t", 1).request("/k2/alive", timeout_seconds=0.1)
    with pytest.raises(StoreDown, match="cannot be reached"):
        Endpoint("127.0.0.1", port, "t", 1).request("/k2/alive")


def test_connections_beyond_the_limit_are_refused_not_queued(endpoint: Endpoint) -> None:
    """Idle connections hold a thread each; the next one hears it at once, and a freed place is used again."""
    held = [socket.create_connection((endpoint.host, endpoint.port)) for _ in range(MAX_CONNECTIONS)]
    refused = socket.create_connection((endpoint.host, endpoint.port), timeout=10)

    assert refused.recv(100).startswith(b"HTTP/1.1 503")
    for connection in [*held, refused]:
        connection.close()


def test_strangers_do_not_keep_others_out(hot: ServedHot, tmp_path: Path) -> None:
    """A connection without a valid token ends soon, silent or not; one that had it stays, idle as it is."""
    server = HotServer(hot.engine, tmp_path / "other", stranger_seconds=0.3)
    endpoint = server.start()
    known = http.client.HTTPConnection(endpoint.host, endpoint.port)

    def ask() -> bytes:
        known.request("POST", "/k2/alive", headers={"Authorization": f"Bearer {endpoint.token}"})
        return known.getresponse().read()

    assert ask() == b"alive"
    strangers = [socket.create_connection((endpoint.host, endpoint.port)) for _ in range(MAX_CONNECTIONS - 1)]
    strangers[0].sendall(b"POST /k2/alive HTTP/1.1\r\nX-Slow: ")

    assert [stranger.recv(100) for stranger in strangers] == [b""] * len(strangers)
    assert ask() == b"alive"
    known.close()
    server.stop()
    for stranger in strangers:
        stranger.close()


def exchanged(endpoint: Endpoint, request: bytes) -> bytes:
    """Send bytes and return everything that comes back."""
    answers = b""
    address = (endpoint.host, endpoint.port)
    with socket.create_connection(address, timeout=10) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        while part := connection.recv(65_536):
            answers += part
    return answers


def test_request_whose_end_is_not_told_ends_the_connection(endpoint: Endpoint) -> None:
    """What follows is never taken for another request."""
    known = b" HTTP/1.1\r\nAuthorization: Bearer %s\r\n" % endpoint.token.encode()
    framings = [
        *(b"Content-Length: abc", b"Content-Length: -5", b"Content-Length: 1_0", b"Content-Length: +3"),
        *(b"Transfer-Encoding: chunked\r\n\r\n-5", b"Transfer-Encoding: chunked\r\n\r\n0x3\r\nabc"),
        b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 2_000,
    ]
    for framing in framings:
        first = b"POST /?query=SELECT+1" + known + framing + b"\r\n\r\n"
        answers = exchanged(endpoint, first + b"POST /k2/alive" + known + b"\r\n")

        assert b"200 OK" not in answers, framing
    assert b"alive" in exchanged(endpoint, b"POST /k2/alive" + known + b"\r\n")


def test_only_the_token_opens(endpoint: Endpoint) -> None:
    """In whatever form a wrong one comes; the right one is in no answer."""
    for token in ("", "guess", "x" * 60_000, "\0", "ä", "Basic " + "A" * 1_000):
        for header in ("Authorization: Bearer", "Authorization: Basic", "X-ClickHouse-Key:"):
            request = f"POST /?query=SELECT+1 HTTP/1.1\r\n{header} {token}\r\n\r\n".encode()
            answer = exchanged(endpoint, request)

            assert b"200 OK" not in answer, (header, token[:20])
            assert endpoint.token.encode() not in answer


def test_closing_the_owner_ends_idle_connections(tmp_path: Path) -> None:
    """A client that stays connected does not keep the owner from stopping."""
    owner = open_hot(Settings(data=str(tmp_path)), "own")
    client = open_hot(Settings(data=str(tmp_path)), "follow")
    assert client.symbols() == []
    owner.close()

    with pytest.raises(StoreDown):
        client.symbols()
    client.close()
