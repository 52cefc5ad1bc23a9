"""What crosses a process: peers that are killed, a child that forks off."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from zmqcore import errors
from zmqcore._port import Port

LIMIT = 30.0

CLIENT = """
import sys, zmq
from zmqcore._channel import Channel
channel = Channel(zmq.Context(), sys.argv[1])
assert channel.wait_open(30)
while True:
    channel.call(b"t", "m", b"x" * 1000, [b"y" * 100_000], b"", 1, 30.0)
    print(".", end="", flush=True)
"""


def start_client(endpoint: str) -> subprocess.Popen[bytes]:
    client = subprocess.Popen(
        [sys.executable, "-c", CLIENT, endpoint],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert client.stdout is not None
    assert client.stdout.read(1) == b"."
    return client


def end(client: subprocess.Popen[bytes]) -> None:
    client.kill()
    client.wait(LIMIT)
    assert client.stdout is not None
    client.stdout.close()


def test_killed_peers_leave_the_port_serving(
    port: Port, serve: Callable[..., Any], bare: Callable[..., Any]
) -> None:
    serve(port)
    for _ in range(3):
        end(start_client(port.endpoints[0]))
    client = bare(port.endpoints[0])
    client.send("call", body=b"x")
    assert bytes(client.receive_kind("reply").body) == b"x"


def test_a_stopped_peer_holds_nobody_up(
    port: Port, serve: Callable[..., Any], bare: Callable[..., Any]
) -> None:
    serve(port)
    stopped = start_client(port.endpoints[0])
    os.kill(stopped.pid, signal.SIGSTOP)
    client = bare(port.endpoints[0])
    for _ in range(100):
        client.send("call", body=b"x")
        assert bytes(client.receive_kind("reply").body) == b"x"
    end(stopped)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_is_refused_and_the_parent_goes_on(port: Port, bare: Callable[..., Any]) -> None:
    client = bare(port.endpoints[0])
    client.send("call")
    requests = port.receive(1, LIMIT)
    waiting = threading.Thread(target=lambda: requests.extend(port.receive(1, LIMIT)), daemon=True)
    waiting.start()
    time.sleep(0.05)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            attempts: list[Callable[[], object]] = [
                port.receive,
                port.wake,
                port.goodbye,
                port.settled,
                lambda: requests[0].reply(b"child"),
            ]
            for attempt in attempts:
                with pytest.raises(errors.Closed, match="fork"):
                    attempt()
            port.close()
            port.stats()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert requests[0].reply(b"parent")
    assert bytes(client.receive_kind("reply").body) == b"parent"
    client.send("call")
    waiting.join(LIMIT)
    assert len(requests) == 2
