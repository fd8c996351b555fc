"""Decides at a start whether hot can be trusted; where not, it is made anew from cold and the log.

Hot does not sync what it writes (docs/decisions/0007-hot-after-a-power-cut.md). After a power cut some of its files may
be old, torn or gone, those of candles and deduplication tokens too, and no count shows all of that. So
what a machine that stopped without warning has left is not examined but made again.
"""

from __future__ import annotations

import logging
from pathlib import Path

from k2.cold.base import Cold
from k2.errors import Corrupt
from k2.hot.base import Hot
from k2.log.base import Log
from k2.run.offload import READER as OFFLOAD_READER
from k2.run.rebuild import common_watermark
from k2.run.state import IngestState, MachineRun, last_use
from k2.schema import HOT_ROW_TABLES

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

logger = logging.getLogger(__name__)


def boot_id() -> str:
    """Return what tells this run of the operating system from every other; empty where it does not say."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


def of_machine(state: IngestState) -> str:
    """Return why hot is not to be trusted, before it is opened; empty when nothing is known against it.

    Processes that were killed are nothing against it: the operating system kept what they had written.
    """
    return _reason(state.machine(), state.rebuilding)


def of_folder(folder: Path) -> str:
    """Return the same for a data folder whose state may be of an older form, or missing; nothing is changed.

    Asked by whoever reads a hot that it does not own. Costs well below a millisecond. Raises StoreDown.
    """
    return _reason(*last_use(folder / "state.db"))


def _reason(then: MachineRun | None, rebuilding: bool) -> str:
    if rebuilding:
        return "making it anew was begun and is not finished"
    now = boot_id()
    if then is None or then.is_synced or not now or then.boot_id in ("", now):
        return ""
    return "the machine went down while hot was in use, and hot does not sync what it writes"


def of_rows(log: Log, hot: Hot, state: IngestState) -> str:
    """Return which rows that cold may not hold yet are missing from hot, or too many there; empty when all are there.

    By the counts of the finished flushes, as far back as they are kept.
    """
    progress = state.progress()
    held = {p: log.reader_position(OFFLOAD_READER, p) for p in progress}
    for start in [held, *state.boundaries(held, progress)[:1]]:
        for table in HOT_ROW_TABLES:
            expected = state.expected_rows(table.name, start, progress)
            if expected is None:
                break
            found = hot.counts(table.name, start, progress)
            if found != expected:
                return f"it holds {found} rows of {table.name} where ingest put {expected}"
        else:
            return ""
    return ""


def check_makeable(log: Log, cold: Cold, state: IngestState) -> None:
    """Make sure that cold and log together hold everything hot is made of.

    Raises:
        Corrupt: the log does not reach back to where cold ends: a hot tier that may be damaged is then still more
            than what could be made.
    """
    marks = common_watermark({table.name: cold.pin(table.name) for table in HOT_ROW_TABLES})
    for partition, offset in state.progress().items():
        start, mark = log.start_offset(partition), marks.get(partition, 0)
        if start > mark and offset > mark:
            raise Corrupt(
                f"hot cannot be made anew from cold and log: of {partition!r} cold ends at offset {mark}, and the log "
                f"begins at {start}; `k2 ingest --rebuild` does it all the same, without the rows in between"
            )
