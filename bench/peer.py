"""What the measured processes of ``side_by_side.py`` share: the line protocol and the ways to measure.

A process gets one command per line on its standard input and answers with one JSON object per line. It ends
when its input ends, so nothing outlives the program that started it; on Linux the kernel also kills it with
its parent.

Commands of a client (``floor.c`` speaks the same)::

    call SIZE SECONDS              one call after the other
    inflight SIZE SECONDS DEPTH    DEPTH calls outstanding
    cast SIZE SECONDS              one way; from the first send to the last message handled by the server
    threads SIZE SECONDS THREADS   sequential calls by THREADS threads
    soak SIZE CALLS THREADS        that many calls by THREADS threads (only where the peer has it)
    cpu                            CPU seconds used so far

Every answer is compared with what was sent. A server knows ``cpu`` only. ``total`` in an answer counts the
calls with those of the warm-up, and ``cpu`` covers just these.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

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


class Sequence:
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
    sequence = Sequence(call, size)
    sequence.run(seconds)
    cpu = cpu_seconds() - cpu
    ordered = sorted(sequence.durations_ns)
    return {
        "calls": len(ordered),
        "rate": len(ordered) * 1e9 / sequence.elapsed_ns,
        "p50_us": percentile(ordered, 0.5),
        "p99_us": percentile(ordered, 0.99),
        "max_us": percentile(ordered, 1.0),
        "total": sequence.number,
        "cpu": cpu,
    }


def measure_threads(
    make_call: Callable[[], Call], size: int, threads: int, seconds: float = 0.0, calls: int = 0
) -> dict[str, Any]:
    """Let ``threads`` threads call, for ``seconds`` or until each has made its share of ``calls``.

    ``make_call`` is run once in each thread and gives the function that the thread calls.
    """
    cpu = cpu_seconds()
    sequences: list[Sequence] = []
    failures: list[BaseException] = []
    begin_together = threading.Barrier(threads)

    def work(index: int) -> None:
        try:
            sequence = Sequence(make_call(), size, first=index << 40)
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
    ordered = sorted(duration for sequence in sequences for duration in sequence.durations_ns)
    rates = [len(sequence.durations_ns) * 1e9 / sequence.elapsed_ns for sequence in sequences]
    return {
        "calls": len(ordered),
        "rate": sum(rates),
        "p50_us": percentile(ordered, 0.5),
        "p99_us": percentile(ordered, 0.99),
        "max_us": percentile(ordered, 1.0),
        "over_100ms": sum(duration > 100_000_000 for duration in ordered),
        "slowest_thread": min(rates) / max(rates),
        "total": sum(sequence.number - sequence.first for sequence in sequences),
        "cpu": cpu,
    }


def measure_casts(
    cast: Callable[[bytes], object], finish: Callable[[], tuple[int, int]], size: int, seconds: float
) -> dict[str, Any]:
    """Send one way for ``seconds``; the rate is that of the messages that the server has handled.

    ``finish()`` gives how many the server has handled since the last time, and its monotonic clock then.
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
        sent += 128
    handed_over = clock()
    handled, last = finish()
    deadline = handed_over + 30_000_000_000
    while handled < sent and clock() < deadline:  # handlers on several threads may still be at it
        time.sleep(0.001)
        more, last = finish()
        handled += more
    if handled != sent:
        raise WrongAnswer(f"{sent} casts sent, {handled} handled")
    return {
        "calls": sent,
        "rate": sent * 1e9 / (last - begin),
        "send_rate": sent * 1e9 / (handed_over - begin),
        "total": sent,
        "cpu": cpu_seconds() - cpu,
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
