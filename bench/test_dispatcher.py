"""From a request to a method and back, without the system: a request that lies there is run and answered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from inproc import TIMEOUT, Line
from pytest_benchmark.fixture import BenchmarkFixture

from zmqcore._pending import Pending
from zmqcore._request import Request
from zmqcore.codec import get_codec
from zmqcore.rpc import faults
from zmqcore.rpc.dispatcher import Dispatcher
from zmqcore.topic import Topic

CODEC = get_codec("msgpack")


def reserve(sku: str, qty: int = 1) -> list[Any]:
    return [sku, qty]


def fail() -> None:
    raise LookupError("no such sku")


class Dispatched(Line):
    """With a dispatcher behind the port."""

    def __init__(self) -> None:
        super().__init__()
        self.dispatcher = Dispatcher(Topic("bench"), {"reserve": reserve, "fail": fail}, CODEC)
        self.pending: Pending | None = None

    def request(
        self, method: str, *args: Any, **kwargs: Any
    ) -> Callable[[], tuple[tuple[Request], dict[str, Any]]]:
        """Return a set-up that takes the last answer, asks anew, and gives the request."""
        body = bytes(CODEC.encode((args, kwargs), []))

        def ask() -> tuple[tuple[Request], dict[str, Any]]:
            if self.pending is not None:
                self.pending.envelope()
            self.pending = self.channel.submit(b"bench", method, body, None, b"", CODEC.id, TIMEOUT, None)
            (request,) = self.port.receive(1, TIMEOUT)
            return (request,), {}

        return ask

    def answer(self) -> Any:
        """Return what the last one was answered, or raise it."""
        assert self.pending is not None
        return faults.outcome(self.pending.envelope(), CODEC, self.channel.endpoint)


@pytest.fixture
def line() -> Iterator[Dispatched]:
    with Dispatched() as made:
        yield made


@pytest.mark.benchmark(group="dispatcher")
def test_run(benchmark: BenchmarkFixture, line: Dispatched) -> None:
    benchmark.pedantic(line.dispatcher.run, setup=line.request("reserve", "sku-1", qty=2), rounds=5000)
    assert line.answer() == ["sku-1", 2]


@pytest.mark.benchmark(group="dispatcher")
def test_run_what_raises(benchmark: BenchmarkFixture, line: Dispatched) -> None:
    benchmark.pedantic(line.dispatcher.run, setup=line.request("fail"), rounds=1000)
    with pytest.raises(Exception, match="no such sku"):
        line.answer()


@pytest.mark.benchmark(group="dispatcher")
def test_refuse_what_is_not_there(benchmark: BenchmarkFixture, line: Dispatched) -> None:
    benchmark.pedantic(line.dispatcher.run, setup=line.request("sell"), rounds=1000)
    with pytest.raises(Exception, match="has no method 'sell'"):
        line.answer()
