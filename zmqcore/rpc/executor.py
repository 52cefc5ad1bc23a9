"""The threads of a running server: how they receive from one port and run what comes.

There is no receiving thread that hands work to others, because handing over to another Python thread costs as much as
a whole round trip. Instead the thread that has received a request runs it:

* :class:`Inline` is one thread that does both in turn.
* :class:`Threads` are N + 1 threads, of which at most N run handlers and one at a time *receives*. Whoever has received
  runs the first request itself. Before a handler that usually takes long it wakes another thread to receive meanwhile;
  before a short one it wakes nobody and receives again right after. While requests are coming, one more thread stands
  by and looks every millisecond, without the GIL, whether a handler takes longer than it used to; then it takes over.

Each request is run in a context of its own. To make one for each would cost more than all else here, so a context is
used as long as handlers leave it empty, which is seen at once.
"""

from __future__ import annotations

import contextvars
import logging
import threading
import time
from collections.abc import Iterator

from zmqcore import errors
from zmqcore._port import Port
from zmqcore._request import Request
from zmqcore.rpc.backlog import Backlog
from zmqcore.rpc.dispatcher import Dispatcher

__all__ = ["Inline", "Threads"]

_logger = logging.getLogger("zmqcore.server")

_BATCH = 64
#: How long a draining server still listens after the last message has come, in seconds: what clients sent before
#: they heard the goodbye arrives within this time.
_DRAIN_QUIET = 0.1
_DRAIN_STEP = 0.01
#: How long a client that is awake takes to read the last goodbye, in seconds.
_FAREWELL = 0.02
#: How long replies that have been handed to libzmq may take to leave after the port is closed, in seconds.
_LINGER = 2.0
#: A handler that takes longer than this, in seconds, is worth waking another thread for.
_SLOW = 250e-6
#: How often the thread that stands by looks, and how long after the last request it still does, in seconds.
_STANDBY_INTERVAL = 0.001
_STANDBY_FOR = 0.1


class _Executor:
    """What both have in common: a port, what comes from it, and the end."""

    def __init__(self, port: Port, dispatcher: Dispatcher) -> None:
        self._port = port
        self._dispatcher = dispatcher
        self._draining = False
        self._drain_until = 0.0
        self._discard = False
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def runs_this_thread(self) -> bool:
        """Whether the calling thread is one of these: it runs a handler."""
        return threading.current_thread() in self._threads

    def ask_to_stop(self, drain: bool, deadline: float) -> None:
        """Begin what stop() does; twice is fine."""
        self._drain_until = deadline
        self._draining = drain
        if drain:
            self._port.goodbye()
            self._port.wake()
        else:
            self._discard_waiting()
            self._port.close()

    def stop(self, drain: bool, deadline: float) -> bool:
        """Take nothing new, finish what has come (with ``drain``) until ``deadline``, close the port.

        Returns whether everything was finished.
        """
        try:
            self.ask_to_stop(drain, deadline)
            for thread in self._threads:
                if thread.is_alive():  # one that start() has not reached cannot be joined
                    thread.join(max(0.0, deadline - time.monotonic()))
            finished = not any(thread.is_alive() for thread in self._threads)
            if drain and finished and self._port.farewell():
                time.sleep(_FAREWELL)
            return finished
        finally:
            self._discard_waiting()
            self._port.close(linger=_LINGER)

    def _discard_waiting(self) -> None:
        """What has not been begun is not run any more; its callers see the connection close."""
        self._discard = True

    def _batches(self) -> Iterator[list[Request]]:
        """Yield what comes, batch by batch, until the server stops.

        While draining, until nothing has come for a while and every client has all its replies.
        """
        receive = self._port.receive
        try:
            while not self._draining:
                if batch := receive(self._room(), None):
                    yield batch
            last = time.monotonic()
            while (now := time.monotonic()) < self._drain_until:
                room = self._room()
                if batch := receive(room, _DRAIN_STEP):
                    last = time.monotonic()
                    yield batch
                elif room and now - last >= _DRAIN_QUIET and self._port.settled():
                    return
        except errors.Closed:
            return
        except errors.ZmqcoreError:
            _logger.exception("the server stops: its port cannot receive")

    def _room(self) -> int:
        """How many requests may be received now. With 0 only cancels are."""
        return _BATCH


class Inline(_Executor):
    """One thread that receives and runs handlers in turn."""

    def __init__(self, port: Port, dispatcher: Dispatcher, name: str) -> None:
        super().__init__(port, dispatcher)
        port.inline = port.batching = True
        self._incoming = self._batches()
        self._batch: list[Request] = []
        self._rest = iter(self._batch)
        self._threads = [threading.Thread(target=self._loop, name=f"zmqcore-server-{name}", daemon=True)]

    @property
    def queued(self) -> int:
        """How many requests have been received and are not being run."""
        return 0

    def _loop(self) -> None:
        going_on = True
        while going_on:
            context = contextvars.Context()
            going_on = context.run(self._run, context)

    def _run(self, context: contextvars.Context) -> bool:
        """Run what comes until the server stops, or a handler has left something in ``context``: then return True."""
        while True:
            if self._dispatcher.run_each(self._rest, context):
                return True
            self._batch.clear()  # the next one may take long to come, and these may have large arguments
            batch = next(self._incoming, None)
            if batch is None:
                return False
            self._batch = batch
            self._rest = iter(batch)
            if self._discard:
                return False

    def _discard_waiting(self) -> None:
        super()._discard_waiting()
        self._batch.clear()


