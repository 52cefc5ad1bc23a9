# cython: language_level=3, embedsignature=True, auto_pickle=False, freethreading_compatible=True
"""Requests that have been sent and whose replies are awaited: who waits for them, and how they end.

A request ends by its reply, by its deadline, because it is given up, or with the connection. Where the answer is a
stream it goes on: whenever the next item has been asked for and is not there, it is waiting again.

Invariant, under the socket's lock: a Pending is in ``Requester.pending`` exactly while its outcome is WAITING, or its
stream goes on, and its message has been sent.
"""

from collections import deque

cimport cython
from cpython.exc cimport PyErr_SetObject, PyErr_WriteUnraisable
from libc.stdint cimport int64_t, uint32_t, uint64_t

from zmqcore._deadlines cimport Deadlines
from zmqcore._frame cimport KIND_CANCEL, KIND_CREDIT, KIND_ITEM, Envelope, Header, envelope_of_stream, header_begin
from zmqcore._led_socket cimport LedSocket
from zmqcore._socket cimport NEVER, Waiter, deadline_after, fork_generation, now_ns, waiter_borrow, waiter_return

from zmqcore import errors

__all__ = ["Pending", "Requester"]


@cython.final
@cython.freelist(64)
cdef class Pending:
    """A request that has been sent and whose reply has not been taken yet. Made by :meth:`Channel.submit`.

    Thread-safe. It has a deadline from its start, and always ends by that: with an envelope or an error.
    """

    def __init__(self):
        raise TypeError("a Pending is made by Channel.submit()")

    @property
    def done(self) -> bool:
        """Whether it has ended: by a reply, an error, its deadline or cancel()."""
        return self.outcome != OUTCOME_WAITING

    @property
    def answered(self) -> bool:
        """Whether it has ended by what the server has sent."""
        return self.outcome == OUTCOME_DONE

    @property
    def cancelled(self) -> bool:
        """Whether it has ended by cancel()."""
        return self.outcome == OUTCOME_CANCELLED

    @property
    def timeout(self) -> float | None:
        """How long, in seconds, the answer was to be waited for; None for ever."""
        return None if self.deadline == NEVER else max(0.0, (self.deadline - self.started) / 1e9)

    def wait(self, timeout: float | None = None) -> bool:
        """Drive the channel until this request has ended or ``timeout`` seconds have passed; return ``done``.

        Any number of threads may do that.
        """
        cdef int64_t deadline = min(deadline_after(timeout), self.deadline)
        if self.outcome == OUTCOME_WAITING:
            self.channel.check()
            self.channel.await_reply(self, deadline)
            if self.outcome == OUTCOME_WAITING and now_ns() >= self.deadline:
                self.channel.abandon(self)
        return self.outcome != OUTCOME_WAITING

    def envelope(self) -> Envelope:
        """Return the reply (kind "reply", "error", "item" or "pong"), driving the channel until it is there.

        Raises DeadlineExceeded, PeerLost or Closed if the request ended without one.
        """
        self.wait()
        return self.channel.result(self)

    def keep(self, made not None):
        """Keep what has been made of the reply, and return it; from the second time on what was kept the first time."""
        with cython.critical_section(self):
            if self.made is None:
                self.made = made
            return self.made

    def cancel(self) -> bool:
        """Give the request up, and tell the server; a reply that still comes is dropped.

        Return whether it was still waiting.
        """
        cdef Requester channel = self.channel
        # Referred to until the lock is released: the callback's finalizer is user code.
        _callback = self.callback
        channel.check()
        channel.shared.enter()
        try:
            if self.outcome != OUTCOME_WAITING or self.id not in channel.pending:
                return False
            self.callback = None
            channel.give_up(self)
            return True
        finally:
            channel.unlock()

    def notify(self, callback not None) -> bool:
        """Have ``callback(pending)`` called as soon as this has ended, instead of the one given to submit().

        Return False, and change nothing, if it has ended already.
        """
        cdef Requester channel = self.channel
        cdef bint attend = False
        # Referred to until the lock is released: its finalizer is user code.
        _previous = self.callback
        channel.check()
        channel.shared.enter()
        try:
            if self.outcome != OUTCOME_WAITING:
                return False
            self.callback = callback
            if self.items is not None:
                channel.expect(self)
            if not self.hurried:
                self.hurried = True
                channel.n_hurried += 1
                attend = channel.n_hurried == 1 and channel.loop_thread == 0
        finally:
            channel.unlock()
        if attend and channel.attention is not None:
            channel.attention(channel)
        return True

    # -- streams: envelope() returns one whose ``stream`` is this Pending. One thread at a time ------------

    def next_item(self, timeout: float | None = None) -> Envelope:
        """Return the stream's next item, or what ends it (kind "reply" or "error"), driving the channel until it comes.

        Raises what envelope() raises. If nothing has come within ``timeout`` seconds, that ends the stream.
        """
        cdef int64_t deadline = deadline_after(timeout)
        cdef Envelope envelope = self._take_item(deadline)
        while envelope is None:
            try:
                self.channel.await_reply(self, deadline)
            finally:
                if self.outcome == OUTCOME_WAITING:
                    self.channel.abandon(self)
            envelope = self._take_item(deadline)
        return envelope

    def take_item(self, timeout: float | None = None) -> Envelope | None:
        """next_item(), but where that would wait return None: notify() tells then when to ask again.

        The ``timeout`` counts from the first time.
        """
        return self._take_item(deadline_after(timeout))

    cdef Envelope _take_item(self, int64_t deadline):
        cdef Requester channel = self.channel
        channel.check()
        channel.shared.enter()
        try:
            if self.items:
                return self.items.popleft()
            if self.outcome == OUTCOME_WAITING:
                return None
            if self.outcome == OUTCOME_DONE and self.reply is None:
                self.outcome = OUTCOME_WAITING
                self.started = now_ns()
                self.deadline = deadline
                return None
        finally:
            channel.unlock()
        return self.reply if self.outcome == OUTCOME_DONE else channel.result(self)

    def grant(self, n_items: int) -> None:
        """Let the server send ``n_items`` more than it may already."""
        cdef Requester channel = self.channel
        cdef bytes body = int(<uint32_t>n_items).to_bytes(4, "little")
        channel.check()
        channel.shared.enter()
        try:
            if self.id in channel.pending:
                channel.tell(KIND_CREDIT, self.id, body)
        finally:
            channel.unlock()

    def close(self) -> None:
        """End the stream; the server is told unless it has ended already. Twice is fine."""
        cdef Requester channel = self.channel
        # Referred to until the lock is released: the callback's finalizer is user code.
        _callback = self.callback
        _items = self.items
        if channel.shared.generation != fork_generation():
            return
        channel.shared.enter()
        try:
            if self.items is not None:
                self.items = deque()
            self.callback = None
            if self.id in channel.pending:
                channel.told_id = self.id
                channel.give_up(self)
        finally:
            channel.unlock()

    def __repr__(self) -> str:
        names = ("waiting", "done", "lost", "closed", "expired", "cancelled", "malformed", "too large", "late")
        return f"<Pending {self.id} on {self.channel.endpoint} {names[self.outcome]}>"


