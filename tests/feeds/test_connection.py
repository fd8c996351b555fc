"""The connection loop against a real WebSocket server on loopback."""

# ruff: noqa: SIM117 (server outside, feed inside: the order of the ends matters and is seen)
from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import re
import socket as sockets
import ssl
import sys
from collections.abc import Awaitable
from pathlib import Path

import pytest
from aiohttp import WSMsgType, web

from k2.errors import FeedDown, UnknownName
from k2.feeds.base import Control, Request
from k2.feeds.connection import Backoff, Feed, Gate, plans, probe, shard
from k2.feeds.session import Subscriptions, retry_after_seconds
from k2.model import CLOSED, FRAME, OPENED, SUBSCRIBED, Frame
from k2.settings import ExchangeSettings, Settings

sys.path.insert(0, str(Path(__file__).parent))
from following import Taken, running, self_signed, settings
from toy_exchange import LIMITS, ToyExchange, ToySocket, serving, until


async def test_subscription_is_acknowledged_and_recorded() -> None:
    """OPENED with the address, frames exactly as sent, SUBSCRIBED, CLOSED at the end; counters without a hole."""
    taken = Taken()
    clock = itertools.count(1_000)
    async with serving() as server:
        feed = Feed(ToyExchange(), settings(server, "BTC-USDT"), taken.emit, clock_ns=lambda: next(clock))
        async with running(feed):
            await until(lambda: taken.of(SUBSCRIBED))
            await server.sockets[0].ws.send_bytes(b"\x00\xff binary")
            await server.sockets[0].ws.send_str('{"n":  1.50}')
            await until(lambda: len(taken.of(FRAME)) == 3)
            status = feed.status()[0]

    assert [f.kind for f in taken.frames] == [OPENED, FRAME, SUBSCRIBED, FRAME, FRAME, CLOSED]
    assert [f.counter for f in taken.frames] == [0, 1, 2, 3, 4, 5]
    assert {(f.connection, f.epoch, f.source) for f in taken.frames} == {("0", 0, "live")}
    assert taken.frames[0].origin == server.url
    assert json.loads(taken.frames[2].data) == {"acknowledged": ["BTC-USDT"], "refused": {}}
    assert [f.data for f in taken.frames[3:5]] == [b"\x00\xff binary", b'{"n":  1.50}']
    assert taken.frames[5].data == b"capture stops"
    assert [f.received_ns for f in taken.frames] == sorted({f.received_ns for f in taken.frames})
    assert (status.state, status.frames, status.acknowledged) == ("subscribed", 3, 1)


async def test_large_compressed_frames_arrive_whole() -> None:
    """permessage-deflate is used where the server offers it, and a frame of megabytes is one record."""
    taken = Taken()
    async with serving() as server:
        async with running(Feed(ToyExchange(), settings(server, "BTC-USDT"), taken.emit)):
            await until(lambda: taken.of(SUBSCRIBED))
            await server.sockets[0].ws.send_bytes(b"abc" * 1_000_000)
            await until(lambda: len(taken.of(FRAME)) == 2)
            compressed = server.sockets[0].ws.compress

    assert compressed
    assert taken.of(FRAME)[1].data == b"abc" * 1_000_000


async def test_frame_above_the_limit_ends_the_connection() -> None:
    """A frame larger than max_frame_bytes is not taken; the connection is closed with that reason and reopened."""
    taken = Taken()
    async with serving() as server:
        async with running(Feed(ToyExchange(), settings(server, "BTC-USDT", max_frame_bytes=1_000), taken.emit)):
            await until(lambda: taken.of(SUBSCRIBED))
            await server.sockets[0].ws.send_str("x" * 2_000)
            await until(lambda: len(taken.of(SUBSCRIBED)) == 2)

    assert b"max_frame_bytes = 1000" in taken.of(CLOSED)[0].data


