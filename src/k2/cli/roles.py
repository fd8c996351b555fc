"""Commands that run processes: capture, ingest, offload, serve, node, up, simulate."""

from __future__ import annotations

import signal
import sys
import threading
from typing import Any

import click

from k2.cli.common import Context, command, start_logging
from k2.cli.main import root
from k2.settings import Settings


def _stop_event() -> threading.Event:
    """Return an event that Ctrl-C and SIGTERM set."""
    stopping = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.set())
    return stopping


@command(root, "capture")
@click.argument("exchange")
def capture(context: Context, exchange: str) -> None:
    """Capture one EXCHANGE into the log, until Ctrl-C. Nothing else needs to run."""
    from k2.run.capture import run_capture

    run_capture(context.settings(), exchange)


@command(root, "ingest")
@click.option("--drain", is_flag=True, help="Work off what the log holds, then exit.")
@click.option("--rebuild", is_flag=True, help="First empty hot and fill it from cold: after hot was lost or damaged.")
def ingest(context: Context, drain: bool, rebuild: bool) -> None:
    """Turn the log into rows in hot."""
    if rebuild:
        from k2.node import rebuild_hot

        written = rebuild_hot(context.existing())
        click.echo("hot rebuilt from cold: " + ", ".join(f"{n:,} {t}" for t, n in written.items()), err=True)
    _role(context, "ingest", drain)


@command(root, "offload")
@click.option("--drain", is_flag=True, help="Move what hot and log hold, then exit.")
def offload(context: Context, drain: bool) -> None:
    """Move rows from hot, and frames from the log, into Iceberg."""
    _role(context, "offload", drain)


@command(root, "serve")
@click.option("--host", help="Address to listen on.")
@click.option("--port", type=int, help="Port to listen on; 0 takes a free one.")
def serve(context: Context, host: str | None, port: int | None) -> None:
    """Answer queries over REST."""
    _run_node(context.settings(api__host=host, api__port=port), ["serve"])


@command(root, "node", hidden=True)
@click.option("--port", type=int)
def node(context: Context, port: int | None) -> None:
    """Ingest, offload, maintain and serve in one process: what `k2 up` runs beside the captures."""
    _run_node(context.settings(api__port=port), ["ingest", "offload", "serve"])


def _role(context: Context, role: str, drain: bool) -> None:
    from k2 import node

    settings = context.existing()
    if not drain:
        _run_node(settings, [role])
        return
    start_logging(level=30)
    moved = node.drain(settings, role)
    context.show(
        dict(moved), lambda: ", ".join(f"{count:,} {what}" for what, count in moved.items()) or "nothing to do"
    )


def _run_node(settings: Settings, roles: list[str]) -> None:
    from k2.node import Node
    from k2.run.heartbeat import attach

    heartbeat = attach()
    start_logging()
    stopping = _stop_event()
    with Node(settings, roles) as running:
        click.echo(f"{' + '.join(roles)} running on {settings.data_path}" + _at(running.url), err=True)
        running.run_until(stopping, heartbeat)


def _at(url: str | None) -> str:
    return f", REST at {url}/docs" if url else ""


@command(root, "up")
@click.option("--exchange", "exchanges", multiple=True, help="Only these exchanges (repeat).")
@click.option("--port", type=int, help="Port of the REST interface; 0 takes a free one.")
@click.option("--quiet", is_flag=True, help="Keep the processes' messages in <data>/run/*.log only.")
def up(context: Context, exchanges: tuple[str, ...], port: int | None, quiet: bool) -> None:
    """Capture the exchanges and run the node, until Ctrl-C; what dies or hangs is started again."""
    from k2.api.server import check_free
    from k2.run.folder import run_folder
    from k2.run.supervise import hold_data_folder, supervise
    from k2.run.up import check_reachable, children, plan
    from k2.run.upgrade import upgrade

    settings = context.settings(capture__exchanges=list(exchanges) or None, api__port=port)
    start_logging()
    upgrade(settings)
    with hold_data_folder(settings):
        names = plan(settings)
        check_free(settings.api.host, settings.api.port)
        check_reachable(settings, names, lambda text: click.echo(text, err=True))
        sys.exit(supervise(children(settings, names, context.config), run_folder(settings), quiet=quiet))


@command(root, "simulate")
@click.option("--exchange", "exchanges", multiple=True, help="Exchanges to play (repeat). Default: all four.")
@click.option("--symbol", "symbols", multiple=True, help="Canonical symbols (repeat). Default: BTC and ETH.")
@click.option("--rate", type=float, default=50.0, show_default=True, help="Events a second and symbol.")
@click.option("--speed", default="1", show_default=True, help="How much faster than the clock; or max.")
@click.option("--seed", type=int, default=1, show_default=True)
@click.option(
    "--recording", "recordings", multiple=True, type=click.Path(), help="Play this file (with one --exchange)."
)
@click.option("--from-log", is_flag=True, help="Play the log of --data instead.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(0, 65_535), default=8700, show_default=True)
@click.option(
    "--fault", "faults", multiple=True, help="What goes wrong, e.g. 'disconnect every=30'; see docs/simulator.md."
)
@click.option("--for", "for_seconds", type=float, help="Stop after this many seconds.")
def simulate(
    context: Context, exchanges: tuple[str, ...], symbols: tuple[str, ...], speed: str,
    recordings: tuple[str, ...], from_log: bool, **options: Any,
) -> int:  # fmt: skip
    """Play exchanges on loopback: their WebSocket and REST protocols, generated or from recordings."""
    from k2.run.play import frames_of_installation, frames_of_recordings
    from k2.simulator.market import EXCHANGES
    from k2.simulator.server import Options, parse_speed, run

    start_logging(level=30)
    sources = frames_of_recordings(exchanges, recordings)
    if from_log:
        sources = frames_of_installation(context.existing(), exchanges)
    played = exchanges or (tuple(sources) if sources else EXCHANGES)
    chosen = Options(exchanges=played, symbols=symbols, speed=parse_speed(speed), recordings=sources, **options)
    return run(chosen, lambda value: context.show(value, lambda: _simulation_text(value)))


def _simulation_text(value: dict[str, Any]) -> str:
    from k2.cli.text import table

    if "account" in value:
        return "stopped; the account is printed with --json"
    rows = [(name, urls["url"], urls["rest_url"]) for name, urls in value["endpoints"].items()]
    return f"simulator at {value['address']}\n" + table(("exchange", "WebSocket", "REST"), rows)
