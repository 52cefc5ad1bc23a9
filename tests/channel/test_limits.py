"""What a channel takes: it says so by a hello of its own, first on each connection, and drops what is more."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest
from channel_support import Puppet

from zmqcore import errors
from zmqcore._channel import Channel
from zmqcore._frame import Envelope

LONG = 20.0
ROOM = 1 << 18
"""What a message may have besides body and buffers; a hello adds it."""


def told(hello: Envelope) -> tuple[int, int]:
    """What a hello of a channel says: bytes of a whole message, and buffers."""
    assert (hello.kind, hello.flags, hello.codec, hello.ack) == ("hello", 1, 0, 0)
    nobody, max_bytes, max_buffers = struct.unpack("<16sQI", hello.body)
    assert nobody == bytes(16)
    return max_bytes, max_buffers


def submit(channel: Channel, method: str = "m") -> Any:
    return channel.submit(b"t", method, b"", None, b"", 1, LONG, None)


def test_who_takes_what_is_assumed_says_nothing(puppet: Puppet, connect: Callable[..., Channel]) -> None:
    channel = connect(puppet.endpoint, max_bytes=1 << 28, max_buffers=1024)
    submit(channel)
    assert (puppet.take().kind, channel.stats()["window_messages"]) == ("call", 1)


@pytest.mark.parametrize(("max_bytes", "max_buffers"), [(1000, 1024), (1 << 28, 1023), (1 << 40, 65535)])
def test_any_other_channel_says_hello_before_its_first_message(
    puppet: Puppet, connect: Callable[..., Channel], max_bytes: int, max_buffers: int
) -> None:
    channel = connect(puppet.endpoint, max_bytes=max_bytes, max_buffers=max_buffers)
    pending = submit(channel)
    hello, first = puppet.take(), puppet.take()
    assert told(hello) == (max_bytes + ROOM, max_buffers)
    assert (first.kind, first.id, hello.id) == ("call", 1, 1)
    assert channel.stats()["window_messages"] == 1, "a hello is not counted"
    puppet.say("hello", id=1, body=b"i" * 16)
    puppet.say("reply", id=1, ack=1, body=b"good")
    assert bytes(pending.envelope().body) == b"good"
    assert channel.peer_instance == b"i" * 16
    assert channel.settle()
    assert channel.stats()["garbage"] == 0


def test_the_ports_hello_may_come_before_anything_else_was_sent(
    puppet: Puppet, connect: Callable[..., Channel], until: Callable[..., None]
) -> None:
    channel = connect(puppet.endpoint, max_bytes=1000)
    assert puppet.take().id == 1
    puppet.say("hello", id=1, body=b"i" * 16 + struct.pack("<QI", 700 + ROOM, 3))
    until(lambda: channel.look() or channel.peer_instance, "the hello")
    assert channel.limits == (700, 3)
    assert channel.settle()
    assert channel.stats()["garbage"] == channel.stats()["lost"] == 0


def test_a_port_that_has_not_heard_it_is_told_again(
    puppet: Puppet, connect: Callable[..., Channel], until: Callable[..., None]
) -> None:
    """libzmq has connected again unnoticed: the port names the first message that it has seen, which was no hello."""
    channel = connect(puppet.endpoint, max_bytes=1000)
    lost, answered = submit(channel), submit(channel)
    assert [puppet.take().kind for _ in range(3)] == ["hello", "call", "call"]
    puppet.say("hello", id=2, body=b"j" * 16)
    until(lambda: channel.look() or channel.peer_instance, "the hello")
    again = puppet.take()
    assert told(again) == (1000 + ROOM, 1024)
    assert again.id == 3
    with pytest.raises(errors.PeerLost, match="made again"):
        lost.envelope()
    # Should that one, too, be the first on yet another connection: whatever was sent before it is lost.
    puppet.say("hello", id=3, body=b"k" * 16)
    with pytest.raises(errors.PeerLost, match="made again"):
        answered.envelope()
    assert channel.settle()
    assert channel.stats()["garbage"] == 0


TOO_LARGE: dict[str, tuple[dict[str, Any], str]] = {
    "in the body": ({"body": bytes(10_001)}, "payload of 10001 bytes with 0 buffers"),
    "in buffers": (
        {"body": b"b", "buffers": [bytes(6000)] * 2}, "payload of 12001 bytes with 2 buffers",
    ),
    "in buffers, 2 MiB": ({"buffers": [bytes(2 << 20)]}, "payload of 2097152 bytes with 1 buffers"),
    "in the number of buffers": ({"buffers": [b"x"] * 5}, "payload of 5 bytes with 5 buffers"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["reply", "error", "item"])
@pytest.mark.parametrize("name", TOO_LARGE)
def test_an_answer_over_the_limits_ends_its_own_call_only(
    puppet: Puppet, connect: Callable[..., Channel], kind: str, name: str
) -> None:
    """A port that does not keep them; whose message libzmq takes all the same, up to what is assumed."""
    channel = connect(puppet.endpoint, max_buffers=4, max_bytes=10_000)
    bad, innocent = submit(channel), submit(channel)
    for _ in range(3):
        puppet.take()
    answer, text = TOO_LARGE[name]
    puppet.say(kind, id=1, ack=2, **answer)
    puppet.say("reply", id=2, ack=2, body=bytes(9000), buffers=[bytes(250)] * 4)
    limits = "the limits are 10000 and 4"
    with pytest.raises(errors.PayloadTooLarge, match=f"^{puppet.endpoint} .*: {text}; {limits}$"):
        bad.envelope()
    assert len(innocent.envelope().body) == 9000
    assert channel.state_name == "open"
    assert channel.stats()["garbage"] == 1
    if kind == "item":
        cancel = puppet.take()
        assert (cancel.kind, cancel.id) == ("cancel", 1), "it would wait for credit"


def test_a_large_item_ends_its_stream(puppet: Puppet, connect: Callable[..., Channel]) -> None:
    channel = connect(puppet.endpoint, max_bytes=1000)
    pending = submit(channel)
    assert [puppet.take().kind for _ in range(2)] == ["hello", "call"]
    puppet.say("item", id=1, ack=1, body=b"first")
    stream = pending.envelope().stream
    assert bytes(stream.next_item(LONG).body) == b"first"
    puppet.say("item", id=1, ack=1, body=bytes(2000))
    with pytest.raises(errors.PayloadTooLarge, match="payload of 2000 bytes"):
        stream.next_item(LONG)
    puppet.say("item", id=1, ack=1, body=b"was on its way")
    submit(channel)
    assert [puppet.take().kind for _ in range(2)] == ["cancel", "call"], "it is told once"
    assert channel.look() is None
