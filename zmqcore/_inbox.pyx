# cython: language_level=3, embedsignature=True, auto_pickle=False, freethreading_compatible=True
"""What comes to a ROUTER socket, one envelope at a time: the parts of a message put together, and envelopes that share
a part told apart.

The lock of the socket is held throughout.
"""

cimport cython
from libc.errno cimport EAGAIN
from libc.stddef cimport size_t

from zmqcore._frame cimport Header, envelope_share, envelope_take, is_over, parse_header, parse_part, part_take
from zmqcore._libzmq cimport libzmq
from zmqcore._socket cimport SharedSocket

__all__ = ["Inbox"]


@cython.final
cdef class Inbox:
    """Take envelopes from ``shared``. Of a message over ``max_bytes`` or ``max_buffers`` no buffers are kept."""

    def __cinit__(self):
        libzmq.msg_init(&self.routing_id)
        libzmq.msg_init(&self.part)

    def __init__(self, SharedSocket shared not None, max_bytes: int, max_buffers: int):
        self.shared = shared
        self.max_bytes = max_bytes
        self.max_buffers = max_buffers

    def __dealloc__(self):
        libzmq.msg_close(&self.routing_id)
        libzmq.msg_close(&self.part)

    cdef int take(self) except -1:
        """Take the next envelope, or what is none. Return 0, or EAGAIN if there is nothing."""
        self.envelope = None
        self.n_buffers = 0
        if self.at < self.size:
            return self._take_next()
        if self.shared.receive(&self.routing_id) == EAGAIN:
            return EAGAIN
        self.delimiter = False
        if not libzmq.msg_more(&self.routing_id):
            return 0
        self.shared.receive_rest(&self.part)
        if libzmq.msg_size(&self.part) == 0 and libzmq.msg_more(&self.part):
            self.delimiter = True
            self.shared.receive_rest(&self.part)
        return self._open_part()

    cdef int _open_part(self) except -1:
        """Take the first envelope of a part that has come."""
        cdef Header header
        cdef size_t size = libzmq.msg_size(&self.part)
        cdef bint more = libzmq.msg_more(&self.part)
        cdef const char *problem = parse_part(<const unsigned char *>libzmq.msg_data(&self.part), size, &header)
        if problem != NULL or (more and header.n_bytes < size):
            return self._skip()
        if header.n_bytes < size:
            self.at = 0
            self.size = size
            return self._take_next()
        self.envelope = envelope_take(&self.part, &header)
        return self._take_buffers() if more else 0

    cdef int _take_next(self) except -1:
        """Take the next envelope of a part that holds several. They were looked at when it came."""
        cdef Header header
        parse_header(<const unsigned char *>libzmq.msg_data(&self.part) + self.at, self.size - self.at, &header)
        self.envelope = envelope_share(&self.part, self.at, &header)
        self.at += header.n_bytes
        if self.at == self.size:
            libzmq.msg_close(&self.part)
            libzmq.msg_init(&self.part)
        return 0

    cdef int _take_buffers(self) except -1:
        """Receive the parts behind the envelope's own. Over a limit the rest is dropped part by part."""
        cdef Envelope envelope = self.envelope
        cdef list buffers = []
        cdef bint more = True
        while more:
            self.shared.receive_rest(&self.part)
            more = libzmq.msg_more(&self.part)
            envelope.n_bytes += libzmq.msg_size(&self.part)
            self.n_buffers += 1
            if len(buffers) < envelope.header.n_buffers and len(buffers) < self.max_buffers \
                    and not is_over(&envelope.header, envelope.n_bytes, self.max_bytes):
                buffers.append(part_take(&self.part))
        envelope.buffers = buffers
        return 0

    cdef int _skip(self) except -1:
        """Drop what is left of a message."""
        while libzmq.msg_more(&self.part):
            self.shared.receive_rest(&self.part)
        return 0
