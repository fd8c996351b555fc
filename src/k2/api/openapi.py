"""Describes the interface, derived from routes and schema: OpenAPI for programs, a page for people."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Annotated, Any

import msgspec

from k2.api import models
from k2.api.formats import MEDIA
from k2.api.routing import Endpoint, Parameter
from k2.schema import CANDLES, DEAD_LETTERS, FRAMES, GAPS, QUOTES, TRADES, Column, Table, Type

_ROWS = {
    "Trade": TRADES,
    "Quote": QUOTES,
    "Candle": CANDLES,
    "Gap": GAPS,
    "DeadLetter": DEAD_LETTERS,
    "Frame": FRAMES,
}
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
_PROBLEMS = {
    400: "The request can never work as it stands",
    404: "No such symbol, exchange, timeframe, snapshot...; the nearest is suggested",
    503: "Try again later",
    504: "Interrupted at the time limit",
}
_REF = "#/components/schemas/{name}"


def document(title: str, version: str, description: str, endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document."""
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = _operation(endpoint)
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": version, "description": description.strip()},
        "paths": paths,
        "components": {"schemas": _schemas()},
    }


def page(title: str, description: str, endpoints: Sequence[Endpoint]) -> str:
    """Return the page that shows every path, parameter and column; it loads nothing from anywhere."""
    text = escape(description.strip()).replace("\n* ", "<li>")
    tags = list(dict.fromkeys(endpoint.tag for endpoint in endpoints))
    schemas = _schemas()
    parts = [
        f"<h2>{escape(tag)}</h2>" + "".join(_section(e, schemas) for e in endpoints if e.tag == tag) for tag in tags
    ]
    return (
        f"<!DOCTYPE html><html lang=en><meta charset=utf-8><title>{escape(title)}</title><style>{_STYLE}</style>"
        f"<h1>{escape(title)}</h1><div>{text}</div><p>For programs: <a href=/openapi.json>/openapi.json</a></p>"
        + "".join(parts)
    )


_STYLE = (
    "body{font:15px/1.5 system-ui;max-width:70em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse}td,th{padding:.15em 1em .15em 0;text-align:left;vertical-align:top}"
    "code{font-size:95%}details{margin:.5em 0}summary{cursor:pointer}"
)


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    said: dict[str, Any] = {
        "tags": [endpoint.tag],
        "summary": endpoint.summary,
        "description": endpoint.handler.__doc__,
        "operationId": endpoint.handler.__name__,
        "parameters": [_parameter(parameter, endpoint) for parameter in endpoint.parameters],
        "responses": _responses(endpoint),
    }
    if endpoint.body:
        said["requestBody"] = {"required": True, "content": {"application/json": {"schema": _ref(endpoint.body)}}}
    return said


def _parameter(parameter: Parameter, endpoint: Endpoint) -> dict[str, Any]:
    in_path = f"{{{parameter.name}}}" in endpoint.path
    schema: dict[str, Any] = {"type": "string" if parameter.kind is str else "integer"}
    if parameter.kind is int:
        schema["minimum"] = parameter.least
    if parameter.default is not None:
        schema["default"] = parameter.default
    return {
        "name": parameter.name,
        "in": "path" if in_path else "query",
        "required": parameter.needed,
        "description": parameter.doc,
        "schema": schema,
    }


def _responses(endpoint: Endpoint) -> dict[str, Any]:
    media = ["application/json", *(MEDIA[fmt].partition(";")[0] for fmt in MEDIA if fmt != "json" and endpoint.rows)]
    content: dict[str, Any] = {name: {} for name in media}
    if endpoint.model:
        content["application/json"] = {"schema": _ref(endpoint.model)}
    responses = {"200": {"description": endpoint.summary, "content": content}}
    for status, text in _PROBLEMS.items() if endpoint.may_fail else ():
        problem = {"application/problem+json": {"schema": _ref("Problem")}}
        responses[str(status)] = {"description": text, "content": problem}
    return responses


def _ref(name: str) -> dict[str, str]:
    return {"$ref": _REF.format(name=name)}


def _schemas() -> dict[str, Any]:
    """Return the models of everything sent and received, those of rows derived from the tables."""
    rows = {name: _row_model(table, name) for name, table in _ROWS.items()}
    plain = [models.SymbolList, models.SnapshotList, models.SqlRequest, models.SqlRows]
    health = [models.Live, models.Ready, models.Problem]
    pages = [_page_model(name, row) for name, row in rows.items()]
    _, components = msgspec.json.schema_components([*pages, *plain, *health], ref_template=_REF)
    return components


def _row_model(table: Table, name: str) -> type[msgspec.Struct]:
    fields = [(column.name, Annotated[_PYTHON[column.type], models.told(_doc(column))]) for column in table.columns]
    return msgspec.defstruct(name, fields, namespace={"__doc__": table.doc})


def _doc(column: Column) -> str:
    if column.derived_from:
        return f"{column.derived_from} as ISO 8601 with nine decimals"
    return column.doc + _UNITS.get(column.type, "")


def _page_model(name: str, row: type[msgspec.Struct]) -> type[msgspec.Struct]:
    fields: list[tuple[str, Any]] = [
        ("data", Annotated[list[row], models.told("The rows")]),  # type: ignore[valid-type]
        (
            "next",
            Annotated[
                str | None, models.told("Path of the next page, when the limit cut the answer; null after the last one")
            ],
        ),
        ("tiers", Annotated[list[str], models.told("Where the rows came from: cold, hot, tail")]),
        (
            "watermark",
            Annotated[
                dict[str, int],
                models.told("Log offset per partition up to which the cold tier answered (exclusive)"),
            ],
        ),
        (
            "snapshot_id",
            Annotated[int | None, models.told("Snapshot of the cold tier that was read; usable as `as_of`")],
        ),
        ("note", Annotated[str, models.told("What is missing from this answer, if something is")]),
    ]
    doc = f"Rows of {name}, sorted by time, and what they are made from."
    return msgspec.defstruct(f"{name}Page", fields, namespace={"__doc__": doc})


def _section(endpoint: Endpoint, schemas: Mapping[str, Any]) -> str:
    path = escape(endpoint.path)
    link = f'<a href="{path}">{path}</a>' if endpoint.method == "GET" and "{" not in endpoint.path else path
    rows = "".join(f"<tr><td><code>{p.name}</code><td>{_marked(p.doc)}{_default(p)}" for p in endpoint.parameters)
    parameters = f"<table>{rows}</table>" if rows else ""
    columns = _columns(schemas.get(endpoint.body or endpoint.model.removesuffix("Page"), {}))
    what = "Body" if endpoint.body else "Columns"
    details = f"<details><summary>{what}</summary><table>{columns}</table></details>" if columns else ""
    doc = _marked(endpoint.handler.__doc__ or "")
    return f"<h3>{endpoint.method} <code>{link}</code></h3><p>{doc}</p>{parameters}{details}"


def _columns(schema: dict[str, Any]) -> str:
    properties: dict[str, Any] = schema.get("properties", {})
    return "".join(
        f"<tr><td><code>{name}</code><td>{said.get('type', '')}<td>{_marked(said.get('description', ''))}"
        for name, said in properties.items()
    )


def _default(parameter: Parameter) -> str:
    if parameter.needed:
        return " (must be given)"
    return f" (default: {escape(parameter.default)})" if parameter.default is not None else ""


def _marked(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
