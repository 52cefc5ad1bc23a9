"""A process with a port that reads only when it is told to: ``python reader.py ENDPOINT``.

Each line on standard input is an order: ``meet`` receives until a client has introduced itself; ``take N`` receives
N messages and prints, as one line of JSON, the SHA-256 of each one's first buffer. Prints the endpoint first. Ends
with its input.
"""

from __future__ import annotations

import hashlib
import json
import sys

import zmq

from zmqcore._port import Port


def main() -> None:
    context = zmq.Context()
    port = Port(context, [sys.argv[1]])
    print(port.endpoints[0], flush=True)
    for line in sys.stdin:
        if line == "meet\n":
            while not port.stats()["peers"]:
                port.receive(1, 0.01)
            continue
        wanted = int(line.split()[1])
        digests: list[str] = []
        while len(digests) < wanted:
            for request in port.receive(64, None):
                digests.append(hashlib.sha256(request.envelope.buffers[0]).hexdigest())
        print(json.dumps(digests), flush=True)
    port.close()
    context.term()


if __name__ == "__main__":
    main()
