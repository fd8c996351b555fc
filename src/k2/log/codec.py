"""Batches as stored: frames to a checksummed blob and back, without I/O."""

from __future__ import annotations

import struct
import threading
import zlib
from collections.abc import Sequence

import msgspec
import zstandard

from k2 import meters
from k2.errors import Rejected
from k2.model import Frame

PLAIN, ZSTD = 0, 1
COMPRESS_ABOVE_BYTES = 512  # below, the zstd header eats what is won
MAX_BATCH_BYTES = 256 << 20  # SQLite takes blobs up to 1e9 bytes; nothing sane comes near this

Row = tuple[int, int, int, str, int, int, int, bytes]
"""base_offset, count, logged_ns, producer, sequence, codec, crc32, blob: the columns of `batches`."""

_ROW_TYPES = (int, int, int, str, int, int, int, bytes)
_HEADER = struct.Struct("<qqqqq")
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[Frame])
_contexts = threading.local()  # zstd contexts are dear to make, and belong to one thread at a time


def encode(frames: Sequence[Frame]) -> tuple[int, bytes]:
    """Return codec and blob of a batch: msgpack, zstd level 1 where that makes it smaller."""
    plain = _encoder.encode(frames if isinstance(frames, list) else list(frames))
    if len(plain) > MAX_BATCH_BYTES:
        meters.acted("log.batch")
        raise Rejected(
            f"log: a batch of {len(plain)} bytes is above the limit of {MAX_BATCH_BYTES}; append it in parts"
        )
    if len(plain) > COMPRESS_ABOVE_BYTES:
        if not hasattr(_contexts, "compressor"):
            _contexts.compressor = zstandard.ZstdCompressor(level=1)
        packed: bytes = _contexts.compressor.compress(plain)
        if len(packed) < len(plain):
            return ZSTD, packed
    return PLAIN, plain


def decode(codec: int, blob: bytes) -> list[Frame]:
    """Return the frames of a blob whose checksum was right.

    Raises:
        ValueError: it is not what `encode` makes.
    """
    if codec == ZSTD:
        if not hasattr(_contexts, "decompressor"):
            _contexts.decompressor = zstandard.ZstdDecompressor()
        try:
            size = zstandard.frame_content_size(blob)
            if size > MAX_BATCH_BYTES:  # memory is taken for as much as it claims
                raise ValueError(f"zstd: it claims to hold {size} bytes")
            blob = _contexts.decompressor.decompress(blob)
        except zstandard.ZstdError as error:
            raise ValueError(f"zstd: {error}") from None
    elif codec != PLAIN:
        raise ValueError(f"unknown codec {codec}")
    return _decoder.decode(blob)  # its errors are ValueErrors


def checksum(
    base_offset: int, count: int, logged_ns: int, producer: str, sequence: int, codec: int, blob_crc32: int
) -> int:
    """Return the CRC-32 of a row, continued from the one of its blob over every header field."""
    header = _HEADER.pack(base_offset, count, logged_ns, sequence, codec)
    return zlib.crc32(producer.encode("utf-8", "surrogateescape"), zlib.crc32(header, blob_crc32))


def is_whole(row: tuple[object, ...]) -> bool:
    """Return whether a row read back is what was written: types, count and checksum."""
    if tuple(map(type, row)) != _ROW_TYPES:
        return False
    base_offset, count, logged_ns, producer, sequence, codec, crc32, blob = row
    expected = checksum(base_offset, count, logged_ns, producer, sequence, codec, zlib.crc32(blob))  # type: ignore[arg-type]
    return crc32 == expected
