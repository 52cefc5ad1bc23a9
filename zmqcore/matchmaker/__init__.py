"""Who serves which topic: members register under a lease, and whoever wants to know watches."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final, final

from zmqcore import options
from zmqcore.errors import MatchmakerError
from zmqcore.matchmaker.base import Backend
from zmqcore.matchmaker.member import Change, Member, Membership
from zmqcore.matchmaker.session import Lease, Session
from zmqcore.matchmaker.watch import Watch
from zmqcore.topic import Topic

__all__ = ["Change", "Lease", "Matchmaker", "Member", "Membership", "Watch", "open_matchmaker"]

# Imported when first asked for: each needs a library that the others do not.
_FACTORIES: Final = {
    "local": "zmqcore.matchmaker.local:from_url",
    "memory": "zmqcore.matchmaker.memory:from_url",
    "static": "zmqcore.matchmaker.static:from_url",
}


def open_matchmaker(url: str) -> Matchmaker:
    """Return a matchmaker for the registry at ``url``. Nothing is connected or read, and no thread is
    started.

    * ``memory://name``: inside this process.
    * ``static:///path/to/members.toml``: a file that somebody writes.
    * ``local://``: all processes of this user on this host; ``local:///path/to/directory``: those that use
      that directory.

    Raises :class:`~zmqcore.errors.MatchmakerError` for anything else.
    """
    scheme, separator, _ = options.instance("matchmaker", url, str, "a URL such as local://").partition("://")
    target = _FACTORIES.get(scheme)
    if not separator or target is None:
        known = ", ".join(f"{name}://" for name in sorted(_FACTORIES))
        raise MatchmakerError(f"no matchmaker can be made from {url!r}; known are {known}")
    module, _, factory = target.partition(":")
    backend: Backend = getattr(importlib.import_module(module), factory)(url)
    return Matchmaker(url, backend)


@final
class Matchmaker:
    """A process's view of one registry. Made by :func:`open_matchmaker`.

    Thread-safe. It costs nothing until it is used; the first :meth:`register` or :meth:`watch` starts one
    daemon thread, which :meth:`close` ends. The thread does not keep the matchmaker alive, leases and watches
    do. A matchmaker may be used on both sides of a fork: the child makes its own connection and thread when
    it first uses it, its watches go on, and the leases stay the parent's.

    ``clock`` gives seconds and is what leases are measured by.
    """

    def __init__(self, url: str, backend: Backend, clock: Callable[[], float] = time.monotonic) -> None:
        self._session = Session(url, backend, clock)

    @property
    def url(self) -> str:
        """What it was opened with."""
        return self._session.url

    @property
    def closed(self) -> bool:
        return self._session.closed

    def register(self, member: Member, ttl: float = 10.0) -> Lease:
        """Enter ``member`` into the registry, to be renewed until the lease is closed.

        If this process dies, the member is gone within ``ttl`` seconds (0.1 to 86,400), or sooner where the
        registry can tell. A member of the same topic, server and instance is replaced.

        Raises :class:`~zmqcore.errors.MatchmakerError` if the registry cannot be written,
        :class:`~zmqcore.errors.InvalidEndpoint` for an endpoint that nobody could connect to, ``ValueError``
        for a ttl out of range, :class:`~zmqcore.errors.Closed`.
        """
        return self._session.register(member, ttl)

    def members(self, topic: Topic | str) -> Membership:
        """Read the registry now: all servers of the topic, or the one it names.

        Linear in the members of the topic; whoever asks often holds a :meth:`watch` instead. Raises
        :class:`~zmqcore.errors.MatchmakerError` if the registry cannot be read,
        :class:`~zmqcore.errors.Closed`.
        """
        return self._session.members(Topic.of(topic))

    def watch(self, topic: Topic | str) -> Watch:
        """Return a watch whose ``current`` is up to date already, after one read of the registry.

        Watches of one topic share what is known. Raises as :meth:`members` does; once it exists, an
        unreachable registry only makes it ``stale``.
        """
        return self._session.watch(Topic.of(topic))

    def topics(self) -> list[Topic]:
        """Return every topic that has a member, sorted, without servers. Raises as :meth:`members` does."""
        return self._session.topics()

    def close(self) -> None:
        """Give up all leases, end all watches and the thread. Idempotent; does not raise for a dead
        registry."""
        self._session.close()

    def __enter__(self) -> Matchmaker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Matchmaker {self.url} {self._session!r}>"