cdef class Requester(LedSocket):
    """The requests of a Channel. The lock is held wherever nothing else is said."""

    def __cinit__(self):
        self.pending = {}
        self.expiring = Deadlines.__new__(Deadlines)

    # -- what the subclass does --------------------------------------------------------------------------

    cdef int check(self) except -1:
        """Raise Closed in a forked child: there even the lock may be held by a thread that does not exist."""
        raise NotImplementedError

    cdef int unlock(self) except -1:
        """Release the lock; then do what must not happen under it."""
        raise NotImplementedError

    cdef int tell(self, int kind, uint64_t id, bytes body=b"") except -1:
        """Tell the server something about request ``id``."""
        raise NotImplementedError

    # -- waiting -----------------------------------------------------------------------------------------

    @cython.final
    cdef int await_reply(self, Pending pending, int64_t deadline) except -1:
        """Wait until ``pending`` has ended, or the deadline. Takes the lock."""
        cdef Waiter waiter
        self.shared.enter()
        try:
            if pending.outcome == OUTCOME_WAITING:
                waiter = waiter_borrow()
                if pending.waiter is None:
                    pending.waiter = waiter
                elif pending.joined is None:
                    pending.joined = [waiter]
                else:
                    pending.joined.append(waiter)
                try:
                    self.lead_or_follow(waiter, deadline)
                finally:
                    if pending.waiter is waiter:
                        pending.waiter = None
                    else:
                        pending.joined.remove(waiter)
                    waiter_return(waiter)
        finally:
            self.unlock()
        return 0

    @cython.final
    cdef int expect(self, Pending pending) except -1:
        """Have expire_overdue() end ``pending`` at its deadline."""
        cdef Pending other
        cdef Deadlines left
        cdef Py_ssize_t i
        if self.expiring.n > 64 + 2 * len(self.pending):
            # Most have ended before their deadlines, or wait for the next item under another one.
            left = Deadlines.__new__(Deadlines)
            for i in range(self.expiring.n):
                other = self.pending.get(self.expiring.heap[i].id)
                if other is not None and other.deadline == self.expiring.heap[i].deadline:
                    left.push(other.deadline, other.id)
            self.expiring = left
        return self.expiring.push(pending.deadline, pending.id)

    @cython.final
    cdef bint expire_overdue(self, int64_t now, int64_t *earliest) except -1:
        """End what is overdue; return whether any request that nobody waits for is left, and set its deadline."""
        cdef int64_t deadline
        cdef Pending pending
        while self.expiring.n:
            deadline = self.expiring.heap[0].deadline
            pending = self.pending.get(self.expiring.heap[0].id)
            if pending is not None and (pending.outcome != OUTCOME_WAITING or pending.deadline != deadline):
                pending = None      # a stream, which waits under another deadline or not at all
            if pending is not None and deadline > now:
                earliest[0] = deadline
                return True
            self.expiring.pop()
            if pending is not None:
                self._expire(pending)
                if pending.items is not None:
                    self.drain()        # something was sent
        return False

    # -- how a request ends ------------------------------------------------------------------------------

    @cython.final
    cdef int finish(self, Pending pending, int outcome) except -1:
        """End ``pending``, which has been taken out of the table, and wake or note whom it concerns."""
        cdef Waiter waiter
        pending.outcome = outcome
        if pending.hurried:
            pending.hurried = False
            self.n_hurried -= 1
        if pending.callback is not None:
            self.due.append(pending)
        if pending.waiter is not None:
            self.end_wait(pending.waiter)
        if pending.joined is not None:
            for waiter in pending.joined:
                self.end_wait(waiter)
        return 0

    @cython.final
    cdef int finish_all(self, int outcome) except -1:
        cdef Pending pending
        for pending in self.pending.values():
            self.finish(pending, outcome)
        self.pending.clear()
        return 0

    @cython.final
    cdef int abandon(self, Pending pending) except -1:
        """Nobody waits for ``pending`` any longer: its time is over, or its thread was interrupted. Takes the lock."""
        self.shared.enter()
        try:
            if pending.outcome != OUTCOME_WAITING:
                pass
            elif pending.deadline != NEVER and now_ns() >= pending.deadline:
                self._expire(pending)
            else:
                self.give_up(pending)
        finally:
            self.unlock()
        return 0

    @cython.final
    cdef int give_up(self, Pending pending) except -1:
        """End ``pending``, which has been sent, without its reply, and tell the server that nobody waits for it."""
        del self.pending[pending.id]
        self.n_cancelled += 1
        self.finish(pending, OUTCOME_CANCELLED)
        return self.tell(KIND_CANCEL, pending.id)

    @cython.final
    cdef int _expire(self, Pending pending) except -1:
        """``pending``'s time is over."""
        self.pending.pop(pending.id, None)
        self.n_timeouts += 1
        self.finish(pending, OUTCOME_EXPIRED)
        if pending.items is not None:
            # The server knows of no deadline for this.
            self.tell(KIND_CANCEL, pending.id)
        return 0

    @cython.final
    cdef bint take_item(self, Envelope envelope) except -1:
        """An item has come. It is kept until it is asked for: their number is bounded by what was granted.

        Return False if the server is to be told that nobody waits for this stream.
        """
        cdef uint64_t id = envelope.header.id
        cdef Pending pending = self.pending.get(id)
        if pending is None:
            self.n_late += 1
            if id != self.told_id:
                # Its call expired before its first item came.
                self.told_id = id
                return False
            return True
        self.n_items += 1
        if pending.items is None:
            pending.items = deque()
        pending.items.append(envelope)
        if pending.outcome == OUTCOME_WAITING:
            self.finish(pending, OUTCOME_DONE)
        return True

    # -- what is made of that, not under the lock ----------------------------------------------------------

    @cython.final
    cdef int call_back(self, list due) except -1:
        cdef Pending pending
        for pending in due:
            callback, pending.callback = pending.callback, None
            if callback is not None:
                try:
                    callback(pending)
                except BaseException as exc:
                    # Not ours to handle, and nobody to raise it to. The interpreter's own hook takes no lookalike of
                    # its argument, so the interpreter has to make it.
                    PyErr_SetObject(type(exc), exc)
                    PyErr_WriteUnraisable(callback)
        return 0

    @cython.final
    cdef Envelope result(self, Pending pending):
        """Return what ``pending``, which has ended, has ended by; or raise that."""
        cdef double waited
        cdef Header header
        if pending.outcome == OUTCOME_DONE:
            if pending.items is not None:
                header_begin(&header, KIND_ITEM, 0, pending.id)
                return envelope_of_stream(pending, &header)
            return pending.reply
        if pending.outcome == OUTCOME_EXPIRED:
            waited = max(<int64_t>0, pending.deadline - pending.started) / 1e9
            raise errors.DeadlineExceeded(f"{self.endpoint} has not answered within {waited:.3g} s")
        if pending.outcome == OUTCOME_LOST:
            raise errors.PeerLost(
                f"{self.endpoint}: {self.lost_reason} before the reply came; the request may have been executed")
        if pending.outcome == OUTCOME_LATE:
            raise errors.PeerLost(
                f"{self.endpoint}: the server had stopped before this request came; not executed",
                executed_possible=False)
        if pending.outcome == OUTCOME_MALFORMED:
            raise errors.ProtocolError(f"{self.endpoint} has answered by what cannot be read: {pending.problem}")
        if pending.outcome == OUTCOME_TOO_LARGE:
            raise errors.PayloadTooLarge(
                f"{self.endpoint} has answered by more than this side takes: {pending.problem}")
        if pending.outcome == OUTCOME_CLOSED:
            raise errors.Closed(f"channel to {self.endpoint} was closed before the reply came")
        raise errors.Closed(f"request {pending.id} to {self.endpoint} was cancelled")
