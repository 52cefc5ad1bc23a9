# cython: language_level=3, embedsignature=True, auto_pickle=False, freethreading_compatible=True
"""The channels of one process under one hard budget of sockets.

One channel per endpoint, shared by all threads: acquire() counts a user in, release() counts it out. What nobody
uses stays open for the next one, and gives way when the budget is needed elsewhere.

What it holds and who gives way is decided in ``_table.pyx``, under the table's lock. How channels are made, drained and
closed, outside of it, is in ``_lifecycle.pyx``. Here they are handed out, and waited for.
"""

import os
import resource
import weakref

from libc.stdint cimport int64_t, uint64_t

from zmqcore._channel cimport Channel
from zmqcore._pending cimport Pending
from zmqcore._retention cimport Lane
from zmqcore._frame cimport Envelope
from zmqcore._lifecycle cimport Lifecycle
from zmqcore._socket cimport NEVER, deadline_after, now_ns, waiter_return
from zmqcore._table cimport (
    DRAIN_GRACE, MAINTAINED, STAGE_CONNECTING, STAGE_DRAINING, STAGE_OPEN, STAYS, Slot, Table, Turn,
)

from zmqcore import errors, options
from zmqcore._table import CAUSES

__all__ = ["ChannelPool", "default_max_sockets"]

# How long to wait for libzmq's threads between two looks at sockets that are closing, in ns.
cdef int64_t REAP_INTERVAL = 100_000
# Of anything that is counted: far more than there can be, and fits every machine's Py_ssize_t.
cdef Py_ssize_t MOST = 2**31 - 1
# Descriptors besides the pool's sockets that a process cannot do without: 9 of ours (docs/explanation/pool.md), the
# standard ones, and a few for what is opened and closed again, as modules and name lookups.
cdef long FEWEST_OTHERS = 24


