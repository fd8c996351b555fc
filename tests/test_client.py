"""The Python client: the same rows from a folder and from a node."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars
import pyarrow as pa
import pytest

import k2
from k2.api.app import create_app
from k2.api.server import ApiServer
from k2.api.services import Services
from k2.client import Client
from k2.cold import open_cold
from k2.errors import Misconfigured, Rejected, StoreDown, Unavailable, UnknownName
from k2.hot import OWN, open_hot
from k2.hot.memory import MemoryHot
from k2.node import OFFLOAD, SERVE, drain
from k2.node import Node as RunningNode
from k2.query.engine import Engine
from k2.query.remote import NODE_FILE, Node, find_node
from k2.run import doubt
from k2.run.state import IngestState, MachineRun
from k2.schema import TRADES, arrow_schema
from k2.settings import ApiSettings, QuerySettings, Settings

START = 1_723_075_200_000_000_000  # 2024-08-08


def trades(count: int) -> pa.Table:
    """Trades one nanosecond apart."""
    rows: list[dict[str, Any]] = [
        {
            "exchange": "kraken",
            "symbol": "BTC-USD",
            "trade_id": index + 1,
            "kind": "trade",
            "first_id": index + 1,
            "last_id": index + 1,
            "price": Decimal("61837.63") + index,
            "amount": Decimal("0.000000000001"),
            "side": "buy",
            "off_market": False,
            "occurrence": 0,
            "exchange_ns": START + index,
            "received_ns": START,
            "source": "live",
            "log_partition": "kraken",
            "log_offset": index,
            "row_in_frame": 0,
            "logged_ns": START,
        }
        for index in range(count)
    ]
    return pa.Table.from_pylist(rows, schema=arrow_schema(TRADES))


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A data folder whose cold tier holds twelve trades."""
    folder = tmp_path_factory.mktemp("data")
    settings = Settings(data=str(folder), query=QuerySettings(limit=3, max_limit=5))
    cold = open_cold(settings)
    cold.append("trades", trades(12), start={}, end={"kraken": 12})
    cold.close()
    return settings


@pytest.fixture
def folder_client(installation: Settings) -> Iterator[Client]:
    """A client of the folder itself."""
    with k2.connect(settings=installation) as client:
        yield client


@pytest.fixture
def node(installation: Settings) -> Iterator[ApiServer]:
    """A node on the same folder, which says where it is."""
    cold = open_cold(installation)
    server = ApiServer(
        create_app(Services(Engine(MemoryHot(), cold, None, installation), installation)), "127.0.0.1", 0
    )
    server.start()
    file = installation.data_path / NODE_FILE
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"url": server.url, "pid": os.getpid()}))
    yield server
    file.unlink()
    server.stop()
    cold.close()


def test_folder_and_node_give_the_same_answers(folder_client: Client, node: ApiServer, installation: Settings) -> None:
    """Whoever answers, rows, types, order, watermark and snapshot are the same."""
    options: dict[str, Any] = {"start": START + 2, "end": START + 9, "exchange": "kraken"}
    with k2.connect(installation.data_path, settings=installation) as remote:
        here, there = folder_client.trades("xbt/usd", **options), remote.trades("xbt/usd", **options)

        assert remote.where == node.url
        assert here.arrow().equals(there.arrow())
        assert here.arrow()["trade_id"].to_pylist() == list(range(3, 10))
        assert here.watermark == there.watermark == {"kraken": 12}
        assert here.snapshot_id == there.snapshot_id is not None
        assert [s["snapshot_id"] for s in remote.snapshots()] == [s["snapshot_id"] for s in folder_client.snapshots()]
        assert remote.symbols() == folder_client.symbols() == [("kraken", "BTC-USD")]
        as_of = remote.candles("BTC-USD", "1m", as_of=here.snapshot_id)
        assert as_of.arrow().equals(folder_client.candles("BTC-USD", "1m", as_of=here.snapshot_id).arrow())
        query = "SELECT sum(amount) AS amount FROM trades"
        assert remote.sql(query, tier="cold").arrow().equals(folder_client.sql(query, tier="cold").arrow())


