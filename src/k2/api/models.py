"""What requests and answers look like, beside the rows of the tables (see `openapi.py`)."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec


def told(text: str) -> msgspec.Meta:
    """Return the description of a field."""
    return msgspec.Meta(description=text)


class Symbol(msgspec.Struct):
    """A symbol there is data of."""

    exchange: str
    symbol: str


class SymbolList(msgspec.Struct):
    """All symbols there is data of."""

    data: list[Symbol]


class SnapshotRow(msgspec.Struct):
    """One commit of one cold table."""

    table: str
    snapshot_id: Annotated[int, told("Usable as `as_of`")]
    committed_ns: Annotated[int, told("When it was committed (nanoseconds UTC since 1970)")]
    committed_time: Annotated[str, told("committed_ns as ISO 8601")]
    operation: str
    rows_added: int
    rows_total: int
    files_total: int
    bytes_total: int
    start: Annotated[dict[str, int], told("Log offset per partition the commit starts at, inclusive")]
    end: Annotated[dict[str, int], told("Log offset per partition the commit ends at, exclusive")]


class SnapshotList(msgspec.Struct):
    """The retained commits of the cold tier, oldest first."""

    data: list[SnapshotRow]


class SqlRequest(msgspec.Struct, forbid_unknown_fields=True):
    """One read-only statement."""

    query: Annotated[str, msgspec.Meta(min_length=1, description="One SELECT; no file, network or system functions")]
    tier: Annotated[str, told("hot (ClickHouse dialect) | cold (DuckDB dialect)")] = "hot"
    limit: Annotated[
        Annotated[int, msgspec.Meta(ge=1)] | None, told("Most rows returned; never more than query.max_limit")
    ] = None


class SqlRows(msgspec.Struct):
    """The rows of a statement, by its own column names."""

    data: list[dict[str, Any]]


class Live(msgspec.Struct):
    """The process answers."""

    status: str
    name: str
    version: str


class Ready(msgspec.Struct):
    """Whether the node can do its work, and if not, why."""

    status: Annotated[str, told("ready | not ready")]
    reasons: list[str]


class Problem(msgspec.Struct):
    """What went wrong, and what to do."""

    type: Annotated[str, told("unknown-name | rejected | timed-out | unavailable | misconfigured | failed | ...")]
    title: Annotated[str, told("The same in words")]
    status: Annotated[int, told("The HTTP status")]
    detail: Annotated[str, told("What was attempted, on what, what came back, what to do")]
    instance: Annotated[str, told("The request's id, also in the header X-Request-Id; quote it in a report")]
