"""The membership of a topic, kept up to date."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, final

from zmqcore.errors import Closed
from zmqcore.matchmaker.base import Key, Update
from zmqcore.matchmaker.member import Change, Member, Membership
from zmqcore.topic import Topic

if TYPE_CHECKING:
    from zmqcore.matchmaker.session import Session

__all__ = ["Group", "Watch", "in_order"]


@final
class Watch:
    """The membership of one topic, kept up to date by the matchmaker's thread.

    ``current`` is the latest known :class:`Membership`: a plain attribute, replaced as a whole, so that
    reading it takes no lock and never waits. ``stale`` is true while the registry cannot be reached: what is
    known stays. ``topic`` is what was asked for. Thread-safe. In a forked child the first use resumes the
    watch there, which takes one read of the registry unless the fork was less than 1 s ago. To read
    ``current`` within the matchmaker's poll interval (0.1 s) of the fork resumes nothing yet.
    """

    __slots__ = ("__weakref__", "closed", "current", "cursor", "inherited", "session", "stale", "topic")

    current: Membership

    def __init__(self, session: Session, topic: Topic) -> None:
        self.session = session
        self.topic = topic
        self.stale = False
        self.closed = False
        self.current = Membership(0, ())
        #: What :meth:`next` has told so far.
        self.cursor: Membership | None = None
        self.inherited: Membership | None = None

    if not TYPE_CHECKING:
        # Reached only while ``current`` is missing: see leave_behind. The usual read pays nothing for it.
        def __getattr__(self, name: str) -> Membership:
            if name != "current":
                raise AttributeError(f"'Watch' object has no attribute {name!r}")
            inherited = self.inherited
            if inherited is not None and self.session.just_forked:
                self.stale = False
                return inherited
            self.session.resume()
            return object.__getattribute__(self, "current")

    def leave_behind(self) -> None:
        """In a forked child: make a read of ``current`` resume the session there, unless it comes right away."""
        self.stale = True
        if self.inherited is None:
            self.inherited = self.current
            del self.current

    def take_up(self) -> None:
        if self.inherited is not None:
            self.current, self.inherited = self.inherited, None

    def publish(self, membership: Membership) -> bool:
        """Take in the membership of the whole group; returns whether it is news for this watch."""
        if self.topic.server is not None:
            mine = tuple(member for member in membership.members if member.server == self.topic.server)
            membership = Membership(membership.epoch, mine)
        self.take_up()
        if self.current.epoch and self.current.members == membership.members:
            return False
        self.current = membership
        return True

    def next(self, timeout: float | None = None) -> Change | None:
        """Wait for what has changed since the last call, at most ``timeout`` seconds (``None``: for ever).

        The first call returns at once, with every member in ``added`` (possibly none); ``None`` means that
        nothing changed in time. What happens between two calls is merged: a member that came and went in
        between is not told. Raises :class:`~zmqcore.errors.Closed` if the watch or the matchmaker is or gets
        closed.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        self._be_kept_up()
        while True:
            known = self.current
            with self.session.changed:
                self._check_open()
                before = self.cursor
                if known is not before:
                    self.cursor = known
                    if before is None:
                        return Change(known.epoch, known.members, ())
                    had, has = set(before.members), set(known.members)
                    added = tuple(member for member in known.members if member not in had)
                    removed = tuple(member for member in before.members if member not in has)
                    if added or removed:
                        return Change(known.epoch, added, removed)
                elif not self._await_news(known, deadline):
                    return None

    def wait_for(
        self, predicate: Callable[[Membership], bool], timeout: float | None = None
    ) -> Membership | None:
        """Wait until ``predicate(membership)`` is true and return that membership; ``None`` after ``timeout``
        s.

        The predicate is called with no lock held, first at once. Raises :class:`~zmqcore.errors.Closed` like
        :meth:`next`.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        self._be_kept_up()
        while True:
            known = self.current
            if predicate(known):
                return known
            with self.session.changed:
                self._check_open()
                if not self._await_news(known, deadline):
                    return None

    def _be_kept_up(self) -> None:
        """Who may wait for news needs the session's thread, which a forked child does without at first."""
        if self.inherited is not None:
            self.session.resume()

    def _check_open(self) -> None:
        if self.closed or self.session.closed:
            raise Closed(f"the watch of {self.topic} is closed")

    def _await_news(self, known: Membership, deadline: float | None) -> bool:
        """Wait for another membership than ``known``, or the end; needs ``session.changed``; false at the
        deadline."""
        while self.current is known and not (self.closed or self.session.closed):
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return False
            self.session.changed.wait(left)
        return True

    def close(self) -> None:
        """Stop watching; who waits in :meth:`next` or :meth:`wait_for` gets ``Closed``. Idempotent."""
        self.session.unwatch(self)

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        # Not self.current: a repr must not resume an inherited session.
        known = self.inherited if self.inherited is not None else self.current
        state = "closed" if self.closed else "stale" if self.stale else "live"
        return f"<Watch {self.topic} {len(known.members)} members epoch={known.epoch} {state}>"


class Group:
    """What is known of one group, for all its watches."""

    __slots__ = ("membership", "seen", "table", "topic", "watches")

    def __init__(self, topic: Topic) -> None:
        self.topic = topic
        #: The epoch up to which the registry has been read; 0: nothing has.
        self.seen = 0
        self.table: dict[Key, Member] = {}
        self.membership = Membership(0, ())
        # Weak: a watch that nobody holds any more need not be closed to stop costing.
        self.watches: weakref.WeakSet[Watch] = weakref.WeakSet()

    def apply(self, update: Update) -> bool:
        """Take in what was read; returns whether the membership is another one now."""
        self.seen = update.epoch
        if update.complete:
            table = {key: member for key, member in update.records.items() if member is not None}
        else:
            table = dict(self.table)
            for key, member in update.records.items():
                if member is None:
                    table.pop(key, None)
                else:
                    table[key] = member
        if table == self.table and self.membership.epoch:
            return False
        self.table = table
        self.membership = Membership(update.epoch, in_order(table))
        return True


def in_order(table: dict[Key, Member]) -> tuple[Member, ...]:
    return tuple(table[key] for key in sorted(table))
