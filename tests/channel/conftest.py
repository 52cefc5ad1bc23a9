"""A real server process for a channel to talk to, and channels that are closed at the end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import waiting_support
import zmq
from channel_support import Puppet

from zmqcore._channel import Channel

LIMIT = 30.0
"""How long, in seconds, anything may take before a test gives up: a hang, not a promise about speed."""

_PROGRAM = Path(__file__).with_name("port_process.py")


class ServerProcess:
    """One process with one port. Kill it, stop it, start it again."""

    def __init__(self, **options: Any) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(_PROGRAM), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the server process did not start"
        self.endpoints: list[str] = json.loads(line)

    @property
    def endpoint(self) -> str:
        return self.endpoints[0]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(LIMIT)

    def pause(self) -> None:
        """Stop the process, and come back when it really stands still."""
        os.kill(self.process.pid, signal.SIGSTOP)
        state = Path(f"/proc/{self.process.pid}/stat")
        while state.exists() and state.read_text().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.001)

    def resume(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)

    def end(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if self.process.poll() is None:
            self.resume()
            self.process.stdin.close()
            try:
                self.process.wait(LIMIT)
            except subprocess.TimeoutExpired:
                self.kill()
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture
def start_server() -> Iterator[Callable[..., ServerProcess]]:
    """``start_server(endpoints=[…], batch=…, batch_delay=…)`` starts a process with a port."""
    started: list[ServerProcess] = []

    def start(**options: Any) -> ServerProcess:
        server = ServerProcess(**options)
        started.append(server)
        return server

    yield start
    for server in started:
        server.end()


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    """A context of the test's own; it ends only when every socket has been closed."""
    made: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield made
    made.term()


@pytest.fixture
def puppet(context: zmq.Context[zmq.Socket[bytes]]) -> Iterator[Puppet]:
    made = Puppet(context)
    yield made
    made.socket.close(linger=0)


class Nowhere:
    """A loopback endpoint that refuses connections, and that nobody else gets until it is freed."""

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))  # bound, but not listening
        self.endpoint = f"tcp://127.0.0.1:{self._socket.getsockname()[1]}"

    def free(self) -> str:
        self._socket.close()
        return self.endpoint


@pytest.fixture
def nowhere() -> Iterator[Nowhere]:
    made = Nowhere()
    yield made
    made.free()


@pytest.fixture
def connect(context: zmq.Context[zmq.Socket[bytes]]) -> Iterator[Callable[..., Channel]]:
    """``connect(endpoint, **options)`` returns an open channel."""
    made: list[Channel] = []

    def make(endpoint: str, *, open: bool = True, **options: Any) -> Channel:
        channel = Channel(context, endpoint, **options)
        made.append(channel)
        if open:
            assert channel.wait_open(LIMIT)
        return channel

    yield make
    for channel in made:
        channel.close()


class Handshakes:
    """Tells of a channel's connections without anybody looking at the channel: connect(..., configure=this.watch)."""

    def watch(self, made: zmq.Socket[bytes]) -> None:
        self.monitor = made.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)

    def wait(self) -> None:
        """Return once there has been a further one."""
        assert self.monitor.poll(int(LIMIT * 1000)), "never: a connection"
        self.monitor.recv_multipart()


@pytest.fixture
def handshakes() -> Iterator[Handshakes]:
    made = Handshakes()
    yield made
    made.monitor.close()


class Team:
    """Threads that run together; what one of them raises, join() raises."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self._errors: list[BaseException] = []

    def start(self, work: Callable[..., object], *args: Any) -> threading.Thread:
        def run() -> None:
            try:
                work(*args)
            except BaseException as exc:  # noqa: BLE001 - handed to join()
                self._errors.append(exc)

        thread = threading.Thread(target=run, daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread

    @property
    def started(self) -> int:
        return len(self._threads)

    @property
    def alive(self) -> int:
        return sum(thread.is_alive() for thread in self._threads)

    def join(self, timeout: float = LIMIT) -> None:
        give_up = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, give_up - time.monotonic()))
        assert not self.alive, f"{self.alive} of {self.started} threads hang"
        if self._errors:
            raise self._errors[0]


@pytest.fixture
def team() -> Team:
    return Team()


@pytest.fixture
def quick_switches() -> Iterator[None]:
    """Let the interpreter switch threads as often as it can: races show sooner."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def until() -> Callable[..., None]:
    """``until(condition, what)`` waits until the condition holds."""
    return waiting_support.until
