"""Where a member listens: ``tcp://``, ``ipc://`` and ``inproc://`` addresses, checked before use."""

from __future__ import annotations

import errno
import re
import socket
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from typing import Any, Final

from zmqcore.errors import InvalidEndpoint
from zmqcore.resolver import addresses

__all__ = ["INPROC_LIMIT_BYTES", "IPC_LIMIT_BYTES", "Endpoint", "Refusal", "in_option", "numeric", "probe"]

#: ``sun_path`` has 108 bytes on Linux and 104 elsewhere; libzmq keeps one for a NUL, also in ``@name``.
IPC_LIMIT_BYTES: Final = 107 if sys.platform == "linux" else 103
#: libzmq itself has no limit; this one keeps the name loggable.
INPROC_LIMIT_BYTES: Final = 256

_TRANSPORTS = ("tcp", "ipc", "inproc")
_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?\.?")
_PORT = re.compile("[1-9][0-9]{0,4}")
_LOOKS_LIKE_IPV4 = re.compile(r"[0-9.]+")
#: An endpoint without a host name. Nothing else is asked of most.
_IS_NUMERIC = re.compile(r"tcp://(\[|[0-9.]+:)|ipc:|inproc:")
#: What this process or host is short of, whatever the endpoint is like.
_LACKS: Final = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL, errno.EAGAIN}
)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One address, immutable and hashable. Made by :meth:`parse`; ``str()`` is the canonical text.

    ``transport`` is ``"tcp"``, ``"ipc"`` or ``"inproc"``. For tcp, ``host`` is a name in lower case or an
    address (IPv6 without its brackets) and ``port`` a number, or ``None`` for a port that bind is to choose.
    For ipc, ``path`` is the absolute path or ``@name`` in Linux's abstract namespace, for inproc the name.
    """

    transport: str
    host: str = ""
    port: int | None = None
    path: str = ""

    @classmethod
    def parse(cls, text: str, *, bind: bool = False) -> Endpoint:
        """Read an endpoint.

        ``bind=True`` also takes what only a bound socket can have: the host ``*`` (every interface), the port
        ``*`` or ``0`` (one that is free), and ``ipc://*`` (a fresh temporary path).

        Raises :class:`~zmqcore.errors.InvalidEndpoint` (a ``ValueError``) that says what is wrong and what
        was expected. Nothing is resolved or opened.
        """
        if not isinstance(text, str):
            raise InvalidEndpoint(f"an endpoint is a str, not {type(text).__name__}: {text!r}")
        transport, separator, rest = text.partition("://")
        if not separator or transport not in _TRANSPORTS:
            raise InvalidEndpoint(f"endpoint {text!r} must start with tcp://, ipc:// or inproc://")
        if any(ord(char) < 0x20 or ord(char) == 0x7F for char in rest):
            raise InvalidEndpoint(f"endpoint {text!r} holds a control character")
        if transport == "tcp":
            return _parse_tcp(text, rest, bind)
        try:
            size = len(rest.encode())
        except UnicodeEncodeError as exc:
            raise InvalidEndpoint(f"endpoint {text!r} has no UTF-8 form: {exc.reason}") from exc
        if transport == "inproc":
            if not 0 < size <= INPROC_LIMIT_BYTES:
                raise InvalidEndpoint(
                    f"endpoint {text!r}: the name is {size} bytes long; it may have 1 to {INPROC_LIMIT_BYTES}"
                )
            return cls("inproc", path=rest)
        if rest == "*" and bind:
            return cls("ipc", path=rest)
        if rest[:1] == "@":
            if size == 1:
                raise InvalidEndpoint(f"endpoint {text!r}: nothing stands after the @")
        elif rest[:1] != "/" or rest.endswith("/"):
            # A relative path means another file in every working directory.
            raise InvalidEndpoint(
                f"endpoint {text!r}: expected the absolute path of a socket (ipc:///…) or ipc://@name"
            )
        if size > IPC_LIMIT_BYTES:
            raise InvalidEndpoint(
                f"endpoint {text!r}: the path is {size} bytes long;"
                f" a local socket's may have {IPC_LIMIT_BYTES}"
            )
        return cls("ipc", path=rest)

    @property
    def is_local_ipc(self) -> bool:
        """Whether only processes on this host can reach it, through a local socket."""
        return self.transport == "ipc"

    @property
    def is_wildcard(self) -> bool:
        """Whether bind has yet to choose host, port or path: nobody can connect to it as it stands."""
        if self.transport == "tcp":
            return self.host == "*" or self.port is None
        return self.transport == "ipc" and self.path == "*"

    def __str__(self) -> str:
        if self.transport != "tcp":
            return f"{self.transport}://{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp://{host}:{'*' if self.port is None else self.port}"


def in_option(name: str, value: Any, *, bind: bool = False) -> tuple[str, ...]:
    """Return ``value``, what was given as the option ``name``: one endpoint or several, each as Endpoint.parse() wants.

    Raises InvalidEndpoint also if there is none, TypeError for what is no text and no list.
    """
    if isinstance(value, str):
        value = (value,)
    elif not isinstance(value, Iterable):
        raise TypeError(f"{name} is {value!r}; it must be an endpoint, or a list of them")
    made = tuple(value)
    if not made:
        raise InvalidEndpoint(f"{name} is empty; name one endpoint at least")
    for text in made:
        Endpoint.parse(text, bind=bind)
    return made


def _parse_tcp(text: str, rest: str, bind: bool) -> Endpoint:
    if rest[:1] == "[":
        inside, bracket, after = rest[1:].partition("]")
        if not bracket or after[:1] != ":":
            raise InvalidEndpoint(f"endpoint {text!r}: expected tcp://[address]:port")
        try:
            host = str(IPv6Address(inside))
        except AddressValueError as exc:
            raise InvalidEndpoint(f"endpoint {text!r}: {inside!r} is not an IPv6 address") from exc
        port_text = after[1:]
    else:
        host, colon, port_text = rest.rpartition(":")
        if not colon:
            raise InvalidEndpoint(f"endpoint {text!r} has no port; expected tcp://host:port")
        if ":" in host:
            raise InvalidEndpoint(
                f"endpoint {text!r}: an IPv6 address goes in brackets: tcp://[{host}]:{port_text}"
            )
        if host == "*":
            if not bind:
                raise InvalidEndpoint(f"endpoint {text!r}: one can bind to '*' but not connect; name a host")
        elif len(host) > 255 or not _HOST.fullmatch(host):
            raise InvalidEndpoint(f"endpoint {text!r}: {host!r} is not a host name or address")
        elif _LOOKS_LIKE_IPV4.fullmatch(host):
            try:
                IPv4Address(host)
            except AddressValueError as exc:
                raise InvalidEndpoint(f"endpoint {text!r}: {exc}") from exc
        host = host.lower()
    if port_text == "*" or port_text == "0":
        if not bind:
            raise InvalidEndpoint(f"endpoint {text!r}: only bind can choose a port; expected 1 to 65535")
        return Endpoint("tcp", host)
    # Not int(): that takes "+1", "1_0" and digits of other scripts.
    if not _PORT.fullmatch(port_text) or int(port_text) > 65_535:
        raise InvalidEndpoint(f"endpoint {text!r}: the port is {port_text!r}; expected 1 to 65535")
    return Endpoint("tcp", host, int(port_text))


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why nothing can be reached at an endpoint, as ``reason``, which is also its ``str()``.

    ``final`` is false if another try may well succeed: no answer in time, or a full backlog. ``local`` is true if it
    says nothing about the endpoint: this process or host has no descriptor, port or memory left to ask with.
    """

    reason: str
    final: bool = True
    local: bool = False

    def __str__(self) -> str:
        return self.reason


