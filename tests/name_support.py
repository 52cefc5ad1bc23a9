"""Host names of a test's own, which the system's resolver, and so libzmq, does not know."""

from __future__ import annotations

import socket
import threading
from types import TracebackType
from typing import Any, Self

import pytest
from waiting_support import PATIENCE

from zmqcore import resolver


class Names:
    """What getaddrinfo(3) says of names that end in ``.test``: the addresses in ``known``, once ``answers`` is set.

    ``asked`` are the names that were looked up, in order. The resolver of this process begins anew.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.known: dict[str, list[str]] = {}
        self.asked: list[str] = []
        self.answers = threading.Event()
        self.answers.set()
        self._real = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", self._getaddrinfo)
        monkeypatch.setattr(resolver, "_resolver", resolver._Resolver())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.answers.set()  # or its thread would stay

    def _getaddrinfo(self, host: str, port: Any, *args: Any, **options: Any) -> list[Any]:
        if not host.endswith(".test"):
            return self._real(host, port, *args, **options)
        self.asked.append(host)
        assert self.answers.wait(PATIENCE)
        if host not in self.known:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in self.known[host]]
