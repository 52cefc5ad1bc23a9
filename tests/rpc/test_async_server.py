"""AsyncServer: coroutine functions as tasks, plain ones inline, on the running loop."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from waiting_support import PATIENCE, CountingSelector, assert_idle, eventually
from waiting_support import until as wait_until

from zmqcore import (
    AsyncClient,
    AsyncServer,
    BadArguments,
    Client,
    Closed,
    DeadlineExceeded,
    Node,
    NoSuchMethod,
    Operation,
    PeerLost,
    RemoteError,
    Server,
)
from zmqcore.rpc import deadline

Until = Callable[..., None]
Running = Callable[..., Any]
Peers = Callable[..., Any]
MakeNode = Callable[..., Node]


class Work:
    """Handlers of both sorts; ``gate`` is made by the loop that serves."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.entered = 0
        self.most = 0
        self.inside = 0
        self.cancelled = 0
        self.noted: list[Any] = []

    async def echo(self, value: Any = None) -> Any:
        return value

    def plain(self, value: Any = None) -> Any:
        return value

    async def wait(self, value: Any = None) -> Any:
        self.entered += 1
        self.inside += 1
        self.most = max(self.most, self.inside)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.inside -= 1
        return value

    async def fail(self, text: str) -> None:
        await asyncio.sleep(0)
        raise LookupError(text)

    def fail_at_once(self, text: str) -> None:
        raise LookupError(text)

    async def note(self, value: Any) -> None:
        await asyncio.sleep(0)
        self.noted.append(value)

    async def remaining(self) -> float | None:
        return deadline.time_left()

    def remaining_plain(self) -> float | None:
        return deadline.time_left()


class Pair:
    """A node to serve on and one to call from."""

    def __init__(self, make_node: MakeNode, registry: str) -> None:
        self.here = make_node(registry)
        self.there = make_node(registry)

    def server(self, *endpoints: Any, **options: Any) -> AsyncServer:
        return AsyncServer("t", *endpoints, node=self.here, **options)

    def client(self, **options: Any) -> AsyncClient:
        return AsyncClient("t", node=self.there, **{"timeout": PATIENCE, **options})


@pytest.fixture
def pair(make_node: MakeNode, registry: str) -> Pair:
    return Pair(make_node, registry)


# -- handlers ----------------------------------------------------------------------------------------------------


def test_handlers_of_both_sorts(pair: Pair) -> None:
    class Callable:
        async def __call__(self, value: int) -> int:
            return value + 1

    async def add(a: int, b: int) -> int:
        return a + b

    async def main() -> None:
        work = Work()
        extra = {"bad": object, "partial": functools.partial(add, 40), "object": Callable()}
        async with pair.server(work, extra) as server, pair.client() as client:
            assert server.running
            assert await client.call("echo", 1) == 1
            assert await client.call("plain", [1, "x"]) == [1, "x"]
            assert await client.call("partial", 2) == 42
            assert await client.call("object", 2) == 3
            large = os.urandom(500_000)
            assert await client.call("echo", large) == large
            for method in ("fail", "fail_at_once"):
                with pytest.raises(RemoteError) as caught:
                    await client.call(method, "not there")
                assert (caught.value.type, caught.value.message) == ("LookupError", "not there")
                assert f"in {method}" in caught.value.traceback
            with pytest.raises(NoSuchMethod, match="plain"):
                await client.call("nothing")
            for method in ("echo", "plain"):
                with pytest.raises(BadArguments, match="signature"):
                    await client.call(method, 1, 2, 3)
            with pytest.raises(RemoteError, match="cannot be sent"):
                await client.call("bad")
            assert await client.call("echo", "still there") == "still there"
        assert not server.running

    asyncio.run(main())


def test_what_it_tells_about_itself(pair: Pair) -> None:
    async def main() -> None:
        work = Work()
        async with pair.server(work) as server, pair.client() as client:
            waiting = [client.submit("wait") for _ in range(3)]
            await eventually(lambda: work.entered == 3)
            stats = await client.call("zmqcore.stats")
            assert stats["tasks"] == 3
            assert stats["pid"] == os.getpid()
            assert stats["endpoints"] == list(server.endpoints)
            assert stats["port"]["calls"] >= 4
            assert (await client.call("zmqcore.ping"))["server"] == server.topic.server
            assert "wait" in await client.call("zmqcore.methods")
            assert "serving at" in repr(server)
            work.gate.set()
            await asyncio.gather(*waiting)
            assert server.stats()["handled"] >= 6
            with pytest.raises(RemoteError):
                await client.call("fail", "x")
            assert server.stats()["failed"] == 1
        assert server.stats()["tasks"] == 0
        assert "not running" in repr(server)

    asyncio.run(main())


