"""The number of a store's form on disk, kept in the store: which version of K2 may open it, and what it must bring on.

Forms count from 1, what the first release wrote; that release wrote no stamp, so a store without one has form 1.
"""

from __future__ import annotations

import os
from pathlib import Path

from k2.durable import sync_folder
from k2.errors import Corrupt, Misconfigured
from k2.version import __version__

FIRST = 1
FILE = "k2.format"  # no name a partition of the log may have


def read(folder: Path) -> int:
    """Return the form of the store in a folder.

    Raises Corrupt when the stamp is not a number.
    """
    path = folder / FILE
    try:
        text = path.read_text("ascii").strip()
    except FileNotFoundError:
        return FIRST
    except UnicodeDecodeError:
        text = ""
    if not text.isdecimal():
        raise Corrupt(f"read {path}: it should hold the number of the store's form; put the file back from a copy")
    return int(text)


def write(folder: Path, form: int) -> None:
    """Stamp a folder, durably and at once: a reader sees the old number or the new."""
    draft = folder / f".{FILE}.{os.getpid()}"
    with draft.open("w", encoding="ascii") as file:
        file.write(f"{form}\n")
        file.flush()
        os.fsync(file.fileno())
    draft.replace(folder / FILE)
    sync_folder(folder)


def check(store: str, where: Path | str, found: int, newest: int) -> None:
    """Raise Misconfigured when a store has a newer form than this version knows."""
    if found <= newest:
        return
    raise Misconfigured(
        f"{store}: {where} was written by a newer K2: it has form {found}, and K2 {__version__} knows forms up to "
        f"{newest}. Nothing was changed. Install the newer K2 again, or choose another data folder with --data"
    )
