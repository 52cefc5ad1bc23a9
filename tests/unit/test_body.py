"""The compiled half of the codec: lift, scan, and the encoder and decoder that every message goes through.

This file is also run on the build with the address sanitizer.
"""

from __future__ import annotations

import gc
import math
import struct
import sys
import threading
import tracemalloc
from collections import OrderedDict
from typing import Any, NamedTuple

import msgpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from zmqcore._body import EXT_BUFFER, MAX_DEPTH, BodyCodec
from zmqcore._decoder import Buffers, scan
from zmqcore._encoder import Unpackable, lift
from zmqcore.errors import PayloadTooLarge, ProtocolError


class Point(NamedTuple):
    x: Any
    y: Any


FAR = 1_000_000


class Left(Exception):
    """The compiled encoder left a value to the subclass."""


class Bare(BodyCodec):
    """Nothing but the compiled half."""

    def __init__(
        self,
        message_bytes: int = 1 << 24,
        buffers: int = 8,
        inline_bytes: int = 1 << 15,
        elements: int = FAR,
        depth: int = 64,
    ) -> None:
        self._keep(message_bytes, buffers, inline_bytes, elements, depth)

    def encode_any(self, _: Any, buffers: list[Any]) -> bytes:
        assert buffers == [], "what the compiled encoder has appended must be gone"
        raise Left

    def read_ext(self, code: int, data: bytes, _: Buffers) -> Any:
        return (code, data)


def reference(index: int) -> msgpack.ExtType:
    return msgpack.ExtType(EXT_BUFFER, struct.pack("<I", index))


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.binary()
)
keys = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text("aé\U0001f600b") | st.binary()
plain = st.recursive(
    scalars,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(keys, inner),
    max_leaves=60,
)
buffer_like = st.binary(min_size=20, max_size=40).flatmap(
    lambda data: st.sampled_from([data, bytearray(data), memoryview(data)])
)
with_buffers = st.recursive(
    scalars | buffer_like,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(keys, inner),
    max_leaves=40,
)


def same(a: Any, b: Any) -> bool:
    """Equal, with the types of the wire: 1 is neither 1.0 nor True, and a tuple is a list."""
    if isinstance(a, (list, tuple)):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return (
            isinstance(b, dict)
            and len(a) == len(b)
            and all(
                same(key, other) and same(value, b[other])
                for (key, value), other in zip(a.items(), b, strict=True)
            )
        )
    if isinstance(a, (bytes, bytearray, memoryview)):
        return isinstance(b, (bytes, memoryview)) and bytes(a) == bytes(b)
    if isinstance(a, float) and math.isnan(a):
        return isinstance(b, float) and math.isnan(b)
    return (
        type(a) is type(b)
        and a == b
        and (not isinstance(a, float) or math.copysign(1, a) == math.copysign(1, b))
    )


def elements(value: Any) -> int:
    if isinstance(value, (list, tuple)):
        return 1 + sum(map(elements, value))
    if isinstance(value, dict):
        return 1 + len(value) + sum(map(elements, value.values()))
    return 1


def depth(value: Any) -> int:
    levels = 0
    level = [value]
    while containers := [item for item in level if isinstance(item, (list, tuple, dict))]:
        levels += 1
        level = [
            inner for item in containers for inner in (item.values() if isinstance(item, dict) else item)
        ]
    return levels


def snapshot(value: Any) -> Any:
    """A deep copy that keeps the identity of the leaves."""
    if isinstance(value, (list, tuple)):
        return (type(value), [snapshot(item) for item in value])
    if isinstance(value, dict):
        return {key: snapshot(item) for key, item in value.items()}
    return id(value)


# -- encoder and decoder -------------------------------------------------------------------------------------


