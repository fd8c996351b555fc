"""Rebuild hot, after its files were lost or damaged: history from cold, the rest from the log again.

Done by `k2 ingest --rebuild`, and at a start where hot cannot be trusted (`doubt.py`). Every row below
cold's watermark is written into hot anew, which makes the candles, too; ingest then goes on from there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

import pyarrow as pa
import pyarrow.compute as pc

from k2 import crash
from k2.cold.base import Cold, Pin
from k2.errors import UnknownName
from k2.feeds import registry
from k2.hot.base import Hot
from k2.model import Positions, Selection
from k2.run.accounting import IdLedger
from k2.run.normalise import PartitionState
from k2.run.state import IngestState, Ledgers
from k2.schema import HOT_ROW_TABLES, Table

_DAY_NS = 86_400 * 10**9
_SQL_SECONDS = 3_600.0
_MOST_ROWS = 10**9

# The intervals of ids per ledger, in one pass over sorted ids: an id less its rank is the same within a run.
_INTERVALS = """
SELECT log_partition, symbol, kind, min(trade_id) AS first_id, max(trade_id) AS last_id FROM (
    SELECT log_partition, symbol, kind, trade_id,
           trade_id - row_number() OVER (PARTITION BY log_partition, symbol, kind ORDER BY trade_id) AS run
    FROM trades WHERE trade_id > 0 AND {below})
GROUP BY log_partition, symbol, kind, run ORDER BY log_partition, symbol, kind, first_id
"""
_NEWEST = """
SELECT log_partition, symbol, kind, max(log_offset) AS last_offset, max(exchange_ns) AS newest_ns, count(*) AS trades
FROM trades WHERE trade_id > 0 AND {below} GROUP BY log_partition, symbol, kind
"""
_OPENED = """
SELECT log_partition, max(log_offset) AS last_opened FROM frames WHERE kind = 'opened' AND {below}
GROUP BY log_partition
"""

logger = logging.getLogger(__name__)


def rebuild(hot: Hot, cold: Cold, state: IngestState) -> dict[str, int]:
    """Empty hot, fill it with what cold holds, and set ingest back to there; returns the rows written per table.

    To be run while nobody else ingests or offloads. Killed in between, ingest refuses to start until
    it was run again.
    """
    pins = {table.name: cold.pin(table.name) for table in HOT_ROW_TABLES}
    start = common_watermark(pins)
    state.begin_rebuild()
    crash.point("rebuild.begun")
    hot.reset()
    crash.point("rebuild.emptied")
    written = {table.name: _refill(hot, cold, table, pins[table.name], start) for table in HOT_ROW_TABLES}
    crash.point("rebuild.filled")
    state.set_back(start, _partition_states(cold, start), _ledgers(cold, start))
    return written


def common_watermark(pins: Mapping[str, Pin]) -> dict[str, int]:
    """Return per partition the offset below which every table of rows holds everything."""
    partitions = {p for pin in pins.values() for p in pin.watermark}
    return {p: min(pin.watermark.get(p, 0) for pin in pins.values()) for p in sorted(partitions)}


def _refill(hot: Hot, cold: Cold, table: Table, pin: Pin, below: Positions) -> int:
    if pin.snapshot_id is None:
        return 0
    written = 0
    for day in _days(cold, table):
        rows = cold.read(pin, Selection(table.name, start_ns=day * _DAY_NS, end_ns=(day + 1) * _DAY_NS))
        rows = rows.filter(_is_below(rows, below))
        if rows.num_rows:
            hot.write(table.name, rows, f"rebuild:{pin.snapshot_id}:{day}")
            written += rows.num_rows
            crash.point("rebuild.half")
            logger.info("rebuilt %d rows of %s", written, table.name)
    return written


def _days(cold: Cold, table: Table) -> Iterator[int]:
    query = f"SELECT DISTINCT {table.time_column} // {_DAY_NS} AS day FROM {table.name} ORDER BY day"  # noqa: S608 - names of ours
    yield from cold.sql(query, timeout_seconds=_SQL_SECONDS, limit=_MOST_ROWS)["day"].to_pylist()


def _is_below(rows: pa.Table, below: Positions) -> pa.ChunkedArray:
    keep = pc.is_in(rows["log_partition"], value_set=pa.array([], pa.string()))
    for partition, offset in below.items():
        of_partition = pc.equal(rows["log_partition"], partition)
        keep = pc.or_(keep, pc.and_(of_partition, pc.less(rows["log_offset"], offset)))
    return keep


def _sql(cold: Cold, query: str, below: Positions) -> list[dict[str, object]]:
    """Run a query with `{below}` written out; partition names are checked by the log ([a-z0-9-])."""
    cuts = [f"(log_partition = '{p}' AND log_offset < {int(offset)})" for p, offset in below.items()]
    text = query.format(below=f"({' OR '.join(cuts) or 'false'})")
    found: list[dict[str, object]] = cold.sql(text, timeout_seconds=_SQL_SECONDS, limit=_MOST_ROWS).to_pylist()
    return found


def _ledgers(cold: Cold, below: Positions) -> dict[str, Ledgers]:
    """Count the id ledgers anew from the trades cold holds."""
    ledgers: dict[str, Ledgers] = {}
    if cold.pin("trades").snapshot_id is None:
        return ledgers
    for row in _sql(cold, _NEWEST, below):
        partition = str(row["log_partition"])
        if _has_ledgers(partition):
            made = IdLedger([], [], int(str(row["last_offset"])), int(str(row["newest_ns"])), int(str(row["trades"])))
            ledgers.setdefault(partition, {})[str(row["symbol"]), str(row["kind"])] = made
    for row in _sql(cold, _INTERVALS, below):
        ledger = ledgers.get(str(row["log_partition"]), {}).get((str(row["symbol"]), str(row["kind"])))
        if ledger is not None:
            ledger.firsts.append(int(str(row["first_id"])))
            ledger.lasts.append(int(str(row["last_id"])))
    return ledgers


def _has_ledgers(partition: str) -> bool:
    try:
        return registry.get(partition).contiguous_ids
    except UnknownName:
        return False


def _partition_states(cold: Cold, below: Positions) -> dict[str, PartitionState]:
    states = {partition: PartitionState() for partition in below}
    if cold.pin("frames").snapshot_id is not None:
        for row in _sql(cold, _OPENED, below):
            states[str(row["log_partition"])] = PartitionState(int(str(row["last_opened"])))
    return states
