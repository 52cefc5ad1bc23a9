"""What accompanies a request, and that the context of one handler is nobody else's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import pytest

import zmqcore
from zmqcore import (
    AsyncClient,
    AsyncServer,
    BadArguments,
    Client,
    Node,
    PayloadTooLarge,
    ProtocolError,
    Server,
    Topic,
)
from zmqcore._frame import pack

Serve = Callable[..., Server]
Connect = Callable[..., Client]
MakeNode = Callable[..., Node]

mark: ContextVar[str] = ContextVar("mark", default="untouched")


class Handlers:
    def __init__(self) -> None:
        self.noted: list[Any] = []

    def read(self) -> dict[str, Any]:
        return zmqcore.metadata()

    def note(self) -> None:
        self.noted.append(zmqcore.metadata())

    def set_mark(self, value: str) -> str:
        before = mark.get()
        mark.set(value)
        return before

    def get_mark(self) -> str:
        return mark.get()

    def fail(self, value: str) -> None:
        mark.set(value)
        raise LookupError(value)


class AsyncHandlers(Handlers):
    async def read_later(self) -> dict[str, Any]:
        await asyncio.sleep(0.01)
        return zmqcore.metadata()

    async def set_mark_later(self, value: str) -> list[str]:
        before = mark.get()
        mark.set(value)
        await asyncio.sleep(0.01)
        return [before, mark.get()]


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_it_is_read_by_the_handler_of_its_own_message_only(
    serve: Serve, connect: Connect, workers: int
) -> None:
    handlers = Handlers()
    serve("t", handlers, workers=workers)
    plain = connect("t")
    values = {"trace": "4f1a", "tenant": 7, "tags": ["a", b"\0"], "": None}
    tagged = plain.prepare(metadata=values)
    assert plain.call("read") == {}
    assert tagged.call("read") == values
    assert plain.call("read") == {}
    assert tagged.prepare(timeout=9.0).call("read") == values
    assert tagged.prepare(metadata={"x": 1}).call("read") == {"x": 1}
    assert tagged.prepare(metadata=None).call("read") == {}
    assert tagged.submit("read").result() == values
    assert list(tagged.gather("read").results.values()) == [values]
    tagged.cast("note")
    tagged.fanout("note")
    plain.cast("note")
    assert plain.call("read") == {}
    if workers < 2:
        assert handlers.noted == [values, values, {}]
    assert (plain.metadata, tagged.metadata) == (None, values)


def test_for_coroutines(make_node: MakeNode, registry: str) -> None:
    async def main() -> None:
        async with (
            AsyncServer("t", AsyncHandlers(), node=make_node(registry)),
            AsyncClient("t", node=make_node(registry), metadata={"n": -1}) as client,
        ):
            calls = [client.prepare(metadata={"n": n}).call("read_later") for n in range(50)]
            assert await asyncio.gather(*calls) == [{"n": n} for n in range(50)]
            assert await client.call("read") == {"n": -1}
            assert await client.prepare(metadata={}).call("read") == {}

    asyncio.run(main())


def test_it_is_not_passed_on(serve: Serve, connect: Connect) -> None:
    serve("inner", Handlers(), workers=1)
    inner = connect("inner")
    serve("outer", {"relay": lambda: [zmqcore.metadata(), inner.call("read")]}, workers=1)
    assert connect("outer", metadata={"a": 1}).call("relay") == [{"a": 1}, {}]
    assert zmqcore.metadata() == {}


def test_what_cannot_travel_is_refused_at_once(connect: Connect) -> None:
    client = connect("t")
    with pytest.raises(BadArguments, match="has the key 1; keys are str"):
        client.prepare(metadata={1: 2})
    with pytest.raises(BadArguments, match="object"):
        client.prepare(metadata={"x": object()})
    with pytest.raises(PayloadTooLarge, match=r"metadata of 70\d\d\d bytes; the limit is 65536"):
        client.prepare(metadata={"x": "x" * 70_000})
    with pytest.raises(PayloadTooLarge, match=r"metadata of 40\d\d\d bytes"):
        client.prepare(metadata={"x": b"x" * 40_000})


@pytest.mark.parametrize(
    ("metadata", "error"),
    [
        (b"\xc1", ProtocolError),
        (b"\x90", ProtocolError),
        (b"\x81\x01\x02", ProtocolError),
        (b"\xa0" * 65537, None),
    ],
)
def test_what_is_none_is_refused(
    serve: Serve, connect: Connect, metadata: bytes, error: type[Exception] | None
) -> None:
    serve("t", Handlers(), workers=1)
    client = connect("t")
    client._metadata = metadata
    with pytest.raises(error or PayloadTooLarge):
        client.call("read")
    client._metadata = b""
    assert client.call("read") == {}


def test_the_envelope_carries_it() -> None:
    packed = pack("call", topic=Topic("t").wire, metadata=b"\x81\xa1a\x01")
    assert packed[0].endswith(b"t\x81\xa1a\x01")


# -- contexts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_a_handler_leaves_nothing_to_the_next_one(serve: Serve, connect: Connect, workers: int) -> None:
    serve("t", Handlers(), workers=workers)
    client = connect("t")
    for number in range(20):
        assert client.call("set_mark", str(number)) == "untouched"
        assert client.call("get_mark") == "untouched"
        with pytest.raises(zmqcore.RemoteError):
            client.call("fail", "x")
    # Batches too, which are received at once.
    futures = [client.submit("set_mark", str(number)) for number in range(300)]
    assert {future.result() for future in futures} == {"untouched"}


def test_coroutines_side_by_side(make_node: MakeNode, registry: str) -> None:
    async def main() -> None:
        mark.set("the server's")
        async with (
            AsyncServer("t", AsyncHandlers(), node=make_node(registry)),
            AsyncClient("t", node=make_node(registry)) as client,
        ):
            calls = [client.call("set_mark_later", str(number)) for number in range(50)]
            assert await asyncio.gather(*calls) == [["the server's", str(number)] for number in range(50)]
            assert await client.call("set_mark", "x") == "the server's"
            assert await client.call("get_mark") == "the server's"

    asyncio.run(main())
