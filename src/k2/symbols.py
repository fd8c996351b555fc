"""Canonical symbols: BASE-QUOTE, perpetual futures BASE-QUOTE-PERP; and the spellings people use for them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from k2 import meters
from k2.errors import UnknownName

# Codes that stand for the same asset; the right side is canonical. XBT and XDG are Kraken's
# (ISO 4217 style) codes for bitcoin and dogecoin.
ASSET_ALIASES = {"XBT": "BTC", "XDG": "DOGE"}

# Quote assets by which an unseparated symbol (`BTCUSDT`) is split, longest first. From the
# exchanges' own instrument lists; a new one is added here.
# fmt: off
_QUOTES = (
    "USDT", "USDC", "FDUSD", "TUSD", "BUSD", "USDP", "USDS", "USD1", "USDE", "PAX", "SUSD", "BKRW", "BIDR", "IDRT",
    "BVND", "USD", "EUR", "GBP", "AUD", "CAD", "CHF", "JPY", "TRY", "BRL", "RUB", "UAH", "NGN", "ZAR", "PLN", "RON",
    "ARS", "MXN", "COP", "CZK", "IDR", "DAI", "BTC", "XBT", "ETH", "BNB", "TRX", "XRP", "DOGE", "SOL", "DOT", "VAI",
    "U",
)
# fmt: on
QUOTE_ASSETS = tuple(sorted(_QUOTES, key=lambda asset: (-len(asset), asset)))

# Longer than any exchange's name of a symbol; what is longer is neither read nor kept in a cache.
LONGEST_SYMBOL = 80
CACHED_SYMBOLS = 10_000  # spellings remembered, here and by each exchange

_CANONICAL = re.compile(r"[A-Z0-9][A-Z0-9.]{0,31}-[A-Z0-9][A-Z0-9.]{0,15}(-[A-Z0-9]{1,16})?")
_SEPARATED = re.compile(r"([^-/_:]+)[-/_]([^-/_:]+)(?:[-_]([^-/_:]+)|:[^-/_:]+)?")


def legible(text: str) -> str:
    """Return the text unchanged if it may be the name of a symbol: short, and ASCII.

    Other scripts have letters that become ASCII ones in upper case (`ß`, `ı`): another symbol's name.

    Raises UnknownName.
    """
    if len(text) > LONGEST_SYMBOL:
        raise UnknownName(
            f"symbol {text[:40]!r}... has {len(text)} characters, more than {LONGEST_SYMBOL} are no symbol"
        )
    if not text.isascii():
        raise UnknownName(f"symbol {text!r} is not understood: it has characters that are not ASCII")
    return text


def canonical_asset(asset: str) -> str:
    """Return the canonical code of an asset: `XBT` -> `BTC`, `XDG` -> `DOGE`, else upper case."""
    asset = asset.upper()
    return ASSET_ALIASES.get(asset, asset)


def join(base: str, quote: str, suffix: str = "") -> str:
    """Return the canonical symbol of two asset codes in any alias, with an optional `PERP` or expiry."""
    symbol = f"{canonical_asset(base)}-{canonical_asset(quote)}"
    return f"{symbol}-{suffix.upper()}" if suffix else symbol


def is_canonical(symbol: str) -> bool:
    """Whether the text has the form of a canonical symbol."""
    return _CANONICAL.fullmatch(symbol) is not None


def split_unseparated(native: str, quotes: Iterable[str] = QUOTE_ASSETS) -> tuple[str, str]:
    """Split `BTCUSDT` into base and quote by the longest known quote asset; raises UnknownName."""
    upper = legible(native).upper()
    for alias in ASSET_ALIASES:  # XBTUSD is not XB and TUSD
        if upper.startswith(alias) and upper[len(alias) :] in QUOTE_ASSETS:
            return alias, upper[len(alias) :]
    for quote in quotes:
        if upper.endswith(quote) and len(upper) > len(quote):
            return upper[: -len(quote)], quote
    raise UnknownName(f"symbol {native!r}: cannot be split into base and quote (write it as BASE-QUOTE, e.g. BTC-USDT)")


@lru_cache(maxsize=CACHED_SYMBOLS)
def canonical(text: str) -> str:
    """Return the canonical form of what a person typed.

    `BTC-USDT`, `btc/usdt`, `BTC_USDT`, `BTCUSDT`, `XBT/USD` -> `BTC-USDT`, ..., `BTC-USD`;
    `BTC/USDT:USDT` (a perpetual in ccxt's notation) -> `BTC-USDT-PERP`.

    Raises UnknownName when it cannot be understood.
    """
    stripped = legible(text).strip()
    match = _SEPARATED.fullmatch(stripped)
    if match:
        base, quote, suffix = match.groups()
        if quote.upper() == "PERP" and suffix is None:  # BTCUSDT-PERP
            base, quote = split_unseparated(base)
            suffix = "PERP"
        symbol = join(base, quote, suffix or ("PERP" if ":" in stripped else ""))
    else:
        symbol = join(*split_unseparated(stripped))
    if not is_canonical(symbol):
        raise UnknownName(f"symbol {text!r} is not understood (write it as BASE-QUOTE, e.g. BTC-USDT or BTC-USDT-PERP)")
    return symbol


meters.watch_cache("feeds.symbols", canonical)
