"""Registries to test against, and members that live in processes of their own."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from clock_support import Clock

import zmqcore.topic
from zmqcore.matchmaker import Matchmaker, Member, open_matchmaker
from zmqcore.topic import Topic

#: Far above what anything here takes. Nothing is asserted about time; this only ends a test that hangs.
PATIENCE = 30.0

_PEER = Path(__file__).parent / "peer.py"
_ROOT = Path(zmqcore.topic.__file__).parent.parent


class Peer:
    """A process that registers, renews, and does what it is told on stdin (see peer.py)."""

    def __init__(self, url: str, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(_PEER), url, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(_ROOT)},
        )

    def hear(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the peer ended with {self.process.wait(PATIENCE)}"
        return line.rstrip("\n")

    def tell(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        """SIGKILL, and leave it a zombie until the test ends."""
        self.process.kill()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def cont(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def end(self) -> int:
        if self.process.poll() is None:
            self.process.kill()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        return self.process.wait(PATIENCE)


@pytest.fixture
def peer() -> Iterator[Callable[..., Peer]]:
    made: list[Peer] = []

    def start(url: str, *arguments: str) -> Peer:
        made.append(Peer(url, *arguments))
        return made[-1]

    yield start
    for each in made:
        each.end()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "registry"


@pytest.fixture
def local_url(directory: Path) -> str:
    return directory.as_uri().replace("file:", "local:")


_names = itertools.count()


@pytest.fixture(params=["memory", "local"])
def url(request: pytest.FixtureRequest) -> str:
    """A fresh registry of each kind that can be written."""
    if request.param == "memory":
        return f"memory://test-{next(_names)}"
    found = request.getfixturevalue("local_url")
    assert isinstance(found, str)
    return found


@pytest.fixture
def opened() -> Iterator[Callable[[str], Matchmaker]]:
    made: list[Matchmaker] = []

    def opener(url: str) -> Matchmaker:
        made.append(open_matchmaker(url))
        return made[-1]

    yield opener
    for matchmaker in made:
        matchmaker.close()


@pytest.fixture
def member() -> Callable[..., Member]:
    def make(server: str = "a", topic: str = "inventory", instance: str = "1", exchange: str = "") -> Member:
        return Member(
            Topic(topic, server, exchange),
            (f"ipc:///run/{server}.sock", "tcp://127.0.0.1:5555"),
            instance=instance,
            host="host",
            pid=os.getpid(),
            capacity=2,
            version="1.2",
            public_key="k",
        )

    return make