def test_many_tasks_at_once(peers: Peers, node: Node) -> None:
    """From threads of another process's point of view: 200 calls wait at the same time."""
    peers("t", **{"async": True})
    with Client("t", node=node, timeout=PATIENCE) as client:
        futures = [client.submit("sleep", 0.3) for _ in range(200)]
        assert client.call("add", 1, 2) == 3
        assert not any(future.done() for future in futures)
        assert len({future.result() for future in futures}) == 1
        assert client.call("zmqcore.stats")["handled"] >= 201


def test_options_are_checked(pair: Pair) -> None:
    for name, value in (("max_concurrency", 0), ("queue_size", 0), ("on_full", "drop")):
        with pytest.raises(ValueError, match=f"{name} is {value!r}"):
            pair.server({"x": len}, **{name: value})
    with pytest.raises(TypeError, match="coroutine"):
        Server("t", {"x": Work.echo}, node=pair.here)


def test_plain_functions_alone_cannot_reject(pair: Pair) -> None:
    """They are run where they are received: there is no queue that could be full."""
    with pytest.raises(ValueError, match="on_full is 'reject' and there are plain functions only"):
        pair.server({"x": len}, on_full="reject")
    pair.server(Work(), on_full="reject")  # coroutine functions, too
    pair.server({"x": lambda: iter(())}, {"y": count_up}, on_full="reject")

    async def passing(operation: Operation, proceed: Callable[[Operation], Any]) -> Any:
        return await proceed(operation)

    pair.server({"x": len}, on_full="reject", interceptors=[passing])  # by which it runs as a task


def count_up(n: int) -> Iterator[int]:
    yield from range(n)


def test_a_start_that_fails_leaves_nothing(make_node: MakeNode, runtime: Path) -> None:
    """On a loop that cannot watch a descriptor, for example. On another one it starts then."""

    class Blind(asyncio.SelectorEventLoop):
        def add_reader(self, *_: Any) -> None:
            raise NotImplementedError("it watches no descriptors")

    node = make_node("memory://blind")
    server = AsyncServer("t", {"x": len}, node=node, bind=["ipc://*", "tcp://127.0.0.1:*"])
    with asyncio.Runner(loop_factory=Blind) as runner:
        for _ in range(2):
            with pytest.raises(NotImplementedError, match="it watches no descriptors"):
                runner.run(server.start())
    assert list(runtime.glob("*.sock")) == []

    async def main() -> None:
        async with server:
            assert await AsyncClient("t", node=node).call("x", "four") == 4

    asyncio.run(main())


# -- deadlines and contexts --------------------------------------------------------------------------------------


def test_deadlines(pair: Pair) -> None:
    async def main() -> None:
        work = Work()
        async with pair.server(work), pair.client() as client:
            for method in ("remaining", "remaining_plain"):
                left = await client.prepare(timeout=20.0).call(method)
                assert 0 < left <= 20.0
                assert await client.prepare(timeout=None).call(method) is None
            assert deadline.time_left() is None
            with pytest.raises(DeadlineExceeded):
                await client.prepare(timeout=0.05).call("wait")
            work.gate.set()

    asyncio.run(main())


def test_expired_work_is_not_run(pair: Pair) -> None:
    """The loop is blocked meanwhile, which is why the client is on another thread."""

    async def main() -> None:
        work = Work()
        gate, entered = threading.Event(), threading.Event()

        def block() -> None:
            entered.set()
            gate.wait(PATIENCE)

        async with pair.server(work, {"block": block, "pause": time.sleep}) as server:

            def calls() -> None:
                client = Client("t", node=pair.there, timeout=PATIENCE)
                blocking = client.submit("block")
                assert entered.wait(PATIENCE)
                # All of it has come when the loop goes on, and is received at once; the deadlines pass in the pause.
                client.cast("pause", 1.0)
                futures = [client.prepare(timeout=0.6).submit("note", i) for i in range(10)]
                time.sleep(0.2)
                gate.set()
                assert [type(future.exception()) for future in futures] == [DeadlineExceeded] * 10
                blocking.result()
                assert client.call("echo", 1) == 1

            await asyncio.to_thread(calls)
            assert work.noted == []
            assert server.stats()["expired"] == 10

    asyncio.run(main())


