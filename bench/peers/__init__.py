"""Who is measured beside zmqcore by ``against.py``: one program for each, and what it needs.

Nothing of a peer is imported here: the programs run in processes of their own.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
from collections.abc import Mapping

NEEDS_A_BROKER = "a client knows one endpoint, the broker"
ONLY_CALLS = "it has calls only"


@dataclasses.dataclass(frozen=True)
class Peer:
    """One system.

    ``program``: ``c``, a file in ``bench/`` and its first arguments, or ``-m`` and a module. ``modules``: what must be
    importable. ``broker``: which server it needs. ``forms``: the first argument for a task, where that differs.
    ``without``: which tasks it has no part in, and why. ``settings``: what a reader should know.
    """

    name: str
    title: str
    program: tuple[str, ...]
    modules: tuple[str, ...] = ()
    broker: str = ""
    form: str = ""
    forms: Mapping[str, str] = dataclasses.field(default_factory=dict)
    without: Mapping[str, str] = dataclasses.field(default_factory=dict)
    settings: str = ""

    def missing(self) -> str:
        """Return what has to be installed before it can take part; empty if it can."""
        absent = [module for module in self.modules if importlib.util.find_spec(module) is None]
        if absent:
            return f"no module {', '.join(absent)}: pip install -r bench/peers/requirements.txt"
        server = BROKERS.get(self.broker)
        if server is not None and find_server(server) is None:
            return f"no {server}: apt-get install {server}"
        return ""


BROKERS = {"nats": "nats-server", "rabbitmq": "rabbitmq-server"}

# Debian's /usr/sbin/rabbitmq-server insists on its own user and its own directories.
SERVER_DIRECTORIES = ("/usr/lib/rabbitmq/bin", "/opt/homebrew/opt/rabbitmq/sbin")


def find_server(name: str) -> str | None:
    """Return the path of a broker's program."""
    if name == "rabbitmq-server":
        for directory in SERVER_DIRECTORIES:
            if found := shutil.which(name, path=directory):
                return found
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")


PEERS = (
    Peer(
        "zmqcore",
        "zmqcore",
        ("peers_zmqcore.py",),
        ("zmq", "msgpack"),
        settings="`Client`, `Server(workers=0)`; in flight by `submit`; a connection for each call: `max_sockets=1`",
    ),
    Peer(
        "zmqcore-asyncio",
        "zmqcore asyncio",
        ("-m", "peers.zmqcore_asyncio"),
        ("zmq", "msgpack", "uvloop"),
        without={"new": "an event loop looks every few ms only whether a place in the pool is wanted"},
        settings="`AsyncClient`, `AsyncServer` with coroutines; uvloop",
    ),
    Peer(
        "c",
        "C and libzmq",
        ("c",),
        settings="DEALER to ROUTER, blocking, no encoding; fanout: a DEALER for each server",
    ),
    Peer(
        "pyzmq",
        "bare pyzmq",
        ("peers_pyzmq.py",),
        ("zmq",),
        form="plain",
        forms={"call-64k": "frames", "call-1m": "frames"},
        settings="the same in Python; `copy=False` from 64 KiB on",
    ),
    Peer(
        "pyzmq-msgpack",
        "pyzmq + msgpack",
        ("peers_pyzmq.py",),
        ("zmq", "msgpack"),
        form="msgpack",
        settings="the same, with a method's name and arguments packed and unpacked at both ends",
    ),
    Peer(
        "zeroapi",
        "zeroapi",
        ("-m", "peers.zeroapi_tcp"),
        ("zero", "uvloop"),
        without={"cast": ONLY_CALLS, "cast-1k": ONLY_CALLS, "fanout": ONLY_CALLS},
        settings="TCP protocol (the faster one), uvloop, one worker; in flight: a connection each",
    ),
    Peer(
        "rpyc",
        "RPyC",
        ("-m", "peers.rpyc_threads"),
        ("rpyc",),
        settings="`ThreadedServer`, no Nagle, no compression; one way and in flight by `async_`",
    ),
    Peer(
        "pyro5",
        "Pyro5",
        ("-m", "peers.pyro5_threads"),
        ("Pyro5",),
        settings="`marshal`, no Nagle, `multiplex`; in flight: 100 threads with a proxy each; one way by `@oneway`",
    ),
    Peer(
        "zerorpc",
        "zerorpc",
        ("-m", "peers.zerorpc_gevent"),
        ("zerorpc",),
        settings="gevent; in flight by `async`; one way by `Pusher`, fanout: a `Pusher` for each server",
    ),
    Peer(
        "grpc",
        "gRPC",
        ("-m", "peers.grpc_threads"),
        ("grpc",),
        settings="bytes, no protobuf; 8 threads; in flight by futures, one way by a stream",
    ),
    Peer(
        "grpc-asyncio",
        "gRPC asyncio",
        ("-m", "peers.grpc_asyncio"),
        ("grpc", "uvloop"),
        settings="bytes, no protobuf; uvloop; one way by a stream",
    ),
    Peer(
        "nats",
        "NATS",
        ("-m", "peers.nats_broker"),
        ("nats", "uvloop"),
        broker="nats",
        without={"kept": NEEDS_A_BROKER},
        settings="nats-py on uvloop through one nats-server; one way and fanout by `publish`",
    ),
    Peer(
        "oslo",
        "oslo.messaging",
        ("-m", "peers.oslo_rabbitmq"),
        ("oslo_messaging",),
        broker="rabbitmq",
        without={"kept": NEEDS_A_BROKER},
        settings="RabbitMQ, transient queues, threads; JSON text in place of bytes; in flight: 100 threads",
    ),
)
