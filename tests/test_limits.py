"""Every limit is declared, has a value, says what happens, and is seen; what grows without one is named here."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from k2 import limits
from k2.run.metrics import METRICS
from k2.settings import Settings, describe

SOURCE = Path(limits.__file__).parent

# What a name looks like that bounds something.
LIMIT_NAME = re.compile(
    r"(^|_)(MAX|MOST|LARGEST|LONGEST|LIMITS?|KEPT|CACHED|ATTEMPTS|RETRIES|TRIES|WINDOW|SECONDS|NS|MS|BYTES|FRAMES|ROWS|"
    r"LINES|LEVELS|MESSAGES|EVENTS|CHARACTERS|SYMBOLS|STREAMS|CONNECTIONS|THREADS|BACKLOG|WAITING|SIZE|DEPTH|PINGS)(_|$)",
    re.IGNORECASE,
)
# Arguments that bound a call: a number in place of a name hides a limit.
UNIT = re.compile(r"_?(DAY|MINUTE|SECOND)_NS|_?NS")
BOUNDING = re.compile(r"timeout|maxlen|maxsize|backlog|limit|most|max_\w+|\w+_(seconds|bytes|frames|rows|timeout)")
# Calls whose first number is a bound.
BOUNDED_BY_POSITION = frozenset(
    {"listen", "Semaphore", "BoundedSemaphore", "ThreadPoolExecutor", "Queue", "lru_cache", "join", "wait", "acquire"}
)

NO_LIMITS = {
    # Units, scales and years.
    "hot.memo:ENTRY_BYTES": "what an entry counts for beside its rows",
    "query.pinned:ENTRY_BYTES": "what an entry counts for beside its rows",
    "feeds.times:EARLIEST_NS": "what time a field may hold",
    "feeds.times:LATEST_NS": "what time a field may hold",
    "feeds.times:_SECONDS_BELOW": "what tells a unit",
    "feeds.base:Limits.data_silence_seconds": "of exchange modules that say nothing else",
    "feeds.conformance:_LARGEST": "the largest 64-bit integer",
    "feeds.conformance:_RECEIVED_NS": "an example",
    "hot.engine:_MESSAGE_CHARACTERS": "cuts a text for people",
    "run.columnar:EARLIEST_NS": "what time a field may hold",
    "run.normalise:_LATE_NS": "the exchanges' own rounding",
    "log.times:EARLIEST_NS": "what a clock may say",
    "log.times:STEP_NS": "what counts as a step of the clock",
    "query.times:_LEAST_DIGITS_NS": "what tells a unit",
    "query.times:_INT64_MAX": "the largest 64-bit integer",
    "query.plan:_MAX_SNAPSHOT_ID": "the largest 64-bit integer",
    "candles:LARGEST_COUNT": "the largest 64-bit integer",
    "schema:FRAME_ROWS": "a factor of a sort key",
    # Formats.
    "run.columnar:FEW_FRAMES": "what is worth columns",
    "query.output:_FEW_ROWS": "what is worth columns",
    "log.codec:COMPRESS_ABOVE_BYTES": "what is worth compressing",
    "log.segment:PAGE_BYTES": "of the file format",
    "log.walfile:HEADER_BYTES": "of the file format",
    "log.walfile:FRAME_HEADER_BYTES": "of the file format",
    "log.carve:_MOST_LOCAL": "of the file format",
    "simulator.kraken:_CHECKSUM_LEVELS": "of Kraken's protocol",
    "simulator.market:MIN_LEVELS": "the least a book holds",
    # How often something is done that costs nothing.
    "run.capture:STATUS_SECONDS": "a pace",
    "run.capture:APPEND_RETRY_FIRST_SECONDS": "the first wait, see capture.append_retry",
    "run.ingest:_RETRY_FIRST_SECONDS": "the first wait, see ingest.retry",
    "run.offload:_BACKOFF_FIRST_SECONDS": "the first wait, see cold.retry",
    "run.supervise:RESTART_FIRST_SECONDS": "the first wait, see supervise.restart",
    "run.supervise:HEALTHY_SECONDS": "a run as long makes the next restart quick again",
    "run.heartbeat:BEAT_SECONDS": "a pace",
    "run.folder:LOCK_POLL_SECONDS": "a pace",
    "node:_LOOK_SECONDS": "a pace",
    "run.readings:TELL_SECONDS": "a pace",
    "hot.owner:TRY_SECONDS": "a pace",
    "hot.server:WAKE_SECONDS": "of a connection to itself",
    "feeds.connection:REPEAT_SECONDS": "how often a message is repeated",
    "log.segment:BUSY_PAUSE_SECONDS": "a pace, see log.busy",
    "crash:LOOK_SECONDS": "a pace, of tests",
    "cli.demo:_SHOW_SECONDS": "a pace",
    "simulator.server:TICK_SECONDS": "a pace",
    "simulator.server:_FULL_SPEED_EVENTS": "a pace",
    "simulator.faults:_EVERY_MESSAGES": "how often a fault strikes",
    "simulator.market:_WARM_UP_EVENTS": "how a market begins",
    "simulator.recording:SETTLE_SECONDS": "a pause between two recordings",
    "simulator.recording:_POLL_SECONDS": "a pace",
}
SETTINGS_WITHOUT_LIMIT = {
    "capture.backoff_first_seconds": "the first wait, see feeds.backoff",
    "capture.ping_seconds": "a pace, see feeds.pong",
    "api.port": "an address",
}

# Calls that make something without a limit of its own, and what bounds it.
BOUNDED_ELSEWHERE = {
    "run.capture: deque()": "capture.buffer_frames and capture.buffer_bytes",
    "run.accounting: deque()": "ingest.repeat_sightings",
    "run.echo: deque()": "supervise.echo",
    "simulator.connection: deque()": "simulator.outbox",
    "feeds.connection: aiohttp.TCPConnector(limit=0)": "one socket a connection: feeds.pace and symbols a connection",
    "feeds.connection: aiohttp.ClientTimeout(total=None)": "every step has a time limit of its own, see Session",
    "feeds.registry: cache": "the modules of exchanges",
    "run.heartbeat: cache": "one heartbeat a process",
    "log.walfile: cache": "one table of numbers a page size",
    "limits: cache": "one table",
}


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the package, by its name below `k2`."""
    return {
        ".".join(path.relative_to(SOURCE).with_suffix("").parts): ast.parse(path.read_text("utf-8"))
        for path in sorted(SOURCE.rglob("*.py"))
    }


