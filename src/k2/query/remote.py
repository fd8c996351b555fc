"""Asks a node over its REST interface; rows come as Arrow streams."""

from __future__ import annotations

import http.client
import ipaddress
import json
import os
import threading
import weakref
from dataclasses import replace
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import pyarrow as pa

from k2.errors import K2Error, Misconfigured, Rejected, StoreDown, TimedOut, Unavailable, UnknownName
from k2.query.plan import Question
from k2.query.result import Result
from k2.query.times import format_ns
from k2.schema import CANDLES
from k2.settings import Settings

NODE_FILE = Path("run") / "node.json"
"""Where a node says how to reach it, below the data folder: `{"url": "http://127.0.0.1:8642", "pid": 4711}`."""

MAX_IDLE_CONNECTIONS = 4  # kept of one client; more are closed after their answer
_PROBE_SECONDS = 2.0
_ARROW = "application/vnd.apache.arrow.stream"
# `type` of a problem answer -> the error it was.
_PROBLEMS: dict[str, type[K2Error]] = {
    "unknown-name": UnknownName,
    "rejected": Rejected,
    "timed-out": TimedOut,
    "unavailable": Unavailable,
    "misconfigured": Misconfigured,
}


def find_node(folder: Path) -> str | None:
    """Return the URL of the node that runs on a data folder, or None when none answers."""
    try:
        said = json.loads((folder / NODE_FILE).read_text())
        url, pid = str(said["url"]), int(said["pid"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return url if _is_alive(pid) and Node(url, Settings()).answers() else None


class Node:
    """Answers from a node, over its REST interface, rows as Arrow streams."""

    def __init__(self, url: str, settings: Settings) -> None:
        parts = urlsplit(url.rstrip("/"))
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise Rejected(f"url {url!r} is not the address of a node (http://HOST:PORT)")
        self.where = url.rstrip("/")
        self._parts = parts
        self._query = settings.query
        self._connections = _Connections(parts.scheme == "https", parts.hostname, parts.port)

    def default_limit(self) -> int:
        """Return how many rows are given when no limit is."""
        return self._query.limit

    def answers(self) -> bool:
        """Whether a K2 node is there."""
        try:
            _, body = self._request("GET", "/health/live", seconds=_PROBE_SECONDS)
            return bool(json.loads(body).get("name") == "k2")
        except (K2Error, ValueError, AttributeError):
            return False

    def answer(self, question: Question) -> Result:
        """Answer a question."""
        if question.limit == 0 and not self._is_local():
            return self._all_pages(question)
        return self._page(question)[0]

    def sql(self, query: str, tier: str, limit: int | None) -> Result:
        """Run one read-only statement."""
        body = json.dumps({"query": query, "tier": tier, "limit": limit}).encode()
        _, data = self._request("POST", "/v1/sql", body=body, accept=_ARROW)
        return Result(_read_arrow(data), None)

    def symbols(self) -> list[tuple[str, str]]:
        """Return the (exchange, symbol) pairs there is data of."""
        return [(row["exchange"], row["symbol"]) for row in self._json("/v1/symbols")["data"]]

    def snapshots(self, table: str | None) -> list[dict[str, Any]]:
        """Return the retained commits."""
        found: list[dict[str, Any]] = self._json(
            "/v1/snapshots" + (f"?{urlencode({'table': table})}" if table else "")
        )["data"]
        return found

    def status(self) -> dict[str, Any]:
        """Return what the node is doing."""
        return {"node": self.where, **self._json("/v1/status")}

    def close(self) -> None:
        """Close the connections kept for further requests."""
        self._connections.close()

    def _all_pages(self, question: Question) -> Result:
        """A node gives callers of other machines no more than its `query.max_limit` rows at a time."""
        start_ns = question.start_ns or 0
        page = replace(question, start_ns=start_ns, limit=self._query.max_limit, newest=False)
        result, cursor = self._page(page)
        parts = [result._rows]
        while cursor:
            following, cursor = self._page(page, cursor)
            parts.append(following._rows)
        result._rows = pa.concat_tables(parts)
        return result

    def _page(self, question: Question, cursor: str | None = None) -> tuple[Result, str | None]:
        path = "/v1/" + question.table.name.replace("_", "-")
        if question.table is CANDLES:
            path += "/" + question.timeframe
        headers, data = self._request("GET", f"{path}?{urlencode(_parameters(question, cursor))}", accept=_ARROW)
        snapshot = headers.get("K2-Snapshot")
        result = Result(
            _read_arrow(data),
            question.table,
            tiers=tuple(filter(None, headers.get("K2-Tiers", "").split(","))),
            watermark=json.loads(headers.get("K2-Watermark", "{}")),
            snapshot_id=int(snapshot) if snapshot else None,
            note=headers.get("K2-Note", ""),
        )
        return result, headers.get("K2-Cursor")

    def _json(self, path: str) -> dict[str, Any]:
        decoded: dict[str, Any] = json.loads(self._request("GET", path)[1])
        return decoded

    def _is_local(self) -> bool:
        host = self._parts.hostname or ""
        try:
            return host == "localhost" or ipaddress.ip_address(host).is_loopback
        except ValueError:
            return False

    def _request(
        self,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        accept: str = "application/json",
        seconds: float | None = None,
    ) -> tuple[Message, bytes]:
        """Send one request; a problem answer is raised as the error it was on the node."""
        # The node ends a query at its own limit; this one is for a node that has gone silent.
        limit = seconds if seconds is not None else self._query.timeout_seconds + 10
        headers = {"Accept": accept} | ({"Content-Type": "application/json"} if body is not None else {})
        try:
            response, data = self._connections.exchange(method, self._parts.path + path, body, headers, limit)
        except TimeoutError:
            raise TimedOut(f"{method} {self.where}{path}: no answer within {limit:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise StoreDown(
                f"{method} {self.where}{path}: the node does not answer ({error}); is it still running?"
            ) from None
        if response.status >= 400:
            raise _problem(response.status, data, f"{method} {self.where}{path}")
        return response.headers, data


class _Connections:
    """Connections to one node, kept open between requests; each is used by one thread at a time.

    Making one anew costs a small question as much as its answer.
    """

    def __init__(self, is_secure: bool, host: str, port: int | None) -> None:
        self._make = http.client.HTTPSConnection if is_secure else http.client.HTTPConnection
        self._host = host
        self._port = port
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._idle: list[http.client.HTTPConnection] = []
        weakref.finalize(self, _close_all, self._idle)

    def exchange(
        self, method: str, path: str, body: bytes | None, headers: dict[str, str], seconds: float
    ) -> tuple[http.client.HTTPResponse, bytes]:
        """Send a request and return its answer, read whole.

        The node closes what was idle for some seconds, which shows when it is used again: then the request, which
        changes nothing, is sent once more.
        """
        kept = self._kept()
        if kept is not None:
            try:
                return self._send(kept, method, path, body, headers, seconds)
            except TimeoutError:
                raise
            except (OSError, http.client.HTTPException):
                pass
        return self._send(self._make(self._host, self._port), method, path, body, headers, seconds)

    def close(self) -> None:
        """Close what is idle."""
        with self._lock:
            _close_all(self._idle)

    def _kept(self) -> http.client.HTTPConnection | None:
        with self._lock:
            if self._pid != os.getpid():  # a fork: these are the parent's
                self._pid = os.getpid()
                _close_all(self._idle)
            return self._idle.pop() if self._idle else None

    def _send(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        body: bytes | None,
        headers: dict[str, str],
        seconds: float,
    ) -> tuple[http.client.HTTPResponse, bytes]:
        connection.timeout = seconds
        if connection.sock is not None:
            connection.sock.settimeout(seconds)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            data = response.read()
        except BaseException:
            connection.close()
            raise
        with self._lock:
            if connection.sock is None or len(self._idle) >= MAX_IDLE_CONNECTIONS:
                connection.close()
            else:
                self._idle.append(connection)
        return response, data


def _close_all(connections: list[http.client.HTTPConnection]) -> None:
    while connections:
        connections.pop().close()


def _parameters(question: Question, cursor: str | None) -> dict[str, str]:
    as_of = None if question.logged_before_ns is None else format_ns(question.logged_before_ns)
    given = {
        "symbol": question.symbol,
        "exchange": question.exchange,
        "start": None if question.start_ns is None else format_ns(question.start_ns),
        "end": None if question.end_ns is None else format_ns(question.end_ns),
        "tier": question.tier,
        "as_of": as_of if question.snapshot_id is None else str(question.snapshot_id),
        "limit": str(question.limit),
        "kind": question.kind if question.table is CANDLES else None,
        "cursor": cursor,
    }
    return {name: value for name, value in given.items() if value is not None}


def _problem(status: int, body: bytes, attempt: str) -> K2Error:
    try:
        told = json.loads(body)
        return _PROBLEMS.get(told["type"], Unavailable)(str(told["detail"]))
    except (ValueError, KeyError, TypeError):
        return Unavailable(f"{attempt}: the node answered with status {status}")


def _read_arrow(data: bytes) -> pa.Table:
    return pa.ipc.open_stream(data).read_all()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True
