# cython: language_level=3, embedsignature=True, auto_pickle=False, freethreading_compatible=True
"""The window: what a channel has sent and its peer has not acknowledged, and how much that may be.

Messages count up from 1, and are acknowledged cumulatively. Invariant: acked_id <= sent_id <= acked_id + max_messages;
sent_bytes - acked_bytes is what the messages between them have together.
"""

cimport cython
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from libc.stddef cimport size_t
from libc.stdint cimport uint64_t

from zmqcore import options

__all__ = ["Window"]

# The largest one in messages. A port's libzmq holds 10,000 messages of a connection that nobody takes (its RCVHWM);
# with more it reads nothing, not even heartbeats, and a busy server would be lost.
cdef int MOST_MESSAGES = 8192
# Bytes are counted by 64 bits.
cdef uint64_t MOST_BYTES = <uint64_t>1 << 62


@cython.final
@cython.no_gc
cdef class Window:
    """At most ``max_messages`` and ``max_bytes``; but one message of any size if there is no other."""

    def __init__(self, max_messages, max_bytes):
        self.max_messages = options.whole("window_messages", max_messages, 1, MOST_MESSAGES)
        self.max_bytes = options.whole("window_bytes", max_bytes, 1, MOST_BYTES)
        self.sent_bytes_at = <uint64_t *>PyMem_RawMalloc(<size_t>max_messages * sizeof(uint64_t))
        if self.sent_bytes_at == NULL:
            raise MemoryError()

    def __dealloc__(self):
        PyMem_RawFree(self.sent_bytes_at)

    cdef uint64_t n_messages(self) noexcept:
        return self.sent_id - self.acked_id

    cdef uint64_t n_bytes(self) noexcept:
        return self.sent_bytes - self.acked_bytes

    cdef bint has_room(self, size_t size) noexcept:
        """Whether a message of ``size`` bytes may be sent."""
        cdef uint64_t held = self.sent_bytes - self.acked_bytes
        return self.sent_id - self.acked_id < self.max_messages and (held == 0 or held + size <= self.max_bytes)

    cdef int send(self, size_t size) noexcept:
        """The next message, of ``size`` bytes, has been sent."""
        self.sent_id += 1
        self.sent_bytes += size
        self.sent_bytes_at[self.sent_id % self.max_messages] = self.sent_bytes
        return 0

    cdef int acknowledge(self, uint64_t id) noexcept:
        """All up to ``id``, which has been sent and not been acknowledged, is acknowledged."""
        self.acked_id = id
        self.acked_bytes = self.sent_bytes_at[id % self.max_messages]
        return 0

    cdef int empty(self) noexcept:
        """Nothing more will be acknowledged."""
        self.acked_id = self.sent_id
        self.acked_bytes = self.sent_bytes
        return 0
