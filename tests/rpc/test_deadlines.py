"""Every operation ends by its deadline, and the deadline travels with the work."""

from __future__ import annotations

import concurrent.futures
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from waiting_support import PATIENCE

from zmqcore import Client, DeadlineExceeded, Node, NoSuchTopic, Overloaded, RemoteError, Server, Unreachable
from zmqcore.rpc import deadline

Until = Callable[..., None]
Running = Callable[..., Any]


def _ends(running: Running, function: Callable[..., Any], *args: Any) -> BaseException:
    """Run what must raise by a deadline that is far below the time after which this gives up."""
    error = running(function, *args).join()
    assert error is not None, f"{function} returned"
    return error


@pytest.mark.parametrize("operation", ["call", "submit"])
def test_a_sleeping_server(peers: Callable[..., Any], node: Node, running: Running, operation: str) -> None:
    peers("t")
    with Client("t", node=node, timeout=0.3) as client:

        def work() -> Any:
            result = getattr(client, operation)("sleep", 600.0)
            return result.result() if operation == "submit" else result

        error = _ends(running, work)
    assert isinstance(error, DeadlineExceeded)
    assert isinstance(error, TimeoutError)
    assert "has not answered within" in str(error)


@pytest.mark.parametrize("operation", ["call", "submit", "gather"])
def test_a_stopped_server(peers: Callable[..., Any], node: Node, running: Running, operation: str) -> None:
    peer = peers("t")
    with Client("t", node=node, timeout=30.0) as client:
        assert client.call("echo", 1) == 1
        peer.freeze()
        hurried = client.prepare(timeout=0.3)
        if operation == "gather":
            gathered = running(hurried.gather, "echo", 1).result()
            assert not gathered.results
            (error,) = gathered.missing.values()
        elif operation == "submit":
            error = hurried.submit("echo", 1).exception()
        else:
            error = _ends(running, hurried.call, "echo", 1)
        assert isinstance(error, DeadlineExceeded)
        peer.thaw()
        assert client.call("echo", 2) == 2, "a late reply is not taken for another one's"


def test_casts_to_a_stopped_server_end_too(peers: Callable[..., Any], make_node: Callable[..., Node]) -> None:
    """The window fills and nobody makes room."""
    peer = peers("t", workers=1)
    node = make_node(window_messages=300)
    with Client("t", node=node, timeout=30.0) as client:
        assert client.call("echo", 1) == 1
        peer.freeze()
        hurried = client.prepare(timeout=0.3)
        for _ in range(300):
            hurried.cast("count", "x")
        with pytest.raises(Overloaded, match="unacknowledged"):
            hurried.cast("count", "x")
        peer.thaw()
        assert client.call("echo", 2) == 2


@pytest.mark.parametrize("operation", ["call", "cast", "submit"])
@pytest.mark.parametrize("timeout", [0.001, 0.3, 5.0])
def test_nobody_listens(
    make_node: Callable[..., Node], free_port: int, running: Running, operation: str, timeout: float
) -> None:
    node = make_node(connect_timeout=0.5)
    client = Client("t", node=node, timeout=timeout, connect=f"tcp://127.0.0.1:{free_port}")
    error = _ends(running, getattr(client, operation), "work")
    if timeout < 0.1 and isinstance(error, DeadlineExceeded):
        return  # on a busy machine it had passed before anything was tried
    assert isinstance(error, Unreachable)
    assert str(free_port) in str(error)


@pytest.mark.parametrize("operation", ["call", "cast", "submit"])
@pytest.mark.parametrize("timeout", [0.3, 5.0, None])
def test_a_blackhole(
    make_node: Callable[..., Node], blackhole: str, running: Running, operation: str, timeout: float | None
) -> None:
    node = make_node(connect_timeout=0.5)
    client = Client("t", node=node, timeout=timeout, connect=blackhole)
    error = _ends(running, getattr(client, operation), "work")
    assert isinstance(error, (Unreachable, DeadlineExceeded))
    assert node.stats()["pool"]["in_use"] == 0


def test_nobody_serves_and_no_time_to_wait_for_somebody(node: Node, running: Running) -> None:
    client = Client("t", node=node, timeout=0.1, discovery_timeout=600.0)
    assert isinstance(_ends(running, client.call, "work"), NoSuchTopic)


