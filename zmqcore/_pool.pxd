"""The pool of channels: see ``_pool.pyx``."""

from libc.stdint cimport int64_t, uint64_t

from zmqcore._channel cimport Channel
from zmqcore._lifecycle cimport Lifecycle
from zmqcore._table cimport Slot

cdef class ChannelPool(Lifecycle):
    cdef object __weakref__
    cdef object clock
    cdef dict holders               # weak references; the values are None
    cdef readonly Py_ssize_t max_sockets_per_endpoint, max_waiting
    cdef int64_t acquire_timeout_ns
    cdef set pinned

    cdef int _count_out(self, Slot slot) except -1
    cdef tuple _acquire_within(self, str endpoint, timeout)
    cdef Channel _touch_open(self, str endpoint)
    cdef int _count_unused(self) except -1
    cpdef Channel acquire_open(self, str endpoint)
    cpdef release(self, Channel channel)
