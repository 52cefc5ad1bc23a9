"""call, cast, fanout, gather, submit, prepare and connect=, against servers in other processes."""

from __future__ import annotations

import concurrent.futures
import socket
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from zmqcore import (
    Client,
    Closed,
    InvalidEndpoint,
    Node,
    NoSuchMethod,
    NoSuchTopic,
    RemoteError,
    Server,
    Unreachable,
)

Peers = Callable[..., Any]
Until = Callable[..., None]


def test_call_returns_the_result_across_processes(peers: Peers, node: Node) -> None:
    peer = peers("t")
    with Client("t", node=node, timeout=30.0) as client:
        assert client.call("add", 2, b=40) == 42
        assert client.call("add", 41) == 42
        assert client.call("pid") == peer.pid
        assert client.call("echo") is None


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_every_number_of_workers_serves_calls_and_casts(
    peers: Peers, node: Node, workers: int, until: Until
) -> None:
    peers("t", workers=workers)
    with Client("t", node=node, timeout=30.0) as client:
        assert [client.call("echo", number) for number in range(100)] == list(range(100))
        for _ in range(100):
            client.cast("count", "casts")
        until(lambda: client.call("counted", "casts") == 100)


def test_the_local_matchmaker_gives_ipc_to_the_same_host(peers: Peers, node: Node) -> None:
    peers("t")
    with Client("t", node=node, timeout=30.0) as client:
        client.call("echo")
    (endpoint,) = node.stats()["channels"]
    assert endpoint.startswith("ipc://")


def test_a_method_name_may_be_anything(serve: Callable[..., Server], connect: Callable[..., Client]) -> None:
    serve("t", {"": lambda: "empty", "naïve.x/y @": lambda: "odd", "method": lambda method: method})
    client = connect("t")
    assert client.call("") == "empty"
    assert client.call("naïve.x/y @") == "odd"
    assert client.call("method", method="self, method and the like are no names of ours") != ""


def test_objects_modules_and_mappings_are_endpoints(
    serve: Callable[..., Server], connect: Callable[..., Client]
) -> None:
    class First:
        limit = 7

        def both(self) -> str:
            return "first"

        def _hidden(self) -> str:
            return "hidden"

        @property
        def never(self) -> int:
            raise AssertionError("a property was read")

    class Second:
        def both(self) -> str:
            return "second"

        def own(self) -> str:
            return "own"

    serve("t", First(), Second(), {"mapped": len}, socket)
    client = connect("t")
    assert client.call("both") == "first"
    assert client.call("own") == "own"
    assert client.call("mapped", [1, 2]) == 2
    assert client.call("htons", 1) == socket.htons(1)
    for name in ("_hidden", "never", "limit", "__class__", "__init__", "socket"):
        with pytest.raises(NoSuchMethod, match=name):
            client.call(name)


def test_what_has_nothing_to_serve_is_refused() -> None:
    class Empty:
        pass

    async def coroutine() -> None: ...

    with Node("memory://refused") as node:
        for endpoint in (Empty(), Empty, {"x": 3}, {"x": coroutine}, {}):
            with pytest.raises(TypeError):
                Server("t", endpoint, node=node)
        with pytest.raises(TypeError, match="nothing to serve"):
            Server("t", node=node)
        with pytest.raises(ValueError, match="-1"):
            Server("t", {"x": len}, node=node, workers=-1)
        with pytest.raises(ValueError, match="0"):
            Server("t", {"x": len}, node=node, queue_size=0)


def test_the_built_in_methods(peers: Peers, node: Node) -> None:
    peer = peers("t", "one")
    with Client("t", node=node, timeout=30.0) as client:
        ping = client.call("zmqcore.ping")
        assert (ping["server"], ping["pid"]) == ("one", peer.pid)
        assert ping["uptime"] >= 0
        assert client.members()[0].instance == ping["instance"]
        assert client.call("zmqcore.methods")["add"] == "(a: 'int', b: 'int' = 1) -> 'int'"
        stats = client.call("zmqcore.stats")
        assert stats["handled"] == 2
        assert stats["endpoints"] == peer.endpoints


