"""Codecs: what turns arguments and results into a message's body and its out-of-band buffers, and back.

A codec is known by the id that travels in the envelope. :class:`MsgpackCodec` (id 1) is the default. Never
pickle: what a peer sends can become plain values and arrays, and nothing else.

The body of ``msgpack``
=======================

One value of the `MessagePack specification <https://github.com/msgpack/msgpack/blob/master/spec.md>`_, and
nothing after it. A call's value is the array ``[args, kwargs]`` (an array, and a map with string keys); a
reply's is the result itself. ``bin`` is used for bytes, ``str`` holds UTF-8. The shortest form of each
integer and length is sent, and every form is accepted.

A buffer of the threshold's size or larger (32 KiB by default, the sender's choice) travels as a further part
of the message, behind the one with the body. The body refers to each such part exactly once, by an index that
starts at 0. These extension types are defined; the numbers in all but the first are little-endian:

==== ==================== =============================================================================
code what                 data
==== ==================== =============================================================================
-1   time                 MessagePack's timestamp, 32, 64 or 96 bits: a moment, without a time zone
1    bytes, out of band   ``index: u32``
2    array, in the body   ``typecode: u8, itemsize: u8``, then the items
3    array, out of band   ``typecode: u8, itemsize: u8, index: u32``
4    ndarray, in the body ``length: u8, dtype: length bytes, ndim: u8, shape: ndim u64``, then the items
5    ndarray, out of band as 4, with ``index: u32`` instead of the items
==== ==================== =============================================================================

* *typecode* is one of ``bBhHiIlLqQfd`` as in Python's ``array``. *itemsize* says how many bytes an item
  really has: 1, 2, 4 or 8, for ``f`` and ``d`` 4 or 8. Lower case is signed.
* *dtype* is NumPy's ``dtype.str`` in ASCII: ``|b1``, ``|i1 |u1``, ``<i2 <i4 <i8``, ``<u2 <u4 <u8``,
  ``<f2 <f4 <f8``, ``<c8 <c16``, ``|S`` or ``|V`` and a size in bytes, ``<U`` and a size in code points of 4
  bytes each, ``<M8`` or ``<m8`` with or without a unit in brackets, such as ``<M8[ns]``.
* Items are in C order. *ndim* is at most 64. The product of *shape* times the size of an item is exactly the
  length of the items.
* Every other code, and every other form of these, is refused.

An *element* is any value, container or map key; *depth* counts the containers around a value. A receiver
refuses a body that is over its limits.

What comes back
===============

===================================================== =====================================================
sent                                                  received
===================================================== =====================================================
None, bool, int (64 bits), float, str, bytes, dict    the same (of a subclass: the plain type)
list, tuple, named tuple                              list
datetime with a time zone                             datetime in UTC
bytearray, memoryview of any format and strides       bytes
the same and bytes, from the threshold on             read-only memoryview of bytes; not copied on either side
another object with the buffer protocol               as a memoryview
array.array                                           array.array
array.array from the threshold on                     read-only memoryview of the same format
numpy.ndarray, dtypes as above in any byte order      read-only ndarray, or memoryview if there is no NumPy
NumPy's bool, integer and floating scalars            bool, int, float
===================================================== =====================================================

The key of a dict is any of these that is hashable when it arrives. All else is refused with
:class:`~zmqcore.errors.BadArguments`, which gives the path to the value.
"""

from __future__ import annotations

import array
import datetime
import math
import re
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import NoneType
from typing import Any, Protocol, runtime_checkable

from msgpack import ExtType, Packer, Timestamp

from zmqcore._body import EXT_BUFFER, MAX_DEPTH, BodyCodec
from zmqcore._decoder import Buffers
from zmqcore._encoder import Unpackable, lift
from zmqcore.errors import BadArguments, PayloadTooLarge, ProtocolError, ZmqcoreError

__all__ = ["Codec", "Limits", "MsgpackCodec", "get_codec", "register_codec"]

MAX_BUFFERS = 0xFFFF  # the envelope's field for their number has 16 bits

