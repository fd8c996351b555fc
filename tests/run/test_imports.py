"""What a process loads when it starts: each library takes a share of the time until it answers."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {
    "aiohttp", "fastapi", "pandas", "polars", "pyarrow.dataset", "pydantic", "pyiceberg", "rich", "sqlalchemy",
}  # fmt: skip
ENGINES = {"chdb", "clickhouse_connect", "duckdb", "starlette", "uvicorn"}
NODE = (
    "k2.node, k2.hot.owner, k2.hot.server, k2.cold.iceberg, k2.query.engine, k2.run.telemetry, k2.api.app,"
    " k2.api.server, k2.run.offload"
)

_AS_THE_COMMAND_LINE = "import k2.cli.common; k2.cli.common._spare_pandas()"  # else Arrow looks for it by itself


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [(NODE, HEAVY), ("k2", HEAVY | {"chdb", "clickhouse_connect", "duckdb", "starlette", "uvicorn"})],
)
def test_no_library_is_loaded_that_is_not_needed_to_answer(modules: str, heavy: set[str]) -> None:
    """A node needs no exchange's connection, no writer of Iceberg, no data frames; a client no engine either."""
    program = f"{_AS_THE_COMMAND_LINE}; import sys, {modules}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)

    assert heavy & set(loaded.stdout.split()) == set()
