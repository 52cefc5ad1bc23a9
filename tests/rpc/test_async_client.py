"""AsyncClient: the event loop drives the channels. Servers in processes of their own where one is lost or restarted."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from waiting_support import PATIENCE, CountingSelector, assert_idle, eventually
from waiting_support import until as wait_until

from zmqcore import (
    AsyncClient,
    BadArguments,
    Client,
    Closed,
    DeadlineExceeded,
    Node,
    NoSuchMethod,
    NoSuchTopic,
    Overloaded,
    PayloadTooLarge,
    PeerLost,
    RemoteError,
    Server,
    Topic,
    Unreachable,
)
from zmqcore.rpc import deadline
from zmqcore.rpc import loop as loops

Until = Callable[..., None]
Running = Callable[..., Any]
Peers = Callable[..., Any]


@asynccontextmanager
async def ticking() -> AsyncIterator[list[float]]:
    """The turns of a task that sleeps for 5 ms each: there are none while somebody blocks the loop."""
    turns: list[float] = []

    async def tick() -> None:
        while True:
            await asyncio.sleep(0.005)
            turns.append(time.monotonic())

    ticker = asyncio.create_task(tick())
    try:
        yield turns
    finally:
        ticker.cancel()


def in_use(node: Node) -> int:
    return int(node.pool.stats()["in_use"])


class Gate:
    """Handlers that wait, on threads."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.entered = 0
        self.casts: list[Any] = []

    def echo(self, value: Any = None) -> Any:
        return value

    def wait(self, value: Any = None) -> Any:
        self.entered += 1
        self.opened.wait(60.0)
        return value

    def note(self, value: Any, seconds: float = 0.0) -> None:
        time.sleep(seconds)
        self.casts.append(value)

    def fail(self, text: str) -> None:
        raise LookupError(text)

    def remaining(self) -> float | None:
        return deadline.time_left()


@pytest.fixture
def gate() -> Any:
    gate = Gate()
    yield gate
    gate.opened.set()
    gate.casts.clear()


@pytest.fixture
def make(make_node: Callable[..., Node], registry: str) -> Callable[..., AsyncClient]:
    """``make(topic, **options)`` makes a client of the servers in this process, all on one node."""
    node: list[Node] = []

    def client(topic: str | Topic, **options: Any) -> AsyncClient:
        if not node:
            node.append(make_node(registry))
        return AsyncClient(topic, **{"node": node[0], "timeout": PATIENCE, **options})

    return client


Serve = Callable[..., Server]
Make = Callable[..., AsyncClient]


# -- operations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [False, True])
def test_every_operation_across_processes(peers: Peers, node: Node, asynchronous: bool) -> None:
    names = ("one", "two", "three")
    for name in names:
        peers("t", name, **({"async": True} if asynchronous else {}))

    async def main() -> None:
        async with AsyncClient("t", node=node, timeout=PATIENCE) as client:
            await eventually(lambda: client.members() or asyncio.ensure_future(client.call("who")))
            await eventually(lambda: len(client.members()) == 3)
            assert await client.call("add", 1, b=2) == 3
            assert {await client.call("who") for _ in range(6)} == set(names)
            assert await client.call("echo", {"a": [1, b"x" * 100_000]}) == {"a": [1, b"x" * 100_000]}
            assert await client.cast("count", "cast") is None
            fanned = await client.fanout("count", "fanout")
            assert {member.server for member in fanned.sent} == set(names)
            assert fanned.failed == {}
            gathered = await client.gather("who")
            assert gathered.complete
            assert {member.server: who for member, who in gathered.results.items()} == {n: n for n in names}
            task = client.submit("add", 40, 2)
            assert not task.done()
            assert await task == 42
            two = client.prepare(server="two", timeout=20.0)
            assert {await two.call("who") for _ in range(4)} == {"two"}

            for key, number in (("cast", 1), ("fanout", 3)):

                async def counted(key: str = key, number: int = number) -> bool:
                    return sum((await client.gather("counted", key)).results.values()) == number

                await eventually(counted)

    asyncio.run(main())
    node.close()


