# cython: language_level=3, embedsignature=True, auto_pickle=False, freethreading_compatible=True
"""What is sent *accepted*: kept until the port says that it is finished, and sent again if the channel is lost first.

A Retained is one such message: the very one that libzmq has, with the identity by which a port knows it when it comes
twice. A Retention is what one channel keeps. When the channel is lost it gives what is left to ``undelivered``, to be
sent again elsewhere by Channel.send_again().

A Lane is what one client sends accepted to one endpoint, whichever channels it takes, and keeps it in order: while
messages of a lane that have not been taken yet are on a channel that is being left, or wait to be sent again, they
*bar* it, and nothing new is sent for it.

Invariants:
  I1. Each Retained that has been sent counts in its lane's n_unfinished until it is finished or given up.
  I2. A Retained that is ``barring`` counts in its lane's n_barred; all that a Retention has left over are.
  I3. n_messages and n_bytes of a Retention are those of its list, whose ids go up.
"""

import os
import time

cimport cython
from cpython.exc cimport PyErr_SetObject, PyErr_WriteUnraisable
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint64_t

from zmqcore._frame cimport Parcel, parcel_close, parcel_set_identity, parcel_share
from zmqcore._socket cimport deadline_after, now_ns

from zmqcore import errors

cdef extern from *:
    """
    #include <stdint.h>
    static inline int64_t zc_add(int64_t *counter, int64_t n) {
        return __atomic_add_fetch(counter, n, __ATOMIC_SEQ_CST);
    }
    static inline int64_t zc_read(int64_t *counter) { return __atomic_load_n(counter, __ATOMIC_SEQ_CST); }
    """
    int64_t zc_add(int64_t *, int64_t) noexcept nogil
    int64_t zc_read(int64_t *) noexcept nogil

__all__ = ["Lane", "Retained"]

# How many messages a channel retains at most. Part of the protocol: no more than a port remembers of one sender, or it
# could not tell whether one that comes again is new.
cdef enum:
    MAX_RETAINED = 8192

# Who waits for a lane to be finished looks this often, in ns, where its messages are now.
cdef int64_t LANE_INTERVAL = 50_000_000


