"""What all commands share: options, settings, output, and errors without tracebacks."""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click

from k2.errors import K2Error, Misconfigured, NotInstalled
from k2.settings import Settings, load

DEBUG_VARIABLE = "K2_DEBUG"
EXIT_INTERRUPTED = 130
EXIT_INTERNAL = 70


class Context:
    """The options every command takes, and the settings made from them."""

    def __init__(self, data: str | None, config: str | None, as_json: bool) -> None:
        self.data = data
        self.config = config
        self.as_json = as_json

    def settings(self, **arguments: Any) -> Settings:
        """Return the settings; `arguments` are dotted names with `__` for the dot, None meaning not given."""
        dotted = {name.replace("__", "."): value for name, value in arguments.items()}
        return load({"data": self.data, **dotted}, file=Path(self.config) if self.config else None)

    def existing(self) -> Settings:
        """Return the settings of an installation that must exist already."""
        settings = self.settings()
        if not settings.data_path.is_dir():
            raise Misconfigured(
                f"there is no K2 data in {settings.data_path} (choose another with --data or K2_DATA; "
                "`k2 up`, `k2 demo` or `k2 import` make one)"
            )
        return settings

    def show(self, value: Any, text: str | Callable[[], str]) -> None:
        """Print a value as JSON with --json, else its text for people."""
        if self.as_json:
            click.echo(json.dumps(value, default=str, ensure_ascii=False))
        else:
            click.echo(text() if callable(text) else text)


def command(group: click.Group, name: str, **options: Any) -> Callable[[Callable[..., Any]], click.Command]:
    """Register a command that also takes --data, --config and --json, and gets a Context first."""

    def register(function: Callable[..., Any]) -> click.Command:
        @click.option("--json", "as_json", is_flag=True, help="Print JSON.")
        @click.option("--config", metavar="FILE", help="Settings file (K2_CONFIG); else k2.toml in the data folder.")
        @click.option(
            "--data", metavar="DIR", envvar="K2_DATA", help="Folder of the installation (K2_DATA). Default: k2-data."
        )
        @functools.wraps(function)
        def wrapped(data: str | None, config: str | None, as_json: bool, **arguments: Any) -> Any:
            _spare_pandas()
            return function(Context(data, config, as_json), **arguments)

        return group.command(name, **options)(wrapped)

    return register


class _NoPandas:
    """A finder of modules that does not find pandas."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "pandas":
            raise ModuleNotFoundError(name, name=name)


def _spare_pandas() -> None:
    """Let Arrow find no pandas when it looks, which it does once, at its first conversion.

    Importing it takes half a second of every command, and none uses it. A plugin that imports it gets it.
    """
    if "pandas" in sys.modules:
        return
    import pyarrow

    finder: Any = _NoPandas()
    sys.meta_path.insert(0, finder)
    try:
        pyarrow.array([0])
    finally:
        sys.meta_path.remove(finder)


def start_logging(level: int = logging.INFO) -> None:
    """Send log lines of a long-running command to stderr."""
    logging.basicConfig(
        level=logging.DEBUG if os.environ.get(DEBUG_VARIABLE) else level,
        format="%(asctime)s %(levelname)-7s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    # The catalog library warns about each property it does not know; ours are meant.
    logging.getLogger("pyiceberg").setLevel(logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.ERROR)


def run(group: click.Group) -> NoReturn:
    """Run the command line and end the process with an exit code that means something."""
    as_json = "--json" in sys.argv
    try:
        result = group.main(standalone_mode=False)
        sys.exit(result if isinstance(result, int) else 0)
    except click.exceptions.Abort:
        _fail("interrupted", EXIT_INTERRUPTED, as_json)
    except KeyboardInterrupt:
        _fail("interrupted", EXIT_INTERRUPTED, as_json)
    except click.ClickException as error:
        _usage(error, as_json)
    except K2Error as error:
        _reraise_for_debugging()
        _fail(str(error), error.exit_code, as_json)
    except BrokenPipeError:
        sys.stdout = None  # the reader of our output went away: nothing is left to flush to
        sys.exit(0)
    except ModuleNotFoundError as error:
        _reraise_for_debugging()
        _fail(
            f"Python module {error.name!r} is missing: install K2 with its dependencies",
            NotInstalled.exit_code,
            as_json,
        )
    except OSError as error:
        _reraise_for_debugging()
        _fail(f"{error.strerror or error}: {error.filename}" if error.filename else str(error), 74, as_json)
    except Exception as error:  # noqa: BLE001 - the last resort: a fault of K2 itself, said as such
        _reraise_for_debugging()
        _fail(
            f"unexpected {type(error).__name__}: {error} (set {DEBUG_VARIABLE}=1 for details)", EXIT_INTERNAL, as_json
        )


def _reraise_for_debugging() -> None:
    if os.environ.get(DEBUG_VARIABLE):
        raise


def _usage(error: click.ClickException, as_json: bool) -> NoReturn:
    hint = ""
    if isinstance(error, click.UsageError) and error.ctx is not None:
        hint = f" (see `{error.ctx.command_path} --help`)"
    _fail(error.format_message() + hint, error.exit_code, as_json)


def _fail(message: str, code: int, as_json: bool) -> NoReturn:
    click.echo(json.dumps({"error": message, "exit_code": code}) if as_json else f"k2: {message}", err=True)
    sys.exit(code)
