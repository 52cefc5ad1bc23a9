"""What ``zmqcore doctor --endpoint`` looks at: who, if anybody, is at an address.

Layer by layer, and no further than the first one that is wrong: does anything accept a connection, does it speak
ZeroMQ (by its greeting, https://rfc.zeromq.org/spec/23/), will its socket talk to ours, and is it a zmqcore server.
"""

from __future__ import annotations

import socket
import time
from typing import Any, Final

import click
import zmq

from zmqcore import errors
from zmqcore._channel import Channel
from zmqcore.cli.diagnosis import Diagnosis, Problem
from zmqcore.cli.measure import percentile
from zmqcore.endpoint import Endpoint, probe

__all__ = ["examine"]

#: For each layer, in seconds. A handshake on the other side of the world takes well under one.
_PATIENCE: Final = 3.0
#: Enough for a median; over in a moment also where a round trip takes 100 ms.
_PINGS: Final = 20
#: Signature and version 3.1. After that the other side sends the rest of its greeting; to our mechanism, if it does not
#: want that one, it would answer by closing the connection instead.
_GREETING: Final = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x01"
_SIGNATURE_BYTES: Final = 10
_GREETING_BYTES: Final = 64
_MECHANISM: Final = slice(12, 32)
#: More than any port takes: what the channel then says is the port's own limit.
_NO_LIMIT_BYTES: Final = 1 << 62
_NO_LIMIT_BUFFERS: Final = (1 << 31) - 1


class _Wrong(Exception):
    """What is wrong, and what to do about it."""

    def __init__(self, what: str, advice: str) -> None:
        super().__init__(what)
        self.advice = advice


def _connected(where: Endpoint) -> socket.socket:
    if where.transport == "tcp":
        return socket.create_connection((where.host, where.port or 0), _PATIENCE)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(_PATIENCE)
        sock.connect("\0" + where.path[1:] if where.path[0] == "@" else where.path)
    except BaseException:
        sock.close()
        raise
    return sock


def _read_greeting(where: Endpoint) -> tuple[bytes, str]:
    """Begin to greet as a ZeroMQ socket does. Return the greeting that comes back, and how it ended if it is short."""
    got = b""
    deadline = time.monotonic() + _PATIENCE
    try:
        with _connected(where) as sock:
            sock.sendall(_GREETING)
            while len(got) < _GREETING_BYTES:
                sock.settimeout(max(1e-3, deadline - time.monotonic()))
                piece = sock.recv(_GREETING_BYTES - len(got))
                if not piece:
                    return got, "then closed the connection"
                got += piece
    except TimeoutError:
        return got, f"nothing more within {_PATIENCE:g} s"
    except OSError as exc:
        return got, f"then {(exc.strerror or str(exc)).lower()}"
    return got, ""


def _check_accepts(endpoint: str) -> None:
    refusal = probe(endpoint, _PATIENCE)
    if refusal is not None:
        raise _Wrong(
            f"nothing can be reached at {endpoint}: {refusal}",
            "is the server running, and does it listen on this address? A firewall mostly shows as a timeout",
        )


def _check_zeromq(where: Endpoint, facts: dict[str, Any]) -> None:
    got, ended = _read_greeting(where)
    if len(got) < _SIGNATURE_BYTES or got[0] != 0xFF or not got[_SIGNATURE_BYTES - 1] & 1:
        if not got:
            raise _Wrong(
                f"something accepts connections at {where}, but does not greet: it sent nothing, {ended}",
                "its process is stopped or hangs; or another program has this address",
            )
        raise _Wrong(
            f"something listens at {where}, but does not speak ZeroMQ: it sent {got[:24]!r}"
            + (f", {ended}" if ended else ""),
            "another program has this address",
        )
    facts["speaks_zeromq"] = True
    if len(got) == _GREETING_BYTES:
        facts["zmtp"] = f"{got[10]}.{got[11]}"
        mechanism = facts["mechanism"] = got[_MECHANISM].rstrip(b"\0").decode("ascii", "backslashreplace")
        if mechanism != "NULL":
            raise _Wrong(
                f"{where} speaks ZeroMQ, but not zmqcore: it asks for {mechanism}, which zmqcore does not use",
                "this is the address of another ZeroMQ program",
            )


def _check_zmqcore(endpoint: str, facts: dict[str, Any]) -> None:
    with zmq.Context() as context:
        started = time.perf_counter()
        channel = Channel(context, endpoint, max_bytes=_NO_LIMIT_BYTES, max_buffers=_NO_LIMIT_BUFFERS)
        try:
            if not channel.wait_open(_PATIENCE):
                raise _Wrong(
                    f"{endpoint} speaks ZeroMQ, but not zmqcore: its socket does not take a connection of ours",
                    "this is the address of another ZeroMQ program; zmqcore servers have a ROUTER socket",
                )
            facts["handshake_ms"] = round((time.perf_counter() - started) * 1e3, 3)
            try:
                times = [channel.ping(_PATIENCE) * 1e6 for _ in range(_PINGS)]
            except errors.ZmqcoreError as exc:
                garbage = channel.stats()["garbage"]
                why = "what it answers is no message of zmqcore" if garbage else str(exc)
                raise _Wrong(
                    f"{endpoint} speaks ZeroMQ, but not zmqcore: {why}",
                    "this is the address of another ZeroMQ program; or of a server that has been busy with a"
                    " single request all this time, as one with workers=0 can be",
                ) from exc
            if channel.peer_instance is None:
                raise _Wrong(
                    f"{endpoint} answers, but has not said hello as a zmqcore server does",
                    "see that nothing stands between that changes or repeats messages",
                )
            facts["speaks_zmqcore"] = True
            facts["instance"] = channel.peer_instance.hex()
            facts["message_bytes_at_most"], facts["buffers_at_most"] = channel.limits
            facts["pings"] = len(times)
            facts["first_ping_us"] = round(times.pop(0), 1)
            facts["ping_p50_us"] = round(percentile(sorted(times), 0.5), 1)
        finally:
            channel.close()


def examine(endpoint: str) -> Diagnosis:
    """Find out who is at *endpoint*. Takes a few times 3 s at most, plus resolving a name.

    Raises :class:`~zmqcore.errors.InvalidEndpoint` for what is none, and ``click.UsageError`` for ``inproc``.
    """
    where = Endpoint.parse(endpoint)
    if where.transport == "inproc":
        raise click.UsageError(f"{where} can be reached within its own process only")
    facts: dict[str, Any] = {"endpoint": str(where), "accepts": False}
    facts |= {"speaks_zeromq": False, "speaks_zmqcore": False}
    diagnosis = Diagnosis(facts={"endpoint": facts})
    try:
        _check_accepts(str(where))
        facts["accepts"] = True
        _check_zeromq(where, facts)
        _check_zmqcore(str(where), facts)
    except _Wrong as exc:
        diagnosis.problems.append(Problem("broken", "endpoint", str(exc), exc.advice))
    return diagnosis
