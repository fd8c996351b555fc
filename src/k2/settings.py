"""Every setting, declared once, and the only reader of `k2.toml` and the environment.

Order: defaults, then the file, then the environment (`K2_LOG_SYNC`, `K2_EXCHANGES_KRAKEN_URL`),
then arguments; the later wins. An unknown key is refused with the nearest name.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from k2.errors import Misconfigured, nearest

FILE_NAME = "k2.toml"
ENV_PREFIX = "K2_"
NO_SETTINGS = frozenset({"K2_CONFIG", "K2_DEBUG", "K2_SERVICES", "K2_TEST_DATA"})
MAX_FILE_BYTES = 1 << 20
CHANNELS = ("trades", "quotes", "book")


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=False):
    """Base of all sections; the text beside each field is its documentation."""


class LogSettings(_Section, frozen=True):
    """`[log]`: the durable log."""

    sync: Annotated[
        Literal["full", "normal"],
        "full: every append is on the disk before it is acknowledged, a power cut loses nothing acknowledged "
        "(only what capture has received and not appended yet: 0 to 22 ms of frames in five measured cuts). "
        "normal: faster, a power cut can lose the appends since the last flush of ingest, or the last 4 MB where "
        "none runs (killing processes never does)",
    ] = "full"
    segment_bytes: Annotated[int, "a segment file is closed at this size, bytes"] = 256 << 20
    segment_seconds: Annotated[int, "a segment file is closed at this age, seconds"] = 3600
    retention_seconds: Annotated[int, "segments older than this are removed once every reader has passed them"] = 86_400
    max_bytes: Annotated[
        int,
        "most bytes of segments kept per exchange; above it the oldest are removed although a reader still needs them "
        "(said in the log, in repairs.jsonl, in k2_log_given_up_frames, as a dead letter); "
        "0: no limit, until the disk is full",
    ] = 64 << 30
    linger_ms: Annotated[
        float, "capture appends at most once in this many milliseconds; what comes meanwhile shares the next append"
    ] = 5.0
    batch_frames: Annotated[int, "most frames in one append"] = 5_000


class CaptureSettings(_Section, frozen=True):
    """`[capture]`: connections to exchanges."""

    exchanges: Annotated[tuple[str, ...], "exchanges `k2 up` captures"] = (
        "binance",
        "binance-usdm",
        "kraken",
        "coinbase",
    )
    buffer_frames: Annotated[
        int,
        "frames held in memory per exchange while the log is slow; when full the socket is not read (back-pressure)",
    ] = 100_000
    buffer_bytes: Annotated[int, "the same limit in bytes"] = 64 << 20
    connect_seconds: Annotated[float, "time limit of connecting, TLS included"] = 10.0
    subscribe_seconds: Annotated[float, "time limit of all acknowledgements after connecting"] = 15.0
    backoff_first_seconds: Annotated[float, "wait before the first reconnection; doubles, with jitter"] = 0.5
    backoff_max_seconds: Annotated[float, "ceiling of the wait between reconnections"] = 30.0
    ping_seconds: Annotated[float, "interval of pings"] = 15.0
    pong_seconds: Annotated[float, "a ping unanswered for this long ends the connection"] = 10.0
    rotate_overlap_seconds: Annotated[
        float, "how long the old and the new connection run side by side at a rotation"
    ] = 5.0
    max_frame_bytes: Annotated[int, "a larger frame ends the connection"] = 16 << 20
    memory_bytes: Annotated[
        int, "`k2 up` starts a capture again that has taken more resident memory for 10 s; 0: no limit"
    ] = 1 << 30


class HotSettings(_Section, frozen=True):
    """`[hot]`: recent rows."""

    url: Annotated[str, "chdb: (in the data folder)"] = "chdb:"
    flush_seconds: Annotated[
        float, "rows wait in the memory tail (where queries see them) at most this long before they are inserted"
    ] = 2.0
    flush_rows: Annotated[int, "or until there are this many"] = 50_000
    tail_rows: Annotated[
        int, "most rows in the memory tail; ingest stops reading the log there until hot has caught up"
    ] = 500_000
    retention_seconds: Annotated[
        int, "rows logged longer ago than this are deleted once cold holds them; candles are kept"
    ] = 7 * 86_400
    memory_bytes: Annotated[int, "memory limit of the embedded engine"] = 2 << 30


class ColdSettings(_Section, frozen=True):
    """`[cold]`: Iceberg."""

    catalog: Annotated[str, "sqlite: (in the data folder)"] = "sqlite:"
    warehouse: Annotated[str, "file: (in the data folder)"] = "file:"
    commit_seconds: Annotated[float, "a commit is made when the oldest row waits this long"] = 60.0
    commit_rows: Annotated[int, "or when this many rows wait"] = 500_000
    file_bytes: Annotated[int, "compaction aims at files of this size"] = 128 << 20
    keep_snapshots: Annotated[int, "snapshots kept for time travel by id, per table"] = 100
    grace_seconds: Annotated[
        int, "an expired snapshot, and a file nothing refers to any more, can still be read this long"
    ] = 3_600
    orphan_seconds: Annotated[int, "no unreferenced file younger than this is removed, whatever the grace"] = 3_600
    maintain_seconds: Annotated[
        float,
        "interval of maintenance and retention in a running node, and of commits that say a table has no new rows",
    ] = 600.0


class QuerySettings(_Section, frozen=True):
    """`[query]`: limits of questions."""

    timeout_seconds: Annotated[float, "a query is interrupted after this long"] = 30.0
    limit: Annotated[int, "rows returned when no limit is given"] = 1_000
    max_limit: Annotated[int, "most rows one REST answer gives"] = 100_000
    concurrent: Annotated[int, "queries run side by side; further ones wait"] = 4
    memory_bytes: Annotated[int, "memory limit of the cold query engine"] = 2 << 30


class ApiSettings(_Section, frozen=True):
    """`[api]`: the REST server."""

    host: Annotated[str, "address to listen on"] = "127.0.0.1"
    port: Annotated[int, "port to listen on; 0 takes a free one"] = 8642


class NodeSettings(_Section, frozen=True):
    """`[node]`: the process that ingests, offloads, maintains and answers."""

    memory_bytes: Annotated[
        int,
        "`k2 up` starts the node again when it has taken more resident memory for 10 s; 0: no limit. Leave room for "
        "hot.memory_bytes and query.memory_bytes",
    ] = 6 << 30


class ExchangeSettings(_Section, frozen=True):
    """`[exchanges.NAME]`: what to capture there, and where; empty values take the exchange's own."""

    symbols: Annotated[tuple[str, ...], "canonical symbols; empty: the exchange module's defaults"] = ()
    channels: Annotated[tuple[str, ...], "any of trades, quotes, book"] = ("trades", "quotes")
    url: Annotated[str, "WebSocket address; empty: the exchange's own"] = ""
    rest_url: Annotated[str, "REST address; empty: the exchange's own"] = ""
    symbols_per_connection: Annotated[int, "0: the exchange's limit"] = 0


