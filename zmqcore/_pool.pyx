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

A slot that drains is taken back if somebody wants its endpoint meanwhile: a new channel would overtake what that one
has under way.

Every change of state happens in short functions under the table's lock; what they return (channels to make, close or
drain, waiters to wake) is acted on outside it. A signal handler can raise wherever Python code runs (making a channel,
closing it, waiting), so whatever must follow such a place is in a ``finally``, or is made up for by maintain().

Invariants, under the lock:
  I1. total is the number of slots that are not GONE, and never above max_sockets.
  I2. A slot stands in a ring exactly while it is open, has no users and is not persistent.
  I3. ``queue`` is empty unless the budget is used up: whoever frees a place hands it to the first in the queue.
  I4. A Turn that has given up stands in no list, and holds no slot.
  I5. in_use is the number of slots that are connecting or open and have users.
  I6. n_opened + n_revived is the number of slots that are connecting or open, plus the sum of ``left``.
"""

import errno
import os
import resource
import time
import weakref

import zmq

cimport cython
from libc.math cimport exp2, log2
from libc.stdint cimport int64_t, uint64_t

from zmqcore._channel cimport STATE_CLOSED, STATE_LOST, STATE_OPEN, Channel, Lane, Pending
from zmqcore._frame cimport Envelope
from zmqcore._socket cimport (
    NEVER, OpenFds, coarse_now_ns, deadline_after, gc_pause, gc_resume, now_ns, waiter_borrow, waiter_return,
)

from zmqcore import errors

__all__ = ["ChannelPool", "default_max_sockets"]

# A connection over loopback takes well under a millisecond; one that is refused never shows. After this time it is
# worth asking the endpoint by a plain connect(2), in ns.
cdef int64_t FIRST_PROBE_AFTER = 3_000_000
# How long to wait for libzmq's threads between two looks at sockets that are closing, in ns.
cdef int64_t REAP_INTERVAL = 100_000
# A draining channel is mostly clean within a round trip. For so long, in ns, it counts as a place that will be free;
# after that the next one in line is evicted as well. Also how often the first in the queue looks after them.
cdef int64_t DRAIN_GRACE = 20_000_000
# Backoff after a failed connection, in ns: the first pause, and the longest. Doubles with each failure.
cdef int64_t BACKOFF_FIRST = 20_000_000
cdef int64_t BACKOFF_MAX = 1_000_000_000
# How long a failure is remembered without a new attempt, in ns, and of how many endpoints.
cdef int64_t FAILURE_KEPT = 60_000_000_000
cdef Py_ssize_t FAILURES_KEPT = 65_536
# A channel used 2^n times lately keeps its socket for n + 1 times idle_ttl, at most this many times.
cdef double LONGEST_TTL = 8.0
# More uses than that make no difference to the TTL, and would only take longer to be forgotten.
cdef double MOST_USES = 128.0
# Openings since a channel's own that make its next use count as a return, not as part of its first use.
cdef uint64_t RETURN_DISTANCE = 4

# maintain() wants to be called at least this often, in seconds: until then what is lost unused holds its place.
cdef double LONGEST_PAUSE = 2.5

#: Upper bounds of the wait histogram's buckets, in seconds; the last bucket holds all above.
WAIT_BUCKETS = (0.0001, 0.001, 0.01, 0.1, 1.0, 10.0)

_CAUSES = (
    "evicted_clean", "evicted_draining", "expired_idle", "expired_lifetime", "lost", "goodbyes", "dead", "abandoned",
    "failed", "closed",
)


def default_max_sockets() -> int:
    """Return how many pooled sockets this process may hold, from its limit on file descriptors (RLIMIT_NOFILE).

    A pooled socket costs two descriptors. A quarter of the limit, at least 128, is left to everything else.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return 8192
    return max(8, min(8192, (soft - max(128, soft // 4)) // 2))


cdef object _left(int64_t deadline):
    """Return the seconds until ``deadline``, 0.0 at least; None for never."""
    return None if deadline == NEVER else max(0.0, (deadline - now_ns()) / 1e9)


class _Failure:
    """Why an endpoint could not be reached, and until when it is not tried again. Times are the pool's clock's."""

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
        self.stale = []
        self.draining = []
        self.closing = []
        self.queue = {}
        self.making = {}
        self.failures = {}
        self.wait_histogram = [0] * (len(WAIT_BUCKETS) + 1)
        self.chance = <uint64_t>now_ns() ^ (<uint64_t>os.getpid() << 32) | 1

    cdef int enter(self) except -1:
        """Take the lock. Until leave() no garbage is collected, where that could happen at any allocation."""
        self.lock.acquire()
        self.gc_was_on = gc_pause()
        return 0

    cdef int leave(self) except -1:
        cdef bint gc_was_on = self.gc_was_on
        self.lock.release()
        gc_resume(gc_was_on)
        return 0

    cdef double random(self) noexcept:
        """Return a number from 0 to 1 (xorshift64, Marsaglia 2003). The lock is held.

        Not by the random module: that is Python code, in which a signal handler could raise.
        """
        self.chance ^= self.chance << 13
        self.chance ^= self.chance >> 7
        self.chance ^= self.chance << 17
        return <double>(self.chance >> 11) / <double>(<uint64_t>1 << 53)

    cdef list everything(self):
        """Return all slots that count. The lock is held."""
        return [slot for slots in self.slots.values() for slot in slots] + self.stale + self.draining + self.closing


cdef class ChannelPool:
    """Keep at most ``max_sockets`` channels, made by ``connect(endpoint)``.

    ``max_sockets``: default from the limit on descriptors, see default_max_sockets(); each costs two descriptors.
    ``max_sockets_per_endpoint``: more than one spreads the users of one endpoint; order holds per channel only.
    ``idle_ttl``: how long, in seconds, a channel that was used once stays open without use. Each doubling of its uses
    (which halve with every ``idle_ttl`` that passes) adds as much again, up to 8 times: hot endpoints keep their
    sockets. ``max_lifetime``: after how many seconds a channel is replaced as soon as nobody uses it. Both vary by up
    to a tenth, so that channels of one age do not reconnect together.
    ``acquire_timeout``: how long, in seconds, acquire() waits if its caller sets no limit. ``max_waiting``: how many
    threads may wait; a further one is refused at once. ``connect_timeout``: how long an endpoint may take to connect.
    ``drain_timeout``: how long a channel that is to close may wait for its acknowledgements.
    ``probe(endpoint, timeout)``: returns why an endpoint cannot be reached (``.reason``, and ``.final`` if it is of no
    use to go on trying), or None.
    ``maintenance(pool)``: called when the first channel is opened; who is responsible then calls maintain() as it
    says, so that expiry goes on without traffic. ``clock``: monotonic seconds, for tests; what varies by chance is the
    same in each run then.

    Thread-safe by its own lock. In a forked child it is empty and works; nothing of the parent's is used or closed.
    """

    def __init__(
        self, connect, *, max_sockets: int | None = None, max_sockets_per_endpoint: int = 1, idle_ttl: float = 300.0,
        max_lifetime: float = 3600.0, acquire_timeout: float = 30.0, max_waiting: int = 10_000,
        connect_timeout: float = 2.0, drain_timeout: float = 5.0, probe=None, maintenance=None,
        clock=None,
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
        self.table = self._new_table()
        _pools.add(self)

    def _new_table(self) -> Table:
        cdef Table table = Table()
        if self.clock is not None:
            table.chance = 1
        return table

    cdef int64_t now(self) except? -1:
        if self.clock is None:
            return coarse_now_ns()
        return <int64_t>(self.clock() * 1e9)

    # -- acquire and release -----------------------------------------------------------------------------

    cpdef Channel acquire_open(self, str endpoint):
        """Return the channel to ``endpoint`` if it is open already, else None. Never waits.

        What is returned is to be given back by release().
        """
        cdef Table table = self.table
        cdef Slot slot
        cdef Channel channel = None
        cdef int64_t now = self.now()
        # Nothing up to release() can raise, or make an object that the garbage collector knows.
        table.lock.acquire()
        slot = self._find(table, endpoint)
        if slot is not None and slot.stage == STAGE_OPEN:
            self._use(table, slot, now)
            table.n_acquired += 1
            table.n_reused += 1
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
        if persistent and endpoint not in self.pinned:
            self.pin(endpoint)
        channel = self.acquire_open(endpoint)
        if channel is not None:
            return channel
        deadline = now_ns() + self.acquire_timeout_ns if timeout is None else deadline_after(timeout)
        slot = self._obtain(endpoint, deadline)
        try:
            return self._connected(slot, deadline)
        except BaseException:
            self._count_out(slot)
            raise

    cpdef release(self, Channel channel):
        """Give back what acquire() returned. Never waits.

        Giving back what a forked child's parent acquired does nothing; InternalError for what no pool has made.
        """
        if channel.owner is None:
            raise errors.InternalError(f"{channel!r} does not belong to a pool")
        self._count_out(channel.owner)

    cdef int _count_out(self, Slot slot) except -1:
        """One user less. Who was the last one parks the slot, or retires it if it is of no more use."""
        cdef Table table = slot.table
        cdef bint pump = False
        cdef bint retire = False
        cdef int cause
        cdef int64_t now = self.now()
        if table is not self.table:
            return 0            # made before a fork: the parent's
        # As in acquire_open().
        table.lock.acquire()
        if slot.users > 0:
            slot.users -= 1
            if slot.users == 0 and slot.stage <= STAGE_OPEN:
                table.in_use -= 1
                slot.last_used = now
                cause = self._fate(slot, now)
                if cause == STAYS:
                    self._park(table, slot)
                else:
                    retire = True
                    self._leave(table, slot, cause)
                pump = retire or len(table.queue) > 0
        table.lock.release()
        try:
            if retire and slot.stage == STAGE_DRAINING:
                self._begin_drain(slot)
        finally:
            if pump:
                self._pump()
        return 0

    def call(
        self, str endpoint not None, bytes topic, str method, body, list buffers, bytes metadata, int codec, timeout,
    ) -> Envelope:
        """acquire(), Channel.call() and release() in one; ``timeout`` in seconds bounds them together."""
        cdef int64_t deadline
        cdef Channel channel = self.acquire_open(endpoint)
        if channel is None:
            deadline = deadline_after(timeout)
            channel = self.acquire(endpoint, timeout)
            timeout = _left(deadline)
        try:
            return channel.call(topic, method, body, buffers, metadata, codec, timeout)
        finally:
            self.release(channel)

    def send(
        self, str endpoint not None, str kind, bytes topic, str method, body, list buffers, bytes metadata, int codec,
        timeout,
    ) -> int:
        """acquire(), Channel.send() and release() in one; ``timeout`` in seconds bounds them together."""
        cdef int64_t deadline
        cdef Channel channel = self.acquire_open(endpoint)
        if channel is None:
            deadline = deadline_after(timeout)
            channel = self.acquire(endpoint, timeout)
            timeout = _left(deadline)
        try:
            return channel.send(kind, topic, method, body, buffers, metadata, codec, timeout)
        finally:
            self.release(channel)

    def send_now(
        self, str endpoint not None, str kind not None, bytes topic, str method, body, list buffers, bytes metadata,
        int codec,
    ) -> int:
        """Channel.send_now() on the open channel to ``endpoint``; 0 if there is none, or it would have to wait.

        What most casts come to: one turn under each of two locks, no user counted in and out.
        """
        cdef Table table = self.table
        cdef Slot slot
        cdef Channel channel = None
        cdef uint64_t id
        cdef int64_t now = self.now()
        # As in acquire_open().
        table.lock.acquire()
        slot = self._find(table, endpoint)
        if slot is not None and slot.stage == STAGE_OPEN:
            self._touch(table, slot, now)
            table.n_acquired += 1
            table.n_reused += 1
            channel = slot.channel
        table.lock.release()
        if channel is None:
            return 0
        id = channel.send_now(kind, topic, method, body, buffers, metadata, codec)
        if id == 0:
            table.lock.acquire()
            table.n_acquired -= 1
            table.n_reused -= 1
            table.lock.release()
        return id

    def send_accepted(
        self, Lane lane not None, str kind, bytes topic, str method, body, list buffers, bytes metadata, int codec,
        timeout,
    ) -> int:
        """acquire(), Channel.send_accepted() and release() in one; ``timeout`` in seconds bounds them together."""
        cdef int64_t deadline
        cdef Channel channel = self.acquire_open(lane.endpoint)
        if channel is None:
            deadline = deadline_after(timeout)
            channel = self.acquire(lane.endpoint, timeout)
            timeout = _left(deadline)
        try:
            return channel.send_accepted(lane, kind, topic, method, body, buffers, metadata, codec, timeout)
        finally:
            self.release(channel)

    def submit(
        self, str endpoint not None, bytes topic, str method, body, list buffers, bytes metadata, int codec,
        callback, timeout, hurry: bool = True,
    ) -> Pending:
        """acquire(), Channel.submit() and release() in one; ``timeout`` in seconds bounds acquire and call together.

        The channel may be chosen for eviction before the reply has come; it then closes only after that.
        """
        cdef int64_t deadline
        cdef Channel channel = self.acquire_open(endpoint)
        if channel is None:
            deadline = deadline_after(timeout)
            channel = self.acquire(endpoint, timeout)
            timeout = _left(deadline)
        try:
            return channel.submit(topic, method, body, buffers, metadata, codec, timeout, callback, hurry)
        finally:
            self.release(channel)

    def pin(self, endpoint: str) -> None:
        """Keep the channel to ``endpoint``, once it is open, until unpin(): no eviction, no expiry.

        Raises PoolExhausted when the pins would take the whole budget.
        """
        cdef Table table = self.table
        cdef Slot slot
        table.enter()
        try:
            if endpoint in self.pinned:
                return
            if (len(self.pinned) + 1) * self.max_sockets_per_endpoint > self.max_sockets:
                raise errors.PoolExhausted(
                    f"{len(self.pinned)} endpoints are pinned already, and the pool has {self.max_sockets} sockets, up"
                    f" to {self.max_sockets_per_endpoint} for an endpoint; {endpoint} cannot be pinned")
            self.pinned.add(endpoint)
            for slot in table.slots.get(endpoint, ()):
                slot.persistent = True
                if slot.ring is not None:
                    slot.ring.remove(slot)
        finally:
            table.leave()

    def unpin(self, endpoint: str) -> None:
        """Undo pin(). An endpoint that is not pinned is ignored."""
        cdef Table table = self.table
        cdef Slot slot
        table.enter()
        try:
            self.pinned.discard(endpoint)
            for slot in table.slots.get(endpoint, ()):
                if slot.persistent:
                    slot.persistent = False
                    if slot.users == 0 and slot.stage == STAGE_OPEN:
                        self._park(table, slot)
        finally:
            table.leave()
        self._pump()

    # -- changes of state: short, under the lock, no I/O ---------------------------------------------------

    cdef Slot _find(self, Table table, str endpoint):
        """Return the slot of ``endpoint`` to share, or None if a new one is wanted. Skips what is of no more use."""
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

    cdef int _use(self, Table table, Slot slot, int64_t now) except -1:
        """Count one more user in."""
        if slot.users == 0:
            table.in_use += 1
            if slot.ring is not None:
                slot.ring.remove(slot)
        self._note_use(table, slot, now)
        slot.users += 1
        return 0

    cdef int _note_use(self, Table table, Slot slot, int64_t now) except -1:
        """Count one more use; one of an idle slot lets the earlier ones fade first, and may be a return."""
        if slot.users == 0:
            if now - slot.decayed > self.idle_ttl_ns / 16:
                slot.uses *= exp2((slot.decayed - now) / self.idle_ttl_ns)
                slot.decayed = now
            if not slot.protected and table.n_opened - slot.opened_before >= RETURN_DISTANCE:
                slot.protected = True
        if slot.uses < MOST_USES:
            slot.uses += 1
        return 0

    cdef int _touch(self, Table table, Slot slot, int64_t now) except -1:
        """Note a use that ends at once: as _use(), and then the last user's release."""
        cdef bint protected = slot.protected
        self._note_use(table, slot, now)
        slot.last_used = now
        if slot.ring is not None and (slot.protected != protected or slot.behind is not slot.ring.anchor):
            slot.ring.remove(slot)
            self._park(table, slot)
        return 0

    cdef Slot _reserve(self, Table table, str endpoint):
        """Take a place in the budget, with one user, for a channel that is to be made."""
        cdef Slot slot = Slot.__new__(Slot)
        cdef list slots = table.slots.get(endpoint)
        slot.table = table
        slot.endpoint = endpoint
        slot.stage = STAGE_CONNECTING
        slot.cause = STAYS
        slot.users = 1
        slot.uses = 1
        slot.created = slot.last_used = slot.decayed = self.now()
        slot.made_ns = now_ns()
        slot.jitter = 0.9 + 0.1 * table.random()
        slot.dies = slot.created + <int64_t>(self.max_lifetime_ns * slot.jitter)
        slot.persistent = endpoint in self.pinned
        slot.fd = -1
        # What can fail comes first.
        if slots is None:
            table.slots[endpoint] = [slot]
        else:
            slots.append(slot)
        table.n_opened += 1
        slot.opened_before = table.n_opened
        table.total += 1
        table.in_use += 1
        return slot

    cdef Slot _revive(self, Table table, str endpoint):
        """Take back a slot of ``endpoint`` that drains for want of a place or of use, with one user more; or None.

        The caller calls its channel's keep() once the lock is released. Who waits in the queue comes first: the slot
        may be draining for that thread.
        """
        cdef Slot slot
        for slot in table.draining:
            if slot.cause <= EXPIRED_LIFETIME and slot.endpoint == endpoint and slot.channel.state == STATE_OPEN \
                    and not slot.channel.goodbye:
                table.draining.remove(slot)
                slot.stage = STAGE_OPEN
                slot.cause = STAYS
                slot.persistent = endpoint in self.pinned
                table.slots.setdefault(endpoint, []).append(slot)
                table.n_revived += 1
                self._use(table, slot, self.now())
                return slot
        return None

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
            demoted.opened_before = table.n_opened
            table.probation.push(demoted)
        return 0

    cdef int _fate(self, Slot slot, int64_t now) except? -2:
        """Return why ``slot``, used or not, is of no more use to anybody new, or STAYS."""
        cdef Channel channel = slot.channel
        if slot.stale:
            return slot.cause
        if channel is None:
            return FAILED
        if slot.stage == STAGE_CONNECTING:
            # Nobody waits for the connection any more; it may still come, but takes no place for that.
            return DEAD if slot.unreachable else ABANDONED
        if channel.goodbye:
            return GOODBYE
        if channel.state > STATE_OPEN:
            return LOST
        if now > slot.dies and not slot.persistent and channel.is_clean():
            return EXPIRED_LIFETIME
        return STAYS

    cdef int _leave(self, Table table, Slot slot, int cause) except -1:
        """Take a slot that nobody uses out of use, for ``cause``. It still counts, unless it never had a channel."""
        table.left[cause] += 1
        slot.cause = cause
        if slot.channel is None:
            self._move(table, slot, STAGE_GONE)
            self._wake_making(table, slot.endpoint)
        else:
            self._move(table, slot, STAGE_DRAINING)
        return 0

    cdef int _move(self, Table table, Slot slot, int stage) except -1:
        """Move a slot to a later stage: nobody finds it any more. It counts until it is GONE."""
        cdef list slots
        if slot.stage <= STAGE_OPEN:
            if slot.stale:
                table.stale.remove(slot)
                slot.stale = False
            else:
                slots = table.slots[slot.endpoint]
                slots.remove(slot)
                if not slots:
                    del table.slots[slot.endpoint]
            if slot.users:
                table.in_use -= 1
        elif slot.stage == STAGE_DRAINING:
            table.draining.remove(slot)
        if slot.ring is not None:
            slot.ring.remove(slot)
        slot.stage = stage
        slot.left_ns = now_ns()
        if stage == STAGE_DRAINING:
            table.draining.append(slot)
        elif stage == STAGE_CLOSING:
            table.closing.append(slot)
        else:
            slot.channel = None
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
                    slot.channel = None     # or the two would keep each other until the garbage is collected
                    table.total -= 1
            table.closing = still
        return 0

    cdef int _grant(self, Table table) except -1:
        """Hand free places to the first in the queue; wake everybody who waits for the same endpoint."""
        cdef Turn turn
        cdef list turns
        cdef Slot slot
        while table.queue:
            endpoint = next(iter(table.queue))
            turns = table.queue[endpoint]
            slot = None
            if self._find(table, endpoint) is None and not table.closed:
                slot = self._revive(table, endpoint)
                if slot is None:
                    if table.total >= self.max_sockets:
                        break
                    slot = self._reserve(table, endpoint)
            turn = turns[0]
            turn.slot = slot
            del table.queue[endpoint]
            table.waiting -= len(turns)
            for turn in turns:
                turn.awake = True
                turn.waiter.wake()
            self._wake_head(table)
        return 0

    cdef int _wake_head(self, Table table) except -1:
        """Whoever is first in the queue looks after the sockets that are leaving: there is something new to see."""
        cdef Turn turn
        if table.queue and (table.closing or table.draining):
            turn = table.queue[next(iter(table.queue))][0]
            turn.waiter.wake()
        return 0

    cdef list _victims(self, Table table):
        """Choose idle slots to close for those in the queue, and take them out of use."""
        cdef Slot slot
        cdef list victims = []
        cdef Py_ssize_t wanted = len(table.queue) - len(table.closing)
        cdef Py_ssize_t spare = self.batch - 1
        cdef int64_t recently = now_ns() - DRAIN_GRACE
        cdef Ring ring
        # One that drains for longer, because its peer is slow or dead, is not waited for.
        for slot in table.draining:
            if slot.left_ns > recently:
                wanted -= 1
        while wanted > 0 or (victims and spare > 0):
            if wanted <= 0:
                spare -= 1
                if not table.probation.length:
                    break
            ring = table.probation if table.probation.length else table.protected
            if not ring.length:
                break
            slot = self._least_missed(ring)
            self._leave(table, slot, EVICTED_CLEAN if slot.channel.is_clean() else EVICTED_DRAINING)
            victims.append(slot)
            wanted -= 1
        return victims

    cdef Slot _least_missed(self, Ring ring):
        """Return the least recently used slot that can close at once; if there is none near, the very least."""
        cdef Slot slot = ring.anchor.behind
        for _ in range(8):
            if slot is ring.anchor:
                break
            if slot.channel.is_clean():
                return slot
            slot = slot.behind
        return ring.anchor.behind

    cdef list _retire_stale(self, Table table, str endpoint):
        """Take channels to ``endpoint`` that are lost, or whose server takes nothing new, out of use.

        Returns those to drain; one that is still in use drains when it is released.
        """
        cdef Slot slot
        cdef list slots = table.slots.get(endpoint)
        cdef list to_drain = []
        cdef int cause
        if slots is None:
            return to_drain
        for slot in slots.copy():
            if slot.stage == STAGE_OPEN:
                cause = self._fate(slot, 0)
                if cause == STAYS:
                    continue
                if slot.users == 0:
                    self._leave(table, slot, cause)
                    to_drain.append(slot)
                else:
                    table.stale.append(slot)
                    slot.stale = True
                    slot.cause = cause
                    slots.remove(slot)
                    if not slots:
                        del table.slots[endpoint]
        return to_drain

    cdef int _pump(self) except -1:
        """Move things on: count out what has gone, hand out places, close victims for those who wait."""
        cdef Table table = self.table
        cdef list victims = []
        table.enter()
        try:
            self._reap(table)
            self._grant(table)
            if table.queue:
                victims = self._victims(table)
        finally:
            table.leave()
            self._drain(victims)
        return 0

    # -- what is done outside the lock ---------------------------------------------------------------------

    def _drain(self, list slots not None):
        """Begin to drain each of ``slots``, whatever happens to the others."""
        cdef Slot slot
        failure = None
        for slot in slots:
            try:
                self._begin_drain(slot)
            except BaseException as exc:
                failure = exc
        if failure is not None:
            raise failure

    def _begin_drain(self, Slot slot not None):
        """Close a slot's channel as soon as nothing is outstanding on it: mostly at once."""
        cdef Channel channel = slot.channel
        if channel is not None:
            channel.retire(self._drained, self.drain_timeout_ns / 1e9)
            if slot.stage == STAGE_OPEN:
                channel.keep()      # taken back meanwhile

    def _drained(self, Channel channel not None):
        """Nothing is outstanding on the channel of a draining slot, or it is lost: close it."""
        cdef Slot slot = channel.owner
        cdef Table table = slot.table
        table.enter()
        try:
            if slot.stage != STAGE_DRAINING:
                return
            if channel.state != STATE_LOST:
                table.n_drained += 1
            elif slot.cause != LOST:
                table.n_drain_lost += 1
            self._note_closing(table, slot)
        finally:
            table.leave()
        try:
            channel.close()
        finally:
            table.enter()
            try:
                self._wake_head(table)
            finally:
                table.leave()

    def _note_closing(self, Table table not None, Slot slot not None):
        """The slot's socket is about to be closed: its place is free when its descriptors have gone."""
        # First count out an earlier socket whose descriptor had the same number.
        self._reap(table)
        if slot.fd >= 0:
            try:
                table.fds.add(slot.fd)
            except Exception:
                slot.fd = -1        # cannot be watched: then it does not count
        self._move(table, slot, STAGE_CLOSING)

    def _tend_draining(self, Table table not None):
        """Look after the channels that drain: whoever should have done so may have been interrupted."""
        cdef Slot slot
        cdef Channel channel
        table.enter()
        try:
            draining = table.draining.copy()
        finally:
            table.leave()
        for slot in draining:
            channel = slot.channel
            if channel is None or slot.stage != STAGE_DRAINING:
                continue
            try:
                if channel.on_clean is None and channel.state <= STATE_OPEN and not channel.is_clean():
                    self._begin_drain(slot)
                channel.attend()
            except errors.ZmqcoreError:
                pass            # e.g. its context has been closed: the channel goes, too
            else:
                if channel.state <= STATE_OPEN and not channel.is_clean():
                    continue
            self._drained(channel)

    def _wake_making(self, Table table not None, endpoint):
        cdef Turn turn
        for turn in table.making.pop(endpoint, ()):
            turn.awake = True
            turn.waiter.wake()

    def _obtain(self, str endpoint, int64_t deadline) -> Slot:
        """Return a slot for ``endpoint``, counted in. If it has no channel yet, the caller makes it."""
        cdef Table table = self.table
        cdef Turn turn
        cdef Slot slot
        cdef int64_t started = 0
        cdef bint revived
        cdef list stale = []
        try:
            while True:
                turn = None
                revived = False
                table.enter()
                try:
                    if table.closed:
                        raise errors.Closed("the pool is closed")
                    stale = self._retire_stale(table, endpoint)
                    slot = self._find(table, endpoint)
                    if slot is not None:
                        if slot.stage == STAGE_CONNECTING:
                            self._check_negative(table, endpoint)
                        if slot.channel is not None:
                            self._use(table, slot, self.now())
                        else:
                            turn = self._queue_up(table.making, endpoint)
                    else:
                        self._check_negative(table, endpoint)
                        self._reap(table)
                        if not table.queue:
                            slot = self._revive(table, endpoint)
                            revived = slot is not None
                            if slot is None and table.total < self.max_sockets:
                                slot = self._reserve(table, endpoint)
                        if slot is None:
                            if table.waiting >= self.max_waiting:
                                table.n_refused += 1
                                raise errors.PoolExhausted(
                                    f"{self._numbers(table)}; {table.waiting} threads wait already (limit"
                                    f" {self.max_waiting}), so {endpoint} was refused at once")
                            turn = self._queue_up(table.queue, endpoint)
                            table.waiting += 1
                    if turn is not None and not started:
                        started = now_ns()
                        table.n_waits += 1
                finally:
                    table.leave()
                    if stale:
                        self._drain(stale)
                if turn is None:
                    if revived:
                        slot.channel.keep()
                    return slot
                slot = self._wait(table, turn, endpoint, deadline, started)
                if slot is not None:
                    return slot
        finally:
            if started:
                self._count_wait(table, now_ns() - started)

    def _queue_up(self, dict queue, endpoint) -> Turn:
        cdef Turn turn = Turn.__new__(Turn)
        turn.waiter = waiter_borrow()
        queue.setdefault(endpoint, []).append(turn)
        return turn

    def _wait(
        self, Table table not None, Turn turn not None, str endpoint, int64_t deadline, int64_t started,
    ) -> Slot | None:
        """Wait until it is ``turn``'s turn. Return the place granted, or None to look again.

        Raises PoolExhausted at the deadline; a place that is granted at the same moment goes to the next one.
        """
        cdef int64_t now, pause
        cdef bint given_up = True
        cdef bint closed = False
        cdef Slot slot = None
        try:
            while not turn.awake:
                self._pump()
                if turn.awake:
                    break
                now = now_ns()
                if now >= deadline:
                    table.enter()
                    try:
                        numbers = self._numbers(table)
                        table.n_timeouts += 1
                    finally:
                        table.leave()
                    raise errors.PoolExhausted(
                        f"{numbers}; waited {(now - started) / 1e9:.3g} s for a socket to {endpoint}")
                pause = 1_000_000_000
                # The first in the queue looks again soon; who is first after it is woken then.
                if (table.closing or table.draining) and self._is_head(table, turn, endpoint):
                    pause = REAP_INTERVAL if table.closing else DRAIN_GRACE
                    if table.draining and not table.closing:
                        self._tend_draining(table)
                        if turn.awake or table.closing:
                            continue
                turn.waiter.wait(-1, min(deadline, now + pause), 0)
            given_up = False
        finally:
            table.enter()
            try:
                self._leave_queue(table, turn, endpoint)
                slot, turn.slot = turn.slot, None
                closed = table.closed
            finally:
                table.leave()
            waiter_return(turn.waiter)
            if slot is not None and slot.channel is not None:
                slot.channel.keep()         # it has been taken back
            if slot is not None and (given_up or closed):
                self._count_out(slot)
        if closed:
            raise errors.Closed("the pool was closed while waiting for a socket")
        return slot

    def _is_head(self, Table table not None, Turn turn not None, endpoint) -> bool:
        cdef list turns
        table.enter()
        try:
            turns = table.queue.get(endpoint)
            return bool(turns) and turns[0] is turn and next(iter(table.queue)) == endpoint
        finally:
            table.leave()

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

    def _make(self, Slot slot not None) -> Channel:
        """Make the channel of a reserved slot."""
        cdef Channel channel
        cdef Table table = slot.table
        cdef bint first = False
        cdef bint usable
        if table.fds is None:
            # Before the first socket: at the limit of descriptors this fails, and nothing has happened yet.
            fds = OpenFds()
            table.enter()
            try:
                if table.fds is None:
                    table.fds = fds
            finally:
                table.leave()
        try:
            channel = self.connect(slot.endpoint)
        except zmq.ZMQError as exc:
            raise self._cannot_connect(slot.endpoint, exc) from exc
        channel.owner = slot
        table.enter()
        try:
            # The pool may have been closed meanwhile: then the slot has gone.
            usable = slot.stage == STAGE_CONNECTING
            if usable:
                slot.channel = channel
                slot.fd = channel.shared.fd
                first = not table.maintained
                table.maintained = True
                self._wake_making(table, slot.endpoint)
        finally:
            table.leave()
        if not usable:
            channel.close()
            raise errors.Closed("the pool was closed while a channel was made")
        if first and self.maintenance is not None:
            try:
                self.maintenance(self)
            except RuntimeError:
                table.maintained = False    # no thread can be started now; tried again with the next channel
        return channel

    def _cannot_connect(self, endpoint, exc):
        """Return the error to raise when libzmq makes no socket for ``endpoint``, or cannot connect it."""
        if exc.errno in (errno.EMFILE, errno.ENFILE):
            limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            return errors.PoolExhausted(
                f"no file descriptor is left for a socket to {endpoint} (limit {limit}); the pool holds"
                f" {self.table.total} sockets of {self.max_sockets}. Raise the limit, or lower max_sockets")
        if exc.errno in (errno.EINVAL, errno.EPROTONOSUPPORT, errno.ENODEV, errno.ENAMETOOLONG):
            return errors.InvalidEndpoint(f"endpoint {endpoint!r}: {exc.strerror}")
        if exc.errno == zmq.ETERM:
            return errors.Closed("the ZeroMQ context has been closed")
        return errors.Unreachable(f"{endpoint}: {exc.strerror}")

    def _connected(self, Slot slot not None, int64_t deadline) -> Channel:
        """Wait until the slot's channel is open, and return it; if the endpoint refuses, say so at once."""
        cdef Table table = slot.table
        cdef Channel channel = slot.channel
        cdef bint opener = channel is None
        cdef int64_t started = now_ns()
        cdef int64_t patience = FIRST_PROBE_AFTER
        cdef int64_t limit = max(slot.made_ns + self.connect_timeout_ns, started + FIRST_PROBE_AFTER)
        cdef int64_t until = min(deadline, limit)
        cdef int64_t now
        reason = "no connection came about"
        if opener:
            channel = self._make(slot)
        while slot.stage != STAGE_OPEN:
            now = now_ns()
            if channel.wait_open(max(0, min(until - now, patience)) / 1e9):
                break
            if channel.state == STATE_CLOSED:
                raise errors.Closed("the pool was closed while connecting")
            if channel.state == STATE_LOST:
                raise errors.PeerLost(
                    f"{channel.endpoint}: the channel was lost while connecting", executed_possible=False)
            now = now_ns()
            if slot.unreachable:
                raise self._unreachable(slot.endpoint, f"tried for {(now - started) / 1e9:.3g} s")
            final = False
            if self.probe is not None and now < until:
                refusal = self.probe(channel.endpoint, max(0.001, min(until - now, 250_000_000) / 1e9))
                if refusal is None:
                    reason = "it accepts connections, but does not speak ZeroMQ"
                else:
                    reason, final = refusal.reason, refusal.final
            now = now_ns()
            if channel.state == STATE_OPEN:
                continue
            if final or now >= limit:
                self._note_failure(table, slot, reason)
                raise self._unreachable(slot.endpoint, f"tried for {(now - started) / 1e9:.3g} s")
            if now >= deadline:
                # The caller had too little time to tell; that is no failure to remember.
                raise errors.Unreachable(
                    f"{slot.endpoint}: no connection within the {(now - started) / 1e9:.3g} s that were left"
                    f" (connect_timeout is {self.connect_timeout_ns / 1e9:.3g} s)")
            patience *= 4
        table.enter()
        try:
            if slot.stage == STAGE_CONNECTING:
                slot.stage = STAGE_OPEN
                table.failures.pop(slot.endpoint, None)
            elif slot.stage != STAGE_OPEN:
                raise errors.Closed("the pool was closed while connecting")
            table.n_acquired += 1
            if not opener:
                table.n_reused += 1
        finally:
            table.leave()
        return channel

    # -- endpoints that cannot be reached ----------------------------------------------------------------

    def _note_failure(self, Table table not None, Slot slot not None, str reason):
        """Remember for a while that the slot's endpoint cannot be reached: once, however many wait for it."""
        cdef int64_t now = self.now()
        table.enter()
        try:
            table.n_unreachable += 1
            if slot.unreachable:
                return
            slot.unreachable = True
            failure = table.failures.pop(slot.endpoint, None) or _Failure(now)
            failure.attempts += 1
            failure.reason = reason
            pause = min(BACKOFF_MAX, BACKOFF_FIRST << min(failure.attempts - 1, 10))
            failure.until = now + <int64_t>(pause * (0.5 + 0.5 * table.random()))
            failure.last = now
            table.failures[slot.endpoint] = failure
            if len(table.failures) > FAILURES_KEPT:
                del table.failures[next(iter(table.failures))]
        finally:
            table.leave()

    def _check_negative(self, Table table not None, str endpoint):
        """Raise Unreachable if the endpoint has failed a moment ago. The lock is held."""
        failure = table.failures.get(endpoint)
        if failure is not None:
            left = failure.until - self.now()
            if left > 0:
                table.n_negative_hits += 1
                raise self._unreachable(endpoint, f"known from before; tried again in {left / 1e9:.2g} s")

    def _unreachable(self, str endpoint, str detail):
        failure = self.table.failures.get(endpoint)
        if failure is None:
            return errors.Unreachable(f"{endpoint} cannot be reached ({detail})")
        attempts = "1 attempt" if failure.attempts == 1 else f"{failure.attempts} attempts"
        since = (self.now() - failure.since) / 1e9
        return errors.Unreachable(f"{endpoint}: {failure.reason} ({detail}; {attempts} in {since:.3g} s)")

    # -- time ----------------------------------------------------------------------------------------------

    cdef double _ttl_ns(self, Slot slot) except? -1:
        """Return how long ``slot`` may be idle: the more it has been used lately, the longer."""
        return self.idle_ttl_ns * slot.jitter * min(LONGEST_TTL, 1 + log2(max(slot.uses, 1.0)))

    def maintain(self) -> float | None:
        """Expire what is overdue, notice channels that have been lost, count out what has gone.

        Never waits. Returns after how many seconds it wants to be called again; None when the pool is empty.
        """
        cdef Table table = self.table
        cdef Slot slot
        cdef Channel channel
        cdef int64_t now = self.now()
        cdef int cause
        cdef list overdue = []
        table.enter()
        try:
            if table.closed:
                return None
            everything = [slot for slots in table.slots.values() for slot in slots if slot.stage == STAGE_OPEN]
        finally:
            table.leave()
        for slot in everything:
            channel = slot.channel
            if slot.users == 0 and channel is not None:
                try:
                    # Takes acknowledgements or a goodbye, or notices that the connection has gone.
                    channel.look()
                except errors.ZmqcoreError:
                    channel.close()     # e.g. its context has been closed
        table.enter()
        try:
            for slot in everything:
                if slot.stage != STAGE_OPEN or slot.stale or slot.users:
                    continue
                cause = self._fate(slot, now)
                if cause == STAYS and not slot.persistent and now - slot.last_used > self._ttl_ns(slot):
                    cause = EXPIRED_IDLE
                if cause != STAYS:
                    self._leave(table, slot, cause)
                    overdue.append(slot)
            while table.failures:
                endpoint, failure = next(iter(table.failures.items()))
                if now - failure.last <= FAILURE_KEPT:
                    break               # they are in the order of their last attempts
                del table.failures[endpoint]
        finally:
            table.leave()
            self._drain(overdue)
        self._tend_draining(table)
        self._pump()
        table.enter()
        try:
            if not table.total:
                table.maintained = False
                return None
            if table.closing or table.draining:
                return 0.01
        finally:
            table.leave()
        return min(LONGEST_PAUSE, max(0.05, min(self.idle_ttl_ns, <double>self.max_lifetime_ns) / 1e10))

    def close(self, timeout: float = 5.0) -> bool:
        """Refuse everything new, wake every waiter with Closed, drain up to ``timeout`` seconds, close all channels.

        Waits until libzmq has let the descriptors go, a second at most. Returns whether nothing was lost. What is
        outstanding at the end of the timeout ends with Closed. Twice is fine. Interrupted by a signal it closes all
        at once.
        """
        cdef Table table = self.table
        cdef Slot slot
        cdef Turn turn
        cdef int64_t deadline = deadline_after(timeout)
        cdef bint clean = True
        table.enter()
        try:
            table.closed = True
            everything = table.everything()
            for turns in (*table.queue.values(), *table.making.values()):
                for turn in turns:
                    turn.awake = True
                    turn.waiter.wake()
        finally:
            table.leave()
        try:
            for slot in everything:
                while not self._settled(slot.channel) and now_ns() < deadline:
                    time.sleep(0.001)
        finally:
            for slot in everything:
                clean = self._close_slot(table, slot) and clean
        deadline = now_ns() + 1_000_000_000
        while now_ns() < deadline:
            table.enter()
            try:
                self._reap(table)
                if not table.closing:
                    if table.fds is not None:
                        table.fds.close()
                    break
            finally:
                table.leave()
            time.sleep(0.0005)
        return clean

    def _settled(self, Channel channel) -> bool:
        """Whether nothing is outstanding on ``channel``, as far as one can still tell."""
        try:
            return channel is None or channel.settle()
        except errors.ZmqcoreError:
            return True

    def _close_slot(self, Table table not None, Slot slot not None) -> bool:
        """Close the slot's channel as it is; return whether nothing was outstanding on it."""
        cdef Channel channel = slot.channel
        cdef bint clean = self._settled(channel)
        table.enter()
        try:
            if slot.stage <= STAGE_OPEN:
                table.left[<int>POOL_CLOSED] += 1
                slot.cause = POOL_CLOSED
            if slot.stage < STAGE_CLOSING:
                if slot.channel is None:
                    self._move(table, slot, STAGE_GONE)     # who is making it will see that
                    self._wake_making(table, slot.endpoint)
                else:
                    self._note_closing(table, slot)
        finally:
            table.leave()
        if channel is not None:
            channel.close()
        return clean

    # -- what it tells about itself --------------------------------------------------------------------------

    def _numbers(self, Table table not None):
        cdef Py_ssize_t leaving = len(table.draining) + len(table.closing)
        pinned = table.total - table.in_use - leaving - table.probation.length - table.protected.length
        return (f"all {self.max_sockets} sockets of the pool are taken: {table.in_use} in use, {pinned} idle but"
                f" pinned, {len(table.draining)} draining, {len(table.closing)} closing")

    def _count_wait(self, Table table not None, int64_t waited):
        cdef Py_ssize_t i = 0
        table.enter()
        try:
            while i < len(WAIT_BUCKETS) and waited > WAIT_BUCKETS[i] * 1e9:
                i += 1
            table.wait_histogram[i] += 1
            table.waited_ns += waited
            table.waited_most_ns = max(table.waited_most_ns, waited)
        finally:
            table.leave()

    def stats(self) -> dict:
        """Return the counters since the pool was made, or since the fork, and what it holds now, as a JSON-able dict.

        open = connecting + idle + in_use + draining + closing <= max_sockets. opened + revived is the sum of the first
        three and of all causes of leaving: evicted_* to closed. acquired is what acquire() and acquire_open() have
        returned.
        """
        cdef Table table = self.table
        cdef Slot slot
        cdef int i
        connecting = 0
        table.enter()
        try:
            self._reap(table)
            for slots in table.slots.values():
                for slot in slots:      # no comprehension: its variables would be untyped, and the fields are C's
                    connecting += slot.stage == STAGE_CONNECTING
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
                "acquired": table.n_acquired,
                "opened": table.n_opened,
                "reused": table.n_reused,
                **{_CAUSES[i]: table.left[i] for i in range(N_CAUSES)},
                "revived": table.n_revived,
                "drained": table.n_drained,
                "lost_while_draining": table.n_drain_lost,
                "waits": table.n_waits,
                "wait_timeouts": table.n_timeouts,
                "refused": table.n_refused,
                "unreachable": table.n_unreachable,
                "negative_hits": table.n_negative_hits,
                "waited_seconds": table.waited_ns / 1e9,
                "longest_wait_seconds": table.waited_most_ns / 1e9,
                "wait_seconds": dict(zip([f"<={bound:g}" for bound in WAIT_BUCKETS] + ["more"], table.wait_histogram)),
            }
        finally:
            table.leave()

    def snapshot(self) -> list:
        """Return one row per channel, as JSON-able dicts, in no particular order. Times are in seconds."""
        cdef Table table = self.table
        cdef Slot slot
        cdef Channel channel
        cdef int64_t now = self.now()
        names = ("connecting", "open", "draining", "closing", "gone")
        rows = []
        table.enter()
        try:
            everything = table.everything()
            for slot in everything:
                state = names[slot.stage]
                if slot.stage == STAGE_OPEN:
                    state = "in use" if slot.users else "idle"
                rows.append({
                    "endpoint": slot.endpoint, "state": state, "users": slot.users, "persistent": slot.persistent,
                    "protected": slot.protected, "age": (now - slot.created) / 1e9,
                    "idle": 0.0 if slot.users else (now - slot.last_used) / 1e9,
                    "uses": slot.uses, "ttl": self._ttl_ns(slot) / 1e9,
                    "leaves_for": None if slot.cause == STAYS else _CAUSES[slot.cause],
                })
            channels = [slot.channel for slot in everything]
        finally:
            table.leave()
        for row, channel in zip(rows, channels):
            if channel is not None:
                row["channel"] = channel.state_name
                row.update(channel.stats())
        return rows

    def channels(self) -> list:
        """Return the channels that are connecting or open now."""
        cdef Table table = self.table
        table.enter()
        try:
            return [slot.channel for slots in table.slots.values() for slot in slots if slot.channel is not None]
        finally:
            table.leave()

    def __repr__(self) -> str:
        cdef Table table = self.table
        if table.closed:
            state = "closed"
        else:
            leaving = len(table.draining) + len(table.closing)
            state = f"{table.in_use} in use, {leaving} leaving, {table.waiting} waiting"
        return f"<ChannelPool {table.total} of {self.max_sockets} sockets, {state}>"

    def _after_fork_in_child(self):
        closed = self.table.closed
        # Kept, not freed: freeing thousands of channels takes time, and pyzmq would speak of sockets left open.
        _inherited.append(self.table)
        if self.table.fds is not None:
            self.table.fds.close()      # the child's copy of the descriptor
        self.table = self._new_table()
        self.table.closed = closed


_pools = weakref.WeakSet()
_inherited = []


def _after_fork_in_child():
    for pool in list(_pools):
        pool._after_fork_in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)
