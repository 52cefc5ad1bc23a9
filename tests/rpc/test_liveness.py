"""A peer that is stopped or cut off is lost within the limit; one that is busy never is. Real processes, real sockets.

The limit is short here, so that the tests are. No time is asserted: who waits does so without a deadline of its own, so
that nothing but the loss can end it; and who is busy is so for several times the limit.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest
from memory_support import peak_rss_bytes, reset_peak_rss

from zmqcore import (
    AsyncClient,
    Client,
    DeadlineExceeded,
    Node,
    Overloaded,
    PeerLost,
    Server,
    Unreachable,
    ZmqcoreError,
)

# Short enough for a test, and long enough that no I/O thread waits for a CPU for so long.
LIMIT = 1.0
BUSY = 3 * LIMIT
WINDOW = 8192

MakeNode = Callable[..., Node]
Peers = Callable[..., Any]
Running = Callable[..., Any]
Until = Callable[..., None]


@pytest.fixture
def node(make_node: MakeNode) -> Node:
    return make_node(liveness=LIMIT)


def works(client: Client) -> bool:
    try:
        return bool(client.prepare(timeout=1.0).call("echo", 1) == 1)
    except ZmqcoreError:
        return False


# -- stopped -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bind", ["tcp://127.0.0.1:*", None], ids=["tcp", "ipc"])
def test_a_stopped_process_is_lost_and_comes_back(
    peers: Peers, node: Node, running: Running, until: Until, bind: str | None
) -> None:
    """Whoever waits gets PeerLost: the request may have been executed. After SIGCONT the next calls are answered."""
    options = {} if bind is None else {"bind": bind}
    peer = peers("frozen", **options)
    client = Client("frozen", node=node, timeout=None)
    assert client.call("echo", 1) == 1
    begun = client.submit("sleep", 600.0)
    until(lambda: node.pool.channels()[0].stats()["window_messages"] == 0, "the call is taken")
    peer.freeze()
    waiting = [running(client.call, "echo", 2), running(client.submit("echo", 3).result)]
    for lost in (begun.exception(), waiting[0].join(), waiting[1].join()):
        assert isinstance(lost, PeerLost)
        assert lost.executed_possible
    peer.thaw()
    until(lambda: works(client), "an answer after SIGCONT")


def test_a_stopped_process_is_lost_to_an_event_loop(peers: Peers, node: Node) -> None:
    peer = peers("frozen")

    async def wait() -> None:
        async with AsyncClient("frozen", node=node, timeout=None) as client:
            assert await client.call("echo", 1) == 1
            calls = [asyncio.ensure_future(client.call("sleep", 600.0)) for _ in range(10)]
            await client.call("echo", 2)
            peer.freeze()
            for lost in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(lost, PeerLost)

    asyncio.run(wait())


@pytest.mark.parametrize("used", [True, False], ids=["waited for", "idle"])
def test_what_was_never_sent_was_never_executed(peers: Peers, node: Node, until: Until, used: bool) -> None:
    """A cast that finds the connection gone says so, whether or not anybody noticed before."""
    peer = peers("frozen", bind="tcp://127.0.0.1:*")
    client = Client("frozen", node=node, timeout=None)
    client.call("echo", 1)
    channel = node.pool.acquire(peer.endpoints[0])  # held: the pool would close it
    peer.freeze()
    if used:
        with pytest.raises(PeerLost):
            client.call("echo", 2)
    else:
        until(lambda: channel.look() or not channel.usable, "the loss of an idle channel")
    with pytest.raises(PeerLost) as refused:
        channel.send("cast", b"frozen", "echo", b"", None, b"", 1, None)
    assert not refused.value.executed_possible
    node.pool.release(channel)


def test_a_stopped_process_is_lost_behind_what_it_has_not_read(peers: Peers, node: Node) -> None:
    """libzmq sends no heartbeat while a message is half written; the connection ends all the same."""
    peer = peers("frozen", bind="tcp://127.0.0.1:*")
    client = Client("frozen", node=node, timeout=None)
    client.call("echo", 1)
    peer.freeze()
    for _ in range(2):
        client.cast("echo", bytes(24 << 20))
    with pytest.raises(PeerLost):
        client.call("echo", 2)


def test_a_stopped_server_among_ten_costs_a_bounded_amount_of_memory(
    peers: Peers, serve: Callable[..., Server], make_node: MakeNode, registry: str, running: Running
) -> None:
    """560 MiB go to nine servers, and as much as can be to one that has stopped, before and after it is lost."""
    window, size, count = 4 << 20, 1 << 16, 1000
    taken = [0] * 9

    def sink(number: int) -> dict[str, Callable[[bytes], None]]:
        def take(_: bytes) -> None:
            taken[number] += 1

        return {"take": take}

    node = make_node(registry, liveness=LIMIT, window_bytes=window, connect_timeout=0.2)
    clients = [
        Client("t", node=node, connect=serve("t", sink(number), workers=0).endpoints[0])
        for number in range(9)
    ]
    peer = peers("t", bind="tcp://127.0.0.1:*")
    stopped = Client("t", node=node, connect=peer.endpoints[0], timeout=0.5)
    for client in (*clients, stopped):
        client.call("zmqcore.ping")
    peer.freeze()

    over = threading.Event()

    def cast(client: Client) -> None:
        for _ in range(count):
            client.cast("take", bytes(size))

    def cast_to_nobody() -> set[type]:
        failed: set[type] = set()
        while not (over.is_set() and Unreachable in failed):
            try:
                stopped.cast("take", bytes(size))
            except ZmqcoreError as exc:
                failed.add(type(exc))
        return failed

    reset_peak_rss()
    before = peak_rss_bytes()
    tenth = running(cast_to_nobody)
    for each in [running(cast, client) for client in clients]:
        each.result()
    for client in clients:
        client.call("zmqcore.ping")
    over.set()
    # The last one of who had no time left to try, on a busy machine.
    assert tenth.result() <= {Overloaded, PeerLost, Unreachable, DeadlineExceeded}
    assert taken == [count] * 9
    grown = peak_rss_bytes() - before
    # A window for each of ten connections, on both sides; libzmq, sockets and allocators have theirs.
    assert grown < 30 * window


# -- busy ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "bind"), [(0, "tcp://127.0.0.1:*"), (4, None)], ids=["tcp", "ipc"])
def test_a_handler_that_holds_the_gil_is_busy(
    peers: Peers, node: Node, running: Running, until: Until, workers: int, bind: str | None
) -> None:
    """No Python code of the server runs for several times the limit. Nobody is lost, no connection replaced."""
    options: dict[str, Any] = {} if bind is None else {"bind": bind}
    peers("busy", workers=workers, node={"liveness": LIMIT}, **options)
    client = Client("busy", node=node, timeout=None)
    assert client.call("echo", 0) == 0
    holding = running(client.call, "hold_the_gil", BUSY)
    meanwhile = running(client.call, "echo", 1)
    for _ in range(100):
        client.cast("count", "casts")
    assert holding.result() == "held"
    assert meanwhile.result() == 1
    until(lambda: client.call("counted", "casts") == 100, "all casts run")
    stats = node.pool.stats()
    assert (stats["opened"], stats["lost"]) == (1, 0)


@pytest.mark.slow
def test_ten_seconds_with_the_gil_held_are_no_loss(
    peers: Peers, make_node: MakeNode, running: Running
) -> None:
    """The same with the limit that is the default."""
    node = make_node()
    peers("busy", workers=0)
    client = Client("busy", node=node, timeout=None)
    holding = running(client.call, "hold_the_gil", 10.0)
    assert client.call("echo", 1) == 1
    assert holding.result() == "held"
    assert node.pool.stats()["opened"] == 1


def test_a_client_that_holds_the_gil_is_busy(peers: Peers, node: Node) -> None:
    """The other way round: the server keeps a client whose process computes."""
    peers("server", node={"liveness": LIMIT})
    client = Client("server", node=node, timeout=None)
    future = client.submit("sleep", BUSY / 2)
    ctypes.PyDLL(None).usleep(int(BUSY * 1e6))
    future.result()
    assert node.pool.stats()["opened"] == 1


def test_a_full_window_is_no_loss(peers: Peers, make_node: MakeNode) -> None:
    """The largest window there is, all of it sent to a server that reads nothing for several times the limit."""
    node = make_node(liveness=LIMIT, window_messages=WINDOW)
    peers("busy", workers=0, node={"liveness": LIMIT}, bind="tcp://127.0.0.1:*")
    client = Client("busy", node=node, timeout=None)
    client.call("echo", 0)
    client.cast("hold_the_gil", BUSY)
    for _ in range(WINDOW + 100):
        client.cast("count", "casts")
    assert client.call("counted", "casts") == WINDOW + 100
    assert node.pool.stats()["opened"] == 1


# -- cut off -------------------------------------------------------------------------------------------------


class Proxy:
    """A TCP proxy in front of ``endpoint``. After stall() it keeps its connections and forwards nothing."""

    def __init__(self, endpoint: str) -> None:
        host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._ended = threading.Event()
        self._stalled = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        there: dict[int, tuple[socket.socket, socket.socket]] = {}
        while not self._ended.is_set():
            for fd, _ in poll.poll(10):
                if self._stalled.is_set():
                    self._ended.wait(0.01)
                elif fd == self._listener.fileno():
                    client, _ = self._listener.accept()
                    server = socket.create_connection(self._target)
                    self._pairs.append((client, server))
                    for here, other in ((client, server), (server, client)):
                        there[here.fileno()] = (here, other)
                        poll.register(here, select.POLLIN)
                else:
                    here, other = there[fd]
                    data = here.recv(1 << 16)
                    if data:
                        other.sendall(data)
                    else:
                        poll.unregister(here)
                        other.shutdown(socket.SHUT_WR)

    def stall(self) -> None:
        self._stalled.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join()
        for sock in (self._listener, *(end for pair in self._pairs for end in pair)):
            sock.close()


@pytest.fixture
def proxied(peers: Peers) -> Iterator[Proxy]:
    with Proxy(peers("far", bind="tcp://127.0.0.1:*").endpoints[0]) as proxy:
        yield proxy


def test_a_black_hole_is_a_loss(proxied: Proxy, node: Node, running: Running) -> None:
    """The network swallows everything and says nothing; both ends are alive."""
    client = Client("far", node=node, timeout=None, connect=proxied.endpoint)
    assert client.call("echo", 1) == 1
    waiting = running(client.call, "sleep", 600.0)
    assert client.call("echo", 2) == 2
    proxied.stall()
    lost = waiting.join()
    assert isinstance(lost, PeerLost)
    assert lost.executed_possible


def test_casts_into_a_black_hole_are_counted_as_lost(proxied: Proxy, node: Node, until: Until) -> None:
    """Nobody waits for anything: the node's maintenance notices, and the place is free again."""
    client = Client("far", node=node, timeout=5.0, connect=proxied.endpoint)
    client.call("echo", 1)
    proxied.stall()
    client.cast("echo", 2)
    until(lambda: node.pool.stats()["lost"] == 1, "the loss")
    until(lambda: node.pool.stats()["open"] == 0, "the end of its socket")


