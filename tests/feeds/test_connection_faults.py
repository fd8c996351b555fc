"""The connection loop against networks that vanish and servers that break every rule."""

# ruff: noqa: SIM117 (server outside, feed inside: the order of the ends matters and is seen)
from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import ssl
import sys
import zlib
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp import web

from k2.errors import FeedDown
from k2.feeds.connection import Feed, probe
from k2.model import CLOSED, FRAME, OPENED, SUBSCRIBED

sys.path.insert(0, str(Path(__file__).parent))
from following import Taken, running, self_signed, settings
from hostile_server import PING, TEXT, forget_peak, frame, peak_bytes, proxying, raw_server, until_closed, upgrade
from toy_exchange import LIMITS, ToyExchange, ToySocket, serving, until

MEGABYTE = 1 << 20


def largest(low: float, high: float) -> float:
    """Draw the longest wait, and the latest rotation."""
    return high


# Networks.


async def test_vanished_network_is_left_and_found_again(caplog: pytest.LogCaptureFixture) -> None:
    """The peer is gone without a word: noticed by the missing pong, tried while it is away, there again after it."""
    caplog.set_level(logging.INFO)
    taken = Taken()
    async with serving() as server, proxying(server.url) as (proxy, url):
        feed = Feed(ToyExchange(), settings(url, "BTC-USDT", pong_seconds=0.3, connect_seconds=0.3), taken.emit)
        async with running(feed):
            await until(lambda: taken.of(SUBSCRIBED))
            first = await server.publish()
            await until(lambda: first in taken.numbers())
            proxy.vanish()
            lost = await server.publish()
            await until(lambda: feed.status()[0].ended.get("connect", 0) >= 2)
            ended, error = dict(feed.status()[0].ended), feed.status()[0].last_error
            proxy.reappear()
            await until(lambda: len(taken.of(SUBSCRIBED)) == 2)
            last = await server.publish()
            await until(lambda: last in taken.numbers())

    assert taken.of(CLOSED)[0].data == b"a ping was not answered within 0.3 s"
    assert ended["pong"] == 1
    assert "no answer within 0.3 s" in error
    assert proxy.dropped > 0
    assert lost not in taken.numbers()
    assert [(f.kind, f.epoch) for f in taken.frames if f.kind != FRAME][:4] == [
        (OPENED, 0), (SUBSCRIBED, 0), (CLOSED, 0), (OPENED, 1),
    ]  # fmt: skip
    assert caplog.text.count("connected and subscribed again") == 1


async def test_network_that_vanishes_while_subscribing_is_left() -> None:
    """Nothing comes after the upgrade: the subscription's time limit or the ping ends it; the next one works."""
    taken = Taken()
    async with serving() as server, proxying(server.url) as (proxy, url):

        async def vanish(socket: ToySocket) -> None:
            if socket.number == 0:
                await socket.ws.receive()
                proxy.vanish()
            await socket.listen()

        server.script = vanish
        feed = Feed(ToyExchange(), settings(url, "BTC-USDT", pong_seconds=30.0, subscribe_seconds=0.2), taken.emit)
        async with running(feed):
            await until(lambda: taken.of(CLOSED))
            proxy.reappear()
            await until(lambda: taken.of(SUBSCRIBED))

    assert taken.of(CLOSED)[0].data == b"no acknowledgement of BTC-USDT within 0.2 s"


async def test_name_that_is_not_found_is_told_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    """DNS fails: said once however often it fails, counted, and nothing is recorded as opened."""
    taken = Taken()
    feed = Feed(ToyExchange(), settings("wss://no-such-host.invalid/ws", "BTC-USDT", connect_seconds=20.0), taken.emit)
    async with running(feed):
        await until(lambda: feed.status() and feed.status()[0].ended.get("connect", 0) >= 3, 60)
        error = feed.status()[0].last_error

    assert "the host name is not found (DNS)" in error
    assert "exchanges.toy.url" in error
    assert caplog.text.count("(DNS)") == 1
    assert taken.frames == []


