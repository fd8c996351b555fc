"""Reading recordings other programs made; small files are written here, in the forms of public recorders."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from k2.errors import BadData, Misconfigured, Rejected
from k2.feeds.recordings import read
from k2.feeds.registry import get
from k2.model import ANSWER, BACKFILL, FRAME, IMPORT, OPENED, Frame

TRADE = (
    '{"stream":"btcusdt@trade","data":{"e":"trade","E":1672515782136,"s":"BTCUSDT","t":1,"p":"1","q":"1",'
    '"T":1672515782136,"m":true}}'
)


def _frames(path: Path, name: str = "binance", fmt: str = "auto") -> list[Frame]:
    return [frame for _, frame in read(path, get(name), fmt) if frame is not None]


def _write(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


@pytest.mark.parametrize(
    ("text", "ns"),
    [
        ("1672515782136123456", 1672515782136123456),
        ("1672515782136123", 1672515782136123000),
        ("1672515782136", 1672515782136000000),
        ("1672515782", 1672515782000000000),
        ("1672515782.136123", 1672515782136123000),
    ],
)
def test_stamped_receive_time_in_any_unit(tmp_path: Path, text: str, ns: int) -> None:
    """The unit of a receive time follows from its size; nothing of it is rounded."""
    frames = _frames(_write(tmp_path / "feed", f"{text} {TRADE}"))

    assert frames == [Frame(FRAME, IMPORT, "feed", 0, 0, ns, TRADE.encode())]


def test_text_capture_keeps_messages_connections_and_answers(tmp_path: Path) -> None:
    """Messages, openings and REST answers become frames; what was sent and the configuration do not."""
    path = _write(
        tmp_path / "capture",
        "configuration: {'trades': ['BTC-USDT']}",
        "wss://stream.example/ws <-> 1617566590.378895",
        'wss://stream.example/ws <- 1617566590.5: {"method":"SUBSCRIBE"}',
        f"1617566591.326123: {TRADE}",
        'https://api.example/depth?symbol=X -> 1617566592.1065369: {"lastUpdateId":1}',
        "",
        "wss://stream.example/ws <-> 1617566600.0",
        f"1617566601.0: {TRADE}",
    )
    recorded = list(read(path, get("binance")))
    frames = [frame for _, frame in recorded if frame is not None]

    assert [line for line, frame in recorded if frame is None] == [1, 3, 6]
    assert [(f.kind, f.epoch, f.counter, f.received_ns) for f in frames] == [
        (OPENED, 0, 0, 1617566590378895000),
        (FRAME, 0, 1, 1617566591326123000),
        (ANSWER, 0, 0, 1617566592106536900),
        (OPENED, 1, 0, 1617566600000000000),
        (FRAME, 1, 1, 1617566601000000000),
    ]
    assert (frames[0].origin, frames[2].origin) == ("wss://stream.example/ws", "https://api.example/depth?symbol=X")
    assert frames[2].data == b'{"lastUpdateId":1}'


def test_json_capture_keeps_its_connections_apart(tmp_path: Path) -> None:
    """Connections written one after the other keep their names, their counters and the order of the file."""
    entries = [
        {"t": "header", "format": 2},
        {"t": "connect", "conn": "ws.1", "ts": 1617566590.5, "addr": "wss://a"},
        {"t": "send", "conn": "ws.1", "ts": 1617566590.6, "data": "{}"},
        {"t": "recv", "conn": "ws.1", "ts": 1617566599.25, "data": TRADE},
        {"t": "connect", "conn": "ws.2", "ts": 1617566590.75, "addr": "wss://a"},
        {"t": "recv", "conn": "ws.2", "ts": 1617566591, "data": TRADE},
        {"t": "http", "conn": "http.0", "ts": 1617566592.5, "url": "https://b", "data": "[]"},
    ]
    frames = _frames(_write(tmp_path / "x.jsonl", *(json.dumps(entry) for entry in entries)))

    assert [(f.kind, f.connection, f.counter, f.received_ns % 10**11) for f in frames] == [
        (OPENED, "ws.1", 0, 90500000000),
        (FRAME, "ws.1", 1, 99250000000),
        (OPENED, "ws.2", 0, 90750000000),
        (FRAME, "ws.2", 1, 91000000000),
        (ANSWER, "http.0", 0, 92500000000),
    ]


def test_bare_messages_take_times_of_their_own_and_never_step_back(tmp_path: Path) -> None:
    """A message without a time takes that before it; those at the beginning take the first; none goes back."""
    path = _write(
        tmp_path / "bare.jsonl",
        '{"channel":"status","type":"update","data":[{"system":"online"}]}',
        '{"method":"subscribe","success":true,"result":{},"time_out":"2026-01-01T00:00:01Z"}',
        '{"channel":"heartbeat"}',
        '{"channel":"trade","data":[{"timestamp":"2026-01-01T00:00:00Z"},{"timestamp":"2025-01-01T00:00:00Z"}]}',
        '{"channel":"trade","data":[{"timestamp":"2026-01-01T00:00:02.5Z"}]}',
    )
    start = 1767225600 * 10**9

    assert [f.received_ns - start for f in _frames(path, "kraken")] == [10**9, 10**9, 10**9, 10**9, 2_500_000_000]


def test_rest_rows_are_cut_in_answers(tmp_path: Path) -> None:
    """2,500 bare rows make three answers, each received when its newest trade was made."""
    rows = [{"a": i, "p": "1.0", "q": "2", "f": i, "l": i, "T": 1672515782000 + i, "m": True} for i in range(2_500)]
    path = tmp_path / "aggTrades_XRPETH_2023.json.gz"
    path.write_bytes(gzip.compress(json.dumps(rows).encode()))
    frames = _frames(path)

    assert [f.source for f in frames] == [BACKFILL] * 3
    assert [f.received_ns for f in frames] == [(1672515782000 + last) * 10**6 for last in (999, 1_999, 2_499)]
    assert frames[1].origin == "https://api.binance.com/api/v3/aggTrades?symbol=XRPETH&fromId=1000&limit=1000"
    assert [len(get("binance").parse(f).trades) for f in frames] == [1_000, 1_000, 500]


def _kraken_rows(count: int, same_time_from: int = 1 << 30) -> list[str]:
    """Rows without an id, as Kraken gave them before 2022."""
    times = (f"{1617566590 + min(i, same_time_from)}.1234" for i in range(count))
    return [f'["1.50000", "0.02500000",{time},"b","m","]}}, \\"[{{"]' for time in times]


def test_kraken_answer_is_cut_and_its_rows_keep_their_text(tmp_path: Path) -> None:
    """2,500 rows in one answer become three, each one a whole answer; the last keeps the end of the file."""
    rows = _kraken_rows(2_500)
    path = tmp_path / "trades_XBTUSD.json"
    path.write_text('{ "error":[],\n"result": {"XXBTZUSD": [ ' + " ,\n".join(rows) + '], "last":"1617"}}\n')
    frames = _frames(path, "kraken")

    head = '{ "error":[],\n"result": {"XXBTZUSD": ['
    ends = ["]}}", "]}}", '], "last":"1617"}}\n']
    assert [f.data.decode() for f in frames] == [
        head + ",".join(rows[start : start + 1_000]) + end for start, end in zip((0, 1_000, 2_000), ends, strict=True)
    ]
    assert [f.counter for f in frames] == [0, 1, 2]
    assert [f.received_ns // 10**9 - 1617566590 for f in frames] == [999, 1_999, 2_499]
    assert {f.origin for f in frames} == {"https://api.kraken.com/0/public/Trades?pair=XXBTZUSD"}


def test_equal_trades_without_an_id_stay_in_one_answer(tmp_path: Path) -> None:
    """Rows of one moment are not cut apart: equal ones are told apart by their number within their answer."""
    path = _write(
        tmp_path / "t.json",
        '{"error":[],"result":{"XXBTZUSD":[' + ",".join(_kraken_rows(1_500, same_time_from=990)) + '],"last":"1"}}',
    )
    (frame,) = _frames(path, "kraken")

    trades = get("kraken").parse(frame).trades
    assert [trade.occurrence for trade in trades[989:]] == [0, *range(510)]


def test_damaged_answer_gives_what_came_before(tmp_path: Path) -> None:
    """Answers are cut while the file is read: those before the damage are there, whatever the file's size."""
    rows = [f'{{"a":{i},"p":"1","q":"2","f":{i},"l":{i},"T":1672515782000,"m":true}}' for i in range(40_000)]
    path = tmp_path / "aggTrades_XRPETH.json.gz"
    path.write_bytes(gzip.compress(("[" + ",".join(rows) + "]").encode(), 1)[:-40_000])
    found: list[int] = []
    with pytest.raises(BadData, match="damaged or cut off"):
        found.extend(part for part, _ in read(path, get("binance")))

    assert len(found) > 10


