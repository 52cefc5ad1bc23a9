"""A server that answers at thousands of endpoints, and pools that connect to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zmq
from clock_support import Clock
from pool_support import Far

from zmqcore._channel import Channel
from zmqcore._pool import ChannelPool
from zmqcore.attendant import Attendant
from zmqcore.endpoint import probe

MakePool = Callable[..., ChannelPool]


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    made: zmq.Context[Any] = zmq.Context()
    made.set(zmq.MAX_SOCKETS, 20_000)
    yield made
    made.term()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def far(context: zmq.Context[Any]) -> Iterator[Far]:
    made = Far(context)
    yield made
    made.close()


@pytest.fixture
def make_pool(context: zmq.Context[Any]) -> Iterator[MakePool]:
    """``make_pool(**options)`` makes a pool with an attendant, or without one by ``attended=False``."""
    made: list[tuple[ChannelPool, Attendant]] = []

    def make(*, attended: bool = True, connect: Any = None, **options: Any) -> ChannelPool:
        attendant = Attendant()
        attention = attendant.attend if attended else None
        pool = ChannelPool(
            connect or (lambda endpoint: Channel(context, endpoint, attention=attention)),
            **{"probe": probe, "maintenance": attendant.maintain if attended else None, **options},
        )
        made.append((pool, attendant))
        return pool

    yield make
    for pool, attendant in made:
        pool.close(0.0)
        attendant.close()
