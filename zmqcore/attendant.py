"""The one maintenance thread of a node, started when first needed.

A call, and whoever waits for the result of a submitted one, drives its channel by itself. Where requests are
outstanding and nobody waits (callbacks, collect later) this thread is the leader of last resort: it takes the
replies and keeps the deadlines. It also calls the pool's maintain(), so that expiry goes on without traffic.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
import weakref
from typing import Protocol

from zmqcore import errors

__all__ = ["Attendant"]

_logger = logging.getLogger("zmqcore.attendant")

#: How often to look after a channel that is in no hurry, in seconds: waking up for each reply would only take the
#: interpreter from who waits for it.
_UNHURRIED_INTERVAL = 0.005
#: With more of them than this, less often in proportion.
_UNHURRIED_OFTEN = 16
#: How long after it has got no descriptor the thread tries again, in seconds. close() may have to wait for that.
_RETRY = 0.1


class Attended(Protocol):
    """What the attendant needs of a channel."""

    @property
    def fd(self) -> int: ...
    @property
    def unhurried(self) -> bool: ...
    def attend(self) -> float | None: ...


class Maintained(Protocol):
    """What the attendant needs of a pool."""

    def maintain(self) -> float | None: ...


class Attendant:
    """Attend to channels until nothing submitted is outstanding on them, and maintain pools. Thread-safe.

    The thread is a daemon. It ends with :meth:`close`, or when the attendant is garbage: it holds channels only while
    something is outstanding on them, and pools only weakly. A forked child starts with none.
    """

    def __init__(self) -> None:
        self._begin(closed=False)
        _attendants.add(self)

    def _begin(self, *, closed: bool) -> None:
        self._work = _Work(closed=closed)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._finalizer: weakref.finalize[[_Work], Attendant] | None = None

    def attend(self, channel: Attended) -> None:
        """Look after ``channel`` until its ``attend()`` returns None."""
        self._work.channels.add(channel)
        self._start()

    def maintain(self, pool: Maintained) -> None:
        """Call ``pool.maintain()`` now, and again whenever it asks for it, until it returns None."""
        self._work.pools[weakref.ref(pool)] = 0.0
        self._start()

    def _start(self) -> None:
        with self._lock:
            if self._work.closed:
                return
            if self._thread is None or not self._thread.is_alive():
                # Not alive: start() was interrupted, or there was no memory for a thread.
                if self._finalizer is None:
                    self._finalizer = weakref.finalize(self, _end, self._work)
                    self._finalizer.atexit = False
                self._thread = threading.Thread(target=self._work.run, name="zmqcore-attendant", daemon=True)
                self._thread.start()
            else:
                self._work.wake()

    def close(self, timeout: float | None = None) -> None:
        """End the thread and wait for it, ``timeout`` seconds at most: a callback may run on it. Twice is fine."""
        with self._lock:
            thread = self._thread
            _end(self._work)
        # One whose start() was interrupted has no ident, and cannot be joined.
        if thread is not None and thread.ident is not None and thread is not threading.current_thread():
            thread.join(timeout)

    def _after_fork_in_child(self) -> None:
        self._work.abandon()
        if self._finalizer is not None:
            self._finalizer.detach()
        self._begin(closed=self._work.closed)


def _end(work: _Work) -> None:
    work.closed = True
    work.wake()


class _Work:
    """What the thread has to do. It knows nothing of the attendant, which can be collected meanwhile."""

    def __init__(self, *, closed: bool) -> None:
        # Changed by single operations only, which are atomic, as copy() is; the thread iterates over copies.
        self.channels: set[Attended] = set()
        self.pools: dict[weakref.ref[Maintained], float] = {}
        self.closed = closed
        self._wake_read = self._wake_write = -1

    def abandon(self) -> None:
        """In a forked child: close its copies of the descriptors."""
        for fd in (self._wake_read, self._wake_write):
            if fd >= 0:
                os.close(fd)
        self._wake_read = self._wake_write = -1

    def wake(self) -> None:
        try:
            if self._wake_write >= 0:
                os.write(self._wake_write, b"\0")
        except OSError:
            pass  # awake already, or at its end

    def run(self) -> None:
        # Here, because no signal handler can raise on this thread and leave it open. Who had something for it before
        # needs to wake nobody: it is looked for next.
        if not self._open_pipe():
            return
        try:
            os.set_blocking(self._wake_read, False)
            os.set_blocking(self._wake_write, False)
            while not self.closed:
                fds, timeout = self._look_after_channels()
                due = self._maintain_pools()
                if due is not None:
                    timeout = due if timeout is None else min(timeout, due)
                self._wait(fds, timeout)
        finally:
            wake_read, wake_write = self._wake_read, self._wake_write
            self._wake_read = self._wake_write = -1
            os.close(wake_read)
            os.close(wake_write)

    def _open_pipe(self) -> bool:
        """Open what the thread is woken by, as soon as there is a descriptor for it. False: closed before that."""
        told = False
        while not self.closed:
            try:
                self._wake_read, self._wake_write = os.pipe()
            except OSError:
                if not told:
                    _logger.exception("nobody attends to channels: no descriptor is left, see zmqcore doctor")
                told = True
                time.sleep(_RETRY)
            else:
                if told:
                    _logger.warning("there is a descriptor again: channels are attended to")
                return True
        return False

    def _look_after_channels(self) -> tuple[list[int], float | None]:
        """Attend to each channel; return the descriptors to wait for, and for how many seconds at most."""
        fds = [self._wake_read]
        timeout: float | None = None
        n_unhurried = 0
        for channel in self.channels.copy():
            # Dropped before it says that it is done: it may be handed to us again right after.
            self.channels.discard(channel)
            try:
                left = channel.attend()
            except errors.Closed:
                left = None
            except Exception:
                _logger.exception("%r cannot be attended to", channel)
                left = None
            if left is None:
                continue
            self.channels.add(channel)
            if channel.unhurried:
                n_unhurried += 1
            else:
                fds.append(channel.fd)
            timeout = left if timeout is None else min(timeout, left)
        if n_unhurried and timeout is not None:
            timeout = min(timeout, _UNHURRIED_INTERVAL * max(1.0, n_unhurried / _UNHURRIED_OFTEN))
        return fds, timeout

    def _maintain_pools(self) -> float | None:
        """Maintain the pools whose time has come; return in how many seconds the next one's does."""
        soonest: float | None = None
        for reference, due in self.pools.copy().items():
            now = time.monotonic()
            if due <= now:
                pool = reference()
                self.pools.pop(reference, None)
                if pool is None:
                    continue
                try:
                    pause = pool.maintain()
                except Exception:
                    _logger.exception("%r cannot be maintained", pool)
                    pause = 1.0
                if pause is None:
                    continue
                self.pools[reference] = due = now + pause
            soonest = due - now if soonest is None else min(soonest, due - now)
        return soonest

    def _wait(self, fds: list[int], timeout: float | None) -> None:
        poll = select.poll()
        for fd in fds:
            poll.register(fd, select.POLLIN)
        ready = poll.poll(None if timeout is None else max(0.0, timeout * 1000))
        if any(fd == self._wake_read for fd, _ in ready):
            os.read(self._wake_read, 4096)


_attendants: weakref.WeakSet[Attendant] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for attendant in list(_attendants):
        attendant._after_fork_in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)