def test_no_timeout_waits_as_long_as_it_takes(
    serve: Callable[..., Server], connect: Callable[..., Client], running: Running
) -> None:
    gate = threading.Event()
    serve("t", {"work": lambda: gate.wait(30.0), "remaining": deadline.time_left})
    client = connect("t", timeout=None)
    assert client.call("remaining") is None
    waiting = running(client.call, "work")
    waiting.thread.join(0.3)
    assert not waiting.ended
    gate.set()
    assert waiting.result() is True


def test_the_deadline_travels(serve: Callable[..., Server], connect: Callable[..., Client]) -> None:
    for workers in (0, 2):
        topic = f"t{workers}"
        serve(topic, {"remaining": deadline.time_left}, workers=workers)
        client = connect(topic)
        for timeout in (7.0, 0.9, 3600.0, 1e9):
            left = client.prepare(timeout=timeout).call("remaining")
            assert left <= timeout + 0.001
            # On the wire are 32 bits of milliseconds: 49 days at most.
            assert left > min(timeout, 2**32 / 1000) - 30.0
        assert client.prepare(timeout=None).call("remaining") is None
        assert client.call("remaining") <= client.timeout + 0.001, "each request has its own"
    assert deadline.time_left() is None


def test_a_cast_has_no_deadline(
    serve: Callable[..., Server], connect: Callable[..., Client], until: Until
) -> None:
    seen: list[float | None] = []
    serve("t", {"work": lambda: seen.append(deadline.time_left())}, workers=1)
    client = connect("t", timeout=0.5)
    client.cast("work")
    client.fanout("work")
    until(lambda: seen == [None, None])


def test_expired_work_is_not_run(
    serve: Callable[..., Server], connect: Callable[..., Client], until: Until, running: Running
) -> None:
    gate, entered = threading.Event(), threading.Event()
    ran: list[str] = []

    def block() -> None:
        entered.set()
        gate.wait(30.0)

    server = serve("t", {"block": block, "work": ran.append}, workers=1)
    client = connect("t")
    blocking = running(client.call, "block")
    assert entered.wait(30.0)
    for name in ("one", "two", "three"):
        with pytest.raises(DeadlineExceeded):
            client.prepare(timeout=0.05).call("work", name)
    patient = running(client.call, "work", "patient")
    until(lambda: server.stats()["port"]["calls"] == 5)
    gate.set()
    blocking.result()
    patient.result()
    assert ran == ["patient"]
    assert server.stats()["expired"] == 3
    assert server.stats()["handled"] == 2


def test_late_replies_are_dropped_and_counted(peers: Callable[..., Any], node: Node) -> None:
    peers("t", workers=1)
    with Client("t", node=node, timeout=30.0) as client:
        client.call("echo")
        with pytest.raises(DeadlineExceeded):
            client.prepare(timeout=0.3).call("sleep", 0.6)
        assert client.call("echo", "next") == "next"
        (channel,) = node.stats()["channels"].values()
        assert channel["timeouts"] == 1
        assert channel["late_replies"] == 1


def test_nested_calls_inherit_what_is_left(peers: Callable[..., Any], node: Node) -> None:
    """Over three processes; each sleeps before it calls the next one with a timeout of a minute of its own."""
    for topic in ("a", "b", "c"):
        peers(topic)
    with Client("a", node=node, timeout=20.0) as client:
        left = client.call("relay", 0.2, ["b", "c"], "remaining")
        # Each hop rounds up to a millisecond.
        assert 0 < left <= 20.0 - 2 * 0.2 + 0.01
    with Client("a", node=node, timeout=None) as client:
        assert 60.0 - PATIENCE < client.call("relay", 0.0, ["b", "c"], "remaining") <= 60.01


def test_a_nested_call_ends_with_the_outer_one(peers: Callable[..., Any], node: Node) -> None:
    """The innermost sleeps for ever as far as anybody cares; the middle is free again at the deadline."""
    peers("a", workers=1)
    peers("b", workers=1)
    with Client("a", node=node, timeout=0.5) as client:
        # On a busy machine the middle's own error may be there before this thread has looked at the clock.
        with pytest.raises((DeadlineExceeded, RemoteError)) as ended:
            client.call("relay", 0.0, ["b"], "sleep", 600.0)
        if isinstance(ended.value, RemoteError):
            assert ended.value.type == "zmqcore.errors.DeadlineExceeded"
        assert client.prepare(timeout=30.0).call("echo", "free") == "free"


