# cython: language_level=3, embedsignature=True, auto_pickle=False, freethreading_compatible=True
"""The envelope: packed straight into libzmq's message memory, parsed by offset without making a Python object.

One envelope is one ZeroMQ message part, followed by one part for each out-of-band buffer. Envelopes without such
buffers may share a part, one right behind the other: their lengths tell where the next one begins. An envelope:

====== ===== ==================================================================================
offset bytes field (all integers little-endian, unsigned)
====== ===== ==================================================================================
0      2     magic, ``7A 43`` ("zC")
2      1     version, 1
3      1     kind, see :data:`KINDS`
4      1     flags; bit 0 ``FLOW``: the sender counts on acknowledgements and a hello;
             bit 1 ``IDENTIFIED``: the metadata begin with the message's identity;
             bit 2 ``PROMPT``: the answer is not to wait for others to leave with
5      1     codec of the body; 0 for none
6      2     number of out-of-band buffers, each one further part
8      8     id: counts the messages of one channel from 1; a reply repeats the id of its request
16     8     ack: highest id that the receiver has taken, all lower ones included; 0 for none
24     4     remaining time in ms; ``FFFFFFFF`` for no deadline
28     2     length of the topic (T)
30     2     length of the method (M)
32     4     length of the metadata (D)
36     4     length of the body (B)
40     …     topic (UTF-8), method (UTF-8), metadata, body; 40 + T + M + D + B is the size of the envelope
====== ===== ==================================================================================

The identity is 16 bytes, part of D: the sender, 8 bytes, and the message's sequence number there, 8 bytes.

``docs/reference/protocol.md`` is the specification; ``tests/frame/vectors`` has examples as files.
"""

cimport cython
from cpython.buffer cimport (
    PyBUF_SIMPLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer,
)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from cpython.unicode cimport PyUnicode_AsUTF8AndSize
from libc.errno cimport EINTR
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from zmqcore._libzmq cimport ZMQ_DONTWAIT, ZMQ_SNDMORE, libzmq, zc_msg_t

from zmqcore import errors

cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>

    /* Little-endian loads and stores: memcpy is a single move. Put together of bytes they were not always: gcc 12 made
       90 instructions of two stores side by side. */
    #if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    #define ZC_LITTLE(bits, v) __builtin_bswap##bits(v)
    #else
    #define ZC_LITTLE(bits, v) (v)
    #endif
    #define ZC_FIELD(bits) \
        static inline uint##bits##_t zc_load##bits(const unsigned char *p) { \
            uint##bits##_t v; \
            memcpy(&v, p, sizeof v); \
            return ZC_LITTLE(bits, v); \
        } \
        static inline void zc_store##bits(unsigned char *p, uint##bits##_t v) { \
            v = ZC_LITTLE(bits, v); \
            memcpy(p, &v, sizeof v); \
        }
    ZC_FIELD(16)
    ZC_FIELD(32)
    ZC_FIELD(64)

    /* One exported buffer that libzmq still reads. libzmq's I/O thread gives it back here by its free function,
       which must never need the GIL: it pushes onto a stack that a Python thread empties later. */
    typedef struct zc_pin { Py_buffer view; struct zc_pin *next; } zc_pin;
    static zc_pin *zc_returned;
    static int64_t zc_pinned_buffers, zc_pinned_bytes, zc_held_parts, zc_held_bytes;

    static void zc_return_pin(void *data, void *hint) {
        zc_pin *pin = (zc_pin *)hint;
        zc_pin *head = __atomic_load_n(&zc_returned, __ATOMIC_RELAXED);
        (void)data;
        do { pin->next = head; }
        while (!__atomic_compare_exchange_n(&zc_returned, &head, pin, 1, __ATOMIC_RELEASE, __ATOMIC_RELAXED));
    }
    static inline int zc_any_returned(void) { return __atomic_load_n(&zc_returned, __ATOMIC_RELAXED) != NULL; }
    /* Taking the whole stack at once leaves no ABA problem. */
    static inline zc_pin *zc_take_returned(void) { return __atomic_exchange_n(&zc_returned, NULL, __ATOMIC_ACQUIRE); }
    static inline void zc_count(int64_t *counter, int64_t n) { __atomic_fetch_add(counter, n, __ATOMIC_RELAXED); }
    static inline int64_t zc_counted(int64_t *counter) { return __atomic_load_n(counter, __ATOMIC_RELAXED); }
    """
    ctypedef struct zc_pin:
        Py_buffer view
        zc_pin *next
    int64_t zc_pinned_buffers, zc_pinned_bytes, zc_held_parts, zc_held_bytes
    uint16_t zc_load16(const unsigned char *) noexcept nogil
    uint32_t zc_load32(const unsigned char *) noexcept nogil
    uint64_t zc_load64(const unsigned char *) noexcept nogil
    void zc_store16(unsigned char *, uint16_t) noexcept nogil
    void zc_store32(unsigned char *, uint32_t) noexcept nogil
    void zc_store64(unsigned char *, uint64_t) noexcept nogil
    void zc_return_pin(void *data, void *hint) noexcept nogil
    int zc_any_returned() noexcept nogil
    zc_pin *zc_take_returned() noexcept nogil
    void zc_count(int64_t *, int64_t) noexcept nogil
    int64_t zc_counted(int64_t *) noexcept nogil

__all__ = ["KINDS", "Envelope", "pack", "pinned", "split"]

#: The kinds of an envelope, by name.
KINDS = {
    "call": KIND_CALL, "cast": KIND_CAST, "fanout": KIND_FANOUT, "reply": KIND_REPLY, "error": KIND_ERROR,
    "ack": KIND_ACK, "ping": KIND_PING, "pong": KIND_PONG, "hello": KIND_HELLO, "goodbye": KIND_GOODBYE,
    "cancel": KIND_CANCEL, "item": KIND_ITEM, "credit": KIND_CREDIT,
}
# Their names by number; what is no kind has none.
cdef tuple _KIND_NAMES = ("", *sorted(KINDS, key=KINDS.__getitem__))

cdef unsigned char MAGIC_0 = 0x7A
cdef unsigned char MAGIC_1 = 0x43
cdef unsigned char VERSION = 1


# -- reading ----------------------------------------------------------------------------------------------

cdef const char *parse_header(const unsigned char *data, size_t size, Header *header) noexcept nogil:
    """Read the header at ``data``, of which ``size`` bytes are left, into ``header``.

    Return NULL, or why there is no envelope (a static string).
    """
    if size < HEADER_BYTES:
        return b"shorter than a header of 40 bytes"
    if data[0] != MAGIC_0 or data[1] != MAGIC_1:
        return b"no magic number at its start"
    if data[2] != VERSION:
        return b"of another protocol version than 1"
    header.kind = data[3]
    if header.kind < KIND_CALL or header.kind > KIND_LAST:
        return b"of an unknown kind"
    header.flags = data[4]
    header.codec = data[5]
    header.n_buffers = zc_load16(data + 6)
    header.id = zc_load64(data + 8)
    header.ack = zc_load64(data + 16)
    header.remaining_ms = zc_load32(data + 24)
    header.topic_bytes = zc_load16(data + 28)
    header.method_bytes = zc_load16(data + 30)
    header.metadata_bytes = zc_load32(data + 32)
    header.body_bytes = zc_load32(data + 36)
    # In 64 bits the sum of two 16-bit and two 32-bit lengths cannot overflow.
    header.n_bytes = <uint64_t>HEADER_BYTES + header.topic_bytes + header.method_bytes + header.metadata_bytes \
        + <uint64_t>header.body_bytes
    if header.n_bytes > size:
        return b"not as long as its own lengths add up to"
    if header.flags & FLAG_IDENTIFIED and header.metadata_bytes < IDENTITY_BYTES:
        return b"without the identity that its flags announce"
    return NULL


cdef const char *parse_part(const unsigned char *data, size_t size, Header *header) noexcept nogil:
    """Read the header of the first envelope of a message part. Return NULL, or why the part holds no envelopes.

    Of several that share the part all are looked at: it is good as a whole or not at all.
    """
    cdef Header next
    cdef size_t at
    cdef const char *problem = parse_header(data, size, header)
    if problem != NULL or header.n_bytes == size:
        return problem
    if header.n_buffers:
        return b"not as long as its own lengths add up to"
    at = header.n_bytes
    while at < size:
        if parse_header(data + at, size - at, &next) != NULL or next.n_buffers:
            return b"not as long as its own lengths add up to, and no further envelope follows"
        at += next.n_bytes
    return NULL


@cython.final
@cython.no_gc       # holds libzmq's memory and views of it: no reference cycle can pass through
cdef class _Part:
    """One received out-of-band buffer. Owns the ``zmq_msg_t``; memoryviews of it keep it alive."""

    cdef zc_msg_t message

    def __cinit__(self):
        libzmq.msg_init(&self.message)

    def __dealloc__(self):
        zc_count(&zc_held_parts, -1)
        zc_count(&zc_held_bytes, -<int64_t>libzmq.msg_size(&self.message))
        libzmq.msg_close(&self.message)

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, libzmq.msg_data(&self.message), libzmq.msg_size(&self.message), 1, flags)

    def __releasebuffer__(self, Py_buffer *view):
        pass


cdef object part_take(zc_msg_t *part):
    """Move ``part`` into a new object and return a read-only memoryview of it. ``part`` is left empty."""
    cdef _Part taken = _Part.__new__(_Part)
    libzmq.msg_move(&taken.message, part)
    zc_count(&zc_held_parts, 1)
    zc_count(&zc_held_bytes, libzmq.msg_size(&taken.message))
    return memoryview(taken)


@cython.final
@cython.no_gc       # its list holds memoryviews of _Part only: no reference cycle can pass through
@cython.freelist(64)
cdef class Envelope:
    """A received envelope. Owns its first part; its body is readable through the buffer protocol, without a copy.

    Immutable; safe to read from any thread. Made by channels and ports, or by :meth:`parse`.
    """

    def __cinit__(self):
        libzmq.msg_init(&self.head)
        self.buffers = None

    def __dealloc__(self):
        libzmq.msg_close(&self.head)

    @staticmethod
    def parse(parts) -> Envelope:
        """Return the envelope whose message parts are ``parts`` (a sequence of bytes-like objects; copied).

        Raises ProtocolError if they are not one, or more than one: see split(). For tests, tools, and programs with
        sockets of their own.
        """
        cdef zc_msg_t message
        cdef Header header
        cdef Envelope envelope = None
        cdef Py_buffer view
        cdef size_t size
        cdef const char *problem
        cdef list buffers = []
        if not parts:
            raise errors.ProtocolError("an envelope has at least one message part, not none")
        for part in parts:
            PyObject_GetBuffer(part, &view, PyBUF_SIMPLE)
            try:
                if libzmq.msg_init_size(&message, view.len) != 0:
                    raise MemoryError()
                if view.len:
                    memcpy(libzmq.msg_data(&message), view.buf, view.len)
            finally:
                PyBuffer_Release(&view)
            try:
                if envelope is None:
                    size = libzmq.msg_size(&message)
                    problem = parse_part(<const unsigned char *>libzmq.msg_data(&message), size, &header)
                    if problem != NULL:
                        raise errors.ProtocolError(f"message part of {size} bytes is {problem.decode()}")
                    if header.n_bytes != size:
                        raise errors.ProtocolError(
                            f"message part of {size} bytes holds several envelopes, the first of {header.n_bytes}")
                    envelope = envelope_take(&message, &header)
                else:
                    buffers.append(part_take(&message))
            finally:
                libzmq.msg_close(&message)
            if envelope is not None and buffers:
                envelope.n_bytes += len(buffers[-1])
        if len(buffers) != envelope.header.n_buffers:
            raise errors.ProtocolError(
                f"envelope announces {envelope.header.n_buffers} out-of-band buffers, but {len(buffers)} came")
        envelope.buffers = buffers
        return envelope

    def open(self, int codec, decoder) -> tuple | None:
        """Return ``(decoder.decode(self, buffers),)`` for a reply, or an item, whose body is of ``codec``; else None.

        In one step, as of most envelopes a client wants nothing else.
        """
        if self.header.codec != codec or self.stream is not None \
                or (self.header.kind != KIND_REPLY and self.header.kind != KIND_ITEM):
            return None
        return (decoder.decode(self, () if self.buffers is None else self.buffers),)

    @property
    def kind(self) -> str:
        """What the envelope is: a key of :data:`KINDS`; "" for one that was not received."""
        return _KIND_NAMES[self.header.kind if self.header.kind <= KIND_LAST else 0]

    @property
    def flags(self) -> int:
        """The flag bits as sent; unknown ones are kept."""
        return self.header.flags

    @property
    def codec(self) -> int:
        """The number of the body's codec; 0 for none."""
        return self.header.codec

    @property
    def id(self) -> int:
        """The message's number on its channel; a reply has that of its request."""
        return self.header.id

    @property
    def ack(self) -> int:
        """The highest id that the sender of this envelope has taken; 0 for none."""
        return self.header.ack

    @property
    def remaining_ms(self) -> int | None:
        """How many milliseconds were left when the envelope was sent; None for no deadline."""
        return None if self.header.remaining_ms == NO_DEADLINE else self.header.remaining_ms

    @property
    def topic(self) -> bytes:
        """The topic's canonical text, UTF-8."""
        return PyBytes_FromStringAndSize(<const char *>self.data + HEADER_BYTES, self.header.topic_bytes)

    @property
    def method(self) -> str:
        """The method's name. Bytes that are not UTF-8 show as escapes."""
        cdef const char *start = <const char *>self.data + HEADER_BYTES + self.header.topic_bytes
        return start[:self.header.method_bytes].decode("utf-8", "backslashreplace")

    @property
    def metadata(self) -> bytes:
        """The metadata's bytes, without the identity; empty for none."""
        cdef const char *start = (
            <const char *>self.data + HEADER_BYTES + self.header.topic_bytes + self.header.method_bytes)
        cdef Py_ssize_t own = identity_bytes(&self.header)
        return PyBytes_FromStringAndSize(start + own, self.header.metadata_bytes - own)

    @property
    def identity(self) -> tuple | None:
        """Who has sent the message first and its number there, as (sender, sequence); None if it carries none."""
        cdef uint64_t sender, sequence
        return (sender, sequence) if self.read_identity(&sender, &sequence) else None

    cdef bint read_identity(self, uint64_t *sender, uint64_t *sequence) noexcept:
        cdef const unsigned char *at = (
            self.data + HEADER_BYTES + self.header.topic_bytes + self.header.method_bytes)
        if not self.header.flags & FLAG_IDENTIFIED:
            return False
        sender[0] = zc_load64(at)
        sequence[0] = zc_load64(at + 8)
        return True

    @property
    def body(self) -> memoryview:
        """A read-only view of the body, without a copy; it keeps the envelope alive."""
        return memoryview(self)

    def __getbuffer__(self, Py_buffer *view, int flags):
        cdef size_t offset = (
            <size_t>HEADER_BYTES + self.header.topic_bytes + self.header.method_bytes + self.header.metadata_bytes)
        PyBuffer_FillInfo(view, self, <void *>(self.data + offset), self.header.body_bytes, 1, flags)

    def __releasebuffer__(self, Py_buffer *view):
        pass

    def __repr__(self) -> str:
        return (f"<Envelope {self.kind} id={self.id} topic={self.topic!r} method={self.method!r}"
                f" body={self.header.body_bytes} bytes, {self.header.n_buffers} buffers>")


