from typing_extensions import disjoint_base

__all__ = ["LedSocket"]

@disjoint_base
class LedSocket: ...
