"""Leases that are kept alive and watches that are kept up to date, on any backend, by one thread."""

from __future__ import annotations

import logging
import math
import os
import random
import threading
import time
import uuid
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Final, Literal, TypeVar, final

from zmqcore import options
from zmqcore.endpoint import Endpoint
from zmqcore.errors import Closed, MatchmakerError
from zmqcore.matchmaker.base import Backend, Busy, Registration, Update
from zmqcore.matchmaker.member import Member, Membership
from zmqcore.matchmaker.watch import Group, Watch, in_order
from zmqcore.topic import Topic

__all__ = ["TTL_MAX", "TTL_MIN", "Lease", "Session", "check_ttl"]

logger = logging.getLogger("zmqcore.matchmaker")

#: Below this a lease would expire between two turns of a busy scheduler.
TTL_MIN: Final = 0.1
#: A day: whoever wants more wants no lease.
TTL_MAX: Final = 86_400.0


def check_ttl(name: str, ttl: float) -> float:
    """Return ``ttl``, given as the option ``name``. Raises ValueError or TypeError if no lease can be that long."""
    return options.seconds(name, ttl, TTL_MIN, TTL_MAX)


#: A lease survives two lost renewals.
_RENEWALS_PER_TTL: Final = 3
#: The longest pause between two attempts at a registry that does not answer, so that its return is soon seen.
_RETRY_MAX: Final = 1.0
#: How long the thread sleeps when there is nothing to do; whatever brings work wakes it.
_IDLE: Final = 3600.0
#: How long, in seconds, who registers or reads waits while others write, which takes each of them less than a
#: millisecond.
_BUSY_PATIENCE: Final = 5.0
#: The same for who gives up a lease, which ends by itself: before that is left to the thread, and at the end.
_LEAVING_PATIENCE: Final = 0.2
_CLOSING_PATIENCE: Final = 1.0
#: Between two attempts, about so many seconds.
_BUSY_PAUSE: Final = 0.01
#: For how long after a fork what the parent knew is news to the child: as long as a change may take to be seen.
_INHERITANCE: Final = 1.0

_Result = TypeVar("_Result")


@final
class Lease:
    """A member's place in the registry, renewed by the matchmaker's thread every third of ``ttl``.

    Given up by :meth:`close`, by the end of a with-statement, or by closing the matchmaker; if the process
    dies, it ends by itself. Not given up by dropping the object: the matchmaker holds it. Thread-safe. A
    forked child inherits none: there the lease is not ``alive``, and closing it does nothing.
    """

    __slots__ = ("__weakref__", "due", "registration", "renewed", "session", "state")

    def __init__(self, session: Session, registration: Registration, now: float) -> None:
        self.session = session
        self.registration = registration
        self.state: Literal["held", "replaced", "closed", "inherited"] = "held"
        self.renewed_at(now)

    def renewed_at(self, now: float) -> None:
        self.renewed = now
        self.due = now + self.registration.ttl / _RENEWALS_PER_TTL

    @property
    def member(self) -> Member:
        """The member as it was registered."""
        return self.registration.member

    @property
    def ttl(self) -> float:
        """Seconds for which the registry keeps the member after each renewal."""
        return self.registration.ttl

    @property
    def alive(self) -> bool:
        """Whether the registry still holds the member, as far as this process can know.

        False once closed, once another registration of the same topic, server and instance has replaced it,
        and while renewals have failed for longer than ``ttl`` (true again when one succeeds).
        """
        return self.state == "held" and self.session.clock() < self.renewed + self.ttl

    def close(self) -> None:
        """Leave the registry. Idempotent; a registry that does not answer is logged, and the lease runs
        out."""
        self.session.release(self)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Lease {self.member} ttl={self.ttl:g} {self.state}>"


