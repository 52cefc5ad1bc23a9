"""Codecs: what turns arguments and results into a message's body and its out-of-band buffers, and back.

A codec is known by the id that travels in the envelope. :class:`MsgpackCodec` (id 1) is the default. Never
pickle: what a peer sends can become plain values and arrays, and nothing else.

The body of ``msgpack``
=======================

One value of the `MessagePack specification <https://github.com/msgpack/msgpack/blob/master/spec.md>`_, and
nothing after it. A call's value is the array ``[args, kwargs]`` (an array and a map with string keys); a reply's
is the result itself. ``bin`` is used for bytes, ``str`` holds UTF-8. The shortest form of each number and length
is sent; every form is accepted.

Buffers at or above the threshold (32 KiB by default, the sender's choice) follow the body as further parts of the
message. The body refers to each of them exactly once, by its index from 0. These extension types are defined;
all numbers inside them are little-endian:

==== ===================== ==================================================================================
code what                  data
==== ===================== ==================================================================================
-1   time                  MessagePack's timestamp (32, 64 or 96 bits): a moment, without a time zone of its own
1    bytes, out of band    ``index: u32``
2    array, in the body    ``typecode: u8, itemsize: u8``, then the items
3    array, out of band    ``typecode: u8, itemsize: u8, index: u32``
4    ndarray, in the body  ``length: u8, dtype: length × ASCII, ndim: u8, shape: ndim × u64``, then the items
5    ndarray, out of band  as 4, but ``index: u32`` instead of the items
==== ===================== ==================================================================================

* *typecode* is one of ``bBhHiIlLqQfd`` as in Python's ``array``; *itemsize* is 1, 2, 4 or 8 and says how many
  bytes an item really has (4 and 8 for ``f`` and ``d``). Lower case is signed.
* *dtype* is NumPy's ``dtype.str``: ``<`` or ``|``, then a kind and a size in bytes (``b1``, ``i`` and ``u`` with 1, 2,
  4 or 8, ``f2 f4 f8``, ``c8 c16``, ``S`` and ``V`` with any size, ``U`` with a size in code points of 4 bytes), or
  ``M8`` or ``m8`` with a unit in brackets. Items are in C order. *ndim* is at most 64; the product of *shape* and
  the item's size is exactly the length of the items.
* All other codes are refused.

An *element* is any value, container or map key; *depth* counts the containers around a value. A receiver refuses a
body over its limits before it makes anything of it.

What comes back
===============

========================================================= ========================================================
sent                                                      received
========================================================= ========================================================
None, bool, int (64 bits), float, str, bytes, dict        the same (subclasses: the plain type)
list, tuple (also named)                                  list
datetime with a time zone                                 datetime in UTC
bytearray, memoryview (contiguous or not, any format)     bytes
bytes, bytearray, memoryview from the threshold on        read-only memoryview of bytes; no copy on either side
any other object with the buffer protocol                 as a memoryview
array.array                                               array.array
array.array from the threshold on                         read-only memoryview of the same format
numpy.ndarray (fixed-size dtypes, any byte order)         read-only ndarray, or a memoryview if there is no NumPy
NumPy's bool, integer and floating scalars                bool, int, float
========================================================= ========================================================

Everything else is :class:`~zmqcore.errors.BadArguments`, with the path to the value.
"""

from __future__ import annotations

import array
import datetime
import math
import re
import struct
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

from msgpack import ExtType, Packer, Timestamp, unpackb

from zmqcore._body import EXT_BUFFER, MAX_DEPTH, SmallBodyCodec, Unpackable, lift, scan
from zmqcore.errors import BadArguments, PayloadTooLarge, ProtocolError, ZmqcoreError

__all__ = ["Codec", "Limits", "MsgpackCodec", "get_codec", "register_codec"]

EXT_ARRAY = 2
EXT_ARRAY_OUT = 3
EXT_NDARRAY = 4
EXT_NDARRAY_OUT = 5

_BIG_ENDIAN = sys.byteorder == "big"
_INDEX = struct.Struct("<I")
_ARRAY_HEAD = struct.Struct("<BB")
_ARRAY_CODES = "bBhHiIlLqQfd"
# NumPy's own limit since 2.0 (before, it is 32, and NumPy itself refuses).
_MAX_NDIM = 64
_DTYPE = re.compile(
    r"(?:\|b1|[<|][iu]1|<[iu][248]|<f[248]|<c(?:8|16)|\|[SV]\d{1,9}|<U\d{1,9}"
    r"|<[mM]8(?:\[\d{0,9}(?:Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as)\])?)"
)
# dtypes that memoryview can show as they are, for a receiver without NumPy.
_VIEW_FORMATS = {
    "|b1": "?", "|i1": "b", "|u1": "B", "<i2": "h", "<u2": "H", "<i4": "i", "<u4": "I", "<i8": "q", "<u8": "Q",
    "<f4": "f", "<f8": "d",
}  # fmt: skip
# A Packer keeps the largest buffer it ever needed: one that grew beyond this is not kept for the next message.
_PACKER_KEPT_BYTES = 1 << 20
# Idle packers kept per codec; with more threads than this packing at once, the surplus is made anew each time.
_PACKERS_KEPT = 8


