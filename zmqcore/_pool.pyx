# cython: language_level=3, embedsignature=True, auto_pickle=False, freethreading_compatible=True
"""The channels of one process under one hard budget of sockets.

One channel per endpoint, shared by all threads: acquire() counts a user in, release() counts it out. What nobody
uses stays open for the next one, and gives way when the budget is needed elsewhere.

A slot is one place in the budget. It is *connecting*, *open* (in use or idle), *draining* (to be closed once what was
sent is acknowledged) or *closing* (closed by us, but libzmq's threads have not got to it: the descriptors are still
there). All of these count: total = connecting + open + draining + closing <= max_sockets, at every instant.

Which idle slot gives way: a segmented LRU. A new channel begins on *probation*; one that is used again after a few
other channels have been opened since is *protected*, up to four fifths of the budget. Victims come from the probation
ring first, least recently used first. So a scan over thousands of endpoints that are used once each passes
through probation and leaves the hot ones alone, which plain LRU would not (and frequency counts would need ageing).

Every change of state happens in short functions under the table's lock; what they return (channels to make, close or
drain, waiters to wake) is acted on outside it. Invariants, under the lock:
  I1. total is the number of slots that are not GONE, and never above max_sockets.
  I2. A slot stands in a ring exactly while it is open, has no users and is not persistent.
  I3. ``queue`` is empty unless the budget is used up: whoever frees a place hands it to the first in the queue.
  I4. A Turn that has given up stands in no list, and holds no slot.
"""

import os
import random
import resource
import sys
import threading
import time
import weakref

cimport cython
from libc.math cimport exp2, log2
from libc.stdint cimport INT64_MAX, int64_t, uint64_t

from zmqcore._channel cimport STATE_LOST, STATE_OPEN, Channel
from zmqcore._socket cimport NEVER, OpenFds, Waiter, deadline_after, now_ns, waiter_borrow, waiter_return

from zmqcore import _channel, errors  # noqa: F401  (_channel fills the function table)

__all__ = ["ChannelPool", "default_max_sockets"]

# A connection over loopback takes well under a millisecond; one that is refused never shows. After this time it is
# worth asking the endpoint by a plain connect(2), in ns.
cdef int64_t FIRST_PROBE_AFTER = 3_000_000
# How long to wait for libzmq's threads between two looks at sockets that are closing, in ns.
cdef int64_t REAP_INTERVAL = 100_000
# Backoff after a failed connection, in ns: the first pause, and the longest. Doubles with each failure.
cdef int64_t BACKOFF_FIRST = 20_000_000
cdef int64_t BACKOFF_MAX = 1_000_000_000
# How long a failure is remembered without a new attempt, in ns, and of how many endpoints.
cdef int64_t FAILURE_KEPT = 60_000_000_000
cdef Py_ssize_t FAILURES_KEPT = 65_536
# A channel used 2^n times lately keeps its socket for n + 1 times idle_ttl, at most this many times.
cdef double LONGEST_TTL = 8.0
# Openings since a channel's own that make its next use count as a return, not as part of its first use.
cdef uint64_t RETURN_DISTANCE = 4

#: Upper bounds of the wait histogram's buckets, in seconds; the last bucket holds all above.
WAIT_BUCKETS = (0.0001, 0.001, 0.01, 0.1, 1.0, 10.0)


