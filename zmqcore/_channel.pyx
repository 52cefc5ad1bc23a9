# cython: language_level=3, embedsignature=True, auto_pickle=False, freethreading_compatible=True
"""One DEALER socket to one endpoint, shared by any number of threads.

There is no reactor thread: the callers drive the socket themselves. Of the threads that wait on one channel one is
the *leader*: it polls the socket, takes what comes and hands replies that belong to others to them. The rest are
*followers*, parked until their reply has come or until they are promoted, because the leader has left with its own.

A channel lives as long as one connection. When the connection breaks (libzmq takes the pipe away, POLLOUT clears and
the fd wakes: no monitor is needed) everything outstanding fails with PeerLost and the channel is *lost*; its owner
closes it, and the pool makes a fresh one. Should libzmq reconnect before anybody has looked, the port's hello tells:
it names the first message it has seen, and everything before that was lost.

A port that is to close says goodbye. The channel sends nothing new then, and once it has all its replies it answers:
only then may the port close, because libzmq drops what has not been read when a connection breaks.

The window: the port acknowledges what it has taken, cumulatively. At most ``window_messages`` and ``window_bytes``
are unacknowledged; beyond that a sender waits until its deadline. SNDHWM is unbounded, so that POLLOUT is false
only when there is no connection.

What is sent *accepted* is retained until the port says that it is finished, see ``_retention.pyx``. If the channel is
lost before that, ``undelivered`` gets what is left, to be sent again elsewhere by send_again().

Invariants, under the socket's lock:
  I1. If any thread waits, there is a leader, or a woken follower that will become one.
  I2. ``watched`` is true only while the leader is between its last EAGAIN and its return from poll(2).
  I3. A Pending is in ``pending`` exactly while its outcome is WAITING and its message has been sent.
  I4. acked_id <= sent_id; sent_bytes - acked_bytes is what the window holds.
"""

from collections import deque

import zmq

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_SetObject, PyErr_WriteUnraisable
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from cpython.pythread cimport PyThread_get_thread_ident
from libc.errno cimport EAGAIN
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint32_t, uint64_t

from zmqcore._deadlines cimport Deadlines
from zmqcore._frame cimport (
    FLAG_FLOW, FLAG_IDENTIFIED, HEADER_BYTES, IDENTITY_BYTES, KIND_ACK, KIND_CALL, KIND_CANCEL, KIND_CAST,
    KIND_CREDIT, KIND_ERROR, KIND_GOODBYE, KIND_HELLO, KIND_ITEM, KIND_PING, KIND_PONG, KIND_REPLY, NO_DEADLINE,
    Envelope, Header, Parcel, envelope_of_stream, envelope_take, parcel_close, parcel_copy, parcel_pack,
    parcel_pack_control, parcel_send, parcel_set_id, parcel_set_remaining, parse_header, part_take,
    release_sent_buffers, sent_buffers_returned,
)
from zmqcore._libzmq cimport (
    ZMQ_IMMEDIATE, ZMQ_LINGER, ZMQ_RCVHWM, ZMQ_RECONNECT_IVL, ZMQ_RECONNECT_IVL_MAX, ZMQ_SNDHWM, libzmq, raise_errno,
    zc_msg_t,
)
from zmqcore._retention cimport Lane, Retained, Retention
from zmqcore._socket cimport (
    NEVER, SharedSocket, SpinScore, Waiter, Wakes, coarse_now_ns, deadline_after, deadline_from, fork_generation,
    handle_of, limit_silence, now_ns, set_option, waiter_borrow, waiter_return, wakes_move, wakes_owe, wakes_pay,
)

from zmqcore import errors
from zmqcore._frame import KINDS

__all__ = ["Channel", "Pending"]

# A message of this size, in bytes, may go before the port has said what it takes.
cdef Py_ssize_t UNANNOUNCED_BYTES = 1 << 18
# While requests are outstanding and nothing comes, the port is asked this often, in ns, for its hello.
cdef int64_t HELLO_INTERVAL = 2_000_000_000
# The largest window in messages. A port's libzmq holds 10,000 messages of a connection that nobody takes (its RCVHWM);
# with more it reads nothing, not even heartbeats, and a busy server would be lost.
cdef int MOST_WINDOW_MESSAGES = 8192
# A sender that nobody makes wait looks this often, in ns, whether something has come.
cdef int64_t LOOK_INTERVAL = 10_000_000

# While something is retained, somebody looks at least this often, in s, whether it is finished or the channel lost.
cdef double TEND_INTERVAL = 0.05
cdef bytes NO_IDENTITY = bytes(IDENTITY_BYTES)

# All channels of the process.
cdef SpinScore _spin_shared = SpinScore()

_STATE_NAMES = ("connecting", "open", "lost", "closed")


cdef Py_ssize_t _sizes(list buffers) except -1:
    """Return how many bytes ``buffers`` have together; 0 for None."""
    cdef Py_ssize_t total = 0
    if buffers is not None:
        for buffer in buffers:
            total += len(buffer) if isinstance(buffer, bytes) else memoryview(buffer).nbytes
    return total


cdef uint32_t remaining_ms(int64_t deadline) noexcept nogil:
    """Return how many ms are left until ``deadline``, as the header has it. At least 1: 0 would be expired."""
    cdef int64_t left
    if deadline == NEVER:
        return NO_DEADLINE
    left = (deadline - now_ns() + 999999) // 1000000
    if left < 1:
        return 1
    return <uint32_t>(left if left < <int64_t>NO_DEADLINE else <int64_t>NO_DEADLINE - 1)


@cython.final
@cython.freelist(64)
cdef class Pending:
    """A request that has been sent and whose reply has not been taken yet. Made by :meth:`Channel.submit`.

    Thread-safe. It has a deadline from its start, and always ends by that: with an envelope or an error.
    """

    @property
    def done(self) -> bool:
        """Whether it has ended: by a reply, an error, its deadline or cancel()."""
        return self.outcome != OUTCOME_WAITING

    def wait(self, timeout: float | None = None) -> bool:
        """Drive the channel until this request has ended or ``timeout`` seconds have passed; return ``done``.

        Any number of threads may do that.
        """
        cdef int64_t deadline = min(deadline_after(timeout), self.deadline)
        if self.outcome == OUTCOME_WAITING:
            self.channel._check()
            self.channel._await(self, deadline)
            if self.outcome == OUTCOME_WAITING and now_ns() >= self.deadline:
                self.channel._abandon(self)
        return self.outcome != OUTCOME_WAITING

    def envelope(self) -> Envelope:
        """Return the reply (kind "reply", "error", "item" or "pong"), driving the channel until it is there.

        Raises DeadlineExceeded, PeerLost or Closed if the request ended without one.
        """
        self.wait()
        return self.channel._result(self)

    def keep(self, made not None):
        """Keep what has been made of the reply, and return it; from the second time on what was kept the first time."""
        with cython.critical_section(self):
            if self.made is None:
                self.made = made
            return self.made

    def cancel(self) -> bool:
        """Give the request up, and tell the server; a reply that still comes is dropped.

        Return whether it was still waiting."""
        return self.channel._cancel(self)

    @property
    def answered(self) -> bool:
        """Whether it has ended by what the server has sent."""
        return self.outcome == OUTCOME_DONE

    @property
    def cancelled(self) -> bool:
        """Whether it has ended by cancel()."""
        return self.outcome == OUTCOME_CANCELLED

    # Where the answer is a stream, this goes on: envelope() returns one whose ``stream`` is this Pending, and from then
    # on it is waiting whenever the next item has been asked for and is not there. One thread at a time.

    def next_item(self, timeout: float | None = None) -> Envelope:
        """Return the stream's next item, or what ends it (kind "reply" or "error"), driving the channel until it comes.

        Raises what envelope() raises. If nothing has come within ``timeout`` seconds, that ends the stream.
        """
        cdef int64_t deadline = deadline_after(timeout)
        cdef Envelope envelope = self.channel._take_item(self, deadline)
        while envelope is None:
            try:
                self.channel._await(self, deadline)
            finally:
                if self.outcome == OUTCOME_WAITING:
                    self.channel._abandon(self)
            envelope = self.channel._take_item(self, deadline)
        return envelope

    def take_item(self, timeout: float | None = None) -> Envelope | None:
        """next_item(), but where that would wait return None: notify() tells then when to ask again.

        The ``timeout`` counts from the first time.
        """
        return self.channel._take_item(self, deadline_after(timeout))

    def grant(self, n_items: int) -> None:
        """Let the server send ``n_items`` more than it may already."""
        self.channel._grant(self, n_items)

    def close(self) -> None:
        """End the stream; the server is told unless it has ended already. Twice is fine."""
        self.channel._close_stream(self)

    @property
    def timeout(self) -> float | None:
        """How long, in seconds, the answer was to be waited for; None for ever."""
        return None if self.deadline == NEVER else max(0.0, (self.deadline - self.started) / 1e9)

    def notify(self, callback) -> bool:
        """Have ``callback(pending)`` called as soon as this has ended, instead of the one given to submit().

        Return False, and change nothing, if it has ended already.
        """
        return self.channel._notify(self, callback)

    def __repr__(self) -> str:
        names = ("waiting", "done", "lost", "closed", "expired", "cancelled", "malformed")
        return f"<Pending {self.id} on {self.channel.endpoint} {names[self.outcome]}>"


