# cython: language_level=3, embedsignature=True, auto_pickle=False, freethreading_compatible=True
# cython: boundscheck=False, wraparound=False
"""The receiver's half of the msgpack codec: bytes from the network, about which nothing is known.

``decoded`` makes the value in one pass, which keeps the limits too. :func:`scan` keeps the limits for bytes, without
making a single object of them.

The msgpack library's decoder is not used. With it, the limits take a pass of their own; and it interns every map key,
which on Python 3.12.1 is never freed again: 10**6 calls with a new key each left 108 MB behind.

Everything here is thread-safe (it has no state but constants), also without the GIL, and safe across a fork.
"""

cimport cython
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.list cimport PyList_New, PyList_SET_ITEM
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from cpython.memoryview cimport PyMemoryView_Check
from cpython.ref cimport Py_INCREF, PyObject
from cpython.unicode cimport PyUnicode_CheckExact, PyUnicode_DecodeUTF8
from libc.stdint cimport int8_t, int16_t, int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy

from zmqcore.errors import PayloadTooLarge, ProtocolError

from zmqcore._msgpack cimport EXT_BUFFER_CODE, ZMQCORE_MAX_DEPTH, Limits

__all__ = ["Buffers", "scan"]

cdef extern from "Python.h":
    Py_buffer* PyMemoryView_GET_BUFFER(object view)
    void Py_XDECREF(PyObject* value)
    Py_ssize_t PyUnicode_GET_LENGTH(object text)
    void* PyUnicode_1BYTE_DATA(object text)
    bint PyUnicode_IS_COMPACT_ASCII(object text)

cdef extern from *:
    """
    /* The map keys that a long body shares, and from how many elements on it pays (measured). */
    #define ZMQCORE_KEY_SLOTS 64
    #define ZMQCORE_KEYS_FROM_ELEMENTS 64
    """
    enum:
        KEY_SLOTS "ZMQCORE_KEY_SLOTS"
        KEYS_FROM_ELEMENTS "ZMQCORE_KEYS_FROM_ELEMENTS"


# -- before anything is made of them -----------------------------------------------------------------------


cdef inline uint64_t big_endian(const uint8_t* at, int size) noexcept nogil:
    cdef uint64_t value = 0
    cdef int i
    for i in range(size):
        value = (value << 8) | at[i]
    return value


cdef int too_many(uint64_t elements, Py_ssize_t limit) except -1:
    raise PayloadTooLarge(f"the body claims at least {elements} elements, the limit is {limit}")


cdef int too_deep(Py_ssize_t depth, Py_ssize_t limit) except -1:
    raise PayloadTooLarge(f"the body is nested at least {depth} deep, the limit is {limit}")


cdef int malformed(str what, Py_ssize_t offset, Py_ssize_t size) except -1:
    raise ProtocolError(f"malformed msgpack: {what} at byte {offset} of {size}")


def scan(body, Py_ssize_t max_depth, Py_ssize_t max_elements):
    """Check that *body* is one whole msgpack value within the limits, making nothing of it.

    *body* is any object with a contiguous buffer. One pass, no recursion, no allocation; every length is
    compared with what is left before it is believed. Text is not checked to be UTF-8, and what is inside an
    extension is not looked at: decoding does both. Elements and depth count as in ``lift``.

    Raises ``ProtocolError`` for a bad type byte and for missing or surplus bytes, ``PayloadTooLarge`` over
    *max_depth* (at most ``MAX_DEPTH``) or *max_elements*.
    """
    cdef Py_buffer view
    PyObject_GetBuffer(body, &view, PyBUF_SIMPLE)
    try:
        max_depth = min(max_depth, <Py_ssize_t>ZMQCORE_MAX_DEPTH)
        scanned(<const uint8_t*>view.buf, view.len, max_depth, max_elements)
    finally:
        PyBuffer_Release(&view)