@pytest.mark.parametrize(
    "end",
    ["", "]", ',{"a":1', ' {"a":1}]', "] []", ",5]", ',{"a":[[[[[[[1]]]]]]]}]', ',{"a":"' + "x" * (2 << 20) + '"}]'],
)
def test_answer_with_a_bad_end_is_refused(tmp_path: Path, end: str) -> None:
    """A row that is none, something after the end, no end: said with the row it follows."""
    rows = [f'{{"a":{i},"p":"1","q":"2","f":{i},"l":{i},"T":1672515782000,"m":true}}' for i in range(1_001)]
    path = tmp_path / "aggTrades_XRPETH.json"
    path.write_text("[" + ",".join(rows) + end)
    if end == "]":
        assert [f.counter for f in _frames(path)] == [0, 1]
        return

    with pytest.raises(BadData, match="what follows its row 1001 is neither"):
        _frames(path)


@pytest.mark.parametrize("line", [f"1672515782136 {'x' * (17 << 20)}", f"1672515782136 {'x' * (33 << 20)}"])
def test_huge_message_is_refused_with_its_line(tmp_path: Path, line: str) -> None:
    """More than 16 MiB are no message: the file and the line are named, the lines before are read."""
    path = _write(tmp_path / "feed", f"1672515782136 {TRADE}", line)
    lines = read(path, get("binance"))

    assert next(lines).line == 1
    with pytest.raises(BadData, match=r"feed: line 2 .*(has 17825792 bytes|longer than 33554432 bytes)"):
        next(lines)


