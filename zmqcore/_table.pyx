# cython: language_level=3, embedsignature=True, auto_pickle=False, freethreading_compatible=True
"""The state of a pool of channels: which sockets there are, who waits for one, and which one gives way.

Every change of state is a short function under the table's lock, without I/O. What follows from it (channels to make,
to drain or to close) is up to the pool, outside the lock.

A slot is one place in the budget. It is *connecting*, *open* (in use or idle), *draining* (to be closed once what was
sent is acknowledged) or *closing* (closed by us, but libzmq's threads have not got to it: the descriptors are still
there). All of these count: total = connecting + open + draining + closing <= max_sockets, at every instant.

Which idle slot gives way: a segmented LRU. A new channel begins on *probation*; one that is used again after a few
other channels have been opened since is *protected*, up to four fifths of the budget. Victims come from the probation
ring first, least recently used first. So a scan over thousands of endpoints that are used once each passes
through probation and leaves the hot ones alone, which plain LRU would not (and frequency counts would need ageing).

A slot that drains is taken back if somebody wants its endpoint meanwhile: a new channel would overtake what that one
has under way.

Invariants, under the lock:
  I1. total is the number of slots that are not GONE, and never above max_sockets.
  I2. A slot stands in a ring exactly while it is open, has no users and is not persistent.
  I3. ``queue`` is empty unless the budget is used up: whoever frees a place hands it to the first in the queue.
  I4. A Turn that has given up stands in no list, and holds no slot.
  I5. in_use is the number of slots that are connecting or open and have users.
  I6. n_opened + n_revived is the number of slots that are connecting or open, plus the sum of ``left``.
"""

import os

cimport cython
from libc.math cimport exp2, log2
from libc.stdint cimport int64_t, uint64_t

from zmqcore._channel cimport STATE_OPEN, Channel
from zmqcore._socket cimport coarse_now_ns, gc_pause, gc_resume, now_ns, waiter_borrow

from zmqcore import errors

__all__ = ["CAUSES", "MESSAGES", "WAIT_BUCKETS"]

# A draining channel is mostly clean within a round trip. For so long, in ns, it counts as a place that will be free;
# after that the next one in line is evicted as well. Also how often the first in the queue looks after them.
cdef int64_t DRAIN_GRACE = 20_000_000
cdef uint64_t MAINTAINED = <uint64_t>-1
# Backoff after a failed connection, in ns: the first pause, and the longest. Doubles with each failure.
cdef int64_t BACKOFF_FIRST = 20_000_000
cdef int64_t BACKOFF_MAX = 1_000_000_000
# How long a failure is remembered without a new attempt, in ns, and of how many endpoints.
cdef int64_t FAILURE_KEPT = 60_000_000_000
cdef Py_ssize_t FAILURES_KEPT = 65_536
# For how long after a server's goodbye, in ns, who connects there asks first whether anything new is taken.
cdef int64_t GOODBYE_KEPT = 10_000_000_000
# How often all sockets that are closing are looked at, in ns; in between only the oldest ones are.
cdef int64_t REAP_ALL_INTERVAL = 1_000_000
# A channel used 2^n times lately keeps its socket for n + 1 times idle_ttl, at most this many times.
cdef double LONGEST_TTL = 8.0
# More uses than that make no difference to the TTL, and would only take longer to be forgotten.
cdef double MOST_USES = 128.0
# Openings since a channel's own that make its next use count as a return, not as part of its first use.
cdef uint64_t RETURN_DISTANCE = 4

#: Upper bounds of the wait histogram's buckets, in seconds; the last bucket holds all above.
WAIT_BUCKETS = (0.0001, 0.001, 0.01, 0.1, 1.0, 10.0)

#: Why a channel leaves, in the order of Cause.
CAUSES = (
    "evicted_clean", "evicted_draining", "expired_idle", "expired_lifetime", "lost", "goodbyes", "dead", "abandoned",
    "failed", "closed",
)

