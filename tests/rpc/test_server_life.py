"""How servers start, drain, stop and start again."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from zmqcore import (
    Client,
    Closed,
    DeadlineExceeded,
    MatchmakerError,
    Node,
    NoSuchTopic,
    Overloaded,
    PeerLost,
    Server,
    Unreachable,
)
from zmqcore._request import Request
from zmqcore.rpc.backlog import Backlog
from zmqcore.rpc.executor import Threads

Until = Callable[..., None]
Running = Callable[..., Any]


class Gate:
    """Handlers that end when they are told to, and count."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.entered = threading.Semaphore(0)
        self.count = 0
        self._lock = threading.Lock()

    def wait(self, value: Any = None) -> Any:
        self.entered.release()
        self.opened.wait(60.0)
        return value

    def add(self, seconds: float = 0.0) -> None:
        time.sleep(seconds)
        with self._lock:
            self.count += 1

    def echo(self, value: Any) -> Any:
        return value

    def await_entered(self) -> None:
        assert self.entered.acquire(timeout=30.0)


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.opened.set()


# -- draining ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_stop_finishes_what_has_come(
    serve: Callable[..., Server], connect: Callable[..., Client], gate: Gate, running: Running, workers: int
) -> None:
    server = serve("t", gate, workers=workers)
    client = connect("t")
    assert client.call("echo", 1) == 1
    futures = [client.submit("wait", number) for number in range(10)]
    gate.await_entered()
    stopping = running(server.stop)
    stopping.thread.join(0.2)
    assert not stopping.ended
    gate.opened.set()
    assert stopping.result() is True
    assert [future.result() for future in futures] == list(range(10))
    assert not server.running


@pytest.mark.parametrize("workers", [0, 4])
def test_casts_that_have_been_sent_are_run_before_it_stops(
    serve: Callable[..., Server], connect: Callable[..., Client], gate: Gate, workers: int
) -> None:
    server = serve("t", gate, workers=workers)
    client = connect("t")
    assert client.call("echo", 1) == 1
    for _ in range(2000):
        client.cast("add")
    assert server.stop() is True
    assert gate.count == 2000


def test_stop_under_load_loses_nothing(
    peers: Callable[..., Any], node: Node, until: Until, running: Running
) -> None:
    """Threads call and cast all the time; one of two servers in other processes is stopped, and started again."""
    one, _ = (peers("t", name) for name in ("one", "two"))
    client = Client("t", node=node, timeout=30.0)
    until(lambda: len(client.members()) == 2)
    stop = threading.Event()
    casts = [0] * 4

    def work(thread: int) -> int:
        calls = 0
        while not stop.is_set():
            assert client.call("echo", calls) == calls
            client.cast("count", "x")
            casts[thread] += 1
            calls += 1
        return calls

    threads = [running(work, thread) for thread in range(4)]

    def each_casts(more: int) -> None:
        before = list(casts)
        until(lambda: all(now >= was + more for now, was in zip(casts, before, strict=True)))

    for _ in range(3):
        each_casts(20)
        assert one.ask("stop", True, 30.0) is True
        each_casts(20)
        one.ask("start")
    stop.set()
    assert all(thread.result() > 0 for thread in threads)
    until(lambda: len(client.members()) == 2)
    until(
        lambda: sum(client.prepare(server=name).call("counted", "x") for name in ("one", "two")) == sum(casts)
    )


def test_stop_ends_although_clients_go_on_calling(
    serve: Callable[..., Server], connect: Callable[..., Client], running: Running
) -> None:
    """They know no other server, and no matchmaker that tells them; draining must end all the same."""
    server = serve("t", {"work": lambda: time.sleep(0.001)}, bind="tcp://127.0.0.1:*")
    client = connect("t", connect=server.endpoints, timeout=60.0)
    assert client.call("work") is None
    stop = threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        while not stop.is_set():
            try:
                client.call("work")
            except Unreachable:
                return
            except Exception as exc:  # noqa: BLE001 - looked at below
                failures.append(exc)
                return

    threads = [running(work) for _ in range(4)]
    try:
        assert running(server.stop, timeout=20.0).result() is True
    finally:
        stop.set()
    for thread in threads:
        thread.result()
    assert failures == []