@settings(deadline=None)
@given(with_buffers)
@example(2**63)
@example(-(2**63))
@example({"": {"": ()}})
@example([b"x" * size for size in (0, 31, 32, 255, 256, 65535, 65536)])
@example(["x" * size for size in (0, 15, 16, 31, 32, 255, 256, 65535, 65536)])
@example([list(range(size)) for size in (0, 15, 16, 65535, 65536)])
@example([{str(i): i for i in range(size)} for size in (0, 15, 16, 65535, 65536)])
@example([sign * (2**n - d) for n in range(64) for d in (0, 1) for sign in (1, -1)])
@example([{"sku": i, "é": 1, "quantity of things": [i]} for i in range(200)])
def test_what_is_encoded_is_what_the_library_would_make_and_comes_back(value: Any) -> None:
    codec = Bare(inline_bytes=FAR)
    before = snapshot(value)
    expected = msgpack.packb(value)
    try:
        body = codec.encode(value, [])
    except Left:
        body = expected  # a key that is no str, a large int
    assert body == expected
    assert snapshot(value) == before
    scan(body, MAX_DEPTH, FAR)
    assert same(value, codec.decode(body, []))
    assert same(value, codec.decode(memoryview(bytearray(body)), ()))


@settings(deadline=None)
@given(with_buffers)
def test_large_buffers_go_out_of_band_as_the_objects_they_are(value: Any) -> None:
    codec = Bare(inline_bytes=20, buffers=FAR)
    buffers: list[Any] = []
    lifted_buffers: list[Any] = []
    lifted = msgpack.packb(lift(value, lifted_buffers, 20, MAX_DEPTH, FAR))
    try:
        body = codec.encode(value, buffers)
    except Left:
        body, buffers = lifted, lifted_buffers
    assert body == lifted
    assert [id(buffer) for buffer in buffers] == [id(buffer) for buffer in lifted_buffers]
    assert all(len(buffer) >= 20 for buffer in buffers)
    received = codec.decode(body, [memoryview(buffer).toreadonly() for buffer in buffers])
    assert same(value, received)


@pytest.mark.parametrize(
    "value",
    [
        2**64,
        -(2**63) - 1,
        {1: 2},
        {b"k": 2},
        OrderedDict(a=1),
        Point(1, 2),
        "\ud800",
        {"\ud800": 1},
        object(),
        {1, 2},
        memoryview(b"abcdef")[::2],
        [[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]],
        b"x" * (1 << 20),
    ],
    ids=repr,
)
def test_what_is_unusual_is_left_to_the_subclass(value: Any) -> None:
    with pytest.raises(Left):
        Bare(inline_bytes=FAR * 10).encode([b"x" * 100, value], [])


def test_a_value_that_is_left_takes_back_the_buffers_before_it() -> None:
    with pytest.raises(Left):  # Bare.encode_any looks at the buffers
        Bare(inline_bytes=10).encode([b"x" * 10, object()], [])


def test_a_released_memoryview_is_left() -> None:
    view = memoryview(b"abc")
    view.release()
    with pytest.raises(Left):
        Bare().encode(view, [])