def test_connect_needs_no_matchmaker(peers: Peers, make_node: Callable[..., Node]) -> None:
    peer = peers("t", "one")
    node = make_node("memory://empty")

    async def main() -> None:
        client = AsyncClient("t", node=node, connect=peer.endpoints[1], timeout=PATIENCE)
        assert await client.call("who") == "one"
        assert (await client.gather("who")).complete
        assert "tcp://" in repr(client)
        await client.close()
        assert "closed" in repr(client)
        with pytest.raises(Closed):
            await client.call("who")

    asyncio.run(main())


def test_errors(serve: Serve, make: Make, gate: Gate) -> None:
    serve("t", gate)

    async def main() -> None:
        client = make("t")
        with pytest.raises(RemoteError) as caught:
            await client.call("fail", "not there")
        assert (caught.value.type, caught.value.message) == ("LookupError", "not there")
        assert "def fail" in caught.value.traceback or "in fail" in caught.value.traceback
        with pytest.raises(NoSuchMethod):
            await client.call("nothing")
        with pytest.raises(BadArguments):
            await client.call("echo", 1, 2, 3)
        with pytest.raises(BadArguments):
            await client.call("echo", object())
        with pytest.raises(NoSuchTopic):
            await make("nobody", discovery_timeout=0.05).call("x")
        with pytest.raises(PayloadTooLarge):
            await client.fanout("echo", bytes(1 << 29))
        gathered = await client.gather("fail", "x")
        assert [type(error) for error in gathered.errors.values()] == [RemoteError]
        assert await client.call("echo", "still there") == "still there"

    asyncio.run(main())


def test_options_are_checked(make: Make) -> None:
    for options in (
        {"timeout": 0},
        {"timeout": -1.0},
        {"delivery": "by pigeon"},
        {"discovery_timeout": -1},
        {"retry": 3},  # as other libraries have it
    ):
        (name,) = options
        with pytest.raises((ValueError, TypeError), match=f"{name} is"):
            make("t", **options)
        with pytest.raises((ValueError, TypeError), match=f"{name} is"):
            make("t").prepare(**options)


def test_the_first_message_may_be_a_large_one(
    make_node: Callable[..., Node], serve: Serve, registry: str, gate: Gate
) -> None:
    """What the server takes is known only after its hello."""
    serve("t", gate)
    large = bytes(3_000_000)

    async def main() -> None:
        with make_node(registry) as node:
            assert await AsyncClient("t", node=node, timeout=PATIENCE).call("echo", large) == large
        with make_node(registry) as node:
            await AsyncClient("t", node=node, timeout=PATIENCE).cast("note", large)
            await eventually(lambda: gate.casts)

    asyncio.run(main())


def test_outside_a_loop(make: Make) -> None:
    client = make("t")
    with pytest.raises(RuntimeError):
        client.submit("x")


# -- deadlines --------------------------------------------------------------------------------------------------


def test_deadlines(serve: Serve, make: Make, gate: Gate) -> None:
    server = serve("t", gate, workers=1)

    async def main() -> None:
        client = make("t")
        with pytest.raises(DeadlineExceeded):
            await client.prepare(timeout=0.05).call("wait")
        # The only worker is busy with it; these expire in the queue and are not run.
        expired = await asyncio.gather(
            *(client.prepare(timeout=0.05).call("note", i) for i in range(10)), return_exceptions=True
        )
        assert [type(error) for error in expired] == [DeadlineExceeded] * 10
        # A deadline counts from when the server has received the call.
        await eventually(lambda: server.stats()["queued"] == 10)
        await asyncio.sleep(0.06)
        gate.opened.set()
        assert await client.call("echo", 1) == 1
        assert gate.casts == []
        assert await client.prepare(timeout=None).call("remaining") is None
        left = await client.prepare(timeout=20.0).call("remaining")
        assert 0 < left <= 20.0

    asyncio.run(main())


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_nested_call_inherits_what_is_left(peers: Peers, node: Node, asynchronous: bool) -> None:
    for topic in ("a", "b", "c"):
        peers(topic, **({"async": True} if asynchronous else {}))

    async def main() -> None:
        client = AsyncClient("a", node=node, timeout=25.0)
        left = await client.call("relay", 0.2, ["b", "c"], "remaining")
        assert 0 < left <= 25.0 - 0.4
        assert await client.prepare(timeout=None).call("relay", 0.0, ["b"], "remaining") <= 60.0

    asyncio.run(main())


