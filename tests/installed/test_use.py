"""The main jobs, between processes, as a user does them after ``pip install zmqcore[cli,numpy]``."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import pytest

from zmqcore import AsyncClient, Client, Node, RemoteError

SERVICE = """
import os, sys
from zmqcore import Node, Server

class Service:
    def __init__(self):
        self.noted = []
    def add(self, a, b=1):
        return a + b
    def fail(self):
        raise LookupError("not here")
    def note(self, text):
        self.noted.append(text)
    def notes(self):
        return self.noted
    def pid(self):
        return os.getpid()
    def double(self, array):
        return array * 2

with Node() as node, Server("installed", Service(), node=node, workers=0):
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def servers(place: Path) -> Iterator[list[int]]:
    """Two processes that serve the topic "installed"; their pids."""
    script = place / "service.py"
    script.write_text(SERVICE)
    started = [
        subprocess.Popen(
            [sys.executable, str(script)], cwd=place, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    try:
        for process in started:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        yield [process.pid for process in started]
    finally:
        for process in started:
            process.communicate()  # closes its input, which ends it
    assert [process.returncode for process in started] == [0, 0]


@pytest.fixture
def node(place: Path) -> Iterator[Node]:
    del place  # the registry that it is to use
    with Node() as owned:
        yield owned


def test_call_cast_fanout_and_gather(node: Node, servers: list[int]) -> None:
    client = Client("installed", node=node, timeout=30.0)
    assert client.call("add", 41) == 42
    with pytest.raises(RemoteError, match="not here"):
        client.call("fail")
    gathered = client.gather("pid")
    assert sorted(gathered.results.values()) == sorted(servers)

    one = client.prepare(server=next(iter(gathered.results)).topic.server)
    one.cast("note", "cast")
    client.fanout("note", "fanout")
    assert one.call("notes") == ["cast", "fanout"]
    assert client.submit("add", 1).result(timeout=30.0) == 2


@pytest.mark.usefixtures("servers")
def test_coroutines(node: Node) -> None:
    async def both() -> list[int]:
        client = AsyncClient("installed", node=node, timeout=30.0)
        return await asyncio.gather(client.call("add", 1), client.call("add", 2))

    assert asyncio.run(both()) == [2, 3]


@pytest.mark.usefixtures("servers")
def test_an_array_that_travels_out_of_band(node: Node) -> None:
    numpy = pytest.importorskip("numpy")
    array = numpy.arange(100_000, dtype="f8").reshape(1000, 100)
    answer = Client("installed", node=node, timeout=30.0).call("double", array)
    assert (answer == array * 2).all()


def run_command(place: Path, *words: str) -> Any:
    """Run the command line and return the JSON that it prints."""
    pytest.importorskip("click")
    pytest.importorskip("rich")
    # the script that pip has written lies beside this Python
    command = Path(sys.executable).with_name("zmqcore")
    done = subprocess.run(
        [command, *words],
        cwd=place,
        env=dict(os.environ),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60.0,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_command_calls_a_server(servers: list[int], place: Path) -> None:
    assert run_command(place, "call", "installed", "pid") in servers


def test_the_command_measures_by_processes_of_its_own(place: Path) -> None:
    results = run_command(place, "bench", "--seconds", "0.1")["results"]
    assert len(results) == 6
    assert all(result["ratio"] > 0 for result in results)


def readme() -> str:
    """README as the wheel carries it; in a checkout the file itself, which may be newer than what was installed."""
    file = Path(__file__).parents[2] / "README.md"
    return file.read_text(encoding="utf-8") if file.exists() else metadata("zmqcore")["Description"]


def test_the_first_example_of_the_readme(
    run: Callable[..., subprocess.CompletedProcess[str]], place: Path
) -> None:
    example = re.search(r"^```python\n(.*?)^```$", readme(), re.MULTILINE | re.DOTALL)
    assert example
    assert len(example[1].splitlines()) <= 5
    (place / "hello.py").write_text(example[1])
    done = run("hello.py")
    assert (done.returncode, done.stdout) == (0, "hello, world\n"), done.stderr
