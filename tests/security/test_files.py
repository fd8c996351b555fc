"""What lies on a disk or comes from a keyboard is as hostile as a feed: recordings, log blobs, settings, symbols."""

from __future__ import annotations

import struct
import sys
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from k2.errors import BadData
from k2.feeds import recordings, registry
from k2.log import codec

sys.path.insert(0, str(Path(__file__).parent))
import fuzz

TARGETS = sorted(fuzz.TARGETS.keys() - {"parsers", "normalisers"})


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.binary(min_size=1, max_size=120))
def test_damage_is_understood_or_refused_as_what_it_is(
    name: str, data: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """BadData of a recording, ValueError of a blob, Misconfigured of settings, UnknownName of a symbol: no more."""
    fuzz.SCRATCH = tmp_path_factory.getbasetemp()
    fuzz.run(fuzz.TARGETS[name], data)


@pytest.mark.parametrize("size", [1 << 30, 1 << 40, 1 << 60])
def test_blob_that_claims_to_be_huge_takes_no_memory(size: int) -> None:
    """A compressed batch whose header tells more than a batch may hold is refused before memory is taken for it."""
    blob = b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", size) + bytes(100)

    with pytest.raises(ValueError, match="claims to hold"):
        codec.decode(codec.ZSTD, blob)


def test_gzip_bomb_is_refused_at_the_longest_line(tmp_path: Path) -> None:
    """Two hundred kilobytes that unpack to two hundred megabytes without a line end: BadData, names the line."""
    packer = zlib.compressobj(9, wbits=31)
    with (tmp_path / "bomb.gz").open("wb") as file:
        file.write(packer.compress(b"1723161600000000000 {"))
        for _ in range(100):
            file.write(packer.compress(bytes(2 << 20)))
        file.write(packer.flush())

    with pytest.raises(BadData, match="line 1 is longer than"):
        list(recordings.read(tmp_path / "bomb.gz", registry.get("binance"), recordings.HFTBACKTEST))