class Threads(_Executor):
    """``workers`` + 1 threads that take turns in receiving; at most ``workers`` run handlers.

    When all of them do, the last one goes on receiving until the backlog is full; then the port sets aside what comes,
    until one of its requests has been begun. With a backlog that rejects it is the one that answers what there is no
    room for.

    The condition's lock guards all that follows it here:
      I1. At most one thread receives: the one that has set ``_receiving``.
      I2. ``_running`` threads run handlers, or are about to; never more than ``workers``.
      I3. If nobody receives, some thread is running a handler that is expected to be short, is on its way to _take(),
          or is standing by.
    """

    def __init__(self, port: Port, dispatcher: Dispatcher, workers: int, backlog: Backlog, name: str) -> None:
        super().__init__(port, dispatcher)
        self._workers = workers
        self._durations: dict[str, float] = {}
        self._incoming = self._batches()
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._backlog = backlog
        self._receiving = False
        self._standing_by = False
        self._ended = False
        self._running = 0
        self._idle = 0
        self._last_batch = 0.0
        self._threads = [
            threading.Thread(target=self._loop, name=f"zmqcore-server-{name}-{i}", daemon=True)
            for i in range(workers + 1)
        ]

    @property
    def queued(self) -> int:
        """How many requests have been received and are not being run."""
        return len(self._backlog)

    def _loop(self) -> None:
        going_on = True
        while going_on:
            context = contextvars.Context()
            going_on = context.run(self._run, context)

    def _run(self, context: contextvars.Context) -> bool:
        """Run what comes until the server stops, or a handler has left something in ``context``: then return True."""
        durations, run, clock = self._durations, self._dispatcher.run, time.perf_counter
        while not context:
            request = self._take()
            if request is None:
                return False
            method = request.method
            usual = durations.get(method, 1.0)
            if usual > _SLOW:
                self._wake_others()
            started = clock()
            if not self._discard:
                run(request)
            seconds = clock() - started
            if usual > _SLOW or seconds > _SLOW:
                self._note_duration(method, seconds)
            del request  # the next one may take long to come, and this one may have large arguments
            with self._lock:
                self._running -= 1
        return True

    def _note_duration(self, method: str, seconds: float) -> None:
        """Remember how long the method usually takes; what has always been short needs no note."""
        if method in self._dispatcher.methods:
            self._durations[method] = 0.75 * self._durations.get(method, seconds) + 0.25 * seconds

    def _wake_others(self) -> None:
        """This thread will be busy for long: somebody else should receive, and run what waits."""
        with self._lock:
            if self._idle:
                self._rouse(1 + len(self._backlog))

    def _rouse(self, most: int) -> None:
        """Wake up to ``most`` of those who wait, who stands by first. The lock is held."""
        if self._standing_by:
            self._port.relieve()
            most -= 1
        self._changed.notify(most)

    def _room(self) -> int:
        return 0 if self._backlog.full else _BATCH

    def _pop(self) -> Request:
        """Take the next request that waits; whoever receives may have been waiting for room. The lock is held."""
        was_full = self._backlog.full
        request = self._backlog.popleft()
        if was_full:
            # Only now: who is woken looks without the lock whether there is room.
            self._port.wake()
        return request

    def _take(self) -> Request | None:
        """Return a request to run, counted as running: one that waits, or one received. None at the end."""
        while True:
            with self._lock:
                while True:
                    if self._backlog and self._running < self._workers:
                        self._running += 1
                        return self._pop()
                    if self._ended:
                        return None
                    if not self._receiving:
                        self._receiving = True
                        break
                    self._sleep()
            request = self._receive()
            if request is not None:
                return request

    def _sleep(self) -> None:
        """Wait until something has changed; one of the waiting threads stands by while requests are coming."""
        self._idle += 1
        try:
            if self._standing_by or time.monotonic() - self._last_batch > _STANDBY_FOR:
                self._changed.wait()
                return
            self._standing_by = True
            self._lock.release()
            try:
                self._port.stand_by(_STANDBY_INTERVAL, _STANDBY_FOR)
            finally:
                self._lock.acquire()
                self._standing_by = False
        finally:
            self._idle -= 1

    def _receive(self) -> Request | None:
        """Receive until there is a request that this thread may run; return it, counted as running.

        None when nothing more will come.
        """
        for batch in self._incoming:
            request = None
            with self._lock:
                self._last_batch = time.monotonic()
                rejected = self._backlog.admit(batch, self._workers - self._running)
                if self._idle and not self._standing_by:
                    self._changed.notify()
                if self._running < self._workers:
                    self._running += 1
                    request = self._backlog.popleft()
                self._receiving = request is None
            batch.clear()  # those who run them keep them, and no longer than that
            for each in rejected:
                self._dispatcher.reject(each, f"workers={self._workers} and queue_size={self._backlog.size}")
            if request is not None:
                return request
        with self._lock:
            self._ended = True
            self._receiving = False
            self._rouse(len(self._threads))
        return None