def test_rest_rows_of_futures_have_its_address(tmp_path: Path) -> None:
    """The same rows imported for USD-M become answers of that interface, for the perpetual."""
    path = _write(
        tmp_path / "trades_BTCUSDT.json",
        '[{"id":1,"price":"1","qty":"2","time":1672515782000,"isBuyerMaker":false}]',
    )
    (frame,) = _frames(path, "binance-usdm")

    assert frame.origin.startswith("https://fapi.binance.com/fapi/v1/historicalTrades?symbol=BTCUSDT&")
    assert get("binance-usdm").parse(frame).trades[0].symbol == "BTC-USDT-PERP"


def test_line_without_receive_time_is_named(tmp_path: Path) -> None:
    """A line that does not fit the format is an error with file and line; the lines before are read."""
    path = _write(tmp_path / "feed", f"1672515782136123456 {TRADE}", "167251 ?", f"1672515782136123456 {TRADE}")
    lines = read(path, get("binance"))

    assert next(lines).line == 1
    with pytest.raises(BadData, match=r"feed: line 2 does not fit the format 'hftbacktest': b'167251 \?'"):
        next(lines)


def test_cut_gzip_is_named_after_its_whole_lines(tmp_path: Path) -> None:
    """A gzip file that ends early gives the lines it holds and then one error that names the line."""
    text = "".join(f"{1672515782136123456 + i} {os.urandom(200).hex()}\n" for i in range(100)).encode()
    path = tmp_path / "cut.gz"
    path.write_bytes(gzip.compress(text)[:-500])
    found: list[int] = []
    with pytest.raises(BadData, match=r"cut\.gz: cannot be read any further at line \d+: .*damaged or cut off"):
        found.extend(line for line, _ in read(path, get("binance")))

    assert 90 < len(found) < 100


def test_damaged_gzip_is_an_error(tmp_path: Path) -> None:
    """Bytes changed inside a gzip file are noticed."""
    data = bytearray(gzip.compress(os.urandom(5_000).hex().encode()))
    data[2_000:2_100] = bytes(100)
    path = tmp_path / "damaged.gz"
    path.write_bytes(data)

    with pytest.raises(BadData, match="damaged"):
        list(read(path, get("binance"), "hftbacktest"))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is empty"),
        (b"\n  \n", "is empty"),
        (b"time,price\n1,2\n", "not recognised"),
        (b"\x28\xb5\x2f\xfd\x00\x00", "zstandard"),
        (b"[]", "is empty|no message tells a time"),
        (b'{"channel":"heartbeat"}\n', "no message tells a time"),
        (b'[{"x":1}]', "does not|neither its rows|fields"),
        (b'{"error":["EQuery:Unknown asset pair"]}', "one pair's trades were expected"),
        (b"[\n{", "is not a REST answer"),
    ],
)
def test_file_of_no_known_form_is_refused(tmp_path: Path, content: bytes, told: str) -> None:
    """A file that is not a recording gives one error that says why."""
    path = tmp_path / "file_BTCUSDT"
    path.write_bytes(content)

    with pytest.raises(BadData, match=told):
        list(read(path, get("binance")))


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    """What cannot be opened is named with the system's reason."""
    with pytest.raises(Misconfigured, match="No such file"):
        list(read(tmp_path / "absent", get("binance")))
    with pytest.raises(Misconfigured, match="Is a directory"):
        list(read(tmp_path, get("binance")))


def test_unknown_format_suggests_the_nearest(tmp_path: Path) -> None:
    """A format nobody knows is refused before the file is touched."""
    with pytest.raises(Rejected, match="did you mean 'cryptofeed'"):
        list(read(tmp_path / "absent", get("binance"), "cryptofed"))
