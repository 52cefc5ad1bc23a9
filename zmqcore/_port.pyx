# cython: language_level=3, embedsignature=True, auto_pickle=False, freethreading_compatible=True
"""One bound ROUTER socket: one thread receives, in batches; any thread replies.

A reply does not wake the receiving thread: the replying thread sends by itself, under the socket's lock, and wakes
the receiver only if sending has swallowed the edge of a message that came meanwhile.

The port acknowledges what it has taken, cumulatively for each peer that counts on it (flag FLOW): with every reply, at
the latest after ACK_MESSAGES messages or ACK_BYTES bytes (unless that is a single call), for one-way messages also
before it goes to sleep, and for calls that take long after ACK_CALLS_AFTER. The first message on a new connection is
answered by a hello that names that message and this port's instance.

A server that can begin nothing more goes on receiving all the same, with a limit of 0: cancels are obeyed at once then,
and requests are set aside. Those are not acknowledged before they are handed over, so their senders' windows fill.

A message that carries an identity (flag IDENTIFIED) may come twice, on another connection too: its sender keeps it
until it is known to be *finished*, whatever becomes of the connection meanwhile. The port remembers the identities of
the last WINDOW_MESSAGES of each sender and hands a duplicate to nobody. Whoever receives such a request calls its
finish(); with every ack goes the highest id up to which all of them are finished.

Bytes that are not an envelope are counted and dropped.
"""

import os
from collections import deque

import zmq

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.pythread cimport PyThread_get_thread_ident
from libc.errno cimport EAGAIN, EHOSTUNREACH, EINTR
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memcmp, memcpy

from zmqcore._duplicates cimport Sender, Senders
from zmqcore._frame cimport (
    ASSUMED_BUFFERS, ASSUMED_BYTES, ENVELOPE_ROOM, FLAG_FLOW, FLAG_IDENTIFIED, FLAG_PROMPT, HEADER_BYTES,
    INITIAL_CREDIT, KIND_ACK, KIND_CALL, KIND_CANCEL, KIND_CAST, KIND_CREDIT, KIND_ERROR, KIND_FANOUT, KIND_GOODBYE,
    KIND_HELLO, KIND_ITEM, KIND_PING, KIND_PONG, KIND_REPLY, NO_DEADLINE, Envelope, Header, Parcel, excess_of,
    header_begin, hello_pack, hello_read, is_over, parcel_close, parcel_pack, parcel_pack_control, parcel_send,
    parcel_set_ack, release_sent_buffers, sent_buffers_held,
)
from zmqcore._inbox cimport Inbox
from zmqcore._libzmq cimport ZMQ_DONTWAIT, ZMQ_SNDMORE, libzmq, raise_errno, zc_msg_t
from zmqcore._outbox cimport MOST_HELD_BYTES, Outbox
from zmqcore._request cimport ACK_MESSAGES, Answerer, Peer, Request
from zmqcore._socket cimport (
    NEVER, SharedSocket, Waiter, coarse_now_ns, deadline_after, fork_generation, handle_of, is_ipv6,
    limit_silence, now_ns, wait_without_gil, waiter_borrow, waiter_return,
)

from zmqcore import errors

__all__ = ["Port"]

cdef int64_t ACK_CALLS_AFTER = 100_000_000      # ns; below the time that anybody drains for
cdef int64_t SENDER_KEPT = 600_000_000_000      # ns; a sender of identities that is silent for so long is forgotten
cdef int64_t PROBE_AFTER = 1_000_000_000        # ns; who waits for credit so long asks whether the peer is there
cdef int64_t LOOK_INTERVAL = 10_000_000         # ns; a stream on the receiving thread looks so often for its cancel
# A peer is busy for so long, in ns, after each message whose number is a multiple of this power of 2.
cdef enum:
    BUSY_MESSAGES = 64
cdef int64_t BUSY_FOR = 1_000_000_000
cdef int64_t PRUNE_EVERY = 30_000_000_000       # ns
cdef int64_t PRUNE_SILENT_FOR = 60_000_000_000  # ns


cdef inline bint _is_accepted(const Header *header) noexcept nogil:
    """Whether it is a one-way message whose sender keeps it until it is finished."""
    return header.flags & FLAG_IDENTIFIED and (header.kind == KIND_CAST or header.kind == KIND_FANOUT)


cdef inline bint _is_answer(const Header *header) noexcept nogil:
    """Whether it is what only a port may send."""
    return header.kind == KIND_REPLY or header.kind == KIND_ERROR or header.kind == KIND_PONG \
        or header.kind == KIND_ITEM


