"""Files of the cold tier that are on the disk before a commit refers to them."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

from pyiceberg.io import OutputStream
from pyiceberg.io.pyarrow import PyArrowFile, PyArrowFileIO

from k2 import crash
from k2.durable import make_folder, sync_folder


class DurableFileIO(PyArrowFileIO):
    """The library's file access, with every local file it makes synced when closed, its name in the folder too.

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
        make_folder(path.parent)
        return _SyncedOnClose(path, "wb" if overwrite else "xb", self._buffer_size)


def _point_behind(name: str) -> str:
    """Return the crash point behind a file, which the library names by its kind."""
    if name.endswith(".parquet"):
        return "cold.data_file.synced"
    if name.endswith(".metadata.json"):
        return "cold.metadata.synced"
    return "cold.manifest_list.synced" if name.startswith("snap-") else "cold.manifest.synced"


class _SyncedOnClose(io.BufferedWriter):
    def __init__(self, path: Path, mode: str, buffer_size: int) -> None:
        super().__init__(io.FileIO(path, mode), buffer_size)
        self._path = path

    def close(self) -> None:
        if self.closed:
            return
        try:
            self.flush()
            os.fsync(self.fileno())
        finally:
            super().close()
        sync_folder(self._path.parent)
        crash.point(_point_behind(self._path.name))

    def __exit__(self, *reason: Any) -> None:
        self.close()
