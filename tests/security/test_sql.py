"""SQL that strangers type: rows or Rejected, nothing written, nothing read but K2's tables, memory and time bounded."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from k2.cold import open_cold
from k2.cold.base import Cold
from k2.errors import K2Error, Rejected, TimedOut
from k2.hot import open_hot
from k2.hot.base import Hot
from k2.settings import QuerySettings, Settings

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "hot"))
from hot_rows import table, trade

TIERS = ("hot", "cold")
ATTACKS_ON_COLD = [
    # files and networks
    "SELECT * FROM read_csv('{secret}')",
    "SELECT * FROM read_text('{secret}')",
    "SELECT * FROM read_blob('{secret}')",
    "SELECT * FROM read_json('{secret}')",
    "SELECT * FROM parquet_scan('{secret}')",
    "SELECT * FROM iceberg_scan('{folder}')",
    "SELECT * FROM sniff_csv('{secret}')",
    "SELECT * FROM glob('{folder}/*')",
    "SELECT * FROM '{secret}'",
    "SELECT * FROM \"{secret}\"",
    "SELECT * FROM 'http://127.0.0.1:1/x.csv'",
    "SELECT * FROM (SUMMARIZE SELECT * FROM read_csv('{secret}'))",
    "SELECT * FROM (DESCRIBE '{secret}')",
    "SELECT 1 LIMIT (SELECT count(*) FROM read_csv('{secret}'))",
    "SELECT 1 ORDER BY (SELECT count(*) FROM read_csv('{secret}'))",
    "SELECT * FROM trades WHERE symbol IN (SELECT content FROM read_text('{secret}'))",
    "SELECT (SELECT content FROM read_text('{secret}'))",
    "SELECT * FROM query('SELECT 1')",
    "SELECT * FROM query_table('trades')",
    "SELECT * FROM json_execute_serialized_sql(json_serialize_sql('SELECT 1'))",
    "SELECT * FROM \"{secret}\", (WITH \"{secret}\" AS (SELECT 1) SELECT 1)",
    "WITH \"{secret}\" AS (SELECT * FROM \"{secret}\") SELECT * FROM \"{secret}\"",
    # writing
    "COPY (SELECT 1) TO '{written}'",
    "COPY trades FROM '{secret}'",
    "EXPORT DATABASE '{written}'",
    "ATTACH '{written}'",
    "CREATE TABLE x AS SELECT 1",
    "INSERT INTO trades SELECT * FROM trades",
    "DELETE FROM trades",
    "DROP VIEW trades",
    # the engine itself
    "INSTALL httpfs",
    "LOAD httpfs",
    "SET memory_limit = '1TB'",
    "RESET ALL",
    "PRAGMA database_list",
    "CALL pragma_version()",
    "SELECT * FROM duckdb_settings()",
    "SELECT * FROM duckdb_secrets()",
    "SELECT getenv('PATH')",
    "SELECT current_setting('memory_limit')",
    "SELECT * FROM sqlite_master",
    "SELECT * FROM information_schema.tables",
    "SELECT * FROM pg_catalog.pg_class",
    "SELECT * FROM system.main.duckdb_settings()",
    "WITH sqlite_master AS (SELECT * FROM sqlite_master) SELECT * FROM sqlite_master",
    "SELECT * FROM duckdb_tables, (WITH duckdb_tables AS (SELECT 1) SELECT 1)",
    "WITH Duckdb_Views AS (SELECT * FROM duckdb_views) SELECT * FROM duckdb_views",
    # several statements, and ways out of the brackets the limit is put around
    "SELECT 1; SELECT 2",
    "SELECT 1; DROP VIEW trades",
    "SELECT 1) LIMIT 5; DROP VIEW trades; SELECT * FROM (SELECT 1",
    "SELECT 1) UNION ALL (SELECT * FROM read_text('{secret}')",
    "",
    ";;;",
    "-- nothing",
    # memory that is not counted, and time that cannot be interrupted
    "SELECT length(repeat('x', 1500000000))",
    "SELECT len(range(3000000000))",
    "SELECT len(generate_series(1, 3000000000))",
    "SELECT length(lpad('x', 1500000000, 'y'))",
    "SELECT length(RPAD('x', 1500000000, 'y'))",
    "SELECT length(printf('%1500000000d', 1))",
    "SELECT length(format('{:>1500000000}', 'x'))",
    "SELECT len(list_resize([1], 1000000000))",
    # shapes no stack is made for
    "SELECT " + "abs(" * 900 + "1" + ")" * 900,
    "SELECT * FROM (" * 400 + "SELECT 1" + ")" * 400,
    "SELECT " + "(" * 20_000 + "1" + ")" * 20_000,
    "SELECT " + "1+" * 40_000 + "1",
    "SELECT " + "[" * 3_000 + "1" + "]" * 3_000,
    "SELECT " + "CASE WHEN 1 THEN " * 500 + "1" + " END" * 500,
    "SELECT '" + "x" * 100_000 + "'",
    "SELECT '\ud800'",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder, with a file beside it that nobody may read."""
    made = tmp_path_factory.mktemp("sql")
    (made / "secret.csv").write_text("swordfish\nswordfish\n")
    return made


@pytest.fixture(scope="module")
def hot(folder: Path) -> Iterator[Hot]:
    """A hot tier with one trade."""
    opened = open_hot(Settings(data=str(folder / "data")), "own")
    opened.write("trades", table("trades", [trade(0)]), "t")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def cold(folder: Path) -> Iterator[Cold]:
    """A cold tier with one trade."""
    opened = open_cold(Settings(data=str(folder / "data"), query=QuerySettings(memory_bytes=256 << 20)))
    opened.append("trades", table("trades", [trade(0)]), start={}, end={"binance": 1})
    yield opened
    opened.close()


