"""SIGTERM and Ctrl-C: the first one drains, the next one ends the process; and what no process can hear."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from zmqcore import Client, Node, NoSuchTopic, PeerLost

Serving = Callable[..., "subprocess.Popen[str]"]
Until = Callable[..., None]
Running = Callable[..., Any]

PATIENCE = 30.0

# What each of them gets: the drain's timeout, then words that the program looks for.
_THREADS = """
import os, signal, sys, time
from zmqcore import Server

class Work:
    def echo(self, value): return value
    def sleep(self, seconds):
        print("asleep", flush=True)
        time.sleep(seconds)
        return "slept"
    def sleep_until(self, path):
        print("asleep", flush=True)
        while not os.path.exists(path):
            time.sleep(0.005)
        return "slept"

server = Server("t", Work(), server="s")
if "stop-in-handler" in sys.argv:
    signal.signal(signal.SIGTERM, lambda *_: os.write(1, b"heard\\n") and server.stop(timeout=600))
server.start()
print("ready", flush=True)
server.serve_forever(float(sys.argv[1]))
print("served", flush=True)
"""

_COROUTINES = """
import asyncio, signal, sys
from zmqcore import AsyncServer

LOOP = None
if "uvloop" in sys.argv:
    import uvloop
    LOOP = uvloop.new_event_loop

class Work:
    async def echo(self, value): return value
    async def sleep(self, seconds):
        print("asleep", flush=True)
        await asyncio.sleep(seconds)
        return "slept"

async def main():
    if "own-handler" in sys.argv:
        asyncio.get_running_loop().add_signal_handler(
            signal.SIGTERM, lambda: print("heard", flush=True) or asyncio.ensure_future(server.stop()))
    server = AsyncServer("t", Work(), server="s")
    await server.start()
    other = AsyncServer("other", Work())
    if "two" in sys.argv:
        await other.start()
    print("ready", flush=True)
    forever = [server.serve_forever(float(sys.argv[1]))]
    if "two" in sys.argv:
        forever.append(other.serve_forever())
    await asyncio.gather(*forever)
    print("served", server.running, other.running, signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, flush=True)

try:
    with asyncio.Runner(loop_factory=LOOP) as runner:
        runner.run(main())
except KeyboardInterrupt:
    print("served", flush=True)
"""

_UVLOOP = pytest.mark.skipif(importlib.util.find_spec("uvloop") is None, reason="uvloop is not installed")
ALL = pytest.mark.parametrize(
    "program",
    [
        pytest.param((_THREADS,), id="threads"),
        pytest.param((_COROUTINES,), id="coroutines"),
        pytest.param((_COROUTINES, "uvloop"), id="uvloop", marks=_UVLOOP),
    ],
)
LOOPS = pytest.mark.parametrize("loop", ["asyncio", pytest.param("uvloop", marks=_UVLOOP)])


@pytest.fixture
def serving(start_program: Serving) -> Serving:
    """``serving(program, *words, drain=…)`` starts it and waits until it serves."""

    def start(program: str, *words: str, drain: float = PATIENCE) -> subprocess.Popen[str]:
        return start_program(program, str(drain), *words)

    return start


@pytest.fixture
def client(node: Node) -> Client:
    return Client("t", node=node, timeout=PATIENCE, discovery_timeout=0.1)


def _said(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == f"{word}\n"


def _called(process: subprocess.Popen[str], client: Client, running: Running, seconds: float = 0.5) -> Any:
    """Return a call that the server runs, for a moment."""
    assert client.call("echo", 1) == 1
    sleeping = running(client.call, "sleep", seconds)
    _said(process, "asleep")
    return sleeping


def _ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out, err


@ALL
def test_ctrl_c_drains(
    serving: Serving, client: Client, node: Node, running: Running, runtime: Path, program: tuple[str, ...]
) -> None:
    process = serving(*program)
    sleeping = _called(process, client, running)
    process.send_signal(signal.SIGINT)
    assert sleeping.result() == "slept"
    assert _ended(process) == (0, "served\n", "")
    assert node.matchmaker.members("t").members == ()
    assert list(runtime.glob("*.sock")) == []


@ALL
def test_sigterm_drains(
    serving: Serving, client: Client, node: Node, running: Running, runtime: Path, program: tuple[str, ...]
) -> None:
    """It is how service managers stop a server."""
    process = serving(*program)
    sleeping = _called(process, client, running)
    process.send_signal(signal.SIGTERM)
    assert sleeping.result() == "slept"
    code, out, err = _ended(process)
    assert (code, out.split()[0], err) == (0, "served", "")
    assert node.matchmaker.members("t").members == ()
    assert list(runtime.glob("*.sock")) == []


@ALL
def test_a_second_sigterm_ends_it_at_once(
    serving: Serving, client: Client, running: Running, until: Until, runtime: Path, program: tuple[str, ...]
) -> None:
    process = serving(*program, drain=600.0)
    sleeping = _called(process, client, running, 600.0)
    assert list(runtime.glob("*.sock"))
    process.send_signal(signal.SIGTERM)
    until(lambda: client.members() == ())
    assert process.poll() is None, "it does not wait for what runs"
    process.send_signal(signal.SIGTERM)
    assert _ended(process) == (-signal.SIGTERM, "", "")
    assert isinstance(sleeping.join(), PeerLost)
    assert list(runtime.glob("*.sock")) == []


@ALL
def test_draining_has_an_end(
    serving: Serving, client: Client, running: Running, program: tuple[str, ...]
) -> None:
    process = serving(*program, drain=0.3)
    sleeping = _called(process, client, running, 600.0)
    process.send_signal(signal.SIGTERM)
    code, out, _ = _ended(process)
    assert (code, out.split()[0]) == (0, "served")
    assert sleeping.join() is not None


def test_a_signal_handler_may_stop_the_server_again_and_again(
    serving: Serving, client: Client, running: Running, until: Until, tmp_path: Path
) -> None:
    """Each interrupts the stop() of serve_forever(), in the same thread: it must not wait for that."""
    process = serving(_THREADS, "stop-in-handler")
    heard = tmp_path / "heard"
    sleeping = running(client.call, "sleep_until", str(heard))
    _said(process, "asleep")
    process.send_signal(signal.SIGTERM)
    until(lambda: client.members() == ())
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        _said(process, "heard")
    heard.touch()
    assert sleeping.result() == "slept"
    assert _ended(process) == (0, "served\n", "")


@LOOPS
def test_sigterm_stops_all_servers_of_a_loop(
    serving: Serving, client: Client, running: Running, loop: str
) -> None:
    """And leaves the signal as it was."""
    process = serving(_COROUTINES, "two", loop)
    sleeping = _called(process, client, running)
    process.send_signal(signal.SIGTERM)
    assert sleeping.result() == "slept"
    assert _ended(process) == (0, "served False False True\n", "")


@LOOPS
def test_a_loops_own_handler_stays(serving: Serving, client: Client, loop: str) -> None:
    process = serving(_COROUTINES, "own-handler", loop)
    assert client.call("echo", 1) == 1
    process.send_signal(signal.SIGTERM)
    assert _ended(process) == (0, "heard\nserved False False False\n", "")


def test_a_killed_server_leaves_the_registry(serving: Serving, client: Client, until: Until) -> None:
    process = serving(_THREADS)
    assert client.call("echo", 1) == 1
    process.kill()
    process.wait()
    until(lambda: client.members() == ())
    with pytest.raises(NoSuchTopic):
        client.call("echo", 1)
