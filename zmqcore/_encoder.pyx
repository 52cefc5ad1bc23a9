# cython: language_level=3, embedsignature=True, auto_pickle=False, freethreading_compatible=True
# cython: boundscheck=False, wraparound=False
"""The sender's half of the msgpack codec.

``encoded`` makes a body of values of plain types in one pass, which keeps the limits too. :func:`lift` prepares all
other values for the msgpack library's packer: it takes the large buffers out and keeps the limits.

Everything here is thread-safe (it has no state but constants), also without the GIL, and safe across a fork.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytearray cimport PyByteArray_Check, PyByteArray_CheckExact
from cpython.dict cimport PyDict_Check, PyDict_CheckExact
from cpython.exc cimport PyErr_Clear
from cpython.float cimport PyFloat_AS_DOUBLE, PyFloat_CheckExact
from cpython.list cimport PyList_Check, PyList_CheckExact
from cpython.long cimport PyLong_CheckExact
from cpython.memoryview cimport PyMemoryView_Check
from cpython.ref cimport PyObject
from cpython.tuple cimport PyTuple_Check, PyTuple_CheckExact
from cpython.unicode cimport PyUnicode_CheckExact
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcpy

from msgpack import ExtType

from zmqcore.errors import PayloadTooLarge

from zmqcore._msgpack cimport EXT_BUFFER_CODE, ZMQCORE_MAX_DEPTH, Limits

__all__ = ["Unpackable", "lift"]

cdef extern from "Python.h":
    const char* PyUnicode_AsUTF8AndSize(object text, Py_ssize_t* size) except NULL
    long long PyLong_AsLongLongAndOverflow(object value, int* overflow) except? -1
    bint PyBytes_Check(object value)
    # The same functions as in cpython.bytes, for a bytes object that is not an object of Cython's yet.
    PyObject* raw_bytes_new "PyBytes_FromStringAndSize" (const char* data, Py_ssize_t size)
    char* raw_bytes_data "PyBytes_AS_STRING" (PyObject* raw)
    void Py_XDECREF(PyObject* value)

cdef extern from *:
    """
    /* Room on the stack for almost every call without a large argument; beyond it the heap is used. */
    #define ZMQCORE_STACK_BYTES 4096
    /* The longest body and the deepest nesting that the compiled encoder makes. */
    #define ZMQCORE_COMPILED_BYTES (1 << 20)
    #define ZMQCORE_COMPILED_DEPTH 16
    """
    enum:
        ZMQCORE_STACK_BYTES
        ZMQCORE_COMPILED_BYTES
        ZMQCORE_COMPILED_DEPTH

cdef Py_ssize_t COMPILED_BYTES = ZMQCORE_COMPILED_BYTES


class Unpackable(Exception):
    """A value inside the payload has no form on the wire: ``value`` is it (by identity), ``reason`` says why.

    Internal between the walkers and the codec, which finds the path to the value and raises ``BadArguments``.
    """

    def __init__(self, value, reason):
        super().__init__(reason)
        self.value = value
        self.reason = reason


# -- for the library's packer: large buffers out, limits kept ----------------------------------------------


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
        return lifted_items(<list>value, walk, buffers, depth + 1)
    if PyTuple_Check(value):
        if isinstance(value, ExtType):
            raise Unpackable(value, "extension types of one's own are not carried; send bytes")
        enter(walk, depth)
        return lifted_items(<tuple>value, walk, buffers, depth + 1)
    if PyMemoryView_Check(value):
        return lifted_view(value, walk, buffers)
    return value


ctypedef fused Items:
    list
    tuple


cdef object lifted_items(Items value, Walk* walk, list buffers, Py_ssize_t depth):
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
    return ExtType(EXT_BUFFER_CODE, index.to_bytes(4, "little"))


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


cdef bytes encoded(object value, list buffers, const Limits* limits):
    """Return *value* as a body, with its large buffers appended to *buffers*; None if it has to go the general way.

    Then *buffers* is as it was.
    """
    cdef uint8_t[ZMQCORE_STACK_BYTES] stack
    cdef Out out
    cdef Py_ssize_t before = len(buffers)
    out.start = out.at = stack
    out.end = out.at + ZMQCORE_STACK_BYTES
    out.heap = NULL
    out.threshold = limits.inline_bytes
    out.elements_left = limits.elements - 1
    out.buffers_left = limits.buffers - before
    out.bytes_left = limits.message_bytes
    out.depth_left = min(limits.depth, <int>ZMQCORE_COMPILED_DEPTH)
    try:
        if pack(value, &out, buffers) and out.at - out.start <= out.bytes_left:
            return PyBytes_FromStringAndSize(<const char*>out.start, out.at - out.start)
    except RuntimeError:                            # another thread changed a dict: the general way says so
        pass
    finally:
        Py_XDECREF(out.heap)
    del buffers[before:]
    return None
