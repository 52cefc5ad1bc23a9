"""How servers run what comes: what a pool of threads costs, who suffers from a handler that computes, and overload;
and how late calls end that a stopped server does not answer.

::

    python bench/servers.py                     # about 2 minutes
    python bench/servers.py --rows pool --quick

Every server is a process of its own; the clients are in this one. Prints each row beside its goal; ``--json FILE``
keeps every sample.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import zmq
from options import some_of

import zmqcore
from zmqcore import AsyncClient, Client, DeadlineExceeded, Node, Overloaded, Server, Topic
from zmqcore.rpc.loop_server import LoopServer

TOPIC = "servers"
PAYLOAD = b"0123456789abcdef"
TIMEOUT = 30.0

Sample = dict[str, float]


class Service:
    """What the servers do."""

    def echo(self, value: Any) -> Any:
        return value

    def pid(self) -> int:
        return os.getpid()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def burn(self, seconds: float) -> None:
        """Compute in Python for so much CPU time."""
        until = time.thread_time() + seconds
        while time.thread_time() < until:
            for _ in range(100):
                pass


class AsyncService(Service):
    """The same, where it waits by coroutines."""

    async def sleep(self, seconds: float) -> None:  # type: ignore[override]
        await asyncio.sleep(seconds)


def serve(options: dict[str, Any]) -> None:
    """Serve until the parent has gone: on an event loop where ``max_concurrency`` is given."""
    with Node("memory://servers") as node:
        if "max_concurrency" in options:
            server: Any = LoopServer(Topic(TOPIC), AsyncService(), node, **options)
        else:
            server = Server(TOPIC, Service(), node=node, **options)
        server.start()
        print(server.endpoints[0], flush=True)
        sys.stdin.read()
        server.stop()


@contextlib.contextmanager
def server(node: Node, **options: Any) -> Iterator[Client]:
    """Start a server process and yield a client that is connected to it."""
    options["bind"] = "tcp://127.0.0.1:*"
    environment = os.environ | {"PYTHONPATH": str(Path(zmqcore.__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, __file__, "--serve", json.dumps(options)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout is not None
        endpoint = process.stdout.readline().strip()
        with Client(TOPIC, node=node, connect=endpoint, timeout=TIMEOUT) as client:
            for _ in range(100):
                assert client.call("echo", PAYLOAD) == PAYLOAD
            yield client
        assert process.stdin is not None
        process.stdin.close()


def percentile(values: list[float], share: float) -> float:
    """Return the value below which ``share`` of the values lie."""
    return sorted(values)[min(int(len(values) * share), len(values) - 1)]


# -- pool: what threads cost ---------------------------------------------------------------------------------


def sequential(client: Client, calls: int) -> list[float]:
    """Return how long each of some calls took, one after the other."""
    clock, call, took = time.perf_counter, client.call, []
    for _ in range(calls):
        began = clock()
        answer = call("echo", PAYLOAD)
        took.append(clock() - began)
        assert answer == PAYLOAD
    return took


def pool(node: Node, options: argparse.Namespace) -> Sample:
    """Sequential calls to an inline server and to one with four threads, in turn within one round."""
    took: dict[int, list[float]] = {0: [], 4: []}
    with server(node, workers=0) as inline, server(node, workers=4) as threads:
        for _ in range(4 if options.quick else 10):
            for workers, client in ((0, inline), (4, threads)):
                took[workers] += sequential(client, 500)
    inline_us, threads_us = (statistics.median(took[workers]) * 1e6 for workers in (0, 4))
    return {"inline_us": inline_us, "threads_us": threads_us, "ratio": threads_us / inline_us}


# -- compute: short calls beside one that computes -----------------------------------------------------------


def paced(client: Client, rate: float, seconds: float, threads: int = 16) -> list[float]:
    """Call ``rate`` times a second by a clock that waits for nobody; return how late each answer came, in seconds."""
    began = time.perf_counter() + 0.1
    late: list[float] = []

    def some(number: int) -> None:
        for turn in range(int(rate * seconds / threads)):
            due = began + (turn * threads + number) / rate
            time.sleep(max(0.0, due - time.perf_counter()))
            assert client.call("echo", PAYLOAD) == PAYLOAD
            late.append(time.perf_counter() - due)

    running = [threading.Thread(target=some, args=(number,)) for number in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return late


def compute(node: Node, options: argparse.Namespace) -> Sample:
    """1,000 short calls a second, alone and beside a handler that computes in Python all the time."""
    seconds = 2.0 if options.quick else 5.0
    with server(node, workers=4) as client:
        alone = paced(client, 1000.0, seconds)
        over = threading.Event()

        def burn() -> None:
            while not over.is_set():
                client.call("burn", 0.2)

        burning = threading.Thread(target=burn)
        burning.start()
        time.sleep(0.5)
        beside = paced(client, 1000.0, seconds)
        over.set()
        burning.join()
    p99 = percentile(beside, 0.99)
    return {
        "alone_p99_ms": percentile(alone, 0.99) * 1e3,
        "beside_p50_ms": statistics.median(beside) * 1e3,
        "beside_p99_ms": p99 * 1e3,
        "switch_intervals": p99 / sys.getswitchinterval(),
    }


# -- overload: three times more than can be done -------------------------------------------------------------


def closed_loop(client: Client, call: tuple[str, float], in_flight: int, seconds: float) -> float:
    """Return how many calls a second are done when so many are always in flight: the peak."""
    until = time.perf_counter() + seconds

    def some() -> int:
        done = 0
        while time.perf_counter() < until:
            client.call(*call)
            done += 1
        return done

    counts: list[int] = []
    running = [threading.Thread(target=lambda: counts.append(some())) for _ in range(in_flight)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return sum(counts) / seconds


def open_loop(client: Client, call: tuple[str, float], rate: float, seconds: float) -> Counter[str]:
    """Offer ``rate`` calls a second whatever becomes of them; return how many ended how."""
    ended: Counter[str] = Counter()

    def note(future: Any) -> None:
        error = future.exception()
        ended["done" if error is None else type(error).__name__] += 1

    futures = []
    began = time.perf_counter()
    for number in range(int(rate * seconds)):
        time.sleep(max(0.0, began + number / rate - time.perf_counter()))
        try:
            futures.append(client.submit(*call))
        except Overloaded:
            ended["not sent"] += 1
        else:
            futures[-1].add_done_callback(note)
    for future in futures:
        with contextlib.suppress(zmqcore.ZmqcoreError):
            future.result()
    return ended


def overload(
    call: tuple[str, float], workers: int, on_full: str, limit: str = "workers"
) -> Callable[..., Sample]:
    def measure(node: Node, options: argparse.Namespace) -> Sample:
        """The peak, and then three times as much for 10 s, from callers that have 250 ms."""
        seconds = 3.0 if options.quick else 10.0
        with server(node, queue_size=8 * workers, on_full=on_full, **{limit: workers}) as client:
            before = closed_loop(client, call, 2 * workers, 2.0)
            began = time.perf_counter()
            ended = open_loop(client.prepare(timeout=0.25), call, 3 * before, seconds)
            took = time.perf_counter() - began
            # Measured on both sides, as neighbours come and go.
            peak = statistics.mean((before, closed_loop(client, call, 2 * workers, 2.0)))
        goodput = ended["done"] / took
        return {"peak": peak, "goodput": goodput, "share": goodput / peak, **ended}

    return measure


# -- deadlines: a stopped server, and 100,000 calls to it -----------------------------------------------------


async def lateness(client: AsyncClient, calls: int, timeout: float, together: bool) -> list[float]:
    """Return by how much each of ``calls`` calls ended after its deadline, in seconds, in order.

    Each has ``timeout`` seconds from its own start, or they are due ``together``.
    """
    until = time.monotonic() + timeout
    late: list[float] = []

    async def call() -> None:
        mine = client.prepare(timeout=max(0.001, until - time.monotonic())) if together else client
        due = until if together else time.monotonic() + timeout
        with contextlib.suppress(DeadlineExceeded, Overloaded):
            await mine.call("echo", PAYLOAD)
        late.append(time.monotonic() - due)

    async with asyncio.TaskGroup() as group:
        for _ in range(calls):
            group.create_task(call())
    return sorted(late)


async def bare_lateness(calls: int) -> float:
    """Return after how many seconds the last one of so many tasks goes on whose futures have failed at one moment."""
    loop = asyncio.get_running_loop()
    futures = [loop.create_future() for _ in range(calls)]
    late: list[float] = []

    async def wait(future: asyncio.Future[None]) -> None:
        with contextlib.suppress(DeadlineExceeded):
            await future
        late.append(time.monotonic())

    async with asyncio.TaskGroup() as group:
        for future in futures:
            group.create_task(wait(future))
        await asyncio.sleep(0)
        began = time.monotonic()
        for future in futures:
            future.set_exception(DeadlineExceeded("due"))
    return max(late) - began


def thread_lateness(call: Callable[[], object], calls: int, timeout: float) -> list[float]:
    """lateness() of ``call`` in 64 threads, in each of them one after the other."""
    late: list[float] = []

    def work() -> None:
        for _ in range(calls // 64):
            due = time.monotonic() + timeout
            with contextlib.suppress(DeadlineExceeded, Overloaded):
                call()
            late.append(time.monotonic() - due)

    workers = [threading.Thread(target=work) for _ in range(64)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sorted(late)


def deadlines(_node: Node, options: argparse.Namespace) -> Sample:
    """How late calls to a stopped server end: of coroutines, by their own deadlines and by one, and of threads."""
    calls, timeout = (20_000, 4.0) if options.quick else (100_000, 15.0)
    late: dict[str, list[float]] = {}
    # A node that does not take a stopped server for lost.
    with Node("memory://servers", liveness=600.0) as node, server(node, workers=0) as client:
        asynchronous = AsyncClient(
            TOPIC, node=node, connect=client.members()[0].endpoints[0], timeout=timeout
        )
        pid = client.call("pid")
        os.kill(pid, signal.SIGSTOP)
        os.waitid(os.P_PID, pid, os.WSTOPPED)
        try:
            for name, together in (("own", False), ("one", True)):
                late[name] = asyncio.run(lateness(asynchronous, calls, timeout, together))
            hurried = client.prepare(timeout=0.02)
            late["threads"] = thread_lateness(lambda: hurried.call("echo", PAYLOAD), calls, 0.02)
        finally:
            os.kill(pid, signal.SIGCONT)
    # The same without zmqcore: what the machine itself is late by.
    late["sleeping_threads"] = thread_lateness(lambda: time.sleep(0.02), calls, 0.02)
    sample = {
        f"{name}_p{100 * share:.0f}_ms": percentile(values, share) * 1e3
        for name, values in late.items()
        for share in (0.5, 0.99, 1.0)
    }
    return sample | {"bare_ms": asyncio.run(bare_lateness(calls)) * 1e3}


# -- running them --------------------------------------------------------------------------------------------

MEASUREMENTS: dict[str, Callable[[Node, argparse.Namespace], Sample]] = {
    "pool": pool,
    "compute": compute,
    "overload": overload(("sleep", 0.005), 4, "reject"),
    "overload-compute": overload(("burn", 0.002), 1, "reject"),
    "overload-async": overload(("sleep", 0.005), 4, "reject", "max_concurrency"),
    "deadlines": deadlines,
    "overload-wait": overload(("sleep", 0.005), 4, "wait"),
}
REPEATED = {"pool", "compute"}


@dataclasses.dataclass(frozen=True)
class Goal:
    """What a row's figure should be: the median over the rounds."""

    row: str
    metric: str
    title: str
    bound: str
    goal: float


