"""What a forked child gets of a node, a client and a server: fresh ones that work, and the parent is not disturbed."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pool_support import PATIENCE, Far, adds_up, call

from zmqcore import Client, Node, Server
from zmqcore._channel import Channel
from zmqcore.errors import ZmqcoreError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def in_child(work: Callable[[], object]) -> str:
    """Run ``work`` in a forked child; return its result as text. A child that hangs shows where, and fails."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.close(read)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(int(PATIENCE))
            os.write(write, str(work()).encode())
            code = 0
        except BaseException:  # noqa: BLE001 (shown by the parent)
            os.write(write, traceback.format_exc().encode())
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        text = pipe.read().decode()
    _, status = os.waitpid(pid, 0)
    assert status == 0, f"the child ended with {os.waitstatus_to_exitcode(status)}:\n{text}"
    return text


class Echo:
    def echo(self, x: Any) -> Any:
        return x

    def pid(self) -> int:
        return os.getpid()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with Node(f"local://{tmp_path}/registry") as made:
        yield made


@pytest.fixture
def server(node: Node) -> Iterator[Server]:
    with Server("echo", Echo(), node=node, bind="tcp://127.0.0.1:*") as made:
        yield made


@pytest.fixture
def client(node: Node, server: Server) -> Iterator[Client]:
    assert server.running
    with Client("echo", node=node, timeout=PATIENCE) as made:
        assert made.call("echo", 1) == 1
        yield made


def test_the_childs_pool_is_empty_and_works(make_pool: Any, far: Far) -> None:
    pool = make_pool(max_sockets=4)
    held = pool.acquire(far.endpoint(0))
    pool.release(pool.acquire(far.endpoint(1)))

    def work() -> str:
        assert pool.snapshot() == []
        stats = pool.stats()
        adds_up(stats)
        assert (stats["open"], stats["opened"], stats["acquired"]) == (0, 0, 0)
        with pytest.raises(ZmqcoreError, match="fork"):
            call(held)
        pool.release(held)
        assert pool.stats()["in_use"] == 0
        assert pool.close(), "nothing of the child's was open"
        return "done"

    assert in_child(work) == "done"
    assert call(held) == b"ok"
    pool.release(held)
    assert pool.stats()["idle"] == 2
    adds_up(pool.stats())


def test_node_and_client_work_in_the_child(client: Client, node: Node) -> None:
    before = node.pool.stats()

    def work() -> str:
        identity = node.identity
        results = [client.call("echo", i) for i in range(20)], client.call("pid")
        assert results == (list(range(20)), os.getppid())
        assert identity == node.identity
        Client("echo", node=node).cast("echo", 1)
        node.close()
        return identity

    assert in_child(work) != node.identity
    assert client.call("echo", 2) == 2
    after = node.pool.stats()
    assert after["opened"] == before["opened"], "the parent's channel is the one it was"
    assert after["lost"] == 0


def test_with_threads_in_flight(client: Client, node: Node) -> None:
    """The child may be forked while other threads hold any lock there is."""
    stop = threading.Event()
    failures: list[BaseException] = []
    done = [0] * 6

    def busy(k: int) -> None:
        try:
            while not stop.is_set():
                assert client.call("echo", k) == k
                client.submit("echo", k).result()
                node.stats()
                done[k] += 1
        except BaseException as exc:  # noqa: BLE001 (raised below)
            failures.append(exc)

    threads = [threading.Thread(target=busy, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(25):
            assert in_child(lambda: client.call("echo", "child")) == "child"
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures
    assert all(done)
    assert node.pool.stats()["lost"] == 0


def test_a_fork_while_the_pool_is_exhausted(make_pool: Any, far: Far) -> None:
    pool = make_pool(max_sockets=1)
    held = pool.acquire(far.endpoint(0))
    waiting = threading.Thread(target=lambda: pool.release(pool.acquire(far.endpoint(1))))
    waiting.start()
    while not pool.stats()["waiting"]:
        time.sleep(0.001)
    assert in_child(lambda: (pool.stats()["waiting"], pool.stats()["waits"])) == "(0, 0)"
    pool.release(held)
    waiting.join()


def test_grandchildren(client: Client) -> None:
    def work() -> str:
        mine = client.call("echo", "child")
        return mine + in_child(lambda: client.call("echo", "grandchild"))

    assert in_child(work) == "childgrandchild"


def test_a_server_in_the_child(client: Client, node: Node, server: Server) -> None:
    """The parent's server goes on in the parent only; the child can have one of its own on the same node."""

    def work() -> str:
        with Server("child", Echo(), node=node, bind="tcp://127.0.0.1:*"):
            answer = Client("child", node=node, timeout=PATIENCE).call("pid")
        node.close()
        return str(answer == os.getpid())

    assert in_child(work) == "True"
    assert server.running
    assert client.call("pid") == os.getpid()


def test_the_parents_server_is_left_alone_by_the_child(client: Client, node: Node, server: Server) -> None:
    def work() -> str:
        try:
            server.stop(timeout=1.0)
        except ZmqcoreError:
            pass  # a clear error is fine, too
        node.close()
        return "done"

    assert in_child(work) == "done"
    assert client.call("echo", 3) == 3
    assert len(client.members()) == 1


def test_an_ordinary_exit_of_the_child(client: Client) -> None:
    """With exit handlers and destructors, unlike os._exit()."""
    pid = os.fork()
    if not pid:
        try:
            signal.alarm(int(PATIENCE))
            client.call("echo", 1)
        finally:
            sys.stdout.flush()
            # The handlers of atexit run, pytest's own machinery does not.
            atexit._run_exitfuncs()
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert status == 0
    assert client.call("echo", 2) == 2


def test_a_channel_of_the_parents_is_not_touched_by_garbage_collection(make_pool: Any, far: Far) -> None:
    pool = make_pool(max_sockets=8)
    for i in range(8):
        pool.release(pool.acquire(far.endpoint(i)))

    def work() -> str:
        gc.collect()
        return str(len(pool.channels()))

    assert in_child(work) == "0"
    for channel in pool.channels():
        assert isinstance(channel, Channel)
        assert call(channel) == b"ok"