def is_number(node: ast.expr) -> bool:
    """Whether an expression is of numbers alone, and above zero."""
    if not all(
        isinstance(part, ast.Constant | ast.BinOp | ast.operator | ast.UnaryOp | ast.unaryop) for part in ast.walk(node)
    ):
        return False
    value = eval(compile(ast.Expression(node), "", "eval"))
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def constants(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
    """Yield the names of numbers given a name in a module or in one of its classes."""
    for statement in body:
        if isinstance(statement, ast.ClassDef):
            yield from constants(statement.body, f"{prefix}{statement.name}.")
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        value = getattr(statement, "value", None)
        for target in targets:
            pairs = (
                zip(target.elts, value.elts, strict=True)
                if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
                else [(target, value)]
            )
            for name, number in pairs:
                if isinstance(name, ast.Name) and isinstance(number, ast.expr) and _is_numeric(number):
                    yield prefix + name.id


def _is_numeric(node: ast.expr) -> bool:
    """A number, several of them, or one made of other constants (`2 * _LARGEST_FRAME_BYTES`)."""
    if isinstance(node, ast.Tuple):
        return bool(node.elts) and all(is_number(element) for element in node.elts)
    return is_number(node) or (isinstance(node, ast.BinOp) and any(is_number(part) for part in (node.left, node.right)))


def undeclared(name: str, tree: ast.Module, declared: set[str]) -> list[str]:
    """Return the limits of a module that are in no table."""
    found = []
    if name != "settings":  # every setting is looked at by a test of its own
        for constant in constants(tree.body):
            where = f"{name}:{constant}"
            short = constant.rpartition(".")[2]
            if not LIMIT_NAME.search(short) or UNIT.fullmatch(short):
                continue
            if where not in declared and where not in NO_LIMITS:
                found.append(where)
    return found


def hidden(name: str, tree: ast.Module) -> list[str]:
    """Return the limits of a module that are bare numbers in a call or a default."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            bare = [k for k in node.keywords if k.arg and BOUNDING.fullmatch(k.arg) and is_number(k.value)]
            called = ast.unparse(node.func).rpartition(".")[2]
            first = (
                node.args[:1]
                if called in BOUNDED_BY_POSITION
                else node.args[1:2]
                if called in ("deque", "wait_for")
                else []
            )
            if (bare or any(is_number(argument) for argument in first)) and called not in ("Limits", "option"):
                found.append(f"{name}: {ast.unparse(node)[:100]}")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args]
            defaults = [
                *zip(arguments[len(arguments) - len(node.args.defaults) :], node.args.defaults, strict=True),
                *zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True),
            ]
            found += [
                f"{name}: {node.name}({argument.arg}={ast.unparse(default)})"
                for argument, default in defaults
                if default is not None and BOUNDING.fullmatch(argument.arg) and is_number(default)
            ]
    return found


def unbounded(name: str, tree: ast.Module) -> list[str]:
    """Return what is made without a limit: queues, caches, thread pools, waits on other programs and servers."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found += [
                f"{name}: cache" for each in node.decorator_list if ast.unparse(each) in ("cache", "functools.cache")
            ]
        if not isinstance(node, ast.Call):
            continue
        called, given = ast.unparse(node.func).rpartition(".")[2], {k.arg: ast.unparse(k.value) for k in node.keywords}
        bare = {
            "deque": len(node.args) < 2 and "maxlen" not in given,
            "Queue": not node.args and "maxsize" not in given,
            "SimpleQueue": True,
            "ThreadPoolExecutor": not node.args and "max_workers" not in given,
            "lru_cache": given.get("maxsize") == "None",
            "urlopen": "timeout" not in given,
            "communicate": "timeout" not in given,
            "check_output": "timeout" not in given,
        }.get(called, False)
        off = [key for key, value in given.items() if key in ("limit", "total", "maxlen") and value in ("0", "None")]
        if bare or (off and called in ("TCPConnector", "ClientTimeout", "deque")):
            found.append(f"{name}: {ast.unparse(node.func)}({f'{off[0]}={given[off[0]]}' if off else ''})")
    return found


