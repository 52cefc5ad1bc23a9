"""Small messages that leave a socket together: see ``_outbox.pyx``."""

from libc.stddef cimport size_t
from libc.stdint cimport uint64_t

from zmqcore._libzmq cimport zc_msg_t
from zmqcore._socket cimport SharedSocket

cdef enum:
    BATCH_BYTES = 65536             # the longest part that holds several envelopes; everybody takes as much
    MOST_HELD_BYTES = 16384         # what is longer goes by itself
    MOST_HELD_MESSAGES = 512        # less than a window has: the port acknowledges what it has seen

cdef extern from *:
    """
    #ifndef ZC_HELD
    #define ZC_HELD
    /* An outbox in the list of those that hold something. */
    typedef struct zc_held {
        struct zc_held *next;
        void *outbox;
        int listed;
        int counted;
    } zc_held;
    #endif
    """
    ctypedef struct zc_held:
        void *outbox
        int listed
        int counted

cdef class Outbox:
    cdef SharedSocket shared        # its lock guards all that follows
    cdef zc_held held
    cdef unsigned char *data        # owned: the envelopes that are held, one behind the other
    cdef size_t n_bytes, capacity
    cdef size_t given               # the capacity of what libzmq was given last, until there is other memory
    cdef int n_messages
    cdef unsigned char[255] routing_id      # of whom they are for, on a ROUTER
    cdef size_t routing_bytes
    cdef int watcher_fd             # of the Waiter of who is in poll(2) on the socket, or -1: see _flush_held()
    cdef int failed                 # libzmq's errno, when what was held could not be sent, and was dropped ...
    cdef uint64_t n_failed          # ... and how many messages that were, until somebody has taken note
    cdef readonly uint64_t n_batches, n_batched

    cdef bint takes(self, size_t size) noexcept nogil
    cdef int address(self, const char *routing_id, size_t size) noexcept
    cdef int add(self, const unsigned char *envelope, size_t size) except -1
    cdef int flush(self) noexcept nogil
    cdef int close(self) except -1
    cdef bint _pack(self, zc_msg_t *head, zc_msg_t *body) noexcept nogil
    cdef int _grow(self, size_t size) except -1
