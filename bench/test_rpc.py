"""The whole way: ``Client`` to ``Server``, the server in a process of its own.

One round trip depends on where the scheduler has put the processes; for comparisons with others, and for the
goals, see ``side_by_side.py``.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from zmqcore import AsyncClient, Client, Node, RemoteError

PAYLOAD = b"0123456789abcdef"
TIMEOUT = 10.0
MIB = 1 << 20


@pytest.fixture
def node() -> Iterator[Node]:
    with Node("memory://bench") as made:
        yield made


@pytest.fixture
def connect(start_server: Callable[..., str], node: Node) -> Callable[..., Client]:
    """Return a function that gives a client that is connected to an echo server."""

    def connected(transport: str = "tcp", workers: int = 0) -> Client:
        endpoint = start_server(transport, f"--workers={workers}")
        client = Client("bench", node=node, connect=endpoint, timeout=TIMEOUT)
        client.call("finish")
        return client

    return connected


@pytest.mark.benchmark(group="rpc: call")
@pytest.mark.parametrize("workers", [0, 4])
@pytest.mark.parametrize("transport", ["tcp", "ipc"])
def test_call(
    benchmark: BenchmarkFixture, connect: Callable[..., Client], transport: str, workers: int
) -> None:
    client = connect(transport, workers)
    assert benchmark(client.call, "echo", PAYLOAD) == PAYLOAD


@pytest.mark.benchmark(group="rpc: call")
@pytest.mark.parametrize("transport", ["tcp", "ipc"])
def test_call_1_mib(benchmark: BenchmarkFixture, connect: Callable[..., Client], transport: str) -> None:
    client, payload = connect(transport), b"x" * MIB
    assert benchmark(client.call, "echo", payload) == payload


@pytest.mark.benchmark(group="rpc: 1000 casts")
@pytest.mark.parametrize("size", [16, 1024])
def test_1000_casts(benchmark: BenchmarkFixture, connect: Callable[..., Client], size: int) -> None:
    """Sent and handled: with an inline server the call behind them is answered when they have been."""
    client, payload = connect(), b"x" * size
    client.call("finish")

    def thousand() -> int:
        for _ in range(1000):
            client.cast("tick", payload)
        handled: int = client.call("finish")[0]
        return handled

    assert benchmark(thousand) == 1000


@pytest.mark.benchmark(group="rpc: 1000 casts")
def test_1000_accepted_casts(benchmark: BenchmarkFixture, connect: Callable[..., Client]) -> None:
    """Kept until they have been run, and that is waited for."""
    client = connect().prepare(delivery="accepted")
    client.call("finish")

    def thousand() -> int:
        for _ in range(1000):
            client.cast("tick", PAYLOAD)
        client.flush(TIMEOUT)
        handled: int = client.call("finish")[0]
        return handled

    assert benchmark(thousand) == 1000


@pytest.mark.benchmark(group="rpc: call")
def test_call_that_raises(benchmark: BenchmarkFixture, connect: Callable[..., Client]) -> None:
    """With the remote traceback."""
    client = connect()

    def failed() -> str:
        try:
            client.call("fail")
        except RemoteError as exc:
            return exc.message
        return ""

    assert benchmark(failed) == "no such sku"


@pytest.mark.benchmark(group="rpc: call")
def test_submit(benchmark: BenchmarkFixture, connect: Callable[..., Client]) -> None:
    """One future, waited for."""
    client = connect()
    assert benchmark(lambda: client.submit("echo", PAYLOAD).result(TIMEOUT)) == PAYLOAD


@pytest.mark.benchmark(group="rpc: call")
def test_call_with_several_members(
    benchmark: BenchmarkFixture, start_server: Callable[..., str], node: Node
) -> None:
    """The way of a call that has a choice: two members in turn."""
    endpoints = [start_server("tcp", "--workers=0"), start_server("ipc", "--workers=0")]
    client = Client("bench", node=node, connect=endpoints, timeout=TIMEOUT)
    assert len(client.gather("finish").results) == 2
    assert benchmark(client.call, "echo", PAYLOAD) == PAYLOAD


@pytest.mark.benchmark(group="rpc: to all")
@pytest.mark.parametrize("operation", ["fanout", "gather"])
def test_to_all(
    benchmark: BenchmarkFixture, start_server: Callable[..., str], node: Node, operation: str
) -> None:
    """To two members."""
    endpoints = [start_server("tcp", "--workers=0"), start_server("ipc", "--workers=0")]
    client = Client("bench", node=node, connect=endpoints, timeout=TIMEOUT)
    assert len(client.gather("finish").results) == 2
    outcome = benchmark(getattr(client, operation), "echo", PAYLOAD)
    assert len(outcome.sent if operation == "fanout" else outcome.results) == 2


@pytest.mark.benchmark(group="rpc: 1000 items")
def test_stream(benchmark: BenchmarkFixture, connect: Callable[..., Client]) -> None:
    client = connect()
    assert benchmark(lambda: sum(client.call("count", 1000))) == sum(range(1000))


@pytest.mark.benchmark(group="rpc: call")
@pytest.mark.parametrize("server", ["--workers=0", "--asyncio"])
def test_await_call(
    benchmark: BenchmarkFixture, start_server: Callable[..., str], node: Node, server: str
) -> None:
    """One coroutine, one call after the other: 10 in each run of the loop, which costs something, too."""
    client = AsyncClient("bench", node=node, connect=start_server("tcp", server), timeout=TIMEOUT)

    async def ten() -> bytes:
        for _ in range(10):
            answer: bytes = await client.call("echo", PAYLOAD)
        return answer

    with asyncio.Runner() as runner:
        assert benchmark(lambda: runner.run(ten())) == PAYLOAD
        runner.run(client.close())


@pytest.mark.benchmark(group="rpc: 100 calls")
def test_100_submitted(benchmark: BenchmarkFixture, connect: Callable[..., Client]) -> None:
    """All in flight at once on one channel."""
    client = connect()

    def hundred() -> list[bytes]:
        futures = [client.submit("echo", PAYLOAD) for _ in range(100)]
        return [future.result(TIMEOUT) for future in futures]

    assert benchmark(hundred) == [PAYLOAD] * 100


@pytest.mark.benchmark(group="rpc: 100 calls")
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_100_coroutines(
    benchmark: BenchmarkFixture, start_server: Callable[..., str], node: Node, loop: str
) -> None:
    """All in flight at once, driven by an event loop."""
    factory = pytest.importorskip(loop).new_event_loop
    client = AsyncClient("bench", node=node, connect=start_server("tcp", "--workers=0"), timeout=TIMEOUT)

    async def hundred() -> list[bytes]:
        return await asyncio.gather(*(client.call("echo", PAYLOAD) for _ in range(100)))

    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(hundred())
        assert benchmark(lambda: runner.run(hundred())) == [PAYLOAD] * 100
        runner.run(client.close())


@pytest.mark.benchmark(group="rpc: 100 calls")
def test_100_by_8_threads(benchmark: BenchmarkFixture, connect: Callable[..., Client]) -> None:
    """Eight threads on one client, started each time: about 13 calls each."""
    client = connect()
    answers: list[bytes] = []

    def some() -> None:
        for _ in range(100 // 8 + 1):
            answers.append(client.call("echo", PAYLOAD))

    def eight() -> int:
        answers.clear()
        threads = [threading.Thread(target=some) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return len(answers)

    assert benchmark(eight) == 8 * 13
    assert set(answers) == {PAYLOAD}