def test_a_deadline_of_the_surrounding_request_holds(serve: Serve, make: Make, gate: Gate) -> None:
    serve("t", gate)

    async def main() -> None:
        client = make("t")
        token = deadline.current.set(time.monotonic() + 0.1)
        with pytest.raises(DeadlineExceeded):
            await client.call("wait")
        await eventually(lambda: deadline.time_left() <= 0)
        with pytest.raises(DeadlineExceeded):
            await client.call("echo", 1)
        deadline.current.reset(token)
        assert await client.call("echo", 1) == 1

    asyncio.run(main())
    gate.opened.set()


# -- cancelling -------------------------------------------------------------------------------------------------


def test_a_cancelled_call_is_given_up(serve: Serve, make: Make, gate: Gate) -> None:
    server = serve("t", gate, workers=4)

    async def main() -> None:
        client = make("t")
        assert await client.call("echo", 1) == 1
        (channel,) = client._node.pool.channels()
        task = client.submit("wait", "dropped")
        other = client.submit("wait", "kept")
        await eventually(lambda: gate.entered == 2)
        assert channel.stats()["outstanding_calls"] == 2
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert channel.stats()["outstanding_calls"] == 1
        await eventually(lambda: server.stats()["port"]["cancelled"] == 1)  # else it may still answer
        gate.opened.set()
        assert await other == "kept"
        assert await client.call("echo", 2) == 2
        assert (channel.stats()["cancelled"], channel.stats()["late_replies"]) == (1, 0)

    asyncio.run(main())


def test_what_a_call_is_cancelled_with_reaches_who_awaits_it(serve: Serve, make: Make, gate: Gate) -> None:
    serve("t", gate)

    async def main() -> None:
        client = make("t")

        async def call() -> Any:
            try:
                await client.call("wait")
            except asyncio.CancelledError as exc:
                return exc.args
            finally:
                gate.opened.set()

        task = asyncio.create_task(call())
        await eventually(lambda: gate.entered == 1)
        task.cancel("enough")
        assert await task == ("enough",)

    asyncio.run(main())


def test_a_reply_that_comes_when_the_loop_is_closed(serve: Serve, make: Make, gate: Gate) -> None:
    """Another client of its thread takes it: nobody is resumed, and nothing is raised."""
    serve("t", gate, workers=2)
    client = make("t")
    loop = asyncio.new_event_loop()

    async def main() -> asyncio.Task[Any]:
        task = client.submit("wait")
        await eventually(lambda: gate.entered)
        return task

    task = loop.run_until_complete(main())
    loop.close()
    (channel,) = client._node.pool.channels()
    replies = channel.stats()["replies"]
    gate.opened.set()
    with Client("t", node=client._node, timeout=PATIENCE) as synchronous:
        while channel.stats()["replies"] < replies + 2:
            assert synchronous.call("echo", 1) == 1
    assert not task.done()
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    # Else the garbage collector may begin with the innermost coroutine, which then lets go of the others.
    cast("Coroutine[Any, Any, Any]", task.get_coro()).close()


def test_a_third_of_1000_calls_is_cancelled(peers: Peers, node: Node) -> None:
    peers("t", **{"async": True})

    async def main() -> None:
        client = AsyncClient("t", node=node, timeout=PATIENCE)
        assert await client.call("echo", 1) == 1
        (channel,) = node.pool.channels()
        before = channel.stats()

        async def one(number: int) -> int:
            await client.call("pass_gate")
            return int(await client.call("echo", number))

        tasks = [asyncio.create_task(one(number)) for number in range(1000)]
        await eventually(lambda: channel.stats()["outstanding_calls"] == 1000)
        for task in tasks[::3]:
            task.cancel()
        await client.call("open_gate")
        results = await asyncio.gather(*tasks, return_exceptions=True)
        cancelled = len(tasks[::3])
        for number, result in enumerate(results):
            if number % 3:
                assert result == number
            else:
                assert isinstance(result, asyncio.CancelledError)
        after = channel.stats()
        assert after["cancelled"] - before["cancelled"] == cancelled
        assert after["calls"] - before["calls"] == 1000 + 1 + (1000 - cancelled)
        assert after["replies"] - before["replies"] == 1 + 2 * (1000 - cancelled)
        assert (after["outstanding_calls"], after["timeouts"], after["lost"]) == (0, 0, 0)
        assert loops.channels_of_running_loop(node).n_awaited == 0

    asyncio.run(main())


