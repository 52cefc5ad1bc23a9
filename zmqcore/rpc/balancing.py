"""Which member gets the next message: least outstanding calls first, ties in strict round-robin."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterable
from pathlib import Path

from zmqcore.endpoint import Endpoint
from zmqcore.matchmaker import Member, Membership
from zmqcore.rpc.forked import renew_in_child

__all__ = ["Balancer", "Target", "nearest_endpoint"]


def nearest_endpoint(member: Member, host: str) -> str:
    """Return the endpoint by which this process, on ``host``, best reaches ``member``: ipc on the same host."""
    remote = None
    for text in member.endpoints:
        endpoint = Endpoint.parse(text)
        if endpoint.transport == "ipc":
            if member.host == host and (endpoint.path.startswith("@") or Path(endpoint.path).exists()):
                return text
        elif remote is None:
            remote = text
    return remote if remote is not None else member.endpoints[0]


class Target:
    """One member as a client sees it: where it is, and how many of the client's calls it has."""

    __slots__ = ("endpoint", "member", "outstanding")

    def __init__(self, member: Member, endpoint: str) -> None:
        self.member = member
        self.endpoint = endpoint
        self.outstanding = 0

    def __repr__(self) -> str:
        return f"<Target {self.endpoint} {self.outstanding} outstanding>"


class Balancer:
    """Choose among the members of a topic. Thread-safe.

    Each choice counts one outstanding call, until done(). Linear in the members while calls are outstanding, else
    constant.
    """

    def __init__(self, host: str) -> None:
        self._host = host
        # Fresh clients do not all begin with the same member.
        self._next = random.randrange(1 << 16)
        self.renew()
        renew_in_child(self)

    def renew(self) -> None:
        """Forget all members and counts."""
        self._lock = threading.Lock()
        self._targets: list[Target] = []
        self._membership: Membership | None = None
        self._outstanding = 0
        #: The only target there is, and the membership that says so: most clients have one, and need no lock.
        self.only: tuple[Membership, Target] | tuple[None, None] = (None, None)

    def targets(self, membership: Membership) -> list[Target]:
        """Return the targets for ``membership``; who was a member before keeps its count."""
        if membership is self._membership:
            return self._targets
        with self._lock:
            known = {target.member: target for target in self._targets}
            targets = [
                known.get(member) or Target(member, nearest_endpoint(member, self._host))
                for member in membership.members
            ]
            # Another thread may have seen a newer one: that stays.
            if self._membership is None or membership.epoch >= self._membership.epoch:
                self._targets = targets
                self._membership = membership
                self.only = (membership, targets[0]) if len(targets) == 1 else (None, None)
            return targets

    def choose(self, membership: Membership, avoid: Iterable[Target] = ()) -> Target | None:
        """Return the next target, counted as having one more call, or None if there is none but ``avoid``."""
        targets = self.targets(membership)
        with self._lock:
            n = len(targets)
            if not n:
                return None
            start = self._next
            if n == 1 or (not avoid and self._outstanding == 0):
                best = start % n
                if targets[best] in avoid:
                    return None
            else:
                best = -1
                least = 1 << 62
                for i in range(start, start + n):
                    target = targets[i % n]
                    if target.outstanding < least and target not in avoid:
                        best, least = i % n, target.outstanding
                        if not least:
                            break
                if best < 0:
                    return None
            self._next = (best + 1) % n
            self._outstanding += 1
            chosen = targets[best]
            chosen.outstanding += 1
            return chosen

    def done(self, target: Target) -> None:
        """The call that choose() counted has ended."""
        with self._lock:
            target.outstanding -= 1
            self._outstanding -= 1