def test_what_has_no_limit_of_its_own_is_bounded_elsewhere():
    """Queues, caches and pools without a number are those named above, each with what bounds it."""
    assert {each for name, tree in modules().items() for each in unbounded(name, tree)} == set(BOUNDED_ELSEWHERE)


@pytest.mark.parametrize(
    "code",
    ["deque()", "deque(rows)", "Queue()", "queue.SimpleQueue()", "ThreadPoolExecutor()", "lru_cache(maxsize=None)",
     "@cache\ndef f(x): ...", "urlopen(url)", "process.communicate()", "aiohttp.ClientTimeout(total=None)"],
)  # fmt: skip
def test_something_without_a_limit_is_found(code: str):
    """What can grow for ever is not written unseen."""
    assert unbounded("new", ast.parse(code))


def test_every_limit_in_the_code_is_declared():
    """A number that bounds something has a name, and that name stands in limits.toml (or above, with a reason)."""
    declared = {limit.of for limit in limits.all_limits().values()}
    found = [
        each for name, tree in modules().items() for each in (*undeclared(name, tree, declared), *hidden(name, tree))
    ]

    assert not found, "declare it in src/k2/limits.toml, or say in NO_LIMITS why it is none:\n" + "\n".join(found)


@pytest.mark.parametrize(
    "code",
    ["QUEUE_MAX = 10", "RETRY_SECONDS = 2.5", "MAX_ROWS: int = 1 << 20", "A_BYTES, B = 3, 4",
     "class Q:\n    MOST_IDLE = 16", "_TWICE_BYTES = 2 * OTHER_BYTES"],
)  # fmt: skip
def test_a_new_constant_that_looks_like_a_limit_is_found(code: str):
    """The scan sees it wherever it stands."""
    assert undeclared("new", ast.parse(code), set())


