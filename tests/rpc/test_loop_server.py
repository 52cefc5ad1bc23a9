"""LoopServer: an AsyncServer with a loop of its own, used like a Server; and when it is what one gets."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from zmqcore import Client, Node, PeerLost, RemoteError, Server, Topic
from zmqcore.rpc.loop_server import LoopServer, server_for

Running = Callable[..., Any]

PATIENCE = 30.0


class Work:
    def __init__(self) -> None:
        self.entered = threading.Event()
        self.released = threading.Event()

    async def wait(self, value: Any = None) -> Any:
        self.entered.set()
        while not self.released.is_set():
            await asyncio.sleep(0.005)
        return value

    def block(self) -> None:
        self.entered.set()
        self.released.wait(PATIENCE)


@pytest.fixture
def work() -> Work:
    return Work()


@pytest.fixture
def server(make_node: Callable[..., Node], registry: str, work: Work) -> LoopServer:
    return LoopServer(Topic("t", "s"), work, make_node(registry))


@pytest.fixture
def client(make_node: Callable[..., Node], registry: str) -> Client:
    return Client("t", node=make_node(registry), timeout=PATIENCE, retry=None)


def test_several_may_stop_it(server: LoopServer, client: Client, work: Work, running: Running) -> None:
    server.start()
    assert (server.topic, server.member.topic) == (Topic("t", "s"), Topic("t", "s"))
    assert server.member.instance == server.instance
    calls = [client.submit("wait", number) for number in range(10)]
    assert work.entered.wait(PATIENCE)
    serving = running(server.serve_forever)
    stopping = [running(server.stop, timeout=PATIENCE) for _ in range(3)]
    stopping[0].thread.join(0.2)
    assert not any(each.ended for each in (*stopping, serving))
    work.released.set()
    assert [each.result() for each in (*stopping, serving)] == [True] * 4
    assert [call.result() for call in calls] == list(range(10))
    assert server.stop() is True


def test_what_takes_too_long_is_cancelled(server: LoopServer, client: Client, work: Work) -> None:
    server.start()
    call = client.submit("wait")
    assert work.entered.wait(PATIENCE)
    assert server.stop(timeout=0.2) is False
    assert isinstance(call.exception(), (RemoteError, PeerLost))


def test_a_blocked_loop_is_given_up(server: LoopServer, client: Client, work: Work) -> None:
    server.start()
    call = client.submit("block")
    assert work.entered.wait(PATIENCE)
    assert server.stop(timeout=0.1) is False
    work.released.set()
    call.exception()
    assert server._over.wait(PATIENCE)


def test_start_raises_what_went_wrong(
    make_node: Callable[..., Node], registry: str, work: Work, free_port: int
) -> None:
    taken = f"tcp://127.0.0.1:{free_port}"
    node = make_node(registry)
    with Server("u", {"x": len}, node=node, bind=taken):
        server = LoopServer(Topic("t"), work, node, bind=taken)
        with pytest.raises(OSError, match=str(free_port)):
            server.start()
        assert server._over.wait(PATIENCE)
        assert server.stop() is True


def test_coroutine_functions_decide(make_node: Callable[..., Node], registry: str, work: Work) -> None:
    def chosen(endpoint: Any) -> type:
        options = {"workers": 1, "max_concurrency": 1}
        return type(server_for(Topic("t"), endpoint, make_node(registry), **options))

    assert chosen(work) is LoopServer
    assert chosen({"plain": len}) is Server
    with pytest.raises(TypeError, match="class"):
        chosen(Work)
