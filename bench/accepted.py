"""What it costs to keep a cast until it has run: ``delivery="accepted"`` beside ``"sent"``, in turns.

::

    python bench/accepted.py                     # about half a minute
    python bench/accepted.py --rounds 9 --casts 20000 --size 1024

One client, and one server process with an inline handler. A round casts so many messages each way and waits until all
have run. Prints casts/s of both ways and the median of the rounds' ratios, beside the goal.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import zmq

import zmqcore
from zmqcore import Client, Node
from zmqcore.cli.bench.processes import Process

GOAL = 0.8
TIMEOUT = 60.0
_SERVER = Path(__file__).with_name("peers_zmqcore.py")


def rate(client: Client, casts: int, payload: bytes) -> float:
    """Return how many casts a second the server has handled."""
    cast = client.cast
    begin = time.monotonic_ns()
    for _ in range(casts):
        cast("tick", payload)
    # Behind all casts, and on the server's own clock.
    handled, end = client.call("finish")
    assert handled == casts, f"{handled} of {casts} casts were handled"
    client.flush(TIMEOUT)
    return casts * 1e9 / (end - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="default %(default)s")
    parser.add_argument("--casts", type=int, default=30_000, help="in one round; default %(default)s")
    parser.add_argument("--size", type=int, default=16, help="bytes of each payload; default %(default)s")
    options = parser.parse_args()
    payload = b"x" * options.size
    server = Process([sys.executable, str(_SERVER), "server", "tcp://127.0.0.1:*"])
    try:
        endpoint = server.read()["endpoint"]
        with Node("memory://accepted") as node:
            sent = Client("bench", node=node, connect=endpoint, timeout=TIMEOUT)
            clients = {"sent": sent, "accepted": sent.prepare(delivery="accepted")}
            rates: dict[str, list[float]] = {name: [] for name in clients}
            for number in range(options.rounds + 1):
                names = list(clients) if number % 2 else list(clients)[::-1]
                for name in names:
                    measured = rate(clients[name], options.casts, payload)
                    if number:  # the first round only warms up
                        rates[name].append(measured)
    finally:
        server.end()
    ratio = statistics.median(a / s for a, s in zip(rates["accepted"], rates["sent"], strict=True))
    print(f"zmqcore {zmqcore.__version__}, libzmq {zmq.zmq_version()}, Python {sys.version.split()[0]}")
    print(f"{options.size} B, {options.casts} casts in each of {options.rounds} rounds, in casts/s:")
    for name, values in rates.items():
        print(f"  {name:9}{statistics.median(values):10,.0f}   ({min(values):,.0f} to {max(values):,.0f})")
    print(f"  ratio     {ratio:9.2f}   goal {GOAL} {'reached' if ratio >= GOAL else 'NOT reached'}")


if __name__ == "__main__":
    main()
