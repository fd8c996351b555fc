"""A machine whose power can be cut: processes on a file system that forgets what was not synced (`forgetful.py`)."""

from __future__ import annotations

import ctypes.util
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

FORGETFUL = Path(__file__).with_name("forgetful.py")
BOOT_ID = "/proc/sys/kernel/random/boot_id"
SECONDS = 20.0


def missing() -> str:
    """Return what keeps such a machine from being made here; empty when nothing does."""
    if os.name != "posix" or os.geteuid() != 0:
        return "needs root, to mount"
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "needs /dev/fuse"
    if ctypes.util.find_library("fuse") is None:
        return "needs libfuse2 (`make fuse`)"
    if shutil.which("unshare") is None or not Path(BOOT_ID).exists():
        return "needs unshare and the kernel's boot id"
    return ""


class Machine:
    """The mount `disk`, its power, and the processes that die with it. Each start has a boot id of its own."""

    def __init__(
        self, folder: Path, *, entries: str = "strict", torn: int | None = None, disk: Path | None = None
    ) -> None:
        self.disk = disk or folder / "disk"
        self._backing = folder / "backing" / "files"
        self._boot_id = folder / "boot_id"
        self._options = ["--entries", entries, *(["--torn", str(torn)] if torn is not None else [])]
        self._files: subprocess.Popen[str] | None = None
        self._running: list[subprocess.Popen[str]] = []
        self.disk.mkdir(parents=True)
        self._backing.mkdir(parents=True)

    def __enter__(self) -> Machine:
        self.switch_on()
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def switch_on(self) -> None:
        """Mount the disk as it is, under a new boot id."""
        self._boot_id.write_text(f"{uuid.uuid4()}\n")
        argv = [sys.executable, str(FORGETFUL), str(self._backing), str(self.disk), *self._options]
        self._files = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        deadline = time.monotonic() + SECONDS
        while not os.path.ismount(self.disk):
            assert self._files.poll() is None, "the file system did not start"
            assert time.monotonic() < deadline, "the file system was not mounted in time"
            time.sleep(0.01)

    def run(
        self, argv: Sequence[str], *, environment: Mapping[str, str] | None = None, output: IO[str] | int | None = None
    ) -> subprocess.Popen[str]:
        """Start a process on this machine; it dies with the power."""
        script = f'mount --bind "$0" {BOOT_ID} && exec "$@"'
        started = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", script, str(self._boot_id), *argv],
            env={**os.environ, **(environment or {})}, stdin=subprocess.DEVNULL, stdout=output,
            stderr=None if output is None or output == subprocess.PIPE else subprocess.STDOUT, text=True,
        )  # fmt: skip
        self._running.append(started)
        return started

    def cut(self) -> tuple[int, int]:
        """Cut the power at once, for all processes; returns how many files and names were put back."""
        _, files, names = self.order("cut").split()
        self._end()
        return int(files), int(names)

    def order(self, command: str) -> str:
        """Give the file system a command, and return its answer; see `forgetful.py`."""
        assert self._files is not None
        assert self._files.stdin is not None
        assert self._files.stdout is not None
        self._files.stdin.write(f"{command}\n")
        self._files.stdin.flush()
        answer = self._files.stdout.readline()
        assert answer, f"no answer to {command!r}"
        return answer

    def _end(self) -> None:
        for process in self._running:
            if process.poll() is None:
                process.kill()
        subprocess.run(["umount", "--lazy", str(self.disk)], check=False, capture_output=True)
        for process in self._running:
            process.wait(SECONDS)
        self._running.clear()
        if self._files is not None:
            self._files.kill()
            self._files.wait(SECONDS)
            for pipe in (self._files.stdin, self._files.stdout):
                if pipe is not None:
                    pipe.close()
            self._files = None
