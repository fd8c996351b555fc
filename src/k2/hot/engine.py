"""Connections to one ClickHouse engine: embedded (chDB) or the loopback server of the process that owns it.

What both give: Arrow in and out, values only as query parameters, errors by what the caller
should do, a bound on connections, and a time limit that holds even if the engine ignores it.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import clickhouse_connect
import pyarrow as pa
import urllib3
from clickhouse_connect.driver.exceptions import Error as DriverError

from k2 import crash, meters
from k2.errors import InUse, StoreDown, TimedOut
from k2.hot.ddl import DATABASE
from k2.hot.tokens import strike_lost

MAX_CONNECTIONS = 16
WAIT_SECONDS = 30.0  # for a free connection, and at close for running queries
GUARD_SECONDS = 2.0  # given to the engine to interrupt a query by itself, then to a KILL
WANTED_SECONDS = 2.0  # after this a sign that was not renewed means nothing
OPEN_SECONDS = 5.0  # a dying owner's lock is waited for this long

# The engine's own caches, bytes. Its defaults are a server's: 5 GiB for each of the first three.
MARK_CACHE_BYTES = 64 << 20
PRIMARY_INDEX_CACHE_BYTES = 64 << 20
INDEX_MARK_CACHE_BYTES = 16 << 20
CONDITION_CACHE_BYTES = 16 << 20
COMPILED_CACHE_BYTES = 16 << 20

# ClickHouse error codes that say "interrupted": TIMEOUT_EXCEEDED, TOO_SLOW, QUERY_WAS_CANCELLED.
INTERRUPTED = frozenset({159, 160, 394})
OUT_OF_MEMORY = 241  # MEMORY_LIMIT_EXCEEDED

Parameters = Mapping[str, Any]
Settings = Mapping[str, Any]

# Text as Arrow strings, not bytes or dictionaries: the types of `schema.arrow_schema`.
CLIENT_SETTINGS: Settings = {
    "output_format_arrow_string_as_string": 1,
    "output_format_arrow_low_cardinality_as_dictionary": 0,
    "output_format_arrow_compression_method": "none",  # it never leaves the machine: copying costs less
    "async_insert": 0,
    "mutations_sync": 2,
}

# One insert = one block = one part per table: with a token, a unit that is stored or not.
INSERT_SETTINGS: Settings = {
    "async_insert": 0,
    "insert_deduplicate": 1,
    "deduplicate_blocks_in_dependent_materialized_views": 1,
    "max_insert_threads": 1,
    "max_insert_block_size": 10_000_000,
    "min_insert_block_size_rows": 10_000_000,
    "min_insert_block_size_bytes": 0,
}


class EngineError(StoreDown):
    """Raised when the engine refuses or fails a statement; `code` is ClickHouse's number, 0 if it gave none."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Engine(ABC):
    """A bounded set of connections, each used by one caller at a time."""

    broken: tuple[type[Exception], ...] = ()  # errors beside the driver's that mean the connection broke

    def __init__(self) -> None:
        self._permits = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._lock = threading.Lock()
        self._idle: list[Any] = []
        self._lent = 0  # about, for the metric: counted without a lock
        self._closed = False
        meters.watch("hot.connections", self, lambda engine: engine._lent)

    @abstractmethod
    def connect(self, settings: Settings) -> Any:
        """Return a new clickhouse-connect client whose every query has these settings."""

    @abstractmethod
    def insert(self, table: str, rows: pa.Table, token: str) -> None:
        """Insert rows as one block under a deduplication token."""

    def query(
        self,
        sql: str,
        parameters: Parameters | None = None,
        *,
        timeout_seconds: float | None = None,
        settings: Settings | None = None,
    ) -> pa.Table:
        """Run a SELECT of ours with these settings and return its rows; values of others only in `parameters`.

        Raises:
            TimedOut: interrupted at `timeout_seconds`.
            EngineError: anything else.
        """
        chosen = dict(settings or {})
        if timeout_seconds is not None:
            chosen["max_execution_time"] = f"{max(timeout_seconds, 0.001):.3f}"
        if chosen:
            sql += "\nSETTINGS " + ", ".join(f"{name} = {value}" for name, value in chosen.items())
        if timeout_seconds is None:
            return self._with_client(sql, parameters)
        return self._guarded(lambda text: self._with_client(text, parameters), sql, timeout_seconds)

    def query_readonly(self, sql: str, settings: Settings, timeout_seconds: float) -> pa.Table:
        """Run a statement of someone else on a connection of its own that can only read.

        `readonly = 1` is set last and cannot be taken back: the engine then refuses writes,
        changed settings, and table functions that reach outside.
        """
        fixed = {**settings, "max_execution_time": max(timeout_seconds, 0.001), "readonly": 1}

        def run(text: str) -> pa.Table:
            with self._permit():
                client = self._connect_checked(fixed)
                try:
                    return self._fetch(client, text, None)
                finally:
                    client.close()

        return self._guarded(run, sql, timeout_seconds)

    def files(self, table: str) -> frozenset[str]:
        """Return the names in the folder of a table; none where the folder is another process's."""
        return frozenset()

    def command(self, sql: str, parameters: Parameters | None = None) -> None:
        """Run one statement that returns nothing."""
        with self._client() as client:
            client.command(sql, parameters=dict(parameters or {}))

    def lines(self, sql: str) -> list[str]:
        """Run a statement whose answer is lines of text, special characters escaped."""
        with self._client() as client:
            return str(client.raw_query(sql).decode("utf-8", "replace")).splitlines()

    def close(self) -> None:
        """Refuse new work, wait for running work, release every connection; may be called twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        deadline = time.monotonic() + WAIT_SECONDS
        for _ in range(MAX_CONNECTIONS):
            if not self._permits.acquire(timeout=max(0.0, deadline - time.monotonic())):
                break  # a query that ignored its KILL; its connection goes with the process
        for client in self._idle:
            client.close()
        self._idle.clear()

    def drop_idle(self) -> None:
        """Close the connections nobody uses at the moment."""
        with self._lock:
            idle, self._idle = self._idle, []
        for client in idle:
            client.close()

    def _with_client(self, sql: str, parameters: Parameters | None) -> pa.Table:
        with self._client() as client:
            return self._fetch(client, sql, parameters)

    @staticmethod
    def _fetch(client: Any, sql: str, parameters: Parameters | None) -> pa.Table:
        data = client.raw_query(sql, parameters=dict(parameters or {}), fmt="ArrowStream")
        return pa.ipc.open_stream(data).read_all()

    @contextmanager
    def _permit(self) -> Iterator[None]:
        if self._closed:
            raise StoreDown("hot: the store is closed; open it again")
        if not self._permits.acquire(blocking=False) and not self._wait_for_permit():
            meters.acted("hot.connection_wait")
            raise StoreDown(
                f"hot: all {MAX_CONNECTIONS} connections were busy for {WAIT_SECONDS:.0f} s;"
                " ask again, or for less at a time"
            )
        self._lent += 1
        try:
            yield
        finally:
            self._lent -= 1
            self._permits.release()

    def _wait_for_permit(self) -> bool:
        with meters.waiting("hot.connections"):
            return self._permits.acquire(timeout=WAIT_SECONDS)

    @contextmanager
    def _client(self) -> Iterator[Any]:
        """Lend a connection.

        After any error it is thrown away: on a chDB connection the next query's answer would
        start with what the failed one had already written (seen with chDB 26.9).
        """
        with self._permit():
            with self._lock:
                client = self._idle.pop() if self._idle else None
            if client is None:
                client = self._connect_checked(CLIENT_SETTINGS)
            try:
                yield client
            except BaseException as error:
                client.close()
                if isinstance(error, DriverError):
                    raise self.explained(error) from error
                if isinstance(error, self.broken):
                    raise EngineError(f"hot: the connection broke: {error}", 0) from error
                raise
            with self._lock:
                self._idle.append(client)

    def _connect_checked(self, settings: Settings) -> Any:
        try:
            return self.connect({**CLIENT_SETTINGS, **settings})
        except DriverError as error:
            raise self.explained(error) from error

    def explained(self, error: DriverError) -> EngineError | TimedOut:
        """Return the K2 error for a driver's error."""
        return translated(error)

    def _guarded(self, run: Callable[[str], pa.Table], sql: str, timeout_seconds: float) -> pa.Table:
        """Run in a thread of its own; past the limit KILL the query, and give up waiting if that fails too."""
        mark = f"k2:{uuid.uuid4().hex}"
        outcome: list[pa.Table | BaseException] = []

        def work() -> None:
            try:
                outcome.append(run(f"/* {mark} */ {sql}"))
            except DriverError as error:
                outcome.append(translated(error))
            except BaseException as error:  # noqa: BLE001 - handed to the caller, who raises it
                outcome.append(error)

        thread = threading.Thread(target=work, name=f"hot-{mark}", daemon=True)
        thread.start()
        thread.join(timeout_seconds + GUARD_SECONDS)
        if thread.is_alive():
            meters.acted("hot.guard")
            self._kill(mark)
            thread.join(GUARD_SECONDS)
        if not outcome:
            raise TimedOut(
                f"hot: query did not stop at its limit of {timeout_seconds:g} s and was left behind; ask for less"
            )
        if isinstance(outcome[0], TimedOut):
            raise TimedOut(
                f"hot: query interrupted at its limit of {timeout_seconds:g} s; ask for less, or raise the limit"
            )
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        return outcome[0]

    def _kill(self, mark: str) -> None:
        with suppress(StoreDown):
            # The mark is a comment at the head of the query; a KILL starts with KILL, so it never finds itself.
            self.command("KILL QUERY WHERE startsWith(query, {mark:String}) ASYNC", {"mark": f"/* {mark} */"})


