"""What ``zmqcore doctor`` looks at: versions, libzmq, limits, directories, the matchmaker, and a call to
itself.

Each look is a function that returns facts and adds to the list of problems; one that fails is a problem
itself and does not keep the others from looking.
"""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import stat
import sys
import sysconfig
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgpack
import zmq

from zmqcore import Client, Node, Server, __version__, _libzmq, _pool
from zmqcore.cli.measure import open_fds, percentile
from zmqcore.endpoint import IPC_LIMIT_BYTES, probe
from zmqcore.matchmaker import open_matchmaker
from zmqcore.runtime_dir import runtime_directory

__all__ = ["Diagnosis", "Problem", "diagnose"]

# Enough for a stable median, and over before one wonders.
_SELF_TEST_CALLS = 300
_SELF_TEST_TIMEOUT = 5.0
# A node with a handful of peers, its logs and files: below this a small service runs into EMFILE.
_SMALL_NOFILE = 256
# "<pid>-<8 digits>.sock", with a pid of up to 10 digits.
_SOCKET_NAME_BYTES = 24
# Asking a local socket takes some 20 µs, so this bounds the look to a fraction of a second.
_MAX_PROBED = 5000
_MIN_MSGPACK = (1, 2, 1)


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is not as it should be, and what to do about it."""

    severity: Literal["broken", "warning"]
    where: str
    what: str
    advice: str


@dataclass(slots=True)
class Diagnosis:
    """The facts by section, and the problems found."""

    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is broken; warnings do not count."""
        return not any(problem.severity == "broken" for problem in self.problems)


_Add = Callable[[Literal["broken", "warning"], str, str], None]


def _cython_version() -> str:
    # Cython's function type lives in a module named after the version that compiled it: _cython_3_1_2.
    name = type(_libzmq.library_path).__module__
    return name.removeprefix("_cython_").replace("_", ".") if name.startswith("_cython_") else "unknown"


def _versions(add: _Add) -> dict[str, Any]:
    if tuple(msgpack.version[:3]) < _MIN_MSGPACK:
        add(
            "broken",
            f"msgpack {'.'.join(map(str, msgpack.version))} is older than {'.'.join(map(str, _MIN_MSGPACK))}",
            "pip install --upgrade msgpack",
        )
    if msgpack.Packer.__module__ == "msgpack.fallback":
        add(
            "warning",
            "msgpack runs in pure Python, many times slower",
            "pip install --force-reinstall msgpack, and see that MSGPACK_PUREPYTHON is not set",
        )
    return {
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "free_threaded": bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
        "executable": sys.executable,
        "zmqcore": __version__,
        "zmqcore_path": str(Path(_libzmq.__file__).parent),
        "pyzmq": zmq.pyzmq_version(),
        "libzmq": ".".join(map(str, _libzmq.library_version())),
        "msgpack": ".".join(map(str, msgpack.version)),
        "cython": _cython_version(),
        "system": platform.platform(),
    }


def _capability(name: str) -> bool:
    return _libzmq.has(name)


def _libzmq_facts(add: _Add) -> dict[str, Any]:
    capabilities = {
        name: _capability(name) for name in ("ipc", "curve", "gssapi", "pgm", "tipc", "norm", "vmci", "draft")
    }
    if not capabilities["ipc"]:
        add(
            "broken",
            "this libzmq has no ipc transport, which servers listen on by default",
            "pip install --force-reinstall pyzmq, for the wheel with its own libzmq",
        )
    if not capabilities["curve"]:
        add(
            "warning",
            "this libzmq has no CURVE: nothing can be encrypted or authenticated",
            "pip install --force-reinstall pyzmq, for the wheel with its own libzmq",
        )
    if zmq.zmq_version_info() != _libzmq.library_version():
        add(
            "broken",
            f"pyzmq uses libzmq {zmq.zmq_version()}, but zmqcore has found {_libzmq.library_version()}",
            "two libzmq cannot share sockets: see what else loads one (LD_PRELOAD, LD_LIBRARY_PATH)",
        )
    return {
        "path": os.path.realpath(_libzmq.library_path()),
        "version": ".".join(map(str, _libzmq.library_version())),
        "capabilities": capabilities,
    }


