"""Measure the pool of channels: thousands of endpoints on a fixed number of sockets, against the goals.

::

    python bench/churn.py                          # everything: about 2 minutes
    python bench/churn.py --quick                  # a first look: a quarter of that
    python bench/churn.py --rows many,hot --json result.json

One server process listens on all of 127.0.0.0/8, so that each of its 16 million addresses is an endpoint of its own.
Every measurement runs in a fresh client process. Descriptors and memory are sampled every 2 ms by a thread of it.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import platform
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import zmq
from options import some_of

import zmqcore
from zmqcore import Client, Node, Server, errors
from zmqcore._pool import ChannelPool
from zmqcore._port import Port
from zmqcore._socket import waiters

FD_CONSTANT = 32
"""What may come on top of 530 with 16 threads: one per thread that waits (an eventfd, kept for the next one), and one
per thread that is just asking whether a dead endpoint accepts connections."""

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
    command = [sys.executable, __file__, "--serve", at]
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


# -- the measurements: each runs in a process of its own ---------------------------------------------------


def warm(ports: dict[str, int], options: argparse.Namespace) -> dict[str, Any]:
    """Acquire and release one open channel; the cost of the loop itself is taken off."""
    rounds, times = (5, 20_000) if options.quick else (15, 100_000)
    with Node("memory://churn", max_sockets=8) as node:
        where = endpoint(0, ports["live"])
        call(node.pool, where)
        acquire, release = node.pool.acquire, node.pool.release
        acquire_open = node.pool.acquire_open
        figures: dict[str, list[float]] = {"acquire": [], "acquire_open": []}
        for _ in range(rounds):
            for name, take in (("acquire", acquire), ("acquire_open", acquire_open)):
                turns = range(times)
                began = time.perf_counter()
                for _turn in turns:
                    pass
                empty = time.perf_counter() - began
                began = time.perf_counter()
                for _turn in turns:
                    release(take(where))  # type: ignore[arg-type]
                figures[name].append((time.perf_counter() - began - empty) / times * 1e9)
        assert node.pool.stats()["opened"] == 1
    return {f"{name}_ns": statistics.median(values) for name, values in figures.items()}


def many(ports: dict[str, int], options: argparse.Namespace, dead: bool = False) -> dict[str, Any]:
    """Call each of 10,000 endpoints once with 256 sockets; with ``dead``, every fifth one refuses connections."""
    count, cap = (2000 if options.quick else 10_000), 256
    doomed = {number for number in range(count) if dead and number % 5 == 0}
    where = [endpoint(n, ports["dead" if n in doomed else "live"]) for n in range(count)]
    served: list[int] = []
    reported: list[int] = []
    other: collections.Counter[str] = collections.Counter()
    fds, megabytes = lasting_fds(), resident_mb()

    with Node("memory://churn", max_sockets=cap) as node:

        def work(first: int) -> None:
            for number in range(first, count, options.threads):
                try:
                    call(node.pool, where[number])
                    served.append(number)
                except errors.Unreachable as exc:
                    if where[number] in str(exc):
                        reported.append(number)
                except errors.ZmqcoreError as exc:
                    other[f"{type(exc).__name__}: {exc}"[:200]] += 1

        with Sampler(node.pool) as sampler:
            seconds = in_threads(options.threads, work)
        stats = node.pool.stats()
    return {
        "seconds": seconds,
        "endpoints": count,
        "served": len(served),
        "lost": count - len(doomed) - len(set(served) - doomed),
        "dead": len(doomed),
        "dead_not_reported": len(doomed - set(reported)),
        "live_reported_dead": len(set(reported) - doomed),
        "peak_fds": sampler.most_fds - fds,
        "rss_mb": sampler.most_mb - megabytes,
        "most_open": sampler.most_open,
        "books": int(books_balance(stats)),
        "fds_left": lasting_fds() - fds,
        "other": dict(other),
    }


def many_dead(ports: dict[str, int], options: argparse.Namespace) -> dict[str, Any]:
    """Do many() with a fifth of the endpoints dead."""
    return many(ports, options, dead=True)


def robin(ports: dict[str, int], options: argparse.Namespace) -> dict[str, Any]:
    """Call 500 endpoints in turn: on kept channels, and in bare pyzmq with a socket per call and on kept sockets."""
    count, rounds, laps = 500, (3 if options.quick else 9), 4
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    bare = [endpoint(number, ports["bare"]) for number in range(count)]
    live = [endpoint(number, ports["live"]) for number in range(count)]

    def connected(where: str) -> zmq.Socket[bytes]:
        made = context.socket(zmq.DEALER)
        made.linger = 0
        made.connect(where)
        return made

    def echo(made: zmq.Socket[bytes]) -> None:
        made.send(ANSWER)
        if made.recv() != ANSWER:
            raise AssertionError("the server did not echo")

    def socket_per_call() -> float:
        began = time.perf_counter()
        for where in bare:
            made = connected(where)
            echo(made)
            made.close()
        return count / (time.perf_counter() - began)

    with Node("memory://churn", max_sockets=count + 12) as node:

        def pool() -> float:
            began = time.perf_counter()
            for _ in range(laps):
                for where in live:
                    call(node.pool, where)
            return laps * count / (time.perf_counter() - began)

        sockets: list[zmq.Socket[bytes]] = []

        def kept_sockets() -> float:
            began = time.perf_counter()
            for _ in range(laps):
                for made in sockets:
                    echo(made)
            return laps * count / (time.perf_counter() - began)

        cold = pool()
        sockets.extend(map(connected, bare))
        for made in sockets:
            echo(made)
        found = [(pool(), socket_per_call(), kept_sockets()) for _ in range(rounds)]
        assert node.pool.stats()["opened"] == count
    for made in sockets:
        made.close()
    context.term()
    return {
        "pool_per_s": statistics.median(own for own, _, _ in found),
        "socket_per_call_per_s": statistics.median(other for _, other, _ in found),
        "kept_sockets_per_s": statistics.median(kept for _, _, kept in found),
        "ratio": statistics.median(own / other for own, other, _ in found),
        "ratios": [own / other for own, other, _ in found],
        "kept_ratio": statistics.median(kept / other for _, other, kept in found),
        "first_laps_per_s": cold,
    }


def hot(ports: dict[str, int], options: argparse.Namespace) -> dict[str, Any]:
    """Send 90 % of the calls to 50 endpoints and 10 % to 10,000 others, with 128 sockets."""
    calls, threads = (20_000 if options.quick else 100_000), 4
    hits, misses, cold = [0] * threads, [0] * threads, [0] * threads

    with Node("memory://churn", max_sockets=128) as node:

        def work(me: int) -> None:
            chance = random.Random(me)
            for _ in range(calls // threads):
                if chance.random() < 0.1:
                    call(node.pool, endpoint(1000 + chance.randrange(10_000), ports["live"]))
                    cold[me] += 1
                    continue
                where = endpoint(chance.randrange(50), ports["live"])
                channel = node.pool.acquire_open(where)
                if channel is not None:
                    hits[me] += 1
                else:
                    misses[me] += 1
                    channel = node.pool.acquire(where, 30.0)
                try:
                    channel.call(b"churn", "echo", b"x", None, b"", 0, 30.0)
                finally:
                    node.pool.release(channel)

        seconds = in_threads(threads, work)
        books = books_balance(node.pool.stats())
    return {
        "hit_rate": sum(hits) / (sum(hits) + sum(misses)),
        "hot": sum(hits) + sum(misses),
        "cold": sum(cold),
        "per_s": calls / seconds,
        "books": int(books),
    }


def fair(ports: dict[str, int], options: argparse.Namespace) -> dict[str, Any]:
    """Let 64 threads, each with an endpoint of its own, call in a loop with 4 sockets."""
    threads, seconds = 64, (2 if options.quick else 8)
    failures: collections.Counter[str] = collections.Counter()
    calls, most_before = [0] * threads, [0] * threads

    with Node("memory://churn", max_sockets=4) as node:
        end = time.monotonic() + seconds

        def work(me: int) -> None:
            where = endpoint(me, ports["live"])
            while time.monotonic() < end:
                made = sum(calls)
                try:
                    call(node.pool, where, 30.0)
                    most_before[me] = max(most_before[me], sum(calls) - made)
                    calls[me] += 1
                except errors.ZmqcoreError as exc:
                    failures[f"{type(exc).__name__}: {exc}"[:200]] += 1

        in_threads(threads, work)
        stats = node.pool.stats()
    mean = stats["waited_seconds"] / stats["waits"]
    return {
        "failures": sum(failures.values()),
        "waits": stats["waits"],
        "mean_wait_ms": mean * 1e3,
        "longest_wait_ms": stats["longest_wait_seconds"] * 1e3,
        "longest_by_mean": stats["longest_wait_seconds"] / mean,
        "most_calls_of_others_during_one": max(most_before),
        "fewest_calls_of_a_thread": min(calls),
        "most_calls_of_a_thread": max(calls),
        "books": int(books_balance(stats)),
        "what": dict(failures),
    }


def rough(ports: dict[str, int], options: argparse.Namespace) -> dict[str, Any]:
    """Acquire 10**6 times while servers are killed, channels expire, endpoints are dead and time runs out."""
    times, threads, cap = (100_000 if options.quick else 1_000_000), 8, 32
    got, exhausted, unreachable, late, lost, failed = ([0] * threads for _ in range(6))
    # libzmq and Python open a few descriptors once and for all.
    with Node("memory://churn") as node:
        call(node.pool, endpoint(0, ports["live"]))
    fds = lasting_fds()

    with (
        Flaky(0.3, 0.1) as flaky,
        Node("memory://churn", max_sockets=cap, idle_ttl=0.05, max_lifetime=0.5) as node,
    ):

        def work(me: int) -> None:
            chance = random.Random(me)
            for _ in range(times // threads):
                dice = chance.random()
                timeout = 30.0
                if dice < 0.97:
                    where = endpoint(chance.randrange(24), ports["live"])
                elif dice < 0.99:
                    where = endpoint(chance.randrange(6), flaky.port)
                elif dice < 0.995:
                    where = endpoint(chance.randrange(2000), ports["live"])
                elif dice < 0.9975:
                    where, timeout = (
                        endpoint(2000 + chance.randrange(100), ports["live"]),
                        chance.random() / 1e3,
                    )
                else:
                    where = endpoint(chance.randrange(100), ports["dead"])
                try:
                    channel = node.pool.acquire(where, timeout)
                except errors.PoolExhausted:
                    exhausted[me] += 1
                    continue
                except errors.Unreachable as exc:
                    if "that were left" in str(exc):
                        late[me] += 1
                    else:
                        unreachable[me] += 1
                    continue
                except errors.PeerLost:
                    lost[me] += 1
                    continue
                got[me] += 1
                try:
                    if dice < 0.02 or dice > 0.97:
                        channel.call(b"churn", "echo", b"x", None, b"", 0, 30.0)
                except errors.ZmqcoreError:
                    failed[me] += 1
                finally:
                    node.pool.release(channel)

        with Sampler(node.pool) as sampler:
            seconds = in_threads(threads, work)
        stats = node.pool.stats()
    left = lasting_fds()
    waiting_time = stats["wait_timeouts"] + stats["refused"]
    return {
        "acquires": times,
        "seconds": seconds,
        "got": sum(got),
        "exhausted": sum(exhausted),
        "unreachable": sum(unreachable),
        "no_time_to_connect": sum(late),
        "lost_while_connecting": sum(lost),
        "calls_failed": sum(failed),
        "servers_killed": flaky.kills,
        "expired": stats["expired_idle"] + stats["expired_lifetime"],
        "evicted": stats["evicted_clean"] + stats["evicted_draining"],
        "most_open": sampler.most_open,
        "peak_fds": sampler.most_fds - fds,
        "fds_left": left - fds,
        "books": int(
            books_balance(stats)
            and stats["acquired"] == sum(got)
            and waiting_time == sum(exhausted)
            and sum(got) + sum(exhausted) + sum(unreachable) + sum(late) + sum(lost) == times
            and sampler.most_open <= cap
        ),
        "stats": stats,
    }


class Echo:
    """What a forked child's client calls."""

    def echo(self, value: int) -> int:
        return value


