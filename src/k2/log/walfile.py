"""SQLite's write-ahead file, read without SQLite: where the last whole commit ends and what lies behind it.

SQLite takes a WAL up to the first frame whose checksum fails and silently forgets the rest. For a
transaction cut short by a crash that is right, and all that is left to do is to say so. For a damaged
byte in the middle it would throw away every commit behind it: so that is told apart here.

Format: sqlite.org/fileformat2.html, section 4 "The Write-Ahead Log", read 2026-11-21.
"""

from __future__ import annotations

import operator
import struct
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import msgspec

HEADER_BYTES, FRAME_HEADER_BYTES = 32, 24
_HEADER = struct.Struct(">8I")  # magic, version, page size, checkpoint, salt 1, salt 2, checksum 1, checksum 2
_FRAME = struct.Struct(">6I")  # page, pages after commit (0: none), salt 1, salt 2, checksum 1, checksum 2
_MAGIC, _VERSION = 0x377F0682, 3007000  # lowest bit of the magic set: checksums over big-endian words
_MASK = 0xFFFFFFFF
Checksum = tuple[int, int]


class WalState(msgspec.Struct, frozen=True):
    """What a WAL file holds: `whole_bytes` up to the end of its last whole commit, `torn_bytes` begun behind it.

    `broken_frames` lie before the last whole commit and fail their checksum: SQLite would
    stop at the first of them.
    """

    whole_bytes: int
    torn_bytes: int
    broken_frames: int = 0


class _Frame(msgspec.Struct):
    page_number: int
    commit_pages: int
    checksum: Checksum
    page: memoryview
    is_ours: bool  # carries the salts of the header: of this generation, not of the one overwritten
    is_linked: bool  # its checksum follows from the one before it


def inspect(wal: Path, page_size: int) -> WalState:
    """Return what the file holds. Reads the whole file; nobody may write to it meanwhile."""
    content = wal.read_bytes()
    frames, header_is_whole = _frames(content, page_size)
    last = _last_whole_commit(frames)
    frame_bytes = FRAME_HEADER_BYTES + page_size
    whole_bytes = HEADER_BYTES + (last + 1) * frame_bytes if last >= 0 else 0
    broken = sum(not (frame.is_ours and frame.is_linked) for frame in frames[: last + 1])
    if last >= 0 and not header_is_whole:
        broken = max(broken, 1)
    return WalState(whole_bytes, _torn_bytes(content, frames[last + 1 :], max(whole_bytes, HEADER_BYTES)), broken)


def images(wal: Path, page_size: int) -> Iterator[tuple[int, memoryview]]:
    """Give number and content of every page written up to the last whole commit, oldest first, broken ones too."""
    frames, _ = _frames(wal.read_bytes(), page_size)
    for frame in frames[: _last_whole_commit(frames) + 1]:
        yield frame.page_number, frame.page


def _frames(content: bytes, page_size: int) -> tuple[list[_Frame], bool]:
    """Return every frame slot of the file that is complete, and whether the header is."""
    frame_bytes = FRAME_HEADER_BYTES + page_size
    offsets = range(HEADER_BYTES, len(content) - frame_bytes + 1, frame_bytes)
    if not offsets:
        return [], len(content) >= HEADER_BYTES
    magic, version, header_page_size, _, *salts, check_1, check_2 = _HEADER.unpack_from(content)
    seed = (check_1, check_2)
    header_is_whole = (
        magic & ~1 == _MAGIC
        and version == _VERSION
        and header_page_size == page_size
        and _sum((0, 0), content[:24], big_endian=bool(magic & 1)) == seed
    )
    big_endian = bool(magic & 1) if header_is_whole else False
    if not header_is_whole:
        salts = list(_FRAME.unpack_from(content, HEADER_BYTES)[2:4])
    frames = []
    view = memoryview(content)
    for offset in offsets:
        page_number, commit_pages, salt_1, salt_2, check_1, check_2 = _FRAME.unpack_from(content, offset)
        page = view[offset + FRAME_HEADER_BYTES : offset + frame_bytes]
        is_ours = [salt_1, salt_2] == salts
        checksum = (check_1, check_2)
        # Frames of the overwritten generation are not worth the sum: they are never ours.
        is_linked = is_ours and _sum(seed, view[offset : offset + 8], page, big_endian=big_endian) == checksum
        frames.append(_Frame(page_number, commit_pages, checksum, page, is_ours, is_linked))
        seed = checksum
    return frames, header_is_whole


def _last_whole_commit(frames: Sequence[_Frame]) -> int:
    """Return the index of the newest frame that ends a transaction without a broken frame, or -1."""
    last, is_whole = -1, True
    for index, frame in enumerate(frames):
        is_whole = is_whole and frame.is_linked
        if frame.is_ours and frame.commit_pages:
            if is_whole:
                last = index
            is_whole = True
    return last


def _torn_bytes(content: bytes, behind: Sequence[_Frame], whole_bytes: int) -> int:
    """Count what was begun behind the last whole commit; frames of an older generation are no part of it."""
    frame_bytes = FRAME_HEADER_BYTES + len(behind[0].page) if behind else 0
    begun = 0
    for index, frame in enumerate(behind):
        if frame.is_ours:
            begun = (index + 1) * frame_bytes
    if begun or behind:
        return begun
    return max(0, len(content) - whole_bytes)


def _sum(seed: Checksum, *parts: bytes | memoryview, big_endian: bool = False) -> Checksum:
    """Return SQLite's checksum of the parts one after another, continued from `seed`."""
    data = b"".join(parts)
    words = struct.unpack(f"{'>' if big_endian else '<'}{len(data) // 4}I", data)
    first, second, from_seed = _weights(len(words) // 2)
    return (
        (sum(map(operator.mul, first, words)) + from_seed[0] * seed[0] + from_seed[1] * seed[1]) & _MASK,
        (sum(map(operator.mul, second, words)) + from_seed[2] * seed[0] + from_seed[3] * seed[1]) & _MASK,
    )


@cache
def _weights(pairs: int) -> tuple[list[int], list[int], tuple[int, int, int, int]]:
    """Return how much each word, and each half of the seed, counts in the two sums.

    The definition, `s0 += x0 + s1; s1 += x1 + s0` for each pair of words, is linear: so a
    page is two scalar products, ten times faster in Python than the loop.
    """
    first: list[int] = []
    second: list[int] = []
    a, b, c, d = 1, 0, 0, 1  # of the sums after this pair, in the final ones
    for _ in range(pairs):
        first += (b, a + b)
        second += (d, c + d)
        a, b, c, d = (a + b) & _MASK, (a + 2 * b) & _MASK, (c + d) & _MASK, (c + 2 * d) & _MASK
    first.reverse()
    second.reverse()
    return first, second, (a, b, c, d)