cdef int scanned(
    const uint8_t* start, Py_ssize_t size, Py_ssize_t max_depth, Py_ssize_t max_elements
) except -1:
    cdef uint64_t[ZMQCORE_MAX_DEPTH + 1] left      # values still to come, per open container
    cdef Py_ssize_t depth = 0
    cdef Py_ssize_t at = 0
    cdef uint64_t elements = 1
    cdef uint64_t skip                              # bytes of the value after its head
    cdef uint64_t inside                            # values inside, for a container
    cdef int head                                   # bytes of a length after the type byte
    cdef uint8_t kind
    cdef bint container
    if max_elements < 1:
        too_many(1, max_elements)
    left[0] = 1
    while True:
        while left[depth] == 0:
            if depth == 0:
                if at != size:
                    malformed(f"{size - at} surplus bytes", at, size)
                return 0
            depth -= 1
        left[depth] -= 1
        if at >= size:
            malformed("it ends before a value", at, size)
        kind = start[at]
        at += 1
        if kind <= 0x7F or kind >= 0xE0:            # fixint
            continue
        container = False
        inside = 0
        skip = 0
        head = 0
        if kind <= 0x8F:                            # fixmap
            container = True
            inside = 2 * <uint64_t>(kind & 0x0F)
        elif kind <= 0x9F:                          # fixarray
            container = True
            inside = kind & 0x0F
        elif kind <= 0xBF:                          # fixstr
            skip = kind & 0x1F
        elif kind == 0xC0 or kind == 0xC2 or kind == 0xC3:
            continue
        elif kind == 0xC1:
            malformed("the type byte 0xc1, which is never used,", at - 1, size)
        elif kind <= 0xC6:                          # bin 8, 16, 32
            head = 1 << (kind - 0xC4)
        elif kind <= 0xC9:                          # ext 8, 16, 32: one byte of type code follows the length
            head = 1 << (kind - 0xC7)
            skip = 1
        elif kind <= 0xCB:                          # float 32, 64
            skip = 4 << (kind - 0xCA)
        elif kind <= 0xCF:                          # uint 8 ... 64
            skip = 1 << (kind - 0xCC)
        elif kind <= 0xD3:                          # int 8 ... 64
            skip = 1 << (kind - 0xD0)
        elif kind <= 0xD8:                          # fixext 1 ... 16
            skip = 1 + (1 << (kind - 0xD4))
        elif kind <= 0xDB:                          # str 8, 16, 32
            head = 1 << (kind - 0xD9)
        elif kind <= 0xDD:                          # array 16, 32
            head = 2 << (kind - 0xDC)
            container = True
        else:                                       # map 16, 32
            head = 2 << (kind - 0xDE)
            container = True
        if head:
            if size - at < head:
                malformed("it ends within a length", at, size)
            if container:
                inside = big_endian(start + at, head)
                if kind >= 0xDE:
                    inside *= 2
            else:
                skip += big_endian(start + at, head)
            at += head
        if container:
            elements += inside                      # each addend is below 2**33: it cannot wrap
            if elements > <uint64_t>max_elements:
                too_many(elements, max_elements)
            if depth >= max_depth:
                too_deep(depth + 1, max_depth)
            if inside > <uint64_t>(size - at):      # each value takes a byte at least
                malformed("a container of more values than there are bytes", at, size)
            depth += 1
            left[depth] = inside
        else:
            if skip > <uint64_t>(size - at):
                malformed(f"a value of {skip} bytes with only {size - at} left", at, size)
            at += <Py_ssize_t>skip


# -- one pass from body to value ---------------------------------------------------------------------------


cdef struct In:
    const uint8_t* start
    const uint8_t* at
    const uint8_t* end
    PyObject** keys             # KEY_SLOTS of them, each owned or NULL; or NULL until there are many elements
    Py_ssize_t max_depth
    Py_ssize_t max_elements
    Py_ssize_t elements
    Py_ssize_t depth


@cython.final
cdef class Buffers:
    """The out-of-band buffers of one message while its body is decoded. Each is taken exactly once.

    Used by one thread. ``unused`` counts those that nothing has referred to yet.
    """

    cdef object buffers
    cdef bytearray taken
    cdef readonly Py_ssize_t unused

    def __cinit__(self, buffers):
        self.buffers = buffers
        self.unused = len(buffers)
        self.taken = bytearray(self.unused)

    cpdef memoryview take(self, uint32_t index):
        """Return buffer *index* as a read-only memoryview of bytes. ``ProtocolError`` if it cannot be had."""
        cdef Py_buffer* view
        if index >= <size_t>len(self.taken):
            raise ProtocolError(f"malformed body: a reference to buffer {index} of {len(self.taken)}")
        if self.taken[index]:
            raise ProtocolError(f"malformed body: two references to buffer {index}")
        self.taken[index] = 1
        self.unused -= 1
        buffer = self.buffers[index]
        if PyMemoryView_Check(buffer):
            view = PyMemoryView_GET_BUFFER(buffer)
            if view.readonly and view.ndim == 1 and view.format != NULL and view.format[0] == c"B":
                return buffer
        return memoryview(buffer).cast("B").toreadonly()


cdef Buffers NO_BUFFERS = Buffers(())


cdef object bad(In* source, str what):
    malformed(what, source.at - source.start, source.end - source.start)


