"""libzmq has connected again before anybody looked, and nobody sends anything: the channel finds out by itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from zmqcore import errors
from zmqcore._channel import Channel
from zmqcore._pending import Pending

LONG = 20.0


def wait(pending: Pending, channel: Channel, until: Callable[..., None]) -> None:  # noqa: ARG001
    assert pending.wait(LONG)


def attend(pending: Pending, channel: Channel, until: Callable[..., None]) -> None:
    until(lambda: channel.attend() is None and pending.done, "the end of the call")


@pytest.mark.parametrize("look", [wait, attend])
def test_a_call_that_was_under_way_is_lost(
    start_server: Callable[..., Any],
    connect: Callable[..., Channel],
    handshakes: Any,
    until: Callable[..., None],
    look: Callable[..., None],
) -> None:
    """It has no deadline: without a ping nothing would ever tell that the new server knows nothing of it."""
    first = start_server()
    channel = connect(first.endpoint, configure=handshakes.watch)
    handshakes.wait()
    channel.call(b"t", "echo", b"", None, b"", 1, LONG)
    instance = channel.peer_instance
    first.pause()
    pending = channel.submit(b"t", "silent", b"", None, b"", 1, None, None)
    first.kill()
    start_server(endpoints=[first.endpoint])
    handshakes.wait()
    assert channel.state_name == "open"
    look(pending, channel, until)
    with pytest.raises(errors.PeerLost, match="made again"):
        pending.envelope()
    assert channel.peer_instance != instance
    assert channel.stats()["calls"] == 2, "nobody has sent anything else"


def test_it_asks_once_in_each_silence_however_often_somebody_looks(
    start_server: Callable[..., Any], connect: Callable[..., Channel]
) -> None:
    """Each ping takes a place in the window: as many of them as there are looks would leave no room for calls."""
    began = time.monotonic()
    server = start_server()
    channel = connect(server.endpoint)
    assert channel.wait_open(LONG)
    server.pause()
    channel.submit(b"t", "silent", b"", None, b"", 1, LONG, None)
    for _ in range(100):
        channel.attend()
    silences = (time.monotonic() - began) // 2.0
    assert channel.stats()["window_messages"] <= 1 + silences
