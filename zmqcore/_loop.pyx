# cython: language_level=3, embedsignature=True, auto_pickle=False, freethreading_compatible=True
"""The compiled half of what an event loop does with its channels: calls that need not wait, and replies that
coroutines await. No task, no thread and no callback of the event loop for each.

What they await is a future as far as asyncio's tasks look at one (``_asyncio_future_blocking``, ``add_done_callback``,
``result``, ``cancel``). asyncio's own has its callbacks called by the loop, one by one; here the look at the channel
that has found the replies resumes all tasks that await them.
"""

import weakref
from asyncio import CancelledError
from collections import deque

cimport cython
from cpython.contextvars cimport PyContext_CopyCurrent, PyContext_Enter, PyContext_Exit
from cpython.pythread cimport PyThread_get_thread_ident

from zmqcore._channel cimport STATE_OPEN, UNANNOUNCED_BYTES, Channel
from zmqcore._frame cimport Envelope
from zmqcore._pending cimport OUTCOME_WAITING, Pending
from zmqcore._socket cimport now_ns

__all__ = ["Awaited", "Driven", "LoopCalls", "Reply", "Turn"]


@cython.final
cdef class Driven:
    """One channel while an event loop drives it."""

    cdef readonly Channel channel
    cdef readonly object node       # held as long as the channel is driven
    cdef readonly int fd
    cdef readonly bint adopted      # not if another loop has it: then both read it
    cdef public bint look_due       # the loop will look at the channel by itself
    cdef public bint used           # since somebody has asked that last
    cdef public object timer        # of the loop, for ``deadline``; None if it is not armed
    cdef public double deadline     # a time of time.monotonic()
    cdef readonly object waiting    # Turns: for room in the window; while there are any nobody else may send
    cdef readonly object waiting_to_accept      # likewise, for something to be finished

    def __init__(self, Channel channel not None, node, waiting, waiting_to_accept):
        self.channel = channel
        self.node = node
        self.fd = channel.fd
        self.adopted = channel.adopt()
        self.used = True
        self.waiting = waiting
        self.waiting_to_accept = waiting_to_accept

    cpdef bint must_hear_hello(self, tuple request):
        """Whether a message is so large that the server, which has not said what it takes, has to do that first.

        ``request`` is what Channel.submit() takes first.
        """
        return self.channel.instance is None and (request[3] is not None or len(request[2]) > UNANNOUNCED_BYTES)


cdef class Awaited:
    """What one task awaits, with the methods that a task wants of a future. Made by :class:`LoopCalls`."""

    cdef LoopCalls calls
    cdef object callback            # of the task that awaits it; None before, and after it has been called
    cdef object context             # to call it in
    cdef public bint _asyncio_future_blocking
    cdef bint interrupted           # by cancel(), which the task will be told
    cdef object message             # what cancel() was given

    cdef bint is_over(self) noexcept:
        """Whether what is awaited has come."""
        return True

    def close(self) -> None:
        """Nobody awaits it any longer. Twice is fine."""

    def __await__(self) -> Awaited:
        return self

    def __iter__(self) -> Awaited:
        return self

    def __next__(self) -> Awaited:
        if self.interrupted or self.is_over():
            raise StopIteration
        self._asyncio_future_blocking = True
        return self

    def throw(self, kind, value=None, trace=None) -> None:
        """Raise what the coroutine is to be interrupted by; nobody awaits this any longer."""
        self.close()
        raise kind if value is None else value

    def get_loop(self) -> object:
        """Return the event loop that it belongs to."""
        return self.calls.loop

    def done(self) -> bool:
        """Whether there is nothing to wait for any more."""
        return self.interrupted or self.is_over()

    def cancelled(self) -> bool:
        """Whether cancel() came first."""
        return self.interrupted

    def add_done_callback(self, callback, *, context=None) -> None:
        """Have ``callback(self)`` called by the loop when this is done. There can be one."""
        self.context = PyContext_CopyCurrent() if context is None else context
        self.callback = callback
        if self.interrupted or self.is_over():
            self.calls._resume_soon(self)

    def cancel(self, msg=None) -> bool:
        """Interrupt the task that awaits it; return whether there is time for that. ``msg`` goes to the error."""
        if self.interrupted or self.is_over():
            return False
        self.interrupted = True
        self.message = msg
        self.calls._resume_soon(self)
        return True

    def result(self) -> None:
        """Raise CancelledError if cancel() came first."""
        if self.interrupted:
            raise CancelledError() if self.message is None else CancelledError(self.message)


