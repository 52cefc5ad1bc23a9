"""``memory://name``: a registry inside one process, for tests and for programs of one process."""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple, final

from zmqcore.matchmaker.base import Backend, Key, Registration, Update
from zmqcore.matchmaker.member import Member
from zmqcore.topic import Topic

__all__ = ["MemoryBackend"]


class _Row(NamedTuple):
    epoch: int
    #: ``None``: the member has gone.
    registration: Registration | None
    expires: float


@final
class _Registry:
    """The rows that all backends of one name share.

    A member that has gone leaves an empty row behind, so that those who read what changed since an epoch hear
    of it. ``horizon`` is the epoch up to which such rows have been cleared away: from before it, only
    everything can be read.
    """

    #: Gone members that are remembered; more are cleared away, the older half at a time.
    MEMORY = 1000

    def __init__(self) -> None:
        self.lock = threading.Lock()  # guards all that follows
        self.epoch = 1
        self.horizon = 0
        self.groups: dict[Topic, dict[Key, _Row]] = {}
        self.gone = 0
        #: No member expires before this.
        self.soonest = math.inf

    def put(self, group: Topic, key: Key, registration: Registration | None, expires: float) -> None:
        rows = self.groups.setdefault(group, {})
        before = rows.get(key)
        if before is not None and before.registration is None:
            self.gone -= 1
        self.epoch += 1
        rows[key] = _Row(self.epoch, registration, expires)
        self.soonest = min(self.soonest, expires)
        if registration is None:
            self.gone += 1
            if self.gone > self.MEMORY:
                self._clear_away()

    def expire(self, now: float) -> None:
        if now < self.soonest:
            return
        held = [
            (row.expires, group, key)
            for group, rows in self.groups.items()
            for key, row in rows.items()
            if row.registration is not None
        ]
        self.soonest = min((expires for expires, _, _ in held if expires > now), default=math.inf)
        for expires, group, key in held:
            if expires <= now:
                self.put(group, key, None, math.inf)

    def _clear_away(self) -> None:
        empty = sorted(
            (row.epoch, group, key)
            for group, rows in self.groups.items()
            for key, row in rows.items()
            if row.registration is None
        )
        for epoch, group, key in empty[: len(empty) // 2 + 1]:
            self.horizon = epoch
            self.gone -= 1
            del self.groups[group][key]
            if not self.groups[group]:
                del self.groups[group]


_registries: weakref.WeakValueDictionary[str, _Registry] = weakref.WeakValueDictionary()
_registries_lock = threading.Lock()  # guards _registries


def _key(member: Member) -> Key:
    return member.server, member.instance


@final
class MemoryBackend(Backend):
    """Backends of one name and one process share a registry, which lasts as long as one of them does.

    A forked child has a copy of it, which does not hear of the parent's any more: the parent's members stay
    in it until their leases run out.
    """

    # A look costs microseconds, and tests wait for it.
    poll_interval = 0.02

    def __init__(self, name: str = "", clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        with _registries_lock:
            registry = _registries.get(name)
            if registry is None:
                registry = _registries[name] = _Registry()
        self._registry = registry
        self._connected = False

    def connect(self) -> bool:
        fresh, self._connected = not self._connected, True
        return fresh

    def disconnect(self) -> None:
        pass

    def abandon(self) -> None:
        # Whichever thread held it does not exist here.
        self._registry.lock = threading.Lock()

    def register(self, registration: Registration) -> None:
        member = registration.member
        with self._registry.lock:
            self._registry.put(
                member.topic.group, _key(member), registration, self._clock() + registration.ttl
            )

    def renew(self, registrations: Sequence[Registration]) -> Sequence[Registration]:
        replaced = []
        now = self._clock()
        with self._registry.lock:
            for registration in registrations:
                member = registration.member
                group, key = member.topic.group, _key(member)
                row = self._registry.groups.get(group, {}).get(key)
                if row is None or row.registration is None:
                    self._registry.put(group, key, registration, now + registration.ttl)
                elif row.registration is registration:
                    self._registry.groups[group][key] = row._replace(expires=now + registration.ttl)
                else:
                    replaced.append(registration)
        return replaced

    def delete(self, registrations: Sequence[Registration]) -> None:
        with self._registry.lock:
            for registration in registrations:
                group, key = registration.member.topic.group, _key(registration.member)
                row = self._registry.groups.get(group, {}).get(key)
                if row is not None and row.registration is registration:
                    self._registry.put(group, key, None, math.inf)

    def refresh(self) -> int:
        with self._registry.lock:
            self._registry.expire(self._clock())
            return self._registry.epoch

    def raise_epoch(self, floor: int) -> int:
        with self._registry.lock:
            self._registry.epoch = max(self._registry.epoch, floor)
            return self._registry.epoch

    def read(self, group: Topic, since: int) -> Update:
        with self._registry.lock:
            complete = since == 0 or since < self._registry.horizon
            records = {
                key: row.registration.member if row.registration is not None else None
                for key, row in self._registry.groups.get(group, {}).items()
                if complete or row.epoch > since
            }
            return Update(self._registry.epoch, complete, records)

    def groups(self) -> list[Topic]:
        with self._registry.lock:
            return [
                group
                for group, rows in self._registry.groups.items()
                if any(row.registration is not None for row in rows.values())
            ]


def from_url(url: str) -> MemoryBackend:
    return MemoryBackend(url.removeprefix("memory://"))
