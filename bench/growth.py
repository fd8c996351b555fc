"""Does the cost of a row and of an answer stay the same as the data grow: 1, 10, 100 symbols; 1, 10, 50 million trades?

Made trades, a million a day, over ten symbols; then a million over 1, 10 and 100 symbols. They are written into hot,
with all candles, 250,000 at a time, and committed to cold 500,000 at a time, without maintenance. At each size the cost
of the newest rows is measured, and the delay of answers that are as large at every size: one symbol's hour of trades
from hot and from cold, its day of 1m candles, its last 100 trades. A bend is the cost at the largest size over that at
the smallest: 1 is a straight line.
"""

from __future__ import annotations

from harness import LOWER, Figure, Process, Run, below, main

_SIZES = {"1m": 1, "10m": 10, "50m": 50}
_SYMBOLS = {"1_symbol": 1, "10_symbols": 10, "100_symbols": 100}
_COSTS = {
    "insert": ("us/row", "into hot, with the candles of six timeframes"),
    "commit": ("us/row", "into cold"),
    "hour_hot": ("ms", "one symbol's hour of trades from hot"),
    "hour_cold": ("ms", "one symbol's hour of trades from cold"),
    "candles": ("ms", "one symbol's day of 1m candles"),
    "last": ("ms", "one symbol's last 100 trades"),
}
_BEND = 1.5

_OF_ONE_SIZE = {  # costs that are of the same work, whatever grows
    "rows": ("50 over 1 million trades", tuple(_COSTS)),
    "symbols": ("100 symbols over 1", ("insert", "commit", "candles", "last")),
}

_WHY = (
    "One step, then a straight line: rows of one symbol arrive in order and are written as they are, rows of several "
    "are sorted; 100 symbols cost no more a row than 10."
)
FIGURES = {
    **{
        f"{cost}_bend_{over}": Figure("x", LOWER, (below(_BEND),), what=f"{_COSTS[cost][1]}, {sizes}", why=_WHY)
        for over, (sizes, costs) in _OF_ONE_SIZE.items()
        for cost in costs
    },
    **{f"{cost}_{size}": Figure(unit, LOWER) for cost, (unit, _) in _COSTS.items() for size in (*_SIZES, *_SYMBOLS)},
    "memory_50m": Figure("MiB", LOWER, what="of the process that does all this, at the largest size"),
}


def measure(run: Run) -> None:
    """Grow one store to each size in turn; then one store for each number of symbols."""
    day = 10_000 if run.quick else 1_000_000
    sizes = {"1m": 1, "10m": 2, "50m": 3} if run.quick else _SIZES
    grown: dict[str, dict[str, float]] = {}
    store = _open(run, "rows", day, 10)
    for name, days in sizes.items():
        grown[name] = store.ask("grow", days=days)
    run.add({"memory_50m": grown["50m"]["memory_mib"]})
    store.close()
    for name, symbols in _SYMBOLS.items():
        store = _open(run, name, day, symbols)
        grown[name] = store.ask("grow", days=1)
        store.close()
    for name, told in grown.items():
        run.add({f"{cost}_{name}": told[cost] for cost in _COSTS})
    ends = {"rows": ("50m", "1m"), "symbols": ("100_symbols", "1_symbol")}
    for over, (_, costs) in _OF_ONE_SIZE.items():
        last, first = ends[over]
        run.add({f"{cost}_bend_{over}": grown[last][cost] / grown[first][cost] for cost in costs})
    run.detail(sizes={name: told["facts"] for name, told in grown.items()})


def _open(run: Run, name: str, day: int, symbols: int) -> Process:
    process = run.process("growth_k2.py")
    assert process is not None
    process.ask("start", folder=str(run.folder / name), day_rows=day, symbols=symbols, answers=2 if run.quick else 15)
    return process


if __name__ == "__main__":
    main(__file__)