def test_no_handler_sees_the_context_of_another_request(pair: Pair) -> None:
    """Neither a plain function's nor a coroutine's, whatever the order; but that in which the server was started."""
    variable: contextvars.ContextVar[Any] = contextvars.ContextVar("variable", default=None)
    seen: list[Any] = []

    def plain(value: int) -> None:
        seen.append((variable.get(), deadline.time_left()))
        variable.set(value)
        deadline.current.set(time.monotonic() + 1000.0)

    async def coroutine(value: int) -> None:
        plain(value)
        await asyncio.sleep(0)
        assert variable.get() == value

    async def main() -> None:
        variable.set("the server's")
        token = deadline.current.set(time.monotonic() + 1000.0)
        async with pair.server({"plain": plain, "coroutine": coroutine}):
            deadline.current.reset(token)
            variable.set("changed later")
            client = pair.client(timeout=None)
            for number in range(5):
                await client.call("plain", number)
                await client.call("coroutine", number)
            await asyncio.gather(*(client.call(method, 9) for method in ("plain", "coroutine") * 20))
            assert variable.get() == "changed later"
        assert seen == [("the server's", None)] * 50

    asyncio.run(main())


# -- max_concurrency ---------------------------------------------------------------------------------------------


def test_max_concurrency_is_kept(pair: Pair) -> None:
    selector = CountingSelector()

    async def main() -> None:
        work = Work()
        async with pair.server(work, max_concurrency=3, queue_size=1) as server, pair.client() as client:
            calls = [client.submit("wait", number) for number in range(100)]
            await eventually(lambda: work.entered == 3)
            # A connection that comes now makes the descriptor readable, and it stays so.
            late = AsyncClient("t", node=pair.here, timeout=PATIENCE).submit("wait", "late")
            await eventually(lambda: pair.here.pool.stats()["in_use"] == 1)
            await assert_idle(selector)
            assert (work.entered, server.stats()["tasks"]) == (3, 3)
            work.gate.set()
            assert await asyncio.gather(*calls) == list(range(100))
            assert await late == "late"
            assert work.most == 3

    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as runner:
        runner.run(main())


def test_windows_fill_when_it_reads_no_more(peers: Peers, make_node: MakeNode) -> None:
    peers("t", **{"async": True, "max_concurrency": 1, "queue_size": 1})
    node = make_node(window_messages=300)
    with Client("t", node=node, timeout=60.0) as client:
        for _ in range(2000):
            client.cast("count", "x", 0.0005)
        (channel,) = node.pool.channels()
        assert channel.stats()["window_waits"] > 0
        wait_until(lambda: client.call("counted", "x") == 2000)


def test_a_fast_caster_and_a_loop_that_has_other_work(pair: Pair, running: Running) -> None:
    async def main() -> None:
        work = Work()
        async with pair.server(work, max_concurrency=8, queue_size=8):

            def cast() -> None:
                client = Client("t", node=pair.there, timeout=60.0)
                for number in range(5000):
                    client.cast("note", number)

            casting = running(cast)
            ticks = 0
            while not casting.ended or len(work.noted) < 5000:
                await asyncio.sleep(0)
                ticks += 1
            casting.result()
            assert ticks > 100
            assert sorted(work.noted) == list(range(5000))

    asyncio.run(main())


# -- stopping ----------------------------------------------------------------------------------------------------


def test_stop_drains(pair: Pair) -> None:
    async def main() -> None:
        work = Work()
        server = await pair.server(work).start()
        client = pair.client()
        calls = [client.submit("wait", number) for number in range(20)]
        await eventually(lambda: work.entered == 20)
        for number in range(20):
            await client.cast("note", number)
        stopping = [asyncio.create_task(server.stop()) for _ in range(3)]
        waiting = asyncio.create_task(server.wait())
        await eventually(lambda: not server.running and len(work.noted) == 20)
        assert not any(task.done() for task in (*stopping, waiting))
        with pytest.raises(RuntimeError, match="stopped"):
            await server.start()
        work.gate.set()
        assert await asyncio.gather(*stopping) == [True] * 3
        await waiting
        assert await asyncio.gather(*calls) == list(range(20))
        assert sorted(work.noted) == list(range(20))
        assert await server.stop() is True
        assert client.members() == ()

    asyncio.run(main())


def test_stop_gives_up_in_the_end(pair: Pair) -> None:
    async def main() -> None:
        work = Work()
        server = await pair.server(work).start()
        client = pair.client()
        call = client.submit("wait")
        await eventually(lambda: work.entered)
        assert await server.stop(timeout=0.2) is False
        assert work.cancelled == 1
        with pytest.raises((RemoteError, PeerLost)):
            await call

    asyncio.run(main())


