"""One of the processes that ServerProcesses starts: ``python -P -m zmqcore.rpc.process_main FD``.

FD is one end of a pair of sockets, on which both sides write JSON, a map per line. The parent begins with what is to be
served, and the process answers by what it announces, or by why it cannot. Later the parent may say when to stop. When
its end is closed it has died, and the process drains and ends, too.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import traceback
from typing import Any, NoReturn

from zmqcore.codec import Limits
from zmqcore.node import Node, default_matchmaker, default_node
from zmqcore.rpc.loop_server import LoopServer, server_for
from zmqcore.rpc.server import Server
from zmqcore.rpc.target import NotServable, load_endpoint, load_object
from zmqcore.topic import Topic

_LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s [%(process)d]: %(message)s"

#: The exit code of a process whose handlers were still running when its time was over.
UNFINISHED = 3


class _Parent:
    """The way to the parent."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)
        # What a handler starts must not hold it open.
        self._socket.set_inheritable(False)
        self._lines = self._socket.makefile("r", encoding="utf-8")

    def hear(self) -> dict[str, Any] | None:
        """Return the next thing it says; None when it has gone."""
        try:
            line = self._lines.readline()
        except OSError:
            return None
        message: dict[str, Any] | None = json.loads(line) if line else None
        return message

    def say(self, message: dict[str, Any]) -> None:
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            pass  # it has gone; hear() is told, too


class _Stopping:
    """Stops the server when the parent says so, or has gone."""

    def __init__(self, parent: _Parent, drain_timeout: float) -> None:
        self._parent = parent
        self._drain_timeout = drain_timeout
        self._thread: threading.Thread | None = None
        self._finished = True
        self.server: Server | LoopServer | None = None
        threading.Thread(target=self._obey, name="zmqcore-parent", daemon=True).start()

    def _obey(self) -> None:
        while (message := self._parent.hear()) is not None:
            self._begin(**message["stop"])
        self._begin(drain=True, timeout=self._drain_timeout)

    def _begin(self, drain: bool, timeout: float) -> None:
        """Stop; at once if there is nothing to stop yet, or if it is being stopped and the parent waits no longer."""
        if self.server is None or (self._thread is not None and not drain):
            _end_now(UNFINISHED)
        if self._thread is None:
            self._thread = threading.Thread(target=self._stop, args=(self.server, drain, timeout))
            self._thread.start()

    def _stop(self, server: Server | LoopServer, drain: bool, timeout: float) -> None:
        self._finished = server.stop(drain, timeout)

    def finished(self) -> bool:
        """After the server has stopped: whether that left nothing undone."""
        if self._thread is not None:
            self._thread.join()
        return self._finished


def _end_now(code: int) -> NoReturn:
    """End at once: Python would wait for what still runs."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass
    os._exit(code)


def _load(target: str) -> Any:
    """Return what is to be served; what its module raises is shown as the user's own fault."""
    try:
        return load_endpoint(target)
    except NotServable:
        raise
    except Exception as exc:
        traceback.print_exception(exc)
        raise NotServable(f"{target} cannot be loaded: {type(exc).__name__}: {exc}") from exc


def _node(matchmaker: str | None, options: dict[str, Any]) -> Node:
    """Return the node of this process: the default one, unless something is said about it."""
    if not matchmaker and not options:
        return default_node()
    if "limits" in options:
        options["limits"] = Limits(**options["limits"])
    return Node(matchmaker or default_matchmaker(), **options)


def _serve(parent: _Parent, config: dict[str, Any]) -> int:
    stopping = _Stopping(parent, config["drain_timeout"])
    sys.path[:] = config["path"]
    if config["log_level"] is not None:
        logging.basicConfig(level=config["log_level"], format=_LOG_FORMAT)
    try:
        endpoint = _load(config["target"])
        interceptors = [load_object(name) for name in config["interceptors"]]
        node = _node(config["matchmaker"], config["node"])
        topic = Topic(*config["topic"])
        server = server_for(topic, endpoint, node, interceptors=interceptors, **config["options"])
        try:
            server.start()
        except Exception:
            # Before the parent hears of it, which then ends this process at once: the socket's file would stay.
            node.close(0.0)
            raise
    except Exception as exc:  # noqa: BLE001 - the parent raises it
        fault = str(exc) if isinstance(exc, NotServable) else f"{type(exc).__name__}: {exc}"
        parent.say({"failed": fault, "not_servable": isinstance(exc, NotServable)})
        return 1
    stopping.server = server
    parent.say({"server": server.topic.server, "instance": server.instance, "endpoints": server.endpoints})
    if not (server.serve_forever(config["drain_timeout"]) and stopping.finished()):
        _end_now(UNFINISHED)
    node.close()
    return 0


def main() -> int:
    """Serve what the parent says."""
    parent = _Parent(int(sys.argv[1]))
    config = parent.hear()
    return 1 if config is None else _serve(parent, config)


if __name__ == "__main__":
    sys.exit(main())
