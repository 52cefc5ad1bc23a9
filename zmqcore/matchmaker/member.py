"""What a registry tells: members, the membership of a topic at one moment, and how it changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from zmqcore import options
from zmqcore.errors import InvalidEndpoint, InvalidTopic
from zmqcore.topic import Topic

__all__ = ["Change", "Member", "Membership"]


@dataclass(frozen=True, slots=True)
class Member:
    """One server of a topic, as it announces itself. Immutable and hashable.

    ``topic`` names the server; ``endpoints`` are where it listens, the nearest way first; ``instance`` tells
    this run of the server from an earlier one of the same name; ``host`` and ``pid`` say where it runs;
    ``capacity`` is its share of the work relative to the others; ``public_key`` is its CURVE key in Z85,
    empty without CURVE.

    Raises :class:`~zmqcore.errors.InvalidTopic` if the topic names no server,
    :class:`~zmqcore.errors.InvalidEndpoint` if there is no endpoint (that each is well-formed is checked when
    the member registers), ``ValueError`` for a capacity below 1.
    """

    topic: Topic
    endpoints: tuple[str, ...]
    instance: str
    host: str
    pid: int
    capacity: int = 1
    version: str = ""
    public_key: str = ""

    def __post_init__(self) -> None:
        if self.topic.server is None:
            raise InvalidTopic(f"a member's topic must name its server; {self.topic!r} does not")
        if type(self.endpoints) is not tuple:
            if isinstance(self.endpoints, str):  # type: ignore[unreachable]
                raise InvalidEndpoint(f"endpoints is a tuple of str, not one str: {self.endpoints!r}")
            object.__setattr__(self, "endpoints", tuple(self.endpoints))
        if not self.endpoints:
            raise InvalidEndpoint(f"member {self.topic} has no endpoint")
        object.__setattr__(self, "capacity", options.whole("capacity", self.capacity, 1))

    @property
    def server(self) -> str:
        """The name of the server, unique among the members of a topic unless two runs of it overlap."""
        return self.topic.server or ""

    def __str__(self) -> str:
        return f"{self.topic} {self.host}:{self.pid} {' '.join(self.endpoints)}"


class Membership(NamedTuple):
    """Who serves a topic at one moment.

    ``epoch`` is the registry's counter of changes when this was read; it only ever grows. ``members`` is
    sorted by server, then instance.
    """

    epoch: int
    members: tuple[Member, ...]


class Change(NamedTuple):
    """What came and what went between two memberships. A member that announces something new is in both."""

    epoch: int
    added: tuple[Member, ...]
    removed: tuple[Member, ...]
