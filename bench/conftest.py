"""What the unit benchmarks share: servers in processes of their own, and versions in each saved result."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

import zmqcore
from zmqcore.cli.bench.processes import Process

SERVER = Path(__file__).with_name("served.py")


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Add to a saved result what its figures depend on."""
    machine_info["zmqcore"] = zmqcore.__file__
    machine_info["pyzmq"] = zmq.__version__
    machine_info["libzmq"] = zmq.zmq_version()
    machine_info["load"] = os.getloadavg()


@pytest.fixture(scope="session")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """Return a function that starts an echo server in a process of its own and returns its endpoint.

    ``start_server(transport, *options)``; one server per combination, ended with the session.
    """
    directory = tmp_path_factory.mktemp("ipc")
    processes: list[Process] = []
    endpoints: dict[tuple[str, ...], str] = {}
    # the process imports the very package that is measured here, installed or built in place
    paths = [str(Path(zmqcore.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}

    def start(transport: str = "tcp", *options: str) -> str:
        key = (transport, *options)
        if key not in endpoints:
            endpoint = "tcp://127.0.0.1:*" if transport == "tcp" else f"ipc://{directory}/{len(processes)}"
            processes.append(Process([sys.executable, str(SERVER), endpoint, *options], environment))
            endpoints[key] = processes[-1].read()["endpoint"]
        return endpoints[key]

    yield start
    for process in processes:
        process.end()