async def test_refused_symbol_does_not_stop_the_others_and_is_tried_again() -> None:
    """The acknowledged ones go on on the same connection; once the exchange accepts the other, it is subscribed."""
    taken = Taken()
    refuse = ["NOPE-USD"]
    async with serving() as server:
        server.script = lambda socket: socket.listen(refuse=refuse)
        feed = Feed(ToyExchange(), settings(server, "BTC-USDT", "NOPE-USD", backoff_max_seconds=0.02), taken.emit)
        async with running(feed):
            await until(lambda: taken.of(SUBSCRIBED))
            refused = dict(feed.status()[0].refused)
            refuse.clear()
            await until(lambda: len(taken.of(SUBSCRIBED)) == 2)
            asked_again = server.sockets[0].heard[1]

    assert json.loads(taken.of(SUBSCRIBED)[0].data) == {
        "acknowledged": ["BTC-USDT"],
        "refused": {"NOPE-USD": "not listed"},
    }
    assert json.loads(taken.of(SUBSCRIBED)[1].data) == {"acknowledged": ["BTC-USDT", "NOPE-USD"], "refused": {}}
    assert refused == {"NOPE-USD": "not listed"}
    assert json.loads(asked_again) == {"subscribe": ["NOPE-USD"]}
    assert len(taken.of(OPENED)) == 1


async def test_everything_refused_is_recorded_and_tried_anew() -> None:
    """With nothing acknowledged the connection ends with the exchange's words, and a new one is made."""
    taken = Taken()
    async with serving() as server:
        server.script = lambda socket: socket.listen(refuse=["NOPE-USD"] if socket.number == 0 else [])
        async with running(Feed(ToyExchange(), settings(server, "NOPE-USD"), taken.emit)):
            await until(lambda: taken.of(SUBSCRIBED))

    assert taken.of(CLOSED)[0].data == b"every subscription was refused: NOPE-USD: not listed"
    assert taken.of(SUBSCRIBED)[0].epoch == 1


async def test_missing_acknowledgement_reconnects_then_goes_on_without_it() -> None:
    """Unanswered subscriptions end the connection; unanswered three times in a row, the others go on without them."""
    taken = Taken()
    async with serving() as server:
        server.script = lambda socket: socket.listen(ignore=["MUTE-USD"])
        async with running(
            Feed(ToyExchange(), settings(server, "BTC-USDT", "MUTE-USD", subscribe_seconds=0.1), taken.emit)
        ):
            await until(lambda: taken.of(SUBSCRIBED))

    reason = "no acknowledgement of MUTE-USD within 0.1 s"
    assert [f.data.decode() for f in taken.of(CLOSED)[:2]] == [reason, reason]
    assert json.loads(taken.of(SUBSCRIBED)[0].data) == {"acknowledged": ["BTC-USDT"], "refused": {"MUTE-USD": reason}}
    assert taken.of(SUBSCRIBED)[0].epoch == 2


def test_refusal_without_keys_is_laid_to_the_oldest_open_request() -> None:
    """Answers come in the order of the requests; an acknowledgement that comes yet puts a wrong guess right."""
    requests = [Request("a", frozenset({"A"})), Request("b", frozenset({"B"})), Request("c", frozenset({"C"}))]
    subscriptions = Subscriptions(requests)
    subscriptions.apply(Control("refused", reason="nothing was asked"))
    nothing_sent = (set(subscriptions.waiting), subscriptions.complaint)
    for request in requests[:2]:
        subscriptions.note_sent(request)
    subscriptions.apply(Control("refused", reason="bad"))
    guess = dict(subscriptions.refused)
    subscriptions.apply(Control("acknowledged", frozenset({"A"})))
    subscriptions.apply(Control("refused", reason="worse"))

    assert nothing_sent == ({"A", "B", "C"}, "nothing was asked")
    assert guess == {"A": "bad"}
    assert (subscriptions.acknowledged, subscriptions.refused, subscriptions.waiting) == ({"A"}, {"B": "worse"}, {"C"})
    assert subscriptions.unnamed & subscriptions.refused.keys() == {"B"}