def test_cancelling_while_it_connects(make: Make, blackhole: str) -> None:
    async def main() -> None:
        client = make("t", connect=blackhole)
        tasks = [client.submit("x") for _ in range(10)]
        await eventually(lambda: client._node.pool.stats()["connecting"])
        for task in tasks:
            task.cancel()
        assert await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)
        await eventually(lambda: in_use(client._node) == 0)

    asyncio.run(main())


def test_cancelling_while_it_waits_for_room(
    serve: Serve, make_node: Callable[..., Node], registry: str
) -> None:
    gate = Gate()
    serve("t", gate, workers=1, queue_size=1)
    node = make_node(registry, window_messages=300)

    async def main() -> None:
        client = AsyncClient("t", node=node, timeout=PATIENCE)
        await client.cast("wait")
        (channel,) = node.pool.channels()
        casts = [asyncio.create_task(client.cast("note", number)) for number in range(3000)]
        await eventually(lambda: channel.stats()["window_waits"])
        waiting = [number for number, task in enumerate(casts) if not task.done()]
        assert waiting, "the window is full"
        given_up = set(waiting[::3])
        for number in given_up:
            casts[number].cancel()
        gate.opened.set()
        await asyncio.gather(*casts, return_exceptions=True)
        await eventually(lambda: len(gate.casts) == 3000 - len(given_up))
        expected = [number for number in range(3000) if number not in given_up]
        assert gate.casts == expected, "in the order in which they came"

    asyncio.run(main())


# -- several at once ---------------------------------------------------------------------------------------------


def test_two_loops_and_threads_share_one_channel(peers: Peers, node: Node, running: Running) -> None:
    """Two loops in two threads, and the synchronous client in two more."""
    peer = peers("t", "one")
    client = AsyncClient("t", node=node, timeout=PATIENCE, connect=peer.endpoints[1])
    sync = Client("t", node=node, timeout=PATIENCE, connect=peer.endpoints[1])
    rounds = 300

    async def work(offset: int) -> None:
        async def some(start: int) -> None:
            for number in range(start, start + rounds):
                assert await client.call("echo", number) == number
                await client.cast("count", "x")

        await asyncio.gather(*(some(offset + 1_000 * i) for i in range(5)))

    def calls(offset: int) -> None:
        for number in range(offset, offset + rounds):
            assert sync.call("echo", number) == number
            assert sync.submit("echo", -number).result() == -number

    threads = [running(asyncio.run, work(100_000 * i)) for i in range(2)]
    threads += [running(calls, 1_000_000 * i) for i in (1, 2)]
    for thread in threads:
        thread.result()
    assert len(node.pool.channels()) == 1
    wait_until(lambda: sync.call("counted", "x") == 2 * 5 * rounds)
    (channel,) = node.pool.channels()
    stats = channel.stats()
    assert (stats["late_replies"], stats["timeouts"], stats["lost"]) == (0, 0, 0)
    assert sync.call("echo", "the loops have gone") == "the loops have gone"


def test_the_synchronous_client_in_the_loop_s_thread(serve: Serve, make: Make, gate: Gate) -> None:
    """It blocks the loop, which is the user's affair; but it takes the loop's replies, too, and none is lost."""
    serve("t", gate)

    async def main() -> None:
        client = make("t")
        sync = Client("t", node=client._node, timeout=PATIENCE)
        for _ in range(20):
            tasks = [client.submit("echo", number) for number in range(50)]
            await asyncio.sleep(0)
            assert sync.call("echo", "sync") == "sync"
            assert await asyncio.gather(*tasks) == list(range(50))

    asyncio.run(main())


