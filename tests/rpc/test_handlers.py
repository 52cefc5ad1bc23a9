"""Whatever a handler or a caller does wrong: a clear error at the caller, and the server goes on."""

from __future__ import annotations

import datetime
import functools
import logging
import operator
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import pytest
import zmq

from zmqcore import (
    BadArguments,
    Client,
    DeadlineExceeded,
    InternalError,
    Limits,
    Node,
    NoSuchMethod,
    PayloadTooLarge,
    ProtocolError,
    RemoteError,
    Server,
)
from zmqcore.rpc import faults

WORKERS = [0, 2]


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text for this one")


class BadlyPrintable(Exception):
    def __str__(self) -> str:
        return 7  # type: ignore[return-value]  # noqa: PLE0307 - that is the point


class Nameless(Exception):
    pass


Nameless.__module__ = None  # type: ignore[assignment]


class BrokenZone(datetime.tzinfo):
    def utcoffset(self, _: datetime.datetime | None) -> NoReturn:
        raise RuntimeError("no offset for this one")


class BrokenSignature:
    @property
    def __signature__(self) -> NoReturn:
        raise RuntimeError("no signature for this one")

    def __call__(self, a: int) -> int:
        return a


class UnprintableDefault:
    def __repr__(self) -> str:
        raise RuntimeError("no repr for this one")


class Colour(Exception):
    """An exception with attributes of its own."""

    def __init__(self, red: int, *, green: int) -> None:
        super().__init__(red, green)


def _deep(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def _cyclic() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


class Misbehaving:
    """Handlers that do what handlers should not."""

    def raises(self, what: str) -> NoReturn:
        raise {
            "ValueError": ValueError("bad value"),
            "empty": ValueError(),
            "SystemExit": SystemExit(3),
            "KeyboardInterrupt": KeyboardInterrupt(),
            "GeneratorExit": GeneratorExit(),
            "BaseException": BaseException("the very base"),
            "StopIteration": StopIteration(1),
            "MemoryError": MemoryError(),
            "own": Colour(1, green=2),
            "surrogates": ValueError("lone \udc80 surrogate"),
            "unprintable": Unprintable(),
            "badly printable": BadlyPrintable(),
            "nameless": Nameless("no module"),
            "huge": ValueError("x" * 10_000_000),
            "group": ExceptionGroup("several", [ValueError("one"), TypeError("two")]),
        }[what]

    def exits(self) -> NoReturn:
        sys.exit("the handler's exit")

    def interrupts(self) -> NoReturn:
        raise KeyboardInterrupt

    def chained(self) -> NoReturn:
        try:
            {}["missing"]
        except KeyError as exc:
            raise LookupError("outer") from exc

    def recurses(self) -> Any:
        return self.recurses()

    def returns(self, what: str) -> Any:
        return {
            "object": object,
            "set": lambda: {1, 2},
            "lambda": lambda: print,
            "huge int": lambda: 1 << 64,
            "surrogates": lambda: "lone \udc80 surrogate",
            "deep": lambda: _deep(1000),
            "very deep": lambda: _deep(100_000),
            "cyclic": _cyclic,
            "large": lambda: bytes(3_000_000),
            "many": lambda: [None] * 20_000,
            "large in pieces": lambda: [bytes(100_000)] * 30,
            "broken time zone": lambda: datetime.datetime(2020, 1, 1, tzinfo=BrokenZone()),
            "naive time": lambda: datetime.datetime(2020, 1, 1),  # noqa: DTZ001
        }[what]()

    def type_error(self, a: int) -> Any:
        return a + "text"  # type: ignore[operator]

    def type_error_one_deeper(self, a: int) -> Any:
        return operator.add(a, "text")

    def wrong_call_inside(self, a: int) -> Any:
        return self.two(a)  # type: ignore[call-arg]

    def two(self, a: int, b: int) -> int:
        return a + b

    def keyword_only(self, *, key: int) -> int:
        return key

    def positional_only(self, a: int, /) -> int:
        return a

    def anything(self, *args: Any, **kwargs: Any) -> list[Any]:
        return [list(args), kwargs]

    def strange_default(self, a: int, b: Any = UnprintableDefault()) -> int:  # noqa: B008
        return b and a

    @functools.lru_cache  # noqa: B019
    def cached(self, a: int) -> int:
        return a + 1

    broken_signature = BrokenSignature()

    def fine(self) -> str:
        return "fine"


@pytest.fixture(params=WORKERS, ids=["inline", "workers"])
def client(
    request: pytest.FixtureRequest,
    make_node: Callable[..., Node],
    registry: str,
) -> Iterator[Client]:
    """A client of a misbehaving server that must be as good as new after each test."""
    limits = Limits(message_bytes=2_000_000, elements=10_000)
    node = make_node(registry, limits=limits)
    workers: int = request.param
    server = Server("t", Misbehaving(), _builtins(), node=node, workers=workers).start()
    client = Client("t", node=make_node(registry), timeout=30.0)
    yield client
    for _ in range(2 * workers + 1):
        assert client.prepare(timeout=30.0).call("fine") == "fine"
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("zmqcore-server")]
    assert len(threads) == workers + 1, "a thread has died"
    assert server.stop() is True


