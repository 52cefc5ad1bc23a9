from typing import final

from zmqcore._socket import SharedSocket

__all__ = ["Outbox"]

@final
class Outbox:
    @property
    def n_batches(self) -> int: ...
    @property
    def n_batched(self) -> int: ...
    def __init__(self, shared: SharedSocket) -> None: ...
