"""What is due first: see ``_deadlines.pyx``."""

from libc.stdint cimport int64_t, uint64_t

cdef struct Due:
    int64_t deadline
    uint64_t id

cdef class Deadlines:
    cdef Due *heap              # owned array of ``room``
    cdef readonly Py_ssize_t n
    cdef Py_ssize_t room
    cpdef int push(self, int64_t deadline, uint64_t id) except -1
    cpdef int pop(self) except -1
