# cython: language_level=3, embedsignature=True, auto_pickle=False, freethreading_compatible=True
"""One ZeroMQ socket made safe to share: its lock, the edge-trigger rule, and the ways to wait.

This is the only place that knows these rules:

* Every libzmq operation on the socket is non-blocking and happens under the socket's lock. The lock is not the
  GIL, and a small operation does not release the GIL: only real waiting does.
* ``ZMQ_FD`` is edge-triggered (zmq_getsockopt(3)). Nobody waits on it unless ``ZMQ_EVENTS``, read after the last
  receive, had no POLLIN, however that receive ended; and who sends while somebody waits reads ``ZMQ_EVENTS``
  afterwards, because sending may have swallowed the edge.
* Waiting is poll(2) outside the lock, on the socket's fd and on an eventfd by which other threads wake the waiter.
  Before it blocks it polls without blocking and yields the processor between tries, for a short while: a round
  trip over loopback is answered sooner than a blocked thread wakes up. It does so only while that pays.

Sockets do not survive a fork: everything here carries the generation of the process that made it.
"""

import os

import zmq

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport INT64_MAX, int64_t, uint64_t
from libc.string cimport memcpy

from zmqcore._libzmq cimport (
    ZMQ_DONTWAIT, ZMQ_EVENTS, ZMQ_FD, ZMQ_HEARTBEAT_IVL, ZMQ_HEARTBEAT_TIMEOUT, ZMQ_POLLIN, ZMQ_POLLOUT,
    ZMQ_TCP_KEEPALIVE, ZMQ_TCP_KEEPALIVE_IDLE, ZMQ_TCP_KEEPALIVE_INTVL, ZMQ_TCP_MAXRT, libzmq, raise_errno, zc_msg_t,
)

from zmqcore import options


