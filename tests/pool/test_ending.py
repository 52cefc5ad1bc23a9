"""How a node ends: by close(), at the interpreter's exit, on Ctrl-C, or because nobody knows it any more."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import zmq
from pool_support import PATIENCE, Far, call
from waiting_support import until

from zmqcore import Client, Node
from zmqcore.errors import Closed


def holding(far: Far, **options: Any) -> Node:
    node = Node("memory://pool-tests", **options)
    with Client("topic", node=node, connect=far.endpoint(0)) as client:
        node.pool.release(node.pool.acquire(far.endpoint(0)))
        assert client.members()
    return node


def test_close_leaves_nothing(far: Far) -> None:
    """Descriptors are counted by the fixture that watches every test."""
    threads = threading.active_count()
    node = holding(far)
    assert node.pool.stats()["idle"] == 1
    node.close()
    assert threading.active_count() == threads
    assert node.pool.stats()["open"] == 0
    with pytest.raises(Closed):
        node.pool.acquire(far.endpoint(0))
    node.close()


def test_close_drains(far: Far) -> None:
    node = holding(far)
    channel = node.pool.acquire(far.endpoint(0))
    far.reading.clear()
    pending = [channel.submit(b"t", "m", b"x", None, b"", 0, PATIENCE, lambda _: None) for _ in range(20)]
    node.pool.release(channel)
    closing = threading.Thread(target=node.close, args=(PATIENCE,))
    closing.start()
    far.reading.set()
    closing.join()
    assert [bytes(each.envelope().body) for each in pending] == [b"ok"] * 20


def test_a_pool_that_is_closing_takes_nothing_new(far: Far) -> None:
    node = holding(far)
    pool, where = node.pool, far.endpoint(0)
    channel = pool.acquire(where)
    far.reading.clear()
    call(channel)  # the server was receiving; it is not any more
    pending = channel.submit(b"t", "m", b"x", None, b"", 0, PATIENCE, lambda _: None)
    pool.release(channel)
    closing = threading.Thread(target=pool.close, args=(PATIENCE,))
    closing.start()
    until(lambda: "closed" in repr(pool), "it is closing")
    assert channel.state_name == "open"
    assert pool.acquire_open(where) is None
    assert pool.send_now(where, "cast", b"t", "m", b"x", None, b"", 0) == 0
    for begin in (
        lambda: pool.acquire(where),
        lambda: pool.call(where, b"t", "m", b"x", None, b"", 0, PATIENCE),
        lambda: pool.submit(where, b"t", "m", b"x", None, b"", 0, lambda _: None, PATIENCE),
    ):
        with pytest.raises(Closed):
            begin()
    far.reading.set()
    closing.join()
    assert bytes(pending.envelope().body) == b"ok"
    node.close()


def test_release_takes_a_channel(far: Far) -> None:
    node = holding(far)
    with pytest.raises(TypeError, match="not None"):
        node.pool.release(None)  # type: ignore[arg-type]
    node.close()


def test_close_gives_up_in_time(far: Far) -> None:
    """What has no answer by then ends with Closed."""
    far.port.close()
    node = Node("memory://pool-tests")
    with zmq.Context() as context, context.socket(zmq.ROUTER) as mute:
        mute.bind("tcp://127.0.0.1:*")
        channel = node.pool.acquire(mute.getsockopt_string(zmq.LAST_ENDPOINT))
        pending = channel.submit(b"t", "m", b"x", None, b"", 0, PATIENCE, lambda _: None)
        node.close(0.05)
        with pytest.raises(Closed):
            pending.envelope()
        node.pool.release(channel)


@pytest.mark.filterwarnings("ignore:Unclosed context:ResourceWarning")
def test_a_node_that_is_dropped_is_collected(far: Far) -> None:
    threads = threading.active_count()
    node = holding(far)
    attendant = weakref.ref(node.attendant)
    gone = weakref.ref(node), weakref.ref(node.pool)
    assert threading.active_count() > threads
    del node
    until(lambda: gc.collect() >= 0 and all(ref() is None for ref in (*gone, attendant)), "collection")
    until(lambda: threading.active_count() == threads, "the thread's end")


PROGRAM = """
import sys, threading, time
from zmqcore import Node, Client, Server
from zmqcore.errors import ZmqcoreError
class Echo:
    def echo(self, x): return x
    def sleep(self, s): time.sleep(s)
server = Server("exit", Echo(), bind="tcp://127.0.0.1:*").start()
client = Client("exit", timeout=60.0)
assert client.call("echo", 1) == 1
client.cast("echo", 2)
future = client.submit("sleep", 3600.0) if "busy" in sys.argv else None
print("ready", flush=True)
if "raise" in sys.argv:
    raise SystemError("on purpose")
if "ctrl-c" in sys.argv:
    client.call("sleep", 3600.0)
if "threads" in sys.argv:
    def call():
        try: client.call("sleep", 3600.0)
        except ZmqcoreError: pass
    for _ in range(8):
        threading.Thread(target=call, daemon=True).start()
    (channel,) = client._node.pool.channels()
    while channel.stats()["outstanding_calls"] < 8:
        time.sleep(0.001)
"""


def run(*arguments: str, tmp_path: Path, interrupt: bool = False) -> subprocess.CompletedProcess[str]:
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-X", "faulthandler", "-c", PROGRAM, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "ZMQCORE_RUNTIME_DIR": str(tmp_path / "run"),
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        },
    )
    assert process.stdout is not None
    first = process.stdout.readline()
    if interrupt:
        process.send_signal(signal.SIGINT)
    try:
        out, err = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        raise AssertionError(f"the interpreter hangs at its exit: {process.communicate()[1]}") from None
    return subprocess.CompletedProcess([], process.returncode, first + out, err)


@pytest.mark.parametrize("how", ["", "busy", "threads"])
def test_exit_without_close(how: str, tmp_path: Path) -> None:
    done = run(how, tmp_path=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ready\n", "")


def test_exit_after_an_exception(tmp_path: Path) -> None:
    done = run("raise", "busy", tmp_path=tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1
    assert done.stderr.splitlines()[-1] == "SystemError: on purpose"


def test_exit_on_ctrl_c(tmp_path: Path) -> None:
    done = run("ctrl-c", tmp_path=tmp_path, interrupt=True)
    assert done.returncode in (1, 130, -signal.SIGINT)
    assert done.stderr.count("Traceback") == 1, done.stderr
    assert done.stderr.splitlines()[-1] == "KeyboardInterrupt"
