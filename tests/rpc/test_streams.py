"""Handlers that are generators: the caller gets an iterator, and no more than it has granted. Real processes."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from waiting_support import PATIENCE, eventually

from zmqcore import (
    AsyncClient,
    AsyncServer,
    AsyncStream,
    BadArguments,
    Client,
    Closed,
    DeadlineExceeded,
    Node,
    PeerLost,
    RemoteError,
    Server,
    Stream,
    time_left,
)

Peers = Callable[..., Any]
Serve = Callable[..., Server]
Connect = Callable[..., Client]
Until = Callable[..., None]
MakeNode = Callable[..., Node]

#: What the server may send ahead of what has been taken.
CREDIT = 32

#: The servers of another process: threads, the receiving thread itself, and a loop.
KINDS = pytest.mark.parametrize(
    "options", [{"workers": 2}, {"workers": 0}, {"async": True}], ids=["threads", "inline", "async"]
)


@pytest.fixture
def client(node: Node) -> Client:
    return Client("t", node=node, timeout=PATIENCE)


def assert_nothing_open(node: Node) -> None:
    for channel in node.pool.channels():
        channel.look()
        assert channel.stats()["outstanding_calls"] == 0
        assert channel.stats()["window_messages"] <= 1


# -- threads, inline and a loop at the server; threads here ------------------------------------------------------


@KINDS
def test_items_come_in_order_and_all(peers: Peers, client: Client, options: dict[str, Any]) -> None:
    peers("t", **options)
    for n in (0, 1, 15, 16, 17, 31, 32, 33, 64, 1000):
        stream = client.call("numbers", n)
        if n == 0:
            # It ends before there is an item: no stream, but what a method without a result returns.
            assert stream is None or list(stream) == []
            continue
        assert isinstance(stream, Stream)
        assert list(stream) == list(range(n))
        assert list(stream) == []
        assert stream.closed
    assert client.call("counted", "produced") == 1209
    assert client.call("counted", "closed") == 10
    assert_nothing_open(client._node)


@KINDS
def test_the_server_stays_no_further_ahead_than_it_was_granted(
    peers: Peers, client: Client, until: Until, options: dict[str, Any]
) -> None:
    peers("t", **options)
    stream = client.call("numbers", 10**9)
    # On the receiving thread nothing else is run until the stream has ended, so its port is asked.
    (channel,) = client._node.pool.channels()
    assert channel.ping(PATIENCE)
    until(lambda: channel.look() or channel.stats()["items"] == CREDIT)
    assert next(stream) == 0
    assert channel.ping(PATIENCE)
    assert channel.stats()["items"] == CREDIT
    for number in range(1, 16):
        assert next(stream) == number
    until(lambda: channel.look() or channel.stats()["items"] == CREDIT + 16)
    stream.close()
    until(lambda: client.call("counted", "closed") == 1)  # on another thread than this call, maybe
    assert client.call("counted", "produced") <= CREDIT + 17


@KINDS
def test_a_slow_consumer_costs_neither_side_memory(
    peers: Peers, client: Client, until: Until, options: dict[str, Any]
) -> None:
    """Arrays of 1 MiB, without end, to somebody who takes none for a while: 32 of them are under way."""
    peers("t", **options)
    with client.call("numbers", 10**9, 1 << 20) as stream:
        assert len(next(stream)) == 1 << 20
        (channel,) = client._node.pool.channels()
        until(lambda: channel.look() or channel.stats()["items"] >= CREDIT)
        assert channel.ping(PATIENCE)
        assert [len(item) for item in itertools.islice(stream, 50)] == [1 << 20] * 50
    assert client.call("max_rss") < 400 << 20
    assert client.call("counted", "produced") < 100


@KINDS
def test_closing_early_stops_the_generator(
    peers: Peers, client: Client, until: Until, options: dict[str, Any]
) -> None:
    peer = peers("t", **options)

    def closed() -> int:
        return int(client.call("counted", "closed"))

    with client.call("numbers", 10**9) as stream:
        assert list(itertools.islice(stream, 100)) == list(range(100))
    assert stream.closed
    assert list(stream) == []
    until(lambda: closed() == 1)
    stream.close()

    for _ in client.call("numbers", 10**9):
        break  # letting go of it does it, too
    gc.collect()
    until(lambda: closed() == 2)
    assert_nothing_open(client._node)
    port = peer.ask("stats")["port"]
    assert (port["cancelled"], port["calls"]) == (2, port["replies"] + 2)


@KINDS
def test_what_the_generator_raises_comes_behind_its_items(
    peers: Peers, client: Client, options: dict[str, Any]
) -> None:
    peers("t", **options)
    stream = client.call("fails_after", 40)
    assert list(itertools.islice(stream, 40)) == list(range(40))
    with pytest.raises(RemoteError, match="after 40") as caught:
        next(stream)
    assert "in fails_after" in caught.value.traceback
    assert "zmqcore" not in caught.value.traceback.replace("tests", "")
    assert list(stream) == []
    with pytest.raises(RemoteError, match="after 0"):
        client.call("fails_after", 0)
    with pytest.raises(BadArguments, match="missing a required argument"):
        client.call("fails_after")


@KINDS
def test_a_server_that_is_killed(
    peers: Peers, client: Client, running: Callable[..., Any], until: Until, options: dict[str, Any]
) -> None:
    peer = peers("t", **options)
    stream = client.call("slowly", 0.01)
    assert [next(stream), next(stream)] == [0, 1]
    taking = running(lambda: list(stream))
    (channel,) = client._node.pool.channels()
    until(lambda: channel.stats()["items"] > 4)
    peer.kill()
    assert isinstance(taking.join(), PeerLost)
    assert list(stream) == []


@KINDS
def test_items_that_are_here_are_not_lost_with_their_server(
    peers: Peers, client: Client, until: Until, options: dict[str, Any]
) -> None:
    peer = peers("t", **options)
    stream = client.call("numbers", 10**9)
    (channel,) = client._node.pool.channels()
    until(lambda: channel.look() or channel.stats()["items"] == CREDIT)
    peer.kill()
    # The pool's maintenance may have found that first, and closed it.
    until(lambda: channel.look() or channel.state_name in ("lost", "closed"))
    assert list(itertools.islice(stream, CREDIT)) == list(range(CREDIT))
    with pytest.raises(PeerLost):
        next(stream)


@KINDS
def test_a_client_that_is_killed_ends_the_generator(
    peers: Peers, client: Client, until: Until, run_python: Callable[..., Any], options: dict[str, Any]
) -> None:
    peers("t", **options)
    ended = run_python(
        "import os\n"
        "from zmqcore import Client\n"
        "stream = Client('t').call('numbers', 10**9)\n"
        "assert next(stream) == 0\n"
        "os._exit(7)\n"
    )
    assert ended.returncode == 7, ended.stderr
    # On the receiving thread the generator waits for credit, until its port has found that nobody grants any more.
    until(lambda: client.call("counted", "closed") == 1)


@KINDS
def test_an_item_that_does_not_come_in_time_ends_it(
    peers: Peers, client: Client, until: Until, options: dict[str, Any]
) -> None:
    peer = peers("t", **options)
    stream = client.call("slowly", 0.2)
    stream.timeout = 0.02
    with pytest.raises(DeadlineExceeded, match=r"within 0\.02 s"):
        next(stream), next(stream)
    assert stream.closed
    until(lambda: peer.ask("stats")["port"]["cancelled"] == 1)
    # So does the first one; the server may have begun by then.
    with pytest.raises(DeadlineExceeded):
        client.prepare(timeout=0.05).call("slowly", 0.2)
    until(lambda: peer.ask("stats")["port"]["cancelled"] == 2 or peer.ask("stats")["expired"] == 1)
    assert_nothing_open(client._node)


@KINDS
def test_draining_waits_for_open_streams(
    peers: Peers, client: Client, until: Until, options: dict[str, Any]
) -> None:
    peer = peers("t", **options)
    stream = client.call("numbers", 200)
    (channel,) = client._node.pool.channels()
    peer.tell("stop", True, PATIENCE)
    until(lambda: channel.look() or not channel.usable, "the goodbye")
    assert list(stream) == list(range(200))
    assert peer.hear() is True


@KINDS
def test_a_drain_that_takes_too_long_ends_them(peers: Peers, client: Client, options: dict[str, Any]) -> None:
    peer = peers("t", **options)
    stream = client.call("numbers", 10**9)
    assert peer.ask("stop", True, 0.3) is False
    with pytest.raises((PeerLost, RemoteError)):
        list(stream)


def test_many_streams_side_by_side_and_calls_between_them(peers: Peers, client: Client) -> None:
    peers("t", **{"async": True})
    streams = [client.call("anumbers", 300) for _ in range(50)]
    for number in range(300):
        assert [next(stream) for stream in streams] == [number] * 50
        assert client.call("echo", number) == number
    assert [list(stream) for stream in streams] == [[]] * 50
    assert client.call("counted", "closed") == 50


def test_a_stream_per_worker_and_others_wait(serve: Serve, connect: Connect, until: Until) -> None:
    """Open streams hold their threads; calls beyond wait, and credit is heard all the same."""

    def count(n: int) -> Iterator[int]:
        yield from range(n)

    server = serve("t", {"count": count}, workers=2, queue_size=1)
    client = connect("t")
    streams = [client.call("count", 100) for _ in range(2)]
    waiting = [client.submit("count", 1)]
    until(lambda: server.stats()["queued"] == 1)
    waiting += [client.submit("count", 1) for _ in range(10)]
    until(lambda: server.stats()["port"]["set_aside"] == 10)
    assert [list(stream) for stream in streams] == [list(range(100))] * 2
    assert [list(future.result()) for future in waiting] == [[0]] * 11


def test_by_submit_and_gather(serve: Serve, connect: Connect) -> None:
    def count(n: int) -> Iterator[int]:
        yield from range(n)

    serve("t", {"count": count}, server="a", workers=1)
    serve("t", {"count": count}, server="b", workers=1)
    client = connect("t")
    future = client.submit("count", 100)
    stream = future.result()
    assert list(stream) == list(range(100))
    assert future.done()
    assert future.result() is stream
    gathered = client.gather("count", 50)
    assert [list(stream) for stream in gathered.results.values()] == [list(range(50))] * 2
    client.submit("count", 10**9).result().close()


def test_it_must_be_called(
    serve: Serve, connect: Connect, caplog: pytest.LogCaptureFixture, until: Until
) -> None:
    def count() -> Iterator[int]:
        yield 1

    server = serve("t", {"count": count}, workers=1)
    client = connect("t")
    client.cast("count")
    until(lambda: server.stats()["refused"] == 1)
    assert "answers by a stream" in caplog.text


def test_an_item_that_cannot_be_sent_ends_it(serve: Serve, connect: Connect) -> None:
    closed = threading.Event()

    def broken() -> Iterator[Any]:
        try:
            yield 1
            yield object()
        finally:
            closed.set()

    serve("t", {"broken": broken}, workers=1)
    stream = connect("t").call("broken")
    assert next(stream) == 1
    with pytest.raises(RemoteError, match=r"cannot pack value \(object\)"):
        next(stream)
    assert closed.wait(PATIENCE)


def test_the_deadline_is_for_the_first_item(serve: Serve, connect: Connect) -> None:
    def left() -> Iterator[float | None]:
        yield time_left()
        yield time_left()

    serve("t", {"left": left}, workers=1)
    first, second = connect("t", timeout=700.0).call("left")
    assert 600.0 < first <= 700.0
    assert second is None


def test_a_handler_that_relays_a_stream_keeps_its_callers_deadline(serve: Serve, connect: Connect) -> None:
    def slowly() -> Iterator[int]:
        yield 1
        time.sleep(0.3)
        yield 2

    serve("inner", {"slowly": slowly}, workers=1)
    inner = connect("inner")
    serve("outer", {"relay": lambda: list(inner.call("slowly"))}, workers=1)
    with pytest.raises((DeadlineExceeded, RemoteError), match=r"DeadlineExceeded|within"):
        connect("outer", timeout=0.1).call("relay")
    assert connect("outer").call("relay") == [1, 2]


def test_the_clients_node_is_closed(serve: Serve, make_node: MakeNode, registry: str) -> None:
    def count() -> Iterator[int]:
        yield from itertools.count()

    serve("t", {"count": count}, workers=1)
    node = make_node(registry)
    stream = Client("t", node=node, timeout=PATIENCE).call("count")
    assert next(stream) == 0
    node.close()
    with pytest.raises((Closed, PeerLost)):
        list(stream)


# -- a loop here -------------------------------------------------------------------------------------------------


@KINDS
def test_to_a_loop(peers: Peers, node: Node, options: dict[str, Any]) -> None:
    peers("t", **options)

    async def main() -> None:
        async with AsyncClient("t", node=node, timeout=PATIENCE) as client:
            for n in (1, 16, 32, 33, 1000):
                stream = await client.call("numbers", n)
                assert isinstance(stream, AsyncStream)
                assert [item async for item in stream] == list(range(n))
                assert [item async for item in stream] == []
            with pytest.raises(RemoteError, match="after 40"):
                [item async for item in await client.call("fails_after", 40)]
            assert await client.call("counted", "closed") == 5
            assert_nothing_open(node)

    asyncio.run(main())


@KINDS
def test_a_loop_that_takes_slowly(peers: Peers, node: Node, options: dict[str, Any]) -> None:
    peers("t", **options)

    async def main() -> None:
        async with AsyncClient("t", node=node, timeout=PATIENCE) as client:
            async with await client.call("numbers", 10**9) as stream:
                (channel,) = node.pool.channels()
                await eventually(lambda: channel.stats()["items"] == CREDIT)
                await asyncio.sleep(0.05)  # a further item would come now
                assert channel.stats()["items"] == CREDIT
                assert await anext(stream) == 0
            await eventually(lambda: channel.clean)
            await eventually(lambda: client.call("counted", "closed"))
            assert await client.call("counted", "produced") <= CREDIT + 1

    asyncio.run(main())


def test_cancelling_who_waits_for_an_item(peers: Peers, node: Node) -> None:
    peer = peers("t", **{"async": True})

    async def main() -> None:
        async with AsyncClient("t", node=node, timeout=PATIENCE) as client:
            stream = await client.call("slowly", 0.2)
            assert await anext(stream) == 0
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(stream), 0.05)
            assert stream.closed
            (channel,) = node.pool.channels()
            await eventually(lambda: channel.clean)
            await eventually(lambda: not peer.ask("stats")["tasks"])
            stream = await client.call("slowly", 0.2)
            stream.timeout = 0.05
            with pytest.raises(DeadlineExceeded):
                [item async for item in stream]
            await eventually(lambda: not peer.ask("stats")["tasks"])

    asyncio.run(main())


def test_a_loop_whose_server_is_killed(peers: Peers, node: Node) -> None:
    peer = peers("t", **{"async": True})

    async def main() -> None:
        async with AsyncClient("t", node=node, timeout=PATIENCE) as client:
            stream = await client.call("slowly", 0.01)
            assert await anext(stream) == 0
            asyncio.get_running_loop().call_later(0.05, peer.kill)
            with pytest.raises(PeerLost):
                [item async for item in stream]

    asyncio.run(main())


def test_a_thousand_streams_and_calls_on_one_loop(make_node: MakeNode, registry: str) -> None:
    """More than run at a time: those that wait are begun as others end."""

    async def numbers(n: int) -> AsyncIterator[int]:
        for number in range(n):
            yield number
            if number % 7 == 0:
                await asyncio.sleep(0)

    async def echo(value: int) -> int:
        return value

    async def main() -> None:
        handlers = {"numbers": numbers, "echo": echo}
        async with (
            AsyncServer("t", handlers, node=make_node(registry), max_concurrency=50, queue_size=50) as server,
            AsyncClient("t", node=make_node(registry), timeout=PATIENCE) as client,
        ):

            async def one(number: int) -> int:
                total = 0
                async with await client.call("numbers", 100) as stream:
                    async for item in stream:
                        total += item
                        if number % 3 == 0 and item == 40:
                            return total
                return total

            calls = asyncio.gather(*(client.call("echo", number) for number in range(1000)))
            totals = await asyncio.gather(*(one(number) for number in range(1000)))
            assert totals == [
                sum(range(41)) if number % 3 == 0 else sum(range(100)) for number in range(1000)
            ]
            assert await calls == list(range(1000))
            await eventually(lambda: not server.stats()["tasks"])
            port = server.stats()["port"]
            assert port["calls"] == port["replies"] + port["cancelled"]
            assert port["cancelled"] <= 334

    asyncio.run(main())


@pytest.mark.parametrize("method", ["numbers", "anumbers"])
def test_on_uvloop(peers: Peers, node: Node, uvloop: Any, method: str) -> None:
    peers("t", **{"async": True})

    async def main() -> None:
        async with AsyncClient("t", node=node, timeout=PATIENCE) as client:
            streams = [await client.call(method, 500) for _ in range(10)]
            totals = await asyncio.gather(*(total(stream) for stream in streams))
            assert totals == [sum(range(500))] * 10
            async with await client.call(method, 10**9) as stream:
                assert await anext(stream) == 0

            async def all_closed() -> bool:
                return await client.call("counted", "closed") == 11

            await eventually(all_closed)

    async def total(stream: AsyncStream) -> int:
        return sum([item async for item in stream])

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def test_a_stream_outlives_the_loops_client_but_not_the_loop(
    serve: Serve, make_node: MakeNode, registry: str
) -> None:
    def count() -> Iterator[int]:
        yield from itertools.count()

    server = serve("t", {"count": count}, workers=1)
    node = make_node(registry)
    kept = []

    async def main() -> None:
        async with AsyncClient("t", node=node, timeout=PATIENCE) as client:
            kept.append(await client.call("count"))
        assert [await anext(kept[0]) for _ in range(100)] == list(range(100))

    asyncio.run(main())
    kept.clear()
    gc.collect()
    node.close()
    assert server.stop(timeout=PATIENCE)
