"""One channel to a server process, without the RPC layer: what the compiled core costs per message."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import zmq
from pytest_benchmark.fixture import BenchmarkFixture

from zmqcore._channel import Channel
from zmqcore._frame import Envelope
from zmqcore._retention import Lane
from zmqcore.codec import get_codec

TOPIC = b"bench"
CODEC = get_codec("msgpack")
BODY = bytes(CODEC.encode(((b"0123456789abcdef",), {}), []))
TIMEOUT = 10.0


@pytest.fixture(params=["tcp", "ipc"])
def channel(request: pytest.FixtureRequest, start_server: Callable[..., str]) -> Iterator[Channel]:
    """Return an open channel to a server that runs its handlers inline."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    made = Channel(context, start_server(request.param))
    assert made.wait_open(TIMEOUT)
    yield made
    made.close()
    context.term()


@pytest.mark.benchmark(group="channel: round trip")
def test_ping(benchmark: BenchmarkFixture, channel: Channel) -> None:
    """To the port's compiled code and back: no body, no handler."""
    assert benchmark(channel.ping, TIMEOUT) > 0


@pytest.mark.benchmark(group="channel: round trip")
def test_call(benchmark: BenchmarkFixture, channel: Channel) -> None:
    """With a handler in Python at the other end; the body is packed already."""
    envelope = benchmark(channel.call, TOPIC, "echo", BODY, None, b"", CODEC.id, TIMEOUT)
    assert CODEC.decode(envelope.body, []) == b"0123456789abcdef"


@pytest.mark.benchmark(group="channel: 1000 one way")
def test_1000_casts(benchmark: BenchmarkFixture, channel: Channel) -> None:
    """Sent, and handled: the ping comes back when the port has taken them all."""

    def thousand() -> int:
        for _ in range(1000):
            last: int = channel.send("cast", TOPIC, "tick", BODY, None, b"", CODEC.id, TIMEOUT)
        channel.ping(TIMEOUT)
        return last

    assert benchmark(thousand) >= 1000


@pytest.mark.benchmark(group="channel: 1000 one way")
def test_1000_accepted_casts(benchmark: BenchmarkFixture, channel: Channel) -> None:
    """Sent and kept, run, acknowledged, and dropped."""
    lane = Lane(channel.endpoint)

    def thousand() -> bool:
        for _ in range(1000):
            channel.send_accepted(lane, "cast", TOPIC, "tick", BODY, None, b"", CODEC.id, TIMEOUT)
        return lane.wait(TIMEOUT)

    assert benchmark(thousand)
    assert channel.stats()["retained"] == 0


@pytest.mark.benchmark(group="channel: round trip")
def test_submit(benchmark: BenchmarkFixture, channel: Channel) -> None:
    """The same as a call, in two steps."""

    def submitted() -> Envelope:
        return channel.submit(TOPIC, "echo", BODY, None, b"", CODEC.id, TIMEOUT, None).envelope()

    assert CODEC.decode(benchmark(submitted).body, []) == b"0123456789abcdef"
