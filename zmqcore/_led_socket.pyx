# cython: language_level=3, embedsignature=True, auto_pickle=False, freethreading_compatible=True
"""A socket that is driven by the threads that wait on it: leader and followers.

There is no reactor thread. Of the threads that wait one is the *leader*: it polls the socket, takes what comes and ends
the waits of those whom that concerns. The rest are *followers*, parked until their wait is over or until they are
promoted, because the leader has left: its own wait is over.

Invariants, under the socket's lock:
  I1. If any thread waits, there is a leader, or a woken follower that will become one.
  I2. ``watched`` is true only while the leader is between its last EAGAIN and its return from poll(2).
"""

cimport cython
from libc.stdint cimport int64_t

from zmqcore._frame cimport release_sent_buffers, sent_buffers_returned
from zmqcore._socket cimport NEVER, Waiter, Wakes, now_ns, wakes_move, wakes_owe, wakes_settle

__all__ = ["LedSocket"]

SILENCE = 2_000_000_000


cdef class LedSocket:
    """What a Channel is for those who wait on it. The lock is held wherever nothing else is said."""

    def __cinit__(self):
        self.followers = {}
        self.due = []

    # -- what the subclass does --------------------------------------------------------------------------

    cdef int drain(self) except -1:
        """Hand over what is held to be sent, take everything that has come, and call end_wait() for those whom it
        concerns."""
        raise NotImplementedError

    cdef int hear_nothing(self) except -1:
        """Somebody has waited for SILENCE, and nothing has come."""
        raise NotImplementedError

    cdef int call_back(self, list due) except -1:
        """Run the user code that is due. Not under the lock."""
        raise NotImplementedError

    # -- waiting -----------------------------------------------------------------------------------------

    @cython.final
    cdef int lead_or_follow(self, Waiter waiter, int64_t deadline) except -1:
        """Drive the socket, or let another thread do so, until the wait is over or the deadline.

        The lock is held on entry and on return, but not while waiting or while callbacks run.
        """
        cdef Spin spin
        cdef bint overdue = False
        if waiter.over:
            return 0
        spin.began = spin.budget = 0
        spin.unjudged = False
        self.inside += 1
        try:
            while not waiter.over:
                if self.leader is None:
                    self.leader = waiter
                if self.leader is waiter:
                    self.drain()
                    if spin.unjudged:
                        self._judge(&spin)
                    if not overdue and (self.due or (not waiter.over and sent_buffers_returned())):
                        self._step_out(waiter)
                    elif waiter.over or overdue:
                        break
                    else:
                        self._poll(waiter, deadline, &spin)
                elif overdue:
                    break
                elif self.due:
                    # A sender has taken them before it found that it has to wait.
                    self._step_out(waiter)
                elif self.outbox.n_bytes:
                    self.drain()
                else:
                    self._park(waiter, deadline)
                overdue = deadline != NEVER and now_ns() >= deadline
        finally:
            self.inside -= 1
            if self.leader is waiter:
                self.leader = None
            self._promote()
        return 0

    @cython.final
    cdef int end_wait(self, Waiter waiter) except -1:
        """What ``waiter``'s thread waits for is there."""
        waiter.over = True
        # The leader itself is awake while it drains; it sleeps only while ``watched``.
        if self.watched or waiter is not self.leader:
            wakes_owe(&self.owed, waiter)
        return 0

    @cython.final
    cdef int _poll(self, Waiter waiter, int64_t deadline, Spin *spin) except -1:
        """Wait on the socket, as the leader."""
        cdef int64_t before = now_ns()
        if spin.began == 0:
            # Once for each wait, however often libzmq signals for reasons of its own.
            spin.began = before
            spin.unjudged = self.inside == 1
            spin.budget = self.shared.spin_budget() if spin.unjudged else 0
            spin.received = self.n_received_bytes
        self.watched = True
        self.outbox.watcher_fd = waiter.write_fd
        wakes_move(&self.owed, &waiter.owed)
        self.shared.leave()
        try:
            waiter.wait(
                self.shared.fd, min(deadline, before + SILENCE), max(<int64_t>0, spin.began + spin.budget - before))
        finally:
            self.shared.enter()
            self.watched = False
            self.outbox.watcher_fd = -1
        if now_ns() - before >= SILENCE:
            self.hear_nothing()
        return 0

    @cython.final
    cdef int _judge(self, Spin *spin) except -1:
        """Note how long it took until something came, once that is known."""
        if self.shared.spin_result(spin.budget, spin.began, self.n_received_bytes != spin.received):
            spin.unjudged = False
            spin.budget = 0
        return 0

    @cython.final
    cdef int _park(self, Waiter waiter, int64_t deadline) except -1:
        """Wait as a follower."""
        self.followers[waiter] = None
        wakes_move(&self.owed, &waiter.owed)
        self.shared.leave()
        try:
            waiter.wait(-1, deadline, 0)
        finally:
            self.shared.enter()
            self.followers.pop(waiter, None)
        return 0

    @cython.final
    cdef int _promote(self) except -1:
        """If nobody leads, wake the follower that has waited longest: it will, or comes here in its turn.

        Its own wait may be over; then it has been woken, or is about to be.
        """
        cdef Waiter follower
        if self.leader is None:
            for follower in self.followers:
                if not follower.over:
                    wakes_owe(&self.owed, follower)
                break
        return 0

    @cython.final
    cdef int _step_out(self, Waiter waiter) except -1:
        """Run user code without the lock and without being the leader: what is due, and what releasing sent buffers may
        run."""
        cdef Wakes owed
        due, self.due = self.due, []
        if self.leader is waiter:
            self.leader = None
            self._promote()
        wakes_move(&self.owed, &owed)
        self.shared.leave()
        wakes_settle(&owed)
        try:
            release_sent_buffers()
            self.call_back(due)
        finally:
            self.shared.enter()
        return 0
