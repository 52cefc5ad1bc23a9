"""Names, servers and exchanges as they are, from end to end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from zmqcore import Client, Node, NoSuchTopic, Server, Topic

ODD = ["a@b", "a/b", "a.b:c", "100%", "with space", "näïve ☃", "%2F", "@", "/", "\n", "x" * 500]


@pytest.mark.parametrize("odd", ODD)
def test_odd_characters_travel_in_every_part(
    serve: Callable[..., Server], connect: Callable[..., Client], odd: str
) -> None:
    serve(Topic(odd, odd, odd), {"work": lambda: "done"})
    assert connect(Topic(odd, odd, odd)).call("work") == "done"
    assert connect(Topic(odd, None, odd)).call("work") == "done"
    assert connect(Topic(odd, None, odd)).prepare(server=odd).call("work") == "done"
    assert sorted(connect(Topic(odd, None, odd)).gather("work").results.values()) == ["done"]
    for other in (Topic(odd), Topic(odd, odd), Topic(odd, odd + "x", odd)):
        with pytest.raises(NoSuchTopic):
            connect(other, discovery_timeout=0.01).call("work")


def test_odd_names_travel_between_processes(peers: Callable[..., Any], node: Node) -> None:
    peers("näïve/☃ %2F", "host-3@lvm", "ex/change")
    with Client(Topic("näïve/☃ %2F", "host-3@lvm", "ex/change"), node=node, timeout=30.0) as client:
        assert client.call("who") == "host-3@lvm"


def test_a_topic_without_server_reaches_every_server(
    serve: Callable[..., Server], connect: Callable[..., Client]
) -> None:
    for name in ("a", "b", "c"):
        serve("t", {"work": lambda name=name: name}, server=name)
    everybody = connect("t")
    assert {everybody.call("work") for _ in range(3)} == {"a", "b", "c"}
    assert sorted(everybody.gather("work").results.values()) == ["a", "b", "c"]
    assert {connect(Topic("t", "b")).call("work") for _ in range(3)} == {"b"}
    assert sorted(connect(Topic("t", "b")).gather("work").results.values()) == ["b"]


def test_exchanges_are_apart(serve: Callable[..., Server], connect: Callable[..., Client]) -> None:
    for exchange in ("", "one", "two"):
        serve(Topic("t", "s", exchange), {"work": lambda exchange=exchange: exchange})
    for exchange in ("", "one", "two"):
        client = connect(Topic("t", None, exchange))
        assert {client.call("work") for _ in range(3)} == {exchange}
        assert [member.topic.exchange for member in client.gather("work").results] == [exchange]
        assert [member.topic.exchange for member in client.fanout("work").sent] == [exchange]


def test_a_server_refuses_what_is_meant_for_another_topic(
    serve: Callable[..., Server], connect: Callable[..., Client]
) -> None:
    """A client with a stale address may find another server there."""
    server = serve(Topic("t", "s", "e"), {"work": lambda: "done"})
    here = server.endpoints
    assert connect(Topic("t", None, "e"), connect=here).call("work") == "done"
    assert connect(Topic("t", "s", "e"), connect=here).call("work") == "done"
    for topic in (Topic("t"), Topic("t", "x", "e"), Topic("u", None, "e"), Topic("t", "s", "f")):
        with pytest.raises(NoSuchTopic, match="is not served here"):
            connect(topic, connect=here).call("work")


def test_two_servers_of_one_name_are_both_reached(
    serve: Callable[..., Server], connect: Callable[..., Client]
) -> None:
    for result in (1, 2):
        serve(Topic("t", "same"), {"work": lambda result=result: result})
    client = connect(Topic("t", "same"))
    assert sorted(client.call("work") for _ in range(2)) == [1, 2]
    assert sorted(client.gather("work").results.values()) == [1, 2]