def test_refusal_of_an_acknowledged_key_changes_nothing() -> None:
    """`Already subscribed` is no loss of the subscription."""
    subscriptions = Subscriptions([Request("a", frozenset({"A"}))])
    subscriptions.apply(Control("acknowledged", frozenset({"A"})))

    assert not subscriptions.apply(Control("refused", frozenset({"A"}), "already subscribed"))
    assert subscriptions.acknowledged == {"A"}


async def test_silent_socket_is_replaced() -> None:
    """A socket that is open, answers pings and says nothing is dead after silence_seconds."""
    taken = Taken()
    limits = dataclasses.replace(LIMITS, silence_seconds=0.3)
    async with serving() as server:
        async with running(Feed(ToyExchange(limits=limits), settings(server, "BTC-USDT"), taken.emit)):
            await until(lambda: len(taken.of(SUBSCRIBED)) == 2)

    assert taken.of(CLOSED)[0].data == b"no message for 0.3 s on an open connection"


async def test_heartbeats_count_as_life_but_not_as_data() -> None:
    """Heartbeats alone keep a connection; the status shows how old the data is."""
    taken = Taken()
    limits = dataclasses.replace(LIMITS, silence_seconds=0.5)

    async def beat(socket: ToySocket) -> None:
        listening = asyncio.create_task(socket.listen())
        await until(lambda: socket.subscribed)
        while not socket.ws.closed:
            await socket.send(heartbeat=1)
            await asyncio.sleep(0.02)
        await listening

    async with serving() as server:
        server.script = beat
        feed = Feed(ToyExchange(limits=limits), settings(server, "BTC-USDT"), taken.emit)
        async with running(feed):
            await until(lambda: taken.of(SUBSCRIBED))
            opened = taken.frames[0].received_ns
            await until(lambda: taken.frames[-1].received_ns - opened > 1_000_000_000)
            status = feed.status()[0]

    assert len(taken.of(OPENED)) == 1
    assert (status.last_data_ns, status.last_frame_ns > 0) == (0, True)


async def _heartbeats_only(socket: ToySocket, *, data: int = 0, apart_seconds: float = 0.0) -> None:
    """Send some numbers, then heartbeats and nothing else, for ever."""
    listening = asyncio.create_task(socket.listen())
    await until(lambda: socket.subscribed)
    for number in range(data):
        await socket.send(n=number)
        await asyncio.sleep(apart_seconds)
    while not socket.ws.closed:
        await socket.send(heartbeat=1)
        await asyncio.sleep(0.02)
    await listening


async def test_socket_with_heartbeats_but_no_data_is_replaced() -> None:
    """Data stops for good on a living socket: a new one is subscribed first, then the old one is closed, counted."""
    taken = Taken()
    limits = dataclasses.replace(LIMITS, data_silence_seconds=0.2)

    async def die_quietly(socket: ToySocket) -> None:
        await _heartbeats_only(socket, data=3 if socket.number == 0 else 1_000_000, apart_seconds=0.001)

    async with serving() as server:
        server.script = die_quietly
        feed = Feed(ToyExchange(limits=limits), settings(server, "BTC-USDT"), taken.emit)
        async with running(feed):
            await until(lambda: 100 in taken.numbers() and taken.of(CLOSED))
            status = feed.status()[0]
            kinds = [(f.kind, f.epoch) for f in taken.frames if f.kind != FRAME]

    assert kinds == [(OPENED, 0), (SUBSCRIBED, 0), (OPENED, 1), (SUBSCRIBED, 1), (CLOSED, 0)]
    assert re.fullmatch(
        rb"alive, but no data for 0.2[0-9]* s: replaced by a newer connection", taken.of(CLOSED)[0].data
    )
    assert status.ended == {"data_silence": 1}
    assert status.state == "subscribed"


async def test_quiet_market_is_replaced_ever_more_rarely() -> None:
    """Where no connection brings data, the patience doubles with every replacement."""
    taken = Taken()
    limits = dataclasses.replace(LIMITS, data_silence_seconds=0.05)
    async with serving() as server:
        server.script = _heartbeats_only
        async with running(Feed(ToyExchange(limits=limits), settings(server, "BTC-USDT"), taken.emit)):
            await until(lambda: len(taken.of(CLOSED)) == 4)

    told = [f.data.decode().split(":")[0] for f in taken.of(CLOSED)[:4]]
    assert told == [f"alive, but no data for {seconds} s" for seconds in ("0.05", "0.1", "0.2", "0.4")]


