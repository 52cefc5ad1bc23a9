from collections.abc import Callable
from typing import Any, final

import zmq
from typing_extensions import Buffer

from zmqcore._frame import Envelope
from zmqcore._pending import Pending, Requester
from zmqcore._retention import Lane, Retained

__all__ = ["Channel"]

@final
class Channel(Requester):
    @property
    def created_ns(self) -> int: ...
    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        *,
        window_messages: int = 4096,
        window_bytes: int = ...,
        max_bytes: int = ...,
        max_buffers: int = 1024,
        liveness: float = 5.0,
        spin: float = 100e-6,
        configure: Callable[[zmq.Socket[bytes]], object] | None = None,
        attention: Callable[[Channel], object] | None = None,
        undelivered: Callable[[list[Retained]], object] | None = None,
        address: str | None = None,
    ) -> None: ...
    def call(
        self,
        topic: bytes,
        method: str,
        body: Buffer,
        buffers: list[Any] | None,
        metadata: bytes,
        codec: int,
        timeout: float | None,
    ) -> Envelope: ...
    def submit(
        self,
        topic: bytes,
        method: str,
        body: Buffer,
        buffers: list[Any] | None,
        metadata: bytes,
        codec: int,
        timeout: float | None,
        callback: Callable[[Pending], object] | None,
        hurry: bool = True,
    ) -> Pending: ...
    def submit_nowait(
        self,
        topic: bytes,
        method: str,
        body: Buffer,
        buffers: list[Any] | None,
        metadata: bytes,
        codec: int,
        timeout: float | None,
        callback: Callable[[Pending], object] | None,
    ) -> Pending: ...
    def send(
        self,
        kind: str,
        topic: bytes,
        method: str,
        body: Buffer,
        buffers: list[Any] | None,
        metadata: bytes,
        codec: int,
        timeout: float | None,
        expires: bool = False,
    ) -> int: ...
    def send_now(
        self,
        kind: str,
        topic: bytes,
        method: str,
        body: Buffer,
        buffers: list[Any] | None,
        metadata: bytes,
        codec: int,
        lane: Lane | None = None,
    ) -> int: ...
    def send_accepted(
        self,
        lane: Lane,
        kind: str,
        topic: bytes,
        method: str,
        body: Buffer,
        buffers: list[Any] | None,
        metadata: bytes,
        codec: int,
        timeout: float | None,
    ) -> int: ...
    def send_again(self, retained: Retained, lane: Lane, timeout: float | None) -> int: ...
    def ping(self, timeout: float | None = 5.0) -> float: ...
    def wait_open(self, timeout: float | None = None) -> bool: ...
    def await_finished(self, lane: Lane, timeout: float) -> bool: ...
    def attend(self) -> float | None: ...
    def adopt(self) -> bool: ...
    def disown(self) -> None: ...
    def retire(self, on_clean: Callable[[Channel], object], timeout: float = 5.0) -> None: ...
    def keep(self) -> None: ...
    def look(self) -> None: ...
    def settle(self) -> bool: ...
    def close(self) -> None: ...
    @property
    def state_name(self) -> str: ...
    @property
    def usable(self) -> bool: ...
    @property
    def clean(self) -> bool: ...
    @property
    def led(self) -> bool: ...
    @property
    def unhurried(self) -> bool: ...
    @property
    def fd(self) -> int: ...
    @property
    def peer_instance(self) -> bytes | None: ...
    @property
    def limits(self) -> tuple[int, int]: ...
    def stats(self) -> dict[str, int]: ...
