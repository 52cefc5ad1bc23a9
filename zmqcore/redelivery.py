"""Sends again what lost channels have left undelivered: accepted messages that are not known to be finished.

It goes to the same endpoint first, which may be back in a moment, and then to whoever else the lane's owner names. One
thread does that, from the first loss until nothing is left. Of a host that does not answer it tries one member at a
time, so that they do not keep the others waiting. It never gives a message up because of the time that has passed:
until it is sent, nothing new can be accepted for that endpoint, so there is never more than what the lost channel held.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

from zmqcore import errors
from zmqcore._pool import ChannelPool
from zmqcore._retention import Lane, Retained

__all__ = ["Destination", "Redelivery", "is_finished", "wait_until_finished"]

_logger = logging.getLogger("zmqcore.redelivery")

#: Between two attempts for one lane: first and longest pause, in seconds.
_PAUSE, _PAUSE_MAX = 0.02, 1.0
#: How long one attempt may wait for a connection, and for room in a window: other lanes wait behind it.
_CONNECT_TIMEOUT, _ROOM_TIMEOUT = 1.0, 0.05
#: An attempt that took longer than this, in seconds, and failed says that its host may be gone: what else is to go
#: there counts as failed, too, for so many seconds.
_LONG, _SILENCE = 0.1, 1.0
#: What is lost again within so many seconds after it has been sent again counts as a failed attempt.
_MEMORY = 2.0
#: How long what belongs together may take to come together, in seconds. Longer than a server usually drains.
_GATHERING = 15.0
#: A warning about one lane is repeated after so many seconds at the earliest.
_WARN_INTERVAL = 30.0


class Destination(Protocol):
    """What the owner of a lane says."""

    def lane_for(self, lane: Lane, elsewhere: bool, silent: Callable[[str], bool]) -> Lane | None:
        """Return the lane on which what belongs to ``lane`` is to be sent now; None if nobody is there just now.

        ``elsewhere``: it has been tried at its own endpoint for long enough. ``silent(endpoint)``: whether its host has
        just not answered, so that another one is better. Raises Closed when nobody wants it to be sent any more.
        """


class _Load:
    """What has to be sent again for one lane, in its order."""

    def __init__(self) -> None:
        self.messages: deque[Retained] = deque()
        self.due = self.since = self.tried = 0.0
        self.failing_since: float | None = None
        self.pause = _PAUSE
        self.warned = 0.0

    def add(self, messages: Iterable[Retained]) -> None:
        if not self.messages:
            self.since = time.monotonic()
        self.messages = deque(sorted([*self.messages, *messages], key=_order))

    def put_off(self) -> None:
        """It has failed, or what was sent has come back: the next attempt comes later, and later each time."""
        now = time.monotonic()
        if self.failing_since is None:
            self.failing_since = now
        self.due = now + self.pause
        self.pause = min(2 * self.pause, _PAUSE_MAX)

    def rest(self) -> None:
        """All has been sent. Kept for a while: what comes back at once is not sent again at once."""
        self.due = time.monotonic() + _MEMORY


def _host(endpoint: str) -> str:
    """Return what members that vanish together have in common."""
    return endpoint.rpartition(":")[0] if endpoint.startswith("tcp://") else endpoint


def _order(message: Retained) -> int:
    return message.order


class Redelivery:
    """Take what channels have left undelivered, and send it again on channels of ``pool``. Thread-safe.

    ``patience``: how long, in seconds, an endpoint is tried before another one. A forked child starts with nothing.
    """

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self.pool: ChannelPool | None = None
        self.sent_again = self.given_up = 0
        self._inbox: queue.SimpleQueue[list[Retained]] = queue.SimpleQueue()
        self._loads: dict[Lane, _Load] = {}
        #: Hosts that have not answered, and until when nobody there is tried.
        self._silent: dict[str, float] = {}
        self._lanes: weakref.WeakSet[Lane] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False

    def of_child(self) -> Redelivery:
        """Return what takes its place in a forked child: what there was is the parent's."""
        renewed = Redelivery(self.patience)
        renewed._closed = self._closed
        return renewed

    def lane(self, endpoint: str, owner: Destination) -> Lane:
        """Return a new lane, which flush() knows."""
        lane = Lane(endpoint, owner)
        with self._lock:
            self._lanes.add(lane)
        return lane

    def take(self, messages: list[Retained]) -> None:
        """A channel has left these undelivered. They are sent again later; nothing is waited for."""
        # What a signal handler may do at any time: put() is reentrant, and the lock is held for a moment only.
        self._inbox.put(messages)
        if self._closed:
            self._give_up_inbox("the node is closed")
            return
        self._start()

    def _start(self) -> None:
        thread = None
        with self._lock:
            if self._thread is None:
                self._thread = thread = threading.Thread(
                    target=self._run, name="zmqcore-redelivery", daemon=True
                )
        if thread is not None:
            try:
                thread.start()
            except RuntimeError:
                # None can be started now; the next loss, or close(), tries again or says so.
                self._thread = None

    def flush(self, timeout: float) -> bool:
        """Wait until all that was accepted is finished, up to ``timeout`` seconds; return whether it is."""
        return wait_until_finished(self._known_lanes, time.monotonic() + timeout)

    def _known_lanes(self) -> list[Lane]:
        with self._lock:
            return list(self._lanes)

    def close(self, timeout: float | None = None) -> None:
        """Send nothing more; what is left is given up, and the log says how much. Twice is fine.

        Waits for the thread, ``timeout`` seconds at most: a callback may run on it.
        """
        self._closed = True
        with self._lock:
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            self._inbox.put([])
            thread.join(timeout)
        self._give_up_inbox("the node was closed")

    def stats(self) -> dict[str, int]:
        """Return the counters since it was made, and what is accepted and not finished now, wherever it is."""
        return {
            "unfinished": sum(lane.unfinished for lane in self._known_lanes()),
            "waiting": sum(len(load.messages) for load in tuple(self._loads.values())),
            "sent_again": self.sent_again,
            "given_up": self.given_up,
        }

    # -- the thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closed:
                self._collect()
                self._attempt_what_is_due()
                with self._lock:
                    if not self._loads and self._inbox.empty():
                        self._silent.clear()
                        self._thread = None
                        return
        except BaseException:
            self._thread = None
            raise
        for load in self._loads.values():
            self._inbox.put(list(load.messages))
        self._loads.clear()
        self._thread = None

    def _collect(self) -> None:
        """Sort in what has come; wait for it until the next attempt is due."""
        wait = 0.0
        if self._loads:
            wait = max(0.0, min(load.due for load in self._loads.values()) - time.monotonic())
        while True:
            try:
                messages = self._inbox.get(timeout=wait) if wait > 0 else self._inbox.get_nowait()
            except queue.Empty:
                return
            wait = 0.0
            by_lane: dict[Lane, list[Retained]] = {}
            for message in messages:
                by_lane.setdefault(message.in_lane, []).append(message)
            for lane, some in by_lane.items():
                load = self._loads.get(lane)
                if load is None:
                    load = self._loads[lane] = _Load()
                elif not load.messages:
                    load.put_off()
                load.add(some)

    def _attempt_what_is_due(self) -> None:
        """Attempt what is due, first what has not been tried for longest.

        After an attempt that took long something new may have come, whose turn it is then.
        """
        for lane, load in sorted(self._loads.items(), key=lambda item: item[1].tried):
            if self._closed:
                return
            started = time.monotonic()
            if load.due <= started:
                self._attempt(lane, load)
                if time.monotonic() - started > _LONG:
                    return

    def _attempt(self, lane: Lane, load: _Load) -> None:
        """Send what can be sent for one lane; note when to try again what cannot."""
        if not load.messages:
            del self._loads[lane]
            return
        now = time.monotonic()
        if lane.barred > len(load.messages) and now - load.since < _GATHERING:
            # Some are still on their way here, or may yet be taken where they are: in their order, or not at all.
            load.due = now + _PAUSE
            return
        elsewhere = load.failing_since is not None and now - load.failing_since > self.patience
        problem: Exception | str
        latest = math.inf
        try:
            target = lane.owner.lane_for(lane, elsewhere, self._is_silent)
            if target is None:
                problem = "nobody serves its topic"
            elif self._is_silent(target.endpoint):
                host = _host(target.endpoint)
                # Before the one that has found it silent is tried again: that may be dead alone.
                problem, latest = f"{host} has just not answered", self._silent[host]
            else:
                self._send(load, target)
                load.rest()
                return
        except errors.Closed as exc:
            self._give_up(lane, load.messages, str(exc))
            del self._loads[lane]
            return
        except errors.PayloadTooLarge as exc:
            self._give_up(lane, [load.messages.popleft()], str(exc))
            return
        except (errors.Overloaded, errors.PoolExhausted) as exc:
            problem = exc  # it is there, or has not been asked
            load.due = time.monotonic() + _PAUSE
            return
        except Exception as exc:  # noqa: BLE001 - the registry, for example; it may be better the next time
            problem = exc
        load.put_off()
        load.due = min(load.due, latest)
        if now - load.warned > _WARN_INTERVAL and load.pause > 0.5:
            load.warned = now
            _logger.warning(
                "%d accepted messages for %s cannot be sent again yet: %s",
                len(load.messages),
                lane.endpoint,
                problem,
            )

    def _is_silent(self, endpoint: str) -> bool:
        return self._silent.get(_host(endpoint), 0.0) > time.monotonic()

    def _send(self, load: _Load, target: Lane) -> None:
        assert self.pool is not None
        load.tried = time.monotonic()
        try:
            channel = self.pool.acquire(target.endpoint, _CONNECT_TIMEOUT)
        except errors.Unreachable:
            now = time.monotonic()
            if now - load.tried > _LONG:
                self._silent[_host(target.endpoint)] = now + _SILENCE
            raise
        try:
            while load.messages:
                channel.send_again(load.messages[0], target, _ROOM_TIMEOUT)
                load.messages.popleft()
                self.sent_again += 1
        finally:
            self.pool.release(channel)

    # -- giving up -------------------------------------------------------------------------------------------

    def _give_up_inbox(self, reason: str) -> None:
        left: dict[Lane, list[Retained]] = {}
        while True:
            try:
                messages = self._inbox.get_nowait()
            except queue.Empty:
                break
            for message in messages:
                left.setdefault(message.in_lane, []).append(message)
        for lane, some in left.items():
            self._give_up(lane, some, reason)

    def _give_up(self, lane: Lane, messages: Iterable[Retained], reason: str) -> None:
        n = 0
        for message in messages:
            message.give_up()
            n += 1
        self.given_up += n
        if n:
            _logger.warning(
                "%d accepted messages for %s are given up; they may have been executed: %s",
                n,
                lane.endpoint,
                reason,
            )


def is_finished(lanes: Callable[[], Iterable[Lane]]) -> bool:
    """Return whether none of ``lanes()`` has anything unfinished."""
    # Twice: what is sent again elsewhere goes from one lane to another, perhaps to one that has been looked at already.
    return not any(lane.unfinished for _ in range(2) for lane in lanes())


def wait_until_finished(lanes: Callable[[], Iterable[Lane]], deadline: float | None) -> bool:
    """Wait until nothing of ``lanes()`` is unfinished, at most until ``deadline``, a time of ``time.monotonic()``.

    Returns whether nothing is. Drives their channels meanwhile.
    """
    while not is_finished(lanes):
        for lane in lanes():
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return False
            lane.wait(left)
    return True
