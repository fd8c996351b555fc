"""The recordings after the whole pipeline, by K2's own commands, and the answers to every question about them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from installation import Installation
from plain_reader import FILES

FIRST_ROUND = {
    "binance/spot_ws/btcusdt_20240808.gz",
    "binance/spot_ws/capture_20210404.txt.gz",
    "binance/usdm_ws/btcusdt_20240718.gz",
    "binance/usdm_ws/ethusdt_20240718.gz",
    "kraken/ws_v1/capture_20210417.jsonl.gz",
    "coinbase/advanced_ws/capture_20260809_part1.jsonl.gz",
}
TIERS = ("hot", "cold", "all")
CANDLES = {  # name -> what is asked for
    "spot": ("BTC-USDT", "5m", "binance", "trade"),
    "usdm": ("BTC-USDT-PERP", "1m", "binance-usdm", "trade"),
    "kraken": ("BTC-USDT", "1m", "kraken", "trade"),
    "xrpeth": ("XRP-ETH", "1m", "binance", "aggregate"),
}


@dataclass(frozen=True)
class Proof:
    """All recordings after import, ingest and offload in two rounds, and the answers to every question."""

    folder: Path
    installation: Installation

    def rows(self, name: str) -> pa.Table:
        """Return a kept answer."""
        with pa.ipc.open_stream(self.folder / "answers" / f"{name}.arrow") as reader:
            return reader.read_all()

    def told(self, name: str) -> Any:
        """Return what a command printed with --json."""
        return json.loads((self.folder / "answers" / f"{name}.json").read_text())


class Making:
    """Runs the pipeline over all recordings and keeps every answer."""

    def __init__(self, proof: Proof, recordings: Path) -> None:
        self.proof, self.recordings = proof, recordings
        self.k2 = proof.installation.k2

    def run(self) -> None:
        """Import in two rounds, then everything again, then ask."""
        for number in (1, 2):
            imported = self._import(number, lambda file, n=number: (file in FIRST_ROUND) == (n == 1))
            self._keep(f"import_{number}", imported)
            self._keep(f"ingest_{number}", self.k2("ingest", "--drain", "--json").json())
            self._keep(f"offload_{number}", self.k2("offload", "--drain", "--json").json())
        self._keep("import_again", self._import(3, lambda _: True))
        self._keep("ingest_again", self.k2("ingest", "--drain", "--json").json())
        self._keep("offload_again", self.k2("offload", "--drain", "--json").json())
        self._keep("snapshots", self.k2("snapshots", "--table", "trades", "--json").json())
        self._ask_by_command()
        self._ask_by_client()

    def _import(self, number: int, chosen: Callable[[str], bool]) -> list[Any]:
        done = []
        for exchange, files in FILES.items():
            paths = [self.recordings / file for file in files if chosen(file)]
            done += self.k2("import", *paths, "--exchange", exchange, "--json").json()
        return done

    def _ask_by_command(self) -> None:
        answers = self.proof.folder / "answers"
        query = self.proof.installation.query
        asked = [("BTC-USDT", tier) for tier in TIERS] + [("BTC-USDT-PERP", "all"), ("BTC-USD", "all")]
        for symbol, tier in asked:
            query(answers / f"command_{symbol}_{tier}.arrow", "query", "trades", symbol, "--tier", tier, "--limit", 0)
        as_of = ("--as-of", self._trades_snapshot(1))
        query(answers / "command_as_of.arrow", "query", "trades", "BTC-USDT", "--limit", 0, *as_of)
        for tier in ("hot", "cold"):
            asked_for = ("candles", "BTC-USDT", "5m", "--exchange", "binance", "--tier", tier, "--limit", 0)
            query(answers / f"command_candles_{tier}.arrow", *asked_for)

    def _trades_snapshot(self, number: int) -> int:
        first, last = self.proof.told("snapshots")  # each round made one commit
        return int((first if number == 1 else last)["snapshot_id"])

    def _ask_by_client(self) -> None:
        first, last = self._trades_snapshot(1), self._trades_snapshot(2)
        with self.proof.installation.client() as client:
            self._keep("symbols", client.symbols())
            counted = "SELECT exchange, kind, source, count(*) AS frames FROM frames GROUP BY ALL"
            self._keep("frames", client.sql(counted, tier="cold").arrow().to_pylist())
            for tier in TIERS:
                for table in ("trades", "quotes", "gaps", "dead_letters"):
                    self._write(f"{table}_{tier}", client.rows(table, tier=tier, limit=0).arrow())
            self._write("trades_first", client.trades(as_of=first, limit=0).arrow())
            self._write("trades_last", client.trades(as_of=last, limit=0).arrow())
            for name, (symbol, timeframe, exchange, kind) in CANDLES.items():
                for how, options in (
                    *((tier, {"tier": tier}) for tier in TIERS),
                    ("first", {"as_of": first}),
                    ("last", {"as_of": last}),
                ):
                    found = client.candles(symbol, timeframe, exchange=exchange, kind=kind, limit=0, **options)
                    self._write(f"candles_{name}_{how}", found.arrow())

    def _keep(self, name: str, value: Any) -> None:
        (self.proof.folder / "answers" / f"{name}.json").write_text(json.dumps(value))

    def _write(self, name: str, rows: pa.Table) -> None:
        path = str(self.proof.folder / "answers" / f"{name}.arrow")
        with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, rows.schema) as writer:
            writer.write_table(rows)