def test_a_handler_whose_time_is_over_starts_nothing(
    serve: Callable[..., Server], connect: Callable[..., Client]
) -> None:
    """What is called after the deadline has passed is expired work, and is not even sent."""
    ran: list[str] = []
    outcome: list[BaseException | None] = []
    serve("inner", {"work": ran.append, "echo": lambda value: value})
    inner = connect("inner")
    assert inner.call("echo", 1) == 1, "the way is open"

    def work() -> None:
        wait = deadline.time_left()
        assert wait is not None
        time.sleep(wait + 0.01)
        for operation in (inner.call, lambda *args: inner.submit(*args).result()):
            try:
                operation("work", "too late")
            except BaseException as exc:  # noqa: BLE001 - looked at below
                outcome.append(exc)
            else:
                outcome.append(None)

    serve("outer", {"work": work, "echo": lambda value: value}, workers=1)
    outer = connect("outer")
    timeout = 0.05
    while len(outcome) < 10:
        with pytest.raises(DeadlineExceeded):
            outer.prepare(timeout=timeout).call("work")
        assert outer.call("echo", 1) == 1, "the only worker is free again"
        timeout *= 1.1  # on a busy machine it expires before it is run
    assert {type(error) for error in outcome} == {DeadlineExceeded}
    assert inner.call("echo", 2) == 2
    assert ran == []


def test_the_deadline_of_one_request_does_not_leak_into_another(
    serve: Callable[..., Server], connect: Callable[..., Client]
) -> None:
    serve("t", {"remaining": deadline.time_left}, workers=1)
    client = connect("t")
    for _ in range(3):
        assert client.prepare(timeout=2.0).call("remaining") <= 2.001
        assert client.prepare(timeout=None).call("remaining") is None


def test_a_callback_does_not_inherit_the_deadline_of_the_thread_that_runs_it(
    serve: Callable[..., Server], connect: Callable[..., Client], until: Until
) -> None:
    """It runs on whichever thread drives the channel; here that is a handler with a deadline."""
    gate, entered = threading.Event(), threading.Event()
    seen: list[float | None] = []

    def last(value: int) -> int:
        gate.wait(30.0)
        return value

    def outer() -> Any:
        entered.set()
        return inner.call("last", 2)

    serve("inner", {"last": last}, workers=2)
    inner = connect("inner", timeout=None)
    serve("outer", {"outer": outer}, workers=1)
    started = connect("outer", timeout=20.0).submit("outer")
    assert entered.wait(30.0)
    channels = inner._node.pool.channels
    until(lambda: any(channel.led for channel in channels()))
    future = inner.submit("last", 1)
    future.add_done_callback(lambda _: seen.append(deadline.time_left()))
    gate.set()
    assert started.result() == 2
    until(lambda: seen)
    assert seen == [None]


def test_threads_with_different_deadlines_share_a_channel(peers: Callable[..., Any], node: Node) -> None:
    peers("t", workers=8)
    with Client("t", node=node, timeout=30.0) as client, concurrent.futures.ThreadPoolExecutor(8) as threads:
        client.call("sleep", 0.0)  # connected: what expires below is not the connecting

        def work(number: int) -> str:
            if number % 2:
                return client.call("sleep", 0.3) and "slept"
            try:
                client.prepare(timeout=0.02 + number / 200).call("sleep", 0.3)
            except DeadlineExceeded:
                return "expired"
            return "too fast"

        assert list(threads.map(work, range(8))) == ["expired", "slept"] * 4
    assert node.stats()["pool"]["in_use"] == 0


def test_a_remote_timeout_is_not_ours(serve: Callable[..., Server], connect: Callable[..., Client]) -> None:
    def work() -> None:
        raise TimeoutError("the database's")

    serve("t", {"work": work})
    with pytest.raises(RemoteError, match="the database's"):
        connect("t").call("work")