cdef extern from *:
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <poll.h>
    #include <sched.h>
    #include <stdint.h>
    #include <time.h>
    #include <unistd.h>
    #ifdef __linux__
    #include <sys/epoll.h>
    #include <sys/eventfd.h>
    #endif
    #include <sys/stat.h>

    /* Is a descriptor that was registered here still the same open file? Its number may have been given to another
       one since. On Linux an epoll instance knows: an entry is the pair of number and open file, so that changing
       it fails as soon as either is gone (epoll(7)). Elsewhere the inode tells: ZMQ_FD is a socket or a pipe. */
    #ifdef __linux__
    static int zc_fds_open(void) { return epoll_create1(EPOLL_CLOEXEC); }
    static int zc_fds_ctl(int epoll_fd, int op, int fd) {
        struct epoll_event event = {0};
        event.data.fd = fd;
        return epoll_ctl(epoll_fd, op, fd, &event);
    }
    static int zc_fds_add(int epoll_fd, int fd) { return zc_fds_ctl(epoll_fd, EPOLL_CTL_ADD, fd); }
    static int zc_fds_has(int epoll_fd, int fd) { return zc_fds_ctl(epoll_fd, EPOLL_CTL_MOD, fd) == 0; }
    #else
    static int zc_fds_open(void) { return -2; }
    static int zc_fds_add(int epoll_fd, int fd) { (void)epoll_fd; (void)fd; return 0; }
    static int zc_fds_has(int epoll_fd, int fd) { (void)epoll_fd; (void)fd; return 0; }
    #endif
    static uint64_t zc_inode(int fd) {
        struct stat status;
        return fstat(fd, &status) == 0 ? (uint64_t)status.st_ino + 1 : 0;
    }

    /* Before Python 3.12 any allocation may collect garbage, and so run a finalizer, which is user code: under one of
       our locks it could wait for that very lock. Later versions collect only between bytecodes. */
    #if PY_VERSION_HEX < 0x030C0000
    #define zc_gc_pause() PyGC_Disable()
    #define zc_gc_resume(was_on) do { if (was_on) PyGC_Enable(); } while (0)
    #else
    #define zc_gc_pause() 0
    #define zc_gc_resume(was_on) ((void)(was_on))
    #endif

    /* The clock of time.monotonic(). */
    static inline int64_t zc_now_ns(void) {
    #ifdef __APPLE__
        return (int64_t)clock_gettime_nsec_np(CLOCK_UPTIME_RAW);
    #else
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
    #endif
    }

    /* The same clock as of the last timer tick, some ms ago at most, for a fifth of the price. */
    static inline int64_t zc_coarse_now_ns(void) {
    #ifdef CLOCK_MONOTONIC_COARSE
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC_COARSE, &t);
        return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
    #else
        return zc_now_ns();
    #endif
    }

    /* A descriptor to wake a poll by. One eventfd on Linux, else a pipe; both ends non-blocking, not inherited. */
    static int zc_wake_open(int *read_fd, int *write_fd) {
    #ifdef __linux__
        *read_fd = *write_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
        return *read_fd < 0 ? -1 : 0;
    #else
        int ends[2], i;
        if (pipe(ends) < 0) return -1;
        for (i = 0; i < 2; i++) {
            fcntl(ends[i], F_SETFD, FD_CLOEXEC);
            fcntl(ends[i], F_SETFL, O_NONBLOCK);
        }
        *read_fd = ends[0]; *write_fd = ends[1];
        return 0;
    #endif
    }
    static void zc_wake_close(int read_fd, int write_fd) {
        if (read_fd >= 0) close(read_fd);
        if (write_fd >= 0 && write_fd != read_fd) close(write_fd);
    }
    static void zc_wake_write(int fd) {
        static const uint64_t one = 1;
        while (write(fd, &one, sizeof one) < 0 && errno == EINTR) {}
    }
    static void zc_wake_clear(int fd) {
        char buffer[64];
    #ifdef __linux__
        while (read(fd, buffer, sizeof buffer) < 0 && errno == EINTR) {}    /* one read takes all of an eventfd */
    #else
        while (read(fd, buffer, sizeof buffer) > 0) {}
    #endif
    }

    /* A yield that takes longer than this, in ns, has given the CPU to a thread that computes. Blocking would not: who
       is woken goes first. So this process then spins no more for a while, that long at first and at most. */
    #define ZC_YIELD_LOST_NS 500000
    #define ZC_BARRED_FIRST_NS 5000000
    #define ZC_BARRED_MOST_NS 3200000000
    static int64_t zc_barred_until = 0, zc_barred_for = 0;
    static int zc_spin_barred(int64_t now) {
        return now < __atomic_load_n(&zc_barred_until, __ATOMIC_RELAXED);
    }
    static void zc_bar_spin(int64_t now) {
        int64_t last = __atomic_load_n(&zc_barred_until, __ATOMIC_RELAXED);
        int64_t ns = __atomic_load_n(&zc_barred_for, __ATOMIC_RELAXED);
        ns = now - last < 4 * ns ? 2 * ns : ZC_BARRED_FIRST_NS;
        if (ns > ZC_BARRED_MOST_NS) ns = ZC_BARRED_MOST_NS;
        __atomic_store_n(&zc_barred_for, ns, __ATOMIC_RELAXED);
        __atomic_store_n(&zc_barred_until, now + ns, __ATOMIC_RELAXED);
    }

    /* poll(2) on up to two descriptors (-1: none) until `deadline`, first `spin_ns` long without blocking.
       Returns a set of bits: 1 fd is readable, 2 wake_fd is, 4 a signal came; 0 when the time is over. */
    static int zc_wait(int fd, int wake_fd, int64_t deadline, int64_t spin_ns) {
        struct pollfd fds[2] = {{fd, POLLIN, 0}, {wake_fd, POLLIN, 0}};
        struct timespec left;
        int64_t now, before, spin_until;
        int n;
        if (spin_ns > 0) {
            now = zc_now_ns();
            spin_until = now + spin_ns < deadline ? now + spin_ns : deadline;
            do {
                n = poll(fds, 2, 0);
                if (n > 0) goto ready;
                if (n < 0 && errno == EINTR) return 4;
                before = now;
                sched_yield();
                now = zc_now_ns();
                if (now - before > ZC_YIELD_LOST_NS) zc_bar_spin(now);
            } while (now < spin_until);
        }
        if (deadline == INT64_MAX) {
            n = poll(fds, 2, -1);
        } else {
            now = zc_now_ns();
            if (deadline <= now) {
                n = poll(fds, 2, 0);
            } else {
    #ifdef __linux__
                left.tv_sec = (deadline - now) / 1000000000;
                left.tv_nsec = (deadline - now) % 1000000000;
                n = ppoll(fds, 2, &left, NULL);
    #else
                (void)left;
                /* Rounded up: to wait a little too long beats a busy loop at the end. */
                int64_t ms = (deadline - now + 999999) / 1000000;
                n = poll(fds, 2, ms > 2000000000 ? 2000000000 : (int)ms);
    #endif
            }
        }
        if (n < 0) return errno == EINTR ? 4 : 1;    /* any other error shows at the next operation */
    ready:
        n = (fds[0].revents ? 1 : 0) | (fds[1].revents ? 2 : 0);
        if (n & 2) zc_wake_clear(wake_fd);
        return n;
    }
    """
    int zc_gc_pause() noexcept
    void zc_gc_resume(int was_on) noexcept
    int zc_fds_open() noexcept nogil
    int zc_fds_add(int epoll_fd, int fd) noexcept nogil
    int zc_fds_has(int epoll_fd, int fd) noexcept nogil
    uint64_t zc_inode(int fd) noexcept nogil
    int64_t zc_now_ns() noexcept nogil
    int64_t zc_coarse_now_ns() noexcept nogil
    int zc_wake_open(int *, int *) noexcept nogil
    void zc_wake_close(int, int) noexcept nogil
    void zc_wake_write(int) noexcept nogil
    void zc_wake_clear(int) noexcept nogil
    int zc_wait(int fd, int wake_fd, int64_t deadline, int64_t spin_ns) noexcept nogil
    bint zc_spin_barred(int64_t now) noexcept nogil

__all__ = ["check_liveness", "generation", "open_sockets", "waiters"]

NEVER = INT64_MAX

# The longest timeout that is taken as one; anything above it is "never" (about 146 years).
cdef double _LONGEST_SECONDS = 4.6e9

cdef uint64_t _generation = 1

# How many idle Waiters are kept at most. An eventfd costs 2 µs, and as many threads as wait at a time seldom end their
# waits together.
cdef enum:
    MOST_IDLE = 16

cdef cython.pymutex _counting   # guards the next three; nothing else happens under it
cdef list _idle_waiters = []
cdef int64_t _open_waiters = 0
cdef int64_t _open_sockets = 0  # as long as there is none, no Waiter is kept


cdef int64_t now_ns() noexcept nogil:
    return zc_now_ns()


cdef int gc_pause() noexcept:
    """Keep the garbage collector from running under a lock; return what gc_resume() wants to know."""
    return zc_gc_pause()


cdef int gc_resume(int was_on) noexcept:
    zc_gc_resume(was_on)
    return 0


cdef int64_t coarse_now_ns() noexcept nogil:
    """Return now_ns() as of some ms ago: for what is measured in more than that, where it is asked often."""
    return zc_coarse_now_ns()


cdef int64_t deadline_after(timeout) except -1:
    """Return the monotonic time in ns that lies ``timeout`` seconds ahead; NEVER for None."""
    return deadline_from(zc_now_ns(), timeout)


cdef int64_t deadline_from(int64_t started, timeout) except -1:
    """Return the monotonic time in ns that lies ``timeout`` seconds after ``started``; NEVER for None."""
    cdef double seconds
    if timeout is None:
        return NEVER
    seconds = timeout
    if seconds != seconds:
        raise ValueError("timeout is not a number")
    if seconds >= _LONGEST_SECONDS:
        return NEVER
    if seconds < 0:
        seconds = 0
    return started + <int64_t>(seconds * 1e9)


# -- fork ---------------------------------------------------------------------------------------------------

cdef uint64_t fork_generation() noexcept nogil:
    """Return a number that is another one in a forked child than in its parent."""
    return _generation


def generation() -> int:
    """Return this process's generation: 1, and one more in each forked child than in its parent."""
    return _generation


