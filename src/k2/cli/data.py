"""Commands about data: import, query, candles, snapshots, sql, maintain."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from k2.cli.common import Context, command
from k2.cli.main import root
from k2.schema import TIMEFRAMES

if TYPE_CHECKING:
    from k2.query.result import Result

FORMATS = ("table", "csv", "json", "ndjson", "parquet", "arrow")


def _query_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options `k2 query` and `k2 candles` share."""
    for option in reversed(
        (
            click.option("--exchange", help="Only this exchange."),
            click.option(
                "--start", help="First moment, inclusive: ISO 8601 (UTC), nanoseconds, or relative such as -1h."
            ),
            click.option("--end", help="Last moment, exclusive; as --start."),
            click.option("--tier", type=click.Choice(["all", "hot", "cold"]), default="all", show_default=True),
            click.option("--as-of", help="A snapshot id (see `k2 snapshots`), or a moment: what was known then."),
            click.option(
                "--limit",
                type=click.IntRange(min=0),
                help="Most rows: the first with --start, else the newest. 0 = all.",
            ),
            click.option("--format", "fmt", type=click.Choice(FORMATS), help="Default: table, or by the ending of -o."),
            click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="File to write."),
        )
    ):
        function = option(function)
    return function


def _write(context: Context, result: Result, fmt: str | None, output: Path | None) -> None:
    from k2.query.output import write

    if result.note:
        click.echo(f"note: {result.note}", err=True)

    ending = output.suffix.removeprefix(".") if output else ""
    if output is not None and not fmt and ending not in FORMATS:
        raise click.UsageError(f"-o {output}: its ending is none of {', '.join(FORMATS[1:])}: name the --format")
    chosen = fmt or ("json" if context.as_json else ending if ending in FORMATS else "table")
    write(result.arrow(), chosen, output)


@command(root, "query")
@click.argument("table", type=click.Choice(["trades", "quotes", "gaps", "dead_letters", "frames"]))
@click.argument("symbol", required=False)
@_query_options
def query(
    context: Context, table: str, symbol: str | None, fmt: str | None, output: Path | None, **options: Any
) -> None:
    """Ask for rows of TABLE, of one SYMBOL in any spelling: BTC-USDT, btcusdt, XBT/USD, BTC/USDT:USDT.

    Rows come from cold, hot and the memory tail as one, in time order: trades by exchange time, all
    else by receive time.
    """
    from k2.client import connect

    if symbol is None and table in ("trades", "quotes"):
        raise click.UsageError(f"which symbol? k2 query {table} SYMBOL, e.g. BTC-USDT (known ones: k2 status)")
    with connect(settings=context.existing()) as client:
        result = client.rows(table, symbol, **options)
    _write(context, result, fmt, output)


@command(root, "candles")
@click.argument("symbol")
@click.argument("timeframe", type=click.Choice(list(TIMEFRAMES)))
@click.option("--kind", type=click.Choice(["auto", "trade", "aggregate"]), default="auto", show_default=True)
@_query_options
def candles(
    context: Context, symbol: str, timeframe: str, fmt: str | None, output: Path | None, **options: Any
) -> None:
    """Ask for candles of SYMBOL; --start and --end are about the start of a candle."""
    from k2.client import connect

    with connect(settings=context.existing()) as client:
        result = client.candles(symbol, timeframe, **options)
    _write(context, result, fmt, output)


@command(root, "snapshots")
@click.option("--table", "table", help="Only this table.")
def snapshots(context: Context, table: str | None) -> None:
    """List the commits of the cold tables: what `--as-of` takes."""
    from k2.cli.text import snapshots_text
    from k2.client import connect

    with connect(settings=context.existing()) as client:
        found = client.snapshots(table)
    context.show(found, lambda: snapshots_text(found))


@command(root, "sql")
@click.argument("statement")
@click.option("--tier", type=click.Choice(["hot", "cold"]), default="hot", show_default=True)
@click.option("--limit", type=click.IntRange(min=0), help="Most rows; 0 = all.")
@click.option("--format", "fmt", type=click.Choice(FORMATS))
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path))
def sql(context: Context, statement: str, tier: str, limit: int | None, fmt: str | None, output: Path | None) -> None:
    """Run one read-only SELECT: ClickHouse's SQL on hot, DuckDB's on cold. No file or network functions."""
    from k2.client import connect

    with connect(settings=context.existing()) as client:
        result = client.sql(statement, tier=tier, limit=limit)
    _write(context, result, fmt, output)


@command(root, "maintain")
def maintain(context: Context) -> None:
    """Compact small files of cold, expire old snapshots, remove orphans. Safe at any time, also twice."""
    from k2.cli.text import maintenance_text
    from k2.cold import open_cold
    from k2.run.upgrade import upgrade

    settings = context.existing()
    upgrade(settings)
    cold = open_cold(settings)
    try:
        done = cold.maintain(now_ns=time.time_ns())
    finally:
        cold.close()
    context.show([vars(one) for one in done], lambda: maintenance_text(done))


@command(root, "import")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--exchange", required=True, help="Whose messages they are: binance, binance-usdm, kraken, coinbase...")
@click.option(
    "--format",
    "fmt",
    type=click.Choice(["auto", "hftbacktest", "cryptofeed", "jsonl"]),
    default="auto",
    show_default=True,
    help="hftbacktest: '<receive time> <message>' a line; cryptofeed: its captures; jsonl: a message a line.",
)
def import_(context: Context, files: tuple[Path, ...], exchange: str, fmt: str) -> None:
    """Append recordings others made, or REST trade answers, to the log, with their own receive times.

    A file that is in the log already adds nothing. `k2 ingest --drain` (or a running `k2 up`) turns
    the frames into rows.
    """
    from k2.cli.text import imports_text
    from k2.log import open_log
    from k2.run.folder import run_folder
    from k2.run.importer import import_files
    from k2.run.upgrade import upgrade

    settings = context.settings()
    upgrade(settings)
    run_folder(settings)  # a place that can never be used is told as such, not as a log that is down
    log = open_log(settings)
    try:
        results = import_files(log, list(files), exchange, fmt)
    finally:
        log.close()
    context.show([_plain(result) for result in results], lambda: imports_text(results))


def _plain(record: Any) -> dict[str, Any]:
    names = getattr(record, "__struct_fields__", None) or vars(record)
    return {name: getattr(record, name) for name in names}
