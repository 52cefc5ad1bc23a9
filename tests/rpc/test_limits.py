"""What a caller takes is known to the server: a result over it is answered by an error, and nothing else suffers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from zmqcore import AsyncClient, AsyncServer, Client, Limits, Node, RemoteError, Server
from zmqcore.errors import PayloadTooLarge

PATIENCE = 30.0
LIMIT = 1 << 20
LIMITS = Limits(message_bytes=LIMIT, buffers=4)


class Source:
    def __init__(self) -> None:
        self.made = 0

    def make(self, size: int, pieces: int = 1) -> Any:
        self.made += 1
        data = bytes(size // pieces)
        return data if pieces == 1 else [data] * pieces

    def stream(self, *sizes: int) -> Iterator[bytes]:
        for size in sizes:
            yield bytes(size)

    def take(self, data: Any) -> int:
        return len(data)


class AsyncSource:
    async def make(self, size: int, pieces: int = 1) -> Any:
        data = bytes(size // pieces)
        return data if pieces == 1 else [data] * pieces

    async def stream(self, *sizes: int) -> AsyncIterator[bytes]:
        for size in sizes:
            yield bytes(size)


OVER = [
    ((2 << 20,), rf"payload of 20971\d\d bytes; the limit is {LIMIT}"),
    ((2 << 20, 100), rf"payload of 20974\d\d bytes; the limit is {LIMIT}"),  # all in the body
    ((500_000, 5), "5 out-of-band buffers; the limit is 4"),
]


@pytest.fixture
def node(make_node: Callable[..., Node], registry: str) -> Node:
    return make_node(registry, limits=LIMITS)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("idempotent", [False, True])
def test_a_result_over_the_callers_limits_is_an_error_of_that_call_only(
    serve: Callable[..., Server], node: Node, workers: int, idempotent: bool
) -> None:
    source = Source()
    server = serve("t", source, workers=workers)
    client = Client("t", node=node, timeout=PATIENCE, idempotent=idempotent)
    for number, (arguments, text) in enumerate(OVER, 1):  # also as the first one of all
        pending = client.submit("make", 10)
        with pytest.raises(RemoteError, match=f"the result of 'make' cannot be sent: .*{text}") as caught:
            client.call("make", *arguments)
        assert caught.value.type == "zmqcore.errors.PayloadTooLarge"
        assert pending.result() == bytes(10)
        assert source.made == 2 * number, "it is not tried again"
    assert client.call("make", LIMIT - 100) == bytes(LIMIT - 100)
    assert node.pool.stats()["lost"] == 0
    assert server.stats()["failed"] == len(OVER)
    assert server.stats()["port"]["peers"] == 1


def test_an_item_over_them_ends_its_stream(serve: Callable[..., Server], node: Node) -> None:
    serve("t", Source())
    client = Client("t", node=node, timeout=PATIENCE)
    for _ in range(2):
        stream = client.call("stream", 10, LIMIT + 1, 20)
        assert next(stream) == bytes(10)
        with pytest.raises(RemoteError, match=f"PayloadTooLarge: payload of .* bytes; the limit is {LIMIT}"):
            next(stream)
    assert list(client.call("stream", 10, 20)) == [bytes(10), bytes(20)]
    assert node.pool.stats()["lost"] == 0


def test_coroutines(make_node: Callable[..., Node], node: Node, registry: str) -> None:
    async def main() -> None:
        async with AsyncServer("t", AsyncSource(), node=make_node(registry)):
            client = AsyncClient("t", node=node, timeout=PATIENCE)
            for arguments, text in OVER:
                with pytest.raises(RemoteError, match=text):
                    await client.call("make", *arguments)
            stream = await client.call("stream", 10, LIMIT + 1, 20)
            assert await anext(stream) == bytes(10)
            with pytest.raises(RemoteError, match="PayloadTooLarge: payload of"):
                await anext(stream)
            assert await client.call("make", 7) == bytes(7)
            assert node.pool.stats()["lost"] == 0

    asyncio.run(main())


def test_arguments_over_the_servers_limits_are_refused_at_the_caller(
    make_node: Callable[..., Node], connect: Callable[..., Client], registry: str
) -> None:
    """Also on the first call, and by the limit that the server's user has set, not by what travels besides."""
    with Server("t", Source(), node=make_node(registry, limits=LIMITS)) as server:
        client = connect("t")
        for _ in range(2):
            with pytest.raises(PayloadTooLarge, match=rf"the limit is {LIMIT}\b"):
                client.call("take", bytes(LIMIT + 1))
        assert client.call("take", bytes(LIMIT - 100)) == LIMIT - 100
        assert server.stats()["port"]["calls"] == 1
        assert server.stats()["port"]["peers"] == 1
