from typing import Any, Final

from typing_extensions import disjoint_base

MAX_DEPTH: Final[int]
EXT_BUFFER: Final[int]

@disjoint_base
class BodyCodec:
    def _keep(
        self, message_bytes: int, buffers: int, inline_bytes: int, elements: int, depth: int
    ) -> None: ...
    def encode(self, value: Any, buffers: list[Any]) -> bytes: ...
    def decode(self, body: Any, buffers: Any) -> Any: ...