def _after_fork_in_child():
    global _generation, _idle_waiters, _open_waiters, _open_sockets
    _generation += 1
    # The inherited eventfds are the parent's too: to write to one would wake the parent.
    _idle_waiters = []
    _open_waiters = _open_sockets = 0


os.register_at_fork(after_in_child=_after_fork_in_child)


# -- liveness -----------------------------------------------------------------------------------------------

# Of the limit: until the next heartbeat or keepalive, and for an answer. Together a little less than all.
cdef double _ASKED_AFTER = 1 / 3
cdef double _ANSWERED_WITHIN = 0.6


def check_liveness(liveness) -> float:
    """Return ``liveness`` as a float. Raises ValueError or TypeError if that is no limit of silence."""
    return options.seconds("liveness", liveness, 0.1, 86_400)


cdef int limit_silence(void *socket, double liveness, bint heartbeats) except -1:
    """Have every connection of ``socket``, which has none yet, broken when its peer has not been heard for so long.

    ``liveness`` is the limit in seconds, 0.1 to 86,400. With ``heartbeats``, ZMTP's: they are answered by the peer's
    I/O thread, which needs no GIL, so that a peer that computes is heard, and one that is stopped or cut off is not.
    They cost libzmq a timer per connection and a search through all of them per answer, which is too much for
    thousands. So one side has them, the one that connects; for the other one TCP alone tells (tcp(7)), to whole
    seconds, of peers that are cut off. TCP's own limit for what is not acknowledged is for both: libzmq sends no
    heartbeat while a message is half written.
    """
    check_liveness(liveness)
    set_option(socket, ZMQ_TCP_MAXRT, <int>(liveness * 1000 * _ANSWERED_WITHIN))
    if heartbeats:
        set_option(socket, ZMQ_HEARTBEAT_IVL, <int>(liveness * 1000 * _ASKED_AFTER))
        set_option(socket, ZMQ_HEARTBEAT_TIMEOUT, <int>(liveness * 1000 * _ANSWERED_WITHIN))
    else:
        pause = max(1, min(<int>(liveness * _ASKED_AFTER), 32_767))
        set_option(socket, ZMQ_TCP_KEEPALIVE, 1)
        set_option(socket, ZMQ_TCP_KEEPALIVE_IDLE, pause)
        set_option(socket, ZMQ_TCP_KEEPALIVE_INTVL, pause)
    return 0


