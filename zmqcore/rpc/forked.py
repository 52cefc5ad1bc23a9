"""What a forked child must make anew: locks that another thread of the parent may have held, and the like."""

from __future__ import annotations

import os
import weakref
from typing import Protocol

__all__ = ["renew_in_child"]


class Renewable(Protocol):
    """Something that has a state which only the process that made it can use."""

    def renew(self) -> None:
        """Called in the child right after the fork, when it has one thread only."""


_things: weakref.WeakSet[Renewable] = weakref.WeakSet()


def renew_in_child(thing: Renewable) -> None:
    """Have ``thing.renew()`` called in every forked child, as long as ``thing`` lives."""
    _things.add(thing)


def _after_fork_in_child() -> None:
    for thing in list(_things):
        thing.renew()


os.register_at_fork(after_in_child=_after_fork_in_child)
