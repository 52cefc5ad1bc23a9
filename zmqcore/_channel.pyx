# cython: language_level=3, embedsignature=True, auto_pickle=False, freethreading_compatible=True
"""One DEALER socket to one endpoint, shared by any number of threads.

There is no reactor thread: the callers drive the socket themselves, see ``_led_socket.pyx``.

A channel lives as long as one connection. When the connection breaks (libzmq takes the pipe away, POLLOUT clears and
the fd wakes: no monitor is needed) everything outstanding fails with PeerLost and the channel is *lost*; its owner
closes it, and the pool makes a fresh one. Should libzmq reconnect before anybody has looked, the port's hello tells:
it names the first message it has seen, and everything before that was lost.

What the channel takes, if that is not what is assumed, it says by a hello of its own: first on each connection, so that
the port has it before any request. The port answers that by its hello as it does any first message. On a connection
that was made again unnoticed it comes late, behind the port's hello; until then the port keeps to what is assumed, and
libzmq takes that.

A port that is to close says goodbye. The channel sends nothing new then, and once it has all its replies it answers:
only then may the port close, because libzmq drops what has not been read when a connection breaks.

Messages that follow one another closely leave together, see ``_outbox.pyx``.

The port acknowledges what it has taken, cumulatively. At most ``window_messages`` and ``window_bytes`` are
unacknowledged, see ``_window.pyx``; beyond that a sender waits until its deadline. SNDHWM is unbounded, so that POLLOUT
is false only when there is no connection.

What is sent *accepted* is retained until the port says that it is finished, see ``_retention.pyx``. If the channel is
lost before that, ``undelivered`` gets what is left, to be sent again elsewhere by send_again().
"""

from collections import deque

import zmq

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.pythread cimport PyThread_get_thread_ident
from libc.errno cimport EAGAIN
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint32_t, uint64_t

from zmqcore._frame cimport (
    ASSUMED_BUFFERS, ASSUMED_BYTES, ENVELOPE_ROOM, FLAG_FLOW, FLAG_IDENTIFIED, HEADER_BYTES, IDENTITY_BYTES, KIND_ACK,
    KIND_CALL, KIND_CANCEL, KIND_CAST, KIND_ERROR, KIND_GOODBYE, KIND_HELLO, KIND_ITEM, KIND_PING, KIND_PONG,
    KIND_REPLY, NO_DEADLINE, Envelope, Header, Parcel, bytes_of, envelope_share, envelope_take, excess_of,
    header_begin, hello_pack, hello_read, is_over, parcel_close, parcel_copy, parcel_hurry, parcel_pack,
    parcel_pack_control, parcel_send, parcel_set_id, parcel_set_remaining, parse_header, parse_part, part_take,
    release_sent_buffers,
)
from zmqcore._led_socket cimport SILENCE
from zmqcore._libzmq cimport (
    ZMQ_IMMEDIATE, ZMQ_LINGER, ZMQ_RCVHWM, ZMQ_RECONNECT_IVL, ZMQ_RECONNECT_IVL_MAX, ZMQ_SNDHWM, libzmq, raise_errno,
    zc_msg_t,
)
from zmqcore._outbox cimport MOST_HELD_BYTES, Outbox
from zmqcore._pending cimport (
    OUTCOME_CLOSED, OUTCOME_DONE, OUTCOME_LATE, OUTCOME_LOST, OUTCOME_MALFORMED, OUTCOME_TOO_LARGE, OUTCOME_WAITING,
    Pending, Requester,
)
from zmqcore._retention cimport Lane, Retained, Retention
from zmqcore._socket cimport (
    NEVER, SharedSocket, SpinScore, Waiter, Wakes, coarse_now_ns, deadline_after, deadline_from, fork_generation,
    handle_of, is_ipv6, limit_silence, now_ns, set_option, waiter_borrow, waiter_return, wakes_move, wakes_pay,
    wakes_settle,
)
from zmqcore._window cimport Window

from zmqcore import errors
from zmqcore._frame import KINDS

__all__ = ["Channel"]

# From so many unacknowledged messages on, further ones are held for a moment to leave together.
cdef uint64_t HOLD_FROM = 8
# A sender that nobody makes wait looks this often, in ns, whether something has come.
cdef int64_t LOOK_INTERVAL = 10_000_000

# While something is retained, somebody looks at least this often, in s, whether it is finished or the channel lost.
cdef double TEND_INTERVAL = 0.05
cdef bytes NO_IDENTITY = bytes(IDENTITY_BYTES)

# All channels of the process.
cdef SpinScore _spin_shared = SpinScore()

_STATE_NAMES = ("connecting", "open", "lost", "closed")


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
cdef class Turn:
    """A thread's place among those who wait for a connection or for room."""