@cython.final
cdef class Reply(Awaited):
    """That ``pending`` ends, awaited. Then envelope() tells by what.

    Whoever is interrupted while it awaits has given the request up, and the server is told.
    """

    cdef readonly Pending pending
    cdef Driven driven

    cdef bint is_over(self) noexcept:
        return self.pending.outcome != OUTCOME_WAITING

    def close(self) -> None:
        self.calls._drop(self)

    def envelope(self) -> Envelope:
        """Return the reply, or raise what its request has ended by; see Pending.envelope(). For when it is done."""
        return self.pending.channel.result(self.pending)

    def __repr__(self) -> str:
        return f"<Reply to {self.pending!r}{' interrupted' if self.interrupted else ''}>"


@cython.final
cdef class Turn(Awaited):
    """That there is room for one who waits for it, or will be none, awaited: who knows it calls settle()."""

    cdef bint settled
    cdef readonly object outcome        # what settle() was given

    cdef bint is_over(self) noexcept:
        return self.settled

    def settle(self, outcome) -> None:
        """End the wait. Once, and not after done()."""
        self.settled = True
        self.outcome = outcome
        self.calls._resume_soon(self)

    def __repr__(self) -> str:
        return f"<Turn {'settled' if self.settled else 'waiting'}{' interrupted' if self.interrupted else ''}>"


@cython.final
cdef class _Settle:
    """The callback of all requests of a LoopCalls, which any thread may call. What is outside the loop must not keep
    that alive, so it is referred to weakly."""

    cdef object reference

    def __call__(self, Pending pending not None):
        cdef LoopCalls calls = self.reference()
        if calls is not None:
            calls._settled(pending)


