"""Bare pyzmq, DEALER to ROUTER, with blocking sends and receives: what zmqcore is compared with.

``python peers_pyzmq.py server|client FORM ENDPOINT...`` speaks the line protocol of ``peer.py``. The forms:

``plain``
    The payload is the message, copied into and out of ``bytes``.
``frames``
    The same with ``copy=False``, which is slower for small messages and faster for large ones.
``msgpack``
    What a small RPC written by hand sends: a call is ``(id, method, arguments)``, its answer
    ``(id, result)``; the server looks the method up and calls it.

Frames are received one by one: that costs 1.1 µs for two, ``recv_multipart`` and ``send_multipart`` 4.4 µs.
"""

from __future__ import annotations

import collections
import struct
import sys
import time
from collections.abc import Callable
from typing import Any

import msgpack
import zmq
from peer import (
    Call,
    Target,
    Task,
    WrongAnswer,
    connection_tasks,
    cpu_seconds,
    die_with_parent,
    inflight_figures,
    leave,
    measure_threads,
    obey,
    obey_beside,
    payload_maker,
    same,
    say,
)

CALL, CAST, FINISH = ord("C"), ord("O"), ord("F")
FINISH_PAYLOAD = b"F" + b"x" * 15
COUNTED = struct.Struct("=QQ")  # messages counted, clock of the last in ns


# -- servers ---------------------------------------------------------------------------------------------


def serve_plain(router: zmq.Socket[bytes]) -> None:
    """Echo calls and count casts; the payload is the message."""
    receive, send, more = router.recv, router.send, int(zmq.SNDMORE)
    counted = 0
    while True:
        identity = receive()
        body = receive()
        kind = body[0]
        if kind == CAST:
            counted += 1
            continue
        if kind == FINISH:
            body = COUNTED.pack(counted, time.monotonic_ns())
            counted = 0
        send(identity, more)
        send(body)


def serve_frames(router: zmq.Socket[bytes]) -> None:
    """Do the same without copying the body; the frame that came is the one that goes back."""
    receive, send, more = router.recv, router.send, int(zmq.SNDMORE)
    counted = 0
    while True:
        identity = receive()
        body = receive(0, False)
        kind = body.buffer[0]
        if kind == CAST:
            counted += 1
            continue
        send(identity, more)
        if kind == CALL:
            send(body, 0, False)
            del body  # as in C: freed once sent, so that the next one may come into the same memory
        else:
            send(COUNTED.pack(counted, time.monotonic_ns()))
            counted = 0


def serve_msgpack(router: zmq.Socket[bytes]) -> None:
    """Unpack each message, call the method that it names, and answer unless its id is 0."""
    receive, send, more = router.recv, router.send, int(zmq.SNDMORE)
    pack, unpack = msgpack.Packer(autoreset=True).pack, msgpack.unpackb
    target = Target()
    methods: dict[str, Callable[..., Any]] = {
        "echo": target.echo,
        "tick": target.tick,
        "finish": target.finish,
    }
    while True:
        identity = receive()
        number, method, arguments = unpack(receive())
        result = methods[method](*arguments)
        if number:
            send(identity, more)
            send(pack((number, result)))


# -- clients ---------------------------------------------------------------------------------------------