cdef void *handle_of(socket) except NULL:
    """Return libzmq's socket behind a pyzmq socket, which owns it."""
    cdef size_t address = socket.underlying
    return <void *>address


cdef int set_option(void *socket, int option, int value) except -1:
    """Set an option of libzmq that is an int: ten of them, through pyzmq, took a third of making a channel's socket."""
    if libzmq.setsockopt(socket, option, &value, sizeof(int)) != 0:
        raise_errno(libzmq.get_errno(), f"cannot set option {option} to {value}")
    return 0


cdef bint is_ipv6(str endpoint):
    """Whether libzmq is to be told, by ZMQ_IPV6, that ``endpoint`` is one of IPv6."""
    return endpoint.startswith("tcp://[")


# -- waiting ------------------------------------------------------------------------------------------------

@cython.final
@cython.no_gc
cdef class Waiter:
    """One waiting thread: it waits here, any other thread wakes it. Owns its eventfd.

    A wake that comes after the wait has ended makes the next wait return early, so who waits looks at its
    condition again whatever wait() returned.
    """

    def __cinit__(self):
        global _open_waiters
        self.read_fd = self.write_fd = -1
        if zc_wake_open(&self.read_fd, &self.write_fd) != 0:
            raise_errno(errno, "cannot open an eventfd to wait on")
        self.generation = _generation
        _counting.acquire()
        _open_waiters += 1
        _counting.release()

    def __dealloc__(self):
        global _open_waiters
        wakes_settle(&self.owed)
        zc_wake_close(self.read_fd, self.write_fd)
        if self.read_fd >= 0 and self.generation == _generation:
            _counting.acquire()
            _open_waiters -= 1
            _counting.release()

    cdef int wait(self, int fd, int64_t deadline, int64_t spin_ns) except -1:
        """Wait until ``fd`` (-1: none) is readable, wake() is called, or ``deadline``. Releases the GIL.

        Returns WAIT_* bits. Runs signal handlers; what one raises is raised here.
        """
        cdef int result = 0
        try:
            if spin_ns > 0:
                with nogil:
                    self.wake_owed()
                    result = zc_wait(fd, self.read_fd, min(deadline, zc_now_ns() + spin_ns), spin_ns)
            if result == 0:
                # A signal that came before poll(2) does not interrupt it.
                PyErr_CheckSignals()
                with nogil:
                    self.wake_owed()
                    result = zc_wait(fd, self.read_fd, deadline, 0)
            if result & WAIT_INTERRUPTED:
                PyErr_CheckSignals()
        finally:
            if self.owed.n:
                wakes_settle(&self.owed)
        return result

    cdef int wake(self) noexcept nogil:
        zc_wake_write(self.write_fd)
        return 0

    cdef int wake_owed(self) noexcept nogil:
        """Wake those whom this thread was to wake as soon as it has let go of the GIL, which they need."""
        if self.owed.n_paid < self.owed.n:
            wakes_pay(&self.owed)
        return 0