def test_what_loops_drive_one_after_another(peers: Peers, node: Node) -> None:
    peer = peers("t")
    client = AsyncClient("t", node=node, timeout=PATIENCE, connect=peer.endpoints[1])
    for number in range(10):
        assert asyncio.run(client.call("echo", number)) == number
    assert len(node.pool.channels()) == 1


# -- the loop is never blocked -----------------------------------------------------------------------------------


def test_a_full_window(peers: Peers, make_node: Callable[..., Node]) -> None:
    """A fast caster and a slow server: the caster is made to wait, the loop is not, and nothing is lost."""
    peer = peers("t", "one", queue_size=1, workers=1)
    node = make_node(window_messages=300)

    async def main() -> None:
        client = AsyncClient("t", node=node, timeout=60.0, connect=peer.endpoints[1])
        async with ticking() as turns:
            for _ in range(1500):
                await client.cast("count", "x", 0.001)
            (channel,) = node.pool.channels()
            assert channel.stats()["window_waits"] > 0
            assert channel.stats()["window_messages"] <= 300

            async def all_ran() -> bool:
                return await client.call("counted", "x") == 1500

            await eventually(all_ran)
        # The server needs 1.5 s for them. Who waited for room on the loop would let hardly any turn pass meanwhile.
        assert len(turns) > 20

    asyncio.run(main())


def test_a_window_that_stays_full(serve: Serve, make_node: Callable[..., Node], registry: str) -> None:
    gate = Gate()
    serve("t", gate, workers=1, queue_size=1)
    node = make_node(registry, window_messages=300)

    async def main() -> None:
        client = AsyncClient("t", node=node, timeout=0.3)
        await client.prepare(timeout=PATIENCE).cast("wait")  # it connects
        outcomes = await asyncio.gather(
            *(client.cast("note", number) for number in range(3000)), return_exceptions=True
        )
        refused = [outcome for outcome in outcomes if outcome is not None]
        # On a busy machine one may find its time over before it has asked for room.
        kinds = {type(outcome) for outcome in refused}
        assert Overloaded in kinds
        assert kinds <= {Overloaded, DeadlineExceeded}
        # Calls wait for room too, in the same queue.
        with pytest.raises((Overloaded, DeadlineExceeded)):
            await client.call("echo", 1)
        gate.opened.set()
        await eventually(lambda: len(gate.casts) == 3000 - len(refused))
        assert await client.prepare(timeout=PATIENCE).call("echo", 1) == 1

    asyncio.run(main())


def test_endpoints_where_nobody_answers(make: Make, blackhole: str, free_port: int) -> None:
    dead = f"tcp://127.0.0.1:{free_port}"

    async def main() -> None:
        for endpoint in (dead, blackhole):
            client = make("t", connect=endpoint, timeout=1.0)
            for operation in (client.call, client.cast):
                outcomes = await asyncio.gather(*(operation("x") for _ in range(100)), return_exceptions=True)
                assert {type(outcome) for outcome in outcomes} <= {Unreachable, DeadlineExceeded}
            gathered = await client.gather("x")
            assert [type(error) for error in gathered.missing.values()] == [Unreachable]
            fanned = await client.fanout("x")
            assert (fanned.sent, [type(error) for error in fanned.failed.values()]) == ((), [Unreachable])

    asyncio.run(main())


def test_the_loop_goes_on_while_operations_connect(
    make_node: Callable[..., Node], registry: str, blackhole: str
) -> None:
    node = make_node(registry, connect_timeout=PATIENCE)

    async def main() -> None:
        client = AsyncClient("t", node=node, timeout=PATIENCE, connect=blackhole)
        for operation in (client.call, client.cast, client.gather, client.fanout):
            tasks = [asyncio.ensure_future(operation("x")) for _ in range(5)]
            for _ in range(100):
                await asyncio.sleep(0)
            assert not any(task.done() for task in tasks), "the loop has waited for them"
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        await client.close()

    asyncio.run(main())


