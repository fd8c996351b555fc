"""Response models, derived from `schema.py`: what OpenAPI shows of each table."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, create_model

from k2.schema import CANDLES, DEAD_LETTERS, FRAMES, GAPS, QUOTES, TRADES, Column, Table, Type

_PYTHON: dict[Type, type] = {
    Type.NAME: str,
    Type.TEXT: str,
    Type.BYTES: str,
    Type.BOOL: bool,
    Type.INT: int,
    Type.NS: int,
    Type.TIMESTAMP: str,
    Type.DECIMAL: str,
    Type.WIDE: str,
}
_UNITS = {
    Type.NS: " (nanoseconds UTC since 1970; larger than 2^53, so read it as a 64-bit integer)",
    Type.DECIMAL: " (exact decimal as text)",
    Type.WIDE: " (exact decimal as text)",
    Type.BYTES: " (as text; `base64:...` where it is none)",
}


def _field(column: Column) -> Any:
    if column.derived_from:
        return (str, Field(description=f"{column.derived_from} as ISO 8601 with nine decimals"))
    return (_PYTHON[column.type], Field(description=column.doc + _UNITS.get(column.type, "")))


def row_model(table: Table, name: str) -> type[BaseModel]:
    """Return the model of one row of a table."""
    fields = {column.name: _field(column) for column in table.columns}
    return create_model(name, __doc__=table.doc, **fields)


def page_model(row: type[BaseModel]) -> type[BaseModel]:
    """Return the model of an answer: rows and what they are made from."""
    return create_model(
        f"{row.__name__}Page",
        __doc__=f"Rows of {row.__name__}, sorted by time, and what they are made from.",
        __config__=ConfigDict(title=f"{row.__name__}Page"),
        data=(list[row], Field(description="The rows")),  # type: ignore[valid-type]
        next=(
            str | None,
            Field(description="Path of the next page, when the limit cut the answer; null after the last one"),
        ),
        tiers=(list[str], Field(description="Where the rows came from: cold, hot, tail")),
        watermark=(
            dict[str, int],
            Field(description="Log offset per partition up to which the cold tier answered (exclusive)"),
        ),
        snapshot_id=(int | None, Field(description="Snapshot of the cold tier that was read; usable as `as_of`")),
        note=(str, Field(description="What is missing from this answer, if something is")),
    )


TradePage = page_model(row_model(TRADES, "Trade"))
QuotePage = page_model(row_model(QUOTES, "Quote"))
CandlePage = page_model(row_model(CANDLES, "Candle"))
GapPage = page_model(row_model(GAPS, "Gap"))
DeadLetterPage = page_model(row_model(DEAD_LETTERS, "DeadLetter"))
FramePage = page_model(row_model(FRAMES, "Frame"))


class Symbol(BaseModel):
    """A symbol there is data of."""

    exchange: str
    symbol: str


class SymbolList(BaseModel):
    """All symbols there is data of."""

    data: list[Symbol]


class SnapshotRow(BaseModel):
    """One commit of one cold table."""

    table: str
    snapshot_id: int = Field(description="Usable as `as_of`")
    committed_ns: int = Field(description="When it was committed (nanoseconds UTC since 1970)")
    committed_time: str = Field(description="committed_ns as ISO 8601")
    operation: str
    rows_added: int
    rows_total: int
    files_total: int
    bytes_total: int
    start: dict[str, int] = Field(description="Log offset per partition the commit starts at, inclusive")
    end: dict[str, int] = Field(description="Log offset per partition the commit ends at, exclusive")


class SnapshotList(BaseModel):
    """The retained commits of the cold tier, oldest first."""

    data: list[SnapshotRow]


class SqlRequest(BaseModel):
    """One read-only statement."""

    model_config = ConfigDict(extra="forbid")

    query: str = Field(description="One SELECT; no file, network or system functions", min_length=1)
    tier: str = Field("hot", description="hot (ClickHouse dialect) | cold (DuckDB dialect)")
    limit: int | None = Field(None, ge=1, description="Most rows returned; never more than query.max_limit")


class SqlRows(BaseModel):
    """The rows of a statement, by its own column names."""

    data: list[dict[str, Any]]


class Live(BaseModel):
    """The process answers."""

    status: str
    name: str
    version: str


class Ready(BaseModel):
    """Whether the node can do its work, and if not, why."""

    status: str = Field(description="ready | not ready")
    reasons: list[str]
