"""Files of the cold tier that are on the disk before a commit refers to them."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

from pyiceberg.io import OutputStream
from pyiceberg.io.pyarrow import PyArrowFile, PyArrowFileIO

from k2 import crash


class DurableFileIO(PyArrowFileIO):
    """The library's file access, with every local file it makes synced when closed.

    The catalog (SQLite) syncs its own commit. Without this a power cut could keep the commit and
    lose the files it names; with it the files are older than the commit.
    """

    def new_output(self, location: str) -> PyArrowFile:
        """Return a file to write to that is synced when it is closed."""
        made = super().new_output(location)
        return _DurableFile(location, made._path, made._filesystem, made._buffer_size)


class _DurableFile(PyArrowFile):
    def create(self, overwrite: bool = False) -> OutputStream:
        """Open the file for writing, making its folder first."""
        path = Path(self._path)
        path.parent.mkdir(parents=True, exist_ok=True)
        return _SyncedOnClose(io.FileIO(path, "wb" if overwrite else "xb"), buffer_size=self._buffer_size)


def _point_behind(name: str) -> str:
    """Return the crash point behind a file, which the library names by its kind."""
    if name.endswith(".parquet"):
        return "cold.data_file.synced"
    if name.endswith(".metadata.json"):
        return "cold.metadata.synced"
    return "cold.manifest_list.synced" if name.startswith("snap-") else "cold.manifest.synced"


class _SyncedOnClose(io.BufferedWriter):
    def __init__(self, raw: io.FileIO, buffer_size: int) -> None:
        super().__init__(raw, buffer_size)
        self._name = Path(os.fsdecode(raw.name)).name

    def close(self) -> None:
        if not self.closed:
            self.flush()
            os.fsync(self.fileno())
            super().close()
            crash.point(_point_behind(self._name))

    def __exit__(self, *reason: Any) -> None:
        self.close()