class Settings(_Section, frozen=True):
    """The whole tree. `data` is the folder everything is kept in."""

    data: Annotated[str, "folder of this installation (K2_DATA, --data)"] = "k2-data"
    log: LogSettings = LogSettings()
    capture: CaptureSettings = CaptureSettings()
    hot: HotSettings = HotSettings()
    cold: ColdSettings = ColdSettings()
    query: QuerySettings = QuerySettings()
    api: ApiSettings = ApiSettings()
    node: NodeSettings = NodeSettings()
    exchanges: dict[str, ExchangeSettings] = {}

    @property
    def data_path(self) -> Path:
        """The data folder, absolute and without `..`: cold keeps it in its metadata, so one folder has one name."""
        return Path(os.path.abspath(Path(self.data).expanduser()))  # noqa: PTH100 - symbolic links stay as given

    def exchange(self, name: str) -> ExchangeSettings:
        """Return the settings of one exchange, defaults if it has no section."""
        return self.exchanges.get(name, ExchangeSettings())


SECRET_FIELDS = frozenset({"password", "token", "secret", "api_key"})
"""Field names masked wherever settings are shown; so is the password in any URL."""


def load(
    arguments: Mapping[str, Any] | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    file: Path | None = None,
) -> Settings:
    """Build the settings from defaults, file, environment and arguments (dotted names), the later winning.

    The file is `file`, or `K2_CONFIG`, or `k2.toml` in the data folder, or `k2.toml` in the working folder.

    Raises:
        Misconfigured: unknown key, wrong type, unreadable file; names the place and the mend.
    """
    environment = os.environ if environment is None else environment
    given = {k: v for k, v in (arguments or {}).items() if v is not None}
    tree: dict[str, Any] = {}
    path = _find_file(file, environment, given)
    if path is not None:
        _merge(tree, _read_file(path), str(path))
    for name, value in sorted(environment.items()):
        if name.startswith(ENV_PREFIX) and name not in NO_SETTINGS:
            _set(tree, _env_path(name), value, f"environment variable {name}")
    for dotted, value in given.items():
        _set(tree, dotted.split("."), value, f"argument {dotted}")
    try:
        settings = msgspec.convert(tree, Settings, strict=False)
    except msgspec.ValidationError as error:
        raise Misconfigured(f"settings: {error} (see `k2 config show` for names, types and defaults)") from None
    _check(settings)
    return settings


