"""The ClickHouse HTTP protocol on loopback, for the other processes of this machine.

Only one process can hold a chDB folder. The owner serves it here to every other one, which use
an ordinary ClickHouse HTTP client, and adds routes of its own (`HotServer.route`). Who may read
`<data>/run/hot.json` has the token in it, and with that all rights.
"""

from __future__ import annotations

import base64
import hmac
import http.client
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BufferedIOBase
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import chdb

import k2.errors
from k2 import meters
from k2.errors import K2Error, StoreDown, TimedOut
from k2.hot.ddl import DATABASE
from k2.hot.engine import INTERRUPTED, EmbeddedEngine, quoted

MAX_CONNECTIONS = 32  # each has a thread; further ones are refused
MAX_BODY_BYTES = 1 << 30
MAX_HEAD_BYTES = 1 << 20  # of the statement before the rows of an insert
MAX_REQUEST_SECONDS = 600.0  # of one query
IDLE_SECONDS = 900.0  # a connection that asks nothing is closed
STRANGER_SECONDS = 5.0  # until the first request with a valid token is there, whole up to its head
COPY_BYTES = 1 << 20
ALIVE_SECONDS, ANSWER_SECONDS = 2.0, 30.0  # an owner that gives no answer by then
WAKE_SECONDS = 1.0  # of the connection that wakes the accepting thread at a stop

Handler = Callable[[dict[str, str], bytes], bytes]

# Query string fields that are not ClickHouse settings.
NOT_SETTINGS = frozenset(
    {
        *("query", "database", "default_format", "query_id", "session_id", "session_timeout", "session_check"),
        *("compress", "decompress", "wait_end_of_query", "client_protocol_version", "role", "user", "password"),
        *("buffer_size", "quota_key", "send_progress_in_http_headers", "http_headers_progress_interval_ms"),
        "enable_http_compression",
    }
)
_LENGTH = re.compile(r"[0-9]{1,15}")
_CHUNK_SIZE = re.compile(rb"[0-9A-Fa-f]{1,16}")
_SETTING = re.compile(r"[A-Za-z_]\w*")
_INSERT = re.compile(r"\s*(INSERT\s+INTO\s+.+?)\s+FORMAT\s+(\w+)\s*$", re.IGNORECASE | re.DOTALL)
_FORMAT = re.compile(r"\bFORMAT\s+(\w+)\s*;?\s*$", re.IGNORECASE)
# What surely changes nothing, behind a comment such as `Engine` puts in front; anything else may.
_READ = re.compile(r"\s*(/\*[^*]*\*/\s*)?(SELECT|EXPLAIN|SHOW|DESCRIBE|KILL)\b", re.IGNORECASE)
_ERROR_CODE = re.compile(r"Code: (\d+)")
_COMPRESSIONS = {"gzip": "gzip", "zstd": "zstd", "lz4": "lz4", "deflate": "deflate", "br": "br"}

# ClickHouse's own numbers for what this server refuses by itself.
AUTHENTICATION_FAILED = 516
BAD_REQUEST_PARAMETER = 36
TOO_LARGE = 307


