# cython: language_level=3, embedsignature=True, auto_pickle=False, freethreading_compatible=True
"""A request that has come to a port, and the peer that it came from: one connection, and what that is owed.

A peer is owed acknowledgements, cumulatively: what has been taken, by the highest id, and up to which id everything
that carries an identity is *finished*.

Peers, and what is not public about requests, are used under the lock of their port.
"""

cimport cython
from libc.stddef cimport size_t
from libc.stdint cimport uint64_t

from zmqcore._frame cimport KIND_CALL, KIND_CAST, KIND_ERROR, KIND_FANOUT, KIND_ITEM, KIND_REPLY, Header, identity_bytes
from zmqcore._socket cimport NEVER, now_ns

__all__ = ["Answerer", "Request"]


cdef class Answerer:
    """Where requests come to and answers go from: a Port. What a Request needs of it."""

    cdef int answer(self, Request request, int kind, body, list buffers, bytes metadata, int codec) except -1:
        """Pack and send the answer; return 1, or 0 if the peer has gone or does not want it any more."""
        raise NotImplementedError

    cdef int finish(self, Request request) except -1:
        """The work for ``request`` is done; tell its sender, at once if nobody else is about to."""
        raise NotImplementedError

    cdef int await_credit(self, Request request) except -1:
        """Wait until ``request`` has credit for an item, or is cancelled."""
        raise NotImplementedError

    cdef int probe(self, Peer peer) except -1:
        """Send ``peer`` something, only to see whether it is there; if not, its streams are given up."""
        raise NotImplementedError


@cython.final
cdef class Peer:
    """One connection to the port, by the routing id that libzmq gave it.

    Its calls that wait for an answer are a list, linked through the requests themselves, from ``oldest`` to ``newest``.
    """

    cdef bint take(self, const Header *header, size_t n_bytes) noexcept:
        """Count a message as taken; return whether that is to be acknowledged at once.

        A single call is not, however large: its answer acknowledges it. An ack just before that would wake the caller
        while the answer, probably large too, is still on its way.
        """
        if header.id > self.taken:
            self.taken = header.id
        self.unacked += 1
        self.unacked_bytes += n_bytes
        if header.kind == KIND_CAST or header.kind == KIND_FANOUT:
            self.unacked_one_way += 1
        return self.unacked >= ACK_MESSAGES or (
            self.unacked_bytes >= ACK_BYTES and (self.unacked > 1 or header.kind != KIND_CALL))

    cdef int note_reply(self) noexcept:
        """It is being told what it must have read before the port may be closed."""
        self.last_reply = now_ns()
        self.replied_since = self.told
        return 0

    cdef int link(self, Request request) noexcept:
        """``request`` is a call that waits for its answer."""
        request.linked = True
        if self.newest is None:
            self.oldest = request
        else:
            request.older = <void *>self.newest
            self.newest.newer = request
        self.newest = request
        self.outstanding += 1
        return 0

    cdef int unlink(self, Request request) noexcept:
        """It does not any more; twice is fine."""
        cdef Request newer = request.newer
        if not request.linked:
            return 0
        if request.older == NULL:
            self.oldest = newer
        else:
            (<Request>request.older).newer = newer
        if newer is None:
            self.newest = None if request.older == NULL else <Request>request.older
        else:
            newer.older = request.older
        request.newer = None
        request.older = NULL
        request.linked = False
        self.outstanding -= 1
        return 0

    cdef Request find(self, uint64_t id):
        """Return the call of this number; None if nobody knows it any more. It is probably one of the older ones."""
        cdef Request request = self.oldest
        while request is not None and request.envelope.header.id != id:
            request = request.newer
        return request

    cdef int expect_finish(self, Request request) noexcept:
        """``request`` carries an identity: its finish() is awaited."""
        if self.newest_unfinished is None:
            self.oldest_unfinished = request
        else:
            self.newest_unfinished.next_unfinished = request
        self.newest_unfinished = request
        return 0

    cdef int finish(self, Request request) noexcept:
        """``request`` is finished. Count those that the peer can be told of: no unfinished one comes before them."""
        cdef Request oldest = self.oldest_unfinished
        request.finished = True
        if not self.flow:
            return 0            # it has gone, or does not want to know
        while oldest is not None and oldest.finished:
            self.oldest_unfinished = oldest.next_unfinished
            oldest.next_unfinished = None
            oldest = self.oldest_unfinished
            self.owed_finished += 1
        if oldest is None:
            self.newest_unfinished = None
        return 0

    cdef uint64_t finished_up_to(self) noexcept:
        """Return the highest id up to which everything is finished; 0 for a peer that has sent no identities."""
        if self.oldest_unfinished is not None:
            return self.oldest_unfinished.envelope.header.id - 1
        return self.taken if self.wants_finished else 0


