"""The envelope for the other compiled modules: see ``_frame.pyx`` for what each function promises."""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from zmqcore._libzmq cimport zc_msg_t

cdef enum Kind:
    KIND_CALL = 1
    KIND_CAST = 2
    KIND_FANOUT = 3
    KIND_REPLY = 4
    KIND_ERROR = 5
    KIND_ACK = 6
    KIND_PING = 7
    KIND_PONG = 8
    KIND_HELLO = 9
    KIND_GOODBYE = 10
    KIND_CANCEL = 11
    KIND_ITEM = 12
    KIND_CREDIT = 13
    KIND_LAST = 13

cdef enum:
    HEADER_BYTES = 40
    FLAG_FLOW = 1
    FLAG_IDENTIFIED = 2
    FLAG_PROMPT = 4
    IDENTITY_BYTES = 16
    NO_DEADLINE = 0xFFFFFFFF
    INITIAL_CREDIT = 32     # items that may be sent before the caller has granted any; part of the protocol
    # The payload of a message is its body and buffers. Part of the protocol, too: what it may have besides, which is
    # header, topic, method and metadata; and the payload that is assumed of who has not said what it takes.
    ENVELOPE_ROOM = 1 << 18
    ASSUMED_BYTES = 1 << 28
    ASSUMED_BUFFERS = 1024

cdef struct Header:
    uint8_t kind
    uint8_t flags
    uint8_t codec
    uint16_t n_buffers
    uint64_t id
    uint64_t ack
    uint32_t remaining_ms
    uint16_t topic_bytes
    uint16_t method_bytes
    uint32_t metadata_bytes
    uint32_t body_bytes
    size_t n_bytes          # of the header and what follows it, as the lengths say; set by parse_header()

cdef inline void header_begin(Header *header, int kind, int flags, uint64_t id) noexcept nogil:
    """Fill in the header of a message that carries nothing yet, and has no deadline."""
    header.kind = kind
    header.flags = flags
    header.codec = 0
    header.n_buffers = 0
    header.id = id
    header.ack = 0
    header.remaining_ms = NO_DEADLINE
    header.topic_bytes = header.method_bytes = 0
    header.metadata_bytes = header.body_bytes = 0

cdef inline Py_ssize_t identity_bytes(const Header *header) noexcept nogil:
    """Return how many bytes of the metadata are the message's identity, and not the user's."""
    return IDENTITY_BYTES if header.flags & FLAG_IDENTIFIED else 0

cdef inline size_t payload_bytes(const Header *header, size_t n_bytes) noexcept nogil:
    """Return how many of a message's ``n_bytes`` are body and buffers."""
    return n_bytes - HEADER_BYTES - header.topic_bytes - header.method_bytes - header.metadata_bytes

cdef inline bint is_over(const Header *header, size_t n_bytes, size_t max_bytes) noexcept nogil:
    """Whether a message of ``n_bytes`` has a payload of more than ``max_bytes``, or far too much besides."""
    return n_bytes > max_bytes and (
        payload_bytes(header, n_bytes) > max_bytes or n_bytes - max_bytes > ENVELOPE_ROOM)

cdef struct Parcel:
    # A message on its way out. Owned by whoever packed it until parcel_send or parcel_close.
    zc_msg_t head
    zc_msg_t *parts         # owned array of n_parts messages; NULL when there are none
    Py_ssize_t n_parts
    size_t n_bytes          # of the head and all parts
    bint prompt             # see parcel_hurry()
    unsigned char *header   # borrowed: into head, valid until head is sent

cdef const char *parse_header(const unsigned char *data, size_t size, Header *header) noexcept nogil
cdef const char *parse_part(const unsigned char *data, size_t size, Header *header) noexcept nogil

cdef int parcel_pack(
    Parcel *parcel, Header *header, bytes topic, method, bytes metadata, body, buffers,
    size_t max_bytes, Py_ssize_t max_buffers
) except -1
cdef int parcel_pack_control(Parcel *parcel, Header *header, const void *body) except -1
cdef void parcel_set_id(Parcel *parcel, uint64_t id) noexcept nogil
cdef void parcel_set_ack(Parcel *parcel, uint64_t ack) noexcept nogil
cdef void parcel_set_remaining(Parcel *parcel, uint32_t remaining_ms) noexcept nogil
cdef void parcel_hurry(Parcel *parcel) noexcept nogil
cdef void parcel_set_identity(Parcel *parcel, uint64_t sender, uint64_t sequence) noexcept nogil
cdef int parcel_share(Parcel *parcel, Parcel *other) except -1
cdef int parcel_copy(Parcel *parcel, Parcel *other) except -1
cdef int parcel_send(Parcel *parcel, void *socket) noexcept nogil
cdef void parcel_close(Parcel *parcel) noexcept nogil

cdef int release_sent_buffers() except -1
cdef bint sent_buffers_returned() noexcept nogil
cdef bint sent_buffers_held() noexcept nogil

cdef class Envelope:
    cdef zc_msg_t head
    cdef Header header
    cdef const unsigned char *data      # borrowed: into head
    cdef readonly list buffers          # read-only memoryviews, one per out-of-band buffer
    cdef readonly size_t n_bytes        # of all parts together
    cdef readonly object stream         # the Pending whose items are to come; else None
    cdef bint read_identity(self, uint64_t *sender, uint64_t *sequence) noexcept

cdef Envelope envelope_of_stream(object pending, const Header *header)
cdef Envelope envelope_take(zc_msg_t *head, const Header *header)
cdef Envelope envelope_share(zc_msg_t *part, size_t at, const Header *header)
cdef object part_take(zc_msg_t *part)
cdef Py_ssize_t bytes_of(buffers) except -1
cdef str excess_of(const Header *header, size_t n_bytes, size_t max_bytes, Py_ssize_t max_buffers)

cdef bytes hello_pack(bytes instance, size_t max_bytes, size_t max_buffers)
cdef bint hello_read(Envelope envelope, size_t *max_bytes, Py_ssize_t *max_buffers) noexcept
