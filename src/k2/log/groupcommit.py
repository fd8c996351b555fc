"""Group commit: callers that append at the same time share one commit.

There is no thread behind it. The caller that finds nobody committing leads: it commits
everything queued, its own included, wakes the others, and hands the lead to the first
that queued meanwhile. A single caller so pays no switch of threads, and a process that
never appends starts nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from k2 import meters
from k2.errors import Rejected, StoreDown


class Request:
    """One batch on its way to the disk; `base_offset` is set by the commit (-1: a repeat)."""

    __slots__ = (
        "base_offset",
        "blob",
        "blob_crc32",
        "codec",
        "count",
        "error",
        "leads",
        "producer",
        "sequence",
        "turn",
    )

    def __init__(self, count: int, codec: int, blob: bytes, blob_crc32: int, producer: str, sequence: int) -> None:
        self.count = count
        self.codec = codec
        self.blob = blob
        self.blob_crc32 = blob_crc32
        self.producer = producer
        self.sequence = sequence
        self.base_offset: int | None = None
        self.error: StoreDown | None = None
        self.leads = False
        self.turn = threading.Lock()  # released when the request is done or is to lead
        self.turn.acquire()


class GroupCommit:
    """A bounded queue of requests in front of `commit`, which one thread at a time calls.

    `commit` gets requests in the order they queued and sets `base_offset` of each, or raises:
    then none of them is stored. When the queue holds `max_frames` or `max_bytes`, callers wait.
    """

    def __init__(self, commit: Callable[[list[Request]], None], *, max_frames: int, max_bytes: int) -> None:
        self._commit = commit
        self._max_frames = max_frames
        self._max_bytes = max_bytes
        self._changed = threading.Condition(threading.Lock())
        self._queue: list[Request] = []
        self._frames = 0
        self._bytes = 0
        self._is_led = False
        self._closed = False
        meters.watch("log.queue_frames", self, lambda group: group._frames)
        meters.watch("log.queue_bytes", self, lambda group: group._bytes)

    def submit(self, request: Request) -> int:
        """Return the offset of the stored batch when it is durable.

        Raises:
            StoreDown: from the commit.
        """
        with self._changed:
            if not self._has_room(request):
                with meters.waiting("log.queue_frames"):
                    self._changed.wait_for(lambda: self._closed or self._has_room(request))
            if self._closed:
                raise Rejected("log: it was closed; open a new one")
            self._queue.append(request)
            self._frames += request.count
            self._bytes += len(request.blob)
            if not self._is_led:
                self._is_led = request.leads = True
        if not request.leads:
            self._await_turn(request)
        if request.leads:
            self._lead()
        if request.error is not None:
            raise request.error
        if request.base_offset is None:
            raise StoreDown("log: the append was interrupted; stored or not is unknown, append again with a producer")
        return request.base_offset

    def close(self) -> None:
        """Let what is queued finish, refuse what comes."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._is_led)

    def _has_room(self, request: Request) -> bool:
        if not self._queue:
            return True  # a batch above the limits still passes, alone
        return self._frames + request.count <= self._max_frames and self._bytes + len(request.blob) <= self._max_bytes

    def _await_turn(self, request: Request) -> None:
        try:
            request.turn.acquire()
        except BaseException:  # Ctrl-C while waiting: the others must not wait for this thread to lead
            with self._changed:
                if request.leads:
                    self._remove(request)
                    self._hand_on()
                elif request in self._queue:
                    self._remove(request)
            raise

    def _lead(self) -> None:
        with self._changed:
            group, self._queue = self._queue, []
            self._frames = self._bytes = 0
            self._changed.notify_all()
        try:
            self._commit(group)
        except StoreDown as error:
            for request in group:
                request.error = StoreDown(*error.args)  # one each: a raised error belongs to one thread
        finally:
            for request in group:
                if not request.leads:
                    request.turn.release()
            with self._changed:
                self._hand_on()

    def _hand_on(self) -> None:
        if self._queue:
            self._queue[0].leads = True
            self._queue[0].turn.release()
        else:
            self._is_led = False
            self._changed.notify_all()

    def _remove(self, request: Request) -> None:
        self._queue.remove(request)
        self._frames -= request.count
        self._bytes -= len(request.blob)
        self._changed.notify_all()
