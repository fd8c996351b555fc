"""What `Hot.sql` lets through, and what it refuses."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from k2.errors import Rejected
from k2.hot import open_hot, readonly
from k2.hot.owner import ServedHot
from k2.settings import Settings

sys.path.insert(0, str(Path(__file__).parent))
from hot_rows import table, trade

ALLOWED = [
    "SELECT 1",
    "select count(*) from trades;",
    "SELECT symbol, sumIf(amount, side = 'buy') FROM k2.trades GROUP BY symbol HAVING count() > 0 ORDER BY 1 LIMIT 5",
    "WITH t AS (SELECT * FROM trades) SELECT max(price) FROM t WHERE exchange IN (SELECT exchange FROM candles_1d)",
    "WITH RECURSIVE r AS (SELECT 1 AS a UNION ALL SELECT a + 1 FROM r WHERE a < 3) SELECT * FROM r",
    "SELECT argMinMerge(open) FROM candles_1m GROUP BY start_ns",
    "SELECT toStartOfInterval(exchange_time, INTERVAL 1 MINUTE) AS m, quantileExactIf(0.5)(price, NOT off_market)"
    " FROM trades GROUP BY m",
    "SELECT row_number() OVER (PARTITION BY symbol ORDER BY exchange_ns), lagInFrame(price) OVER () FROM trades",
    "SELECT price::String, CASE WHEN off_market THEN 1 ELSE 2 END, [1, 2][1], (1, 'a').2 FROM trades",
    "SELECT * FROM trades AS a ASOF JOIN quotes AS b ON a.symbol = b.symbol AND a.exchange_ns >= b.received_ns",
    "SELECT arrayMap(x -> x + 1, [1, 2]), number FROM numbers(3)",
    "(SELECT 1) UNION ALL (SELECT 2)",
    "SELECT 'file(1); INTO OUTFILE -- system.one', 1 AS `into outfile`",
    "SELECT * FROM trades PREWHERE price > 0",
    "EXPLAIN SELECT * FROM trades",
    "EXPLAIN indexes = 1 SELECT * FROM trades WHERE symbol = 'x'",
    "SHOW TABLES",
    "SHOW CREATE TABLE trades",
    "DESCRIBE candles_5m",
]

ATTACKS = [
    # other statements, alone and after an innocent one
    "DROP TABLE trades",
    "SELECT 1; DROP TABLE trades",
    "SELECT 1 /* ; */ ; SELECT 2",
    "INSERT INTO trades SELECT * FROM trades",
    "INSERT INTO FUNCTION file('{file}') SELECT 1",
    "ALTER TABLE trades DELETE WHERE 1",
    "CREATE TABLE x (a Int8) ENGINE = Memory",
    "SYSTEM SHUTDOWN",
    "SET readonly = 0",
    "USE system",
    "KILL QUERY WHERE 1",
    "OPTIMIZE TABLE trades",
    "EXISTS TABLE trades",
    "EXPLAIN AST INSERT INTO FUNCTION file('{file}') SELECT 1",
    "EXPLAIN SYNTAX DROP TABLE trades",
    "",
    "-- nothing",
    "SELECT",
    # files written
    "SELECT 1 INTO OUTFILE '{file}'",
    "SELECT 1 /* x */ INTO -- y\n OUTFILE '{file}' FORMAT CSV",
    "EXPLAIN SELECT 1 INTO OUTFILE '{file}'",
    "SHOW TABLES INTO OUTFILE '{file}'",
    "DESCRIBE trades INTO OUTFILE '{file}'",
    "(SELECT 1) UNION ALL (SELECT 2) INTO OUTFILE '{file}' TRUNCATE",
    # files and networks read
    "SELECT * FROM file('/etc/passwd', 'LineAsString')",
    "SELECT * FROM FiLe('/etc/passwd')",
    "SELECT * FROM /* a table */ file /* ! */ ('/etc/passwd')",
    "SELECT file('/etc/passwd')",
    "SELECT `file`('/etc/passwd')",
    "SELECT (SELECT (SELECT file('/etc/passwd')))",
    "SELECT arrayMap(x -> file(x), ['/etc/passwd'])",
    "SELECT 1 ORDER BY file('/etc/passwd')",
    "SELECT 1 WHERE (SELECT count() FROM url('http://127.0.0.1:1/')) = 0",
    "WITH t AS (SELECT * FROM url('http://127.0.0.1:1/')) SELECT * FROM t",
    "WITH file('/etc/passwd') AS x SELECT x",
    "SELECT * FROM s3('http://127.0.0.1:1/x')",
    "SELECT * FROM remote('127.0.0.1', 'system.one')",
    "SELECT * FROM cluster('default', 'system.one')",
    "SELECT * FROM executable('x', 'TSV', 'a String', (SELECT 1))",
    "SELECT * FROM icebergLocal('/tmp')",
    "SELECT * FROM sqlite('/tmp/x', 'y')",
    "SELECT * FROM input('a Int8')",
    "SELECT * FROM Python(sys)",
    "SELECT * FROM python(trades)",
    "SELECT * FROM `/etc/passwd`",
    "SELECT * FROM '/etc/passwd'",
    "SELECT * FROM merge('system', '.*')",
    "SELECT * FROM dictionary('x')",
    "SELECT * FROM loop(system.one)",
    "SELECT * FROM view(SELECT * FROM system.one)",
    "SELECT * FROM (EXPLAIN SELECT 1)",
    "SELECT hasColumnInTable('127.0.0.1:1', 'u', 'p', 'd', 't', 'c')",
    "SELECT dictGet('d', 'a', 1)",
    "SELECT joinGet('system.one', 'dummy', 1)",
    "SELECT aiGenerate('hello')",
    "SELECT getSetting('max_threads'), getServerSetting('x'), hostName()",
    "SELECT sleep(3)",
    "DESCRIBE file('/etc/passwd')",
    "DESCRIBE (SELECT * FROM file('/etc/passwd'))",
    "EXPLAIN SELECT * FROM file('/etc/passwd')",
    # other tables
    "SELECT * FROM system.one",
    "SELECT * FROM `system`.`tables`",
    "SELECT * FROM information_schema.tables",
    "SELECT * FROM trades, system.users",
    "SELECT 1 UNION ALL SELECT 2 FROM system.one",
    "SELECT 1 IN system.one",
    "SELECT 1 GLOBAL NOT IN (system.one)",
    "SELECT * FROM trades WHERE exchange IN (SELECT name FROM system.users)",
    "WITH `system.one` AS (SELECT 1) SELECT * FROM system.one",
    "WITH `/etc/passwd` AS (SELECT 1) SELECT * FROM `/etc/passwd`",
    "SELECT * FROM migrations",
    "SHOW CREATE TABLE system.one",
    "SHOW TABLES FROM system",
    "SHOW PROCESSLIST",
    "SHOW SETTINGS LIKE '%'",
    "SHOW GRANTS",
    "SHOW DATABASES",
    "DESCRIBE system.one",
    # limits and settings
    "SELECT 1 SETTINGS max_execution_time = 0",
    "SELECT 1 SETTINGS readonly = 0",
    "SELECT * FROM (SELECT 1 SETTINGS max_memory_usage = 0)",
    "EXPLAIN SELECT 1 SETTINGS readonly = 0",
    "SELECT 1 FORMAT Null",
    "SELECT {x:String}",
    # names made to mislead the reader of the tree
    "SELECT 1 AS `x\n TableIdentifier trades`",
    "SELECT * FROM `trades (children 1)`",
    "SELECT * FROM `trades (alias system.one)`",
    'SELECT * FROM "trades\n"',
]


@pytest.fixture(scope="module")
def hot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedHot]:
    """A hot tier with one trade; nothing here may change it."""
    opened = open_hot(Settings(data=str(tmp_path_factory.mktemp("readonly"))), "own")
    assert isinstance(opened, ServedHot)
    opened.write("trades", table("trades", [trade(0)]), "t")
    yield opened
    opened.close()


@pytest.mark.parametrize("query", ALLOWED)
def test_reading_the_hot_tables_is_allowed(hot: ServedHot, query: str) -> None:
    """Joins, windows, subqueries, aggregate states: the whole of SELECT on known tables."""
    hot.sql(query, timeout_seconds=10, limit=100)


@pytest.mark.parametrize("query", ATTACKS)
def test_everything_else_is_refused_and_leaves_no_trace(hot: ServedHot, query: str, tmp_path: Path) -> None:
    """No write, no file, no network, no other table, no changed limit; with a message, and the rows still there."""
    file = tmp_path / "written"
    with pytest.raises(Rejected, match=r"^sql: "):
        hot.sql(query.replace("{file}", str(file)), timeout_seconds=10, limit=100)

    assert not file.exists()
    assert hot.counts("trades", {}, {"binance": 1}) == 1


def test_no_function_of_a_forbidden_category_slips_through(hot: ServedHot) -> None:
    """Whatever the engine offers: neither directly nor by the look of a combinator."""
    rows = hot.engine.query("SELECT name, alias_to, toString(categories) AS category FROM system.functions").to_pylist()
    functions = readonly.allowed_functions([(row["name"], row["alias_to"], row["category"]) for row in rows])
    category = {row["name"].lower(): row["category"] for row in rows if not row["alias_to"]}
    forbidden = [
        name
        for row in rows
        if (name := row["name"].lower()) not in readonly.MORE_FUNCTIONS
        and (category.get(row["alias_to"].lower()) or row["category"]) not in readonly.FUNCTION_CATEGORIES
        and row["alias_to"].lower() not in readonly.MORE_FUNCTIONS
    ]

    assert len(forbidden) > 100
    assert [name for name in forbidden if readonly._is_allowed(name, functions)] == []


def test_the_limit_cuts_the_answer(hot: ServedHot) -> None:
    """Also where the statement asks for more itself."""
    assert hot.sql("SELECT number FROM numbers(100000) LIMIT 5000", timeout_seconds=10, limit=7).num_rows == 7


def test_a_misspelt_table_is_answered_with_the_nearest(hot: ServedHot) -> None:
    """The message helps."""
    with pytest.raises(Rejected, match="did you mean 'trades'"):
        hot.sql("SELECT * FROM trade", timeout_seconds=10, limit=1)