def probe(endpoint: str, timeout: float) -> Refusal | None:
    """Say why nothing can be reached at ``endpoint``, or return ``None`` if something accepts there.

    A plain ``connect()`` that libzmq has no part in, closed at once. It takes at most ``timeout`` seconds, for a name's
    resolution and all its addresses together. ``inproc`` has nothing to connect to and always gives ``None``. For
    diagnosis only: the answer is a moment old when it arrives.

    Raises :class:`~zmqcore.errors.InvalidEndpoint` for what is no endpoint. Thread-safe; holds no resources
    after it has returned, but for the thread that looks up a name.
    """
    where = Endpoint.parse(endpoint)
    if where.transport == "inproc":
        return None
    if where.transport == "ipc":
        return _ask(socket.AF_UNIX, "\0" + where.path[1:] if where.path[0] == "@" else where.path, timeout)
    deadline = time.monotonic() + timeout
    refusal: Refusal | None = None
    try:
        for host in [where.host] if _IS_NUMERIC.match(endpoint) else addresses(where.host, timeout):
            left = deadline - time.monotonic()
            if left <= 0 and refusal is not None:
                break
            # Numeric: never blocks, and knows what a zone is.
            ((family, *_, address),) = socket.getaddrinfo(
                host, where.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
            )
            refusal = _ask(family, address, left)
            if refusal is None:
                break
    except OSError as exc:
        return _unresolved(where, exc)
    return refusal


