# ruff: noqa: PTH101, PTH102, PTH108, PTH112, PTH115, PTH116, PTH208, PTH211
"""A file system that forgets what was not synced: a pass-through to a folder, and on command a power cut.

    python forgetful.py BACKING MOUNT [--entries strict|journal] [--torn SEED]

Reads commands on its input. `cut`: from then on every operation fails with EIO, and the backing folder is put into
the state a disk would be in: of each file what its last fsync found; names made, removed or changed only where the
folder was synced afterwards (`strict`: all POSIX promises), or where anything at all was synced afterwards (`journal`:
what ext4 and xfs do). With `--torn`, of the unsynced sectors of 512 bytes, and of the sizes, a random half is
kept, as by a disk that writes in any order. `fail EROFS` (or another error) lets everything that would change
something fail with it, `slow 0.1` take so many seconds; `heal` ends both. Each command is answered with one line.

Single-threaded. What it has to undo is kept in memory and in `.trash` beside the backing folder.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import random
import resource
import shutil
import stat
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mfusepy

SECTOR_BYTES = 512
_ATTRIBUTES = ("st_atime_ns", "st_ctime_ns", "st_gid", "st_mode", "st_mtime_ns", "st_nlink", "st_size", "st_uid",
               "st_ino", "st_blocks")  # fmt: skip


class Unsynced:
    """What must be put back into one file: its size at the last fsync, and the sectors changed since."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = os.dup(descriptor)
        self.size = os.fstat(descriptor).st_size
        self.sectors: dict[int, bytes] = {}
        self.beyond: set[int] = set()  # sectors written behind the synced size

    def changing(self, start: int, end: int) -> None:
        """Keep the content of the sectors that hold bytes `start` .. `end` (exclusive), before they change."""
        for number in range(start // SECTOR_BYTES, -(-end // SECTOR_BYTES)):
            at = number * SECTOR_BYTES
            if at >= self.size:
                self.beyond.add(number)
            elif number not in self.sectors:
                self.sectors[number] = os.pread(self.descriptor, min(SECTOR_BYTES, self.size - at), at)

    def forget(self, torn: random.Random | None) -> None:
        """Put the file back into the state of its last fsync; `torn`, a random part of what came since stays."""
        keeps_size = torn is not None and torn.random() < 0.5
        size_now = os.fstat(self.descriptor).st_size
        for number, content in self.sectors.items():
            # Cutting a file off frees sectors and writes none: they come back whole, or not at all.
            is_cut_off = number * SECTOR_BYTES >= size_now
            if torn is None or is_cut_off or torn.random() < 0.5:
                os.pwrite(self.descriptor, content, number * SECTOR_BYTES)
        if not keeps_size:
            os.ftruncate(self.descriptor, self.size)
        else:
            os.ftruncate(self.descriptor, size_now)
            for number in self.beyond:
                at = number * SECTOR_BYTES
                if torn is not None and at < size_now and torn.random() < 0.5:
                    os.pwrite(self.descriptor, bytes(min(SECTOR_BYTES, size_now - at)), at)
        self.close()

    def close(self) -> None:
        """Release the file."""
        os.close(self.descriptor)


class Change:
    """A change of names that is not durable yet: folders still to be synced, how to undo it, what is rubbish then."""

    def __init__(self, folders: set[int], undo: Callable[[], None], rubbish: str = "") -> None:
        self.folders = folders
        self.undo = undo
        self.rubbish = rubbish


_UNGUARDED = frozenset({"init", "destroy"})


def _until_cut(operations: type[Forgetful]) -> type[Forgetful]:
    """Let every operation fail once the power is cut, and none run beside the cut."""

    def guarded(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(self: Forgetful, *arguments: Any, **named: Any) -> Any:
            with self.guard:
                if self.is_cut:
                    raise OSError(errno.EIO, "the power was cut")
                if self.failing and _changes(name, arguments):
                    raise OSError(self.failing, os.strerror(self.failing))
                if self.slow_seconds and _changes(name, arguments):
                    time.sleep(self.slow_seconds)
                return operation(self, *arguments, **named)

        return run

    for name in vars(mfusepy.Operations).keys() & vars(operations).keys() - _UNGUARDED:
        if not name.startswith("_") and callable(operation := getattr(operations, name)):
            setattr(operations, name, guarded(name, operation))
    return operations


_CHANGING = frozenset({"create", "mknod", "write", "truncate", "mkdir", "rmdir", "unlink", "link", "symlink", "rename",
                       "chmod", "chown", "utimens"})  # fmt: skip


def _changes(name: str, arguments: tuple[Any, ...]) -> bool:
    """Return whether an operation is refused by a file system that is read-only.

    Not what SQLite maps into memory to share it: on a disk that stays in the kernel's pages whatever the disk does;
    here the kernel writes it back whenever another process opens the file, and forgets it when that fails.
    """
    if arguments and str(arguments[0]).endswith("-shm") and name in ("write", "open", "truncate"):
        return False
    return name in _CHANGING or (name == "open" and arguments[1] & os.O_ACCMODE != os.O_RDONLY)


@_until_cut
class Forgetful(mfusepy.Operations):
    """The pass-through."""

    use_ns = True

    def __init__(self, backing: Path, *, strict: bool, torn: int | None) -> None:
        self.backing = backing
        self.strict = strict
        self.torn = None if torn is None else random.Random(torn)
        self.guard = threading.RLock()
        self.is_cut = False
        self.failing = 0
        self.slow_seconds = 0.0
        self.unsynced: dict[int, Unsynced] = {}
        self.changes: list[Change] = []
        self.trash = backing.parent / ".trash"
        shutil.rmtree(self.trash, ignore_errors=True)
        self.trash.mkdir()
        self._trashed = 0
        self._folders: dict[int, int] = {}

    # -- the cut -----------------------------------------------------------------------

    def cut(self) -> tuple[int, int]:
        """Forget; returns how many files and how many changes of names were put back."""
        with self.guard:
            self.is_cut = True
            forgotten = len(self.unsynced), len(self.changes)
            for change in reversed(self.changes):
                with contextlib.suppress(OSError):  # its folder is gone: a durable change took it along
                    change.undo()
            for file in self.unsynced.values():
                file.forget(self.torn)
            self.changes.clear()
            self.unsynced.clear()
            shutil.rmtree(self.trash, ignore_errors=True)
            return forgotten

    def _real(self, path: str) -> str:
        return f"{self.backing}{path}"

    def _folder(self, path: str) -> tuple[int, int, str]:
        """Return inode and descriptor of the folder a path is in, and the name there."""
        parent, _, name = self._real(path).rpartition("/")
        inode = os.stat(parent).st_ino
        if inode not in self._folders:
            self._folders[inode] = os.open(parent, os.O_RDONLY | os.O_DIRECTORY)
        return inode, self._folders[inode], name

    def _made(self, path: str) -> None:
        """Note a new name."""
        inode, folder, name = self._folder(path)
        self.changes.append(Change({inode}, lambda: self._to_trash(folder, name)))

    def _to_trash(self, folder: int, name: str) -> None:
        self._trashed += 1
        os.rename(name, self.trash / str(self._trashed), src_dir_fd=folder)

    def _removed(self, path: str) -> None:
        """Remove a name so that it can come back."""
        inode, folder, name = self._folder(path)
        self._to_trash(folder, name)
        kept = str(self.trash / str(self._trashed))
        self.changes.append(Change({inode}, lambda: os.rename(kept, name, dst_dir_fd=folder), kept))

    def _synced(self, inode: int, *, is_folder: bool) -> None:
        """Note that a file or folder was synced: what that makes durable is no longer to be undone."""
        if not is_folder and (file := self.unsynced.pop(inode, None)) is not None:
            file.close()
        kept = []
        for change in self.changes:
            if is_folder:
                change.folders.discard(inode)
            if change.folders and self.strict:
                kept.append(change)
            elif change.rubbish:
                _discard(change.rubbish)
        self.changes = kept

    def _changing(self, descriptor: int, start: int, end: int) -> None:
        inode = os.fstat(descriptor).st_ino
        if inode not in self.unsynced:
            self.unsynced[inode] = Unsynced(descriptor)
        self.unsynced[inode].changing(start, end)

    # -- files -------------------------------------------------------------------------

    def create(self, path: str, mode: int, fi: Any = None) -> int:
        descriptor = os.open(self._real(path), os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
        self._made(path)
        return descriptor

    def mknod(self, path: str, mode: int, dev: int) -> int:
        os.mknod(self._real(path), mode, dev)
        self._made(path)
        return 0

    def open(self, path: str, flags: int) -> int:
        if flags & os.O_TRUNC:
            self.truncate(path, 0)
        writable = flags & os.O_ACCMODE != os.O_RDONLY
        return os.open(self._real(path), os.O_RDWR if writable else os.O_RDONLY)

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        return os.pread(fh, size, offset)

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        self._changing(fh, offset, offset + len(data))
        return os.pwrite(fh, data, offset)

    def truncate(self, path: str, length: int, fh: int | None = None) -> int:
        descriptor = os.open(self._real(path), os.O_RDWR) if fh is None else fh
        try:
            size = os.fstat(descriptor).st_size
            self._changing(descriptor, min(length, size), max(length, size))
            os.ftruncate(descriptor, length)
        finally:
            if fh is None:
                os.close(descriptor)
        return 0

    def fsync(self, path: str, datasync: int, fh: int) -> int:
        self._synced(os.fstat(fh).st_ino, is_folder=False)
        return 0

    def flush(self, path: str, fh: int) -> int:
        return 0

    def release(self, path: str, fh: int) -> int:
        os.close(fh)
        return 0

    # -- names -------------------------------------------------------------------------

    def mkdir(self, path: str, mode: int) -> int:
        os.mkdir(self._real(path), mode)
        self._made(path)
        return 0

    def rmdir(self, path: str) -> int:
        if os.listdir(self._real(path)):
            raise OSError(errno.ENOTEMPTY, "not empty")
        self._removed(path)
        return 0

    def unlink(self, path: str) -> int:
        self._removed(path)
        return 0

    def link(self, target: str, source: str) -> int:
        os.link(self._real(source), self._real(target))
        self._made(target)
        return 0

    def symlink(self, target: str, source: str) -> int:
        os.symlink(source, self._real(target))
        self._made(target)
        return 0

    def rename(self, old: str, new: str) -> int:
        if os.path.lexists(self._real(new)):
            if os.path.isdir(self._real(new)) and os.listdir(self._real(new)):
                raise OSError(errno.ENOTEMPTY, "not empty")
            self._removed(new)
        from_inode, from_folder, from_name = self._folder(old)
        to_inode, to_folder, to_name = self._folder(new)
        os.rename(from_name, to_name, src_dir_fd=from_folder, dst_dir_fd=to_folder)
        self.changes.append(
            Change(
                {from_inode, to_inode},
                lambda: os.rename(to_name, from_name, src_dir_fd=to_folder, dst_dir_fd=from_folder),
            )
        )
        return 0

    def opendir(self, path: str) -> int:
        return os.open(self._real(path), os.O_RDONLY | os.O_DIRECTORY)

    def releasedir(self, path: str, fh: int) -> int:
        os.close(fh)
        return 0

    def readdir(self, path: str, fh: int) -> list[str]:
        return [".", "..", *os.listdir(self._real(path))]

    def fsyncdir(self, path: str, datasync: int, fh: int) -> int:
        self._synced(os.stat(self._real(path)).st_ino, is_folder=True)
        return 0

    # -- the rest ----------------------------------------------------------------------

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        found = os.lstat(self._real(path)) if fh is None else os.fstat(fh)
        return {name.removesuffix("_ns"): getattr(found, name) for name in _ATTRIBUTES}

    def access(self, path: str, amode: int) -> int:
        if not os.access(self._real(path), amode):
            raise OSError(errno.EACCES, "refused")
        return 0

    def readlink(self, path: str) -> str:
        return os.readlink(self._real(path))

    def chmod(self, path: str, mode: int) -> int:
        os.chmod(self._real(path), mode)
        return 0

    def chown(self, path: str, uid: int, gid: int) -> int:
        os.chown(self._real(path), uid, gid)
        return 0

    def utimens(self, path: str, times: tuple[int, int] | None = None) -> int:
        os.utime(self._real(path), ns=times)
        return 0

    def statfs(self, path: str) -> dict[str, int]:
        found = os.statvfs(self._real(path))
        names = (
            "f_bavail",
            "f_bfree",
            "f_blocks",
            "f_bsize",
            "f_favail",
            "f_ffree",
            "f_files",
            "f_frsize",
            "f_namemax",
        )
        return {name: getattr(found, name) for name in names}


def _discard(path: str) -> None:
    with contextlib.suppress(OSError):
        if stat.S_ISDIR(os.lstat(path).st_mode):
            shutil.rmtree(path)
        else:
            os.unlink(path)


def _obey(files: Forgetful) -> None:
    for line in sys.stdin:
        if line.strip() == "cut":
            sys.stdout.write("cut {} {}\n".format(*files.cut()))
        elif line.startswith("fail "):
            files.failing = getattr(errno, line.split()[1])
            sys.stdout.write("failing\n")
        elif line.startswith("slow "):
            files.slow_seconds = float(line.split()[1])
            sys.stdout.write("slow\n")
        elif line.strip() == "heal":
            files.failing, files.slow_seconds = 0, 0.0
            sys.stdout.write("healed\n")
        sys.stdout.flush()


def main() -> None:
    """Mount, and serve until unmounted."""
    parser = argparse.ArgumentParser()
    parser.add_argument("backing", type=Path)
    parser.add_argument("mount", type=Path)
    parser.add_argument("--entries", choices=("strict", "journal"), default="strict")
    parser.add_argument("--torn", type=int)
    given = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    files = Forgetful(given.backing.absolute(), strict=given.entries == "strict", torn=given.torn)
    threading.Thread(target=_obey, args=(files,), daemon=True).start()
    mfusepy.FUSE(files, str(given.mount), foreground=True, nothreads=True, big_writes=True, fsname="forgetful")


if __name__ == "__main__":
    main()
