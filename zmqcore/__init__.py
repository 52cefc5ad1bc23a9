"""Brokerless RPC over ZeroMQ: cast, call and fanout on a compiled core.

>>> from zmqcore import Server, Client
"""

import sys

# Before anything that would fail there with a riddle. setup.py builds nothing on Windows, so that this is what is read.
if sys.platform == "win32":
    raise ImportError(
        "zmqcore runs on Linux (macOS is meant to work, and is untested so far), not on Windows, which lacks what its"
        " compiled core is made of: poll(2), dlopen(3), fork(2), Unix sockets. In WSL 2 it runs as on Linux:"
        " wsl --install, then pip install zmqcore there"
    )

from zmqcore import errors
from zmqcore._version import __version__
from zmqcore.codec import Limits
from zmqcore.errors import *  # noqa: F403  (the exceptions are part of the public face)
from zmqcore.node import Node, default_node
from zmqcore.rpc.async_client import AsyncClient
from zmqcore.rpc.async_server import AsyncServer
from zmqcore.rpc.client import Client
from zmqcore.rpc.deadline import time_left
from zmqcore.rpc.interception import Operation
from zmqcore.rpc.metadata import metadata
from zmqcore.rpc.processes import ServerProcesses
from zmqcore.rpc.results import Fanout, Gathered
from zmqcore.rpc.retry import Retry
from zmqcore.rpc.server import Server
from zmqcore.rpc.stream import AsyncStream, Stream
from zmqcore.topic import Topic

__all__ = [  # noqa: PLE0604  (strings, all of them)
    "AsyncClient",
    "AsyncServer",
    "AsyncStream",
    "Client",
    "Fanout",
    "Gathered",
    "Limits",
    "Node",
    "Operation",
    "Retry",
    "Server",
    "ServerProcesses",
    "Stream",
    "Topic",
    "__version__",
    "default_node",
    "metadata",
    "time_left",
    *errors.__all__,
]
