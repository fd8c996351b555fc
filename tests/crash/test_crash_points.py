"""The real processes die at every declared crash point while exchanges trade: nothing lost, nothing doubled."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from installation import Installation, toml
from processes import reading
from supervised import SLOW, START_NS, Exchanges, Supervised, compare, exchanges, ingested, sections, supervised

from k2 import crash
from k2.client import connect
from k2.crash import POINTS, PROCESSES, CrashPoint
from k2.log.embedded import EmbeddedLog
from k2.model import FRAME, Frame
from k2.run.importer import BATCH_FRAMES
from k2.run.normalise import REPEAT_WINDOW
from k2.settings import load
from k2.simulator.server import Simulator

# One of every stage in the default run; the others are `slow`.
DEFAULT = {
    "log.append.after_commit",
    "hot.insert.between_views",
    "cold.metadata.synced",
    "cold.compact.swapped",
}
LIVE = ("status", "capture", "ingest", "offload", "maintenance")


@dataclass(frozen=True)
class Running:
    """An installation at work, and what it works on."""

    markets: Exchanges
    processes: Supervised


def parameters(*roles: str) -> list[object]:
    """Return the points of some roles, those not in the default run marked."""
    return [
        pytest.param(point, id=point.label, marks=() if point.label in DEFAULT else pytest.mark.slow)
        for point in POINTS
        if point.role in roles
    ]


def check_equal(running: Running, *, hot_forgets: bool = False, drain: Callable[[], object] = lambda: None) -> None:
    """Close the markets, let everything drain, compare with the account, and open them again."""
    account = running.markets.close_markets()
    drain()
    with connect(settings=running.processes.settings) as client:
        running.processes.await_drained(client)
        checks = compare(client, account, hot_forgets=hot_forgets)
        gaps, dead = client.gaps().arrow(), client.rows("dead_letters").arrow()
    running.markets.open_markets()

    assert [check for check in checks if not check.passed] == [], running.processes.tails()
    assert sum(market["count"] for market in account["markets"]) > 50
    assert (gaps.num_rows, dead.num_rows) == (0, 0)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One installation for many deaths, compared once more when it was stopped in order."""
    with exchanges() as markets:
        folder = tmp_path_factory.mktemp("live")
        with supervised(folder, sections(markets), spared=["capture-binance"]) as processes:
            processes.start()
            processes.until("all processes run", processes.all_run)
            yield Running(markets, processes)
            account = markets.close_markets()
            processes.stop()
            with connect(settings=processes.settings) as client:
                checks = compare(client, account)
            assert [check for check in checks if not check.passed] == []
            assert left_behind(processes) == []


def left_behind(processes: Supervised) -> list[Path]:
    """Return the drafts and side files of the dead that are still there after the next opening."""
    with reading(processes.settings) as log:
        for partition in log.partitions():
            log.end_offset(partition)
    data = processes.installation.folder
    patterns = ("run/*.draft", "log/*/.*.draft*", "hot-inbox/*", "cold/catalog-*.tmp*")
    left = [path for pattern in patterns for path in data.glob(pattern)]
    return left + [side for side in data.glob("log/*/*.db-*") if not Path(str(side)[: -len("-wal")]).exists()]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("point", parameters(*LIVE))
def test_process_dies_at_a_point_while_data_flows(live: Running, point: CrashPoint) -> None:
    """It dies there, is replaced, the work goes on; then every tier equals the exchanges' own account."""
    hit = live.processes.kill_at(point)
    live.processes.await_work()

    assert point.role == "status" or hit.child.startswith(PROCESSES[point.role])
    check_equal(live)


# -- retention ---------------------------------------------------------------------------------


HEARTBEAT = b'{"channel":"heartbeat"}'


