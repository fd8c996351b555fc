"""Lets one SELECT over named tables through, and nothing else: no files, no network, no settings.

The query is judged by DuckDB's own parser (`json_serialize_sql` knows SELECT only), by a list of
what is allowed, not of what is forbidden. The engine it then runs in is locked as well, see
`reader.py`; either of the two would do against what we tried.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from typing import Any

import duckdb

from k2 import meters
from k2.errors import Rejected, nearest

TABLE_FUNCTIONS = frozenset({"range", "generate_series", "unnest"})
"""Table functions that only make rows out of their arguments."""

SOURCES = frozenset(
    {"BASE_TABLE", "TABLE_FUNCTION", "JOIN", "SUBQUERY", "EMPTY", "EXPRESSION_LIST", "PIVOT", "CTE", "SHOW_REF"}
)
SCALARS_REFUSED = frozenset(
    {
        *("write_log", "current_setting", "getenv", "getvariable", "nextval", "currval", "setseed"),
        # They take as much memory as they are told to, outside of the engine's limit, and cannot be interrupted.
        *("range", "generate_series", "repeat", "lpad", "rpad", "list_resize", "array_resize", "printf", "format"),
        *("bitstring", "bar"),
    }
)
MAX_SQL_CHARACTERS = 100_000
_PLAIN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")


def check(connection: duckdb.DuckDBPyConnection, query: str, tables: Collection[str]) -> None:
    """Raise Rejected unless `query` is a single SELECT that reads only `tables` and its own expressions."""
    statements = _parsed(connection, query)
    if len(statements) != 1:
        raise Rejected(f"sql: one statement at a time, not {len(statements)}")
    nodes = list(_nodes(statements[0]))
    names = {name for node in nodes for name in _cte_names(node)}
    if names:
        _check_cte_names(names, connection)
    made_of_rows = {id(node.get("function")) for node in nodes if node.get("type") == "TABLE_FUNCTION"}
    for node in nodes:
        if id(node) not in made_of_rows:
            _check_node(node, {*tables, *names}, tables)


def _parsed(connection: duckdb.DuckDBPyConnection, query: str) -> list[Any]:
    """Return the statements as DuckDB's parser understands them; raises Rejected."""
    if len(query) > MAX_SQL_CHARACTERS:
        meters.acted("cold.sql")
        raise Rejected(f"sql: longer than {MAX_SQL_CHARACTERS} characters")
    if any("\ud800" <= letter <= "\udfff" for letter in query):
        raise Rejected("sql: holds half a character (a lone surrogate); send UTF-8")
    try:
        parsed = json.loads(_serialized(connection, query))
    except RecursionError:
        raise Rejected("sql: nested too deeply; write it more simply") from None
    if parsed.get("error"):
        if parsed.get("error_type") == "not implemented":  # DuckDB's own words are about its serialisation
            raise Rejected("sql: only a SELECT may be run")
        raise Rejected(f"sql: {parsed.get('error_message', 'not understood')}")
    statements: list[Any] = parsed["statements"]
    return statements


def _check_cte_names(names: Collection[str], connection: duckdb.DuckDBPyConnection) -> None:
    """Refuse names by which a table or file outside could be meant where the name of WITH does not reach."""
    found = connection.execute("SELECT view_name FROM duckdb_views() WHERE internal").fetchall()
    taken = {str(name).lower() for (name,) in found}
    for name in names:
        if not _PLAIN_NAME.fullmatch(name) or name.lower() in taken:
            raise Rejected(f"sql: WITH cannot take the name {name!r}; choose another of letters, digits and _")


def _serialized(connection: duckdb.DuckDBPyConnection, query: str) -> str:
    try:
        row = connection.execute("SELECT json_serialize_sql(?::VARCHAR)", [query]).fetchone()
    except duckdb.Error as error:
        raise Rejected(f"sql: {error}") from None
    assert row is not None
    return str(row[0])


def _nodes(value: Any) -> Iterator[dict[str, Any]]:
    """Every object of the tree; with a stack of its own, so that a deeply nested query cannot exhaust ours."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            yield item
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)


def _cte_names(node: dict[str, Any]) -> Iterator[str]:
    for entry in (node.get("cte_map") or {}).get("map") or []:
        yield str(entry["key"])


def _check_node(node: dict[str, Any], known: Collection[str], tables: Collection[str]) -> None:
    kind = node.get("type")
    if kind == "BASE_TABLE":
        name = str(node.get("table_name"))
        if node.get("schema_name") or node.get("catalog_name") or name.lower() not in {k.lower() for k in known}:
            raise Rejected(f"sql: no table {name!r}{nearest(name, tables)}")
    elif kind == "TABLE_FUNCTION":
        name = str((node.get("function") or {}).get("function_name")).lower()
        if name not in TABLE_FUNCTIONS:
            raise Rejected(f"sql: table function {name!r} is not allowed; known: {', '.join(sorted(TABLE_FUNCTIONS))}")
    elif node.get("class") == "FUNCTION" and str(node.get("function_name")).lower() in SCALARS_REFUSED:
        raise Rejected(f"sql: function {node.get('function_name')!r} is not allowed")
    elif "sample" in node and "alias" in node and "class" not in node and kind not in SOURCES:
        raise Rejected(f"sql: {str(kind).lower().replace('_', ' ')} is not allowed")