GOALS = (
    Goal("pool", "ratio", "sequential calls, 4 threads / inline", "≤", 1.3),
    Goal(
        "compute",
        "switch_intervals",
        "1,000 calls/s beside one that computes: p99 / switch interval",
        "≤",
        3.0,
    ),
    Goal("overload", "share", "3 x overload, handlers that wait: done / peak", "≥", 0.8),
    Goal("overload-async", "share", "3 x overload, coroutines: done / peak", "≥", 0.8),
    Goal("deadlines", "own_p100_ms", "100,000 coroutines call a stopped server: ms too late", "≤", 50.0),
    Goal("deadlines", "threads_p100_ms", "100,000 calls of 64 threads to it: ms too late", "≤", 50.0),
    Goal("overload-compute", "share", "3 x overload, handlers that compute: done / peak", "≥", 0.8),
)


def report(samples: dict[str, list[Sample]]) -> None:
    """Print the goals, then everything else that was measured."""
    print(
        f"{os.cpu_count()} CPUs, {platform.system()} {platform.release()}, Python {platform.python_version()}, "
        f"libzmq {zmq.zmq_version()}, zmqcore {zmqcore.__version__}"
    )
    width = max(len(goal.title) for goal in GOALS)
    print(f"\n{'':{width}}   goal  reached  met")
    for goal in GOALS:
        if goal.row in samples:
            value = statistics.median(sample[goal.metric] for sample in samples[goal.row])
            met = value <= goal.goal if goal.bound == "≤" else value >= goal.goal
            print(
                f"{goal.title:{width}}  {goal.bound} {goal.goal:3g}  {value:7.3g}  {'yes' if met else 'NO'}"
            )
    print()
    for row, found in samples.items():
        for sample in found:
            print(f"{row}: " + ", ".join(f"{name} {value:,.4g}" for name, value in sample.items()))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--rows", type=some_of(MEASUREMENTS), default=list(MEASUREMENTS), help=", ".join(MEASUREMENTS)
    )
    parser.add_argument("--quick", action="store_true", help="fewer calls and rounds")
    parser.add_argument("--rounds", type=int, default=5, help="of pool and compute (default 5)")
    parser.add_argument("--json", metavar="FILE", help="write everything there, too")
    parser.add_argument("--serve", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Measure and print. Whether a goal was met does not matter here."""
    options = parse()
    if options.serve is not None:
        serve(options.serve)
        return 0
    samples: dict[str, list[Sample]] = {}
    for row in options.rows:
        for _ in range(options.rounds if row in REPEATED and not options.quick else 1):
            print(f"\r\x1b[K{row} ...", end="", file=sys.stderr, flush=True)
            with Node("memory://servers") as node:
                samples.setdefault(row, []).append(MEASUREMENTS[row](node, options))
    print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    if options.json:
        goals = [dataclasses.asdict(goal) for goal in GOALS]
        Path(options.json).write_text(json.dumps({"goals": goals, "samples": samples}, indent=1) + "\n")
    report(samples)
    return 0


if __name__ == "__main__":
    sys.exit(main())