def test_a_call_under_way_survives_that_another_one_comes_while_draining(
    serve: Callable[..., Server], connect: Callable[..., Client], gate: Gate, running: Running, until: Until
) -> None:
    """After the goodbye another call needs a way of its own; the channel with the first one must stay."""
    server = serve("t", gate, bind="tcp://127.0.0.1:*")
    client = connect("t", connect=server.endpoints)
    assert client.call("echo", 1) == 1
    (channel,) = client._node.pool.channels()
    future = client.submit("wait", "result")
    gate.await_entered()
    stopping = running(server.stop, timeout=30.0)
    until(lambda: not channel.usable)
    assert channel.state_name == "open"
    with contextlib.suppress(Unreachable, NoSuchTopic, DeadlineExceeded, PeerLost):
        client.prepare(timeout=0.3).call("echo", 2)
    gate.opened.set()
    assert future.result() == "result"
    assert stopping.result() is True


def test_stop_gives_up_in_the_end(
    serve: Callable[..., Server], connect: Callable[..., Client], gate: Gate, running: Running
) -> None:
    server = serve("t", gate, workers=1)
    client = connect("t")
    stuck = client.submit("wait", "too late")
    gate.await_entered()
    queued = client.submit("add")
    assert running(server.stop, timeout=0.3).result() is False
    assert isinstance(stuck.exception(), PeerLost)
    assert isinstance(queued.exception(), PeerLost)
    gate.opened.set()
    assert gate.count == 0


def test_stop_without_draining(
    serve: Callable[..., Server], connect: Callable[..., Client], gate: Gate, running: Running
) -> None:
    server = serve("t", gate, workers=1)
    client = connect("t")
    futures = [client.submit("wait"), *(client.submit("add") for _ in range(10))]
    gate.await_entered()
    stopping = running(server.stop, drain=False, timeout=30.0)
    for future in futures:
        assert isinstance(future.exception(), PeerLost)
    gate.opened.set()
    stopping.result()
    assert gate.count == 0


# -- stopping more than once, from anywhere -------------------------------------------------------------------


def test_stop_twice(serve: Callable[..., Server], gate: Gate) -> None:
    server = serve("t", gate)
    assert server.stop() is True
    assert server.stop() is True
    assert server.wait(0) is True


def test_stop_before_start(make_node: Callable[..., Node], registry: str, gate: Gate) -> None:
    server = Server("t", gate, node=make_node(registry))
    assert server.stop() is True
    assert not server.running
    assert server.endpoints == ()
    with pytest.raises(RuntimeError, match="start"):
        _ = server.member
    assert "not running" in repr(server)


def test_stop_from_several_threads_at_once(
    serve: Callable[..., Server], connect: Callable[..., Client], gate: Gate, running: Running
) -> None:
    server = serve("t", gate)
    client = connect("t")
    future = client.submit("wait", 1)
    gate.await_entered()
    stopping = [running(server.stop) for _ in range(4)]
    stopping[0].thread.join(0.2)
    gate.opened.set()
    assert [thread.result() for thread in stopping] == [True] * 4
    assert future.result() == 1
    assert server.wait(0)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_handler_may_stop_its_server_twice(
    serve: Callable[..., Server], connect: Callable[..., Client], workers: int
) -> None:
    """Neither waits for the handler itself; and until it has stopped the server cannot be started again."""
    server: list[Server] = []

    def shut_down() -> list[Any]:
        stopped = [server[0].stop(), server[0].stop()]
        try:
            server[0].start()
        except RuntimeError as exc:
            stopped.append("stopped" in str(exc))
        return stopped

    server.append(serve("t", {"shut_down": shut_down}, workers=workers))
    assert connect("t").call("shut_down") == [False, False, True]
    assert server[0].wait(30.0)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_handler_may_stop_its_server(
    serve: Callable[..., Server], connect: Callable[..., Client], workers: int
) -> None:
    server: list[Server] = []

    def shut_down() -> str:
        server[0].stop()
        return "it is stopping"

    server.append(serve("t", {"shut_down": shut_down}, workers=workers))
    client = connect("t")
    assert client.call("shut_down") == "it is stopping"
    assert server[0].wait(30.0)


