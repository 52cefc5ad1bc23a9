"""The codec: what comes back for what was sent, and what is refused; what a peer sends never breaks it."""

from __future__ import annotations

import array
import ctypes
import enum
import math
import mmap
import struct
import subprocess
import sys
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, NamedTuple

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zmqcore import codec as codec_module
from zmqcore.codec import Codec, Limits, MsgpackCodec, get_codec, register_codec
from zmqcore.errors import BadArguments, PayloadTooLarge, ProtocolError

SMALL = MsgpackCodec(Limits(inline_bytes=64))


class Point(NamedTuple):
    x: Any
    y: Any


def sent(value: Any, codec: MsgpackCodec = SMALL) -> Any:
    """What a receiver gets for *value*."""
    body, parts = wire(value, codec)
    return codec.decode(body, parts)


def wire(value: Any, codec: MsgpackCodec = SMALL) -> tuple[bytes, list[memoryview]]:
    buffers: list[Any] = []
    body = codec.encode(value, buffers)
    return body, [memoryview(bytes(memoryview(buffer).cast("B"))) for buffer in buffers]


def ext(code: int, data: bytes) -> bytes:
    return bytes(msgpack.Packer().pack_ext_type(code % 256 if code >= 0 else code, data))


# -- plain values --------------------------------------------------------------------------------------------


class Colour(enum.IntEnum):
    RED = 3


class Name(str):
    __slots__ = ()


@pytest.mark.parametrize(
    ("value", "received"),
    [
        (OrderedDict(a=1, b=(2,)), {"a": 1, "b": [2]}),
        (defaultdict(list, {"a": [1]}), {"a": [1]}),
        (Point(1, [2]), [1, [2]]),
        (Colour.RED, 3),
        (Name("n"), "n"),
        ({Name("n"): 1}, {"n": 1}),
        ({1: 1, 2.5: 2, None: 3, b"k": 4, False: 5}, {1: 1, 2.5: 2, None: 3, b"k": 4, False: 5}),
        (bytearray(b"abc"), b"abc"),
        (memoryview(b"abc"), b"abc"),
        (memoryview(b"abcdef")[::2], b"ace"),
        (memoryview(array.array("H", [1, 2])), struct.pack("=HH", 1, 2)),
        ([[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]], [[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]]),
        (list(range(300_000)), list(range(300_000))),  # a body over 1 MiB
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_comes_back(value: Any, received: Any) -> None:
    result = sent(value)
    assert result == received
    assert type(result) is type(received)
    assert sent([value]) == [received]
    assert sent({"k": value}) == {"k": received}


@settings(deadline=None)
@given(st.datetimes(timezones=st.timezones() | st.just(UTC)))
def test_times_keep_their_moment(moment: datetime) -> None:
    try:
        utc = moment.astimezone(UTC)
    except OverflowError:  # the first or last day of the calendar, but not in UTC
        return
    received = sent((moment, {"when": moment}))
    assert received == [utc, {"when": utc}]
    assert received[0].tzinfo is UTC


def test_times_of_a_subclass() -> None:
    class Moment(datetime):
        pass

    moment = Moment(2026, 1, 2, 3, 4, 5, 678, timezone(timedelta(hours=-7)))
    assert sent(moment) == moment


def test_times_of_other_senders() -> None:
    stamps = {
        ext(-1, struct.pack(">I", 2**32 - 1)): datetime(2106, 2, 7, 6, 28, 15, tzinfo=UTC),
        ext(-1, struct.pack(">Q", 999_999_999 << 34 | 1)): datetime(1970, 1, 1, 0, 0, 1, 999_999, UTC),
        ext(-1, struct.pack(">Iq", 500_000_000, -1)): datetime(1969, 12, 31, 23, 59, 59, 500_000, UTC),
    }
    for body, moment in stamps.items():
        assert SMALL.decode(body, []) == moment


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"123",
        b"123456789",
        struct.pack(">Q", 1_000_000_000 << 34),
        struct.pack(">Iq", 2**32 - 1, 0),
        struct.pack(">Iq", 0, 2**63 - 1),
        struct.pack(">Iq", 0, -(2**63)),
    ],
)
def test_times_that_are_none(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="malformed body: extension type -1"):
        SMALL.decode(ext(-1, data), [])


