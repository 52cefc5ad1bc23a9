"""What the tests of the pool share: a server at thousands of endpoints, and what must always add up."""

from __future__ import annotations

import threading
from typing import Any

import zmq

from zmqcore._channel import Channel
from zmqcore._port import Port
from zmqcore.errors import Closed

PATIENCE = 30.0
"""How long to wait for what must happen, in seconds; nothing is asserted about time."""


class Far:
    """A ROUTER bound to a wildcard address: every 127.x.y.z reaches it. Answers calls; counts casts by their body."""

    def __init__(self, context: zmq.Context[Any], bind: str = "tcp://0.0.0.0:*") -> None:
        self.port = Port(context, [bind])
        self.number = int(self.port.endpoints[0].rpartition(":")[2])
        self.taken: list[bytes] = []
        self.reading = threading.Event()
        self.reading.set()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def endpoint(self, number: int) -> str:
        return f"tcp://127.{1 + number // 62_500}.{number // 250 % 250}.{1 + number % 250}:{self.number}"

    def _serve(self) -> None:
        try:
            while True:
                self.reading.wait()
                for request in self.port.receive(64, None):
                    if request.wants_reply:
                        request.reply(b"ok")
                    else:
                        self.taken.append(bytes(request.envelope.body))
        except Closed:
            pass

    def close(self) -> None:
        self.reading.set()
        self.port.close()
        self._thread.join()


def call(channel: Channel, timeout: float = PATIENCE) -> bytes:
    return bytes(channel.call(b"topic", "method", b"x", None, b"", 0, timeout).body)


def cast(channel: Channel, body: bytes) -> int:
    return channel.send("cast", b"topic", "method", body, None, b"", 0, PATIENCE)


def adds_up(stats: dict[str, Any]) -> None:
    """What holds at every instant, see stats()."""
    now = {name: stats[name] for name in ("connecting", "idle", "in_use", "draining", "closing")}
    assert all(value >= 0 for value in now.values()), stats
    assert sum(now.values()) == stats["open"] <= stats["max_sockets"]
    causes = (
        "evicted_clean", "evicted_draining", "expired_idle", "expired_lifetime", "lost", "goodbyes", "dead",
        "abandoned", "failed", "closed",
    )  # fmt: skip
    left = sum(stats[name] for name in causes)
    assert stats["opened"] + stats["revived"] == now["connecting"] + now["idle"] + now["in_use"] + left
    assert stats["waits"] >= stats["wait_timeouts"]