def _builtins() -> dict[str, Callable[..., Any]]:
    return {
        "len": len,
        "divmod": divmod,
        "max": max,
        "int": functools.partial(int, base=16),
        "upper": "text".upper,
        "add": operator.add,
        "bound": [1, 2, 3].index,
        "lambda": lambda a, b=2: a + b,
    }


@pytest.mark.parametrize(
    ("what", "kind", "message"),
    [
        ("ValueError", "ValueError", "bad value"),
        ("empty", "ValueError", ""),
        ("SystemExit", "SystemExit", "3"),
        ("KeyboardInterrupt", "KeyboardInterrupt", ""),
        ("GeneratorExit", "GeneratorExit", ""),
        ("BaseException", "BaseException", "the very base"),
        ("StopIteration", "StopIteration", "1"),
        ("MemoryError", "MemoryError", ""),
        ("own", ".Colour", "(1, 2)"),
        ("surrogates", "ValueError", "lone \\udc80 surrogate"),
        ("nameless", "Nameless", "no module"),
        ("group", "ExceptionGroup", "several (2 sub-exceptions)"),
    ],
)
def test_what_a_handler_raises_is_raised_at_the_caller(
    client: Client, what: str, kind: str, message: str
) -> None:
    with pytest.raises(RemoteError) as caught:
        client.call("raises", what)
    assert caught.value.type.endswith(kind)
    assert caught.value.message == message
    assert "in raises" in caught.value.traceback
    assert "dispatcher.py" not in caught.value.traceback, "our own frames are no help"
    assert "Remote traceback" in str(caught.value)


@pytest.mark.parametrize("what", ["unprintable", "badly printable"])
def test_an_exception_without_a_text_is_told_nonetheless(client: Client, what: str) -> None:
    for _ in range(3):
        with pytest.raises(RemoteError) as caught:
            client.prepare(timeout=3.0).call("raises", what)
        assert "rintable" in caught.value.type
        assert "in raises" in caught.value.traceback


def test_an_exception_with_a_huge_text_is_told_in_short(client: Client) -> None:
    with pytest.raises(RemoteError) as caught:
        client.call("raises", "huge")
    assert caught.value.type == "ValueError"
    assert caught.value.message.startswith("xxx")


def test_a_handler_that_exits_ends_nothing(client: Client) -> None:
    for _ in range(5):
        with pytest.raises(RemoteError) as caught:
            client.call("exits")
        assert (caught.value.type, caught.value.message) == ("SystemExit", "the handler's exit")
        with pytest.raises(RemoteError):
            client.call("interrupts")
        client.cast("exits")


def test_the_remote_traceback_shows_the_cause(client: Client) -> None:
    with pytest.raises(RemoteError) as caught:
        client.call("chained")
    assert caught.value.type == "LookupError"
    assert "KeyError: 'missing'" in caught.value.traceback
    assert "direct cause" in caught.value.traceback
    assert "test_handlers.py" in caught.value.traceback


def test_endless_recursion_is_an_error_like_others(client: Client) -> None:
    with pytest.raises(RemoteError) as caught:
        client.call("recurses")
    assert caught.value.type == "RecursionError"


@pytest.mark.parametrize(
    ("what", "kind"),
    [
        ("object", "BadArguments"),
        ("set", "BadArguments"),
        ("lambda", "BadArguments"),
        ("huge int", "BadArguments"),
        ("surrogates", "BadArguments"),
        ("naive time", "BadArguments"),
        ("deep", "PayloadTooLarge"),
        ("very deep", "PayloadTooLarge"),
        ("cyclic", "PayloadTooLarge"),
        ("large", "PayloadTooLarge"),
        ("many", "PayloadTooLarge"),
        ("large in pieces", "PayloadTooLarge"),
        ("broken time zone", ""),
    ],
)
def test_a_result_that_cannot_be_sent_is_an_error_at_the_caller(client: Client, what: str, kind: str) -> None:
    for _ in range(3):
        with pytest.raises(RemoteError, match="returns") as caught:
            client.call("returns", what)
        assert kind in caught.value.type
        assert "the result of 'returns' cannot be sent" in caught.value.message
        client.cast("returns", what)


