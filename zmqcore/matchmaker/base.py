"""What a registry must offer so that a matchmaker can stand on it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from zmqcore.errors import MatchmakerError
from zmqcore.matchmaker.member import Member
from zmqcore.topic import Topic

__all__ = ["Backend", "Busy", "Key", "Registration", "Update", "path_in"]

#: What tells the members of one group apart: server and instance.
Key = tuple[str, str]


@dataclass(frozen=True, slots=True, eq=False)
class Registration:
    """A member that is to be in the registry for ``ttl`` seconds from each renewal.

    ``token`` is fresh for every registration, so that whoever has been replaced (same topic, server and
    instance) neither renews nor deletes what its successor wrote.
    """

    member: Member
    ttl: float
    token: str


class Update(NamedTuple):
    """What a read of one group gave, all of one moment.

    ``complete``: ``records`` holds every member and nothing else. Otherwise it holds what has changed since
    the epoch that was asked for, with ``None`` for a member that has gone.
    """

    epoch: int
    complete: bool
    records: Mapping[Key, Member | None]


def path_in(url: str) -> Path | None:
    """Return the absolute path in ``scheme:///path``, ``None`` for a bare ``scheme://``."""
    parts = urlsplit(url)
    if parts.netloc or parts.query or parts.fragment:
        raise MatchmakerError(
            f"matchmaker {url!r}: expected three slashes and an absolute path, as in {parts.scheme}:///a/path"
            " (write '?' and '#' in it as %3F and %23)"
        )
    return Path(unquote(parts.path)) if parts.path.strip("/") else None


class Busy(MatchmakerError):
    """Somebody else is writing to the registry. Nothing has been done, and it can be tried again at once."""


class Backend(ABC):
    """One way to keep a registry. Knows no threads: a session calls its hooks one at a time.

    Contract:
      * The constructor opens nothing: processes fork after it.
      * ``connect`` comes before any other hook and is cheap when there is nothing to do.
      * Each hook ends within seconds, whatever the registry does, and raises
        :class:`~zmqcore.errors.MatchmakerError` for what the registry did wrong. A hook that has raised
        leaves the backend in a state in which ``connect`` can try again.
      * A hook does not wait for other writers for longer than moments: it raises :class:`Busy`, and the session waits,
        without its lock.
      * A *group* is a topic without a server: exchange and name.
    """

    #: Seconds between two looks at the registry while somebody watches. A backend to which changes are pushed
    #: sets it high and calls the session's ``prod`` instead.
    poll_interval = 0.1
    #: Whether there are members that have expired, and could not be removed just now. Then ``read`` gives everything,
    #: without them, and it is to be read again: they may yet be renewed, which changes no epoch.
    unburied = False

    @abstractmethod
    def connect(self) -> bool:
        """Make sure that the registry can be used.

        True if it is new to this backend: opened for the first time, emptied, or replaced by another one. The
        session then writes all its registrations again and reads everything anew.
        """

    @abstractmethod
    def disconnect(self) -> None:
        """Let go of everything. Idempotent, does not raise; ``connect`` may follow."""

    @abstractmethod
    def abandon(self) -> None:
        """Called in a forked child: forget what was inherited without closing or using it."""

    def quiesce(self) -> None:  # noqa: B027 - most backends have nothing to do
        """Called in the parent right before a fork. Does not raise."""

    @abstractmethod
    def register(self, registration: Registration) -> None:
        """Write a new registration, over an earlier one of the same topic, server and instance."""

    @abstractmethod
    def renew(self, registrations: Sequence[Registration]) -> Sequence[Registration]:
        """Extend registrations by their ttl from now; one that has vanished is written again.

        Returns those that another token has replaced.
        """

    @abstractmethod
    def delete(self, registrations: Sequence[Registration]) -> None:
        """Remove registrations, except where another token has replaced them."""

    @abstractmethod
    def refresh(self) -> int:
        """Drop what has expired and return the epoch. Cheap: called at every poll."""

    @abstractmethod
    def raise_epoch(self, floor: int) -> int:
        """Make the epoch at least ``floor`` and return it. Needed when a lost registry has begun anew."""

    @abstractmethod
    def read(self, group: Topic, since: int) -> Update:
        """Return what changed in ``group`` after the epoch ``since``; everything if ``since`` is 0 or
        forgotten."""

    @abstractmethod
    def groups(self) -> list[Topic]:
        """Return every group that has a member, in any order."""