class Plain:
    """One DEALER whose messages are the payloads."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.connect(endpoint)
        self.call, self.cast, self.close = self.caller(), self.caster(), self.socket.close

    def caller(self) -> Call:
        """Return the function that sends a payload and waits for the answer."""
        send, receive = self.socket.send, self.socket.recv

        def call(payload: bytes) -> bytes:
            send(payload)
            return receive()

        return call

    def caster(self) -> Call:
        """Return the function that sends a payload one way."""
        return self.socket.send

    def finish(self) -> tuple[int, int]:
        """Return how many casts the server has handled since the last time, and when."""
        handled, last = COUNTED.unpack(self.call(FINISH_PAYLOAD))
        return handled, last


class Frames(Plain):
    """One DEALER that copies nothing."""

    def caller(self) -> Call:
        send, receive = self.socket.send, self.socket.recv

        def call(payload: bytes) -> memoryview:
            send(payload, 0, False)
            return receive(0, False).buffer

        return call


class Msgpack(Plain):
    """One DEALER that packs calls and unpacks answers."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> None:
        self.pack = msgpack.Packer(autoreset=True).pack
        self.number = 0
        super().__init__(context, endpoint)

    def _call(self, method: str, *arguments: Any) -> Any:
        self.number = number = self.number + 1
        self.socket.send(self.pack((number, method, arguments)))
        answered, result = msgpack.unpackb(self.socket.recv())
        if answered != number:
            raise WrongAnswer(f"answer {answered}, not {number}")
        return result

    def caller(self) -> Call:
        call = self._call
        return lambda payload: call("echo", payload)

    def caster(self) -> Call:
        send, pack = self.socket.send, self.pack
        return lambda payload: send(pack((0, "tick", (payload,))))

    def finish(self) -> tuple[int, int]:
        handled, last = self._call("finish")
        return handled, last


def measure_inflight(client: Plain, size: int, seconds: float, depth: int) -> dict[str, Any]:
    """Keep ``depth`` calls outstanding on one socket; answers come in the order of the calls."""
    pack = client.pack if isinstance(client, Msgpack) else None
    send, receive, unpack = client.socket.send, client.socket.recv, msgpack.unpackb
    payload_of = payload_maker(size)
    cpu = cpu_seconds()
    begin = now = time.perf_counter_ns()
    end = begin + int(seconds * 1e9)
    outstanding: collections.deque[tuple[int, bytes]] = collections.deque()
    number = 0
    while outstanding or now < end:
        while len(outstanding) < depth and now < end:
            number += 1
            payload = payload_of(number)
            send(pack((number, "echo", (payload,))) if pack else payload)
            outstanding.append((number, payload))
        expected, payload = outstanding.popleft()
        if pack:
            answered, answer = unpack(receive())
        else:
            answered, answer = expected, receive()
        if answered != expected or not same(answer, payload):
            raise WrongAnswer(f"call {expected} was answered {answered}: {answer[:32]!r}")
        if not number & 15:
            now = time.perf_counter_ns()
    return inflight_figures(number, time.perf_counter_ns() - begin, cpu_seconds() - cpu)


SERVERS = {"plain": serve_plain, "frames": serve_frames, "msgpack": serve_msgpack}
CLIENTS: dict[str, type[Plain]] = {"plain": Plain, "frames": Frames, "msgpack": Msgpack}


def run_client(form: str, *endpoints: str) -> None:
    """Connect, and run the tasks that the input names."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    make = CLIENTS[form]
    endpoint = endpoints[0]
    client = make(context, endpoint)

    def threads(size: int, seconds: float, count: int) -> dict[str, Any]:
        return measure_threads(lambda: make(context, endpoint).call, size, count, seconds=seconds)

    tasks: dict[str, Task] = {
        "inflight": lambda size, seconds, depth: measure_inflight(client, size, seconds, depth),
        "threads": threads,
        **connection_tasks(client, lambda endpoint: make(context, endpoint), endpoints),
    }
    versions = {"pyzmq": zmq.__version__, "libzmq": zmq.zmq_version()}
    say(versions=versions | ({"msgpack": ".".join(map(str, msgpack.version))} if form == "msgpack" else {}))
    obey(tasks)


def run_server(form: str, endpoint: str) -> None:
    """Bind, say where, and serve until the input ends."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.bind(endpoint)
    say(endpoint=router.getsockopt_string(zmq.LAST_ENDPOINT))
    obey_beside()
    SERVERS[form](router)


def main() -> None:
    role, form, *endpoints = sys.argv[1:]
    die_with_parent()
    {"server": run_server, "client": run_client}[role](form, *endpoints)
    leave()


if __name__ == "__main__":
    main()
