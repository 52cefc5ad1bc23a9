"""Options that cannot be are refused where they are given, by an error that names option, value and limit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import pytest

from zmqcore import (
    AsyncClient,
    AsyncServer,
    Client,
    InvalidEndpoint,
    Node,
    Retry,
    Server,
    ServerProcesses,
    options,
)
from zmqcore.matchmaker import Member, open_matchmaker
from zmqcore.topic import Topic

WHOLE = [(TypeError, "4"), (TypeError, 2.5), (TypeError, True), (TypeError, None), (ValueError, -1)]
SECONDS = [(TypeError, "5"), (TypeError, True), (TypeError, [1]), (ValueError, -1), (ValueError, math.nan)]


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with Node("memory://options") as node:
        yield node


async def coroutine(value: int) -> int:
    return value


def make(cls: type, own: Node, **given: Any) -> Any:
    if cls in (Node, Retry):
        return cls(**given)
    if cls is ServerProcesses:
        return ServerProcesses("t", "statistics", **given)
    endpoints = [{"f": coroutine if cls is AsyncServer else abs}] if cls in (Server, AsyncServer) else []
    return cls("t", *endpoints, **{"node": own, **given})


CASES = [
    *((cls, "timeout", *case) for cls in (Client, AsyncClient) for case in [*SECONDS, (ValueError, 0)]),
    *((cls, "discovery_timeout", *case) for cls in (Client, AsyncClient) for case in SECONDS),
    *((Client, "hedge_after", *case) for case in SECONDS),
    *((Client, name, TypeError, "no") for name in ("idempotent", "retry", "node")),
    (Client, "delivery", ValueError, "ack"),
    (Client, "connect", TypeError, 5),
    (Client, "connect", InvalidEndpoint, []),
    (Client, "interceptors", TypeError, 3),
    *((Retry, "attempts", *case) for case in [*WHOLE, (ValueError, 0)]),
    *((Retry, name, *case) for name in ("backoff", "backoff_max") for case in [*SECONDS, (ValueError, math.inf)]),
    *((Retry, "budget", *case) for case in SECONDS),
    *((cls, "workers", *case) for cls in (Server, ServerProcesses) for case in WHOLE),
    *((cls, "max_concurrency", *case) for cls in (AsyncServer, ServerProcesses) for case in [*WHOLE, (ValueError, 0)]),
    *((cls, "queue_size", *case) for cls in (Server, AsyncServer, ServerProcesses) for case in WHOLE),
    *((cls, "on_full", ValueError, "drop") for cls in (Server, AsyncServer, ServerProcesses)),
    *((cls, "lease", *case) for cls in (Server, AsyncServer, ServerProcesses) for case in [*SECONDS, (ValueError, 0)]),
    *((cls, "bind", InvalidEndpoint, []) for cls in (Node, Server, AsyncServer, ServerProcesses)),
    *((cls, "bind", TypeError, 5) for cls in (Node, Server, AsyncServer, ServerProcesses)),
    *((ServerProcesses, "processes", *case) for case in [(TypeError, "4"), (TypeError, 1.5), (ValueError, 0)]),
    *((ServerProcesses, "drain_timeout", *case) for case in SECONDS),
    (ServerProcesses, "log_level", ValueError, "LOUD"),
    (ServerProcesses, "log_level", TypeError, 1.5),
    *((Node, name, *case) for name in ("max_waiting", "max_sockets_per_endpoint") for case in WHOLE),
    *((Node, name, *case) for name in ("window_messages", "window_bytes", "max_sockets") for case in WHOLE[:3]),
    *((Node, name, *case) for name in ("liveness", "spin") for case in SECONDS),
    *(
        (Node, name, *case)
        for name in ("idle_ttl", "max_lifetime", "acquire_timeout", "connect_timeout", "drain_timeout")
        for case in [*SECONDS, (ValueError, 0), (ValueError, math.inf)]
    ),
    *((Node, name, TypeError, 5) for name in ("codec", "limits", "matchmaker", "advertise", "context")),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "name", "error", "value"), CASES)
def test_the_error_names_option_and_value(
    node: Node, cls: type, name: str, error: type[Exception], value: Any
) -> None:
    with pytest.raises(error) as caught:
        make(cls, node, **{name: value}, **({"idempotent": True} if name == "hedge_after" else {}))
    text = str(caught.value)
    assert text.startswith(f"{name} is {'empty' if value == [] else repr(value)}"), text
    assert "must be" in text or "name one" in text


@pytest.mark.parametrize(("value", "limit"), [(0, "at least 1"), (9000, "at most 8,192")])
def test_the_error_names_the_limit(value: int, limit: str) -> None:
    with pytest.raises(ValueError, match=limit):
        Node("memory://options", window_messages=value)


def test_variations_are_checked_as_well(node: Node) -> None:
    client = Client("t", node=node)
    with pytest.raises(TypeError, match="timeout is '5'; it must be a number of seconds, above 0, or None"):
        client.prepare(timeout="5")  # type: ignore[arg-type]
    assert client.prepare(timeout=None).timeout is None
    assert client.prepare(timeout=math.inf).timeout == math.inf


def test_the_matchmakers_own() -> None:
    with pytest.raises(TypeError, match="matchmaker is 5; it must be a URL"):
        open_matchmaker(5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="capacity is '1'; it must be a whole number"):
        Member(Topic("t", "s"), ("tcp://a:1",), "1", "h", 1, capacity="1")  # type: ignore[arg-type]
    with open_matchmaker("memory://options") as matchmaker, pytest.raises(TypeError, match="ttl is 'x'"):
        matchmaker.register(Member(Topic("t", "s"), ("tcp://a:1",), "1", "h", 1), "x")  # type: ignore[arg-type]


def test_numbers_of_other_kinds_will_do() -> None:
    numpy = pytest.importorskip("numpy")
    assert Retry(attempts=numpy.int64(2), backoff=Fraction(1, 4)) == Retry(attempts=2, backoff=0.25)  # type: ignore[arg-type]
    assert type(Retry(attempts=numpy.int64(2)).attempts) is int
    with Node(
        "memory://options",
        window_messages=numpy.int32(7),
        liveness=numpy.float32(3),
        max_sockets=numpy.int8(9),
    ) as own:  # type: ignore[arg-type]
        assert (own.window_messages, own.liveness, own.pool.max_sockets) == (7, 3.0, 9)
        with Server(
            "t",
            {"f": abs},
            node=own,
            workers=numpy.int64(1),
            queue_size=numpy.int64(3),
            lease=numpy.float32(5),
        ):  # type: ignore[arg-type]
            client = Client("t", node=own, timeout=numpy.float32(20), discovery_timeout=numpy.int64(1))  # type: ignore[arg-type]
            assert client.call("f", -3) == 3


CHECKS: list[tuple[Callable[[], Any], str]] = [
    (lambda: options.whole("n", 0, 1), "n is 0; it must be a whole number, at least 1"),
    (lambda: options.whole("n", 9, 1, 8192 // 1024), "n is 9; it must be a whole number, at least 1 and at most 8"),
    (lambda: options.number("n", 2, 0, 1), "n is 2; it must be a number, at least 0 and at most 1"),
    (
        lambda: options.seconds("t", 0, 0.0, 86_400.0, above=True, unless="None"),
        "t is 0; it must be a number of seconds, above 0 and at most 86,400, or None",
    ),
    (lambda: options.choice("c", "x", "a", "b"), "c is 'x'; it must be 'a' or 'b'"),
]  # fmt: skip


@pytest.mark.parametrize(("check", "text"), CHECKS)
def test_what_errors_say(check: Callable[[], Any], text: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole text is compared
        check()
    assert str(caught.value) == text