def test_a_handler_may_stop_its_server_while_another_thread_does(
    serve: Callable[..., Server], connect: Callable[..., Client], gate: Gate, running: Running
) -> None:
    server: list[Server] = []

    def shut_down() -> None:
        gate.wait()
        server[0].stop(timeout=30.0)

    server.append(serve("t", {"shut_down": shut_down}, workers=1))
    future = connect("t").submit("shut_down")
    gate.await_entered()
    stopping = running(server[0].stop, timeout=20.0)
    stopping.thread.join(0.2)
    gate.opened.set()
    stopping.result()
    future.exception()


def test_a_server_can_be_started_again(
    serve: Callable[..., Server], connect: Callable[..., Client], gate: Gate, until: Until
) -> None:
    server = serve("t", gate)
    client = connect("t", discovery_timeout=30.0)
    instances = set()
    for number in range(3):
        assert client.call("echo", number) == number
        instances.add(server.member.instance)
        with pytest.raises(RuntimeError, match="runs already"):
            server.start()
        assert client.call("echo", number) == number, "the attempt harmed nobody"
        assert server.stop() is True
        until(lambda: not client.members())
        assert server.start() is server
    assert len(instances) == 3


def test_with_statement_and_wait(
    make_node: Callable[..., Node], registry: str, gate: Gate, running: Running
) -> None:
    node = make_node(registry)
    with Server("t", gate, node=node) as server:
        assert server.running
        assert server.wait(0.01) is False
        waiting = running(server.wait)
        assert Client("t", node=node).call("echo", 1) == 1
    assert waiting.result() is True
    assert not server.running
    assert node.matchmaker.members("t").members == ()


def test_serve_forever_ends_by_stop(
    make_node: Callable[..., Node], registry: str, gate: Gate, running: Running, until: Until
) -> None:
    node = make_node(registry)
    server = Server("t", gate, node=node)
    serving = running(server.serve_forever)
    until(lambda: server.running)
    assert Client("t", node=node, timeout=30.0).call("echo", 1) == 1
    server.stop()
    serving.result()


# -- starting that fails ---------------------------------------------------------------------------------------


def test_a_port_that_is_taken(
    serve: Callable[..., Server], make_node: Callable[..., Node], registry: str, gate: Gate
) -> None:
    first = serve("t", gate, bind="tcp://127.0.0.1:*")
    second = Server("t", gate, node=make_node(registry), bind=first.endpoints)
    for _ in range(2):
        with pytest.raises(OSError, match=first.endpoints[0].rpartition(":")[2]):
            second.start()
        assert not second.running
    first.stop()
    deadline = time.monotonic() + 30.0
    while True:
        try:
            second.start()
            break
        except OSError:
            # libzmq closes a listening socket a moment after zmq_close().
            assert time.monotonic() < deadline
    assert second.endpoints == first.endpoints


@pytest.mark.parametrize(
    "bind", ["nonsense", "tcp://127.0.0.1", "tcp://127.0.0.1:99999", "udp://127.0.0.1:1"]
)
def test_an_endpoint_that_is_none(
    make_node: Callable[..., Node], registry: str, gate: Gate, bind: str
) -> None:
    with pytest.raises(ValueError, match=r"://|nonsense"):
        Server("t", gate, node=make_node(registry), bind=bind).start()


def test_a_registry_that_fails(
    make_node: Callable[..., Node], tmp_path: Path, runtime: Path, gate: Gate
) -> None:
    """start() raises, and everything it had opened is closed again."""
    server = Server("t", gate, node=make_node(f"static://{tmp_path}/none.toml"))
    with pytest.raises(MatchmakerError, match="cannot read the static registry"):
        server.start()
    assert not server.running
    assert list(runtime.glob("*.sock")) == []


