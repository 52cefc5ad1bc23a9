"""A node closes: nothing is left, everybody is woken. The process ends without: it is quiet, and does not hang."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zmq
from waiting_support import PATIENCE, stands_in, until

import zmqcore
from zmqcore import Client, Closed, Node, Server, Topic
from zmqcore._channel import Channel
from zmqcore.rpc.loop_server import LoopServer

Until = Callable[..., None]
Running = Callable[..., Any]
RunPython = Callable[..., "subprocess.CompletedProcess[str]"]


def test_close_wakes_everybody_who_waits(
    serve: Callable[..., Server],
    make_node: Callable[..., Node],
    registry: str,
    blackhole: str,
    running: Running,
) -> None:
    gate = threading.Event()
    serve("t", {"wait": lambda: gate.wait(60.0), "echo": lambda value: value}, workers=8)
    node = make_node(registry, connect_timeout=60.0)
    client = Client("t", node=node, timeout=None)
    assert client.call("echo", 1) == 1
    future = client.submit("wait")
    waiting = {
        "call": running(client.call, "wait"),
        "another call": running(client.call, "wait"),
        "gather": running(client.gather, "wait"),
        "result": running(client.submit("wait").result),
        "wait": running(future.exception),
        "connecting": running(Client("t", node=node, timeout=None, connect=blackhole).call, "wait"),
        "discovering": running(
            Client("nobody", node=node, timeout=None, discovery_timeout=60.0).call, "wait"
        ),
    }
    waiting["call"].thread.join(0.3)
    assert not any(thread.ended for thread in waiting.values())
    running(node.close, timeout=0.5).result()
    gathered = waiting.pop("gather").result()
    assert [type(error) for error in gathered.missing.values()] == [Closed]
    assert isinstance(waiting.pop("wait").result(), Closed)
    assert {name: type(thread.join()) for name, thread in waiting.items()} == dict.fromkeys(waiting, Closed)
    gate.set()


def test_close_wakes_who_waits_for_room(
    serve: Callable[..., Server], make_node: Callable[..., Node], registry: str, running: Running
) -> None:
    gate = threading.Event()
    serve("t", {"wait": lambda: gate.wait(60.0)}, workers=1, queue_size=1)
    node = make_node(registry, window_messages=300)
    client = Client("t", node=node, timeout=None)

    def cast() -> None:
        while True:
            client.cast("wait")

    threads = [running(cast) for _ in range(3)]
    threads[0].thread.join(0.5)
    running(node.close, timeout=0.5).result()
    assert [type(thread.join()) for thread in threads] == [Closed] * 3
    gate.set()


def test_close_wakes_who_waits_for_a_socket(
    serve: Callable[..., Server], make_node: Callable[..., Node], registry: str, running: Running
) -> None:
    gate = threading.Event()
    for topic in ("t", "u"):
        serve(topic, {"wait": lambda: gate.wait(60.0)})
    node = make_node(registry, max_sockets=1)
    using = running(Client("t", node=node, timeout=None).call, "wait")
    using.thread.join(0.2)
    waiting = running(Client("u", node=node, timeout=None).call, "wait")
    waiting.thread.join(0.2)
    running(node.close, timeout=0.5).result()
    assert isinstance(using.join(), Closed)
    assert isinstance(waiting.join(), Closed)
    gate.set()


def test_a_closed_node_refuses_to_work(make_node: Callable[..., Node], registry: str) -> None:
    node = make_node(registry)
    client, server = Client("t", node=node), Server("t", {"x": len}, node=node)
    node.close()
    node.close()
    for operation in (client.call, client.cast, client.fanout, client.gather, client.submit):
        with pytest.raises(Closed):
            operation("x")
    with pytest.raises(Closed):
        server.start()
    with pytest.raises(Closed):
        _ = node.context
    assert "closed" in repr(node)


def test_close_from_a_callback(
    serve: Callable[..., Server],
    make_node: Callable[..., Node],
    registry: str,
    running: Running,
    until: Until,
) -> None:
    """On the attendant's thread, and on one that waits for another call on that channel."""
    for driven in (False, True):
        gate = threading.Event()
        server = serve("t", {"wait": lambda gate=gate: gate.wait(60.0), "echo": lambda value: value})
        node = make_node(registry)
        client = Client("t", node=node, timeout=30.0)
        assert client.call("echo", 1) == 1
        called: list[bool] = []

        def close(_: Any, node: Node = node, called: list[bool] = called) -> None:
            node.close()
            called.append(True)

        future = client.submit("wait")
        future.add_done_callback(close)
        driving = running(client.call, "wait") if driven else None

        def waited_for(node: Node = node, driven: bool = driven) -> bool:
            (channel,) = node.pool.channels()
            thread = node.attendant._thread
            return channel.led if driven else thread is not None and stands_in(thread, "_wait")

        until(waited_for)
        gate.set()
        until(lambda called=called: called, "node.close() in a callback")
        if driving is not None:
            driving.join()
        server.stop()