cdef Envelope envelope_of_stream(object pending, const Header *header):
    """Return an envelope without contents that stands for a stream, which is the answer to a request."""
    cdef Envelope envelope = Envelope.__new__(Envelope)
    envelope.header = header[0]
    envelope.stream = pending
    return envelope


cdef Envelope envelope_take(zc_msg_t *head, const Header *header):
    """Move ``head``, whose parsed header is ``header``, into a new Envelope. ``head`` is left empty."""
    cdef Envelope envelope = Envelope.__new__(Envelope)
    libzmq.msg_move(&envelope.head, head)
    envelope.header = header[0]
    # Small messages live inside the zmq_msg_t itself, so the data is looked up after the move.
    envelope.data = <const unsigned char *>libzmq.msg_data(&envelope.head)
    envelope.n_bytes = libzmq.msg_size(&envelope.head)
    return envelope


cdef Envelope envelope_share(zc_msg_t *part, size_t at, const Header *header):
    """Return the envelope at offset ``at`` of a part that holds several, whose parsed header is ``header``."""
    cdef Envelope envelope = Envelope.__new__(Envelope)
    libzmq.msg_copy(&envelope.head, part)       # refers to the same memory: two headers are too long for another way
    envelope.header = header[0]
    envelope.data = <const unsigned char *>libzmq.msg_data(&envelope.head) + at
    envelope.n_bytes = header.n_bytes
    return envelope


