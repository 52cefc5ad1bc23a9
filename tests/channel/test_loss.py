"""What breaks: a killed server, one that comes back, one that says goodbye, a process that forks."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import pytest
from channel_support import Puppet

from zmqcore import errors
from zmqcore._channel import Channel
from zmqcore._pending import Pending

LONG = 20.0


def call(channel: Channel, method: str, body: bytes = b"", timeout: float | None = LONG) -> bytes:
    return bytes(channel.call(b"t", method, body, None, b"", 1, timeout).body)


def cast(channel: Channel, number: int, timeout: float | None = LONG) -> None:
    channel.send("cast", b"t", "count", b"me %d" % number, None, b"", 1, timeout)


def silent(
    channel: Channel, timeout: float | None = LONG, callback: Callable[[Pending], object] = print
) -> Pending:
    return channel.submit(b"t", "silent", b"", None, b"", 1, timeout, callback)


@pytest.mark.parametrize("spin", [60e-6, 0.0])
def test_a_killed_server_fails_all_pending_calls_at_once(
    start_server: Callable[..., Any], connect: Callable[..., Channel], team: Any, until: Callable[..., None],
    spin: float,
) -> None:  # fmt: skip
    server = start_server()
    channel = connect(server.endpoint, spin=spin)

    def ask() -> None:
        with pytest.raises(errors.PeerLost, match="before the reply came") as caught:
            call(channel, "silent", timeout=None)  # nothing but the loss can end it
        assert caught.value.executed_possible

    for _ in range(8):
        team.start(ask)
    until(lambda: channel.stats()["outstanding_calls"] == 8, "eight calls")
    server.kill()
    team.join()
    assert channel.state_name == "lost"
    assert not channel.usable
    with pytest.raises(errors.PeerLost, match="had not been sent") as caught:
        call(channel, "echo")
    assert not caught.value.executed_possible


def test_a_loss_nobody_watched_shows_at_the_next_use(
    start_server: Callable[..., Any], connect: Callable[..., Channel], until: Callable[..., None]
) -> None:
    server = start_server()
    channel = connect(server.endpoint)
    call(channel, "echo")
    server.kill()

    def gone() -> bool:
        try:
            call(channel, "echo", timeout=LONG)
        except errors.PeerLost:
            return True
        return False

    until(gone, "PeerLost")
    assert channel.state_name == "lost"


def test_a_server_on_another_port_is_another_channel(
    start_server: Callable[..., Any], connect: Callable[..., Channel]
) -> None:
    first = start_server()
    lost = connect(first.endpoint)
    call(lost, "echo")
    first.kill()
    second = start_server()
    assert second.endpoint != first.endpoint
    fresh = connect(second.endpoint)
    assert call(fresh, "echo", b"again") == b"again"
    assert fresh.peer_instance != lost.peer_instance
    with pytest.raises(errors.PeerLost):
        call(lost, "silent", timeout=None)


def test_a_server_that_comes_back_before_anybody_looks_is_noticed_by_its_hello(
    start_server: Callable[..., Any],
    connect: Callable[..., Channel],
    handshakes: Any,
    until: Callable[..., None],
) -> None:
    """libzmq reconnects by itself. The casts that went into the dead connection count as lost, an older call fails,
    and the channel goes on with the new server."""
    first = start_server()
    channel = connect(first.endpoint, configure=handshakes.watch)
    handshakes.wait()
    call(channel, "echo")
    instance = channel.peer_instance
    first.pause()
    ended: list[str] = []
    old = silent(channel, callback=lambda pending: ended.append(repr(pending)))
    for number in range(10):
        cast(channel, number)
    assert channel.stats()["window_messages"] == 11
    first.kill()
    start_server(endpoints=[first.endpoint])
    handshakes.wait()
    assert channel.state_name == "open"
    cast(channel, 10)
    assert call(channel, "echo", b"again") == b"again"
    assert channel.peer_instance != instance
    assert channel.stats()["lost"] == 11
    assert old.done
    assert len(ended) == 1
    with pytest.raises(errors.PeerLost, match="made again"):
        old.envelope()
    report = json.loads(call(channel, "report"))
    assert (report["casts"], report["disorder"]) == (1, 0)
    until(lambda: channel.ping(LONG) and channel.clean, "clean")


def test_after_a_goodbye_nothing_new_is_sent_and_what_is_outstanding_is_answered(
    start_server: Callable[..., Any], connect: Callable[..., Channel], team: Any, until: Callable[..., None]
) -> None:
    channel = connect(start_server().endpoint)

    def ask() -> None:
        assert call(channel, "after", b"400") == b"after"

    team.start(ask)
    until(lambda: channel.led, "a leader")
    call(channel, "goodbye")
    until(lambda: channel.look() or not channel.usable, "the goodbye")
    assert channel.state_name == "open"
    for attempt in (lambda: call(channel, "echo"), lambda: cast(channel, 1)):
        with pytest.raises(
            errors.PeerLost, match="takes nothing new; this message had not been sent"
        ) as caught:
            attempt()
        assert not caught.value.executed_possible
    team.join()
    assert channel.stats()["lost"] == 0


def in_child(work: Callable[[], None]) -> None:
    """Run ``work`` in a forked child; fail with what it raised."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        message = b""
        try:
            work()
        except BaseException as exc:  # noqa: BLE001 - handed to the parent
            message = repr(exc).encode() or b"?"
        os.write(write_end, message)
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        message = pipe.read()
    os.waitpid(pid, 0)
    assert not message, message.decode()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_is_refused_and_the_parent_goes_on(
    start_server: Callable[..., Any], connect: Callable[..., Channel], team: Any, until: Callable[..., None]
) -> None:
    channel = connect(start_server().endpoint)
    pending = channel.submit(b"t", "after", b"700", None, b"", 1, LONG, lambda _: None)

    def wait() -> None:
        assert call(channel, "after", b"800") == b"after"

    team.start(wait)
    team.start(wait)
    until(lambda: channel.led, "a leader")

    def child() -> None:
        for attempt in (
            lambda: call(channel, "echo"),
            lambda: cast(channel, 1),
            lambda: channel.ping(1.0),
            lambda: silent(channel),
            channel.attend,
            channel.look,
            channel.wait_open,
            pending.wait,
            pending.envelope,
            pending.cancel,
        ):
            with pytest.raises(errors.Closed, match="fork"):
                attempt()
        channel.stats()
        repr(channel)
        channel.close()
        channel.close()

    in_child(child)
    assert bytes(pending.envelope().body) == b"after"
    team.join()
    assert call(channel, "echo", b"parent") == b"parent"


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.usefixtures("quick_switches")
def test_a_fork_with_the_lock_held_by_another_thread_does_not_hang_the_child(
    start_server: Callable[..., Any], connect: Callable[..., Channel], team: Any
) -> None:
    channel = connect(start_server().endpoint)
    over = []

    def work() -> None:
        while not over:
            call(channel, "echo")

    for _ in range(4):
        team.start(work)

    def child() -> None:
        with pytest.raises(errors.Closed, match="fork"):
            call(channel, "echo")
        channel.close()

    for _ in range(30):
        in_child(child)
    over.append(True)
    team.join()


def test_a_port_that_has_stopped_tells_what_it_has_not_taken(
    puppet: Puppet, connect: Callable[..., Channel], until: Callable[..., None]
) -> None:
    """What crossed the goodbye on the way, from a client that had not read it: certainly not executed."""
    channel = connect(puppet.endpoint)
    taken, late = silent(channel), silent(channel)
    first, second = puppet.take(), puppet.take()
    puppet.say("goodbye", id=1, ack=first.id)
    until(lambda: channel.look() or late.done, "the last word")
    assert not taken.done
    with pytest.raises(errors.PeerLost, match="had stopped before this request came; not executed") as caught:
        late.envelope()
    assert not caught.value.executed_possible
    assert "late" in repr(late)
    puppet.say("reply", id=second.id)  # it did not keep its word
    puppet.say("reply", id=first.id)
    assert taken.envelope().kind == "reply"
    assert channel.stats()["late_replies"] == 1