def test_errors_of_a_node_are_the_same_as_of_the_folder(
    folder_client: Client, node: ApiServer, installation: Settings
) -> None:
    """An unknown symbol is the same error with the same message, here or over HTTP."""
    with k2.connect(url=node.url, settings=installation) as remote:
        for client in (folder_client, remote):
            with pytest.raises(UnknownName, match="did you mean 'BTC-USD'"):
                client.trades("BTC-USDT")
            with pytest.raises(Rejected):
                client.sql("DROP TABLE trades", tier="cold")


def test_a_kept_connection_is_used_again_and_its_end_is_no_error(installation: Settings) -> None:
    """Questions of one client share a connection; a node that was started anew in between answers all the same."""
    cold = open_cold(installation)

    def started(port: int) -> ApiServer:
        app = create_app(Services(Engine(MemoryHot(), cold, None, installation), installation))
        server = ApiServer(app, "127.0.0.1", port)
        server.start()
        return server

    server = started(0)
    try:
        with k2.connect(url=server.url, settings=installation) as remote:
            kept = remote._source._connections._idle  # type: ignore[attr-defined]
            (probed,) = kept
            remote.symbols()
            (again,) = kept
            server.stop()
            server = started(server.port)
            symbols = remote.symbols()
            (anew,) = kept
    finally:
        server.stop()
        cold.close()

    assert probed is again is not anew
    assert symbols == [("kraken", "BTC-USD")]
    assert not kept


def test_result_as_frames_keeps_every_digit(folder_client: Client) -> None:
    """Arrow, Polars, pandas and plain rows hold the same exact decimals."""
    pandas = pytest.importorskip("pandas")
    result = folder_client.trades("BTC-USD", tier="cold", limit=1, start="2024-08-08")
    (row,) = result

    assert row.price == Decimal("61837.63")
    assert (row.amount, row.exchange_ns, row.side) == (Decimal("0.000000000001"), START, "buy")
    assert result.arrow().schema.field("price").type == pa.decimal128(38, 12)
    assert result.polars()["price"].dtype == polars.Decimal(38, 12)
    assert result.polars()["price"][0] == Decimal("61837.63")
    frame = result.pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert frame["amount"][0] == Decimal("0.000000000001")
    assert frame["exchange_time"][0] == pandas.Timestamp("2024-08-08", tz="UTC")
    assert len(result) == 1


def test_result_shows_itself(folder_client: Client) -> None:
    """The first rows, how many there are, which tiers answered and what is missing."""
    text = repr(folder_client.trades("BTC-USD"))

    assert text.startswith("12 trades from cold")
    assert "61837.63" in text
    assert "2 more" in text
    assert "hot tier is not open" in text


def test_limits_mean_the_same_everywhere(folder_client: Client, node: ApiServer, installation: Settings) -> None:
    """0 is all rows, None the configured number of newest."""
    with k2.connect(url=node.url, settings=installation) as remote:
        for client in (folder_client, remote):
            assert len(client.trades("BTC-USD")) == 12
            assert [row.trade_id for row in client.trades("BTC-USD", limit=None)] == [10, 11, 12]


class FarNode(Node):
    """A node treated as one of another machine."""

    def _is_local(self) -> bool:
        return False


def test_all_rows_of_a_far_node_come_in_pages(node: ApiServer, installation: Settings) -> None:
    """A far node gives at most max_limit rows at a time; the client follows to the end."""
    client = Client(FarNode(node.url, installation))

    assert [row.trade_id for row in client.trades("BTC-USD")] == list(range(1, 13))


