# What the encoder and the decoder share.

cdef extern from *:
    """
    /* Bounds the C recursion of the walkers: 512 levels take some 100 KiB of stack. */
    #define ZMQCORE_MAX_DEPTH 512
    """
    enum:
        ZMQCORE_MAX_DEPTH


# Extension code of a reference to an out-of-band buffer (see the table in codec.py).
cdef enum:
    EXT_BUFFER_CODE = 1


# The limits that a codec keeps, for what it sends and for what it receives.
cdef struct Limits:
    Py_ssize_t message_bytes
    Py_ssize_t buffers
    Py_ssize_t inline_bytes
    Py_ssize_t elements
    int depth