@dataclass(frozen=True, slots=True)
class Limits:
    """What one message may hold. Refused at the sender first, and by the receiver before it is decoded.

    ``message_bytes``: body and buffers together, in bytes. ``depth``: containers within containers, the array of
    ``args`` and ``kwargs`` included; at most 512. ``elements``: values, containers and map keys together (an array or
    a bytes object is one). ``buffers``: out-of-band buffers. ``inline_bytes``: a buffer of this size or above goes out
    of band, in bytes.
    """

    message_bytes: int = 256 << 20
    depth: int = 64
    elements: int = 1_000_000
    buffers: int = 1024
    inline_bytes: int = 32 << 10

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value < 1 << 62:
                raise BadArguments(f"the limit {name} must be a positive int, not {value!r}")
        if self.depth > MAX_DEPTH:
            raise BadArguments(f"the limit depth is {self.depth}, but more than {MAX_DEPTH} is not supported")
        if self.buffers >= 1 << 32:
            raise BadArguments(f"the limit buffers is {self.buffers}, but the wire has 32 bits for an index")


@runtime_checkable
class Codec(Protocol):
    """What a codec must offer. All of it is called by many threads at once."""

    @property
    def id(self) -> int:
        """The id on the wire, 1 to 255. 1 to 127 are reserved for zmqcore."""

    @property
    def name(self) -> str:
        """The name that people use for it."""

    def encode(self, value: Any, buffers: list[Any]) -> Any:
        """Return the body for *value* as a bytes-like object.

        Objects with a C-contiguous buffer that are to travel out of band are appended to *buffers* (an empty list
        of the caller's), which afterwards holds references to the caller's own objects: they must not be changed
        until the message has been sent. *value* itself is never changed.

        Raises ``BadArguments`` for a value that has no form on the wire, and ``PayloadTooLarge`` over a limit;
        *buffers* is then of no use.
        """

    def decode(self, body: Any, buffers: Sequence[memoryview]) -> Any:
        """Return the value in *body* (any object with a contiguous buffer of bytes) and its *buffers*.

        The value owns what it needs: of *body* nothing is kept, of *buffers* only views of the buffers.

        Raises ``ProtocolError`` for bytes that are not a valid body, and ``PayloadTooLarge`` over a limit.
        """


class MsgpackCodec(SmallBodyCodec):
    """MessagePack, with arrays, and large buffers out of band. The module's docstring has the wire format.

    ``encode`` and ``decode`` are compiled: small bodies of plain types take one pass there, all others come to the
    two methods below. Thread-safe; can be used across a fork.
    """

    id = 1
    name = "msgpack"

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits = Limits() if limits is None else limits
        super().__init__(inline_bytes=limits.inline_bytes, depth=limits.depth, elements=limits.elements)
        # Idle packers. list.append and list.pop are atomic, with and without the GIL.
        self._idle: list[_Packing] = []
        if limits.message_bytes < 1 << 16:  # the compiled path does not look at the size of a body
            super().__init__(inline_bytes=limits.inline_bytes, depth=limits.depth, elements=0)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.limits!r})"

    def with_limits(self, limits: Limits) -> MsgpackCodec:
        """Return a codec of the same wire format that keeps *limits*."""
        return type(self)(limits)

    def encode_any(self, value: Any, buffers: list[Any]) -> bytes:
        """Encode what the compiled path leaves: large or nested bodies, arrays, subclasses, and all errors."""
        limits = self.limits
        try:
            packing = self._idle.pop()
        except IndexError:
            packing = _Packing(limits.inline_bytes)
        packing.buffers = buffers
        try:
            body = packing.pack(lift(value, buffers, limits.inline_bytes, limits.depth, limits.elements))
        except Unpackable as exc:
            raise _refusal(value, exc.value, exc.reason) from exc.__cause__
        except UnicodeEncodeError as exc:
            raise _refusal(value, exc.object, "it has lone surrogates, which UTF-8 cannot hold") from exc
        except (ZmqcoreError, MemoryError):
            raise
        except Exception as exc:
            raise BadArguments(f"cannot pack the payload: {exc}") from exc
        packing.buffers = _NO_BUFFERS
        if len(body) <= _PACKER_KEPT_BYTES and len(self._idle) < _PACKERS_KEPT:
            self._idle.append(packing)
        _check_size(len(body), buffers, limits)
        return body

    def decode_any(self, body: Any, buffers: Sequence[memoryview]) -> Any:
        """Decode what the compiled path leaves, the malformed included."""
        limits = self.limits
        with memoryview(body) as view:
            _check_size(view.nbytes, buffers, limits)
        scan(body, limits.depth, limits.elements)
        reader = _ExtReader(buffers)
        try:
            value = unpackb(body, timestamp=3, strict_map_key=False, ext_hook=reader.read)
        except (ZmqcoreError, MemoryError):
            raise
        except Exception as exc:
            raise ProtocolError(f"malformed body: {exc}") from exc
        if reader.unused:
            raise ProtocolError(f"malformed body: {reader.unused} of {len(buffers)} buffers are not referred to")
        return value


