# cython: language_level=3, embedsignature=True, auto_pickle=False, freethreading_compatible=True
# cython: boundscheck=False, wraparound=False
"""The compiled part of the msgpack codec: small bodies in one pass, and what guards the large ones.

``SmallBodyCodec`` packs and unpacks a small body of plain types itself. Whatever it does not know, does not
like, or has no room for goes the general way through the msgpack library, which alone raises errors.
``lift`` takes large buffers out of a value and keeps the limits on the way; ``scan`` keeps them for bytes from
the network, before a single object is made of them.

Everything here is thread-safe (no state but constants), also without the GIL, and safe across a fork.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytearray cimport PyByteArray_Check
from cpython.dict cimport PyDict_Check, PyDict_CheckExact
from cpython.float cimport PyFloat_AS_DOUBLE, PyFloat_CheckExact
from cpython.list cimport PyList_Check, PyList_CheckExact, PyList_New, PyList_SET_ITEM
from cpython.long cimport PyLong_CheckExact
from cpython.memoryview cimport PyMemoryView_Check
from cpython.ref cimport Py_INCREF
from cpython.tuple cimport PyTuple_Check, PyTuple_CheckExact
from cpython.unicode cimport PyUnicode_CheckExact, PyUnicode_DecodeUTF8
from libc.stdint cimport int8_t, int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from msgpack import ExtType

from zmqcore.errors import PayloadTooLarge, ProtocolError

cdef extern from "Python.h":
    const char* PyUnicode_AsUTF8AndSize(object text, Py_ssize_t* size) except NULL
    long long PyLong_AsLongLongAndOverflow(object value, int* overflow) except? -1
    bint PyBytes_Check(object value)
    bint PyUnicode_Check(object value)
    bint PyLong_Check(object value)

cdef extern from *:
    """
    /* Large enough for almost every call without a large argument, small enough for any thread's stack. */
    #define ZMQCORE_SMALL_BYTES 4096
    /* Deeper nesting goes the general way. It bounds the C recursion of the small path. */
    #define ZMQCORE_SMALL_DEPTH 16
    /* Above it the library's own decoder gives up (its stack holds 1024), and C recursion gets risky. */
    #define ZMQCORE_MAX_DEPTH 512
    """
    enum:
        ZMQCORE_SMALL_BYTES
        ZMQCORE_SMALL_DEPTH
        ZMQCORE_MAX_DEPTH

MAX_DEPTH = ZMQCORE_MAX_DEPTH
SMALL_BYTES = ZMQCORE_SMALL_BYTES

#: Extension code of a reference to an out-of-band buffer (see the table in codec.py).
EXT_BUFFER = 1

# What the small decoder returns for "not mine": an object that no body can decode to.
cdef object NOT_SMALL = object()


class Unpackable(Exception):
    """A value inside the payload has no form on the wire: ``value`` is it (by identity), ``reason`` says why.

    Internal between the walkers and the codec, which finds the path to the value and raises ``BadArguments``.
    """

    def __init__(self, value, reason):
        super().__init__(reason)
        self.value = value
        self.reason = reason


# -- the sender's side: large buffers out, limits kept -----------------------------------------------------


cdef struct Walk:
    Py_ssize_t threshold
    Py_ssize_t max_depth
    Py_ssize_t max_elements
    Py_ssize_t elements


def lift(value, list buffers not None, Py_ssize_t threshold, Py_ssize_t max_depth, Py_ssize_t max_elements):
    """Return *value* with each large buffer in it replaced by a reference to its place in *buffers*.

    A buffer is bytes, bytearray or memoryview; it is large from *threshold* bytes on. It is appended to
    *buffers* as it is, or as a contiguous copy if it is a memoryview that is not contiguous. Lists, tuples and
    dicts (and their subclasses) are walked, and copied only where something in them was replaced: the caller's
    objects are never changed. Keys of dicts stay in place. Cost is linear in the number of elements.

    An element is every value, every container and every key; depth counts the containers around a value.
    Raises ``PayloadTooLarge`` over *max_depth* (at most ``MAX_DEPTH``) or *max_elements*, which also ends the
    walk of a structure that contains itself, and ``Unpackable`` for a dict key that is a container.
    """
    cdef Walk walk
    walk.threshold = threshold
    walk.max_depth = min(max_depth, <Py_ssize_t>ZMQCORE_MAX_DEPTH)
    walk.max_elements = max_elements
    walk.elements = 0
    count(&walk, 1)
    return lifted(value, &walk, buffers, 0)


cdef int count(Walk* walk, Py_ssize_t more) except -1:
    walk.elements += more
    if walk.elements > walk.max_elements:
        raise PayloadTooLarge(
            f"the payload has at least {walk.elements} elements, the limit is {walk.max_elements}: "
            "send less at once, or one bytes object or array"
        )
    return 0


cdef int enter(Walk* walk, Py_ssize_t depth) except -1:
    if depth >= walk.max_depth:
        raise PayloadTooLarge(
            f"the payload is nested at least {depth + 1} deep, the limit is {walk.max_depth} (does it contain itself?)"
        )
    return 0


cdef inline bint is_plain(object value) noexcept:
    # The leaves that nothing is ever done to, cheapest and commonest first.
    return PyUnicode_CheckExact(value) or PyLong_CheckExact(value) or value is None or PyFloat_CheckExact(value)


cdef object lifted(object value, Walk* walk, list buffers, Py_ssize_t depth):
    if is_plain(value):
        return value
    if PyBytes_Check(value) or PyByteArray_Check(value):
        if len(value) >= walk.threshold:
            return refer(value, buffers)
        return value
    if PyDict_Check(value):
        enter(walk, depth)
        return lifted_dict(<dict>value, walk, buffers, depth + 1)
    if PyList_Check(value):
        enter(walk, depth)
        return lifted_list(<list>value, walk, buffers, depth + 1)
    if PyTuple_Check(value):
        if isinstance(value, ExtType):
            raise Unpackable(value, "extension types of one's own are not carried; send bytes")
        enter(walk, depth)
        return lifted_tuple(<tuple>value, walk, buffers, depth + 1)
    if PyMemoryView_Check(value):
        return lifted_view(value, walk, buffers)
    return value


cdef object lifted_list(list value, Walk* walk, list buffers, Py_ssize_t depth):
    cdef list copy = None
    cdef Py_ssize_t index = 0
    count(walk, len(value))
    for item in value:
        new = item if is_plain(item) else lifted(item, walk, buffers, depth)
        if copy is not None:
            copy.append(new)
        elif new is not item:
            copy = list(value[:index])
            copy.append(new)
        index += 1
    return value if copy is None else copy


cdef object lifted_tuple(tuple value, Walk* walk, list buffers, Py_ssize_t depth):
    cdef list copy = None
    cdef Py_ssize_t index = 0
    count(walk, len(value))
    for item in value:
        new = item if is_plain(item) else lifted(item, walk, buffers, depth)
        if copy is not None:
            copy.append(new)
        elif new is not item:
            copy = list(value[:index])
            copy.append(new)
        index += 1
    return value if copy is None else copy


cdef object lifted_dict(dict value, Walk* walk, list buffers, Py_ssize_t depth):
    cdef dict copy = None
    count(walk, 2 * len(value))
    for key, item in value.items():
        if not PyUnicode_CheckExact(key) and (PyTuple_Check(key) or isinstance(key, frozenset)):
            raise Unpackable(key, "a container cannot be the key of a dict on the wire")
        new = item if is_plain(item) else lifted(item, walk, buffers, depth)
        if new is not item:
            if copy is None:
                copy = dict(value)
            copy[key] = new
    return value if copy is None else copy


cdef object lifted_view(object value, Walk* walk, list buffers):
    try:
        if value.nbytes >= walk.threshold:
            return refer(value if value.c_contiguous else value.tobytes(), buffers)
        return value if value.c_contiguous else value.tobytes()
    except ValueError as exc:
        raise Unpackable(value, str(exc)) from exc


cdef object refer(object value, list buffers):
    cdef Py_ssize_t index = len(buffers)
    buffers.append(value)
    return ExtType(EXT_BUFFER, index.to_bytes(4, "little"))


# -- the receiver's side: bytes from the network, before anything is made of them --------------------------


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
    extension is not looked at: decoding does both. Elements and depth count as in :func:`lift`.

    Raises ``ProtocolError`` for an invalid type byte, and for missing or surplus bytes, and ``PayloadTooLarge``
    over *max_depth* (at most ``MAX_DEPTH``) or *max_elements*.
    """
    cdef Py_buffer view
    PyObject_GetBuffer(body, &view, PyBUF_SIMPLE)
    try:
        scanned(<const uint8_t*>view.buf, view.len, min(max_depth, <Py_ssize_t>ZMQCORE_MAX_DEPTH), max_elements)
    finally:
        PyBuffer_Release(&view)