@pytest.mark.parametrize("size", [4090, 4091, 4096, 5000, 70_000, 1_000_000])
def test_bodies_that_outgrow_the_stack(size: int) -> None:
    value = [b"x" * 100] * 20 + ["é" * (size // 2), 1.5, list(range(100)), {"k": None}]
    codec = Bare(inline_bytes=FAR * 10)
    body = codec.encode(value, [])
    assert body == msgpack.packb(value)
    assert codec.decode(body, []) == value


@pytest.mark.parametrize(
    ("limits", "fits", "too_much"),
    [
        ({"elements": 5}, [1, [2, 3]], [1, [2, 3, 4]]),
        ({"elements": 5}, {"a": 1, "b": 2}, {"a": 1, "b": [2]}),
        ({"elements": 1}, None, [None]),
        ({"depth": 2}, [[1]], [[[]]]),
        ({"depth": 2}, {"a": {}}, {"a": {"b": {}}}),
        ({"depth": 2}, ({},), ({"a": ()},)),
        ({"message_bytes": 10}, b"12345678", b"123456789"),
        ({"message_bytes": 16, "inline_bytes": 10}, b"1234567890", b"12345678901"),
        ({"buffers": 2, "inline_bytes": 2}, [b"12", b"34"], [b"12", b"34", b"56"]),
    ],
)
def test_each_limit_is_kept_exactly(limits: dict[str, int], fits: Any, too_much: Any) -> None:
    codec = Bare(**limits)
    buffers: list[Any] = []
    body = codec.encode(fits, buffers)
    assert same(fits, codec.decode(body, buffers))
    with pytest.raises(Left):
        codec.encode(too_much, [])
    body = Bare(**{**limits, "message_bytes": FAR, "elements": FAR, "depth": 64, "buffers": 9}).encode(
        too_much, buffers := []
    )
    with pytest.raises(PayloadTooLarge, match=r"limit is \d+"):
        codec.decode(body, buffers)


def test_an_instance_without_limits_has_room_for_nothing() -> None:
    class Forgetful(Bare):
        def __init__(self) -> None:
            pass

    with pytest.raises(Left):
        Forgetful().encode(None, [])
    with pytest.raises(PayloadTooLarge):
        Forgetful().decode(b"\xc0", [])


def test_small_memoryviews_and_bytearrays_are_released() -> None:
    data = bytearray(b"abc")
    assert Bare().encode([data, memoryview(data)], []) == b"\x92\xc4\x03abc\xc4\x03abc"
    data.append(1)  # BufferError if an export were left


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"\xc0\xc0",
        b"\x92\x01",
        b"\x81\x01",
        b"\xa5abc",
        b"\xd9\x05abc",
        b"\xda\x00",
        b"\xdb\x00\x00\x00",
        b"\xdb\xff\xff\xff\xff",
        b"\xc4\x05abc",
        b"\xc6\xff\xff\xff\xff",
        b"\xdc\xff\xff\x01",
        b"\xde\x00\x02\x01\x02\x03",
        b"\xca\x00\x00\x00",
        b"\xcb\x00",
        b"\xcf\x00",
        b"\xd3\x00",
        b"\xc7",
        b"\xc7\x01",
        b"\xc7\xff\x01",
        b"\xc9\xff\xff\xff\xff\x01",
        b"\xd4\x01",
        b"\xd8\x01\x00",
        b"\xc7\x05\x01a",
    ],
    ids=lambda body: body.hex() or "empty",
)
def test_malformed_bodies(body: bytes) -> None:
    with pytest.raises(ProtocolError, match=r"malformed msgpack: .* at byte"):
        scan(body, 64, FAR)
    with pytest.raises(ProtocolError, match=r"malformed msgpack: .* at byte"):
        Bare().decode(body, [])


@pytest.mark.parametrize(
    "body", [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\x91\xdd\xff\xff\xff\xff"]
)
def test_a_head_that_claims_billions_allocates_nothing(body: bytes) -> None:
    with pytest.raises(PayloadTooLarge, match="claims at least"):
        scan(body, 64, FAR)
    with pytest.raises(PayloadTooLarge, match="claims at least"):
        Bare().decode(body, [])


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (b"\xa1\xff", "UTF-8"),
        (b"\x81\xa1\xff\x01", "UTF-8"),
        (b"\x81\x90\x01", "a key of list"),
        (b"\x81\x80\x01", "a key of dict"),
        (b"\xd6\x01\x00\x00\x00\x00", "buffer 0 of 0"),
    ],
)
def test_what_only_decoding_can_refuse(body: bytes, match: str) -> None:
    scan(body, 64, FAR)
    with pytest.raises(ProtocolError, match=match):
        Bare().decode(body, [])


@settings(deadline=None)
@given(plain, st.data())
def test_every_beginning_of_a_body_is_told_to_be_cut_short(value: Any, data: st.DataObject) -> None:
    body = msgpack.packb(value)
    cut = memoryview(body)[: data.draw(st.integers(0, len(body) - 1))]  # what is missing follows in memory
    for refuse in (lambda: scan(cut, MAX_DEPTH, FAR), lambda: Bare().decode(cut, [])):
        with pytest.raises(
            ProtocolError, match=r"it ends|with only \d+ left|than there are bytes|within a length"
        ):
            refuse()
    with pytest.raises(ProtocolError, match="1 surplus bytes"):
        scan(body + b"\xc0", MAX_DEPTH, FAR)
    with pytest.raises(ProtocolError, match="1 surplus bytes"):
        Bare().decode(body + b"\xc0", [])


def refused_within(size_bytes: int, body: bytes, error: type[Exception], codec: Bare) -> None:
    """Decoding *body* raises *error*, and takes no more than *size_bytes* of memory at any time."""
    tracemalloc.start()
    try:
        with pytest.raises(error):
            codec.decode(body, [])
        assert tracemalloc.get_traced_memory()[1] < size_bytes
    finally:
        tracemalloc.stop()