def default_max_sockets() -> int:
    """Return how many pooled sockets this process may hold, from its limit on file descriptors (RLIMIT_NOFILE).

    A pooled socket costs two descriptors. A quarter of the limit, at least 128, is left to everything else; but there
    are 8 sockets at least, if the limit has room for them beside what any process with a pool needs.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return 8192
    least = max(1, min(8, (soft - FEWEST_OTHERS) // 2))
    return max(least, min(8192, (soft - max(128, soft // 4)) // 2))


cdef double _ns(name, value) except -1:
    """Return a time in seconds, which must be above 0, in ns."""
    return options.seconds(name, value, 0, 1e9, above=True) * 1e9


cdef class ChannelPool(Lifecycle):
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
    ``resolve(endpoint, timeout)``: returns the address without a host name that channels are to be made with, by
    ``connect(endpoint, address)``, or why there is none, as ``probe`` does. Without it names are libzmq's affair.
    ``probe(endpoint, timeout)``: returns why an endpoint cannot be reached (``.reason``; ``.final`` if it is of no
    use to go on trying; ``.local`` if it is for want of something here), or None.
    ``maintenance(pool)``: called when a channel is given back for the first time; who is responsible then calls
    maintain() as it says, so that expiry goes on without traffic.
    ``clock``: monotonic seconds, for tests; what varies by chance is the same in each run then.

    Thread-safe by its own lock. In a forked child it is empty and works; nothing of the parent's is used or closed.
    """

    def __cinit__(self, *args, **options):
        if not args and not options:
            raise TypeError("ChannelPool takes the function that makes a channel")

    def __init__(
        self, connect, *, max_sockets=None, max_sockets_per_endpoint=1, idle_ttl=300.0, max_lifetime=3600.0,
        acquire_timeout=30.0, max_waiting=10_000, connect_timeout=2.0, drain_timeout=5.0, resolve=None, probe=None,
        maintenance=None, clock=None,
    ):
        if max_sockets is None:
            max_sockets = default_max_sockets()
        self.max_sockets = options.whole("max_sockets", max_sockets, 1, MOST)
        self.max_sockets_per_endpoint = options.whole(
            "max_sockets_per_endpoint", max_sockets_per_endpoint, 1, MOST)
        self.max_waiting = options.whole("max_waiting", max_waiting, 0, MOST)
        self.idle_ttl_ns = _ns("idle_ttl", idle_ttl)
        self.max_lifetime_ns = <int64_t>_ns("max_lifetime", max_lifetime)
        self.connect_timeout_ns = <int64_t>_ns("connect_timeout", connect_timeout)
        self.acquire_timeout_ns = <int64_t>_ns("acquire_timeout", acquire_timeout)
        self.drain_timeout_ns = <int64_t>_ns("drain_timeout", drain_timeout)
        self.connect = connect
        self.resolve = resolve
        self.probe = probe
        self.maintenance = maintenance
        self.clock = clock
        self.holders = {}
        self.pinned = set()
        self.table = self._new_table()
        _pools.add(self)

    def _new_table(self) -> Table:
        cdef Table table = Table(
            self.max_sockets, self.max_sockets_per_endpoint, self.idle_ttl_ns, self.max_lifetime_ns, self.pinned,
            self.clock)
        table.maintain_from = MAINTAINED if self.maintenance is None else 0
        return table

    # -- acquire and release -----------------------------------------------------------------------------

    cpdef Channel acquire_open(self, str endpoint):
        """Return the channel to ``endpoint`` if it is open already, else None. Never waits.

        What is returned is to be given back by release().
        """
        cdef Table table = self.table
        cdef Slot slot
        cdef Channel channel = None
        cdef int64_t now = table.now()
        # Nothing up to release() can raise, or make an object that the garbage collector knows.
        table.lock.acquire()
        slot = table.find(endpoint)
        if slot is not None and slot.stage == STAGE_OPEN and not table.closed:
            table.use(slot, now)
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

    cdef tuple _acquire_within(self, str endpoint, timeout):
        """acquire(); return the channel, and how many seconds of ``timeout`` are left."""
        cdef int64_t deadline = deadline_after(timeout)
        cdef Channel channel = self.acquire(endpoint, timeout)
        return channel, None if deadline == NEVER else max(0.0, (deadline - now_ns()) / 1e9)

    cpdef release(self, Channel channel):
        """Give back what acquire() returned. Never waits.

        Giving back what a forked child's parent acquired does nothing; InternalError for what no pool has made.
        """
        if channel is None:
            raise TypeError("release() takes a channel that acquire() has returned, not None")
        if channel.owner is None:
            raise errors.InternalError(f"{channel!r} does not belong to a pool")
        self._count_out(channel.owner)

    cdef int _count_out(self, Slot slot) except -1:
        """One user less. Who was the last one parks the slot, or retires it if it is of no more use."""
        cdef Table table = slot.table
        cdef bint pump = False
        cdef bint retire = False
        cdef bint unmaintained = False
        cdef int cause
        cdef int64_t now = table.now()
        if table is not self.table:
            return 0            # made before a fork: the parent's
        # As in acquire_open().
        table.lock.acquire()
        if slot.users > 0:
            slot.users -= 1
            if slot.users == 0 and slot.stage <= STAGE_OPEN:
                table.in_use -= 1
                slot.last_used = now
                cause = table.fate(slot, now)
                if cause == STAYS:
                    table.park(slot)
                else:
                    retire = True
                    table.retire(slot, cause)
                pump = retire or len(table.queue) > 0
        if table.n_acquired >= table.maintain_from:
            table.maintain_from = MAINTAINED
            unmaintained = True
        table.lock.release()
        try:
            if retire and slot.stage == STAGE_DRAINING:
                self._begin_drain(slot)
        finally:
            if pump:
                self._pump()
        if unmaintained:
            try:
                self.maintenance(self)
            except RuntimeError:
                self._maintain_later(table)     # no thread can be started now
        return 0

    def call(
        self, str endpoint not None, bytes topic, str method, body, list buffers, bytes metadata, int codec, timeout,
    ) -> Envelope:
        """acquire(), Channel.call() and release() in one; ``timeout`` in seconds bounds them together."""
        cdef Channel channel = self.acquire_open(endpoint)
        if channel is None:
            channel, timeout = self._acquire_within(endpoint, timeout)
        try:
            return channel.call(topic, method, body, buffers, metadata, codec, timeout)
        finally:
            self.release(channel)

    def send(
        self, str endpoint not None, str kind, bytes topic, str method, body, list buffers, bytes metadata, int codec,
        timeout,
    ) -> int:
        """acquire(), Channel.send() and release() in one; ``timeout`` in seconds bounds them together."""
        cdef Channel channel = self.acquire_open(endpoint)
        if channel is None:
            channel, timeout = self._acquire_within(endpoint, timeout)
        try:
            return channel.send(kind, topic, method, body, buffers, metadata, codec, timeout)
        finally:
            self.release(channel)

    def send_now(
        self, str endpoint not None, str kind not None, bytes topic, str method, body, list buffers, bytes metadata,
        int codec, dict lanes=None,
    ) -> int:
        """Channel.send_now() on the open channel to ``endpoint``; 0 if there is none, or it would have to wait.

        What most casts come to: one turn under each of two locks, no user counted in and out. With ``lanes``, by
        endpoint, on the lane there; 0 also if there is none yet.
        """
        cdef Channel channel
        cdef Lane lane = None
        cdef uint64_t id
        if lanes is not None:
            lane = lanes.get(endpoint)
            if lane is None:
                return 0
        channel = self._touch_open(endpoint)
        if channel is None:
            return 0
        id = channel.send_now(kind, topic, method, body, buffers, metadata, codec, lane)
        if id == 0:
            self._count_unused()
        return id

    cdef Channel _touch_open(self, str endpoint):
        """Return the open channel to ``endpoint``, counted as used but without a user; None if there is none.

        It may be retired at any time: only for what does nothing then. If so, _count_unused().
        """
        cdef Table table = self.table
        cdef Slot slot
        cdef Channel channel = None
        cdef int64_t now = table.now()
        # As in acquire_open().
        table.lock.acquire()
        slot = table.find(endpoint)
        if slot is not None and slot.stage == STAGE_OPEN and table.maintain_from == MAINTAINED and not table.closed:
            table.touch(slot, now)
            table.n_acquired += 1
            table.n_reused += 1
            channel = slot.channel
        table.lock.release()
        return channel

    cdef int _count_unused(self) except -1:
        cdef Table table = self.table
        table.lock.acquire()
        table.n_acquired -= 1
        table.n_reused -= 1
        table.lock.release()
        return 0

    def send_accepted(
        self, Lane lane not None, str kind, bytes topic, str method, body, list buffers, bytes metadata, int codec,
        timeout,
    ) -> int:
        """acquire(), Channel.send_accepted() and release() in one; ``timeout`` in seconds bounds them together."""
        cdef Channel channel = self.acquire_open(lane.endpoint)
        if channel is None:
            channel, timeout = self._acquire_within(lane.endpoint, timeout)
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
        cdef Pending pending
        cdef Channel channel = self._touch_open(endpoint)
        if channel is not None:
            pending = channel.try_submit(topic, method, body, buffers, metadata, codec, timeout, callback, hurry)
            if pending is not None:
                return pending
            self._count_unused()
        channel, timeout = self._acquire_within(endpoint, timeout)
        try:
            return channel.submit(topic, method, body, buffers, metadata, codec, timeout, callback, hurry)
        finally:
            self.release(channel)

    def add_holder(self, holder) -> None:
        """Have ``holder.give_way()`` called whenever somebody begins to wait for a place; ``holder`` is held weakly.

        It keeps channels while nothing is outstanding on them, and gives those back then. Called by any thread, outside
        any lock. A forked child forgets the holders.
        """
        cdef dict holders = self.holders
        # By single operations, each of them atomic: no lock could be held here, as a holder's end may be user code.
        for reference in holders.copy():
            if reference() is None:
                holders.pop(reference, None)
        holders[weakref.ref(holder)] = None

    @property
    def waiting(self) -> int:
        """How many threads wait for a place."""
        return self.table.waiting

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
                        table.park(slot)
        finally:
            table.leave()
        self._pump()

    # -- waiting for a place ---------------------------------------------------------------------------------

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
                    stale = table.retire_stale(endpoint)
                    slot = table.find(endpoint)
                    if slot is not None:
                        if slot.stage == STAGE_CONNECTING:
                            table.check_negative(endpoint)
                        if slot.channel is not None:
                            table.use(slot, table.now())
                        else:
                            turn = table.queue_up(table.making, endpoint)
                    else:
                        table.check_negative(endpoint)
                        table.reap()
                        if not table.queue:
                            slot = table.revive(endpoint)
                            revived = slot is not None
                            if slot is None and table.total < self.max_sockets:
                                slot = table.reserve(endpoint)
                        if slot is None:
                            if table.waiting >= self.max_waiting + table.n_free_soon():
                                table.n_refused += 1
                                raise errors.PoolExhausted(
                                    f"{table.numbers()}; {table.waiting} threads wait already (limit"
                                    f" {self.max_waiting}), so {endpoint} was refused at once")
                            turn = table.queue_up(table.queue, endpoint)
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
                table.count_wait(now_ns() - started)

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
            if table.waiting:
                for reference in self.holders.copy():
                    holder = reference()
                    if holder is not None:
                        holder.give_way()
            while not turn.awake:
                self._pump()
                if turn.awake:
                    break
                now = now_ns()
                if now >= deadline:
                    table.enter()
                    try:
                        numbers = table.numbers()
                        table.n_timeouts += 1
                        making = turn in table.making.get(endpoint, ())
                    finally:
                        table.leave()
                    if making:
                        # There is a place, and another thread is about to have a channel there.
                        raise table.unjudged(endpoint, now - started, self.connect_timeout_ns)
                    raise errors.PoolExhausted(
                        f"{numbers}; waited {(now - started) / 1e9:.3g} s for a socket to {endpoint}")
                pause = 1_000_000_000
                # The first in the queue looks again soon; who is first after it is woken then.
                if (table.closing or table.draining) and table.is_head(turn, endpoint):
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
                table.leave_queue(turn, endpoint)
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

    # -- what it tells about itself --------------------------------------------------------------------------

    def stats(self) -> dict:
        """Return the counters since the pool was made, or since the fork, and what it holds now, as a JSON-able dict.

        open = connecting + idle + in_use + draining + closing <= max_sockets. opened + revived is the sum of the first
        three and of all causes of leaving: evicted_* to closed. acquired is what acquire() and acquire_open() have
        returned. messages holds the sums of what all channels have counted, those that have gone included.
        """
        return self.table.stats()

    def snapshot(self) -> list:
        """Return one row per channel, as JSON-able dicts, in no particular order. Times are in seconds."""
        cdef Table table = self.table
        cdef Slot slot
        cdef Channel channel
        cdef int64_t now = table.now()
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
                    "uses": slot.uses, "ttl": table.ttl_ns(slot) / 1e9,
                    "leaves_for": None if slot.cause == STAYS else CAUSES[slot.cause],
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
        self.holders = {}

_pools = weakref.WeakSet()
_inherited = []


def _after_fork_in_child():
    for pool in list(_pools):
        pool._after_fork_in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)
