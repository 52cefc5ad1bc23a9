# cython: language_level=3, embedsignature=True, auto_pickle=False, freethreading_compatible=True
"""Which of many requests is due first: a binary heap without an object for each entry."""

cimport cython
from cpython.mem cimport PyMem_RawFree, PyMem_RawRealloc
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint64_t

__all__ = ["Deadlines"]


@cython.final
cdef class Deadlines:
    """Deadlines of numbered requests, the earliest one first; those of the same time in the order of their numbers.

    Not thread-safe: a channel has it under its lock. push() and pop() cost O(log n), and O(1) where deadlines come in
    order.

    Invariant: no entry is before its parent, ``heap[(i - 1) // 2]``.
    """

    def __dealloc__(self):
        PyMem_RawFree(self.heap)

    def __len__(self) -> int:
        return self.n

    @property
    def first(self) -> tuple[int, int] | None:
        """The earliest deadline and whose it is; None without any."""
        return (self.heap[0].deadline, self.heap[0].id) if self.n else None

    cpdef int push(self, int64_t deadline, uint64_t id) except -1:
        """Add the deadline of request ``id``."""
        cdef Py_ssize_t i = self.n, parent
        cdef Due due
        cdef Due *grown
        due.deadline = deadline
        due.id = id
        if self.n == self.room:
            grown = <Due *>PyMem_RawRealloc(self.heap, <size_t>(2 * self.room + 64) * sizeof(Due))
            if grown == NULL:
                raise MemoryError()
            self.heap = grown
            self.room = 2 * self.room + 64
        self.n += 1
        while i > 0:
            parent = (i - 1) >> 1
            if not _before(&due, &self.heap[parent]):
                break
            self.heap[i] = self.heap[parent]
            i = parent
        self.heap[i] = due
        return 0

    cpdef int pop(self) except -1:
        """Take out the first one. Raises IndexError if there is none."""
        cdef Py_ssize_t i = 0, child = 1
        cdef Due last
        if self.n == 0:
            raise IndexError("there is no deadline")
        self.n -= 1
        last = self.heap[self.n]
        while child < self.n:
            if child + 1 < self.n and _before(&self.heap[child + 1], &self.heap[child]):
                child += 1
            if not _before(&self.heap[child], &last):
                break
            self.heap[i] = self.heap[child]
            i = child
            child = 2 * i + 1
        self.heap[i] = last
        return 0


cdef bint _before(Due *one, Due *other) noexcept nogil:
    return one.deadline < other.deadline or (one.deadline == other.deadline and one.id < other.id)
