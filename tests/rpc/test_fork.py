"""A forked child uses what it has inherited: it gets sockets, threads and connections of its own."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

import pytest

RunPython = Callable[..., "subprocess.CompletedProcess[str]"]

# Each program runs in an interpreter of its own: pytest's has threads that a fork would not carry over.
_SETUP = """
import multiprocessing, os, sys, threading, time, traceback, warnings
from zmqcore import Client, Node, Server
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)

def forked(function):
    '''Run it in a forked child; return whether it returned.'''
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitpid(pid, 0)[1] == 0

node = Node()
client = Client("t", node=node, timeout=10.0)
"""


@pytest.fixture
def peer(peers: Callable[..., Any]) -> Any:
    return peers("t", workers=8)


def _passes(run_python: RunPython, program: str) -> None:
    ended = run_python(_SETUP + program)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""


@pytest.mark.usefixtures("peer")
def test_a_client_that_was_used_before(run_python: RunPython) -> None:
    _passes(
        run_python,
        """
assert client.call("echo", 1) == 1
def child():
    for number in range(50):
        assert client.call("echo", number) == number
    assert client.submit("echo", 7).result() == 7
    key = str(os.getpid())
    client.call("count", key)
    client.cast("count", key)
    assert list(client.gather("echo", 3).results.values()) == [3]
    while client.call("counted", key) < 2:
        time.sleep(0.01)
for _ in range(3):
    assert forked(child)
    assert client.call("echo", 2) == 2
""",
    )


@pytest.mark.usefixtures("peer")
def test_a_client_that_was_not_used_before(run_python: RunPython) -> None:
    _passes(
        run_python,
        """
def child():
    assert client.call("echo", 1) == 1
    node.close()
assert forked(child)
assert client.call("echo", 1) == 1
""",
    )


@pytest.mark.usefixtures("peer")
def test_parent_and_child_at_once(run_python: RunPython) -> None:
    _passes(
        run_python,
        """
assert client.call("echo", 1) == 1
def work():
    for number in range(300):
        assert client.call("echo", number) == number
results = []
threads = [threading.Thread(target=lambda: results.append(forked(work))) for _ in range(3)]
for thread in threads: thread.start()
work()
for thread in threads: thread.join()
assert results == [True] * 3
work()
""",
    )


@pytest.mark.usefixtures("peer")
def test_a_fork_in_the_middle_of_calls(run_python: RunPython) -> None:
    """Other threads of the parent hold every lock there is at one time or another."""
    _passes(
        run_python,
        """
assert client.call("echo", 1) == 1
stop = threading.Event()
def work():
    while not stop.is_set():
        client.call("echo", 1)
        client.submit("echo", 2).result()
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads: thread.start()
def child():
    hangs = threading.Timer(15.0, os._exit, [9])
    hangs.daemon = True
    hangs.start()
    assert client.call("echo", 5) == 5
    assert client._route._balancer._outstanding == 0, client._route._balancer._outstanding
outcomes = []
while len(outcomes) < 20 and all(outcomes):
    outcomes.append(forked(child))
stop.set()
for thread in threads: thread.join()
assert all(outcomes), outcomes
""",
    )


@pytest.mark.usefixtures("peer")
def test_multiprocessing(run_python: RunPython) -> None:
    _passes(
        run_python,
        """
assert client.call("echo", 1) == 1
def work(number):
    return client.call("echo", number)
with multiprocessing.get_context("fork").Pool(3) as pool:
    assert pool.map(work, range(30)) == list(range(30))
assert client.call("echo", 2) == 2
""",
    )


@pytest.mark.usefixtures("peer")
def test_a_child_that_exits_the_usual_way(run_python: RunPython) -> None:
    """It runs atexit handlers, which must leave what is the parent's alone."""
    _passes(
        run_python,
        """
server = Server("u", {"echo": lambda value: value}, node=node).start()
inner = Client("u", node=node, timeout=10.0)
assert client.call("echo", 1) == inner.call("echo", 1) == 1
future = client.submit("sleep", 0.5)
for use in (False, True):
    if os.fork() == 0:
        if use:
            assert client.call("echo", 1) == inner.call("echo", 1) == 1
        sys.exit(0)
    assert os.wait()[1] == 0
assert client.call("echo", 2) == inner.call("echo", 2) == 2
assert isinstance(future.result(), str)
""",
    )


def test_a_server_is_the_parents(run_python: RunPython) -> None:
    """The child can call it, can stop its own copy without harm, and can serve by itself."""
    _passes(
        run_python,
        """
server = Server("u", {"pid": os.getpid}, node=node).start()
client = Client("u", node=node, timeout=10.0)
assert client.call("pid") == os.getpid()
parent = os.getpid()
def child():
    assert client.call("pid") == parent
    server.stop()
    assert client.call("pid") == parent
    with Server("own", {"pid": os.getpid}, node=node):
        assert Client("own", node=node, timeout=10.0).call("pid") == os.getpid()
assert forked(child)
assert client.call("pid") == parent
assert server.running
assert server.stop()
""",
    )


@pytest.mark.usefixtures("peer")
def test_a_future_of_the_parent_ends_in_the_child_too(run_python: RunPython) -> None:
    _passes(
        run_python,
        """
from zmqcore import Closed
future = client.submit("sleep", 1.0)
def child():
    try:
        future.result(timeout=10.0)
    except Closed:
        pass
assert forked(child)
future.result()
""",
    )


def test_a_context_given_in_a_child(run_python: RunPython) -> None:
    """What matters is whether the context is of this process, not whether this process was forked."""
    _passes(
        run_python,
        """
import zmq
def child():
    with zmq.Context() as context, Node("memory://x", context=context) as own:
        assert own.context is context
        with Server("t", {"echo": lambda value: value}, node=own):
            assert Client("t", node=own, timeout=10.0).call("echo", 1) == 1
assert forked(child)
""",
    )
