"""Files of the cold tier that are on the disk before a commit refers to them."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

from pyiceberg.io import OutputStream
from pyiceberg.io.pyarrow import PyArrowFile, PyArrowFileIO


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


class _SyncedOnClose(io.BufferedWriter):
    def __init__(self, raw: io.FileIO, buffer_size: int) -> None:
        super().__init__(raw, buffer_size)

    def close(self) -> None:
        if not self.closed:
            self.flush()
            os.fsync(self.fileno())
        super().close()

    def __exit__(self, *reason: Any) -> None:
        self.close()