@cython.final
@cython.freelist(64)
cdef class Request:
    """A call, cast or fanout that has come to a port. Answer a call once, from any thread.

    A cast or fanout with ``accepted`` is to be given to finish() when the work is done, also if that has failed.
    """

    def __init__(self):
        raise TypeError("a Request is made by Port.receive()")

    @property
    def kind(self) -> str:
        """"call", "cast" or "fanout"."""
        return self.envelope.kind

    @property
    def wants_reply(self) -> bool:
        """Whether it is a call that has neither been answered yet nor cancelled."""
        return self.envelope.header.kind == KIND_CALL and not self.answered and not self.cancelled

    @property
    def expired(self) -> bool:
        """Whether nobody waits for the result any more: the caller's deadline has passed, or it has cancelled."""
        return self.cancelled or (self.deadline != NEVER and now_ns() >= self.deadline)

    @property
    def remaining(self) -> float | None:
        """How many seconds are left until the caller's deadline, 0.0 at least; None if it has none.

        0.0 once the caller has cancelled.
        """
        if self.cancelled:
            return 0.0
        if self.deadline == NEVER:
            return None
        return max(0.0, (self.deadline - now_ns()) / 1e9)

    def open(self, dict methods not None, topics, int codec, decode):
        """Return (method, args, kwargs, deadline, wants), or None if anything about it is out of the ordinary.

        ``method`` is what ``methods`` has under its name, ``args`` and ``kwargs`` are what ``decode(envelope,
        buffers)`` makes of its body, ``deadline`` is a time of ``time.monotonic()`` or None, and ``wants`` as below.
        Ordinary is a request with a known method and topic, this codec, a body that can be decoded, and no metadata,
        which has neither expired nor been cancelled. All in one step: attribute by attribute it would take longer than
        the port needs to receive the request.
        """
        cdef list body
        cdef object until = None
        method = methods.get(self.method)
        if method is None or self.cancelled or self.envelope.header.codec != codec or self.topic not in topics \
                or self.envelope.header.metadata_bytes > identity_bytes(&self.envelope.header):
            return None
        if self.deadline != NEVER:
            if now_ns() >= self.deadline:
                return None
            until = self.deadline / 1e9
        try:
            value = decode(self.envelope, () if self.envelope.buffers is None else self.envelope.buffers)
        except Exception:       # a codec of the user's may raise anything
            return None
        if type(value) is not list:
            return None
        body = value
        if len(body) != 2 or type(body[0]) is not list or type(body[1]) is not dict:
            return None
        return method, body[0], body[1], until, self._wants()

    @property
    def wants(self) -> str | None:
        """What is to be done at its end: "reply", "finish" for an accepted one, or None for nothing."""
        return self._wants()

    cdef str _wants(self):
        return "reply" if self.envelope.header.kind == KIND_CALL else None if self.sender is None else "finish"

    @property
    def accepted(self) -> bool:
        """Whether its sender keeps it until it is finished, and sends it again if it does not hear that."""
        return self.sender is not None

    def finish(self) -> None:
        """Tell the sender, with the next acknowledgement, that an accepted request need not be sent again.

        From any thread, once everything about it is done. Nothing happens the second time, and for other requests.
        """
        if self.sender is not None:
            self.port.finish(self)

    def reply(self, body, list buffers=None, int codec=0, bytes metadata not None=b"") -> bool:
        """Send the result. Return False if the peer has gone or has cancelled.

        ``body`` is bytes-like and copied, ``buffers`` are not copied and must not change until they are sent.
        Raises PayloadTooLarge over the limits of the port or the peer (nothing has been sent then and another answer
        can be), and InternalError when it is answered already or is not a call.
        """
        return self.port.answer(self, KIND_REPLY, body, buffers, metadata, codec) != 0

    def error(self, body, list buffers=None, int codec=0, bytes metadata not None=b"") -> bool:
        """Send an error in place of the result; as reply() otherwise."""
        return self.port.answer(self, KIND_ERROR, body, buffers, metadata, codec) != 0

    # -- an answer in items: as many as the caller grants -------------------------------------------------

    @property
    def can_stream(self) -> bool:
        """Whether it can be answered by items: it is a call, and its connection has flow."""
        return self.envelope.header.kind == KIND_CALL and self.peer.flow

    def item(self, body, list buffers=None, int codec=0) -> bool:
        """Send one item of the answer, which reply() or error() ends; takes one credit. As reply() otherwise.

        Where it returns False the stream is over, and nothing more is sent: there are no gaps.
        """
        return self.port.answer(self, KIND_ITEM, body, buffers, b"", codec) != 0

    def await_credit(self) -> bool:
        """Wait until an item may be sent; return False once the caller has cancelled or gone.

        Some thread is to receive meanwhile, or the port is ``inline``: then this drives it. Raises Closed once the port
        is closed.
        """
        self.port.await_credit(self)
        return not self.cancelled

    def probe(self) -> bool:
        """Have libzmq say whether the peer is still there, as nothing else may be sent to it for long."""
        self.port.probe(self.peer)
        return not self.cancelled

    def __repr__(self) -> str:
        return f"<Request {self.kind} {self.method!r} id={self.envelope.id}{' answered' if self.answered else ''}>"
