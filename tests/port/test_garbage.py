"""Bytes of any sort are counted and dropped, and the port goes on serving."""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any

import pytest
import zmq

from zmqcore._channel import Channel
from zmqcore._frame import KINDS, pack
from zmqcore._port import Port

LIMIT = 30.0

GOOD = pack("cast", id=1, topic=b"t", method="m", body=b"body")[0]


def changed(offset: int, value: bytes) -> bytes:
    return GOOD[:offset] + value + GOOD[offset + len(value) :]


#: Multipart messages, as a DEALER sends them, none of which is a request.
GARBAGE: dict[str, list[bytes]] = {
    "nothing": [b""],
    "two delimiters": [b"", b""],
    "many delimiters": [b""] * 20,
    "delimiters before the envelope": [b"", b"", GOOD],
    "text": [b"GET / HTTP/1.1\r\n\r\n"],
    "39 bytes": [GOOD[:39]],
    "one byte short": [GOOD[:-1]],
    "one byte too many": [GOOD + b"\0"],
    "wrong magic": [changed(0, b"cz")],
    "version 0": [changed(2, b"\0")],
    "version 2": [changed(2, b"\2")],
    "version 255": [changed(2, b"\xff")],
    "kind 0": [changed(3, b"\0")],
    "kind 12": [changed(3, b"\x0c")],
    "a reply": pack("reply", id=1),
    "an error": pack("error", id=1),
    "a pong": pack("pong", id=1),
    "huge topic": [changed(28, b"\xff\xff")],
    "huge method": [changed(30, b"\xff\xff")],
    "huge metadata": [changed(32, b"\xff" * 4)],
    "huge body": [changed(36, b"\xff" * 4)],
    "lengths that overflow 32 bits": [changed(32, b"\xff" * 8)],
    "buffers that do not come": [changed(6, b"\x05\0")],
    "65535 buffers that do not come": [changed(6, b"\xff\xff"), b"1"],
    "a surplus part": [GOOD, b"surplus"],
    "many surplus parts": [GOOD] * 500,
    "ones": [b"\xff" * 1000],
    "parts of nothing": [os.urandom(50), b"", os.urandom(50), b""],
}


@pytest.fixture
def served(port: Port, serve: Callable[..., Any]) -> Port:
    serve(port)
    return port


def still_serves(port: Port, bare: Callable[..., Any]) -> None:
    client = bare(port.endpoints[0])
    client.send("call", body=b"still there?")
    assert bytes(client.receive_kind("reply").body) == b"still there?"


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_is_counted_and_dropped(
    served: Port, bare: Callable[..., Any], name: str, until: Callable[..., None]
) -> None:
    client = bare(served.endpoints[0])
    client.socket.send_multipart(GARBAGE[name])
    until(lambda: served.stats()["garbage"] + served.stats()["too_large"] == 1, "counted")
    # The same connection goes on, too.
    client.send("call", flow=False, body=b"x")
    assert bytes(client.receive_kind("reply").body) == b"x"
    still_serves(served, bare)
    assert served.stats()["garbage"] + served.stats()["too_large"] == 1


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_control_messages_that_make_no_sense_harm_nobody(
    served: Port, bare: Callable[..., Any], kind: str
) -> None:
    client = bare(served.endpoints[0])
    for number in (0, 1, 2**64 - 1, 5, 2**63):
        client.socket.send_multipart(pack(kind, id=number, ack=number, flags=0xFF, body=b"?"))
        client.socket.send_multipart(pack(kind, id=number, flags=0, remaining_ms=0))
    still_serves(served, bare)