async def test_market_with_pauses_is_given_ten_of_them() -> None:
    """The longest gap a connection has seen in its data raises its limit."""
    taken = Taken()
    limits = dataclasses.replace(LIMITS, data_silence_seconds=0.5)
    async with serving() as server:
        server.script = lambda socket: _heartbeats_only(socket, data=4, apart_seconds=0.1)
        async with running(Feed(ToyExchange(limits=limits), settings(server, "BTC-USDT"), taken.emit)):
            await until(lambda: taken.of(CLOSED))

    seconds = float(taken.of(CLOSED)[0].data.rsplit(b"for ", 1)[1].split()[0])
    assert seconds >= 0.9


@pytest.mark.parametrize("own_ping", [None, '{"ping": 1}'])
async def test_half_open_socket_is_noticed_by_its_missing_pong(own_ping: str | None) -> None:
    """A peer that no longer answers pings, the protocol's or the exchange's own, is left within pong_seconds."""
    taken = Taken()
    async with serving() as server:
        server.autoping = False
        exchange = ToyExchange(own_ping=own_ping)
        async with running(Feed(exchange, settings(server, "BTC-USDT", pong_seconds=0.2), taken.emit)):
            await until(lambda: len(taken.of(SUBSCRIBED)) == 2)

    assert taken.of(CLOSED)[0].data == b"a ping was not answered within 0.2 s"


async def test_frozen_peer_is_noticed() -> None:
    """A peer whose network is gone (nothing read, nothing sent, no FIN) is left, and closing does not hang."""
    taken = Taken()
    frozen = asyncio.Event()

    async def freeze(socket: ToySocket) -> None:
        if socket.number == 0:
            message = await socket.ws.receive()
            await socket.send(ack=json.loads(message.data)["subscribe"])
            request_transport = socket.ws._req.transport  # type: ignore[union-attr]
            request_transport.pause_reading()  # type: ignore[union-attr]
            frozen.set()
            await asyncio.sleep(3600)
        await socket.listen()

    async with serving() as server:
        server.script = freeze
        async with running(Feed(ToyExchange(), settings(server, "BTC-USDT", pong_seconds=0.2), taken.emit)):
            await until(lambda: len(taken.of(SUBSCRIBED)) == 2)

    assert frozen.is_set()
    assert taken.of(CLOSED)[0].data == b"a ping was not answered within 0.2 s"


async def test_close_by_the_exchange_is_recorded_with_its_words() -> None:
    """Code and words of the close are the data of CLOSED; the next epoch follows."""
    taken = Taken()

    async def leave(socket: ToySocket) -> None:
        if socket.number == 0:
            await socket.ws.close(code=1012, message=b"restarting")
        await socket.listen()

    async with serving() as server:
        server.script = leave
        feed = Feed(ToyExchange(), settings(server, "BTC-USDT"), taken.emit)
        async with running(feed):
            await until(lambda: taken.of(SUBSCRIBED))
            ended = dict(feed.status()[0].ended)

    assert taken.of(CLOSED)[0].data == b"closed by the exchange (code 1012, 'restarting')"
    assert [f.epoch for f in taken.of(OPENED)] == [0, 1]
    assert ended == {"closed": 1}


async def test_drop_without_close_is_recorded() -> None:
    """A connection reset is a record too."""
    taken = Taken()

    async def drop(socket: ToySocket) -> None:
        if socket.number == 0:
            socket.ws._req.transport.abort()  # type: ignore[union-attr]
        await socket.listen()

    async with serving() as server:
        server.script = drop
        async with running(Feed(ToyExchange(), settings(server, "BTC-USDT"), taken.emit)):
            await until(lambda: taken.of(SUBSCRIBED))

    assert b"dropped the connection" in taken.of(CLOSED)[0].data or b"broke" in taken.of(CLOSED)[0].data


