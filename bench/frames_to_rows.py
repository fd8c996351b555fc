"""How many trades and quotes a second does one core make exact, normalised rows of, from frames as received?

Recorded frames, each contender bound to the same core, in turns; the seconds are the processor's, so that whatever else
the machine does counts less. Every contender gets the same bytes and must make the same number of rows. K2 does what
its ingest does: parse, validate, account ids, find repeats, make Arrow tables with exact decimals. cryptofeed calls an
empty callback with its objects (exact decimals); tardis-dev gives the objects of its normalised stream (binary floats),
and, beside it, those of its mappers alone; ccxt parses into its dictionaries (binary floats). The peers neither
validate nor find repeats or gaps.

Where peers read different dialects of an exchange, each is a figure of its own. Short recordings are prolonged: the
same frames again with their ids (where there are none: times) counted on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import inputs
from harness import Figure, Measured, Process, Run, main, times
from k2.feeds import recordings, registry
from k2.feeds.base import QUOTES, TRADES
from k2.model import FRAME

_CRYPTOFEED, _TARDIS, _CCXT = times(5, "cryptofeed"), times(2, "tardis-dev"), times(20, "ccxt")

_WHY = (
    "Profile: a third of the time finds values (quotes, the bytes between values), a third reads numbers, names and "
    "times, a fifth touches the frames as Python objects (four attributes each), the rest accounts ids and builds "
    "tables. All of it is NumPy over whole runs: 60 to 100 passes over arrays of a run. It would take one compiled "
    "pass over the bytes."
)

FIGURES = {
    "binance_trades": Figure("rows/s", bars=(_TARDIS, _CCXT), why=_WHY, what="spot `trade`"),
    "binance_aggregates": Figure("rows/s", bars=(_CRYPTOFEED, _CCXT), why=_WHY, what="spot `aggTrade`"),
    "binance_quotes": Figure("rows/s", bars=(_CRYPTOFEED, _TARDIS, _CCXT), why=_WHY, what="spot `bookTicker`"),
    "binance_futures_quotes": Figure("rows/s", bars=(_CRYPTOFEED, _TARDIS, _CCXT), why=_WHY, what="USD-M `bookTicker`"),
    "kraken_v1_trades": Figure("rows/s", bars=(_CRYPTOFEED, _TARDIS), why=_WHY),
    "kraken_v2_trades": Figure("rows/s", bars=(_CCXT,), why=_WHY),
    "coinbase_trades": Figure("rows/s", bars=(_CRYPTOFEED, _CCXT), why=_WHY, what="Advanced Trade `market_trades`"),
    "coinbase_matches": Figure("rows/s", bars=(_TARDIS,), why=_WHY, what="Exchange `match`"),
    "parse_only": Figure("rows/s", what="spot `trade`, K2's records without accounting and Arrow"),
}

_PEERS = {"cryptofeed": "frames_cryptofeed.py", "tardis-dev": "frames_tardis.mjs", "ccxt": "frames_ccxt.py"}
_ENVIRONMENTS = {"cryptofeed": "cryptofeed", "tardis-dev": "tardis", "ccxt": "ccxt"}
_ROWS = 20_000


@dataclass(frozen=True)
class Set:
    """Frames of one kind: where they are recorded, how to tell them, and the numbers to count on.

    `numbers` are patterns of two groups, what stands before and the number; numbers are counted on by the range they
    have among the frames with the same `key`.
    """

    exchange: str
    files: tuple[str, ...]
    has: bytes
    lacks: bytes = b"\0"
    numbers: tuple[bytes, ...] = ()
    key: bytes = rb"()"


_SPOT = ("binance/spot_ws/btcusdt_20240808.gz", "binance/spot_ws/btcusdt_20240809.gz")
_IDS = rb'("trade_id":"?)([0-9]+)'
SETS = {
    "binance_trades": Set("binance", _SPOT, b'"e":"trade"', numbers=(rb'("t":)([0-9]+)',)),
    "binance_aggregates": Set(
        "binance",
        ("binance/spot_ws/capture_20210404.txt.gz",),
        b'"e":"aggTrade"',
        numbers=(rb'("a":)([0-9]+)', rb'("[fl]":)([0-9]+)'),
        key=rb'"s":"([A-Z]+)"',
    ),
    "binance_quotes": Set("binance", _SPOT, b"@bookTicker", numbers=(rb'("u":)([0-9]+)',)),
    "binance_futures_quotes": Set(
        "binance-usdm", ("binance/usdm_ws/btcusdt_20240719.gz",), b"@bookTicker", numbers=(rb'("u":)([0-9]+)',)
    ),
    "kraken_v1_trades": Set(
        "kraken",
        ("kraken/ws_v1/capture_20210417.jsonl.gz",),
        b',"trade","',
        numbers=(rb'(")([0-9]{10})(?=[.][0-9]{6}")',),
    ),
    "kraken_v2_trades": Set(
        "kraken", ("kraken/ws_v2/trades_20260926.jsonl",), b'"trade_id"', numbers=(_IDS,), key=rb'"symbol":"([^"]+)"'
    ),
    "coinbase_trades": Set(
        "coinbase",
        ("coinbase/advanced_ws/capture_20260809_part1.jsonl.gz",),
        b'"market_trades"',
        lacks=b'"type":"snapshot"',
        numbers=(_IDS,),
        key=rb'"product_id":"([^"]+)"',
    ),
    "coinbase_matches": Set(
        "coinbase",
        ("coinbase/exchange_ws/capture_20210417_part1.txt.gz",),
        b'"type":"match"',
        numbers=(_IDS,),
        key=rb'"product_id":"([^"]+)"',
    ),
}
_SIMULATED = {
    "binance_trades": (TRADES,),
    "binance_quotes": (QUOTES,),
    "binance_futures_quotes": (QUOTES,),
    "kraken_v2_trades": (TRADES,),
    "coinbase_trades": (TRADES,),
}


def measure(run: Run) -> None:
    """All contenders that read a set, in turns, on the same file."""
    own = run.process("frames_k2.py", core=0)
    assert own is not None
    peers = {name: run.process(script, environment=_ENVIRONMENTS[name], core=0) for name, script in _PEERS.items()}
    seconds = 0.02 if run.quick else 0.5
    for name, chosen in SETS.items():
        path = _file(run, name, chosen)
        if path is None:
            continue
        contenders = {"k2": own}
        contenders |= {bar.peer: peer for bar in FIGURES[name].bars if bar.peer and (peer := peers[bar.peer])}
        made = {
            of: process.ask("load", path=str(path), exchange=chosen.exchange, name=name)
            for of, process in contenders.items()
        }
        if len(set(made.values())) != 1 or not made["k2"]:
            raise SystemExit(f"{name}: the contenders made different numbers of rows: {made}")
        run.detail(**{f"{name}_rows": made["k2"]})
        turns = {of: partial(_rate, process, "run", name, seconds) for of, process in contenders.items()}
        if "tardis-dev" in contenders:
            mappers = partial(_rate, contenders["tardis-dev"], "mappers_only", name, seconds)
            turns["tardis-dev mappers"] = mappers
        run.interleave(turns)
        if name == "binance_trades":
            run.interleave({"k2": partial(_rate, own, "parse_only", "parse_only", seconds)})


def _rate(process: Process, call: str, figure: str, seconds: float) -> Measured:
    told = process.ask(call, seconds=seconds)
    return {figure: told["rows"] / told["seconds"]}


def _file(run: Run, name: str, chosen: Set) -> Path | None:
    """Write what all contenders are given, `<receive time in ns> <frame>` a line; None if there is nothing."""
    folder = inputs.recordings_folder()
    rows = 500 if run.quick else _ROWS
    if folder is not None:
        frames = _prolonged(list(_recorded(run, folder, chosen)), chosen, rows)
    elif name in _SIMULATED:
        run.note("the recordings are not present (K2_TEST_DATA): the simulator's frames were used")
        frames = [
            (frame.received_ns, frame.data)
            for frame in inputs.simulated_frames(chosen.exchange, rows, channels=_SIMULATED[name])
            if chosen.has in frame.data
        ]
    else:
        run.skip(name, "the recordings are not present (K2_TEST_DATA), and the simulator does not speak this dialect")
        return None
    path = run.folder / f"{name}.txt"
    path.write_bytes(b"".join(b"%d %s\n" % line for line in frames))
    return run.used(path, source="made" if folder is None else "recorded", name=f"{name}, as given to all")


def _recorded(run: Run, folder: Path, chosen: Set) -> Iterator[tuple[int, bytes]]:
    for file in chosen.files:
        path = run.used(folder / file, source="recorded", name=file)
        for one in recordings.read(path, registry.get(chosen.exchange)):
            frame = one.frame
            if (
                frame is not None
                and frame.kind == FRAME
                and chosen.has in frame.data
                and chosen.lacks not in frame.data
            ):
                yield frame.received_ns, frame.data


def _prolonged(frames: list[tuple[int, bytes]], chosen: Set, least: int) -> list[tuple[int, bytes]]:
    """Return at least this many rows' frames: the same again and again, their numbers counted on."""
    key = re.compile(chosen.key)
    keys = [found[1] if (found := key.search(data)) else b"" for _, data in frames]
    patterns = [re.compile(pattern) for pattern in chosen.numbers]
    rows = sum(len(patterns[0].findall(data)) for _, data in frames)
    ranges: dict[tuple[bytes, bytes], list[int]] = {}
    for mine, (_, data) in zip(keys, frames, strict=True):
        for pattern in patterns:
            ranges.setdefault((mine, pattern.pattern), []).extend(int(number) for _, number in pattern.findall(data))
    steps = {of: max(numbers) - min(numbers) + 1 for of, numbers in ranges.items() if numbers}
    span = frames[-1][0] - frames[0][0] + 1

    def counted_on(data: bytes, mine: bytes, times_: int) -> bytes:
        for pattern in patterns:
            step = times_ * steps.get((mine, pattern.pattern), 0)
            data = pattern.sub(lambda found: found[1] + str(int(found[2]) + step).encode(), data)  # noqa: B023
        return data

    if rows > least:
        return frames[:least]
    return [
        (received_ns + again * span, counted_on(data, mine, again) if again else data)
        for again in range(-(-least // rows))
        for mine, (received_ns, data) in zip(keys, frames, strict=True)
    ]


if __name__ == "__main__":
    main(__file__)
