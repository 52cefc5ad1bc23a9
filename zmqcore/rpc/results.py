"""What operations on several members return."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from zmqcore.matchmaker import Member

__all__ = ["Fanout", "Gathered"]


@dataclass(frozen=True, slots=True)
class Fanout:
    """To whom a fanout went.

    ``epoch``: the membership's. ``sent``: the members whose connection has the message. ``failed``: the others, and
    why. With ``delivery="accepted"`` those in ``sent`` are either ``finished``: they have said that the method has
    run, or ``unknown``: they have not said so within the timeout, and may have run it or not. Else both are empty.
    """

    epoch: int
    sent: tuple[Member, ...]
    failed: dict[Member, Exception] = field(default_factory=dict)
    finished: tuple[Member, ...] = ()
    unknown: tuple[Member, ...] = ()


@dataclass(frozen=True, slots=True)
class Gathered:
    """What the members answered.

    ``epoch``: the membership's. ``results``: what each one returned. ``errors``: what each one's handler raised or
    refused. ``missing``: who could not be reached or has not answered in time.
    """

    epoch: int
    results: dict[Member, Any] = field(default_factory=dict)
    errors: dict[Member, Exception] = field(default_factory=dict)
    missing: dict[Member, Exception] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether every member has returned a result."""
        return not self.errors and not self.missing
