"""What a node is before anything crosses a process. Its life and its end: tests/rpc/test_node_life.py."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import zmq
from clock_support import Clock

from zmqcore import Client, Closed, Limits, MatchmakerError, Node, Server
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


def test_its_own_name_is_looked_up_when_it_is_needed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The name server may be silent: a node that nobody asks for it must not wait for that."""
    asked: list[str] = []

    def addresses(host: str, _timeout: float) -> list[str]:
        asked.append(host)
        if host == "silent.test":
            raise TimeoutError("the name has not been resolved yet")
        return ["192.0.2.1"]

    monkeypatch.setattr("zmqcore.node.addresses", addresses)
    for host, announced in (("known.test", "known.test"), ("silent.test", "127.0.0.1")):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        with Node("memory://node") as node:
            with Server("local", {"f": int}, node=node, bind="tcp://127.0.0.1:*"):
                assert asked == []
            with Server("everywhere", {"f": int}, node=node, bind="tcp://0.0.0.0:*") as server:
                assert server.member.endpoints[0].startswith(f"tcp://{announced}:")
            assert node.advertised_host == announced
        assert asked == [host]
        asked.clear()
    (record,) = caplog.records
    assert "silent.test" in record.getMessage()
    with Node("memory://node", advertise="10.0.0.1") as node:
        assert node.advertised_host == "10.0.0.1"
    assert asked == []


_AT_THE_LIMIT = """
import contextlib, errno, os, resource
from zmqcore import Node
node = Node("memory://node")
node.open_port(["tcp://127.0.0.1:*"]).close()
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
taken, refused = [], 0
with contextlib.suppress(OSError):
    while True:
        taken.append(os.dup(0))
for n in range(12):
    try:
        node.open_port(["tcp://127.0.0.1:*"]).close()
    except OSError as exc:
        assert exc.errno == errno.EMFILE, exc
        assert "of the 100 " in str(exc), exc
        refused += 1
    os.close(taken.pop())
assert 0 < refused < 12, refused
for fd in taken:
    os.close(fd)
node.close()
print("survived")
"""


def test_a_port_at_the_limit_of_descriptors() -> None:
    """libzmq aborts the process if it finds none when it binds to tcp."""
    ran = subprocess.run(
        [sys.executable, "-c", _AT_THE_LIMIT], check=False, capture_output=True, text=True, timeout=60.0
    )
    assert (ran.stdout, ran.stderr, ran.returncode) == ("survived\n", "", 0)


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
    with Node("memory://node") as node:
        assert node.codec is get_codec("msgpack")


def test_the_context_is_one_and_allows_more_sockets_than_the_pool() -> None:
    with Node("memory://node", max_sockets=5000) as node:
        assert node.context is node.context
        assert node.context.get(zmq.MAX_SOCKETS) > 6000
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


@pytest.mark.parametrize(
    ("option", "value", "limit"),
    [
        ("window_messages", 0, "at least 1"),
        ("window_messages", 100_000, "at most 8,192"),
        ("window_bytes", 0, "at least 1"),
        ("liveness", 0.01, "at least 0.1"),
        ("liveness", 1e6, "at most 86,400"),
        ("liveness", float("nan"), "at least 0.1"),
        ("spin", -1.0, "at least 0"),
        ("spin", 2.0, "at most 1"),
        ("bind", "nonsense", "tcp://"),
        ("bind", ["tcp://127.0.0.1:*", "tcp://127.0.0.1"], "port"),
        ("max_sockets", 0, "max_sockets"),
    ],
)
def test_an_option_that_cannot_be_is_refused_at_once(option: str, value: object, limit: str) -> None:
    with pytest.raises(ValueError, match=limit):
        Node("memory://node", **{option: value})  # type: ignore[arg-type]


def test_after_close() -> None:
    node = Node("memory://node")
    node.close()
    node.close()
    for use in (lambda: node.context, node.open_port):
        with pytest.raises(Closed):
            use()
    assert node.stats()["pool"]["open"] == 0, "one can still look at it"
    assert "closed" in repr(node)


def test_a_socket_that_somebody_leaves_open_does_not_hang_close(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """libzmq ends a context with its last socket. close() says how many are open, and the context ends with them."""
    node = Node("memory://node")
    sockets = [node.context.socket(zmq.PUB) for _ in range(3)]
    context = node.context
    sockets.pop().close()
    node.close(0.0)
    (record,) = caplog.records
    assert "2 sockets" in record.getMessage()
    assert not context.closed
    for socket in sockets:
        socket.close()
    (helper,) = [thread for thread in threading.enumerate() if thread.name == "zmqcore-term"]
    helper.join()
    assert context.closed


def test_closing_twice_at_once_waits_for_the_first() -> None:
    node = Node("memory://node")
    begun, gate = threading.Event(), threading.Event()

    class Thing:
        def runs_this_thread(self) -> bool:
            return False

        def ask_to_stop(self, _timeout: float) -> None:
            pass

        def close_down(self, _timeout: float) -> None:
            begun.set()
            gate.wait(30.0)

    thing = Thing()
    node.own(thing)
    first = threading.Thread(target=node.close)
    first.start()
    assert begun.wait(30.0)
    second = threading.Thread(target=node.close, args=(30.0,))
    second.start()
    second.join(0.1)
    assert second.is_alive()
    gate.set()
    second.join(30.0)
    first.join(30.0)
    assert not second.is_alive()
    assert not first.is_alive()


def test_close_has_one_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who uses up all of the time leaves none to the others, who have been asked by then."""
    clock = Clock()
    monkeypatch.setattr("zmqcore.node.time", SimpleNamespace(monotonic=clock))
    node = Node("memory://node")
    asked: list[float] = []
    waited: list[float] = []

    class Thing:
        def runs_this_thread(self) -> bool:
            return False

        def ask_to_stop(self, timeout: float) -> None:
            asked.append(timeout)

        def close_down(self, timeout: float) -> None:
            assert asked == [2.0] * 3
            waited.append(timeout)
            clock.now += 2.0

    things = [Thing() for _ in range(3)]
    for thing in things:
        node.own(thing)
    node.close(2.0)
    assert waited == [2.0, 0.0, 0.0]


def test_close_by_what_has_to_go_on_first_is_done_behind_it() -> None:
    """As a handler of a server does: close() returns at once there, and waits for it on another thread."""
    node = Node("memory://node")
    handler = threading.get_ident()
    gate, closed_by = threading.Event(), []

    class Thing:
        def runs_this_thread(self) -> bool:
            return threading.get_ident() == handler

        def ask_to_stop(self, _timeout: float) -> None:
            pass

        def close_down(self, _timeout: float) -> None:
            gate.wait(30.0)
            closed_by.append(threading.get_ident())

    thing = Thing()
    node.own(thing)
    node.close()
    node.close()
    with pytest.raises(Closed):
        _ = node.context
    assert closed_by == []
    (helper,) = [thread for thread in threading.enumerate() if thread.name == "zmqcore-close"]
    gate.set()
    helper.join(30.0)
    assert len(closed_by) == 1
    assert closed_by != [handler]


def test_what_belongs_to_a_process_says_so_when_pickled() -> None:
    with Node("memory://pickled") as node, pytest.raises(TypeError, match="make one in the other process"):
        pickle.dumps(Client("t", node=node))