def _limit(value: int) -> int | None:
    return None if value == resource.RLIM_INFINITY else value


def _limits(add: _Add) -> dict[str, Any]:
    soft, hard = (_limit(value) for value in resource.getrlimit(resource.RLIMIT_NOFILE))
    if soft is not None and soft < _SMALL_NOFILE:
        add(
            "warning",
            f"only {soft} file descriptors are allowed, and each connection takes 2",
            f"ulimit -n {min(hard or 65536, 65536)}, or LimitNOFILE= in the systemd unit",
        )
    with zmq.Context() as context:
        max_sockets = context.get(zmq.MAX_SOCKETS)
        socket_limit = context.get(zmq.SOCKET_LIMIT)
    return {
        "nofile_soft": soft,
        "nofile_hard": hard,
        "libzmq_max_sockets_default": max_sockets,
        "libzmq_socket_limit": socket_limit,
    }


def _budget(add: _Add) -> dict[str, Any]:
    sockets = _pool.default_max_sockets()
    held = open_fds()
    soft = _limit(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    if sockets < 16:
        add(
            "warning",
            f"the limit on file descriptors leaves room for {sockets} connections only",
            "raise it (ulimit -n), or give Node(max_sockets=...) a number that you know to be right",
        )
    if soft is not None and held is not None and held > soft * 0.8:
        add(
            "warning", f"{held} of {soft} file descriptors are open already", "raise the limit with ulimit -n"
        )
    return {
        "max_sockets": sockets,
        "fds_at_most": 2 * sockets,
        "derived": _DERIVATION,
        "fds_open_now": held,
    }


_DERIVATION = (
    "a quarter of the soft limit (at least 128) is left to everything else; a socket takes 2 of the rest"
)


def _stale_sockets(directory: Path) -> tuple[int, list[str]]:
    """Return how many sockets lie in *directory*, and those of them at which nobody listens any more."""
    sockets = sorted(path for path in directory.iterdir() if stat.S_ISSOCK(path.lstat().st_mode))
    stale = [str(path) for path in sockets[:_MAX_PROBED] if probe(f"ipc://{path}", 0.5) is not None]
    return len(sockets), stale


def _runtime_directory(add: _Add) -> dict[str, Any]:
    named_by = next(
        (name for name in ("ZMQCORE_RUNTIME_DIR", "XDG_RUNTIME_DIR") if os.environ.get(name)), None
    )
    directory = runtime_directory()
    status = directory.stat()
    sockets, stale = _stale_sockets(directory)
    room = IPC_LIMIT_BYTES - len(os.fsencode(directory)) - 1
    if room < _SOCKET_NAME_BYTES:
        add(
            "broken",
            f"the path {directory} leaves {room} bytes for the names of sockets, too few",
            "set ZMQCORE_RUNTIME_DIR to a directory with a shorter path, such as /run/zmqcore",
        )
    if stale:
        add(
            "warning",
            f"the sockets of servers that are gone lie in {directory}: {len(stale)}",
            "they do no harm; to remove them: "
            "zmqcore doctor --json | jq -r '.runtime_directory.stale_sockets[]' | xargs rm",
        )
    return {
        "path": str(directory),
        "from": f"${named_by}" if named_by else "default",
        "mode": f"{stat.S_IMODE(status.st_mode):04o}",
        "owner": status.st_uid,
        "sockets": sockets,
        "stale_sockets": stale,
    }


def _matchmaker(url: str) -> dict[str, Any]:
    started = time.perf_counter()
    with open_matchmaker(url) as registry:
        topics = registry.topics()
        members = [member for topic in topics for member in registry.members(topic).members]
    return {
        "url": url,
        "topics": len(topics),
        "members": len(members),
        "read_ms": round((time.perf_counter() - started) * 1000, 3),
    }


class _Echo:
    def echo(self, value: bytes) -> bytes:
        """Return *value*."""
        return value


def _round_trips(transport: str) -> tuple[str, list[float]]:
    """Call a server in this very process; return where it listened and the round trips in µs."""
    payload = os.urandom(16)
    times = []
    with contextlib.ExitStack() as stack:
        # Its own registry and directory: a doctor must not be called by strangers.
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="zmqcore-doctor-"))
        bind = "tcp://127.0.0.1:*" if transport == "tcp" else f"ipc://{directory}/self-test"
        node = stack.enter_context(Node(matchmaker=f"memory://doctor-{uuid.uuid4()}"))
        server = stack.enter_context(Server("doctor", _Echo(), node=node, workers=0, bind=bind))
        endpoint = server.endpoints[0]
        client = stack.enter_context(
            Client("doctor", node=node, connect=endpoint, timeout=_SELF_TEST_TIMEOUT)
        )
        for _ in range(_SELF_TEST_CALLS):
            started = time.perf_counter()
            answer = client.call("echo", payload)
            times.append((time.perf_counter() - started) * 1e6)
            if bytes(answer) != payload:
                raise RuntimeError(f"sent {payload!r}, got {answer!r}")
    return endpoint, times