@dataclass(frozen=True)
class Endpoint:
    """Where the owner of a hot folder listens; kept in `<data>/run/hot.json`, readable by its user only."""

    host: str
    port: int
    token: str
    pid: int

    @staticmethod
    def file(data: Path) -> Path:
        """Return the file an endpoint is kept in."""
        return data / "run" / "hot.json"

    @classmethod
    def load(cls, data: Path) -> Endpoint | None:
        """Return the endpoint that was written last, of a living owner or a dead one; None if there is none."""
        try:
            return cls(**json.loads(cls.file(data).read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def save(self, data: Path) -> None:
        """Write the endpoint in one step, so that a reader sees the old one or this one."""
        file = self.file(data)
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_name(f"{file.name}.{os.getpid()}")
        draft.unlink(missing_ok=True)
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
            json.dump(asdict(self), stream)
        draft.replace(file)

    def remove(self, data: Path) -> None:
        """Remove the file if it is still this endpoint's."""
        if Endpoint.load(data) == self:
            self.file(data).unlink(missing_ok=True)

    def alive(self, timeout_seconds: float = ALIVE_SECONDS) -> bool:
        """Whether an owner that knows the token answers there."""
        try:
            return self.request("/k2/alive", timeout_seconds=timeout_seconds) == b"alive"
        except TimedOut:
            meters.acted("hot.alive")
            return False
        except K2Error:
            return False

    def request(
        self,
        path: str,
        query: dict[str, str] | None = None,
        body: bytes = b"",
        *,
        timeout_seconds: float = ANSWER_SECONDS,
    ) -> bytes:
        """Call a route of the owner (`HotServer.route`) and return what its handler returned.

        Raises:
            StoreDown: nobody answers.
            TimedOut: no answer in time.
            K2Error: whichever the handler raised.
        """
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout_seconds)
        target = f"{path}?{urlencode(query)}" if query else path
        try:
            connection.request("POST", target, body, {"Authorization": f"Bearer {self.token}"})
            answer = connection.getresponse()
            data = answer.read()
        except TimeoutError:
            meters.acted("hot.answer")
            raise TimedOut(f"hot: {path} of process {self.pid} gave no answer within {timeout_seconds:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise StoreDown(f"hot: {path} of process {self.pid} cannot be reached: {error}; is it running?") from None
        finally:
            connection.close()
        if answer.status != http.client.OK:
            raise _raised_there(answer.headers.get("X-K2-Error", ""), data.decode("utf-8", "replace"))
        return data


def _raised_there(name: str, message: str) -> K2Error:
    """Return the error a handler raised in the owner, by its name."""
    kind = getattr(k2.errors, name, StoreDown)
    if not (isinstance(kind, type) and issubclass(kind, K2Error)):
        kind = StoreDown
    return kind(message)


class HotServer:
    """Serves one embedded engine, and routes of the owner, to holders of a token."""

    def __init__(self, engine: EmbeddedEngine, data: Path, *, stranger_seconds: float = STRANGER_SECONDS) -> None:
        self.engine = engine
        self.stranger_seconds = stranger_seconds
        self._data = data
        self._token = secrets.token_urlsafe(32)
        self._routes: dict[str, Handler] = {}
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None
        self.endpoint: Endpoint | None = None
        self.changed: Callable[[], None] = lambda: None
        """Called when another process may have changed what the engine holds."""
        self.route("/k2/alive", lambda _query, _body: b"alive")

    def route(self, path: str, handler: Handler) -> None:
        """Let `handler(query, body)` answer requests for `path`; called from many threads at once.

        A K2Error it raises is raised again by `Endpoint.request` in the asking process.
        """
        self._routes[path] = handler

    def start(self) -> Endpoint:
        """Listen on a free port of 127.0.0.1 and publish it."""
        self._server = _Server(self)
        host, port = "127.0.0.1", int(self._server.server_address[1])
        self.endpoint = Endpoint(host, port, self._token, os.getpid())
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="hot-server", daemon=True)
        self._thread.start()
        self.endpoint.save(self._data)
        return self.endpoint

    def stop(self) -> None:
        """Withdraw the endpoint, end every connection and wait for their threads."""
        if self._server is None or self.endpoint is None or self._thread is None:
            return
        self.endpoint.remove(self._data)
        self._server.stop_accepting()
        self._server.end_connections()
        self._server.server_close()
        self._thread.join()
        self._server = None

    def find(self, path: str) -> Handler | None:
        """Return the handler of a route."""
        return self._routes.get(path)

    def accepts(self, authorization: str, key: str) -> bool:
        """Whether the request carries the token: as bearer, as password of any user, or as X-ClickHouse-Key."""
        kind, _, value = authorization.partition(" ")
        if kind == "Basic":
            with suppress(ValueError):
                value = base64.b64decode(value).decode("utf-8", "replace").partition(":")[2]
        given = value or key
        return hmac.compare_digest(given.encode(), self._token.encode())

    @contextmanager
    def connection(self, settings: dict[str, str]) -> Iterator[Any]:
        """Lend a chDB connection made for one request.

        Opening one takes a quarter of a millisecond; keeping one would mean to undo settings, and
        to meet the leftover answer of a failed query.
        """
        connection = chdb.connect(self.engine.connection_string)
        try:
            connection.query(f"USE {DATABASE}")
            for name, value in sorted(settings.items(), key=lambda item: item[0] == "readonly"):
                connection.query(f"SET {name} = {quoted(value)}")
            yield connection
        finally:
            connection.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    allow_reuse_address = True

    def __init__(self, hot: HotServer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hot = hot
        self._permits = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._open: set[socket.socket] = set()
        self._strangers: dict[socket.socket, float] = {}  # until when they may stay so
        self._changed = threading.Condition()
        meters.watch("hot.server_connections", self, lambda server: len(server._open))

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._permits.acquire(blocking=False):
            meters.acted("hot.server_connections")
            with suppress(OSError):
                request.sendall(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            self.shutdown_request(request)
            return
        with self._changed:
            self._open.add(request)
            self._strangers[request] = time.monotonic() + self.hot.stranger_seconds
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._changed:
                self._open.discard(request)
                self._strangers.pop(request, None)
                self._changed.notify_all()
            self._permits.release()

    def know(self, connection: socket.socket) -> None:
        """Let a connection stay: it has shown the token."""
        with self._changed:
            self._strangers.pop(connection, None)

    def service_actions(self) -> None:
        """End strangers whose time is up, called with each look for new connections.

        Places are few. By the clock, not by silence: a stranger might send its head letter by letter.
        """
        now = time.monotonic()
        with self._changed:
            for connection in [known for known, until in self._strangers.items() if until <= now]:
                meters.acted("hot.server_stranger")
                del self._strangers[connection]
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def stop_accepting(self) -> None:
        """End `serve_forever` without waiting for its next look at the flag."""
        ending = threading.Thread(target=self.shutdown)
        ending.start()
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", self.server_port), timeout=WAKE_SECONDS).close()
        ending.join()

    def end_connections(self) -> None:
        """Shut every socket down, which ends idle threads at once and busy ones after their query."""
        with self._changed:
            for connection in self._open:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            self._changed.wait_for(lambda: not self._open, timeout=MAX_REQUEST_SECONDS)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a client that goes away in the middle of an answer is no news."""


class _Refused(Exception):
    """Raised when a request is answered with an error of this server."""

    def __init__(self, status: int, code: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = IDLE_SECONDS
    # Without these two an answer takes 44 ms instead of 1: head and body go out separately,
    # and the second waits for an acknowledgement.
    disable_nagle_algorithm = True
    wbufsize = 1 << 16

    server: _Server

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, format: str, *arguments: Any) -> None:
        """Keep no access log."""

    def _answer(self) -> None:
        """Choose what answers the request, and turn its errors into answers."""
        hot = self.server.hot
        url = urlsplit(self.path)
        query = dict(parse_qsl(url.query, keep_blank_values=True))
        body = _Body(hot.engine.new_inbox_file(".body"))
        try:
            if not hot.accepts(self.headers.get("Authorization", ""), self.headers.get("X-ClickHouse-Key", "")):
                raise _Refused(403, AUTHENTICATION_FAILED, "the token is wrong; read it from run/hot.json")
            self.server.know(self.connection)
            self._receive(body)
            if url.path == "/ping":
                self._send(200, b"Ok.\n", {})
            elif (route := hot.find(url.path)) is not None:
                self._send(200, route(query, body.read()), {"Content-Type": "application/octet-stream"})
            elif url.path == "/":
                self._send(200, *self._run(query, body))
            else:
                raise _Refused(404, BAD_REQUEST_PARAMETER, f"there is no {url.path} here")
        except _Refused as error:
            self.close_connection = True
            self._fail(error.status, error.code, f"Code: {error.code}. DB::Exception: {error}")
        except K2Error as error:
            self._send(500, str(error).encode(), {"X-K2-Error": type(error).__name__})
        except OSError:
            self.close_connection = True  # the client went away
        except Exception as error:  # noqa: BLE001 - chdb raises plain ones; every failure must reach the client
            message = str(error)
            found = _ERROR_CODE.search(message)
            code = int(found[1]) if found else 0
            if code in INTERRUPTED:
                meters.acted("hot.server_request")
            self._fail(500, code, message[found.start() :] if found else message)
        finally:
            body.remove()

    def _receive(self, body: _Body) -> None:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body.fill(_chunks(self.rfile))
        else:
            length = self.headers.get("Content-Length") or "0"
            if not _LENGTH.fullmatch(length):  # where the next request begins is not known
                raise _Refused(400, BAD_REQUEST_PARAMETER, f"Content-Length {length[:40]!r} is no number")
            body.fill(_exactly(self.rfile, int(length)))

    def _run(self, query: dict[str, str], body: _Body) -> tuple[bytes, dict[str, str]]:
        """Run one statement; the rows of an insert may follow it in the body."""
        settings = {
            name: value for name, value in query.items() if name not in NOT_SETTINGS and not name.startswith("param_")
        }
        unsafe = [name for name in settings if not _SETTING.fullmatch(name)]
        if unsafe:
            raise _Refused(400, BAD_REQUEST_PARAMETER, f"{unsafe[0]!r} is no setting")
        settings.setdefault("max_execution_time", str(MAX_REQUEST_SECONDS))
        parameters = {name.removeprefix("param_"): value for name, value in query.items() if name.startswith("param_")}
        statement = query.get("query", "")
        insert = _INSERT.match(statement) or (None if statement else _INSERT.match(body.head()))
        with self.server.hot.connection(settings) as connection:
            if insert is not None:
                try:
                    self._insert(connection, insert, body, in_body=not statement)
                finally:
                    self.server.hot.changed()
                return b"", {}
            text = f"{statement}\n{body.read().decode()}" if statement else body.read().decode()
            named = _FORMAT.search(text)
            used = named[1] if named else query.get("default_format") or "TabSeparated"
            try:
                answer = connection.query(text, used, params=parameters)
            finally:
                if not _READ.match(text):
                    self.server.hot.changed()
            data = bytes(answer.bytes() or b"")
            return data, {"X-ClickHouse-Format": used} if data else {}

    def _insert(self, connection: Any, insert: re.Match[str], body: _Body, *, in_body: bool) -> None:
        """Let the engine read the rows from the file the body went into."""
        encoding = self.headers.get("Content-Encoding", "")
        if encoding and encoding not in _COMPRESSIONS:
            raise _Refused(400, BAD_REQUEST_PARAMETER, f"compression {encoding!r} is not understood")
        if in_body:
            body.drop_head()
        compression = f" COMPRESSION '{_COMPRESSIONS[encoding]}'" if encoding else ""
        connection.query(f"{insert[1]} FROM INFILE {quoted(str(body.file))}{compression} FORMAT {insert[2]}")

    def _fail(self, status: int, code: int, message: str) -> None:
        self._send(status, message.encode(), {"X-ClickHouse-Exception-Code": str(code)})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()


class _Body:
    """A request's body: small ones in memory, others in a file, so that an insert costs no memory twice."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._size = 0

    def fill(self, parts: Iterator[bytes]) -> None:
        with self.file.open("wb") as stream:
            for part in parts:
                self._size += len(part)
                if self._size > MAX_BODY_BYTES:
                    meters.acted("hot.server_body")
                    raise _Refused(413, TOO_LARGE, f"the body is larger than {MAX_BODY_BYTES} bytes; send it in parts")
                stream.write(part)

    def read(self) -> bytes:
        return self.file.read_bytes() if self._size else b""

    def head(self) -> str:
        """Return the first line."""
        with self.file.open("rb") as stream:
            line = stream.readline(MAX_HEAD_BYTES)
        if len(line) == MAX_HEAD_BYTES:
            meters.acted("hot.server_head")
        return line.decode("utf-8", "replace")

    def drop_head(self) -> None:
        """Remove the first line."""
        rest = self.file.with_suffix(".rows")
        with self.file.open("rb") as source, rest.open("wb") as target:
            source.readline(MAX_HEAD_BYTES)
            while part := source.read(COPY_BYTES):
                target.write(part)
        rest.replace(self.file)

    def remove(self) -> None:
        self.file.unlink(missing_ok=True)


def _exactly(stream: BufferedIOBase, size: int) -> Iterator[bytes]:
    while size > 0:
        part = stream.read(min(size, COPY_BYTES))
        if not part:
            raise ConnectionError("the request ended early")
        size -= len(part)
        yield part


def _chunks(stream: BufferedIOBase) -> Iterator[bytes]:
    """Decode a chunked body."""
    while True:
        digits = stream.readline(1024).split(b";", 1)[0].strip()
        if not _CHUNK_SIZE.fullmatch(digits):  # int() would take a sign, blanks and _ too
            raise ConnectionError("the request is not well-formed")
        size = int(digits, 16)
        if size == 0:
            break
        yield from _exactly(stream, size)
        stream.readline(8)
    while stream.readline(8192).strip():  # trailers
        pass
