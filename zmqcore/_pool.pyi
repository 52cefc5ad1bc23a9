from collections.abc import Callable
from typing import Any, Protocol

from typing_extensions import Buffer, disjoint_base

from zmqcore._channel import Channel
from zmqcore._frame import Envelope
from zmqcore._lifecycle import Lifecycle
from zmqcore._pending import Pending
from zmqcore._retention import Lane

__all__ = ["ChannelPool", "default_max_sockets"]

def default_max_sockets() -> int: ...

class _Refusal(Protocol):
    @property
    def reason(self) -> str: ...
    @property
    def final(self) -> bool: ...
    @property
    def local(self) -> bool: ...

class _Holder(Protocol):
    def give_way(self) -> None: ...

@disjoint_base
class ChannelPool(Lifecycle):
    @property
    def max_sockets_per_endpoint(self) -> int: ...
    @property
    def max_waiting(self) -> int: ...
    def __init__(
        self,
        connect: Callable[..., Channel],
        *,
        max_sockets: int | None = None,
        max_sockets_per_endpoint: int = 1,
        idle_ttl: float = 300.0,
        max_lifetime: float = 3600.0,
        acquire_timeout: float = 30.0,
        max_waiting: int = 10_000,
        connect_timeout: float = 2.0,
        drain_timeout: float = 5.0,
        resolve: Callable[[str, float], str | _Refusal] | None = None,
        probe: Callable[[str, float], _Refusal | None] | None = None,
        maintenance: Callable[[ChannelPool], object] | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None: ...
    def acquire_open(self, endpoint: str) -> Channel | None: ...
    def acquire(
        self, endpoint: str, timeout: float | None = None, *, persistent: bool = False
    ) -> Channel: ...
    def release(self, channel: Channel) -> None: ...
    def call(
        self,
        endpoint: str,
        topic: bytes,
        method: str,
        body: Buffer,
        buffers: list[Any] | None,
        metadata: bytes,
        codec: int,
        timeout: float | None,
    ) -> Envelope: ...
    def send(
        self,
        endpoint: str,
        kind: str,
        topic: bytes,
        method: str,
        body: Buffer,
        buffers: list[Any] | None,
        metadata: bytes,
        codec: int,
        timeout: float | None,
    ) -> int: ...
    def send_now(
        self,
        endpoint: str,
        kind: str,
        topic: bytes,
        method: str,
        body: Buffer,
        buffers: list[Any] | None,
        metadata: bytes,
        codec: int,
        lanes: dict[str, Lane] | None = None,
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
    def submit(
        self,
        endpoint: str,
        topic: bytes,
        method: str,
        body: Buffer,
        buffers: list[Any] | None,
        metadata: bytes,
        codec: int,
        callback: Callable[[Pending], object] | None,
        timeout: float | None,
        hurry: bool = True,
    ) -> Pending: ...
    def add_holder(self, holder: _Holder) -> None: ...
    @property
    def waiting(self) -> int: ...
    def pin(self, endpoint: str) -> None: ...
    def unpin(self, endpoint: str) -> None: ...
    def stats(self) -> dict[str, Any]: ...
    def snapshot(self) -> list[dict[str, Any]]: ...
    def channels(self) -> list[Channel]: ...
