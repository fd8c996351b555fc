"""What a folder answers, in the words in which the first release's answers were kept."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa

import k2
from k2.cold import open_cold
from k2.run.state import IngestState
from k2.settings import Settings, load

TIERS = {"frames": ("cold",)}
SYMBOLS = {"binance": "BTC-USDT", "binance-usdm": "BTC-USDT-PERP", "kraken": "BTC-USD", "coinbase": "BTC-USD"}
TABLES = ("trades", "quotes", "gaps", "dead_letters", "frames")


def settings_of(folder: Path) -> Settings:
    return load({"data": str(folder)}, environment={})


def answers(folder: Path, said: dict[str, Any], candles: Collection[str] | None = None) -> dict[str, Any]:
    """Ask a folder everything the first release was asked, or only these candles."""
    settings = settings_of(folder)
    found: dict[str, Any] = {"tables": {}, "candles": {}}
    with k2.connect(settings=settings) as client:
        for table in TABLES:
            tiers = TIERS.get(table, ("all", "hot", "cold"))
            rows = {t: client.rows(table, tier=t, limit=0).arrow() for t in tiers}
            found["tables"][table] = {t: rows_said(r) for t, r in rows.items()}
        for name in candles or said["candles"]:
            exchange, timeframe = name.split()
            made = client.candles(SYMBOLS[exchange], timeframe, exchange=exchange, limit=0).arrow()
            found["candles"][name] = [" ".join(str(row[n]) for n in sorted(row)) for row in made.to_pylist()]
        found["symbols"] = [list(pair) for pair in client.symbols()]
    with closing(open_cold(settings)) as cold, closing(IngestState(folder / "state.db")) as state:
        found["snapshots"] = {t: len(cold.snapshots(t)) for t in said["snapshots"]}
        found["watermarks"] = {t: dict(cold.pin(t).watermark) for t in said["watermarks"]}
        found["progress"] = state.progress()
    return found


def rows_said(rows: pa.Table) -> dict[str, Any]:
    """Return the number of rows and the exact sums of their numbers."""
    sums = {
        field.name: str(sum(rows[field.name].to_pylist()))
        for field in rows.schema
        if field.type == pa.int64() or str(field.type).startswith("decimal")
    }
    return {"rows": rows.num_rows, "sums": sums}


def command(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command of this version on a folder."""
    line = [sys.executable, "-m", "k2.cli", *arguments, "--data", str(folder)]
    return subprocess.run(
        line, env={**os.environ, **environment}, capture_output=True, text=True, timeout=110, check=False
    )