EXT_TIME = -1
EXT_ARRAY = 2
EXT_ARRAY_OUT = 3
EXT_NDARRAY = 4
EXT_NDARRAY_OUT = 5

_BIG_ENDIAN = sys.byteorder == "big"
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_INDEX = struct.Struct("<I")
_ARRAY_HEAD = struct.Struct("<BB")
_ARRAY_CODES = "bBhHiIlLqQfd"
# NumPy's own limit since 2.0 (before, it is 32, and NumPy itself refuses).
_MAX_NDIM = 64
# The group is the size.
_DTYPE = re.compile(
    r"(?=..(\d+))(?:\|b1|[<|][iu]1|<[iu][248]|<f[248]|<c(?:8|16)|\|[SV]\d{1,9}|<U\d{1,9}"
    r"|<[mM]8(?:\[\d{0,9}(?:Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as)\])?)"
)
# dtypes that memoryview can show as they are, for a receiver without NumPy.
_VIEW_FORMATS = {
    "|b1": "?", "|i1": "b", "|u1": "B", "<i2": "h", "<u2": "H", "<i4": "i", "<u4": "I", "<i8": "q",
    "<u8": "Q", "<f4": "f", "<f8": "d",
}  # fmt: skip
# A Packer keeps the largest buffer it ever needed: one that grew beyond this is not used again.
_PACKER_KEPT_BYTES = 1 << 20
# Idle packers kept per codec. If more threads than this pack at once, the surplus is made anew each time.
_PACKERS_KEPT = 8


@dataclass(frozen=True, slots=True)
class Limits:
    """What one message may hold. Kept at the sender first, and again by the receiver.

    * ``message_bytes``: the size of body and buffers together;
    * ``depth``: containers within containers, the array of ``args`` and ``kwargs`` included; at most 512;
    * ``elements``: values, containers and map keys together; bytes or a whole array are one;
    * ``buffers``: the number of out-of-band buffers; at most 65,535;
    * ``inline_bytes``: a buffer of this size or larger goes out of band. For the sender only.

    Each is at least 1. Raises ``BadArguments`` for anything else.
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
        if self.buffers > MAX_BUFFERS:
            raise BadArguments(
                f"the limit buffers is {self.buffers}, but a message has {MAX_BUFFERS} at most"
            )


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

        Objects with a C-contiguous buffer that are to travel out of band are appended to *buffers*, an empty
        list. They are parts of *value*, not copies, and must not change until the message has been sent.
        *value* itself is not changed.

        Raises ``BadArguments`` for a value that has no form on the wire, ``PayloadTooLarge`` over a limit;
        *buffers* is then of no use.
        """

    def decode(self, body: Any, buffers: Sequence[memoryview]) -> Any:
        """Return the value in *body* (any object with a contiguous buffer of bytes) and its *buffers*.

        Of *body* nothing is kept. Of *buffers* the value holds views, each for as long as its part lives.

        Raises ``ProtocolError`` for bytes that are not a valid body, and ``PayloadTooLarge`` over a limit.
        """


