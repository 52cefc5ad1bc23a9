"""What the measured processes share: the line protocol and the ways to measure.

A process gets one command per line on its standard input and answers with one JSON object per line. It ends
when its input ends, so nothing outlives the program that started it; on Linux the kernel also kills it with
its parent.

Commands of a client (``floor.c`` speaks the same)::

    call SIZE SECONDS              one call after the other
    inflight SIZE SECONDS DEPTH    DEPTH calls outstanding
    cast SIZE SECONDS              one way; from the first send to the last message handled by the server
    threads SIZE SECONDS THREADS   sequential calls by THREADS threads
    soak SIZE CALLS THREADS        that many calls by THREADS threads (only where the peer has it)
    fanout SIZE SECONDS            one way, each message to every server that the client was started with
    open SIZE 0 COUNT              one call to each of COUNT addresses of the server; the connections stay open
    kept SIZE SECONDS              calls to these addresses in turn
    shut 0 0                       close these connections
    new SIZE SECONDS COUNT         calls to COUNT addresses in turn, each on a connection of its own
    cpu                            CPU seconds used so far

Every answer is compared with what was sent. A server knows ``cpu`` only. ``total`` in an answer counts the
calls with those of the warm-up, and ``cpu`` covers just these.
"""

from __future__ import annotations

import collections
import ctypes
import itertools
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

SMALLEST_BYTES = 16
"""The smallest payload: byte 0 is the kind of message, bytes 8 to 15 a sequence number."""

Call = Callable[[bytes], Any]
Task = Callable[[int, float, int], dict[str, Any]]


def die_with_parent() -> None:
    """Ask the kernel for SIGKILL when the starting process ends. Does nothing outside Linux."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1  # <sys/prctl.h>
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, int(signal.SIGKILL), 0, 0, 0)


def cpu_seconds() -> float:
    """Return the CPU time, user and system, of all threads of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def say(**fields: Any) -> None:
    """Write one answer."""
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def warmup_seconds(seconds: float) -> float:
    """Return how long to warm up before a measurement of ``seconds``: a fifth of it, at most 0.1 s."""
    return min(seconds / 5, 0.1)


def payload_maker(size: int) -> Callable[[int], bytes]:
    """Return a function that gives a payload of ``size`` bytes for each number, cheaply.

    Small payloads differ by their number. From 4 KiB on it is always the same object, as making another would
    cost more than what is to be measured.
    """
    if size < SMALLEST_BYTES:
        raise ValueError(f"a payload of {size} bytes; it has at least {SMALLEST_BYTES}")
    filling = b"x" * (size - SMALLEST_BYTES)
    if size >= 4096:
        large = b"C" + b"x" * (size - 1)
        return lambda _: large
    return lambda number: b"Cxxxxxxx" + number.to_bytes(8, "little") + filling


def same(answer: Any, payload: bytes) -> bool:
    """Say whether ``answer`` is what was sent; of a large one, its length and both ends are compared."""
    if len(payload) < 4096:
        return bool(answer == payload)
    return len(answer) == len(payload) and answer[:16] == payload[:16] and answer[-16:] == payload[-16:]


class WrongAnswer(AssertionError):
    """An answer that is not what was asked for: a fault of the peer, and the end of the run."""


def percentile(ordered: list[int], share: float) -> float:
    """Return the value in µs below which ``share`` of the ``ordered`` nanoseconds lie."""
    return round(ordered[min(int(len(ordered) * share), len(ordered) - 1)] / 1000, 2)


def call_figures(durations_ns: list[int], rate: float, total: int, cpu: float) -> dict[str, Any]:
    """Return what is answered for calls one after the other; ``total`` counts the warm-up's, too."""
    ordered = sorted(durations_ns)
    return {
        "calls": len(ordered),
        "rate": rate,
        "p50_us": percentile(ordered, 0.5),
        "p99_us": percentile(ordered, 0.99),
        "max_us": percentile(ordered, 1.0),
        "total": total,
        "cpu": cpu,
    }


