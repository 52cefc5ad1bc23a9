"""The servers that some peers need: private ones, on free ports of the loopback device, in a scratch directory."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from pathlib import Path
from typing import Self

from peer import die_with_parent

from peers import BROKERS, find_server

START_SECONDS = 90.0
"""How long a server may take until it takes connections: RabbitMQ needs 5 s on a quiet machine."""


class NoBroker(RuntimeError):
    """A server did not start."""


def free_port() -> int:
    """Return a port of the loopback device that nobody uses at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Broker:
    """A server, and what it needs; a context manager that ends them."""

    def __init__(self, kind: str, scratch: Path) -> None:
        self.kind = kind
        self.directory = scratch / kind
        self.directory.mkdir()
        self.port = free_port()
        self.processes: list[subprocess.Popen[bytes]] = []

    @property
    def url(self) -> str:
        """Where clients find it."""
        user = "guest:guest@" if self.kind == "rabbitmq" else ""
        scheme = "rabbit" if self.kind == "rabbitmq" else "nats"
        return f"{scheme}://{user}127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """The server's own process, without what helps it."""
        return self.processes[-1].pid

    def __enter__(self) -> Self:
        try:
            {"nats": self._start_nats, "rabbitmq": self._start_rabbitmq}[self.kind]()
            self._wait()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """End the server, then what it needed."""
        while self.processes:
            process = self.processes.pop()
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def version(self) -> str:
        """Return what the server says of itself; empty if it does not."""
        if self.kind == "nats":
            done = subprocess.run([self._program(), "--version"], capture_output=True, text=True, check=False)
            return done.stdout.strip().rpartition("v")[2]
        names = (path.name for path in Path("/usr/lib/rabbitmq/lib").glob("rabbitmq_server-*"))
        return next(names, "").rpartition("-")[2]

    def _program(self) -> str:
        program = find_server(BROKERS[self.kind])
        if program is None:
            raise NoBroker(f"no {BROKERS[self.kind]}")
        return program

    def _start(self, command: list[str], environment: dict[str, str] | None = None) -> None:
        with (self.directory / "log").open("ab") as log:
            self.processes.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=environment,
                    cwd=self.directory,
                    preexec_fn=die_with_parent,  # noqa: PLW1509 - no other thread runs yet
                    start_new_session=True,  # Ctrl-C is for us, who end it in order
                )
            )

    def _start_nats(self) -> None:
        self._start([self._program(), "-a", "127.0.0.1", "-p", str(self.port)])

    def _start_rabbitmq(self) -> None:
        """Start Erlang's port mapper, which would outlive the node if the node started it, and the node."""
        mapper = str(free_port())
        directory = str(self.directory)
        self._start(["epmd", "-port", mapper, "-address", "127.0.0.1"])
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": directory,  # where Erlang keeps its cookie
            "ERL_EPMD_PORT": mapper,
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_ALLOW_INPUT": "1",  # no shell stays in between that would not pass on a signal
            "RABBITMQ_CONFIG_FILE": f"{directory}/none",
            "RABBITMQ_CONF_ENV_FILE": f"{directory}/none",
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{directory}/plugins",
            "RABBITMQ_LOG_BASE": directory,
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_MNESIA_BASE": directory,
            "RABBITMQ_NODENAME": "bench@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_PID_FILE": f"{directory}/pid",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        }
        self._start([self._program(), "-noinput"], environment)

    def _wait(self) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if self.processes[-1].poll() is not None:
                raise NoBroker(f"{BROKERS[self.kind]} ended at once: {self._last_words()}")
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                time.sleep(0.1)
        raise NoBroker(
            f"{BROKERS[self.kind]} takes no connection after {START_SECONDS:g} s: {self._last_words()}"
        )

    def _last_words(self) -> str:
        return (self.directory / "log").read_text(errors="replace").strip()[-500:] or "it says nothing"
