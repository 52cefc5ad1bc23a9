"""A socket that is driven by the threads that wait on it: see ``_led_socket.pyx``."""

from libc.stdint cimport int64_t, uint64_t

from zmqcore._outbox cimport Outbox
from zmqcore._socket cimport SharedSocket, Waiter, Wakes

# While nothing comes, a leader calls hear_nothing() this often, in ns.
cdef int64_t SILENCE

# How one who waits polls without blocking first.
cdef struct Spin:
    int64_t began               # when it has begun to; 0 before that
    int64_t budget              # for how long, in ns, it does so
    uint64_t received           # n_received_bytes then
    bint unjudged               # whether that was right is not known yet

cdef class LedSocket:
    cdef SharedSocket shared    # its lock guards all that follows
    cdef Outbox outbox          # small messages that are to leave together
    cdef Waiter leader          # of the thread that polls the socket
    cdef bint watched           # the leader is in poll(2): senders must keep the edge-trigger rule
    cdef dict followers         # Waiter -> None, in order of arrival: whose threads are parked
    cdef Wakes owed             # whose waits are over: woken when the lock is released, best without the GIL
    cdef list due               # for call_back(), outside the lock
    cdef Py_ssize_t inside      # threads between waiting and leaving
    cdef uint64_t n_received_bytes

    cdef int drain(self) except -1
    cdef int hear_nothing(self) except -1
    cdef int call_back(self, list due) except -1

    cdef int lead_or_follow(self, Waiter waiter, int64_t deadline) except -1
    cdef int end_wait(self, Waiter waiter) except -1
    cdef int _poll(self, Waiter waiter, int64_t deadline, Spin *spin) except -1
    cdef int _judge(self, Spin *spin) except -1
    cdef int _park(self, Waiter waiter, int64_t deadline) except -1
    cdef int _promote(self) except -1
    cdef int _step_out(self, Waiter waiter) except -1
