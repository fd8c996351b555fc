"""`k2 status` and `k2 tail`: what runs, how far it is, and what comes in right now."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import click

from k2.cli.common import Context, command
from k2.cli.main import root
from k2.cli.text import table
from k2.errors import BadFrame, UnknownName
from k2.feeds import registry
from k2.log import open_log
from k2.log.base import Log
from k2.model import FRAME, LogBatch, Quote, Trade
from k2.query.times import format_ns
from k2.run.folder import data_folder_holder
from k2.settings import Settings
from k2.symbols import canonical


@command(root, "status")
def status(context: Context) -> None:
    """Show what runs, how far every stage is, and what the tiers hold."""
    from k2.client import connect
    from k2.run.telemetry import processes

    settings = context.existing()
    with connect(settings=settings) as client:
        found = {**_log_status(settings), "where": client.where, **client.status()}
        found["symbols"] = [list(listed) for listed in client.symbols()]
    found.setdefault("captures", processes(settings)["captures"])
    holder = data_folder_holder(settings)
    found["running"] = {"pid": holder[0], "role": holder[1]} if holder else None
    context.show(found, lambda: _status_text(found))


def _log_status(settings: Settings) -> dict[str, Any]:
    from k2.run.state import IngestState

    with closing(open_log(settings)) as log, closing(IngestState(settings.data_path / "state.db")) as state:
        progress = state.progress()
        return {
            "data": str(settings.data_path),
            "partitions": {
                p: {"log_start": log.start_offset(p), "log_end": log.end_offset(p), "in_hot": progress.get(p, 0)}
                for p in log.partitions()
            },
        }


def _status_text(found: dict[str, Any]) -> str:
    running = found["running"]
    lines = [
        f"data     {found['data']}",
        f"running  {running['role']}, pid {running['pid']}" if running else "running  nothing",
    ]
    rows = [
        (p, f"{v['log_start']:,}", f"{v['log_end']:,}", f"{v.get('ingested', v['in_hot']):,}", f"{v['in_hot']:,}")
        for p, v in found["partitions"].items()
    ]
    lines += ["", table(("partition", "log from", "log end", "queryable to", "in hot to"), rows, right=range(1, 5))]
    if found["symbols"]:
        lines += ["", table(("exchange", "symbol"), found["symbols"])]
    if found.get("hot"):
        hot = [(name, f"{v['rows']:,}", f"{v['bytes']:,}", v["parts"]) for name, v in found["hot"].items()]
        lines += ["", table(("hot table", "rows", "bytes", "parts"), hot, right=range(1, 4))]
    cold = found.get("cold_watermarks") or {name: v["watermark"] for name, v in found.get("cold", {}).items()}
    offsets = [(name, ", ".join(f"{p} {o:,}" for p, o in sorted(w.items())) or "-") for name, w in cold.items()]
    lines += ["", table(("cold table", "holds everything below offset"), offsets)]
    if found.get("captures"):
        captures = [
            (
                c["exchange"],
                "yes" if c["alive"] else "no",
                _connected(c["connections"]),
                f"{c['appended_frames']:,}",
                c["buffer_frames"],
                _trouble(c),
            )
            for c in found["captures"]
        ]
        header = ("capture", "alive", "connected", "frames", "in buffer", "newest trouble")
        lines += ["", table(header, captures, right=(3, 4))]
    return "\n".join(lines)


def _connected(connections: list[dict[str, Any]]) -> str:
    """Say how many connections bring data, and how many subscriptions the exchange refuses."""
    subscribed = sum(connection["state"] == "subscribed" for connection in connections)
    refused = sum(len(connection["refused"]) for connection in connections)
    return f"{subscribed} of {len(connections)}" + (f", {refused} refused" if refused else "")


def _trouble(capture: dict[str, Any]) -> str:
    """Return why the log or a connection failed last, with what ended the connections so far."""
    ended: dict[str, int] = {}
    for connection in capture["connections"]:
        for reason, count in connection["ended"].items():
            ended[reason] = ended.get(reason, 0) + count
    told = next((c["last_error"] for c in capture["connections"] if c["state"] != "subscribed" and c["last_error"]), "")
    told = capture["last_error"] or told or next((c["last_error"] for c in capture["connections"]), "")
    counts = ", ".join(f"{reason} {count}" for reason, count in sorted(ended.items()))
    return f"{told} (ended: {counts})" if counts else str(told)


@command(root, "tail")
@click.argument("symbol", required=False)
@click.option("--exchange", help="Only this exchange.")
@click.option("--quotes", is_flag=True, help="Show quotes too.")
@click.option("--for", "for_seconds", type=float, help="Stop after this many seconds.")
def tail(context: Context, symbol: str | None, exchange: str | None, quotes: bool, for_seconds: float | None) -> None:
    """Print trades as they reach the log, until Ctrl-C."""
    settings = context.existing()
    wanted = canonical(symbol) if symbol else None
    only = registry.get(exchange).name if exchange else None
    end = None if for_seconds is None else time.monotonic() + for_seconds
    with closing(open_log(settings)) as log:
        for batch in _follow(log, only, end):
            for line, record in _records(batch, wanted, quotes):
                context.show(record, line)


def _follow(log: Log, only: str | None, end: float | None) -> Iterator[LogBatch]:
    """Yield what is appended from now on, woken by the appender."""
    positions = {partition: log.end_offset(partition) for partition in log.partitions()}
    while end is None or time.monotonic() < end:
        for partition in log.partitions():
            batches = log.read(partition, positions.get(partition, 0))
            if batches:
                positions[partition] = batches[-1].end_offset
            if only in (None, partition):
                yield from batches
        log.wait(positions, 1.0 if end is None else max(0.0, min(1.0, end - time.monotonic())))


def _records(batch: LogBatch, wanted: str | None, quotes: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    exchange = registry.get(batch.partition)
    for frame in batch.frames:
        if frame.kind != FRAME:
            continue
        try:
            parsed = exchange.parse(frame)
        except (BadFrame, UnknownName) as error:
            yield f"{batch.partition}: cannot be parsed: {error}", {"exchange": batch.partition, "error": str(error)}
            continue
        shown: Sequence[Trade | Quote] = [*parsed.trades, *(parsed.quotes if quotes else [])]
        for record in shown:
            if wanted in (None, record.symbol):
                fields = {name: getattr(record, name) for name in record.__struct_fields__}
                yield _line(batch.partition, frame.received_ns, record), {"exchange": batch.partition, **fields}


def _line(exchange: str, received_ns: int, record: Trade | Quote) -> str:
    head = f"{format_ns(received_ns)[11:26]}  {exchange:<13} {record.symbol:<14}"
    if isinstance(record, Trade):
        return f"{head} {record.side:<4} {record.price:>16} x {record.amount:<16} #{record.trade_id}"
    bid, ask = f"{record.bid_price} x {record.bid_amount}", f"{record.ask_price} x {record.ask_amount}"
    return f"{head} bid {bid:<28} ask {ask}"