class MsgpackCodec(BodyCodec):
    """MessagePack, with arrays, and large buffers out of band. The module's docstring has the wire format.

    ``encode`` and ``decode`` are compiled, and come here for what is unusual. Thread-safe and fork-safe.
    """

    id = 1
    name = "msgpack"

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits = Limits() if limits is None else limits
        self._keep(
            message_bytes=limits.message_bytes,
            buffers=limits.buffers,
            inline_bytes=limits.inline_bytes,
            elements=limits.elements,
            depth=limits.depth,
        )
        # Packers that nobody uses now. list.append and list.pop are atomic, with and without the GIL. One
        # that has raised does not come back.
        self._idle: list[tuple[_Hook, Callable[[Any], bytes]]] = []

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.limits!r})"

    def with_limits(self, limits: Limits) -> MsgpackCodec:
        """Return a codec of the same wire format that keeps *limits*."""
        return type(self)(limits)

    def encode_any(self, value: Any, buffers: list[Any]) -> bytes:
        """Encode what the compiled encoder leaves: subclasses, arrays, times, long bodies, and all errors."""
        limits = self.limits
        try:
            hook, pack = self._idle.pop()
        except IndexError:
            hook = _Hook(limits.inline_bytes)
            pack = Packer(default=hook.default, datetime=True, buf_size=16 << 10).pack
        hook.buffers = buffers
        try:
            body = pack(lift(value, buffers, limits.inline_bytes, limits.depth, limits.elements))
        except Unpackable as exc:
            raise _refusal(value, exc.value, exc.reason) from exc.__cause__
        except UnicodeEncodeError as exc:
            raise _refusal(value, exc.object, "it has lone surrogates, which UTF-8 cannot hold") from exc
        except (ZmqcoreError, MemoryError):
            raise
        except Exception as exc:
            raise BadArguments(f"cannot pack the payload: {exc}") from exc
        hook.buffers = _NO_BUFFERS
        if len(body) <= _PACKER_KEPT_BYTES and len(self._idle) < _PACKERS_KEPT:
            self._idle.append((hook, pack))
        if len(buffers) > limits.buffers:
            raise PayloadTooLarge(
                f"the payload has {len(buffers)} large buffers, the limit is {limits.buffers}: join some"
            )
        total = len(body) + sum(memoryview(buffer).nbytes for buffer in buffers)
        if total > limits.message_bytes:
            raise PayloadTooLarge(
                f"the payload has {total} bytes, the limit is {limits.message_bytes}: send it in pieces"
            )
        return body

    def read_ext(self, code: int, data: bytes, buffers: Buffers) -> Any:
        """Return the value of the extension type *code* of a body. Trusts nothing in *data*."""
        reader = _READERS.get(code)
        if reader is None:
            raise ProtocolError(f"malformed body: unknown extension type {code} of {len(data)} bytes")
        try:
            return reader(data, buffers)
        except (ZmqcoreError, MemoryError):
            raise
        except Exception as exc:
            raise ProtocolError(f"malformed body: extension type {code}: {exc}") from exc


_NO_BUFFERS: list[Any] = []


# -- the sender's side ---------------------------------------------------------------------------------------


class _Hook:
    """Gives one packer the form of what msgpack does not know; used by one thread at a time."""

    __slots__ = ("buffers", "inline_bytes")

    def __init__(self, inline_bytes: int) -> None:
        self.inline_bytes = inline_bytes
        self.buffers = _NO_BUFFERS

    def default(self, value: Any) -> Any:
        if isinstance(value, array.array):
            return self._array(value)
        if isinstance(value, datetime.datetime):
            if value.tzinfo is None:
                raise Unpackable(
                    value, "it has no time zone; use datetime.now(timezone.utc) or .astimezone()"
                )
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
        dtype, name = _wire_dtype(value.dtype)
        if dtype is None:
            raise Unpackable(
                value,
                f"arrays of dtype {value.dtype} are not carried (plain numbers, times, bytes and text are)",
            )
        head = name + struct.pack(f"<B{value.ndim}Q", value.ndim, *value.shape)
        if dtype is not value.dtype or not value.flags.c_contiguous:
            value = value.astype(dtype, order="C", copy=False)
        if value.nbytes >= self.inline_bytes:
            # As bytes: NumPy exports no buffer of times.
            return self._out_of_band(memoryview(value.reshape(-1).view(numpy.uint8)), EXT_NDARRAY_OUT, head)
        return ExtType(EXT_NDARRAY, head + value.tobytes())


@lru_cache(maxsize=256)
def _wire_dtype(dtype: Any) -> tuple[Any, bytes]:
    """Return the dtype that arrays of *dtype* travel in, or None, and its name behind its length."""
    wire = dtype.newbyteorder("<") if dtype.str[0] == ">" else dtype
    if wire.fields is not None or not _DTYPE.fullmatch(wire.str):
        return None, b""
    name = wire.str.encode()
    return wire, bytes((len(name),)) + name


_KNOWN_TYPES = (
    "it has no form on the wire; None, bool, int, float, str, bytes, list, tuple, dict, datetime with a time "
    "zone, array.array and NumPy arrays have"
)