cdef int wait_without_gil(int read_fd, int64_t deadline) noexcept nogil:
    """Wait until the Waiter with this descriptor (-1: none) is woken, or ``deadline``. Signal handlers do not run."""
    return zc_wait(-1, read_fd, deadline, 0)


cdef int wake_by(int write_fd) noexcept nogil:
    """Wake the Waiter with this descriptor, as its wake() does."""
    zc_wake_write(write_fd)
    return 0


cdef int wakes_owe(Wakes *wakes, Waiter waiter) noexcept:
    """Have ``waiter`` woken by wakes_pay(); by then it may wait for something else, which does no harm."""
    if wakes.n == MOST_WAKES:
        wakes_settle(wakes)
    Py_INCREF(waiter)
    wakes.waiters[wakes.n] = <void *>waiter
    wakes.n += 1
    return 0


cdef int wakes_move(Wakes *source, Wakes *target) noexcept:
    """Make ``target``, which is settled, owe what ``source`` does."""
    target.n = source.n
    target.n_paid = source.n_paid
    memcpy(target.waiters, source.waiters, source.n * sizeof(void *))
    source.n = source.n_paid = 0
    return 0


cdef int wakes_pay(Wakes *wakes) noexcept nogil:
    """Wake them, best without the GIL; afterwards wakes_settle()."""
    while wakes.n_paid < wakes.n:
        zc_wake_write((<Waiter>wakes.waiters[wakes.n_paid]).write_fd)
        wakes.n_paid += 1
    return 0


cdef int wakes_settle(Wakes *wakes) noexcept:
    """Wake who has not been woken yet, and let go of all of them."""
    cdef int i, n
    wakes_pay(wakes)
    n, wakes.n, wakes.n_paid = wakes.n, 0, 0
    for i in range(n):
        Py_DECREF(<Waiter>wakes.waiters[i])
    return 0


cdef Waiter waiter_borrow():
    """Return an idle Waiter, or a new one."""
    cdef Waiter waiter = None
    _counting.acquire()
    if _idle_waiters:
        waiter = <Waiter>_idle_waiters.pop()
    _counting.release()
    if waiter is None:
        return Waiter()
    waiter.over = False
    return waiter


cdef int waiter_return(Waiter waiter) except -1:
    """Keep ``waiter`` for the next thread that waits, if there may be one soon; else it goes with who still owes it."""
    _counting.acquire()
    if _open_sockets and len(_idle_waiters) < MOST_IDLE:
        _idle_waiters.append(waiter)
    _counting.release()
    return 0


def waiters() -> dict[str, int]:
    """Return how many eventfds for waiting threads are open, and how many of them are idle: 16 at most, and none while
    no socket is open."""
    return {"open": _open_waiters, "idle": len(_idle_waiters)}


def open_sockets() -> int:
    """Return how many channels and ports hold a socket."""
    return _open_sockets