def test_no_such_method(client: Client) -> None:
    for name in ("nonsense", "_hidden", "__init__", "zmqcore.nonsense", "Fine", "fine ", "x" * 60_000, "☃"):
        with pytest.raises(NoSuchMethod) as caught:
            client.call(name)
        assert "has no method" in str(caught.value)
        assert isinstance(caught.value, AttributeError)
    with pytest.raises(NoSuchMethod, match="divmod"):
        client.call("three")


@pytest.mark.parametrize(
    ("method", "args", "kwargs", "hint"),
    [
        ("two", (), {}, "missing"),
        ("two", (1,), {}, "'b'"),
        ("two", (1, 2, 3), {}, "too many"),
        ("two", (1, 2), {"c": 3}, "'c'"),
        ("two", (1, 2), {"b": 3}, "'b'"),
        ("fine", (1,), {}, "too many"),
        ("keyword_only", (1,), {}, "too many"),
        ("keyword_only", (), {}, "key"),
        ("positional_only", (), {"a": 1}, "'a'"),
        ("cached", (), {}, "missing"),
        ("lambda", (), {}, "'a'"),
        ("len", (), {}, "missing"),
        ("len", (1, 2), {}, "too many"),
        ("add", (1,), {}, "'b'"),
        ("upper", (1,), {}, "too many"),
    ],
)
def test_arguments_that_do_not_fit(
    client: Client, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], hint: str
) -> None:
    with pytest.raises(BadArguments) as caught:
        client.call(method, *args, **kwargs)
    assert hint in str(caught.value)
    assert method in str(caught.value)
    assert isinstance(caught.value, TypeError)


def test_a_signature_that_cannot_be_shown_is_no_reason_to_die(client: Client) -> None:
    for method in ("strange_default", "broken_signature"):
        for _ in range(3):
            with pytest.raises((BadArguments, RemoteError)):
                client.prepare(timeout=3.0).call(method)
            assert client.call(method, 1) == 1


@pytest.mark.parametrize(
    ("method", "args"),
    [
        ("type_error", (1,)),
        ("type_error_one_deeper", (1,)),
        ("wrong_call_inside", (1,)),
        ("len", (1,)),
        ("add", (1, "x")),
    ],
)
def test_a_type_error_inside_the_handler_is_the_handlers(
    client: Client, method: str, args: tuple[Any, ...]
) -> None:
    with pytest.raises(RemoteError) as caught:
        client.call(method, *args)
    assert caught.value.type == "TypeError"


def test_builtins_and_callables_of_all_kinds_are_handlers(client: Client) -> None:
    assert client.call("len", [1, 2, 3]) == 3
    assert client.call("divmod", 7, 2) == [3, 1]
    assert client.call("max", 3, 9, 4) == 9
    assert client.call("int", "ff") == 255
    assert client.call("upper") == "TEXT"
    assert client.call("bound", 2) == 1
    assert client.call("lambda", 1) == 3
    assert client.call("cached", 1) == 2
    assert client.call("anything", 1, b=2) == [[1], {"b": 2}]
    with pytest.raises(RemoteError, match="ZeroDivisionError"):
        client.call("divmod", 1, 0)
    with pytest.raises(RemoteError, match="ValueError"):
        client.call("bound", 9)
    with pytest.raises((RemoteError, BadArguments), match="max expected"):
        client.call("max")


@pytest.mark.parametrize("operation", ["call", "cast", "fanout", "gather", "submit"])
@pytest.mark.parametrize(
    ("argument", "error", "hint"),
    [
        (object(), BadArguments, r"args\[0\]"),
        ({"x": [1, {2}]}, BadArguments, r"args\[0\]\['x'\]\[1\]"),
        (1 << 64, BadArguments, "64"),
        ("lone \udc80 surrogate", BadArguments, "args"),
        (_cyclic(), PayloadTooLarge, "64"),
        (_deep(100), PayloadTooLarge, "64"),
        ([None] * 1_000_001, PayloadTooLarge, "1000000"),
    ],
    ids=["object", "set", "int", "surrogate", "cycle", "depth", "elements"],
)
def test_arguments_that_cannot_be_packed_are_refused_at_the_caller(
    serve: Callable[..., Server],
    connect: Callable[..., Client],
    operation: str,
    argument: Any,
    error: type[Exception],
    hint: str,
) -> None:
    server = serve("t", Misbehaving())
    with pytest.raises(error, match=hint):
        getattr(connect("t"), operation)("anything", argument)
    assert server.stats()["port"]["calls"] == 0