def test_file_of_a_dead_node_is_not_believed(tmp_path: Path) -> None:
    """A file left behind by a killed node, or one that is no JSON, leads nowhere."""
    (tmp_path / "run").mkdir()
    for text in (
        '{"url": "http://127.0.0.1:1", "pid": 4194305}',
        f'{{"url": "http://127.0.0.1:1", "pid": {os.getpid()}}}',
        "{",
    ):
        (tmp_path / NODE_FILE).write_text(text)

        assert find_node(tmp_path) is None


def test_missing_folder_and_silent_address_are_said(tmp_path: Path) -> None:
    """Both say what was tried and what to do."""

    with pytest.raises(Misconfigured, match="there is no K2 data in"):
        k2.connect(tmp_path / "nothing")
    with pytest.raises(Unavailable, match="no K2 node answers"):
        k2.connect(url="http://127.0.0.1:1")
    with pytest.raises(Rejected, match="http://HOST:PORT"):
        k2.connect(url="127.0.0.1:8642")


def test_a_command_loads_only_what_its_question_needs(installation: Settings) -> None:
    """Neither pandas nor the library that writes cold is loaded to read: each takes longer than the answer."""
    program = (
        "import sys; from k2.cli.main import root; "
        f"root(['query', 'trades', 'BTC-USD', '--tier', 'cold', '--data', {str(installation.data_path)!r}], "
        "standalone_mode=False); "
        "print([name for name in ('pandas', 'pyiceberg', 'sqlalchemy', 'chdb', 'polars') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert "BTC-USD" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.fixture
def doubted(tmp_path: Path) -> Settings:
    """A folder with twelve trades in cold and some of twenty in hot, in use when the machine went down."""
    if not doubt.boot_id():
        pytest.skip("this system does not tell its boot id")
    settings = Settings(data=str(tmp_path), api=ApiSettings(port=0))
    cold = open_cold(settings)
    cold.append("trades", trades(12), start={}, end={"kraken": 12})
    cold.close()
    hot = open_hot(settings, OWN)
    hot.write("trades", trades(20).slice(0, 15), "torn")
    hot.close()
    state = IngestState(tmp_path / "state.db")
    state.note_machine(MachineRun("other", is_synced=False))
    state.close()
    return settings


def test_a_hot_tier_that_may_be_damaged_is_not_read(doubted: Settings) -> None:
    """After a power cut a client answers from cold and says why and what to do; where hot was asked for, it refuses."""
    with k2.connect(settings=doubted) as client:
        for found in (client.trades("BTC-USD", exchange="kraken"), client.candles("BTC-USD", exchange="kraken")):
            assert found.tiers == ("cold",)
            assert "the machine went down while hot was in use" in found.note
            assert "`k2 up`" in found.note
        assert len(client.trades().arrow()) == 12
        assert client.status()["hot"] is None
        elsewhere = client.trades(exchange="binance")  # hot may know it
        assert (len(elsewhere.arrow()), "the machine went down" in elsewhere.note) == (0, True)
        for ask in (lambda: client.trades(tier="hot"), lambda: client.sql("SELECT count() FROM trades")):
            with pytest.raises(StoreDown, match="the machine went down while hot was in use"):
                ask()

        state = IngestState(doubted.data_path / "state.db")
        state.note_machine(MachineRun(doubt.boot_id(), is_synced=False))
        state.close()
        assert (len(client.trades().arrow()), client.trades().note) == (15, "")


def test_a_node_that_only_serves_does_not_read_a_doubted_hot_either(doubted: Settings) -> None:
    """Nor does an offload that borrows it: nothing of it gets into cold."""
    with RunningNode(doubted, [SERVE]) as serving, k2.connect(url=serving.url, settings=doubted) as client:
        found = client.trades()
        assert len(found.arrow()) == 12
        assert "the machine went down while hot was in use" in found.note
    with pytest.raises(StoreDown, match="offload from hot: the machine went down"):
        drain(doubted, OFFLOAD)
