"""One bound ROUTER socket and the requests that came to it: see ``_port.pyx``."""

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint64_t

from zmqcore._frame cimport Envelope, Header, Parcel
from zmqcore._libzmq cimport zc_msg_t
from zmqcore._socket cimport SharedSocket, Waiter

cdef class Request

cdef enum:
    # Of one sender, the port remembers at least this many messages (see the protocol), in words of 64 bits. One word
    # more, because words are cleared as a whole.
    WINDOW_MESSAGES = 8192
    WINDOW_WORDS = 129

cdef class Sender:
    cdef uint64_t name
    cdef uint64_t highest       # sequence number
    cdef uint64_t[129] taken    # WINDOW_WORDS of them; one bit per sequence number: it has come
    cdef uint64_t[129] finished
    cdef dict again             # sequence number -> Requests that have come again before the first one was finished
    cdef int64_t last_seen
    cdef int advance(self, uint64_t sequence) noexcept
    cdef bint is_known(self, uint64_t sequence) noexcept

cdef class Peer:
    cdef bytes routing_id
    cdef bint flow              # it counts on acknowledgements
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
    cdef Request oldest_unfinished, newest_unfinished   # ends of the list of those with an identity, by their ids
    cdef bint wants_finished    # some have come from it
    cdef uint64_t owed_finished     # of those that are, how many it has not been told
    cdef bint parted            # it has answered the goodbye: it has everything, and sends nothing more

cdef class Request:
    cdef Port port
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

cdef class Port:
    cdef SharedSocket shared    # its lock guards all that follows
    cdef Waiter waiter          # of the receiving thread
    cdef readonly tuple endpoints
    cdef readonly bytes instance
    cdef bytes hello
    cdef dict peers             # routing id -> Peer
    cdef Peer last_peer
    cdef bytes last_topic, last_method_bytes    # of the last request, and below as text
    cdef str last_method
    cdef list owing             # peers that have something unacknowledged
    cdef object aside           # deque of requests that nobody could begin yet, and that are not acknowledged
    cdef Py_ssize_t max_aside
    cdef bint setting_aside
    cdef list noticed           # requests whose watcher or on_credit is to be called
    cdef public bint inline     # the receiving thread runs the handlers, and receives while one waits for credit
    cdef Request awaited        # ... and this is its request
    cdef int64_t last_look      # ... and when it has received last
    cdef dict senders           # name -> Sender, of messages with an identity
    cdef Sender last_sender
    cdef bint receiving         # a thread is in receive()
    cdef bint watched           # ... and in poll(2): senders must keep the edge-trigger rule
    cdef bint woken, closed
    cdef bint leaving           # goodbye() has been called
    cdef list socket_files      # (path, inode) of the ipc endpoints, removed on closing
    cdef size_t max_bytes
    cdef Py_ssize_t max_buffers
    cdef int64_t next_prune
    cdef uint64_t n_calls, n_casts, n_fanouts, n_cancelled, n_items, n_replies, n_acks, n_garbage, n_too_large
    cdef uint64_t n_duplicates, n_undeliverable, n_dropped, n_received_bytes, n_sent_bytes

    cdef int _check(self) except -1
    cdef int _part(self, Peer peer) except -1
    cdef int _take(self, list requests) except -1
    cdef Request _take_envelope(self, Peer peer, zc_msg_t *message, bint delimiter)
    cdef int _set_aside(self) except -1
    cdef int _hand_over(self, list requests, Py_ssize_t limit) except -1
    cdef int _link(self, Request request) noexcept
    cdef int _unlink(self, Request request) noexcept
    cdef Request _find(self, Peer peer, uint64_t id)
    cdef int _give_up(self, Request request) except -1
    cdef int _give_up_streams(self, Peer peer) except -1
    cdef int _add_credit(self, Request request, Envelope envelope) except -1
    cdef int _stir(self, Request request) except -1
    cdef int _await_credit(self, Request request) except -1
    cdef int _probe(self, Peer peer) except -1
    cdef int _send_item(self, Request request, Parcel *parcel) except -1
    cdef int _notify(self) except -1
    cdef bytes _topic_of(self, Envelope envelope)
    cdef str _method_of(self, Envelope envelope)
    cdef Request _refuse(self, Request request, size_t n_bytes)
    cdef int _skip(self, zc_msg_t *message, bint more) except -1
    cdef Peer _peer(self, zc_msg_t *routing_id)
    cdef int _count_taken(self, Peer peer, Header *header, size_t n_bytes) except -1
    cdef Sender _sender(self, uint64_t name)
    cdef int _forget_senders(self, int64_t silent_for) except -1
    cdef bint _is_duplicate(self, Request request) except -1
    cdef int _expect_finish(self, Peer peer, Request request) except -1
    cdef int _finish(self, Request request) except -1
    cdef int _note_finished(self, Request request) except -1
    cdef int _finish_for_peer(self, Request request) except -1
    cdef int _count_in_turn(self, Peer peer, Header *header, size_t n_bytes) except -1
    cdef int _owe(self, Peer peer) except -1
    cdef int _acknowledge(self, Peer peer) except -1
    cdef int _flush_acks(self, bint calls_too) except -1
    cdef int _control(self, Peer peer, int kind, uint64_t id, bytes body, bint delimiter) except -1
    cdef int _send(self, Peer peer, Parcel *parcel, bint delimiter) except -1
    cdef int _answer(self, Request request, int kind, body, list buffers, bytes metadata, int codec) except -1
    cdef int _prune(self, int64_t now) except -1
    cdef int _unlock(self) except -1