cdef int scanned(const uint8_t* start, Py_ssize_t size, Py_ssize_t max_depth, Py_ssize_t max_elements) except -1:
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


# -- small bodies in one pass --------------------------------------------------------------------------------


cdef struct Out:
    uint8_t* at
    uint8_t* end
    Py_ssize_t threshold
    Py_ssize_t elements_left
    int depth_left


cdef struct In:
    const uint8_t* at
    const uint8_t* end
    Py_ssize_t elements_left
    int depth_left


cdef inline void put(uint8_t* at, uint64_t value, int size) noexcept nogil:
    cdef int i
    for i in range(size):
        at[i] = <uint8_t>(value >> (8 * (size - 1 - i)))


cdef inline bint put_int(Out* out, long long value) noexcept nogil:
    cdef uint8_t* at = out.at
    if out.end - at < 9:
        return False
    if -32 <= value <= 127:
        at[0] = <uint8_t>value
        out.at = at + 1
    elif value > 0:
        if value <= 0xFF:
            at[0] = 0xCC
            at[1] = <uint8_t>value
            out.at = at + 2
        elif value <= 0xFFFF:
            at[0] = 0xCD
            put(at + 1, <uint64_t>value, 2)
            out.at = at + 3
        elif value <= 0xFFFFFFFFLL:
            at[0] = 0xCE
            put(at + 1, <uint64_t>value, 4)
            out.at = at + 5
        else:
            at[0] = 0xCF
            put(at + 1, <uint64_t>value, 8)
            out.at = at + 9
    elif value >= -0x80:
        at[0] = 0xD0
        at[1] = <uint8_t>value
        out.at = at + 2
    elif value >= -0x8000:
        at[0] = 0xD1
        put(at + 1, <uint64_t>value, 2)
        out.at = at + 3
    elif value >= -0x80000000LL:
        at[0] = 0xD2
        put(at + 1, <uint64_t>value, 4)
        out.at = at + 5
    else:
        at[0] = 0xD3
        put(at + 1, <uint64_t>value, 8)
        out.at = at + 9
    return True


