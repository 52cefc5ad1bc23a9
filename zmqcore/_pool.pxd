"""The pool and its records: see ``_pool.pyx``."""

cimport cython
from libc.stdint cimport int64_t, uint64_t

from zmqcore._channel cimport Channel

cdef class Slot:
    cdef readonly Channel channel
    cdef Py_ssize_t users
    cdef int64_t last_used

cdef class ChannelPool:
    cdef dict slots             # endpoint -> Slot, least recently used first
    cdef cython.pymutex lock    # guards the table and the counters; never held while a socket is opened or closed
    cdef object connect         # makes a channel to an endpoint
    cdef object probe           # says why an endpoint cannot be reached
    cdef object room            # threading.Condition: signalled when a slot is freed
    cdef readonly Py_ssize_t max_sockets
    cdef Py_ssize_t reserved    # channels that are being made
    cdef int64_t idle_ttl_ns, max_lifetime_ns, connect_timeout_ns
    cdef bint closed
    cdef uint64_t generation
    cdef uint64_t n_opened, n_reused, n_evicted, n_expired, n_lost, n_waits, n_unreachable
    cdef int _check(self) except -1
    cpdef Channel acquire_open(self, str endpoint)
    cpdef release(self, Channel channel)