def test_what_is_refused_costs_no_memory() -> None:
    # 1 MiB of empty maps would become 76 MB of dicts.
    maps = b"\xdd" + struct.pack(">I", 1 << 20) + b"\x80" * (1 << 20)
    refused_within(100_000, maps, PayloadTooLarge, Bare())
    # The same behind many heads, none of which is over the limit.
    maps = b"\xdc\x01\x00" + 256 * (b"\xdc\x10\x00" + b"\x80" * 4096)
    refused_within(100_000, maps, PayloadTooLarge, Bare())
    # Heads that claim what cannot follow, none of which is over the limit.
    refused_within(100_000, b"\xdc\xff\xff" * 15, ProtocolError, Bare())


@pytest.mark.parametrize("levels", [64, 65, MAX_DEPTH, MAX_DEPTH + 1, 100_000])
@pytest.mark.parametrize("opening", [b"\x91", b"\x81\xa1k", b"\xdc\x00\x01", b"\xdf\x00\x00\x00\x01\x01"])
@pytest.mark.parametrize("limit", [64, MAX_DEPTH, 10**9])
def test_depth(levels: int, opening: bytes, limit: int) -> None:
    body = opening * levels + b"\xc0"
    if levels <= min(limit, MAX_DEPTH):
        scan(body, limit, FAR)
        value = Bare(depth=limit).decode(body, [])
        assert depth(value) == levels
        return
    for refuse in (lambda: scan(body, limit, FAR), lambda: Bare(depth=limit).decode(body, [])):
        with pytest.raises(PayloadTooLarge, match=f"at least {min(limit, MAX_DEPTH) + 1} deep"):
            refuse()


@settings(deadline=None)
@given(st.binary(max_size=300), st.integers(0, 2))
def test_arbitrary_bytes_never_crash(body: bytes, count: int) -> None:
    buffers = [memoryview(b"out of band")] * count
    try:
        scan(body, 8, 100)
        valid = True
    except (ProtocolError, PayloadTooLarge):
        valid = False
    try:
        value = Bare(depth=8, elements=100).decode(body, buffers)
    except (ProtocolError, PayloadTooLarge):
        return
    assert valid, "decoded what scan refuses"
    assert elements(value) <= 100
    assert depth(value) <= 8


@settings(deadline=None)
@given(plain, st.data())
def test_damaged_bodies_never_crash(value: Any, data: st.DataObject) -> None:
    body = bytearray(msgpack.packb(value))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(body) - 1))
        body[at] = data.draw(st.integers(0, 255))
    del body[data.draw(st.integers(1, len(body))) :]
    try:
        result = Bare().decode(body, [])
    except (ProtocolError, PayloadTooLarge):
        return
    scan(body, 64, FAR)
    assert elements(result) <= len(body)


@settings(deadline=None)
@given(st.binary(max_size=64))
def test_scan_accepts_what_the_library_accepts(body: bytes) -> None:
    def hook(code: int, data: bytes) -> tuple[int, bytes]:
        return code, data

    try:
        expected = msgpack.unpackb(body, strict_map_key=False, ext_hook=hook, timestamp=0)
    except Exception:  # noqa: BLE001 - the library has many ways to say no
        return
    scan(body, 64, FAR)
    buffers = [memoryview(b"")] * 0
    if b"\xd6\x01" not in body and b"\xff" not in body:  # no reference to a buffer, no time
        assert same(expected, Bare().decode(body, buffers)) or "(" in repr(expected)


def test_the_map_keys_of_a_long_body_are_shared() -> None:
    rows = [{"sku": i, "qty": 1, "é": 2, "": 3, "k" * 40: 4} for i in range(1000)]
    received = Bare().decode(msgpack.packb(rows), [])
    assert received == rows
    last = {key: key for key in received[-1]}
    before = {key: key for key in received[-2]}
    assert last["sku"] is before["sku"]
    assert last["qty"] is before["qty"]


@settings(deadline=None)
@given(
    st.lists(
        st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=32), st.integers(0, 5)), min_size=40
    )
)
def test_sharing_keys_mixes_none_up(rows: list[dict[str, int]]) -> None:
    assert Bare().decode(msgpack.packb([0] * 64 + rows), []) == [0] * 64 + rows


