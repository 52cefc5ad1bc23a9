# cython: language_level=3, embedsignature=True, auto_pickle=False, freethreading_compatible=True
"""The compiled base of the msgpack codec: an encoder and a decoder under one set of limits."""

from zmqcore._decoder cimport decoded
from zmqcore._encoder cimport encoded
from zmqcore._msgpack cimport EXT_BUFFER_CODE, ZMQCORE_MAX_DEPTH, Limits

MAX_DEPTH = ZMQCORE_MAX_DEPTH
EXT_BUFFER = EXT_BUFFER_CODE


cdef class BodyCodec:
    """The compiled base of the msgpack codec.

    It keeps the limits that a subclass gives to ``_keep``, and without them has no room for anything. It
    holds numbers only, so it is thread-safe. A subclass has two methods:

    * ``encode_any(value, buffers) -> bytes`` for what ``encode`` leaves to it: a value that is not made of
      exactly None, bool, int, float, str, bytes, bytearray, contiguous memoryview, tuple, list, and dict with
      str keys; a nesting over 16; a body over 1 MiB; and all that is an error;
    * ``read_ext(code, data, buffers) -> object`` for the value of an extension type; *buffers* is a
      ``_decoder.Buffers``.
    """

    cdef Limits limits

    def _keep(
        self,
        Py_ssize_t message_bytes,
        Py_ssize_t buffers,
        Py_ssize_t inline_bytes,
        Py_ssize_t elements,
        Py_ssize_t depth,
    ):
        """Set the limits; before the first use, by the subclass's constructor only."""
        self.limits.message_bytes = message_bytes
        self.limits.buffers = buffers
        self.limits.inline_bytes = inline_bytes
        self.limits.elements = elements
        self.limits.depth = <int>min(depth, <Py_ssize_t>ZMQCORE_MAX_DEPTH)

    def encode(self, value, list buffers not None):
        """Return *value* as a body; large buffers in it are appended to *buffers*. See ``Codec.encode``."""
        body = encoded(value, buffers, &self.limits)
        return self.encode_any(value, buffers) if body is None else body

    def decode(self, body, buffers):
        """Return the value in *body*, whose large buffers are in *buffers*. See ``Codec.decode``."""
        return decoded(body, buffers, &self.limits, self)