def append_old_frames(folder: Path) -> None:
    """Fill a partition so that the log may let go of its oldest segments.

    Ingest wants the last REPEAT_WINDOW frames kept. Some of the many small segments at the beginning are beyond that
    at once, and with every 20 new frames one more.
    """
    frames = [Frame(FRAME, "live", "old", 0, number, START_NS + number, HEARTBEAT) for number in range(1_000)]
    small = EmbeddedLog(folder, segment_seconds=0)  # each append closes the segment before
    for _ in range(150):
        small.append("kraken", frames[:20])
    small.close()
    large = EmbeddedLog(folder)
    for _ in range((REPEAT_WINDOW - 2_500) // len(frames)):
        large.append("kraken", frames)
    large.close()


@pytest.fixture(scope="module")
def forgetting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """An installation whose hot tier and log keep rows and frames for a second or two."""
    folder = tmp_path_factory.mktemp("forgetting")
    with exchanges() as markets:
        short = sections(markets, hot={"retention_seconds": 2}, log={"retention_seconds": 1})
        with supervised(folder, short, spared=["capture-binance"]) as processes:
            append_old_frames(folder / "data" / "log")
            processes.start()
            processes.until("all processes run", processes.all_run)
            yield Running(markets, processes)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("point", parameters("retention"))
def test_process_dies_while_it_forgets(forgetting: Running, point: CrashPoint) -> None:
    """Rows leave hot, and segments the log, only when cold holds them, also if the process dies on the way."""
    hit = forgetting.processes.kill_at(point)
    forgetting.processes.await_work()

    assert hit.child == PROCESSES[point.role]
    check_equal(forgetting, hot_forgets=True)


# -- first start -------------------------------------------------------------------------------


@pytest.mark.timeout(300)
@pytest.mark.parametrize("point", parameters("first start"))
def test_process_dies_at_its_first_start(tmp_path: Path, point: CrashPoint) -> None:
    """What is made once, in an empty folder, is made by the next process, and holds everything."""
    with exchanges() as markets, supervised(tmp_path, sections(markets)) as processes:
        hit = processes.kill_at(point, begin=processes.start)
        processes.await_work()

        assert hit.child == PROCESSES[point.role]
        check_equal(Running(markets, processes))


# -- commands ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rebuilding(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """An installation with `k2 ingest --rebuild` in the place of the node, and something in cold to rebuild from."""
    folder = tmp_path_factory.mktemp("rebuilding")
    with (
        exchanges() as markets,
        supervised(folder, sections(markets), spared=["capture-binance"], node="ingest --rebuild") as processes,
    ):
        processes.start()
        processes.until("all processes run", processes.all_run)
        processes.until("trades are ingested", lambda: sum(ingested(processes.settings).values()) > 200)
        processes.installation.k2("offload", "--drain")
        yield Running(markets, processes)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("point", parameters("rebuild"))
def test_process_dies_while_it_rebuilds_hot(rebuilding: Running, point: CrashPoint) -> None:
    """The rebuild is run again and ends with all rows, while capture goes on."""
    processes = rebuilding.processes
    hit = processes.kill_at(point, begin=lambda: processes.kill("node"), deaths=2)
    before = processes.logged()
    processes.until("ingest goes on", lambda: sum(ingested(processes.settings).values()) > sum(before.values()))

    assert hit.child == "node"
    check_equal(rebuilding, drain=lambda: processes.installation.k2("offload", "--drain"))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("point", parameters("import"))
def test_process_dies_while_it_imports(tmp_path: Path, point: CrashPoint) -> None:
    """The same command again adds the rest of the file, and nothing twice."""
    with Exchanges(Simulator(exchanges=["kraken"], symbols=SLOW, rate=500, start_ns=START_NS)) as markets:
        recording, account = record(tmp_path, markets)
    importing = Installation(tmp_path / "importing")
    importing.folder.mkdir()
    crash.arm(tmp_path / "crash", point.label)
    importing.environment[crash.VARIABLE] = str(tmp_path / "crash")
    first = importing.run("import", recording, "--exchange", "kraken")
    again = importing.k2("import", recording, "--exchange", "kraken", "--json").json()[0]
    importing.k2("ingest", "--drain")
    importing.k2("offload", "--drain")
    with importing.client() as client:
        checks = compare(client, account)

    assert first.code == -signal.SIGKILL
    assert again["frames_present"] >= BATCH_FRAMES
    assert again["frames_added"] > 0
    assert [check for check in checks if not check.passed] == []


def record(folder: Path, markets: Exchanges) -> tuple[Path, dict[str, object]]:
    """Capture more than one batch of frames and write them as others write recordings; return file and account."""
    source = Installation(folder / "source")
    source.folder.mkdir()
    endpoints = markets.endpoints()["kraken"]
    (source.folder / "k2.toml").write_text(toml({"exchanges.kraken": {"symbols": SLOW["kraken"], **endpoints}}))
    settings = load({"data": str(source.folder)}, environment={})
    capture = source.start("capture", "kraken", log=folder / "capture.log")
    try:
        with reading(settings) as log:
            while log.end_offset("kraken") < BATCH_FRAMES * 5 // 4:
                assert capture.poll() is None
                log.wait({"kraken": log.end_offset("kraken")}, 1.0)
            account = markets.close_markets()
            capture.terminate()
            capture.wait(60)
            batches = []
            while found := log.read("kraken", batches[-1].end_offset if batches else 0):
                batches += found
    finally:
        _end(capture)
    frames = [frame for batch in batches for frame in batch.frames if frame.kind == FRAME]
    recording = folder / "recording.txt"
    recording.write_bytes(b"".join(b"%d %s\n" % (frame.received_ns, frame.data) for frame in frames))
    return recording, account


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
        process.wait()


def test_every_role_is_tried() -> None:
    """A point of a new role cannot go without a test; those of upgrades are in tests/upgrade."""
    here = {*LIVE, "retention", "first start", "rebuild", "import"}
    assert {point.role for point in POINTS} == here | {"upgrade"}
    assert {point.label for point in POINTS} >= DEFAULT
