"""A feed at work on quick settings, and what it emits."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import json
import sys
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path

import msgspec
import pytest

from k2.feeds.connection import Feed
from k2.model import FRAME, Frame
from k2.settings import CaptureSettings, ExchangeSettings, Settings

sys.path.insert(0, str(Path(__file__).parent))
from toy_exchange import ToyServer

QUICK = CaptureSettings(
    connect_seconds=5.0,
    subscribe_seconds=5.0,
    backoff_first_seconds=0.01,
    backoff_max_seconds=0.05,
    ping_seconds=0.1,
    pong_seconds=5.0,
    rotate_overlap_seconds=0.1,
)


def settings(server: ToyServer | str, *symbols: str, per_connection: int = 0, **capture: float) -> Settings:
    url = server if isinstance(server, str) else server.url
    own = ExchangeSettings(symbols=symbols, url=url, symbols_per_connection=per_connection)
    return Settings(capture=msgspec.structs.replace(QUICK, **capture), exchanges={"toy": own})


class Taken:
    """Collects what a feed emits."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []

    def emit(self, frame: Frame) -> Awaitable[None] | None:
        self.frames.append(frame)
        return None

    def of(self, kind: str) -> list[Frame]:
        return [frame for frame in self.frames if frame.kind == kind]

    def numbers(self) -> set[int]:
        return {json.loads(f.data)["n"] for f in self.of(FRAME) if b'"n"' in f.data}


@contextlib.asynccontextmanager
async def running(feed: Feed) -> AsyncIterator[None]:
    task = asyncio.create_task(feed.run())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def self_signed(folder: Path) -> tuple[Path, Path]:
    """Write a certificate for 127.0.0.1 and its key."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "toy")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (folder / "cert.pem").write_bytes(certificate.public_bytes(pem))
    (folder / "key.pem").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return folder / "cert.pem", folder / "key.pem"
