"""A WebSocket server that sends Binance trades made beforehand, as blocks of many frames, faster than anyone reads.

One connection at a time. Trades of LOAD have ids 1, 2, 3...; so have those of PROBE, which come in between, alone,
at the times they are told with.
"""

import base64
import hashlib
import json
import socket
import struct
import threading
import time

from serving import serve

GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
TICK_SECONDS = 0.001
BLOCK_FRAMES = 200
TEXT, CLOSE, PING, PONG = 0x81, 0x88, 0x89, 0x8A


class Blaster:
    """Listens, subscribes whoever comes to anything, and sends when told."""

    def __init__(self):
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._socket = None
        self._ready = threading.Event()
        self._sending = threading.Lock()
        self._ids = {"BTCUSDT": 0, "ETHUSDT": 0}
        self._blocks = []
        threading.Thread(target=self._accept, daemon=True).start()

    def port(self):
        """Return where it listens."""
        return self._listener.getsockname()[1]

    def wait(self, seconds):
        """Return whether somebody subscribed within this time."""
        return self._ready.wait(seconds)

    def prepare(self, frames):
        """Make this many trades of LOAD for `flood`; return their bytes."""
        self._blocks = [self._block("BTCUSDT", BLOCK_FRAMES) for _ in range(frames // BLOCK_FRAMES)]
        return sum(map(len, self._blocks))

    def flood(self):
        """Send what was prepared, as fast as it is taken; return when the first byte went (time_ns), and the frames."""
        began = time.time_ns()
        for block in self._blocks:
            self._send(block)
        frames = len(self._blocks) * BLOCK_FRAMES
        self._blocks = []
        return {"began_ns": began, "seconds": (time.time_ns() - began) / 1e9, "frames": frames}

    def pace(self, rate, seconds, probes):
        """Send `rate` trades of LOAD a second, `probes` of PROBE among them, by the clock, whoever is slow (open loop).

        Returns [id, time it was due (time_ns)] of each probe.
        """
        sent, due = [], 0
        began, began_ns = time.perf_counter(), time.time_ns()
        while (now := time.perf_counter() - began) < seconds:
            block = b""
            if int(now * rate) > due:
                block = self._block("BTCUSDT", int(now * rate) - due)
                due = int(now * rate)
            while len(sent) / probes <= now:
                block += self._block("ETHUSDT", 1)
                sent.append([self._ids["ETHUSDT"], began_ns + int(len(sent) / probes * 1e9)])
            if block:
                self._send(block)
            time.sleep(TICK_SECONDS)
        return {"probes": sent, "late_ms": (time.perf_counter() - began - seconds) * 1e3}

    def _block(self, symbol, count):
        now = time.time_ns() // 1_000_000
        first = self._ids[symbol] + 1
        self._ids[symbol] += count
        stream = symbol.lower()
        return b"".join(
            _frame(
                b'{"stream":"%s@trade","data":{"e":"trade","E":%d,"s":"%s","t":%d,"p":"%d.%02d000000","q":"0.%05d000",'
                b'"T":%d,"m":%s,"M":true}}'
                % (stream.encode(), now, symbol.encode(), n, 60_000 + n % 97, n % 100, 1 + n * 7_919 % 90_000, now,
                   b"true" if n % 3 else b"false")
            )
            for n in range(first, first + count)
        )  # fmt: skip

    def _send(self, data):
        with self._sending:
            self._socket.sendall(data)

    def _accept(self):
        while True:
            connection, _ = self._listener.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            reader = connection.makefile("rb")
            try:
                _shake_hands(connection, reader)
                self._socket = connection
                self._answer(reader)
            except (OSError, ValueError):
                continue  # it went away; the next one may come

    def _answer(self, reader):
        while True:
            kind, text = _read(reader)
            if kind == PING:
                self._send(bytes([PONG, len(text)]) + text)
            elif kind == TEXT:
                self._send(_frame(b'{"result":null,"id":%d}' % json.loads(text)["id"]))
                self._ready.set()
            elif kind == CLOSE:
                return


def _frame(text):
    if len(text) < 126:
        return bytes([TEXT, len(text)]) + text
    return struct.pack(">BBH", TEXT, 126, len(text)) + text


def _shake_hands(connection, reader):
    key = b""
    while (line := reader.readline()) not in (b"\r\n", b""):
        name, _, value = line.partition(b":")
        if name.lower() == b"sec-websocket-key":
            key = value.strip()
    accept = base64.b64encode(hashlib.sha1(key + GUID).digest())
    connection.sendall(
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n"
    )


def _read(reader):
    head = reader.read(2)
    if len(head) < 2:
        raise ValueError("closed")
    kind, length = head[0], head[1] & 0x7F
    if length == 126:
        (length,) = struct.unpack(">H", reader.read(2))
    mask = reader.read(4)
    return kind, bytes(b ^ mask[i % 4] for i, b in enumerate(reader.read(length)))


if __name__ == "__main__":
    blaster = Blaster()
    serve(port=blaster.port, wait=blaster.wait, prepare=blaster.prepare, flood=blaster.flood, pace=blaster.pace)
