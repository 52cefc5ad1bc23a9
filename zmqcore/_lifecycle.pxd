"""What becomes of a pool's channels: see ``_lifecycle.pyx``."""

from libc.stdint cimport int64_t

from zmqcore._table cimport Table

cdef class Lifecycle:
    cdef Table table
    cdef object connect, resolve, probe, maintenance
    cdef readonly Py_ssize_t max_sockets
    cdef double idle_ttl_ns
    cdef int64_t max_lifetime_ns, connect_timeout_ns, drain_timeout_ns

    cdef int _pump(self) except -1
    cdef int _maintain_later(self, Table table) except -1
