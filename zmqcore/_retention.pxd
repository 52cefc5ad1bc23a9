"""Messages that are kept until they are finished: see ``_retention.pyx``."""

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint64_t

from zmqcore._frame cimport Parcel

cdef class Lane:
    cdef object __weakref__
    cdef readonly str endpoint
    cdef readonly object owner
    cdef object channel         # the one that has sent for it last
    # Each changed by atomic operations: its messages may be on several channels, under the locks of those.
    cdef int64_t n_unfinished   # accepted, and not known to be finished
    cdef int64_t n_barred       # of these, those that something new must not overtake now
    cdef int64_t n_accepted     # since it was made; gives each message its place
    cdef int64_t n_given_up
    cdef bint is_finished(self) noexcept
    cdef bint is_barred(self) noexcept
    cdef int check(self) except -1

cdef class Retained:
    cdef Parcel parcel          # owned: shares the memory of what was sent
    cdef Lane lane
    cdef Retained newer         # the next one of its Retention
    cdef uint64_t id            # on the channel that holds it
    cdef int64_t place          # in its lane's order
    cdef bint barring           # counted in lane.n_barred
    cdef bint packed
    cdef int bar(self) noexcept
    cdef int unbar(self) noexcept
    cdef int64_t leave_lane(self) noexcept

cdef class Retention:
    cdef Retained oldest, newest        # ends of the list, in the order of their ids
    cdef uint64_t n_messages, max_messages
    cdef uint64_t n_bytes, max_bytes
    cdef uint64_t sender        # names this channel in the messages' identities; 0 until it is needed
    cdef bint barring           # the channel is being left: what has not been taken yet bars its lane
    cdef list done              # Lanes whose last message is finished, to be let go outside the lock
    cdef list left_over         # Retained that were given up, for ``undelivered``
    cdef object undelivered     # called with those; or None
    cdef uint64_t n_accepted    # the sequence number of the last one that began here
    cdef uint64_t n_finished, n_undelivered

    cdef bint has_room(self, size_t size) noexcept
    cdef int begin(self, Retained retained, Lane lane, Parcel *parcel) except -1
    cdef int add(self, Retained retained, Lane lane, uint64_t id) except -1
    cdef int finish(self, uint64_t up_to) except -1
    cdef int bar(self, uint64_t acked_id) except -1
    cdef int unbar(self, uint64_t acked_id) except -1
    cdef int give_up(self, uint64_t before) except -1
    cdef bint give_up_one(self, uint64_t id) except -1
    cdef int hand_over(self, list left_over) except -1
    cdef Retained _pop(self)
    cdef int _count_out(self, Retained retained) except -1
    cdef int _leave_over(self, Retained retained) except -1
