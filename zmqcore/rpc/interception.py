"""Interceptors: what is to happen around every operation of a client, and around every request of a server.

An interceptor is called with the operation and with ``proceed``, which goes on: to the next interceptor, and at last to
the operation itself. What it returns or raises is what the caller gets::

    def timed(operation, proceed):
        started = time.monotonic()
        try:
            return proceed(operation)
        finally:
            print(operation.method, time.monotonic() - started)

For an AsyncClient and an AsyncServer it is a coroutine function, which awaits what ``proceed`` returns; or a plain
function that returns something to be awaited.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from zmqcore import options
from zmqcore.rpc.metadata import metadata
from zmqcore.rpc.producer import is_stream

__all__ = ["Interceptor", "Operation", "chain", "intercepted", "through"]

Interceptor = Callable[["Operation", Callable[["Operation"], Any]], Any]


@dataclass(slots=True)
class Operation:
    """What a client is about to do, or a server to run. Interceptors may change it before they proceed.

    ``kind``: "call", "cast", "fanout", "gather" or "submit" at a client, "request" at a server. ``metadata``: what is
    to be sent along, or what has come.
    """

    kind: str
    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    metadata: dict[str, Any] = field(default_factory=dict)


Operate = Callable[[Operation], Any]


def chain(interceptors: Iterable[Interceptor], *, coroutines: bool) -> tuple[Interceptor, ...]:
    """Return ``interceptors`` as a tuple. Raises TypeError for one that cannot be called.

    Without ``coroutines`` also for a coroutine function: nobody would await it. With them a plain function will do,
    which returns what can be awaited, such as what ``proceed`` has returned.
    """
    made = tuple(options.instance("interceptors", interceptors, Iterable, "a list of functions"))
    for each in made:
        if not callable(each):
            raise TypeError(
                f"an interceptor is called with an operation and proceed; {each!r} cannot be called"
            )
        if not coroutines and (
            inspect.iscoroutinefunction(each) or inspect.iscoroutinefunction(type(each).__call__)
        ):
            raise TypeError(
                f"the interceptor {each!r} is a coroutine function: those are for an AsyncClient and an AsyncServer"
            )
    return made


def through(interceptors: Sequence[Interceptor], operate: Operate) -> Operate:
    """Return ``operate`` behind ``interceptors``, of which the first is the outermost."""
    for interceptor in reversed(interceptors):
        operate = functools.partial(_around, interceptor, operate)
    return operate


def _around(interceptor: Interceptor, proceed: Operate, operation: Operation) -> Any:
    return interceptor(operation, proceed)


def intercepted(
    name: str, method: Callable[..., Any], interceptors: Sequence[Interceptor], *, coroutines: bool
) -> Callable[..., Any]:
    """Return a server's ``method`` behind ``interceptors``: with ``coroutines`` a coroutine function.

    A generator stays one.
    """
    wrap = _WRAPPERS[coroutines, is_stream(method)]
    return functools.wraps(method)(wrap(name, method, interceptors))


def _request(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operation:
    return Operation("request", name, args, kwargs, metadata())


def _plain(name: str, method: Callable[..., Any], interceptors: Sequence[Interceptor]) -> Callable[..., Any]:
    steps = through(interceptors, lambda operation: method(*operation.args, **operation.kwargs))
    return lambda *args, **kwargs: steps(_request(name, args, kwargs))


def _generator(
    name: str, method: Callable[..., Any], interceptors: Sequence[Interceptor]
) -> Callable[..., Any]:
    begin = _plain(name, method, interceptors)

    def run(*args: Any, **kwargs: Any) -> Iterator[Any]:
        yield from begin(*args, **kwargs)

    return run


def _coroutine(
    name: str, method: Callable[..., Any], interceptors: Sequence[Interceptor]
) -> Callable[..., Any]:
    async def operate(operation: Operation) -> Any:
        result = method(*operation.args, **operation.kwargs)
        return await result if inspect.isawaitable(result) else result

    steps = through(interceptors, operate)

    async def run(*args: Any, **kwargs: Any) -> Any:
        return await steps(_request(name, args, kwargs))

    return run


def _async_generator(
    name: str, method: Callable[..., Any], interceptors: Sequence[Interceptor]
) -> Callable[..., Any]:
    begin = _coroutine(name, method, interceptors)

    async def run(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        items = await begin(*args, **kwargs)
        if isinstance(items, Generator):
            with contextlib.closing(items):
                for item in items:
                    yield item
        else:
            async with contextlib.aclosing(items):
                async for item in items:
                    yield item

    return run


#: By whether there is a loop, and whether the method is a generator.
_WRAPPERS = {
    (False, False): _plain,
    (False, True): _generator,
    (True, False): _coroutine,
    (True, True): _async_generator,
}
