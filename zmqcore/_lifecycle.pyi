from typing_extensions import disjoint_base

__all__ = ["Lifecycle"]

@disjoint_base
class Lifecycle:
    @property
    def max_sockets(self) -> int: ...
    def maintain(self) -> float | None: ...
    def close(self, timeout: float = 5.0) -> bool: ...