def test_stop_without_draining(pair: Pair) -> None:
    async def main() -> None:
        work = Work()
        server = await pair.server(work, max_concurrency=5).start()
        client = pair.client()
        calls = [client.submit("wait") for _ in range(20)]
        await eventually(lambda: work.entered == 5)
        await server.stop(drain=False)
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} <= {RemoteError, PeerLost}
        assert (work.cancelled, work.entered) == (5, 5)

    asyncio.run(main())


def test_a_handler_that_will_not_be_cancelled(pair: Pair) -> None:
    async def stubborn() -> None:
        entered.append(1)
        while not released.is_set():
            try:
                await asyncio.sleep(0.05)
            except asyncio.CancelledError:
                continue
        left.append(1)

    entered: list[int] = []
    left: list[int] = []
    released = threading.Event()

    async def main() -> None:
        server = await pair.server({"stubborn": stubborn}).start()
        call = pair.client().submit("stubborn")
        await eventually(lambda: entered)
        assert await asyncio.wait_for(server.stop(timeout=0.1), PATIENCE) is False
        with pytest.raises(PeerLost):
            await call
        released.set()
        await eventually(lambda: left)

    asyncio.run(main())


def test_stop_is_cancelled(pair: Pair) -> None:
    async def main() -> None:
        work = Work()
        server = await pair.server(work).start()
        call = pair.client().submit("wait", 1)
        await eventually(lambda: work.entered)
        stopping = asyncio.create_task(server.stop())
        await eventually(lambda: not server.running)
        stopping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stopping
        with pytest.raises((RemoteError, PeerLost)):
            await call
        await server.wait()
        assert server.stats()["tasks"] == 0

    asyncio.run(main())


def test_a_handler_may_stop_its_server(pair: Pair) -> None:
    async def main() -> None:
        holder: list[AsyncServer] = []

        async def shut_down() -> Any:
            return [await holder[0].stop(), await holder[0].stop()]

        holder.append(await pair.server({"shut_down": shut_down}).start())
        assert await pair.client().call("shut_down") == [False, False]
        await asyncio.wait_for(holder[0].wait(), PATIENCE)
        assert not holder[0].running

    asyncio.run(main())


def test_start_again_and_twice(pair: Pair) -> None:
    async def main() -> None:
        server = pair.server(Work())
        assert await server.stop() is True
        await server.wait()
        client = pair.client(discovery_timeout=PATIENCE)
        for number in range(3):
            await server.start()
            with pytest.raises(RuntimeError, match="runs"):
                await server.start()
            assert await client.call("echo", number) == number
            await server.stop()

    asyncio.run(main())
    server = pair.server({"echo": lambda value: value})

    async def again() -> int:
        async with server:
            return int(await pair.client(discovery_timeout=PATIENCE).call("echo", 5))

    assert [asyncio.run(again()) for _ in range(3)] == [5] * 3