class Session:
    """Everything a matchmaker does, on the hooks of one backend.

    ``io`` guards the backend: its hooks run one at a time and nothing else happens under it. ``lock`` (and
    the condition ``changed`` on it) guards leases, groups and watches and is held only for moments. Order:
    ``io`` before ``lock``. Nobody waits for other writers with ``io`` held: a fork waits for it.

    The thread holds only a weak reference, so that a matchmaker that nobody holds is collected, and the
    thread ends with it. Before a fork both locks are taken and the backend made quiet; the child starts with no
    thread, no leases, and watches that resume when first used.
    """

    def __init__(self, url: str, backend: Backend, clock: Callable[[], float] = time.monotonic) -> None:
        self.url = url
        self.backend = backend
        self.clock = clock
        self.closed = False
        self.stale = False
        self.leases: dict[str, Lease] = {}
        self.groups: dict[Topic, Group] = {}
        #: Of leases that were given up while the registry was locked. Guarded by ``lock``.
        self._leaving: list[Registration] = []
        #: What the epoch of a registry that has begun anew is still to be raised to. Guarded by ``io``.
        self._floor = 0
        self._failures = 0
        #: Since when the thread finds the registry locked, and whether the log says so. Guarded by ``io``.
        self._busy_since: float | None = None
        self._busy_told = False
        self._thread: threading.Thread | None = None
        #: The thread's own. Without one nobody may touch it: in a forked child its lock may be held for ever.
        self._wake = threading.Event()
        #: Until when, in a forked child, what the parent knew is as good as news.
        self._inheritance_ends = -math.inf
        #: When, in a forked child, the thread would first read the registry if it were started at once.
        self._first_turn = -math.inf
        self.io = threading.Lock()
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)
        # For whoever forgets to close: without the session nobody uses the backend, so this needs no lock.
        weakref.finalize(self, backend.disconnect).atexit = False
        with _forking:
            _sessions.add(self)

    # -- what users ask for -------------------------------------------------------------------------------

    def register(self, member: Member, ttl: float) -> Lease:
        ttl = check_ttl("ttl", ttl)
        for endpoint in member.endpoints:
            Endpoint.parse(endpoint)
        registration = Registration(member, ttl, uuid.uuid4().hex)

        def register() -> Lease:
            self._open()
            now = self.clock()
            self.backend.register(registration)
            lease = Lease(self, registration, now)
            with self.lock:
                self.leases[registration.token] = lease
            self._catch_up_quietly()
            return lease

        lease = self._when_free(register)
        self._run_thread()
        return lease

    def release(self, lease: Lease) -> None:
        with self.lock:
            if lease.state != "held":
                return
            lease.state = "closed"
            self.leases.pop(lease.registration.token, None)

        def give_up() -> None:
            if not self.closed:
                self._open()
                self.backend.delete([lease.registration])
                self._catch_up_quietly()

        try:
            self._when_free(give_up, _LEAVING_PATIENCE)
        except MatchmakerError as exc:
            if isinstance(exc.__cause__, Busy):
                with self.lock:
                    self._leaving.append(lease.registration)
                self._run_thread()
            else:
                logger.warning(
                    "%s could not be deregistered, its lease ends by itself: %s", lease.member, exc
                )

    def members(self, topic: Topic) -> Membership:
        group = topic.group

        def read() -> Update:
            self._open()
            self.backend.refresh()
            return self.backend.read(group, 0)

        update = self._when_free(read)
        found = in_order({key: member for key, member in update.records.items() if member is not None})
        if topic.server is not None:
            found = tuple(member for member in found if member.server == topic.server)
        return Membership(update.epoch, found)

    def topics(self) -> list[Topic]:
        def read() -> list[Topic]:
            self._open()
            self.backend.refresh()
            return sorted(self.backend.groups())

        return self._when_free(read)

    def watch(self, topic: Topic) -> Watch:
        watch = Watch(self, topic)

        def begin() -> None:
            self._open()
            with self.lock:
                group = self.groups.get(topic.group)
            if group is None:
                group = Group(topic.group)
                self.backend.refresh()
                self._read(group)
            else:
                self._catch_up_quietly()
            watch.stale = self.stale
            watch.publish(group.membership)
            with self.lock:
                self.groups[group.topic] = group
                group.watches.add(watch)

        self._when_free(begin)
        self._run_thread()
        return watch

    def unwatch(self, watch: Watch) -> None:
        with self.lock:
            watch.closed = True
            group = self.groups.get(watch.topic.group)
            if group is not None:
                group.watches.discard(watch)
            self.changed.notify_all()

    def close(self) -> None:
        with self.lock:
            if self.closed:
                return
            self.closed = True
            thread, self._thread = self._thread, None
            self.groups.clear()
            self.changed.notify_all()
        if thread is not None:
            self._wake.set()
            if thread is not threading.current_thread():
                thread.join()
        # Only now: a register that was under way when this began has added its own.
        with self.io, self.lock:
            leaving, self._leaving = self._leaving, []
            for lease in self.leases.values():
                lease.state = "closed"
                leaving.append(lease.registration)
            self.leases.clear()

        def give_up() -> None:
            if leaving:
                self.backend.connect()
                self.backend.delete(leaving)

        try:
            self._when_free(give_up, _CLOSING_PATIENCE)
        except MatchmakerError as exc:
            logger.warning("%d leases could not be given up, they end by themselves: %s", len(leaving), exc)
        finally:
            with self.io:
                self.backend.disconnect()

    def prod(self) -> None:
        """Let the thread look at the registry now. For backends to which changes are pushed; any thread."""
        if self._thread is not None:
            self._wake.set()

    def _when_free(self, hooks: Callable[[], _Result], patience: float | None = None) -> _Result:
        """Return ``hooks()``, called with io held, and again as long as others write, for ``patience`` seconds."""
        if patience is None:
            patience = _BUSY_PATIENCE
        deadline = time.monotonic() + patience
        while True:
            with self.io:
                try:
                    return hooks()
                except Busy as exc:
                    if time.monotonic() > deadline:
                        raise MatchmakerError(f"{exc}; tried for {patience:g} s") from exc
            time.sleep(_BUSY_PAUSE * random.uniform(0.1, 1.0))

    # -- with io held -------------------------------------------------------------------------------------

    def _open(self) -> None:
        if self.closed:
            raise Closed(f"the matchmaker {self.url} is closed")
        if self.backend.connect():
            with self.lock:
                for lease in self.leases.values():
                    lease.due = -math.inf
                for group in self.groups.values():
                    group.seen = 0
                told = max((group.membership.epoch for group in self.groups.values()), default=0)
            self._floor = told + 1 if told else 0
            self.prod()
        if self._floor:
            self.backend.raise_epoch(self._floor)
            self._floor = 0

    def _read(self, group: Group) -> bool:
        """Bring ``group`` up to date; return whether its membership is another one now."""
        news = group.apply(self.backend.read(group.topic, group.seen))
        if self.backend.unburied:
            group.seen = 0
        return news

    def _catch_up(self) -> None:
        """Bring every watch up to date."""
        epoch = self.backend.refresh()
        with self.lock:
            for topic in [topic for topic, group in self.groups.items() if not group.watches]:
                del self.groups[topic]
            behind = [group for group in self.groups.values() if group.seen != epoch or self.backend.unburied]
        for group in behind:
            if self._read(group):
                with self.lock:
                    told = [watch.publish(group.membership) for watch in group.watches]
                    if any(told):
                        self.changed.notify_all()
        self._reached()

    def _catch_up_quietly(self) -> None:
        if self.groups:
            try:
                self._catch_up()
            except Busy:
                self.prod()
            except MatchmakerError as exc:
                self._missed(exc)

    def _reached(self) -> None:
        if self._failures:
            self._failures = 0
            logger.info("the matchmaker %s answers again", self.url)
        if self.stale:
            self._mark(stale=False)

    def _missed(self, exc: Exception) -> None:
        self._failures += 1
        if self._failures == 1:
            # Once per outage: the thread tries again every second.
            known = isinstance(exc, MatchmakerError)
            logger.warning(
                "the matchmaker %s does not answer; members known so far stay: %s",
                self.url,
                exc,
                exc_info=None if known else exc,
            )
        self._mark(stale=True)

    def _mark(self, *, stale: bool) -> None:
        with self.lock:
            self.stale = stale
            for group in self.groups.values():
                for watch in group.watches:
                    watch.stale = stale

    # -- the thread ---------------------------------------------------------------------------------------

    def _run_thread(self, pause: float = 0.0) -> None:
        """Have the thread take its next turn after ``pause`` seconds."""
        with self.lock:
            if self._thread is None and not self.closed:
                wake = self._wake = threading.Event()
                ref = weakref.ref(self, lambda _: wake.set())
                self._thread = threading.Thread(
                    target=_keep_up, args=(ref, wake, pause), name="zmqcore-matchmaker", daemon=True
                )
                self._thread.start()
        if not pause:
            self.prod()

    def turn(self) -> float | None:
        """Do what is due, and return the seconds until something is again; ``None``: never."""
        with self.io:
            if self.closed:
                return None
            try:
                pause = self._turn()
            except Busy as exc:
                return self._be_patient(exc)
            # The thread must outlive whatever a backend raises.
            except Exception as exc:  # noqa: BLE001
                self._missed(exc)
                return float(min(self.backend.poll_interval * 2 ** min(self._failures, 10), _RETRY_MAX))
            self._busy_since, self._busy_told = None, False
            return pause

    def _be_patient(self, exc: Busy) -> float:
        """Others write, and so nothing could be written: it is tried again soon."""
        now = time.monotonic()
        if self._busy_since is None:
            self._busy_since = now
        elif now - self._busy_since > _BUSY_PATIENCE and not self._busy_told:
            self._busy_told = True
            logger.warning("leases cannot be renewed for %g s already: %s", now - self._busy_since, exc)
        return _BUSY_PAUSE * random.uniform(1.0, 2.0)

    def _turn(self) -> float:
        now = self.clock()
        with self.lock:
            work = bool(self.groups or self._leaving)
            work = work or any(lease.due <= now for lease in self.leases.values())
        if work:
            self._open()
            busy = None
            try:
                self._renew(now)
            except Busy as exc:
                busy = exc  # reading needs no turn
            if self.groups:
                self._catch_up()
            else:
                self._reached()
            if busy is not None:
                raise busy
        with self.lock:
            next_due = min((lease.due for lease in self.leases.values()), default=math.inf)
            watching = bool(self.groups)
        return max(0.0, min(next_due - self.clock(), self.backend.poll_interval if watching else _IDLE))

    def _renew(self, now: float) -> None:
        """Write what is to be written: who leaves, and the leases that are due at ``now``."""
        with self.lock:
            leaving, due = self._leaving, [lease for lease in self.leases.values() if lease.due <= now]
        if leaving:
            self.backend.delete(leaving)
            with self.lock:
                self._leaving = self._leaving[len(leaving) :]
        if not due:
            return
        replaced = set(self.backend.renew([lease.registration for lease in due]))
        with self.lock:
            for lease in due:
                lease.renewed_at(now)
                if lease.registration in replaced and lease.state == "held":
                    lease.state = "replaced"
                    del self.leases[lease.registration.token]
                    logger.warning("%s was replaced by another registration of its name", lease.member)

    # -- fork ---------------------------------------------------------------------------------------------

    def start_anew_in_child(self) -> None:
        self._thread = None
        self._failures = self._floor = 0
        self._busy_since, self._busy_told = None, False
        self._leaving = []
        if not self.stale:
            now = self.clock()
            self._inheritance_ends = now + _INHERITANCE
            self._first_turn = now + self.backend.poll_interval
        self.stale = bool(self.groups)
        self.backend.abandon()
        for lease in self.leases.values():
            lease.state = "inherited"
        self.leases.clear()
        for group in self.groups.values():
            group.seen = 0
            for watch in group.watches:
                watch.leave_behind()

    @property
    def just_forked(self) -> bool:
        """Whether a forked child need not resume() yet: starting the thread takes a fifth of its first call."""
        return self.clock() < self._first_turn

    def resume(self) -> None:
        """Bring inherited watches up to date in a forked child, and keep them so.

        Right after the fork they are: then reading the registry, which takes longer than a call, is left to the thread.
        """
        pause = 0.0
        with self.io:
            with self.lock:
                for group in self.groups.values():
                    for watch in group.watches:
                        watch.take_up()
            if self.closed:
                return
            if self.clock() < self._inheritance_ends:
                self._mark(stale=False)
                pause = self.backend.poll_interval
            else:
                try:
                    self._open()
                except MatchmakerError as exc:
                    self._missed(exc)
                else:
                    self._catch_up_quietly()
        self._run_thread(pause)

    def __repr__(self) -> str:
        state = "closed" if self.closed else "stale" if self.stale else "open"
        return f"leases={len(self.leases)} watched={len(self.groups)} {state}"


def _keep_up(ref: weakref.ref[Session], wake: threading.Event, pause: float | None) -> None:
    while True:
        # Here, without a session: this thread must not be what keeps it alive.
        wake.wait(pause)
        wake.clear()
        session = ref()
        if session is None:
            return
        pause = session.turn()
        del session
        if pause is None:
            return


# Guards _sessions, and is held across a fork, so that two forking threads do not take the sessions' locks in
# different orders.
_forking = threading.Lock()
_sessions: weakref.WeakSet[Session] = weakref.WeakSet()
_quiet: list[Session] = []


def _before_fork() -> None:
    _forking.acquire()
    for session in list(_sessions):
        session.io.acquire()
        session.lock.acquire()
        _quiet.append(session)
        session.backend.quiesce()


def _after_fork_in_parent() -> None:
    _go_on()


def _after_fork_in_child() -> None:
    for session in _quiet:
        session.start_anew_in_child()
    _go_on()


def _go_on() -> None:
    while _quiet:
        session = _quiet.pop()
        session.lock.release()
        session.io.release()
    _forking.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )
