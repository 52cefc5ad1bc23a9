"""The rows of ``churn.py``: each measurement runs in a process of its own."""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import zmq
from churn_server import (
    ANSWER,
    Flaky,
    Sampler,
    books_balance,
    call,
    endpoint,
    in_threads,
    lasting_fds,
    resident_mb,
)

from zmqcore import Client, Node, Server, errors
from zmqcore._channel import Channel


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
        by_node, by_pool, by_client, by_pyzmq = [], [], [], []
        for _ in range(rounds):
            by_node.append(in_child(lambda: times(lambda: Channel(node.context, where))))
            by_pool.append(
                in_child(lambda: times(lambda: node.pool.acquire(where), lambda: call(node.pool, where)))
            )
            by_client.append(in_child(lambda: times(*[lambda: client.call("echo", 1)] * 4)))
            by_pyzmq.append(in_child(lambda: times(with_bare_pyzmq)))

    def median_ms(samples: list[list[float]], step: int) -> float:
        return statistics.median(sample[step] for sample in samples) * 1e3

    return {
        "forked_ms": median_ms(by_client, 0),
        "made_ms": median_ms(by_node, 1),
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