@cython.final
cdef class OpenFds:
    """Tell whether descriptors that libzmq closes in its own time are still open. Not thread-safe.

    zmq_close(3) returns at once; the socket and its connections go when libzmq's threads get to it. ZMQ_FD is the last
    descriptor to go: when it has, so have the connections'.
    """

    def __cinit__(self):
        self.epoll_fd = zc_fds_open()
        if self.epoll_fd == -1:
            raise_errno(errno, "cannot open an epoll instance")
        self.inodes = {}

    def __dealloc__(self):
        self.close()

    cdef int add(self, int fd) except -1:
        """Remember ``fd``, which is open now."""
        if self.epoll_fd >= 0:
            if zc_fds_add(self.epoll_fd, fd) != 0:
                raise_errno(errno, f"cannot watch descriptor {fd}")
        else:
            self.inodes[fd] = zc_inode(fd)
        return 0

    cdef bint is_open(self, int fd) except -1:
        """Whether ``fd``, once added, is still the same open file."""
        if self.epoll_fd >= 0:
            return zc_fds_has(self.epoll_fd, fd)
        if self.inodes.get(fd) == zc_inode(fd):
            return True
        self.inodes.pop(fd, None)
        return False

    cdef int close(self) noexcept:
        if self.epoll_fd >= 0:
            zc_wake_close(self.epoll_fd, -1)
            self.epoll_fd = -2
        return 0


# -- the socket ---------------------------------------------------------------------------------------------

# For how long, in ns, a socket's own score says more than that of its kind.
cdef int64_t SPIN_REMEMBERED = 50_000_000
# One in so many waits blocks at once although spinning pays, to tell what it is worth; rarely enough for its price to
# stay out of the slowest hundredth. And one in so many spins although it does not pay.
cdef unsigned int BLOCKS_EVERY = 256
cdef unsigned int SPINS_EVERY = 16


@cython.final
@cython.no_gc
cdef class SpinScore:
    """How well spinning has paid lately, for sockets that wait for the like. A hint: no lock guards it."""

    def __cinit__(self):
        self.score = 4


