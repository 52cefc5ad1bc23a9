"""What a node is before anything crosses a process. Its life and its end: tests/rpc/test_node_life.py."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import zmq

from zmqcore import Closed, Limits, MatchmakerError, Node
from zmqcore.codec import MsgpackCodec, get_codec
from zmqcore.matchmaker import open_matchmaker


def test_nothing_is_opened_until_it_is_used() -> None:
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").is_dir() else 0
    threads = threading.active_count()
    with Node("memory://node") as node:
        assert threading.active_count() == threads
        if before:
            assert len(list(Path("/proc/self/fd").iterdir())) == before
        assert node.stats()["pool"]["open"] == 0


def test_each_node_has_an_identity_of_its_own() -> None:
    with Node("memory://node") as one, Node("memory://node") as two:
        assert one.identity != two.identity
        assert one.stats()["identity"] == one.identity
        assert repr(one) != repr(two)


def test_a_matchmaker_of_ones_own() -> None:
    matchmaker = open_matchmaker("memory://own")
    with Node(matchmaker) as node:
        assert node.matchmaker is matchmaker
    with pytest.raises(MatchmakerError, match="nonsense"):
        Node("nonsense://x")


def test_limits_go_to_the_codec() -> None:
    limits = Limits(message_bytes=1000)
    with Node("memory://node", limits=limits) as node:
        assert isinstance(node.codec, MsgpackCodec)
        assert node.codec.limits == limits
        assert node.max_message_bytes > 1000
    with Node("memory://node") as node:
        assert node.codec is get_codec("msgpack")


def test_the_context_is_one_and_allows_as_many_sockets_as_libzmq_can() -> None:
    with Node("memory://node") as node:
        assert node.context is node.context
        assert node.context.get(zmq.MAX_SOCKETS) > 1023
    assert node._context is not None
    assert node._context.closed


def test_ports_listen_where_they_are_told() -> None:
    with Node("memory://node", bind="tcp://127.0.0.1:*") as node:
        port = node.open_port()
        (endpoint,) = port.endpoints
        assert endpoint.startswith("tcp://127.0.0.1:")
        with pytest.raises(OSError, match=endpoint):
            node.open_port([endpoint])
        port.close()
        named = node.open_port(["inproc://name", "tcp://127.0.0.1:*"])
        assert named.endpoints[0] == "inproc://name"
        named.close()


@pytest.mark.parametrize("bind", ["", "tcp://", "tcp://127.0.0.1", "http://x:1", "ipc://" + "x" * 200])
def test_endpoints_that_are_none(bind: str) -> None:
    with Node("memory://node") as node, pytest.raises(ValueError, match=r"endpoint|ipc|tcp"):
        node.open_port([bind])


def test_after_close() -> None:
    node = Node("memory://node")
    node.close()
    node.close()
    for use in (lambda: node.context, node.open_port):
        with pytest.raises(Closed):
            use()
    assert node.stats()["pool"]["open"] == 0, "one can still look at it"
    assert "closed" in repr(node)
