"""Who gets the next call, and what happens when somebody is not there."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from zmqcore import Client, Node, NoSuchTopic, PeerLost, Server, Unreachable

Until = Callable[..., None]
Running = Callable[..., Any]


@pytest.fixture
def three(peers: Callable[..., Any], node: Node, until: Until) -> Client:
    """A client that sees three servers."""
    for name in ("a", "b", "c"):
        peers("t", name)
    client = Client("t", node=node, timeout=30.0)
    until(lambda: len(client.members()) == 3)
    return client


def test_strict_round_robin(three: Client) -> None:
    names = [three.call("who") for _ in range(30)]
    assert set(names[:3]) == {"a", "b", "c"}
    assert names == names[:3] * 10


def test_casts_go_round_too(three: Client, until: Until) -> None:
    for _ in range(30):
        three.cast("count", "x")
    for name in ("a", "b", "c"):
        one = three.prepare(server=name)
        until(lambda one=one: one.call("counted", "x") == 10)


def test_submitted_calls_are_spread_evenly(three: Client) -> None:
    futures = [three.submit("sleep", 0.05) for _ in range(30)]
    assert Counter(future.result() for future in futures) == {"a": 10, "b": 10, "c": 10}


def test_preparing_for_each_call_goes_round_all_the_same(three: Client) -> None:
    """``client.prepare(timeout=...).call(...)`` is how it is used: a fresh variation every time."""
    variations = (three.prepare(timeout=20.0 + n, discovery_timeout=1.0 + n) for n in range(30))
    names = Counter(client.call("who") for client in variations)
    assert names == {"a": 10, "b": 10, "c": 10}


@pytest.mark.usefixtures("three")
def test_clients_in_turn_do_not_all_begin_with_the_same_server(node: Node) -> None:
    """Many short-lived clients, as a command line is: no server may get all of their first calls."""
    names = set()
    for _ in range(40):
        with Client("t", node=node, timeout=30.0) as client:
            names.add(client.call("who"))
    assert len(names) > 1


def test_least_outstanding_calls_come_first(
    serve: Callable[..., Server], connect: Callable[..., Client], until: Until
) -> None:
    gate = threading.Event()
    for name in ("a", "b"):
        serve("t", {"block": lambda: gate.wait(30.0), "who": lambda name=name: name}, server=name, workers=4)
    client = connect("t")
    until(lambda: len(client.members()) == 2)
    first = client.submit("block")
    (busy,) = (target.member.server for target in client._route._balancer._targets if target.outstanding)
    idle = {"a": "b", "b": "a"}[busy]
    assert [client.call("who") for _ in range(6)] == [idle] * 6
    second = client.submit("block")
    assert [target.outstanding for target in client._route._balancer._targets] == [1, 1]
    both = [client.call("who") for _ in range(6)]
    assert sorted(both[:2]) == ["a", "b"]
    assert both == both[:2] * 3
    gate.set()
    assert first.result()
    assert second.result()
    assert [target.outstanding for target in client._route._balancer._targets] == [0, 0]


@pytest.mark.parametrize("bind", [None, "tcp://127.0.0.1:*"], ids=["ipc", "tcp"])
def test_a_killed_server_is_left_out(
    peers: Callable[..., Any], node: Node, until: Until, bind: str | None
) -> None:
    options = {} if bind is None else {"bind": bind}
    victim, survivor = (peers("t", name, **options) for name in ("victim", "survivor"))
    client = Client("t", node=node, timeout=30.0)
    until(lambda: len(client.members()) == 2)
    assert {client.call("who") for _ in range(4)} == {"victim", "survivor"}
    victim.kill()
    lost = 0
    for _ in range(100):
        try:
            assert client.call("who") == "survivor"
        except PeerLost:
            lost += 1  # sent before the connection was seen to break
    assert lost <= 1
    until(lambda: [member.pid for member in client.members()] == [survivor.pid])
    for _ in range(20):
        assert client.call("who") == "survivor"


def test_a_kill_fails_what_that_server_had_and_nothing_else(
    peers: Callable[..., Any], node: Node, until: Until
) -> None:
    victim, _ = (peers("t", name, workers=16) for name in ("victim", "survivor"))
    client = Client("t", node=node, timeout=30.0)
    until(lambda: len(client.members()) == 2)
    futures = [client.submit("sleep", 1.0) for _ in range(20)]
    for name in ("victim", "survivor"):
        assert client.prepare(server=name).call("echo", 1) == 1, "it has taken what came before"
    victim.kill()
    outcomes = Counter(
        type(error).__name__ if (error := future.exception()) else future.result() for future in futures
    )
    assert outcomes == {"PeerLost": 10, "survivor": 10}


def test_a_server_that_refuses_connections_is_passed_over(
    peers: Callable[..., Any], node: Node, free_port: int
) -> None:
    peer = peers("t", "alive", bind="tcp://127.0.0.1:*")
    client = Client("t", node=node, timeout=30.0, connect=[f"tcp://127.0.0.1:{free_port}", *peer.endpoints])
    for _ in range(20):
        assert client.call("who") == "alive"
        client.cast("count", "x")
        assert client.submit("who").result() == "alive"


def test_the_client_may_be_first(
    peers: Callable[..., Any], node: Node, running: Running, until: Until
) -> None:
    client = Client("t", node=node, timeout=30.0, discovery_timeout=30.0)
    waiting = running(client.call, "who")
    casting = running(client.cast, "count", "x")
    until(lambda: client._route._watch is not None)
    peers("t", "late")
    assert waiting.result() == "late"
    casting.result()


def test_the_client_may_be_first_at_a_fixed_endpoint(
    peers: Callable[..., Any], make_node: Callable[..., Node], free_port: int, running: Running, until: Until
) -> None:
    endpoint = f"tcp://127.0.0.1:{free_port}"
    client = Client("t", node=make_node(connect_timeout=30.0), timeout=30.0, connect=endpoint)
    waiting = running(client.call, "who")
    until(lambda: client._node.pool.stats()["connecting"] == 1)
    peers("t", "late", bind=endpoint)
    assert waiting.result() == "late"


def test_a_topic_whose_servers_have_all_gone(peers: Callable[..., Any], node: Node, until: Until) -> None:
    peer = peers("t")
    client = Client("t", node=node, timeout=30.0, discovery_timeout=0.2)
    assert client.call("echo", 1) == 1
    assert peer.ask("stop", True, 10.0) is True
    until(lambda: client.members() == ())
    with pytest.raises(NoSuchTopic):
        client.call("echo", 1)


def test_a_server_is_found_again_on_another_port(peers: Callable[..., Any], node: Node, until: Until) -> None:
    client = Client("t", node=node, timeout=30.0, discovery_timeout=30.0)
    seen = set()
    for _ in range(3):
        peer = peers("t", "same", bind="tcp://127.0.0.1:*")
        seen.update(peer.endpoints)
        until(lambda peer=peer: [member.pid for member in client.members()] == [peer.pid])
        assert client.call("pid") == peer.pid
        peer.kill()
    assert len(seen) == 3


def test_a_server_is_found_again_on_the_same_port(
    peers: Callable[..., Any], node: Node, free_port: int
) -> None:
    endpoint = f"tcp://127.0.0.1:{free_port}"
    client = Client("t", node=node, timeout=30.0, connect=endpoint)
    for _ in range(3):
        peer = peers("t", bind=endpoint)
        for attempt in range(2):
            try:
                assert client.call("pid") == peer.pid
                break
            except (PeerLost, Unreachable):
                assert attempt == 0, "once the broken connection has been noticed all is well"
        peer.kill()


def test_a_new_server_gets_its_share(peers: Callable[..., Any], node: Node, until: Until) -> None:
    peers("t", "a")
    client = Client("t", node=node, timeout=30.0)
    assert client.call("who") == "a"
    peers("t", "b")
    until(lambda: len(client.members()) == 2)
    assert Counter(client.call("who") for _ in range(20)) == {"a": 10, "b": 10}


def test_a_stopped_server_costs_others_nothing(peers: Callable[..., Any], node: Node, until: Until) -> None:
    """Its calls are outstanding, so the next ones go to the other server."""
    frozen, _ = (peers("t", name) for name in ("frozen", "alive"))
    client = Client("t", node=node, timeout=30.0)
    until(lambda: len(client.members()) == 2)
    assert {client.call("who") for _ in range(2)} == {"frozen", "alive"}
    frozen.freeze()
    held = [client.submit("who") for _ in range(2)]
    until(lambda: any(future.done() for future in held))
    assert [client.call("who") for _ in range(20)] == ["alive"] * 20
    frozen.thaw()
    assert sorted(future.result() for future in held) == ["alive", "frozen"]


def test_membership_changes_under_load(
    serve: Callable[..., Server], connect: Callable[..., Client], running: Running, until: Until
) -> None:
    """Servers come and go cleanly while 6 threads call: no call may fail, and no count may be off at the end."""
    servers = [serve("t", {"work": lambda n: n}) for _ in range(2)]
    client = connect("t")
    until(lambda: len(client.members()) == 2)
    stop = threading.Event()

    def work() -> int:
        count = 0
        while not stop.is_set():
            assert client.call("work", count) == count
            count += 1
        return count

    threads = [running(work) for _ in range(6)]
    for _ in range(6):
        servers.append(serve("t", {"work": lambda n: n}))
        until(lambda: servers[-1].stats()["handled"] > 10)
        assert servers.pop(0).stop() is True
    stop.set()
    assert all(thread.result() > 0 for thread in threads)
    assert client._route._balancer._outstanding == 0
    assert {target.outstanding for target in client._route._balancer._targets} == {0}