def test_arguments_over_the_servers_limits_are_refused_there(client: Client) -> None:
    for argument in ([None] * 20_000, [bytes(30_000)] * 70):
        with pytest.raises(PayloadTooLarge):
            client.call("anything", argument)


def test_a_message_over_the_size_limit_is_refused_at_the_caller(
    serve: Callable[..., Server], make_node: Callable[..., Node], registry: str
) -> None:
    serve("t", Misbehaving())
    client = Client("t", node=make_node(registry, limits=Limits(message_bytes=100_000)), timeout=30.0)
    for argument in (bytes(100_001), [bytes(20_000)] * 6, [bytes(40_000)] * 3):
        for operation in (client.call, client.cast, client.submit):
            with pytest.raises(PayloadTooLarge, match=r"100000|100,000"):
                operation("anything", argument)
    assert client.call("fine") == "fine"


def test_failed_casts_are_logged_where_they_fail(
    serve: Callable[..., Server],
    connect: Callable[..., Client],
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = serve("t", Misbehaving(), workers=1)
    client = connect("t")
    with caplog.at_level(logging.WARNING, "zmqcore"):
        client.cast("raises", "ValueError")
        client.cast("raises", "unprintable")
        client.cast("nonsense")
        client.cast("two", 1)
        assert client.call("fine") == "fine", "one worker: by now all of them have been run"
    text = caplog.text
    for hint in ("bad value", "'nonsense'", "'b'", "raises"):
        assert hint in text
    stats = server.stats()
    assert (stats["refused"], stats["failed"]) == (2, 2)


@pytest.mark.parametrize("workers", WORKERS)
def test_garbage_on_the_port_harms_nobody(
    serve: Callable[..., Server], connect: Callable[..., Client], until: Callable[..., None], workers: int
) -> None:
    server = serve("t", Misbehaving(), workers=workers)
    client = connect("t")
    assert client.call("fine") == "fine"
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.connect(next(endpoint for endpoint in server.endpoints if endpoint.startswith("tcp")))
        for number in range(50):
            socket.send(os.urandom(number))
            socket.send_multipart([b"", os.urandom(number)])
            socket.send_multipart([os.urandom(3)] * (number + 1))
        until(lambda: server.stats()["port"]["garbage"] >= 150)
    assert client.call("fine") == "fine"


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize(
    "body", [b"", b"\xc1", b"\x90", b"\x92\x90\x90", b"\x92\x80\x80", b"\xa1x", b"\x92\x90\x80\x00"]
)
def test_a_body_that_is_none_is_refused(
    serve: Callable[..., Server], make_node: Callable[..., Node], registry: str, workers: int, body: bytes
) -> None:
    """What another implementation might send: the envelope is right and the body is not [args, kwargs]."""
    serve("t", Misbehaving(), workers=workers)
    node = make_node(registry)
    with Client("t", node=node, timeout=30.0) as client:
        target = client._route.targets(client._route.members(client.discovery_timeout, None))[0]
        channel = node.pool.acquire(target.endpoint, 30.0)
        try:
            for codec in (1, 0, 200):
                envelope = channel.call(client.topic.wire, "fine", body, None, b"", codec, 30.0)
                assert envelope.kind == "error"
                with pytest.raises(ProtocolError):
                    faults.outcome(envelope, node.codec, target.endpoint)
            # A keyword that is no identifier, and one that is no str.
            for kwargs in (b"\x81\xa2\xff\xfe\x01", b"\x81\x01\x01"):
                envelope = channel.call(client.topic.wire, "fine", b"\x92\x90" + kwargs, None, b"", 1, 30.0)
                assert envelope.kind == "error"
        finally:
            node.pool.release(channel)
        assert client.call("fine") == "fine"


def test_our_own_faults_do_not_end_a_worker(
    serve: Callable[..., Server],
    connect: Callable[..., Client],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If the dispatcher itself breaks, the caller hears of it and the thread goes on."""
    server = serve("t", Misbehaving(), workers=1)
    client = connect("t")

    def broken(*_: Any) -> NoReturn:
        raise RuntimeError("a fault of ours")

    encode = server._dispatcher._encode
    monkeypatch.setattr(server._dispatcher, "_encode", broken)
    with pytest.raises((InternalError, RemoteError, DeadlineExceeded)):
        client.prepare(timeout=1.0).call("fine")
    monkeypatch.setattr(server._dispatcher, "_encode", encode)
    assert client.prepare(timeout=5.0).call("fine") == "fine"