def test_a_cold_endpoint_is_connected_once_however_many_call(serve: Serve, make: Make, gate: Gate) -> None:
    server = serve("t", gate, bind="tcp://127.0.0.1:*")

    async def main() -> None:
        client = make("t", connect=server.endpoints)
        threads = threading.active_count()
        tasks = [client.submit("echo", number) for number in range(500)]
        await asyncio.sleep(0)
        assert threading.active_count() <= threads + 1
        assert await asyncio.gather(*tasks) == list(range(500))
        stats = client._node.pool.stats()
        assert stats["opened"] == 1
        assert in_use(client._node) == 1

    asyncio.run(main())


def test_a_member_that_does_not_answer_leaves_time_for_the_others(
    serve: Serve, make: Make, blackhole: str, gate: Gate
) -> None:
    server = serve("t", gate, bind="tcp://127.0.0.1:*")

    async def main() -> None:
        client = make("t", connect=[blackhole, *server.endpoints], timeout=1.5)
        for number in range(4):
            assert await client.call("echo", number) == number
            await client.cast("note", number)
        gathered = await client.gather("echo", 1)
        assert list(gathered.results.values()) == [1]
        assert len(gathered.missing) == 1

    asyncio.run(main())


def test_who_has_more_time_than_the_one_who_began_to_connect(
    make_node: Callable[..., Node], registry: str, serve: Serve, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve("t", gate, bind="tcp://127.0.0.1:*")
    node = make_node(registry)
    acquire = node.pool.acquire
    attempts = []

    class Slow:
        """The first attempt finds nobody within its time."""

        def __getattr__(self, name: str) -> Any:
            return getattr(pool, name)

        def acquire(self, endpoint: str, timeout: float | None = None) -> Any:
            attempts.append(timeout)
            if len(attempts) == 1:
                time.sleep(timeout or 0.0)
                raise Unreachable("too little time")
            return acquire(endpoint, timeout)

    pool = node.pool

    async def main() -> None:
        client = AsyncClient("t", node=node, timeout=PATIENCE, connect=server.endpoints)
        monkeypatch.setattr(node, "pool", Slow())
        hasty = client.prepare(timeout=0.1).submit("echo", 1)
        patient = client.submit("echo", 2)
        with pytest.raises((Unreachable, DeadlineExceeded)):
            await hasty
        assert await patient == 2
        await client.close()
        monkeypatch.undo()

    asyncio.run(main())
    assert len(attempts) >= 2


# -- servers that die --------------------------------------------------------------------------------------------


def test_kill_9(peers: Peers, node: Node) -> None:
    peer = peers("t", "one")

    async def main() -> None:
        client = AsyncClient("t", node=node, timeout=None, connect=peer.endpoints[1])
        assert await client.call("who") == "one"
        calls = [client.submit("sleep", 600.0) for _ in range(20)]
        await eventually(lambda: peer.ask("stats")["port"]["calls"] > len(calls))
        assert not any(call.done() for call in calls)
        await asyncio.to_thread(peer.kill)
        # No timeout: only the broken connection tells.
        outcomes = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), PATIENCE)
        assert {type(outcome) for outcome in outcomes} == {PeerLost}
        assert all(outcome.executed_possible for outcome in outcomes)  # type: ignore[union-attr]
        with pytest.raises(Unreachable):
            await client.prepare(timeout=10.0).call("who")
        assert in_use(node) == 0

    asyncio.run(main())


def test_a_lost_channel_does_not_spin_the_loop(peers: Peers, node: Node) -> None:
    peer = peers("t", "one")
    selector = CountingSelector()

    async def main() -> None:
        client = AsyncClient("t", node=node, timeout=PATIENCE, connect=peer.endpoints[1])
        assert await client.call("who") == "one"
        await asyncio.to_thread(peer.kill)
        await eventually(lambda: in_use(node) == 0)
        await assert_idle(selector)

    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as runner:
        runner.run(main())