cdef const uint8_t* take(In* source, uint64_t size) except NULL:
    """Move past the next *size* bytes and return where they begin."""
    cdef const uint8_t* at = source.at
    if size > <uint64_t>(source.end - at):
        bad(source, f"a value of {size} bytes with only {source.end - at} left")
    source.at = at + size
    return at


cdef inline uint64_t take_number(In* source, int size) except? 0:
    return big_endian(take(source, size), size)


cdef object unpack_text(In* source, uint64_t size):
    cdef const uint8_t* at = take(source, size)
    try:
        return PyUnicode_DecodeUTF8(<const char*>at, <Py_ssize_t>size, NULL)
    except UnicodeDecodeError as exc:
        raise ProtocolError(f"malformed msgpack: text that is not UTF-8: {exc}") from exc


cdef object unpack_bytes(In* source, uint64_t size):
    return PyBytes_FromStringAndSize(<const char*>take(source, size), <Py_ssize_t>size)


cdef int unpack_head(In* source, uint64_t elements) except -1:
    source.elements += elements
    if source.elements > source.max_elements:
        too_many(source.elements, source.max_elements)
    source.depth += 1
    if source.depth > source.max_depth:
        too_deep(source.depth, source.max_depth)
    # Each value takes a byte at least, so no more is allocated than the body could fill.
    if elements > <uint64_t>(source.end - source.at):
        bad(source, "a container of more values than there are bytes")
    return 0


cdef object unpack_array(In* source, uint64_t size, object codec, Buffers buffers):
    cdef Py_ssize_t i
    unpack_head(source, size)
    result = PyList_New(<Py_ssize_t>size)
    for i in range(<Py_ssize_t>size):
        item = unpack(source, codec, buffers)
        Py_INCREF(item)                             # stolen by the list
        PyList_SET_ITEM(result, i, item)
    source.depth -= 1
    return result


