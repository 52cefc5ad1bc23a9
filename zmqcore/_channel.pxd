"""One channel: see ``_channel.pyx``."""

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint64_t

from zmqcore._frame cimport Envelope, Header, Parcel
from zmqcore._libzmq cimport zc_msg_t
from zmqcore._pending cimport Pending, Requester
from zmqcore._retention cimport Lane, Retained, Retention
from zmqcore._socket cimport Waiter
from zmqcore._window cimport Window

cdef enum State:
    STATE_CONNECTING = 0
    STATE_OPEN = 1
    STATE_LOST = 2
    STATE_CLOSED = 3

# To whom a reply goes.
cdef enum:
    # A message of more bytes does not go before the port has said what it takes.
    UNANNOUNCED_BYTES = 1 << 18

cdef enum Reply:
    TO_NOBODY = 0               # none is expected
    TO_WAITER = 1               # the thread that has sent the request waits for it
    TO_WHOEVER_LOOKS = 2        # nobody waits yet; its deadline is kept all the same
    TO_CALLBACK = 3             # and a callback is to be called as soon as it is there

cdef class Turn:
    cdef Waiter waiter
    cdef size_t size            # of the message that is to be sent
    cdef bint retains           # ... and is to be retained: that is what it waits for room for

cdef class Channel(Requester):
    cdef object owner           # the pool's record of this channel; None without a pool
    cdef readonly int64_t created_ns
    cdef int state
    cdef bint goodbye           # the server wants nothing new
    cdef bint parted            # ... and has been told that we have everything
    cdef bint retired           # it is to close: see retire()
    cdef bytes instance         # of the port at the other end; None before its hello
    cdef bytes hello            # the body of ours; None if we take what is assumed
    cdef uint64_t hello_id      # the number under which it was sent last; 0 if it was not

    cdef Window window          # what has been sent and not yet acknowledged
    cdef object senders         # deque of Turn: who waits for a connection or for room in the window

    # What was accepted is retained, apart from the window.
    cdef Retention retention
    cdef object acceptors       # deque of Turn: who waits for room to retain
    cdef dict flushers          # Waiter -> Lane: who waits for what to be finished
    cdef bint tended            # ``attention`` has been called because of what is retained

    cdef bint attended
    cdef object on_clean        # called with the channel once it is clean or lost; set by retire()
    cdef int64_t drain_deadline
    cdef int64_t last_drain
    cdef int64_t quiet_since    # when anything came last, or was asked for

    cdef uint64_t n_calls, n_casts, n_replies, n_garbage, n_lost, n_window_waits
    cdef uint64_t n_sent_again, n_retain_waits

    cpdef Envelope call(
        self, bytes topic, str method, body, list buffers, bytes metadata, int codec, timeout)
    cpdef Pending submit(
        self, bytes topic, str method, body, list buffers, bytes metadata, int codec, timeout, callback,
        bint hurry=*)
    cdef Pending try_submit(
        self, bytes topic, str method, body, list buffers, bytes metadata, int codec, timeout, callback, bint hurry)
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
        Lane lane=*, bint now_or_none=*)
    cdef Retained _pack(
        self, Parcel *parcel, int kind, bytes topic, str method, body, list buffers, bytes metadata, int codec,
        Lane lane)
    cdef int _send(
        self, Parcel *parcel, Pending pending, int64_t deadline, bint carries_deadline, bint expects_reply,
        bint wait, Retained retained, Lane lane) except -1
    cdef int _look_sometimes(self, int64_t now) except -1
    cdef int _transmit(self, Parcel *parcel, Retained retained, Lane lane) except -1
    cdef bint _may_hold(self, Parcel *parcel) noexcept
    cdef int _hold(self, Parcel *parcel) except -1
    cdef int _send_at_once(self, Parcel *parcel) noexcept
    cdef int _after_sending(self) except -1
    cdef int _keep_edge(self) except -1
    cdef bint _is_done_waiting(self) noexcept
    cdef bint _is_polled_by_another(self) noexcept
    cdef bint _can_send_now(self, size_t size)
    cdef int _acked(self, uint64_t ack) except -1
    cdef int _wake_sender(self) except -1
    cdef bint _fits(self, Turn turn) noexcept
    cdef int _wake_first(self, object queue) except -1
    cdef int _wait_in_turn(
        self, object queue, size_t size, int64_t started, int64_t deadline, bint retains) except -1
    cdef Turn _queue_up(self, object queue, size_t size, bint retains)
    cdef int _leave_queue(self, object queue, Turn turn) except -1
    cdef int _end_turns(self) except -1
    cdef int _raise_gone(self) except -1
    cdef int _raise_no_room(self, int64_t started, bint retains) except -1
    cdef int _take(self, zc_msg_t *message) except -1
    cdef int _take_envelope(self, Envelope envelope) except -1
    cdef int _open(self) except -1
    cdef bint _say_hello(self) except -1
    cdef int _end_late(self) except -1
    cdef int _refuse(self, const Header *header, int outcome, str problem) except -1
    cdef int _refuse_for_size(self, Envelope envelope) except -1
    cdef int _take_buffers(self, Envelope envelope, zc_msg_t *message) except -1
    cdef int _hello(self, Envelope envelope) except -1
    cdef int _part(self) except -1
    cdef bint _control(self, int kind, uint64_t id, bytes body=*) except -1
    cdef int _lose(self, str reason) except -1
    cdef int _end_all(self, int outcome) except -1
