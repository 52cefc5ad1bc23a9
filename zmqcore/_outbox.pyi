from typing import final

from zmqcore._socket import SharedSocket

__all__ = ["Outbox"]

@final
class Outbox:
    n_batches: int
    n_batched: int
    def __init__(self, shared: SharedSocket) -> None: ...
