"""A server that dies or stops under load: what was under way ends, and the rest goes elsewhere."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Self

import pytest
from waiting_support import eventually

from zmqcore import (
    AsyncClient,
    Client,
    DeadlineExceeded,
    Node,
    NoSuchTopic,
    Overloaded,
    PeerLost,
    Unreachable,
)
from zmqcore.rpc import deadline

PATIENCE = 30.0

Peers = Callable[..., Any]
Running = Callable[..., Any]
Until = Callable[..., None]


class Load:
    """Threads that call until they are told to stop; what they got, in order, for each thread."""

    def __init__(self, client: Client, running: Running, threads: int) -> None:
        self._client = client
        self._stopped = threading.Event()
        self.outcomes: list[list[Any]] = [[] for _ in range(threads)]
        self._threads = [running(self._call, outcomes) for outcomes in self.outcomes]

    def _call(self, outcomes: list[Any]) -> None:
        while not self._stopped.is_set():
            try:
                outcomes.append(self._client.call("sleep", 0.001))
            except Exception as exc:  # noqa: BLE001 - looked at by the test
                outcomes.append(exc)

    @property
    def calls(self) -> int:
        return sum(map(len, self.outcomes))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.result()


def test_a_server_of_four_is_killed_under_load(
    peers: Peers, node: Node, running: Running, until: Until
) -> None:
    """The timeout is far beyond the test's patience: what ends does so because the server is gone."""
    servers = {name: peers("t", name, workers=8) for name in "abcd"}
    with Client("t", node=node, timeout=20 * PATIENCE) as client:
        until(lambda: len(client.members()) == 4)
        held = [client.prepare(server="c").submit("sleep", 10 * PATIENCE) for _ in range(6)]
        with Load(client, running, 12) as load:
            until(lambda: load.calls > 400 and all(load.outcomes))
            assert {name for outcomes in load.outcomes for name in outcomes} == set("abcd")
            before = [len(outcomes) for outcomes in load.outcomes]
            servers["c"].kill()
            assert {type(future.exception(PATIENCE)) for future in held} == {PeerLost}
            until(lambda: all(len(new) > old + 50 for new, old in zip(load.outcomes, before, strict=True)))
        for outcomes in load.outcomes:
            lost = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
            assert all(isinstance(exc, PeerLost) and exc.executed_possible for exc in lost), lost
            assert len(lost) <= 1, "each thread had one call under way"
            assert set(outcomes[-20:]) <= {"a", "b", "d"}
        until(lambda: client._route._balancer._outstanding == 0)


def test_idempotent_calls_do_not_notice_the_death_of_a_server(
    peers: Peers, node: Node, running: Running, until: Until
) -> None:
    servers = {name: peers("t", name, workers=8) for name in "abcd"}
    with Client("t", node=node, timeout=20 * PATIENCE, idempotent=True) as client:
        until(lambda: len(client.members()) == 4)
        with Load(client, running, 8) as load:
            until(lambda: load.calls > 200)
            servers["c"].kill()
            enough = load.calls + 400
            until(lambda: load.calls > enough)
        assert set(Counter(name for outcomes in load.outcomes for name in outcomes)) == set("abcd")


CALLS = 5000  # more than the window holds


@pytest.fixture
def stopped(peers: Peers, node: Node) -> Any:
    peer = peers("t")
    with Client("t", node=node, timeout=PATIENCE) as client:
        assert client.call("echo", 1) == 1
        peer.freeze()
    yield peer
    peer.thaw()


def all_over(node: Node) -> bool:
    """Whether no call is outstanding on any channel."""
    return not any(channel.stats()["outstanding_calls"] for channel in node.pool.channels())


@pytest.mark.usefixtures("stopped")
def test_every_call_of_coroutines_to_a_stopped_server_ends_by_its_deadline(node: Node, until: Until) -> None:
    async def main() -> list[Any]:
        async with AsyncClient("t", node=node, timeout=0.5) as client:
            return await asyncio.gather(
                *(client.call("echo", n) for n in range(CALLS)), return_exceptions=True
            )

    outcomes = Counter(type(outcome) for outcome in asyncio.run(main()))
    assert set(outcomes) <= {DeadlineExceeded, Overloaded}
    assert outcomes[DeadlineExceeded] >= node.window_messages * 3 // 4
    until(lambda: all_over(node))


@pytest.mark.usefixtures("stopped")
def test_who_waits_for_room_is_refused_at_its_own_deadline(node: Node, until: Until) -> None:
    """Whoever came before it, and whatever deadlines those have."""
    refused: list[int] = []

    async def main() -> None:
        async with AsyncClient("t", node=node, timeout=PATIENCE) as client:
            full = [client.submit("echo", n) for n in range(node.window_messages)]
            await asyncio.sleep(0)
            endless = [client.prepare(timeout=None).submit("echo", n) for n in range(3)]
            await asyncio.sleep(0)

            began = time.monotonic()

            async def call(number: int) -> None:
                deadline.current.set(began + 1.0 + number / 100)  # of its own task; not from when that begins
                with pytest.raises(Overloaded, match=f"limits {node.window_messages} and .* not been sent"):
                    await client.call("echo", number)
                refused.append(number)

            async with asyncio.TaskGroup() as group:
                for number in reversed(range(20)):
                    group.create_task(call(number))
            for task in (*endless, *full):
                assert not task.done()
                task.cancel()
            await asyncio.wait((*endless, *full))

    asyncio.run(main())
    assert refused == list(range(20))
    until(lambda: all_over(node))


@pytest.mark.usefixtures("stopped")
def test_every_submitted_call_to_a_stopped_server_ends_by_its_deadline(node: Node, until: Until) -> None:
    with Client("t", node=node, timeout=0.5) as client:
        futures = [client.submit("echo", number) for number in range(node.window_messages // 2)]
        assert {type(future.exception(PATIENCE)) for future in futures} == {DeadlineExceeded}
    until(lambda: all_over(node))


@pytest.mark.usefixtures("stopped")
def test_every_threads_call_to_a_stopped_server_ends_by_its_deadline(
    node: Node, running: Running, until: Until
) -> None:
    with Client("t", node=node, timeout=0.5) as client:
        calls = [running(client.call, "echo", number) for number in range(64)]
        assert {type(call.join()) for call in calls} == {DeadlineExceeded}
    until(lambda: all_over(node))


def test_who_waits_for_room_when_the_server_is_lost_is_told_so(
    peers: Peers, make_node: Callable[..., Node]
) -> None:
    """Not that something was closed, which nobody has done."""
    peer = peers("t")

    sent = 0

    async def main() -> list[Any]:
        nonlocal sent
        node = make_node(window_messages=4, connect_timeout=0.2)
        async with AsyncClient("t", node=node, timeout=PATIENCE) as client:
            assert await client.call("echo", 1) == 1
            peer.freeze()
            calls = [client.submit("echo", number) for number in range(20)]
            (channel,) = node.pool.channels()
            await eventually(lambda: channel.stats()["window_messages"] == 4)
            sent = channel.stats()["outstanding_calls"]
            peer.kill()
            return await asyncio.gather(*calls, return_exceptions=True)

    outcomes = asyncio.run(main())
    assert {type(outcome) for outcome in outcomes} <= {PeerLost, Unreachable, NoSuchTopic}
    assert 3 <= sent <= 4  # a ping of the channel's own may be in the window, too
    assert sum(isinstance(exc, PeerLost) and exc.executed_possible for exc in outcomes) == sent