def inflight_figures(calls: int, elapsed_ns: int, cpu: float) -> dict[str, Any]:
    """Return what is answered for calls that were outstanding together."""
    return {"calls": calls, "rate": calls * 1e9 / elapsed_ns, "total": calls, "cpu": cpu}


def cast_figures(
    sent: int, handled: int, begin_ns: int, handed_over_ns: int, last_ns: int, cpu: float
) -> dict[str, Any]:
    """Return what is answered for messages one way: up to ``last_ns``, the server's clock after the last one."""
    if handled != sent:
        raise WrongAnswer(f"{sent} casts sent, {handled} handled")
    return {
        "calls": sent,
        "rate": sent * 1e9 / (last_ns - begin_ns),
        "send_rate": sent * 1e9 / (handed_over_ns - begin_ns),
        "total": sent,
        "cpu": cpu,
    }


class Target:
    """The object whose methods are called from afar."""

    def __init__(self) -> None:
        self.handled = 0

    def echo(self, payload: Any) -> Any:
        return payload

    def tick(self, _payload: Any) -> None:
        self.handled += 1

    def finish(self) -> tuple[int, int]:
        """Return how many ticks there were since the last time, and the clock."""
        handled, self.handled = self.handled, 0
        return handled, time.monotonic_ns()


class Calls:
    """One thread's calls, one after the other, with the duration of each."""

    def __init__(self, call: Call, size: int, first: int = 0) -> None:
        self.call = call
        self.payload = payload_maker(size)
        self.number = first
        self.first = first
        self.durations_ns: list[int] = []
        self.elapsed_ns = 0

    def _calls(self) -> Iterator[int]:
        """Make one call at a time; give the clock after each."""
        call, payload_of, clock = self.call, self.payload, time.perf_counter_ns
        while True:
            payload = payload_of(self.number)
            answer = call(payload)
            if not same(answer, payload):
                raise WrongAnswer(f"call {self.number}: sent {payload[:32]!r}, got {bytes(answer[:32])!r}")
            self.number += 1
            del answer  # as in C: the next one may come into the same memory
            yield clock()

    def run(self, seconds: float) -> None:
        """Warm up, then measure for ``seconds``."""
        calls = self._calls()
        end = time.perf_counter_ns() + int(warmup_seconds(seconds) * 1e9)
        while next(calls) < end:
            pass
        note = self.durations_ns.append
        begin = last = time.perf_counter_ns()
        end = begin + int(seconds * 1e9)
        for now in calls:
            note(now - last)
            last = now
            if now >= end:
                break
        self.elapsed_ns = last - begin

    @property
    def rate(self) -> float:
        """Calls per second."""
        return len(self.durations_ns) * 1e9 / self.elapsed_ns

    def run_calls(self, count: int) -> None:
        """Measure ``count`` calls, without a warm-up."""
        note = self.durations_ns.append
        begin = last = time.perf_counter_ns()
        for _, now in zip(range(count), self._calls(), strict=False):
            note(now - last)
            last = now
        self.elapsed_ns = last - begin


def measure_calls(call: Call, size: int, seconds: float) -> dict[str, Any]:
    """Call ``call(payload) -> answer`` for ``seconds``, one after the other."""
    cpu = cpu_seconds()
    sequence = Calls(call, size)
    sequence.run(seconds)
    cpu = cpu_seconds() - cpu
    return call_figures(sequence.durations_ns, sequence.rate, sequence.number, cpu)