async def test_retry_after_is_respected() -> None:
    """After HTTP 429 nobody connects before the time asked for."""
    taken = Taken()
    asked_at: list[float] = []

    def answer(number: int) -> web.Response | None:
        asked_at.append(asyncio.get_running_loop().time())
        return web.Response(status=429, headers={"Retry-After": "1"}) if number == 0 else None

    async with serving() as server:
        server.answer = answer
        feed = Feed(ToyExchange(), settings(server, "BTC-USDT"), taken.emit)
        async with running(feed):
            await until(lambda: taken.of(SUBSCRIBED))
            ended, error = dict(feed.status()[0].ended), feed.status()[0].last_error

    assert asked_at[1] - asked_at[0] >= 1.0
    assert ended == {"throttled": 1}
    assert "HTTP 429" in error


async def test_rotation_overlaps_and_misses_nothing() -> None:
    """Numbers are published all the time, connections are replaced at their age; each number arrives at least once."""
    taken = Taken()
    limits = dataclasses.replace(LIMITS, connection_seconds=0.4)
    async with serving() as server:
        async with running(Feed(ToyExchange(limits=limits), settings(server, "BTC-USDT"), taken.emit)):
            await until(lambda: taken.of(SUBSCRIBED))
            while len(taken.of(CLOSED)) < 4:
                await server.publish()
                await asyncio.sleep(0.001)
            last = await server.publish()
            await until(lambda: last in taken.numbers())

    assert taken.numbers() == set(range(1, last + 1))
    assert {f.data for f in taken.of(CLOSED)[:4]} == {
        b"replaced by a newer connection before the exchange cuts this one"
    }
    for old in range(4):
        subscribed = next(i for i, f in enumerate(taken.frames) if f.kind == SUBSCRIBED and f.epoch == old + 1)
        closed = next(i for i, f in enumerate(taken.frames) if f.kind == CLOSED and f.epoch == old)
        assert subscribed < closed


async def test_old_connection_goes_on_when_no_new_one_can_be_had() -> None:
    """A rotation that the exchange refuses leaves the old connection in place; it is tried again until it works."""
    taken = Taken()
    limits = dataclasses.replace(LIMITS, connection_seconds=0.2)
    async with serving() as server:
        server.answer = lambda number: web.Response(status=503) if 1 <= number <= 3 else None
        async with running(Feed(ToyExchange(limits=limits), settings(server, "BTC-USDT"), taken.emit)):
            await until(lambda: server.asked == 3)
            number = await server.publish()
            await until(lambda: number in taken.numbers())
            carried = next(f.epoch for f in taken.of(FRAME) if b'"n"' in f.data)
            await until(lambda: taken.of(CLOSED))

    assert carried == 0
    assert taken.of(CLOSED)[0].data.startswith(b"replaced")


async def test_exchange_asks_to_reconnect() -> None:
    """The wish of the exchange is followed by an overlapping replacement."""
    taken = Taken()
    async with serving() as server:
        async with running(Feed(ToyExchange(), settings(server, "BTC-USDT"), taken.emit)):
            await until(lambda: taken.of(SUBSCRIBED))
            await server.sockets[0].send(reconnect=1)
            await until(lambda: taken.of(CLOSED))
            kinds = [(f.kind, f.epoch) for f in taken.frames if f.kind != FRAME]

    assert kinds == [(OPENED, 0), (SUBSCRIBED, 0), (OPENED, 1), (SUBSCRIBED, 1), (CLOSED, 0)]


async def test_thousand_symbols_are_spread_over_connections() -> None:
    """1,000 symbols at 200 a connection are five connections, all acknowledged, each symbol once."""
    taken = Taken()
    symbols = tuple(f"A{i}-USDT" for i in range(1_000))
    async with serving() as server:
        feed = Feed(ToyExchange(), settings(server, *symbols), taken.emit)
        async with running(feed):
            await until(lambda: len(taken.of(SUBSCRIBED)) == 5)
            status = feed.status()

    assert sorted(s for socket in server.sockets for s in socket.subscribed) == sorted(symbols)
    assert [(s.name, s.symbols, s.acknowledged) for s in status] == [(str(i), 200, 200) for i in range(5)]