# -- large buffers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
@pytest.mark.parametrize("size", [63, 64, 65, 1 << 20])
def test_buffers_on_both_sides_of_the_threshold(kind: Callable[[bytes], Any], size: int) -> None:
    data = bytes(range(256)) * (size // 256 + 1)
    value = kind(data[:size])
    buffers: list[Any] = []
    body = SMALL.encode(((1, [value]), {"k": value}), buffers)
    if size < 64:
        assert buffers == []
        assert SMALL.decode(body, []) == [[1, [data[:size]]], {"k": data[:size]}]
        return
    assert [id(buffer) for buffer in buffers] == [id(value)] * 2, "a copy was made"
    assert len(body) < 40
    parts = [memoryview(bytes(buffer)) for buffer in buffers]
    (_, (first,)), options = SMALL.decode(body, parts)
    assert first == options["k"] == data[:size]
    assert type(first) is memoryview
    assert first.readonly
    assert first.obj is parts[0].obj, "a copy was made"


def test_the_threshold_is_the_senders_choice() -> None:
    body, parts = wire(b"x" * 100, MsgpackCodec(Limits(inline_bytes=1)))
    assert MsgpackCodec(Limits(inline_bytes=10**6)).decode(body, parts) == b"x" * 100


def test_large_buffers_beside_what_is_unusual() -> None:
    data = b"x" * 100
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    value = OrderedDict(a=data, b=Point(bytearray(data), moment), c={1: memoryview(data + data)[::2]}, d=data)
    buffers: list[Any] = []
    body = SMALL.encode(value, buffers)
    assert [bytes(buffer) for buffer in buffers] == [data] * 4
    assert buffers[0] is data
    received = SMALL.decode(body, [memoryview(bytes(buffer)) for buffer in buffers])
    assert received == {"a": data, "b": [data, moment], "c": {1: data}, "d": data}


@pytest.mark.parametrize("size", [10, 100])
def test_other_objects_with_a_buffer(size: int) -> None:
    mapped = mmap.mmap(-1, size)
    mapped[:] = b"m" * size
    numbers = (ctypes.c_int32 * (size // 4))(*range(size // 4))
    try:
        assert sent([mapped, numbers]) == [b"m" * size, struct.pack(f"={size // 4}i", *range(size // 4))]
    finally:
        mapped.close()


def test_pointers_do_not_travel() -> None:
    with pytest.raises(BadArguments, match="pointers"):
        sent((ctypes.POINTER(ctypes.c_int) * 3)())


# -- array.array ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("typecode", "bBhHiIlLqQfd")
def test_arrays(typecode: str) -> None:
    values = [0, 1, 100] if typecode.isupper() or typecode in "fd" else [0, 1, -100]
    for count in (0, 1, 3, 100):
        value = array.array(typecode, (values * 40)[:count])
        received = sent([value])[0]
        if count * value.itemsize < 64:
            assert type(received) is array.array
            assert (received.typecode, received) == (typecode, value)
        else:
            assert type(received) is memoryview
            assert (received.format, received.readonly) == (typecode, True)
            assert received.tolist() == value.tolist()


def test_large_arrays_are_not_copied() -> None:
    value = array.array("d", range(1000))
    buffers: list[Any] = []
    SMALL.encode(value, buffers)
    assert len(buffers) == 1
    assert buffers[0] is value


def test_an_array_of_a_platform_with_other_sizes() -> None:
    data = struct.pack("<3i", 1, -2, 3)
    received = SMALL.decode(ext(2, b"l\x04" + data), [])
    assert received == array.array("i", [1, -2, 3])
    assert received.itemsize == 4
    view = SMALL.decode(ext(3, b"L\x02" + struct.pack("<I", 0)), [memoryview(struct.pack("<2H", 1, 65535))])
    assert (view.format, view.tolist()) == ("H", [1, 65535])


def test_arrays_of_characters_are_refused() -> None:
    with pytest.raises(BadArguments, match="tounicode"):
        sent(array.array("w" if sys.version_info >= (3, 13) else "u", "abc"))


@pytest.mark.parametrize(
    ("code", "data", "parts"),
    [
        (2, b"", 0),
        (2, b"i", 0),
        (2, b"i\x00abcd", 0),
        (2, b"i\x03abc", 0),
        (2, b"u\x04abcd", 0),
        (2, b"O\x08abcdefgh", 0),
        (2, b"f\x02ab", 0),
        (2, b"i\x04abc", 0),
        (2, b"\xff\x04abcd", 0),
        (3, b"", 1),
        (3, b"i\x04", 1),
        (3, b"i\x04\x00\x00\x00", 1),
        (3, b"i\x04\x00\x00\x00\x00\x00", 1),
        (3, b"i\x04\x01\x00\x00\x00", 1),
        (3, b"i\x08\x00\x00\x00\x00", 1),
        (1, b"", 1),
        (1, b"\x00", 1),
        (1, b"\x00\x00\x00\x00\x00", 1),
        (6, b"", 0),
        (127, b"abc", 0),
        (-2, b"abc", 0),
    ],
)
def test_malformed_extensions(code: int, data: bytes, parts: int) -> None:
    buffers = [memoryview(b"123456789012")] * parts
    with pytest.raises(ProtocolError, match="malformed body"):
        SMALL.decode(ext(code, data), buffers)


def test_a_buffer_is_not_taken_twice_by_different_extensions() -> None:
    body = msgpack.packb([msgpack.ExtType(1, bytes(4)), msgpack.ExtType(3, b"B\x01" + bytes(4))])
    with pytest.raises(ProtocolError, match="two references to buffer 0"):
        SMALL.decode(body, [memoryview(b"abcd")])


# -- NumPy ---------------------------------------------------------------------------------------------------

DTYPES = [
    *("?", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", "c8", "c16"),
    *("S3", "U3", "V5", "S1", "U1", "M8[ns]", "M8[D]", "M8[25s]", "m8[us]", "m8"),
]
SHAPES = [(), (0,), (1,), (5,), (40,), (3, 4), (0, 7), (2, 0, 3), (5, 6, 7), (1,) * 20]


def sample(dtype: str, shape: tuple[int, ...]) -> Any:
    numpy = pytest.importorskip("numpy")
    made = numpy.zeros(shape, dtype)
    raw = bytes(i % 2 for i in range(made.nbytes))
    if numpy.dtype(dtype).kind in "U?":
        made[...] = numpy.array("aé"[: numpy.dtype(dtype).itemsize // 4] if "U" in dtype else True)
        return made
    return numpy.ndarray(shape, dtype, raw)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ndarrays(dtype: str, shape: tuple[int, ...]) -> None:
    numpy = pytest.importorskip("numpy")
    value = sample(dtype, shape)
    body, parts = wire([value])
    assert len(parts) == (value.nbytes >= 64)
    (received,) = SMALL.decode(body, parts)
    assert type(received) is numpy.ndarray
    assert (received.dtype, received.shape) == (value.dtype, value.shape)
    assert received.tobytes() == value.tobytes()
    assert not received.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        received[...] = received
    with pytest.raises(ValueError, match="cannot set WRITEABLE"):
        received.flags.writeable = True


@pytest.mark.parametrize("count", [3, 1000])
def test_ndarrays_of_any_layout_and_byte_order(count: int) -> None:
    numpy = pytest.importorskip("numpy")
    base = numpy.arange(count * 4, dtype="f8").reshape(count, 4)
    for value in (
        base.T,
        numpy.asfortranarray(base),
        base[::2],
        base[:, 1],
        base[::-1],
        base.astype(">f8"),
        base.astype(">i2").T,
        numpy.broadcast_to(base[0], (count, 4)),
    ):
        received = sent(value)
        assert numpy.array_equal(received, value)
        assert received.dtype == value.dtype.newbyteorder("=")


def test_large_ndarrays_are_not_copied() -> None:
    numpy = pytest.importorskip("numpy")
    for value in (numpy.arange(1000.0), numpy.zeros((30, 40), "M8[s]"), numpy.zeros((2, 3, 4), "U9")):
        buffers: list[Any] = []
        body = SMALL.encode(value, buffers)
        assert len(buffers) == 1
        assert numpy.shares_memory(numpy.frombuffer(buffers[0], "u1"), value)
        part = memoryview(buffers[0]).toreadonly()
        assert numpy.shares_memory(SMALL.decode(body, [part]), value)


def test_an_ndarray_in_a_file(tmp_path: Any) -> None:
    numpy = pytest.importorskip("numpy")
    value = numpy.memmap(tmp_path / "array", "i4", "w+", shape=(10,))
    value[:] = range(10)
    assert sent(value).tolist() == list(range(10))


def test_scalars_of_numpy() -> None:
    numpy = pytest.importorskip("numpy")
    value = [
        numpy.bool_(True),
        numpy.int8(-1),
        numpy.uint64(2**64 - 1),
        numpy.float32(0.5),
        numpy.float64(1.5),
    ]
    received = sent([*value, numpy.str_("s"), numpy.bytes_(b"b"), {numpy.int64(3): numpy.float16(2)}])
    assert received == [True, -1, 2**64 - 1, 0.5, 1.5, "s", b"b", {3: 2.0}]
    plain = [bool, int, int, float, float, str, bytes, dict]
    assert [type(item) for item in received] == plain
    assert type(sent(numpy.bytes_(b"x" * 100))) is memoryview


@pytest.mark.parametrize(
    "make",
    [
        lambda numpy: numpy.array([None, 1]),
        lambda numpy: numpy.zeros(3, "i4,f8"),
        lambda numpy: numpy.zeros(3, numpy.longdouble),
        lambda numpy: numpy.ma.array([1, 2], mask=[0, 1]),
        lambda numpy: numpy.longdouble(1),
        lambda numpy: numpy.complex128(1),
        lambda numpy: numpy.datetime64("2026-01-01"),
        lambda numpy: numpy.timedelta64(5, "s"),
        lambda numpy: numpy.zeros(1, "i4,f8")[0],
    ],
)
def test_what_numpy_has_and_the_wire_has_not(make: Callable[[Any], Any]) -> None:
    value = make(pytest.importorskip("numpy"))
    with pytest.raises(BadArguments, match=r"cannot pack args\[1\]\['x'\] \(numpy\."):
        sent((("a", {"x": value}), {}))


def ndarray_head(dtype: bytes, *shape: int, ndim: int | None = None) -> bytes:
    ndim = len(shape) if ndim is None else ndim
    return bytes((len(dtype),)) + dtype + bytes((ndim,)) + struct.pack(f"<{len(shape)}Q", *shape)


BAD_NDARRAYS = {
    "empty": b"",
    "dtype cut": b"\x05<f",
    "no ndim": b"\x03<f8",
    "shape cut": ndarray_head(b"<f8", 1, ndim=2),
    "not ascii": ndarray_head(b"\xff\xff\xff", 1) + bytes(8),
    "objects": ndarray_head(b"|O", 1) + bytes(8),
    "objects with size": ndarray_head(b"|O8", 1) + bytes(8),
    "fields": ndarray_head(b"i4,f8", 1) + bytes(12),
    "big-endian": ndarray_head(b">f8", 1) + bytes(8),
    "native": ndarray_head(b"=f8", 1) + bytes(8),
    "long double": ndarray_head(b"<f16", 1) + bytes(16),
    "unit": ndarray_head(b"<M8[parsec]", 1) + bytes(8),
    "huge item": ndarray_head(b"|S999999999999", 1),
    "newline": ndarray_head(b"<f8\n", 1) + bytes(8),
    "too long": ndarray_head(b"<f8", 1) + bytes(9),
    "too short": ndarray_head(b"<f8", 2) + bytes(8),
    "huge": ndarray_head(b"<f8", 2**40),
    "wraps to 8": ndarray_head(b"<f8", 2**61 + 1) + bytes(8),
    "wraps to 0": ndarray_head(b"<f8", 2**63, 2**63),
    "empty of huge items": ndarray_head(b"|S999999999", 2**40),
    "empty items, huge": ndarray_head(b"|S0", 2**63, 2**63),
    "empty, huge": ndarray_head(b"<f8", 0, 2**63, 2**63),
    "dimensions": ndarray_head(b"<f8", *[1] * 65) + bytes(8),
    "dimensions cut": ndarray_head(b"<f8", ndim=255),
}


@pytest.mark.parametrize("data", BAD_NDARRAYS.values(), ids=BAD_NDARRAYS)
@pytest.mark.parametrize("has_numpy", [True, False], ids=["numpy", "no numpy"])
def test_malformed_ndarrays(data: bytes, has_numpy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_numpy:
        monkeypatch.setattr(codec_module, "_numpy", lambda: None)
    try:
        value = SMALL.decode(ext(4, data), [])
    except ProtocolError:
        pass
    else:  # nothing wrong with an empty one, whatever its shape, if it can be made
        assert data in (BAD_NDARRAYS["empty items, huge"], BAD_NDARRAYS["empty, huge"])
        assert value.nbytes == 0
    with pytest.raises(ProtocolError):
        SMALL.decode(ext(5, data), [memoryview(bytes(8))])
    with pytest.raises(ProtocolError):
        SMALL.decode(ext(5, data + bytes(4)), [memoryview(bytes(7))])


def test_a_receiver_without_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    numpy = pytest.importorskip("numpy")
    monkeypatch.setattr(codec_module, "_numpy", lambda: None)
    for count in (6, 600):
        received = sent(numpy.arange(count, dtype="i2").reshape(2, -1))
        assert (received.format, received.shape, received.readonly) == ("h", (2, count // 2), True)
        assert received.tolist() == [list(range(count // 2)), list(range(count // 2, count))]
        flat = sent(numpy.zeros(count, "M8[s]"))
        assert (flat.format, flat.nbytes) == ("B", count * 8)
    assert sent(numpy.zeros((0, 3))).nbytes == 0
    assert sent(numpy.array(7)).tolist() == 7


def test_numpy_is_imported_only_when_an_ndarray_arrives() -> None:
    pytest.importorskip("numpy")
    body = ext(4, ndarray_head(b"<i8", 2) + struct.pack("<2q", 3, 4))
    program = f"""
import sys
from zmqcore.codec import get_codec
codec = get_codec("msgpack")
buffers = []
class Other: pass
try:
    codec.encode([Other()], buffers)
except TypeError:
    pass
codec.decode(codec.encode([1, b"2"], buffers), buffers)
assert "numpy" not in sys.modules
assert codec.decode({body!r}, []).tolist() == [3, 4]
assert "numpy" in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ({1, 2}, r"\(set\): it has no form on the wire"),
        (object(), r"\(object\): it has no form"),
        (1j, r"\(complex\)"),
        (2**64, r"\(int\): it does not fit into 64 bits"),
        (-(2**63) - 1, r"\(int\): it does not fit into 64 bits"),
        ("\ud800", r"\(str\): it has lone surrogates"),
        (datetime(2026, 1, 1), r"\(datetime.datetime\): it has no time zone"),  # noqa: DTZ001 - what is refused
        (msgpack.ExtType(1, b"abcd"), r"\(msgpack.ext.ExtType\): extension types of one's own"),
        (Limits, r"\(type\)"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_the_error_names_the_type_and_the_path(value: Any, match: str) -> None:
    for root, path in [
        (((value,), {}), r"args\[0\]"),
        (((1, [{"x": value}]), {}), r"args\[1\]\[0\]\['x'\]"),
        (((), {"k": (0, value)}), r"kwargs\['k'\]\[1\]"),
        (value, "value"),
        ([{5: value}], r"value\[0\]\[5\]"),
        ([b"x" * 100, value, value], r"value\[1\]"),
    ]:
        with pytest.raises(BadArguments, match=rf"^cannot pack {path} {match}"):
            SMALL.encode(root, [])


def test_the_path_to_a_key() -> None:
    with pytest.raises(BadArguments, match=r"cannot pack a key of args\[1\] \(tuple\)"):
        SMALL.encode(((1, {(1, 2): 3}), {}), [])
    with pytest.raises(BadArguments, match=r"cannot pack a key of value \(object\)"):
        SMALL.encode({object(): 1}, [])


def test_the_path_through_keys_that_cannot_be_shown() -> None:
    class Rude(int):
        __hash__ = int.__hash__

        def __repr__(self) -> str:
            raise RuntimeError

    class Shy:
        def __repr__(self) -> str:
            raise RuntimeError

    with pytest.raises(BadArguments, match=r"value\[a Rude\]"):
        SMALL.encode({Rude(1): object()}, [])
    with pytest.raises(BadArguments, match="a key of value"):
        SMALL.encode({Shy(): 1}, [])
    with pytest.raises(BadArguments, match=rf"value\['{'k' * 79}\] \("):
        SMALL.encode({"k" * 10_000: object()}, [])


def test_the_path_in_what_contains_the_same_twice() -> None:
    common = [1, 2]
    culprit = object()
    with pytest.raises(BadArguments, match=r"value\[2\]\[1\]"):
        SMALL.encode([common, common, [common, culprit]], [])


def test_objects_whose_buffer_cannot_be_had() -> None:
    released = memoryview(b"x" * 100)
    released.release()
    with pytest.raises(BadArguments, match=r"value\[0\] \(memoryview\): operation forbidden on released"):
        SMALL.encode([released], [])


def test_a_dict_that_fails_while_it_is_read() -> None:
    class Broken(dict):  # type: ignore[type-arg]
        def items(self) -> Any:
            raise LookupError("no more")

    with pytest.raises(BadArguments, match="cannot pack the payload: no more"):
        SMALL.encode(Broken(a=1), [])


def test_after_an_error_all_is_well() -> None:
    codec = MsgpackCodec()
    for _ in range(20):
        with pytest.raises(BadArguments):
            codec.encode([1, "a" * 100, OrderedDict(a=b"x" * 100_000), object()], [])
        assert codec.encode(OrderedDict(a=1), []) == b"\x81\xa1a\x01"


def test_a_codec_keeps_no_payload() -> None:
    codec = MsgpackCodec(Limits(inline_bytes=64))
    data = bytearray(100)
    before = sys.getrefcount(data)
    codec.encode(OrderedDict(a=data), [])
    with pytest.raises(BadArguments):
        codec.encode(OrderedDict(a=data, b=object()), [])
    assert sys.getrefcount(data) == before
    data.append(1)


def test_a_huge_body_does_not_stay_in_a_packer() -> None:
    codec = MsgpackCodec()
    codec.encode(OrderedDict(a="x"), [])
    assert len(codec._idle) == 1
    codec.encode(OrderedDict(a="x" * (2 << 20)), [])
    assert codec._idle == []


# -- limits --------------------------------------------------------------------------------------------------


def test_the_sender_refuses_first() -> None:
    limits = Limits(message_bytes=100_000, depth=5, elements=50, buffers=3, inline_bytes=64)
    codec = MsgpackCodec(limits)
    for value, match in [
        (list(range(50)), "at least 51 elements, the limit is 50"),
        ([[[[[[]]]]]], "at least 6 deep, the limit is 5"),
        ([b"x" * 64] * 4, "4 large buffers, the limit is 3"),
        ([array.array("d", [0.0] * 8)] * 4, "4 large buffers, the limit is 3"),
        (b"x" * 100_001, "has 100007 bytes, the limit is 100000"),
        ("x" * 100_001, "the limit is 100000"),
        (OrderedDict(a=["x" * 60_000, "y" * 60_000]), "the limit is 100000"),
    ]:
        with pytest.raises(PayloadTooLarge, match=match):
            codec.encode(value, [])
    for value in (list(range(49)), [[[[[]]]]], [b"x" * 64] * 3, b"x" * 99_994, OrderedDict(a="x" * 99_990)):
        body, parts = wire(value, codec)
        codec.decode(body, parts)


def test_a_structure_that_contains_itself() -> None:
    loop: list[Any] = []
    loop.append(loop)
    for value in (loop, [object(), loop], {"k": (loop,)}):
        with pytest.raises((PayloadTooLarge, BadArguments)):
            SMALL.encode(value, [])
    with pytest.raises(PayloadTooLarge, match="does it contain itself"):
        SMALL.encode(((loop,), {}), [])


def test_the_receiver_keeps_its_own_limits() -> None:
    for limits, value in [
        (Limits(elements=10), list(range(10))),
        (Limits(depth=2), [[[]]]),
        (Limits(message_bytes=200), [b"x" * 100] * 2),
        (Limits(buffers=1), [b"x" * 100] * 2),
    ]:
        body, parts = wire(value)
        with pytest.raises(PayloadTooLarge, match=r"limit is \d"):
            MsgpackCodec(limits).decode(body, parts)
        assert SMALL.decode(body, parts) == value


@pytest.mark.parametrize(
    "limits",
    [
        {"depth": 0},
        {"depth": 513},
        {"elements": -1},
        {"message_bytes": 1.5},
        {"buffers": 65_536},
        {"inline_bytes": 0},
        {"inline_bytes": 1 << 63},
    ],
    ids=str,
)
def test_limits_that_make_no_sense(limits: dict[str, Any]) -> None:
    with pytest.raises(BadArguments, match=f"the limit {next(iter(limits))} "):
        Limits(**limits)


# -- anything ------------------------------------------------------------------------------------------------

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.binary(max_size=150)
    | st.binary(max_size=150).map(bytearray)
    | st.lists(st.floats(allow_nan=False), max_size=20).map(lambda items: array.array("d", items))
    | st.lists(st.integers(0, 255), max_size=100).map(lambda items: array.array("B", items))
    | st.datetimes(timezones=st.just(UTC)),
    lambda inner: (
        st.lists(inner, max_size=6)
        | st.dictionaries(st.text("abc") | st.integers(0, 9), inner, max_size=6)
        | st.dictionaries(st.text("abc"), inner, max_size=6).map(OrderedDict)
    ),
    max_leaves=25,
)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return type(b) is dict and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, array.array):
        return memoryview(a) == memoryview(b) and (type(b) is array.array) == (len(a) * a.itemsize < 64)
    if isinstance(a, (bytes, bytearray)):
        return bool(a == b) and type(b) is (bytes if len(a) < 64 else memoryview)
    if isinstance(a, float):
        return type(b) is float and a == b and math.copysign(1, a) == math.copysign(1, b)
    return type(a) is type(b) and bool(a == b)


@settings(deadline=None)
@given(values)
def test_round_trip(value: Any) -> None:
    assert same(value, sent(value))


@settings(deadline=None)
@given(values, st.data())
def test_a_damaged_message_never_crashes(value: Any, data: st.DataObject) -> None:
    body, parts = wire(value)
    damaged = bytearray(body)
    for _ in range(data.draw(st.integers(0, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    change = data.draw(st.sampled_from(["none", "drop", "add", "shorten"]))
    if change == "drop":
        del parts[:1]
    elif change == "add":
        parts.append(memoryview(b"more"))
    elif change == "shorten" and parts:
        parts[0] = parts[0][1:]
    try:
        SMALL.decode(damaged, parts)
    except (ProtocolError, PayloadTooLarge):
        pass


@settings(deadline=None)
@given(st.integers(-128, 127), st.binary(max_size=60), st.lists(st.binary(max_size=20), max_size=2))
def test_arbitrary_extensions_never_crash(code: int, data: bytes, parts: list[bytes]) -> None:
    try:
        SMALL.decode(ext(code, data), [memoryview(part) for part in parts])
    except ProtocolError:
        pass


@settings(deadline=None)
@given(
    st.sampled_from([4, 5]),
    st.from_regex(r"\A[<|>=][?biufcSUVmMO][0-9]{0,3}(\[[a-z]{1,2}\])?\Z").map(str.encode),
    st.lists(st.integers(0, 4) | st.integers(0, 2**64 - 1), max_size=4),
    st.binary(max_size=64),
)
def test_arbitrary_ndarrays_never_crash(code: int, dtype: bytes, shape: list[int], data: bytes) -> None:
    body = ndarray_head(dtype, *shape)
    parts = []
    if code == 4:
        body += data
    else:
        body += bytes(4)
        parts.append(memoryview(data))
    try:
        value = SMALL.decode(ext(code, body), parts)
    except ProtocolError:
        return
    assert value.nbytes == len(data)


def test_threads_share_a_codec() -> None:
    """Each thread gets back what it sent, also while others fail, and on the way that packers are shared."""
    codec = MsgpackCodec(Limits(inline_bytes=64))
    failed: list[Any] = []

    def work(number: int) -> None:
        value = OrderedDict(
            n=number, data=bytes([number]) * 100, when=datetime(2026, 1, number + 1, tzinfo=UTC)
        )
        expected = dict(value)
        for turn in range(400):
            if turn % 7 == 0:
                try:
                    codec.encode([value, object()], [])
                except BadArguments:
                    pass
            received = sent([value, array.array("B", [number])], codec)
            if received != [expected, array.array("B", [number])]:
                failed.append(received)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failed
    assert len(codec._idle) <= 8


def test_an_encode_within_an_encode() -> None:
    """User code that runs while a payload is packed may use the codec itself."""
    codec = MsgpackCodec()

    class Nested(dict):  # type: ignore[type-arg]
        def items(self) -> Any:
            inner = codec.encode(OrderedDict(b=2), [])
            return {"inner": inner}.items()

    assert sent([OrderedDict(a=1), Nested(x=1)], codec) == [{"a": 1}, {"inner": b"\x81\xa1b\x02"}]


# -- the registry --------------------------------------------------------------------------------------------


class Upper:
    id = 200
    name = "upper"

    def encode(self, value: Any, buffers: list[Any]) -> bytes:
        assert not buffers
        return str(value).upper().encode()

    def decode(self, body: Any, buffers: Any) -> Any:
        assert not buffers
        return bytes(body).decode()


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec_module, "_by_id", dict(codec_module._by_id))
    monkeypatch.setattr(codec_module, "_by_name", dict(codec_module._by_name))


def test_msgpack_is_there() -> None:
    codec = get_codec("msgpack")
    assert codec is get_codec(1)
    assert isinstance(codec, Codec)
    assert (codec.id, codec.name) == (1, "msgpack")
    assert repr(codec) == f"MsgpackCodec({Limits()!r})"


def test_a_codec_with_other_limits() -> None:
    codec = MsgpackCodec().with_limits(Limits(depth=3))
    assert codec.limits.depth == 3
    with pytest.raises(PayloadTooLarge):
        codec.encode([[[[]]]], [])


@pytest.mark.usefixtures("registry")
def test_a_codec_of_ones_own() -> None:
    codec = Upper()
    register_codec(codec)
    register_codec(codec)  # again: the same
    assert get_codec("upper") is get_codec(200) is codec


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"id": 0}, "from 1 to 255, not 0"),
        ({"id": 256}, "from 1 to 255, not 256"),
        ({"id": "1"}, "from 1 to 255, not '1'"),
        ({"name": ""}, "must have a name"),
        ({"id": 1}, "collides with 'msgpack' with id 1"),
        ({"name": "msgpack"}, "collides with 'msgpack' with id 1"),
    ],
    ids=str,
)
def test_codecs_that_cannot_be_registered(change: dict[str, Any], match: str) -> None:
    codec = Upper()
    for name, value in change.items():
        setattr(codec, name, value)
    with pytest.raises(BadArguments, match=match):
        register_codec(codec)
    assert get_codec(1).name == "msgpack"
    with pytest.raises(ProtocolError):
        get_codec(200)


def test_unknown_codecs() -> None:
    with pytest.raises(ProtocolError, match=r"codec 77; known here: \[1"):
        get_codec(77)
    with pytest.raises(BadArguments, match="no codec is named 'json'; known: msgpack"):
        get_codec("json")
