"""What a client sends with ``delivery="accepted"``: a lane for each endpoint, and where it goes when one is lost."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator

from zmqcore import errors
from zmqcore._retention import Lane
from zmqcore.node import Node
from zmqcore.rpc.forked import renew_in_child

__all__ = ["Lanes", "OneMember", "check_finished", "unfinished"]

#: Beyond so many lanes those that have nothing to keep are forgotten: members come and go.
_LANES = 1024


class Lanes:
    """The lanes of one client, and all its variations, to the members of one topic; ``endpoints`` tells where they are.

    Thread-safe. In a forked child there are none: what was accepted is the parent's.
    """

    def __init__(self, node: Node, endpoints: Callable[[], list[str]]) -> None:
        self._node = node
        self._endpoints = endpoints
        #: Read without the lock. The dict itself never changes place.
        self.by_endpoint: dict[str, Lane] = {}
        self.renew()
        renew_in_child(self)

    def renew(self) -> None:
        """In a forked child: begin anew."""
        self._lock = threading.Lock()
        self.by_endpoint.clear()

    def __call__(self, endpoint: str) -> Lane:
        """Return the lane to ``endpoint``: what is sent accepted on it keeps its order."""
        lane = self.by_endpoint.get(endpoint)
        if lane is not None:
            return lane
        made = self._node.redelivery.lane(endpoint, self)
        with self._lock:
            if len(self.by_endpoint) >= _LANES:
                for key, lane in tuple(self.by_endpoint.items()):
                    if not lane.unfinished:
                        del self.by_endpoint[key]
            return self.by_endpoint.setdefault(endpoint, made)

    def __iter__(self) -> Iterator[Lane]:
        return iter(tuple(self.by_endpoint.values()))

    def lane_for(self, lane: Lane, elsewhere: bool, silent: Callable[[str], bool]) -> Lane | None:
        """Say where to send again what belongs to ``lane``: to its own endpoint, ``elsewhere`` to another member's."""
        endpoints = self._endpoints()
        others = [endpoint for endpoint in endpoints if endpoint != lane.endpoint]
        if lane.endpoint in endpoints and not (elsewhere and others):
            return lane
        answering = [endpoint for endpoint in others if not silent(endpoint)]
        return self(random.choice(answering or others)) if others else None


class OneMember:
    """Where an accepted fanout's copy for one member goes: nowhere else, and only until ``deadline``.

    A time of ``time.monotonic()``, or None.
    """

    def __init__(self, deadline: float | None) -> None:
        self._deadline = deadline

    def lane_for(self, lane: Lane, *_: object) -> Lane:  # it has nowhere else to go
        """Say where to send the copy again. Raises Closed when nobody waits for that any more."""
        if self._deadline is not None and time.monotonic() >= self._deadline:
            raise errors.Closed("the fanout has returned, and has told that the outcome is unknown")
        return lane


def unfinished(lanes: Iterable[Lane]) -> str:
    """Return how much of which lanes is not finished, as text; empty if nothing is."""
    some = [(lane.unfinished, lane.endpoint) for lane in lanes if lane.unfinished]
    return ", ".join(f"{n} for {endpoint}" for n, endpoint in some[:5]) + (", …" if len(some) > 5 else "")


def check_finished(lanes: Iterable[Lane]) -> None:
    """Raise DeadlineExceeded if anything is unfinished, and PeerLost if something was given up."""
    lanes = tuple(lanes)
    if left := unfinished(lanes):
        raise errors.DeadlineExceeded(f"accepted, and not known to be finished within the time: {left}")
    if given_up := sum(lane.given_up for lane in lanes):
        raise errors.PeerLost(f"{given_up} accepted messages were given up; the log says why")
