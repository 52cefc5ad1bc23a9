# cython: language_level=3, embedsignature=True, auto_pickle=False, freethreading_compatible=True
"""The channels of one process under one budget of sockets.

One channel per endpoint, shared by all threads: acquire() counts a user in, release() counts it out. A channel that
nobody uses stays open for the next one; when the budget is used up, the one that has been idle longest gives
way. Channels in use are never closed for another one.
"""

import random
import resource
import threading

from libc.stdint cimport int64_t, uint64_t

from zmqcore._channel cimport STATE_OPEN, Channel
from zmqcore._socket cimport NEVER, deadline_after, fork_generation, now_ns

from zmqcore import _channel, errors  # noqa: F401  (_channel fills the function table)

__all__ = ["ChannelPool", "default_max_sockets"]

# A connection that is refused shows within this time on loopback; only then is it worth asking why.
cdef int64_t FIRST_PROBE_AFTER = 25_000_000     # ns


def default_max_sockets() -> int:
    """Return how many pooled sockets this process may hold, from its limit on file descriptors (RLIMIT_NOFILE).

    A pooled socket costs two descriptors. A quarter of the limit, at least 128, is left to everything else.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return 8192
    return max(8, min(8192, (soft - max(128, soft // 4)) // 2))


cdef class Slot:
    """One channel of the pool, and who uses it."""


cdef class ChannelPool:
    """Keep at most ``max_sockets`` channels, made by ``connect(endpoint)``.

    A channel that has been idle for ``idle_ttl`` seconds, or is older than ``max_lifetime`` seconds and idle, is
    closed; both vary by up to a tenth, so that channels of one age do not go together. ``connect_timeout`` is how
    long, in seconds, an endpoint may take to connect. ``probe(endpoint, timeout)`` says why it cannot be reached,
    or returns None.

    Thread-safe. After a fork the child's pool is empty; the parent's channels are neither used nor closed.
    """

    def __init__(
        self, connect, *, max_sockets: int | None = None, idle_ttl: float = 300.0, max_lifetime: float = 3600.0,
        connect_timeout: float = 2.0, probe=None,
    ):
        self.max_sockets = default_max_sockets() if max_sockets is None else max_sockets
        if self.max_sockets < 1:
            raise ValueError(f"max_sockets is {max_sockets}; it must be at least 1")
        self.connect = connect
        self.probe = probe
        self.idle_ttl_ns = <int64_t>(idle_ttl * 1e9)
        self.max_lifetime_ns = <int64_t>(max_lifetime * 1e9)
        self.connect_timeout_ns = <int64_t>(connect_timeout * 1e9)
        self.slots = {}
        self.room = threading.Condition()
        self.generation = fork_generation()

    cpdef Channel acquire_open(self, str endpoint):
        """Return the channel to ``endpoint`` if it is open already, else None. Never waits.

        What is returned is to be given back by release().
        """
        cdef Slot slot
        self._check()
        self.lock.acquire()
        slot = self.slots.get(endpoint)
        if slot is not None and slot.channel.state == STATE_OPEN and not slot.channel.goodbye:
            slot.users += 1
            self.n_reused += 1
            self.lock.release()
            return slot.channel
        self.lock.release()
        return None

    def acquire(self, str endpoint not None, timeout: float | None = None) -> Channel:
        """Return the connected channel to ``endpoint``, to be given back by release().

        Waits up to ``timeout`` seconds for a place in the budget, and for the connection. Raises PoolExhausted,
        Unreachable or Closed.
        """
        cdef Channel channel = self.acquire_open(endpoint)
        cdef int64_t deadline
        if channel is not None:
            return channel
        deadline = deadline_after(timeout)
        channel = self._obtain(endpoint, deadline)
        try:
            self._connected(channel, deadline)
        except BaseException:
            self.release(channel)
            self._drop(channel)
            raise
        return channel

    cpdef release(self, Channel channel):
        """Give back what acquire() returned. Never raises, never waits."""
        cdef Slot slot = channel.owner
        cdef bint last
        if self.generation != fork_generation():
            return
        self.lock.acquire()
        slot.users -= 1
        last = slot.users == 0
        if last:
            slot.last_used = now_ns()
            if self.slots.get(channel.endpoint) is slot:
                # Most recently used is last.
                del self.slots[channel.endpoint]
                self.slots[channel.endpoint] = slot
        self.lock.release()
        if last and len(self.slots) >= self.max_sockets:
            with self.room:
                self.room.notify()

    cdef int _check(self) except -1:
        if self.closed:
            raise errors.Closed("the pool is closed")
        if self.generation != fork_generation():
            self.generation = fork_generation()
            self.slots = {}
            self.reserved = 0
            self.room = threading.Condition()
        return 0

    def _obtain(self, str endpoint, int64_t deadline):
        """Return a usable channel, counted in: the one there is, or a new one as soon as the budget has room."""
        cdef Slot slot
        cdef int64_t started = now_ns()
        cdef bint waited = False
        while True:
            self.expire()
            victims = []
            with self.lock:
                if self.closed:
                    raise errors.Closed("the pool is closed")
                slot = self.slots.get(endpoint)
                if slot is not None and slot.channel.usable:
                    slot.users += 1
                    self.n_reused += 1
                    return slot.channel
                if slot is not None:
                    # Lost, or its server takes nothing new. Who still uses it keeps it until it is released.
                    del self.slots[endpoint]
                    self.n_lost += 1
                    victims.append(slot.channel)
                if len(self.slots) + self.reserved >= self.max_sockets:
                    for slot in self.slots.values():
                        if slot.users == 0 and slot.channel.clean:
                            del self.slots[slot.channel.endpoint]
                            self.n_evicted += 1
                            victims.append(slot.channel)
                            break
                room = len(self.slots) + self.reserved < self.max_sockets
                if room:
                    self.reserved += 1
            for channel in victims:
                channel.close()
            if room:
                return self._open(endpoint)
            if now_ns() >= deadline:
                raise errors.PoolExhausted(
                    f"all {self.max_sockets} sockets of the pool are in use; waited"
                    f" {(now_ns() - started) / 1e9:.3g} s for one to {endpoint}")
            if not waited:
                waited = True
                self.n_waits += 1
            with self.room:
                self.room.wait(0.05 if deadline == NEVER else min(0.05, max(0.0, (deadline - now_ns()) / 1e9)))

    def _open(self, str endpoint):
        cdef Slot slot
        try:
            channel = self.connect(endpoint)
        except BaseException:
            with self.lock:
                self.reserved -= 1
            raise
        with self.lock:
            self.reserved -= 1
            slot = self.slots.get(endpoint)
            if slot is not None and slot.channel.usable:
                # Another thread was faster.
                slot.users += 1
                surplus = channel
            else:
                surplus = None
                slot = Slot.__new__(Slot)
                slot.channel = channel
                slot.users = 1
                slot.last_used = now_ns()
                (<Channel>channel).owner = slot
                self.slots[endpoint] = slot
                self.n_opened += 1
        if surplus is not None:
            surplus.close()
        return slot.channel

    def _connected(self, Channel channel, int64_t deadline):
        """Wait until the channel is open; if the endpoint refuses, say so at once."""
        cdef int64_t limit = channel.created_ns + self.connect_timeout_ns
        cdef int64_t started = now_ns()
        cdef int64_t patience = FIRST_PROBE_AFTER
        cdef int64_t now
        cdef object reason = None
        if limit < started + FIRST_PROBE_AFTER:
            limit = started + FIRST_PROBE_AFTER
        limit = min(limit, deadline)
        while True:
            now = now_ns()
            if channel.wait_open(max(0, min(limit - now, patience)) / 1e9):
                return
            if channel.state > STATE_OPEN:
                raise errors.PeerLost(
                    f"{channel.endpoint}: the channel was lost while connecting", executed_possible=False)
            now = now_ns()
            if self.probe is not None:
                reason = self.probe(channel.endpoint, max(0.001, min(limit - now, 250_000_000) / 1e9))
            if reason is not None and "timed out" not in reason or now >= limit:
                self.n_unreachable += 1
                raise errors.Unreachable(
                    f"{channel.endpoint}: {reason or 'something listens there, but does not speak ZeroMQ'}"
                    f" (tried for {(now - started) / 1e9:.3g} s)")
            patience *= 4

    def _drop(self, Channel channel):
        """Take a channel out of the pool and close it, unless somebody uses it."""
        cdef Slot slot = channel.owner
        with self.lock:
            if slot.users or self.slots.get(channel.endpoint) is not slot:
                return
            del self.slots[channel.endpoint]
        channel.close()

    def expire(self) -> int:
        """Close what has been idle or alive for too long and is not in use; return how many channels that were."""
        cdef Slot slot
        cdef int64_t now = now_ns()
        cdef list overdue = []
        jitter = random.uniform(0.9, 1.0)
        with self.lock:
            for slot in self.slots.values():
                if now - slot.last_used < self.idle_ttl_ns * 0.9 and now - slot.channel.created_ns \
                        < self.max_lifetime_ns * 0.9:
                    continue
                if slot.users == 0 and slot.channel.clean and (
                        now - slot.last_used > self.idle_ttl_ns * jitter
                        or now - slot.channel.created_ns > self.max_lifetime_ns * jitter):
                    overdue.append(slot)
            for slot in overdue:
                del self.slots[slot.channel.endpoint]
            self.n_expired += len(overdue)
        for slot in overdue:
            slot.channel.close()
        return len(overdue)

    def close(self) -> None:
        """Close every channel; what is outstanding ends with Closed. Twice is fine."""
        with self.lock:
            self.closed = True
            slots, self.slots = self.slots, {}
        for slot in slots.values():
            slot.channel.close()
        with self.room:
            self.room.notify_all()

    def stats(self) -> dict[str, int]:
        """Return the counters since the pool was made, and how many channels it holds now."""
        cdef Slot slot
        with self.lock:
            used = sum([1 for slot in self.slots.values() if slot.users])
            return {
                "max_sockets": self.max_sockets, "open": len(self.slots) + self.reserved, "in_use": used,
                "idle": len(self.slots) - used, "opened": self.n_opened, "reused": self.n_reused,
                "evicted": self.n_evicted, "expired": self.n_expired, "lost": self.n_lost, "waits": self.n_waits,
                "unreachable": self.n_unreachable,
            }

    def channels(self) -> list[Channel]:
        """Return the channels the pool holds now, least recently used first."""
        cdef Slot slot
        with self.lock:
            return [slot.channel for slot in self.slots.values()]

    def __repr__(self) -> str:
        return f"<ChannelPool {len(self.slots)} of {self.max_sockets} sockets{', closed' if self.closed else ''}>"