cdef str excess_of(const Header *header, size_t n_bytes, size_t max_bytes, Py_ssize_t max_buffers):
    """Return what a message of ``n_bytes`` that was refused for a limit has, and what the limit is."""
    cdef size_t payload = payload_bytes(header, n_bytes)
    if payload <= max_bytes and header.n_buffers <= max_buffers:
        return f"envelope of {n_bytes - payload} bytes besides the body; the limit is {ENVELOPE_ROOM}"
    return (f"payload of {payload} bytes with {header.n_buffers} buffers; the limits are {max_bytes} and"
            f" {max_buffers}")


# -- hello: 16 bytes that name who says it, then what it takes: u64 bytes of a whole message, u32 buffers ---

cdef bytes hello_pack(bytes instance, size_t max_bytes, size_t max_buffers):
    """Return the body of a hello for a payload of at most ``max_bytes``, and so many buffers."""
    cdef unsigned char told[12]
    zc_store64(told, max_bytes + ENVELOPE_ROOM)
    zc_store32(told + 8, <uint32_t>min(max_buffers, <size_t>0xFFFFFFFF))
    return instance + told[:12]


cdef bint hello_read(Envelope envelope, size_t *max_bytes, Py_ssize_t *max_buffers) noexcept:
    """Set what the hello ``envelope`` says that a message may have; return False if it does not say that."""
    cdef const unsigned char *at = envelope.data + envelope.header.n_bytes - envelope.header.body_bytes
    cdef uint64_t told
    if envelope.header.body_bytes < 28:
        return False
    told = zc_load64(at + 16)
    max_bytes[0] = told - ENVELOPE_ROOM if told > ENVELOPE_ROOM else 0
    max_buffers[0] = zc_load32(at + 24)
    return True


