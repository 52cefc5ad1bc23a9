"""A child of a process that uses a pool gets a fresh one, however it was made, and the parent does not notice."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pool_support import PATIENCE

import zmqcore

_PATHS = os.pathsep.join([str(Path(zmqcore.__file__).parent.parent), str(Path(__file__).parent.parent)])

_PEER = """
import os, sys
from zmqcore import Node, Server
server = Server("t", {"echo": lambda value: value, "pid": os.getpid}, node=Node(), workers=8).start()
print("ready", flush=True)
sys.stdin.read()
server.stop()
"""

# What parent and child share. The children made by spawn import it; those of fork inherit it, in use.
_SHARED = '''
import multiprocessing, os, sys, threading, time, traceback, warnings
from pool_support import adds_up
from waiting_support import until
from zmqcore import Client, Node, Server
from zmqcore._socket import waiters

warnings.filterwarnings("ignore", ".* is multi-threaded", DeprecationWarning)

node = Node()
client = Client("t", node=node, timeout=20.0)
server = Server("u", {"pid": os.getpid}, node=node, server="ours")


def check_child(began=None, sent=None):
    """Use everything that was inherited."""
    stats = node.pool.stats()
    usable = time.monotonic()
    assert node.pool.channels() == [] and node.pool.snapshot() == []
    assert {name: stats[name] for name in ("open", "opened", "acquired", "in_use", "waiting", "lost")} == dict.fromkeys(
        ("open", "opened", "acquired", "in_use", "waiting", "lost"), 0
    ), stats
    channel = node.pool.acquire(client.members()[0].endpoints[0])
    acquired = time.monotonic()
    node.pool.release(channel)
    assert client.call("echo", 1) == 1
    if began is not None:
        print(
            f"after the fork: pool usable {(usable - began) * 1e3:.2f} ms,"
            f" first channel {(acquired - began) * 1e3:.2f} ms",
            flush=True,
        )
    for number in range(50):
        assert client.call("echo", number) == number
    assert client.submit("echo", 7).result(20.0) == 7
    adds_up(node.pool.stats())
    assert node.pool.stats()["open"] >= 1

    assert not server.running
    assert server.endpoints == ()
    assert "not running" in repr(server)
    try:
        server.member
    except RuntimeError as exc:
        assert "start() it" in str(exc)
    else:
        raise AssertionError("the inherited server has a member")
    with server:
        assert server.running
        own = Client("u", node=node, timeout=20.0, connect=server.endpoints[0])
        assert own.call("pid") == os.getpid()
    assert not server.running
    if sent is not None:
        sent.send(os.getpid())


def hangs_never():
    timer = threading.Timer(25.0, os._exit, [9])
    timer.daemon = True
    timer.start()
'''

# The parent: four threads call all the time, and what it holds is the same before and after.
_PARENT = '''
import contextlib
from shared import *
from shared import _held

parked = threading.Barrier(5)
errors = []
calls = [0] * 4
resume, stop, over = threading.Event(), threading.Event(), threading.Event()

def work(n):
    try:
        while True:
            parked.wait(20.0)
            parked.wait(20.0)
            if over.is_set():
                return
            while not stop.is_set():
                assert client.call("echo", n) == n
                calls[n] += 1
    except BaseException:
        errors.append(traceback.format_exc())
        parked.abort()

threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(4)]

def busy():
    """Have the threads call."""
    stop.clear()
    parked.wait(20.0)

def rest():
    """Have them stop, and return once they have."""
    stop.set()
    parked.wait(20.0)

@contextlib.contextmanager
def undisturbed():
    """Calls are under way in here; what the parent holds and has counted is the same afterwards."""
    for thread in threads:
        thread.start()
    parked.wait(20.0)
    busy()
    until(lambda: errors or min(calls) > 50)
    rest()
    before, fds, made = node.pool.stats(), _held(), sum(calls)
    busy()
    yield
    reached = list(calls)
    until(lambda: errors or all(now > then for now, then in zip(calls, reached)), "going on")
    rest()
    assert not errors, errors[0]
    after = node.pool.stats()
    changed = {
        name for name in after if after[name] != before[name]
    }
    assert changed <= {"acquired", "reused", "protected", "messages"}, (before, after)
    assert after["acquired"] - before["acquired"] == sum(calls) - made
    until(lambda: _held() == fds, f"holding the same descriptors: {fds}")
    over.set()
    parked.wait(20.0)
    for thread in threads:
        thread.join()
    adds_up(after)
'''

_HELD = '''

def _held():
    """The descriptors of this process, without those kept for the next thread that waits."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue
        found.append(target)
    idle = waiters()["idle"]
    eventfds = sum("eventfd" in target for target in found) - idle
    return eventfds, sorted(target for target in found if "eventfd" not in target)