_NO_BUFFERS: list[Any] = []


def _check_size(body_bytes: int, buffers: Sequence[Any], limits: Limits) -> None:
    if len(buffers) > limits.buffers:
        raise PayloadTooLarge(
            f"the message has {len(buffers)} out-of-band buffers, the limit is {limits.buffers}: join some of them"
        )
    total = body_bytes + sum(memoryview(buffer).nbytes for buffer in buffers)
    if total > limits.message_bytes:
        raise PayloadTooLarge(f"the message has {total} bytes, the limit is {limits.message_bytes}: send it in pieces")


# -- the sender's side ---------------------------------------------------------------------------------------


class _Packing:
    """A Packer and the list its hook appends buffers to; used by one thread at a time."""

    __slots__ = ("buffers", "inline_bytes", "pack")

    def __init__(self, inline_bytes: int) -> None:
        self.inline_bytes = inline_bytes
        self.buffers = _NO_BUFFERS
        # The hook must not keep the packing alive through the packer: a cycle per thread for the collector.
        self.pack = Packer(default=self._default, datetime=True, buf_size=16 << 10).pack

    def _default(self, value: Any) -> Any:
        """Give the form on the wire of what msgpack does not know."""
        if isinstance(value, array.array):
            return self._array(value)
        if isinstance(value, datetime.datetime):
            if value.tzinfo is None:
                raise Unpackable(value, "it has no time zone; use datetime.now(timezone.utc) or .astimezone()")
            return Timestamp.from_datetime(value)
        if isinstance(value, int):
            raise Unpackable(value, "it does not fit into 64 bits; send it as str or bytes")
        numpy = sys.modules.get("numpy")  # if there is no NumPy yet, this is none of its arrays
        if numpy is not None:
            if isinstance(value, numpy.ndarray):
                return self._ndarray(value, numpy)
            if isinstance(value, numpy.generic):
                return _scalar(value, numpy)
        try:
            view = memoryview(value)
        except TypeError:
            raise Unpackable(value, _KNOWN_TYPES) from None
        if set(view.format) & set("OPX&"):
            raise Unpackable(value, f"its items (format {view.format!r}) are pointers")
        raw = view if view.c_contiguous else view.tobytes()
        return self._out_of_band(raw, EXT_BUFFER, b"") if view.nbytes >= self.inline_bytes else raw

    def _out_of_band(self, raw: Any, code: int, head: bytes) -> ExtType:
        self.buffers.append(raw)
        return ExtType(code, head + _INDEX.pack(len(self.buffers) - 1))

    def _array(self, value: array.array[Any]) -> ExtType:
        if value.typecode not in _ARRAY_CODES:
            raise Unpackable(value, "arrays of characters are not carried; send .tounicode()")
        head = _ARRAY_HEAD.pack(ord(value.typecode), value.itemsize)
        if _BIG_ENDIAN:
            value = array.array(value.typecode, value)
            value.byteswap()
        if len(value) * value.itemsize >= self.inline_bytes:
            return self._out_of_band(value, EXT_ARRAY_OUT, head)
        return ExtType(EXT_ARRAY, head + value.tobytes())

    def _ndarray(self, value: Any, numpy: Any) -> ExtType:
        if type(value) is not numpy.ndarray and type(value) is not numpy.memmap:
            raise Unpackable(value, "subclasses of ndarray would lose what they add; send numpy.asarray(it)")
        dtype = value.dtype
        if dtype.str[0] == ">":
            dtype = dtype.newbyteorder("<")
        if dtype.fields is not None or not _DTYPE.fullmatch(dtype.str):
            raise Unpackable(
                value, f"arrays of dtype {value.dtype} are not carried (plain numbers, times, bytes and text are)"
            )
        value = value.astype(dtype, order="C", copy=False)
        name = dtype.str.encode()
        head = b"".join((bytes((len(name),)), name, struct.pack(f"<B{value.ndim}Q", value.ndim, *value.shape)))
        if value.nbytes >= self.inline_bytes:
            # As bytes: NumPy exports no buffer of times.
            return self._out_of_band(memoryview(value.reshape(-1).view(numpy.uint8)), EXT_NDARRAY_OUT, head)
        return ExtType(EXT_NDARRAY, head + value.tobytes())