# -- writing ----------------------------------------------------------------------------------------------

cdef inline void _store_header(unsigned char *data, const Header *header) noexcept nogil:
    data[0] = MAGIC_0
    data[1] = MAGIC_1
    data[2] = VERSION
    data[3] = header.kind
    data[4] = header.flags
    data[5] = header.codec
    zc_store16(data + 6, header.n_buffers)
    zc_store64(data + 8, header.id)
    zc_store64(data + 16, header.ack)
    zc_store32(data + 24, header.remaining_ms)
    zc_store16(data + 28, header.topic_bytes)
    zc_store16(data + 30, header.method_bytes)
    zc_store32(data + 32, header.metadata_bytes)
    zc_store32(data + 36, header.body_bytes)


cdef int parcel_pack_control(Parcel *parcel, Header *header, const void *body) except -1:
    """Pack a message of the protocol itself: no topic, no method, ``header.body_bytes`` bytes of ``body``."""
    cdef size_t size = <size_t>HEADER_BYTES + header.body_bytes
    if libzmq.msg_init_size(&parcel.head, size) != 0:
        raise MemoryError()
    parcel.parts = NULL
    parcel.n_parts = 0
    parcel.prompt = False
    parcel.n_bytes = size
    parcel.header = <unsigned char *>libzmq.msg_data(&parcel.head)
    header.n_buffers = header.topic_bytes = header.method_bytes = 0
    header.metadata_bytes = 0
    _store_header(parcel.header, header)
    if header.body_bytes:
        memcpy(parcel.header + HEADER_BYTES, body, header.body_bytes)
    return 0


