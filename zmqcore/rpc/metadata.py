"""What accompanies a request besides its arguments, for those in between: a trace, a tenant, a language."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from zmqcore import errors
from zmqcore.codec import Codec

__all__ = ["IDEMPOTENCY_KEY", "Metadata", "current", "decode", "encode", "metadata"]

Metadata = Mapping[str, Any]

#: The key under which ``prepare(idempotency_key=…)`` travels.
IDEMPOTENCY_KEY = "idempotency-key"

#: It is there to be read by everybody on the way: what is large belongs into the arguments.
_MAX_BYTES = 64 << 10

#: That of the request that is being handled.
current: ContextVar[Metadata] = ContextVar("zmqcore_metadata")


def metadata() -> dict[str, Any]:
    """Return what the caller of the request that is being handled has sent along with it; empty if nothing.

    It is not passed on to what the handler calls in turn, unless the handler does so.
    """
    return dict(current.get({}))


def encode(values: Metadata | None, codec: Codec) -> bytes:
    """Return ``values`` as they travel. Raises BadArguments, and PayloadTooLarge above 64 KiB."""
    if not values:
        return b""
    for key in values:
        if not isinstance(key, str):
            raise errors.BadArguments(f"metadata has the key {key!r}; keys are str")
    buffers: list[Any] = []
    packed = bytes(codec.encode(dict(values), buffers))
    if buffers or len(packed) > _MAX_BYTES:
        size = len(packed) + sum(memoryview(buffer).nbytes for buffer in buffers)
        raise errors.PayloadTooLarge(
            f"metadata of {size} bytes; the limit is {_MAX_BYTES}, and less for one buffer"
        )
    return packed


def decode(packed: bytes, codec: Codec) -> Metadata:
    """Return what has travelled as ``packed``. Raises ProtocolError and PayloadTooLarge."""
    if len(packed) > _MAX_BYTES:
        raise errors.PayloadTooLarge(f"metadata of {len(packed)} bytes; the limit is {_MAX_BYTES}")
    values = codec.decode(packed, ())
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise errors.ProtocolError("the metadata is not a map with text as keys")
    return values
