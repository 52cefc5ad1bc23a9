"""The pool of channels: see ``_pool.pyx``."""

from libc.stdint cimport int64_t, uint64_t

from zmqcore._channel cimport Channel
from zmqcore._retention cimport Lane
from zmqcore._table cimport Slot, Table

cdef class ChannelPool:
    cdef object __weakref__
    cdef Table table
    cdef object connect, probe, maintenance, clock
    cdef object holders             # a WeakSet; None if there are none
    cdef readonly Py_ssize_t max_sockets, max_sockets_per_endpoint, max_waiting
    cdef double idle_ttl_ns
    cdef int64_t max_lifetime_ns, connect_timeout_ns, acquire_timeout_ns, drain_timeout_ns
    cdef set pinned

    cdef int _maintain_later(self, Table table) except -1
    cdef int _pump(self) except -1
    cdef int _count_out(self, Slot slot) except -1
    cdef Channel _touch_open(self, str endpoint)
    cdef int _count_unused(self) except -1
    cdef uint64_t _send_now(
        self, str endpoint, str kind, bytes topic, str method, body, list buffers, bytes metadata, int codec,
        Lane lane) except? 0
    cpdef Channel acquire_open(self, str endpoint)
    cpdef release(self, Channel channel)
