"""What submit() returns: a concurrent.futures.Future, whoever waits for it and if nobody does."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from typing import Any

import pytest

from zmqcore import Client, Closed, DeadlineExceeded, Node, NoSuchMethod, PeerLost, RemoteError, Server
from zmqcore.codec import MsgpackCodec
from zmqcore.rpc.future import CallFuture

Until = Callable[..., None]
Running = Callable[..., Any]


class Gate:
    """Handlers that end when they are told to."""

    def __init__(self) -> None:
        self.opened = threading.Event()

    def wait(self, value: Any = None) -> Any:
        self.opened.wait(60.0)
        return value

    def echo(self, value: Any = None) -> Any:
        return value

    def fail(self) -> None:
        raise ValueError("failed")


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.opened.set()


@pytest.fixture(params=[1, 2])
def client(
    request: pytest.FixtureRequest,
    serve: Callable[..., Server],
    connect: Callable[..., Client],
    gate: Gate,
    until: Until,
) -> Iterator[Client]:
    """Of one server, whose calls are not counted, and of two, between which calls are balanced."""
    for name in "ab"[: request.param]:
        serve("t", gate, server=name, workers=8)
    client = connect("t")
    yield client
    gate.opened.set()
    assert client.call("echo", 1) == 1
    assert client._node.stats()["pool"]["in_use"] == 0, "a future has kept its channel"
    until(lambda: client._route._balancer._outstanding == 0)
    assert {target.outstanding for target in client._route._balancer._targets} == {0}


def test_the_result_and_the_exception(client: Client) -> None:
    future = client.submit("echo", [1, 2])
    assert isinstance(future, concurrent.futures.Future)
    assert future.result() == [1, 2]
    assert future.result() == [1, 2]
    assert future.exception() is None
    assert future.done()
    failing = client.submit("fail")
    assert isinstance(failing.exception(), RemoteError)
    with pytest.raises(RemoteError, match="failed"):
        failing.result()
    with pytest.raises(NoSuchMethod):
        client.submit("nonsense").result()


def test_the_time_to_wait_for_a_result_is_not_the_calls(client: Client, gate: Gate) -> None:
    future = client.submit("wait", "late")
    for _ in range(3):
        with pytest.raises(TimeoutError):
            future.result(timeout=0.02)
        with pytest.raises(TimeoutError):
            future.exception(timeout=0)
    assert not future.done()
    gate.opened.set()
    assert future.result(timeout=30.0) == "late"


def test_a_call_that_expires_ends_its_future(client: Client) -> None:
    for _ in "ab":
        assert client.call("echo", 1) == 1, "connected"
    hurried = client.prepare(timeout=0.05)
    assert isinstance(hurried.submit("wait").exception(), DeadlineExceeded)
    with pytest.raises(DeadlineExceeded):
        hurried.submit("wait").result(timeout=30.0)


def test_done_tells_although_nobody_waits(client: Client, gate: Gate, until: Until) -> None:
    for _ in "ab":
        assert client.call("echo", 1) == 1, "connected"
    future, hurried = client.submit("wait", 1), client.prepare(timeout=0.05).submit("wait")
    assert not future.done()
    until(hurried.done)
    assert isinstance(hurried.exception(), DeadlineExceeded)
    assert not future.running()
    gate.opened.set()
    until(future.done)
    assert future.result(timeout=0) == 1


def test_who_asks_again_gets_the_same_object(client: Client, running: Running) -> None:
    future, failing = client.submit("echo", [1]), client.submit("fail")
    threads = [running(future.result) for _ in range(4)]
    first = future.result()
    assert all(thread.result() is first for thread in threads)
    assert failing.exception() is failing.exception()
    concurrent.futures.wait([future, failing], 30.0)
    assert future.result() is first


def test_asyncio_can_wait_for_it(client: Client, gate: Gate) -> None:
    async def main() -> None:
        assert await asyncio.wrap_future(client.submit("echo", 1)) == 1
        with pytest.raises(RemoteError):
            await asyncio.wrap_future(client.submit("fail"))
        waited = client.submit("wait")
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.wrap_future(waited), 0.05)
        assert waited.cancelled()

    asyncio.run(main())
    gate.opened.set()


def test_wait_and_as_completed_need_nobody_to_drive(client: Client, gate: Gate) -> None:
    futures = [client.submit("echo", number) for number in range(50)]
    done, pending = concurrent.futures.wait(futures, timeout=30.0)
    assert len(done) == 50
    assert not pending
    futures = [client.submit("echo", number) for number in range(50)]
    assert sorted(future.result() for future in concurrent.futures.as_completed(futures, 30.0)) == list(
        range(50)
    )
    slow, fast = client.submit("wait"), client.submit("echo")
    done, pending = concurrent.futures.wait([slow, fast], 30.0, concurrent.futures.FIRST_COMPLETED)
    assert done == {fast}
    assert pending == {slow}
    gate.opened.set()
    assert concurrent.futures.wait([slow], 30.0).done == {slow}


def test_without_a_timeout_nobody_has_to_drive_either(client: Client, gate: Gate, until: Until) -> None:
    patient = client.prepare(timeout=None)
    futures = [patient.submit("echo", number) for number in range(5)]
    futures += [patient.submit("wait", number) for number in range(3)]
    done: list[Any] = []
    futures[0].add_done_callback(done.append)
    gate.opened.set()
    assert concurrent.futures.wait(futures, 10.0).not_done == set()
    until(lambda: done)


def test_deadlines_are_kept_when_nobody_drives(client: Client) -> None:
    futures = [client.prepare(timeout=timeout).submit("wait") for timeout in (0.05, 0.1, 0.15)]
    assert concurrent.futures.wait(futures, 10.0).not_done == set()
    assert {type(future.exception()) for future in futures} == {DeadlineExceeded}


def test_a_shorter_deadline_after_a_longer_one_is_kept(peers: Callable[..., Any], node: Node) -> None:
    """Nothing comes from the stopped server that would wake who keeps the deadlines."""
    peer = peers("t")
    with Client("t", node=node, timeout=60.0) as client:
        assert client.call("echo", 1) == 1
        peer.freeze()
        long = client.submit("echo", 1)
        assert concurrent.futures.wait([long], 0.3).not_done == {long}
        short = client.prepare(timeout=0.1).submit("echo", 2)
        assert concurrent.futures.wait([short], 10.0).done == {short}
        assert isinstance(short.exception(), DeadlineExceeded)
        peer.thaw()
        assert long.result(30.0) == 1


def test_callbacks_run_once_when_nobody_waits(client: Client, gate: Gate, until: Until) -> None:
    called: list[Any] = []
    futures = [client.submit("wait", number) for number in range(8)]
    for future in futures:
        future.add_done_callback(lambda future: called.append(future.result()))
    assert called == []
    gate.opened.set()
    until(lambda: len(called) >= 8)
    late = client.submit("echo", "late")
    assert late.result() == "late"
    late.add_done_callback(lambda future: called.append(future.result()))
    assert sorted(called[:-1]) == list(range(8))
    assert called[-1] == "late"


def test_a_callback_may_use_the_client(client: Client, until: Until) -> None:
    results: list[Any] = []

    def again(future: concurrent.futures.Future[int]) -> None:
        number = future.result()
        results.append(client.call("echo", number))
        if number:
            client.submit("echo", number - 1).add_done_callback(again)

    client.submit("echo", 20).add_done_callback(again)
    until(lambda: len(results) == 21)
    results.clear()
    # The same while another thread, this one, drives the channel.
    client.submit("echo", 20).add_done_callback(again)
    while len(results) < 21:
        client.call("echo", 0)
    assert results == list(range(20, -1, -1))


class Ends:
    """Stands for a Pending at the moment at which it has just ended, or its channel has others to call back."""

    cancelled = False

    def __init__(self, meanwhile: Callable[[], Any] | None = None, *, waits: bool = False) -> None:
        self.meanwhile = meanwhile
        self.waits = waits

    @property
    def done(self) -> bool:
        return not self.waits

    def envelope(self) -> Any:
        raise PeerLost("gone", executed_possible=True)

    def keep(self, made: Any) -> Any:
        return made

    def notify(self, _: Any) -> bool:
        if self.meanwhile is not None:
            self.meanwhile()
        return self.waits


def future_of(pending: Ends) -> CallFuture:
    return CallFuture(MsgpackCodec(), pending, "tcp://nowhere:1")  # type: ignore[arg-type]


def test_to_be_told_of_one_end_may_bring_that_of_another(running: Running) -> None:
    """The channel calls back whoever has ended on the thread that asks to be called back."""
    told: list[Any] = []
    other = future_of(Ends(waits=True))
    other.add_done_callback(told.append)
    assert told == []
    asked = future_of(Ends(lambda: other.settle(other._pending), waits=True))
    running(asked.add_done_callback, told.append).result()
    assert told == [other]
    asked.settle(asked._pending)
    assert told == [other, asked]


def test_one_that_ends_before_it_is_told_whom_to_call_tells_all() -> None:
    """Another thread asks to be told, too, just before it shows that the call has ended; each is told once."""
    told: list[Any] = []
    future: CallFuture
    future = future_of(Ends(lambda: future.add_done_callback(lambda _: told.append("other"))))
    future.add_done_callback(lambda _: told.append("first"))
    assert told == ["other", "first"]


def test_a_callback_that_raises_harms_nobody(
    client: Client, caplog: pytest.LogCaptureFixture, until: Until
) -> None:
    def broken(_: Any) -> None:
        raise RuntimeError("the callback's own fault")

    futures = [client.submit("echo", number) for number in range(5)]
    for future in futures:
        future.add_done_callback(broken)
    assert [future.result() for future in futures] == list(range(5))
    until(lambda: sum("exception calling callback" in record.message for record in caplog.records) == 5)


def test_cancel(client: Client, gate: Gate) -> None:
    called: list[bool] = []
    future = client.submit("wait", "nobody wants it")
    future.add_done_callback(lambda future: called.append(future.cancelled()))
    assert future.cancel() is True
    assert future.cancel() is True
    assert future.cancelled()
    assert future.done()
    assert called == [True]
    with pytest.raises(CancelledError):
        future.result()
    with pytest.raises(CancelledError):
        future.exception()
    assert concurrent.futures.wait([future], 30.0).done == {future}
    assert list(concurrent.futures.as_completed([future], 30.0)) == [future]
    done = client.submit("echo", 1)
    assert done.result() == 1
    assert done.cancel() is False
    gate.opened.set()


def test_who_waits_is_told_of_a_cancellation(client: Client, running: Running) -> None:
    future = client.submit("wait")
    waiting = [running(future.result), running(future.result), running(concurrent.futures.wait, [future])]
    waiting[0].thread.join(0.1)
    assert future.cancel()
    assert isinstance(waiting[0].join(), CancelledError)
    assert isinstance(waiting[1].join(), CancelledError)
    assert waiting[2].result().done == {future}


def test_cancelling_races_with_the_reply(client: Client, running: Running) -> None:
    """Whoever is first, the future ends, and the channel is given back exactly once."""
    chance = random.Random(1)
    outcomes = {"cancelled": 0, "done": 0}
    for _ in range(300):
        future = client.submit("echo", 7)
        waiting = running(future.result) if chance.random() < 0.3 else None
        for _ in range(chance.randrange(400)):
            pass
        cancelled = future.cancel()
        assert future.cancelled() is cancelled
        if cancelled:
            outcomes["cancelled"] += 1
            with pytest.raises(CancelledError):
                future.result()
        else:
            outcomes["done"] += 1
            assert future.result() == 7
        if waiting is not None:
            error = waiting.join()
            assert error is None or (cancelled and isinstance(error, CancelledError))
    assert sum(outcomes.values()) == 300


def test_two_threads_cancel_at_once(client: Client, running: Running) -> None:
    for _ in range(50):
        future = client.submit("echo", 1)
        barrier = threading.Barrier(3)

        def cancel(future: Any = future, barrier: threading.Barrier = barrier) -> bool:
            barrier.wait()
            return future.cancel()

        threads = [running(cancel), running(cancel)]
        barrier.wait()
        answers = {thread.result() for thread in threads}
        assert len(answers) == 1
        assert future.cancelled() is answers.pop()


def test_many_threads_wait_for_one_future(client: Client, gate: Gate, running: Running) -> None:
    future = client.submit("wait", "result")
    impatient = [running(future.result, 0.01 * number) for number in range(5)]
    patient = [running(future.result) for _ in range(5)]
    for thread in impatient:
        assert isinstance(thread.join(), TimeoutError)
    gate.opened.set()
    assert [thread.result() for thread in patient] == ["result"] * 5


def test_an_impatient_driver_leaves_the_wheel_to_others(client: Client, gate: Gate, running: Running) -> None:
    """The first one drives for a moment; who came second relies on it and must not be forgotten."""
    future = client.submit("wait", "result")
    first = running(future.result, 0.1)
    second = running(future.result)
    assert isinstance(first.join(), TimeoutError)
    gate.opened.set()
    assert second.result() == "result"


def test_peer_lost_ends_every_future(peers: Callable[..., Any], node: Node, until: Until) -> None:
    peer = peers("t", workers=16)
    called: list[Any] = []
    with Client("t", node=node, timeout=60.0) as client:
        assert client.call("echo", 1) == 1
        futures = [client.submit("sleep", 600.0) for _ in range(10)]
        futures[0].add_done_callback(called.append)
        until(lambda: client.call("echo") is None)
        peer.kill()
        assert concurrent.futures.wait(futures, 30.0).not_done == set()
        for future in futures:
            error = future.exception()
            assert isinstance(error, PeerLost)
            assert isinstance(error, ConnectionError)
            assert error.executed_possible
        assert called == [futures[0]]
        assert client._route._balancer._outstanding == 0
    assert node.stats()["pool"]["in_use"] == 0


def test_peer_lost_while_somebody_waits(peers: Callable[..., Any], node: Node, running: Running) -> None:
    peer = peers("t")
    with Client("t", node=node, timeout=60.0) as client:
        assert client.call("echo", 1) == 1
        future = client.submit("sleep", 600.0)
        waiting = [running(future.result), running(future.exception), running(client.call, "sleep", 600.0)]
        waiting[0].thread.join(0.1)
        peer.kill()
        assert isinstance(waiting[0].join(), PeerLost)
        assert isinstance(waiting[1].result(), PeerLost)
        assert isinstance(waiting[2].join(), PeerLost)


def test_closing_the_node_ends_every_future(
    serve: Callable[..., Server], make_node: Callable[..., Node], registry: str, gate: Gate
) -> None:
    serve("t", gate)
    node = make_node(registry)
    client = Client("t", node=node, timeout=60.0)
    futures = [client.submit("wait") for _ in range(5)]
    node.close(timeout=0.5)
    assert concurrent.futures.wait(futures, 30.0).not_done == set()
    assert {type(future.exception()) for future in futures} == {Closed}
    with pytest.raises(Closed):
        client.submit("echo")
    gate.opened.set()


def test_futures_that_nobody_keeps_end_all_the_same(client: Client, gate: Gate, until: Until) -> None:
    for number in range(20):
        client.submit("wait", number)
    gate.opened.set()
    until(lambda: client._node.stats()["pool"]["in_use"] == 0)


def test_submissions_come_and_go(client: Client, running: Running) -> None:
    """The attendant's thread starts, finds nothing left, and is needed again, over and over."""

    def work() -> None:
        for number in range(150):
            future = client.submit("echo", number)
            assert concurrent.futures.wait([future], 30.0).done, "nobody attends to it"
            assert future.result() == number

    threads = [running(work) for _ in range(4)]
    for thread in threads:
        thread.result()


def test_an_executor_of_futures_is_of_no_concern(client: Client) -> None:
    """A future that is used as asyncio does: through callbacks only."""
    with contextlib.closing(_Loop()) as loop:
        for number in range(20):
            client.submit("echo", number).add_done_callback(loop.put)
        assert sorted(loop.take(20)) == list(range(20))


class _Loop:
    def __init__(self) -> None:
        self._results: list[Any] = []
        self._changed = threading.Condition()

    def put(self, future: concurrent.futures.Future[Any]) -> None:
        with self._changed:
            self._results.append(future.result())
            self._changed.notify()

    def take(self, count: int) -> list[Any]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self._results) == count, 30.0)
            return self._results

    def close(self) -> None:
        self._results = []