@cython.final
cdef class Port(Answerer):
    """Bind a ROUTER socket of ``context`` to each of ``endpoints`` (``tcp://127.0.0.1:*`` takes a free port).

    ``max_bytes`` of body and buffers and ``max_buffers`` bound one message in either direction, for a peer that takes
    less its own limits do; ``high_water`` is how many replies may wait for one peer that does not read them before
    further ones are dropped and counted. After ``liveness`` seconds or a little more a TCP peer that is cut off is
    disconnected. ``spin`` is how long, in seconds, receive() polls without blocking first. ``configure(socket)`` is
    called before binding. Raises OSError or zmq.ZMQError when an endpoint cannot be bound.

    receive() belongs to one thread at a time, everything else is thread-safe. A forked child cannot use it.
    """

    def __cinit__(self, *args, **options):
        if not args and not options:
            raise TypeError("Port takes a context and the endpoints to bind")

    def __init__(
        self, context: zmq.Context, endpoints, *, max_bytes: int = 1 << 28, max_buffers: int = 1024,
        high_water: int = 10_000, liveness: float = 5.0, spin: float = 100e-6, configure=None,
    ):
        socket = context.socket(zmq.ROUTER)
        bound = []
        try:
            socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
            socket.setsockopt(zmq.SNDHWM, high_water)
            socket.setsockopt(zmq.RCVHWM, high_water)
            socket.setsockopt(zmq.LINGER, 0)
            # The room twice: once for what may come before the peer knows what is taken here.
            socket.setsockopt(zmq.MAXMSGSIZE, max(max_bytes, ENVELOPE_ROOM) + ENVELOPE_ROOM)
            socket.setsockopt(zmq.BACKLOG, 1024)
            limit_silence(handle_of(socket), liveness, False)
            if configure is not None:
                configure(socket)
            for endpoint in endpoints:
                socket.setsockopt(zmq.IPV6, is_ipv6(endpoint))
                socket.bind(endpoint)
                bound.append(socket.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode())
            self.shared = SharedSocket(socket, spin)
            self.inbox = Inbox(self.shared, max_bytes, max_buffers)
            self.outbox = Outbox(self.shared)
            self.waiter = Waiter()
        except BaseException:
            files = _socket_files(bound)
            socket.close(linger=0)
            _remove(files)
            raise
        self.endpoints = tuple(bound)
        self.socket_files = _socket_files(bound)
        self.instance = os.urandom(16)
        self.max_bytes = max_bytes
        self.max_buffers = max_buffers
        self.hello = hello_pack(self.instance, max_bytes, max_buffers)
        self.peers = {}
        self.owing = []
        self.aside = deque()
        self.max_aside = max(1, high_water)
        self.noticed = []
        self.senders = Senders()
        self.next_prune = now_ns() + PRUNE_EVERY

    # -- what the server uses ----------------------------------------------------------------------------

    def receive(self, max_messages: int = 64, timeout: float | None = None) -> list:
        """Return the requests that have come, at most ``max_messages``; wait up to ``timeout`` seconds for one.

        With 0 cancels are obeyed, and requests are set aside for later, as many as ``full`` allows. Returns an empty
        list at the timeout or after wake(). Calls the ``watcher`` of every request that has been cancelled. Raises
        Closed once the port is closed, and InternalError if another thread is in receive().
        """
        cdef int64_t deadline = deadline_after(timeout)
        cdef int64_t until, before, now, budget, tried = 0, began = 0
        cdef uint64_t received = 0
        cdef Py_ssize_t limit = max_messages
        cdef bint spun = False, judged = False, acknowledged = False
        cdef list requests = []
        self._check()
        self.shared.enter()
        try:
            if self.closed:
                raise errors.Closed("the port is closed")
            if self.receiving:
                raise errors.InternalError("two threads receive from one port")
            self.receiving = True
            self.n_receiving += 1
            self.receiver = PyThread_get_thread_ident()
            try:
                self._flush_held()
                if coarse_now_ns() >= self.next_prune:
                    self._prune(coarse_now_ns())
                while True:
                    if self.aside:
                        self._hand_over(requests, limit)
                    while len(requests) < limit and self._take(requests) != EAGAIN:
                        pass
                    if limit == 0:
                        self._set_aside()
                    if judged and self.shared.spin_result(tried, began, self.n_received_bytes != received):
                        judged = False
                    if requests:
                        break
                    if self.closed:
                        raise errors.Closed("the port is closed")
                    if self.woken:
                        self.woken = False
                        break
                    before = now_ns()
                    if before >= deadline:
                        break
                    budget = 0
                    if not spun:
                        budget = tried = self.shared.spin_budget()
                        spun = judged = True
                        began, received = before, self.n_received_bytes
                    if not budget and not acknowledged:
                        # About to block: acknowledge what needs no reply; having sent, look again first.
                        acknowledged = True
                        if self.owing and self._flush_acks(False):
                            continue
                    until = deadline
                    if budget:
                        until = min(before + budget, deadline)
                    elif self.owing or sent_buffers_held():
                        # The latter: perhaps nobody else comes by to release what the last reply has pinned.
                        until = min(before + ACK_CALLS_AFTER, deadline)
                    self.watched = True
                    self.shared.leave()
                    try:
                        release_sent_buffers()
                        # What is not read keeps the descriptor readable.
                        self.waiter.wait(self.shared.fd if limit or not self.full else -1, until, budget)
                    finally:
                        self.shared.enter()
                        self.watched = False
                        now = now_ns()
                    if now < until:
                        spun = acknowledged = False
                    elif not budget and self.owing:
                        self._flush_acks(True)
            finally:
                self.receiving = False
        finally:
            self._unlock()
            if self.noticed:
                self._notify()
        return requests

    @property
    def full(self) -> bool:
        """Whether so many requests have been set aside that receive(0) reads nothing more."""
        return len(self.aside) >= self.max_aside

    def flush(self, calls_too: bool = False) -> None:
        """Acknowledge what needs no reply, with ``calls_too`` everything that has been taken.

        receive() does that by itself before it blocks. Who waits on ``fd`` elsewhere does it here, and looks once more
        by receive() with timeout 0 before waiting: sending may have swallowed the edge.
        """
        self._check()
        self.shared.enter()
        try:
            if not self.closed and self.owing:
                self._flush_acks(calls_too)
        finally:
            self._unlock()

    @property
    def fd(self) -> int:
        """The descriptor that becomes readable when something has come (edge-triggered: receive until empty)."""
        return self.shared.fd

    def wake(self) -> None:
        """Make receive() return, now or the next time."""
        self._check()
        self.shared.enter()
        self.woken = True
        if self.watched:
            self.waiter.wake()
        self.shared.leave()

    def stand_by(self, interval: float, quiet: float) -> None:
        """Wait until no thread has been in receive() for ``interval`` seconds, relieve() is called, or nothing has come
        for ``quiet`` seconds.

        Without the GIL all the while: another thread that wants it would lose its turn to this one. Raises
        InternalError if another thread stands by.
        """
        cdef int64_t tick = max(1, <int64_t>(interval * 1e9)), patience = <int64_t>(quiet * 1e9)
        cdef int64_t now = now_ns(), heard = now
        cdef uint64_t receives = 0, received = 0
        cdef bint absent = False, over = False
        cdef int read_fd = -1
        cdef Waiter waiter = None
        self._check()
        try:
            waiter = waiter_borrow()
            read_fd = waiter.read_fd
        except OSError:
            pass        # there is no descriptor left: relieve() is noticed at the next look
        self.shared.enter()
        if self.standing_by:
            self.shared.leave()
            if waiter is not None:
                waiter_return(waiter)
            raise errors.InternalError("two threads stand by at one port")
        self.standing_by, self.standby = True, waiter
        self.shared.leave()
        with nogil:
            while True:
                self.shared.lock.acquire()
                if self.n_received_bytes != received:
                    heard, received = now, self.n_received_bytes
                over = self.relieved or now - heard >= patience or (
                    absent and not self.receiving and self.n_receiving == receives)
                absent, receives = not self.receiving, self.n_receiving
                if over:
                    self.relieved = self.standing_by = False
                self.shared.lock.release()
                if over:
                    break
                wait_without_gil(read_fd, now + tick)
                now = now_ns()
        if waiter is not None:
            self.shared.enter()
            if self.standby is waiter:
                self.standby = None
            self.shared.leave()
            waiter_return(waiter)

    def relieve(self) -> None:
        """Make stand_by() return, now or the next time."""
        self._check()
        self.shared.enter()
        self.relieved = True
        if self.standby is not None:
            self.standby.wake()
        self.shared.leave()

    def goodbye(self) -> None:
        """Tell every peer, also those to come, that nothing new is wanted here: clients go elsewhere.

        Calls and accepted messages on connections that are made later are refused. (The socket is not unbound: libzmq
        would end the existing connections, too.)

        A channel answers once it has everything it waits for, see settled().
        """
        cdef Peer peer
        self._check()
        self.shared.enter()
        try:
            self.leaving = True
            if not self.closed:
                for peer in list(self.peers.values()):
                    self._part(peer)
        finally:
            self._unlock()

    def settled(self, grace: float = 0.1) -> bool:
        """After goodbye(): whether closing now loses no reply.

        libzmq drops what a client has not read yet when its connection breaks. So every call is to be answered, every
        accepted message finished, and whoever got a reply, or heard that something is finished, since the goodbye, or
        less than ``grace`` seconds before now, is to have answered the goodbye; as is who has sent much within the last
        second, and may merely be held up, about to send more. Call it now and then while receive() goes on.
        """
        cdef Peer peer
        cdef int64_t now = now_ns()
        cdef bint settled = True
        self._check()
        self.shared.enter()
        try:
            if not self.closed and self.owing:
                self._flush_acks(False)
            for peer in list(self.peers.values()):
                if peer.parted:
                    continue
                if peer.outstanding > 0:
                    settled = False
                elif peer.oldest_unfinished is not None:
                    settled = False
                elif peer.replied_since or now - peer.last_reply < grace * 1e9 or now - peer.busy_at < BUSY_FOR:
                    # Said again, it also shows whether the peer is still there.
                    if not self.closed and self._part(peer):
                        settled = False
        finally:
            self._unlock()
        return settled

    def farewell(self) -> bool:
        """The last goodbye, before close() and instead of receiving anything more: what comes now is not executed.

        Returns whether there is anybody who could have sent something without having read the first one. Who reads the
        last one before the connection is closed, a moment later, can try that elsewhere.
        """
        cdef Peer peer
        cdef int64_t now = now_ns()
        cdef bint heard = False
        self._check()
        self.shared.enter()
        try:
            if not self.closed:
                for peer in list(self.peers.values()):
                    if peer.flow and not peer.parted and self._control(peer, KIND_GOODBYE, 1, b"", False):
                        heard = heard or now - peer.last_seen < BUSY_FOR
        except errors.ZmqcoreError:
            pass        # as in close()
        finally:
            self._unlock()
        return heard

    def close(self, linger: float = 0.0) -> None:
        """Close the socket; what has not been sent is dropped after ``linger`` seconds. Twice is fine.

        Returns at once. A thread in receive() gets Closed, and closes the socket as it leaves.
        """
        cdef Peer peer
        cdef Request request
        if self.shared.generation != fork_generation():
            return
        self.shared.enter()
        try:
            if not self.closed:
                try:
                    self._flush_held()
                    # What has been finished since the last look: whoever hears of it need not send that again.
                    self._flush_acks(False)
                except errors.ZmqcoreError:
                    pass        # e.g. the context has been closed
                self.closed = True
                try:
                    self.shared.socket.setsockopt(zmq.LINGER, int(linger * 1000))
                except zmq.ContextTerminated:
                    pass        # the context waits for this socket to be closed, and for nothing else
                if self.watched:
                    self.waiter.wake()
                for peer in self.peers.values():
                    request = peer.oldest
                    while request is not None:
                        self._stir(request)
                        request = request.newer
        finally:
            self._unlock()

    def remove_files(self) -> None:
        """Remove the files of ipc endpoints, as closing does: nobody can connect any more.

        For who is about to end the process, at any point of the program: it takes no lock.
        """
        if self.shared.generation == fork_generation():
            _remove(self.socket_files)

    @property
    def is_closed(self) -> bool:
        """Whether close() has been called."""
        return self.closed

    def stats(self) -> dict[str, int]:
        """Return the counters since the port was made, and how many peers it knows now."""
        return {
            "peers": len(self.peers), "calls": self.n_calls, "casts": self.n_casts, "fanouts": self.n_fanouts,
            "cancelled": self.n_cancelled, "set_aside": len(self.aside),
            "replies": self.n_replies, "items": self.n_items, "acks": self.n_acks, "garbage": self.n_garbage,
            "too_large": self.n_too_large, "undeliverable_replies": self.n_undeliverable,
            "dropped_replies": self.n_dropped, "received_bytes": self.n_received_bytes,
            "sent_bytes": self.n_sent_bytes,
            "batches": self.outbox.n_batches, "batched": self.outbox.n_batched,
            "duplicates": self.n_duplicates, "senders": len(self.senders.by_name),
        }

    def __repr__(self) -> str:
        return f"<Port {', '.join(self.endpoints)} {'closed' if self.closed else 'open'}, {len(self.peers)} peers>"

    cdef int _part(self, Peer peer) except -1:
        """Say goodbye to one peer; return 1, or 0 if it has gone. The lock is held."""
        if not peer.flow:
            return 0
        peer.told = True
        return self._control(peer, KIND_GOODBYE, 0, b"", False)

    # -- receiving ---------------------------------------------------------------------------------------

    cdef int _check(self) except -1:
        """Raise Closed in a forked child: there even the lock may be held by a thread that does not exist."""
        if self.shared.generation != fork_generation():
            raise errors.Closed(f"the port at {', '.join(self.endpoints)} was made before a fork and is the parent's")
        return 0

    cdef int _take(self, list requests) except -1:
        """Take one envelope; append it to ``requests`` if it is one. Return 0, or EAGAIN if there was none."""
        cdef Inbox inbox = self.inbox
        cdef Envelope envelope
        cdef Request request
        if inbox.take() == EAGAIN:
            return EAGAIN
        envelope, inbox.envelope = inbox.envelope, None
        if envelope is None or _is_answer(&envelope.header):
            self.n_garbage += 1
            return 0
        request = self._take_envelope(self._peer(&inbox.routing_id), envelope)
        if request is not None:
            requests.append(request)
        return 0

    cdef Peer _peer(self, zc_msg_t *routing_id):
        """Return the peer with this routing id, or a new one that is not in the table yet."""
        cdef const char *data = <const char *>libzmq.msg_data(routing_id)
        cdef Py_ssize_t size = libzmq.msg_size(routing_id)
        cdef Peer peer = self.last_peer
        if peer is not None and PyBytes_GET_SIZE(peer.routing_id) == size \
                and memcmp(PyBytes_AS_STRING(peer.routing_id), data, size) == 0:
            return peer
        key = PyBytes_FromStringAndSize(data, size)
        peer = self.peers.get(key)
        if peer is None:
            peer = Peer.__new__(Peer)
            peer.routing_id = key
            peer.max_bytes = min(self.max_bytes, <size_t>ASSUMED_BYTES)
            peer.max_buffers = min(self.max_buffers, <Py_ssize_t>ASSUMED_BUFFERS)
        else:
            self.last_peer = peer
        return peer

    cdef Request _take_envelope(self, Peer peer, Envelope envelope):
        """Do what the protocol asks for an envelope that has come; return a request, or None."""
        cdef Header *header = &envelope.header
        self.n_received_bytes += envelope.n_bytes
        peer.last_seen = coarse_now_ns()
        if header.id & (BUSY_MESSAGES - 1) == 0 and header.id:
            peer.busy_at = peer.last_seen
        if header.flags & FLAG_FLOW and not peer.flow:
            self._greet(peer, header.id)
        if peer.late and (header.kind == KIND_CALL or _is_accepted(header)):
            self._count_taken(peer, header, envelope.n_bytes)
            self._control(
                peer, KIND_ERROR, header.id, b"Draining: the server takes nothing new", self.inbox.delimiter)
            # It must have read that before the port is closed: else it cannot know that nothing was executed.
            peer.note_reply()
            peer.parted = False
            return None
        if header.kind == KIND_CALL:
            self.n_calls += 1
            peer.parted = False
        elif header.kind == KIND_CAST:
            self.n_casts += 1
        elif header.kind == KIND_FANOUT:
            self.n_fanouts += 1
        else:
            self._take_control(peer, envelope)
            return None
        return self._make_request(peer, envelope)

    cdef int _greet(self, Peer peer, uint64_t id) except -1:
        """``peer``'s first message that counts on acknowledgements has come."""
        peer.flow = True
        self.peers[peer.routing_id] = peer
        self._control(peer, KIND_HELLO, id, self.hello, self.inbox.delimiter)
        if self.leaving:
            peer.late = True
            self._part(peer)
        return 0

    cdef int _take_control(self, Peer peer, Envelope envelope) except -1:
        """What has come is no request. An ack says nothing to a port."""
        cdef Header *header = &envelope.header
        cdef Request request
        cdef size_t max_bytes
        cdef Py_ssize_t max_buffers
        if header.kind == KIND_PING:
            self._count_in_turn(peer, header, envelope.n_bytes)
            self._control(peer, KIND_PONG, header.id, b"", self.inbox.delimiter)
        elif header.kind == KIND_GOODBYE:
            peer.parted = True
            if not peer.told:
                self.peers.pop(peer.routing_id, None)
                if self.last_peer is peer:
                    self.last_peer = None
        elif header.kind == KIND_HELLO:
            if hello_read(envelope, &max_bytes, &max_buffers):
                peer.max_bytes = min(self.max_bytes, max_bytes)
                peer.max_buffers = min(self.max_buffers, max_buffers)
            else:
                self.n_garbage += 1
        elif header.kind == KIND_CANCEL or header.kind == KIND_CREDIT:
            request = peer.find(header.id)
            if request is None:
                return 0
            if header.kind == KIND_CANCEL:
                self._give_up(request)
            else:
                self._add_credit(request, envelope)
        return 0

    cdef Request _make_request(self, Peer peer, Envelope envelope):
        """Return the request that has come; None if it is refused, or has come before."""
        cdef Header *header = &envelope.header
        cdef Py_ssize_t n_buffers = self.inbox.n_buffers
        cdef Request request = Request.__new__(Request)
        request.port = self
        request.peer = peer
        request.envelope = envelope
        if _is_accepted(header) and self._is_duplicate(request):
            self._count_in_turn(peer, header, envelope.n_bytes)
            return None
        request.delimiter = self.inbox.delimiter
        request.topic = self._topic_of(envelope)
        request.method = self._method_of(envelope)
        request.credit = INITIAL_CREDIT
        request.deadline = NEVER
        if header.remaining_ms != NO_DEADLINE:
            request.deadline = now_ns() + <int64_t>header.remaining_ms * 1000000
        if is_over(header, envelope.n_bytes, self.max_bytes) or n_buffers != header.n_buffers \
                or (n_buffers and len(envelope.buffers) != n_buffers):
            self._count_taken(peer, header, envelope.n_bytes)
            return self._refuse(request)
        if self.setting_aside:
            peer.n_aside += 1
        else:
            self._count_taken(peer, header, envelope.n_bytes)
        if header.kind == KIND_CALL:
            peer.link(request)
        return request

    cdef int _set_aside(self) except -1:
        """Take what has come, and keep the requests for later. They are taken, for their senders, when handed over."""
        cdef list requests = []
        self.setting_aside = True
        try:
            while len(self.aside) < self.max_aside and self._take(requests) != EAGAIN:
                if requests:
                    self.aside.append(requests.pop())
        finally:
            self.setting_aside = False
        return 0

    cdef int _hand_over(self, list requests, Py_ssize_t limit) except -1:
        """Append requests that were set aside to ``requests``, the oldest first."""
        cdef Request request
        cdef Peer peer
        while self.aside and len(requests) < limit:
            request = self.aside.popleft()
            peer = request.peer
            peer.n_aside -= 1
            self._count_taken(peer, &request.envelope.header, request.envelope.n_bytes)
            if peer.n_aside == 0 and peer.last_aside > peer.taken:
                peer.taken = peer.last_aside
            requests.append(request)
        return 0

    # -- what becomes of calls that wait for an answer ---------------------------------------------------
    cdef int _give_up(self, Request request) except -1:
        """The caller of ``request`` has cancelled it, or can be sent no more of it."""
        self.n_cancelled += 1
        request.cancelled = True
        request.peer.unlink(request)
        return self._stir(request)

    cdef int _add_credit(self, Request request, Envelope envelope) except -1:
        """The caller takes that many items more."""
        if envelope.header.body_bytes != 4:
            self.n_garbage += 1
            return 0
        request.credit = min(request.credit + <int64_t>int.from_bytes(envelope.body, "little"), <int64_t>1 << 32)
        return self._stir(request)

    cdef int _stir(self, Request request) except -1:
        """Something has become of ``request``: tell who waits for that."""
        if request.waiter is not None:
            request.waiter.wake()
        if self.awaited is request:
            self.woken = True
        if request.watcher is not None or request.on_credit is not None:
            self.noticed.append(request)
        return 0

    cdef int _notify(self) except -1:
        """Tell those who watch their requests. Without the lock: what they do is their own."""
        cdef Request request
        noticed, self.noticed = self.noticed, []
        for request in noticed:
            if request.cancelled:
                # It may refer to the request.
                callback, request.watcher = request.watcher, None
            else:
                callback, request.on_credit = request.on_credit, None
            if callback is not None:
                callback()
        return 0

    cdef int await_credit(self, Request request) except -1:
        if self.inline and coarse_now_ns() - self.last_look > LOOK_INTERVAL:
            self._look_for_credit(request)
        while request.credit == 0 and not request.cancelled:
            self._look_for_credit(request)
        return 0

    cdef int _look_for_credit(self, Request request) except -1:
        """Wait until something has become of ``request``, or a while; then look whether its peer is still there."""
        cdef Waiter waiter
        if self.inline:
            self.awaited = request
            try:
                self.receive(0, 0.0 if request.credit else PROBE_AFTER / 1e9)
            finally:
                self.awaited = None
                self.last_look = coarse_now_ns()
        else:
            waiter = waiter_borrow()
            self.shared.enter()
            try:
                if self.closed:
                    raise errors.Closed(f"the port at {', '.join(self.endpoints)} is closed")
                if request.credit or request.cancelled:
                    return 0
                request.waiter = waiter
                self.shared.leave()
                try:
                    waiter.wait(-1, now_ns() + PROBE_AFTER, 0)
                finally:
                    self.shared.enter()
                    request.waiter = None
            finally:
                self._unlock()
                waiter_return(waiter)
        if request.credit == 0 and not request.cancelled:
            self.probe(request.peer)
        return 0

    cdef int probe(self, Peer peer) except -1:
        """Send ``peer`` something, only to see whether it is there; if not, its streams are given up."""
        self._check()
        self.shared.enter()
        try:
            if not self.closed:
                self._acknowledge(peer)
        finally:
            self._unlock()
        return 0

    cdef bytes _topic_of(self, Envelope envelope):
        """Return the envelope's topic: the very object of the last request if it is the same."""
        cdef const char *start = <const char *>envelope.data + HEADER_BYTES
        cdef Py_ssize_t size = envelope.header.topic_bytes
        if self.last_topic is None or PyBytes_GET_SIZE(self.last_topic) != size \
                or memcmp(PyBytes_AS_STRING(self.last_topic), start, size) != 0:
            self.last_topic = PyBytes_FromStringAndSize(start, size)
        return self.last_topic

    cdef str _method_of(self, Envelope envelope):
        """Return the envelope's method: the very object of the last request if it is the same."""
        cdef const char *start = <const char *>envelope.data + HEADER_BYTES + envelope.header.topic_bytes
        cdef Py_ssize_t size = envelope.header.method_bytes
        if self.last_method_bytes is None or PyBytes_GET_SIZE(self.last_method_bytes) != size \
                or memcmp(PyBytes_AS_STRING(self.last_method_bytes), start, size) != 0:
            self.last_method_bytes = PyBytes_FromStringAndSize(start, size)
            self.last_method = envelope.method
        return self.last_method

    cdef Request _refuse(self, Request request):
        """A request without all of its buffers: over a limit, or not what its header says. Tell a caller."""
        cdef Header *header = &request.envelope.header
        cdef size_t n_bytes = request.envelope.n_bytes
        cdef bytes reason
        if is_over(header, n_bytes, self.max_bytes) or header.n_buffers > self.max_buffers:
            self.n_too_large += 1
            reason = f"PayloadTooLarge: {excess_of(header, n_bytes, self.max_bytes, self.max_buffers)}".encode()
        else:
            self.n_garbage += 1
            reason = b"ProtocolError: the envelope announces another number of buffers than came"
        if header.kind == KIND_CALL:
            self._control(request.peer, KIND_ERROR, header.id, reason, request.delimiter)
        elif request.sender is not None:
            self._note_finished(request)        # it would be no better the next time
        return None

    # -- acknowledging -----------------------------------------------------------------------------------

    cdef int _count_taken(self, Peer peer, Header *header, size_t n_bytes) except -1:
        if peer.flow:
            self._owe(peer)
            if peer.take(header, n_bytes):
                self._acknowledge(peer)
        return 0

    cdef int _count_in_turn(self, Peer peer, Header *header, size_t n_bytes) except -1:
        """Something that is no request, or had come before, is taken; but not before requests that are set aside."""
        if peer.n_aside:
            peer.last_aside = header.id
            return 0
        return self._count_taken(peer, header, n_bytes)

    cdef int _owe(self, Peer peer) except -1:
        if not peer.owing:
            peer.owing = True
            self.owing.append(peer)
        return 0

    cdef int _acknowledge(self, Peer peer) except -1:
        """Tell the peer what has been taken and, by the id, up to where everything is finished."""
        self.n_acks += 1
        if not self._control(peer, KIND_ACK, peer.finished_up_to(), b"", False):
            return 0
        if peer.owed_finished:
            peer.owed_finished = 0
            peer.note_reply()
        return 1

    cdef int _flush_acks(self, bint calls_too) except -1:
        """Acknowledge one-way messages, with ``calls_too`` everything, and forget who owes nothing any more.

        Return 1 if something was sent for that, else 0.
        """
        cdef Peer peer
        cdef list still_owing = []
        cdef int sent = 0
        for peer in self.owing:
            if peer.unacked_one_way or peer.owed_finished or (calls_too and peer.unacked):
                self._acknowledge(peer)
                sent = 1
            if peer.flow and (peer.unacked or peer.oldest_unfinished is not None or peer.owed_finished):
                still_owing.append(peer)
            else:
                peer.owing = False
        self.owing = still_owing
        return sent

    # -- messages with an identity -----------------------------------------------------------------------

    cdef bint _is_duplicate(self, Request request) except -1:
        """Note that a request with an identity has come; return whether it had come before."""
        cdef Peer peer = request.peer
        cdef uint64_t name
        peer.wants_finished = peer.flow
        request.envelope.read_identity(&name, &request.sequence)
        request.sender = self.senders.find(name)
        if not request.sender.take(request.sequence):
            if peer.flow:
                peer.expect_finish(request)
            return False
        self.n_duplicates += 1
        if not peer.flow:
            pass
        elif request.sender.is_finished(request.sequence):
            peer.owed_finished += 1
        else:
            # It counts as finished when the first one is.
            peer.expect_finish(request)
            request.sender.note_again(request.sequence, request)
        return True

    cdef int finish(self, Request request) except -1:
        """The work for ``request`` is done; tell its sender, at once if nobody else is about to."""
        if self.shared.generation != fork_generation():
            return 0
        self.shared.enter()
        try:
            self._note_finished(request)
        finally:
            self._unlock()
        return 0

    cdef int _note_finished(self, Request request) except -1:
        cdef Sender sender = request.sender
        cdef Request again
        if request.finished:
            return 0
        sender.finish(request.sequence)
        self._finish_for_peer(request)
        if sender.again:
            for again in sender.again.pop(request.sequence, ()):
                self._finish_for_peer(again)
        return 0

    cdef int _finish_for_peer(self, Request request) except -1:
        cdef Peer peer = request.peer
        peer.finish(request)
        if peer.flow and peer.owed_finished and not self.closed:
            # Else the receiver does it before it sleeps, and while something is unfinished also every now and then.
            if peer.owed_finished >= ACK_MESSAGES or (self.watched and peer.oldest_unfinished is None):
                self._acknowledge(peer)
            else:
                self._owe(peer)
        return 0

    cdef int _prune(self, int64_t now) except -1:
        """Forget silent peers whose connection has gone: sending to them says so (ROUTER_MANDATORY)."""
        cdef Peer peer
        self.next_prune = now + PRUNE_EVERY
        self.senders.forget(SENDER_KEPT)
        for peer in list(self.peers.values()):
            if now - peer.last_seen > PRUNE_SILENT_FOR:
                self._acknowledge(peer)
        return 0

    # -- sending -----------------------------------------------------------------------------------------

    cdef int _control(self, Peer peer, int kind, uint64_t id, bytes body, bint delimiter) except -1:
        """Send a message of the protocol itself; return 1, or 0 if the peer has gone. The lock is held."""
        cdef Parcel parcel
        cdef Header header
        header_begin(&header, kind, 0, id)
        header.body_bytes = PyBytes_GET_SIZE(body)
        parcel_pack_control(&parcel, &header, PyBytes_AS_STRING(body))
        return self._send(peer, &parcel, delimiter)

    cdef int answer(self, Request request, int kind, body, list buffers, bytes metadata, int codec) except -1:
        """Pack and send the answer; return 1, or 0 if the peer has gone or does not want it any more."""
        cdef Parcel parcel
        cdef Header header
        if request.envelope.header.kind != KIND_CALL:
            raise errors.InternalError(f"{request!r} wants no answer")
        self._check()
        header_begin(&header, kind, 0, request.envelope.header.id)
        header.codec = codec
        parcel_pack(
            &parcel, &header, b"", "", metadata, body, buffers, request.peer.max_bytes, request.peer.max_buffers)
        self.shared.enter()
        if request.answered or self.closed:
            self.shared.leave()
            parcel_close(&parcel)
            if request.answered:
                raise errors.InternalError(f"{request!r} is answered twice")
            raise errors.Closed(f"the port at {', '.join(self.endpoints)} is closed")
        if request.cancelled:
            self.shared.leave()
            parcel_close(&parcel)
            request.watcher = None
            return 0
        if kind == KIND_ITEM:
            return self._send_item(request, &parcel)
        request.answered = True
        request.peer.unlink(request)
        request.peer.note_reply()
        try:
            self.n_replies += 1
            if self._may_hold(request, &parcel):
                return self._hold(request.peer, &parcel)
            return self._send(request.peer, &parcel, request.delimiter)
        finally:
            self._unlock()
            request.watcher = None      # it may refer to the request

    cdef int _send_item(self, Request request, Parcel *parcel) except -1:
        """The last part of answer() for an item. The lock is held, and released."""
        cdef int sent = 0
        try:
            if request.credit == 0:
                parcel_close(parcel)
                raise errors.InternalError(f"{request!r} has no credit for an item")
            request.credit -= 1
            request.streaming = True
            self.n_items += 1
            sent = self._send(request.peer, parcel, request.delimiter)
            if not sent and request.linked:
                self._give_up(request)
        finally:
            self._unlock()
        return sent

    cdef int _send(self, Peer peer, Parcel *parcel, bint delimiter) except -1:
        """Send ``parcel`` to ``peer`` and close it; return 1, or 0 if the peer has gone or reads nothing.

        The lock is held. Every message to a peer that counts on it carries the acknowledgement.
        """
        cdef zc_msg_t part
        cdef int code = 0
        cdef size_t size = PyBytes_GET_SIZE(peer.routing_id)
        if self.held_for is peer:
            self._flush_held()
        if peer.flow:
            parcel_set_ack(parcel, peer.taken)
        try:
            if libzmq.msg_init_size(&part, size) != 0:
                raise MemoryError()
            memcpy(libzmq.msg_data(&part), PyBytes_AS_STRING(peer.routing_id), size)
            while libzmq.msg_send(&part, self.shared.handle, ZMQ_DONTWAIT | ZMQ_SNDMORE) < 0:
                code = libzmq.get_errno()
                if code != EINTR:
                    break
                code = 0
            if code != 0:
                libzmq.msg_close(&part)
                return self._note_unsent(peer, code, 1)
            if delimiter:
                libzmq.msg_init(&part)
                while libzmq.msg_send(&part, self.shared.handle, ZMQ_DONTWAIT | ZMQ_SNDMORE) < 0:
                    if libzmq.get_errno() != EINTR:
                        break
            self.n_sent_bytes += parcel.n_bytes
            code = parcel_send(parcel, self.shared.handle)
            if code != 0 and code != EAGAIN and code != EHOSTUNREACH:
                raise_errno(code, "cannot send")
            peer.unacked = peer.unacked_one_way = peer.unacked_bytes = 0
        finally:
            parcel_close(parcel)
            if self.watched:
                self.shared.read_events()
                if self.shared.readable:
                    self.waiter.wake()
        return 1

    cdef int _note_unsent(self, Peer peer, int code, uint64_t n_messages) except -1:
        """libzmq has not taken what was for ``peer``, and says why by ``code``. Return 0."""
        if code == EHOSTUNREACH:
            self.n_undeliverable += n_messages
            self.peers.pop(peer.routing_id, None)
            peer.flow = False
            peer.unacked = peer.unacked_one_way = 0
            self._give_up_streams(peer)
            if self.last_peer is peer:
                self.last_peer = None
        elif code == EAGAIN:
            self.n_dropped += n_messages
        else:
            raise_errno(code, "cannot send")
        return 0

    cdef bint _may_hold(self, Request request, Parcel *parcel) noexcept:
        """Whether a reply can wait a moment for others to the same peer: this thread is about to answer them, or else
        to receive again."""
        if not self.batching or self.receiving or request.peer.outstanding == 0 or not request.peer.flow \
                or request.delimiter or request.envelope.header.flags & FLAG_PROMPT:
            return False
        return parcel.n_parts == 0 and parcel.n_bytes <= MOST_HELD_BYTES \
            and self.receiver == PyThread_get_thread_ident()

    cdef int _hold(self, Peer peer, Parcel *parcel) except -1:
        """Have ``parcel`` sent to ``peer`` with others, soon. Return 1, or 0 if the peer has gone or reads nothing."""
        if self.held_for is not peer or not self.outbox.takes(parcel.n_bytes):
            self._flush_held()
            if self.outbox.n_bytes or not peer.flow:
                # There is no memory for those that are held, maybe for another peer; or this one has gone.
                return self._send(peer, parcel, False)
            self.held_for = peer
            self.outbox.address(PyBytes_AS_STRING(peer.routing_id), PyBytes_GET_SIZE(peer.routing_id))
        try:
            parcel_set_ack(parcel, peer.taken)
            self.outbox.add(parcel.header, parcel.n_bytes)
            self.n_sent_bytes += parcel.n_bytes
            peer.unacked = peer.unacked_one_way = peer.unacked_bytes = 0
        finally:
            parcel_close(parcel)
        return 1

    cdef int _flush_held(self) except -1:
        """Send what is held, and note what has become of it. Return 1, or 0 if it was not sent."""
        cdef Peer peer = self.held_for
        cdef int code
        cdef uint64_t n_failed
        if peer is None:
            return 1
        self.outbox.flush()
        code, n_failed = self.outbox.failed, self.outbox.n_failed
        self.outbox.failed = 0
        self.outbox.n_failed = 0
        if self.outbox.n_bytes == 0:
            self.held_for = None
        if code == 0:
            return 1
        if peer.flow:
            # It had been told with these what was taken.
            peer.unacked = 1
            self._owe(peer)
        return self._note_unsent(peer, code, n_failed)

    cdef int _give_up_streams(self, Peer peer) except -1:
        """``peer`` has gone: who sends it items may be waiting for credit."""
        cdef Request request = peer.oldest
        cdef Request newer
        while request is not None:
            newer = request.newer
            if request.streaming:
                self._give_up(request)
            request = newer
        return 0

    cdef int _unlock(self) except -1:
        """Release the lock, and close the socket if that was asked for and nobody receives."""
        cdef bint close_now = self.closed and not self.receiving and self.shared.handle != NULL
        cdef Peer peer
        if close_now:
            self.shared.handle = NULL
            # Nobody will answer what is left: the lists are cycles.
            for peer in self.peers.values():
                while peer.oldest is not None:
                    peer.unlink(peer.oldest)
        self.shared.leave()
        release_sent_buffers()
        if close_now:
            self.outbox.close()
            self.waiter = None      # its eventfd goes too, however long somebody keeps the port or a request
            self.shared.take_socket().close()
            _remove(self.socket_files)
        return 0


def _socket_files(endpoints):
    """Return path and inode of the socket file of each ipc endpoint that has one."""
    paths = [endpoint[6:] for endpoint in endpoints if endpoint.startswith("ipc://")]
    return [(path, os.stat(path).st_ino) for path in paths if not path.startswith("@")]


def _remove(files):
    """Remove socket files, unless another server has bound the path since. libzmq leaves them behind."""
    for path, inode in files:
        try:
            if os.stat(path).st_ino == inode:
                os.unlink(path)
        except OSError:
            pass
