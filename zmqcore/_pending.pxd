"""Requests whose replies are awaited: see ``_pending.pyx``."""

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint32_t, uint64_t

from zmqcore._deadlines cimport Deadlines
from zmqcore._frame cimport Envelope
from zmqcore._led_socket cimport LedSocket
from zmqcore._socket cimport Waiter

cdef enum Outcome:
    OUTCOME_WAITING = 0
    OUTCOME_DONE = 1            # a reply came
    OUTCOME_LOST = 2
    OUTCOME_CLOSED = 3
    OUTCOME_EXPIRED = 4
    OUTCOME_CANCELLED = 5
    OUTCOME_MALFORMED = 6
    OUTCOME_TOO_LARGE = 7
    OUTCOME_LATE = 8            # the port had stopped before the request came

cdef class Pending:
    cdef readonly Requester channel
    cdef Envelope reply
    cdef str problem            # what is wrong with what came, where that is the outcome
    cdef Waiter waiter          # of the thread that waits for it, if any
    cdef list joined            # Waiters of further threads that wait for it
    cdef object callback
    cdef object items           # of a stream: deque of Envelopes that nobody has asked for yet; else None
    cdef bint hurried           # the callback is to be called as soon as this has ended
    cdef object made            # what somebody has made of the reply: see keep()
    cdef uint64_t id
    cdef int64_t started
    cdef int64_t deadline
    cdef int outcome
    cdef Envelope _take_item(self, int64_t deadline)

cdef class Requester(LedSocket):
    cdef readonly str endpoint
    cdef str lost_reason
    # Of body and buffers of one message: ours, and once its hello has come no more than the port's.
    cdef size_t max_bytes
    cdef Py_ssize_t max_buffers
    cdef dict pending           # id -> Pending
    cdef Deadlines expiring     # of Pendings whose sender does not wait
    cdef uint64_t n_hurried     # of those, how many are hurried
    cdef object attention       # called with the channel when a Pending has nobody who waits for it; or None
    cdef unsigned long loop_thread      # whose event loop attends to this channel, see adopt(); 0 for none
    cdef uint64_t told_id       # of the stream that was cancelled last: its further items are no news
    cdef uint64_t n_timeouts, n_cancelled, n_items, n_late

    cdef int check(self) except -1
    cdef int unlock(self) except -1
    cdef int tell(self, int kind, uint64_t id, bytes body=*) except -1

    cdef int await_reply(self, Pending pending, int64_t deadline) except -1
    cdef int abandon(self, Pending pending) except -1
    cdef int expect(self, Pending pending) except -1
    cdef bint expire_overdue(self, int64_t now, int64_t *earliest) except -1
    cdef bint take_item(self, Envelope envelope) except -1
    cdef int finish(self, Pending pending, int outcome) except -1
    cdef int finish_all(self, int outcome) except -1
    cdef int give_up(self, Pending pending) except -1
    cdef Envelope result(self, Pending pending)
    cdef int _expire(self, Pending pending) except -1
