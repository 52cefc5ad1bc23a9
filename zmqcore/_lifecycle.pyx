# cython: language_level=3, embedsignature=True, auto_pickle=False, freethreading_compatible=True
"""What becomes of a pool's channels besides being handed out: made, connected, maintained, drained and closed.

All of it is I/O, outside of the table's lock. A signal handler can raise wherever Python code runs (making a channel,
closing it, waiting), so whatever must follow such a place is in a ``finally``, or is made up for by maintain().
"""

import errno
import resource
import time

import zmq

from libc.stdint cimport int64_t, uint64_t

from zmqcore._channel cimport STATE_CLOSED, STATE_LOST, STATE_OPEN, Channel
from zmqcore._socket cimport OpenFds, deadline_after, now_ns
from zmqcore._table cimport (
    EXPIRED_IDLE, LOST, POOL_CLOSED, STAGE_CLOSING, STAGE_CONNECTING, STAGE_DRAINING, STAGE_GONE, STAGE_OPEN,
    STAYS, Slot, Table, Turn,
)

from zmqcore import errors

__all__ = ["Lifecycle"]

# A connection over loopback takes well under a millisecond; one that is refused never shows. After this time it is
# worth asking the endpoint by a plain connect(2), in ns; later where connections usually take more than half of it, as
# when dozens of threads make them: then it would only add to the load. But at the latest after the second time.
cdef int64_t FIRST_PROBE_AFTER = 3_000_000
cdef int64_t FIRST_PROBE_LATEST = 50_000_000
# How long an endpoint's name or a plain connection is waited for before one looks at the pool and the channel again.
cdef int64_t LOOK_INTERVAL = 250_000_000
# If nobody can be told to call maintain(), because no thread can be started, it is tried again after so many uses.
cdef uint64_t USES_BEFORE_RETRY = 3
# maintain() wants to be called at least this often, in seconds: until then what is lost unused holds its place.
cdef double LONGEST_PAUSE = 2.5


class _Accepts:
    """What is known when an endpoint accepts a plain connection, and libzmq's does not come about."""

    # Nothing has been read from it: what it speaks, if it speaks at all, would be a guess.
    reason = "it accepts connections, but no handshake of ZeroMQ's came about"
    final = local = False


ACCEPTS = _Accepts()


