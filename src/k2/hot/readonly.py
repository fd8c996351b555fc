"""Decide whether a statement someone typed may run: one SELECT, EXPLAIN, SHOW or DESCRIBE of the hot tables.

The engine parses it: `formatQuery` gives its canonical text (no comments, one statement) and
`EXPLAIN AST` its tree, in which only known tables, table functions and functions may stand. Only
the canonical text is run, on a `readonly = 1` connection. Both are needed: the engine alone would
allow the function `file()`, `INTO OUTFILE`, several statements and the system tables.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from k2.errors import Rejected, nearest
from k2.hot.ddl import CANDLE_TABLES, DATABASE
from k2.schema import HOT_ROW_TABLES

MAX_SQL_CHARACTERS = 100_000
TABLES = frozenset(table.name for table in HOT_ROW_TABLES) | frozenset(CANDLE_TABLES)
TABLE_FUNCTIONS = frozenset({"numbers", "zeros", "values", "generate_series", "generateseries", "null"})

# Categories of system.functions that only compute. Not among them: Other, Introspection,
# Dictionary, AI (asks a service), Machine Learning, Internal, Encryption.
FUNCTION_CATEGORIES = frozenset(
    {
        *("Aggregate Functions", "Arithmetic", "Arrays", "Bit", "Bitmap", "Comparison", "Conditional"),
        *("Dates and Times", "Distance", "Encoding", "Financial", "Hash", "IP Address", "JSON", "Logical", "Map"),
        *("Mathematical", "Null", "Random Number", "Rounding", "String", "String Replacement", "String Search"),
        *("String Splitting", "Time Series", "Time Window", "Tuple", "Type Conversion", "UUID", "URL"),
    }
)
# Harmless ones of the category Other, and names only the parser knows; lower case.
MORE_FUNCTIONS = frozenset(
    {
        *("bar", "bytesize", "countdigits", "finalizeaggregation", "formatreadabledecimalsize"),
        *("formatreadablequantity", "formatreadablesize", "formatreadabletimedelta", "identity", "ignore"),
        *("isdecimaloverflow", "materialize", "neighbor", "runningaccumulate", "runningdifference"),
        *("rownumberinallblocks", "totypename", "transform", "version", "lambda", "exists"),
    }
)
COMBINATORS = re.compile(
    r"(if|array|map|distinct|ordefault|ornull|foreach|resample|argmin|argmax|state|simplestate|merge|mergestate)$"
)
_MEMBERSHIP = frozenset(
    {"in", "notin", "globalin", "globalnotin", "nullin", "notnullin", "globalnullin", "globalnotnullin"}
)

_TOKENS = re.compile(r"'(?:[^'\\]|\\.|'')*'|`(?:[^`\\]|\\.|``)*`|\"(?:[^\"\\]|\\.|\"\")*\"|\w+|[^\s\w]", re.DOTALL)
_PLAIN_NAME = re.compile(r"[^\x00-\x1f()`\"\\]{1,128}")
_SHOW = re.compile(r"SHOW (TABLES( (NOT )?I?LIKE '[^'\\]*')?|CREATE TABLE [\w.]+)")
_CTE = re.compile(r"[A-Za-z_]\w*")
_ALIAS = re.compile(r" \(alias .*?\)(?= \(children |$)")
_CHILDREN = re.compile(r" \(children \d+\)$")


@dataclass
class Node:
    """One node of the tree: its kind (`Function`, `TableIdentifier`...), the rest of its line, its children."""

    kind: str
    text: str
    children: list[Node] = field(default_factory=list)

    def walk(self) -> Iterator[Node]:
        """Yield the node and everything below it; with a stack of its own, a tree may be a thousand levels deep."""
        waiting = [self]
        while waiting:
            node = waiting.pop()
            yield node
            waiting.extend(reversed(node.children))


def check(canonical: str, tree: list[str], functions: frozenset[str]) -> None:
    """Refuse a statement that may do more than read the hot tables.

    `canonical` is the engine's own text of it, `tree` the lines of its EXPLAIN AST.

    Raises:
        Rejected: names what is not allowed.
    """
    check_text(canonical)
    check_tree(parse_tree(tree), with_names(canonical), functions)


def allowed_functions(rows: list[tuple[str, str, str]]) -> frozenset[str]:
    """Return the allowed functions, in lower case, from (name, alias_to, categories) of system.functions."""
    allowed = {name.lower() for name, _, category in rows if category in FUNCTION_CATEGORIES} | MORE_FUNCTIONS
    allowed |= {name.lower() for name, alias_to, _ in rows if alias_to.lower() in allowed}
    return frozenset(allowed)


def check_text(canonical: str) -> None:
    """Refuse what the tree would not show: output clauses and names made to mislead.

    Raises:
        Rejected: says which.
    """
    tokens = _TOKENS.findall(canonical)
    if not tokens or tokens[0] not in ("SELECT", "WITH", "EXPLAIN", "SHOW", "DESCRIBE", "("):
        raise Rejected("sql: only one SELECT, WITH, EXPLAIN, SHOW or DESCRIBE statement is allowed")
    if tokens[0] == "SHOW" and not _SHOW.fullmatch(canonical):
        raise Rejected("sql: of SHOW only SHOW TABLES and SHOW CREATE TABLE are allowed")
    for word, following in zip(tokens, [*tokens[1:], ""], strict=True):
        if word == "INTO" and following == "OUTFILE":
            raise Rejected("sql: INTO OUTFILE is not allowed; choose the output with --format and -o instead")
        if word == "FORMAT" and re.fullmatch(r"\w+", following):
            raise Rejected("sql: FORMAT is not allowed; choose the output with --format instead")
        if word[0] in '`"' and not _PLAIN_NAME.fullmatch(word[1:-1]):
            raise Rejected(f"sql: the name {word} is not allowed; use letters, digits and _")


def parse_tree(lines: list[str]) -> Node:
    """Build the tree from the lines of EXPLAIN AST, one space of indentation a level."""
    root = Node("", "")
    path = [root]
    for line in lines:
        stripped = line.lstrip(" ")
        if not stripped:
            continue
        depth = len(line) - len(stripped)
        kind, _, text = _ALIAS.sub("", _CHILDREN.sub("", stripped)).partition(" ")
        node = Node(kind, text)
        if depth >= len(path):
            raise Rejected("sql: the statement could not be checked; write it more simply")
        del path[depth + 1 :]
        path[-1].children.append(node)
        path.append(node)
    return root


def check_tree(root: Node, names: frozenset[str], functions: frozenset[str]) -> None:
    """Refuse every table, function and clause that is not known to be harmless.

    `names` are those WITH gives to subqueries, `functions` the allowed ones in lower case.

    Raises:
        Rejected: names what is not allowed.
    """
    statements = root.children
    if len(statements) != 1:
        raise Rejected("sql: exactly one statement is allowed")
    statement = statements[0]
    known = TABLES | names
    if statement.kind == "ShowCreateTableQuery":
        _require_table(".".join(statement.text.split()), TABLES)
    elif statement.kind == "DescribeQuery":
        if not any(node.kind == "TableIdentifier" for node in statement.walk()):
            raise Rejected("sql: DESCRIBE is allowed of a table only")
    elif statement.kind == "Explain":
        _require_select_inside(statement)
    elif statement.kind not in ("SelectWithUnionQuery", "ShowTables"):  # of SHOW, `check_text` knows more
        raise Rejected("sql: only one SELECT, WITH, EXPLAIN, SHOW or DESCRIBE statement is allowed")
    for node in statement.walk():
        _check_node(node, known, functions, explained=statement.kind == "Explain" and node in statement.children)


def _require_select_inside(statement: Node) -> None:
    kinds = {child.kind for child in statement.children} - {"Set", "Identifier"}
    if kinds != {"SelectWithUnionQuery"}:
        raise Rejected("sql: only a SELECT can be explained")


def with_names(canonical: str) -> frozenset[str]:
    """Return the names WITH gives to subqueries, which the tree leaves out.

    A plain name that is taken for one by mistake does no harm: without a dot it can only be
    a table of our own database.
    """
    tokens = _TOKENS.findall(canonical)
    triples = zip(tokens, tokens[1:], tokens[2:], strict=False)
    return frozenset(
        name for name, word, bracket in triples if word == "AS" and bracket == "(" and _CTE.fullmatch(name)
    )


def _check_node(node: Node, known: frozenset[str], functions: frozenset[str], *, explained: bool) -> None:
    if node.kind == "Set" and not explained:
        raise Rejected("sql: SETTINGS is not allowed")
    if node.kind in ("TableIdentifier", "TableExpression"):
        _check_source(node, known)
    elif node.kind == "Function":
        _check_function(node, known, functions)
    elif node.kind in ("InsertQuery", "CreateQuery", "DropQuery", "AlterQuery", "SystemQuery"):
        raise Rejected("sql: only reading is allowed")


def _check_source(node: Node, known: frozenset[str]) -> None:
    if node.kind == "TableIdentifier":
        _require_table(node.text, known)
        return
    for child in node.children:
        if child.kind == "Function" and child.text.lower() not in TABLE_FUNCTIONS:
            raise Rejected(f"sql: the table function {child.text}() is not allowed")


def _require_table(name: str, known: frozenset[str]) -> None:
    if name.removeprefix(f"{DATABASE}.") not in known:
        raise Rejected(f"sql: there is no table {name!r}{nearest(name, TABLES)}")


def _check_function(node: Node, known: frozenset[str], functions: frozenset[str]) -> None:
    name = node.text.lower()
    if not _is_allowed(name, functions):
        raise Rejected(f"sql: the function {node.text}() is not allowed")
    if name in _MEMBERSHIP and node.children:
        right = node.children[0].children[-1:]
        for operand in right:
            if operand.kind == "Identifier":  # `x IN t` reads the table t
                _require_table(operand.text, known)


def _is_allowed(name: str, functions: frozenset[str]) -> bool:
    """Look the name up, without the combinators of aggregate functions (`sumIf`, `argMinMerge`)."""
    while name not in functions and name not in TABLE_FUNCTIONS:
        shorter = COMBINATORS.sub("", name)
        if shorter == name or not shorter:
            return False
        name = shorter
    return True