def test_random_changes_of_good_messages(served: Port, bare: Callable[..., Any]) -> None:
    chance = random.Random(4711)
    good = [
        pack(kind, id=3, topic=b"topic", method="m", body=b"b" * 50, buffers=[b"x"] * 2) for kind in KINDS
    ]
    clients = [bare(served.endpoints[0]) for _ in range(3)]
    for _ in range(3000):
        parts = [bytearray(part) for part in chance.choice(good)]
        for _ in range(chance.randrange(4)):
            part = chance.choice(parts)
            if part:
                part[chance.randrange(len(part))] = chance.randrange(256)
        if chance.random() < 0.2:
            del parts[chance.randrange(len(parts))]
        if chance.random() < 0.2:
            parts.insert(0, bytearray())
        if parts:
            chance.choice(clients).socket.send_multipart([bytes(part) for part in parts])
    still_serves(served, bare)
    assert served.stats()["garbage"] > 100


SIGNATURE = b"\xff" + bytes(8) + b"\x7f"
GREETING = SIGNATURE + b"\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)

RAW: dict[str, bytes] = {
    "nothing at all": b"",
    "one byte": b"\x01",
    "HTTP": b"GET / HTTP/1.0\r\nHost: x\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),
    "zeros": bytes(4096),
    "ones": b"\xff" * 4096,
    "half a greeting": GREETING[:40],
    "a greeting, then garbage": GREETING + os.urandom(2000),
    "another mechanism": SIGNATURE + b"\x03\x00" + b"CURVE".ljust(20, b"\0") + bytes(32),
    "a mechanism that does not exist": SIGNATURE + b"\x03\x00" + b"\xff" * 20 + bytes(32),
    "a command of 2**63 bytes": GREETING + b"\x06" + struct.pack(">Q", 2**63),
    "a frame of 2**62 bytes": GREETING + b"\x04\x05READY" + b"\x02" + struct.pack(">Q", 2**62),
    "READY twice": GREETING + b"\x04\x06\x05READY" * 2,
    "ZMTP 1.0, our bytes": b"\x01\x00" + bytes([len(GOOD) + 1]) + b"\x00" + GOOD,
    "ZMTP 1.0, garbage": b"\x01\x00" + b"\x05\x00abcd" * 50,
    "ZMTP 1.0, many parts": b"\x01\x00" + b"\x02\x01x" * 500 + b"\x02\x00x",
}


def raw(port: Port) -> socket.socket:
    host, _, number = port.endpoints[0].removeprefix("tcp://").rpartition(":")
    return socket.create_connection((host, int(number)), LIMIT)


@pytest.mark.parametrize("name", RAW)
def test_raw_garbage_on_the_tcp_port(served: Port, bare: Callable[..., Any], name: str) -> None:
    with raw(served) as one, raw(served) as two:
        one.sendall(RAW[name])
        still_serves(served, bare)  # with the connection open
        two.sendall(RAW[name])
        two.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
        two.close()
        still_serves(served, bare)
    still_serves(served, bare)


def test_much_raw_garbage_beside_real_work(served: Port, context: zmq.Context[zmq.Socket[bytes]]) -> None:
    chance = random.Random(99)
    over = threading.Event()

    def pour() -> None:
        while not over.is_set():
            try:
                with raw(served) as connection:
                    start = chance.choice([b"", SIGNATURE, GREETING, b"\x01\x00"])
                    connection.sendall(start + chance.randbytes(chance.randrange(200)))
            except ConnectionError:  # the port closes it first
                continue

    channel = Channel(context, served.endpoints[0])
    assert channel.wait_open(LIMIT)
    thread = threading.Thread(target=pour, daemon=True)
    thread.start()
    for number in range(2000):
        body = b"%d" % number
        assert bytes(channel.call(b"t", "m", body, None, b"", 1, LIMIT).body) == body
    over.set()
    thread.join(LIMIT)
    assert channel.stats()["garbage"] == 0
    channel.close()


def test_a_peer_that_stops_in_the_middle_holds_nobody_up(served: Port, bare: Callable[..., Any]) -> None:
    client = bare(served.endpoints[0])
    client.socket.send(GOOD, zmq.SNDMORE)  # and never the rest
    with raw(served) as connection:
        connection.sendall(GREETING + b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x06DEA")
        still_serves(served, bare)
    assert served.stats()["casts"] == 0