cdef class Lifecycle:
    """The part of a ChannelPool that makes and ends its channels; who gets them is up to the pool."""

    # -- making and connecting -------------------------------------------------------------------------------

    def _make(self, Slot slot not None, address: str | None) -> Channel:
        """Make the channel of a reserved slot. ``address`` is its endpoint's without a host name, if that is known."""
        cdef Channel channel
        cdef Table table = slot.table
        cdef bint usable
        if table.fds is None:
            # Before the first socket: at the limit of descriptors this fails, and nothing has happened yet.
            fds = OpenFds()
            table.enter()
            try:
                if table.fds is None:
                    table.fds = fds
            finally:
                table.leave()
        try:
            channel = self.connect(slot.endpoint) if address is None else self.connect(slot.endpoint, address)
        except zmq.ZMQError as exc:
            raise self._cannot_connect(slot.endpoint, exc) from exc
        channel.owner = slot
        table.enter()
        try:
            # The pool may have been closed meanwhile: then the slot has gone.
            usable = slot.stage == STAGE_CONNECTING
            if usable:
                slot.channel = channel
                slot.fd = channel.shared.fd
                table.wake_making(slot.endpoint)
        finally:
            table.leave()
        if not usable:
            channel.close()
            raise errors.Closed("the pool was closed while a channel was made")
        return channel

    def _cannot_connect(self, endpoint, exc):
        """Return the error to raise when libzmq makes no socket for ``endpoint``, or cannot connect it."""
        if exc.errno in (errno.EMFILE, errno.ENFILE):
            limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            return errors.PoolExhausted(
                f"no file descriptor is left for a socket to {endpoint} (limit {limit}); the pool holds"
                f" {self.table.total} sockets of {self.max_sockets}. Raise the limit, or lower max_sockets")
        if exc.errno in (errno.EINVAL, errno.EPROTONOSUPPORT, errno.ENODEV, errno.ENAMETOOLONG):
            return errors.InvalidEndpoint(f"endpoint {endpoint!r}: {exc.strerror}")
        if exc.errno == zmq.ETERM:
            return errors.Closed("the ZeroMQ context has been closed")
        return errors.Unreachable(f"{endpoint}: {exc.strerror}")

    def _address(self, Slot slot not None, int64_t started, int64_t until, int64_t limit) -> str | None:
        """Return what libzmq is to connect to: it would look up a name on its I/O thread, and serve nobody else
        meanwhile. None if there is nobody to ask for that.
        """
        if self.resolve is None:
            return None
        while True:
            address = self.resolve(slot.endpoint, min(max(0, until - now_ns()), LOOK_INTERVAL) / 1e9)
            if isinstance(address, str):
                return address
            if slot.stage != STAGE_CONNECTING:
                raise errors.Closed("the pool was closed while a name was resolved")
            if address.final or address.local or now_ns() >= until:
                raise self._failed(slot, address, started, limit)

    def _connected(self, Slot slot not None, int64_t deadline) -> Channel:
        """Wait until the slot's channel is open, and return it; if the endpoint refuses, say so at once."""
        cdef Table table = slot.table
        cdef Channel channel = slot.channel
        cdef bint opener = channel is None
        cdef int64_t started = now_ns()
        cdef int64_t patience = max(FIRST_PROBE_AFTER, min(2 * table.usual_connect_ns, FIRST_PROBE_LATEST))
        cdef int64_t limit = max(slot.made_ns + self.connect_timeout_ns, started + FIRST_PROBE_AFTER)
        cdef int64_t until = min(deadline, limit)
        cdef int64_t now
        refusal = None
        if opener:
            channel = self._make(slot, self._address(slot, started, until, limit))
            self._make_room(table)
        while slot.stage != STAGE_OPEN:
            now = now_ns()
            if channel.wait_open(max(0, min(until - now, patience)) / 1e9):
                break
            if channel.state == STATE_CLOSED:
                raise errors.Closed("the pool was closed while connecting")
            if channel.state == STATE_LOST:
                raise errors.PeerLost(
                    f"{channel.endpoint}: the channel was lost while connecting", executed_possible=False)
            now = now_ns()
            if slot.unreachable:
                raise table.unreachable(slot.endpoint, f"tried for {(now - started) / 1e9:.3g} s")
            if self.probe is not None and now < until:
                refusal = self.probe(channel.endpoint, max(0.001, min(until - now, LOOK_INTERVAL) / 1e9)) or ACCEPTS
            if channel.state == STATE_OPEN:
                continue
            if now_ns() >= until or refusal is not None and refusal.final:
                raise self._failed(slot, refusal, started, limit)
            patience *= 4
        if slot.cautious and slot.stage == STAGE_CONNECTING:
            self._ask(channel, until)
        table.enter()
        try:
            if slot.stage == STAGE_CONNECTING:
                slot.stage = STAGE_OPEN
                table.usual_connect_ns += (now_ns() - slot.made_ns - table.usual_connect_ns) // 8
                table.failures.pop(slot.endpoint, None)
            elif slot.stage != STAGE_OPEN:
                raise errors.Closed("the pool was closed while connecting")
            table.n_acquired += 1
            if not opener:
                table.n_reused += 1
        finally:
            table.leave()
        return channel

    def _ask(self, Channel channel not None, int64_t until):
        """See that there is a server that takes what is new: the last one there has said goodbye.

        If it closes right now, before it has read anything, nobody could tell whether that has been executed.
        """
        try:
            channel.ping(max(0.001, (until - now_ns()) / 1e9))
        except errors.DeadlineExceeded:
            return      # a server without threads that runs a method; it is there
        except errors.PeerLost as exc:
            raise errors.PeerLost(
                f"{channel.endpoint}: the channel was lost while connecting", executed_possible=False) from exc
        if channel.goodbye:
            raise errors.PeerLost(
                f"{channel.endpoint}: the server takes nothing new; this message had not been sent",
                executed_possible=False)

    def _failed(self, Slot slot not None, refusal, int64_t started, int64_t limit):
        """Note that the attempt has come to nothing for one who waits since ``started``; return the error to raise.

        ``refusal`` is what the last look at the endpoint has shown, None if there was no time for one.
        """
        cdef Table table = slot.table
        cdef int64_t now = now_ns()
        cdef int64_t waited = now - started
        if refusal is not None and refusal.local:
            descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            return errors.PoolExhausted(
                f"{slot.endpoint}: no connection within {waited / 1e9:.3g} s; {refusal.reason}. That is a lack of this"
                f" process or host, not the endpoint's fault (limit of file descriptors: {descriptors})")
        reason = "" if refusal is None else refusal.reason
        refused = refusal is not None and refusal.final
        judged = refused or now >= limit
        # One whose own time is over has not found out; but together such attempts do.
        if judged or table.note_attempt(slot, reason) >= self.connect_timeout_ns:
            # Who is silent holds a place all the while: for no more than about half of the time.
            table.note_failure(
                slot, reason, judged, 0 if refused else now - slot.made_ns)
            return table.unreachable(slot.endpoint, f"tried for {waited / 1e9:.3g} s")
        return table.unjudged(slot.endpoint, waited, self.connect_timeout_ns)

    # -- draining --------------------------------------------------------------------------------------------

    cdef int _pump(self) except -1:
        """Move things on: count out what has gone, hand out places, close victims for those who wait."""
        cdef Table table = self.table
        cdef list victims = []
        table.enter()
        try:
            table.reap()
            table.grant()
            if table.queue:
                victims = table.victims()
        finally:
            table.leave()
            self._drain(victims)
        return 0

    def _drain(self, list slots not None):
        """Begin to drain each of ``slots``, whatever happens to the others."""
        cdef Slot slot
        failure = None
        for slot in slots:
            try:
                self._begin_drain(slot)
            except BaseException as exc:
                failure = exc
        if failure is not None:
            raise failure

    def _make_room(self, Table table not None):
        """While places are short, close a channel for the next one, as this one is connecting."""
        cdef Slot victim
        table.enter()
        try:
            victim = table.victim_ahead()
        finally:
            table.leave()
        if victim is not None:
            self._begin_drain(victim)

    def _begin_drain(self, Slot slot not None):
        """Close a slot's channel as soon as nothing is outstanding on it: mostly at once."""
        cdef Channel channel = slot.channel
        if channel is not None:
            channel.retire(self._drained, self.drain_timeout_ns / 1e9)
            if slot.stage == STAGE_OPEN:
                channel.keep()      # taken back meanwhile

    def _drained(self, Channel channel not None):
        """Nothing is outstanding on the channel of a draining slot, or it is lost: close it."""
        cdef Slot slot = channel.owner
        cdef Table table = slot.table
        table.enter()
        try:
            if slot.stage != STAGE_DRAINING:
                return
            if channel.state != STATE_LOST:
                table.n_drained += 1
            elif slot.cause != LOST:
                table.n_drain_lost += 1
            table.note_closing(slot)
        finally:
            table.leave()
        try:
            channel.close()
        finally:
            table.enter()
            try:
                table.wake_head()
            finally:
                table.leave()

    def _tend_draining(self, Table table not None):
        """Look after the channels that drain: whoever should have done so may have been interrupted."""
        cdef Slot slot
        cdef Channel channel
        table.enter()
        try:
            draining = table.draining.copy()
        finally:
            table.leave()
        for slot in draining:
            channel = slot.channel
            if channel is None or slot.stage != STAGE_DRAINING:
                continue
            try:
                if channel.on_clean is None and channel.state <= STATE_OPEN and not channel.is_clean():
                    self._begin_drain(slot)
                channel.attend()
            except errors.ZmqcoreError:
                pass            # e.g. its context has been closed: the channel goes, too
            else:
                if channel.state <= STATE_OPEN and not channel.is_clean():
                    continue
            self._drained(channel)

    # -- time ------------------------------------------------------------------------------------------------

    cdef int _maintain_later(self, Table table) except -1:
        """Nobody could be told to call maintain(): try it again, but not at each use."""
        table.maintain_from = table.n_acquired + USES_BEFORE_RETRY
        return 0

    def maintain(self) -> float | None:
        """Expire what is overdue, notice channels that have been lost, count out what has gone.

        Never waits. Returns after how many seconds it wants to be called again; None when the pool is empty.
        """
        cdef Table table = self.table
        cdef Slot slot
        cdef Channel channel
        cdef int64_t now = table.now()
        cdef int cause
        cdef list overdue = []
        table.enter()
        try:
            if table.closed:
                return None
            everything = [slot for slots in table.slots.values() for slot in slots if slot.stage == STAGE_OPEN]
        finally:
            table.leave()
        for slot in everything:
            channel = slot.channel
            if slot.users == 0 and channel is not None:
                try:
                    # Takes acknowledgements or a goodbye, or notices that the connection has gone.
                    channel.look()
                except errors.ZmqcoreError:
                    channel.close()     # e.g. its context has been closed
        table.enter()
        try:
            for slot in everything:
                if slot.stage != STAGE_OPEN or slot.stale or slot.users:
                    continue
                cause = table.fate(slot, now)
                if cause == STAYS and not slot.persistent and now - slot.last_used > table.ttl_ns(slot):
                    cause = EXPIRED_IDLE
                if cause != STAYS:
                    table.retire(slot, cause)
                    overdue.append(slot)
            table.forget_failures(now)
        finally:
            table.leave()
            self._drain(overdue)
        self._tend_draining(table)
        self._pump()
        table.enter()
        try:
            if not table.total:
                if self.maintenance is not None:
                    table.maintain_from = 0     # from the next use on: the thread is there already
                return None
            if table.closing or table.draining:
                return 0.01
        finally:
            table.leave()
        return min(LONGEST_PAUSE, max(0.05, min(self.idle_ttl_ns, <double>self.max_lifetime_ns) / 1e10))

    def close(self, timeout: float = 5.0) -> bool:
        """Refuse everything new, wake every waiter with Closed, drain up to ``timeout`` seconds, close all channels.

        Waits until libzmq has let the descriptors go, a second at most. Returns whether nothing was lost. What is
        outstanding at the end of the timeout ends with Closed. Twice is fine. Interrupted by a signal it closes all
        at once.
        """
        cdef Table table = self.table
        cdef Slot slot
        cdef Turn turn
        cdef int64_t deadline = deadline_after(timeout)
        cdef bint clean = True
        table.enter()
        try:
            table.closed = True
            everything = table.everything()
            for turns in (*table.queue.values(), *table.making.values()):
                for turn in turns:
                    turn.awake = True
                    turn.waiter.wake()
        finally:
            table.leave()
        try:
            for slot in everything:
                while not self._settled(slot.channel) and now_ns() < deadline:
                    time.sleep(0.001)
        finally:
            for slot in everything:
                clean = self._close_slot(table, slot) and clean
        deadline = now_ns() + 1_000_000_000
        while now_ns() < deadline:
            table.enter()
            try:
                table.reap()
                if not table.closing:
                    if table.fds is not None:
                        table.fds.close()
                    break
            finally:
                table.leave()
            time.sleep(0.0005)
        return clean

    def _settled(self, Channel channel) -> bool:
        """Whether nothing is outstanding on ``channel``, as far as one can still tell."""
        try:
            return channel is None or channel.settle()
        except errors.ZmqcoreError:
            return True

    def _close_slot(self, Table table not None, Slot slot not None) -> bool:
        """Close the slot's channel as it is; return whether nothing was outstanding on it."""
        cdef Channel channel = slot.channel
        cdef bint clean = self._settled(channel)
        table.enter()
        try:
            if slot.stage <= STAGE_OPEN:
                table.left[<int>POOL_CLOSED] += 1
                slot.cause = POOL_CLOSED
            if slot.stage < STAGE_CLOSING:
                if slot.channel is None:
                    table.move(slot, STAGE_GONE)     # who is making it will see that
                    table.wake_making(slot.endpoint)
                else:
                    table.note_closing(slot)
        finally:
            table.leave()
        if channel is not None:
            channel.close()
        return clean