def _find_file(file: Path | None, environment: Mapping[str, str], given: Mapping[str, Any]) -> Path | None:
    if file is None and environment.get("K2_CONFIG"):
        file = Path(environment["K2_CONFIG"])
    if file is not None:
        if not file.is_file():
            raise Misconfigured(f"settings file {file} does not exist (given by --config or K2_CONFIG)")
        return file
    data = given.get("data") or environment.get("K2_DATA") or Settings().data
    for candidate in (Path(data).expanduser() / FILE_NAME, Path(FILE_NAME)):
        if candidate.is_file():
            return candidate
    return None


def _read_file(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise Misconfigured(f"settings file {path} is larger than {MAX_FILE_BYTES} bytes: is it the right file?")
        return tomllib.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets in brackets
        raise Misconfigured(f"settings file {path} is not valid TOML: {str(error)[:200]}") from None
    except OSError as error:
        raise Misconfigured(f"settings file {path} cannot be read: {error}") from None


def _merge(tree: dict[str, Any], values: Mapping[str, Any], where: str, prefix: tuple[str, ...] = ()) -> None:
    for key, value in values.items():
        path = (*prefix, key)
        if isinstance(value, dict):
            _merge(tree, value, where, path)
        else:
            _set(tree, list(path), value, where)


def _env_path(name: str) -> list[str]:
    """Turn K2_EXCHANGES_BINANCE_USDM_URL into its path; names hold underscores: match from both ends."""
    rest = name[len(ENV_PREFIX) :].lower()
    for section, hint in get_type_hints(Settings).items():
        if not rest.startswith(section + "_") or section == "data":
            continue
        inner = rest[len(section) + 1 :]
        if section != "exchanges":
            return [section, inner] if isinstance(hint, type) and issubclass(hint, _Section) else [rest]
        for field in sorted(ExchangeSettings.__struct_fields__, key=len, reverse=True):
            if inner.endswith("_" + field):
                return [section, inner[: -len(field) - 1].replace("_", "-"), field]
        return [section, inner]
    return [rest]


def _set(tree: dict[str, Any], path: list[str], value: Any, where: str) -> None:
    """Put a value at its place, after checking that every name on the way exists."""
    hint: Any = Settings
    for depth, key in enumerate(path):
        if get_origin(hint) is dict:
            hint = get_args(hint)[1]
        else:
            known = hint.__struct_fields__ if isinstance(hint, type) and issubclass(hint, _Section) else ()
            if key not in known:
                dotted = ".".join(path)
                raise Misconfigured(f"{where}: unknown setting {dotted!r}{nearest(key, known)}")
            hint = get_type_hints(hint)[key]
        if depth < len(path) - 1:
            inner: Any = tree.setdefault(key, {})
            if not isinstance(inner, dict):
                section = ".".join(path[: depth + 1])
                raise Misconfigured(f"{where}: {section!r} was given a value before; it is a section of settings")
            tree = inner
    is_list = get_origin(hint) is tuple
    tree[path[-1]] = (
        [part.strip() for part in value.split(",") if part.strip()] if is_list and isinstance(value, str) else value
    )


def _check(settings: Settings) -> None:
    """Refuse values no part could work with; zero is allowed only where the text says so."""
    for dotted, value, _doc in describe(settings):
        if isinstance(value, int | float) and not isinstance(value, bool) and not 0 <= value < 2**63:
            raise Misconfigured(f"settings: {dotted} = {value} must not be negative, nor 2^63 or more")
        if "\0" in str(value):
            raise Misconfigured(f"settings: {dotted} = {value!r} holds a NUL character")
    for dotted in (
        "log.segment_bytes",
        "log.batch_frames",
        "hot.flush_rows",
        "hot.tail_rows",
        "cold.commit_rows",
        "query.concurrent",
        "query.limit",
        "query.max_limit",
        "capture.buffer_frames",
        "capture.buffer_bytes",
    ):
        section, field = dotted.split(".")
        if getattr(getattr(settings, section), field) == 0:
            raise Misconfigured(f"settings: {dotted} must be at least 1")
    if settings.api.port > 65_535:
        raise Misconfigured(f"settings: api.port = {settings.api.port} is no port (0 to 65535)")
    engines = settings.hot.memory_bytes + settings.query.memory_bytes
    if 0 < settings.node.memory_bytes < engines:
        raise Misconfigured(
            f"settings: node.memory_bytes = {settings.node.memory_bytes} leaves no room for hot.memory_bytes and "
            f"query.memory_bytes, {engines} together: the node would be started again and again; give it more, or 0"
        )
    for name, exchange in settings.exchanges.items():
        for channel in exchange.channels:
            if channel not in CHANNELS:
                hint = nearest(channel, CHANNELS)
                raise Misconfigured(f"settings: exchanges.{name}.channels: unknown channel {channel!r}{hint}")


def describe(settings: Settings) -> list[tuple[str, Any, str]]:
    """Return (dotted name, value, documentation) of every setting, in order; secrets masked."""
    rows: list[tuple[str, Any, str]] = []
    _describe(settings, "", rows)
    return rows


def _describe(section: _Section, prefix: str, rows: list[tuple[str, Any, str]]) -> None:
    for name, hint in get_type_hints(type(section), include_extras=True).items():
        value = getattr(section, name)
        if isinstance(value, _Section):
            _describe(value, f"{prefix}{name}.", rows)
        elif isinstance(value, dict):
            for key, inner in value.items():
                _describe(inner, f"{prefix}{name}.{key}.", rows)
        else:
            doc = hint.__metadata__[0] if get_origin(hint) is Annotated else ""
            rows.append((f"{prefix}{name}", mask(name, value), doc))


_SECRET_PARAMETER = re.compile(
    r"([?&][^=&#]*(?:token|secret|passw|key|signature|auth)[^=&#]*=)[^&#]+", re.IGNORECASE
)  # fmt: skip


def mask(name: str, value: Any) -> Any:
    """Hide secrets: whole values of secret fields; in URLs passwords and parameters named like secrets."""
    if name in SECRET_FIELDS and value:
        return "********"
    if not isinstance(value, str) or "://" not in value:
        return value
    value = _SECRET_PARAMETER.sub(r"\1********", value)
    scheme, rest = value.split("://", 1)
    user, at, host = rest.rpartition("@")
    return f"{scheme}://{user.split(':', 1)[0]}:********@{host}" if at and ":" in user else value
