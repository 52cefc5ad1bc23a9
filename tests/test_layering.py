"""Imports only point down: ``LAYERS`` is the map, and every import in the tree is held against it.

Imports inside functions and under ``TYPE_CHECKING`` count: they are dependencies too. What the compiled core
and the RPC layer promise beyond their place in the map (``PROMISES``) is checked here as well.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]

# Who may import whom, from the bottom up. A room is a module, or a package with all that is in it; its parts
# may use each other. What is not in a room's list is up or sideways.
BASE = ["errors", "_version", "options"]
SOCKET = [*BASE, "_libzmq", "_frame", "_socket"]
CHANNEL = [*SOCKET, "_outbox", "_led_socket", "_deadlines", "_pending", "_retention", "_window", "_channel"]
PORT = [*SOCKET, "_outbox", "_inbox", "_duplicates", "_request", "_port"]
LAYERS: dict[str, list[str]] = {
    "_version": [],
    "errors": [],
    "options": [],
    # the compiled core
    "_libzmq": [*BASE],
    "_frame": [*BASE, "_libzmq"],
    "_socket": [*BASE, "_libzmq"],
    "_deadlines": [*BASE],
    "_outbox": [*BASE, "_libzmq", "_socket"],
    "_led_socket": [*SOCKET, "_outbox"],
    "_pending": [*SOCKET, "_deadlines", "_led_socket"],
    "_retention": [*SOCKET],
    "_window": [*BASE],
    "_channel": [*SOCKET, "_outbox", "_deadlines", "_led_socket", "_pending", "_retention", "_window"],
    "_loop": [*CHANNEL],
    "_inbox": [*SOCKET],
    "_duplicates": [*SOCKET],
    "_request": [*SOCKET, "_duplicates"],
    "_port": [*SOCKET, "_outbox", "_inbox", "_duplicates", "_request"],
    "_table": [*CHANNEL],
    "_lifecycle": [*CHANNEL, "_table"],
    "_pool": [*CHANNEL, "_table", "_lifecycle"],
    # value types, and what knows nothing of sockets
    "_msgpack": [],
    "_encoder": [*BASE, "_msgpack"],
    "_decoder": [*BASE, "_msgpack"],
    "_body": [*BASE, "_msgpack", "_encoder", "_decoder"],
    "codec": [*BASE, "_encoder", "_decoder", "_body"],
    "topic": [*BASE],
    "resolver": [],
    "endpoint": [*BASE, "resolver"],
    "runtime_dir": [*BASE],
    # the thread that leads where nobody waits: it sees channels through a protocol of its own
    "attendant": [*BASE],
    # the one that sends again what a lost channel has left
    "redelivery": [*CHANNEL, "_pool"],
}
VALUES = [*BASE, "topic", "resolver", "endpoint", "runtime_dir"]
LAYERS["matchmaker"] = VALUES
LAYERS["node"] = [*VALUES, "codec", "matchmaker", "attendant", "redelivery", *CHANNEL, *PORT, "_pool"]
LAYERS["rpc"] = [*VALUES, "codec", "matchmaker", "node", "redelivery", "_frame"]
LAYERS["rpc"] += ["_pending", "_retention", "_channel", "_deadlines", "_loop", "_request", "_port", "_pool"]
LAYERS["router"] = LAYERS["node"] + ["node"]
# The package itself only gathers the public names.
LAYERS[""] = [*VALUES, "codec", "matchmaker", "node", "rpc"]
# The faces: they may use all of the above, and nothing imports them. The demo is the command line's.
BELOW = [*LAYERS]
LAYERS["oslo"] = BELOW
LAYERS["cli"] = [*BELOW, "router"]

CORE = ["_libzmq", "_frame", "_socket", "_outbox", "_led_socket", "_deadlines", "_pending", "_retention"]
CORE += ["_window", "_channel", "_table", "_lifecycle", "_pool"]
CORE += ["_inbox", "_duplicates", "_request", "_port"]
CODEC = ["_msgpack", "_encoder", "_decoder", "_body"]
COMPILED = [*CORE, "_loop", *CODEC]

# room -> imported names (fnmatch) it promises not to need, at any depth of the file.
PROMISES: dict[str, list[str]] = {
    # pure Python that knows nothing of libzmq
    "rpc": ["zmq", "zmq.*", "zmqcore._libzmq", "zmqcore._socket"],
    "matchmaker": ["zmq", "zmq.*"],
    "topic": ["zmq", "zmq.*", "msgpack*"],
    "codec": ["zmq", "zmq.*", "pickle"],
    **{room: ["zmq", "zmq.*", "pickle"] for room in CODEC},
    # no methods, topics or codecs in the core
    **{room: ["msgpack*", "pickle", "json", "asyncio*"] for room in CORE},
}
# What stands beside the package in the checkout, and is not there once it is installed.
BESIDE = ["bench", "bench.*", "tests", "tests.*", "docs", "docs.*"]


class Import(NamedTuple):
    line: int
    name: str
    """Absolute and dotted. For ``from a import b`` there is one entry ``a.b``: b may be a module."""


def room_of(module: str) -> str:
    """``zmqcore.rpc.client`` lives in room ``rpc``, ``zmqcore`` itself in room ``""``."""
    return module.partition(".")[2].partition(".")[0]


def module_of(path: Path, package_parent: Path) -> str:
    parts = list(path.relative_to(package_parent).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)


def absolute(base: str, level: int, module: str, is_package: bool) -> str:
    """Resolve the dots of a relative import made in module ``module``."""
    if level == 0:
        return base
    parts = module.split(".")
    parts = parts[: len(parts) - level + is_package]
    return ".".join([*parts, base] if base else parts)


def python_imports(source: str, module: str, is_package: bool) -> Iterator[Import]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node.module or "", node.level, module, is_package)
            for alias in node.names:
                yield Import(node.lineno, f"{base}.{alias.name}")
        elif isinstance(node, ast.Call) and node.args:
            # importlib.import_module("…") and __import__("…") are no way round.
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            first = node.args[0]
            name = first.value if isinstance(first, ast.Constant) else None
            if called in ("import_module", "__import__") and isinstance(name, str):
                base = name.lstrip(".")
                yield Import(node.lineno, absolute(base, len(name) - len(base), module, is_package))


_FROM = re.compile(r"^\s*from\s+(\.*)\s*([\w.]*)\s+c?import\s+(.+)$")
_PLAIN = re.compile(r"^\s*c?import\s+(.+)$")
_EXTERN = re.compile(r"^\s*cdef\s+extern\s+from\b")
_TEXT = re.compile(r'(?s)""".*?"""|\'\'\'.*?\'\'\'|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'|#[^\n]*')


def cython_imports(source: str, module: str, is_package: bool) -> Iterator[Import]:
    """Read ``import``, ``cimport``, ``from … import`` and ``include`` of .pyx and .pxd without Cython."""
    if re.search(r"(?m)^\s*include\s+[\"']", source):
        yield Import(1, "include")
    # Text and comments go, line numbers stay; a bracketed list is drawn into one line.
    source = _TEXT.sub(lambda match: '""' + "\n" * match[0].count("\n"), source)
    source = re.sub(r"\([^()]*\)|\\\n", lambda match: match[0].replace("\n", " ").replace("\\", " "), source)
    for number, line in enumerate(source.split("\n"), 1):
        if _EXTERN.match(line):
            continue
        for statement in line.split(";"):
            if match := _FROM.match(statement):
                dots, base, names = match.groups()
                base = absolute(base, len(dots), module, is_package)
                for name in names.strip("() ").split(","):
                    if name.strip():
                        yield Import(number, f"{base}.{name.split()[0]}")
            elif match := _PLAIN.match(statement):
                for name in match[1].split(","):
                    yield Import(number, name.split()[0])


def imports_of(path: Path, package_parent: Path) -> Iterator[Import]:
    module = module_of(path, package_parent)
    read = python_imports if path.suffix in (".py", ".pyi") else cython_imports
    return read(path.read_text(encoding="utf-8"), module, path.stem == "__init__")


def is_module(name: str, package_parent: Path) -> bool:
    path = package_parent.joinpath(*name.split("."))
    return path.is_dir() or any(path.with_suffix(suffix).exists() for suffix in (".py", ".pyx", ".pxd"))


def violations(package_parent: Path) -> list[str]:
    """Each import in the ``zmqcore`` package under ``package_parent`` that its layer does not allow."""
    found = []
    for path in sorted(package_parent.joinpath("zmqcore").rglob("*")):
        if path.suffix not in (".py", ".pyi", ".pyx", ".pxd"):
            continue
        where = path.relative_to(package_parent)
        room = room_of(module_of(path, package_parent))
        if room not in LAYERS:
            found.append(f"{where}: room {room!r} is not in the table of layers")
            continue
        if path.suffix in (".pyx", ".pxd") and room not in COMPILED:
            found.append(f"{where}: only the core is compiled")
        for line, name in imports_of(path, package_parent):
            if name == "include":
                found.append(f"{where}: include chains hide who needs what; cimport instead")
            if any(fnmatchcase(name, promise) for promise in [*PROMISES.get(room, []), *BESIDE]):
                found.append(f"{where}:{line}: {room} promises not to import {name}")
            if name != "zmqcore" and not name.startswith("zmqcore."):
                continue
            target = room_of(name)
            # `from zmqcore import Client` names the package's own face, not a room below it.
            if target not in LAYERS and not is_module(f"zmqcore.{target}", package_parent):
                target = ""
            if target != room and target not in LAYERS[room]:
                found.append(
                    f"{where}:{line}: {room or 'zmqcore'} may not import {target or 'zmqcore'} ({name})"
                )
    return found


def test_every_import_points_down() -> None:
    assert violations(ROOT) == []


def test_every_compiled_module_has_a_stub_and_is_built() -> None:
    sources = {path.stem for path in ROOT.joinpath("zmqcore").rglob("*.pyx")}
    assert sources, "no compiled module found: is the test looking in the right place?"
    assert sources <= set(COMPILED)
    assert sources == {path.stem for path in ROOT.joinpath("zmqcore").glob("_*.pyi")}
    assert all(f'"{name}"' in ROOT.joinpath("setup.py").read_text(encoding="utf-8") for name in sources)


def test_the_table_has_no_cycle() -> None:
    """A table with a cycle would let a sideways import through."""
    placed: set[str] = set()
    rest = {room: set(below) for room, below in LAYERS.items()}
    while rest:
        ready = [room for room, below in rest.items() if below <= placed]
        assert ready, f"these import each other: {sorted(rest)}"
        placed.update(ready)
        for room in ready:
            del rest[room]


# -- that it can fail ----------------------------------------------------------------------------------------

BAD = [
    # upwards
    ("errors.py", "import zmqcore.topic", "errors may not import topic"),
    ("_frame.pyx", "from zmqcore cimport _socket", "_frame may not import _socket"),
    ("_frame.pxd", "cimport zmqcore._channel", "_frame may not import _channel"),
    ("_pool.pyx", "from zmqcore.codec import Codec", "_pool may not import codec"),
    ("topic.py", "from .matchmaker.base import Member", "topic may not import matchmaker"),
    ("node.py", "from zmqcore.rpc.client import Client", "node may not import rpc"),
    ("rpc/client.py", "from ..cli import main", "rpc may not import cli"),
    # sideways
    ("topic.py", "from . import endpoint", "topic may not import endpoint"),
    ("codec.py", "import zmqcore.topic as t", "codec may not import topic"),
    ("_channel.pyx", "from zmqcore._port cimport (\n    Port,\n)", "_channel may not import _port"),
    ("matchmaker/local.py", "from zmqcore import codec", "matchmaker may not import codec"),
    ("oslo/driver.py", "import zmqcore.cli", "oslo may not import cli"),
    # hidden
    ("topic.py", "def f():\n    from zmqcore.node import Node", "topic may not import node"),
    (
        "topic.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .node import Node",
        "topic may not import node",
    ),
    (
        "topic.py",
        "import importlib\nimportlib.import_module('.node', 'zmqcore')",
        "topic may not import node",
    ),
    ("_socket.pyx", "def f():\n    import os; import zmqcore._pool", "_socket may not import _pool"),
    # the package's own face from below
    ("rpc/client.py", "from zmqcore import Server", "rpc may not import zmqcore"),
    ("node.py", "import zmqcore", "node may not import zmqcore"),
    # promises
    ("rpc/client.py", "import zmq.asyncio", "rpc promises not to import zmq.asyncio"),
    ("rpc/server.py", "from zmqcore import _socket", "rpc promises not to import zmqcore._socket"),
    ("rpc/fast.pyx", "", "only the core is compiled"),
    ("_port.pyx", "import msgpack", "_port promises not to import msgpack"),
    ("_port.pyx", 'include "common.pxi"', "include chains"),
    ("cli/demo.py", "from bench.peer import main", "cli promises not to import bench.peer"),
    # a room nobody has placed
    ("utils.py", "", "not in the table"),
]


@pytest.mark.parametrize(("file", "source", "complaint"), BAD)
def test_a_bad_import_is_found(tmp_path: Path, file: str, source: str, complaint: str) -> None:
    for name in ("__init__.py", "topic.py", "endpoint.py", "node.py", "codec.py", "_frame.pyx", file):
        tmp_path.joinpath("zmqcore", name).parent.mkdir(parents=True, exist_ok=True)
        tmp_path.joinpath("zmqcore", name).write_text("", encoding="utf-8")
    assert violations(tmp_path) == [] or not source
    tmp_path.joinpath("zmqcore", file).write_text(source, encoding="utf-8")
    found = violations(tmp_path)
    assert found, "not seen"
    assert any(complaint in line for line in found), found


GOOD = [
    (
        "_channel.pyx",
        '"""Text:\nimport zmqcore.rpc\n"""\n# cimport zmqcore._port\nfrom zmqcore._socket cimport Socket',
    ),
    (
        "_libzmq.pyx",
        'cdef extern from "zmq.h" nogil:\n    int zmq_errno()\nimport zmq\nfrom zmqcore import errors',
    ),
    ("_frame.pyx", "from libc.string cimport memcpy\nfrom ._libzmq cimport table, fail"),
    (
        "rpc/server.py",
        "from .client import Client\nfrom ..errors import Closed\nfrom zmqcore.node import Node",
    ),
    ("cli/__init__.py", "from zmqcore import Client, errors\nfrom zmqcore._libzmq import library_path"),
]


@pytest.mark.parametrize(("file", "source"), GOOD)
def test_a_good_import_is_let_through(tmp_path: Path, file: str, source: str) -> None:
    for name in ("rpc/client.py", "node.py", file):
        tmp_path.joinpath("zmqcore", name).parent.mkdir(parents=True, exist_ok=True)
        tmp_path.joinpath("zmqcore", name).write_text("", encoding="utf-8")
    tmp_path.joinpath("zmqcore", file).write_text(source, encoding="utf-8")
    assert violations(tmp_path) == []