_KNOWN_TYPES = (
    "it has no form on the wire; None, bool, int, float, str, bytes, list, tuple, dict, datetime with a time zone, "
    "array.array and NumPy arrays have"
)


def _scalar(value: Any, numpy: Any) -> bool | int | float:
    plain = value.item() if value.itemsize <= 8 and not isinstance(value, numpy.timedelta64) else None
    if isinstance(plain, (bool, int, float)) and isinstance(value, (numpy.bool_, numpy.number)):
        return plain
    raise Unpackable(value, "of NumPy's scalars only bool, integers and floats up to 64 bits are carried; send an array")


def _refusal(root: Any, culprit: Any, reason: str) -> BadArguments:
    """Return the error for *culprit*, which is *root* or somewhere in it, with the path to it."""
    kind = type(culprit)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return BadArguments(f"cannot pack {_path(root, culprit)} ({name}): {reason}")


def _path(root: Any, culprit: Any) -> str:
    is_call = type(root) is tuple and len(root) == 2 and type(root[0]) is tuple and type(root[1]) is dict
    todo = [("args", root[0]), ("kwargs", root[1])] if is_call else [("value", root)]
    seen: set[int] = set()  # the same container twice, or within itself
    while todo:
        path, value = todo.pop()
        if value is culprit:
            return path
        if not isinstance(value, (dict, list, tuple)) or id(value) in seen:
            continue
        seen.add(id(value))
        for label, inner in _children(value):
            if label is None and inner is culprit:
                return f"a key of {path}"
            todo.append((f"{path}[{label}]", inner))
    return "a value in it"


