"""Settings: order of sources, unknown names, wrong values, secrets."""

from __future__ import annotations

from pathlib import Path

import pytest

from k2.errors import Misconfigured
from k2.settings import Settings, describe, load, mask


def loaded(tmp_path: Path, toml: str = "", arguments: dict[str, object] | None = None, **environment: str) -> Settings:
    file = tmp_path / "k2.toml"
    file.write_text(toml)
    return load(arguments, environment=environment, file=file)


def test_the_later_source_wins(tmp_path: Path):
    """Defaults, then the file, then the environment, then arguments."""
    toml = '[api]\nport = 1\nhost = "a"\n[hot]\nflush_rows = 7'
    settings = loaded(tmp_path, toml, {"api.port": 3}, K2_API_PORT="2", K2_API_HOST="b")

    assert (settings.api.port, settings.api.host, settings.hot.flush_rows) == (3, "b", 7)
    assert settings.hot.flush_seconds == Settings().hot.flush_seconds


def test_variables_that_are_no_settings_are_left_alone(tmp_path: Path):
    """The command line shows tracebacks with K2_DEBUG; it is no setting and no error."""
    assert loaded(tmp_path, K2_DEBUG="1", K2_CONFIG="", K2_TEST_DATA="/x") == Settings()


def test_an_explicit_zero_overrides(tmp_path: Path):
    """Not given and zero are different."""
    assert loaded(tmp_path, "[api]\nport = 5", {"api.port": 0}).api.port == 0
    assert loaded(tmp_path, "[api]\nport = 5", {"api.port": None}).api.port == 5


def test_exchanges_are_set_by_name_in_the_environment(tmp_path: Path):
    """Names with a dash are written with an underscore; lists are separated by commas."""
    settings = loaded(
        tmp_path, K2_EXCHANGES_BINANCE_USDM_REST_URL="http://x", K2_EXCHANGES_KRAKEN_SYMBOLS="BTC-USD, ETH-USD"
    )

    assert settings.exchange("binance-usdm").rest_url == "http://x"
    assert settings.exchange("kraken").symbols == ("BTC-USD", "ETH-USD")


@pytest.mark.parametrize(
    ("toml", "environment", "message"),
    [
        ("[log]\nsynk = 'full'", {}, r"log\.synk.*did you mean 'sync'"),
        ("[lok]\nsync = 'full'", {}, r"lok.*did you mean 'log'"),
        ("", {"K2_API_PROT": "1"}, r"K2_API_PROT.*did you mean 'port'"),
        ("", {"K2_NONSENSE": "1"}, r"K2_NONSENSE"),
        ("[log]\nsync = 'maybe'", {}, r"sync"),
        ("", {"K2_API_PORT": "many"}, r"port"),
        ("[api]\nport = 70000", {}, r"70000"),
        ("[hot]\nflush_seconds = -1", {}, r"negative"),
        ("[hot]\nflush_rows = 0", {}, r"at least 1"),
        ("[exchanges.kraken]\nchannels = ['trade']", {}, r"did you mean 'trades'"),
        ("[exchanges.kraken]\nsymbls = ['BTC-USD']", {}, r"did you mean 'symbols'"),
        ("not toml", {}, r"not valid TOML"),
        ("data = " + "[" * 50_000, {}, r"not valid TOML"),
        ("[hot]\nflush_rows = 1" + "0" * 5_000, {}, r"not valid TOML"),
        ("#" * (2 << 20), {}, r"larger than"),
        ("[hot]\nflush_seconds = nan", {}, r"hot\.flush_seconds = nan"),
        ("[hot]\nflush_seconds = inf", {}, r"hot\.flush_seconds = inf"),
        ("[hot]\nflush_rows = 9223372036854775808", {}, r"2\^63"),
        ("[hot]\nmemory_bytes = 8000000000", {}, r"node\.memory_bytes = \d+ leaves no room"),
        ('data = "a\\u0000b"', {}, r"NUL"),
        ("log = 5", {"K2_LOG_SYNC": "full"}, r"K2_LOG_SYNC: 'log' was given a value before"),
        ("exchanges = 5", {"K2_EXCHANGES_KRAKEN_URL": "x"}, r"'exchanges' was given a value before"),
        ("[exchanges]\nkraken = 5", {"K2_EXCHANGES_KRAKEN_URL": "x"}, r"'exchanges\.kraken' was given a value before"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, toml: str, environment: dict[str, str], message: str):
    """The message names the place and the nearest name."""
    with pytest.raises(Misconfigured, match=message):
        loaded(tmp_path, toml, **environment)


def test_a_missing_file_is_refused_only_when_it_was_named(tmp_path: Path):
    """Without a file the defaults hold."""
    with pytest.raises(Misconfigured, match="does not exist"):
        load(environment={"K2_CONFIG": str(tmp_path / "none.toml")})

    assert load({"data": str(tmp_path)}, environment={}).data_path == tmp_path


def test_the_file_in_the_data_folder_is_found(tmp_path: Path):
    """An installation carries its settings with it."""
    (tmp_path / "k2.toml").write_text("[api]\nport = 4321")

    assert load({"data": str(tmp_path)}, environment={}).api.port == 4321


def test_secrets_are_masked():
    """Neither a secret field nor a password in an address is ever shown."""
    assert mask("password", "hunter2") == "********"
    assert mask("url", "s3://me:hunter2@host/x") == "s3://me:********@host/x"
    assert mask("url", "ws://host/x") == "ws://host/x"
    assert mask("url", "ws://h/x?apiKey=hunter2&a=b&TOKEN=hunter2#c") == "ws://h/x?apiKey=********&a=b&TOKEN=********#c"


def test_every_setting_says_what_it_means():
    """`k2 config show` and the settings page are made from these texts."""
    assert all(doc for _, _, doc in describe(Settings()))


def test_a_data_folder_has_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Cold keeps the folder's path in its metadata, so a detour by `..` must not make another one of it."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    assert load({"data": "../data"}).data_path == tmp_path / "data"
