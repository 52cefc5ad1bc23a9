"""Nodes and servers for the tests of the RPC layer, in this process and in others."""

from __future__ import annotations

import itertools
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import waiting_support
from waiting_support import PATIENCE
from worker_support import Worker, settled

import zmqcore
from zmqcore import Client, Node, Server, Topic

_PEER = Path(__file__).parent / "peer.py"
_ROOT = Path(zmqcore.__file__).parent.parent


class Running:
    """A function that runs on a thread of its own."""

    def __init__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        self.outcome: Any = None
        self.error: BaseException | None = None

        def run() -> None:
            try:
                self.outcome = function(*args, **kwargs)
            except BaseException as exc:  # noqa: BLE001 - handed to the test's thread
                self.error = exc

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    @property
    def ended(self) -> bool:
        return not self.thread.is_alive()

    def join(self) -> BaseException | None:
        """Wait for the end; return what was raised."""
        self.thread.join(PATIENCE)
        if self.thread.is_alive():
            pytest.fail(f"still runs after {PATIENCE:g} s")
        return self.error

    def result(self) -> Any:
        """Wait for the end; return what was returned, or raise what was raised."""
        if self.join() is not None:
            raise self.error  # type: ignore[misc]
        return self.outcome


@pytest.fixture
def start_program() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """``start_program(source, *words)`` runs Python in a process of its own, and waits until it says "ready"."""
    started: list[subprocess.Popen[str]] = []

    def start(source: str, *words: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", source, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(_ROOT)},
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate(timeout=PATIENCE)


class Peer:
    """A process with a server (see peer.py)."""

    def __init__(self, **options: Any) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(_PEER), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": f"{_ROOT}:{_ROOT}/tests"},
        )
        self.pid = self.process.pid

    def started(self) -> Peer:
        ready = self.hear()
        self.endpoints: list[str] = ready["endpoints"]
        self.server: str = ready["server"]
        return self

    def hear(self) -> Any:
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], PATIENCE)
        assert readable, f"the peer has said nothing for {PATIENCE:g} s"
        line = self.process.stdout.readline()
        assert line, f"the peer ended with {self.process.wait(PATIENCE)}"
        return json.loads(line)

    def tell(self, *words: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()

    def ask(self, *words: Any) -> Any:
        self.tell(*words)
        return self.hear()

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.process.kill()
        self.process.wait(PATIENCE)

    def freeze(self) -> None:
        """SIGSTOP, and wait until all its threads have stopped: until then they may still answer."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        self.kill()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture(autouse=True)
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime directory of the test's own. Not under tmp_path: an ipc path holds 107 bytes."""
    directory = Path(tempfile.mkdtemp(prefix="zmqcore-"))
    monkeypatch.setenv("ZMQCORE_RUNTIME_DIR", str(directory))
    monkeypatch.delenv("ZMQCORE_MATCHMAKER", raising=False)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def make_node() -> Iterator[Callable[..., Node]]:
    """``make_node(matchmaker="local://", **options)``; closed at the end."""
    made: list[Node] = []

    def make(*args: Any, **options: Any) -> Node:
        made.append(Node(*args, **options))
        return made[-1]

    yield make
    for node in made:
        node.close()


@pytest.fixture
def node(make_node: Callable[..., Node]) -> Node:
    """A node with the local matchmaker, for clients of peers."""
    return make_node()


_names = itertools.count()


@pytest.fixture
def registry() -> str:
    """The URL of a registry in memory."""
    return f"memory://rpc-{next(_names)}"


@pytest.fixture
def serve(make_node: Callable[..., Node], registry: str) -> Callable[..., Server]:
    """``serve(topic, *endpoints, **options)`` starts a server in this process, on a node of its own."""

    def start(topic: str | Topic, *endpoints: Any, **options: Any) -> Server:
        return Server(topic, *endpoints, node=make_node(registry), **options).start()

    return start


@pytest.fixture
def connect(make_node: Callable[..., Node], registry: str) -> Callable[..., Client]:
    """``connect(topic, **options)`` makes a client of those servers, all on one node."""
    node: list[Node] = []

    def make(topic: str | Topic, **options: Any) -> Client:
        if not node:
            node.append(make_node(registry))
        return Client(topic, **{"node": node[0], "timeout": PATIENCE, **options})

    return make


@pytest.fixture
def peers() -> Iterator[Callable[..., Peer]]:
    """``peers(topic, server=None, exchange="", **options)`` starts a server in another process."""
    made: list[Peer] = []

    def start(
        topic: str,
        server: str | None = None,
        exchange: str = "",
        *,
        wait: bool = True,
        matchmaker: str = "local://",
        **options: Any,
    ) -> Peer:
        made.append(Peer(matchmaker=matchmaker, topic=[topic, server, exchange], server=options))
        return made[-1].started() if wait else made[-1]

    yield start
    for peer in made:
        peer.end()


@pytest.fixture(scope="session")
def uvloop() -> Any:
    """The module, if it is installed. Its first loop makes a pipe that the process keeps."""
    uvloop = pytest.importorskip("uvloop")
    uvloop.new_event_loop().close()
    return uvloop


@pytest.fixture
def until() -> Callable[..., None]:
    """``until(condition)`` returns once it holds, and fails the test if it never does."""
    return waiting_support.until


@pytest.fixture
def running() -> Callable[..., Running]:
    """``running(function, *args)`` runs it on a thread of its own."""
    return Running


@pytest.fixture
def blackhole() -> Iterator[str]:
    """An endpoint where the kernel accepts connections and nobody ever says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"tcp://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def free_port() -> int:
    """A port on loopback where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """``run_python(program)`` runs it in a fresh interpreter and returns how that ended."""

    def run(program: str, *args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-W", "error", "-X", "faulthandler", "-c", program, *args],
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
            env=os.environ | {"PYTHONPATH": f"{_ROOT}:{_ROOT}/tests"},
        )

    return run


@pytest.fixture
def workers(serve: Callable[..., Server]) -> Iterator[dict[str, Worker]]:
    """Two servers, "a" and "b"."""
    made = {name: Worker(name) for name in "ab"}
    for name, worker in made.items():
        # More than calls that linger: a handler on a thread cannot be cancelled.
        serve("t", worker, server=name, workers=16)
    yield made
    for worker in made.values():
        worker.gate.set()


@pytest.fixture
def both(
    workers: dict[str, Worker], connect: Callable[..., Client], until: Callable[..., None]
) -> Iterator[Client]:
    """A client of both, connected to both."""
    client = connect("t")
    until(lambda: len(client.members()) == 2)
    assert {client.call("linger") for _ in range(4)} == {"a", "b"}
    yield client
    for worker in workers.values():
        worker.gate.set()
    until(lambda: settled(client))


@pytest.fixture
def full(
    serve: Callable[..., Server], connect: Callable[..., Client], until: Callable[..., None]
) -> Iterator[tuple[Server, Worker, Client]]:
    """A server that rejects everything until its worker's gate is opened, and a client."""
    worker = Worker("full")
    server = serve("t", worker, workers=1, queue_size=1, on_full="reject")
    client = connect("t")
    filling = [client.submit("linger", "full") for _ in range(2)]
    assert worker.entered.acquire(timeout=PATIENCE)
    until(lambda: server.stats()["queued"] == 1)
    yield server, worker, client
    worker.gate.set()
    assert [future.result(PATIENCE) for future in filling] == ["full"] * 2


@pytest.fixture
def two(peers: Callable[..., Peer]) -> dict[str, Any]:
    return {name: peers("t", name, workers=4) for name in "ab"}
