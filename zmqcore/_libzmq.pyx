# cython: language_level=3, embedsignature=True, auto_pickle=False, freethreading_compatible=True
"""The one libzmq of the process: the copy that pyzmq has already loaded, reached through a table of C functions.

pyzmq's wheels bundle libzmq. A second copy in the process could not share contexts or sockets with it, so zmqcore
links none. At import the functions are looked up in pyzmq's own extension: ``dlopen`` with ``RTLD_NOLOAD`` gives
a handle to what is loaded already, and ``dlsym`` also searches that handle's dependencies (dlsym(3)).
"""

import zmq
from zmq.backend.cython import _zmq as _pyzmq_extension

from zmqcore import errors

from libc.errno cimport EAGAIN, EHOSTUNREACH, EINTR, EINVAL, EMFILE, ENFILE, ENOMEM, ENOTSOCK

cdef extern from "dlfcn.h" nogil:
    ctypedef struct Dl_info:
        const char *dli_fname
    void *dlopen(const char *path, int flags)
    void *dlsym(void *handle, const char *symbol)
    int dladdr(const void *address, Dl_info *info)
    char *dlerror()
    int RTLD_NOW
    int RTLD_NOLOAD

__all__ = ["capabilities", "extension_path", "has", "library_path", "library_version"]

_EXTENSION_PATH = str(_pyzmq_extension.__file__)


cdef void *_symbol(void *handle, bytes name) except NULL:
    cdef void *address = dlsym(handle, name)
    if address == NULL:
        raise ImportError(
            f"the libzmq {zmq.zmq_version()} that pyzmq {zmq.__version__} has loaded through {_EXTENSION_PATH}"
            f" does not offer {name.decode()}; install pyzmq's own wheel: pip install --force-reinstall pyzmq"
        )
    return address


cdef int _load() except -1:
    cdef bytes path = _EXTENSION_PATH.encode()
    cdef void *handle = dlopen(path, RTLD_NOW | RTLD_NOLOAD)
    if handle == NULL:
        reason = dlerror()
        raise ImportError(
            f"pyzmq's extension {_EXTENSION_PATH} cannot be reached"
            f" ({reason.decode() if reason is not NULL else 'not loaded'});"
            " zmqcore needs CPython with pyzmq's Cython back end: pip install --force-reinstall pyzmq"
        )
    # The handle stays open as long as the process: the table points into the library.
    libzmq.msg_init = <int (*)(zc_msg_t *) noexcept nogil>_symbol(handle, b"zmq_msg_init")
    libzmq.msg_init_size = <int (*)(zc_msg_t *, size_t) noexcept nogil>_symbol(handle, b"zmq_msg_init_size")
    libzmq.msg_init_data = <int (*)(zc_msg_t *, void *, size_t, zc_free_fn, void *) noexcept nogil>_symbol(
        handle, b"zmq_msg_init_data")
    libzmq.msg_send = <int (*)(zc_msg_t *, void *, int) noexcept nogil>_symbol(handle, b"zmq_msg_send")
    libzmq.msg_recv = <int (*)(zc_msg_t *, void *, int) noexcept nogil>_symbol(handle, b"zmq_msg_recv")
    libzmq.msg_close = <int (*)(zc_msg_t *) noexcept nogil>_symbol(handle, b"zmq_msg_close")
    libzmq.msg_move = <int (*)(zc_msg_t *, zc_msg_t *) noexcept nogil>_symbol(handle, b"zmq_msg_move")
    libzmq.msg_copy = <int (*)(zc_msg_t *, zc_msg_t *) noexcept nogil>_symbol(handle, b"zmq_msg_copy")
    libzmq.msg_data = <void *(*)(zc_msg_t *) noexcept nogil>_symbol(handle, b"zmq_msg_data")
    libzmq.msg_size = <size_t (*)(const zc_msg_t *) noexcept nogil>_symbol(handle, b"zmq_msg_size")
    libzmq.msg_more = <int (*)(const zc_msg_t *) noexcept nogil>_symbol(handle, b"zmq_msg_more")
    libzmq.getsockopt = <int (*)(void *, int, void *, size_t *) noexcept nogil>_symbol(handle, b"zmq_getsockopt")
    libzmq.setsockopt = <int (*)(void *, int, const void *, size_t) noexcept nogil>_symbol(handle, b"zmq_setsockopt")
    libzmq.get_errno = <int (*)() noexcept nogil>_symbol(handle, b"zmq_errno")
    libzmq.strerror = <const char *(*)(int) noexcept nogil>_symbol(handle, b"zmq_strerror")
    libzmq.version = <void (*)(int *, int *, int *) noexcept nogil>_symbol(handle, b"zmq_version")
    libzmq.has = <int (*)(const char *) noexcept nogil>_symbol(handle, b"zmq_has")
    return 0


_load()


cdef int raise_errno(int code, object what) except -1:
    """Turn libzmq's errno ``code`` into one of our exceptions. ``what`` says what was tried.

    EAGAIN and EINTR are part of normal operation: whoever sees them handles them and does not come here.
    """
    text = libzmq.strerror(code).decode(errors="replace")
    if code == ZMQ_ETERM or code == ENOTSOCK:
        raise errors.Closed(f"{what}: the ZeroMQ context or socket has been closed ({text})")
    if code == EHOSTUNREACH:
        raise errors.PeerLost(f"{what}: the peer has gone ({text})")
    if code == EMFILE or code == ENFILE:
        raise errors.PoolExhausted(f"{what}: the process has no file descriptor left ({text}); see zmqcore doctor")
    if code == ENOMEM:
        raise MemoryError(f"{what}: {text}")
    if code in (EINVAL, EAGAIN, EINTR, ZMQ_EFSM):
        raise errors.InternalError(f"{what}: libzmq says {text} (errno {code}); please report this")
    raise OSError(code, f"{what}: {text}")


def library_path() -> str:
    """Return the path of the shared library that holds libzmq: pyzmq's bundled copy, or the system's."""
    cdef Dl_info info
    if dladdr(<const void *>libzmq.msg_send, &info) == 0 or info.dli_fname == NULL:
        return _EXTENSION_PATH
    return info.dli_fname.decode()


def extension_path() -> str:
    """Return the path of pyzmq's extension through which libzmq was found."""
    return _EXTENSION_PATH


def library_version() -> tuple[int, int, int]:
    """Return libzmq's version as (major, minor, patch)."""
    cdef int major = 0, minor = 0, patch = 0
    libzmq.version(&major, &minor, &patch)
    return (major, minor, patch)


def has(capability: str) -> bool:
    """Say whether libzmq was built with ``capability``: "ipc", "curve", "pgm", "gssapi", … (zmq_has)."""
    cdef bytes name = capability.encode()
    return libzmq.has(name) == 1


def capabilities() -> dict[str, bool]:
    """Return what libzmq was built with, by name."""
    return {name: has(name) for name in ("ipc", "curve", "gssapi", "pgm", "tipc", "norm", "vmci", "draft")}
