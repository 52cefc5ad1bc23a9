# cython: language_level=3, embedsignature=True, auto_pickle=False, freethreading_compatible=True
# cython: boundscheck=False, wraparound=False
"""The compiled part of the msgpack codec.

:class:`BodyCodec` encodes values of plain types, and decodes every body, in one pass that keeps the limits
too. :func:`lift` prepares all other values for the msgpack library's packer: it takes the large buffers out
and keeps the limits. :func:`scan` keeps the limits for bytes, without making a single object of them.

The library's decoder is not used. With it, the limits take a pass of their own; and it interns every map key,
which on Python 3.12.1 is never freed again: 10**6 calls with a new key each left 108 MB behind.

Everything here is thread-safe (it has no state but constants), also without the GIL, and safe across a fork.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytearray cimport PyByteArray_Check, PyByteArray_CheckExact
from cpython.dict cimport PyDict_Check, PyDict_CheckExact
from cpython.exc cimport PyErr_Clear
from cpython.float cimport PyFloat_AS_DOUBLE, PyFloat_CheckExact
from cpython.list cimport PyList_Check, PyList_CheckExact, PyList_New, PyList_SET_ITEM
from cpython.long cimport PyLong_CheckExact
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from cpython.memoryview cimport PyMemoryView_Check
from cpython.ref cimport Py_INCREF, PyObject
from cpython.tuple cimport PyTuple_Check, PyTuple_CheckExact
from cpython.unicode cimport PyUnicode_CheckExact, PyUnicode_DecodeUTF8
from libc.stdint cimport int8_t, int16_t, int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy

from msgpack import ExtType

from zmqcore.errors import PayloadTooLarge, ProtocolError

cdef extern from "Python.h":
    const char* PyUnicode_AsUTF8AndSize(object text, Py_ssize_t* size) except NULL
    long long PyLong_AsLongLongAndOverflow(object value, int* overflow) except? -1
    bint PyBytes_Check(object value)
    Py_buffer* PyMemoryView_GET_BUFFER(object view)
    # The same functions as in cpython.bytes, for a bytes object that is not an object of Cython's yet.
    PyObject* raw_bytes_new "PyBytes_FromStringAndSize" (const char* data, Py_ssize_t size)
    char* raw_bytes_data "PyBytes_AS_STRING" (PyObject* raw)
    void Py_XDECREF(PyObject* value)
    Py_ssize_t PyUnicode_GET_LENGTH(object text)
    void* PyUnicode_1BYTE_DATA(object text)
    bint PyUnicode_IS_COMPACT_ASCII(object text)

cdef extern from *:
    """
    /* Room on the stack for almost every call without a large argument; beyond it the heap is used. */
    #define ZMQCORE_STACK_BYTES 4096
    /* The longest body and the deepest nesting that the compiled encoder makes. */
    #define ZMQCORE_COMPILED_BYTES (1 << 20)
    #define ZMQCORE_COMPILED_DEPTH 16
    /* Bounds the C recursion of the walkers: 512 levels take some 100 KiB of stack. */
    #define ZMQCORE_MAX_DEPTH 512
    /* The map keys that a long body shares, and from how many elements on it pays (measured). */
    #define ZMQCORE_KEY_SLOTS 64
    #define ZMQCORE_KEYS_FROM_ELEMENTS 64
    """
    enum:
        ZMQCORE_STACK_BYTES
        ZMQCORE_COMPILED_BYTES
        ZMQCORE_COMPILED_DEPTH
        ZMQCORE_MAX_DEPTH
        KEY_SLOTS "ZMQCORE_KEY_SLOTS"
        KEYS_FROM_ELEMENTS "ZMQCORE_KEYS_FROM_ELEMENTS"

MAX_DEPTH = ZMQCORE_MAX_DEPTH
cdef Py_ssize_t COMPILED_BYTES = ZMQCORE_COMPILED_BYTES

# Extension code of a reference to an out-of-band buffer (see the table in codec.py).
cdef enum:
    EXT_BUFFER_CODE = 1
EXT_BUFFER = EXT_BUFFER_CODE


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
    *buffers* as it is, or as a contiguous copy if it is a memoryview that is not contiguous. Lists, tuples
    and dicts (and their subclasses) are walked, and copied only where something in them was replaced: the
    caller's objects are never changed. Keys of dicts stay in place. Linear in the number of elements.

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
            f"the payload is nested at least {depth + 1} deep, the limit is {walk.max_depth}: "
            "does it contain itself?"
        )
    return 0


cdef inline bint is_plain(object value) noexcept:
    # Leaves that nothing is ever done to: the commonest, not all.
    if PyUnicode_CheckExact(value) or PyLong_CheckExact(value):
        return True
    return value is None or PyFloat_CheckExact(value)


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


# -- one pass from value to body ---------------------------------------------------------------------------


cdef struct Out:
    uint8_t* start              # borrowed: the caller's stack, or the inside of ``heap``
    uint8_t* at
    uint8_t* end
    PyObject* heap              # owned: the bytes object that is being filled, or NULL
    Py_ssize_t threshold
    Py_ssize_t elements_left
    Py_ssize_t buffers_left
    Py_ssize_t bytes_left       # of the message's limit, after the large buffers
    int depth_left


cdef int grow(Out* out, Py_ssize_t more) noexcept:
    """Make room for *more* bytes. 0 if the body would not be small any more, or there is no memory."""
    cdef Py_ssize_t used = out.at - out.start
    cdef Py_ssize_t size = 2 * (used + more)
    cdef PyObject* heap
    if more > COMPILED_BYTES - used:
        return 0
    if size > COMPILED_BYTES:
        size = COMPILED_BYTES
    heap = raw_bytes_new(NULL, size)
    if heap is NULL:
        PyErr_Clear()
        return 0
    memcpy(raw_bytes_data(heap), out.start, used)
    Py_XDECREF(out.heap)
    out.heap = heap
    out.start = <uint8_t*>raw_bytes_data(heap)
    out.at = out.start + used
    out.end = out.start + size
    return 1


cdef inline bint room(Out* out, Py_ssize_t more) noexcept:
    return out.end - out.at >= more or grow(out, more)


cdef inline void put(uint8_t* at, uint64_t value, int size) noexcept nogil:
    cdef int i
    for i in range(size):
        at[i] = <uint8_t>(value >> (8 * (size - 1 - i)))


cdef inline void put_number(Out* out, int kind, uint64_t value, int size) noexcept nogil:
    out.at[0] = <uint8_t>kind
    put(out.at + 1, value, size)
    out.at += 1 + size


cdef inline int pack_int(Out* out, long long value) noexcept:
    cdef uint64_t bits = <uint64_t>value
    if not room(out, 9):
        return 0
    if -32 <= value <= 127:
        out.at[0] = <uint8_t>value
        out.at += 1
    elif value > 0:
        if value <= 0xFF:
            put_number(out, 0xCC, bits, 1)
        elif value <= 0xFFFF:
            put_number(out, 0xCD, bits, 2)
        elif value <= 0xFFFFFFFFLL:
            put_number(out, 0xCE, bits, 4)
        else:
            put_number(out, 0xCF, bits, 8)
    elif value >= -0x80:
        put_number(out, 0xD0, bits, 1)
    elif value >= -0x8000:
        put_number(out, 0xD1, bits, 2)
    elif value >= -0x80000000LL:
        put_number(out, 0xD2, bits, 4)
    else:
        put_number(out, 0xD3, bits, 8)
    return 1


cdef inline int pack_raw(Out* out, const char* data, Py_ssize_t size, int wide) noexcept:
    # ``wide`` is the head with 8 bits of length; those with 16 and 32 bits follow it.
    if not room(out, size + 5):
        return 0
    if wide == 0xD9 and size < 32:
        out.at[0] = <uint8_t>(0xA0 | size)
        out.at += 1
    elif size <= 0xFF:
        put_number(out, wide, <uint64_t>size, 1)
    elif size <= 0xFFFF:
        put_number(out, wide + 1, <uint64_t>size, 2)
    else:
        put_number(out, wide + 2, <uint64_t>size, 4)
    if size:                                        # an empty buffer may be at NULL
        memcpy(out.at, data, size)
    out.at += size
    return 1


cdef inline int open_container(Out* out, Py_ssize_t size, Py_ssize_t elements, int small, int wide) noexcept:
    out.elements_left -= elements
    out.depth_left -= 1
    if out.elements_left < 0 or out.depth_left < 0 or size > 0x7FFFFFFF or not room(out, 5):
        return 0
    if size < 16:
        out.at[0] = <uint8_t>(small | size)
        out.at += 1
    elif size <= 0xFFFF:
        put_number(out, wide, <uint64_t>size, 2)
    else:
        put_number(out, wide + 1, <uint64_t>size, 4)
    return 1


cdef int pack_reference(Out* out, object value, Py_ssize_t size, list buffers) except -1:
    out.buffers_left -= 1
    out.bytes_left -= size
    if out.buffers_left < 0 or out.bytes_left < 0 or not room(out, 6):
        return 0
    out.at[0] = 0xD6                                # fixext 4
    out.at[1] = EXT_BUFFER_CODE
    size = len(buffers)
    out.at[2] = <uint8_t>size
    out.at[3] = <uint8_t>(size >> 8)
    out.at[4] = <uint8_t>(size >> 16)
    out.at[5] = <uint8_t>(size >> 24)
    out.at += 6
    buffers.append(value)
    return 1


cdef int pack(object value, Out* out, list buffers) except -1:
    """Append *value* to *out*: 1 if done, 0 if it has to go the general way (then *out* is of no use)."""
    cdef Py_ssize_t size = 0
    cdef const char* text
    cdef long long number
    cdef int overflow = 0
    cdef double real
    cdef uint64_t bits = 0
    if PyUnicode_CheckExact(value):
        try:
            text = PyUnicode_AsUTF8AndSize(value, &size)
        except UnicodeEncodeError:                  # lone surrogates: the general way says so
            return 0
        return pack_raw(out, text, size, 0xD9)
    if PyBytes_CheckExact(value):
        size = PyBytes_GET_SIZE(value)
        if size >= out.threshold:
            return pack_reference(out, value, size, buffers)
        return pack_raw(out, PyBytes_AS_STRING(value), size, 0xC4)
    if PyLong_CheckExact(value):
        number = PyLong_AsLongLongAndOverflow(value, &overflow)
        return 0 if overflow else pack_int(out, number)
    if value is None or value is True or value is False:
        if not room(out, 1):
            return 0
        out.at[0] = 0xC0 if value is None else 0xC3 if value is True else 0xC2
        out.at += 1
        return 1
    if PyFloat_CheckExact(value):
        if not room(out, 9):
            return 0
        real = PyFloat_AS_DOUBLE(value)
        memcpy(&bits, &real, 8)
        put_number(out, 0xCB, bits, 8)
        return 1
    if PyTuple_CheckExact(value):
        size = len(<tuple>value)
        if not open_container(out, size, size, 0x90, 0xDC):
            return 0
        for item in <tuple>value:
            if not pack(item, out, buffers):
                return 0
        out.depth_left += 1
        return 1
    if PyDict_CheckExact(value):
        return pack_dict(<dict>value, out, buffers)
    if PyList_CheckExact(value):
        return pack_list(<list>value, out, buffers)
    if PyByteArray_CheckExact(value) or PyMemoryView_Check(value):
        return pack_view(value, out, buffers)
    return 0


cdef int pack_view(object value, Out* out, list buffers) except -1:
    cdef Py_buffer view
    try:
        PyObject_GetBuffer(value, &view, PyBUF_SIMPLE)
    except (BufferError, ValueError):               # not contiguous, or released: the general way sees to it
        return 0
    try:
        if view.len >= out.threshold:
            return pack_reference(out, value, view.len, buffers)
        return pack_raw(out, <const char*>view.buf, view.len, 0xC4)
    finally:
        PyBuffer_Release(&view)


cdef int pack_list(list value, Out* out, list buffers) except -1:
    # Another thread may change the list meanwhile: what was announced must be what follows.
    cdef Py_ssize_t size = len(value)
    if not open_container(out, size, size, 0x90, 0xDC):
        return 0
    for item in value:
        if not pack(item, out, buffers):
            return 0
        size -= 1
    out.depth_left += 1
    return size == 0


cdef int pack_dict(dict value, Out* out, list buffers) except -1:
    cdef Py_ssize_t size = len(value)
    if not open_container(out, size, 2 * size, 0x80, 0xDE):
        return 0
    if size:
        for key, item in value.items():
            if not PyUnicode_CheckExact(key) or not pack(key, out, buffers) or not pack(item, out, buffers):
                return 0
            size -= 1
    out.depth_left += 1
    return size == 0


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


cdef object unpack_array(In* source, uint64_t size, BodyCodec codec, Buffers buffers):
    cdef Py_ssize_t i
    unpack_head(source, size)
    result = PyList_New(<Py_ssize_t>size)
    for i in range(<Py_ssize_t>size):
        item = unpack(source, codec, buffers)
        Py_INCREF(item)                             # stolen by the list
        PyList_SET_ITEM(result, i, item)
    source.depth -= 1
    return result


cdef object unpack_key(In* source, BodyCodec codec, Buffers buffers):
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


cdef object unpack_map(In* source, uint64_t size, BodyCodec codec, Buffers buffers):
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


cdef object unpack_ext(In* source, uint64_t size, BodyCodec codec, Buffers buffers):
    cdef int code = <int8_t>take(source, 1)[0]
    cdef const uint8_t* at
    if code == EXT_BUFFER_CODE and size == 4:
        at = take(source, 4)
        return buffers.take(at[0] | at[1] << 8 | at[2] << 16 | <uint32_t>at[3] << 24)
    return codec.read_ext(code, unpack_bytes(source, size), buffers)


cdef object unpack(In* source, BodyCodec codec, Buffers buffers):
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


cdef class BodyCodec:
    """The compiled base of the msgpack codec.

    It keeps the limits that a subclass gives to ``_keep``, and without them has no room for anything. It
    holds numbers only, so it is thread-safe. A subclass has two methods:

    * ``encode_any(value, buffers) -> bytes`` for what ``encode`` leaves to it: a value that is not made of
      exactly None, bool, int, float, str, bytes, bytearray, contiguous memoryview, tuple, list, and dict with
      str keys; a nesting over 16; a body over 1 MiB; and all that is an error;
    * ``read_ext(code, data, buffers) -> object`` for the value of an extension type; *buffers* is a
      :class:`Buffers`.
    """

    cdef Py_ssize_t message_bytes
    cdef Py_ssize_t buffers
    cdef Py_ssize_t inline_bytes
    cdef Py_ssize_t elements
    cdef int depth

    def _keep(
        self,
        Py_ssize_t message_bytes,
        Py_ssize_t buffers,
        Py_ssize_t inline_bytes,
        Py_ssize_t elements,
        Py_ssize_t depth,
    ):
        """Set the limits; before the first use, by the subclass's constructor only."""
        self.message_bytes = message_bytes
        self.buffers = buffers
        self.inline_bytes = inline_bytes
        self.elements = elements
        self.depth = <int>min(depth, <Py_ssize_t>ZMQCORE_MAX_DEPTH)

    def encode(self, value, list buffers not None):
        """Return *value* as a body; large buffers in it are appended to *buffers*. See ``Codec.encode``."""
        cdef uint8_t[ZMQCORE_STACK_BYTES] stack
        cdef Out out
        cdef Py_ssize_t before = len(buffers)
        out.start = out.at = stack
        out.end = out.at + ZMQCORE_STACK_BYTES
        out.heap = NULL
        out.threshold = self.inline_bytes
        out.elements_left = self.elements - 1
        out.buffers_left = self.buffers - before
        out.bytes_left = self.message_bytes
        out.depth_left = min(self.depth, <int>ZMQCORE_COMPILED_DEPTH)
        try:
            if pack(value, &out, buffers) and out.at - out.start <= out.bytes_left:
                return PyBytes_FromStringAndSize(<const char*>out.start, out.at - out.start)
        except RuntimeError:                        # another thread changed a dict: the general way says so
            pass
        finally:
            Py_XDECREF(out.heap)
        del buffers[before:]
        return self.encode_any(value, buffers)

    def decode(self, body, buffers):
        """Return the value in *body*, whose large buffers are in *buffers*. See ``Codec.decode``."""
        cdef Py_buffer view
        cdef In source
        cdef Buffers taken = NO_BUFFERS
        cdef Py_ssize_t size = 0
        if len(buffers):
            taken = Buffers(buffers)
            if taken.unused > self.buffers:
                raise PayloadTooLarge(
                    f"the message has {taken.unused} out-of-band buffers, the limit is {self.buffers}"
                )
            for buffer in buffers:
                if PyMemoryView_Check(buffer):
                    size += PyMemoryView_GET_BUFFER(buffer).len
                else:
                    size += memoryview(buffer).nbytes
        PyObject_GetBuffer(body, &view, PyBUF_SIMPLE)
        source.keys = NULL
        try:
            size += view.len
            if size > self.message_bytes:
                raise PayloadTooLarge(f"the message has {size} bytes, the limit is {self.message_bytes}")
            source.start = source.at = <const uint8_t*>view.buf
            source.end = source.at + view.len
            source.max_depth = self.depth
            source.max_elements = self.elements
            source.elements = 1
            source.depth = 0
            # An element takes a byte at least: a shorter body cannot hold too many, and this pass is spared.
            if view.len > self.elements:
                scanned(source.start, view.len, self.depth, self.elements)
            value = unpack(&source, self, taken)
            if source.at != source.end:
                bad(&source, f"{source.end - source.at} surplus bytes")
        finally:
            drop_keys(&source)
            PyBuffer_Release(&view)
        if taken.unused:
            raise ProtocolError(f"malformed body: {taken.unused} buffers of {len(buffers)} have no reference")
        return value