def in_child(work: Callable[[], list[float]]) -> list[float]:
    """Return what ``work()`` returns in a forked child, and before that how long the fork took until it was there."""
    read, write = os.pipe()
    began = time.perf_counter()
    pid = os.fork()
    if not pid:
        found = [time.perf_counter() - began]
        try:
            found += work()
        finally:
            os.write(write, json.dumps(found).encode())
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        told: list[float] = json.load(pipe)
    os.waitpid(pid, 0)
    return told


def times(*steps: Callable[[], object]) -> list[float]:
    """Return after how many seconds each of ``steps``, one after the other, had been done."""
    began = time.perf_counter()
    done = []
    for step in steps:
        step()
        done.append(time.perf_counter() - began)
    return done


def fork(ports: dict[str, int], options: argparse.Namespace) -> dict[str, Any]:
    """Use a parent's node and client in a forked child; beside it, bare pyzmq with a new context and socket."""
    rounds = 30 if options.quick else 200
    where, bare = endpoint(0, ports["live"]), endpoint(0, ports["bare"])

    def with_bare_pyzmq() -> list[float]:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        made = context.socket(zmq.DEALER)
        made.connect(bare)
        made.send(ANSWER)
        made.recv()
        return []

    with (
        Node("memory://churn") as node,
        Node("memory://churn") as other,
        Server("echo", Echo(), node=other, bind="tcp://127.0.0.1:*", workers=0) as served,
        Client("echo", node=node, connect=served.endpoints[0]) as client,
    ):
        client.call("echo", 1)
        call(node.pool, where)
        by_pool, by_client, by_pyzmq = [], [], []
        for _ in range(rounds):
            by_pool.append(
                in_child(lambda: times(lambda: node.pool.acquire(where), lambda: call(node.pool, where)))
            )
            by_client.append(in_child(lambda: times(*[lambda: client.call("echo", 1)] * 4)))
            by_pyzmq.append(in_child(lambda: times(with_bare_pyzmq)))

    def median_ms(samples: list[list[float]], step: int) -> float:
        return statistics.median(sample[step] for sample in samples) * 1e3

    return {
        "forked_ms": median_ms(by_client, 0),
        "channel_ms": median_ms(by_pool, 1),
        "first_reply_of_pool_ms": median_ms(by_pool, 2),
        "first_reply_of_client_ms": median_ms(by_client, 1),
        "fourth_reply_of_client_ms": median_ms(by_client, 4),
        "first_reply_of_bare_pyzmq_ms": median_ms(by_pyzmq, 1),
    }


