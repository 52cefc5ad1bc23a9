"""The body: values to MessagePack and back, large buffers beside it."""

from __future__ import annotations

from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from zmqcore import _decoder
from zmqcore.codec import get_codec

pytestmark = pytest.mark.benchmark(group="codec")

MIB = 1 << 20
CODEC = get_codec("msgpack")

VALUES: dict[str, Any] = {
    "16 bytes": ((b"0123456789abcdef",), {}),
    "1 KiB": ((b"x" * 1024,), {}),
    "names": (("sku-1",), {"qty": 2, "note": "by the door", "price": 9.5, "tags": ["a", "b"]}),
    "1000 ints": ((list(range(1000)),), {}),
    "100 records": (([{"id": n, "name": f"n{n}", "ok": True, "share": n / 7} for n in range(100)],), {}),
    "1 MiB": ((b"x" * MIB,), {}),
}


def listed(value: Any) -> Any:
    """Return ``value`` as it arrives: tuples as lists, views as bytes."""
    if isinstance(value, (tuple, list)):
        return [listed(item) for item in value]
    if isinstance(value, dict):
        return {key: listed(item) for key, item in value.items()}
    return bytes(value) if isinstance(value, memoryview) else value


@pytest.mark.parametrize("name", VALUES)
def test_encode(benchmark: BenchmarkFixture, name: str) -> None:
    body = benchmark(lambda: CODEC.encode(VALUES[name], []))
    assert body


@pytest.mark.parametrize("name", VALUES)
def test_decode(benchmark: BenchmarkFixture, name: str) -> None:
    buffers: list[Any] = []
    body = CODEC.encode(VALUES[name], buffers)
    views = [memoryview(buffer) for buffer in buffers]
    value = benchmark(lambda: CODEC.decode(body, views))
    assert listed(value) == listed(VALUES[name])


@pytest.mark.parametrize("name", ["16 bytes", "100 records"])
def test_scan(benchmark: BenchmarkFixture, name: str) -> None:
    """Counting what a body holds, before anything is made of it."""
    body = CODEC.encode(VALUES[name], [])
    benchmark(_decoder.scan, body, 64, 1_000_000)


def test_numpy_1_mib(benchmark: BenchmarkFixture) -> None:
    """An array out of band: its cost must not depend on its size."""
    numpy = pytest.importorskip("numpy")
    array = numpy.arange(MIB // 8, dtype="f8").reshape(-1, 64)

    def round_trip() -> Any:
        buffers: list[Any] = []
        body = CODEC.encode(((array,), {}), buffers)
        return CODEC.decode(body, [memoryview(buffer).cast("B") for buffer in buffers])

    (args, _) = benchmark(round_trip)
    assert numpy.array_equal(args[0], array)