def test_decoding_leaks_no_references() -> None:
    """Also not on the way out through an error, in the middle of a body, with shared keys."""
    key = "only in this test"
    good = msgpack.packb([{key: None, "b": [1.5, "x"]}] * 100)
    codec = Bare()
    outgrows = [b"x" * 3000] * 20

    def work() -> None:
        for body in (good, good[:-1], good + b"\xc1", good[:-1] + b"\xc1"):
            try:
                codec.decode(body, [])
            except ProtocolError:
                pass
        codec.encode(outgrows, [])
        for left in ([outgrows, {key: object()}], [b"x" * 40_000, "\ud800"]):
            try:
                codec.encode(left, [])
            except Left:
                pass

    tracemalloc.start()
    try:
        work()
        gc.collect()
        before, references = tracemalloc.get_traced_memory()[0], sys.getrefcount(None)
        for _ in range(200):
            work()
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] - before < 10_000
        if sys.version_info < (3, 12):  # None is immortal from then on
            assert abs(sys.getrefcount(None) - references) < 150
    finally:
        tracemalloc.stop()


def test_the_body_is_released_also_after_an_error() -> None:
    body = bytearray(b"\x91\xc1")
    with pytest.raises(ProtocolError):
        Bare().decode(body, [])
    with pytest.raises(ProtocolError):
        scan(body, 8, 8)
    body.append(0)


def test_bodies_that_are_no_buffers() -> None:
    for body in ("text", None, 5):
        with pytest.raises(TypeError):
            Bare().decode(body, [])
        with pytest.raises(TypeError):
            scan(body, 8, 8)
    with pytest.raises(BufferError):
        Bare().decode(memoryview(b"abcd")[::2], [])


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_extension_types_reach_the_subclass(kind: Any) -> None:
    for size in (0, 1, 2, 4, 8, 16, 17, 255, 256, 70_000):
        for code in (-128, -1, 0, 2, 127):
            data = b"x" * size
            head = msgpack.Packer().pack_ext_type(code % 256 if code >= 0 else code, data)
            assert Bare().decode(kind(head), []) == (code, data)


# -- out-of-band buffers -------------------------------------------------------------------------------------


def test_buffers_are_taken_once() -> None:
    first, second = bytearray(b"first"), b"second"
    buffers = Buffers([memoryview(first), memoryview(second)])
    assert buffers.unused == 2
    view = buffers.take(1)
    assert (view.obj, view.readonly, view.format) == (second, True, "B")
    assert buffers.unused == 1
    with pytest.raises(ProtocolError, match="two references to buffer 1"):
        buffers.take(1)
    with pytest.raises(ProtocolError, match="buffer 2 of 2"):
        buffers.take(2)
    assert buffers.take(0).readonly, "a writable view was given"


def test_a_readonly_view_of_bytes_is_handed_on_as_it_is() -> None:
    view = memoryview(b"12345678")
    assert Buffers([view]).take(0) is view
    assert Buffers([view.cast("d")]).take(0).format == "B"


@pytest.mark.parametrize(
    ("value", "count", "match"),
    [
        ([reference(0), reference(0)], 1, "two references"),
        ([reference(1)], 1, "buffer 1 of 1"),
        ([reference(2**32 - 1)], 1, "buffer 4294967295 of 1"),
        ([reference(0)], 2, "1 buffers of 2 have no reference"),
        (None, 1, "1 buffers of 1 have no reference"),
    ],
)
def test_every_buffer_is_referred_to_exactly_once(value: Any, count: int, match: str) -> None:
    with pytest.raises(ProtocolError, match=match):
        Bare().decode(msgpack.packb(value), [memoryview(b"x")] * count)


def test_a_buffer_may_be_a_key() -> None:
    assert Bare().decode(msgpack.packb({reference(0): 1}), [memoryview(b"x")]) == {memoryview(b"x"): 1}
    with pytest.raises(ProtocolError, match="a key of"):
        # of something that may change: not hashable
        Bare().decode(msgpack.packb({reference(0): 1}), [memoryview(bytearray(b"x"))])


# -- lift ----------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(with_buffers)
def test_lift_changes_nothing_and_copies_only_what_it_must(value: Any) -> None:
    before = snapshot(value)
    buffers: list[Any] = []
    lifted = lift(value, buffers, 20, MAX_DEPTH, FAR)
    assert snapshot(value) == before
    if not buffers:
        assert lifted is value
    received = Bare(buffers=FAR).decode(msgpack.packb(lifted), [memoryview(b).toreadonly() for b in buffers])
    assert same(value, received)


