"""After an error nothing holds the message: it is freed when the caller lets go of the error, not by a collection."""

from __future__ import annotations

import array
import asyncio
import gc
import weakref
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from waiting_support import eventually, until

from zmqcore import AsyncClient, BadArguments, Client, Node, Overloaded, Unreachable, ZmqcoreError

Peers = Callable[..., Any]
Operate = Callable[[Client, Any], Any]
OperateAsync = Callable[[AsyncClient, Any], Awaitable[Any]]

REFUSED: dict[str, Operate] = {
    "call": lambda client, message: client.call("echo", message, message),
    "submit": lambda client, message: client.submit("echo", message, message).result(),
    "gather": lambda client, message: client.gather("echo", message, message).errors,
}
REFUSED_ASYNC: dict[str, OperateAsync] = {
    "call": lambda client, message: client.call("echo", message, message),
    "gather": lambda client, message: errors_of(client.gather("echo", message, message)),
}
UNREACHABLE: dict[str, Operate] = {
    "call": lambda client, message: client.call("echo", message),
    "cast": lambda client, message: client.cast("echo", message),
    "submit": lambda client, message: client.submit("echo", message).result(),
    "fanout": lambda client, message: client.fanout("echo", message).failed,
    "gather": lambda client, message: client.gather("echo", message).missing,
}
UNREACHABLE_ASYNC: dict[str, OperateAsync] = {
    "call": lambda client, message: client.call("echo", message),
    "cast": lambda client, message: client.cast("echo", message),
}


@pytest.fixture(autouse=True)
def _no_collection() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


async def errors_of(gathered: Awaitable[Any]) -> Any:
    return (await gathered).errors


def made() -> tuple[array.array[int], weakref.ref[Any]]:
    """A message, and a reference that tells whether it is still there."""
    message = array.array("q", range(10))  # copied: what is not copied libzmq holds for a moment longer
    return message, weakref.ref(message)


def failed(operate: Operate, client: Client) -> type[Exception]:
    """Return how ``operate`` has failed, once its message has gone."""
    message, left = made()
    try:
        kind = type(next(iter(operate(client, message).values())))
    except ZmqcoreError as exc:
        kind = type(exc)
    del message
    until(lambda: left() is None)  # a thread that has tried to connect may hold it for a moment
    return kind


async def failed_async(operate: OperateAsync, client: AsyncClient) -> type[Exception]:
    message, left = made()
    try:
        kind = type(next(iter((await operate(client, message)).values())))
    except ZmqcoreError as exc:
        kind = type(exc)
    del message
    await eventually(lambda: left() is None)
    return kind


@pytest.mark.parametrize("how", REFUSED)
def test_what_a_server_has_refused(how: str, peers: Peers, node: Node) -> None:
    client = Client("t", node=node, connect=peers("t").endpoints[0])
    assert failed(REFUSED[how], client) is BadArguments


@pytest.mark.parametrize("how", REFUSED_ASYNC)
def test_what_a_server_has_refused_to_a_coroutine(how: str, peers: Peers, node: Node) -> None:
    endpoint = peers("t").endpoints[0]

    async def main() -> None:
        async with AsyncClient("t", node=node, connect=endpoint) as client:
            assert await failed_async(REFUSED_ASYNC[how], client) is BadArguments

    asyncio.run(main())


@pytest.mark.parametrize("how", UNREACHABLE)
def test_what_could_not_be_sent(how: str, free_port: int, make_node: Callable[..., Node]) -> None:
    """It is tried in several rounds, until the time for that is over."""
    node = make_node(connect_timeout=0.2)
    client = Client("t", node=node, connect=f"tcp://127.0.0.1:{free_port}", timeout=5.0)
    assert failed(UNREACHABLE[how], client) is Unreachable


@pytest.mark.parametrize("how", UNREACHABLE_ASYNC)
def test_what_a_coroutine_could_not_send(how: str, free_port: int, make_node: Callable[..., Node]) -> None:
    node = make_node(connect_timeout=0.2)

    async def main() -> None:
        async with AsyncClient("t", node=node, connect=f"tcp://127.0.0.1:{free_port}") as client:
            assert await failed_async(UNREACHABLE_ASYNC[how], client) is Unreachable

    asyncio.run(main())


def test_what_had_no_room(peers: Peers, make_node: Callable[..., Node]) -> None:
    peer = peers("t")
    node = make_node(liveness=600.0, window_messages=1)
    client = Client("t", node=node, connect=peer.endpoints[0], timeout=0.1)
    client.prepare(timeout=30.0).call("echo")
    peer.freeze()
    client.cast("echo")
    for operate in UNREACHABLE["call"], UNREACHABLE["cast"], UNREACHABLE["gather"]:
        assert failed(operate, client) is Overloaded


def test_what_went_through_after_a_member_had_failed(peers: Peers, node: Node, free_port: int) -> None:
    """The failure of the first one is not kept beyond the operation, nor by it."""
    endpoints = [f"tcp://127.0.0.1:{free_port}", peers("t").endpoints[0]]
    client = Client("t", node=node, connect=endpoints, timeout=30.0)
    for _ in range(4):
        message, left = made()
        assert len(client.call("echo", message)) == len(message)
        del message
        assert left() is None


@pytest.fixture(params=[30.0, 0.001])
def hedged(request: pytest.FixtureRequest, make_node: Callable[..., Node]) -> Callable[..., Client]:
    """``hedged(*endpoints)`` makes a client of hedged calls."""
    node = make_node(connect_timeout=0.2)
    return lambda *endpoints: Client(
        "t", node=node, connect=endpoints, timeout=30.0, idempotent=True, hedge_after=request.param
    )


def test_what_both_servers_of_a_hedged_call_have_refused(hedged: Callable[..., Client], peers: Peers) -> None:
    client = hedged(*(peers("t", name).endpoints[0] for name in "ab"))
    for _ in range(6):  # the first ones by threads, which connect
        assert failed(REFUSED["call"], client) is BadArguments


def test_what_a_hedged_call_could_not_send(hedged: Callable[..., Client], free_port: int) -> None:
    client = hedged(f"tcp://127.0.0.1:{free_port}", "ipc:///nobody/is/there")
    assert failed(UNREACHABLE["call"], client) is Unreachable


def test_what_was_sent_to_both_members(hedged: Callable[..., Client], peers: Peers) -> None:
    client = hedged(*(peers("t", name, workers=2).endpoints[0] for name in "ab"))
    for _ in range(10):
        message, left = made()
        assert len(client.call("echo", message)) == len(message)
        del message
        until(lambda left=left: left() is None)