MEASUREMENTS: dict[str, Callable[[dict[str, int], argparse.Namespace], dict[str, Any]]] = {
    "warm": warm,
    "many": many,
    "dead": many_dead,
    "robin": robin,
    "hot": hot,
    "fair": fair,
    "rough": rough,
    "fork": fork,
}


# -- the goals -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Goal:
    """What is to be reached: ``metric`` of ``row``, divided by that of ``against`` if there is one."""

    row: str
    title: str
    metric: str
    bound: str
    goal: float
    against: str = ""


GOALS = (
    Goal("warm", "acquire + release of a warm channel, ns", "acquire_ns", "≤", 500),
    Goal("many", "10,000 endpoints, 256 sockets, a call each: seconds", "seconds", "≤", 2.5),
    Goal("many", "  most descriptors above the start", "peak_fds", "≤", 530 + FD_CONSTANT),
    Goal("many", "  growth of resident memory, MB", "rss_mb", "≤", 64),
    Goal("many", "  lost", "lost", "=", 0),
    Goal("dead", "the same, 20 % dead: time / without dead ones", "seconds", "≤", 2, "many"),
    Goal("dead", "  live ones not served", "lost", "=", 0),
    Goal("dead", "  dead ones not reported", "dead_not_reported", "=", 0),
    Goal("dead", "  live ones reported as dead", "live_reported_dead", "=", 0),
    Goal("dead", "  most descriptors above the start", "peak_fds", "≤", 530 + FD_CONSTANT),
    Goal("robin", "round robin over 500 endpoints / a socket per call", "ratio", "≥", 6),
    Goal("hot", "90 % to 50 hot, 10 % over 10,000 cold, 128 sockets: hit rate", "hit_rate", "≥", 0.99),
    Goal("fair", "64 threads, 4 sockets: failures before the deadline", "failures", "=", 0),
    Goal("fair", "  longest wait / mean wait", "longest_by_mean", "≤", 3),
    Goal("rough", "10⁶ acquires, failures, expiries, timeouts: fds left over", "fds_left", "=", 0),
    Goal("rough", "  counters add up", "books", "=", 1),
    Goal("fork", "forked child: a connected channel in hand, ms", "channel_ms", "≤", 1),
    Goal("fork", "  reply to a client's first call, ms", "first_reply_of_client_ms", "≤", 1),
)