@pytest.mark.parametrize("workers", [0, 2])
def test_close_from_a_handler(
    make_node: Callable[..., Node], registry: str, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    """It returns at once; the reply goes out, and the node closes behind the handler, with nothing to complain of."""
    node = make_node(registry)
    other = make_node(registry)

    def close() -> str:
        node.close()
        node.close()
        return "it is closing"

    server = Server("t", {"close": close}, node=node, workers=workers).start()
    assert Client("t", node=other, timeout=30.0).call("close") == "it is closing"
    node.close(timeout=30.0)
    assert not server.running
    assert [record.getMessage() for record in caplog.records] == []


def test_servers_stop_at_the_same_time(
    make_node: Callable[..., Node], registry: str, running: Running
) -> None:
    """Each of them finishes what it has, and none of them waits for another one to begin with that."""
    node, elsewhere = make_node(registry), make_node(registry)
    gate, entered = threading.Event(), threading.Semaphore(0)

    def work() -> str:
        entered.release()
        return "done" if gate.wait(PATIENCE) else "given up"

    async def work_on_loop() -> str:
        entered.release()
        return "done" if await asyncio.to_thread(gate.wait, PATIENCE) else "given up"

    options: dict[str, Any] = {"bind": "tcp://127.0.0.1:*"}
    for topic in ("a", "b", "c"):
        Server(topic, {"work": work}, node=node, workers=1, **options).start()
    server = LoopServer(Topic("d"), {"work": work_on_loop}, node, **options).start()
    calls = [Client(topic, node=elsewhere, timeout=PATIENCE).submit("work") for topic in "abcd"]
    for _ in calls:
        assert entered.acquire(timeout=PATIENCE)
    closing = running(node.close, 2 * PATIENCE)
    until(lambda: elsewhere.matchmaker.topics() == [], "all have been deregistered")
    assert closing.thread.is_alive()
    gate.set()
    assert [call.result() for call in calls] == ["done"] * 4
    closing.result()
    del server


def test_close_while_servers_and_channels_are_being_made(
    serve: Callable[..., Server], make_node: Callable[..., Node], registry: str, running: Running
) -> None:
    """Whatever the other threads are at, close() ends and leaves nothing."""
    server = serve("t", {"echo": lambda value: value}, bind="tcp://127.0.0.1:*")

    def call(node: Node) -> None:
        while True:
            Client("t", node=node, timeout=30.0, connect=server.endpoints).call("echo", 1)

    def start(node: Node) -> None:
        while True:
            Server("u", {"echo": len}, node=node, bind="tcp://127.0.0.1:*").start().stop(drain=False)

    for pause in range(20):
        node = make_node(registry)
        threads = [running(call, node), running(start, node)]
        time.sleep(pause / 1000)
        running(node.close).result()
        assert [type(thread.join()) for thread in threads] == [Closed, Closed]


def test_close_while_a_channel_is_being_made(
    serve: Callable[..., Server],
    make_node: Callable[..., Node],
    registry: str,
    running: Running,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The socket exists, but the pool does not know it yet."""
    server = serve("t", {"echo": lambda value: value}, bind="tcp://127.0.0.1:*")
    node = make_node(registry)
    client = Client("t", node=node, timeout=5.0, connect=server.endpoints)
    closing: list[Any] = []

    def connect(*args: Any, **kwargs: Any) -> Channel:
        channel = Channel(*args, **kwargs)
        closing.append(running(node.close))
        closing[0].thread.join(0.3)
        return channel

    monkeypatch.setattr("zmqcore.node.Channel", connect)
    error = running(client.call, "echo", 1).join()
    closing[0].result()
    assert isinstance(error, Closed)


def test_close_while_a_server_starts(
    make_node: Callable[..., Node], registry: str, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The port is bound, but the server is not registered yet: it is, and then stopped."""
    node = make_node(registry)
    server = Server("t", {"echo": len}, node=node)
    closing: list[Any] = []
    register = node.matchmaker.register

    def late(*args: Any, **kwargs: Any) -> Any:
        closing.append(running(node.close))
        closing[0].thread.join(0.3)
        return register(*args, **kwargs)

    monkeypatch.setattr(node.matchmaker, "register", late)
    running(server.start).result()
    closing[0].result()
    assert server.wait(0)
    assert not server.running
    assert make_node(registry).matchmaker.members("t").members == ()


def test_close_leaves_no_descriptor_by_which_threads_waited(run_python: RunPython) -> None:
    """While sockets are open a few are kept for the next who wait; those who wait until the end leave theirs behind."""
    ended = run_python(
        _SETUP
        + """
from zmqcore._socket import open_sockets, waiters

def eventfds():
    return sum("eventfd" in os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")[:-1])

node = Node("memory://x")
before = eventfds()
server, client = everything(node)
gate = threading.Barrier(41)
def call():
    client.call("sleep", 0.05)
    gate.wait()
    try: client.prepare(timeout=None).call("sleep", 600.0)
    except Exception: pass
threads = [threading.Thread(target=call) for _ in range(40)]
for thread in threads: thread.start()
gate.wait()
print(waiters()["idle"] <= 16, open_sockets())
(channel,) = node.pool.channels()
while channel.stats()["outstanding_calls"] < 40: time.sleep(0.001)
node.close(0.1)
for thread in threads: thread.join()
print(waiters(), open_sockets(), eventfds() - before, flush=True)
os._exit(0)
"""
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == "True 2\n{'open': 0, 'idle': 0} 0 0\n"


def test_a_context_of_ones_own_stays_open(registry: str) -> None:
    with zmq.Context() as context:
        with Node(registry, context=context) as one, Node(registry, context=context) as two:
            assert one.context is context
            with Server("t", {"echo": lambda value: value}, node=one, bind="inproc://t"):
                assert Client("t", node=two, timeout=30.0).call("echo", 1) == 1
        assert not context.closed
        context.socket(zmq.PUB).close()


def test_stats_are_plain_data(serve: Callable[..., Server], connect: Callable[..., Client]) -> None:
    server = serve("t", {"echo": lambda value: value})
    client = connect("t")
    client.call("echo", 1)
    assert client.call("zmqcore.stats")["handled"] >= 1
    stats = client._node.stats()
    assert stats["pid"] == os.getpid()
    assert stats["channels"]
    assert client.call("echo", stats) == stats, "it can be sent, so it is plain data"
    assert server.stats()["workers"] == 4


def test_stats_of_several_connections_to_one_endpoint(
    serve: Callable[..., Server], make_node: Callable[..., Node], registry: str, running: Running
) -> None:
    """Their figures are summed up, and stay in the pool's when they are closed."""
    gate = threading.Event()
    server = serve("t", {"wait": lambda: gate.wait(PATIENCE)}, workers=3, bind="tcp://127.0.0.1:*")
    node = make_node(registry, max_sockets_per_endpoint=3)
    client = Client("t", node=node, timeout=PATIENCE, connect=server.endpoints)
    calls = [running(client.call, "wait") for _ in range(3)]
    until(lambda: sum(each["calls"] for each in node.stats()["channels"].values()) == 3)
    stats = node.stats()
    assert stats["pool"]["open"] == 3
    assert stats["pool"]["messages"]["calls"] == 3
    [channel] = stats["channels"].values()
    assert channel["outstanding_calls"] == 3
    gate.set()
    for each in calls:
        each.result()
    node.close()
    assert node.pool.stats()["messages"]["replies"] == 3


# -- the end of the process -------------------------------------------------------------------------------------

_SETUP = """
import sys, threading, time, os
from zmqcore import Client, Node, Server, default_node

entered = threading.Event()

class Work:
    def echo(self, value=None): return value
    def sleep(self, seconds):
        entered.set()
        time.sleep(seconds)

def everything(node):
    server = Server("t", Work(), node=node).start()
    client = Client("t", node=node, timeout=30.0)
    assert client.call("echo", 1) == 1
    return server, client

"""

_ENDS = {
    "nothing used": "node = default_node(); client = Client('t')",
    "used": "server, client = everything(default_node())",
    "two nodes": "a = everything(Node('memory://x')); b = everything(Node('memory://y'))",
    "in a function": "def main(): everything(default_node())\nmain()",
    "a future outstanding": "server, client = everything(default_node()); future = client.submit('sleep', 0.2)",
    "a future with a callback": (
        "server, client = everything(default_node()); future = client.submit('sleep', 60.0)\n"
        "future.add_done_callback(lambda future: None)"
    ),
    "a thread that calls": (
        "server, client = everything(default_node())\n"
        "called = []\n"
        "def loop():\n"
        "    try:\n"
        "        while True: called.append(client.call('echo', 1))\n"
        "    except Exception: pass\n"
        "for _ in range(3): threading.Thread(target=loop, daemon=True).start()\n"
        "while len(called) < 20: time.sleep(0.001)"
    ),
    "a thread that waits": (
        "server, client = everything(default_node())\n"
        "def wait():\n"
        "    try: client.prepare(timeout=None).call('sleep', 600.0)\n"
        "    except Exception: pass\n"
        "threading.Thread(target=wait, daemon=True).start()\n"
        "entered.wait()"
    ),
    "threads whose calls nobody guards": (
        "server, client = everything(default_node())\n"
        "called = []\n"
        "def loop():\n"
        "    while True: called.append(client.call('echo', 1))\n"
        "for _ in range(3): threading.Thread(target=loop, daemon=True).start()\n"
        "threading.Thread(target=client.call, args=('sleep', 600.0), daemon=True).start()\n"
        "while len(called) < 20: time.sleep(0.001)\n"
        "entered.wait()"
    ),
    "casts on the way": (
        "server, client = everything(default_node())\nfor _ in range(100): client.cast('echo', 'x')"
    ),
    "large results held": (
        "server, client = everything(default_node()); kept = client.call('echo', bytes(1_000_000))"
    ),
    "closed by hand": (
        "node = Node(); server, client = everything(node); client.close(); server.stop(); node.close()"
    ),
    "a thread of its own": (
        "def main():\n    everything(default_node())\nt = threading.Thread(target=main); t.start(); t.join()"
    ),
}


@pytest.mark.parametrize("program", _ENDS.values(), ids=_ENDS)
def test_a_process_that_closes_nothing_ends_quietly(
    run_python: RunPython, program: str, runtime: Path
) -> None:
    ended = run_python(_SETUP + program)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    assert list(runtime.glob("*.sock")) == []


def test_what_fails_in_a_thread_is_told_to_the_end(run_python: RunPython) -> None:
    """Only what the end itself causes is not: the thread's error comes after ours has begun to close."""
    ended = run_python(
        _SETUP
        + """
import atexit
server, client = everything(default_node())
begun, told = threading.Event(), threading.Event()
def fail():
    begun.wait()
    raise ValueError("of the thread's own")
thread = threading.Thread(target=fail, daemon=True)
thread.start()
def last():
    begun.set()
    thread.join()
# What is registered first is called last.
atexit._run_exitfuncs()
last()
"""
    )
    assert ended.returncode == 0
    assert ended.stderr.count("Traceback") == 1
    assert "ValueError: of the thread's own" in ended.stderr


@pytest.mark.parametrize("program", ["used", "a future outstanding", "a thread that calls"])
def test_a_process_that_fails_ends_with_its_own_error_only(run_python: RunPython, program: str) -> None:
    ended = run_python(_SETUP + _ENDS[program] + "\nraise SystemError('the only error')")
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr.count("Traceback") == 1
    assert ended.stderr.endswith("SystemError: the only error\n")
    ended = run_python(_SETUP + _ENDS[program] + "\nsys.exit(7)")
    assert (ended.returncode, ended.stdout, ended.stderr) == (7, "", "")


def test_a_node_that_nobody_holds_is_no_trap(run_python: RunPython) -> None:
    """The garbage collector meets the context and its open sockets in any order; it must not wait for ever."""
    ended = run_python(
        _SETUP
        + """
import gc, warnings
warnings.simplefilter("ignore", ResourceWarning)
server, client = everything(Node("memory://x"))
def use():
    client = Client("t", node=Node("memory://x"), timeout=30.0)
    assert client.call("echo", 1) == 1
    client.submit("echo", 1).result()
for _ in range(3):
    use()
    gc.collect()
print("collected")
"""
    )
    assert (ended.returncode, ended.stdout) == (0, "collected\n"), ended.stderr


def test_a_server_that_nobody_holds_goes_on(run_python: RunPython) -> None:
    ended = run_python(
        _SETUP
        + """
import gc
Server("t", Work()).start()
gc.collect()
print(Client("t", timeout=30.0).call("echo", 1))
"""
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "1\n", "")


def test_the_default_node(run_python: RunPython) -> None:
    ended = run_python(
        """
import os
from zmqcore import Client, Server, default_node
node = default_node()
assert default_node() is node
assert node.matchmaker.url.startswith("local:")
client = Client("t", timeout=30.0)
with Server("t", {"echo": lambda value: value}):
    assert client.call("echo", 1) == 1
assert client._node is node
node.close()
os.environ["ZMQCORE_MATCHMAKER"] = "memory://default"
assert default_node() is not node
assert default_node().matchmaker.url == "memory://default"
"""
    )
    assert (ended.returncode, ended.stderr) == (0, "")


def test_processes_on_the_default_node_find_each_other(run_python: RunPython) -> None:
    program = _SETUP + "Server('t', Work()).start(); print('ready', flush=True); sys.stdin.read()"
    root = str(Path(zmqcore.__file__).parent.parent)
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": root},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        ended = run_python(_SETUP + "print(Client('t', timeout=30.0).call('echo', 'over there'))")
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, "over there\n", "")
        _, errors = process.communicate(timeout=30.0)
    assert (process.returncode, errors) == (0, "")
