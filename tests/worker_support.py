"""A handler that takes its time, for servers of which one is slower than the other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from waiting_support import PATIENCE

from zmqcore import AsyncClient, Client


class Worker:
    """Takes its time, if its name is the one that is said, until the gate is opened."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.entered = threading.Semaphore(0)
        self.gate = threading.Event()
        self.calls = 0

    def linger(self, *names: str) -> str:
        self.calls += 1
        if self.name in names:
            self.entered.release()
            self.gate.wait(PATIENCE)
        return self.name

    def fail(self, *names: str) -> str:
        if self.name not in names:
            self.gate.wait(PATIENCE)
        raise ValueError(self.name)


def settled(client: Client | AsyncClient) -> bool:
    """Whether no call counts as outstanding any more."""
    balancer = client._route._balancer
    return balancer._outstanding == 0 and {target.outstanding for target in balancer._targets} == {0}


def lingering(
    client: Client, peers: dict[str, Any], running: Callable[..., Any], until: Callable[..., None]
) -> tuple[Any, Any]:
    """Start calls until one lingers in "a"; return it and the peer."""
    watch = client.prepare(server="a")
    while True:
        call = running(client.call, "count_in", "a", PATIENCE)
        until(lambda call=call: call.ended or watch.call("counted", "a"))
        if not call.ended:
            return call, peers["a"]