@pytest.mark.parametrize(
    "code",
    ["deque(rows, 5)", "deque(maxlen=10)", "Queue(maxsize=3)", "Queue(7)", "lru_cache(maxsize=9)", "thread.join(2.0)",
     "connect(timeout=30.0)", "asyncio.wait_for(x, 5)", "ask(wait_seconds=3)", "def f(most=100): ...",
     "def f(*, timeout_seconds=1.5): ..."],
)  # fmt: skip
def test_a_bare_number_that_bounds_a_call_is_found(code: str):
    """A limit without a name is one nobody can declare."""
    assert hidden("new", ast.parse(code))


def test_every_number_among_the_settings_is_a_limit_or_excused():
    """A setting that bounds something stands on the page."""
    declared = {limit.setting for limit in limits.all_limits().values()}
    numbers = {name for name, value, _ in describe(Settings()) if isinstance(value, int | float) and value is not True}

    assert numbers - declared == set(SETTINGS_WITHOUT_LIMIT)


def test_every_declared_limit_has_a_value():
    """The constant or setting it names is there, a number above zero, or 0 where the text says what that means."""
    settings = Settings()

    for limit in limits.all_limits().values():
        assert limit.value(settings) > 0 or limit.then.startswith("0: "), limit.name


def test_no_limit_is_declared_twice():
    """One fact, one source."""
    sources = [limit.of for limit in limits.all_limits().values()]

    assert sorted(sources) == sorted(set(sources))
    assert len(limits.all_limits()) == sum(len(group) for group in limits.groups().values())


def test_no_excuse_outlives_its_constant():
    """What is excused is still there."""
    there = {f"{name}:{constant}" for name, tree in modules().items() for constant in constants(tree.body)}

    assert set(NO_LIMITS) - there == set()


def metered() -> dict[str, set[str]]:
    """Return the limits each function of `k2.meters` is called with, in the whole package."""
    found: dict[str, set[str]] = {"acted": set(), "waiting": set(), "watch": set(), "watch_cache": set()}
    for tree in modules().values():
        for node in ast.walk(tree):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called.startswith("meters.") and node.args and called[7:] in found:
                names = {part.value for part in ast.walk(node.args[0]) if isinstance(part, ast.Constant)}
                found[called[7:]] |= names
                if any(keyword.arg == "waited_seconds" for keyword in node.keywords):
                    found["waiting"] |= names
    return found


def test_the_code_counts_what_the_page_says_is_counted():
    """A limit shown as fill, acted or waited is metered under its name, and nothing is metered that is not declared."""
    calls = metered()
    names = {
        limits.FILL: calls["watch"] | calls["watch_cache"],
        limits.ACTED: calls["acted"] | calls["waiting"] | calls["watch_cache"],
        limits.WAITED: calls["waiting"],
    }
    shown = [metric for limit in limits.all_limits().values() for metric in limit.shown]

    for metric, in_code in names.items():
        promised = {re.findall(r'limit="([^"]+)"', text)[0] for text in shown if text.startswith(metric + "{")}
        assert promised - in_code == set(), metric
    assert set().union(*calls.values()) - set(limits.all_limits()) == set()


def test_every_metric_the_page_names_is_declared():
    """What shows a limit can be asked for."""
    shown = {metric.partition("{")[0] for limit in limits.all_limits().values() for metric in limit.shown}

    assert shown - set(METRICS) == set()