def measure_threads(
    make_call: Callable[[], Call], size: int, threads: int, seconds: float = 0.0, calls: int = 0
) -> dict[str, Any]:
    """Let ``threads`` threads call, for ``seconds`` or until each has made its share of ``calls``.

    ``make_call`` is run once in each thread and gives the function that the thread calls.
    """
    cpu = cpu_seconds()
    sequences: list[Calls] = []
    failures: list[BaseException] = []
    begin_together = threading.Barrier(threads)

    def work(index: int) -> None:
        try:
            sequence = Calls(make_call(), size, first=index << 40)
            sequences.append(sequence)
            begin_together.wait()
            if calls:
                sequence.run_calls(calls // threads)
            else:
                sequence.run(seconds)
        except BaseException as failure:  # noqa: BLE001 - raised again by the main thread
            failures.append(failure)
            begin_together.abort()

    workers = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        raise failures[0]
    cpu = cpu_seconds() - cpu
    durations_ns = [duration for sequence in sequences for duration in sequence.durations_ns]
    rates = [sequence.rate for sequence in sequences]
    total = sum(sequence.number - sequence.first for sequence in sequences)
    return call_figures(durations_ns, sum(rates), total, cpu) | {
        "over_100ms": sum(duration > 100_000_000 for duration in durations_ns),
        "slowest_thread": min(rates) / max(rates),
    }


def measure_inflight(submit: Callable[[bytes], Any], size: int, seconds: float, depth: int) -> dict[str, Any]:
    """Keep ``depth`` calls outstanding; ``submit(payload).result()`` is the answer to one."""
    payload_of = payload_maker(size)
    outstanding: collections.deque[tuple[Any, bytes]] = collections.deque()
    cpu = cpu_seconds()
    begin = now = time.perf_counter_ns()
    end = begin + int(seconds * 1e9)
    number = 0
    while outstanding or now < end:
        while len(outstanding) < depth and now < end:
            number += 1
            payload = payload_of(number)
            outstanding.append((submit(payload), payload))
        future, payload = outstanding.popleft()
        answer = future.result()
        if not same(answer, payload):
            raise WrongAnswer(f"sent {payload[:32]!r}, got {bytes(answer[:32])!r}")
        if not number & 15:
            now = time.perf_counter_ns()
    return inflight_figures(number, time.perf_counter_ns() - begin, cpu_seconds() - cpu)


def measure_casts(
    cast: Callable[[bytes], object],
    finish: Callable[[], tuple[int, int]],
    size: int,
    seconds: float,
    copies: int = 1,
) -> dict[str, Any]:
    """Send one way for ``seconds``; the rate is that of the messages that the servers have handled.

    Each ``cast()`` makes ``copies`` messages. ``finish()`` gives how many of them the servers have handled since the
    last time, and their monotonic clock then.
    Both processes must be of one language: elsewhere than on Linux the clocks of C and Python differ.
    """
    cpu = cpu_seconds()
    payload = payload_maker(size)(0).replace(b"C", b"O", 1)
    sent = 0
    clock = time.monotonic_ns
    begin = clock()
    end = begin + int(seconds * 1e9)
    while clock() < end:
        for _ in range(128):
            cast(payload)
        sent += 128 * copies
    handed_over = clock()
    handled, last = finish()
    deadline = handed_over + 30_000_000_000
    while handled < sent and clock() < deadline:  # handlers on several threads may still be at it
        time.sleep(0.001)
        more, last = finish()
        handled += more
    return cast_figures(sent, handled, begin, handed_over, last, cpu_seconds() - cpu)


class Connection(Protocol):
    """What a blocking peer does on one connection."""

    def call(self, payload: bytes, /) -> Any: ...
    def cast(self, payload: bytes, /) -> object: ...
    def finish(self) -> tuple[int, int]: ...
    def close(self) -> object: ...


def host_and_port(endpoint: str) -> tuple[str, int]:
    """Take ``tcp://host:port`` apart."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return host, int(port)


def addresses(endpoint: str, count: int) -> list[str]:
    """Return ``count`` endpoints that one server listens on if it is bound to all addresses.

    Linux routes all of 127.0.0.0/8 to itself; other systems do not. A broker has one address for all.
    """
    if not endpoint.startswith("tcp://"):
        return [endpoint] * count
    _, port = host_and_port(endpoint)
    return [f"tcp://127.1.{number // 250}.{1 + number % 250}:{port}" for number in range(count)]


def finish_all(connections: Sequence[Connection]) -> tuple[int, int]:
    """Return how many messages all servers have handled since the last time, and when the last one had."""
    answers = [connection.finish() for connection in connections]
    return sum(handled for handled, _ in answers), max(last for _, last in answers)


def one_after_the_other(connections: Sequence[Connection]) -> Call:
    """Return the function that sends a payload on each of ``connections``."""
    casts = [connection.cast for connection in connections]

    def cast_to_all(payload: bytes) -> None:
        for cast in casts:
            cast(payload)

    return cast_to_all


def connection_tasks(
    first: Connection,
    connect: Callable[[str], Connection],
    endpoints: Sequence[str],
    connect_once: Callable[[str], Connection] | None = None,
    to_all: Callable[[Sequence[Any]], Call] | None = None,
) -> dict[str, Task]:
    """Return the tasks of a peer that ``connect(endpoint)`` connects; ``first`` is such a connection.

    ``connect_once(endpoint)`` connects for a single call, and ``to_all(connections)`` is the function that sends one
    payload to all of them, if these are done in another way.
    """
    connect_once = connect_once or connect
    to_all = to_all or one_after_the_other
    kept: list[Connection] = []

    def fanout(size: int, seconds: float, _: int) -> dict[str, Any]:
        connections = [connect(endpoint) for endpoint in endpoints]
        finish_all(connections)  # connected
        cast = to_all(connections)
        return measure_casts(cast, lambda: finish_all(connections), size, seconds, len(connections))

    def open_all(size: int, _: float, count: int) -> dict[str, Any]:
        payload = payload_maker(size)(0)
        begin = time.perf_counter()
        for endpoint in addresses(endpoints[0], count):
            kept.append(connect(endpoint))
            if not same(kept[-1].call(payload), payload):
                raise WrongAnswer(f"{endpoint} did not answer what was sent")
        return {"open": len(kept), "seconds": time.perf_counter() - begin}

    def call_kept(size: int, seconds: float, _: int) -> dict[str, Any]:
        calls = itertools.cycle([connection.call for connection in kept])

        def call(payload: bytes) -> Any:
            return next(calls)(payload)

        return measure_calls(call, size, seconds)

    def shut(*_: object) -> dict[str, Any]:
        for connection in kept:
            connection.close()
        kept.clear()
        return {}

    def call_new(size: int, seconds: float, count: int) -> dict[str, Any]:
        turns = itertools.cycle(addresses(endpoints[0], count))

        def call(payload: bytes) -> Any:
            connection = connect_once(next(turns))
            answer = connection.call(payload)
            connection.close()
            return answer

        return measure_calls(call, size, seconds)

    return {
        "call": lambda size, seconds, _: measure_calls(first.call, size, seconds),
        "cast": lambda size, seconds, _: measure_casts(first.cast, first.finish, size, seconds),
        "fanout": fanout,
        "open": open_all,
        "kept": call_kept,
        "shut": shut,
        "new": call_new,
    }


def obey(tasks: dict[str, Task]) -> None:
    """Read commands and run them until the input ends; a fault is reported and ends the process."""
    for line in sys.stdin:
        words = line.split()
        if not words:
            continue
        if words[0] == "cpu":
            say(cpu=cpu_seconds())
            continue
        try:
            extra = int(words[3]) if len(words) > 3 else 0
            say(**tasks[words[0]](int(words[1]), float(words[2]), extra))
        except BaseException as failure:
            say(error=f"{type(failure).__name__}: {failure}")
            raise


def leave() -> None:
    """End at once: what is measured has been reported, and an orderly shutdown is not what is measured."""
    sys.stdout.flush()
    os._exit(0)


def obey_beside() -> None:
    """Answer ``cpu`` in a thread while the main thread serves, and end the process with its input."""

    def run() -> None:
        try:
            obey({})
        finally:
            leave()

    threading.Thread(target=run, name="control", daemon=True).start()
