"""Interceptors: around every operation of a client, and around every request of a server."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

import zmqcore
from zmqcore import (
    AsyncClient,
    AsyncServer,
    BadArguments,
    Client,
    Node,
    Operation,
    RemoteError,
    Server,
)

Serve = Callable[..., Server]
Connect = Callable[..., Client]
MakeNode = Callable[..., Node]
Proceed = Callable[[Operation], Any]


class Handlers:
    def __init__(self) -> None:
        self.noted: list[Any] = []

    def add(self, a: int, b: int = 1) -> int:
        return a + b

    def read(self) -> dict[str, Any]:
        return zmqcore.metadata()

    def note(self, value: Any) -> None:
        self.noted.append(value)

    def fail(self, text: str) -> None:
        raise LookupError(text)

    def count(self, n: int) -> Iterator[int]:
        yield from range(n)


class AsyncHandlers(Handlers):
    async def wait(self, value: Any) -> Any:
        await asyncio.sleep(0)
        return value

    async def aitems(self, n: int) -> AsyncIterator[int]:
        for number in range(n):
            yield number


class Trail:
    """Notes who passes, on the way in and out."""

    def __init__(self) -> None:
        self.steps: list[str] = []

    @contextlib.contextmanager
    def _passing(self, name: str, operation: Operation) -> Iterator[None]:
        self.steps.append(f"{name} {operation.kind} {operation.method}")
        try:
            yield
        except Exception as exc:
            self.steps.append(f"{name} {type(exc).__name__}")
            raise
        finally:
            self.steps.append(f"{name} out")

    def named(self, name: str) -> Callable[[Operation, Proceed], Any]:
        def interceptor(operation: Operation, proceed: Proceed) -> Any:
            with self._passing(name, operation):
                return proceed(operation)

        return interceptor

    def named_async(self, name: str) -> Callable[[Operation, Proceed], Any]:
        async def interceptor(operation: Operation, proceed: Proceed) -> Any:
            with self._passing(name, operation):
                return await proceed(operation)

        return interceptor


@pytest.mark.parametrize("workers", [0, 2])
def test_the_first_is_the_outermost_on_both_sides(serve: Serve, connect: Connect, workers: int) -> None:
    trail = Trail()
    serve("t", Handlers(), workers=workers, interceptors=[trail.named("s1"), trail.named("s2")])
    client = connect("t", interceptors=[trail.named("c1"), trail.named("c2")])
    assert client.call("add", 1, b=2) == 3
    assert trail.steps == [
        "c1 call add", "c2 call add", "s1 request add", "s2 request add",
        "s2 out", "s1 out", "c2 out", "c1 out",
    ]  # fmt: skip
    trail.steps.clear()
    with pytest.raises(RemoteError, match="gone"):
        client.call("fail", "gone")
    assert trail.steps == [
        "c1 call fail", "c2 call fail", "s1 request fail", "s2 request fail",
        "s2 LookupError", "s2 out", "s1 LookupError", "s1 out",
        "c2 RemoteError", "c2 out", "c1 RemoteError", "c1 out",
    ]  # fmt: skip


def test_every_operation_passes(serve: Serve, connect: Connect) -> None:
    trail = Trail()
    handlers = Handlers()
    serve("t", handlers, workers=1)
    client = connect("t", interceptors=(trail.named("c"),))
    client.cast("note", 1)
    assert len(client.fanout("note", 2).sent) == 1
    assert list(client.gather("add", 1).results.values()) == [2]
    assert client.submit("add", 2).result() == 3
    assert list(client.call("count", 40)) == list(range(40))
    assert handlers.noted == [1, 2]
    assert trail.steps[::2] == [
        "c cast note",
        "c fanout note",
        "c gather add",
        "c submit add",
        "c call count",
    ]
    trail.steps.clear()
    assert client.prepare(interceptors=()).call("add", 1) == 2
    assert client.prepare(timeout=9.0).call("add", 1) == 2
    assert trail.steps == ["c call add", "c out"]


def test_they_change_what_goes_and_comes(serve: Serve, connect: Connect) -> None:
    def tagged(operation: Operation, proceed: Proceed) -> Any:
        operation.metadata["trace"] = "4f1a"
        return proceed(operation)

    def doubled(operation: Operation, proceed: Proceed) -> Any:
        operation.args = tuple(2 * value for value in operation.args)
        return -proceed(operation)

    def forgiving(operation: Operation, proceed: Proceed) -> Any:
        try:
            return proceed(operation)
        except LookupError as exc:
            return f"forgiven: {exc}"

    def admitted(operation: Operation, proceed: Proceed) -> Any:
        if operation.metadata.get("trace") != "4f1a":
            raise PermissionError("who are you?")
        return proceed(operation)

    serve("t", Handlers(), workers=1, interceptors=[admitted, forgiving])
    plain = connect("t", metadata={"a": 1})
    with pytest.raises(RemoteError, match="who are you"):
        plain.call("read")
    client = plain.prepare(interceptors=[tagged])
    assert client.call("read") == {"a": 1, "trace": "4f1a"}
    assert client.call("fail", "x") == "forgiven: x"
    assert client.prepare(interceptors=[tagged, doubled]).call("add", 1, b=3) == -5
    assert plain.metadata == {"a": 1}
    assert plain.call("zmqcore.ping")["instance"], "what the server tells about itself is not intercepted"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_server_with_some_still_says_what_does_not_fit(
    serve: Serve, connect: Connect, workers: int
) -> None:
    trail = Trail()
    serve("t", Handlers(), workers=workers, interceptors=[trail.named("s")])
    client = connect("t")
    with pytest.raises(BadArguments, match=r"missing a required argument: 'a'.*\(a: 'int', b: 'int' = 1\)"):
        client.call("add")
    with pytest.raises(RemoteError, match="can only concatenate"):
        client.call("add", "x", 1.5)
    assert "(a: 'int', b: 'int' = 1)" in client.call("zmqcore.methods")["add"]


def test_streams(serve: Serve, connect: Connect) -> None:
    ended = []

    def squared(operation: Operation, proceed: Proceed) -> Any:
        items = proceed(operation)
        if operation.method != "count":
            return items

        def around() -> Iterator[int]:
            try:
                for item in items:
                    yield item**2
            finally:
                items.close()
                ended.append(operation.args[0])

        return around()

    serve("t", Handlers(), workers=1, interceptors=[squared])
    client = connect("t")
    assert list(client.call("count", 100)) == [number**2 for number in range(100)]
    with contextlib.closing(client.call("count", 10**9)) as stream:
        assert next(stream) == 0
    assert client.call("add", 1) == 2
    assert ended == [100, 10**9]


def test_coroutines(make_node: MakeNode, registry: str) -> None:
    trail = Trail()

    async def main() -> None:
        async with (
            AsyncServer(
                "t", AsyncHandlers(), node=make_node(registry), interceptors=[trail.named_async("s")]
            ),
            AsyncClient("t", node=make_node(registry), interceptors=[trail.named_async("c")]) as client,
        ):
            assert await client.call("wait", 7) == 7
            assert await client.call("add", 1) == 2  # a plain function, too
            assert trail.steps[:4] == ["c call wait", "s request wait", "s out", "c out"]
            with pytest.raises(RemoteError, match="gone"):
                await client.call("fail", "gone")
            with pytest.raises(BadArguments, match="missing a required argument"):
                await client.call("wait")
            for method in ("count", "aitems"):
                assert [item async for item in await client.call(method, 40)] == list(range(40))
            await client.cast("note", 1)
            await client.fanout("note", 2)
            assert (await client.gather("read")).complete
            assert await client.submit("add", 5) == 6
            kinds = [step.split()[1:] for step in trail.steps if step.startswith("c ") and " out" not in step]
            assert [kind for kind, *_ in kinds][-4:] == ["cast", "fanout", "gather", "call"]

    asyncio.run(main())


def test_without_any_the_method_itself_is_served() -> None:
    handlers = Handlers()
    server = Server("t", handlers, node=Node("memory://none"))
    assert server._dispatcher.methods["add"] == handlers.add
    server._node.close()


def test_what_cannot_be_called_is_refused_at_once(connect: Connect, node: Node) -> None:
    for make in (
        lambda: connect("t", interceptors=[5]),
        lambda: connect("t").prepare(interceptors=[5]),
        lambda: Server("t", Handlers(), node=node, interceptors=[5]),  # type: ignore[list-item]
    ):
        with pytest.raises(TypeError, match="5 cannot be called"):
            make()


async def passing(operation: Operation, proceed: Proceed) -> Any:
    return await proceed(operation)


class Passing:
    async def __call__(self, operation: Operation, proceed: Proceed) -> Any:
        return await proceed(operation)


@pytest.mark.parametrize("interceptor", [passing, Passing(), functools.partial(passing)])
def test_coroutine_functions_are_refused_where_nobody_awaits_them(
    connect: Connect, node: Node, interceptor: Any
) -> None:
    for make in (
        lambda: connect("t", interceptors=[interceptor]),
        lambda: connect("t").prepare(interceptors=[interceptor]),
        lambda: Server("t", Handlers(), node=node, interceptors=[interceptor]),
    ):
        with pytest.raises(
            TypeError, match="is a coroutine function: those are for an AsyncClient and an AsyncServer"
        ):
            make()
    AsyncClient("t", node=node, interceptors=[interceptor])
    AsyncServer("t", Handlers(), node=node, interceptors=[interceptor])


def test_a_plain_function_may_hand_on_what_is_to_be_awaited(make_node: MakeNode, registry: str) -> None:
    def noted(operation: Operation, proceed: Proceed) -> Any:
        operation.metadata["trace"] = "4f1a"
        return proceed(operation)

    async def main() -> None:
        async with (
            AsyncServer("t", AsyncHandlers(), node=make_node(registry), interceptors=[noted]),
            AsyncClient("t", node=make_node(registry), interceptors=[noted]) as client,
        ):
            assert await client.call("wait", 7) == 7
            assert await client.submit("read") == {"trace": "4f1a"}

    asyncio.run(main())