def test_cast_returns_nothing_and_is_run_once(peers: Peers, node: Node, until: Until) -> None:
    peers("t", workers=1)
    with Client("t", node=node, timeout=30.0) as client:
        assert client.cast("count", "x") is None
        client.cast("count", key="x", seconds=0.0)
        until(lambda: client.call("counted", "x") == 2)


def test_a_cast_that_fails_tells_nobody(peers: Peers, node: Node, until: Until) -> None:
    peer = peers("t")
    with Client("t", node=node, timeout=30.0) as client:
        client.cast("nonsense")
        client.cast("add", "a", "b", "c", "d")
        client.cast("add", "a")
        until(lambda: (stats := peer.ask("stats"))["refused"] == 2 and stats["failed"] == 1)
        assert client.call("add", 1) == 2


def test_fanout_reaches_every_member_once(peers: Peers, node: Node, until: Until) -> None:
    servers = [peers("t", name) for name in ("a", "b", "c")]
    with Client("t", node=node, timeout=30.0) as client:
        until(lambda: len(client.members()) == 3)
        told = client.fanout("count", "x")
        assert {member.server for member in told.sent} == {"a", "b", "c"}
        assert {member.pid for member in told.sent} == {peer.pid for peer in servers}
        assert not told.failed
        assert told.epoch > 0
        for name in ("a", "b", "c"):
            one = client.prepare(server=name)
            until(lambda one=one: one.call("counted", "x") == 1)


def test_fanout_says_whom_it_did_not_reach(peers: Peers, node: Node, free_port: int) -> None:
    peer = peers("t", bind="tcp://127.0.0.1:*")
    dead = f"tcp://127.0.0.1:{free_port}"
    with Client("t", node=node, timeout=30.0, connect=[dead, *peer.endpoints]) as client:
        told = client.fanout("count", "x")
        assert [member.endpoints for member in told.sent] == [tuple(peer.endpoints)]
        ((member, error),) = told.failed.items()
        assert member.endpoints == (dead,)
        assert isinstance(error, Unreachable)


def test_gather_returns_each_ones_result(peers: Peers, node: Node, until: Until) -> None:
    servers = {peers("t", name).pid: name for name in ("a", "b", "c")}
    with Client("t", node=node, timeout=30.0) as client:
        until(lambda: len(client.members()) == 3)
        gathered = client.gather("who")
        assert {member.pid: result for member, result in gathered.results.items()} == servers
        assert gathered.complete
        assert gathered.epoch > 0
    assert node.stats()["pool"]["in_use"] == 0


def test_gather_tells_results_errors_and_missing_apart(
    serve: Callable[..., Server], connect: Callable[..., Client], blackhole: str, free_port: int
) -> None:
    gate = threading.Event()

    def fail() -> None:
        raise OSError("broken")

    good = serve("t", {"work": lambda: "good", "x": len}, bind="tcp://127.0.0.1:*")
    raising = serve("t", {"work": fail}, bind="tcp://127.0.0.1:*")
    without = serve("t", {"other": len}, bind="tcp://127.0.0.1:*")
    slow = serve("t", {"work": lambda: gate.wait(30)}, bind="tcp://127.0.0.1:*")
    dead = f"tcp://127.0.0.1:{free_port}"
    everybody = [server.endpoints[0] for server in (good, raising, without, slow)]
    client = connect("t", connect=[*everybody, dead, blackhole], timeout=4.0)
    try:
        gathered = client.gather("work")
    finally:
        gate.set()

    def by_endpoint(table: dict[Any, Any]) -> dict[str, Any]:
        return {member.endpoints[0]: value for member, value in table.items()}

    assert by_endpoint(gathered.results) == {good.endpoints[0]: "good"}
    errors = by_endpoint(gathered.errors)
    assert set(errors) == {raising.endpoints[0], without.endpoints[0]}
    assert isinstance(errors[raising.endpoints[0]], RemoteError)
    assert isinstance(errors[without.endpoints[0]], NoSuchMethod)
    missing = by_endpoint(gathered.missing)
    assert set(missing) == {slow.endpoints[0], dead, blackhole}
    assert isinstance(missing[slow.endpoints[0]], TimeoutError)
    assert isinstance(missing[dead], Unreachable)
    assert not gathered.complete
    assert client._node.stats()["pool"]["in_use"] == 0