cdef int parcel_pack(
    Parcel *parcel, Header *header, bytes topic, method, bytes metadata, body, buffers,
    size_t max_bytes, Py_ssize_t max_buffers
) except -1:
    """Pack an envelope into libzmq's memory; ``buffers`` go out of band without a copy.

    ``header`` gives kind, flags, codec, id, ack and remaining_ms; the lengths are filled in. ``method`` is a str,
    ``body`` bytes-like, ``buffers`` a list of C-contiguous bytes-like objects or None. On success the caller owns
    the parcel; on an error it is empty. Raises PayloadTooLarge over ``max_bytes`` of body and buffers together, over
    ``max_buffers`` buffers, and for what has far too much besides.
    """
    cdef Py_ssize_t method_bytes, n_buffers = 0
    cdef const char *method_text = PyUnicode_AsUTF8AndSize(method, &method_bytes)
    cdef Py_ssize_t topic_bytes = PyBytes_GET_SIZE(topic), metadata_bytes = PyBytes_GET_SIZE(metadata)
    cdef Py_buffer body_view
    cdef const char *body_data
    cdef Py_ssize_t body_bytes
    cdef bint exported = False
    cdef size_t size
    cdef unsigned char *at

    parcel.parts = NULL
    parcel.n_parts = 0
    parcel.prompt = False
    if buffers is not None:
        # A copy: releasing earlier buffers may run code that changes the caller's list.
        buffers = tuple(buffers)
        n_buffers = len(buffers)
        if n_buffers > max_buffers or n_buffers > 0xFFFF:
            raise errors.PayloadTooLarge(
                f"message has {n_buffers} out-of-band buffers; the limit is {min(max_buffers, 0xFFFF)}")
    if topic_bytes > 0xFFFF:
        raise errors.PayloadTooLarge(f"topic of {topic_bytes} bytes; the limit is 65535")
    if method_bytes > 0xFFFF:
        raise errors.PayloadTooLarge(f"method name of {method_bytes} bytes; the limit is 65535")
    if metadata_bytes > 0xFFFFFFFF:
        raise errors.PayloadTooLarge(f"metadata of {metadata_bytes} bytes; the limit is 4294967295")
    if isinstance(body, bytes):
        body_data = PyBytes_AS_STRING(body)
        body_bytes = PyBytes_GET_SIZE(body)
    else:
        PyObject_GetBuffer(body, &body_view, PyBUF_SIMPLE)
        exported = True
        body_data = <const char *>body_view.buf
        body_bytes = body_view.len
    try:
        size = <size_t>HEADER_BYTES + topic_bytes + method_bytes + metadata_bytes + body_bytes
        if body_bytes > 0xFFFFFFFF:
            raise errors.PayloadTooLarge(f"body of {body_bytes} bytes; the limit is 4294967295")
        if size > max_bytes:
            if <size_t>body_bytes > max_bytes:
                total = body_bytes + bytes_of(buffers)
                raise errors.PayloadTooLarge(f"payload of {total} bytes; the limit is {max_bytes}")
            if size - max_bytes > ENVELOPE_ROOM:
                size -= body_bytes
                raise errors.PayloadTooLarge(
                    f"envelope of {size} bytes besides the body; the limit is {ENVELOPE_ROOM}")
        if libzmq.msg_init_size(&parcel.head, size) != 0:
            raise MemoryError(f"no memory for a message of {size} bytes")
        header.n_buffers = <uint16_t>n_buffers
        header.topic_bytes = <uint16_t>topic_bytes
        header.method_bytes = <uint16_t>method_bytes
        header.metadata_bytes = <uint32_t>metadata_bytes
        header.body_bytes = <uint32_t>body_bytes
        at = parcel.header = <unsigned char *>libzmq.msg_data(&parcel.head)
        _store_header(at, header)
        at += HEADER_BYTES
        memcpy(at, PyBytes_AS_STRING(topic), topic_bytes)
        at += topic_bytes
        memcpy(at, method_text, method_bytes)
        at += method_bytes
        memcpy(at, PyBytes_AS_STRING(metadata), metadata_bytes)
        at += metadata_bytes
        memcpy(at, body_data, body_bytes)
    finally:
        if exported:
            PyBuffer_Release(&body_view)
    parcel.n_bytes = size
    if n_buffers:
        try:
            _pack_buffers(parcel, buffers, n_buffers, body_bytes, max_bytes)
        except BaseException:
            parcel_close(parcel)
            raise
    return 0


cdef int _pack_buffers(
    Parcel *parcel, buffers, Py_ssize_t n_buffers, size_t body_bytes, size_t max_bytes
) except -1:
    """Append each of ``buffers`` to the parcel as a part that reads the exporter's own memory."""
    cdef zc_pin *pin
    cdef zc_msg_t *part
    cdef size_t payload = body_bytes
    release_sent_buffers()
    parcel.parts = <zc_msg_t *>PyMem_RawMalloc(n_buffers * sizeof(zc_msg_t))
    if parcel.parts == NULL:
        raise MemoryError()
    for buffer in buffers:
        pin = <zc_pin *>PyMem_RawMalloc(sizeof(zc_pin))
        if pin == NULL:
            raise MemoryError()
        try:
            PyObject_GetBuffer(buffer, &pin.view, PyBUF_SIMPLE)
        except BaseException:
            PyMem_RawFree(pin)
            raise
        parcel.n_bytes += pin.view.len
        payload += pin.view.len
        part = &parcel.parts[parcel.n_parts]
        if payload > max_bytes or libzmq.msg_init_data(
                part, pin.view.buf, pin.view.len, zc_return_pin, pin) != 0:
            PyBuffer_Release(&pin.view)
            PyMem_RawFree(pin)
            if payload > max_bytes:
                payload = body_bytes + bytes_of(buffers)
                raise errors.PayloadTooLarge(f"payload of {payload} bytes; the limit is {max_bytes}")
            raise MemoryError()
        zc_count(&zc_pinned_buffers, 1)
        zc_count(&zc_pinned_bytes, pin.view.len)
        parcel.n_parts += 1
    return 0


