"""Batches read from the raw pages of a damaged segment, without SQLite and without its index.

Rows are appended and never changed, and each carries a checksum over all of it. So every page image
that can be found may be searched, also older ones in the WAL, and what passes its checksum is a batch.

Format: sqlite.org/fileformat2.html, sections 1.6 "B-tree Pages" and 2.1 "Record Format", read 2026-11-21.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from k2.log import walfile
from k2.log.codec import MAX_BATCH_BYTES, Row, is_whole
from k2.log.segment import PAGE_BYTES

TABLE_LEAF = 0x0D
_MOST_LOCAL = PAGE_BYTES - 35
_LEAST_LOCAL = (PAGE_BYTES - 12) * 32 // 255 - 23
_INT_BYTES = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}
Image = bytes | memoryview


def carve(path: Path) -> Iterator[Row]:
    """Give every whole batch of a segment file and its WAL, by offset, each once. Nobody may have it open."""
    content = memoryview(path.read_bytes())
    images: list[Image] = [content[at : at + PAGE_BYTES] for at in range(0, len(content), PAGE_BYTES)]
    newest: dict[int, Image] = dict(enumerate(images, start=1))
    wal = Path(f"{path}-wal")
    if wal.exists():
        for page_number, image in walfile.images(wal, PAGE_BYTES):
            newest[page_number] = image
            images.append(image)
    cells = [(rowid, number, at) for number, image in enumerate(images) for rowid, at in _cells(image)]
    given = None
    for rowid, number, at in sorted(cells):
        if rowid == given:
            continue
        row = _row(images[number], at, newest)
        if row is not None:
            given = rowid
            yield row


def _cells(image: Image) -> Iterator[tuple[int, int]]:
    """Give row id and place of each cell of a table leaf."""
    if len(image) < 8 or image[0] != TABLE_LEAF:
        return
    (count,) = struct.unpack_from(">H", image, 3)
    for index in range(min(count, (len(image) - 8) // 2)):
        (at,) = struct.unpack_from(">H", image, 8 + 2 * index)
        try:
            _, behind = _varint(image, at)
            rowid, _ = _varint(image, behind)
        except IndexError:
            continue
        yield rowid, at


def _row(image: Image, at: int, newest: dict[int, Image]) -> Row | None:
    try:
        size, at = _varint(image, at)
        rowid, at = _varint(image, at)
        columns = _columns(_payload(image, at, size, newest))
    except (IndexError, KeyError, ValueError, struct.error):
        return None
    row = (rowid, *columns[1:])  # the key is stored as the row id, and as NULL in its column
    return row if len(columns) == 8 and is_whole(row) else None  # type: ignore[return-value]


def _payload(image: Image, at: int, size: int, newest: dict[int, Image]) -> bytes:
    if not 0 < size <= MAX_BATCH_BYTES + PAGE_BYTES:
        raise ValueError("no payload of ours")
    if size <= _MOST_LOCAL:
        return bytes(image[at : at + size])
    local = _LEAST_LOCAL + (size - _LEAST_LOCAL) % (PAGE_BYTES - 4)
    local = local if local <= _MOST_LOCAL else _LEAST_LOCAL
    parts = [bytes(image[at : at + local])]
    (following,) = struct.unpack_from(">I", image, at + local)
    missing = size - local
    while missing > 0:
        page = newest[following]
        (following,) = struct.unpack_from(">I", page, 0)
        parts.append(bytes(page[4 : 4 + min(missing, PAGE_BYTES - 4)]))
        missing -= PAGE_BYTES - 4
    return b"".join(parts)


def _columns(payload: bytes) -> list[int | str | bytes | None]:
    header_bytes, at = _varint(payload, 0)
    kinds = []
    while at < header_bytes:
        kind, at = _varint(payload, at)
        kinds.append(kind)
    columns: list[int | str | bytes | None] = []
    for kind in kinds:
        size = _INT_BYTES.get(kind, (kind - 12) // 2 if kind >= 12 else 0)
        data = payload[at : at + size]
        at += size
        if kind >= 12:
            columns.append(data.decode("utf-8", "surrogateescape") if kind % 2 else data)
        elif kind in (8, 9):
            columns.append(kind - 8)
        else:
            columns.append(int.from_bytes(data, "big", signed=True) if size else None)
    return columns


def _varint(data: Image, at: int) -> tuple[int, int]:
    """Return a number of up to nine bytes, seven bits in each but the last, and where it ends."""
    value = 0
    for place in range(8):
        byte = data[at + place]
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, at + place + 1
    value = value << 8 | data[at + 8]
    return (value - (1 << 64) if value >> 63 else value), at + 9
