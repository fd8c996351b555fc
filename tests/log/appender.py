"""A process that appends batches and tells on its output which were acknowledged; run by the tests.

    python appender.py FOLDER PARTITION PRODUCER COUNT [SYNC [SEGMENT_BYTES]]

The frames of a batch carry its sequence and place. Starts behind the last sequence the log holds.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from k2.log.embedded import EmbeddedLog
from k2.model import FRAME, LIVE, Frame


def batch(producer: str, sequence: int) -> list[Frame]:
    """Frames that zstd cannot shrink away, of a size that differs from batch to batch."""
    draw = random.Random(f"{producer}-{sequence}")
    size = 30 + sequence % 5 * 400
    return [Frame(FRAME, LIVE, producer, 1, sequence, place, draw.randbytes(size)) for place in range(1 + sequence % 7)]


def main(folder: str, partition: str, producer: str, count: str, sync: str = "full", segment: str = "150000") -> None:
    """Append `count` batches, or until killed."""
    log = EmbeddedLog(Path(folder), sync=sync, segment_bytes=int(segment))  # type: ignore[arg-type]
    last = log.producer_sequence(partition, producer)
    first = 0 if last is None else last + 1
    for sequence in range(first, first + int(count)):
        offset = log.append(partition, batch(producer, sequence), producer=producer, sequence=sequence)
        sys.stdout.write(f"{sequence} {offset}\n")
        sys.stdout.flush()
    log.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