# -- a client that is cut off: by a network of its own, since a proxy's TCP would go on answering ---------------


CLIENT = """
import sys, time
from zmqcore import Client, Node
node = Node("memory://cut-off", liveness=3600.0)
print(Client("t", connect=sys.argv[1], node=node).call("echo", "there"), flush=True)
time.sleep(600)
"""


def ip(*words: str) -> bool:
    """Run ip(8); whether that went well."""
    return subprocess.run(["ip", *words], capture_output=True, check=False).returncode == 0


@pytest.fixture
def cable(require_service: Callable[[str], str]) -> Iterator[str]:
    """Two ends of a network cable, NAME-a here and NAME-b in the network namespace NAME: 198.18.47.1 and .2."""
    require_service("ip")
    name = f"zc{os.getpid()}"
    if not ip("netns", "add", name):
        pytest.skip("needs the right to make network namespaces")
    try:
        for words in (
            f"link add {name}-a type veth peer name {name}-b netns {name}",
            f"addr add 198.18.47.1/30 dev {name}-a",
            f"-n {name} addr add 198.18.47.2/30 dev {name}-b",
            f"link set {name}-a up",
            f"-n {name} link set {name}-b up",
        ):
            if not ip(*words.split()):
                pytest.skip(f"cannot: ip {words}")
        yield name
    finally:
        ip("link", "del", f"{name}-a")
        ip("netns", "del", name)


def connections(port: int) -> list[int]:
    """For each TCP connection to ``port`` of this host, how many bytes it has sent that are not acknowledged."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    established = [row for row in rows if row[3] == "01" and int(row[1].partition(":")[2], 16) == port]
    return [int(row[4].partition(":")[0], 16) for row in established]


def test_a_client_that_is_cut_off_is_let_go(cable: str, make_node: MakeNode, until: Until) -> None:
    """The cable is pulled: no word comes from the client any more, and the server closes the connection."""
    node = make_node("memory://cut-off", liveness=LIMIT)
    with Server("t", {"echo": lambda value: value}, node=node, bind="tcp://198.18.47.1:*") as server:
        (endpoint,) = server.endpoints
        port = int(endpoint.rpartition(":")[2])
        command = ["ip", "netns", "exec", cable, sys.executable, "-c", CLIENT, endpoint]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
            assert client.stdout is not None
            try:
                assert client.stdout.readline() == "there\n"
                # Nothing is under way: what is not acknowledged would break the connection by itself.
                until(lambda: connections(port) == [0], "the last acknowledgement")
                ip("-n", cable, "link", "set", f"{cable}-b", "down")
                until(lambda: not connections(port), "the end of the connection")
            finally:
                client.kill()
