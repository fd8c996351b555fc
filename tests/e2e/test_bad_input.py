"""Whatever is wrong with what K2 is given: one clear message on stderr with what to do, an exit code, no traceback."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import random
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from installation import Ended, Installation, toml

START_NS = 1_723_161_600 * 10**9
WRONG_SETTING, WRONG_REQUEST, WRONG_DATA, TRY_AGAIN, WRONG_USAGE = 78, 64, 65, 75, 2
CLOSED_PORT = "ws://127.0.0.1:1/"
DEADLINE_SECONDS = 60.0


def assert_clear(ended: Ended, code: int, *words: str) -> None:
    """One message that says what is wrong and what to do, in words; the exit code tells the kind."""
    assert ended.code == code, ended
    assert ended.out == ""
    assert ended.err.startswith("k2: "), ended.err
    assert ended.err.count("k2: ") == 1
    assert "Traceback" not in ended.err
    for word in words:
        assert re.search(word, ended.err), (word, ended.err)


def feed(path: Path, count: int = 3) -> Path:
    """Write a stamped feed of Binance, of our own making, after its documentation of `trade` streams."""
    message = (
        '{{"stream":"btcusdt@trade","data":{{"e":"trade","E":{t},"s":"BTCUSDT","t":{n},"p":"61837.63","q":"0.02",'
        '"T":{t},"m":true,"M":true}}}}'
    )
    lines = (f"{START_NS + n} {message.format(n=n, t=1723161600000 + n)}\n" for n in range(1, count + 1))
    path.write_bytes(gzip.compress("".join(lines).encode()))
    return path


@pytest.fixture
def k2(tmp_path: Path) -> Installation:
    """An installation that does not exist yet."""
    return Installation(tmp_path / "data")


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """An installation with three trades of BTC-USDT, hot and cold."""
    folder = tmp_path_factory.mktemp("filled")
    made = Installation(folder / "data")
    made.k2("import", feed(folder / "feed.gz"), "--exchange", "binance")
    made.k2("ingest", "--drain")
    made.k2("offload", "--drain")
    return made


def with_file(k2: Installation, text: str) -> Installation:
    k2.folder.mkdir()
    (k2.folder / "k2.toml").write_text(text)
    return k2


# Settings.


def test_unknown_setting_in_the_file(k2: Installation) -> None:
    """The file, the key and the nearest key."""
    ended = with_file(k2, "[hot]\nflush_second = 1\n").run("status")

    assert_clear(ended, WRONG_SETTING, r"k2\.toml", r"hot\.flush_second'", "did you mean 'flush_seconds'")


def test_setting_of_the_wrong_type(k2: Installation) -> None:
    """The key and what was expected."""
    ended = with_file(k2, '[hot]\nflush_seconds = "soon"\n').run("status")

    assert_clear(ended, WRONG_SETTING, r"hot\.flush_seconds", "float", "k2 config show")


def test_settings_file_that_is_no_toml(k2: Installation) -> None:
    """The file and the line."""
    assert_clear(with_file(k2, "[hot\n").run("status"), WRONG_SETTING, r"k2\.toml is not valid TOML", "line 1")


def test_settings_file_that_is_missing(k2: Installation) -> None:
    """The path, and who named it."""
    assert_clear(k2.run("status", "--config", "gone.toml"), WRONG_SETTING, r"gone\.toml does not exist", "--config")


def test_unknown_setting_in_the_environment(k2: Installation) -> None:
    """The variable and the nearest key."""
    k2.environment["K2_HOT_FLUSH_SECOND"] = "1"

    assert_clear(k2.run("status"), WRONG_SETTING, "K2_HOT_FLUSH_SECOND", "did you mean 'flush_seconds'")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("serve", "--port", "99999"), WRONG_SETTING, ("99999", "0 to 65535")),
        (("serve", "--port", "abc"), WRONG_USAGE, ("--port", "'abc'", "--help")),
        (("query", "trade", "BTC-USDT"), WRONG_USAGE, ("'trade'", "trades", "--help")),
        (("query", "trades"), WRONG_USAGE, ("which symbol",)),
        (("candles", "BTC-USDT", "2m"), WRONG_USAGE, ("'2m'", "1m")),
        (("qury", "trades", "BTC-USDT"), WRONG_USAGE, ("qury",)),
        (("import", "x"), WRONG_USAGE, ("--exchange",)),
        (("simulate", "--speed", "fast"), WRONG_REQUEST, ("fast", "max")),
    ],
)
def test_wrong_argument(k2: Installation, arguments: tuple[str, ...], code: int, words: tuple[str, ...]) -> None:
    """The argument, and what would be right."""
    assert_clear(k2.run(*arguments), code, *words)


# Names.


@pytest.mark.parametrize(
    "arguments",
    [("import", "x", "--exchange", "krakn"), ("capture", "krakn"), ("up", "--exchange", "krakn")],
)
def test_unknown_exchange(k2: Installation, arguments: tuple[str, ...]) -> None:
    """The nearest name."""
    assert_clear(k2.run(*arguments), WRONG_REQUEST, "krakn", "did you mean 'kraken'")


@pytest.mark.parametrize("arguments", [("capture", "kraken"), ("up", "--exchange", "kraken")])
def test_symbol_that_is_none(k2: Installation, arguments: tuple[str, ...]) -> None:
    """The symbol, and how one is written."""
    k2.environment["K2_EXCHANGES_KRAKEN_SYMBOLS"] = "NOTASYMBOL"

    assert_clear(k2.run(*arguments), WRONG_REQUEST, "NOTASYMBOL", "BASE-QUOTE")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("query", "trades", "BTC-USDD"), ("BTC-USDD", "did you mean 'BTC-USDT'")),
        (("candles", "BTC-USDD", "1m", "--tier", "cold"), ("BTC-USDD", "did you mean 'BTC-USDT'")),
        (("query", "trades", "BTC-USDT", "--start", "yesterday"), ("'yesterday'", "2024-08-08", "-1h")),
        (("query", "trades", "BTC-USDT", "--as-of", "12345"), ("12345", "k2 snapshots")),
        (("snapshots", "--table", "trade"), ("'trade'", "trades")),
    ],
)
def test_question_nobody_can_answer(filled: Installation, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    """Unknown symbols, exchanges, tables, snapshots and times: named, with the nearest or how to write it."""
    assert_clear(filled.run(*arguments), WRONG_REQUEST, *words)


@pytest.mark.parametrize(
    ("statement", "tier", "words"),
    [
        ("SELEC 1", "hot", ("Syntax error",)),
        ("SELEC 1", "cold", ("syntax error", "SELEC")),
        ("SELECT * FROM trade", "hot", ("no table 'trade'", "trades")),
        ("DROP TABLE trades", "cold", ("(?i)only .*SELECT",)),
        ("SELECT * FROM read_csv('/etc/hostname')", "cold", ("read_csv", "not allowed")),
    ],
)
def test_bad_sql(filled: Installation, statement: str, tier: str, words: tuple[str, ...]) -> None:
    """What the engine did not understand, or what is not allowed."""
    assert_clear(filled.run("sql", statement, "--tier", tier), WRONG_REQUEST, "sql", *words)


# Places.


@pytest.mark.parametrize(
    "arguments",
    [
        ("query", "trades", "BTC-USDT"),
        ("status",),
        ("snapshots",),
        ("ingest", "--drain"),
        ("offload", "--drain"),
        ("maintain",),
    ],
)
def test_missing_data_folder(k2: Installation, arguments: tuple[str, ...]) -> None:
    """The folder, and how to choose or make one; none is made."""
    assert_clear(k2.run(*arguments), WRONG_SETTING, str(k2.folder), "--data", "k2 up")
    assert not k2.folder.exists()


def _below_a_file(folder: Path) -> Path:
    (folder / "file").touch()
    return folder / "file" / "data"


def _without_permission(folder: Path) -> Path:
    (folder / "locked").mkdir(mode=0o500)
    return folder / "locked" / "data"


@pytest.mark.parametrize(
    "place",
    [
        _below_a_file,
        pytest.param(
            _without_permission,
            marks=pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere"),
        ),
    ],
)
@pytest.mark.parametrize(
    "arguments",
    [("import", "FEED", "--exchange", "binance"), ("capture", "kraken"), ("up", "--exchange", "kraken"), ("serve",)],
)
def test_data_folder_that_cannot_be_made(
    tmp_path: Path, place: Callable[[Path], Path], arguments: tuple[str, ...]
) -> None:
    """The folder and why; that it will not work later either; and to choose another."""
    folder = place(tmp_path)
    path = feed(tmp_path / "feed.gz")
    ended = Installation(folder).run(*(path if part == "FEED" else part for part in arguments))

    assert_clear(ended, WRONG_SETTING, str(folder), "--data")


def test_demo_on_a_folder_that_is_a_file(tmp_path: Path) -> None:
    """The place, and to choose another."""
    (tmp_path / "data").touch()

    assert_clear(Installation(tmp_path / "data").run("demo", "--for", "1"), WRONG_SETTING, "data", "--data")


def test_demo_leaves_other_data_alone(filled: Installation) -> None:
    """A folder that was not made by a demo is not emptied."""
    assert_clear(filled.run("demo", "--for", "1"), WRONG_SETTING, "not of a demo", "--data")
    assert (filled.folder / "log").is_dir()


def test_output_that_cannot_be_written(filled: Installation, tmp_path: Path) -> None:
    """The file, why, and which option."""
    (tmp_path / "file").touch()
    ended = filled.run("query", "trades", "BTC-USDT", "-o", tmp_path / "file" / "rows.csv")

    assert_clear(ended, WRONG_REQUEST, r"rows\.csv", "Not a directory", "-o")


@contextlib.contextmanager
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("command", ["serve", "simulate"])
def test_port_taken(k2: Installation, command: str) -> None:
    """The port, and how to choose another."""
    with taken_port() as port:
        ended = k2.run(command, "--port", port)

    assert_clear(ended, TRY_AGAIN, str(port), "--port")


# Files.


def test_file_that_is_missing(k2: Installation) -> None:
    """The path and why."""
    ended = k2.run("import", "gone.gz", "--exchange", "binance")

    assert_clear(ended, WRONG_SETTING, r"gone\.gz", "No such file", "check the path")


def test_gzip_file_cut_in_the_middle(k2: Installation, tmp_path: Path) -> None:
    """File and line are named; what came before is in the log, and a second run adds nothing."""
    path = feed(tmp_path / "feed.gz", count=20_000)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    first = k2.run("import", path, "--exchange", "binance")
    second = k2.run("import", path, "--exchange", "binance")
    taken = k2.k2("ingest", "--drain", "--json").json()

    for ended in (first, second):
        assert_clear(ended, WRONG_DATA, r"feed\.gz", r"at line \d+", "damaged or cut off")
    assert 1_000 < taken["frames"] == taken["trades"] < 20_000
    assert int(re.findall(r"at line (\d+)", first.err)[0]) == taken["frames"] + 1


@pytest.mark.parametrize("name", ["rubbish.gz", "rubbish.jsonl"])
def test_rubbish(k2: Installation, tmp_path: Path, name: str) -> None:
    """The file, and what its beginning was not recognised as."""
    rubbish = random.Random(1).randbytes(5_000)
    (tmp_path / name).write_bytes(gzip.compress(rubbish) if name.endswith(".gz") else rubbish)

    assert_clear(
        k2.run("import", tmp_path / name, "--exchange", "kraken"), WRONG_DATA, name, "not recognised", "hftbacktest"
    )


def test_file_that_pretends_to_be_gzip(k2: Installation, tmp_path: Path) -> None:
    """Gzip's first bytes before rubbish: the file and that it is damaged."""
    (tmp_path / "x.gz").write_bytes(b"\x1f\x8b\x08\x00" + random.Random(2).randbytes(5_000))

    assert_clear(k2.run("import", tmp_path / "x.gz", "--exchange", "kraken"), WRONG_DATA, r"x\.gz", "damaged")