@settings(deadline=None)
@given(with_buffers)
def test_lift_counts_as_scan_does(value: Any) -> None:
    lifted = lift(value, [], FAR, MAX_DEPTH, FAR)
    body = msgpack.packb(value)
    limits = (max(depth(value), 1), elements(value))
    assert lift(value, [], FAR, *limits) is lifted
    scan(body, *limits)
    for smaller in ((limits[0] - 1, FAR), (MAX_DEPTH, limits[1] - 1)):
        if smaller[0] < depth(value) or smaller[1] < elements(value):
            with pytest.raises(PayloadTooLarge):
                lift(value, [], FAR, *smaller)
            with pytest.raises(PayloadTooLarge):
                scan(body, *smaller)


def test_lift_walks_subclasses_and_leaves_the_rest() -> None:
    other = object()
    value = OrderedDict(a=Point(b"x" * 30, other), b=[memoryview(b"abcdef")[::2]])
    buffers: list[Any] = []
    lifted = lift(value, buffers, 20, 64, FAR)
    assert buffers == [b"x" * 30]
    assert lifted == {"a": [reference(0), other], "b": [b"ace"]}
    assert value["a"].x == b"x" * 30


def test_lift_makes_strided_views_contiguous() -> None:
    data = bytes(range(100))
    buffers: list[Any] = []
    lifted = lift([memoryview(data)[::2], memoryview(data)[::-1]], buffers, 60, 64, FAR)
    assert lifted == [data[::2], reference(0)]
    assert buffers == [data[::-1]]


def test_keys_are_never_lifted() -> None:
    buffers: list[Any] = []
    value = {b"k" * 50: b"v" * 50}
    assert lift(value, buffers, 20, 64, FAR) == {b"k" * 50: reference(0)}
    assert buffers == [b"v" * 50]


@pytest.mark.parametrize(
    "culprit",
    [(1,), frozenset((1,)), Point(1, 2), msgpack.ExtType(1, b"abcd")],
    ids=lambda c: type(c).__name__,
)
def test_containers_as_keys(culprit: Any) -> None:
    with pytest.raises(Unpackable) as caught:
        lift([{culprit: 1}], [], 20, 64, FAR)
    assert caught.value.value is culprit


def test_extension_types_of_ones_own_are_refused() -> None:
    culprit = msgpack.ExtType(1, b"abcd")
    with pytest.raises(Unpackable) as caught:
        lift([[culprit]], [], 20, 64, FAR)
    assert caught.value.value is culprit


def test_a_structure_that_contains_itself_ends_by_the_depth() -> None:
    loop: list[Any] = []
    loop.append(loop)
    knot: dict[str, Any] = {}
    knot["k"] = (knot,)
    for value in (loop, knot):
        with pytest.raises(PayloadTooLarge, match="does it contain itself"):
            lift(value, [], 20, 64, FAR)
        with pytest.raises(PayloadTooLarge, match=f"at least {MAX_DEPTH + 1} deep"):
            lift(value, [], 20, 10**9, FAR)
        with pytest.raises(Left):
            Bare().encode(value, [])


# -- threads -------------------------------------------------------------------------------------------------


def test_threads_that_change_what_is_encoded() -> None:
    """What is announced is what follows, or the value is left to the general way: never a broken body."""
    shared: list[Any] = [{"a": 1}, [1, 2, 3]]
    stop = threading.Event()
    broken: list[Any] = []

    def change() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            shared[0][f"k{number % 50}"] = number
            shared[1].append(number)
            if number % 40 == 0:
                shared[0].clear()
                shared[1].clear()

    def encode() -> None:
        codec = Bare()
        for _ in range(3000):
            try:
                body = codec.encode(shared, [])
            except Left:
                continue
            try:
                codec.decode(body, [])
            except ProtocolError as exc:
                broken.append(exc)

    changer = threading.Thread(target=change)
    encoders = [threading.Thread(target=encode) for _ in range(2)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in (changer, *encoders):
            thread.start()
        for thread in encoders:
            thread.join()
    finally:
        stop.set()
        changer.join()
        sys.setswitchinterval(interval)
    assert not broken