#: What of Channel.stats() is summed up for all channels, those that have gone included: all that only grows.
MESSAGES = (
    "calls", "casts", "replies", "items", "late_replies", "garbage", "timeouts", "cancelled", "lost", "window_waits",
    "sent_bytes", "received_bytes", "accepted", "sent_again", "finished", "retain_waits", "undelivered", "batches",
    "batched",
)


class _Failure:
    """Why an endpoint could not be reached, and until when it is not tried again. Times are the pool's clock's, in ns.

    ``attempts`` counts all since it was last reached, ``failures`` those of them by which it counts as unreachable; the
    others ended before anybody could tell. ``spent`` is how much time they have taken together.
    """

    __slots__ = ("attempts", "failures", "last", "reason", "since", "spent", "until")

    def __init__(self, since):
        self.attempts = self.failures = self.spent = 0
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
    """The state of a pool. What changes it expects the lock to be held, unless it says that it takes it.

    A forked child gets a new one: the parent's may be half changed, its lock held. The arguments are the pool's.
    """

    def __cinit__(
        self, Py_ssize_t max_sockets, Py_ssize_t max_sockets_per_endpoint, double idle_ttl_ns, int64_t max_lifetime_ns,
        set pinned not None, clock,
    ):
        self.max_sockets = max_sockets
        self.max_sockets_per_endpoint = max_sockets_per_endpoint
        self.max_protected = max_sockets * 4 // 5
        # Several victims at a time: libzmq closes one while the next is connected already.
        self.batch = max(1, min(8, max_sockets // 32))
        self.idle_ttl_ns = idle_ttl_ns
        self.max_lifetime_ns = max_lifetime_ns
        self.pinned = pinned
        self.clock = clock
        self.slots = {}
        self.probation = Ring()
        self.protected = Ring()
        self.stale = []
        self.draining = []
        self.closing = []
        self.queue = {}
        self.making = {}
        self.failures = {}
        self.goodbyes = {}
        self.wait_histogram = [0] * (len(WAIT_BUCKETS) + 1)
        self.counted = dict.fromkeys(MESSAGES, 0)
        # With a clock of a test's own what varies by chance is the same in each run.
        self.chance = <uint64_t>now_ns() ^ (<uint64_t>os.getpid() << 32) | 1 if clock is None else 1

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

    # -- slots: found, used, taken, given up ---------------------------------------------------------------

    cdef int64_t now(self) except? -1:
        """Return the pool's clock, in ns."""
        if self.clock is None:
            return coarse_now_ns()
        return <int64_t>(self.clock() * 1e9)

    cdef Slot find(self, str endpoint):
        """Return the slot of ``endpoint`` to share, or None if a new one is wanted. Skips what is of no more use."""
        cdef list slots = self.slots.get(endpoint)
        cdef Slot slot, best = None
        if slots is None:
            return None
        for slot in slots:
            if slot.stage == STAGE_OPEN and (slot.channel.state > STATE_OPEN or slot.channel.goodbye):
                continue
            if best is None or slot.users < best.users:
                best = slot
        if best is not None and best.users and len(slots) < self.max_sockets_per_endpoint \
                and self.total < self.max_sockets:
            return None
        return best

    cdef int use(self, Slot slot, int64_t now) except -1:
        """Count one more user in."""
        if slot.users == 0:
            self.in_use += 1
            if slot.ring is not None:
                slot.ring.remove(slot)
        self.note_use(slot, now)
        slot.users += 1
        return 0

    cdef int note_use(self, Slot slot, int64_t now) except -1:
        """Count one more use; one of an idle slot lets the earlier ones fade first, and may be a return."""
        if slot.users == 0:
            if now - slot.decayed > self.idle_ttl_ns / 16:
                slot.uses *= exp2((slot.decayed - now) / self.idle_ttl_ns)
                slot.decayed = now
            if not slot.protected and self.n_opened - slot.opened_before >= RETURN_DISTANCE:
                slot.protected = True
        if slot.uses < MOST_USES:
            slot.uses += 1
        return 0

    cdef int touch(self, Slot slot, int64_t now) except -1:
        """Note a use that ends at once: as _use(), and then the last user's release."""
        cdef bint protected = slot.protected
        self.note_use(slot, now)
        slot.last_used = now
        if slot.ring is not None and (slot.protected != protected or slot.behind is not slot.ring.anchor):
            slot.ring.remove(slot)
            self.park(slot)
        return 0

    cdef Slot reserve(self, str endpoint):
        """Take a place in the budget, with one user, for a channel that is to be made."""
        cdef Slot slot = Slot.__new__(Slot)
        cdef list slots = self.slots.get(endpoint)
        slot.table = self
        slot.endpoint = endpoint
        slot.stage = STAGE_CONNECTING
        slot.cause = STAYS
        slot.users = 1
        slot.uses = 1
        slot.created = slot.last_used = slot.decayed = self.now()
        slot.made_ns = now_ns()
        slot.jitter = 0.9 + 0.1 * self.random()
        slot.dies = slot.created + <int64_t>(self.max_lifetime_ns * slot.jitter)
        slot.persistent = endpoint in self.pinned
        slot.fd = -1
        slot.cautious = slot.created - self.goodbyes.get(endpoint, slot.created - GOODBYE_KEPT) < GOODBYE_KEPT
        # What can fail comes first.
        if slots is None:
            self.slots[endpoint] = [slot]
        else:
            slots.append(slot)
        self.n_opened += 1
        slot.opened_before = self.n_opened
        self.total += 1
        self.in_use += 1
        return slot

    cdef Slot revive(self, str endpoint):
        """Take back a slot of ``endpoint`` that drains for want of a place or of use, with one user more; or None.

        The caller calls its channel's keep() once the lock is released. Who waits in the queue comes first: the slot
        may be draining for that thread.
        """
        cdef Slot slot
        for slot in self.draining:
            if slot.cause <= EXPIRED_LIFETIME and slot.endpoint == endpoint and slot.channel.state == STATE_OPEN \
                    and not slot.channel.goodbye:
                self.draining.remove(slot)
                slot.stage = STAGE_OPEN
                slot.cause = STAYS
                slot.persistent = endpoint in self.pinned
                self.slots.setdefault(endpoint, []).append(slot)
                self.n_revived += 1
                self.use(slot, self.now())
                return slot
        return None

    cdef int park(self, Slot slot) except -1:
        """An open slot has become idle: put it into its ring."""
        cdef Slot demoted
        if slot.persistent:
            return 0
        if not slot.protected:
            self.probation.push(slot)
            return 0
        self.protected.push(slot)
        if self.protected.length > self.max_protected:
            demoted = self.protected.anchor.behind
            self.protected.remove(demoted)
            demoted.protected = False
            demoted.opened_before = self.n_opened
            self.probation.push(demoted)
        return 0

    cdef int fate(self, Slot slot, int64_t now) except? -2:
        """Return why ``slot``, used or not, is of no more use to anybody new, or STAYS."""
        cdef Channel channel = slot.channel
        if slot.stale:
            return slot.cause
        if channel is None:
            return FAILED
        if channel.goodbye:
            self.goodbyes[slot.endpoint] = self.now()
            if len(self.goodbyes) > FAILURES_KEPT:
                del self.goodbyes[next(iter(self.goodbyes))]
            return GOODBYE
        if slot.stage == STAGE_CONNECTING:
            # Nobody waits for the connection any more; it may still come, but takes no place for that.
            return DEAD if slot.unreachable else ABANDONED
        if channel.state > STATE_OPEN:
            return LOST
        if now > slot.dies and not slot.persistent and channel.is_clean():
            return EXPIRED_LIFETIME
        return STAYS

    cdef int retire(self, Slot slot, int cause) except -1:
        """Take a slot that nobody uses out of use, for ``cause``. It still counts, unless it never had a channel."""
        self.left[cause] += 1
        slot.cause = cause
        if slot.channel is None:
            self.move(slot, STAGE_GONE)
            self.wake_making(slot.endpoint)
        else:
            self.move(slot, STAGE_DRAINING)
        return 0

    cdef int move(self, Slot slot, int stage) except -1:
        """Move a slot to a later stage: nobody finds it any more. It counts until it is GONE."""
        cdef list slots
        if slot.stage <= STAGE_OPEN:
            if slot.stale:
                self.stale.remove(slot)
                slot.stale = False
            else:
                slots = self.slots[slot.endpoint]
                slots.remove(slot)
                if not slots:
                    del self.slots[slot.endpoint]
            if slot.users:
                self.in_use -= 1
        elif slot.stage == STAGE_DRAINING:
            self.draining.remove(slot)
        if slot.ring is not None:
            slot.ring.remove(slot)
        slot.stage = stage
        slot.left_ns = now_ns()
        if stage == STAGE_DRAINING:
            self.draining.append(slot)
        elif stage == STAGE_CLOSING:
            self.closing.append(slot)
        else:
            slot.channel = None
            self.total -= 1
        return 0

    cdef int note_closing(self, Slot slot) except -1:
        """The slot's socket is about to be closed: its place is free when its descriptors have gone."""
        # First count out an earlier socket whose descriptor had the same number, if it is its turn; else that one
        # counts until this one has gone.
        self.reap()
        if slot.fd >= 0:
            try:
                self.fds.add(slot.fd)
            except Exception:
                slot.fd = -1        # cannot be watched: then it does not count
        return self.move(slot, STAGE_CLOSING)

    cdef int reap(self) except -1:
        """Count out the slots whose descriptors have gone by now.

        libzmq closes sockets about in the order in which it was told to. So this looks at the oldest ones, up to the
        second that is still open, and at all of them now and then: each look is a system call.
        """
        cdef Slot slot
        cdef list still = []
        cdef int64_t now
        cdef Py_ssize_t i = 0, enough = 2
        if not self.closing:
            return 0
        now = now_ns()
        if now - self.reaped_all > REAP_ALL_INTERVAL:
            self.reaped_all = now
            enough = len(self.closing)
        while i < len(self.closing) and len(still) < enough:
            slot = self.closing[i]
            i += 1
            if slot.fd >= 0 and self.fds.is_open(slot.fd):
                still.append(slot)
            else:
                self.counted = _sum(self.counted, slot.channel.stats())
                slot.stage = STAGE_GONE
                slot.channel = None     # or the two would keep each other until the garbage is collected
                self.total -= 1
        self.closing[:i] = still
        return 0

    cdef double ttl_ns(self, Slot slot) except? -1:
        """Return how long ``slot`` may be idle: the more it has been used lately, the longer."""
        return self.idle_ttl_ns * slot.jitter * min(LONGEST_TTL, 1 + log2(max(slot.uses, 1.0)))

    # -- who waits for a place, and who gives way ----------------------------------------------------------

    cdef Turn queue_up(self, dict queue, endpoint):
        """Join ``queue`` for ``endpoint``."""
        cdef Turn turn = Turn.__new__(Turn)
        turn.waiter = waiter_borrow()
        queue.setdefault(endpoint, []).append(turn)
        return turn

    cdef int leave_queue(self, Turn turn, endpoint) except -1:
        """If ``turn`` still stands in a queue, take it out."""
        cdef list turns
        for queue in (self.queue, self.making):
            turns = queue.get(endpoint)
            if turns is not None and turn in turns:
                turns.remove(turn)
                if queue is self.queue:
                    self.waiting -= 1
                if not turns:
                    del queue[endpoint]
                self.wake_head()
        return 0

    cdef bint is_head(self, Turn turn, endpoint) except -1:
        """Whether ``turn`` is the first in the queue. Takes the lock."""
        cdef list turns
        self.enter()
        try:
            turns = self.queue.get(endpoint)
            return bool(turns) and turns[0] is turn and next(iter(self.queue)) == endpoint
        finally:
            self.leave()

    cdef int grant(self) except -1:
        """Hand free places to the first in the queue; wake everybody who waits for the same endpoint."""
        cdef Turn turn
        cdef list turns
        cdef Slot slot
        while self.queue:
            endpoint = next(iter(self.queue))
            turns = self.queue[endpoint]
            slot = None
            if self.find(endpoint) is None and not self.closed:
                slot = self.revive(endpoint)
                if slot is None:
                    if self.total >= self.max_sockets:
                        break
                    slot = self.reserve(endpoint)
            turn = turns[0]
            turn.slot = slot
            del self.queue[endpoint]
            self.waiting -= len(turns)
            for turn in turns:
                turn.awake = True
                turn.waiter.wake()
            self.wake_head()
        return 0

    cdef int wake_head(self) except -1:
        """Whoever is first in the queue looks after the sockets that are leaving: there is something new to see."""
        cdef Turn turn
        if self.queue and (self.closing or self.draining):
            turn = self.queue[next(iter(self.queue))][0]
            turn.waiter.wake()
        return 0

    cdef int wake_making(self, endpoint) except -1:
        """Wake those who wait for somebody else to make a channel to ``endpoint``: there is news."""
        cdef Turn turn
        for turn in self.making.pop(endpoint, ()):
            turn.awake = True
            turn.waiter.wake()
        return 0

    cdef list victims(self):
        """Choose idle slots to close for those in the queue, and take them out of use."""
        cdef Slot slot
        cdef list victims = []
        cdef Py_ssize_t wanted = len(self.queue) - len(self.closing)
        cdef Py_ssize_t spare = self.batch - 1
        cdef int64_t recently = now_ns() - DRAIN_GRACE
        cdef Ring ring
        # One that drains for longer, because its peer is slow or dead, is not waited for.
        for slot in self.draining:
            if slot.left_ns > recently:
                wanted -= 1
        while wanted > 0 or (victims and spare > 0):
            if wanted <= 0:
                spare -= 1
                if not self.probation.length:
                    break
            ring = self.probation if self.probation.length else self.protected
            if not ring.length:
                break
            victims.append(self._evict(ring))
            wanted -= 1
        if victims:
            self.pressed_until = self.n_opened + self.max_sockets
        return victims

    cdef Slot victim_ahead(self):
        """Choose an idle slot to close before somebody has to wait for its place, and take it out of use; or None.

        Only while more endpoints are wanted than there are places: somebody has waited for one, and since then fewer
        channels have been opened than there are places. Nobody who has earned protection gives way for that, and in a
        small pool nobody at all.
        """
        if self.batch == 1 or self.n_opened >= self.pressed_until or not self.probation.length:
            return None
        if self.max_sockets - self.total + len(self.closing) + len(self.draining) >= 2 * self.batch:
            return None
        return self._evict(self.probation)

    cdef Slot _evict(self, Ring ring):
        """Take the slot of ``ring`` that is missed least out of use."""
        cdef Slot slot = self._least_missed(ring)
        self.retire(slot, EVICTED_CLEAN if slot.channel.is_clean() else EVICTED_DRAINING)
        return slot

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

    cdef list retire_stale(self, str endpoint):
        """Take channels to ``endpoint`` that are lost, or whose server takes nothing new, out of use.

        Returns those to drain; one that is still in use drains when it is released.
        """
        cdef Slot slot
        cdef list slots = self.slots.get(endpoint)
        cdef list to_drain = []
        cdef int cause
        if slots is None:
            return to_drain
        for slot in slots.copy():
            if slot.stage == STAGE_OPEN:
                cause = self.fate(slot, 0)
                if cause == STAYS:
                    continue
                if slot.users == 0:
                    self.retire(slot, cause)
                    to_drain.append(slot)
                else:
                    self.stale.append(slot)
                    slot.stale = True
                    slot.cause = cause
                    slots.remove(slot)
                    if not slots:
                        del self.slots[endpoint]
        return to_drain

    # -- endpoints that cannot be reached ------------------------------------------------------------------

    cdef int64_t note_attempt(self, Slot slot, str reason) except -1:
        """One of those who wait for a connection could wait no longer: note what is known, and the time it has taken.

        Return how much time, in ns, has been spent on the endpoint since it was last reached. Takes the lock.
        """
        self.enter()
        try:
            return self._count_attempt(slot, reason).spent
        finally:
            self.leave()

    cdef int note_failure(self, Slot slot, str reason, bint for_all, int64_t pause_at_least) except -1:
        """Remember for a while that the slot's endpoint cannot be reached: once, however many wait for it.

        ``for_all``: nobody else needs to wait for it any longer. ``pause_at_least``, in ns, counts up to the longest
        pause. Takes the lock.
        """
        self.enter()
        try:
            self.n_unreachable += 1
            if for_all:
                slot.unreachable = True
            if slot.failed:
                return 0
            slot.failed = True
            failure = self._count_attempt(slot, reason)
            failure.failures += 1
            pause = min(BACKOFF_MAX, max(pause_at_least, BACKOFF_FIRST << min(failure.failures - 1, 10)))
            failure.until = failure.last + <int64_t>(pause * (0.5 + 0.5 * self.random()))
        finally:
            self.leave()
        return 0

    cdef object _count_attempt(self, Slot slot, str reason):
        """Return what is remembered of the slot's endpoint, this attempt counted in."""
        cdef int64_t now = self.now()
        cdef int64_t until = now_ns()
        failure = self.failures.pop(slot.endpoint, None)
        if failure is None or now - failure.last > FAILURE_KEPT:
            # Nobody may have called maintain() since: a pool that is empty needs no maintenance.
            failure = _Failure(slot.created)
        if not slot.counted_until:
            failure.attempts += 1
            slot.counted_until = slot.made_ns
        failure.spent += until - slot.counted_until
        slot.counted_until = until
        failure.reason = reason or failure.reason
        failure.last = now
        self.failures[slot.endpoint] = failure
        if len(self.failures) > FAILURES_KEPT:
            del self.failures[next(iter(self.failures))]
        return failure

    cdef int check_negative(self, str endpoint) except -1:
        """Raise Unreachable if the endpoint has failed a moment ago."""
        failure = self.failures.get(endpoint)
        if failure is not None:
            left = failure.until - self.now()
            if left > 0:
                self.n_negative_hits += 1
                raise self.unreachable(endpoint, f"known from before; tried again in {left / 1e9:.2g} s")
        return 0

    cdef int forget_failures(self, int64_t now) except -1:
        """Forget the endpoints that nobody has tried for long."""
        while self.failures:
            endpoint, failure = next(iter(self.failures.items()))
            if now - failure.last <= FAILURE_KEPT:
                break               # they are in the order of their last attempts
            del self.failures[endpoint]
        return 0

    cdef object unreachable(self, str endpoint, str detail):
        """Return the error to raise: what is known of ``endpoint``, and ``detail``."""
        failure = self.failures.get(endpoint)
        if failure is None:
            return errors.Unreachable(f"{endpoint} cannot be reached ({detail})")
        reason = failure.reason or "no connection came about"
        return errors.Unreachable(f"{endpoint}: {reason} ({detail}; {self._attempts(failure)})")

    cdef object unjudged(self, str endpoint, int64_t waited, int64_t connect_timeout):
        """Return the error to raise when ``waited`` ns were too few to tell, with what is known nevertheless."""
        failure = self.failures.get(endpoint)
        known = ""
        if failure is not None and failure.reason:
            known = f"; {failure.reason}; {self._attempts(failure)}"
        return errors.Unreachable(
            f"{endpoint}: no connection within the {waited / 1e9:.3g} s that were left (connect_timeout is"
            f" {connect_timeout / 1e9:.3g} s{known})")

    cdef str _attempts(self, failure):
        attempts = "1 attempt" if failure.attempts == 1 else f"{failure.attempts} attempts"
        return f"{attempts} in {(self.now() - failure.since) / 1e9:.3g} s"

    # -- what it tells about itself ------------------------------------------------------------------------

    cdef Py_ssize_t n_free_soon(self) except -1:
        """Return how many of those that wait for a place need not wait for a user: for as many an idle channel gives
        way, or one is being closed."""
        return self.probation.length + self.protected.length + len(self.closing)

    cdef str numbers(self):
        """Return in words where all the sockets are."""
        cdef Py_ssize_t leaving = len(self.draining) + len(self.closing)
        cdef Py_ssize_t idle = self.probation.length + self.protected.length
        pinned = self.total - self.in_use - leaving - idle
        return (f"all {self.max_sockets} sockets of the pool are taken: {self.in_use} in use, {idle} idle,"
                f" {pinned} idle but pinned, {len(self.draining)} draining, {len(self.closing)} closing")

    cdef int count_wait(self, int64_t waited) except -1:
        """Note a wait of ``waited`` ns for a place. Takes the lock."""
        cdef Py_ssize_t i = 0
        self.enter()
        try:
            while i < len(WAIT_BUCKETS) and waited > WAIT_BUCKETS[i] * 1e9:
                i += 1
            self.wait_histogram[i] += 1
            self.waited_ns += waited
            self.waited_most_ns = max(self.waited_most_ns, waited)
        finally:
            self.leave()
        return 0

    cdef dict stats(self):
        """Return what ChannelPool.stats() says. Takes the lock."""
        cdef Slot slot
        cdef Channel channel
        cdef int i
        cdef list channels = []
        connecting = 0
        self.enter()
        try:
            self.reap()
            self.forget_failures(self.now())
            for slots in self.slots.values():
                for slot in slots:      # no comprehension: its variables would be untyped, and the fields are C's
                    connecting += slot.stage == STAGE_CONNECTING
            for slot in self.everything():
                if slot.channel is not None:
                    channels.append(slot.channel)
            counted = self.counted
            leaving = len(self.draining) + len(self.closing)
            stats = {
                "max_sockets": self.max_sockets,
                "open": self.total,
                "connecting": connecting,
                "in_use": self.in_use - connecting,
                "idle": self.total - self.in_use - leaving,
                "draining": len(self.draining),
                "closing": len(self.closing),
                "pinned": len(self.pinned),
                "protected": self.protected.length,
                "waiting": self.waiting,
                "unreachable_known": len([1 for failure in self.failures.values() if failure.failures]),
                "acquired": self.n_acquired,
                "opened": self.n_opened,
                "reused": self.n_reused,
                **{CAUSES[i]: self.left[i] for i in range(N_CAUSES)},
                "revived": self.n_revived,
                "drained": self.n_drained,
                "lost_while_draining": self.n_drain_lost,
                "waits": self.n_waits,
                "wait_timeouts": self.n_timeouts,
                "refused": self.n_refused,
                "unreachable": self.n_unreachable,
                "negative_hits": self.n_negative_hits,
                "waited_seconds": self.waited_ns / 1e9,
                "longest_wait_seconds": self.waited_most_ns / 1e9,
                "wait_seconds": dict(zip([f"<={bound:g}" for bound in WAIT_BUCKETS] + ["more"], self.wait_histogram)),
            }
        finally:
            self.leave()
        # There may be thousands: not under the lock.
        for channel in channels:
            counted = _sum(counted, channel.stats())
        stats["messages"] = counted
        return stats


cdef dict _sum(dict counted, dict stats):
    """Return ``counted`` with what a channel has counted added to it."""
    return {name: counted[name] + stats[name] for name in MESSAGES}