def test_shards_are_even_and_in_order() -> None:
    """No connection has more than allowed, sizes differ by one at most, order is kept."""
    parts = shard([str(i) for i in range(10)], 4)

    assert [len(part) for part in parts] == [3, 3, 4]
    assert [s for part in parts for s in part] == [str(i) for i in range(10)]


def test_plans_follow_the_settings() -> None:
    """Spellings become canonical, repeats vanish, the smaller limit holds, the address may be replaced."""
    own = ExchangeSettings(symbols=("btc/usdt", "BTC-USDT", "ETH-USDT"), url="ws://x", symbols_per_connection=1)
    made = plans(ToyExchange("wss://toy"), Settings(exchanges={"toy": own}))

    assert [(p.name, p.symbols, p.base_url) for p in made] == [
        ("0", ("BTC-USDT",), "ws://x"),
        ("1", ("ETH-USDT",), "ws://x"),
    ]


def test_unknown_symbol_is_refused_at_the_start() -> None:
    """A symbol nobody can understand stops the start with a clear error."""
    own = ExchangeSettings(symbols=("nonsense",))

    with pytest.raises(UnknownName, match="nonsense"):
        Feed(ToyExchange("wss://toy"), Settings(exchanges={"toy": own}), Taken().emit)


async def test_full_buffer_leaves_the_socket_unread() -> None:
    """While the sink is full nothing is read or judged; afterwards everything arrives, on the same socket."""
    taken = Taken()
    room = asyncio.Event()

    def emit(frame: Frame) -> Awaitable[None] | None:
        taken.emit(frame)
        return None if room.is_set() or b'"n"' not in frame.data else room.wait()

    async def flood(socket: ToySocket) -> None:
        await socket.ws.receive()
        await socket.send(ack=["BTC-USDT"])
        for number in range(200):
            await socket.send(n=number, filler="x" * 100_000)
        await socket.listen()

    limits = dataclasses.replace(LIMITS, silence_seconds=1.5)
    async with serving() as server:
        server.compress = False
        server.script = flood
        async with running(Feed(ToyExchange(limits=limits), settings(server, "BTC-USDT", pong_seconds=1.5), emit)):
            await until(lambda: len(taken.numbers()) == 1)
            blocked_at = asyncio.get_running_loop().time()
            await until(lambda: asyncio.get_running_loop().time() - blocked_at > 2.0)
            while_full = len(taken.numbers())
            room.set()
            await until(lambda: len(taken.numbers()) == 200)

    assert while_full == 1
    assert {f.epoch for f in taken.of(FRAME) if b'"n"' in f.data} == {0}


async def test_stop_takes_what_was_on_its_way() -> None:
    """Frames sent before the exchange saw our close are records before CLOSED."""
    taken = Taken()

    async def last_words(socket: ToySocket) -> None:
        socket.ws._autoclose = False
        await socket.ws.receive()
        await socket.send(ack=["BTC-USDT"])
        while (await socket.ws.receive()).type is not WSMsgType.CLOSE:
            pass
        await socket.send(n=1)
        await socket.ws.close()

    async with serving() as server:
        server.script = last_words
        async with running(Feed(ToyExchange(), settings(server, "BTC-USDT"), taken.emit)):
            await until(lambda: taken.of(SUBSCRIBED))

    assert [f.kind for f in taken.frames[-2:]] == [FRAME, CLOSED]
    assert taken.numbers() == {1}


async def test_probe_tells_refused(unused_tcp_port: int) -> None:
    """Nobody listens: the message says so and which setting to look at."""
    own = ExchangeSettings(url=f"ws://127.0.0.1:{unused_tcp_port}/ws")

    with pytest.raises(FeedDown, match=r"toy: cannot connect to ws://127.*refused.*exchanges\.toy\.url"):
        await probe(ToyExchange(), Settings(exchanges={"toy": own}), 5.0)