'''

Run = Callable[[str], str]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """``run(program)`` runs a parent's program, checks that it ends in silence, and returns its output."""
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    environ = os.environ | {
        "PYTHONPATH": os.pathsep.join([_PATHS, str(tmp_path)]),
        "ZMQCORE_RUNTIME_DIR": str(runtime),
    }
    environ.pop("ZMQCORE_MATCHMAKER", None)
    (tmp_path / "shared.py").write_text(_SHARED + _HELD)

    def go(program: str) -> str:
        script = tmp_path / "parent.py"
        script.write_text(program)
        ended = subprocess.run(
            [sys.executable, "-W", "error", "-X", "faulthandler", str(script)],
            capture_output=True,
            text=True,
            check=False,
            timeout=2 * PATIENCE,
            env=environ,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert ended.stderr == ""
        return ended.stdout

    peer = subprocess.Popen(
        [sys.executable, "-c", _PEER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ
    )
    with peer:
        try:
            assert peer.stdout is not None
            assert peer.stdout.readline() == "ready\n"
            yield go
        finally:
            peer.kill()


def _inherits(program: str) -> str:
    return _PARENT + textwrap.dedent(program)


def test_os_fork(run: Run) -> None:
    """The children end the usual way, without having closed anything, and say nothing."""
    said = run(
        _inherits(
            """
            server.start()
            with undisturbed():
                for _ in range(10):
                    began = time.monotonic()
                    if os.fork() == 0:
                        hangs_never()
                        check_child(began)
                        sys.exit(0)
                    assert os.wait()[1] == 0
            assert server.running
            assert Client("u", node=node, timeout=20.0, connect=server.endpoints[0]).call("pid") == os.getpid()
            """
        )
    )
    times = re.findall(r"pool usable ([0-9.]+) ms, first channel ([0-9.]+) ms", said)
    assert len(times) == 10
    for index, what in enumerate(("pool usable", "first channel")):
        taken = sorted(float(row[index]) for row in times)
        print(f"os.fork: {what} after {taken[5]:.2f} ms (median), {taken[-1]:.2f} ms (longest)")


def test_children_that_do_not_use_it_or_end_by_an_exception(run: Run) -> None:
    run(
        _inherits(
            """
            server.start()
            with undisturbed():
                for code in (0, 3):
                    for use in (False, True):
                        if os.fork() == 0:
                            hangs_never()
                            if use:
                                assert client.call("echo", 1) == 1
                            raise SystemExit(code)
                        assert os.waitstatus_to_exitcode(os.wait()[1]) == code
            assert server.running
            """
        )
    )


def test_a_childs_child(run: Run) -> None:
    run(
        _inherits(
            """
            server.start()
            with undisturbed():
                if os.fork() == 0:
                    hangs_never()
                    check_child()
                    server.start()
                    if os.fork() == 0:
                        hangs_never()
                        check_child()
                        sys.exit(0)
                    assert os.wait()[1] == 0
                    assert server.running
                    assert client.call("echo", 1) == 1
                    sys.exit(0)
                assert os.wait()[1] == 0
            """
        )
    )


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_multiprocessing(run: Run, method: str) -> None:
    """What fork inherits, and what forkserver and spawn make anew by importing the module."""
    said = run(
        _inherits(
            f"""
            if __name__ == "__main__":
                server.start()
                making = multiprocessing.get_context({method!r})
                making.set_forkserver_preload(["shared"])
                first = making.Process(target=os.getpid)  # starts the helpers, which keep descriptors of ours
                first.start()
                first.join()
                first.close()
                with undisturbed():
                    for _ in range(3):
                        receiving, sending = making.Pipe(duplex=False)
                        child = making.Process(target=check_child, args=(time.monotonic(), sending))
                        child.start()
                        sending.close()
                        child.join()
                        assert child.exitcode == 0
                        assert receiving.recv() == child.pid
                        receiving.close()
                        child.close()
                assert server.running
            """
        )
    )
    assert said.count("pool usable") == 3
    print(f"multiprocessing {method}:\n{said}")


def test_a_forkserver_that_has_used_it(run: Run, tmp_path: Path) -> None:
    """It is preloaded with a module that makes calls: its children inherit what has been in use."""
    (tmp_path / "used.py").write_text("from shared import *\nassert client.call('echo', 1) == 1\n")
    run(
        textwrap.dedent(
            """
            from shared import *

            if __name__ == "__main__":
                making = multiprocessing.get_context("forkserver")
                making.set_forkserver_preload(["used"])
                children = [making.Process(target=check_child) for _ in range(3)]
                for child in children:
                    child.start()
                for child in children:
                    child.join()
                assert [child.exitcode for child in children] == [0] * 3
            """
        )
    )
