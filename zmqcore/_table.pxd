"""The state of a pool: see ``_table.pyx``."""

cimport cython
from libc.stdint cimport int64_t, uint64_t

from zmqcore._channel cimport Channel
from zmqcore._socket cimport OpenFds, Waiter

cdef enum Stage:
    STAGE_CONNECTING = 0        # reserved: the channel is being made or connected
    STAGE_OPEN = 1
    STAGE_DRAINING = 2          # evicted or retired; closes once nothing is outstanding
    STAGE_CLOSING = 3           # closed by us, not yet by libzmq: its descriptors still count
    STAGE_GONE = 4

# Why a slot has left; each leaves for exactly one cause. In the order of CAUSES.
cdef enum Cause:
    STAYS = -1
    EVICTED_CLEAN = 0
    EVICTED_DRAINING = 1
    EXPIRED_IDLE = 2
    EXPIRED_LIFETIME = 3
    LOST = 4
    GOODBYE = 5
    DEAD = 6                    # its endpoint has been found unreachable
    ABANDONED = 7               # nobody waits for its connection any more
    FAILED = 8                  # the channel could not even be made
    POOL_CLOSED = 9
    N_CAUSES = 10

cdef int64_t DRAIN_GRACE
cdef uint64_t MAINTAINED

cdef class Slot:
    cdef Table table                # whose place it is: another one after a fork
    cdef readonly str endpoint
    cdef readonly Channel channel   # None until it has been made, and when it has gone
    cdef Py_ssize_t users
    cdef int stage
    cdef int cause                  # set while it is stale: why it leaves when its last user does
    cdef bint persistent, protected
    cdef bint stale                 # in use, but nobody new gets it
    cdef bint cautious              # a server there has said goodbye a moment ago: ask before anything is sent
    cdef bint unreachable           # its endpoint has been found to be, by one of those who wait for it
    cdef bint failed                # the attempt is remembered as a failure
    cdef Ring ring                  # the ring of idle slots it stands in; None while in use
    cdef Slot before, behind        # its neighbours there
    cdef int64_t created, last_used, dies
    cdef int64_t made_ns, left_ns   # by now_ns(): when it was reserved, and when it left
    cdef int64_t counted_until      # by now_ns(): up to when its time is in the failures' account; 0 until it is there
    cdef int64_t decayed            # until when ``uses`` has decayed
    cdef double uses                # decays by half with every idle_ttl
    cdef double jitter              # 0.9 to 1.0: its share of idle_ttl and max_lifetime
    cdef uint64_t opened_before     # the pool's count of openings when it was opened
    cdef int fd

cdef class Ring:
    cdef Slot anchor                # anchor.behind is the least recently used, anchor.before the most recently
    cdef Py_ssize_t length
    cdef int push(self, Slot slot) except -1
    cdef int remove(self, Slot slot) except -1

cdef class Turn:
    cdef Waiter waiter
    cdef Slot slot                  # granted: the place to open a channel in
    cdef bint awake                 # look again

cdef class Table:
    cdef Py_ssize_t max_sockets, max_sockets_per_endpoint, max_protected, batch
    cdef double idle_ttl_ns
    cdef int64_t max_lifetime_ns
    cdef set pinned                 # the pool's own: a fork does not change it
    cdef object clock               # monotonic seconds; None for the real one

    cdef cython.pymutex lock
    cdef bint gc_was_on             # see enter()
    cdef dict slots                 # endpoint -> list of its slots that are connecting or open
    cdef Ring probation, protected  # idle slots: used once, and used again
    cdef list stale, draining, closing
    cdef dict queue                 # endpoint -> list of Turns, in order of arrival
    cdef dict making                # endpoint -> list of Turns that wait for a slot that is being made
    cdef Py_ssize_t waiting
    cdef Py_ssize_t total           # every slot that is not gone; never above max_sockets
    cdef Py_ssize_t in_use
    cdef dict failures              # endpoint -> _Failure
    cdef dict goodbyes              # endpoint -> when a server there has said goodbye
    cdef OpenFds fds                # None until the first channel is made
    cdef bint closed
    cdef uint64_t maintain_from     # n_acquired from which on maintain() has to be called; MAINTAINED: it is
    cdef uint64_t chance            # state of the generator of jitter
    cdef uint64_t pressed_until     # n_opened up to which places count as short: somebody has waited for one
    cdef int64_t reaped_all         # when reap() has looked at all that are closing
    cdef int64_t usual_connect_ns   # how long a connection takes, a running mean

    cdef uint64_t n_opened, n_acquired, n_reused, n_waits, n_timeouts, n_refused, n_unreachable, n_negative_hits
    cdef uint64_t n_drained, n_drain_lost, n_revived
    cdef uint64_t left[10]          # by Cause
    cdef int64_t waited_ns, waited_most_ns
    cdef list wait_histogram
    cdef dict counted               # MESSAGES of the channels that have gone; replaced as a whole

    cdef int enter(self) except -1
    cdef int leave(self) except -1
    cdef double random(self) noexcept
    cdef list everything(self)

    cdef int64_t now(self) except? -1
    cdef Slot find(self, str endpoint)
    cdef int use(self, Slot slot, int64_t now) except -1
    cdef int note_use(self, Slot slot, int64_t now) except -1
    cdef int touch(self, Slot slot, int64_t now) except -1
    cdef Slot reserve(self, str endpoint)
    cdef Slot revive(self, str endpoint)
    cdef int park(self, Slot slot) except -1
    cdef int fate(self, Slot slot, int64_t now) except? -2
    cdef int retire(self, Slot slot, int cause) except -1
    cdef int move(self, Slot slot, int stage) except -1
    cdef int note_closing(self, Slot slot) except -1
    cdef int reap(self) except -1
    cdef double ttl_ns(self, Slot slot) except? -1
    cdef Turn queue_up(self, dict queue, endpoint)
    cdef int leave_queue(self, Turn turn, endpoint) except -1
    cdef bint is_head(self, Turn turn, endpoint) except -1
    cdef int grant(self) except -1
    cdef int wake_head(self) except -1
    cdef int wake_making(self, endpoint) except -1
    cdef list victims(self)
    cdef Slot victim_ahead(self)
    cdef Slot _evict(self, Ring ring)
    cdef Slot _least_missed(self, Ring ring)
    cdef list retire_stale(self, str endpoint)
    cdef int64_t note_attempt(self, Slot slot, str reason) except -1
    cdef int note_failure(self, Slot slot, str reason, bint for_all, int64_t pause_at_least) except -1
    cdef object _count_attempt(self, Slot slot, str reason)
    cdef int check_negative(self, str endpoint) except -1
    cdef int forget_failures(self, int64_t now) except -1
    cdef object unreachable(self, str endpoint, str detail)
    cdef Py_ssize_t n_free_soon(self) except -1
    cdef object unjudged(self, str endpoint, int64_t waited, int64_t connect_timeout)
    cdef str _attempts(self, failure)
    cdef str numbers(self)
    cdef int count_wait(self, int64_t waited) except -1
    cdef dict stats(self)
