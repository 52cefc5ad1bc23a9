"""The rows of ``bad_days.py``: each runs in a process of its own, with a runtime directory of its own."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bad_days_servers import RECORDS, TIMEOUT, TOPIC, Noting, Recorded, ServerProcess, peer, peers, wait_until
from churn_server import Sampler, resident_mb

from zmqcore import AsyncClient, Client, Node, PeerLost, ServerProcesses, ZmqcoreError
from zmqcore.rpc import loop as loops

Figures = dict[str, Any]


# -- kill: one of four, under load ---------------------------------------------------------------------------


def kill(options: argparse.Namespace) -> Figures:
    """One of four servers is killed while coroutines call by a clock that waits for nobody."""
    rate, seconds = 5000, (3.0 if options.quick else 8.0)
    calls: list[tuple[float, float, Any]] = []  # began, ended, who has answered or what was raised
    killed = 0.0

    async def main(doomed: ServerProcess, node: Node) -> float:
        nonlocal killed
        async with (
            AsyncClient(TOPIC, node=node, timeout=TIMEOUT, retry=None) as client,
            asyncio.TaskGroup() as group,
        ):

            async def call() -> None:
                began = time.monotonic()
                try:
                    outcome: Any = await client.call("sleep", 0.005)
                except ZmqcoreError as exc:
                    outcome = exc
                calls.append((began, time.monotonic(), outcome))

            start, made = time.monotonic(), 0
            while (now := time.monotonic()) < start + seconds:
                if not killed and now >= start + seconds / 2:
                    killed = time.monotonic()
                    doomed.signal(signal.SIGKILL)
                due = int((now - start) * rate)
                for _ in range(due - made):
                    group.create_task(call())
                made = due
                await asyncio.sleep(0.001)
            return now - start

    with peers(4, **{"async": True}) as servers, Node() as node:
        with Client(TOPIC, node=node, timeout=TIMEOUT) as client:
            wait_until(lambda: len(client.members()) == 4, "four members")
            for number in range(4):
                client.prepare(server=f"server-{number}").call("echo")
        took = asyncio.run(main(servers[2], node))
    failed = [(began, ended, exc) for began, ended, exc in calls if isinstance(exc, Exception)]
    noticed = min((ended for _, ended, _ in failed), default=killed)
    lost = [call for call in failed if isinstance(call[2], PeerLost) and call[0] <= noticed]
    later = [call for call in failed if call[0] > noticed]
    return {
        "rate": len(calls) / took,
        "lost": len(lost),
        "ended_ms": 1e3 * (max(ended for _, ended, _ in lost) - killed) if lost else 0.0,
        "noticed_ms": 1e3 * (noticed - killed),
        "went_there_later": sum(isinstance(exc, PeerLost) for _, _, exc in later),
        "others_failed": len(failed) - len(lost) - sum(isinstance(exc, PeerLost) for _, _, exc in later),
        "answered_by_it": sum(who == "server-2" for *_, who in calls),
        "longest_ms": 1e3 * max(ended - began for began, ended, _ in calls),
    }


# -- stop: a server that is stopped, and goes on -----------------------------------------------------------------


def stop(options: argparse.Namespace) -> Figures:
    """Calls without a deadline to a server that is stopped, with the liveness that is the default; then it goes on."""
    del options
    ended: list[float] = []
    with (
        peer("server", **{"async": True}) as server,
        Node() as node,
        Client(TOPIC, node=node, timeout=None) as client,
    ):
        client.call("echo")
        pending = [client.submit("sleep", 600.0) for _ in range(50)]
        client.call("echo")
        for future in pending:
            future.add_done_callback(lambda _: ended.append(time.monotonic()))
        began = time.monotonic()
        server.stop()
        failures = Counter(type(future.exception(TIMEOUT)).__name__ for future in pending)
        wait_until(lambda: len(ended) == len(pending), "the last callback")
        hurried = client.prepare(timeout=1.0)
        again = time.monotonic()
        server.signal(signal.SIGCONT)
        while True:
            with contextlib.suppress(ZmqcoreError):
                hurried.call("echo")
                break
        return {
            "lost_s": max(ended) - began,
            "first_lost_s": min(ended) - began,
            "not_lost": len(pending) - failures["PeerLost"],
            "liveness_s": node.liveness,
            "again_ms": 1e3 * (time.monotonic() - again),
        }


# -- gil: a handler that holds it ------------------------------------------------------------------------------


def gil(options: argparse.Namespace) -> Figures:
    """Calls and casts to a server whose handler holds the GIL in a C function for twice the liveness."""
    seconds, casts = (6.0 if options.quick else 10.0), 100
    failed = lost = unanswered = 0
    for workers in (0, 4):
        with peer("server", workers=workers) as server, Node() as node:
            del server
            with Client(TOPIC, node=node, timeout=None) as client:
                client.call("echo")
                pending = [client.submit("hold_the_gil", seconds)]
                pending += [client.submit("echo", number) for number in range(50)]
                for _ in range(casts):
                    client.cast("count", "casts")
                failed += sum(future.exception(TIMEOUT) is not None for future in pending)
                wait_until(lambda: client.call("counted", "casts") == casts, "all casts")
                unanswered += sum(not future.done() for future in pending)
                lost += node.pool.stats()["lost"]
    return {"held_s": seconds, "calls_failed": failed + unanswered, "connections_lost": lost}


# -- accepted: twenty restarts -----------------------------------------------------------------------------------


def accepted(kind: str) -> Callable[[argparse.Namespace], Figures]:
    """Return the row for handlers of one kind: ``inline``, ``threads`` or ``coroutines``."""
    how: Figures = {"inline": {"server": {"workers": 0}}, "threads": {"server": {"workers": 4}}}.get(
        kind, {"async": True}
    )

    def measure(options: argparse.Namespace) -> Figures:
        """So many accepted casts while the server is restarted 20 times, every other time by kill -9."""
        wanted, restarts = (10_000, 6) if options.quick else (100_000, 20)
        with tempfile.TemporaryDirectory() as directory, Node("memory://") as node:
            record = Recorded(directory)
            client = Client(TOPIC, node=node, connect=record.endpoint, timeout=TIMEOUT, delivery="accepted")
            sent = refused = 0
            began = time.monotonic()
            run = record.start(**how)

            def cast() -> None:
                nonlocal sent, refused
                while sent < wanted:
                    try:
                        client.cast("note", "me", sent)
                        sent += 1
                    except ZmqcoreError:
                        refused += 1  # not accepted: the server is away for longer

            casting = threading.Thread(target=cast, daemon=True)
            casting.start()
            for restart in range(1, restarts + 1):
                wait_until(
                    lambda restart=restart: sent >= wanted * restart // (restarts + 1), "the next restart"
                )
                if restart % 2:
                    run.kill()
                else:
                    run.ask("")
                    run.end()
                run = record.start(**how)
            casting.join()
            client.flush(TIMEOUT)
            seconds = time.monotonic() - began
            stats = node.stats()["accepted"]
            run.end()
            counts = record.counts(wanted)
        return counts | {
            "left": stats["unfinished"] + stats["waiting"] + stats["given_up"],
            "sent_again": stats["sent_again"],
            "refused": refused,
            "seconds": seconds,
        }

    return measure


# -- rolling: ServerProcesses, one after the other ----------------------------------------------------------------


def rolling(options: argparse.Namespace) -> Figures:
    """All servers are replaced, one after the other, while threads and coroutines call all the time."""
    count = 4 if options.quick else 20
    over = threading.Event()
    called: list[str] = []
    failed: Counter[str] = Counter()

    def by_thread(client: Client, number: int) -> None:
        turn = 0
        while not over.is_set():
            called.append(key := f"{number}-{(turn := turn + 1)}")
            try:
                client.call("note", key)
            except ZmqcoreError as exc:
                failed[f"{type(exc).__name__}: {exc}"] += 1

    async def by_coroutines(node: Node) -> None:
        async with AsyncClient(TOPIC, node=node, timeout=TIMEOUT) as client:

            async def work(number: int) -> None:
                turn = 0
                while not over.is_set():
                    called.append(key := f"coroutine-{number}-{(turn := turn + 1)}")
                    try:
                        await client.call("note", key)
                    except ZmqcoreError as exc:
                        failed[f"{type(exc).__name__}: {exc}"] += 1

            await asyncio.gather(*(work(number) for number in range(4)))

    with tempfile.TemporaryDirectory() as directory, Node() as node:
        os.environ[RECORDS] = directory
        with (
            ServerProcesses(
                TOPIC, f"{Noting.__module__}:{Noting.__name__}", processes=count, workers=2
            ) as servers,
            Client(TOPIC, node=node, timeout=TIMEOUT) as client,
        ):
            wait_until(lambda: len(client.members()) == count, "all members")
            threads = [threading.Thread(target=by_thread, args=(client, number)) for number in range(4)]
            threads.append(threading.Thread(target=lambda: asyncio.run(by_coroutines(node))))
            for thread in threads:
                thread.start()
            began = time.monotonic()
            try:
                finished = servers.restart(TIMEOUT)
            finally:
                over.set()
                for thread in threads:
                    thread.join()
            seconds = time.monotonic() - began
        noted = Counter(key for path in Path(directory).iterdir() for key in path.read_text().split())
    return {
        "servers": count,
        "calls": len(called),
        "failed": sum(failed.values()),
        "twice": sum(times - 1 for times in noted.values()),
        "never": len(set(called) - noted.keys()),
        "drained": int(finished),
        "seconds": seconds,
        "rate": len(called) / seconds,
        "what": dict(failed),
    }


# -- storm: a third is cancelled ---------------------------------------------------------------------------------


def storm(options: argparse.Namespace) -> Figures:
    """A third of all calls is cancelled, at any point of their lives; both sides count each of them once."""
    count, chance = (10_000 if options.quick else 100_000), random.Random(7)

    async def main(server: ServerProcess, node: Node) -> Figures:
        client = AsyncClient(TOPIC, node=node, timeout=None)
        await client.call("echo")
        (channel,) = node.pool.channels()
        loop = asyncio.get_running_loop()
        began, tasks = time.monotonic(), []
        for number in range(count):
            task = client.submit("sleep", chance.choice((0.0, 0.001, 0.02)))
            if number % 3 == 0:
                loop.call_later(chance.choice((0.0, 0.0005, 0.01)), task.cancel)
            tasks.append(task)
            if number % 50 == 0:
                await asyncio.sleep(0)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        seconds = time.monotonic() - began
        stats = channel.stats()
        give_up = time.monotonic() + TIMEOUT
        while True:  # what crosses on the way is answered, or not, in a moment
            port = server.ask('["stats"]')["port"]
            balanced = port["calls"] == port["replies"] + port["cancelled"] == stats["calls"]
            if balanced or time.monotonic() > give_up:
                break
            await asyncio.sleep(0.01)
        cancelled = [isinstance(result, asyncio.CancelledError) for result in results]
        await client.close()
        return {
            "calls": count,
            "cancelled": sum(cancelled),
            "left": stats["outstanding_calls"] + loops.channels_of_running_loop(node).n_awaited,
            "wrong": sum(
                result != "server" for result, was in zip(results, cancelled, strict=True) if not was
            ),
            "books": int(balanced and stats["calls"] == stats["replies"] + stats["cancelled"]),
            "seconds": seconds,
        }

    with peer("server", **{"async": True}) as server, Node() as node:
        return asyncio.run(main(server, node))


# -- memory: one of ten is stopped ---------------------------------------------------------------------------------


WINDOW_BYTES, CAST_BYTES = 4 << 20, 1 << 16


def growth(servers: list[ServerProcess], delivery: str, each: int) -> tuple[float, int]:
    """Return by how many MB the client grows at most while it casts, and how often the stopped server was refused."""
    over = threading.Event()
    refused = 0

    def cast_to_stopped(client: Client) -> None:
        nonlocal refused
        while not over.is_set():
            try:
                client.cast("echo", bytes(CAST_BYTES))
            except ZmqcoreError:
                refused += 1

    def cast(client: Client) -> None:
        for _ in range(each):
            client.cast("echo", bytes(CAST_BYTES))

    # Whoever is lost holds nothing any more: so nobody is.
    with Node("memory://", window_bytes=WINDOW_BYTES, liveness=3600.0) as node:
        clients = [
            Client(TOPIC, node=node, connect=server.endpoints[0], timeout=TIMEOUT, delivery=delivery)
            for server in servers
        ]
        for client in clients:
            client.call("echo")
        servers[0].stop()
        hurried = threading.Thread(target=cast_to_stopped, args=(clients[0].prepare(timeout=0.05),))
        threads = [threading.Thread(target=cast, args=(client,)) for client in clients[1:]]
        before = resident_mb()
        with Sampler() as sampler:
            for thread in (hurried, *threads):
                thread.start()
            for thread in threads:
                thread.join()
            wait_until(lambda: refused, "the end of the window")
            over.set()
            hurried.join()
        servers[0].signal(signal.SIGCONT)
        for client in clients:
            client.close()
    return sampler.most_mb - before, refused


def memory(delivery: str) -> Callable[[argparse.Namespace], Figures]:
    """Return the row for casts of one ``delivery``."""

    def measure(options: argparse.Namespace) -> Figures:
        """Casts of 64 KiB to ten servers, one of which is stopped: what the client holds at most, over ten windows."""
        windows_mb = 10 * WINDOW_BYTES / 1e6
        with peers(10, workers=0, bind="tcp://127.0.0.1:*") as servers:
            grown, refused = growth(servers, delivery, 300 if options.quick else 3000)
        return {"ten_windows_mb": windows_mb, "mb": grown, "windows": grown / windows_mb, "refused": refused}

    return measure


MEASUREMENTS: dict[str, Callable[[argparse.Namespace], Figures]] = {
    "kill": kill,
    "stop": stop,
    "gil": gil,
    "accepted-inline": accepted("inline"),
    "accepted-threads": accepted("threads"),
    "accepted-coroutines": accepted("coroutines"),
    "rolling": rolling,
    "storm": storm,
    "memory-sent": memory("sent"),
    "memory-accepted": memory("accepted"),
}