_MESSAGE_CHARACTERS = 2_000


def translated(error: DriverError) -> EngineError | TimedOut:
    """Return the K2 error for a driver's error."""
    code = getattr(error, "code", None) or 0
    message = str(error).replace("DB::Exception: ", "")
    if len(message) > _MESSAGE_CHARACTERS:  # it may repeat the whole statement
        message = f"{message[:_MESSAGE_CHARACTERS]}..."
    if code == OUT_OF_MEMORY:
        meters.acted("hot.memory")
    if code in INTERRUPTED:
        return TimedOut(f"hot: query interrupted: {message}")
    return EngineError(f"hot: the engine answered: {message}", code)


class Wanted:
    """A sign that somebody waits for the hot folder, for those who hold it only because they may ask again soon."""

    def __init__(self, data: Path) -> None:
        self._file = data / "run" / "hot.wanted"
        self._said = False

    def say(self) -> None:
        """Put the sign up, or renew it; where it cannot be written one waits all the same."""
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.touch()
            self._said = True

    def withdraw(self) -> None:
        """Take it down; others who wait put it up again at once."""
        if self._said:
            self._said = False
            with suppress(OSError):
                self._file.unlink(missing_ok=True)

    def seen(self) -> bool:
        """Whether the sign is up, put there not long ago: whoever was killed waiting wants nothing any more."""
        try:
            return time.time() - self._file.stat().st_mtime < WANTED_SECONDS
        except OSError:
            return False


