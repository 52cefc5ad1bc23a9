"""Lanes and what is retained, on channels by themselves: order, room, and whose turn it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from zmqcore import errors
from zmqcore._channel import Channel
from zmqcore._retention import Lane, Retained

LONG = 60.0


def accept(channel: Channel, lane: Lane, number: int, timeout: float | None = LONG) -> int:
    return channel.send_accepted(lane, "cast", b"t", "note", b"me %d" % number, None, b"", 1, timeout)


def held_up(
    start_server: Callable[..., Any], connect: Callable[..., Channel]
) -> tuple[Channel, Lane, list[Retained]]:
    """Return a channel with three messages that are not finished, their lane, and what it will leave undelivered."""
    left: list[Retained] = []
    server = start_server()  # its service finishes nothing
    channel = connect(server.endpoint, undelivered=left.extend)
    lane = Lane(server.endpoint)
    for number in range(3):
        accept(channel, lane, number)
    assert channel.stats()["retained"] == 3
    return channel, lane, left


def test_a_lost_channel_hands_over_what_is_not_finished_in_order(
    start_server: Callable[..., Any], connect: Callable[..., Channel]
) -> None:
    channel, lane, left = held_up(start_server, connect)
    assert (lane.unfinished, lane.barred) == (3, 0)
    channel.close()
    assert [message.order for message in left] == [1, 2, 3]
    assert [message.in_lane for message in left] == [lane] * 3
    assert (lane.unfinished, lane.barred, lane.given_up) == (3, 3, 0)
    for message in left:
        message.give_up()
        message.give_up()  # once is enough
    assert (lane.unfinished, lane.barred, lane.given_up) == (0, 0, 3)
    assert lane.wait(0.0)


def test_nothing_new_overtakes_what_is_to_be_sent_again(
    start_server: Callable[..., Any], connect: Callable[..., Channel]
) -> None:
    channel, lane, left = held_up(start_server, connect)
    channel.close()
    other = connect(start_server().endpoint)
    for message in left:
        with pytest.raises(errors.Unreachable, match="go first; this one had not been sent"):
            accept(other, lane, 3)
        assert other.send_now("cast", b"t", "note", b"me 3", None, b"", 1, lane) == 0
        other.send_again(message, lane, LONG)
    accept(other, lane, 3)
    assert (lane.unfinished, lane.barred) == (4, 0)
    assert not lane.wait(0.05)


def test_on_another_lane_it_is_counted_there(
    start_server: Callable[..., Any], connect: Callable[..., Channel]
) -> None:
    channel, lane, left = held_up(start_server, connect)
    channel.close()
    other = connect(start_server().endpoint)
    elsewhere = Lane(other.endpoint)
    accept(other, elsewhere, 9)
    for message in left:
        other.send_again(message, elsewhere, LONG)
    assert (lane.unfinished, lane.barred, lane.given_up) == (0, 0, 0)
    assert (elsewhere.unfinished, elsewhere.barred) == (4, 0)
    with pytest.raises(TypeError):
        other.send_again(Retained(), elsewhere, LONG)


def test_who_is_refused_when_its_turn_comes_lets_the_next_one_go(
    start_server: Callable[..., Any], connect: Callable[..., Channel], nowhere: Any, team: Any, until: Any
) -> None:
    channel, lane, left = held_up(start_server, connect)
    waiting = connect(nowhere.endpoint, open=False)
    refused: list[Exception] = []

    def too_late(number: int) -> None:
        try:
            accept(waiting, lane, number)
        except errors.Unreachable as exc:
            refused.append(exc)

    for number in range(5):
        team.start(too_late, number)
    until(lambda: waiting.stats()["casts"] == 0 and not waiting.clean, "they wait for the connection")
    team.start(waiting.send, "cast", b"t", "note", b"you 1", None, b"", 1, LONG)
    channel.close()  # now the lane is barred
    start_server(endpoints=[nowhere.free()])
    team.join()
    assert len(refused) + waiting.stats()["casts"] == 6
    assert waiting.stats()["casts"] >= 1
    assert len(left) == 3


def test_a_server_that_comes_back_before_anybody_looks(
    start_server: Callable[..., Any], connect: Callable[..., Channel], handshakes: Any
) -> None:
    """What the old connection had is handed over, though its ids are below what the new server has taken."""
    left: list[Retained] = []
    first = start_server()
    channel = connect(first.endpoint, undelivered=left.extend, configure=handshakes.watch)
    handshakes.wait()
    lane = Lane(first.endpoint)
    for number in range(3):
        accept(channel, lane, number)
    channel.ping(LONG)
    assert channel.stats()["window_messages"] == 0  # taken, and not finished
    first.kill()
    start_server(endpoints=[first.endpoint])
    handshakes.wait()
    assert channel.state_name == "open"
    channel.send("cast", b"t", "note", b"me 9", None, b"", 1, LONG)
    channel.ping(LONG)
    assert [message.order for message in left] == [1, 2, 3]
    assert (channel.state_name, channel.stats()["retained"], lane.barred) == ("open", 0, 3)
    for message in left:
        channel.send_again(message, lane, LONG)
    accept(channel, lane, 3)
    assert (lane.unfinished, lane.barred, channel.stats()["retained"]) == (4, 0, 4)
