"""Which messages with an identity have come already: see ``_duplicates.pyx``."""

from libc.stdint cimport int64_t, uint64_t

cdef class Sender:
    cdef uint64_t name
    cdef uint64_t highest       # sequence number
    cdef uint64_t[129] taken    # WINDOW_WORDS of them; one bit per sequence number: it has come
    cdef uint64_t[129] finished
    cdef dict again             # sequence number -> requests that have come again before the first one was finished
    cdef int64_t last_seen
    cdef bint take(self, uint64_t sequence) noexcept
    cdef bint is_finished(self, uint64_t sequence) noexcept
    cdef int finish(self, uint64_t sequence) noexcept
    cdef int note_again(self, uint64_t sequence, request) except -1
    cdef int _advance(self, uint64_t sequence) noexcept
    cdef bint _is_known(self, uint64_t sequence) noexcept

cdef class Senders:
    cdef dict by_name
    cdef Sender last            # the one that was asked for last
    cdef Sender find(self, uint64_t name)
    cdef int forget(self, int64_t silent_for) except -1