class EmbeddedEngine(Engine):
    """chDB in this process, the one owner of its folder.

    Never fork a process that holds one: the child's first query would hang (measured). Start
    other programs, as `subprocess` does.
    """

    def __init__(self, folder: Path, *, memory_bytes: int, open_seconds: float = OPEN_SECONDS) -> None:
        super().__init__()
        self.folder = folder
        self._memory_bytes = memory_bytes
        self._open_seconds = open_seconds
        self._inbox = folder.parent / "hot-inbox"
        self._wanted = Wanted(folder.parent)
        self._anchor: Any = None

    @property
    def connection_string(self) -> str:
        """How chDB is told folder and limits; every connection of a process must say the same."""
        return f"{self.folder}?" + "&".join(f"{name}={value}" for name, value in self._options.items())

    @property
    def _options(self) -> dict[str, int]:
        return {
            "max_server_memory_usage": self._memory_bytes,
            "mark_cache_size": MARK_CACHE_BYTES,
            "primary_index_cache_size": PRIMARY_INDEX_CACHE_BYTES,
            "index_mark_cache_size": INDEX_MARK_CACHE_BYTES,
            "query_condition_cache_size": CONDITION_CACHE_BYTES,
            "compiled_expression_cache_size": COMPILED_CACHE_BYTES,
        }

    def open(self) -> None:
        """Take the folder's lock and make the database.

        One connection is kept unused for as long as the engine is open: with the last one
        gone chDB would give up the lock.

        Raises:
            InUse: another process holds the folder, also after a short wait for one that is dying.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + self._open_seconds
        try:
            self._take(deadline)
        finally:
            self._wanted.withdraw()
        self._anchor.command(f"CREATE DATABASE IF NOT EXISTS {DATABASE}")
        self._clear_inbox()

    def _take(self, deadline: float) -> None:
        while self._anchor is None:
            try:
                if not self.is_held():
                    self._strike_lost_tokens()
                    self._anchor = self._raw_client(None, {})
                    break
            except DriverError as error:
                if "already initialized" in str(error):
                    raise InUse(
                        f"hot: {self.folder} cannot be opened while this process has another hot folder open;"
                        " close that first"
                    ) from None
                if not self.is_held():  # else somebody was quicker
                    raise translated(error) from error
            if time.monotonic() >= deadline:
                meters.acted("hot.open")
                raise InUse(
                    f"hot: {self.folder} is held by process {self._holder() or 'unknown'};"
                    " stop it, or wait until it has finished"
                )
            self._wanted.say()
            time.sleep(0.02)

    def _strike_lost_tokens(self) -> None:
        """Mend what a killed insert left, while the engine's own lock keeps everybody else out."""
        database = self.folder / "data" / DATABASE
        try:
            with (self.folder / "status").open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                strike_lost(database)
        except FileNotFoundError:  # an orderly end takes the lock's file away
            strike_lost(database)
        except BlockingIOError:
            pass  # somebody was quicker, and has done it

    def is_held(self) -> bool:
        """Return whether another process has chDB's own lock; chDB itself would say so on stderr only."""
        try:
            with (self.folder / "status").open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def files(self, table: str) -> frozenset[str]:
        """Return the names in the folder of a table: parts, parts being written, mutations."""
        return frozenset(os.listdir(self.folder / "data" / DATABASE / table))  # noqa: PTH208 - names are all that is asked

    def _holder(self) -> str:
        """Return the process id the engine wrote into its lock file, if it can be read."""
        with suppress(OSError):
            for line in (self.folder / "status").read_text("utf-8", "replace").splitlines():
                if line.startswith("PID:"):
                    return line.removeprefix("PID:").strip()
        return ""

    def _clear_inbox(self) -> None:
        """Remove files of inserts that were killed."""
        self._inbox.mkdir(exist_ok=True)
        for file in self._inbox.iterdir():
            file.unlink(missing_ok=True)

    def new_inbox_file(self, suffix: str) -> Path:
        """Return the path of a file to insert from; whoever asks removes it."""
        return self._inbox / f"{uuid.uuid4().hex}{suffix}"

    def connect(self, settings: Settings) -> Any:
        """Return a new client; see `Engine`."""
        return self._raw_client(DATABASE, settings)

    def _raw_client(self, database: str | None, settings: Settings) -> Any:
        return clickhouse_connect.get_client(
            interface="chdb",
            path=str(self.folder),
            database=database,
            settings=dict(settings),
            chdb_options=self._options,
        )

    def insert(self, table: str, rows: pa.Table, token: str) -> None:
        """Insert from a file of our own.

        clickhouse-connect would put the same file into $TMPDIR, where a killed process leaves it for ever.
        """
        file = self.new_inbox_file(".arrow")
        try:
            _write_stream(file, rows)
            columns = ", ".join(rows.schema.names)
            settings = ", ".join(f"{name} = {value}" for name, value in INSERT_SETTINGS.items())
            crash.point("hot.insert.file_written")
            self.command(
                f"INSERT INTO {table} ({columns}) FROM INFILE {quoted(str(file))}"
                f" SETTINGS {settings}, insert_deduplication_token = {quoted(token)} FORMAT ArrowStream"
            )
            crash.point("hot.insert.stored")
        finally:
            file.unlink(missing_ok=True)

    def close(self) -> None:
        """Close every connection, the kept one last; the folder is free afterwards."""
        super().close()
        if self._anchor is not None:
            self._anchor.close()
            self._anchor = None


