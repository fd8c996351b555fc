"""`k2 demo`: the whole platform on simulated exchanges, offline, with checks at the end."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import click
import pyarrow as pa

from k2.cli.common import Context, command, start_logging
from k2.cli.main import root
from k2.cli.text import table
from k2.client import connect
from k2.errors import Misconfigured, StoreDown
from k2.query.times import format_ns
from k2.run.folder import hold_data_folder, run_folder
from k2.run.reconcile import Check, reconcile
from k2.run.supervise import Supervisor
from k2.run.up import children
from k2.settings import Settings, load
from k2.simulator.server import DEFAULT_SYMBOLS, Simulator

DEFAULT_FOLDER = "k2-demo"
MARKER = ".k2-demo"
_START_SECONDS = 60.0
_SETTLE_SECONDS = 15.0
_SHOW_SECONDS = 5.0
_ANSWER_SECONDS = 10.0

Say = Callable[[str], None]


@command(root, "demo")
@click.option(
    "--for", "for_seconds", type=click.FloatRange(min=0), default=30.0, show_default=True, help="How long, in seconds."
)
@click.option("--rate", type=float, default=50.0, show_default=True, help="Events a second and symbol.")
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--port", type=int, default=0, help="Port of the REST interface. Default: a free one.")
def demo(context: Context, for_seconds: float, rate: float, seed: int, port: int) -> None:
    """Run everything offline on simulated exchanges, then compare what was stored with their own account.

    Starts from an empty folder (k2-demo) each time. Ends with exit code 0 only if every check holds.
    """
    start_logging(logging.ERROR)
    say: Say = (lambda _: None) if context.as_json else click.echo
    folder = fresh_folder(Path(context.data or DEFAULT_FOLDER))
    account, code = asyncio.run(_run(folder, for_seconds, rate, seed, port, say))
    checks = [Check("orderly end", code == 0, f"exit code {code}"), *compare(folder, account)]
    passed = all(check.passed for check in checks)
    context.show(
        {"passed": passed, "checks": [{"name": c.name, "passed": c.passed, "detail": c.detail} for c in checks]},
        lambda: _checks_text(checks, folder),
    )
    sys.exit(0 if passed else 1)


def fresh_folder(folder: Path) -> Path:
    """Empty the folder of an earlier demo, or make it; raises Misconfigured if it holds anything else."""
    folder = folder.expanduser().absolute()
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / MARKER).is_file():
            raise Misconfigured(f"demo: {folder} holds something that is not of a demo: choose another --data")
        with hold_data_folder(load({"data": str(folder)}, environment={})):
            for entry in folder.iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry)
                elif entry.name != MARKER:
                    entry.unlink()
    run_folder(load({"data": str(folder)}, environment={}))  # makes both, or says why it cannot
    (folder / MARKER).touch()
    return folder


def _write_settings(folder: Path, simulator: Simulator, port: int) -> Settings:
    """Write the demo's k2.toml, so that every other command finds the installation as it ran."""
    lines = ["# Written by `k2 demo`", "[capture]", f"exchanges = {json.dumps(list(DEFAULT_SYMBOLS))}"]
    lines += ["[hot]", "flush_seconds = 1.0", "[cold]", "commit_seconds = 5.0", "[api]", f"port = {port}"]
    for exchange, urls in simulator.endpoints().items():
        lines += [f"[exchanges.{exchange}]", f"symbols = {json.dumps(list(DEFAULT_SYMBOLS[exchange]))}"]
        lines += [f'{key} = "{value}"' for key, value in urls.items()]
    path = folder / "k2.toml"
    path.write_text("\n".join(lines) + "\n")
    return load({"data": str(folder)}, environment={}, file=path)


async def _run(folder: Path, seconds: float, rate: float, seed: int, port: int, say: Say) -> tuple[dict[str, Any], int]:
    async with Simulator(exchanges=tuple(DEFAULT_SYMBOLS), symbols=DEFAULT_SYMBOLS, seed=seed, rate=rate) as simulator:
        settings = _write_settings(folder, simulator, port)
        say(f"Simulated exchanges at {simulator.address}: {', '.join(DEFAULT_SYMBOLS)}")
        with hold_data_folder(settings, "k2 demo"):
            supervisor = Supervisor(children(settings, list(DEFAULT_SYMBOLS), None), run_folder(settings))
            running = asyncio.create_task(supervisor.run())
            try:
                await _present(settings, seconds, say, running)
                await simulator.close_markets(_SETTLE_SECONDS)
            finally:
                supervisor.stop()
                code = await running
        return simulator.account().describe(), code


async def _present(settings: Settings, seconds: float, say: Say, running: asyncio.Task[int]) -> None:
    """Show live candles until the time is up or the processes have ended."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_ANSWER_SECONDS)) as session:
        url = await _node_url(settings, running)
        say(f"K2 is up: REST at {url}/docs\n")
        end = time.monotonic() + seconds
        while not running.done() and (left := end - time.monotonic()) > 0:
            await asyncio.wait({running}, timeout=min(_SHOW_SECONDS, left))
            say(await _candles_text(session, url))


async def _node_url(settings: Settings, running: asyncio.Task[int]) -> str:
    path = run_folder(settings) / "node.json"
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and not running.done():
        if path.exists():
            return str(json.loads(path.read_text())["url"])
        await asyncio.sleep(0.1)
    raise StoreDown(f"demo: the node did not start; see {run_folder(settings)}/node.log")


async def _candles_text(session: aiohttp.ClientSession, url: str) -> str:
    shown = []
    for exchange, symbols in DEFAULT_SYMBOLS.items():
        query = {"symbol": symbols[0], "exchange": exchange, "limit": "1"}
        async with session.get(f"{url}/v1/candles/1m", params=query) as response:
            if response.status != 200:  # no trade yet
                continue
            for row in (await response.json())["data"]:
                shown.append(
                    (
                        exchange, row["symbol"], format_ns(int(row["start_ns"]))[11:16], row["open"], row["high"],
                        row["low"], row["close"], row["volume"], row["trade_count"],
                    )
                )  # fmt: skip
    headings = ("exchange", "symbol", "minute", "open", "high", "low", "close", "volume", "trades")
    return f"{format_ns(time.time_ns())[11:19]} UTC, 1m candles\n{table(headings, shown, right=range(3, 9))}\n"


def compare(folder: Path, account: dict[str, Any]) -> list[Check]:
    """Compare the stopped installation in `folder` with the account of the simulator."""
    settings = load({"data": str(folder)}, environment={}, file=folder / "k2.toml")
    with connect(settings=settings) as client:

        def rows(exchange: str, symbol: str, tier: str) -> pa.Table:
            return client.trades(symbol, exchange=exchange, tier=tier, limit=0).arrow()

        def candles(exchange: str, symbol: str, timeframe: str, kind: str) -> pa.Table:
            return client.candles(symbol, timeframe, exchange=exchange, kind=kind, limit=0).arrow()

        return reconcile(account, rows, candles)


def _checks_text(checks: list[Check], folder: Path) -> str:
    failed = [check for check in checks if not check.passed]
    lines = ["What K2 stored, against the simulator's own account:", ""]
    shown = failed or [check for check in checks if check.name.endswith((", all", "candles 1m", "end"))]
    lines.append(table(("", "check", "found"), [("ok" if c.passed else "FAILED", c.name, c.detail) for c in shown]))
    lines += [
        "",
        f"{len(checks) - len(failed)} of {len(checks)} checks hold: hot, cold and their union, six timeframes.",
    ]
    lines.append(f"The data is in {folder}; try: k2 query trades BTC-USDT --data {folder}")
    return "\n".join(lines)
