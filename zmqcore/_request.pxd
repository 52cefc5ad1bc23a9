"""Requests, and the peers that they come from: see ``_request.pyx``."""

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint64_t

from zmqcore._duplicates cimport Sender
from zmqcore._frame cimport Envelope, Header
from zmqcore._socket cimport Waiter

cdef enum:
    # Part of the protocol: a sender's window should be larger than this, or it waits for the acknowledgement that
    # comes when the port goes to sleep.
    ACK_MESSAGES = 256
    ACK_BYTES = 1 << 20

cdef class Request

cdef class Answerer:
    cdef int answer(self, Request request, int kind, body, list buffers, bytes metadata, int codec) except -1
    cdef int finish(self, Request request) except -1
    cdef int await_credit(self, Request request) except -1
    cdef int probe(self, Peer peer) except -1

cdef class Peer:
    cdef bytes routing_id
    cdef bint flow              # it counts on acknowledgements
    cdef size_t max_bytes       # of body and buffers of one answer: what it takes, and the port sends
    cdef Py_ssize_t max_buffers
    cdef bint owing             # it stands in Port.owing
    cdef uint64_t taken         # the highest id that was taken from it
    cdef uint64_t unacked, unacked_one_way, unacked_bytes
    cdef int64_t last_seen
    # Its calls that have been neither answered nor cancelled yet, in order of arrival, and how many these are.
    cdef Request oldest, newest
    cdef int64_t outstanding
    cdef Py_ssize_t n_aside     # requests of it that stand in Port.aside
    cdef uint64_t last_aside    # the highest id of anything else that came behind such requests
    cdef int64_t last_reply
    cdef int64_t busy_at        # when a message came whose number was a multiple of BUSY_MESSAGES
    cdef bint late              # it has connected after the goodbye
    cdef bint told              # it has been sent a goodbye
    cdef bint replied_since     # ... and a reply after that
    cdef bint parted            # it has answered the goodbye: it has everything, and sends nothing more
    cdef Request oldest_unfinished, newest_unfinished   # ends of the list of those with an identity, by their ids
    cdef bint wants_finished    # some have come from it
    cdef uint64_t owed_finished     # of those that are, how many it has not been told

    cdef bint take(self, const Header *header, size_t n_bytes) noexcept
    cdef int note_reply(self) noexcept
    cdef int link(self, Request request) noexcept
    cdef int unlink(self, Request request) noexcept
    cdef Request find(self, uint64_t id)
    cdef int expect_finish(self, Request request) noexcept
    cdef int finish(self, Request request) noexcept
    cdef uint64_t finished_up_to(self) noexcept

cdef class Request:
    cdef Answerer port
    cdef Peer peer
    cdef readonly Envelope envelope
    cdef readonly bytes topic       # canonical text, UTF-8
    cdef readonly str method        # name; bytes that are not UTF-8 show as escapes
    cdef bint delimiter         # the peer is a REQ socket: an empty part comes before the envelope
    cdef bint answered
    cdef readonly bint cancelled    # the caller has given it up
    cdef public object watcher      # called without arguments by receive() once it is cancelled; or None
    cdef readonly int64_t credit    # how many items its caller still takes
    cdef public object on_credit    # called once, likewise, when that has grown; or None
    cdef bint streaming         # items have been sent
    cdef Waiter waiter          # of the thread that waits for credit, if any
    cdef Request newer          # the next one of Peer's list, and below the one before (borrowed)
    cdef void *older
    cdef bint linked            # it stands in that list
    cdef int64_t deadline
    cdef Sender sender          # who has sent it first, if it carries an identity; else None
    cdef uint64_t sequence
    cdef Request next_unfinished    # of Peer's list of them
    cdef bint finished
    cdef str _wants(self)