def default_max_sockets() -> int:
    """Return how many pooled sockets this process may hold, from its limit on file descriptors (RLIMIT_NOFILE).

    A pooled socket costs two descriptors. A quarter of the limit, at least 128, is left to everything else.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return 8192
    return max(8, min(8192, (soft - max(128, soft // 4)) // 2))


class _Failure:
    """Why an endpoint could not be reached, and until when it is not tried again."""

    __slots__ = ("attempts", "last", "reason", "since", "until")

    def __init__(self, since):
        self.attempts = 0
        self.since = since
        self.until = self.last = 0
        self.reason = ""


@cython.final
cdef class Slot:
    """One place in the budget: a channel, or one that is being made."""


@cython.final
cdef class Ring:
    """Idle slots in the order of their last use: a doubly linked ring. All operations take constant time."""

    def __cinit__(self):
        self.anchor = Slot.__new__(Slot)
        self.anchor.before = self.anchor.behind = self.anchor

    cdef int push(self, Slot slot) except -1:
        """Add ``slot`` as the most recently used."""
        cdef Slot last = self.anchor.before
        slot.before, slot.behind = last, self.anchor
        last.behind = self.anchor.before = slot
        slot.ring = self
        self.length += 1
        return 0

    cdef int remove(self, Slot slot) except -1:
        slot.before.behind, slot.behind.before = slot.behind, slot.before
        slot.before = slot.behind = slot.ring = None
        self.length -= 1
        return 0


@cython.final
cdef class Turn:
    """One thread in the queue for a place in the budget."""


@cython.final
cdef class Table:
    """The pool's state. A forked child gets a new one: the parent's may be half changed, its lock held."""

    def __cinit__(self):
        self.slots = {}
        self.probation = Ring()
        self.protected = Ring()
        self.draining = []
        self.closing = []
        self.queue = {}
        self.making = {}
        self.failures = {}
        self.fds = OpenFds()


cdef class ChannelPool:
    """Keep at most ``max_sockets`` channels, made by ``connect(endpoint)``.

    ``max_sockets``: default from the limit on descriptors, see default_max_sockets(); each costs two descriptors.
    ``max_sockets_per_endpoint``: more than one spreads the users of one endpoint; order holds per channel only.
    ``idle_ttl``: how long, in seconds, a channel that was used once stays open without use. Each doubling of its uses
    (which halve with every ``idle_ttl`` that passes) adds as much again, up to 8 times: hot endpoints keep their
    sockets. ``max_lifetime``: after how many seconds an idle channel is replaced in any case. Both vary by up to a
    tenth, so that channels of one age do not reconnect together.
    ``acquire_timeout``: how long, in seconds, acquire() waits if its caller sets no limit. ``max_waiting``: how many
    threads may wait; a further one is refused at once. ``connect_timeout``: how long an endpoint may take to connect.
    ``drain_timeout``: how long a channel that is to close may wait for its acknowledgements.
    ``probe(endpoint, timeout)``: says why an endpoint cannot be reached, or returns None.
    ``maintenance(pool)``: called when the first channel is opened; who is responsible then calls maintain() as it
    says, so that expiry goes on without traffic. ``clock``: monotonic seconds, for tests.

    Thread-safe by its own lock. In a forked child it is empty and works; nothing of the parent's is used or closed.
    """

    def __init__(
        self, connect, *, max_sockets: int | None = None, max_sockets_per_endpoint: int = 1, idle_ttl: float = 300.0,
        max_lifetime: float = 3600.0, acquire_timeout: float = 30.0, max_waiting: int = 10_000,
        connect_timeout: float = 2.0, drain_timeout: float = 5.0, probe=None, maintenance=None, clock=None,
    ):
        self.max_sockets = default_max_sockets() if max_sockets is None else max_sockets
        if self.max_sockets < 1:
            raise ValueError(f"max_sockets is {max_sockets}; it must be at least 1")
        if max_sockets_per_endpoint < 1:
            raise ValueError(f"max_sockets_per_endpoint is {max_sockets_per_endpoint}; it must be at least 1")
        if max_waiting < 0:
            raise ValueError(f"max_waiting is {max_waiting}; it must not be negative")
        for name, seconds in (
            ("idle_ttl", idle_ttl), ("max_lifetime", max_lifetime), ("acquire_timeout", acquire_timeout),
            ("connect_timeout", connect_timeout), ("drain_timeout", drain_timeout),
        ):
            if not 0 < seconds <= 1e9:
                raise ValueError(f"{name} is {seconds!r} s; it must be above 0 and at most 10**9")
        self.max_sockets_per_endpoint = max_sockets_per_endpoint
        self.max_waiting = max_waiting
        self.max_protected = self.max_sockets * 4 // 5
        # Several victims at a time: libzmq closes one while the next is connected already.
        self.batch = max(1, min(8, self.max_sockets // 32))
        self.idle_ttl_ns = idle_ttl * 1e9
        self.max_lifetime_ns = <int64_t>(max_lifetime * 1e9)
        self.connect_timeout_ns = <int64_t>(connect_timeout * 1e9)
        self.acquire_timeout_ns = <int64_t>(acquire_timeout * 1e9)
        self.drain_timeout_ns = <int64_t>(drain_timeout * 1e9)
        self.connect = connect
        self.probe = probe
        self.maintenance = maintenance
        self.clock = clock
        self.pinned = set()
        self.wait_histogram = [0] * (len(WAIT_BUCKETS) + 1)
        self.table = Table()
        _pools.add(self)

    cdef int64_t now(self) except -1:
        if self.clock is None:
            return now_ns()
        return <int64_t>(self.clock() * 1e9)

    # -- acquire and release -----------------------------------------------------------------------------

    cpdef Channel acquire_open(self, str endpoint):
        """Return the channel to ``endpoint`` if it is open already, else None. Never waits.

        What is returned is to be given back by release().
        """
        cdef Table table = self.table
        cdef Slot slot
        cdef Channel channel = None
        table.lock.acquire()
        slot = self._find(table, endpoint)
        if slot is not None and slot.stage == STAGE_OPEN:
            self._use(table, slot)
            channel = slot.channel
        table.lock.release()
        return channel

    def acquire(self, str endpoint not None, timeout: float | None = None, *, persistent: bool = False) -> Channel:
        """Return the connected channel to ``endpoint``, to be given back by release().

        Waits up to ``timeout`` seconds (default: the pool's acquire_timeout), first come first served, for a place in
        the budget, and for the connection. ``persistent`` pins the endpoint, see pin(). Raises PoolExhausted with the
        numbers when there is no place in time or too many wait already, Unreachable with the reason when the endpoint
        cannot be reached or has just been found to be, and Closed.
        """
        cdef int64_t deadline
        cdef Slot slot
        cdef Channel channel
        if persistent:
            self.pin(endpoint)
        channel = self.acquire_open(endpoint)
        if channel is not None:
            return channel
        deadline = now_ns() + self.acquire_timeout_ns if timeout is None else deadline_after(timeout)
        slot = self._obtain(endpoint, deadline)
        try:
            self._connected(slot, deadline)
        except BaseException:
            self.release(slot.channel)
            raise
        return slot.channel

    cpdef release(self, Channel channel):
        """Give back what acquire() returned. Never raises for a channel of this pool, never waits."""
        cdef Table table = self.table
        cdef Slot slot = channel.owner
        cdef bint pump = False
        cdef bint retire = False
        if slot is None:
            raise errors.InternalError(f"{channel!r} does not belong to a pool")
        table.lock.acquire()
        if slot.users > 0 and slot.stage != STAGE_GONE:
            slot.users -= 1
            if slot.users == 0:
                table.in_use -= 1
                slot.last_used = self.now()
                if slot.stage == STAGE_OPEN:
                    if channel.state > STATE_OPEN or channel.goodbye or channel.suspect:
                        retire = True
                    else:
                        self._park(table, slot)
                elif slot.stage == STAGE_CONNECTING:
                    # Nobody waits for the connection any more; it may still come, but takes no place for that.
                    retire = True
                pump = retire or len(table.queue) > 0 or table.closed
                if retire:
                    self._forget(table, slot, STAGE_DRAINING)
        table.lock.release()
        if retire:
            self._begin_drain(slot)
        if pump:
            self._pump()

    def pin(self, endpoint: str) -> None:
        """Keep the channel to ``endpoint``, once it is open, until unpin(): no eviction, no expiry."""
        cdef Table table = self.table
        cdef Slot slot
        with table.lock:
            if len(self.pinned) >= self.max_sockets and endpoint not in self.pinned:
                raise errors.PoolExhausted(
                    f"{len(self.pinned)} endpoints are pinned, as many as the pool has sockets; {endpoint} cannot be")
            self.pinned.add(endpoint)
            for slot in table.slots.get(endpoint, ()):
                slot.persistent = True
                if slot.ring is not None:
                    slot.ring.remove(slot)

    def unpin(self, endpoint: str) -> None:
        """Undo pin(). An endpoint that is not pinned is ignored."""
        cdef Table table = self.table
        cdef Slot slot
        with table.lock:
            self.pinned.discard(endpoint)
            for slot in table.slots.get(endpoint, ()):
                slot.persistent = False
                if slot.users == 0 and slot.ring is None and slot.stage == STAGE_OPEN:
                    self._park(table, slot)
        self._pump()

    # -- changes of state: short, under the lock, no I/O ---------------------------------------------------

    cdef Slot _find(self, Table table, str endpoint):
        """Return the slot of ``endpoint`` to share, or None if a new one is wanted. Skips what is lost."""
        cdef list slots = table.slots.get(endpoint)
        cdef Slot slot, best = None
        if slots is None:
            return None
        for slot in slots:
            if slot.stage == STAGE_OPEN and (slot.channel.state > STATE_OPEN or slot.channel.goodbye):
                continue
            if best is None or slot.users < best.users:
                best = slot
        if best is not None and best.users and len(slots) < self.max_sockets_per_endpoint \
                and table.total < self.max_sockets:
            return None
        return best

    cdef int _use(self, Table table, Slot slot) except -1:
        """Count one more user in."""
        cdef int64_t idle
        if slot.users == 0:
            table.in_use += 1
            if slot.ring is not None:
                slot.ring.remove(slot)
            idle = self.now() - slot.last_used
            if idle > self.idle_ttl_ns / 16:
                slot.uses *= exp2(-idle / self.idle_ttl_ns)
            if not slot.protected and self.n_opened - slot.opened_before >= RETURN_DISTANCE:
                slot.protected = True
        slot.users += 1
        slot.uses += 1
        self.n_reused += 1
        return 0

    cdef Slot _reserve(self, Table table, str endpoint):
        """Take a place in the budget, with one user, for a channel that is to be made."""
        cdef Slot slot = Slot.__new__(Slot)
        slot.endpoint = endpoint
        slot.stage = STAGE_CONNECTING
        slot.users = 1
        slot.uses = 1
        slot.created = slot.last_used = self.now()
        slot.made_ns = now_ns()
        slot.jitter = random.uniform(0.9, 1.0)
        slot.persistent = endpoint in self.pinned
        slot.fd = -1
        self.n_opened += 1
        slot.opened_before = self.n_opened
        table.total += 1
        table.in_use += 1
        table.slots.setdefault(endpoint, []).append(slot)
        return slot

    cdef int _park(self, Table table, Slot slot) except -1:
        """An open slot has become idle: put it into its ring."""
        cdef Slot demoted
        if slot.persistent:
            return 0
        if not slot.protected:
            table.probation.push(slot)
            return 0
        table.protected.push(slot)
        if table.protected.length > self.max_protected:
            demoted = table.protected.anchor.behind
            table.protected.remove(demoted)
            demoted.protected = False
            demoted.opened_before = self.n_opened
            table.probation.push(demoted)
        return 0

    cdef int _forget(self, Table table, Slot slot, int stage) except -1:
        """Take a slot out of use: nobody finds it any more. It still counts until it is GONE."""
        cdef list slots = table.slots.get(slot.endpoint)
        if slots is not None and slot in slots:
            slots.remove(slot)
            if not slots:
                del table.slots[slot.endpoint]
        if slot.ring is not None:
            slot.ring.remove(slot)
        if slot.stage == STAGE_DRAINING:
            table.draining.remove(slot)
        slot.stage = stage
        if stage == STAGE_DRAINING:
            table.draining.append(slot)
        elif stage == STAGE_CLOSING:
            table.closing.append(slot)
        elif stage == STAGE_GONE:
            table.total -= 1
        return 0

    cdef int _reap(self, Table table) except -1:
        """Count out the slots whose descriptors have gone by now."""
        cdef Slot slot
        cdef list still
        if table.closing:
            still = []
            for slot in table.closing:
                if slot.fd >= 0 and table.fds.is_open(slot.fd):
                    still.append(slot)
                else:
                    slot.stage = STAGE_GONE
                    table.total -= 1
            table.closing = still
        return 0

    cdef int _grant(self, Table table) except -1:
        """Hand free places to the first in the queue; wake everybody who waits for the same endpoint."""
        cdef Turn turn
        cdef list turns
        while table.queue and table.total < self.max_sockets:
            endpoint = next(iter(table.queue))
            turns = table.queue.pop(endpoint)
            table.waiting -= len(turns)
            if self._find(table, endpoint) is None and not table.closed:
                turn = turns[0]
                turn.slot = self._reserve(table, endpoint)
            for turn in turns:
                turn.awake = True
                turn.waiter.wake()
            self._wake_head(table)
        return 0

    cdef int _wake_head(self, Table table) except -1:
        """Whoever is first in the queue looks after the sockets that are closing: there is something new to see."""
        cdef Turn turn
        if table.closing and table.queue:
            turn = table.queue[next(iter(table.queue))][0]
            turn.waiter.wake()
        return 0

    cdef list _victims(self, Table table):
        """Choose idle slots to close for those in the queue, and take them out of use."""
        cdef Slot slot
        cdef list victims = []
        cdef Py_ssize_t wanted = len(table.queue) - len(table.closing) - len(table.draining)
        cdef Py_ssize_t spare = self.batch - 1
        cdef Ring ring
        while wanted > 0 or (victims and spare > 0):
            if wanted <= 0:
                spare -= 1
                if not table.probation.length:
                    break
            ring = table.probation if table.probation.length else table.protected
            if not ring.length:
                break
            slot = self._least_missed(ring)
            self._forget(table, slot, STAGE_DRAINING)
            if slot.channel.is_clean():
                self.n_evicted_clean += 1
            else:
                self.n_evicted_draining += 1
            victims.append(slot)
            wanted -= 1
        return victims

    cdef Slot _least_missed(self, Ring ring):
        """Return the least recently used slot that can close at once; if there is none near, the very least."""
        cdef Slot slot = ring.anchor.behind
        cdef int i
        for i in range(8):
            if slot is ring.anchor:
                break
            if slot.channel.is_clean():
                return slot
            slot = slot.behind
        return ring.anchor.behind

    cdef int _pump(self) except -1:
        """Move things on: count out what has gone, hand out places, close victims for those who wait."""
        cdef Table table = self.table
        cdef list victims
        with table.lock:
            self._reap(table)
            self._grant(table)
            victims = self._victims(table) if table.queue else []
        for slot in victims:
            self._begin_drain(slot)
        return 0

    # -- what is done outside the lock ---------------------------------------------------------------------

    def _begin_drain(self, Slot slot not None):
        """Close a slot's channel as soon as nothing is outstanding on it: mostly at once."""
        cdef Channel channel = slot.channel
        if channel is None:
            self._gone(slot)
            return
        channel.retire(self._drained, self.drain_timeout_ns / 1e9)

    def _drained(self, Channel channel not None):
        """Nothing is outstanding on the channel of a draining slot, or it is lost: close it."""
        cdef Table table = self.table
        cdef Slot slot = channel.owner
        with table.lock:
            if slot.stage != STAGE_DRAINING:
                return
            if channel.state == STATE_LOST:
                self.n_drain_lost += 1
            else:
                self.n_drained += 1
            self._note_closing(table, slot)
        channel.close()
        with table.lock:
            self._wake_head(table)

    def _note_closing(self, Table table not None, Slot slot not None):
        """The slot's socket is about to be closed: its place is free when its descriptors have gone."""
        # First count out an earlier socket whose descriptor had the same number.
        self._reap(table)
        try:
            table.fds.add(slot.fd)
        except errors.ZmqcoreError:
            slot.fd = -1        # cannot be watched: then it does not count
        self._forget(table, slot, STAGE_CLOSING)

    def _gone(self, Slot slot not None):
        """A slot whose channel could not even be made."""
        cdef Table table = self.table
        with table.lock:
            if slot.stage != STAGE_GONE:
                if slot.users:
                    slot.users = 0
                    table.in_use -= 1
                self._forget(table, slot, STAGE_GONE)
                self._wake_making(table, slot.endpoint)
        self._pump()

    def _wake_making(self, Table table not None, endpoint):
        cdef Turn turn
        for turn in table.making.pop(endpoint, ()):
            turn.awake = True
            turn.waiter.wake()

    def _obtain(self, str endpoint, int64_t deadline) -> Slot:
        """Return a slot for ``endpoint``, counted in, whose channel has been made."""
        cdef Table table = self.table
        cdef Turn turn
        cdef Slot slot
        cdef int64_t started = 0
        while True:
            turn = None
            stale = ()
            with table.lock:
                if table.closed:
                    raise errors.Closed("the pool is closed")
                stale = self._retire_stale(table, endpoint)
                slot = self._find(table, endpoint)
                if slot is not None and slot.channel is not None:
                    self._use(table, slot)
                elif slot is not None:
                    turn = self._queue_up(table.making, endpoint)
                else:
                    self._check_negative(table, endpoint)
                    self._reap(table)
                    if not table.queue and table.total < self.max_sockets:
                        slot = self._reserve(table, endpoint)
                    else:
                        if table.waiting >= self.max_waiting:
                            self.n_refused += 1
                            raise errors.PoolExhausted(
                                f"{self._numbers(table)}; {table.waiting} threads wait already (limit"
                                f" {self.max_waiting}), so {endpoint} was refused at once")
                        turn = self._queue_up(table.queue, endpoint)
                        table.waiting += 1
            for other in stale:
                self._begin_drain(other)
            if turn is None:
                if slot.channel is None:
                    self._make(slot)
                return slot
            if not started:
                started = now_ns()
                self.n_waits += 1
            slot = self._wait(table, turn, endpoint, deadline, started)
            if slot is not None:
                self._count_wait(now_ns() - started)
                self._make(slot)
                return slot

    def _queue_up(self, dict queue, endpoint) -> Turn:
        cdef Turn turn = Turn.__new__(Turn)
        turn.waiter = waiter_borrow()
        queue.setdefault(endpoint, []).append(turn)
        return turn

    def _wait(self, Table table not None, Turn turn not None, str endpoint, int64_t deadline, int64_t started) -> Slot | None:
        """Wait until it is ``turn``'s turn. Return the place granted, or None to look again.

        Raises PoolExhausted at the deadline; a place that is granted at the same moment goes to the next one.
        """
        cdef int64_t now
        cdef bint given_up = True
        cdef Slot slot
        try:
            while not turn.awake:
                self._pump()
                if turn.awake:
                    break
                now = now_ns()
                if now >= deadline:
                    with table.lock:
                        numbers = self._numbers(table)
                    self.n_timeouts += 1
                    raise errors.PoolExhausted(
                        f"{numbers}; waited {(now - started) / 1e9:.3g} s for a socket to {endpoint}")
                # The first in the queue looks again soon; who is first after it is woken then.
                head = table.closing and self._is_head(table, turn, endpoint)
                turn.waiter.wait(-1, min(deadline, now + (REAP_INTERVAL if head else 1_000_000_000)), 0)
            given_up = False
        finally:
            with table.lock:
                self._leave_queue(table, turn, endpoint)
                slot, turn.slot = turn.slot, None
                closed = table.closed
            waiter_return(turn.waiter)
            if slot is not None and (given_up or closed):
                self._gone(slot)
        if closed:
            raise errors.Closed("the pool was closed while waiting for a socket")
        return slot

    def _is_head(self, Table table not None, Turn turn not None, endpoint) -> bool:
        cdef list turns
        with table.lock:
            turns = table.queue.get(endpoint)
            return bool(turns) and turns[0] is turn and next(iter(table.queue)) == endpoint

    def _leave_queue(self, Table table not None, Turn turn not None, endpoint):
        cdef list turns
        for queue in (table.queue, table.making):
            turns = queue.get(endpoint)
            if turns is not None and turn in turns:
                turns.remove(turn)
                if queue is table.queue:
                    table.waiting -= 1
                if not turns:
                    del queue[endpoint]
                self._wake_head(table)

    def _retire_stale(self, Table table not None, str endpoint):
        """Take channels to ``endpoint`` that are lost, or whose server takes nothing new, out of use.

        Returns those to drain; one that is still in use drains when it is released.
        """
        cdef Slot slot
        cdef list stale = []
        for slot in list(table.slots.get(endpoint, ())):
            if slot.stage == STAGE_OPEN and (slot.channel.state > STATE_OPEN or slot.channel.goodbye):
                if slot.channel.goodbye:
                    self.n_goodbye += 1
                else:
                    self.n_lost += 1
                if slot.users == 0:
                    self._forget(table, slot, STAGE_DRAINING)
                    stale.append(slot)
                else:
                    # Still counted, still found by its users only.
                    table.slots[endpoint].remove(slot)
                    if not table.slots[endpoint]:
                        del table.slots[endpoint]
        return stale

    def _make(self, Slot slot not None):
        """Make the channel of a reserved slot. On an error its place is free again."""
        cdef Channel channel
        cdef Table table = self.table
        try:
            channel = self.connect(slot.endpoint)
        except BaseException:
            self._gone(slot)
            raise
        channel.owner = slot
        slot.fd = channel.shared.fd
        with table.lock:
            slot.channel = channel
            first = not table.maintained
            table.maintained = True
            self._wake_making(table, slot.endpoint)
        if first and self.maintenance is not None:
            self.maintenance(self)

    def _connected(self, Slot slot not None, int64_t deadline):
        """Wait until the slot's channel is open; if the endpoint refuses, say so at once."""
        cdef Table table = self.table
        cdef Channel channel = slot.channel
        cdef int64_t started = now_ns()
        cdef int64_t patience = FIRST_PROBE_AFTER
        cdef int64_t limit = min(deadline, max(slot.made_ns + self.connect_timeout_ns, started + FIRST_PROBE_AFTER))
        cdef int64_t now
        if slot.stage == STAGE_OPEN:
            return
        while True:
            now = now_ns()
            if channel.wait_open(max(0, min(limit - now, patience)) / 1e9):
                with table.lock:
                    if slot.stage == STAGE_CONNECTING:
                        slot.stage = STAGE_OPEN
                        table.failures.pop(slot.endpoint, None)
                return
            if channel.state > STATE_OPEN:
                raise errors.PeerLost(
                    f"{channel.endpoint}: the channel was lost while connecting", executed_possible=False)
            now = now_ns()
            reason = None
            if self.probe is not None:
                reason = self.probe(channel.endpoint, max(0.001, min(limit - now, 250_000_000) / 1e9))
            now = now_ns()
            if now >= limit or (reason is not None and "timed out" not in reason):
                if channel.state == STATE_OPEN:
                    continue
                self._note_failure(slot.endpoint, reason or "it accepts connections, but does not speak ZeroMQ", now)
                self.n_unreachable += 1
                raise self._unreachable(slot.endpoint, f"tried for {(now - started) / 1e9:.3g} s")
            patience *= 4

    # -- endpoints that cannot be reached ----------------------------------------------------------------

    def _note_failure(self, str endpoint, str reason, int64_t now):
        cdef Table table = self.table
        with table.lock:
            failure = table.failures.pop(endpoint, None) or _Failure(now)
            failure.attempts += 1
            failure.reason = reason
            pause = min(BACKOFF_MAX, BACKOFF_FIRST << min(failure.attempts - 1, 10))
            failure.until = now + <int64_t>(pause * random.uniform(0.5, 1.0))
            failure.last = now
            table.failures[endpoint] = failure
            if len(table.failures) > FAILURES_KEPT:
                del table.failures[next(iter(table.failures))]

    def _check_negative(self, Table table not None, str endpoint):
        """Raise Unreachable if the endpoint has failed a moment ago. The lock is held."""
        failure = table.failures.get(endpoint)
        if failure is not None and now_ns() < failure.until:
            self.n_negative_hits += 1
            raise self._unreachable(
                endpoint, f"known from before; tried again in {(failure.until - now_ns()) / 1e9:.2g} s")

    def _unreachable(self, str endpoint, str detail):
        failure = self.table.failures.get(endpoint)
        if failure is None:
            return errors.Unreachable(f"{endpoint} cannot be reached ({detail})")
        attempts = "1 attempt" if failure.attempts == 1 else f"{failure.attempts} attempts"
        since = (now_ns() - failure.since) / 1e9
        return errors.Unreachable(f"{endpoint}: {failure.reason} ({detail}; {attempts} in {since:.3g} s)")

    # -- time ----------------------------------------------------------------------------------------------

    cdef double _ttl_ns(self, Slot slot) except -1:
        """Return how long ``slot`` may be idle: the more it has been used lately, the longer."""
        return self.idle_ttl_ns * slot.jitter * min(LONGEST_TTL, 1 + log2(max(slot.uses, 1.0)))

    def maintain(self) -> float | None:
        """Expire what is overdue, notice idle channels that have been lost, count out what has gone.

        Never waits. Returns after how many seconds it wants to be called again; None when the pool is empty.
        """
        cdef Table table = self.table
        cdef Slot slot
        cdef int64_t now = self.now()
        cdef list overdue = []
        cdef list idle = []
        cdef Ring ring
        with table.lock:
            if table.closed:
                return None
            for slots in table.slots.values():
                for slot in slots:
                    if slot.stage == STAGE_OPEN and slot.users == 0:
                        idle.append(slot)
        for slot in idle:
            # Takes a goodbye, or notices that the connection has gone.
            slot.channel.look()
        with table.lock:
            for slot in idle:
                if slot.stage != STAGE_OPEN or slot.users:
                    continue
                if slot.channel.state > STATE_OPEN:
                    self.n_lost += 1
                elif slot.channel.goodbye:
                    self.n_goodbye += 1
                elif slot.persistent:
                    continue
                elif now - slot.last_used > self._ttl_ns(slot):
                    self.n_expired_idle += 1
                elif now - slot.created > self.max_lifetime_ns * slot.jitter:
                    self.n_expired_lifetime += 1
                else:
                    continue
                self._forget(table, slot, STAGE_DRAINING)
                overdue.append(slot)
            forgotten = [
                endpoint for endpoint, failure in table.failures.items() if now_ns() - failure.last > FAILURE_KEPT]
            for endpoint in forgotten:
                del table.failures[endpoint]
        for slot in overdue:
            self._begin_drain(slot)
        self._pump()
        with table.lock:
            if not table.total:
                table.maintained = False
                return None
        if table.closing or table.draining:
            return 0.01
        return min(30.0, max(0.05, min(self.idle_ttl_ns, <double>self.max_lifetime_ns) / 1e10))

    def close(self, timeout: float = 5.0) -> bool:
        """Refuse everything new, wake every waiter with Closed, drain up to ``timeout`` seconds, close all channels.

        Waits until libzmq has let the descriptors go, a second at most. Returns whether nothing was lost. What is
        outstanding at the end of the timeout ends with Closed. Twice is fine.
        """
        cdef Table table = self.table
        cdef Slot slot
        cdef Turn turn
        cdef int64_t deadline = deadline_after(timeout)
        with table.lock:
            table.closed = True
            everything = [slot for slots in table.slots.values() for slot in slots] + list(table.draining)
            for turns in (*table.queue.values(), *table.making.values()):
                for turn in turns:
                    turn.awake = True
                    turn.waiter.wake()
        clean = True
        for slot in everything:
            if slot.channel is not None:
                while not slot.channel.settle() and now_ns() < deadline:
                    time.sleep(0.001)
                clean = clean and slot.channel.settle()
        for slot in everything:
            with table.lock:
                if slot.stage < STAGE_CLOSING:
                    self._note_closing(table, slot)
            if slot.channel is not None:
                slot.channel.close()
        deadline = now_ns() + 1_000_000_000
        while now_ns() < deadline:
            with table.lock:
                self._reap(table)
                if not table.closing:
                    table.fds.close()
                    break
            time.sleep(0.0005)
        return clean

    # -- what it tells about itself --------------------------------------------------------------------------

    def _numbers(self, Table table not None):
        return (f"all {self.max_sockets} sockets of the pool are taken: {table.in_use} in use, {len(table.draining)}"
                f" draining, {len(table.closing)} closing")

    def _count_wait(self, int64_t waited):
        for i, bound in enumerate(WAIT_BUCKETS):
            if waited <= bound * 1e9:
                self.wait_histogram[i] += 1
                return
        self.wait_histogram[len(WAIT_BUCKETS)] += 1

    def stats(self) -> dict:
        """Return the counters since the pool was made, and what it holds now, as a JSON-able dict.

        open = connecting + idle + in_use + draining + closing <= max_sockets.
        """
        cdef Table table = self.table
        cdef Slot slot
        with table.lock:
            self._reap(table)
            connecting = sum([1 for slots in table.slots.values() for slot in slots if slot.stage == STAGE_CONNECTING])
            leaving = len(table.draining) + len(table.closing)
            return {
                "max_sockets": self.max_sockets,
                "open": table.total,
                "connecting": connecting,
                "in_use": table.in_use - connecting,
                "idle": table.total - table.in_use - leaving,
                "draining": len(table.draining),
                "closing": len(table.closing),
                "pinned": len(self.pinned),
                "protected": table.protected.length,
                "waiting": table.waiting,
                "unreachable_known": len(table.failures),
                "opened": self.n_opened,
                "reused": self.n_reused,
                "evicted_clean": self.n_evicted_clean,
                "evicted_draining": self.n_evicted_draining,
                "expired_idle": self.n_expired_idle,
                "expired_lifetime": self.n_expired_lifetime,
                "drained": self.n_drained,
                "lost": self.n_lost,
                "lost_while_draining": self.n_drain_lost,
                "goodbyes": self.n_goodbye,
                "waits": self.n_waits,
                "wait_timeouts": self.n_timeouts,
                "refused": self.n_refused,
                "unreachable": self.n_unreachable,
                "negative_hits": self.n_negative_hits,
                "wait_seconds": dict(zip([f"<={bound:g}" for bound in WAIT_BUCKETS] + ["more"], self.wait_histogram)),
            }

    def snapshot(self) -> list:
        """Return one row per channel, as JSON-able dicts, in no particular order."""
        cdef Table table = self.table
        cdef Slot slot
        cdef int64_t now = self.now()
        names = ("connecting", "open", "draining", "closing", "gone")
        with table.lock:
            everything = [slot for slots in table.slots.values() for slot in slots]
            everything += table.draining + table.closing
            rows = []
            for slot in everything:
                state = names[slot.stage]
                if slot.stage == STAGE_OPEN:
                    state = "in use" if slot.users else "idle"
                row = {
                    "endpoint": slot.endpoint, "state": state, "users": slot.users, "persistent": slot.persistent,
                    "protected": slot.protected, "age": (now - slot.created) / 1e9,
                    "idle": 0.0 if slot.users else (now - slot.last_used) / 1e9,
                    "uses": slot.uses, "ttl": self._ttl_ns(slot) / 1e9,
                }
                if slot.channel is not None:
                    row["channel"] = slot.channel.state_name
                    row.update(slot.channel.stats())
                rows.append(row)
        return rows

    def channels(self) -> list:
        """Return the channels that are connecting or open now."""
        cdef Table table = self.table
        cdef Slot slot
        with table.lock:
            return [slot.channel for slots in table.slots.values() for slot in slots if slot.channel is not None]

    def __repr__(self) -> str:
        cdef Table table = self.table
        state = "closed" if table.closed else f"{table.in_use} in use, {table.waiting} waiting"
        return f"<ChannelPool {table.total} of {self.max_sockets} sockets, {state}>"

    def _after_fork_in_child(self):
        self.table = Table()


_pools = weakref.WeakSet()


def _after_fork_in_child():
    for pool in list(_pools):
        pool._after_fork_in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)
