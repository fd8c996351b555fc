"""One installation of K2 as its users have it: a data folder, and commands run as processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from k2.client import Client, connect
from k2.settings import load

COMMAND_SECONDS = 200.0


@dataclass(frozen=True)
class Ended:
    """What a command left behind."""

    command: str
    code: int
    out: str
    err: str

    def json(self) -> Any:
        """Return what it printed with --json."""
        return json.loads(self.out)


class Installation:
    """Commands on one data folder; nothing of the caller's own K2 settings reaches them."""

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("K2_")}
        self.environment.update(environment or {}, K2_DATA=str(folder))

    def argv(self, *arguments: object) -> list[str]:
        """Return the command line of one K2 command."""
        return [sys.executable, "-m", "k2.cli", *map(str, arguments)]

    def run(self, *arguments: object, seconds: float = COMMAND_SECONDS) -> Ended:
        """Run a command to its end, whatever the end is."""
        done = subprocess.run(
            self.argv(*arguments), env=self.environment, capture_output=True, text=True, timeout=seconds, check=False
        )
        return Ended("k2 " + " ".join(map(str, arguments)), done.returncode, done.stdout, done.stderr)

    def k2(self, *arguments: object, seconds: float = COMMAND_SECONDS) -> Ended:
        """Run a command that must succeed."""
        ended = self.run(*arguments, seconds=seconds)
        assert ended.code == 0, f"{ended.command} on {self.folder} ended with {ended.code}:\n{ended.err}\n{ended.out}"
        return ended

    def start(self, *arguments: object, log: Path) -> subprocess.Popen[bytes]:
        """Start a command that goes on running; what it says is added to `log`."""
        with log.open("ab") as output:
            return subprocess.Popen(
                self.argv(*arguments), env=self.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )

    def query(self, file: Path, *arguments: object) -> pa.Table:
        """Ask with a command that writes Arrow, and return the rows."""
        self.k2(*arguments, "--format", "arrow", "-o", file)
        with pa.ipc.open_stream(file) as reader:
            return reader.read_all()

    def client(self) -> AbstractContextManager[Client]:
        """Open the folder with the Python client."""
        return connect(settings=load({"data": str(self.folder)}, environment={}))


def toml(settings: Mapping[str, Mapping[str, object]]) -> str:
    """Return sections as the text of a settings file."""
    lines: list[str] = []
    for section, values in settings.items():
        lines += [f"[{section}]", *(f"{key} = {_toml_value(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


def _toml_value(value: object) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return json.dumps(list(value))
    return json.dumps(value)