def _write_stream(file: Path, rows: pa.Table) -> None:
    """Write rows as an Arrow stream; raises StoreDown when the disk is full or no file can be opened."""
    try:
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, rows.schema) as writer:
            writer.write_table(rows)
    except OSError as error:
        raise StoreDown(f"hot: write {rows.num_rows} rows to insert into {file.parent}: {error}") from None


class HttpEngine(Engine):
    """The ClickHouse HTTP interface of the process that owns the folder.

    `find` tells where the owner is now, (host, port, token), and raises StoreDown when there is none: an
    owner that is started again listens elsewhere.
    """

    # An owner that dies in the middle of an answer; half an Arrow stream.
    broken = (OSError, urllib3.exceptions.HTTPError, pa.ArrowInvalid)

    def __init__(self, find: Callable[[], tuple[str, int, str]]) -> None:
        super().__init__()
        self._find = find
        self._at: tuple[str, int, str] | None = None

    def connect(self, settings: Settings) -> Any:
        """Return a new client; see `Engine`."""
        host, port, token = at = self._find()
        if at != self._at:  # connections to an earlier owner are dead
            self._at = at
            self.drop_idle()
        return clickhouse_connect.get_client(
            host=host,
            port=port,
            username="k2",
            password=token,
            database=DATABASE,
            settings=dict(settings),
            compress=False,  # loopback: copying costs less than compressing
            autogenerate_session_id=False,
            query_retries=0,
        )

    def explained(self, error: DriverError) -> EngineError | TimedOut:
        """Return the K2 error; one that nobody answers is said without the address and its parameters."""
        if isinstance(error.__cause__, urllib3.exceptions.HTTPError) or "Max retries exceeded" in str(error):
            return EngineError("hot: its owner (`k2 ingest` or `k2 up`) does not answer; is it running?", 0)
        return translated(error)

    def insert(self, table: str, rows: pa.Table, token: str) -> None:
        """Insert rows as one block under a deduplication token."""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, rows.schema) as writer:
            writer.write_table(rows)
        with self._client() as client:
            client.raw_insert(
                table,
                column_names=rows.schema.names,
                insert_block=sink.getvalue().to_pybytes(),
                settings={**INSERT_SETTINGS, "insert_deduplication_token": token},
                fmt="ArrowStream",
            )


def quoted(text: str) -> str:
    """Return an SQL string literal."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