def numeric(endpoint: str, timeout: float) -> str | Refusal:
    """Return ``endpoint`` with an IPv4 address in place of a host name, so that nobody else has to look that up.

    What holds no name is returned as it is. Of several addresses it is the first one that accepts a connection, tried
    one after the other. Takes at most ``timeout`` seconds; else, and if there is none, returns why.

    Raises and thread-safety as for :func:`probe`.
    """
    if _IS_NUMERIC.match(endpoint):
        return endpoint
    where = Endpoint.parse(endpoint)
    deadline = time.monotonic() + timeout
    try:
        hosts = addresses(where.host, timeout)
    except OSError as exc:
        return _unresolved(where, exc)
    refusal = Refusal("it has no address")
    for n_left, host in zip(range(len(hosts), 0, -1), hosts, strict=True):
        if len(hosts) > 1:
            refused = _ask(socket.AF_INET, (host, where.port), (deadline - time.monotonic()) / n_left)
            if refused is not None:
                refusal = refused
                continue
        return f"tcp://{host}:{where.port}"
    return refusal


def _ask(family: int, address: object, timeout: float) -> Refusal | None:
    """Connect and close again; return why that is not possible within ``timeout`` seconds."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            # 0 would mean: do not wait at all, and report "in progress".
            sock.settimeout(max(timeout, 1e-3))
            sock.connect(address)  # type: ignore[arg-type]
    except TimeoutError:
        return Refusal(f"timed out after {timeout:.3g} s", final=False)
    except BlockingIOError:
        # A local socket answers a full backlog at once instead of queueing the connect.
        return Refusal("its backlog is full: something listens there, but does not accept", final=False)
    except OSError as exc:
        return _refusal(exc)
    return None


def _unresolved(where: Endpoint, exc: OSError) -> Refusal:
    if isinstance(exc, TimeoutError):
        return Refusal(f"{where.host}: {exc}", final=False)
    refusal = _refusal(exc)
    return Refusal(f"{where.host}: {refusal}", refusal.final, refusal.local)


def _refusal(exc: OSError) -> Refusal:
    text = exc.strerror or str(exc)
    text = text[:1].lower() + text[1:]
    # A gaierror's numbers are others.
    lacks = (socket.EAI_MEMORY,) if isinstance(exc, socket.gaierror) else _LACKS
    if exc.errno in lacks:
        return Refusal(f"it cannot be asked from here: {text}", final=False, local=True)
    return Refusal(text)