@pytest.mark.parametrize("operation", ["fanout", "gather"])
def test_one_member_that_does_not_answer_costs_the_others_nothing(
    serve: Callable[..., Server], connect: Callable[..., Client], blackhole: str, operation: str
) -> None:
    """The blackhole comes first, and takes as long to give up as there is time."""
    server = serve("t", {"work": lambda: None}, bind=["tcp://127.0.0.1:*"] * 8)
    client = connect("t", connect=[blackhole, *server.endpoints], timeout=1.0)
    outcome = getattr(client, operation)("work")
    reached = outcome.sent if operation == "fanout" else outcome.results
    assert {member.endpoints[0] for member in reached} == set(server.endpoints)


@pytest.mark.parametrize("operation", ["call", "cast", "fanout", "gather", "submit"])
def test_a_topic_that_nobody_serves(node: Node, operation: str) -> None:
    with Client("nobody", node=node, timeout=5.0, discovery_timeout=0.05) as client:
        assert client.members() == ()
        with pytest.raises(NoSuchTopic, match="nobody") as caught:
            getattr(client, operation)("work")
        assert isinstance(caught.value, LookupError)


def test_submit_runs_calls_at_once(peers: Peers, node: Node) -> None:
    peers("t")
    with Client("t", node=node, timeout=30.0) as client:
        futures = [client.submit("echo", number) for number in range(200)]
        assert [future.result() for future in futures] == list(range(200))
        failing = client.submit("add", "x")
        assert isinstance(failing.exception(), RemoteError)
    assert node.stats()["pool"]["in_use"] == 0


def test_connect_needs_no_matchmaker(peers: Peers, make_node: Callable[..., Node], registry: str) -> None:
    one, two = (peers("t", bind="tcp://127.0.0.1:*", server=name) for name in ("one", "two"))
    with Client("t", node=make_node(registry), timeout=30.0, connect=one.endpoints[0]) as client:
        assert {client.call("who") for _ in range(10)} == {"one"}
        assert [member.endpoints for member in client.members()] == [tuple(one.endpoints)]
    both = [*one.endpoints, *two.endpoints]
    with Client("t", node=make_node(registry), timeout=30.0, connect=both) as client:
        assert Counter(client.call("who") for _ in range(10)) == {"one": 5, "two": 5}
        assert sorted(client.gather("who").results.values()) == ["one", "two"]
        assert client.prepare(timeout=20.0).call("who") in {"one", "two"}


@pytest.mark.parametrize(
    "connect", [[], "", "nonsense", "udp://h:1", "tcp://127.0.0.1", ["tcp://127.0.0.1:99999"], "tcp://*:5555"]
)
def test_endpoints_that_are_none_are_refused(node: Node, connect: Any) -> None:
    with pytest.raises(InvalidEndpoint):
        Client("t", node=node, connect=connect)


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
def test_a_timeout_that_is_none_is_refused(node: Node, timeout: float) -> None:
    with pytest.raises(ValueError, match="timeout"):
        Client("t", node=node, timeout=timeout)
    with pytest.raises(ValueError, match="timeout"):
        Client("t", node=node).prepare(timeout=timeout)


def test_a_delivery_that_does_not_exist_is_refused(node: Node) -> None:
    with pytest.raises(ValueError, match="'sent' or 'accepted'"):
        Client("t", node=node, delivery="exactly once")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'sent' or 'accepted'"):
        Client("t", node=node).prepare(delivery="exactly once")  # type: ignore[arg-type]