cdef class LoopCalls:
    """The calls of one event loop, and the channels that it drives. All methods belong to the loop's thread.

    Whoever derives from it has ``_look(driven)``, which the loop calls to take what has come, and ``_arm(driven,
    deadline)``, to have it called at the deadline, too.
    """

    cdef object __weakref__
    cdef readonly object loop
    cdef readonly object context    # for what the loop is to call: not that of some request
    cdef readonly object settle     # the callback for requests whose replies are awaited
    cdef readonly unsigned long thread
    cdef readonly dict by_endpoint  # endpoint -> Driven
    cdef dict awaited               # Pending -> Reply
    cdef object ended               # deque of Awaited whose tasks are to be resumed
    cdef bint resuming              # resume() will be called, or is under way
    cdef object look                # bound once: the most frequent thing that the loop calls

    def __init__(self, loop, context):
        cdef _Settle settle = _Settle.__new__(_Settle)
        settle.reference = weakref.ref(self)
        self.settle = settle
        self.loop = loop
        self.context = context
        self.thread = PyThread_get_thread_ident()
        self.by_endpoint = {}
        self.awaited = {}
        self.ended = deque()
        self.look = self._look

    @property
    def n_awaited(self) -> int:
        """How many replies are awaited."""
        return len(self.awaited)

    def is_current(self) -> bool:
        """Whether the calling thread runs this loop: asyncio.get_running_loop() makes a system call for that."""
        return PyThread_get_thread_ident() == self.thread and self.loop.is_running()

    def ask(self, endpoint, tuple request not None, deadline) -> Reply | None:
        """Send a call to ``endpoint`` if that can be done at once, and return its reply; None if it has to wait.

        ``request`` is what Channel.submit() takes first, ``deadline`` a time of time.monotonic() or None. Raises what
        Channel.submit_nowait() raises.
        """
        cdef Driven driven = self.by_endpoint.get(endpoint)
        cdef Channel channel
        cdef double left
        cdef Reply reply
        if driven is None or driven.waiting:
            return None
        channel = driven.channel
        if channel.state != STATE_OPEN or channel.goodbye or channel.senders \
                or channel.window.n_messages() >= channel.window.max_messages:
            return None
        if driven.must_hear_hello(request):
            return None
        topic, method, body, buffers, metadata, codec = request
        timeout = None
        if deadline is not None:
            left = <double>deadline - now_ns() / 1e9
            if left <= 0:
                return None
            timeout = left
        reply = self.expect(
            channel.submit_nowait(topic, method, body, buffers, metadata, codec, timeout, self.settle), driven)
        self.sent(driven, deadline)
        return reply

    cpdef Reply expect(self, Pending pending, Driven driven):
        """Return the reply to ``pending``, whose callback is ``settle``."""
        cdef Reply reply = Reply.__new__(Reply)
        reply.pending = pending
        reply.driven = driven
        reply.calls = self
        self.awaited[pending] = reply
        if pending.outcome != OUTCOME_WAITING:
            # It may have been settled before it was in the table.
            self.awaited.pop(pending, None)
        return reply

    def turn(self) -> Turn:
        """Return what somebody can await until another one calls its settle()."""
        cdef Turn turn = Turn.__new__(Turn)
        turn.calls = self
        return turn

    cpdef sent(self, Driven driven, deadline):
        """Something was sent: look at the channel once at the end of this turn, and at the deadline."""
        driven.used = True
        if not driven.look_due:
            driven.look_due = True
            self.loop.call_soon(self.look, driven, context=self.context)
        if deadline is not None and (driven.timer is None or <double>deadline < driven.deadline):
            self._arm(driven, deadline)

    cpdef told(self, Driven driven):
        """The server was told something, perhaps by a finalizer, on any thread and after the loop's end."""
        if PyThread_get_thread_ident() == self.thread and not self.loop.is_closed():
            self.sent(driven, None)

    cdef int _drop(self, Reply reply) except -1:
        self.awaited.pop(reply.pending, None)
        reply.callback = None
        reply.pending.close()
        self.told(reply.driven)
        return 0

    cdef int _settled(self, Pending pending) except -1:
        """``pending`` has ended, on any thread."""
        cdef Reply reply = self.awaited.pop(pending, None)
        if reply is None:
            return 0
        if PyThread_get_thread_ident() == self.thread:
            return self._resume_soon(reply)
        self.ended.append(reply)
        try:
            self.loop.call_soon_threadsafe(self.resume, context=self.context)
        except RuntimeError:
            pass        # the loop has been closed
        return 0

    cdef int _resume_soon(self, Awaited awaited) except -1:
        self.ended.append(awaited)
        if not self.resuming and not self.loop.is_closed():
            self.resuming = True
            self.loop.call_soon(self.resume, context=self.context)
        return 0

    def attend(self, Channel channel not None) -> float | None:
        """``channel.attend()``, and resume the tasks whose replies have come. Only for callbacks of the loop."""
        self.resuming = True        # below
        try:
            return channel.attend()
        finally:
            self.resume()

    def resume(self) -> None:
        """Resume the tasks for which what they await has come. Only for callbacks of the loop: no task may run now."""
        cdef Awaited awaited
        cdef Py_ssize_t left = len(self.ended)
        self.resuming = True
        try:
            # Those that come meanwhile have to wait: others want their turn, too.
            while left > 0:
                left -= 1
                awaited = self.ended.popleft()
                callback, awaited.callback = awaited.callback, None
                if callback is not None:
                    PyContext_Enter(awaited.context)
                    try:
                        callback(awaited)
                    finally:
                        PyContext_Exit(awaited.context)
        finally:
            self.resuming = len(self.ended) > 0 and not self.loop.is_closed()
            if self.resuming:
                self.loop.call_soon(self.resume, context=self.context)