def _scalar(value: Any, numpy: Any) -> bool | int | float:
    plain = value.item() if value.itemsize <= 8 and not isinstance(value, numpy.timedelta64) else None
    if isinstance(plain, (bool, int, float)) and isinstance(value, (numpy.bool_, numpy.number)):
        return plain
    raise Unpackable(
        value, "of NumPy's scalars only bool, integers and floats up to 64 bits are carried; send an array"
    )


def _refusal(root: Any, culprit: Any, reason: str) -> BadArguments:
    """Return the error for *culprit*, which is *root* or somewhere in it, with the path to it."""
    kind = type(culprit)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return BadArguments(f"cannot pack {_path(root, culprit)} ({name}): {reason}")


def _path(root: Any, culprit: Any) -> str:
    """Return where *culprit* is in *root*: the first place, depth first. For errors: it may visit all."""
    is_call = type(root) is tuple and len(root) == 2 and type(root[0]) is tuple and type(root[1]) is dict
    places: Iterator[tuple[str, Any]]
    places = iter([("args", root[0]), ("kwargs", root[1])] if is_call else [("value", root)])
    open_containers = [("", places)]
    seen: set[int] = set()  # by id: the same container in two places, or within itself
    while open_containers:
        path, places = open_containers[-1]
        for label, value in places:
            if value is culprit:
                return f"{path}{label}"
            if isinstance(value, (dict, list, tuple)) and id(value) not in seen:
                seen.add(id(value))
                if isinstance(value, dict) and any(key is culprit for key in value):
                    return f"a key of {path}{label}"
                open_containers.append((path + label, _children(value)))
                break
        else:
            open_containers.pop()
    return "a value in it"


