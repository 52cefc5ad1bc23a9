"""Which member gets the next message: least outstanding calls first, ties in strict round-robin.

A member that fails again and again is put aside, for longer each time; one that is overloaded, for a moment.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from zmqcore.endpoint import Endpoint
from zmqcore.matchmaker import Member, Membership
from zmqcore.rpc.forked import renew_in_child

__all__ = ["Balancer", "Target", "nearest_endpoint"]

_logger = logging.getLogger("zmqcore.client")

#: After so many failures in a row a member is put aside.
_FAILURES = 5
#: For how long, in seconds: the first time, and at most; twice as long each time that it fails right afterwards.
_ASIDE, _ASIDE_MAX = 1.0, 30.0
#: For how long others are preferred to a member that was overloaded, in seconds.
_OVERLOADED = 0.1
#: What being overloaded, and being put aside, count for beside outstanding calls.
_MUCH, _MORE = 1 << 40, 1 << 41


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
    """One member as a client sees it: where it is, how many of the client's calls it has, and whether it fails.

    ``failures``: how many in a row; those that led to its being put aside count as one less than needed, so that
    one more is enough. ``burden``: what it counts for, until ``burdened_until``, besides its outstanding calls.
    """

    __slots__ = ("burden", "burdened_until", "endpoint", "failures", "member", "outstanding", "times_aside")

    def __init__(self, member: Member, endpoint: str) -> None:
        self.member = member
        self.endpoint = endpoint
        self.outstanding = 0
        self.failures = self.times_aside = self.burden = 0
        self.burdened_until = 0.0

    def is_aside(self, now: float) -> bool:
        """Whether it is put aside for its failures."""
        return self.burden == _MORE and self.burdened_until > now

    def __repr__(self) -> str:
        return f"<Target {self.endpoint} {self.outstanding} outstanding, {self.failures} failures>"


class Balancer:
    """Choose among the members of a topic. Thread-safe.

    Each choice counts one outstanding call, until done(). Linear in the members while calls are outstanding, else
    constant.
    """

    def __init__(self, host: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._host = host
        self._clock = clock
        # Fresh clients do not all begin with the same member.
        self._next = random.randrange(1 << 16)
        self._targets: list[Target] = []
        self._membership: Membership | None = None
        self.renew()
        renew_in_child(self)

    def renew(self) -> None:
        """Forget all counts. Where the members are stays known: to work it out takes longer than many a call."""
        self._lock = threading.Lock()
        self._targets = [Target(target.member, target.endpoint) for target in self._targets]
        self._outstanding = 0
        #: When the last of the burdens ends; 0 if there is none.
        self._burdened_until = 0.0
        #: The only target there is, and the membership that says so: most clients have one, and need no lock.
        self.only: tuple[Membership, Target] | tuple[None, None] = (None, None)
        self._note_only()

    def _note_only(self) -> None:
        if self._membership is not None and len(self._targets) == 1:
            self.only = (self._membership, self._targets[0])
        else:
            self.only = (None, None)

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
                self._keep_half(targets)
                self._note_only()
            return targets

    def choose(self, membership: Membership, avoid: Iterable[Target] = ()) -> Target | None:
        """Return the next target, counted as having one more call, or None if there is none but ``avoid``."""
        targets = self.targets(membership)
        with self._lock:
            n = len(targets)
            if not n:
                return None
            start = self._next
            now = 0.0  # of no interest unless somebody is burdened
            if self._burdened_until:
                now = self._clock()
                if now >= self._burdened_until:
                    now = self._burdened_until = 0.0
            if n == 1 or (not avoid and self._outstanding == 0 and not now):
                best = start % n
                if targets[best] in avoid:
                    return None
            else:
                best = -1
                least = 1 << 62
                for i in range(start, start + n):
                    target = targets[i % n]
                    load = target.outstanding
                    if now and target.burdened_until > now:
                        load += target.burden
                    if load < least and target not in avoid:
                        best, least = i % n, load
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

    def answered(self, target: Target) -> None:
        """``target`` is well."""
        with self._lock:
            target.failures = target.times_aside = 0
            target.burdened_until = 0.0

    def failed(self, target: Target) -> None:
        """A call of ``target`` has failed in a way that may be the member's fault. Too often in a row: put it aside.

        Never more than half of the members are.
        """
        with self._lock:
            now = self._clock()
            target.failures += 1
            aside = sum(each.is_aside(now) for each in self._targets)
            if target.failures < _FAILURES or target.is_aside(now) or 2 * (aside + 1) > len(self._targets):
                return
            duration = min(_ASIDE * 2.0**target.times_aside, _ASIDE_MAX)
            failures, target.failures = target.failures, _FAILURES - 1
            target.times_aside = min(target.times_aside + 1, 10)
            self._burden(target, _MORE, now + duration)
        # No warning: the client has dealt with it, and its callers are told what they must know.
        _logger.info(
            "%s has failed %d times in a row; others are preferred for %g s",
            target.endpoint,
            failures,
            duration,
        )

    def overloaded(self, target: Target) -> None:
        """``target`` has rejected a call: prefer others for a moment."""
        with self._lock:
            now = self._clock()
            if not target.is_aside(now):
                self._burden(target, _MUCH, now + _OVERLOADED)

    def _burden(self, target: Target, burden: int, until: float) -> None:
        target.burden, target.burdened_until = burden, until
        self._burdened_until = max(self._burdened_until, until)

    def _keep_half(self, targets: list[Target]) -> None:
        """Members have gone: if more than half of the others are put aside now, take them all back."""
        now = self._burdened_until and self._clock()
        if now and 2 * sum(target.is_aside(now) for target in targets) > len(targets):
            for target in targets:
                target.burdened_until = 0.0
