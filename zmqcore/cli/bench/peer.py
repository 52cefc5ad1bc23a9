"""One measured process of ``zmqcore bench``: ``python -P -m zmqcore.cli.bench.peer ROLE SYSTEM SIZE ENDPOINT``.

ROLE is ``server`` or ``client``, SYSTEM ``zmqcore`` or ``pyzmq``, SIZE that of all payloads in bytes. A process says
one line of JSON when it is ready, then answers each line on its standard input by one of JSON. It ends when its input
does, so it outlives nobody::

    cpu                     the CPU seconds it has used so far
    call SECONDS            one call after the other            (this and the following: a client only)
    inflight SECONDS        IN_FLIGHT calls outstanding
    cast SECONDS            one way; counted where it arrives

Every answer is compared with what was sent. Neither click nor rich is imported here.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import sys
import threading
import time
from collections import deque
from typing import Any, Protocol

import zmq

from zmqcore import Client, Node, Server

__all__ = ["IN_FLIGHT", "main"]

IN_FLIGHT = 100
"""How many calls the task ``inflight`` keeps outstanding."""

_TIMEOUT = 30.0
# The first byte of what bare pyzmq sends. Payloads of zmqcore are the same, but there the method says what is meant.
_CALL, _CAST, _FINISH = b"C", b"O", b"F"
_HANDLED = struct.Struct("=QQ")
# From here on pyzmq is faster when it does not copy.
_NO_COPY_BYTES = 64 << 10
# What bare pyzmq may queue. Its own default, but no more than so many bytes, and more than are in flight.
_QUEUED_MESSAGES, _QUEUED_BYTES = 1000, 64 << 20


class Caller(Protocol):
    """A client of either system. What ``start`` returns is given to ``collect``, in the same order."""

    def call(self, payload: bytes) -> Any: ...
    def start(self, payload: bytes) -> Any: ...
    def collect(self, started: Any) -> Any: ...
    def cast(self, payload: bytes) -> object: ...
    def finish(self) -> tuple[int, int]:
        """Return how many casts have arrived since the last time, and the clock (monotonic, ns) after the last."""


# -- bare pyzmq: DEALER to ROUTER, the payload is the message ---------------------------------------------------


def _bare_socket(kind: int, size: int) -> zmq.Socket[bytes]:
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(kind)
    socket.set_hwm(max(2 * IN_FLIGHT, min(_QUEUED_MESSAGES, _QUEUED_BYTES // size)))
    return socket


class _Bare:
    def __init__(self, size: int, endpoint: str) -> None:
        socket = _bare_socket(zmq.DEALER, size)
        socket.linger = 0
        socket.connect(endpoint)
        self._send, self._receive = socket.send, socket.recv
        self._copy = size < _NO_COPY_BYTES

    def call(self, payload: bytes) -> Any:
        self._send(payload, 0, self._copy)
        return self._receive() if self._copy else self._receive(0, False).buffer

    def start(self, payload: bytes) -> None:
        self._send(payload, 0, self._copy)

    def collect(self, started: None) -> Any:
        del started
        return self._receive() if self._copy else self._receive(0, False).buffer

    def cast(self, payload: bytes) -> None:
        self._send(payload, 0, self._copy)

    def finish(self) -> tuple[int, int]:
        self._send(_FINISH)
        handled, clock = _HANDLED.unpack(self._receive())
        return handled, clock


def _serve_bare(size: int, endpoint: str) -> None:
    router = _bare_socket(zmq.ROUTER, size)
    router.bind(endpoint)
    _say(endpoint=router.getsockopt_string(zmq.LAST_ENDPOINT))
    threading.Thread(target=_answer_cpu_and_leave, daemon=True).start()
    receive, send, more, copy = router.recv, router.send, int(zmq.SNDMORE), size < _NO_COPY_BYTES
    handled = 0
    while True:
        identity = receive()
        body: Any = receive(0, copy)
        kind = (body if copy else body.buffer)[0]
        if kind == _CAST[0]:
            handled += 1
            continue
        send(identity, more)
        if kind == _CALL[0]:
            send(body, 0, copy)
        else:
            send(_HANDLED.pack(handled, time.monotonic_ns()))
            handled = 0


# -- zmqcore -----------------------------------------------------------------------------------------------------


class _Target:
    def __init__(self) -> None:
        self._handled = 0

    def echo(self, payload: Any) -> Any:
        return payload

    def tick(self, payload: Any) -> None:
        del payload
        self._handled += 1

    def finish(self) -> tuple[int, int]:
        handled, self._handled = self._handled, 0
        return handled, time.monotonic_ns()


class _Zmqcore:
    def __init__(self, size: int, endpoint: str) -> None:
        del size
        self._client = Client("bench", node=Node("memory://bench"), connect=endpoint, timeout=_TIMEOUT)

    def call(self, payload: bytes) -> Any:
        return self._client.call("echo", payload)

    def start(self, payload: bytes) -> Any:
        return self._client.submit("echo", payload)

    def collect(self, started: Any) -> Any:
        return started.result()

    def cast(self, payload: bytes) -> None:
        self._client.cast("tick", payload)

    def finish(self) -> tuple[int, int]:
        handled, clock = self._client.call("finish")
        return handled, clock


def _serve_zmqcore(size: int, endpoint: str) -> None:
    del size
    server = Server("bench", _Target(), node=Node("memory://bench"), workers=0, bind=endpoint)
    server.start()
    _say(endpoint=server.endpoints[0])
    _answer_cpu_and_leave()


# -- what is measured ----------------------------------------------------------------------------------------------


class _WrongAnswer(Exception):
    """What came back is not what was sent."""


def _check(answer: Any, payload: bytes) -> None:
    # All of a small one; of a large one its length and both ends: comparing it would be what is measured.
    if len(payload) < 4096:
        right = answer == payload
    else:
        right = len(answer) == len(payload) and answer[:16] == payload[:16] and answer[-16:] == payload[-16:]
    if not right:
        raise _WrongAnswer(f"{len(payload)} bytes were sent, others came back ({len(answer)} bytes)")


def _end_of(seconds: float) -> int:
    return time.perf_counter_ns() + int(seconds * 1e9)


def _measure_calls(caller: Caller, payload: bytes, seconds: float) -> dict[str, float]:
    call, clock = caller.call, time.perf_counter_ns
    durations = []
    end = _end_of(seconds)
    begin = last = clock()
    while last < end:
        answer = call(payload)
        now = clock()
        durations.append(now - last)
        _check(answer, payload)
        del answer  # the next one may come into the same memory
        last = clock()
    durations.sort()
    median = durations[len(durations) // 2]
    return {
        "messages": len(durations),
        "per_second": len(durations) * 1e9 / (last - begin),
        "p50_us": median / 1000,
    }


def _measure_in_flight(caller: Caller, payload: bytes, seconds: float) -> dict[str, float]:
    start, collect = caller.start, caller.collect
    outstanding: deque[Any] = deque()
    messages = 0
    end = _end_of(seconds)
    begin = now = time.perf_counter_ns()
    while outstanding or now < end:
        while len(outstanding) < IN_FLIGHT and now < end:
            outstanding.append(start(payload))
            messages += 1
        _check(collect(outstanding.popleft()), payload)
        now = time.perf_counter_ns()
    return {"messages": messages, "per_second": messages * 1e9 / (now - begin)}


def _measure_casts(caller: Caller, payload: bytes, seconds: float) -> dict[str, float]:
    cast, clock = caller.cast, time.monotonic_ns
    payload = _CAST + payload[1:]
    sent = 0
    begin = clock()
    end = begin + int(seconds * 1e9)
    while clock() < end:
        for _ in range(32):
            cast(payload)
        sent += 32
    # Behind all of them on the same connection, and both processes' clocks are the system's own.
    handled, last = caller.finish()
    if handled != sent:
        raise _WrongAnswer(f"{sent} casts were sent, {handled} have arrived")
    return {"messages": sent, "per_second": sent * 1e9 / (last - begin)}


_TASKS = {"call": _measure_calls, "inflight": _measure_in_flight, "cast": _measure_casts}


# -- the process -----------------------------------------------------------------------------------------------------


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def _leave() -> None:
    """End at once: all there was to say has been said, and shutting down in order is not what is measured."""
    os._exit(0)


def _answer_cpu_and_leave() -> None:
    for _ in sys.stdin:
        _say(cpu_seconds=_cpu_seconds())
    _leave()


def _run_client(caller: Caller, size: int) -> None:
    payload = _CALL + os.urandom(size - 1)
    _say(ready=True)
    for line in sys.stdin:
        task, *seconds = line.split()
        try:
            if task == "cpu":
                _say(cpu_seconds=_cpu_seconds())
            else:
                _say(**_TASKS[task](caller, payload, float(seconds[0])))
        except Exception as exc:  # noqa: BLE001 - whatever it is, the parent shall tell the user
            _say(error=f"{type(exc).__name__}: {exc}")
    _leave()


def main(words: list[str]) -> None:
    """Run the role that *words* name (see the module)."""
    role, system, size, endpoint = words
    # Ctrl-C in a terminal goes to every process there; the parent ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if role == "server":
        {"zmqcore": _serve_zmqcore, "pyzmq": _serve_bare}[system](int(size), endpoint)
    else:
        caller = _Zmqcore(int(size), endpoint) if system == "zmqcore" else _Bare(int(size), endpoint)
        _run_client(caller, int(size))


if __name__ == "__main__":
    main(sys.argv[1:])