def test_a_server_is_restarted(peers: Peers, node: Node) -> None:
    peer = peers("t", "one")

    async def main() -> None:
        client = AsyncClient("t", node=node, timeout=PATIENCE, discovery_timeout=PATIENCE)
        for _ in range(3):
            called = peer.ask("stats")["port"]["calls"]
            task = client.submit("sleep", 0.2)
            await eventually(lambda called=called: peer.ask("stats")["port"]["calls"] > called)
            stopped = asyncio.create_task(asyncio.to_thread(peer.ask, "stop", True, 20.0))
            assert await task == "one"
            assert await stopped is True
            waiting = client.submit("who")
            await asyncio.sleep(0)
            await asyncio.to_thread(peer.ask, "start")
            assert await waiting == "one"

    asyncio.run(main())


def test_stop_under_load_loses_nothing(peers: Peers, node: Node) -> None:
    """Tasks call all the time; one of two servers is stopped and started again, the other one an AsyncServer."""
    one, _ = peers("t", "one"), peers("t", "two", **{"async": True})

    async def main() -> None:
        client = AsyncClient("t", node=node, timeout=PATIENCE)
        await client.call("who")
        await eventually(lambda: len(client.members()) == 2)
        stop = asyncio.Event()
        made = [0] * 8

        async def work(mine: int) -> None:
            while not stop.is_set():
                assert await client.call("echo", made[mine]) == made[mine]
                made[mine] += 1

        async def each_made(more: int) -> None:
            before = list(made)
            await eventually(lambda: all(now >= was + more for now, was in zip(made, before, strict=True)))

        tasks = [asyncio.create_task(work(mine)) for mine in range(8)]
        for _ in range(3):
            await each_made(20)
            assert await asyncio.to_thread(one.ask, "stop", True, PATIENCE) is True
            await each_made(20)
            await asyncio.to_thread(one.ask, "start")
        stop.set()
        await asyncio.gather(*tasks)

    asyncio.run(main())


# -- the end of loops, clients and nodes -------------------------------------------------------------------------


def test_idle_channels_go_back_to_the_pool(serve: Serve, make: Make, gate: Gate) -> None:
    serve("t", gate)

    async def main() -> None:
        client = make("t")
        assert await client.call("echo", 1) == 1
        assert in_use(client._node) == 1
        await eventually(lambda: in_use(client._node) == 0)
        assert client._node.pool.stats()["idle"] == 1
        assert await client.call("echo", 2) == 2
        assert client._node.pool.stats()["opened"] == 1
        await client.close()
        assert in_use(client._node) == 0
        await client.close()

    asyncio.run(main())


