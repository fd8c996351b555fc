"""K2: market data captured, kept, made exact and answered over both tiers as one."""

from k2.errors import K2Error
from k2.version import __version__ as __version__

__all__ = ["K2Error", "connect"]


def __getattr__(name: str) -> object:
    # `connect` pulls in the query engines; importing the package stays cheap without it.
    if name == "connect":
        from k2.client import connect

        return connect
    raise AttributeError(f"module 'k2' has no attribute {name!r}")