cdef inline bint put_raw(Out* out, const char* data, Py_ssize_t size, int small_limit, int small, int wide) noexcept nogil:
    # ``small`` | size is the head for sizes below small_limit; ``wide`` is the 8-bit head, wide + 1 the 16-bit one.
    cdef uint8_t* at = out.at
    if out.end - at < size + 3:
        return False
    if size < small_limit:
        at[0] = <uint8_t>(small | size)
        at += 1
    elif size <= 0xFF:
        at[0] = <uint8_t>wide
        at[1] = <uint8_t>size
        at += 2
    else:
        at[0] = <uint8_t>(wide + 1)
        put(at + 1, <uint64_t>size, 2)
        at += 3
    memcpy(at, data, size)
    out.at = at + size
    return True


cdef inline bint put_head(Out* out, Py_ssize_t size, int small, int wide) noexcept nogil:
    cdef uint8_t* at = out.at
    if size > 0xFFFF or out.end - at < 3:
        return False
    if size < 16:
        at[0] = <uint8_t>(small | size)
        out.at = at + 1
    else:
        at[0] = <uint8_t>wide
        put(at + 1, <uint64_t>size, 2)
        out.at = at + 3
    return True


cdef int pack(object value, Out* out) except -1:
    """Append *value* to *out*: 1 if done, 0 if it is not for the small path (then *out* is of no use)."""
    cdef Py_ssize_t size
    cdef const char* text
    cdef long long number
    cdef int overflow = 0
    cdef double real
    cdef uint64_t bits
    if PyUnicode_CheckExact(value):
        try:
            text = PyUnicode_AsUTF8AndSize(value, &size)
        except UnicodeEncodeError:                  # lone surrogates: the general way says so
            return 0
        return put_raw(out, text, size, 32, 0xA0, 0xD9)
    if PyBytes_CheckExact(value):
        size = PyBytes_GET_SIZE(value)
        if size >= out.threshold:
            return 0
        return put_raw(out, PyBytes_AS_STRING(value), size, 0, 0, 0xC4)
    if PyLong_CheckExact(value):
        number = PyLong_AsLongLongAndOverflow(value, &overflow)
        if overflow:
            return 0
        return put_int(out, number)
    if value is None or value is True or value is False:
        if out.at == out.end:
            return 0
        out.at[0] = 0xC0 if value is None else 0xC3 if value is True else 0xC2
        out.at += 1
        return 1
    if PyFloat_CheckExact(value):
        if out.end - out.at < 9:
            return 0
        real = PyFloat_AS_DOUBLE(value)
        memcpy(&bits, &real, 8)
        out.at[0] = 0xCB
        put(out.at + 1, bits, 8)
        out.at += 9
        return 1
    if PyTuple_CheckExact(value):
        size = len(<tuple>value)
        out.elements_left -= size
        out.depth_left -= 1
        if out.elements_left < 0 or out.depth_left < 0 or not put_head(out, size, 0x90, 0xDC):
            return 0
        for item in <tuple>value:
            if not pack(item, out):
                return 0
        out.depth_left += 1
        return 1
    if PyDict_CheckExact(value):
        return pack_dict(<dict>value, out)
    if PyList_CheckExact(value):
        return pack_list(<list>value, out)
    return 0