def test_a_full_pool_gets_idle_channels_back_when_somebody_waits(
    peers: Peers, make_node: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One socket for two endpoints: two tasks of the loop, and a thread besides, take turns."""
    monkeypatch.setattr(loops, "_IDLE", 3600.0)
    endpoints = [peers("t", name).endpoints[1] for name in ("one", "two")]
    node = make_node("memory://full", max_sockets=1)

    async def main() -> None:
        one, two = (AsyncClient("t", node=node, connect=each, timeout=PATIENCE) for each in endpoints)
        assert await one.call("who") == "one"
        assert await two.call("who") == "two"
        blocking = Client("t", node=node, connect=endpoints[0], timeout=PATIENCE)
        assert await asyncio.to_thread(blocking.call, "who") == "one"

        async def several(client: AsyncClient) -> list[str]:
            return [await client.call("who") for _ in range(10)]

        assert await asyncio.gather(several(one), several(two)) == [["one"] * 10, ["two"] * 10]
        large = b"x" * 300_000
        assert await asyncio.gather(one.call("echo", large), two.call("echo", large)) == [large] * 2

    asyncio.run(main())
    node.close()


def test_close_leaves_other_clients_of_the_loop_alone(serve: Serve, make: Make, gate: Gate) -> None:
    serve("t", gate)

    async def main() -> None:
        one, two = make("t"), make("t")
        assert await one.call("echo", 1) == 1
        waiting = two.submit("wait", "result")
        await eventually(lambda: gate.entered)
        await one.close()
        with pytest.raises(Closed):
            await one.call("echo", 1)
        gate.opened.set()
        assert await waiting == "result"
        assert await two.call("echo", 2) == 2

    asyncio.run(main())


@pytest.mark.parametrize("outstanding", [False, True])
def test_a_loop_that_is_closed_with_clients_open(
    serve: Serve, make: Make, gate: Gate, outstanding: bool
) -> None:
    """The pool gets the channels back when the loop is garbage, whatever was outstanding on them."""
    serve("t", gate)
    client = make("t", timeout=None)
    loop = asyncio.new_event_loop()

    async def main() -> None:
        assert await client.call("echo", 1) == 1
        if outstanding:
            client.submit("wait")
            await eventually(lambda: gate.entered)

    loop.run_until_complete(main())
    loop.set_exception_handler(lambda *_: None)
    assert in_use(client._node) == 1
    for task in asyncio.all_tasks(loop):
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        del task
    collected = weakref.ref(loop)
    loop.close()
    del loop

    def given_back() -> bool:
        gc.collect()
        return in_use(client._node) == 0

    wait_until(given_back)
    assert collected() is None
    gate.opened.set()
    assert asyncio.run(client.call("echo", 2)) == 2


def test_loops_that_come_and_go_leave_nothing(serve: Serve, make: Make, gate: Gate) -> None:
    serve("t", gate)
    client = make("t")
    seen = []

    async def main() -> None:
        seen.append(weakref.ref(asyncio.get_running_loop()))
        assert await client.call("echo", 1) == 1

    for _ in range(20):
        asyncio.run(main())
    gc.collect()
    assert [reference() for reference in seen] == [None] * 20
    wait_until(lambda: in_use(client._node) == 0)


@pytest.mark.parametrize("where", ["on the loop", "on another thread", "after the loop"])
def test_the_node_is_closed(
    serve: Serve, make_node: Callable[..., Node], registry: str, gate: Gate, where: str
) -> None:
    serve("t", gate)
    node = make_node(registry)
    client = AsyncClient("t", node=node, timeout=None)

    async def main() -> None:
        assert await client.call("echo", 1) == 1
        waiting = client.submit("wait")
        await eventually(lambda: gate.entered)
        if where == "after the loop":
            return
        if where == "on the loop":
            node.close(timeout=0.1)
        else:
            await asyncio.to_thread(node.close, 0.1)
        with pytest.raises(Closed):
            await waiting
        with pytest.raises(Closed):
            await client.call("echo", 1)
        # Another node's sockets get the same descriptors.
        with make_node(registry) as other:
            again = AsyncClient("t", node=other, timeout=PATIENCE)
            for number in range(10):
                assert await again.call("echo", number) == number

    asyncio.run(main())
    node.close()


def test_contexts_do_not_mix(serve: Serve, make: Make, gate: Gate) -> None:
    """What the loop calls later keeps no request's context alive, and callbacks of futures see none."""
    serve("t", gate)
    variable: contextvars.ContextVar[Any] = contextvars.ContextVar("variable", default=None)

    class Large:
        pass

    async def main() -> None:
        client = make("t")
        sync = Client("t", node=client._node, timeout=PATIENCE)
        seen: list[Any] = []

        async def request() -> weakref.ref[Large]:
            large = Large()
            variable.set(large)
            # Not answered before there is a callback: that would run here.
            sync.submit("wait", 1).add_done_callback(lambda _: seen.append(variable.get()))
            gate.opened.set()
            assert await client.call("echo", 1) == 1
            assert variable.get() is large
            return weakref.ref(large)

        reference = await asyncio.create_task(request())
        await eventually(lambda: seen)
        assert seen == [None]
        await asyncio.sleep(0)
        gc.collect()
        assert reference() is None
        assert await client.call("echo", 2) == 2

    asyncio.run(main())


def test_uvloop(serve: Serve, make: Make, gate: Gate, uvloop: Any) -> None:
    serve("t", gate)
    client = make("t")

    async def main() -> None:
        results = await asyncio.gather(*(client.call("echo", number) for number in range(500)))
        assert results == list(range(500))
        await client.cast("note", bytes(1_000_000))
        await eventually(lambda: gate.casts)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
    gc.collect()
