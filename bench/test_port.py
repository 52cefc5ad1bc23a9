"""A port, in one process and one thread with a channel to it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from inproc import TIMEOUT, Line
from pytest_benchmark.fixture import BenchmarkFixture

from zmqcore._request import Request
from zmqcore._retention import Lane

BODY = bytes(64)
BATCH = 64


class Batches(Line):
    """BATCH messages at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.lane = Lane("inproc://bench")

    def receive(self) -> list[Request]:
        """Return the next BATCH requests."""
        requests: list[Request] = []
        while len(requests) < BATCH:
            requests += self.port.receive(BATCH, TIMEOUT)
        return requests

    def cast(self) -> None:
        for _ in range(BATCH):
            self.channel.send("cast", b"bench", "tick", BODY, None, b"", 1, TIMEOUT)

    def accepted(self) -> None:
        for _ in range(BATCH):
            self.channel.send_accepted(self.lane, "cast", b"bench", "tick", BODY, None, b"", 1, TIMEOUT)


@pytest.fixture
def line() -> Iterator[Batches]:
    with Batches() as made:
        yield made


@pytest.mark.benchmark(group="port: 64 messages")
def test_calls(benchmark: BenchmarkFixture, line: Batches) -> None:
    """Submit, receive, reply, and take the replies."""

    def calls() -> int:
        submit = line.channel.submit
        pending = [submit(b"bench", "echo", BODY, None, b"", 1, TIMEOUT, None) for _ in range(BATCH)]
        for request in line.receive():
            request.reply(request.envelope.body, None, 1)
        return sum(len(each.envelope().body) for each in pending)

    assert benchmark(calls) == BATCH * len(BODY)


@pytest.mark.benchmark(group="port: 64 messages")
def test_casts(benchmark: BenchmarkFixture, line: Batches) -> None:
    """Send, receive, and let the channel read the acknowledgements."""

    def casts() -> int:
        line.cast()
        received = len(line.receive())
        line.channel.look()
        return received

    assert benchmark(casts) == BATCH


@pytest.mark.benchmark(group="port: 64 messages")
def test_receive(benchmark: BenchmarkFixture, line: Batches) -> None:
    """Only the receiving is timed."""
    requests = benchmark.pedantic(line.receive, setup=line.cast, rounds=1000)
    assert len(requests) == BATCH
    assert requests[0].method == "tick"


@pytest.mark.benchmark(group="port: 64 messages")
def test_accepted_casts(benchmark: BenchmarkFixture, line: Batches) -> None:
    """Send and keep, receive, finish, and let the channel drop what is acknowledged."""

    def casts() -> int:
        line.accepted()
        requests = line.receive()
        for request in requests:
            request.finish()
        line.port.flush()
        line.channel.look()
        return len(requests)

    assert benchmark(casts) == BATCH
    assert line.lane.wait(TIMEOUT), line.channel.stats()
    assert line.channel.stats()["retained"] == 0