def _children(value: dict[Any, Any] | list[Any] | tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            # Anything else as a key, also a subclass, might have a repr that raises.
            plain = type(key) in (str, bytes, int, float, bool, NoneType)
            yield f"[{key!r:.80}]" if plain else f"[a {type(key).__name__}]", inner
    else:
        for index, inner in enumerate(value):
            yield f"[{index}]", inner


# -- the receiver's side -------------------------------------------------------------------------------------


def _read_time(data: bytes, _: Buffers) -> datetime.datetime:
    if len(data) == 4:
        seconds, nanoseconds = int.from_bytes(data, "big"), 0
    elif len(data) == 8:
        both = int.from_bytes(data, "big")
        seconds, nanoseconds = both & 0x3_FFFF_FFFF, both >> 34
    elif len(data) == 12:
        nanoseconds, seconds = struct.unpack(">Iq", data)
    else:
        raise ValueError(f"a time of {len(data)} bytes")
    if nanoseconds > 999_999_999:
        raise ValueError(f"a time with {nanoseconds} nanoseconds")
    return _EPOCH + datetime.timedelta(seconds=seconds, microseconds=nanoseconds // 1000)


def _read_buffer(data: bytes, _: Buffers) -> Any:
    raise ValueError(f"a reference to a buffer has 4 bytes, not {len(data)}")  # those of 4 never come here


def _array_type(data: bytes, raw_bytes: int) -> str:
    """Return the typecode here of the array with the head *data* and items of *raw_bytes* bytes together."""
    code, itemsize = _ARRAY_HEAD.unpack_from(data)
    typecode = chr(code)
    if typecode not in _ARRAY_CODES or itemsize not in ((4, 8) if typecode in "fd" else (1, 2, 4, 8)):
        raise ValueError(f"an array of typecode {typecode!r} with items of {itemsize} bytes")
    if raw_bytes % itemsize:
        raise ValueError(f"an array of {raw_bytes} bytes with items of {itemsize}")
    if struct.calcsize(typecode) == itemsize:
        return typecode
    codes = "fd" if typecode in "fd" else "bhiq" if typecode.islower() else "BHIQ"
    return next(code for code in codes if struct.calcsize(code) == itemsize)  # a long of another platform


def _read_array(data: bytes, _: Buffers) -> array.array[Any]:
    raw = data[_ARRAY_HEAD.size :]
    result = array.array(_array_type(data, len(raw)), raw)
    if _BIG_ENDIAN:
        result.byteswap()
    return result


def _read_array_out(data: bytes, buffers: Buffers) -> memoryview:
    raw = buffers.take(_index(data, _ARRAY_HEAD.size))
    typecode = _array_type(data, raw.nbytes)
    if _BIG_ENDIAN:
        swapped = array.array(typecode, raw.tobytes())
        swapped.byteswap()
        return memoryview(swapped).toreadonly()
    return _cast(raw, typecode)


def _index(data: bytes, offset: int) -> int:
    """Return the index of a buffer, which must be all of *data* from *offset*."""
    if len(data) != offset + _INDEX.size:
        raise ValueError(f"{len(data)} bytes, not {offset + _INDEX.size}")
    (index,) = _INDEX.unpack_from(data, offset)
    return int(index)


def _read_ndarray(data: bytes, _: Buffers) -> Any:
    dtype, shape, end = _ndarray_head(data)
    return _ndarray(dtype, shape, memoryview(data[end:]))


def _read_ndarray_out(data: bytes, buffers: Buffers) -> Any:
    dtype, shape, end = _ndarray_head(data)
    return _ndarray(dtype, shape, buffers.take(_index(data, end)))


def _ndarray_head(data: bytes) -> tuple[str, tuple[int, ...], int]:
    """Return dtype, shape, and where the head ends."""
    length = data[0]
    dtype = data[1 : 1 + length].decode("ascii")
    ndim = data[1 + length]
    if ndim > _MAX_NDIM:
        raise ValueError(f"an ndarray of {ndim} dimensions")
    return dtype, struct.unpack_from(f"<{ndim}Q", data, 2 + length), 2 + length + 8 * ndim


@lru_cache(maxsize=256)
def _item_bytes(dtype: str) -> int:
    match = _DTYPE.fullmatch(dtype)
    if match is None:
        raise ValueError(f"an ndarray of dtype {dtype!r}")
    return int(match[1]) * (4 if dtype[1] == "U" else 1)


def _ndarray(dtype: str, shape: tuple[int, ...], raw: memoryview) -> Any:
    itemsize = _item_bytes(dtype)
    if math.prod(shape) * itemsize != raw.nbytes:
        raise ValueError(f"an ndarray of shape {shape} and items of {itemsize} bytes in {raw.nbytes} bytes")
    numpy = _numpy()
    if numpy is not None:
        return numpy.ndarray(shape, numpy.dtype(dtype), raw)  # read-only, as raw is
    view_format = _VIEW_FORMATS.get(dtype)
    if view_format is None or _BIG_ENDIAN or 0 in shape:
        return raw
    return _cast(raw, view_format, shape)


def _cast(raw: memoryview, view_format: Any, *shape: Any) -> memoryview:
    return raw.cast(view_format, *shape)


@lru_cache(maxsize=1)
def _numpy() -> Any:
    try:
        import numpy  # noqa: PLC0415 - an optional extra, needed only when an ndarray arrives
    except ImportError:
        return None
    return numpy


_READERS: dict[int, Callable[[bytes, Buffers], Any]] = {
    EXT_TIME: _read_time,
    EXT_BUFFER: _read_buffer,
    EXT_ARRAY: _read_array,
    EXT_ARRAY_OUT: _read_array_out,
    EXT_NDARRAY: _read_ndarray,
    EXT_NDARRAY_OUT: _read_ndarray_out,
}


# -- the registry --------------------------------------------------------------------------------------------

_registry_lock = threading.Lock()  # guards both tables against each other; reading one needs no lock
_by_id: dict[int, Codec] = {}
_by_name: dict[str, Codec] = {}


def register_codec(codec: Codec) -> None:
    """Make *codec* known to this process by its id and its name. Both ends of a connection need it.

    Raises ``BadArguments`` if the id is not within 1 to 255, or the id or name is taken by another codec.
    """
    if codec.id not in range(1, 256):
        raise BadArguments(f"the id of a codec must be an int from 1 to 255, not {codec.id!r}")
    if not codec.name:
        raise BadArguments("a codec must have a name")
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
        raise BadArguments(
            f"no codec is named {name_or_id!r}; known: {', '.join(sorted(_by_name))}"
        ) from None


register_codec(MsgpackCodec())
