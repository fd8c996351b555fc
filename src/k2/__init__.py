"""K2: market data captured, kept, made exact and answered over both tiers as one."""

from k2.errors import K2Error

__all__ = ["K2Error", "connect"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    # `connect` pulls in the query engines; importing the package stays cheap without it.
    if name == "connect":
        from k2.client import connect

        return connect
    raise AttributeError(f"module 'k2' has no attribute {name!r}")