def ask(tier: Hot | Cold, query: str) -> str:
    """Return the rows as text, or nothing where it was refused; anything else is a finding."""
    try:
        return str(tier.sql(query, timeout_seconds=3.0, limit=100).to_pylist())
    except (Rejected, TimedOut) as error:
        refusal = str(error)
    assert len(refusal) < 3_000
    refusal.encode()
    return ""


@pytest.mark.parametrize("query", ATTACKS_ON_COLD, ids=[query[:50] for query in ATTACKS_ON_COLD])
def test_attack_on_cold_is_refused_and_leaves_no_trace(cold: Cold, folder: Path, tmp_path: Path, query: str) -> None:
    """No file read or written, no setting or catalogue seen, no memory or stack blown: Rejected, at once."""
    for name, value in (("secret", folder / "secret.csv"), ("folder", folder), ("written", tmp_path / "written")):
        query = query.replace(f"{{{name}}}", str(value))
    began = time.monotonic()
    with pytest.raises(Rejected, match=r"^sql: "):
        cold.sql(query, timeout_seconds=30.0, limit=100)

    assert time.monotonic() - began < 10.0
    assert not (tmp_path / "written").exists()
    assert cold.sql("SELECT count(*) AS n FROM trades", timeout_seconds=10, limit=1).to_pylist() == [{"n": 1}]


@pytest.mark.parametrize(
    "query",
    [
        "WITH t AS (SELECT * FROM trades), u AS (SELECT * FROM t) SELECT count(*) FROM u JOIN t USING (trade_id)",
        "WITH RECURSIVE r AS (SELECT 1 AS a UNION ALL SELECT a + 1 FROM r WHERE a < 3) SELECT * FROM r",
        "SELECT * FROM range(3)",
        "SELECT * FROM generate_series(1, 3)",
        "SELECT unnest([1, 2])",
        "FROM trades SELECT symbol, sum(amount) GROUP BY ALL",
        "SELECT " + "abs(" * 200 + "1" + ")" * 200,
        "SELECT 'DROP TABLE trades; -- read_csv'",
    ],
)
def test_honest_question_is_answered_by_cold(cold: Cold, query: str) -> None:
    """What is refused is not what people need."""
    assert cold.sql(query, timeout_seconds=10, limit=100).num_rows > 0


@pytest.mark.parametrize(
    "query",
    [
        "SELECT " + "abs(" * 499 + "1" + ")" * 499,
        "SELECT " + "abs(" * 900 + "1" + ")" * 900,
        "SELECT " + "(" * 20_000 + "1" + ")" * 20_000,
        "SELECT " + "1+" * 40_000 + "1",
        "SELECT '\ud800'",
        "SELECT 1 AS `\ud800`",
    ],
    ids=["at the limit", "calls", "brackets", "sums", "surrogate", "surrogate as a name"],
)
def test_shape_no_stack_is_made_for_is_refused_by_hot(hot: Hot, query: str) -> None:
    """Refused, or answered, however deep: and the message does not repeat the statement."""
    ask(hot, query)


WORDS = [
    *("SELECT", "FROM", "WHERE", "WITH", "AS", "(", ")", ",", ";", "*", "UNION ALL", "LIMIT", "ORDER BY", "IN", "JOIN"),
    *("trades", "quotes", "k2.trades", "system.one", "system.users", "x", "1", "'a'", "`trades`", "\"trades\"", "\0"),
    *("file('{secret}')", "read_text('{secret}')", "read_csv('{secret}')", "'{secret}'", "\"{secret}\"", "`{secret}`"),
    *("url('http://127.0.0.1:1/')", "s3('http://127.0.0.1:1/x')"),
    *("executable('sh', TSV, 'a String')", "input('a Int8')"),
    *("INTO OUTFILE '{written}'", "COPY", "TO '{written}'", "ATTACH", "INSTALL", "PRAGMA", "SETTINGS readonly = 0"),
    *("FORMAT CSV", "DROP TABLE trades", "EXPLAIN", "DESCRIBE", "SHOW TABLES", "/*", "*/", "--", "\n", "\\", "'", "`"),
    *("sqlite_master", "duckdb_settings()", "information_schema.tables", "SUMMARIZE", "PIVOT"),
    *("VALUES (1)", "{x:String}"),
]  # fmt: skip
statements = st.lists(st.sampled_from(WORDS), min_size=1, max_size=14).map(" ".join) | st.lists(
    st.sampled_from(WORDS), max_size=8
).map(lambda words: " ".join(["SELECT * FROM", *words]))
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("tier", TIERS)
@QUICK
@given(query=statements | st.text(max_size=60))
def test_no_statement_reads_or_writes_a_file(tier: str, query: str, hot: Hot, cold: Cold, folder: Path) -> None:
    """Words of SQL in any order: rows of K2's own or Rejected; the secret is in no answer, and no file appears."""
    written = folder / "written"
    query = query.replace("{secret}", str(folder / "secret.csv")).replace("{written}", str(written))

    assert "swordfish" not in ask(hot if tier == "hot" else cold, query)
    assert not written.exists()


def test_rows_are_still_there(hot: Hot, cold: Cold) -> None:
    """After everything above, whatever its order."""
    assert hot.counts("trades", {}, {"binance": 1}) == 1
    with pytest.raises(K2Error):
        hot.sql("DROP TABLE trades", timeout_seconds=5, limit=1)
    assert cold.sql("SELECT symbol FROM trades", timeout_seconds=10, limit=5).num_rows == 1
