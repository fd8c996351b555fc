"""Every limit, as declared in `limits.toml`: what it bounds, what happens there, and the metric that shows it.

The declaration names the constant or setting the code itself uses and never repeats a value. `docs/limits.md` is made
of it; `k2.meters` counts what the limits do.
"""

from __future__ import annotations

import importlib
import re
import sys
import tomllib
from functools import cache
from importlib.resources import files
from operator import attrgetter

import msgspec

from k2.settings import Settings

FILL = "k2_limit_fill"
MAX = "k2_limit_max"
ACTED = "k2_limit_acted_total"
WAITED = "k2_limit_waited_seconds_total"

CAPTURE_MEMORY_BYTES = 320 << 20
"""Ceiling of the resident memory of one capture process, under a tenfold burst and with the default settings."""
NODE_MEMORY_BYTES = 1280 << 20
"""The same of the node."""

_SETTING = "setting "
_ENDED = re.compile(r"ended\((\w+)\)")
_LABEL = re.compile(r"(\w+)=([\w.]+)")
_WORDS = {"fill": FILL, "acted": ACTED, "waited": WAITED}


class Limit(msgspec.Struct, frozen=True):
    """One limit: `name` is the label `limit` of its metrics, `then` says what happens, `shown` where that is seen.

    `shown` holds metrics with their labels; it is empty where a command ends with an error instead, or for the
    simulator, which is no part of an installation.
    """

    name: str
    of: str
    unit: str
    then: str
    shown: tuple[str, ...]

    @property
    def setting(self) -> str:
        """The setting it comes from, empty when it is a constant."""
        return self.of.removeprefix(_SETTING) if self.of.startswith(_SETTING) else ""

    def value(self, settings: Settings) -> float:
        """Return what it is under some settings."""
        if self.setting:
            return float(attrgetter(self.setting)(settings))
        module, _, constant = self.of.partition(":")
        return float(attrgetter(constant)(importlib.import_module(f"k2.{module}")))


@cache
def groups() -> dict[str, tuple[Limit, ...]]:
    """Return the limits by the part of the platform they are of, in the order declared."""
    text = files("k2").joinpath("limits.toml").read_text("utf-8")
    return {
        group: tuple(
            Limit(name, entry["of"], entry["unit"], entry["then"], _shown(name, entry["shown"]))
            for name, entry in entries.items()
        )
        for group, entries in tomllib.loads(text).items()
    }


@cache
def all_limits() -> dict[str, Limit]:
    """Return every limit by its name."""
    return {limit.name: limit for limits in groups().values() for limit in limits}


def counted_here() -> list[str]:
    """Return the limits that count how often they act, of which this process has loaded the code."""
    return [
        name
        for name, limit in all_limits().items()
        if f'{ACTED}{{limit="{name}"}}' in limit.shown and any(f"k2.{home}" in sys.modules for home in _homes(limit))
    ]


def _homes(limit: Limit) -> tuple[str, ...]:
    """Return the modules a limit may be of: a setting says only of which part."""
    part = limit.name.partition(".")[0]
    return (part, f"run.{part}") if limit.setting else (limit.of.partition(":")[0],)


def _shown(name: str, words: str) -> tuple[str, ...]:
    return tuple(_metric(name, word) for word in words.split(", ") if word not in ("error", "none"))


def _metric(name: str, word: str) -> str:
    if word in _WORDS:
        return f'{_WORDS[word]}{{limit="{name}"}}'
    if ended := _ENDED.fullmatch(word):
        return f'k2_capture_ended_total{{reason="{ended[1]}"}}'
    return _LABEL.sub(r'\1="\2"', word)