@cython.no_gc_clear         # an Outbox may use the socket until both are freed
cdef class SharedSocket:
    """A pyzmq socket under one lock. Takes ownership of ``socket``.

    ``spin_seconds`` is how long a wait polls without blocking before it blocks; 0 switches that off. ``spin_shared``
    is what others have found of that: it counts for a socket that has not waited for a while, as one of hundreds that
    are used in turn.
    """

    def __init__(self, socket: zmq.Socket, spin_seconds: float = 100e-6, spin_shared: SpinScore | None = None):
        cdef int fd = -1
        cdef size_t size = sizeof(int)
        self.socket = socket
        self.handle = handle_of(socket)
        if libzmq.getsockopt(self.handle, ZMQ_FD, &fd, &size) != 0:
            raise_errno(libzmq.get_errno(), "cannot read ZMQ_FD")
        self.fd = fd
        self.generation = _generation
        self.spin_ns = <int64_t>(spin_seconds * 1e9)
        self.spin_shared = SpinScore() if spin_shared is None else spin_shared
        self._count()

    cdef int _count(self) noexcept:
        global _open_sockets
        if not self.counted:
            self.counted = True
            _counting.acquire()
            _open_sockets += 1
            _counting.release()
        return 0

    cdef int _count_out(self) noexcept:
        """With the last socket of the process the idle Waiters go."""
        global _open_sockets, _idle_waiters
        cdef list idle = None
        if self.counted and self.generation == _generation:
            self.counted = False
            _counting.acquire()
            _open_sockets -= 1
            if _open_sockets == 0:
                idle, _idle_waiters = _idle_waiters, []
            _counting.release()
            if idle is not None:
                idle.clear()
        return 0

    def __dealloc__(self):
        self._count_out()

    cdef int enter(self) except -1:
        """Take the lock. Until leave() the garbage collector rests where it could run at any allocation."""
        self.lock.acquire()
        self.gc_was_on = gc_pause()
        return 0

    cdef int leave(self) noexcept:
        """Release the lock."""
        cdef int gc_was_on = self.gc_was_on
        self.lock.release()
        gc_resume(gc_was_on)
        return 0

    cdef int read_events(self) except -1:
        """Read ZMQ_EVENTS into ``readable`` and ``writable``. The lock is held."""
        cdef int events = 0
        cdef size_t size = sizeof(int)
        while libzmq.getsockopt(self.handle, ZMQ_EVENTS, &events, &size) != 0:
            if libzmq.get_errno() != EINTR:
                raise_errno(libzmq.get_errno(), "cannot read ZMQ_EVENTS")
        self.readable = events & ZMQ_POLLIN
        self.writable = events & ZMQ_POLLOUT
        return 0

    cdef bint is_ready(self) noexcept nogil:
        """Whether who waits on ``fd`` has something to see: a message, or that the connection has gone. The lock is
        held."""
        cdef int events = 0
        cdef size_t size = sizeof(int)
        return libzmq.getsockopt(self.handle, ZMQ_EVENTS, &events, &size) != 0 \
            or events & ZMQ_POLLIN or not events & ZMQ_POLLOUT

    cdef int receive(self, zc_msg_t *message) except -1:
        """Receive the first part of a message into ``message`` (initialised by the caller). The lock is held.

        Returns 0; or EAGAIN when there is certainly nothing: only then may somebody wait on ``fd``. Whether there is
        something is asked before a receive, not after one that has failed: a system call each time, and mostly there
        is nothing, or one message. Of more than that libzmq is asked at their end only.
        """
        cdef int code
        while True:
            if not self.readable:
                self.read_events()
                if not self.readable:
                    self.several = False
                    return EAGAIN
            if libzmq.msg_recv(message, self.handle, ZMQ_DONTWAIT) >= 0:
                self.readable = self.several
                self.several = True
                return 0
            code = libzmq.get_errno()
            if code == EAGAIN:
                self.readable = False
            elif code != EINTR:
                raise_errno(code, "cannot receive")

    cdef int leave_rest(self) noexcept:
        """Whatever else has come is for the next receive() to find. Nobody waits on ``fd`` before; the lock is held."""
        self.readable = self.several = False
        return 0

    cdef int receive_rest(self, zc_msg_t *message) except -1:
        """Receive a further part of a message: libzmq delivers them together. The lock is held."""
        while libzmq.msg_recv(message, self.handle, ZMQ_DONTWAIT) < 0:
            if libzmq.get_errno() != EINTR:
                raise_errno(libzmq.get_errno(), "cannot receive the rest of a multipart message")
        return 0

    cdef int64_t spin_budget(self) noexcept:
        """Return for how many ns the next wait should spin: 0 when spinning has not paid lately."""
        cdef int64_t now = zc_coarse_now_ns()
        cdef SpinScore shared = self.spin_shared
        if zc_spin_barred(now):
            return 0
        if now - self.spin_asked > SPIN_REMEMBERED:
            self.spin_score = shared.score
        self.spin_asked = now
        # Try the other way now and then: the load may have changed.
        shared.asked += 1
        if self.spin_score > 0:
            return self.spin_ns if shared.asked % BLOCKS_EVERY else 0
        return 0 if shared.asked % SPINS_EVERY else self.spin_ns

    cdef bint spin_result(self, int64_t budget, int64_t began, bint received) noexcept:
        """Take note of how a wait has ended for which spin_budget() gave ``budget``; return False if it has not yet.

        A message has been ``received``; or has not for so long that spinning does not pay.
        """
        cdef int64_t waited = zc_now_ns() - began
        cdef SpinScore shared = self.spin_shared
        cdef int change = -1
        if not received and waited <= 3 * self.spin_ns:
            return False
        if budget == 0:
            waited = min(waited, 3 * self.spin_ns)
            shared.blocked_ns += (waited - shared.blocked_ns) // 4 if shared.blocked_ns else waited
            return True
        # Where the CPUs are busy anyway nobody has to be woken from idleness, and who yields waits longer.
        if waited < budget and (shared.blocked_ns == 0 or waited < shared.blocked_ns):
            change = 2
        self.spin_score = max(0, min(self.spin_score + change, 8))
        shared.score = max(0, min(shared.score + change, 8))
        return True

    cdef object take_socket(self):
        """Return the socket, if there is one, for the caller to close: nobody uses it any more."""
        socket, self.socket = self.socket, None
        self.handle = NULL
        self._count_out()
        return socket

    cdef int close_socket(self) except -1:
        """Close the socket, dropping what has not been sent. Nobody may wait on ``fd``; the lock is not held."""
        socket = self.take_socket()
        if socket is not None and self.generation == _generation:
            try:
                socket.close(linger=0)
            except BaseException:
                socket.close(linger=0)      # a signal handler may have raised in pyzmq's Python code, before it closed
                raise
        return 0
