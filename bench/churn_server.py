"""What measurements of a pool share: a server at thousands of endpoints, and what a process holds.

``python churn_server.py PORT`` is that server; ``server()`` starts it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import zmq

from zmqcore._pool import ChannelPool
from zmqcore._port import Port
from zmqcore._socket import waiters

ANSWER = b"ok"


# -- the servers -----------------------------------------------------------------------------------------


def serve(at: str = "*") -> None:
    """Answer calls on port ``at`` of every local address, and echo on another; end with the standard input."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    port = Port(context, [f"tcp://0.0.0.0:{at}"])
    bare = context.socket(zmq.ROUTER)
    bare.bind("tcp://0.0.0.0:*")
    # Bound and not listening: a connection is refused, and nobody else gets the port.
    dead = socket.socket()
    dead.bind(("0.0.0.0", 0))

    def answer() -> None:
        while True:
            for request in port.receive(64, None):
                if request.wants_reply:
                    request.reply(ANSWER)

    def echo() -> None:
        while True:
            bare.send_multipart(bare.recv_multipart())

    for target in (answer, echo):
        threading.Thread(target=target, daemon=True).start()
    ports = {
        "live": int(port.endpoints[0].rpartition(":")[2]),
        "bare": int(bare.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2]),
        "dead": dead.getsockname()[1],
        "pid": os.getpid(),
    }
    print(json.dumps(ports), flush=True)
    sys.stdin.read()
    os._exit(0)


@contextlib.contextmanager
def server(at: str = "*") -> Iterator[dict[str, int]]:
    """Run serve() in a process of its own, which ends with its standard input; yield its ports and its pid."""
    command = [sys.executable, __file__, at]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())
        finally:
            process.communicate()


class Flaky(threading.Thread):
    """A server that is killed, and started again on the same port, until the end of the with statement."""

    def __init__(self, up: float, down: float) -> None:
        super().__init__(daemon=True)
        self.up, self.down = up, down
        self.port = 0
        self.kills = 0
        self.ready = threading.Event()
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.is_set():
            with server(str(self.port or "*")) as ports:
                self.port = ports["live"]
                self.ready.set()
                self.ended.wait(self.up)
                os.kill(ports["pid"], signal.SIGKILL)
            self.kills += 1
            self.ended.wait(self.down)

    def __enter__(self) -> Self:
        self.start()
        if not self.ready.wait(30):
            raise RuntimeError("the server does not start")
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.join()


def endpoint(number: int, port: int) -> str:
    """Return the endpoint of one of 15,000,000 addresses."""
    return f"tcp://127.{1 + number // 62_500}.{number // 250 % 250}.{1 + number % 250}:{port}"


# -- what all measurements use -----------------------------------------------------------------------------


# What is sampled every 2 ms must cost little, or it slows down what is measured: by pathlib it took 4 % of a CPU.
_STATM = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def count_fds() -> int:
    """Return how many descriptors this process has open."""
    # Linux tells since 6.2. Before, each look lists hundreds of them.
    told = os.stat("/proc/self/fd").st_size  # noqa: PTH116
    return told or len(os.listdir("/proc/self/fd")) - 1  # noqa: PTH208


def lasting_fds() -> int:
    """Return how many descriptors are open, without those that are kept for the next threads that wait."""
    kept = waiters()
    assert kept["open"] == kept["idle"], kept
    return count_fds() - kept["open"]


def resident_mb() -> float:
    """Return how much memory this process has resident, in MB."""
    return int(os.pread(_STATM, 100, 0).split()[1]) * _PAGE_BYTES / 1e6


def resident_mb_of(pid: int) -> float:
    """Return how much memory another process has resident, in MB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES / 1e6


class Sampler(threading.Thread):
    """Sample descriptors and memory until the end of the with statement."""

    def __init__(self, pool: ChannelPool | None = None) -> None:
        super().__init__(daemon=True)
        self.pool = pool
        self.samples = 0
        self.most_fds = self.most_open = 0
        self.most_mb = 0.0
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.002):
            self.samples += 1
            self.most_fds = max(self.most_fds, count_fds())
            self.most_mb = max(self.most_mb, resident_mb())
            if self.pool is not None and self.samples % 50 == 0:
                self.most_open = max(self.most_open, self.pool.stats()["open"])

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.join()


def call(pool: ChannelPool, where: str, timeout: float = 30.0) -> None:
    """Make one call and check its answer."""
    answer = bytes(pool.call(where, b"churn", "echo", b"x", None, b"", 0, timeout).body)
    if answer != ANSWER:
        raise AssertionError(f"{where} answered {answer!r}")


def in_threads(count: int, work: Callable[[int], None]) -> float:
    """Run ``work(0)`` to ``work(count - 1)`` in threads; return the seconds. An exception of one is raised."""
    failures: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as exc:  # noqa: BLE001 - raised below
            failures.append(exc)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return time.perf_counter() - began


CAUSES = (
    "evicted_clean",
    "evicted_draining",
    "expired_idle",
    "expired_lifetime",
    "lost",
    "goodbyes",
    "dead",
    "abandoned",
    "failed",
    "closed",
)
"""Why a channel leaves the pool."""


def books_balance(stats: dict[str, Any]) -> bool:
    """Whether the counters of a pool, of which nothing is in use, add up as ChannelPool.stats() says."""
    return bool(
        stats["in_use"] == stats["connecting"] == stats["waiting"] == 0
        and stats["open"] == stats["idle"] + stats["draining"] + stats["closing"] <= stats["max_sockets"]
        and stats["opened"] + stats["revived"] == stats["idle"] + sum(stats[cause] for cause in CAUSES)
        and stats["waits"] == sum(stats["wait_seconds"].values())
    )


if __name__ == "__main__":
    serve(sys.argv[1])