cdef Py_ssize_t bytes_of(buffers) except -1:
    """Return how many bytes ``buffers`` have together; 0 for None."""
    cdef Py_ssize_t total = 0
    if buffers is not None:
        for buffer in buffers:
            total += len(buffer) if isinstance(buffer, bytes) else memoryview(buffer).nbytes
    return total


cdef int release_sent_buffers() except -1:
    """Release the exports of all buffers that libzmq has finished with since the last time. Needs the GIL.

    That may run destructors, which are user code: not to be called under a lock.
    """
    cdef zc_pin *pin
    cdef zc_pin *rest
    if not zc_any_returned():
        return 0
    rest = zc_take_returned()
    while rest != NULL:
        pin = rest
        rest = pin.next
        zc_count(&zc_pinned_buffers, -1)
        zc_count(&zc_pinned_bytes, -pin.view.len)
        PyBuffer_Release(&pin.view)
        PyMem_RawFree(pin)
    return 0


cdef bint sent_buffers_returned() noexcept nogil:
    """Return whether release_sent_buffers() has something to do."""
    return zc_any_returned() != 0


cdef bint sent_buffers_held() noexcept nogil:
    """Return whether libzmq still reads buffers of this process, or has returned some that are not released."""
    return zc_counted(&zc_pinned_buffers) != 0


cdef void parcel_set_id(Parcel *parcel, uint64_t id) noexcept nogil:
    zc_store64(parcel.header + 8, id)


cdef void parcel_set_ack(Parcel *parcel, uint64_t ack) noexcept nogil:
    zc_store64(parcel.header + 16, ack)


cdef void parcel_set_remaining(Parcel *parcel, uint32_t remaining_ms) noexcept nogil:
    zc_store32(parcel.header + 24, remaining_ms)


cdef void parcel_hurry(Parcel *parcel) noexcept nogil:
    """Neither the parcel nor what answers it is to wait for others to leave with."""
    parcel.prompt = True
    parcel.header[4] |= FLAG_PROMPT


cdef void parcel_set_identity(Parcel *parcel, uint64_t sender, uint64_t sequence) noexcept nogil:
    """Write the identity of a parcel that was packed with room for it at the beginning of its metadata."""
    cdef unsigned char *at = (
        parcel.header + HEADER_BYTES + zc_load16(parcel.header + 28) + zc_load16(parcel.header + 30))
    zc_store64(at, sender)
    zc_store64(at + 8, sequence)


cdef int parcel_share(Parcel *parcel, Parcel *other) except -1:
    """Make ``parcel`` refer to the memory of ``other``: both are valid until closed, neither is written any more."""
    cdef Py_ssize_t i
    libzmq.msg_init(&parcel.head)
    parcel.parts = NULL
    parcel.n_parts = 0
    parcel.prompt = False
    parcel.n_bytes = other.n_bytes
    if other.n_parts:
        parcel.parts = <zc_msg_t *>PyMem_RawMalloc(other.n_parts * sizeof(zc_msg_t))
        if parcel.parts == NULL:
            raise MemoryError()
        for i in range(other.n_parts):
            libzmq.msg_init(&parcel.parts[i])
            libzmq.msg_copy(&parcel.parts[i], &other.parts[i])
        parcel.n_parts = other.n_parts
    libzmq.msg_copy(&parcel.head, &other.head)
    parcel.header = <unsigned char *>libzmq.msg_data(&parcel.head)
    return 0


cdef int parcel_copy(Parcel *parcel, Parcel *other) except -1:
    """As parcel_share(), but with a header part of its own, which can be written: for another id."""
    cdef size_t size = libzmq.msg_size(&other.head)
    parcel_share(parcel, other)
    libzmq.msg_close(&parcel.head)
    if libzmq.msg_init_size(&parcel.head, size) != 0:
        libzmq.msg_init(&parcel.head)
        parcel_close(parcel)
        raise MemoryError(f"no memory for a message of {size} bytes")
    parcel.header = <unsigned char *>libzmq.msg_data(&parcel.head)
    memcpy(parcel.header, libzmq.msg_data(&other.head), size)
    return 0


