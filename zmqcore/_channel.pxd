"""One channel and its pending replies: see ``_channel.pyx``."""

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint64_t

from zmqcore._deadlines cimport Deadlines
from zmqcore._frame cimport Envelope, Header, Parcel
from zmqcore._libzmq cimport zc_msg_t
from zmqcore._retention cimport Lane, Retained, Retention
from zmqcore._socket cimport SharedSocket, Waiter, Wakes

cdef enum State:
    STATE_CONNECTING = 0
    STATE_OPEN = 1
    STATE_LOST = 2
    STATE_CLOSED = 3

cdef enum Outcome:
    OUTCOME_WAITING = 0
    OUTCOME_DONE = 1            # a reply came; or, for a sender, it is its turn to look again
    OUTCOME_LOST = 2
    OUTCOME_CLOSED = 3
    OUTCOME_EXPIRED = 4
    OUTCOME_CANCELLED = 5
    OUTCOME_MALFORMED = 6

# To whom a reply goes.
cdef enum Reply:
    TO_NOBODY = 0               # none is expected
    TO_WAITER = 1               # the thread that has sent the request waits for it
    TO_WHOEVER_LOOKS = 2        # nobody waits yet; its deadline is kept all the same
    TO_CALLBACK = 3             # and a callback is to be called as soon as it is there

cdef class Pending:
    cdef readonly Channel channel
    cdef Envelope reply
    cdef Waiter waiter          # of the thread that waits for it, if any
    cdef list joined            # further threads that wait for it, each as a Pending of its own
    cdef object callback
    cdef object items           # of a stream: deque of Envelopes that nobody has asked for yet; else None
    cdef bint hurried           # the callback is to be called as soon as this has ended
    cdef size_t size            # of the message that a sender wants to send
    cdef bint retains           # ... and which is to be retained
    cdef Lane lane              # which is to be finished, for one who waits for that
    cdef object made            # what somebody has made of the reply: see keep()
    cdef uint64_t id
    cdef int64_t started
    cdef int64_t deadline
    cdef int outcome

