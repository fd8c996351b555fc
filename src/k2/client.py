"""K2 for Python: the same calls whether a node is running or only its folder is there."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

from k2.errors import Misconfigured, Unavailable
from k2.query.plan import COLD, Question, ask
from k2.query.remote import Node, find_node
from k2.query.result import Result
from k2.query.times import TimeLike
from k2.schema import CANDLES, FRAMES
from k2.settings import Settings, load

if TYPE_CHECKING:
    from k2.hot.base import Hot
    from k2.query.engine import Answer, Engine


def connect(data: str | Path | None = None, *, url: str | None = None, settings: Settings | None = None) -> Client:
    """Return a client for a data folder, or for the node at a URL.

    With a folder (default: the settings', `K2_DATA` or `k2-data`) the client asks the node that
    runs on it, if one does, and else opens the folder itself; one of an older K2 is upgraded first.

    Raises:
        Misconfigured: there is no such folder, or a newer K2 wrote it.
        Unavailable: nobody answers at `url`.
    """
    chosen = settings if settings is not None else load({"data": None if data is None else str(data)})
    if url is not None:
        node = Node(url, chosen)
        if not node.answers():
            raise Unavailable(
                f"connect to {url}: no K2 node answers there (is it running? `k2 status` shows its address)"
            )
        return Client(node)
    folder = chosen.data_path
    if not folder.is_dir():
        raise Misconfigured(
            f"there is no K2 data in {folder} (`k2 up`, `k2 demo` or `k2 import` make one; or pass data=)"
        )
    address = find_node(folder)
    if address is not None:
        return Client(Node(address, chosen))
    from k2.run.upgrade import upgrade  # not needed to ask a node

    upgrade(chosen)
    return Client(_Folder(chosen))


class Listed(NamedTuple):
    """A symbol there is data of."""

    exchange: str
    symbol: str


class _Source(Protocol):
    """Where a client gets its answers."""

    where: str

    def answer(self, question: Question) -> Result: ...

    def default_limit(self) -> int: ...

    def sql(self, query: str, tier: str, limit: int | None) -> Result: ...

    def symbols(self) -> list[tuple[str, str]]: ...

    def snapshots(self, table: str | None) -> list[dict[str, Any]]: ...

    def status(self) -> dict[str, Any]: ...

    def close(self) -> None: ...


class Client:
    """Asks K2. Usable from any thread; close it, or use it in a `with`.

    Times are ISO 8601 text, dates, datetimes (naive: UTC), `-1h`, or nanoseconds as an int;
    `start` is inclusive, `end` exclusive. `tier` is `all`, `hot` or `cold`. `as_of` is a snapshot
    id or a time: the answer of what was known then. `limit` 0 is all rows, None the setting
    `query.limit`; with a `start` the first rows are given, without one the newest.
    Symbols may be written in any usual way: `BTC-USDT`, `btcusdt`, `XBT/USD`.
    """

    def __init__(self, source: _Source) -> None:
        self._source = source

    @property
    def where(self) -> str:
        """Who answers: the node's address, or the folder."""
        return self._source.where

    def trades(self, symbol: str | None = None, **options: Any) -> Result:
        """Return trades by the exchange's time; options as for `rows`."""
        return self.rows("trades", symbol, **options)

    def quotes(self, symbol: str | None = None, **options: Any) -> Result:
        """Return best bids and asks by the time of receipt; options as for `rows`."""
        return self.rows("quotes", symbol, **options)

    def gaps(self, symbol: str | None = None, **options: Any) -> Result:
        """Return the holes found in the trade ids; options as for `rows`."""
        return self.rows("gaps", symbol, **options)

    def rows(
        self,
        table: str,
        symbol: str | None = None,
        *,
        start: TimeLike | None = None,
        end: TimeLike | None = None,
        exchange: str | None = None,
        tier: str = "all",
        as_of: TimeLike | None = None,
        limit: int | None = 0,
    ) -> Result:
        """Return rows of any table: trades, quotes, gaps, dead_letters, frames.

        Raises:
            UnknownName: no data of that symbol or exchange; suggests the nearest.
            Rejected: a time or combination that cannot be answered.
            TimedOut: interrupted at the time limit (`query.timeout_seconds`).
        """
        return self._ask(table, symbol, start=start, end=end, exchange=exchange, tier=tier, as_of=as_of, limit=limit)

    def candles(
        self,
        symbol: str,
        timeframe: str = "1m",
        *,
        start: TimeLike | None = None,
        end: TimeLike | None = None,
        exchange: str | None = None,
        tier: str = "all",
        as_of: TimeLike | None = None,
        limit: int | None = 0,
        kind: str = "auto",
    ) -> Result:
        """Return candles by their start: 1m, 5m, 15m, 30m, 1h, 1d; the newest one is still growing.

        `kind` is `trade` (made of single trades), `aggregate`, or `auto`: the first where there are any.
        """
        return self._ask(
            CANDLES.name,
            symbol,
            start=start,
            end=end,
            exchange=exchange,
            tier=tier,
            as_of=as_of,
            limit=limit,
            timeframe=timeframe,
            kind=kind,
        )

    def sql(self, query: str, *, tier: str = "hot", limit: int | None = None) -> Result:
        """Run one read-only SELECT on one tier, in its dialect: ClickHouse (hot) or DuckDB (cold).

        At most `query.max_limit` rows come back.
        """
        return self._source.sql(query, tier, limit or None)

    def symbols(self) -> list[Listed]:
        """Return the symbols there is data of, by exchange."""
        return [Listed(exchange, symbol) for exchange, symbol in self._source.symbols()]

    def snapshots(self, table: str | None = None) -> list[dict[str, Any]]:
        """Return the retained commits of the cold tables, oldest first; each `snapshot_id` can be `as_of`."""
        return self._source.snapshots(table)

    def status(self) -> dict[str, Any]:
        """Return what the tiers hold, and, where a node runs, what it is doing."""
        return self._source.status()

    def close(self) -> None:
        """Release what was opened."""
        self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({self.where})"

    def _ask(self, table: str, symbol: str | None, *, limit: int | None, **options: Any) -> Result:
        most = self._source.default_limit() if limit is None else limit
        return self._source.answer(ask(table, symbol, limit=most, **options))


class _Folder:
    """Answers from the folder itself; the hot engine is opened when a question first needs it.

    The engines are imported here, as a client of a node needs none of them.
    """

    def __init__(self, settings: Settings) -> None:
        from k2.cold import open_cold
        from k2.query.engine import Engine

        self.where = str(settings.data_path)
        self._settings = settings
        self._lock = threading.Lock()
        self._cold = open_cold(settings)
        self._hot: Hot | None = None
        self._cold_engine = Engine(None, self._cold, None, settings)
        self._engine: Engine | None = None

    def default_limit(self) -> int:
        return self._settings.query.limit

    def answer(self, question: Question) -> Result:
        cold_alone = question.tier == COLD or question.snapshot_id is not None or question.table is FRAMES
        engine = self._cold_engine if cold_alone else self._whole()
        return _result(engine.answer(question, coded=True))

    def sql(self, query: str, tier: str, limit: int | None) -> Result:
        engine = self._cold_engine if tier == COLD else self._whole()
        return Result(engine.sql(query, tier=tier, limit=limit), None)

    def symbols(self) -> list[tuple[str, str]]:
        return self._whole().symbols()

    def snapshots(self, table: str | None) -> list[dict[str, Any]]:
        from k2.query.output import plain_snapshot

        return [plain_snapshot(snapshot) for snapshot in self._cold_engine.snapshots(table)]

    def status(self) -> dict[str, Any]:
        return {"node": None, **self._whole().status()}

    def close(self) -> None:
        with self._lock:
            if self._hot is not None:
                self._hot.close()
            self._cold.close()
            self._engine = self._hot = None

    def _whole(self) -> Engine:
        """Return the engine over both tiers; over cold alone where the folder has no hot tier.

        A hot that may be damaged is not read: only its owner makes it anew.
        """
        from k2.hot import BORROW, open_hot, open_tail
        from k2.query.engine import Engine
        from k2.run import doubt

        with self._lock:
            if self._engine is None:
                if (self._settings.data_path / "hot").is_dir():
                    self._hot = open_hot(self._settings, BORROW)
                folder = self._settings.data_path
                self._engine = Engine(
                    self._hot, self._cold, open_tail(self._settings), self._settings, lambda: doubt.of_folder(folder)
                )
            return self._engine


def _result(answer: Answer) -> Result:
    return Result(
        answer.rows,
        answer.table,
        tiers=answer.tiers,
        watermark=answer.watermark,
        snapshot_id=answer.snapshot_id,
        note=answer.note,
    )