cdef int pack_list(list value, Out* out) except -1:
    cdef Py_ssize_t size = len(value)
    out.elements_left -= size
    out.depth_left -= 1
    if out.elements_left < 0 or out.depth_left < 0 or not put_head(out, size, 0x90, 0xDC):
        return 0
    for item in value:
        if size == 0 or not pack(item, out):
            return 0
        size -= 1
    out.depth_left += 1
    return size == 0                                # another thread may have changed the list meanwhile


cdef int pack_dict(dict value, Out* out) except -1:
    cdef Py_ssize_t size = len(value)
    out.elements_left -= 2 * size
    out.depth_left -= 1
    if out.elements_left < 0 or out.depth_left < 0 or not put_head(out, size, 0x80, 0xDE):
        return 0
    if size:
        for key, item in value.items():
            if size == 0 or not PyUnicode_CheckExact(key) or not pack(key, out) or not pack(item, out):
                return 0
            size -= 1
    out.depth_left += 1
    return size == 0


cdef object unpack_text(In* source, Py_ssize_t size):
    cdef const uint8_t* at = source.at
    if size > source.end - at:
        return NOT_SMALL
    source.at = at + size
    try:
        return PyUnicode_DecodeUTF8(<const char*>at, size, NULL)
    except UnicodeDecodeError:
        return NOT_SMALL


cdef object unpack_array(In* source, Py_ssize_t size):
    cdef Py_ssize_t i
    source.elements_left -= size
    source.depth_left -= 1
    # Each value takes a byte at least, so no more is allocated than the body could fill.
    if size > source.end - source.at or source.elements_left < 0 or source.depth_left < 0:
        return NOT_SMALL
    result = PyList_New(size)
    for i in range(size):
        item = unpack(source)
        if item is NOT_SMALL:
            return NOT_SMALL
        Py_INCREF(item)                             # stolen by the list
        PyList_SET_ITEM(result, i, item)
    source.depth_left += 1
    return result


cdef object unpack_map(In* source, Py_ssize_t size):
    cdef dict result = {}
    source.elements_left -= 2 * size
    source.depth_left -= 1
    if 2 * size > source.end - source.at or source.elements_left < 0 or source.depth_left < 0:
        return NOT_SMALL
    while size:
        key = unpack(source)
        if not PyUnicode_CheckExact(key):
            return NOT_SMALL
        item = unpack(source)
        if item is NOT_SMALL:
            return NOT_SMALL
        result[key] = item
        size -= 1
    source.depth_left += 1
    return result