REPEATED = {"many", "dead", "fair"}
"""What is measured in several processes, in turn; the others take several rounds within one."""


def met(goal: Goal, value: float) -> bool:
    return (
        value <= goal.goal
        if goal.bound == "≤"
        else value >= goal.goal
        if goal.bound == "≥"
        else value == goal.goal
    )


def reached(goal: Goal, samples: dict[str, list[dict[str, Any]]]) -> float | None:
    """Return the median over the rounds; of a count that must be a certain number, the one farthest from it."""
    own: list[float] = [sample[goal.metric] for sample in samples.get(goal.row, [])]
    if goal.against:
        others = [sample[goal.metric] for sample in samples.get(goal.against, [])]
        own = [mine / other for mine, other in zip(own, others, strict=False)]
    if not own:
        return None
    return max(own, key=lambda value: abs(value - goal.goal)) if goal.bound == "=" else statistics.median(own)


def measure(rows: list[str], options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Measure each row, in fresh processes; where a row is repeated, in turn with the others."""
    samples: dict[str, list[dict[str, Any]]] = {row: [] for row in rows}
    wanted = [row for row in rows if row not in REPEATED]
    wanted += [row for row in rows if row in REPEATED] * (1 if options.quick else options.rounds)
    for row in wanted:
        print(f"\r\x1b[K{row} ...", end="", file=sys.stderr, flush=True)
        # A server of its own: the connections of the row before take time to go away.
        with server() as ports:
            command = [sys.executable, __file__, "--measure", row, "--ports", json.dumps(ports)]
            command += ["--threads", str(options.threads)] + ["--quick"] * options.quick
            done = subprocess.run(
                command, stdout=subprocess.PIPE, text=True, check=True, stdin=subprocess.DEVNULL
            )
        samples[row].append(json.loads(done.stdout))
    print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    return samples


def figure(value: float) -> str:
    """Return a number with three digits."""
    if value == int(value):
        return f"{int(value):,}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.4g}"


def report(
    samples: dict[str, list[dict[str, Any]]], options: argparse.Namespace, load: tuple[float, ...]
) -> None:
    """Print the goals, then everything else that was measured."""
    print(
        f"{os.cpu_count()} CPUs, {platform.system()} {platform.release()}, Python {platform.python_version()}, "
        f"libzmq {zmq.zmq_version()}, zmqcore {zmqcore.__version__}; {options.threads} threads; "
        f"load before: {load[0]:.2f}"
        + ("; --quick: fewer endpoints and calls than the titles say" * options.quick)
    )
    rows = []
    for goal in GOALS:
        value = reached(goal, samples)
        if value is not None:
            rows.append(
                [
                    goal.title,
                    f"{goal.bound} {figure(goal.goal)}",
                    figure(value),
                    "yes" if met(goal, value) else "NO",
                ]
            )
    width = max(len(row[0]) for row in rows)
    print("\n" + f"{'':{width}}  {'goal':>9}  {'reached':>9}  met")
    for title, goal_text, value_text, is_met in rows:
        print(f"{title:{width}}  {goal_text:>9}  {value_text:>9}  {is_met}")
    print()
    for row, found in samples.items():
        for sample in found:
            print(f"{row}: " + ", ".join(
                f"{key} {figure(value)}" for key, value in sample.items() if isinstance(value, int | float)
            ))  # fmt: skip
            for key in ("other", "what"):
                for text, count in sample.get(key, {}).items():
                    print(f"  {count} times: {text}")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--rows", type=some_of(MEASUREMENTS), default=list(MEASUREMENTS), help=", ".join(MEASUREMENTS)
    )
    parser.add_argument("--quick", action="store_true", help="fewer endpoints, calls and rounds")
    parser.add_argument("--rounds", type=int, default=3, help="of many, dead and fair (default 3)")
    parser.add_argument("--threads", type=int, default=16, help="of many and dead (default 16)")
    parser.add_argument("--json", metavar="FILE", help="write everything there, too")
    parser.add_argument("--serve", metavar="PORT", help=argparse.SUPPRESS)
    parser.add_argument("--measure", choices=MEASUREMENTS, help=argparse.SUPPRESS)
    parser.add_argument("--ports", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Measure and print. Whether a goal was met does not matter here; 1 if something could not be measured."""
    options = parse()
    if options.serve:
        serve(options.serve)
    if options.measure:
        print(json.dumps(MEASUREMENTS[options.measure](options.ports, options)))
        return 0
    load = os.getloadavg()
    try:
        samples = measure(options.rows, options)
    except subprocess.CalledProcessError as failure:
        print(f"churn: {failure}", file=sys.stderr)
        return 1
    if options.json:
        goals = [dataclasses.asdict(goal) | {"reached": reached(goal, samples)} for goal in GOALS]
        Path(options.json).write_text(
            json.dumps({"load": load, "quick": options.quick, "goals": goals, "samples": samples}, indent=1)
            + "\n"
        )
    report(samples, options, load)
    return 0


if __name__ == "__main__":
    sys.exit(main())
