"""The envelope: packed and parsed without any I/O.

The Python face that is called here makes ``bytes`` of what a channel leaves in libzmq's memory, so it copies
once more than a real call does; that is why nothing large is measured here but in ``test_rpc.py``.
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from zmqcore import _frame
from zmqcore.codec import get_codec

pytestmark = pytest.mark.benchmark(group="frame")

PAYLOAD = b"0123456789abcdef"
CODEC = get_codec("msgpack")


def small_call(body: bytes) -> list[bytes]:
    return _frame.pack(
        "call", id=7, topic=b"bench", method="echo", body=body, codec=CODEC.id, remaining_ms=5000
    )


def test_pack_small(benchmark: BenchmarkFixture) -> None:
    body = bytes(CODEC.encode(((PAYLOAD,), {}), []))
    parts = benchmark(small_call, body)
    assert _frame.Envelope.parse(parts).method == "echo"


def test_parse_small(benchmark: BenchmarkFixture) -> None:
    body = bytes(CODEC.encode(((PAYLOAD,), {}), []))
    envelope = benchmark(_frame.Envelope.parse, small_call(body))
    assert bytes(envelope.body) == body


def test_pack_and_unpack_a_small_call(benchmark: BenchmarkFixture) -> None:
    """Everything between the arguments here and the arguments there, but the I/O; the goal is 1.5 µs."""

    def round_trip() -> tuple[str, object]:
        buffers: list[object] = []
        envelope = _frame.Envelope.parse(small_call(CODEC.encode(((PAYLOAD,), {}), buffers)))
        return envelope.method, CODEC.decode(envelope.body, envelope.buffers)

    assert benchmark(round_trip) == ("echo", [[PAYLOAD], {}])


@pytest.mark.parametrize("size", [64, 1024, 32 << 10])
def test_pack_body(benchmark: BenchmarkFixture, size: int) -> None:
    parts = benchmark(small_call, b"x" * size)
    assert len(parts[0]) > size


def test_refuse_garbage(benchmark: BenchmarkFixture) -> None:
    """What a port spends on bytes that are not an envelope."""
    garbage = [b"GET / HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n"]

    def refused() -> bool:
        try:
            _frame.Envelope.parse(garbage)
        except ValueError:
            return True
        return False

    assert benchmark(refused)