def test_prepare_changes_what_is_given_and_nothing_else(peers: Peers, node: Node, until: Until) -> None:
    for name in ("a@host.1", "b/c"):
        peers("t", name)
    with Client("t", node=node, timeout=30.0) as client:
        until(lambda: len(client.members()) == 2)
        for name in ("a@host.1", "b/c"):
            one = client.prepare(server=name, timeout=20.0)
            assert one.timeout == 20.0
            assert {one.call("who") for _ in range(4)} == {name}
            assert [member.server for member in one.members()] == [name]
            back = one.prepare(server=None)
            assert back.timeout == 20.0
            assert len(back.members()) == 2
        assert client.timeout == 30.0
        assert client.topic.server is None
        assert client.prepare(timeout=None).timeout is None
        with pytest.raises(NoSuchTopic, match="nobody"):
            client.prepare(server="nobody", discovery_timeout=0.05).call("who")


def test_a_closed_client_refuses_to_work(peers: Peers, node: Node) -> None:
    peers("t")
    client = Client("t", node=node, timeout=30.0)
    assert client.call("add", 1) == 2
    client.close()
    client.close()
    for operation in ("call", "cast", "fanout", "gather", "submit"):
        with pytest.raises(Closed):
            getattr(client, operation)("echo")
    assert "closed" in repr(client)


def test_a_closed_client_with_fixed_endpoints_refuses_too(peers: Peers, node: Node) -> None:
    client = Client("t", node=node, timeout=30.0, connect=peers("t").endpoints)
    assert client.call("add", 1) == 2
    client.close()
    with pytest.raises(Closed):
        client.call("add", 1)


def test_many_threads_share_a_client(peers: Peers, node: Node) -> None:
    for name in ("a", "b"):
        peers("t", name)
    with Client("t", node=node, timeout=30.0) as client, concurrent.futures.ThreadPoolExecutor(16) as threads:

        def work(thread: int) -> list[tuple[int, int]]:
            return [tuple(client.call("echo", (thread, number))) for number in range(100)]

        for thread, result in enumerate(threads.map(work, range(16))):
            assert result == [(thread, number) for number in range(100)]
        assert client._route._balancer._outstanding == 0
    assert node.stats()["pool"]["in_use"] == 0


def test_several_servers_and_clients_live_in_one_process(
    make_node: Callable[..., Node], registry: str
) -> None:
    """On one node, where a server's handlers are clients of the others."""
    node = make_node(registry)
    inner = Client("inner", node=node, timeout=30.0)
    servers = [
        Server("inner", {"work": lambda n: n + 1}, node=node, server="1", workers=0),
        Server("inner", {"work": lambda n: n + 1}, node=node, server="2"),
        Server("outer", {"work": lambda n: inner.call("work", n) * 2}, node=node),
    ]
    for server in servers:
        server.start()
    clients = [Client("outer", node=node, timeout=30.0) for _ in range(4)]
    with concurrent.futures.ThreadPoolExecutor(4) as threads:

        def work(client: Client) -> list[int]:
            return [client.call("work", number) for number in range(50)]

        for result in threads.map(work, clients):
            assert result == [(number + 1) * 2 for number in range(50)]
    assert all(server.stop() for server in servers)


@pytest.mark.parametrize(
    ("bind", "connect"),
    [
        ("tcp://[::1]:*", "tcp://[::1]:{}"),
        ("tcp://[::]:*", "tcp://[::1]:{}"),
        ("tcp://[::]:*", "tcp://127.0.0.1:{}"),
    ],
)
def test_ipv6(make_node: Callable[..., Node], bind: str, connect: str) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as exc:
        pytest.skip(f"this host has no IPv6: {exc}")
    node = make_node("memory://six")
    with (
        Server("t", {"echo": _echo}, node=node, bind=[bind, "tcp://127.0.0.1:*"]) as server,
        Client("t", node=node, connect=connect.format(server.endpoints[0].rpartition(":")[2])) as client,
        Client("t", node=node, connect=server.endpoints[1]) as other,
    ):
        assert client.call("echo", 6) == 6
        assert other.call("echo", 4) == 4
        assert server.endpoints[1].startswith("tcp://127.0.0.1:")


def _echo(value: int) -> int:
    return value
