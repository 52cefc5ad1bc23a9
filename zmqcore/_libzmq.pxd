"""libzmq's C functions as the other compiled modules call them.

The table is filled once, when ``zmqcore._libzmq`` is imported; every other compiled module imports that first.
"""

from libc.stddef cimport size_t

cdef extern from *:
    """
    /* libzmq's ABI, stable since 4.0: 64 opaque bytes, aligned to a pointer (zmq.h). Declared here so that no
       system header is needed: zmqcore links no libzmq of its own. */
    #if defined(_MSC_VER)
    #error "zmqcore supports Linux and macOS"
    #endif
    typedef struct zc_msg_t { unsigned char opaque[64]; } __attribute__((aligned(sizeof(void *)))) zc_msg_t;
    typedef void (*zc_free_fn)(void *data, void *hint);
    """
    ctypedef struct zc_msg_t:
        pass
    ctypedef void (*zc_free_fn)(void *data, void *hint) noexcept nogil

cdef struct LibZmq:
    int (*msg_init)(zc_msg_t *) noexcept nogil
    int (*msg_init_size)(zc_msg_t *, size_t) noexcept nogil
    int (*msg_init_data)(zc_msg_t *, void *, size_t, zc_free_fn, void *) noexcept nogil
    int (*msg_send)(zc_msg_t *, void *, int) noexcept nogil
    int (*msg_recv)(zc_msg_t *, void *, int) noexcept nogil
    int (*msg_close)(zc_msg_t *) noexcept nogil
    int (*msg_move)(zc_msg_t *, zc_msg_t *) noexcept nogil
    int (*msg_copy)(zc_msg_t *, zc_msg_t *) noexcept nogil
    void *(*msg_data)(zc_msg_t *) noexcept nogil
    size_t (*msg_size)(const zc_msg_t *) noexcept nogil
    int (*msg_more)(const zc_msg_t *) noexcept nogil
    int (*getsockopt)(void *, int, void *, size_t *) noexcept nogil
    int (*setsockopt)(void *, int, const void *, size_t) noexcept nogil
    int (*get_errno)() noexcept nogil
    const char *(*strerror)(int) noexcept nogil
    void (*version)(int *, int *, int *) noexcept nogil
    int (*has)(const char *) noexcept nogil

cdef LibZmq libzmq

# Values from zmq.h; part of libzmq's ABI.
cdef enum:
    ZMQ_DONTWAIT = 1
    ZMQ_SNDMORE = 2
    ZMQ_POLLIN = 1
    ZMQ_POLLOUT = 2
    ZMQ_FD = 14
    ZMQ_EVENTS = 15
    ZMQ_LINGER = 17
    ZMQ_RECONNECT_IVL = 18
    ZMQ_RECONNECT_IVL_MAX = 21
    ZMQ_MAXMSGSIZE = 22
    ZMQ_SNDHWM = 23
    ZMQ_RCVHWM = 24
    ZMQ_TCP_KEEPALIVE = 34
    ZMQ_TCP_KEEPALIVE_IDLE = 36
    ZMQ_TCP_KEEPALIVE_INTVL = 37
    ZMQ_IMMEDIATE = 39
    ZMQ_HEARTBEAT_IVL = 75
    ZMQ_HEARTBEAT_TIMEOUT = 77
    ZMQ_TCP_MAXRT = 80
    ZMQ_EFSM = 156384763
    ZMQ_ETERM = 156384765

cdef int raise_errno(int code, object what) except -1