cdef object unpack(In* source):
    """Take the next value off *source*, or return NOT_SMALL (then *source* is of no use)."""
    cdef const uint8_t* at = source.at
    cdef Py_ssize_t available = source.end - at - 1
    cdef uint8_t kind
    cdef Py_ssize_t size
    cdef uint64_t bits
    cdef uint32_t bits32
    cdef double real
    cdef float real32
    if available < 0:
        return NOT_SMALL
    kind = at[0]
    at += 1
    source.at = at
    if kind <= 0x7F:
        return <long>kind
    if kind <= 0x8F:
        return unpack_map(source, kind & 0x0F)
    if kind <= 0x9F:
        return unpack_array(source, kind & 0x0F)
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
    if kind == 0xC4 or kind == 0xC5:                # bin 8, 16
        size = kind - 0xC3
        if available < size:
            return NOT_SMALL
        at += size
        size = <Py_ssize_t>big_endian(at - size, <int>size)
        if size > source.end - at:
            return NOT_SMALL
        source.at = at + size
        return PyBytes_FromStringAndSize(<const char*>at, size)
    if kind == 0xD9 or kind == 0xDA:                # str 8, 16
        size = kind - 0xD8
        if available < size:
            return NOT_SMALL
        source.at = at + size
        return unpack_text(source, <Py_ssize_t>big_endian(at, <int>size))
    if 0xCA <= kind <= 0xD3:                        # float, uint, int: a fixed number of bytes
        if kind <= 0xCB:
            size = 4 << (kind - 0xCA)
        else:
            size = 1 << ((kind - 0xCC) & 3)
        if available < size:
            return NOT_SMALL
        source.at = at + size
        bits = big_endian(at, <int>size)
        if kind == 0xCA:
            bits32 = <uint32_t>bits
            memcpy(&real32, &bits32, 4)
            return <double>real32
        if kind == 0xCB:
            memcpy(&real, &bits, 8)
            return real
        if kind <= 0xCF:
            return bits
        if kind == 0xD0:
            return <long><int8_t>bits
        if kind == 0xD1:
            return <long><int16_t>bits
        if kind == 0xD2:
            return <long><int32_t>bits
        return <int64_t>bits
    if kind == 0xDC or kind == 0xDE:                # array 16, map 16
        if available < 2:
            return NOT_SMALL
        source.at = at + 2
        size = <Py_ssize_t>big_endian(at, 2)
        return unpack_array(source, size) if kind == 0xDC else unpack_map(source, size)
    return NOT_SMALL


cdef class SmallBodyCodec:
    """Base of the msgpack codec: small bodies of plain types at once, everything else by the subclass.

    *inline_bytes*, *depth* and *elements* are the limits, as in :func:`lift`. A body is small up to
    ``SMALL_BYTES`` bytes and a nesting of 16. A subclass defines ``encode_any`` and ``decode_any`` with the same
    arguments and results; they alone raise errors. An object that was not initialised sends everything there.
    """

    cdef Py_ssize_t inline_bytes
    cdef Py_ssize_t elements
    cdef int depth

    def __init__(self, *, Py_ssize_t inline_bytes, int depth, Py_ssize_t elements):
        self.inline_bytes = inline_bytes
        self.depth = min(depth, <int>ZMQCORE_SMALL_DEPTH)
        self.elements = elements

    def encode(self, value, buffers):
        """Return *value* as a body; large buffers in it are appended to the list *buffers*. See ``Codec``."""
        cdef uint8_t[ZMQCORE_SMALL_BYTES] storage
        cdef Out out
        out.at = storage
        out.end = out.at + ZMQCORE_SMALL_BYTES
        out.threshold = self.inline_bytes
        out.elements_left = self.elements - 1
        out.depth_left = self.depth
        if out.elements_left >= 0 and pack(value, &out):
            return PyBytes_FromStringAndSize(<const char*>storage, out.at - storage)
        return self.encode_any(value, buffers)

    def decode(self, body, buffers):
        """Return the value in *body*, whose large buffers are in *buffers*. See ``Codec``."""
        cdef Py_buffer view
        cdef In source
        if len(buffers) == 0:
            PyObject_GetBuffer(body, &view, PyBUF_SIMPLE)
            if view.len <= ZMQCORE_SMALL_BYTES and self.elements >= 1:
                source.at = <const uint8_t*>view.buf
                source.end = source.at + view.len
                source.elements_left = self.elements - 1
                source.depth_left = self.depth
                try:
                    value = unpack(&source)
                finally:
                    PyBuffer_Release(&view)
                if value is not NOT_SMALL and source.at == source.end:
                    return value
            else:
                PyBuffer_Release(&view)
        return self.decode_any(body, buffers)
