"""The exchanges K2 knows: its own, and those other distributions bring by an entry point.

A module is imported when its exchange is asked for, so a broken plugin harms only itself.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import cast

from k2.errors import Misconfigured, UnknownName, nearest
from k2.feeds.base import Exchange

ENTRY_POINT_GROUP = "k2.exchanges"

# name -> module:attribute
OWN = {
    "binance": "k2.feeds.binance:SPOT",
    "binance-usdm": "k2.feeds.binance:USDM",
    "kraken": "k2.feeds.kraken:KRAKEN",
    "coinbase": "k2.feeds.coinbase:COINBASE",
}

# Names people and other programs use for the same feed.
ALIASES = {
    "binance-spot": "binance",
    "binanceusdm": "binance-usdm",
    "binance-futures": "binance-usdm",
    "binance-usdm-futures": "binance-usdm",
    "binance-perp": "binance-usdm",
    "coinbase-exchange": "coinbase",
    "coinbase-advanced": "coinbase",
    "coinbase-pro": "coinbase",
    "coinbasepro": "coinbase",
    "kraken-spot": "kraken",
}

_MEMBERS = (
    *("name", "url", "rest_url", "limits", "default_symbols", "contiguous_ids"),
    *("connection_url", "requests", "control", "ping", "parse", "to_canonical", "to_native"),
)


def names() -> list[str]:
    """Return the names of all exchanges, K2's own and plugins', sorted; imports none of them."""
    return sorted({*OWN, *_plugins()})


def get(name: str) -> Exchange:
    """Return the exchange of this name or alias.

    Raises:
        UnknownName: there is no such exchange; suggests the nearest.
        Misconfigured: the plugin that brings it cannot be loaded, or is not an exchange.
    """
    wanted = name.strip().lower().replace("_", "-").replace(" ", "-")
    wanted = ALIASES.get(wanted, wanted)
    if wanted in OWN:
        return _load_own(wanted)
    plugin = _plugins().get(wanted)
    if plugin is None:
        raise UnknownName(f"exchange {name!r} is not known{nearest(wanted, names())}")
    return _load_plugin(wanted, plugin)


def exchanges() -> dict[str, Exchange]:
    """Return every exchange that can be loaded, by name; `broken` tells of the others."""
    failed = broken()
    return {name: get(name) for name in names() if name not in failed}


def broken() -> dict[str, str]:
    """Return the plugins that cannot be loaded, and why."""
    failures = {}
    for name, plugin in _plugins().items():
        try:
            _load_plugin(name, plugin)
        except Misconfigured as error:
            failures[name] = str(error)
    return failures


@cache
def _load_own(name: str) -> Exchange:
    module, attribute = OWN[name].split(":")
    return cast(Exchange, getattr(import_module(module), attribute))


def _plugins() -> dict[str, EntryPoint]:
    """Entry points by exchange name; one that takes a name of K2's own is not heard."""
    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP) if point.name not in OWN}


def _load_plugin(name: str, plugin: EntryPoint) -> Exchange:
    told = f"exchange {name!r}: its plugin {plugin.value!r} of the entry point group {ENTRY_POINT_GROUP!r}"
    try:
        exchange = plugin.load()
    except Exception as error:  # a plugin may fail in any way when it is imported
        raise Misconfigured(
            f"{told} cannot be loaded: {type(error).__name__}: {error} (mend or uninstall it)"
        ) from error
    missing = [member for member in _MEMBERS if not hasattr(exchange, member)]
    if missing:
        raise Misconfigured(f"{told} is not an exchange: it lacks {', '.join(missing)} (see docs/add-an-exchange.md)")
    if exchange.name != name:
        raise Misconfigured(f"{told} calls itself {exchange.name!r}; both names must be the same")
    return cast(Exchange, exchange)