def test_file_of_another_exchange(k2: Installation, tmp_path: Path) -> None:
    """The file, the exchange it is not of, and nothing in the log."""
    ended = k2.run("import", feed(tmp_path / "feed.gz"), "--exchange", "kraken")

    assert_clear(ended, WRONG_DATA, r"feed\.gz", "not of the exchange 'kraken'")
    assert k2.k2("ingest", "--drain", "--json").json().get("frames", 0) == 0


def test_recording_cut_in_the_middle(recordings: Path, k2: Installation, tmp_path: Path) -> None:
    """A real recording, cut: what was readable is imported and comes out."""
    whole = (recordings / "binance/spot_ws/btcusdt_20240808.gz").read_bytes()
    (tmp_path / "cut.gz").write_bytes(whole[: len(whole) // 10])
    ended = k2.run("import", tmp_path / "cut.gz", "--exchange", "binance")
    taken = k2.k2("ingest", "--drain", "--json").json()

    assert_clear(ended, WRONG_DATA, r"cut\.gz", "damaged or cut off")
    assert taken["trades"] > 100
    assert (taken["gaps"], taken["dead_letters"]) == (0, 0)


# Exchanges and other processes.


def test_up_without_any_reachable_exchange(k2: Installation) -> None:
    """Every exchange with its reason, and the command that works without network."""
    k2.environment |= {"K2_EXCHANGES_KRAKEN_URL": CLOSED_PORT, "K2_EXCHANGES_BINANCE_URL": CLOSED_PORT}
    ended = k2.run("up", "--exchange", "kraken", "--exchange", "binance", "--port", "0")

    assert_clear(ended, TRY_AGAIN, "no exchange can be reached", r"kraken: .*refused", r"binance: .*refused", "k2 demo")
    assert r"exchanges.kraken.url" in ended.err


def _read_until(process: subprocess.Popen[bytes], path: Path, words: str) -> str:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not re.search(words, text := path.read_text()):
        assert process.poll() is None, text
        assert time.monotonic() < deadline, text
        time.sleep(0.02)
    return text


def _until_shown(k2: Installation, words: str) -> str:
    """Return what `k2 status` shows as soon as these words are in it."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not re.search(words, shown := k2.k2("status").out):
        assert time.monotonic() < deadline, shown
    return shown


def test_capture_goes_on_trying(k2: Installation, tmp_path: Path) -> None:
    """It says why it has no connection and that it tries again; when asked to end, it ends well."""
    k2.environment |= {"K2_EXCHANGES_KRAKEN_URL": CLOSED_PORT}
    process = k2.start("capture", "kraken", log=tmp_path / "capture.log")
    try:
        _read_until(process, tmp_path / "capture.log", "refused.*trying again")
        shown = _until_shown(k2, "ended: connect")
        process.send_signal(signal.SIGTERM)
        code = process.wait(DEADLINE_SECONDS)
    finally:
        process.kill()
        process.wait()
    said = (tmp_path / "capture.log").read_text()

    assert code == 0
    assert "Traceback" not in said
    assert said.count("refused") == 1  # not once per attempt
    assert re.search(r"kraken +yes +0 of 1 .*cannot connect to ws://127.0.0.1:1/: the connection was refused", shown)


def test_second_of_a_kind_on_a_folder(k2: Installation, tmp_path: Path) -> None:
    """`k2 capture`, `k2 ingest` and `k2 up`: the one that has the folder is named, the second is refused."""
    k2.environment |= {"K2_EXCHANGES_KRAKEN_URL": CLOSED_PORT}
    k2.folder.mkdir()
    running = {
        role: k2.start(*arguments, log=tmp_path / f"{role}.log")
        for role, arguments in {"capture": ("capture", "kraken"), "ingest": ("ingest",)}.items()
    }
    try:
        _read_until(running["capture"], tmp_path / "capture.log", "trying again")
        _read_until(running["ingest"], tmp_path / "ingest.log", "ingest running")
        refused = {role: k2.run(*a) for role, a in {"capture": ("capture", "kraken"), "ingest": ("ingest",)}.items()}
        draining = k2.run("ingest", "--drain")
    finally:
        for process in running.values():
            process.terminate()
        codes = {role: process.wait(DEADLINE_SECONDS) for role, process in running.items()}

    for role, ended in refused.items():
        assert_clear(ended, TRY_AGAIN, rf"pid {running[role].pid}", "--data")
    assert_clear(draining, TRY_AGAIN, rf"pid {running['ingest'].pid}", "--data")
    assert codes == {"capture": 0, "ingest": 0}


def test_second_up_on_a_folder(k2: Installation, tmp_path: Path) -> None:
    """The second is refused and names the first, which goes on and ends well."""
    simulator = k2.start("simulate", "--exchange", "kraken", "--port", "0", "--json", log=tmp_path / "simulator.log")
    first = None
    try:
        text = _read_until(simulator, tmp_path / "simulator.log", "endpoints")
        kraken = json.loads(text.splitlines()[0])["endpoints"]["kraken"]
        settings = {"capture": {"exchanges": ["kraken"]}, "exchanges.kraken": kraken, "api": {"port": 0}}
        with_file(k2, toml(settings))
        first = k2.start("up", log=tmp_path / "up.log")
        _read_until(first, tmp_path / "up.log", "REST at")
        refused = k2.run("up")
        first.send_signal(signal.SIGINT)
        code = first.wait(DEADLINE_SECONDS)
    finally:
        for process in (first, simulator):
            if process is not None:
                process.kill()
                process.wait()

    assert_clear(refused, TRY_AGAIN, "already in use", rf"pid {first.pid}", "--data")
    assert code == 0


# JSON.


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("status", "--config", "gone.toml"), WRONG_SETTING),
        (("query", "trades", "BTC-USDT"), WRONG_SETTING),  # no such folder
        (("capture", "krakn"), WRONG_REQUEST),
        (("import", "gone.gz", "--exchange", "binance"), WRONG_SETTING),
        (("serve", "--port", "abc"), WRONG_USAGE),
        (("qury",), WRONG_USAGE),
    ],
)
def test_errors_as_json(k2: Installation, arguments: tuple[str, ...], code: int) -> None:
    """With --json the message is one JSON object on stderr, with the exit code in it."""
    ended = k2.run(*arguments, "--json")
    told = json.loads(ended.err)

    assert (ended.code, told["exit_code"], ended.out) == (code, code, "")
    assert told["error"]
    assert set(told) == {"error", "exit_code"}
