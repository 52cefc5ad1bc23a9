"""What comes to a ROUTER socket, one envelope at a time: see ``_inbox.pyx``."""

from libc.stddef cimport size_t

from zmqcore._frame cimport Envelope
from zmqcore._libzmq cimport zc_msg_t
from zmqcore._socket cimport SharedSocket

cdef class Inbox:
    cdef SharedSocket shared        # its lock guards all that follows
    cdef size_t max_bytes
    cdef Py_ssize_t max_buffers
    # Of what has been taken last:
    cdef Envelope envelope          # None: it was none
    cdef Py_ssize_t n_buffers       # how many parts came behind it; all are kept in ``envelope`` or, over a limit, none
    cdef zc_msg_t routing_id        # whom it came from
    cdef bint delimiter             # an empty part came before it
    # The part that it came in may hold more:
    cdef zc_msg_t part
    cdef size_t at, size            # where the next one begins, and the end

    cdef int take(self) except -1
    cdef int _open_part(self) except -1
    cdef int _take_next(self) except -1
    cdef int _take_buffers(self) except -1
    cdef int _skip(self) except -1