@cython.final
cdef class Lane:
    """What one client sends accepted to ``endpoint``: its order, and how much of it is not finished yet.

    ``owner`` is its maker's, and is not looked at. Thread-safe.
    """

    def __init__(self, endpoint: str, owner: object = None):
        self.endpoint = endpoint
        self.owner = owner

    @property
    def unfinished(self) -> int:
        """How many of the accepted messages are not known to be finished, wherever they are."""
        return zc_read(&self.n_unfinished)

    @property
    def given_up(self) -> int:
        """How many of the accepted messages nobody sends any more: they may have been executed, or not."""
        return zc_read(&self.n_given_up)

    @property
    def barred(self) -> int:
        """How many of them nothing new may overtake: while there are any nothing new is sent."""
        return zc_read(&self.n_barred)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until all that was accepted is finished, or given up, or ``timeout`` seconds; return whether it is.

        Drives the channel meanwhile. Any number of threads may do that.
        """
        cdef int64_t deadline = deadline_after(timeout)
        cdef int64_t left
        while not self.is_finished():
            left = deadline - now_ns()
            if left <= 0:
                return False
            channel = self.channel
            if channel is None or not channel.await_finished(self, min(left, LANE_INTERVAL) / 1e9):
                time.sleep(min(0.005, left / 1e9))      # until it is sent again
        return True

    cdef bint is_finished(self) noexcept:
        return zc_read(&self.n_unfinished) <= 0

    cdef bint is_barred(self) noexcept:
        return zc_read(&self.n_barred) > 0

    cdef int check(self) except -1:
        """Raise Unreachable while the lane is barred."""
        if self.is_barred():
            raise errors.Unreachable(
                f"{self.endpoint}: {zc_read(&self.n_barred)} accepted messages, from before a connection was lost or"
                " replaced, go first; this one had not been sent")
        return 0

    def __repr__(self) -> str:
        return f"<Lane to {self.endpoint}, {self.unfinished} unfinished{', barred' if self.barred else ''}>"


@cython.final
@cython.freelist(256)
@cython.no_gc       # refers to its lane only, and by that to who has made that: all of it lives until it is finished
cdef class Retained:
    """An accepted message that is not known to be finished. Belongs to one channel, or to who sends it again."""

    def __dealloc__(self):
        if self.packed:
            parcel_close(&self.parcel)

    @property
    def in_lane(self) -> Lane:
        """The lane that it was accepted for."""
        return self.lane

    @property
    def order(self) -> int:
        """Its place among the messages of its lane; not without gaps."""
        return self.place

    @property
    def n_bytes(self) -> int:
        """How long the message is, all parts together."""
        return self.parcel.n_bytes

    def give_up(self) -> None:
        """Count it out: it will not be sent again. Only for who has been given it as undelivered, and once."""
        if self.lane is not None:
            zc_add(&self.lane.n_given_up, 1)
            self.leave_lane()

    cdef int bar(self) noexcept:
        """Let nothing new overtake it in its lane."""
        if not self.barring:
            self.barring = True
            zc_add(&self.lane.n_barred, 1)
        return 0

    cdef int unbar(self) noexcept:
        if self.barring:
            self.barring = False
            zc_add(&self.lane.n_barred, -1)
        return 0

    cdef int64_t leave_lane(self) noexcept:
        """Count it out; return how many of its lane are unfinished then."""
        cdef Lane lane = self.lane
        self.unbar()
        self.lane = None
        return zc_add(&lane.n_unfinished, -1)

    def __repr__(self) -> str:
        return f"<Retained {self.place} of {self.lane!r}>"


@cython.final
cdef class Retention:
    """What one channel retains, at most ``max_messages`` and ``max_bytes``. The channel's lock is held throughout.

    It is bounded as the window is, but apart from it: a method that takes long must not hold up what needs no more than
    to be taken.
    """

    def __init__(self, max_messages: int, max_bytes: int, undelivered):
        self.max_messages = min(max_messages, MAX_RETAINED)
        self.max_bytes = max_bytes
        self.undelivered = undelivered
        self.done = []
        self.left_over = []

    cdef bint has_room(self, size_t size) noexcept:
        return self.n_messages < self.max_messages and (
            self.n_bytes == 0 or self.n_bytes + size <= self.max_bytes)

    cdef int begin(self, Retained retained, Lane lane, Parcel *parcel) except -1:
        """``parcel`` is about to be sent for the first time: give it its identity, and keep it in ``retained``.

        The identity is this channel's name, drawn when it is first needed, and the next number. Raises Unreachable
        while the lane is barred.
        """
        lane.check()
        while self.sender == 0:
            self.sender = int.from_bytes(os.urandom(8), "little")
        parcel_set_identity(parcel, self.sender, self.n_accepted + 1)
        parcel_share(&retained.parcel, parcel)
        retained.packed = True
        return 0

    cdef int add(self, Retained retained, Lane lane, uint64_t id) except -1:
        """``retained`` has just been sent, for the first time or again, maybe to another endpoint than before."""
        if retained.lane is lane:
            retained.unbar()
        else:
            zc_add(&lane.n_unfinished, 1)
            if retained.lane is None:
                self.n_accepted += 1
            else:
                self._count_out(retained)
            retained.lane = lane
            retained.place = zc_add(&lane.n_accepted, 1)
        retained.id = id
        if self.newest is None:
            self.oldest = retained
        else:
            self.newest.newer = retained
        self.newest = retained
        self.n_messages += 1
        self.n_bytes += retained.parcel.n_bytes
        return 0

    cdef int finish(self, uint64_t up_to) except -1:
        """The port has finished everything with an id up to this one."""
        while self.oldest is not None and self.oldest.id <= up_to:
            self.n_finished += 1
            self._count_out(self._pop())
        return 0

    cdef int bar(self, uint64_t acked_id) except -1:
        """The channel is being left, and another one may take its place before all has been taken."""
        cdef Retained retained = self.oldest
        self.barring = True
        while retained is not None:
            if retained.id > acked_id:
                retained.bar()
            retained = retained.newer
        return 0

    cdef int unbar(self, uint64_t acked_id) except -1:
        """Something more has been taken of what was sent before the channel was left."""
        cdef Retained retained = self.oldest
        while retained is not None and retained.id <= acked_id:
            retained.unbar()
            retained = retained.newer
        return 0

    cdef int give_up(self, uint64_t before) except -1:
        """What was sent with an id below ``before`` is not finished, and this channel will not hear of it any more."""
        while self.oldest is not None and self.oldest.id < before:
            self._leave_over(self._pop())
        return 0

    cdef bint give_up_one(self, uint64_t id) except -1:
        """The port has refused message ``id``; return whether it is one that is retained."""
        cdef Retained before = None, retained = self.oldest
        while retained is not None and retained.id < id:
            before, retained = retained, retained.newer
        if retained is None or retained.id != id:
            return False
        if before is None:
            self._pop()
        else:
            before.newer = retained.newer
            retained.newer = None
            if self.newest is retained:
                self.newest = before
            self.n_messages -= 1
            self.n_bytes -= retained.parcel.n_bytes
        self._leave_over(retained)
        return True

    cdef int hand_over(self, list left_over) except -1:
        """Give what is left to who sends it again. Not under the lock."""
        cdef Retained retained
        if self.undelivered is not None:
            try:
                self.undelivered(left_over)
                return 0
            except BaseException as exc:
                PyErr_SetObject(type(exc), exc)
                PyErr_WriteUnraisable(self.undelivered)
        for retained in left_over:
            retained.give_up()
        return 0

    cdef Retained _pop(self):
        """Take out the oldest one; there is one."""
        cdef Retained retained = self.oldest
        self.oldest = retained.newer
        retained.newer = None
        if self.oldest is None:
            self.newest = None
        self.n_messages -= 1
        self.n_bytes -= retained.parcel.n_bytes
        return retained

    cdef int _count_out(self, Retained retained) except -1:
        """Take ``retained`` out of its lane. Who made that may be freed with it: that is not done under the lock."""
        cdef Lane lane = retained.lane
        if retained.leave_lane() == 0:
            self.done.append(lane)
        return 0

    cdef int _leave_over(self, Retained retained) except -1:
        self.n_undelivered += 1
        retained.bar()
        self.left_over.append(retained)
        return 0
