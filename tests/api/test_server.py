"""The server's thread: it starts, stops, and says clearly why it cannot."""

from __future__ import annotations

import http.client
import socket
import time

import httpx
import pytest

from k2.api.app import create_app
from k2.api.server import ApiServer
from k2.api.services import Services
from k2.errors import InUse, Misconfigured


def test_port_zero_takes_a_free_one_and_stop_frees_it(services: Services) -> None:
    """The port taken is told, and may be bound again as soon as the server has stopped."""
    app = create_app(services)
    server = ApiServer(app, "127.0.0.1", 0)
    server.start()
    assert httpx.get(f"{server.url}/health/live").status_code == 200
    server.stop()

    again = ApiServer(app, "127.0.0.1", server.port)
    again.start()
    again.stop()
    again.stop()
    assert not again.running


def test_taken_port_is_one_clear_message(services: Services) -> None:
    """The message names the port, the address and the setting."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]

        with pytest.raises(InUse, match=rf"port {port} on 127.0.0.1 is taken.*--port"):
            ApiServer(create_app(services), "127.0.0.1", port).start()


def test_address_of_another_machine_is_refused(services: Services) -> None:
    """An address that is not this machine's is a wrong setting."""

    with pytest.raises(Misconfigured, match="cannot be listened on"):
        ApiServer(create_app(services), "192.0.2.1", 0).start()


def test_answers_on_a_kept_connection_wait_for_no_acknowledgement(services: Services) -> None:
    """Head and body leave at once: the twentieth answer on a connection comes as fast as the first."""
    server = ApiServer(create_app(services), "127.0.0.1", 0)
    server.start()
    seconds = []
    try:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        for _ in range(20):
            began = time.perf_counter()
            connection.request("GET", "/v1/symbols")
            connection.getresponse().read()
            seconds.append(time.perf_counter() - began)
        connection.close()
    finally:
        server.stop()

    assert min(seconds[5:]) < 0.03  # a delayed acknowledgement takes 40 ms, each time