def test_what_fails_while_it_starts_leaves_nothing(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        server = pair.server(Work(), bind="tcp://127.0.0.1:*")

        def fail(*_: Any, **__: Any) -> None:
            raise OSError("no registry")

        with monkeypatch.context() as patched:
            patched.setattr(pair.here.matchmaker, "register", fail)
            with pytest.raises(OSError, match="no registry"):
                await server.start()
        assert not server.running
        async with server, pair.client() as client:
            assert await client.call("echo", 1) == 1
            taken = pair.server(Work(), bind=server.endpoints)
            with pytest.raises(OSError, match="cannot listen"):
                await taken.start()
            assert not taken.running

    asyncio.run(main())


def test_serve_forever(pair: Pair) -> None:
    async def main() -> None:
        server = pair.server(Work())
        serving = asyncio.create_task(server.serve_forever())
        client = pair.client(discovery_timeout=PATIENCE)
        assert await client.call("echo", 1) == 1
        serving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await serving
        assert not server.running
        serving = asyncio.create_task(server.serve_forever())
        assert await client.call("echo", 2) == 2
        await server.stop()
        await serving

    asyncio.run(main())


def test_kill_9(peers: Peers, node: Node) -> None:
    peer = peers("t", **{"async": True})
    with Client("t", node=node, timeout=None) as client:
        assert client.call("echo", 1) == 1
        futures = [client.submit("sleep", 600.0) for _ in range(10)]
        peer.kill()
        assert {type(future.exception(PATIENCE)) for future in futures} == {PeerLost}


def test_stopped_and_started_by_another_process(peers: Peers, node: Node) -> None:
    peer = peers("t", **{"async": True})
    with Client("t", node=node, timeout=PATIENCE, discovery_timeout=PATIENCE) as client:
        for _ in range(3):
            future = client.submit("sleep", 0.3)
            client.call("echo", 1)
            assert peer.ask("stop", True, PATIENCE) is True
            assert future.result() == peer.server
            peer.ask("start")
            assert client.call("echo", 2) == 2
    assert peer.ask("stats")["tasks"] == 0


# -- its node is closed ------------------------------------------------------------------------------------------


def test_close_on_another_thread_drains(pair: Pair) -> None:
    async def main() -> None:
        work = Work()
        server = await pair.server(work).start()
        call = pair.client().submit("wait", "result")
        await eventually(lambda: work.entered)
        closing = asyncio.create_task(asyncio.to_thread(pair.here.close))
        await eventually(lambda: not server.running)
        assert not closing.done()
        work.gate.set()
        assert await call == "result"
        await closing
        await server.wait()
        with pytest.raises(Closed):
            await server.start()

    asyncio.run(main())


def test_close_from_a_handler(pair: Pair) -> None:
    async def main() -> None:
        async def coroutine() -> str:
            pair.here.close()
            return "from a coroutine"

        server = await pair.server({"close": coroutine}).start()
        assert await pair.client().call("close") == "from a coroutine"
        await asyncio.wait_for(server.wait(), PATIENCE)

    asyncio.run(main())
    pair.here.close()


def test_close_from_a_plain_handler(pair: Pair) -> None:
    async def main() -> None:
        server = await pair.server({"close": pair.here.close}).start()
        await pair.client().call("close")
        await asyncio.wait_for(server.wait(), PATIENCE)

    asyncio.run(main())
    pair.here.close()


@pytest.mark.parametrize("running_tasks", [False, True])
def test_close_at_the_end_of_main(pair: Pair, running_tasks: bool) -> None:
    """The loop ends right after; whatever of that comes first, nothing hangs and nothing is left."""

    async def main() -> None:
        work = Work()
        await pair.server(work).start()
        call = pair.client().submit("wait")
        await eventually(lambda: work.entered)
        if not running_tasks:
            work.gate.set()
            await call
        pair.here.close()

    asyncio.run(main())
    pair.here.close()


@pytest.mark.parametrize("closed", [False, True])
def test_close_after_its_loop(pair: Pair, closed: bool) -> None:
    """The loop does not run any more, or is closed: it is too late for draining, but not for closing."""
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(pair.server({"echo": len}).start())
    assert server.running
    if closed:
        loop.close()
    pair.here.close()
    assert not server.running
    assert pair.there.matchmaker.members("t").members == ()
    loop.close()


def test_close_while_the_loop_is_blocked(pair: Pair, running: Running) -> None:
    """A plain handler blocks for longer than close() may take: it says so, and the rest is done later."""
    started, gate, entered = threading.Event(), threading.Event(), threading.Event()

    def block() -> None:
        entered.set()
        gate.wait(PATIENCE)

    async def main() -> None:
        server = await pair.server({"block": block}).start()
        started.set()
        await server.wait()

    serving = running(asyncio.run, main())
    # It can be called before start() has returned, and would then be closed while it starts.
    assert started.wait(PATIENCE)
    client = Client("t", node=pair.there, timeout=PATIENCE, discovery_timeout=PATIENCE)
    call = client.submit("block")
    assert entered.wait(PATIENCE)
    closing = running(pair.here.close, 0.2)
    closing.thread.join(0.5)
    gate.set()
    closing.result()
    serving.result()
    assert isinstance(call.exception(), PeerLost | None)


def test_a_process_that_closes_nothing_ends_quietly(run_python: Callable[..., Any], runtime: Path) -> None:
    for end in ("", "await asyncio.sleep(0.05)", "raise SystemExit(0)", "node.close()"):
        ended = run_python(
            "import asyncio\n"
            "from zmqcore import AsyncClient, AsyncServer, default_node\n"
            "async def echo(value): return value\n"
            "async def main():\n"
            "    node = default_node()\n"
            "    server = await AsyncServer('t', {'echo': echo}).start()\n"
            "    client = AsyncClient('t', timeout=30.0)\n"
            "    assert await client.call('echo', 1) == 1\n"
            f"    {end or 'pass'}\n"
            "asyncio.run(main())\n"
        )
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", ""), end
        assert list(runtime.glob("*.sock")) == [], end


def test_uvloop(pair: Pair, uvloop: Any) -> None:

    async def main() -> None:
        work = Work()
        async with pair.server(work, max_concurrency=5), pair.client() as client:
            assert await asyncio.gather(*(client.call("echo", n) for n in range(300))) == list(range(300))
            calls = [client.submit("wait", n) for n in range(20)]
            await eventually(lambda: work.entered == 5)
            work.gate.set()
            assert await asyncio.gather(*calls) == list(range(20))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