def _self_test(add: _Add) -> dict[str, Any]:
    """Make calls over each transport; what comes back must be what was sent."""
    facts: dict[str, Any] = {}
    for transport in ("tcp", "ipc"):
        try:
            endpoint, times = _round_trips(transport)
        except Exception as exc:  # noqa: BLE001 - whatever is wrong with the installation shows here
            facts[transport] = {"ok": False, "error": f"{type(exc).__name__}: {exc}"}
            add(
                "broken",
                f"a call over {transport} within this process fails: {type(exc).__name__}: {exc}",
                "see whether a firewall or sandbox forbids loopback connections"
                if transport == "tcp"
                else f"see whether sockets can be made in {tempfile.gettempdir()}",
            )
            continue
        first, *others = times
        others.sort()
        facts[transport] = {
            "ok": True,
            "endpoint": endpoint,
            "calls": _SELF_TEST_CALLS,
            "first_us": round(first, 1),
            "p50_us": round(percentile(others, 0.5), 1),
            "p99_us": round(percentile(others, 0.99), 1),
        }
    return facts


def _looks(matchmaker: str) -> Iterator[tuple[str, Callable[[_Add], dict[str, Any]], str]]:
    """Yield each section's name, its look, and what to do if the look itself fails."""
    yield "versions", _versions, "pip install --force-reinstall zmqcore"
    yield "libzmq", _libzmq_facts, "pip install --force-reinstall pyzmq zmqcore"
    yield "limits", _limits, "ulimit -n shows the limit on open files"
    yield "budget", _budget, "ulimit -n shows the limit on open files"
    yield (
        "runtime_directory",
        _runtime_directory,
        "set ZMQCORE_RUNTIME_DIR to a directory of your own, mode 0700",
    )
    yield (
        "matchmaker",
        lambda _add: _matchmaker(matchmaker),
        "see that --matchmaker (or ZMQCORE_MATCHMAKER) is right and what it names can be read",
    )
    yield "self_test", _self_test, "pip install --force-reinstall zmqcore"


def diagnose(matchmaker: str) -> Diagnosis:
    """Look at everything and return what was found; *matchmaker* is the URL of the registry to look at.

    Creates the runtime directory if it is missing, as the first server or client would.
    """
    diagnosis = Diagnosis()
    for section, look, advice in _looks(matchmaker):

        def add(
            severity: Literal["broken", "warning"], what: str, to_do: str, section: str = section
        ) -> None:
            diagnosis.problems.append(Problem(severity, section, what, to_do))

        try:
            diagnosis.facts[section] = look(add)
        except Exception as exc:  # noqa: BLE001 - the other looks shall go on
            diagnosis.facts[section] = {"error": f"{type(exc).__name__}: {exc}"}
            what = str(exc) or type(exc).__name__
            # Told once: the local registry is in the runtime directory, too.
            if not any(problem.what == what for problem in diagnosis.problems):
                add("broken", what, advice)
    return diagnosis
