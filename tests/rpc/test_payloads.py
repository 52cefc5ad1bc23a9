"""What travels in arguments and results, small and large, nested and not."""

from __future__ import annotations

import array
import datetime
from collections.abc import Callable
from typing import Any

import pytest

from zmqcore import Client, Node, Server
from zmqcore._frame import pinned

SMALL, LARGE = 100, 300_000


@pytest.fixture
def client(peers: Callable[..., Any], node: Node) -> Client:
    peers("t")
    return Client("t", node=node, timeout=30.0)


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        -(1 << 63),
        (1 << 64) - 1,
        1.5,
        float("inf"),
        "",
        "näïve ☃ \x00",
        b"",
        b"\x00\xff",
        [],
        {},
        [[[[1]]]],
        {"a": {"b": [None, {"c": b"d"}]}},
        {1: "int keys", b"b": "bytes keys"},
        datetime.datetime(2024, 2, 29, 12, 30, 1, 123456, tzinfo=datetime.UTC),
        list(range(5000)),
        "x" * LARGE,
    ],
    ids=lambda value: repr(value)[:20],
)
def test_plain_values_come_back_as_they_were(client: Client, value: Any) -> None:
    assert client.call("echo", value) == value
    assert client.call("echo", value=value) == value
    assert client.call("echo", [value, {"k": value}]) == [value, {"k": value}]
    assert client.submit("echo", value).result() == value
    assert list(client.gather("echo", value).results.values()) == [value]


@pytest.mark.parametrize("size", [0, 1, SMALL, 32 << 10, LARGE, 5_000_000])
@pytest.mark.parametrize(
    "make", [bytes, bytearray, lambda data: memoryview(bytes(data))], ids=["bytes", "bytearray", "memoryview"]
)
def test_bytes_of_all_kinds_and_sizes(client: Client, size: int, make: Callable[[bytes], Any]) -> None:
    data = bytes(range(256)) * (size // 256 + 1)
    data = data[:size]
    value = make(data)
    for _ in range(2):
        back = client.call("echo", value)
        assert back == data
        nested = client.call("echo", {"list": [value, 1, [value]], "map": {"deep": value}})
        assert nested["list"][0] == data
        assert nested["list"][2][0] == data
        assert nested["map"]["deep"] == data
    assert value == data, "the caller's object is untouched"
    if isinstance(value, bytearray):
        value.append(1)  # nobody holds an export of it any more


class Sizes:
    def size(self, value: Any) -> int:
        return len(value)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_server_at_rest_holds_no_arguments(
    serve: Callable[..., Server], connect: Callable[..., Client], until: Callable[..., None], workers: int
) -> None:
    serve("t", Sizes(), workers=workers)
    assert connect("t").call("size", bytes(LARGE)) == LARGE
    until(lambda: pinned()["received_bytes"] == 0, "the last request is freed, before another one has come")


def test_large_results_are_read_only_views(client: Client) -> None:
    back = client.call("echo", bytes(LARGE))
    assert isinstance(back, memoryview)
    assert back.readonly
    with pytest.raises(TypeError):
        back[0] = 1  # type: ignore[index]
    kept = client.call("echo", b"x" * LARGE)
    for _ in range(20):
        client.call("echo", b"y" * LARGE)
    assert kept == b"x" * LARGE, "a view stays what it was"


def test_memoryviews_of_odd_shapes(client: Client) -> None:
    data = bytes(range(256)) * 2000
    assert client.call("echo", memoryview(data)[::2]) == data[::2]
    assert client.call("echo", memoryview(data)[:100:3]) == data[:100:3]
    shaped = memoryview(data).cast("B", (2000, 256))
    assert bytes(client.call("echo", shaped)) == data


@pytest.mark.parametrize("typecode", "bBhHiIlLqQfd")
def test_arrays(client: Client, typecode: str) -> None:
    for count in (0, 1, SMALL, LARGE):
        value = array.array(typecode, [number % 100 for number in range(count)])
        kind = "memoryview" if value.itemsize * count >= 32 << 10 else "array"
        assert client.call("describe", value) == [kind, typecode, count, value.tobytes()]
        back, (nested,) = client.call("echo", [value, [value]])
        assert bytes(back) == bytes(nested) == value.tobytes()
        if kind == "array":
            assert back == value


@pytest.mark.parametrize("dtype", ["u1", "<i4", ">i4", "<f8", "<c16", "?", "S5", "U3", "<M8[ns]"])
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 4), (0, 5), (200, 300), (5, 200, 40)])
def test_numpy_arrays(client: Client, dtype: str, shape: tuple[int, ...]) -> None:
    numpy = pytest.importorskip("numpy")
    value = numpy.arange(numpy.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    back, nested = client.call("echo", [value, {"deep": (value,)}])
    for each in (back, nested["deep"][0]):
        assert isinstance(each, numpy.ndarray)
        assert each.shape == shape
        assert each.dtype.newbyteorder("=") == value.dtype.newbyteorder("=")
        assert numpy.array_equal(each, value)
        assert not each.flags.writeable


def test_numpy_arrays_in_any_order_of_memory(client: Client) -> None:
    numpy = pytest.importorskip("numpy")
    value = numpy.arange(400_000).reshape(500, 800)
    for view in (value.T, value[::2, ::3], numpy.asfortranarray(value), value[::-1]):
        assert numpy.array_equal(client.call("echo", view), view)
    assert client.call("echo", numpy.float32(1.5)) == 1.5
    assert client.call("echo", numpy.int64(7)) == 7


def test_many_large_buffers_in_one_message(client: Client) -> None:
    values = [bytes([number]) * 40_000 for number in range(200)]
    assert client.call("echo", values) == values


def test_casts_carry_large_buffers(client: Client, until: Callable[..., None]) -> None:
    for number in range(50):
        client.cast("count", key=f"{number % 5}" + "x" * 40_000)
        client.cast("echo", bytes(1_000_000))
    until(lambda: client.call("counted", "4" + "x" * 40_000) == 10)


def test_nothing_stays_pinned(client: Client, until: Callable[..., None]) -> None:
    before = pinned()
    kept = [client.call("echo", bytes(LARGE)) for _ in range(20)]
    assert pinned() != before, "what is received is counted as long as it is held"
    del kept
    client.call("echo")
    until(lambda: client.call("echo") is None and pinned() == before)
