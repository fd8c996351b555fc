"""A flipped bit in an old record: found, told with its range, and everything else still answers."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from traded import PER_BATCH, fill, frames

from k2.client import connect
from k2.errors import Corrupt
from k2.log.codec import encode
from k2.log.embedded import EmbeddedLog
from k2.node import drain
from k2.settings import load

COUNT = 3_000


def flip_one_bit_of(folder: Path, batch: int, draw: random.Random) -> None:
    """Flip one random bit in the stored bytes of a batch, wherever its segment keeps them."""
    blob = encode(frames(batch * PER_BATCH + 1))[1]
    for path in sorted((folder / "binance").glob("*.db")):
        content = bytearray(path.read_bytes())
        at = content.find(blob[:64])
        if at >= 0:
            content[at + draw.randrange(64)] ^= 1 << draw.randrange(8)
            path.write_bytes(content)
            return
    raise AssertionError(f"batch {batch} is in no segment")


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_flipped_bits_cost_their_records_and_nothing_else(tmp_path: Path, seed: int) -> None:
    """Two bits in closed segments: two dead letters with exact ranges, every other trade in each tier."""
    draw = random.Random(seed)
    settings = load({"data": str(tmp_path), "log.segment_bytes": 150_000}, environment={})
    log = EmbeddedLog(tmp_path / "log", segment_bytes=150_000)
    fill(log, COUNT)
    log.close()
    first, second = sorted(draw.sample(range(2, COUNT // PER_BATCH - 20), 2))
    for batch in (first, second):
        flip_one_bit_of(tmp_path / "log", batch, draw)

    drain(settings, "ingest")
    drain(settings, "offload")

    damaged = [(batch * PER_BATCH, (batch + 1) * PER_BATCH) for batch in (first, second)]
    if second == first + 1:
        damaged = [(damaged[0][0], damaged[1][1])]
    whole = [offset for offset in range(COUNT) if not any(low <= offset < high for low, high in damaged)]
    log = EmbeddedLog(tmp_path / "log")
    for low, high in damaged:
        with pytest.raises(
            Corrupt, match=rf"the frames {low}\.\.{high - 1} of 'binance' are damaged on disk"
        ) as caught:
            log.read("binance", low)
        assert (caught.value.first_offset, caught.value.end_offset) == (low, high)
        assert log.read("binance", high)[0].base_offset == high
    log.close()
    with connect(settings=settings) as client:
        for tier in ("hot", "cold", "all"):
            ids = client.trades("BTC-USDT", exchange="binance", tier=tier, limit=0).arrow()["trade_id"].to_pylist()
            assert ids == [offset + 1 for offset in whole], tier
        letters = client.rows("dead_letters", limit=0).arrow().to_pylist()
        raw = client.sql("SELECT log_offset FROM frames ORDER BY log_offset", tier="cold", limit=COUNT).arrow()
        gaps = client.gaps("BTC-USDT", exchange="binance", limit=0).arrow().to_pylist()
    assert sorted((row["reason"], row["log_offset"]) for row in letters) == [("corrupt_log", low) for low, _ in damaged]
    assert sorted(int(row["detail"].split("up to ")[1].rstrip(")")) for row in letters) == [h - 1 for _, h in damaged]
    assert raw["log_offset"].to_pylist() == whole
    assert sorted((gap["first_id"], gap["last_id"]) for gap in gaps) == [(low + 1, high) for low, high in damaged]
