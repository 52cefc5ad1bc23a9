"""What is run under callgrind: each scenario so many times, between two marks.

A scenario is one thread's work from end to end: channel and port are in this process, and inproc needs no I/O thread.
So nothing depends on the scheduler, and the same revision executes the same instructions.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import zmq

from zmqcore import AsyncClient, Client, Node, _frame
from zmqcore._channel import Channel
from zmqcore._pool import ChannelPool
from zmqcore._port import Port
from zmqcore.codec import get_codec
from zmqcore.matchmaker import Member, Membership
from zmqcore.rpc.balancing import Balancer
from zmqcore.rpc.dispatcher import Dispatcher
from zmqcore.topic import Topic

TIMES = 1000
"""How often each scenario is run between its marks."""

EMPTY = "empty"
"""The scenario that does nothing: what it takes is taken off the others."""

WARM_UP = 100
TIMEOUT = 60.0
TOPIC = b"bench"
CODEC = get_codec("msgpack")
ARGUMENTS = (("sku-1",), {"qty": 2})

# A function that nothing else calls, and by which callgrind knows where a scenario begins and ends.
mark = os.getppid

Scenario = Callable[[], object]


def empty() -> None:
    """Do nothing."""


def encode() -> Any:
    return CODEC.encode(ARGUMENTS, [])


ENCODED = bytes(CODEC.encode(ARGUMENTS, []))


def decode() -> Any:
    return CODEC.decode(ENCODED, [])


def pack_and_unpack() -> Any:
    parts = _frame.pack("call", id=7, topic=TOPIC, method="reserve", body=ENCODED, codec=1, remaining_ms=5000)
    return _frame.Envelope.parse(parts).body


def choose() -> Scenario:
    members = tuple(
        Member(Topic("bench", f"server-{n}"), (f"tcp://127.0.0.1:{10000 + n}",), f"{n}", "host", n)
        for n in range(4)
    )
    balancer, membership = Balancer("host"), Membership(1, members)

    def run() -> None:
        target = balancer.choose(membership)
        assert target is not None
        balancer.done(target)

    return run


class Line:
    """A pool, its channel, and behind a port a dispatcher, all of one thread."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self.context = context
        self.endpoint = "inproc://counted"
        self.port = Port(context, [self.endpoint])
        # Any reply that is late must not be waited for by spinning: how often that is looked at depends on the clock.
        self.pool = ChannelPool(lambda endpoint: Channel(context, endpoint, spin=0.0), max_sockets=4)
        self.channel = self.pool.acquire(self.endpoint, TIMEOUT)
        self.pool.release(self.channel)
        self.dispatcher = Dispatcher(Topic("bench"), {"reserve": lambda sku, qty: [sku, qty]}, CODEC)

    def acquire_and_release(self) -> None:
        self.pool.release(self.pool.acquire(self.endpoint, TIMEOUT))

    def cast(self) -> None:
        """Send, receive, and let the channel read what the port has acknowledged."""
        self.pool.send_now(self.endpoint, "cast", TOPIC, "reserve", ENCODED, None, b"", CODEC.id)
        self.port.receive(64, 0.0)
        self.port.flush()
        self.channel.look()  # the acknowledgement: without it the next ones would be held, to leave together

    def call(self) -> Any:
        """Submit, receive, reply, and take the reply."""
        pending = self.pool.submit(
            self.endpoint, TOPIC, "reserve", ENCODED, None, b"", CODEC.id, None, TIMEOUT
        )
        (request,) = self.port.receive(64, 0.0)
        request.reply(ENCODED, None, CODEC.id)
        return pending.envelope().body

    def dispatch(self) -> Any:
        """The same with a dispatcher and a method."""
        pending = self.pool.submit(
            self.endpoint, TOPIC, "reserve", ENCODED, None, b"", CODEC.id, None, TIMEOUT
        )
        (request,) = self.port.receive(64, 0.0)
        self.dispatcher.run(request)
        return CODEC.decode(pending.envelope().body, [])

    def close(self) -> None:
        self.pool.close(0.0)
        self.port.close()


def client_cast(line: Line, stack: ExitStack, **options: Any) -> Scenario:
    """From a client to a method, until the client has heard that it is acknowledged (or finished, if accepted)."""
    node = stack.enter_context(Node("memory://counted", context=line.context))
    client = Client("bench", node=node, connect=line.endpoint, timeout=TIMEOUT, **options)
    channel = node.pool.acquire(line.endpoint, TIMEOUT)
    node.pool.release(channel)

    def run() -> None:
        client.cast("reserve", "sku-1", qty=2)
        (request,) = line.port.receive(64, 0.0)
        line.dispatcher.run(request)
        line.port.flush()
        channel.look()

    return run


def loop_calls(line: Line, stack: ExitStack, times: int) -> Scenario:
    """So many calls of a coroutine, one after the other: what starts and stops the loop is shared by them."""
    node = stack.enter_context(Node("memory://counted", context=line.context))
    loop = asyncio.new_event_loop()
    stack.callback(loop.close)
    node.pool.release(node.pool.acquire(line.endpoint, TIMEOUT))  # the first call would open it, on a thread
    client = AsyncClient("bench", node=node, connect=line.endpoint, timeout=TIMEOUT)
    stack.callback(lambda: loop.run_until_complete(client.close()))

    async def calls() -> None:
        for _ in range(times):
            calling = loop.create_task(client.call("reserve", "sku-1", qty=2))
            await asyncio.sleep(0)  # it is sent
            (request,) = line.port.receive(64, 0.0)
            line.dispatcher.run(request)
            await calling

    return lambda: loop.run_until_complete(calls())


def scenarios() -> Iterator[tuple[str, Scenario]]:
    """Yield every scenario with its name; what it needs is made then, and changes nothing for those before it."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    line = Line(context)
    with ExitStack() as stack:
        stack.callback(line.close)
        yield EMPTY, empty
        yield "encode a small call", encode
        yield "decode a small call", decode
        yield "pack and unpack an envelope", pack_and_unpack
        yield "choose one of 4 members", choose()
        yield "acquire and release a channel", line.acquire_and_release
        yield "cast: pool to port, acknowledged", line.cast
        yield "call: pool to port and back", line.call
        yield "call: pool, port, dispatcher, method and back", line.dispatch
        yield "cast: client to method, acknowledged", client_cast(line, stack)
        yield "cast, accepted: client to method, finished", client_cast(line, stack, delivery="accepted")
        yield "5 calls of an AsyncClient, client to method and back", loop_calls(line, stack, 5)
    context.destroy(linger=0)


def repeat(scenario: Scenario, times: int) -> None:
    for _ in itertools.repeat(None, times):
        scenario()


def main() -> None:
    """Run them all, and print their names in a line of JSON."""
    # When it would run depends on what all the imports have left.
    gc.disable()
    names = []
    for name, scenario in scenarios():
        names.append(name)
        repeat(scenario, WARM_UP)
        mark()
        repeat(scenario, TIMES)
        mark()
    print(json.dumps(names))


if __name__ == "__main__":
    main()
