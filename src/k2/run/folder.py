"""The folder `run` of an installation: who holds it, and status files by which processes tell of themselves."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from k2 import crash
from k2.durable import make_folder
from k2.errors import InUse, Misconfigured
from k2.settings import Settings

StatusT = TypeVar("StatusT", bound=msgspec.Struct)

LOCK_POLL_SECONDS = 0.02
# A look at who holds a lock takes it for a moment (`holder`), so a first refusal may mean nothing.
LOCK_WAIT_SECONDS = 0.5


def run_folder(settings: Settings) -> Path:
    """Return `<data>/run`, made if missing; raises Misconfigured when it cannot be."""
    folder = settings.data_path / "run"
    try:
        make_folder(folder)
    except OSError as error:
        raise Misconfigured(
            f"data folder {settings.data_path} cannot be used: {error.strerror} ({error.filename}); "
            "mend its permissions or choose another with --data"
        ) from None
    return folder


@contextlib.contextmanager
def hold(path: Path, role: str, conflict: str, *, wait_seconds: float = LOCK_WAIT_SECONDS) -> Iterator[None]:
    """Hold a lock file as long as the block runs; the kernel releases it however the process ends.

    `role` and the process id are written into it. `conflict` is the message for everybody else, with
    `{owner}` in it.

    Raises:
        InUse: another process still holds it after `wait_seconds`.
        Misconfigured: the file cannot be opened.
    """
    descriptor = _open(path)
    try:
        _lock(descriptor, conflict, time.monotonic() + wait_seconds)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} {role}".encode(), 0)
        yield
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)  # releases the lock; the file stays, removing it would let two hold "it"


def holder(path: Path) -> tuple[int, str] | None:
    """Return process id and role of who holds a lock file, or None when nobody does."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return _read_owner(descriptor)
    finally:
        os.close(descriptor)
    return None


def hold_data_folder(settings: Settings, role: str = "k2 up") -> contextlib.AbstractContextManager[None]:
    """Hold the data folder for one `k2 up`; raises InUse naming the process that has it."""
    return hold(
        run_folder(settings) / "k2.lock",
        role,
        f"data folder {settings.data_path} is already in use by {{owner}}; stop it or choose another with --data",
    )


def data_folder_holder(settings: Settings) -> tuple[int, str] | None:
    """Return process id and role of who runs on this data folder, or None."""
    return holder(settings.data_path / "run" / "k2.lock")


def publish(path: Path, status: bytes) -> None:
    """Replace a status file by a new one at once; a reader sees the old or the new, never a half. Raises OSError.

    One process at a time writes a status: it holds its role's lock. So a draft its predecessor left is written over.
    """
    draft = path.with_name(f"{path.name}.draft")
    draft.write_bytes(status)
    crash.point("run.publish.drafted")
    draft.replace(path)


def read_status(path: Path, kind: type[StatusT]) -> StatusT | None:
    """Return what a status file says, or None when there is none that can be read."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError):
        return None


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise Misconfigured(
            f"lock file {path} cannot be opened: {error.strerror}; "
            "mend the permissions of the data folder or choose another with --data"
        ) from None


def _lock(descriptor: int, conflict: str, deadline: float) -> None:
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if time.monotonic() >= deadline:
                owner = _read_owner(descriptor)
                named = f"`{owner[1]}` (pid {owner[0]})" if owner else "another process"
                raise InUse(conflict.format(owner=named)) from None
        time.sleep(LOCK_POLL_SECONDS)


def _read_owner(descriptor: int) -> tuple[int, str] | None:
    pid, _, role = os.pread(descriptor, 1_000, 0).decode("utf-8", "replace").partition(" ")
    return (int(pid), role) if pid.isdecimal() else None
