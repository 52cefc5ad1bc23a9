"""A server that does nothing by itself, for what a Channel makes of what comes."""

from __future__ import annotations

from typing import Any

import zmq

from zmqcore._frame import Envelope, pack

#: Far above what anything here takes, in seconds; it only ends a test that hangs.
PATIENCE = 20.0


class Puppet:
    """A ROUTER that shows what comes, and answers what the test tells it to."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self.socket = context.socket(zmq.ROUTER)
        self.socket.bind("tcp://127.0.0.1:*")
        self.endpoint = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._from = b""

    def take(self) -> Envelope:
        """Wait for a message and return it; what is said from now on goes to who has sent it."""
        assert self.socket.poll(int(PATIENCE * 1000)), "nothing comes"
        self._from, *parts = self.socket.recv_multipart()
        return Envelope.parse(parts)

    def send(self, parts: list[bytes]) -> None:
        self.socket.send_multipart([self._from, *parts])

    def say(self, kind: str, **fields: Any) -> None:
        self.send(pack(kind, **fields))