@cython.final
cdef class Channel(Requester):
    """Connect to ``endpoint`` with a DEALER socket of ``context``, without waiting for the connection.

    ``window_messages`` and ``window_bytes`` bound what is sent and not yet acknowledged, ``max_bytes`` of body and
    buffers and ``max_buffers`` one message in either direction. ``liveness`` is after how many seconds a peer that
    is stopped or cut off is lost; one that is merely busy is not. ``spin`` is how long, in seconds, a wait polls
    without blocking first. ``configure(socket)`` is called before connecting, e.g. to set keys.
    ``attention(channel)`` is called, outside any lock, when a submitted request may end while nobody waits for it: who
    is responsible then calls attend() until it returns None, at once whenever ``fd`` is readable unless the channel is
    ``unhurried``.
    ``undelivered(messages)`` is called, outside any lock, with the Retained that the channel has given up, in
    order; without it they are dropped. ``address`` is what libzmq connects to if not to ``endpoint``, which remains the
    channel's name: libzmq looks a host name up on its I/O thread, and all its other connections wait meanwhile.

    Thread-safe. After a fork the child cannot use it (Closed). Costs two file descriptors.
    """

    def __cinit__(self, *args, **options):
        if not args and not options:
            raise TypeError("Channel takes a context and an endpoint")

    def __init__(
        self, context: zmq.Context, endpoint: str, *, window_messages: int = 4096, window_bytes: int = 1 << 26,
        max_bytes: int = 1 << 28, max_buffers: int = 1024, liveness: float = 5.0, spin: float = 100e-6, configure=None,
        attention=None, undelivered=None, address: str | None = None,
    ):
        cdef void *handle
        self.window = Window(window_messages, window_bytes)
        socket = context.socket(zmq.DEALER)
        try:
            handle = handle_of(socket)
            set_option(handle, ZMQ_IMMEDIATE, 1)
            set_option(handle, ZMQ_SNDHWM, 0)
            set_option(handle, ZMQ_RCVHWM, 0)       # replies are bounded by the window
            set_option(handle, ZMQ_LINGER, 0)
            set_option(handle, ZMQ_RECONNECT_IVL, 20)
            set_option(handle, ZMQ_RECONNECT_IVL_MAX, 1000)
            socket.setsockopt(zmq.MAXMSGSIZE, max(max_bytes, ASSUMED_BYTES) + ENVELOPE_ROOM)
            limit_silence(handle, liveness, True)
            if configure is not None:
                configure(socket)
            address = endpoint if address is None else address
            socket.setsockopt(zmq.IPV6, is_ipv6(address))
            socket.connect(address)
            self.shared = SharedSocket(socket, spin, _spin_shared)
            self.outbox = Outbox(self.shared)
        except BaseException:
            socket.close(linger=0)
            raise
        self.endpoint = endpoint
        self.created_ns = self.quiet_since = now_ns()
        self.max_bytes = max_bytes
        self.max_buffers = max_buffers
        if (max_bytes, max_buffers) != (ASSUMED_BYTES, ASSUMED_BUFFERS):
            self.hello = hello_pack(bytes(16), max_bytes, max_buffers)
        self.attention = attention
        self.retention = Retention(window_messages, window_bytes, undelivered)
        self.senders = deque()
        self.acceptors = deque()
        self.flushers = {}

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
                self.await_reply(pending, deadline)
            except BaseException:
                if pending.items is not None:
                    pending.close()     # nobody will have it
                raise
            finally:
                if pending.outcome == OUTCOME_WAITING:
                    self.abandon(pending)
        return self.result(pending)

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

    cdef Pending try_submit(
        self, bytes topic, str method, body, list buffers, bytes metadata, int codec, timeout, callback, bint hurry,
    ):
        """submit(), but return None, and do nothing, if it would have to wait, or the channel is to close.

        So it needs no acquired channel of a pool.
        """
        cdef int64_t started = now_ns()
        return self._start(
            KIND_CALL, topic, method, body, buffers, metadata, codec, started, deadline_from(started, timeout),
            callback, TO_CALLBACK if callback is not None and hurry else TO_WHOEVER_LOOKS, True, False, None, True)

    cpdef Pending submit_nowait(
        self, bytes topic, str method, body, list buffers, bytes metadata, int codec, timeout, callback,
    ):
        """submit(), but where that would wait for a connection or for room, raise Unreachable or Overloaded.

        Without a ``callback`` the caller waits for it next, and at its deadline nobody else ends it.
        """
        cdef int64_t started = now_ns()
        return self._start(
            KIND_CALL, topic, method, body, buffers, metadata, codec, started, deadline_from(started, timeout),
            callback, TO_CALLBACK if callback is not None else TO_WAITER, True, False)

    cpdef uint64_t send(
        self, str kind, bytes topic, str method, body, list buffers, bytes metadata, int codec, timeout,
        bint expires=False,
    ) except 0:
        """Send a one-way message of ``kind`` ("cast" or "fanout") and return its id once it is on its way.

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
        cdef Retained retained
        cdef Parcel parcel
        cdef uint64_t id = 0
        # A hint, read without the lock: what is packed in vain costs more than to look twice.
        if self.state != STATE_OPEN or self.window.n_messages() >= self.window.max_messages or self.instance is None:
            return 0
        retained = self._pack(
            &parcel, KIND_CAST if kind == "cast" else KINDS[kind], topic, method, body, buffers, metadata, codec, lane)
        self.shared.enter()
        try:
            if self._can_send_now(parcel.n_bytes):
                self._look_sometimes(coarse_now_ns())
                if self.state == STATE_OPEN and not self.goodbye \
                        and (lane is None or self._may_accept(lane, parcel.n_bytes)):
                    try:
                        self._transmit(&parcel, retained, lane)
                    except errors.PeerLost:
                        return 0        # nothing has left: there may be another one
                    id = self.window.sent_id
                    self.n_casts += 1
                    self._after_sending()
        finally:
            self.unlock()
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
        cdef Header header
        cdef Pending pending = Pending.__new__(Pending)
        if retained is None or lane is None or retained.lane is None:
            raise TypeError("there is nothing to send, or no lane to send it on")
        pending.channel = self
        pending.started = started
        pending.deadline = deadline
        self.check()
        if self.instance is None and retained.parcel.n_bytes > UNANNOUNCED_BYTES:
            self.ping(timeout)
        parse_header(retained.parcel.header, libzmq.msg_size(&retained.parcel.head), &header)
        if is_over(&header, retained.parcel.n_bytes, self.max_bytes) or header.n_buffers > self.max_buffers:
            raise errors.PayloadTooLarge(
                f"{self.endpoint}: {excess_of(&header, retained.parcel.n_bytes, self.max_bytes, self.max_buffers)}")
        parcel_copy(&parcel, &retained.parcel)
        self.shared.enter()
        try:
            self._send(&parcel, pending, deadline, False, False, True, retained, lane)
            self.n_casts += 1
            self.n_sent_again += 1
        finally:
            self._let_next_go()
            self.unlock()
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
                self.await_reply(pending, deadline)
            finally:
                if pending.outcome == OUTCOME_WAITING:
                    self.abandon(pending)
        self.result(pending)
        return (now_ns() - started) / 1e9

    def wait_open(self, timeout: float | None = None) -> bool:
        """Wait until the connection is there. Return False if it is not within ``timeout`` seconds, or is lost."""
        cdef Turn turn
        cdef int64_t deadline = deadline_after(timeout)
        self.check()
        if self.state == STATE_OPEN:
            return True
        self.shared.enter()
        try:
            if self.state == STATE_CONNECTING:
                turn = self._queue_up(self.senders, 0, False)
                try:
                    self.lead_or_follow(turn.waiter, deadline)
                finally:
                    self._leave_queue(self.senders, turn)
        finally:
            self.unlock()
        return self.state == STATE_OPEN

    def attend(self) -> float | None:
        """Take what has come, call callbacks, expire what is overdue; never block. May then be waited for on ``fd``.

        Returns after how many seconds to call it again at the latest, or None when no submitted request
        is outstanding any more: then nobody needs to attend until ``attention`` is called again.
        """
        cdef int64_t now, earliest
        self.check()
        self.shared.enter()
        try:
            self.hear_nothing()
            self.drain()
            now = now_ns()
            if self.expire_overdue(now, &earliest):
                return min((earliest - now) / 1e9, self._tend_after(SILENCE / 1e9))
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
            self.unlock()

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
        self.check()
        self.shared.enter()
        try:
            if self.loop_thread == 0:
                self.loop_thread = PyThread_get_thread_ident()
                self.attended = True
            return self.loop_thread == PyThread_get_thread_ident()
        finally:
            self.unlock()

    def disown(self) -> None:
        """The loop that adopted the channel is done with it; what is still outstanding goes to ``attention``."""
        cdef bint orphaned
        self.check()
        self.shared.enter()
        try:
            self.loop_thread = 0
            orphaned = self.expiring.n > 0 or self.on_clean is not None
            self.attended = orphaned
        finally:
            self.unlock()
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
            self.drain()
            self.on_clean = on_clean
            self.drain_deadline = deadline_after(timeout)
            if self.state <= STATE_OPEN and not self.is_clean():
                attend = not self.attended
                self.attended = True
        finally:
            self.unlock()
        if attend and self.attention is not None:
            self.attention(self)

    def keep(self) -> None:
        """Undo retire(), if its callback has not been called yet: the channel is used again as before."""
        self.shared.enter()
        try:
            self.on_clean = None
            self.retired = False
        finally:
            self.unlock()

    def look(self) -> None:
        """Take what has come and notice what has become of the connection; never block."""
        self.check()
        self.shared.enter()
        try:
            self.drain()
        finally:
            self.unlock()

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
                self.retention.give_up(self.window.sent_id + 1)
                self.state = STATE_CLOSED
                self._end_all(OUTCOME_CLOSED)
        finally:
            self.unlock()

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
        return self.window.acked_id == self.window.sent_id and self.retention.n_messages == 0 and not self.pending \
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
        """The most that is sent in one message, as (bytes of body and buffers, buffers): ours or, after its hello, the
        port's if less."""
        return (self.max_bytes, self.max_buffers)

    def stats(self) -> dict[str, int]:
        """Return the counters since the channel was made, and what is outstanding now."""
        return {
            "calls": self.n_calls, "casts": self.n_casts, "replies": self.n_replies, "items": self.n_items,
            "late_replies": self.n_late,
            "garbage": self.n_garbage, "timeouts": self.n_timeouts, "cancelled": self.n_cancelled,
            "lost": self.n_lost, "window_waits": self.n_window_waits, "sent_bytes": self.window.sent_bytes,
            "received_bytes": self.n_received_bytes, "outstanding_calls": len(self.pending),
            "window_messages": self.window.n_messages(), "window_bytes": self.window.n_bytes(),
            "accepted": self.retention.n_accepted, "sent_again": self.n_sent_again,
            "finished": self.retention.n_finished,
            "retained": self.retention.n_messages,
            "retained_bytes": self.retention.n_bytes, "retain_waits": self.n_retain_waits,
            "undelivered": self.retention.n_undelivered,
            "batches": self.outbox.n_batches, "batched": self.outbox.n_batched,
        }

    def __repr__(self) -> str:
        return (f"<Channel {self.endpoint} {_STATE_NAMES[self.state]}, {len(self.pending)} calls and"
                f" {self.window.n_messages()} messages outstanding>")

    # -- sending -----------------------------------------------------------------------------------------

    cdef int check(self) except -1:
        if self.shared.generation != fork_generation():
            raise errors.Closed(f"channel to {self.endpoint} was made before a fork and is the parent's")
        return 0

    cdef Pending _start(
        self, int kind, bytes topic, str method, body, list buffers, bytes metadata, int codec, int64_t started,
        int64_t deadline, object callback, int reply, bint carries_deadline=True, bint wait=True,
        Lane lane=None, bint now_or_none=False,
    ):
        """Pack and send a message; return its Pending, which is registered if a reply is expected.

        None, with ``now_or_none``, if it cannot be sent at once, or by this channel.
        """
        cdef Parcel parcel
        cdef bint attend = False
        cdef Retained retained
        cdef Pending pending = Pending.__new__(Pending)
        pending.channel = self
        pending.callback = callback
        pending.started = started
        pending.deadline = deadline
        self.check()
        if now_or_none and self.instance is None:
            return None
        if self.instance is None and wait and body is not None and len(body) + bytes_of(buffers) > UNANNOUNCED_BYTES:
            # The port may take less than we do, and libzmq would break the connection: first hear what it takes.
            self.look()
            if self.instance is None:
                self.ping(None if deadline == NEVER else max(0.0, (deadline - now_ns()) / 1e9))
        retained = self._pack(&parcel, kind, topic, method, body, buffers, metadata, codec, lane)
        if reply == TO_WAITER:
            parcel_hurry(&parcel)
        self.shared.enter()
        try:
            if now_or_none and not self._can_send_now(parcel.n_bytes):
                return None
            self._send(&parcel, pending, deadline, carries_deadline, reply != TO_NOBODY, wait, retained, lane)
            if reply != TO_NOBODY:
                self.n_calls += 1
            else:
                self.n_casts += 1
            if reply >= TO_WHOEVER_LOOKS:
                if reply == TO_CALLBACK:
                    pending.hurried = True
                    self.n_hurried += 1
                self.expect(pending)
                # Who attends sleeps until the deadline that was the first one.
                attend = not self.attended or self.expiring.heap[0].id == pending.id or (
                    reply == TO_CALLBACK and self.n_hurried == 1)
        finally:
            if retained is not None:
                self._let_next_go()
            self.unlock()
            parcel_close(&parcel)
        if attend and pending.outcome == OUTCOME_WAITING and self.loop_thread != PyThread_get_thread_ident():
            self.attended = True
            if self.attention is not None:
                self.attention(self)
        if retained is not None:
            self._have_tended()
        return pending

    cdef Retained _pack(
        self, Parcel *parcel, int kind, bytes topic, str method, body, list buffers, bytes metadata, int codec,
        Lane lane,
    ):
        """Pack a message, which gets its id and what else is not known yet later; return what will retain it.

        That is None without ``lane``; else there is room for its identity.
        """
        cdef Header header
        cdef Retained retained = None
        if topic is None or method is None or metadata is None:
            raise TypeError("topic and metadata are bytes and method is str, not None")
        header_begin(&header, kind, FLAG_FLOW, 0)
        header.codec = codec
        if lane is not None:
            header.flags |= FLAG_IDENTIFIED
            metadata = NO_IDENTITY + metadata if metadata else NO_IDENTITY
            retained = Retained.__new__(Retained)
        parcel_pack(parcel, &header, topic, method, metadata, body, buffers, self.max_bytes, self.max_buffers)
        return retained

    cdef int _send(
        self, Parcel *parcel, Pending pending, int64_t deadline, bint carries_deadline, bint expects_reply,
        bint wait, Retained retained, Lane lane,
    ) except -1:
        """Send ``parcel`` under the next id when there is a connection and room; without ``wait``, at once or not.

        The lock is held throughout, but for the time spent waiting.
        """
        if retained is not None and not retained.packed:
            lane.check()        # now, not when its turn has come: others would stand behind it
        if retained is not None and (self.acceptors or not self.retention.has_room(parcel.n_bytes)):
            self.n_retain_waits += 1
            self._wait_in_turn(self.acceptors, parcel.n_bytes, pending.started, deadline if wait else 0, True)
        if self.senders or self.state != STATE_OPEN or not self.window.has_room(parcel.n_bytes):
            if self.state == STATE_OPEN:
                self.n_window_waits += 1
            self._wait_in_turn(self.senders, parcel.n_bytes, pending.started, deadline if wait else 0, False)
        else:
            self._look_sometimes(pending.started)
        if self.state != STATE_OPEN or self.goodbye:
            self._raise_gone()
        if carries_deadline:
            parcel_set_remaining(parcel, remaining_ms(deadline))
        self._transmit(parcel, retained, lane)
        pending.id = self.window.sent_id
        if expects_reply:
            self.pending[pending.id] = pending
        return self._after_sending()

    cdef int _look_sometimes(self, int64_t now) except -1:
        """Acknowledgements and a goodbye must be taken now and then even if nobody ever waits."""
        if self.window.n_messages() & 127 == 127 or now - self.last_drain > LOOK_INTERVAL:
            self.drain()
        return 0

    cdef int _transmit(self, Parcel *parcel, Retained retained, Lane lane) except -1:
        """Hand ``parcel`` to libzmq under the next id. The connection is there, and room; the lock is held."""
        cdef size_t size = parcel.n_bytes
        cdef int code
        parcel_set_id(parcel, self.window.sent_id + 1)
        if retained is not None and not retained.packed:
            self.retention.begin(retained, lane, parcel)
        code = self._hold(parcel) if self._may_hold(parcel) else self._send_at_once(parcel)
        if code != 0:
            if code != EAGAIN:
                raise_errno(code, f"cannot send to {self.endpoint}")
            # SNDHWM is unbounded: EAGAIN means that the connection has gone.
            self._lose("the connection broke")
            self._raise_gone()
        self.window.send(size)
        if retained is not None:
            self.retention.add(retained, lane, self.window.sent_id)
            lane.channel = self
        return 0

    cdef bint _may_hold(self, Parcel *parcel) noexcept:
        """Whether ``parcel`` can wait a moment for others that leave with it.

        Not where somebody polls the descriptor who would not notice that its edge was swallowed later.
        """
        return self.window.n_messages() >= HOLD_FROM and parcel.n_parts == 0 and not parcel.prompt \
            and parcel.n_bytes <= MOST_HELD_BYTES and not (self.attended and self._is_polled_by_another())

    cdef int _hold(self, Parcel *parcel) except -1:
        """Have ``parcel`` sent with others, soon. Return 0, or libzmq's errno if these could not be sent."""
        cdef int code = 0
        if not self.outbox.takes(parcel.n_bytes):
            code = self.outbox.flush()
        if code == 0:
            self.outbox.add(parcel.header, parcel.n_bytes)
        return code

    cdef int _send_at_once(self, Parcel *parcel) noexcept:
        """Send what is held, and ``parcel``. Return 0, or libzmq's errno."""
        cdef int code = self.outbox.flush()
        return parcel_send(parcel, self.shared.handle) if code == 0 else code

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
                self.drain()
        return 0

    cdef bint _is_done_waiting(self) noexcept:
        """Whether nothing is awaited any more and the leader is about to leave: to ask for more costs a system call."""
        return self.inside == 1 and self.leader is not None and self.leader.over and not self.pending \
            and not self.attended

    cdef bint _is_polled_by_another(self) noexcept:
        """Whether the event loop of another thread, or whoever is responsible by ``attention``, may poll the fd."""
        if self.loop_thread != 0:
            return self.loop_thread != PyThread_get_thread_ident()
        return self.n_hurried > 0 or self.on_clean is not None

    cdef bint _can_send_now(self, size_t size):
        return self.state == STATE_OPEN and not (self.goodbye or self.retired or self.senders) \
            and self.window.has_room(size)

    cdef int _acked(self, uint64_t ack) except -1:
        """The port has taken everything up to ``ack``."""
        if ack > self.window.acked_id:
            if ack > self.window.sent_id:
                self.n_garbage += 1         # acknowledges what was never sent
                return 0
            self.window.acknowledge(ack)
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
        cdef Turn first
        if queue and self.state != STATE_CONNECTING:
            first = queue[0]
            if not first.waiter.over and (self.state != STATE_OPEN or self._fits(first)):
                self.end_wait(first.waiter)
        return 0

    cdef bint _fits(self, Turn turn) noexcept:
        return self.retention.has_room(turn.size) if turn.retains else self.window.has_room(turn.size)

    cdef int _wait_in_turn(
        self, object queue, size_t size, int64_t started, int64_t deadline, bint retains,
    ) except -1:
        """Wait until there is a connection and room for ``size`` bytes, and all who came before have left ``queue``.

        The room is in the window, with ``retains`` in what is retained. The lock is held on entry and on return, and
        not released between the last look and the return. Raises as send() does.
        """
        cdef Turn turn = self._queue_up(queue, size, retains)
        try:
            while True:
                self.drain()
                if self.state > STATE_OPEN or self.goodbye:
                    self._raise_gone()
                if self.state == STATE_OPEN and queue[0] is turn and self._fits(turn):
                    queue.popleft()             # who is the first now is told when this one has sent
                    return 0
                if deadline != NEVER and now_ns() >= deadline:
                    self._raise_no_room(started, retains)
                turn.waiter.over = False
                self.lead_or_follow(turn.waiter, deadline)
        finally:
            self._leave_queue(queue, turn)

    cdef Turn _queue_up(self, object queue, size_t size, bint retains):
        cdef Turn turn = Turn.__new__(Turn)
        turn.waiter = waiter_borrow()
        turn.size = size
        turn.retains = retains
        queue.append(turn)
        return turn

    cdef int _leave_queue(self, object queue, Turn turn) except -1:
        """If ``turn`` stands in the queue, take it out and tell who is the first then."""
        if turn in queue:
            queue.remove(turn)
            self._wake_first(queue)
        waiter_return(turn.waiter)
        return 0

    cdef int _end_turns(self) except -1:
        """Nobody can send any more: let all who wait for that see it."""
        cdef Turn turn
        for queue in (self.senders, self.acceptors):
            while queue:
                turn = queue.popleft()
                self.end_wait(turn.waiter)
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
            f"{self.endpoint} has taken nothing for too long: {self.window.n_messages()} messages and"
            f" {self.window.n_bytes()} bytes are unacknowledged (limits {self.window.max_messages} and"
            f" {self.window.max_bytes}); gave up after {waited:.3g} s; this message had not been sent")

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
        if id > self.window.sent_id:
            self.n_garbage += 1             # what was never sent
            return 0
        self.retention.finish(id)
        if self.acceptors:
            self._wake_first(self.acceptors)
        if self.flushers:
            self._wake_flushers()
        return 0

    cdef int _wake_flushers(self) except -1:
        cdef Waiter waiter
        cdef Lane lane
        for waiter, lane in self.flushers.items():
            if self.state > STATE_OPEN or lane.is_finished():
                self.end_wait(waiter)
        return 0

    def await_finished(self, Lane lane not None, timeout: float) -> bool:
        """Drive the channel until all of ``lane`` is finished, the channel is lost, or ``timeout`` seconds.

        Return whether it could be driven: False, at once, if it is lost or closed already, or the parent's.
        """
        cdef Waiter waiter
        cdef int64_t deadline = deadline_after(timeout)
        if self.state > STATE_OPEN or self.shared.generation != fork_generation():
            return False
        self.shared.enter()
        try:
            self.drain()
            if self.state <= STATE_OPEN and not lane.is_finished():
                waiter = waiter_borrow()
                self.flushers[waiter] = lane
                try:
                    self.lead_or_follow(waiter, deadline)
                finally:
                    del self.flushers[waiter]
                    waiter_return(waiter)
        finally:
            self.unlock()
        return True

    cdef int unlock(self) except -1:
        # What must not happen under the lock: callbacks, and closing the socket.
        cdef bint close_now = self.state == STATE_CLOSED and self.inside == 0 and self.shared.handle != NULL
        cdef list due = self.due
        cdef list left_over = self.retention.left_over
        cdef Wakes owed
        on_clean = done = None
        if due:
            self.due = []
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
            wakes_settle(&owed)
        release_sent_buffers()
        if left_over:
            self.retention.hand_over(left_over)
        if close_now:
            self.outbox.close()
            self.shared.close_socket()
        if due:
            self.call_back(due)
        if on_clean is not None:
            on_clean(self)
        return 0

    # -- receiving ---------------------------------------------------------------------------------------

    cdef int drain(self) except -1:
        """Take everything that has come and notice what has become of the connection. The lock is held."""
        cdef zc_msg_t message
        if self.state > STATE_OPEN:
            return 0
        self.last_drain = coarse_now_ns()
        self.outbox.flush()
        libzmq.msg_init(&message)
        try:
            while self.shared.receive(&message) != EAGAIN:
                self._take(&message)
                if self._is_done_waiting():
                    self.shared.leave_rest()
                    break
        finally:
            libzmq.msg_close(&message)
        if self.shared.writable and self.outbox.failed == 0:
            if self.state == STATE_CONNECTING:
                self._open()
        elif self.state == STATE_OPEN:
            self._lose("the connection broke")
        if self.goodbye and not self.parted and self.state == STATE_OPEN and self.is_clean():
            self._part()
        return 0

    cdef int _open(self) except -1:
        """The connection is there. What we take goes first."""
        self.state = STATE_OPEN
        if self.hello is None or self._say_hello():
            return self._wake_sender()
        return self._lose("the connection broke")

    cdef bint _say_hello(self) except -1:
        """Tell the port what we take; return whether libzmq has it.

        It is numbered like the next message, but does not count: a port that has seen nothing else on its connection
        says so by answering to that number.
        """
        self.hello_id = self.window.sent_id + 1
        return self._control(KIND_HELLO, self.hello_id, self.hello)

    cdef int _take(self, zc_msg_t *message) except -1:
        """Take one message, whose first part is ``message``: one envelope, or several."""
        cdef Header header
        cdef Envelope envelope
        cdef size_t n_bytes = libzmq.msg_size(message), at = 0
        cdef const unsigned char *data = <const unsigned char *>libzmq.msg_data(message)
        cdef const char *problem = parse_part(data, n_bytes, &header)
        cdef bint more = libzmq.msg_more(message)
        self.n_received_bytes += n_bytes
        self.quiet_since = coarse_now_ns()
        if problem != NULL or more != (header.n_buffers != 0):
            while more:
                self.shared.receive_rest(message)
                more = libzmq.msg_more(message)
            if problem == NULL:
                return self._refuse(&header, OUTCOME_MALFORMED, "it has other buffers than it announces")
            self.n_garbage += 1
            return 0
        if header.n_bytes < n_bytes:
            while at < n_bytes:
                parse_header(data + at, n_bytes - at, &header)
                self._take_envelope(envelope_share(message, at, &header))
                at += header.n_bytes
            return 0
        envelope = envelope_take(message, &header)
        if more:
            if self._take_buffers(envelope, message) != header.n_buffers:
                return self._refuse(&header, OUTCOME_MALFORMED, "it has other buffers than it announces")
            if len(envelope.buffers) != header.n_buffers:
                return self._refuse_for_size(envelope)
        return self._take_envelope(envelope)

    cdef int _take_envelope(self, Envelope envelope) except -1:
        """Give an envelope that has come to whom it belongs."""
        cdef Header *header = &envelope.header
        cdef Pending pending
        if envelope.n_bytes > self.max_bytes and is_over(header, envelope.n_bytes, self.max_bytes) \
                and (header.kind == KIND_REPLY or header.kind == KIND_ERROR or header.kind == KIND_ITEM):
            return self._refuse_for_size(envelope)
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
                    self.finish(pending, OUTCOME_DONE)
        elif header.kind == KIND_ITEM:
            if not self.take_item(envelope):
                self._control(KIND_CANCEL, header.id)
        elif header.kind == KIND_HELLO:
            self._hello(envelope)
        elif header.kind == KIND_GOODBYE:
            self.goodbye = True
            self.parted = False
            self.retention.bar(self.window.acked_id)
            self._end_turns()       # they go elsewhere
            if header.id:
                self._end_late()
        elif header.kind == KIND_ACK:
            if header.id:
                self._finished_to(header.id)
        else:
            self.n_garbage += 1
        return 0

    cdef int _end_late(self) except -1:
        """The port has stopped, and has not taken what was sent after what it has acknowledged."""
        cdef Pending pending
        for number in [number for number in self.pending if number > self.window.acked_id]:
            pending = self.pending.pop(number)
            self.finish(pending, OUTCOME_LATE)
        return 0

    cdef int _refuse(self, const Header *header, int outcome, str problem) except -1:
        """Something has come that cannot be taken. It says for which request, which ends here."""
        cdef Pending pending = self.pending.pop(header.id, None)
        self.n_garbage += 1
        if pending is not None:
            pending.problem = problem
            self.finish(pending, outcome)
            if header.kind == KIND_ITEM:
                self.told_id = header.id
                self._control(KIND_CANCEL, header.id)   # or it would wait for credit
        return 0

    cdef int _refuse_for_size(self, Envelope envelope) except -1:
        self._acked(envelope.header.ack)
        return self._refuse(&envelope.header, OUTCOME_TOO_LARGE, excess_of(
            &envelope.header, envelope.n_bytes, self.max_bytes, self.max_buffers))

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
                    and not is_over(&envelope.header, envelope.n_bytes, self.max_bytes):
                buffers.append(part_take(message))
        envelope.buffers = buffers
        return n_parts

    cdef int _hello(self, Envelope envelope) except -1:
        """The port has seen this connection's first message, number ``envelope.id``: earlier ones it never got."""
        cdef uint64_t first = envelope.header.id
        cdef size_t max_bytes
        cdef Py_ssize_t max_buffers
        cdef Pending pending
        if envelope.header.body_bytes < 16 or first == 0 \
                or (first > self.window.sent_id and first != self.hello_id):
            self.n_garbage += 1
            return 0
        # Even what was taken: the port counts what is finished for each connection anew.
        self.retention.give_up(first)
        self._wake_first(self.acceptors)
        self.instance = bytes(envelope.body[:16])
        if hello_read(envelope, &max_bytes, &max_buffers):
            self.max_bytes = min(self.max_bytes, max_bytes)
            self.max_buffers = min(self.max_buffers, max_buffers)
        if first - 1 > self.window.acked_id:
            self.n_lost += first - 1 - self.window.acked_id
            for number in [number for number in self.pending if number < first]:
                pending = self.pending.pop(number)
                self.finish(pending, OUTCOME_LOST)
            self.lost_reason = "the connection broke and was made again"
            self._acked(first - 1)
        if self.hello is not None and first != self.hello_id:
            self._say_hello()       # it knows nothing of the one before
        return 0

    cdef int hear_nothing(self) except -1:
        """Requests are outstanding, and nothing has come for long: see that libzmq has not reconnected unnoticed.

        If it has, this is the new connection's first message, and the port's hello tells that the requests are lost.
        A port that is merely busy answers when it can; that it has not is no sign of anything.
        """
        cdef Parcel parcel
        cdef Header header
        cdef int64_t now
        if self.state != STATE_OPEN or not self.pending:
            return 0
        now = now_ns()      # not the coarse clock: who has waited for SILENCE would come ms too early, and 2 s too late
        if now - self.quiet_since < SILENCE:
            return 0
        self.quiet_since = now      # one such ping for each silence, however often somebody looks
        header_begin(&header, KIND_PING, FLAG_FLOW, self.window.sent_id + 1)
        parcel_pack_control(&parcel, &header, NULL)
        if self.window.has_room(parcel.n_bytes) and self._send_at_once(&parcel) == 0:
            self.window.send(HEADER_BYTES)
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
        header_begin(&header, kind, FLAG_FLOW, id)
        header.body_bytes = PyBytes_GET_SIZE(body)
        parcel_pack_control(&parcel, &header, PyBytes_AS_STRING(body))
        sent = self._send_at_once(&parcel) == 0
        parcel_close(&parcel)
        return sent

    cdef int _lose(self, str reason) except -1:
        """The connection has gone: everything outstanding has failed."""
        # First: once another channel can take its place, what was sent here bars the way.
        self.retention.give_up(self.window.sent_id + 1)
        self.state = STATE_LOST
        self.lost_reason = reason
        self.n_lost += self.window.n_messages()
        return self._end_all(OUTCOME_LOST)

    cdef int _end_all(self, int outcome) except -1:
        self.finish_all(outcome)
        self._end_turns()
        self._wake_flushers()
        self.window.empty()
        return 0

    cdef int tell(self, int kind, uint64_t id, bytes body=b"") except -1:
        # Should the connection have gone meanwhile, whoever looks at it next notices.
        if self.state == STATE_OPEN:
            self._control(kind, id, body)
            self._keep_edge()
        return 0