# -- what it leaves ---------------------------------------------------------------------------------------------


def test_no_socket_file_is_left(runtime: Path, node: Node, gate: Gate) -> None:
    with Server("t", gate, node=node) as server:
        assert [endpoint.partition("://")[0] for endpoint in server.endpoints] == ["ipc", "tcp"]
        assert list(runtime.glob("*.sock"))
        assert Client("t", node=node, timeout=30.0).call("echo", 1) == 1
    node.close()
    assert list(runtime.glob("*.sock")) == []


# -- queues -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "queue_size"), [(1, 1), (2, 8), (0, 1), (3, 2)])
def test_a_short_queue_loses_nothing(
    serve: Callable[..., Server], make_node: Callable[..., Node], registry: str, gate: Gate, until: Until,
    running: Running, workers: int, queue_size: int,
) -> None:  # fmt: skip
    """Slow handlers and fast casters: those are made to wait, by the window."""
    server = serve("t", gate, workers=workers, queue_size=queue_size)
    node = make_node(registry, window_messages=300)
    client = Client("t", node=node, timeout=60.0)

    def work() -> None:
        for _ in range(1000):
            client.cast("add", 0.0002)

    for thread in [running(work) for _ in range(3)]:
        thread.result()
    until(lambda: gate.count == 3000)
    assert client.call("echo", 1) == 1
    assert server.stats()["handled"] == 3001
    (channel,) = node.stats()["channels"].values()
    assert channel["casts"] == 3000


