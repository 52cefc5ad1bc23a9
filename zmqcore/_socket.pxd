"""One ZeroMQ socket shared by threads, and how a thread waits: see ``_socket.pyx``."""

cimport cython
from libc.stdint cimport int64_t, uint64_t

from zmqcore._libzmq cimport zc_msg_t

cdef enum:
    WAIT_TIMED_OUT = 0
    WAIT_READABLE = 1
    WAIT_WOKEN = 2
    WAIT_INTERRUPTED = 4

cdef int64_t NEVER

cdef int64_t now_ns() noexcept nogil
cdef int64_t coarse_now_ns() noexcept nogil
cdef int64_t deadline_after(timeout) except -1
cdef int64_t deadline_from(int64_t started, timeout) except -1
cdef uint64_t fork_generation() noexcept nogil
cdef int limit_silence(void *socket, double liveness, bint heartbeats) except -1
cdef void *handle_of(socket) except NULL
cdef int set_option(void *socket, int option, int value) except -1
cdef bint is_ipv6(str endpoint)

cdef int gc_pause() noexcept
cdef int gc_resume(int was_on) noexcept

cdef enum:
    MOST_WAKES = 64

# Whom to wake a little later: Waiters, each one *owned*, so that its descriptor is open until it has been woken.
cdef struct Wakes:
    int n
    int n_paid                  # of these, the first so many have been woken
    void *waiters[64]

cdef int wait_without_gil(int read_fd, int64_t deadline) noexcept nogil
cdef int wake_by(int write_fd) noexcept nogil
cdef int wakes_owe(Wakes *wakes, Waiter waiter) noexcept
cdef int wakes_move(Wakes *source, Wakes *target) noexcept
cdef int wakes_pay(Wakes *wakes) noexcept nogil
cdef int wakes_settle(Wakes *wakes) noexcept

cdef class Waiter:
    cdef int read_fd
    cdef int write_fd
    cdef Wakes owed
    cdef bint over              # what it waits for is there; belongs to who uses that
    cdef uint64_t generation    # fork_generation() when it was made
    cdef int wake_owed(self) noexcept nogil
    cdef int wait(self, int fd, int64_t deadline, int64_t spin_ns) except -1
    cdef int wake(self) noexcept nogil

cdef Waiter waiter_borrow()
cdef int waiter_return(Waiter waiter) except -1

cdef class OpenFds:
    cdef int epoll_fd
    cdef dict inodes
    cdef int add(self, int fd) except -1
    cdef bint is_open(self, int fd) except -1
    cdef int close(self) noexcept

cdef class SpinScore:
    cdef int score                      # above 0: it has paid lately
    cdef unsigned int asked
    cdef int64_t blocked_ns             # what a wait takes that blocks at once, a running mean; 0: not known

cdef class SharedSocket:
    cdef readonly object socket         # owned: the pyzmq socket; None once closed
    cdef void *handle                   # borrowed from socket
    cdef readonly int fd                # ZMQ_FD, borrowed from socket
    cdef cython.pymutex lock            # guards every libzmq operation on the socket, and its owner's state
    cdef int gc_was_on
    cdef bint writable                  # ZMQ_POLLOUT, as of the last time that the events were read
    cdef bint readable                  # ZMQ_POLLIN, likewise; False also if it is not known
    cdef bint several                   # a message has been received since there was none
    cdef uint64_t generation            # fork_generation() when it was made
    cdef int spin_score                 # how well spinning has paid lately, on this socket
    cdef SpinScore spin_shared          # ... and on all that share it
    cdef int64_t spin_asked             # when spin_budget() was called last
    cdef readonly int64_t spin_ns
    cdef bint counted                   # among the open ones
    cdef int enter(self) except -1
    cdef int leave(self) noexcept
    cdef int read_events(self) except -1
    cdef bint is_ready(self) noexcept nogil
    cdef int receive(self, zc_msg_t *message) except -1
    cdef int leave_rest(self) noexcept
    cdef int receive_rest(self, zc_msg_t *message) except -1
    cdef int64_t spin_budget(self) noexcept
    cdef bint spin_result(self, int64_t budget, int64_t began, bint received) noexcept
    cdef int _count(self) noexcept
    cdef int _count_out(self) noexcept
    cdef object take_socket(self)
    cdef int close_socket(self) except -1
