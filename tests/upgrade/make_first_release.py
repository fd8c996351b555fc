"""Make the data folder of a release, and what it answered: run it with the Python of that release.

    git worktree add /tmp/k2-first c68e032 && make -C /tmp/k2-first .venv/.ready
    /tmp/k2-first/.venv/bin/python tests/upgrade/make_first_release.py /tmp/k2-first-release tests/upgrade

Writes `first-release.tar.xz` (the data folder, made at the first path) and `first-release.json` (the answers).
Everything in it comes from the simulator.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import k2
from k2.cold import open_cold
from k2.hot import OWN, open_hot
from k2.run.state import IngestState
from k2.settings import load
from k2.simulator.faults import parse_fault
from k2.simulator.server import Simulator

SYMBOLS = {
    "binance": ("BTC-USDT",),
    "binance-usdm": ("BTC-USDT-PERP",),
    "kraken": ("BTC-USD",),
    "coinbase": ("BTC-USD",),
}
FAULTS = ("drop:every=40", "malformed:every=60", "repeat:every=30", "unknown-type:every=90")
SETTINGS = """
[capture]
exchanges = ["binance", "binance-usdm", "kraken", "coinbase"]
[log]
segment_bytes = 36000
[hot]
flush_seconds = 2.0
[cold]
commit_seconds = 3.0
[api]
port = 0
"""
ROUNDS = 3
TABLES = ("trades", "quotes", "gaps", "dead_letters", "frames")
NOT_NEEDED = ("preprocessed_configs", "tmp", "user_files", "format_schemas", "run")


async def run(folder: Path) -> None:
    """Let the release work on the simulator's markets, which trade some minutes an hour ago."""
    async with Simulator(
        exchanges=tuple(SYMBOLS),
        symbols=SYMBOLS,
        seed=7,
        rate=0.1,
        speed=60.0,
        start_ns=time.time_ns() - 3600 * 10**9,
        faults=[parse_fault(f) for f in FAULTS],
    ) as simulator:
        text = SETTINGS
        for exchange, urls in simulator.endpoints().items():
            text += f"[exchanges.{exchange}]\nsymbols = {json.dumps(list(SYMBOLS[exchange]))}\n"
            text += "".join(f'{key} = "{value}"\n' for key, value in urls.items())
        (folder / "k2.toml").write_text(text)
        for _ in range(ROUNDS):
            await captured(folder)
            await command(folder, "ingest", "--drain")
            await command(folder, "offload", "--drain")
        await captured(folder)  # for hot alone
        await command(folder, "ingest", "--drain")
        await captured(folder)  # for the log alone
    (folder / "k2.toml").write_text(SETTINGS)


async def captured(folder: Path) -> None:
    """Capture all exchanges until each has logged something, and a little longer."""
    before = {e: size(folder / "log" / e) for e in SYMBOLS}
    running = [await start(folder, "capture", exchange) for exchange in SYMBOLS]
    deadline = time.monotonic() + 60
    while any(size(folder / "log" / e) <= before[e] for e in SYMBOLS) and time.monotonic() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(0.2)
    await asyncio.sleep(3)
    for process in running:
        process.send_signal(signal.SIGINT)
    assert [await process.wait() for process in running] == [0] * len(running)


def size(folder: Path) -> int:
    """Return the bytes in a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.db*")) if folder.is_dir() else 0


async def command(folder: Path, *arguments: str) -> None:
    """Run one command of the release to its end."""
    assert await (await start(folder, *arguments)).wait() == 0


async def start(folder: Path, *arguments: str) -> asyncio.subprocess.Process:
    """Start one command of the release."""
    line = [sys.executable, "-m", "k2.cli", *arguments, "--data", str(folder)]
    return await asyncio.create_subprocess_exec(*line, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def answers(folder: Path) -> dict[str, object]:
    """Return what the release says about everything it holds."""
    settings = load({"data": str(folder)}, environment={})
    said: dict[str, object] = {"tables": {}, "candles": {}}
    with k2.connect(settings=settings) as client:
        for table in TABLES:
            tiers = ("cold",) if table == "frames" else ("all", "hot", "cold")
            rows = {t: client.rows(table, tier=t, limit=0).arrow() for t in tiers}
            said["tables"][table] = {t: rows_said(r) for t, r in rows.items()}
        for exchange, (symbol,) in SYMBOLS.items():
            for timeframe in ("1m", "5m", "1h", "1d"):
                made = client.candles(symbol, timeframe, exchange=exchange, limit=0).arrow()
                said["candles"][f"{exchange} {timeframe}"] = [
                    " ".join(str(row[name]) for name in sorted(row)) for row in made.to_pylist()
                ]
        said["symbols"] = [list(pair) for pair in client.symbols()]
    cold = open_cold(settings)
    said["snapshots"] = {t: len(cold.snapshots(t)) for t in (*TABLES, "candles")}
    said["watermarks"] = {t: dict(cold.pin(t).watermark) for t in (*TABLES, "candles")}
    cold.close()
    state = IngestState(folder / "state.db")
    said["progress"] = state.progress()
    state.close()
    return said


def rows_said(rows: object) -> dict[str, object]:
    """Return count, bounds and exact sums of the numeric columns of some rows."""
    sums = {}
    for field in rows.schema:
        if field.type in (rows.schema.field("log_offset").type,) or str(field.type).startswith("decimal"):
            sums[field.name] = str(sum(value for value in rows[field.name].to_pylist()))
    return {"rows": rows.num_rows, "sums": sums}


def merged_parts(folder: Path) -> set[str]:
    """Return the folders of hot's parts that were merged into others; a later start would remove them."""
    hot = open_hot(load({"data": str(folder)}, environment={}), OWN)
    rows = hot.engine.query("SELECT path FROM system.parts WHERE NOT active")
    hot.close()
    return {str(Path(path).relative_to(folder)) for path in rows["path"].to_pylist() if Path(path).is_dir()}


def pack(folder: Path, to: Path) -> None:
    """Put the folder into an archive, without what the next start removes or makes anew."""
    merged = merged_parts(folder)

    def needed(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        parts = Path(entry.name).parts
        left_out = entry.name in merged or any(p in NOT_NEEDED for p in parts[:3])
        return None if left_out or entry.name.endswith(("-shm", ".lock")) else entry

    with tarfile.open(to, "w:xz", preset=9) as archive:
        for child in sorted(folder.iterdir()):
            archive.add(child, arcname=child.name, filter=needed)


def main() -> None:
    """Make folder, archive and answers."""
    folder, to = Path(sys.argv[1]), Path(sys.argv[2])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    asyncio.run(run(folder))
    said = answers(folder)
    said["made_at"] = str(folder)
    said["made"] = time.strftime("%Y-%m-%d", time.gmtime())
    pack(folder, to / "first-release.tar.xz")
    (to / "first-release.json").write_text(json.dumps(said, indent=1, sort_keys=True) + "\n")
    sys.stdout.write(f"{said['snapshots']}\n")


main()
