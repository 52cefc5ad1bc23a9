"""The leader of last resort: one thread that attends to channels on which nobody waits.

A call, and whoever waits for the result of a submitted one, drives its channel by itself. Only where requests are
outstanding and nobody waits (callbacks, collect later) does this thread take the replies and keep the deadlines.
It is started when first needed.
"""

from __future__ import annotations

import logging
import os
import select
import threading
from typing import Protocol

from zmqcore import errors

__all__ = ["Attendant"]

_logger = logging.getLogger("zmqcore.attendant")

#: While somebody else leads a channel, look after it only now and then, in seconds.
_LED_INTERVAL = 0.005


class Attended(Protocol):
    """What the attendant needs of a channel."""

    @property
    def fd(self) -> int: ...
    @property
    def led(self) -> bool: ...
    def attend(self) -> float | None: ...


class Attendant:
    """Attend to channels until nothing submitted is outstanding on them. Thread-safe.

    A forked child starts with none. The thread is a daemon and ends with :meth:`close`.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._channels: set[Attended] = set()
        self._thread: threading.Thread | None = None
        self._wake_read = self._wake_write = -1
        self._closed = False
        self._pid = os.getpid()

    def attend(self, channel: Attended) -> None:
        """Look after ``channel`` until its ``attend()`` returns None."""
        if self._pid != os.getpid():
            self._reset()
        with self._lock:
            if self._closed:
                return
            self._channels.add(channel)
            if self._thread is None:
                self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
                self._thread = threading.Thread(target=self._run, name="zmqcore-attendant", daemon=True)
                self._thread.start()
            else:
                self._wake()

    def _wake(self) -> None:
        try:
            os.write(self._wake_write, b"\0")
        except BlockingIOError:
            pass  # it is awake already

    def close(self) -> None:
        """End the thread and wait for it. Twice is fine."""
        if self._pid != os.getpid():
            return
        with self._lock:
            self._closed = True
            thread = self._thread
            if thread is not None:
                self._wake()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _run(self) -> None:
        try:
            while True:
                with self._lock:
                    if self._closed:
                        return
                    channels = tuple(self._channels)
                self._wait(*self._look_after(channels))
        finally:
            os.close(self._wake_read)
            os.close(self._wake_write)

    def _look_after(self, channels: tuple[Attended, ...]) -> tuple[list[int], float | None]:
        """Attend to each channel; return the descriptors to wait for, and for how many seconds at most."""
        fds = [self._wake_read]
        timeout: float | None = None
        for channel in channels:
            try:
                left = channel.attend()
            except errors.Closed:
                left = None
            except Exception:
                _logger.exception("%r cannot be attended to", channel)
                left = None
            if left is None:
                self._dismiss(channel)
                continue
            if channel.led:
                left = min(left, _LED_INTERVAL)
            else:
                fds.append(channel.fd)
            timeout = left if timeout is None else min(timeout, left)
        return fds, timeout

    def _dismiss(self, channel: Attended) -> None:
        with self._lock:
            self._channels.discard(channel)

    def _wait(self, fds: list[int], timeout: float | None) -> None:
        poll = select.poll()
        for fd in fds:
            poll.register(fd, select.POLLIN)
        ready = poll.poll(None if timeout is None else max(0.0, timeout * 1000))
        if any(fd == self._wake_read for fd, _ in ready):
            os.read(self._wake_read, 4096)