# TLS.


async def test_tls_handshake_that_never_ends_is_given_up() -> None:
    """A peer that says nothing, or a byte now and then: each attempt ends at connect_seconds, and is closed."""
    closed = 0

    async def dribble(number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal closed
        with contextlib.suppress(ConnectionError):
            if number % 2:
                writer.write(b"\x16\x03\x03\x40\x00")  # a TLS record of 16 KiB begins, and comes a byte at a time
            while number % 2 and not reader.at_eof():
                writer.write(b"\x02")
                await writer.drain()
                await asyncio.sleep(0.05)
            while await reader.read(65_536):
                pass
        closed += 1

    taken = Taken()
    async with raw_server(dribble) as url:
        feed = Feed(ToyExchange(), settings(url.replace("ws:", "wss:"), "BTC-USDT", connect_seconds=0.3), taken.emit)
        async with running(feed):
            await until(lambda: feed.status() and feed.status()[0].ended.get("connect", 0) >= 4)
            errors = feed.status()[0].last_error
            await until(lambda: closed >= 3)

    assert "cannot connect" in errors
    assert taken.frames == []


async def test_slow_tls_is_waited_for(tmp_path: Path) -> None:
    """A handshake that takes its time, but less than connect_seconds, is no failure."""
    certificate, key = self_signed(tmp_path)
    serve = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serve.load_cert_chain(certificate, key)
    trusting = ssl.create_default_context(cafile=str(certificate))
    taken = Taken()
    async with serving(ssl_context=serve) as server, proxying(server.url) as (proxy, url):
        proxy.delay_seconds = 0.003
        began = asyncio.get_running_loop().time()
        feed = Feed(ToyExchange(), settings(url, "BTC-USDT", connect_seconds=30.0), taken.emit, tls=trusting)
        async with running(feed):
            await until(lambda: taken.of(OPENED), 30)
            took = asyncio.get_running_loop().time() - began
            proxy.delay_seconds = 0.0
            await until(lambda: taken.of(SUBSCRIBED))

    assert took > 0.1
    assert {f.epoch for f in taken.frames} == {0}


async def test_untrusted_certificate_is_told_on_the_loop(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is sent to a server nobody vouches for; the message says what to check, once."""
    certificate, key = self_signed(tmp_path)
    serve = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serve.load_cert_chain(certificate, key)
    async with serving(ssl_context=serve) as server:
        feed = Feed(ToyExchange(), settings(server, "BTC-USDT"), Taken().emit)
        async with running(feed):
            await until(lambda: feed.status() and feed.status()[0].ended.get("connect", 0) >= 3)

    assert server.asked == 0
    assert caplog.text.count("TLS: the certificate is not trusted") == 1


# Servers that come and go.


async def test_flapping_server_is_asked_ever_more_rarely_until_it_was_healthy() -> None:
    """Subscribed and closed at once, six times: waits double to the ceiling; after a healthy while they begin anew."""
    spans: list[float] = []
    healthy = asyncio.Event()

    def draw(low: float, high: float) -> float:
        if low == 0.0:
            spans.append(high)
        return high

    async def flap(socket: ToySocket) -> None:
        listening = asyncio.create_task(socket.listen())
        await until(lambda: socket.subscribed)
        if socket.number == 6:
            await healthy.wait()
        if socket.number < 7:
            await socket.ws.close()
        await listening

    taken = Taken()
    asked: list[float] = []
    async with serving() as server:
        server.script = flap
        server.answer = lambda number: asked.append(asyncio.get_running_loop().time())  # type: ignore[func-returns-value]
        feed = Feed(
            ToyExchange(),
            settings(server, "BTC-USDT", backoff_first_seconds=0.05, backoff_max_seconds=0.4),
            taken.emit,
            draw=draw,
        )
        async with running(feed):
            await until(lambda: len(taken.of(SUBSCRIBED)) == 7)
            subscribed = asyncio.get_running_loop().time()
            await until(lambda: asyncio.get_running_loop().time() - subscribed > 0.5)
            healthy.set()
            await until(lambda: len(taken.of(SUBSCRIBED)) == 8)
            ended = dict(feed.status()[0].ended)

    assert spans == [0.05, 0.1, 0.2, 0.4, 0.4, 0.4, 0.05]
    assert all(later - sooner >= span for sooner, later, span in zip(asked, asked[1:6], spans, strict=False))
    assert ended == {"closed": 7}


async def test_one_throttled_connection_holds_all_of_them_back() -> None:
    """429 with Retry-After: none of the exchange's connections is tried before its end; those that live go on."""
    asked: list[float] = []

    def answer(number: int) -> web.Response | None:
        asked.append(asyncio.get_running_loop().time())
        return web.Response(status=429, headers={"Retry-After": "1"}) if number == 2 else None

    taken = Taken()
    limits = dataclasses.replace(LIMITS, connections_per_minute=600.0)  # a turn each 0.1 s
    symbols = [f"A{n}-USDT" for n in range(5)]
    async with serving() as server:
        server.answer = answer
        feed = Feed(ToyExchange(limits=limits), settings(server, *symbols, per_connection=1), taken.emit)
        async with running(feed):
            await until(lambda: len(taken.of(SUBSCRIBED)) == 5)
            ended = [dict(status.ended) for status in feed.status()]

    later = [moment - asked[2] for moment in asked[3:]]
    assert len(asked) == 6
    assert min(later) >= 1.0
    assert sorted(map(str, ended)) == ["{'throttled': 1}", "{}", "{}", "{}", "{}"]
    assert taken.of(CLOSED)[-1].data == b"capture stops"


@pytest.mark.parametrize(
    ("status", "headers", "kind", "told", "least_seconds"),
    [
        (418, {}, "throttled", "HTTP 418: too many connections or requests from this address", 0.4),
        (429, {}, "throttled", "HTTP 429: too many", 0.4),
        (418, {"Retry-After": "1"}, "throttled", "it asks to wait 1 s", 1.0),
        (
            403,
            {"Retry-After": "1"},
            "http",
            "HTTP 403: this address or country is not served; it asks to wait 1 s",
            1.0,
        ),
        (503, {"Retry-After": "1"}, "http", "HTTP 503: no WebSocket there", 1.0),
        (429, {"Retry-After": "Mon, 01 Jan 99999999999999999999 00:00:00 GMT"}, "throttled", "HTTP 429", 0.4),
    ],
)
async def test_ban_is_waited_out(
    status: int, headers: dict[str, str], kind: str, told: str, least_seconds: float
) -> None:
    """Without a time to wait the longest backoff is taken, with one that; kind and words are the operator's."""
    asked: list[float] = []

    def answer(number: int) -> web.Response | None:
        asked.append(asyncio.get_running_loop().time())
        return web.Response(status=status, headers=headers) if number == 0 else None

    taken = Taken()
    async with serving() as server:
        server.answer = answer
        feed = Feed(ToyExchange(), settings(server, "BTC-USDT", backoff_max_seconds=0.4), taken.emit)
        async with running(feed):
            await until(lambda: taken.of(SUBSCRIBED))
            after = feed.status()[0]

    assert asked[1] - asked[0] >= least_seconds
    assert after.ended == {kind: 1}
    assert told in after.last_error


async def test_server_that_cuts_at_an_age_finds_nobody_to_cut() -> None:
    """Connections are replaced before the exchange's limit, with an overlap: it closes none, no number is missing."""
    taken = Taken()
    limits = dataclasses.replace(LIMITS, connection_seconds=3.0)
    cut = 0

    async def cut_at_age(socket: ToySocket) -> None:
        nonlocal cut
        listening = asyncio.create_task(socket.listen())
        done, _ = await asyncio.wait({listening}, timeout=3.0)
        if not done:
            cut += 1
            await socket.ws.close(code=1001)
        await listening

    async with serving() as server:
        server.script = cut_at_age
        feed = Feed(ToyExchange(limits=limits), settings(server, "BTC-USDT"), taken.emit, draw=lambda low, high: low)
        async with running(feed):
            await until(lambda: taken.of(SUBSCRIBED))
            while not taken.of(CLOSED):
                await server.publish()
                await asyncio.sleep(0.002)
            last = await server.publish()
            await until(lambda: last in taken.numbers())
            ended = dict(feed.status()[0].ended)

    assert (cut, ended) == (0, {"rotated": 1})
    assert taken.numbers() == set(range(1, last + 1))


# Servers that break the rules of WebSockets.

Hostility = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def _deflate_bomb(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A third of a megabyte that unpacks to sixty-four."""
    await upgrade(reader, writer, "permessage-deflate")
    packer = zlib.compressobj(1, wbits=-15)
    bomb = b"".join(packer.compress(bytes(MEGABYTE)) for _ in range(64)) + packer.flush(zlib.Z_SYNC_FLUSH)
    writer.write(frame(bomb[:-4], compressed=True))
    await writer.drain()


async def _length_of_exabytes(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await upgrade(reader, writer)
    writer.write(frame(b"", told=1 << 62))
    await _pour(writer, bytes(MEGABYTE))


async def _message_without_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Fragments that each are small, of one message that never ends."""
    await upgrade(reader, writer)
    writer.write(frame(b"x" * 1_000, TEXT, last=False))
    await _pour(writer, frame(b"x" * 60_000, 0, last=False))


async def _empty_fragments_without_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await upgrade(reader, writer)
    writer.write(frame(b"", TEXT, last=False))
    await _pour(writer, frame(b"", 0, last=False) * 1_000)


async def _head_without_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 101 Switching Protocols\r\n")
    await _pour(writer, b"X-Filler: x\r\n" * 5_000)


async def _header_without_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 101 Switching Protocols\r\nX-Filler: ")
    await _pour(writer, b"x" * 65_536)


async def _answer_without_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """No WebSocket, but a page that never ends."""
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    await _pour(writer, b"10000\r\n" + b"x" * 65_536 + b"\r\n")


async def _pings_without_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """And no look at the pongs."""
    await upgrade(reader, writer)
    await _pour(writer, frame(b"p" * 100, PING) * 500)


async def _wrong_key(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 101 X\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: x\r\n\r\n")
    await writer.drain()


async def _unknown_opcode(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await upgrade(reader, writer)
    writer.write(frame(b"x", 5))
    await writer.drain()


async def _no_deflate(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A frame said to be compressed that is not."""
    await upgrade(reader, writer, "permessage-deflate")
    writer.write(frame(b"\xff" * 1_000, compressed=True))
    await writer.drain()


async def _endless_redirect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    for _ in range(11):  # as long as a client follows
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 302 Found\r\nLocation: /ws?again\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()


async def _terminal_codes(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Words for the operator's terminal in the status line."""
    writer.write(b"HTTP/1.1 500 \x1b[2J\x1b]0;owned\x07\r\nContent-Length: 0\r\n\r\n")
    await writer.drain()


async def _pour(writer: asyncio.StreamWriter, piece: bytes) -> None:
    """Send one piece after the other, a quarter of a gigabyte at most, as long as anybody reads."""
    for _ in range((256 << 20) // max(len(piece), 4_096)):
        writer.write(piece)
        await writer.drain()
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("hostility", "kinds"),
    [
        (_deflate_bomb, {"too_large"}),
        (_length_of_exabytes, {"too_large", "broken"}),
        (_message_without_end, {"too_large"}),
        (_empty_fragments_without_end, {"silent", "pong", "unacknowledged"}),
        (_head_without_end, {"connect", "http"}),
        (_header_without_end, {"connect", "http"}),
        (_answer_without_end, {"http"}),
        (_pings_without_end, {"silent", "pong", "unacknowledged"}),
        (_wrong_key, {"http"}),
        (_unknown_opcode, {"broken"}),
        (_no_deflate, {"broken"}),
        (_endless_redirect, {"connect"}),
        (_terminal_codes, {"http", "connect"}),
    ],
)
async def test_hostile_server_is_left_with_a_reason(hostility: Hostility, kinds: set[str]) -> None:
    """Whatever it does: the connection ends with a kind and words, memory stays flat, and the next one works."""

    async def script(number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if number == 0:
            await hostility(reader, writer)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(reader.read(), 10)
            return
        await upgrade(reader, writer)
        writer.write(frame(json.dumps({"ack": ["BTC-USDT"]}).encode()))
        await until_closed(reader)

    taken = Taken()
    forget_peak()
    before = peak_bytes()
    limits = dataclasses.replace(LIMITS, silence_seconds=1.0)
    quick = {"max_frame_bytes": MEGABYTE, "connect_seconds": 5.0, "pong_seconds": 1.0, "subscribe_seconds": 2.0}
    async with raw_server(script) as url:
        feed = Feed(ToyExchange(limits=limits), settings(url, "BTC-USDT", **quick), taken.emit)
        async with running(feed):
            await until(lambda: feed.status() and feed.status()[0].ended)
            ended, error = dict(feed.status()[0].ended), feed.status()[0].last_error
            await until(lambda: taken.of(SUBSCRIBED))

    assert ended.keys() <= kinds, (ended, error)
    assert len(error) > 10
    assert error.isprintable()
    assert peak_bytes() - before < 32 * MEGABYTE


@pytest.mark.parametrize("hostility", [_endless_redirect, _header_without_end, _wrong_key, _unknown_opcode])
async def test_secrets_of_an_address_are_not_told(hostility: Hostility, caplog: pytest.LogCaptureFixture) -> None:
    """A password or key in the address is in no record, status or log, whatever goes wrong."""
    caplog.set_level(logging.DEBUG)

    async def script(number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await hostility(reader, writer)

    taken = Taken()
    async with raw_server(script) as url:
        secret = url.replace("://", "://anna:hunter2@") + "?apiKey=hunter3&symbol=x"
        feed = Feed(ToyExchange(), settings(secret, "BTC-USDT"), taken.emit)
        async with running(feed):
            await until(lambda: feed.status() and feed.status()[0].ended)
            status = repr(feed.status())
        with pytest.raises(FeedDown) if hostility is not _unknown_opcode else contextlib.nullcontext() as raised:
            await probe(ToyExchange(), settings(secret, "BTC-USDT"), 5.0)

    said = f"{status} {caplog.text} {taken.frames} {raised.value if raised else ''}"
    assert "anna" in said
    assert "symbol=x" in said
    assert "hunter" not in said


async def test_text_that_is_not_utf8_is_kept_as_it_is() -> None:
    """Broken text, also as the words of a close: recorded byte for byte, and the connection goes on."""
    broken = b'{"n": "\xff\xfe\xc0"}'
    taken = Taken()

    async def script(number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await upgrade(reader, writer)
        writer.write(frame(json.dumps({"ack": ["BTC-USDT"]}).encode()))
        writer.write(frame(broken) + frame(b'{"n": 1}'))
        await until_closed(reader)

    async with raw_server(script) as url:
        async with running(Feed(ToyExchange(), settings(url, "BTC-USDT"), taken.emit)):
            await until(lambda: len(taken.of(FRAME)) == 3)

    assert [f.data for f in taken.of(FRAME)[1:]] == [broken, b'{"n": 1}']
    assert len(taken.of(OPENED)) == 1
