"""A process that serves one port until its standard input ends; run by the tests, not imported.

``python port_process.py '{"endpoints": ["tcp://127.0.0.1:*"], "batch_delay": 0.01}'`` prints the port's endpoints as
one JSON line. What it does with a call depends on the method, see :meth:`Service.answer`; every cast's body is
``b"SENDER NUMBER"`` or ends in that after a blank, and the numbers of one sender must grow.
"""

from __future__ import annotations

import json
import sys
import threading
import time

import zmq
from memory_support import peak_rss_bytes

from zmqcore import errors
from zmqcore._port import Port
from zmqcore._request import Request


class Service:
    """Answer calls by their method's name; count casts and see that each sender's come in order."""

    def __init__(self, port: Port, batch: int, batch_delay: float) -> None:
        self.port = port
        self.batch = batch
        self.batch_delay = batch_delay
        self.casts = 0
        self.disorder = 0
        self.arrival: list[int] = []
        self._last: dict[bytes, int] = {}

    def run(self) -> None:
        while True:
            try:
                requests = self.port.receive(self.batch)
            except errors.Closed:
                return
            for request in requests:
                if request.kind == "cast":
                    self.take(request)
                else:
                    self.answer(request)
            if self.batch_delay:
                time.sleep(self.batch_delay)

    def take(self, request: Request) -> None:
        self.casts += 1
        sender, number = bytes(request.envelope.body[-24:]).split()[-2:]
        if int(number) <= self._last.get(sender, -1):
            self.disorder += 1
        self._last[sender] = int(number)
        if request.method == "note":
            self.arrival.append(int(number))

    def answer(self, request: Request) -> None:
        """``echo``; ``after`` MS, from another thread; ``silent``; ``pause`` MS, receiving nothing; ``goodbye``;
        ``garbage``: an answer with a wrong id first; ``report``; ``mirror`` the buffers."""
        body = request.envelope.body
        match request.method:
            case "echo":
                request.reply(body)
            case "after":
                timer = threading.Timer(int(body) / 1000, request.reply, (b"after",))
                timer.daemon = True
                timer.start()
            case "pause":
                request.reply(b"")
                time.sleep(int(body) / 1000)
            case "mirror":
                request.reply(body, list(request.envelope.buffers or ()))
            case "goodbye":
                self.port.goodbye()
                request.reply(b"")
            case "report":
                report = {
                    "casts": self.casts,
                    "disorder": self.disorder,
                    "arrival": self.arrival,
                    "max_rss_bytes": peak_rss_bytes(),
                    **{f"port.{name}": value for name, value in self.port.stats().items()},
                }
                request.reply(json.dumps(report).encode())
            case "silent":
                pass
            case other:
                request.error(other.encode())


def main() -> None:
    options = json.loads(sys.argv[1])
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    port = Port(context, options.get("endpoints", ["tcp://127.0.0.1:*"]), **options.get("port", {}))
    service = Service(port, options.get("batch", 64), options.get("batch_delay", 0.0))
    thread = threading.Thread(target=service.run, daemon=True)
    thread.start()
    print(json.dumps(port.endpoints), flush=True)
    sys.stdin.read()  # ends with the process that started this one
    port.close()


if __name__ == "__main__":
    main()