cdef class Channel:
    """Connect to ``endpoint`` with a DEALER socket of ``context``, without waiting for the connection.

    ``window_messages`` and ``window_bytes`` bound what is sent and not yet acknowledged, ``max_bytes`` and
    ``max_buffers`` one message in either direction. ``liveness`` is after how many seconds a peer that is stopped or
    cut off is lost; one that is merely busy is not. ``spin`` is how long, in seconds, a wait polls without
    blocking first. ``configure(socket)`` is called before connecting, e.g. to set keys. ``attention(channel)`` is
    called, outside any lock, when a submitted request may end while nobody waits for it: who is responsible then
    calls attend() until it returns None, at once whenever ``fd`` is readable unless the channel is ``unhurried``.
    ``undelivered(messages)`` is called, outside any lock, with the Retained that the channel has given up, in
    order; without it they are dropped.

    Thread-safe. After a fork the child cannot use it (Closed). Costs two file descriptors.
    """

    def __init__(
        self, context: zmq.Context, endpoint: str, *, window_messages: int = 4096, window_bytes: int = 1 << 26,
        max_bytes: int = 1 << 28, max_buffers: int = 1024, liveness: float = 5.0, spin: float = 100e-6, configure=None,
        attention=None, undelivered=None,
    ):
        cdef void *handle
        if not 1 <= window_messages <= MOST_WINDOW_MESSAGES or window_bytes < 1:
            raise ValueError(
                f"window of {window_messages} messages and {window_bytes} bytes; both must be at least 1, and the"
                f" messages at most {MOST_WINDOW_MESSAGES}")
        socket = context.socket(zmq.DEALER)
        try:
            handle = handle_of(socket)
            set_option(handle, ZMQ_IMMEDIATE, 1)
            set_option(handle, ZMQ_SNDHWM, 0)
            set_option(handle, ZMQ_RCVHWM, 0)       # replies are bounded by the window
            set_option(handle, ZMQ_LINGER, 0)
            set_option(handle, ZMQ_RECONNECT_IVL, 20)
            set_option(handle, ZMQ_RECONNECT_IVL_MAX, 1000)
            socket.setsockopt(zmq.MAXMSGSIZE, max_bytes)
            limit_silence(handle, liveness, True)
            if configure is not None:
                configure(socket)
            socket.connect(endpoint)
            self.shared = SharedSocket(socket, spin, _spin_shared)
        except BaseException:
            socket.close(linger=0)
            raise
        self.sent_bytes_at = <uint64_t *>PyMem_RawMalloc(<size_t>window_messages * sizeof(uint64_t))
        if self.sent_bytes_at == NULL:
            raise MemoryError()
        self.endpoint = endpoint
        self.created_ns = now_ns()
        self.window_messages = window_messages
        self.window_bytes = window_bytes
        self.max_bytes = max_bytes
        self.max_buffers = max_buffers
        self.attention = attention
        self.retention = Retention(window_messages, window_bytes, undelivered)
        self.senders = deque()
        self.acceptors = deque()
        self.flushers = []
        self.pending = {}
        self.followers = {}
        self.finished = []
        self.expiring = Deadlines.__new__(Deadlines)

    def __dealloc__(self):
        PyMem_RawFree(self.sent_bytes_at)

    # -- what the callers use ---------------------------------------------------------------------------

    cpdef Envelope call(
        self, bytes topic, str method, body, list buffers, bytes metadata, int codec, timeout,
    ):
        """Send a call and return the reply's envelope: kind "reply" or "error", or "item" with a ``stream`` of them.

        ``body`` is bytes-like and copied; ``buffers`` (or None) are bytes-like, not copied, and must not change
        until the call has returned. ``timeout`` in seconds, None for ever, covers sending too. Raises Unreachable
        (never connected), Overloaded (no room in the window), DeadlineExceeded, PeerLost, PayloadTooLarge, Closed.
        """
        cdef int64_t started = now_ns()
        cdef int64_t deadline = deadline_from(started, timeout)
        cdef Pending pending = self._start(
            KIND_CALL, topic, method, body, buffers, metadata, codec, started, deadline, None, TO_WAITER)
        if pending.outcome == OUTCOME_WAITING:
            try:
                self._await(pending, deadline)
            except BaseException:
                if pending.items is not None:
                    self._close_stream(pending)     # nobody will have it
                raise
            finally:
                if pending.outcome == OUTCOME_WAITING:
                    self._abandon(pending)
        return self._result(pending)

    cpdef Pending submit(
        self, bytes topic, str method, body, list buffers, bytes metadata, int codec, timeout, callback,
        bint hurry=True,
    ):
        """Send a call and return at once; ``callback(pending)``, unless None, is called once when it has ended.

        The callback runs on whichever thread drives the channel, outside its lock; what it raises is reported by
        ``sys.unraisablehook``. Errors while sending are raised here, and the callback is not called then. Without
        ``hurry`` it may be called some ms late, unless somebody waits.
        """
        cdef int64_t started = now_ns()
        return self._start(
            KIND_CALL, topic, method, body, buffers, metadata, codec, started, deadline_from(started, timeout),
            callback, TO_CALLBACK if callback is not None and hurry else TO_WHOEVER_LOOKS)

    cpdef Pending submit_nowait(
        self, bytes topic, str method, body, list buffers, bytes metadata, int codec, timeout, callback,
    ):
        """submit(), but where that would wait for a connection or for room, raise Unreachable or Overloaded."""
        cdef int64_t started = now_ns()
        return self._start(
            KIND_CALL, topic, method, body, buffers, metadata, codec, started, deadline_from(started, timeout),
            callback, TO_CALLBACK, True, False)

    cpdef uint64_t send(
        self, str kind, bytes topic, str method, body, list buffers, bytes metadata, int codec, timeout,
        bint expires=False,
    ) except 0:
        """Send a one-way message of ``kind`` ("cast" or "fanout") and return its id once libzmq has it.

        Waits up to ``timeout`` seconds for a connection and for room in the window. With ``expires`` the message
        carries what is left of the timeout as its deadline; else it has none. Raises as call() does.
        """
        cdef int number = KIND_CAST if kind == "cast" else KINDS[kind]
        cdef int64_t started = now_ns() if expires else coarse_now_ns()
        cdef Pending sent = self._start(
            number, topic, method, body, buffers, metadata, codec, started, deadline_from(started, timeout), None,
            TO_NOBODY, expires)
        return sent.id

    cpdef uint64_t send_now(
        self, str kind, bytes topic, str method, body, list buffers, bytes metadata, int codec, Lane lane=None,
    ) except? 0:
        """send() if that can be done at once; return 0, and do nothing, if it has to wait or cannot be done at all.

        Unlike a send() it needs no acquired channel of a pool: once a channel is to close it does nothing. With
        ``lane`` it is send_accepted() in the same way.
        """
        cdef Retained retained = None
        cdef Parcel parcel
        cdef Header header
        cdef uint64_t id = 0
        # A hint, read without the lock: what is packed in vain costs more than to look twice.
        if self.state != STATE_OPEN or self.sent_id - self.acked_id >= self.window_messages or self.instance is None:
            return 0
        if topic is None or method is None or metadata is None:
            raise TypeError("topic and metadata are bytes and method is str, not None")
        header.kind = KIND_CAST if kind == "cast" else KINDS[kind]
        header.flags = FLAG_FLOW
        header.codec = codec
        header.id = 0
        header.ack = 0
        header.remaining_ms = NO_DEADLINE
        if lane is not None:
            header.flags |= FLAG_IDENTIFIED
            metadata = NO_IDENTITY + metadata if metadata else NO_IDENTITY
            retained = Retained.__new__(Retained)
        parcel_pack(&parcel, &header, topic, method, metadata, body, buffers, self.max_bytes, self.max_buffers)
        self.shared.enter()
        try:
            if self.state == STATE_OPEN and not (self.goodbye or self.retired or self.senders) \
                    and self._has_room(parcel.n_bytes):
                self._look_sometimes(coarse_now_ns())
                if self.state == STATE_OPEN and not self.goodbye \
                        and (lane is None or self._may_accept(lane, parcel.n_bytes)):
                    try:
                        self._transmit(&parcel, retained, lane)
                    except errors.PeerLost:
                        return 0        # nothing has left: there may be another one
                    id = self.sent_id
                    self.n_casts += 1
                    self._after_sending()
        finally:
            self._unlock()
            parcel_close(&parcel)
        if retained is not None and id:
            self._have_tended()
        return id

    cpdef uint64_t send_accepted(
        self, Lane lane, str kind, bytes topic, str method, body, list buffers, bytes metadata, int codec, timeout,
    ) except 0:
        """send(), and retain the message until the port says that it is finished; see ``lane.wait()``.

        It has no deadline. Waits up to ``timeout`` seconds for room to retain it, too. Raises Unreachable without
        waiting while the lane is barred. What is raised means that the message was not accepted. ``buffers`` must not
        change until it is finished.
        """
        cdef int64_t started = coarse_now_ns()
        if lane is None:
            raise TypeError("lane must be a Lane, not None")
        return self._start(
            KIND_CAST if kind == "cast" else KINDS[kind], topic, method, body, buffers, metadata, codec, started,
            deadline_from(started, timeout), None, TO_NOBODY, False, True, lane).id

    cpdef uint64_t send_again(self, Retained retained, Lane lane, timeout) except 0:
        """Send what another channel has left undelivered, under its old identity, and retain it here.

        ``lane`` is that of this endpoint, possibly the message's own. Waits up to ``timeout`` seconds for a connection
        and for room. Raises as send() does; the message then still belongs to the caller.
        """
        cdef int64_t started = now_ns()
        cdef int64_t deadline = deadline_from(started, timeout)
        cdef Parcel parcel
        cdef Pending pending = Pending.__new__(Pending)
        if retained is None or lane is None or retained.lane is None:
            raise TypeError("there is nothing to send, or no lane to send it on")
        pending.channel = self
        pending.started = started
        pending.deadline = deadline
        self._check()
        pending.lane = lane
        if self.instance is None and retained.parcel.n_bytes > <size_t>UNANNOUNCED_BYTES:
            self.ping(timeout)
        if retained.parcel.n_bytes > self.max_bytes or retained.parcel.n_parts > self.max_buffers:
            raise errors.PayloadTooLarge(
                f"message of {retained.parcel.n_bytes} bytes with {retained.parcel.n_parts} buffers; {self.endpoint}"
                f" takes {self.max_bytes} and {self.max_buffers}")
        parcel_copy(&parcel, &retained.parcel)
        self.shared.enter()
        try:
            self._send(&parcel, pending, deadline, False, False, True, retained)
            self.n_casts += 1
            self.n_sent_again += 1
        finally:
            self._let_next_go()
            self._unlock()
            parcel_close(&parcel)
        self._have_tended()
        return pending.id

    def ping(self, timeout: float | None = 5.0) -> float:
        """Return the round-trip time, in seconds, to the port's compiled code. Raises as call() does."""
        cdef int64_t started = now_ns()
        cdef int64_t deadline = deadline_from(started, timeout)
        cdef Pending pending = self._start(KIND_PING, b"", "", b"", None, b"", 0, started, deadline, None, TO_WAITER)
        if pending.outcome == OUTCOME_WAITING:
            try:
                self._await(pending, deadline)
            finally:
                if pending.outcome == OUTCOME_WAITING:
                    self._abandon(pending)
        self._result(pending)
        return (now_ns() - started) / 1e9

    def wait_open(self, timeout: float | None = None) -> bool:
        """Wait until the connection is there. Return False if it is not within ``timeout`` seconds, or is lost."""
        cdef Pending op
        cdef int64_t deadline = deadline_after(timeout)
        self._check()
        if self.state == STATE_OPEN:
            return True
        self.shared.enter()
        try:
            if self.state == STATE_CONNECTING:
                op = Pending.__new__(Pending)
                op.channel = self
                self.senders.append(op)
                try:
                    self._lead_or_follow(op, deadline)
                finally:
                    self._leave_queue(self.senders, op)
        finally:
            self._unlock()
        return self.state == STATE_OPEN

    def attend(self) -> float | None:
        """Take what has come, call callbacks, expire what is overdue; never block. May then be waited for on ``fd``.

        Returns after how many seconds to call it again at the latest, or None when no submitted request
        is outstanding any more: then nobody needs to attend until ``attention`` is called again.
        """
        cdef int64_t now, next_deadline
        cdef Pending pending
        self._check()
        self.shared.enter()
        try:
            self._ask_for_hello()
            self._drain()
            now = now_ns()
            while self.expiring.n:
                next_deadline = self.expiring.heap[0].deadline
                pending = self.pending.get(self.expiring.heap[0].id)
                if pending is not None and (pending.outcome != OUTCOME_WAITING or pending.deadline != next_deadline):
                    pending = None      # a stream, which waits under another deadline or not at all
                if pending is not None and next_deadline > now:
                    return min((next_deadline - now) / 1e9, self._tend_after(HELLO_INTERVAL / 1e9))
                self.expiring.pop()
                if pending is not None:
                    self._expire(pending)
                    if pending.items is not None:
                        self._drain()       # something was sent
            if self.on_clean is not None:
                if now >= self.drain_deadline and not self.pending:
                    self._lose("it was retired and its peer has not acknowledged what was sent")
                elif not self.is_clean():
                    # Overdue, but calls are outstanding: they have deadlines of their own.
                    return max(0.05, min((self.drain_deadline - now) / 1e9, self._tend_after(3600.0)))
            self.attended = self.loop_thread != 0
            if not self.retention.n_messages:
                self.tended = False
            elif self.loop_thread != PyThread_get_thread_ident():
                return TEND_INTERVAL
            return None
        finally:
            self._unlock()

    cdef double _tend_after(self, double seconds) noexcept:
        """Return after how many seconds to attend again where ``seconds`` would do but for what is retained."""
        return min(seconds, TEND_INTERVAL) if self.retention.n_messages else seconds

    cdef int _have_tended(self) except -1:
        """Something is retained: somebody has to take what the port says about it, even if nobody calls any more, and
        even if an event loop drives the channel, which may be closed at any time."""
        if not self.tended and self.attention is not None and self.retention.n_messages:
            self.tended = True
            self.attention(self)
        return 0

    def adopt(self) -> bool:
        """Let the calling thread's event loop drive this channel; return whether it does now.

        The loop waits on ``fd``, and calls attend() when that is readable, at the deadline that attend() gave, and once
        after each of its turns in which it has sent something: its own sends leave the look at the socket to that.
        There can be one such loop; any number of others and of threads may use the channel as ever.
        """
        self._check()
        self.shared.enter()
        try:
            if self.loop_thread == 0:
                self.loop_thread = PyThread_get_thread_ident()
                self.attended = True
            return self.loop_thread == PyThread_get_thread_ident()
        finally:
            self._unlock()

    def disown(self) -> None:
        """The loop that adopted the channel is done with it; what is still outstanding goes to ``attention``."""
        cdef bint orphaned
        self._check()
        self.shared.enter()
        try:
            self.loop_thread = 0
            orphaned = self.expiring.n > 0 or self.on_clean is not None
            self.attended = orphaned
        finally:
            self._unlock()
        if orphaned and self.attention is not None:
            self.attention(self)

    def retire(self, on_clean, timeout: float = 5.0) -> None:
        """Have ``on_clean(channel)`` called once nothing is outstanding any more, possibly at once.

        What is still unacknowledged after ``timeout`` seconds is lost, and so is the channel then.
        """
        cdef bint attend = False
        self.shared.enter()
        try:
            self.retired = True
            self._drain()
            self.on_clean = on_clean
            self.drain_deadline = deadline_after(timeout)
            if self.state <= STATE_OPEN and not self.is_clean():
                attend = not self.attended
                self.attended = True
        finally:
            self._unlock()
        if attend and self.attention is not None:
            self.attention(self)

    def keep(self) -> None:
        """Undo retire(), if its callback has not been called yet: the channel is used again as before."""
        self.shared.enter()
        try:
            self.on_clean = None
            self.retired = False
        finally:
            self._unlock()

    def look(self) -> None:
        """Take what has come and notice what has become of the connection; never block."""
        self._check()
        self.shared.enter()
        try:
            self._drain()
        finally:
            self._unlock()

    def settle(self) -> bool:
        """look(), and return whether nothing is outstanding: all is acknowledged and answered, or lost."""
        self.look()
        return self.is_clean()

    def close(self) -> None:
        """Close the socket; everything outstanding ends with Closed. Twice is fine.

        Returns at once. If threads wait on the channel they are woken, and the last one to leave closes the
        socket.
        """
        if self.shared.generation != fork_generation():
            return
        self.shared.enter()
        try:
            if self.state != STATE_CLOSED:
                self.retention.give_up(self.sent_id + 1)
                self.state = STATE_CLOSED
                self._end_all(OUTCOME_CLOSED)
        finally:
            self._unlock()

    # -- what it tells about itself ----------------------------------------------------------------------

    @property
    def state_name(self) -> str:
        """"connecting", "open", "lost" or "closed"."""
        return _STATE_NAMES[self.state]

    @property
    def usable(self) -> bool:
        """Whether new messages can be sent: connecting or open, and the server has not said goodbye."""
        return self.state <= STATE_OPEN and not self.goodbye

    @property
    def clean(self) -> bool:
        """Whether nothing is outstanding: everything sent has been acknowledged, and answered if it was a call, and
        finished if it was accepted."""
        return self.is_clean()

    cdef bint is_clean(self) noexcept:
        return self.acked_id == self.sent_id and self.retention.n_messages == 0 and not self.pending \
            and not self.senders

    @property
    def led(self) -> bool:
        """Whether a thread is polling the socket."""
        return self.leader is not None

    @property
    def unhurried(self) -> bool:
        """Whether it is enough to call attend() every few ms: a thread polls the socket, or no callback is due."""
        return self.leader is not None or (self.n_hurried == 0 and self.on_clean is None)

    @property
    def fd(self) -> int:
        """The descriptor that becomes readable when attend() has something to do (edge-triggered)."""
        return self.shared.fd

    @property
    def peer_instance(self) -> bytes | None:
        """The 16 bytes that name the port at the other end; None before its hello."""
        return self.instance

    @property
    def limits(self) -> tuple:
        """The most that is sent in one message, as (bytes, buffers): ours or, after its hello, the port's if less."""
        return (self.max_bytes, self.max_buffers)

    def stats(self) -> dict[str, int]:
        """Return the counters since the channel was made, and what is outstanding now."""
        return {
            "calls": self.n_calls, "casts": self.n_casts, "replies": self.n_replies, "items": self.n_items,
            "late_replies": self.n_late,
            "garbage": self.n_garbage, "timeouts": self.n_timeouts, "cancelled": self.n_cancelled,
            "lost": self.n_lost, "window_waits": self.n_window_waits, "sent_bytes": self.sent_bytes,
            "received_bytes": self.n_received_bytes, "outstanding_calls": len(self.pending),
            "window_messages": self.sent_id - self.acked_id, "window_bytes": self.sent_bytes - self.acked_bytes,
            "accepted": self.retention.n_accepted, "sent_again": self.n_sent_again,
            "finished": self.retention.n_finished,
            "retained": self.retention.n_messages,
            "retained_bytes": self.retention.n_bytes, "retain_waits": self.n_retain_waits,
            "undelivered": self.retention.n_undelivered,
        }

    def __repr__(self) -> str:
        return (f"<Channel {self.endpoint} {_STATE_NAMES[self.state]}, {len(self.pending)} calls and"
                f" {self.sent_id - self.acked_id} messages outstanding>")

    # -- sending -----------------------------------------------------------------------------------------

    cdef int _check(self) except -1:
        """Raise Closed in a forked child: there even the lock may be held by a thread that does not exist."""
        if self.shared.generation != fork_generation():
            raise errors.Closed(f"channel to {self.endpoint} was made before a fork and is the parent's")
        return 0

    cdef Pending _start(
        self, int kind, bytes topic, str method, body, list buffers, bytes metadata, int codec, int64_t started,
        int64_t deadline, object callback, int reply, bint carries_deadline=True, bint wait=True,
        Lane lane=None,
    ):
        """Pack and send a message; return its Pending, which is registered if a reply is expected."""
        cdef Parcel parcel
        cdef Header header
        cdef bint attend = False
        cdef Retained retained = None
        cdef Pending pending = Pending.__new__(Pending)
        pending.channel = self
        pending.callback = callback
        pending.started = started
        pending.deadline = deadline
        self._check()
        if self.instance is None and wait and body is not None and len(body) + _sizes(buffers) > UNANNOUNCED_BYTES:
            # The port may take less than we do, and libzmq would break the connection: first hear what it takes.
            self.look()
            if self.instance is None:
                self.ping(None if deadline == NEVER else max(0.0, (deadline - now_ns()) / 1e9))
        if topic is None or method is None or metadata is None:
            raise TypeError("topic and metadata are bytes and method is str, not None")
        header.kind = kind
        header.flags = FLAG_FLOW
        header.codec = codec
        header.id = 0
        header.ack = 0
        header.remaining_ms = NO_DEADLINE
        if lane is not None:
            header.flags |= FLAG_IDENTIFIED
            metadata = NO_IDENTITY + metadata if metadata else NO_IDENTITY
            retained = Retained.__new__(Retained)
            pending.lane = lane
        parcel_pack(&parcel, &header, topic, method, metadata, body, buffers, self.max_bytes, self.max_buffers)
        self.shared.enter()
        try:
            self._send(&parcel, pending, deadline, carries_deadline, reply != TO_NOBODY, wait, retained)
            if reply != TO_NOBODY:
                self.n_calls += 1
            else:
                self.n_casts += 1
            if reply >= TO_WHOEVER_LOOKS:
                if reply == TO_CALLBACK:
                    pending.hurried = True
                    self.n_hurried += 1
                self._expect(pending)
                # Who attends sleeps until the deadline that was the first one.
                attend = not self.attended or self.expiring.heap[0].id == pending.id or (
                    reply == TO_CALLBACK and self.n_hurried == 1)
        finally:
            if retained is not None:
                self._let_next_go()
            self._unlock()
            parcel_close(&parcel)
        if attend and pending.outcome == OUTCOME_WAITING and self.loop_thread != PyThread_get_thread_ident():
            self.attended = True
            if self.attention is not None:
                self.attention(self)
        if retained is not None:
            self._have_tended()
        return pending

    cdef int _expect(self, Pending pending) except -1:
        """Have attend() end ``pending`` at its deadline."""
        cdef Pending other
        cdef Deadlines left
        cdef Py_ssize_t i
        if self.expiring.n > 64 + 2 * len(self.pending):
            # Most have ended before their deadlines, or wait for the next item under another one.
            left = Deadlines.__new__(Deadlines)
            for i in range(self.expiring.n):
                other = self.pending.get(self.expiring.heap[i].id)
                if other is not None and other.deadline == self.expiring.heap[i].deadline:
                    left.push(other.deadline, other.id)
            self.expiring = left
        return self.expiring.push(pending.deadline, pending.id)

    cdef int _send(
        self, Parcel *parcel, Pending pending, int64_t deadline, bint carries_deadline, bint expects_reply,
        bint wait, Retained retained=None,
    ) except -1:
        """Send ``parcel`` under the next id when there is a connection and room; without ``wait``, at once or not.

        The lock is held throughout, but for the time spent waiting.
        """
        if retained is not None and not retained.packed:
            pending.lane.check()        # now, not when its turn has come: others would stand behind it
        if retained is not None and (self.acceptors or not self.retention.has_room(parcel.n_bytes)):
            self.n_retain_waits += 1
            self._wait_in_turn(self.acceptors, parcel.n_bytes, pending.started, deadline if wait else 0, True)
        if self.senders or self.state != STATE_OPEN or not self._has_room(parcel.n_bytes):
            if self.state == STATE_OPEN:
                self.n_window_waits += 1
            self._wait_in_turn(self.senders, parcel.n_bytes, pending.started, deadline if wait else 0, False)
        else:
            self._look_sometimes(pending.started)
        if self.state != STATE_OPEN or self.goodbye:
            self._raise_gone()
        if carries_deadline:
            parcel_set_remaining(parcel, remaining_ms(deadline))
        self._transmit(parcel, retained, pending.lane)
        pending.id = self.sent_id
        if expects_reply:
            self.pending[pending.id] = pending
        return self._after_sending()

    cdef int _look_sometimes(self, int64_t now) except -1:
        """Acknowledgements and a goodbye must be taken now and then even if nobody ever waits."""
        if (self.sent_id - self.acked_id) & 127 == 127 or now - self.last_drain > LOOK_INTERVAL:
            self._drain()
        return 0

    cdef int _transmit(self, Parcel *parcel, Retained retained=None, Lane lane=None) except -1:
        """Hand ``parcel`` to libzmq under the next id. The connection is there, and room; the lock is held."""
        cdef size_t size = parcel.n_bytes
        cdef int code
        parcel_set_id(parcel, self.sent_id + 1)
        if retained is not None and not retained.packed:
            self.retention.begin(retained, lane, parcel)
        code = parcel_send(parcel, self.shared.handle)
        if code != 0:
            if code != EAGAIN:
                raise_errno(code, f"cannot send to {self.endpoint}")
            # SNDHWM is unbounded: EAGAIN means that the connection has gone.
            self._lose("the connection broke")
            self._raise_gone()
        self.sent_id += 1
        self._record_sent(size)
        if retained is not None:
            self.retention.add(retained, lane, self.sent_id)
            lane.channel = self
        return 0

    cdef int _after_sending(self) except -1:
        """Tell the next sender that it may go on, and keep the edge-trigger rule for whoever waits on the fd."""
        if self.senders:
            self._wake_sender()
        return self._keep_edge()

    cdef int _keep_edge(self) except -1:
        """Something was sent, which may have swallowed the edge for whoever waits on the socket: look in its place."""
        if self.watched or (self.attended and self._is_polled_by_another()):
            self.shared.read_events()
            if self.shared.readable or not self.shared.writable:
                self._drain()
        return 0

    cdef bint _is_polled_by_another(self) noexcept:
        """Whether the event loop of another thread, or whoever is responsible by ``attention``, may poll the fd."""
        if self.loop_thread != 0:
            return self.loop_thread != PyThread_get_thread_ident()
        return self.n_hurried > 0 or self.on_clean is not None

    cdef bint _has_room(self, size_t size) noexcept:
        cdef uint64_t held = self.sent_bytes - self.acked_bytes
        return self.sent_id - self.acked_id < self.window_messages and (
            held == 0 or held + size <= self.window_bytes)

    cdef int _record_sent(self, size_t size) noexcept:
        self.sent_bytes += size
        self.sent_bytes_at[self.sent_id % self.window_messages] = self.sent_bytes
        return 0

    cdef int _acked(self, uint64_t ack) except -1:
        """The port has taken everything up to ``ack``."""
        if ack > self.acked_id:
            if ack > self.sent_id:
                self.n_garbage += 1         # acknowledges what was never sent
                return 0
            self.acked_id = ack
            self.acked_bytes = self.sent_bytes_at[ack % self.window_messages]
            if self.retention.barring:
                self.retention.unbar(ack)
            if self.senders:
                self._wake_sender()
        return 0

    cdef int _wake_sender(self) except -1:
        return self._wake_first(self.senders)

    cdef int _wake_first(self, object queue) except -1:
        """If the first of those who wait for a connection or for room can go on now, tell it. It stays the first
        until it has left by itself, so nobody overtakes it meanwhile."""
        cdef Pending first
        if queue and self.state != STATE_CONNECTING:
            first = queue[0]
            if first.outcome == OUTCOME_WAITING and (self.state != STATE_OPEN or self._fits(first)):
                first.outcome = OUTCOME_DONE
                if first.waiter is not None:
                    wakes_owe(&self.owed, first.waiter)
        return 0

    cdef bint _fits(self, Pending turn) noexcept:
        return self.retention.has_room(turn.size) if turn.retains else self._has_room(turn.size)

    cdef int _wait_in_turn(
        self, object queue, size_t size, int64_t started, int64_t deadline, bint retains,
    ) except -1:
        """Wait until there is a connection and room for ``size`` bytes, and all who came before have left ``queue``.

        The room is in the window, with ``retains`` in what is retained. The lock is held on entry and on return, and
        not released between the last look and the return. Raises as send() does.
        """
        cdef Pending turn = Pending.__new__(Pending)
        turn.channel = self
        turn.size = size
        turn.retains = retains
        queue.append(turn)
        try:
            while True:
                self._drain()
                if self.state > STATE_OPEN or self.goodbye:
                    self._raise_gone()
                if self.state == STATE_OPEN and queue[0] is turn and self._fits(turn):
                    queue.popleft()             # who is the first now is told when this one has sent
                    return 0
                if deadline != NEVER and now_ns() >= deadline:
                    self._raise_no_room(started, retains)
                turn.outcome = OUTCOME_WAITING
                self._lead_or_follow(turn, deadline)
        finally:
            self._leave_queue(queue, turn)

    cdef int _leave_queue(self, object queue, Pending turn) except -1:
        """If ``turn`` stands in the queue, take it out and tell who is the first then."""
        if turn in queue:
            queue.remove(turn)
            self._wake_first(queue)
        return 0

    cdef int _raise_gone(self) except -1:
        if self.state == STATE_CLOSED:
            raise errors.Closed(f"channel to {self.endpoint} is closed")
        reason = "the server takes nothing new" if self.state == STATE_OPEN else self.lost_reason
        raise errors.PeerLost(
            f"{self.endpoint}: {reason}; this message had not been sent", executed_possible=False)

    cdef int _raise_no_room(self, int64_t started, bint retains) except -1:
        waited = (now_ns() - started) / 1e9
        if self.state == STATE_CONNECTING:
            raise errors.Unreachable(f"{self.endpoint}: no connection within {waited:.3g} s")
        if retains:
            raise errors.Overloaded(
                f"{self.endpoint} has not finished {self.retention.n_messages} accepted messages of"
                f" {self.retention.n_bytes} bytes (limits {self.retention.max_messages} and"
                f" {self.retention.max_bytes}); gave up after {waited:.3g} s; this message had not been sent")
        raise errors.Overloaded(
            f"{self.endpoint} has taken nothing for too long: {self.sent_id - self.acked_id} messages and"
            f" {self.sent_bytes - self.acked_bytes} bytes are unacknowledged (limits {self.window_messages} and"
            f" {self.window_bytes}); gave up after {waited:.3g} s; this message had not been sent")

    # -- what is retained ----------------------------------------------------------------------------------

    cdef bint _may_accept(self, Lane lane, size_t size) noexcept:
        """Whether a new message can be accepted at once."""
        return not self.acceptors and self.retention.has_room(size) and not lane.is_barred()

    cdef int _let_next_go(self) except -1:
        """Whoever waited in turn has sent, or was refused when its turn came: then nobody else tells the next one."""
        self._wake_first(self.acceptors)
        return self._wake_first(self.senders)

    cdef int _finished_to(self, uint64_t id) except -1:
        """The port has finished everything up to ``id`` that was accepted."""
        if id > self.sent_id:
            self.n_garbage += 1             # what was never sent
            return 0
        self.retention.finish(id)
        if self.acceptors:
            self._wake_first(self.acceptors)
        if self.flushers:
            self._wake_flushers()
        return 0

    cdef int _wake_flushers(self) except -1:
        cdef Pending op
        for op in self.flushers:
            if op.outcome == OUTCOME_WAITING and (self.state > STATE_OPEN or op.lane.is_finished()):
                self._finish(op, OUTCOME_DONE)
        return 0

    def await_finished(self, Lane lane not None, timeout: float) -> bool:
        """Drive the channel until all of ``lane`` is finished, the channel is lost, or ``timeout`` seconds.

        Return whether it could be driven: False, at once, if it is lost or closed already, or the parent's.
        """
        cdef Pending op
        cdef int64_t deadline = deadline_after(timeout)
        if self.state > STATE_OPEN or self.shared.generation != fork_generation():
            return False
        self.shared.enter()
        try:
            self._drain()
            if self.state <= STATE_OPEN and not lane.is_finished():
                op = Pending.__new__(Pending)
                op.channel = self
                op.lane = lane
                self.flushers.append(op)
                try:
                    self._lead_or_follow(op, deadline)
                finally:
                    self.flushers.remove(op)
        finally:
            self._unlock()
        return True

    # -- waiting: leader and followers -------------------------------------------------------------------

    cdef int _await(self, Pending op, int64_t deadline) except -1:
        """Wait until ``op`` has ended, or the deadline."""
        cdef Pending joined
        self.shared.enter()
        try:
            if op.waiter is None:
                self._lead_or_follow(op, deadline)
            elif op.outcome == OUTCOME_WAITING:
                # Another thread waits for it already; _finish() ends this one with it.
                joined = Pending.__new__(Pending)
                joined.channel = self
                if op.joined is None:
                    op.joined = []
                op.joined.append(joined)
                try:
                    self._lead_or_follow(joined, deadline)
                finally:
                    if joined.outcome == OUTCOME_WAITING:
                        op.joined.remove(joined)
        finally:
            self._unlock()
        return 0

    cdef int _lead_or_follow(self, Pending op, int64_t deadline) except -1:
        """Drive the channel, or let another thread do so, until ``op`` has ended or the deadline.

        The lock is held on entry and on return, but not while waiting or while callbacks run. No other thread waits
        for ``op``.
        """
        cdef Waiter waiter
        cdef int64_t budget = 0, began = 0, before
        cdef bint judged = False
        cdef uint64_t received = 0
        cdef bint overdue = False
        if op.outcome != OUTCOME_WAITING:
            return 0
        waiter = waiter_borrow()
        op.waiter = waiter
        self.inside += 1
        try:
            while op.outcome == OUTCOME_WAITING:
                if self.leader is None:
                    self.leader = op
                if self.leader is op:
                    self._drain()
                    if judged and self.shared.spin_result(budget, began, self.n_received_bytes != received):
                        judged = False
                        budget = 0
                    if not overdue and (
                            self.finished or (op.outcome == OUTCOME_WAITING and sent_buffers_returned())):
                        self._call_back(op)
                        overdue = deadline != NEVER and now_ns() >= deadline
                        continue
                    if op.outcome != OUTCOME_WAITING or overdue:
                        break
                    before = now_ns()
                    if began == 0:
                        # Once for each request, however often libzmq signals for reasons of its own.
                        began = before
                        judged = self.inside == 1
                        budget = self.shared.spin_budget() if judged else 0
                        received = self.n_received_bytes
                    self.watched = True
                    wakes_move(&self.owed, &waiter.owed)
                    self.shared.leave()
                    try:
                        waiter.wait(
                            self.shared.fd, min(deadline, before + HELLO_INTERVAL),
                            max(<int64_t>0, began + budget - before))
                    finally:
                        self.shared.enter()
                        self.watched = False
                    if now_ns() - before >= HELLO_INTERVAL:
                        self._ask_for_hello()
                else:
                    if overdue:
                        break
                    if self.finished:
                        # A sender has taken them before it found that it has to wait.
                        self._call_back(op)
                        overdue = deadline != NEVER and now_ns() >= deadline
                        continue
                    self.followers[op] = None
                    wakes_move(&self.owed, &waiter.owed)
                    self.shared.leave()
                    try:
                        waiter.wait(-1, deadline, 0)
                    finally:
                        self.shared.enter()
                        self.followers.pop(op, None)
                overdue = deadline != NEVER and now_ns() >= deadline
        finally:
            op.waiter = None
            self.inside -= 1
            if self.leader is op:
                self.leader = None
            self._promote()
            waiter_return(waiter)
        return 0

    cdef int _promote(self) except -1:
        """If nobody leads, wake the follower that has waited longest: it will."""
        cdef Pending follower
        if self.leader is None:
            for follower in self.followers:
                wakes_owe(&self.owed, follower.waiter)
                break
        return 0

    cdef int _call_back(self, Pending op) except -1:
        """Run user code without the lock and without ``op`` being the leader: the finished requests' callbacks, and
        what releasing sent buffers may run."""
        cdef Wakes owed
        finished, self.finished = self.finished, []
        if self.leader is op:
            self.leader = None
            self._promote()
        wakes_move(&self.owed, &owed)
        self.shared.leave()
        wakes_pay(&owed)
        try:
            release_sent_buffers()
            _run_callbacks(finished)
        finally:
            self.shared.enter()
        return 0

    cdef int _unlock(self) except -1:
        """Release the lock; then do what must not happen under it: callbacks, and closing the socket."""
        cdef bint close_now = self.state == STATE_CLOSED and self.inside == 0 and self.shared.handle != NULL
        cdef list finished = self.finished
        cdef list left_over = self.retention.left_over
        cdef Wakes owed
        on_clean = done = None
        if finished:
            self.finished = []
        if left_over:
            self.retention.left_over = []
        if self.retention.done:
            done, self.retention.done = self.retention.done, []
        if self.on_clean is not None and (self.state > STATE_OPEN or self.is_clean()):
            on_clean, self.on_clean = self.on_clean, None
        if close_now:
            # The state keeps all others from using the handle, and nobody waits on the fd.
            self.shared.handle = NULL
        wakes_move(&self.owed, &owed)
        self.shared.leave()
        if owed.n:
            # They need the GIL: woken while this thread holds it, each would only wake to wait again.
            with nogil:
                wakes_pay(&owed)
        release_sent_buffers()
        if left_over:
            self.retention.hand_over(left_over)
        if close_now:
            self.shared.close_socket()
        if finished:
            _run_callbacks(finished)
        if on_clean is not None:
            on_clean(self)
        return 0

    # -- receiving ---------------------------------------------------------------------------------------

    cdef int _drain(self) except -1:
        """Take everything that has come and notice what has become of the connection. The lock is held."""
        cdef zc_msg_t message
        if self.state > STATE_OPEN:
            return 0
        self.last_drain = coarse_now_ns()
        libzmq.msg_init(&message)
        try:
            while self.shared.receive(&message) != EAGAIN:
                self._take(&message)
        finally:
            libzmq.msg_close(&message)
        if self.shared.writable:
            if self.state == STATE_CONNECTING:
                self.state = STATE_OPEN
                self._wake_sender()
        elif self.state == STATE_OPEN:
            self._lose("the connection broke")
        if self.goodbye and not self.parted and self.state == STATE_OPEN and self.is_clean():
            self._part()
        return 0

    cdef int _take(self, zc_msg_t *message) except -1:
        """Take one message, whose first part is ``message``, and give it to whom it belongs."""
        cdef Header header
        cdef Envelope envelope
        cdef Pending pending
        cdef size_t n_bytes = libzmq.msg_size(message)
        cdef const char *problem = parse_header(<const unsigned char *>libzmq.msg_data(message), n_bytes, &header)
        cdef bint more = libzmq.msg_more(message)
        self.n_received_bytes += n_bytes
        self.last_heard = coarse_now_ns()
        if problem != NULL or (not more and header.n_buffers != 0):
            while more:
                self.shared.receive_rest(message)
                more = libzmq.msg_more(message)
            return self._refuse(0 if problem != NULL else header.id)
        envelope = envelope_take(message, &header)
        if more:
            if self._take_buffers(envelope, message) != envelope.header.n_buffers \
                    or len(envelope.buffers) != envelope.header.n_buffers:
                return self._refuse(header.id)
        self._acked(header.ack)
        if header.kind == KIND_REPLY or header.kind == KIND_ERROR or header.kind == KIND_PONG:
            pending = self.pending.pop(header.id, None)
            if pending is None:
                if header.kind == KIND_ERROR and self.retention.give_up_one(header.id):
                    pass        # refused: the port had said goodbye before it came
                elif header.kind != KIND_PONG:
                    self.n_late += 1
            else:
                self.n_replies += 1
                pending.reply = envelope
                if pending.outcome == OUTCOME_WAITING:
                    self._finish(pending, OUTCOME_DONE)
        elif header.kind == KIND_ITEM:
            self._take_in(envelope)
        elif header.kind == KIND_HELLO:
            self._hello(envelope)
        elif header.kind == KIND_GOODBYE:
            self.goodbye = True
            self.parted = False
            self.retention.bar(self.acked_id)
            for waiting in (self.senders, self.acceptors):
                while waiting:
                    # They go elsewhere.
                    self._finish(waiting.popleft(), OUTCOME_DONE)
        elif header.kind == KIND_ACK:
            if header.id:
                self._finished_to(header.id)
        else:
            self.n_garbage += 1
        return 0

    cdef int _refuse(self, uint64_t id) except -1:
        """What has come is no envelope, or over a limit. If it says for which request, that one ends here."""
        cdef Pending pending = self.pending.pop(id, None)
        self.n_garbage += 1
        if pending is not None:
            self._finish(pending, OUTCOME_MALFORMED)
        return 0

    cdef int _take_buffers(self, Envelope envelope, zc_msg_t *message) except -1:
        """Receive the parts that follow ``envelope``'s first one; libzmq delivers them together. Return how many."""
        cdef bint more = True
        cdef int n_parts = 0
        cdef list buffers = []
        while more:
            self.shared.receive_rest(message)
            more = libzmq.msg_more(message)
            envelope.n_bytes += libzmq.msg_size(message)
            self.n_received_bytes += libzmq.msg_size(message)
            n_parts += 1
            # Over a limit the rest is dropped part by part; nothing is kept.
            if len(buffers) < envelope.header.n_buffers and len(buffers) < self.max_buffers \
                    and envelope.n_bytes <= self.max_bytes:
                buffers.append(part_take(message))
        envelope.buffers = buffers
        return n_parts

    cdef int _hello(self, Envelope envelope) except -1:
        """The port has seen this connection's first message, number ``envelope.id``: earlier ones it never got."""
        cdef uint64_t first = envelope.header.id
        cdef Pending pending
        if envelope.header.body_bytes < 16 or first == 0 or first > self.sent_id:
            self.n_garbage += 1
            return 0
        # Even what was taken: the port counts what is finished for each connection anew.
        self.retention.give_up(first)
        self._wake_first(self.acceptors)
        self.instance = bytes(envelope.body[:16])
        if envelope.header.body_bytes >= 28:
            self.max_bytes = min(self.max_bytes, int.from_bytes(envelope.body[16:24], "little"))
            self.max_buffers = min(self.max_buffers, int.from_bytes(envelope.body[24:28], "little"))
        if first - 1 > self.acked_id:
            self.n_lost += first - 1 - self.acked_id
            for number in [number for number in self.pending if number < first]:
                pending = self.pending.pop(number)
                self._finish(pending, OUTCOME_LOST)
            self.lost_reason = "the connection broke and was made again"
            self._acked(first - 1)
        return 0

    cdef int _ask_for_hello(self) except -1:
        """Requests are outstanding, and nothing has come for long: see that libzmq has not reconnected unnoticed.

        If it has, this is the new connection's first message, and the port's hello tells that the requests are lost.
        A port that is merely busy answers when it can; that it has not is no sign of anything.
        """
        cdef Parcel parcel
        cdef Header header
        if self.state != STATE_OPEN or not self.pending or coarse_now_ns() - self.last_heard < HELLO_INTERVAL:
            return 0
        header.kind = KIND_PING
        header.flags = FLAG_FLOW
        header.codec = 0
        header.id = self.sent_id + 1
        header.ack = 0
        header.remaining_ms = NO_DEADLINE
        header.body_bytes = 0
        parcel_pack_control(&parcel, &header, NULL)
        if self._has_room(parcel.n_bytes) and parcel_send(&parcel, self.shared.handle) == 0:
            self.sent_id += 1
            self._record_sent(HEADER_BYTES)
        parcel_close(&parcel)
        return 0

    cdef int _part(self) except -1:
        """Answer the goodbye: everything has come that we wait for."""
        self.parted = self._control(KIND_GOODBYE, 0)
        return 0

    cdef bint _control(self, int kind, uint64_t id, bytes body=b"") except -1:
        """Send a message of the protocol itself that does not count in the window; return whether libzmq has it.

        The connection is there, as far as is known, and the lock is held.
        """
        cdef Parcel parcel
        cdef Header header
        cdef bint sent
        header.kind = kind
        header.flags = FLAG_FLOW
        header.codec = 0
        header.id = id
        header.ack = 0
        header.remaining_ms = NO_DEADLINE
        header.body_bytes = PyBytes_GET_SIZE(body)
        parcel_pack_control(&parcel, &header, PyBytes_AS_STRING(body))
        sent = parcel_send(&parcel, self.shared.handle) == 0
        parcel_close(&parcel)
        return sent

    cdef int _finish(self, Pending pending, int outcome) except -1:
        """End ``pending``, which has been taken out of the tables, and wake or note whom it concerns."""
        cdef Pending joined
        pending.outcome = outcome
        if pending.hurried:
            pending.hurried = False
            self.n_hurried -= 1
        if pending.callback is not None:
            self.finished.append(pending)
        if pending.joined is not None:
            for joined in pending.joined:
                self._finish(joined, outcome)
        # The leader itself is awake while it drains; it sleeps only while ``watched``.
        if pending.waiter is not None and (self.watched or pending is not self.leader):
            wakes_owe(&self.owed, pending.waiter)
        return 0

    cdef int _lose(self, str reason) except -1:
        """The connection has gone: everything outstanding has failed."""
        # First: once another channel can take its place, what was sent here bars the way.
        self.retention.give_up(self.sent_id + 1)
        self.state = STATE_LOST
        self.lost_reason = reason
        self.n_lost += self.sent_id - self.acked_id
        return self._end_all(OUTCOME_LOST)

    cdef int _end_all(self, int outcome) except -1:
        cdef Pending pending
        for pending in self.pending.values():
            self._finish(pending, outcome)
        self.pending.clear()
        for waiting in (self.senders, self.acceptors):
            for pending in waiting:
                self._finish(pending, outcome)
            waiting.clear()
        self._wake_flushers()
        self.acked_id = self.sent_id
        self.acked_bytes = self.sent_bytes
        return 0

    # -- how a request ends without a reply --------------------------------------------------------------

    cdef int _abandon(self, Pending pending) except -1:
        """Nobody waits for ``pending`` any longer: its time is over, or the waiting thread was interrupted."""
        self.shared.enter()
        try:
            if pending.outcome != OUTCOME_WAITING:
                pass
            elif pending.deadline != NEVER and now_ns() >= pending.deadline:
                self._expire(pending)
            else:
                self._give_up(pending)
        finally:
            self._unlock()
        return 0

    cdef int _expire(self, Pending pending) except -1:
        """``pending``'s time is over."""
        self.pending.pop(pending.id, None)
        self.n_timeouts += 1
        self._finish(pending, OUTCOME_EXPIRED)
        if pending.items is not None:
            # The server knows of no deadline for this.
            self._tell(KIND_CANCEL, pending.id, b"")
        return 0

    def _cancel(self, Pending pending not None) -> bool:
        # Referred to until the lock is released: the callback's finalizer is user code.
        _callback = pending.callback
        self._check()
        self.shared.enter()
        try:
            if pending.outcome != OUTCOME_WAITING or self.pending.get(pending.id) is None:
                return False
            pending.callback = None
            self._give_up(pending)
            return True
        finally:
            self._unlock()

    def _notify(self, Pending pending not None, callback not None) -> bool:
        cdef bint attend = False
        # Referred to until the lock is released: its finalizer is user code.
        _previous = pending.callback
        self._check()
        self.shared.enter()
        try:
            if pending.outcome != OUTCOME_WAITING:
                return False
            pending.callback = callback
            if pending.items is not None:
                self._expect(pending)
            if not pending.hurried:
                pending.hurried = True
                self.n_hurried += 1
                attend = self.n_hurried == 1 and self.loop_thread == 0
        finally:
            self._unlock()
        if attend and self.attention is not None:
            self.attention(self)
        return True

    cdef int _give_up(self, Pending pending) except -1:
        """End ``pending``, which has been sent, without its reply, and tell the server that nobody waits for it."""
        del self.pending[pending.id]
        self.n_cancelled += 1
        self._finish(pending, OUTCOME_CANCELLED)
        return self._tell(KIND_CANCEL, pending.id, b"")

    cdef int _tell(self, int kind, uint64_t id, bytes body) except -1:
        """Tell the server something about request ``id``. The lock is held."""
        # Should the connection have gone meanwhile, whoever looks at it next notices.
        if self.state == STATE_OPEN:
            self._control(kind, id, body)
            self._keep_edge()
        return 0

    # -- streams -----------------------------------------------------------------------------------------

    cdef int _take_in(self, Envelope envelope) except -1:
        """An item has come. It is kept until it is asked for: their number is bounded by what was granted."""
        cdef uint64_t id = envelope.header.id
        cdef Pending pending = self.pending.get(id)
        if pending is None:
            self.n_late += 1
            if id != self.told_id:
                # Nobody waits for this stream: its call expired before its first item came.
                self.told_id = id
                self._control(KIND_CANCEL, id)
            return 0
        self.n_items += 1
        if pending.items is None:
            pending.items = deque()
        pending.items.append(envelope)
        if pending.outcome == OUTCOME_WAITING:
            self._finish(pending, OUTCOME_DONE)
        return 0

    def _take_item(self, Pending pending not None, int64_t deadline) -> Envelope | None:
        self._check()
        self.shared.enter()
        try:
            if pending.items:
                return pending.items.popleft()
            if pending.outcome == OUTCOME_WAITING:
                return None
            if pending.outcome == OUTCOME_DONE and pending.reply is None:
                pending.outcome = OUTCOME_WAITING
                pending.started = now_ns()
                pending.deadline = deadline
                return None
        finally:
            self._unlock()
        return pending.reply if pending.outcome == OUTCOME_DONE else self._result(pending)

    def _grant(self, Pending pending not None, uint32_t n_items) -> None:
        self._check()
        self.shared.enter()
        try:
            if pending.id in self.pending:
                self._tell(KIND_CREDIT, pending.id, int(n_items).to_bytes(4, "little"))
        finally:
            self._unlock()

    def _close_stream(self, Pending pending not None) -> None:
        # Referred to until the lock is released: the callback's finalizer is user code.
        _callback = pending.callback
        _items = pending.items
        if self.shared.generation != fork_generation():
            return
        self.shared.enter()
        try:
            if pending.items is not None:
                pending.items = deque()
            pending.callback = None
            if pending.id in self.pending:
                self.told_id = pending.id
                self._give_up(pending)
        finally:
            self._unlock()

    cdef Envelope _result(self, Pending pending):
        cdef double waited
        cdef Header header
        if pending.outcome == OUTCOME_DONE:
            if pending.items is not None:
                header.kind = KIND_ITEM
                header.flags = header.codec = 0
                header.id = pending.id
                header.ack = header.n_buffers = header.topic_bytes = header.method_bytes = 0
                header.metadata_bytes = header.body_bytes = 0
                header.remaining_ms = NO_DEADLINE
                return envelope_of_stream(pending, &header)
            return pending.reply
        if pending.outcome == OUTCOME_EXPIRED:
            waited = max(<int64_t>0, pending.deadline - pending.started) / 1e9
            raise errors.DeadlineExceeded(f"{self.endpoint} has not answered within {waited:.3g} s")
        if pending.outcome == OUTCOME_LOST:
            raise errors.PeerLost(
                f"{self.endpoint}: {self.lost_reason} before the reply came; the request may have been executed")
        if pending.outcome == OUTCOME_MALFORMED:
            raise errors.ProtocolError(
                f"{self.endpoint} has answered by what is no envelope, or over the limits of {self.max_bytes} bytes and"
                f" {self.max_buffers} buffers")
        if pending.outcome == OUTCOME_CLOSED:
            raise errors.Closed(f"channel to {self.endpoint} was closed before the reply came")
        raise errors.Closed(f"request {pending.id} to {self.endpoint} was cancelled")


cdef int _run_callbacks(list finished) except -1:
    cdef Pending pending
    for pending in finished:
        callback, pending.callback = pending.callback, None
        if callback is not None:
            try:
                callback(pending)
            except BaseException as exc:
                # Not ours to handle, and nobody to raise it to. The interpreter's own hook takes no lookalike of its
                # argument, so the interpreter has to make it.
                PyErr_SetObject(type(exc), exc)
                PyErr_WriteUnraisable(callback)
    return 0