def test_who_receives_hears_of_room_when_there_is_some(
    serve: Callable[..., Server], connect: Callable[..., Client], gate: Gate, until: Until,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Told before there is any, it would look too early, and set aside what comes for ever."""

    class Slow(Backlog):
        def popleft(self) -> Any:
            time.sleep(0.01)  # the others run meanwhile
            return super().popleft()

    monkeypatch.setattr("zmqcore.rpc.server.Backlog", Slow)
    serve("t", gate, workers=1, queue_size=1)
    client = connect("t")
    for n in range(1, 11):
        for _ in range(5):
            client.cast("add")
        until(lambda n=n: gate.count == 5 * n)


def test_a_handler_that_has_always_been_short_may_turn_out_to_be_long(
    serve: Callable[..., Server], connect: Callable[..., Client], gate: Gate
) -> None:
    """Nobody was woken before it began: who stands by takes over."""
    serve("t", gate, workers=2)
    client = connect("t")
    gate.opened.set()
    for number in range(50):
        assert client.call("wait", number) == number
    gate.opened.clear()
    while gate.entered.acquire(blocking=False):
        pass
    blocked = client.submit("wait", "late")
    gate.await_entered()
    assert client.call("echo", 1) == 1
    gate.opened.set()
    assert blocked.result() == "late"


def test_the_thread_that_has_received_a_call_runs_it(
    serve: Callable[..., Server], connect: Callable[..., Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To hand it over to another thread would cost as much as the whole round trip."""
    received: list[int] = []
    batches = Threads._batches

    def noting(self: Threads) -> Iterator[list[Request]]:
        for batch in batches(self):
            received.extend(threading.get_ident() for _ in batch)
            yield batch

    monkeypatch.setattr(Threads, "_batches", noting)
    serve("t", {"who": threading.get_ident}, workers=8)
    client = connect("t")
    ran = [client.call("who") for _ in range(500)]
    assert ran == received


def test_a_full_queue_is_bounded_on_both_sides(
    serve: Callable[..., Server], make_node: Callable[..., Node], registry: str, gate: Gate
) -> None:
    server = serve("t", gate, workers=1, queue_size=4)
    node = make_node(registry, window_messages=300)
    client = Client("t", node=node, timeout=30.0)
    blocked = client.submit("wait")
    gate.await_entered()
    hurried = client.prepare(timeout=0.2)
    sent = 0
    with contextlib.suppress(Overloaded):
        while sent < 5000:
            hurried.cast("add")
            sent += 1
    assert sent < 5000, "nothing stops the caster"
    stats = server.stats()
    assert stats["queued"] <= 64 + 4, "a batch and the queue at most"
    gate.opened.set()
    blocked.result()
    assert server.stop() is True
    assert gate.count == sent


# -- a start that fails ------------------------------------------------------------------------------------------

_TOO_FEW_THREADS = """
import os, resource, sys, threading
from zmqcore import Client, Node, Server

node = Node("memory://z")
server = Server("t", {"echo": lambda value: value}, node=node, bind=["ipc://*", "tcp://127.0.0.1:*"], workers=8)
node.context
print("ready", flush=True)
threads, limits = threading.active_count(), resource.getrlimit(resource.RLIMIT_AS)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
# Stacks so large that there is room for as many as is said.
threading.stack_size(1 << 32)
resource.setrlimit(resource.RLIMIT_AS, (used + (int(sys.argv[1]) << 32) + (1 << 31), limits[1]))
try:
    server.start()
except RuntimeError as exc:
    files = [name for name in os.listdir(os.environ["ZMQCORE_RUNTIME_DIR"]) if name.endswith(".sock")]
    print(exc, server.running, threading.active_count() - threads, files, flush=True)
resource.setrlimit(resource.RLIMIT_AS, limits)
threading.stack_size(0)
with server:
    print(Client("t", node=node).call("echo", "started"))
node.close()
"""


@pytest.mark.parametrize("room", [0, 3])
def test_a_server_whose_threads_cannot_be_started_leaves_nothing(
    start_program: Callable[..., subprocess.Popen[str]], room: int
) -> None:
    """None of them, or not all; and later, when they can, it starts."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("there is no /proc to see how much memory is used")
    process = start_program(_TOO_FEW_THREADS, str(room))
    out, err = process.communicate(timeout=60.0)
    assert (out, err) == ("can't start new thread False 0 []\nstarted\n", "")


def test_a_fixed_port_is_free_again_after_a_start_that_failed(make_node: Callable[..., Node]) -> None:
    """libzmq lets go of it a little later than it is closed."""
    node = make_node("memory://again")
    with contextlib.closing(node.open_port(["tcp://127.0.0.1:*"])) as port:
        (endpoint,) = port.endpoints
    server = Server("t", {"echo": id}, node=node, bind=endpoint)
    stack = threading.stack_size(1 << 46)  # more than there are addresses
    try:
        for _ in range(5):
            with pytest.raises(RuntimeError, match="can't start new thread"):
                server.start()
    finally:
        threading.stack_size(stack)
    for _ in range(5):
        with server:
            assert server.endpoints == (endpoint,)


def test_an_endpoint_that_cannot_be_bound_leaves_no_file_of_another(
    make_node: Callable[..., Node], runtime: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        endpoint = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        server = Server("t", {"echo": id}, node=make_node("memory://taken"), bind=["ipc://*", endpoint])
        with pytest.raises(OSError, match=endpoint):
            server.start()
    assert list(runtime.glob("*.sock")) == []


# -- together with its node --------------------------------------------------------------------------------------


def test_closing_the_node_stops_its_servers(
    make_node: Callable[..., Node],
    connect: Callable[..., Client],
    registry: str,
    gate: Gate,
    running: Running,
) -> None:
    node = make_node(registry)
    servers = [Server("t", gate, node=node, server=name).start() for name in ("a", "b")]
    client = connect("t", discovery_timeout=0.1)
    futures = [client.submit("wait", number) for number in range(2)]
    gate.await_entered()
    gate.await_entered()
    closing = running(node.close)
    closing.thread.join(0.1)
    gate.opened.set()
    closing.result()
    assert [future.result() for future in futures] == [0, 1]
    assert not any(server.running for server in servers)
    for server in servers:
        with pytest.raises(Closed):
            server.start()
