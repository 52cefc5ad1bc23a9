"""One bound ROUTER socket: see ``_port.pyx``."""

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint64_t

from zmqcore._duplicates cimport Senders
from zmqcore._frame cimport Envelope, Header, Parcel
from zmqcore._inbox cimport Inbox
from zmqcore._libzmq cimport zc_msg_t
from zmqcore._outbox cimport Outbox
from zmqcore._request cimport Answerer, Peer, Request
from zmqcore._socket cimport SharedSocket, Waiter

cdef class Port(Answerer):
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
    cdef Inbox inbox            # what comes, one envelope at a time
    cdef Outbox outbox          # small replies, of the receiving thread, that are to leave together
    cdef Peer held_for          # whom they are for; None: there are none
    cdef unsigned long receiver     # the thread that has called receive() last
    cdef public bint batching   # that thread answers, and receives again soon: its replies may leave together
    cdef list noticed           # requests whose watcher or on_credit is to be called
    cdef public bint inline     # the receiving thread runs the handlers, and receives while one waits for credit
    cdef Request awaited        # ... and this is its request
    cdef int64_t last_look      # ... and when it has received last
    cdef Senders senders        # of messages with an identity
    cdef bint receiving         # a thread is in receive()
    cdef uint64_t n_receiving   # ... and how many times one has been
    cdef bint standing_by       # a thread is in stand_by()
    cdef Waiter standby         # ... and its waiter, if there was a descriptor for one
    cdef bint relieved          # relieve() has been called since
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
    cdef Request _take_envelope(self, Peer peer, Envelope envelope)
    cdef int _greet(self, Peer peer, uint64_t id) except -1
    cdef int _take_control(self, Peer peer, Envelope envelope) except -1
    cdef Request _make_request(self, Peer peer, Envelope envelope)
    cdef int _set_aside(self) except -1
    cdef int _hand_over(self, list requests, Py_ssize_t limit) except -1
    cdef int _give_up(self, Request request) except -1
    cdef int _give_up_streams(self, Peer peer) except -1
    cdef int _add_credit(self, Request request, Envelope envelope) except -1
    cdef int _stir(self, Request request) except -1
    cdef int _look_for_credit(self, Request request) except -1
    cdef int _send_item(self, Request request, Parcel *parcel) except -1
    cdef int _notify(self) except -1
    cdef bytes _topic_of(self, Envelope envelope)
    cdef str _method_of(self, Envelope envelope)
    cdef Request _refuse(self, Request request)
    cdef Peer _peer(self, zc_msg_t *routing_id)
    cdef int _count_taken(self, Peer peer, Header *header, size_t n_bytes) except -1
    cdef bint _is_duplicate(self, Request request) except -1
    cdef int _note_finished(self, Request request) except -1
    cdef int _finish_for_peer(self, Request request) except -1
    cdef int _count_in_turn(self, Peer peer, Header *header, size_t n_bytes) except -1
    cdef int _owe(self, Peer peer) except -1
    cdef int _acknowledge(self, Peer peer) except -1
    cdef int _flush_acks(self, bint calls_too) except -1
    cdef int _control(self, Peer peer, int kind, uint64_t id, bytes body, bint delimiter) except -1
    cdef int _send(self, Peer peer, Parcel *parcel, bint delimiter) except -1
    cdef int _note_unsent(self, Peer peer, int code, uint64_t n_messages) except -1
    cdef bint _may_hold(self, Request request, Parcel *parcel) noexcept
    cdef int _hold(self, Peer peer, Parcel *parcel) except -1
    cdef int _flush_held(self) except -1
    cdef int _prune(self, int64_t now) except -1
    cdef int _unlock(self) except -1
