"""A channel and a port in one process and one thread: what the compiled core costs without the system."""

from __future__ import annotations

from typing import Self

import zmq

from zmqcore._channel import Channel
from zmqcore._port import Port

TIMEOUT = 10.0


class Line:
    """A channel, and the port at its other end; a context manager that closes both."""

    def __init__(self) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.port = Port(self._context, ["inproc://bench"])
        self.channel = Channel(self._context, "inproc://bench")
        assert self.channel.wait_open(TIMEOUT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.channel.close()
        self.port.close()
        self._context.term()