cdef object unpack_key(In* source, object codec, Buffers buffers):
    """Take a map's key off *source*. In a long body it is probably the same as in the map before: share it.

    A list of 1000 maps of 4 keys then holds 4 of them, not 4000, and decodes in three quarters of the time.
    """
    cdef const uint8_t* at = source.at
    cdef Py_ssize_t size
    cdef PyObject** slot
    if source.elements < KEYS_FROM_ELEMENTS or at >= source.end or at[0] & 0xE0 != 0xA0:
        return unpack(source, codec, buffers)
    size = at[0] & 0x1F                             # a fixstr, 0 to 31 bytes
    if size == 0 or size >= source.end - at:
        return unpack(source, codec, buffers)
    if source.keys is NULL:
        source.keys = <PyObject**>PyMem_Calloc(KEY_SLOTS, sizeof(PyObject*))
        if source.keys is NULL:
            raise MemoryError
    slot = source.keys + ((at[1] * 7 + at[size] * 3 + at[1 + size // 2] + size) & (KEY_SLOTS - 1))
    if slot[0] is not NULL and PyUnicode_GET_LENGTH(<object>slot[0]) == size:
        if memcmp(PyUnicode_1BYTE_DATA(<object>slot[0]), at + 1, size) == 0:
            source.at = at + 1 + size
            return <object>slot[0]
    key = unpack(source, codec, buffers)
    if PyUnicode_IS_COMPACT_ASCII(key):
        Py_INCREF(key)
        Py_XDECREF(slot[0])
        slot[0] = <PyObject*>key
    return key


cdef void drop_keys(In* source) noexcept:
    cdef int i
    if source.keys is not NULL:
        for i in range(KEY_SLOTS):
            Py_XDECREF(source.keys[i])
        PyMem_Free(source.keys)


cdef object unpack_map(In* source, uint64_t size, object codec, Buffers buffers):
    cdef dict result = {}
    unpack_head(source, 2 * size)
    while size:
        key = unpack_key(source, codec, buffers)
        item = unpack(source, codec, buffers)
        if PyUnicode_CheckExact(key):
            result[key] = item
        else:
            try:
                result[key] = item
            except TypeError as exc:
                raise ProtocolError(f"malformed body: a map has a key of {type(key).__name__}") from exc
        size -= 1
    source.depth -= 1
    return result


cdef object unpack_ext(In* source, uint64_t size, object codec, Buffers buffers):
    cdef int code = <int8_t>take(source, 1)[0]
    cdef const uint8_t* at
    if code == EXT_BUFFER_CODE and size == 4:
        at = take(source, 4)
        return buffers.take(at[0] | at[1] << 8 | at[2] << 16 | <uint32_t>at[3] << 24)
    return codec.read_ext(code, unpack_bytes(source, size), buffers)


cdef object unpack(In* source, object codec, Buffers buffers):
    """Take the next value off *source*."""
    cdef uint64_t bits
    cdef uint32_t bits32
    cdef double real = 0
    cdef float real32 = 0
    cdef uint8_t kind
    if source.at >= source.end:
        bad(source, "it ends before a value")
    kind = source.at[0]
    source.at += 1
    if kind <= 0x7F:
        return <long>kind
    if kind <= 0x8F:
        return unpack_map(source, kind & 0x0F, codec, buffers)
    if kind <= 0x9F:
        return unpack_array(source, kind & 0x0F, codec, buffers)
    if kind <= 0xBF:
        return unpack_text(source, kind & 0x1F)
    if kind >= 0xE0:
        return <long><int8_t>kind
    if kind == 0xC0:
        return None
    if kind == 0xC2:
        return False
    if kind == 0xC3:
        return True
    if 0xC4 <= kind <= 0xC6:
        return unpack_bytes(source, take_number(source, 1 << (kind - 0xC4)))
    if 0xC7 <= kind <= 0xC9:
        return unpack_ext(source, take_number(source, 1 << (kind - 0xC7)), codec, buffers)
    if kind == 0xCA:
        bits32 = <uint32_t>take_number(source, 4)
        memcpy(&real32, &bits32, 4)
        return <double>real32
    if kind == 0xCB:
        bits = take_number(source, 8)
        memcpy(&real, &bits, 8)
        return real
    if 0xCC <= kind <= 0xCF:
        return take_number(source, 1 << (kind - 0xCC))
    if kind == 0xD0:
        return <long><int8_t>take_number(source, 1)
    if kind == 0xD1:
        return <long><int16_t>take_number(source, 2)
    if kind == 0xD2:
        return <long><int32_t>take_number(source, 4)
    if kind == 0xD3:
        return <int64_t>take_number(source, 8)
    if 0xD4 <= kind <= 0xD8:
        return unpack_ext(source, 1 << (kind - 0xD4), codec, buffers)
    if 0xD9 <= kind <= 0xDB:
        return unpack_text(source, take_number(source, 1 << (kind - 0xD9)))
    if kind == 0xDC or kind == 0xDD:
        return unpack_array(source, take_number(source, 2 << (kind - 0xDC)), codec, buffers)
    if kind == 0xDE or kind == 0xDF:
        return unpack_map(source, take_number(source, 2 << (kind - 0xDE)), codec, buffers)
    source.at -= 1
    bad(source, "the type byte 0xc1, which is never used,")


cdef Py_ssize_t buffers_size(object buffers) except -1:
    cdef Py_ssize_t size = 0
    for buffer in buffers:
        if PyMemoryView_Check(buffer):
            size += PyMemoryView_GET_BUFFER(buffer).len
        else:
            size += memoryview(buffer).nbytes
    return size


cdef object decoded(object body, object buffers, const Limits* limits, object codec):
    """Return the value in *body*, whose large buffers are in *buffers*; ``codec.read_ext`` reads extension types."""
    cdef Py_buffer view
    cdef In source
    cdef Buffers taken = NO_BUFFERS
    cdef Py_ssize_t size = 0
    if len(buffers):
        taken = Buffers(buffers)
        if taken.unused > limits.buffers:
            raise PayloadTooLarge(
                f"the message has {taken.unused} out-of-band buffers, the limit is {limits.buffers}"
            )
        size = buffers_size(buffers)
    PyObject_GetBuffer(body, &view, PyBUF_SIMPLE)
    source.keys = NULL
    try:
        size += view.len
        if size > limits.message_bytes:
            raise PayloadTooLarge(f"the message has {size} bytes, the limit is {limits.message_bytes}")
        source.start = source.at = <const uint8_t*>view.buf
        source.end = source.at + view.len
        source.max_depth = limits.depth
        source.max_elements = limits.elements
        source.elements = 1
        source.depth = 0
        # An element takes a byte at least: a shorter body cannot hold too many, and this pass is spared.
        if view.len > limits.elements:
            scanned(source.start, view.len, limits.depth, limits.elements)
        value = unpack(&source, codec, taken)
        if source.at != source.end:
            bad(&source, f"{source.end - source.at} surplus bytes")
    finally:
        drop_keys(&source)
        PyBuffer_Release(&view)
    if taken.unused:
        raise ProtocolError(f"malformed body: {taken.unused} buffers of {len(buffers)} have no reference")
    return value