def _children(value: dict[Any, Any] | list[Any] | tuple[Any, ...]) -> Iterator[tuple[str | None, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield None, key
            yield repr(key)[:80], inner
    else:
        for index, inner in enumerate(value):
            yield str(index), inner


# -- the receiver's side -------------------------------------------------------------------------------------


class _ExtReader:
    """Turns the extension types of one body into objects. Trusts nothing: every length is checked before use."""

    __slots__ = ("buffers", "unused", "used")

    def __init__(self, buffers: Sequence[memoryview]) -> None:
        self.buffers = buffers
        self.unused = len(buffers)
        self.used = bytearray(len(buffers))

    def read(self, code: int, data: bytes) -> Any:
        if code == EXT_BUFFER:
            return self._take(data, 0)
        if code == EXT_ARRAY:
            return _read_array(data, data[2:]) if len(data) >= 2 else _bad("an array without its head")
        if code == EXT_ARRAY_OUT:
            raw = self._take(data, 2)
            return _cast(raw, *_array_type(data, raw.nbytes))
        if code == EXT_NDARRAY:
            dtype, shape, end = _ndarray_head(data)
            return _read_ndarray(dtype, shape, memoryview(data[end:]))
        if code == EXT_NDARRAY_OUT:
            dtype, shape, end = _ndarray_head(data)
            return _read_ndarray(dtype, shape, self._take(data, end))
        return _bad(f"unknown extension type {code}")

    def _take(self, data: bytes, offset: int) -> memoryview:
        """Return the buffer whose index is the rest of *data* from *offset*, read-only and as bytes."""
        if len(data) != offset + 4:
            _bad(f"a reference to a buffer of {len(data)} bytes, not {offset + 4}")
        (index,) = _INDEX.unpack_from(data, offset)
        if index >= len(self.buffers):
            _bad(f"a reference to buffer {index} of {len(self.buffers)}")
        if self.used[index]:
            _bad(f"two references to buffer {index}")
        self.used[index] = 1
        self.unused -= 1
        return memoryview(self.buffers[index]).cast("B").toreadonly()


def _bad(what: str) -> Any:
    raise ProtocolError(f"malformed body: {what}")


def _array_type(data: bytes, size: int) -> tuple[str, int]:
    """Return the typecode here for the array with the head *data*, whose items take *size* bytes, and their size."""
    typecode, itemsize = chr(data[0]), data[1]
    floating = typecode in "fd"
    if typecode not in _ARRAY_CODES or itemsize not in ((4, 8) if floating else (1, 2, 4, 8)) or size % itemsize:
        _bad(f"an array of typecode {typecode!r}, items of {itemsize} bytes and {size} bytes in all")
    if struct.calcsize(typecode) != itemsize:  # a long of another platform
        codes = "fd" if floating else "bhiq" if typecode.islower() else "BHIQ"
        typecode = next(code for code in codes if struct.calcsize(code) == itemsize)
    return typecode, itemsize


def _read_array(data: bytes, raw: bytes) -> array.array[Any]:
    typecode, _ = _array_type(data, len(raw))
    result = array.array(typecode, raw)
    if _BIG_ENDIAN:
        result.byteswap()
    return result


def _cast(raw: memoryview, typecode: str, itemsize: int) -> memoryview:
    if _BIG_ENDIAN and itemsize > 1:
        swapped = array.array(typecode, raw.tobytes())
        swapped.byteswap()
        return memoryview(swapped).toreadonly()
    return raw.cast(typecode)


def _ndarray_head(data: bytes) -> tuple[str, tuple[int, ...], int]:
    """Return dtype, shape, and where the head ends."""
    length = data[0] if data else 0
    if len(data) < length + 2:
        _bad("an ndarray without its head")
    dtype = data[1 : 1 + length].decode("ascii")
    ndim = data[1 + length]
    end = 2 + length + 8 * ndim
    if not _DTYPE.fullmatch(dtype) or ndim > _MAX_NDIM or len(data) < end:
        _bad(f"an ndarray of dtype {dtype!r} with {ndim} dimensions in {len(data)} bytes")
    return dtype, struct.unpack_from(f"<{ndim}Q", data, 2 + length), end


def _read_ndarray(dtype: str, shape: tuple[int, ...], raw: memoryview) -> Any:
    digits = re.match(r"\d+", dtype[2:])
    itemsize = int(digits[0]) * (4 if dtype[1] == "U" else 1) if digits else 0
    if math.prod(shape) * itemsize != raw.nbytes:
        _bad(f"an ndarray of shape {shape} and items of {itemsize} bytes in {raw.nbytes} bytes")
    numpy = _numpy()
    if numpy is not None:
        return numpy.ndarray(shape, numpy.dtype(dtype), raw.toreadonly())
    view_format = _VIEW_FORMATS.get(dtype)
    if view_format is None or _BIG_ENDIAN or 0 in shape:
        return raw.toreadonly()
    return raw.toreadonly().cast(view_format, shape)


@lru_cache(maxsize=1)
def _numpy() -> Any:
    try:
        import numpy  # an optional extra, and only needed when an ndarray arrives
    except ImportError:
        return None
    return numpy


# -- the registry ---------------------------------------------------------------------------------------------

_registry_lock = threading.Lock()  # guards both tables against each other; reading one needs no lock
_by_id: dict[int, Codec] = {}
_by_name: dict[str, Codec] = {}


def register_codec(codec: Codec) -> None:
    """Make *codec* known to this process by its id and its name. Both ends of a connection need it.

    Raises ``BadArguments`` if the id is not within 1 to 255, or the id or name is taken by another codec.
    """
    if not isinstance(codec.id, int) or not 1 <= codec.id <= 255:
        raise BadArguments(f"the id of a codec must be an int from 1 to 255, not {codec.id!r}")
    if not isinstance(codec.name, str) or not codec.name:
        raise BadArguments(f"the name of a codec must be a str that is not empty, not {codec.name!r}")
    with _registry_lock:
        for known in (_by_id.get(codec.id), _by_name.get(codec.name)):
            if known is not None and known is not codec:
                raise BadArguments(
                    f"codec {codec.name!r} with id {codec.id} collides with {known.name!r} with id {known.id}"
                )
        _by_id[codec.id] = codec
        _by_name[codec.name] = codec


def get_codec(name_or_id: str | int) -> Codec:
    """Return the codec with this name (as a user gives it) or id (as a message carries it).

    Raises ``BadArguments`` for an unknown name, ``ProtocolError`` for an unknown id.
    """
    if isinstance(name_or_id, int):
        try:
            return _by_id[name_or_id]
        except KeyError:
            raise ProtocolError(f"a message in codec {name_or_id}; known here: {sorted(_by_id)}") from None
    try:
        return _by_name[name_or_id]
    except KeyError:
        raise BadArguments(f"no codec is named {name_or_id!r}; known: {', '.join(sorted(_by_name))}") from None


register_codec(MsgpackCodec())
