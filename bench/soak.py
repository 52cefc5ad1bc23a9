"""Load one process with everything at once for a long time: its memory must stop growing, no descriptor may be left.

::

    make soak                                # 10 minutes; SOAK_SECONDS=120 for two
    python bench/soak.py --seconds 120 --json samples.json

Threads call, cast, fan out and gather at servers that are killed, stopped and started again all the time, and go round
more endpoints than the pool has sockets for, some of them dead. Exit code 1 if an answer is wrong, a kind of load has
not got through at all, memory goes on growing in the last third, or descriptors are left at the end.

Of the client's resident memory only that counts which is in use: where servers do not get the CPU their windows fill,
and what is freed afterwards malloc keeps (docs/how-to/tuning.md).
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from churn_server import (
    books_balance,
    call,
    count_fds,
    endpoint,
    lasting_fds,
    resident_mb,
    resident_mb_of,
    server,
)

from zmqcore import Client, Node, Server, errors

CAP = 64
"""Sockets of the pool; the churn goes round 2,000 endpoints."""
TOPIC = "soak"
SERVERS = 3


class Service:
    """What the servers do."""

    def echo(self, value: Any) -> Any:
        return value

    def note(self, value: Any) -> None:
        """Take a cast."""


def serve(matchmaker: str, name: str) -> None:
    """Serve until SIGTERM, or until the parent has gone."""
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())

    def wait_for_parent() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=wait_for_parent, daemon=True).start()
    with Node(matchmaker) as node, Server(TOPIC, Service(), node=node, server=name, workers=2, lease=2.0):
        print("ready", flush=True)
        while not ended.wait(0.2):
            pass


class Servers(threading.Thread):
    """Processes that serve, one of which is stopped or killed and started again every second."""

    def __init__(self, matchmaker: str) -> None:
        super().__init__(daemon=True)
        self.matchmaker = matchmaker
        self.processes = [self.started(number) for number in range(SERVERS)]
        self.ended = threading.Event()
        self.restarts = 0

    def started(self, number: int) -> subprocess.Popen[str]:
        command = [sys.executable, __file__, "--serve", self.matchmaker, f"server-{number}"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise RuntimeError(f"a server ended with {process.wait()}")
        return process

    def run(self) -> None:
        while not self.ended.wait(1.0):
            number = self.restarts % SERVERS
            self.end(self.processes[number], signal.SIGKILL if self.restarts % 2 else signal.SIGTERM)
            self.processes[number] = self.started(number)
            self.restarts += 1

    def end(self, process: subprocess.Popen[str], how: signal.Signals) -> None:
        process.send_signal(how)
        process.communicate()

    def close(self) -> None:
        self.ended.set()
        self.join()
        for process in self.processes:
            self.end(process, signal.SIGTERM)


class Mallinfo(ctypes.Structure):
    """What mallinfo2(3) tells, in bytes."""

    # Ten counts, of which the ninth is what is free.
    _fields_ = (("others", ctypes.c_size_t * 8), ("fordblks", ctypes.c_size_t), ("keepcost", ctypes.c_size_t))


def kept_mb() -> float:
    """Return how much memory malloc keeps that nothing uses, in MB; 0 where the C library does not tell."""
    look = getattr(ctypes.CDLL(None), "mallinfo2", None)  # glibc 2.33 and later
    if look is None:
        return 0.0
    look.restype = Mallinfo
    return float(look().fordblks) / 1e6


class Load:
    """The threads that use the node; counts what they did and what they met."""

    def __init__(self, node: Node, ports: dict[str, int]) -> None:
        self.node = node
        self.ports = ports
        self.ended = threading.Event()
        self.lock = threading.Lock()
        self.done: collections.Counter[str] = collections.Counter()
        self.met: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        kinds: list[Callable[[Client, random.Random], None]]
        kinds = [self.calls, self.calls, self.futures, self.casts, self.fanouts, self.gathers]
        kinds += [self.churn, self.churn, self.dead]
        self.threads = [
            threading.Thread(target=self.repeat, args=(kind, number), daemon=True)
            for number, kind in enumerate(kinds)
        ]
        for thread in self.threads:
            thread.start()

    def repeat(self, kind: Callable[[Client, random.Random], None], seed: int) -> None:
        chance = random.Random(seed)
        name = kind.__name__
        with Client(TOPIC, node=self.node, timeout=5.0) as client:
            while not self.ended.wait(0.001):
                try:
                    kind(client, chance)
                    outcome = ""
                except errors.ZmqcoreError as exc:
                    # Servers come and go. Anything else is a fault.
                    outcome = f"{name}: {type(exc).__name__}"
                except Exception as exc:  # noqa: BLE001 - reported at the end
                    self.wrong.append(f"{name}: {exc!r}")
                    return
                with self.lock:
                    if outcome:
                        self.met[outcome] += 1
                    else:
                        self.done[name] += 1

    def check(self, sent: bytes, received: Any) -> None:
        if bytes(received) != sent:
            raise AssertionError(f"{len(sent)} bytes came back as {received!r:.100}")

    def payload(self, chance: random.Random) -> bytes:
        return chance.randbytes(chance.choice((16, 16, 16, 1000, 40_000, 300_000)))

    def calls(self, client: Client, chance: random.Random) -> None:
        sent = self.payload(chance)
        self.check(sent, client.call("echo", sent))

    def futures(self, client: Client, chance: random.Random) -> None:
        sent = [self.payload(chance) for _ in range(4)]
        futures = [client.submit("echo", value) for value in sent]
        futures[0].cancel()
        for value, future in list(zip(sent, futures, strict=True))[1:]:
            self.check(value, future.result(10))

    def casts(self, client: Client, chance: random.Random) -> None:
        for _ in range(20):
            client.cast("note", self.payload(chance))

    def fanouts(self, client: Client, chance: random.Random) -> None:
        client.fanout("note", self.payload(chance))

    def gathers(self, client: Client, chance: random.Random) -> None:
        sent = self.payload(chance)
        for received in client.gather("echo", sent).results.values():
            self.check(sent, received)

    def churn(self, _: Client, chance: random.Random) -> None:
        call(self.node.pool, endpoint(chance.randrange(2000), self.ports["live"]), 10.0)

    def dead(self, _: Client, chance: random.Random) -> None:
        where = endpoint(chance.randrange(10_000), self.ports["dead"])
        try:
            call(self.node.pool, where, 10.0)
        except errors.Unreachable:
            return
        raise AssertionError(f"{where} answered")

    def close(self) -> None:
        self.ended.set()
        for thread in self.threads:
            thread.join(60)
            if thread.is_alive():
                self.wrong.append(f"{thread} hangs")


def grows(samples: list[float]) -> str | None:
    """Return what is wrong if the mean of the last third is above that of the middle one by 5 % and 4 MB."""
    third = len(samples) // 3
    if not third:
        return None
    middle, last = statistics.mean(samples[third : 2 * third]), statistics.mean(samples[2 * third :])
    return (
        f"{middle:.1f} MB in the middle third, {last:.1f} in the last" if last > middle * 1.05 + 4 else None
    )


def soak(seconds: float, json_file: str | None) -> list[str]:
    """Run the load and return what was wrong."""
    samples: list[dict[str, float]] = []
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(prefix="zmqcore-soak-") as directory, server() as ports:
        os.environ["ZMQCORE_RUNTIME_DIR"] = directory
        servers = Servers(f"local://{directory}")
        # What Python and libzmq open once and for all must not count.
        with Node(f"local://{directory}", max_sockets=CAP) as node, Client(TOPIC, node=node) as client:
            client.call("echo", 1)
        started_with = lasting_fds() - 2 * SERVERS  # the pipes of its servers
        servers.start()
        began = time.monotonic()
        with Node(f"local://{directory}", max_sockets=CAP, idle_ttl=20.0, max_lifetime=30.0) as node:
            load = Load(node, ports)
            said = began
            while (now := time.monotonic()) < began + seconds and not load.wrong:
                time.sleep(min(1.0, seconds / 100))
                stats = node.pool.stats()
                resident = resident_mb()
                samples.append(
                    {
                        "seconds": now - began,
                        "rss_mb": resident,
                        "used_mb": resident - kept_mb(),
                        "server_rss_mb": resident_mb_of(ports["pid"]),
                        "fds": count_fds(),
                        "open": stats["open"],
                    }
                )
                if stats["open"] > CAP:
                    wrong.append(f"{stats['open']} sockets are open")
                if now - said >= 10:
                    said = now
                    sample = samples[-1]
                    print(
                        f"{sample['seconds']:5.0f} s  {sample['rss_mb']:.1f} MB, {sample['used_mb']:.1f} used,"
                        f" server {sample['server_rss_mb']:.1f} MB, {sample['fds']} descriptors,"
                        f" {stats['opened']:,} channels opened, {servers.restarts} restarts,"
                        f" {sum(load.done.values()):,} done",
                        flush=True,
                    )
            load.close()
            if not books_balance(stats := node.pool.stats()):
                wrong.append(f"the counters do not add up: {stats}")
        alive = [thread.name for thread in threading.enumerate() if thread.name.startswith("zmqcore")]
        servers.close()
        left = lasting_fds() - started_with
    wrong += load.wrong
    if left:
        wrong.append(f"{left} descriptors are left")
    if alive:
        wrong.append(f"threads are left: {alive}")
    kinds = ("calls", "futures", "casts", "fanouts", "gathers", "churn", "dead")
    wrong += [f"no {kind} got through" for kind in kinds if not load.done[kind]]
    for what in ("used_mb", "server_rss_mb"):
        growth = grows([sample[what] for sample in samples])
        if growth:
            wrong.append(f"{what} goes on growing: {growth}")
    print(f"done: {dict(load.done)}\nmet: {dict(load.met)}\nrestarts: {servers.restarts}")
    print(f"pool: {stats}")
    print(f"descriptors left at the end: {left}")
    if json_file:
        record = {
            "samples": samples,
            "done": load.done,
            "met": load.met,
            "pool": stats,
            "left": left,
            "wrong": wrong,
        }
        Path(json_file).write_text(json.dumps(record, indent=1) + "\n")
    thirds = len(samples) // 3
    if not thirds:
        return [*wrong, "it ended before anything could be said about memory"]
    for what in ("rss_mb", "used_mb", "server_rss_mb", "fds"):
        means = [statistics.mean(s[what] for s in samples[i * thirds : (i + 1) * thirds]) for i in range(3)]
        print(f"{what} by thirds: " + ", ".join(f"{mean:.1f}" for mean in means))
    return wrong


def main() -> int:
    """Run the soak; 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=600.0, help="how long (default 600)")
    parser.add_argument("--json", metavar="FILE", help="write every sample there, too")
    parser.add_argument("--serve", nargs=2, metavar=("URL", "NAME"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(*options.serve)
        return 0
    wrong = soak(options.seconds, options.json)
    for what in wrong:
        print(f"WRONG: {what}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