cdef int parcel_send(Parcel *parcel, void *socket) noexcept nogil:
    """Send all parts without blocking. Return 0, or libzmq's errno.

    On 0 the parcel is empty. On an errno the caller still owns what is left: if nothing had been sent, the whole
    parcel, which can be sent again; else (``header`` is NULL then) a torn rest that can only be closed, and the
    connection has gone.
    """
    cdef Py_ssize_t i
    cdef int flags = ZMQ_DONTWAIT | ZMQ_SNDMORE if parcel.n_parts else ZMQ_DONTWAIT
    # A signal may end even a send that does not block; a message that stops half way would swallow the next one.
    while libzmq.msg_send(&parcel.head, socket, flags) < 0:
        if libzmq.get_errno() != EINTR:
            return libzmq.get_errno()
    parcel.header = NULL
    for i in range(parcel.n_parts):
        flags = ZMQ_DONTWAIT | ZMQ_SNDMORE if i + 1 < parcel.n_parts else ZMQ_DONTWAIT
        while libzmq.msg_send(&parcel.parts[i], socket, flags) < 0:
            if libzmq.get_errno() != EINTR:
                return libzmq.get_errno()
    # A sent message is an empty one (zmq_msg_send(3)); only the array is left to free.
    PyMem_RawFree(parcel.parts)
    parcel.parts = NULL
    parcel.n_parts = 0
    return 0


cdef void parcel_close(Parcel *parcel) noexcept nogil:
    """Free what the parcel still owns. Safe after parcel_send, whatever it returned."""
    cdef Py_ssize_t i
    libzmq.msg_close(&parcel.head)
    for i in range(parcel.n_parts):
        libzmq.msg_close(&parcel.parts[i])
    PyMem_RawFree(parcel.parts)
    parcel.parts = NULL
    parcel.n_parts = 0


# -- the Python face: tests, tools, drivers with sockets of their own --------------------------------------

def pack(
    kind: str, *, id: int = 0, topic: bytes = b"", method: str = "", metadata: bytes = b"", body=b"", buffers=None,
    codec: int = 0, flags: int = 0, ack: int = 0, remaining_ms: int | None = None, max_bytes: int = 0xFFFFFFFF,
) -> list[bytes]:
    """Return an envelope's message parts as bytes: the header part, then each of ``buffers`` (copied).

    Raises KeyError for an unknown ``kind``, OverflowError for a number that its field cannot hold, and
    PayloadTooLarge over ``max_bytes`` of body and buffers together.
    """
    cdef Parcel parcel
    cdef Header header
    cdef Py_ssize_t i
    header.kind = KINDS[kind]
    header.flags = flags
    header.codec = codec
    header.id = id
    header.ack = ack
    header.remaining_ms = <uint32_t>NO_DEADLINE if remaining_ms is None else remaining_ms
    parcel_pack(&parcel, &header, topic, method, metadata, body, buffers, max_bytes, 0xFFFF)
    try:
        parts = [PyBytes_FromStringAndSize(<char *>libzmq.msg_data(&parcel.head), libzmq.msg_size(&parcel.head))]
        for i in range(parcel.n_parts):
            parts.append(PyBytes_FromStringAndSize(
                <char *>libzmq.msg_data(&parcel.parts[i]), libzmq.msg_size(&parcel.parts[i])))
    finally:
        parcel_close(&parcel)
    release_sent_buffers()
    return parts


def split(part) -> list[bytes]:
    """Return the envelopes that share one message part (bytes-like; copied), in order; one is a list of one.

    Raises ProtocolError if it holds anything else.
    """
    cdef Header header
    cdef size_t at = 0
    cdef bytes data = bytes(part)
    cdef size_t size = PyBytes_GET_SIZE(data)
    cdef const unsigned char *start = <const unsigned char *>PyBytes_AS_STRING(data)
    cdef const char *problem = parse_part(start, size, &header)
    cdef list envelopes = []
    if problem != NULL:
        raise errors.ProtocolError(f"message part of {size} bytes is {problem.decode()}")
    while at < size:
        parse_header(start + at, size - at, &header)
        envelopes.append(data[at:at + header.n_bytes])
        at += header.n_bytes
    return envelopes


def pinned() -> dict[str, int]:
    """Return what large buffers hold just now.

    ``sent_buffers`` and ``sent_bytes``: the caller's memory that libzmq still reads; ``received_buffers`` and
    ``received_bytes``: libzmq's memory that memoryviews of this process still use. What libzmq has finished
    with is released first.
    """
    release_sent_buffers()
    return {
        "sent_buffers": zc_counted(&zc_pinned_buffers),
        "sent_bytes": zc_counted(&zc_pinned_bytes),
        "received_buffers": zc_counted(&zc_held_parts),
        "received_bytes": zc_counted(&zc_held_bytes),
    }