cdef class Channel:
    cdef SharedSocket shared    # its lock guards all that follows
    cdef readonly str endpoint
    cdef object owner           # the pool's record of this channel; None without a pool
    cdef readonly int64_t created_ns
    cdef int state
    cdef str lost_reason
    cdef bint goodbye           # the server wants nothing new
    cdef bint parted            # ... and has been told that we have everything
    cdef bint retired           # it is to close: see retire()
    cdef bytes instance         # of the port at the other end; None before its hello

    # Sending: ids count up from 1; the window is what has been sent and not yet acknowledged.
    cdef uint64_t sent_id, acked_id
    cdef uint64_t sent_bytes, acked_bytes
    cdef uint64_t *sent_bytes_at    # owned ring: sent_bytes after message id, at id % window_messages
    cdef uint64_t window_messages, window_bytes
    cdef size_t max_bytes           # of one message: ours, and once its hello has come no more than the port's
    cdef Py_ssize_t max_buffers
    cdef object senders         # deque of Pending: who waits for a connection or for room in the window

    # What was accepted is retained, apart from the window.
    cdef Retention retention
    cdef object acceptors       # deque of Pending: who waits for room to retain
    cdef list flushers          # Pendings of those who wait for their lanes to be finished
    cdef bint tended            # ``attention`` has been called because of what is retained

    # Receiving: leader and followers.
    cdef dict pending           # id -> Pending
    cdef Pending leader         # whose thread polls the socket
    cdef bint watched           # the leader is in poll(2): senders must keep the edge-trigger rule
    cdef Wakes owed             # whose requests have ended: woken when the lock is released, best without the GIL
    cdef dict followers         # Pending -> None, in order of arrival: whose threads are parked
    cdef list finished          # Pendings with a callback that has not been called yet
    cdef Deadlines expiring     # of Pendings whose sender does not wait
    cdef uint64_t n_hurried     # of those, how many are hurried
    cdef Py_ssize_t inside      # threads between waiting and leaving; the last one out closes a closed socket
    cdef object attention       # called with the channel when a Pending has nobody who waits for it; or None
    cdef bint attended
    cdef unsigned long loop_thread      # whose event loop attends to this channel, see adopt(); 0 for none
    cdef object on_clean        # called with the channel once it is clean or lost; set by retire()
    cdef int64_t drain_deadline
    cdef int64_t last_drain
    cdef int64_t last_heard     # when anything came last

    cdef uint64_t n_calls, n_casts, n_replies, n_late, n_garbage, n_timeouts, n_cancelled, n_lost, n_window_waits
    cdef uint64_t n_received_bytes, n_items
    cdef uint64_t told_id       # of the stream that was cancelled last: its further items are no news
    cdef uint64_t n_sent_again, n_retain_waits

    cpdef Envelope call(
        self, bytes topic, str method, body, list buffers, bytes metadata, int codec, timeout)
    cpdef Pending submit(
        self, bytes topic, str method, body, list buffers, bytes metadata, int codec, timeout, callback,
        bint hurry=*)
    cpdef Pending submit_nowait(
        self, bytes topic, str method, body, list buffers, bytes metadata, int codec, timeout, callback)
    cpdef uint64_t send(
        self, str kind, bytes topic, str method, body, list buffers, bytes metadata, int codec, timeout,
        bint expires=*) except 0
    cpdef uint64_t send_now(
        self, str kind, bytes topic, str method, body, list buffers, bytes metadata, int codec,
        Lane lane=*) except? 0

    cpdef uint64_t send_accepted(
        self, Lane lane, str kind, bytes topic, str method, body, list buffers, bytes metadata, int codec,
        timeout) except 0
    cpdef uint64_t send_again(self, Retained retained, Lane lane, timeout) except 0

    cdef int _check(self) except -1
    cdef double _tend_after(self, double seconds) noexcept
    cdef int _have_tended(self) except -1
    cdef bint _may_accept(self, Lane lane, size_t size) noexcept
    cdef int _let_next_go(self) except -1
    cdef int _finished_to(self, uint64_t id) except -1
    cdef int _wake_flushers(self) except -1
    cdef bint is_clean(self) noexcept
    cdef Pending _start(
        self, int kind, bytes topic, str method, body, list buffers, bytes metadata, int codec, int64_t started,
        int64_t deadline, object callback, int reply, bint carries_deadline=*, bint wait=*,
        Lane lane=*)
    cdef int _send(
        self, Parcel *parcel, Pending pending, int64_t deadline, bint carries_deadline, bint expects_reply,
        bint wait, Retained retained=*) except -1
    cdef int _look_sometimes(self, int64_t now) except -1
    cdef int _transmit(self, Parcel *parcel, Retained retained=*, Lane lane=*) except -1
    cdef int _after_sending(self) except -1
    cdef int _keep_edge(self) except -1
    cdef bint _is_polled_by_another(self) noexcept
    cdef bint _has_room(self, size_t size) noexcept
    cdef int _record_sent(self, size_t size) noexcept
    cdef int _acked(self, uint64_t ack) except -1
    cdef int _wake_sender(self) except -1
    cdef bint _fits(self, Pending turn) noexcept
    cdef int _wake_first(self, object queue) except -1
    cdef int _wait_in_turn(
        self, object queue, size_t size, int64_t started, int64_t deadline, bint retains) except -1
    cdef int _leave_queue(self, object queue, Pending turn) except -1
    cdef int _raise_gone(self) except -1
    cdef int _raise_no_room(self, int64_t started, bint retains) except -1
    cdef int _await(self, Pending op, int64_t deadline) except -1
    cdef int _lead_or_follow(self, Pending op, int64_t deadline) except -1
    cdef int _promote(self) except -1
    cdef int _call_back(self, Pending op) except -1
    cdef int _unlock(self) except -1
    cdef int _drain(self) except -1
    cdef int _take(self, zc_msg_t *message) except -1
    cdef int _refuse(self, uint64_t id) except -1
    cdef int _take_buffers(self, Envelope envelope, zc_msg_t *message) except -1
    cdef int _hello(self, Envelope envelope) except -1
    cdef int _part(self) except -1
    cdef int _ask_for_hello(self) except -1
    cdef bint _control(self, int kind, uint64_t id, bytes body=*) except -1
    cdef int _tell(self, int kind, uint64_t id, bytes body) except -1
    cdef int _expect(self, Pending pending) except -1
    cdef int _take_in(self, Envelope envelope) except -1
    cdef int _finish(self, Pending pending, int outcome) except -1
    cdef int _lose(self, str reason) except -1
    cdef int _end_all(self, int outcome) except -1
    cdef int _abandon(self, Pending pending) except -1
    cdef int _expire(self, Pending pending) except -1
    cdef int _give_up(self, Pending pending) except -1
    cdef Envelope _result(self, Pending pending)