async def test_probe_tells_unknown_host() -> None:
    """A name that does not exist is told as DNS."""
    own = ExchangeSettings(url="wss://no-such-host.invalid/ws")

    with pytest.raises(FeedDown, match="DNS"):
        await probe(ToyExchange(), Settings(exchanges={"toy": own}), 20.0)


async def test_probe_tells_time_limit() -> None:
    """A peer that accepts and says nothing is told as no answer."""
    with sockets.create_server(("127.0.0.1", 0)) as mute:
        own = ExchangeSettings(url=f"ws://127.0.0.1:{mute.getsockname()[1]}/ws")

        with pytest.raises(FeedDown, match=r"no answer within 0\.2 s"):
            await probe(ToyExchange(), Settings(exchanges={"toy": own}), 0.2)


async def test_probe_tells_status_and_address() -> None:
    """HTTP without a WebSocket, a ban, and an address that is none each have their words."""
    async with serving() as server:
        server.answer = lambda number: web.Response(status=(418, 451, 404)[number], headers={"Retry-After": "120"})
        for words in ("HTTP 418: too many.*wait 120 s", "HTTP 451: this address or country", "HTTP 404: no WebSocket"):
            with pytest.raises(FeedDown, match=words):
                await probe(ToyExchange(server.url), Settings(), 5.0)
    with pytest.raises(FeedDown, match="no WebSocket address"):
        await probe(ToyExchange("nonsense"), Settings(), 5.0)


async def test_tls_is_verified(tmp_path: Path) -> None:
    """A certificate nobody vouches for is refused; with its authority trusted the same server is reached."""
    certificate, key = self_signed(tmp_path)
    serve = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serve.load_cert_chain(certificate, key)
    trusting = ssl.create_default_context(cafile=str(certificate))
    async with serving(ssl_context=serve) as server:
        with pytest.raises(FeedDown, match="TLS: the certificate is not trusted"):
            await probe(ToyExchange(server.url), Settings(), 5.0)
        await probe(ToyExchange(server.url), Settings(), 5.0, tls=trusting)


async def test_probe_succeeds_quietly() -> None:
    """A reachable exchange raises nothing and is left again."""
    async with serving() as server:
        await probe(ToyExchange(server.url), Settings(), 5.0)
        await until(lambda: server.sockets[0].ws.closed)


def test_gate_spaces_connections_and_closes() -> None:
    """Turns come at the exchange's pace; after Retry-After none comes before its end."""
    now = [100.0]
    gate = Gate(60.0, lambda: now[0])
    first = [gate.reserve() for _ in range(3)]
    now[0] = 110.0
    gate.close_for(30.0)

    assert first == [0.0, 1.0, 2.0]
    assert gate.reserve() == 30.0


def test_backoff_doubles_to_its_ceiling_with_full_jitter() -> None:
    """Each wait is drawn from zero to the doubled span; a reset begins anew; it never ends."""
    spans: list[tuple[float, float]] = []
    backoff = Backoff(0.5, 30.0, lambda low, high: spans.append((low, high)) or high)
    waits = [backoff.next() for _ in range(2_000)]
    backoff.reset()

    assert waits[:8] == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    assert waits[-1] == 30.0
    assert backoff.next() == 0.5
    assert {low for low, _ in spans} == {0.0}


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        *(("7", 7.0), ("", 0.0), ("soon", 0.0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0), ("99999999", 3 * 86_400.0)),
        *(("9" * 5_000, 3 * 86_400.0), ("Mon, 01 Jan 99999999999999999999 00:00:00 GMT", 0.0)),
        *(("Mon, 01 Jan 2020 00:00:00 +9999999999999", 0.0), ("Fri, 31 Dec 9999 23:59:59 -2359", 3 * 86_400.0)),
    ],
)
def test_retry_after_is_read(header: str, seconds: float) -> None:
    """A number, nothing, nonsense, a date gone by, more than Binance's longest ban, and dates there cannot be."""
    assert retry_after_seconds(header) == seconds
