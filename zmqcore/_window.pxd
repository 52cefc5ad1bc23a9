"""What a channel has sent and its peer has not acknowledged: see ``_window.pyx``."""

from libc.stddef cimport size_t
from libc.stdint cimport uint64_t

cdef class Window:
    cdef readonly uint64_t max_messages, max_bytes
    cdef uint64_t sent_id, acked_id         # the ids of the last message that was sent, and that was acknowledged
    cdef uint64_t sent_bytes, acked_bytes   # of all up to these
    cdef uint64_t *sent_bytes_at            # owned ring: sent_bytes after message id, at id % max_messages

    cdef uint64_t n_messages(self) noexcept
    cdef uint64_t n_bytes(self) noexcept
    cdef bint has_room(self, size_t size) noexcept
    cdef int send(self, size_t size) noexcept
    cdef int acknowledge(self, uint64_t id) noexcept
    cdef int empty(self) noexcept
