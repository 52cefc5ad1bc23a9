"""pack() and Envelope.parse(): what goes in comes out, and nothing that comes from a network harms.

Also run on the build with the sanitizers (``make asan``), where reading one byte too far ends the process.
"""

from __future__ import annotations

import array
import ctypes
import gc
import mmap
import struct
import threading
from typing import Any, ClassVar

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from zmqcore import errors
from zmqcore._frame import KINDS, Envelope, pack, pinned

MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0)  # no memory is needed for what is never touched
HEADER = struct.Struct("<2sBBBBHQQIHHII")
NOTHING = {"sent_buffers": 0, "sent_bytes": 0, "received_buffers": 0, "received_bytes": 0}

kinds = st.sampled_from(sorted(KINDS))
text = st.text(st.characters(exclude_categories=["Cs"]))
some_bytes = st.binary(max_size=300)
fields = st.fixed_dictionaries(
    {
        "kind": kinds,
        "id": st.integers(0, 2**64 - 1),
        "ack": st.integers(0, 2**64 - 1),
        "flags": st.integers(0, 255),
        "codec": st.integers(0, 255),
        "remaining_ms": st.none() | st.integers(0, 2**32 - 2),
        "topic": some_bytes,
        "method": text,
        "metadata": some_bytes,
        "body": some_bytes,
        "buffers": st.lists(some_bytes, max_size=4),
    }
)


def read(envelope: Envelope) -> dict[str, Any]:
    """Return every field. On arbitrary bytes none of them may raise."""
    repr(envelope)
    return {
        "kind": envelope.kind,
        "id": envelope.id,
        "ack": envelope.ack,
        "flags": envelope.flags,
        "codec": envelope.codec,
        "remaining_ms": envelope.remaining_ms,
        "topic": envelope.topic,
        "method": envelope.method,
        "metadata": envelope.metadata,
        "body": bytes(envelope.body),
        "buffers": [bytes(buffer) for buffer in envelope.buffers or ()],
    }


def try_to_parse(parts: list[bytes]) -> Envelope | None:
    """Return the envelope; or None if it was refused in the one way it may be."""
    try:
        envelope = Envelope.parse(parts)
    except errors.ProtocolError:
        return None
    read(envelope)
    # What is accepted adds up.
    assert envelope.n_bytes == sum(map(len, parts))
    assert len(envelope.buffers or ()) == len(parts) - 1
    return envelope


# -- there and back ------------------------------------------------------------------------------------------


@given(fields)
@example(
    {
        "kind": "cancel", "id": 2**64 - 1, "ack": 2**64 - 1, "flags": 255, "codec": 255,
        "remaining_ms": 2**32 - 2, "topic": b"t" * 65535, "method": "m" * 65535, "metadata": b"d" * 70000,
        "body": b"b" * 70000, "buffers": [b"x" * 70000],
    }
)  # fmt: skip
def test_every_field_comes_back(sent: dict[str, Any]) -> None:
    parts = pack(**sent)
    assert [type(part) for part in parts] == [bytes] * (1 + len(sent["buffers"]))
    identified = sent["flags"] & 2 != 0
    if identified and len(sent["metadata"]) < 16:
        with pytest.raises(errors.ProtocolError, match="identity"):
            Envelope.parse(parts)
        return
    envelope = Envelope.parse(parts)
    identity = sent["metadata"][:16] if identified else b""
    assert read(envelope) == {**sent, "metadata": sent["metadata"][len(identity) :]}
    assert envelope.identity == (struct.unpack("<QQ", identity) if identified else None)


@given(fields)
def test_the_bytes_are_the_documented_ones(sent: dict[str, Any]) -> None:
    method = sent["method"].encode()
    left = 0xFFFFFFFF if sent["remaining_ms"] is None else sent["remaining_ms"]
    header = HEADER.pack(
        b"zC", 1, KINDS[sent["kind"]], sent["flags"], sent["codec"], len(sent["buffers"]), sent["id"],
        sent["ack"], left, len(sent["topic"]), len(method), len(sent["metadata"]), len(sent["body"]),
    )  # fmt: skip
    assert pack(**sent) == [
        header + sent["topic"] + method + sent["metadata"] + sent["body"],
        *sent["buffers"],
    ]


@pytest.mark.parametrize(
    "make",
    [
        bytes,
        bytearray,
        memoryview,
        lambda data: array.array("B", data),
        lambda data: memoryview(bytearray(data)),
    ],
    ids=["bytes", "bytearray", "memoryview", "array", "writable-memoryview"],
)
@pytest.mark.parametrize("data", [b"", b"x", b"x" * 100_000], ids=["0", "1", "100000"])
def test_bodies_buffers_and_parts_are_any_bytes_like_object(make: Any, data: bytes) -> None:
    parts = pack("call", body=make(data), buffers=[make(data)])
    envelope = Envelope.parse([make(part) for part in parts])
    assert bytes(envelope.body) == data
    assert [bytes(buffer) for buffer in envelope.buffers] == [data]


def test_a_buffer_may_be_of_any_items_and_is_sent_as_bytes() -> None:
    numbers = array.array("d", [0.5, -1.0])
    empty = (ctypes.c_char * 0)()
    parts = pack("call", body=numbers, buffers=[numbers, empty])
    assert parts[1:] == [numbers.tobytes(), b""]
    assert parts[0].endswith(numbers.tobytes())
    words = array.array("I", parts[0])
    assert bytes(Envelope.parse([words, *parts[1:]]).body) == numbers.tobytes()


def test_an_envelope_keeps_its_memory_as_long_as_a_view_of_it_lives() -> None:
    envelope = Envelope.parse(pack("call", body=b"body" * 50, buffers=[b"buffer" * 50]))
    body, (buffer,) = envelope.body, envelope.buffers
    assert (body.readonly, buffer.readonly) == (True, True)
    del envelope
    gc.collect()
    assert bytes(body) == b"body" * 50
    assert bytes(buffer) == b"buffer" * 50
    assert pinned()["received_buffers"] == 1
    assert pinned()["received_bytes"] == 300
    slice_of_it = buffer[10:20]
    del body, buffer  # the body's view keeps the envelope, and that keeps its buffers
    assert pinned()["received_buffers"] == 1
    del slice_of_it
    assert pinned() == NOTHING


def test_views_cannot_be_written_to() -> None:
    envelope = Envelope.parse(pack("call", body=b"body", buffers=[b"buffer"]))
    for view in (envelope.body, envelope.buffers[0]):
        with pytest.raises(TypeError):
            view[0] = 0
        with pytest.raises(TypeError):
            ctypes.c_char.from_buffer(view)


# -- what comes from a network -------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=200), max_size=4))
@example([b"zC"])
@example([b"zC\x01\x01" + b"\xff" * 36])
@example([b"zC\x01\x01" + b"\0" * 36])
def test_arbitrary_bytes_are_an_envelope_or_refused(parts: list[bytes]) -> None:
    try_to_parse(parts)


@settings(max_examples=500)
@given(
    st.integers(0, 65535), st.integers(0, 65535), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1),
    st.binary(max_size=100),
)  # fmt: skip
@example(0, 0, 2**32 - 1, 1, b"")
@example(65535, 65535, 2**32 - 1, 2**32 - 1, b"x" * 100)
def test_lengths_are_believed_only_if_they_add_up(t: int, m: int, d: int, b: int, rest: bytes) -> None:
    part = HEADER.pack(b"zC", 1, 1, 0, 0, 0, 1, 0, 0xFFFFFFFF, t, m, d, b) + rest
    envelope = try_to_parse([part])
    assert (envelope is not None) == (t + m + d + b == len(rest))


@given(st.data())
def test_lengths_that_add_up_are_each_obeyed(data: st.DataObject) -> None:
    rest = data.draw(st.binary(max_size=120))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rest)), min_size=3, max_size=3)))
    t, m, d = cuts[0], cuts[1] - cuts[0], cuts[2] - cuts[1]
    part = HEADER.pack(b"zC", 1, 1, 0, 0, 0, 1, 0, 0xFFFFFFFF, t, m, d, len(rest) - cuts[2]) + rest
    envelope = try_to_parse([part])
    assert envelope is not None
    assert envelope.topic == rest[:t]
    assert envelope.method == rest[t : t + m].decode(errors="backslashreplace")
    assert envelope.metadata == rest[cuts[1] : cuts[2]]
    assert bytes(envelope.body) == rest[cuts[2] :]


@settings(max_examples=500)
@given(fields, st.data())
def test_a_mutated_envelope_is_one_or_refused(sent: dict[str, Any], data: st.DataObject) -> None:
    parts = pack(**sent)
    for _ in range(data.draw(st.integers(1, 4))):
        which = data.draw(st.integers(0, max(0, len(parts) - 1)))
        part = bytearray(parts[which]) if parts else bytearray()
        at = data.draw(st.integers(0, max(0, min(len(part), 60) - 1)))
        change = data.draw(st.sampled_from(["set", "cut", "insert", "append", "drop", "double"]))
        if change == "set" and part:
            part[at] = data.draw(st.integers(0, 255))
        elif change == "cut":
            del part[data.draw(st.integers(0, len(part))) :]
        elif change == "insert":
            part[at:at] = data.draw(st.binary(max_size=5))
        elif change == "append":
            part += data.draw(st.binary(max_size=5))
        elif change == "drop" and parts:
            del parts[which]
            continue
        elif change == "double":
            parts.append(bytes(part))
            continue
        if parts:
            parts[which] = bytes(part)
    try_to_parse(parts)


@pytest.mark.parametrize("offset", range(40))
def test_each_byte_of_the_header_may_be_anything(offset: int) -> None:
    part, buffer = pack(
        "call", id=1, topic=b"topic", method="m", metadata=b"meta", body=b"body", buffers=[b"b"]
    )
    accepted = set()
    for value in range(256):
        changed = bytearray(part)
        changed[offset] = value
        if try_to_parse([bytes(changed), buffer]) is not None:
            accepted.add(value)
    if offset in (0, 1, 2) or offset in (6, 7) or offset >= 28:
        # magic, version, number of buffers, lengths: only the right value
        assert accepted == {part[offset]}
    elif offset == 3:
        assert accepted == set(KINDS.values())
    elif offset == 4:
        # the metadata are too short for an identity
        assert accepted == {value for value in range(256) if not value & 2}
    else:
        assert accepted == set(range(256))


@pytest.mark.parametrize("size", [*range(41), 41, 52, 53])
def test_every_truncation_is_refused(size: int) -> None:
    (part,) = pack("call", topic=b"topic", method="m", metadata=b"meta", body=b"body")
    assert len(part) == 54
    with pytest.raises(errors.ProtocolError, match=str(size)):
        Envelope.parse([part[:size]])


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([], "at least one"),
        ([b""], "shorter than a header of 40 bytes"),
        ([b"ZC" + bytes(38)], "no magic number"),
        ([b"zC\x02" + bytes(37)], "another protocol version"),
        ([b"zC\x01\x0e" + bytes(36)], "unknown kind"),
        ([b"zC\x01\x01" + bytes(37)], "its own lengths"),
        ([b"zC\x01\x01" + bytes(36), b""], "announces 0 out-of-band buffers, but 1 came"),
    ],
)
def test_a_refusal_says_why(parts: list[bytes], reason: str) -> None:
    with pytest.raises(errors.ProtocolError, match=reason):
        Envelope.parse(parts)


@pytest.mark.parametrize("parts", [[None], ["text"], [3], 3, [memoryview(b"abcd")[::2]]])
def test_what_is_not_bytes_is_the_callers_mistake(parts: Any) -> None:
    with pytest.raises((TypeError, BufferError)):
        Envelope.parse(parts)


def test_what_is_not_bytes_is_no_empty_buffer() -> None:
    (part,) = pack("call")
    with pytest.raises(TypeError):
        Envelope.parse([part[:6] + b"\x01\x00" + part[8:], None])  # type: ignore[list-item]
    assert pinned() == NOTHING


def test_a_method_that_is_not_utf8_is_shown() -> None:
    part = HEADER.pack(b"zC", 1, 1, 0, 0, 0, 1, 0, 0, 0, 3, 0, 0) + b"a\xff\xed"
    assert Envelope.parse([part]).method == "a\\xff\\xed"


def test_an_envelope_of_ones_own_is_empty_and_harmless() -> None:
    assert "Envelope" in repr(Envelope())
    assert bytes(Envelope().body) == b""


# -- the sender's mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mistake", "refusal"),
    [
        ({"kind": "invoke"}, KeyError),
        ({"id": -1}, OverflowError),
        ({"id": 2**64}, OverflowError),
        ({"ack": 2**64}, OverflowError),
        ({"flags": 256}, OverflowError),
        ({"codec": 256}, OverflowError),
        ({"remaining_ms": -1}, OverflowError),
        ({"remaining_ms": 2**32}, OverflowError),
        ({"topic": "text"}, TypeError),
        ({"topic": None}, TypeError),
        ({"method": b"bytes"}, TypeError),
        ({"method": None}, TypeError),
        ({"method": "\ud800"}, UnicodeEncodeError),
        ({"metadata": None}, TypeError),
        ({"body": None}, TypeError),
        ({"body": "text"}, TypeError),
        ({"body": memoryview(b"abcd")[::2]}, BufferError),
        ({"buffers": 3}, TypeError),
        ({"buffers": ["text"]}, TypeError),
        ({"buffers": [b"good", None]}, TypeError),
        ({"buffers": [b"good", memoryview(b"abcd")[::2]]}, BufferError),
    ],
)
def test_a_mistake_is_refused_and_leaves_nothing_pinned(mistake: dict[str, Any], refusal: type) -> None:
    with pytest.raises(refusal):
        pack(**{"kind": "call", **mistake})
    assert pinned() == NOTHING


@pytest.mark.parametrize(
    ("message", "size", "limit"),
    [
        ({"topic": bytes(65536)}, 65536, 65535),
        ({"method": "x" * 65536}, 65536, 65535),
        ({"method": "ß" * 32768}, 65536, 65535),
        ({"body": bytes(101), "max_bytes": 100}, 101, 100),
        ({"topic": bytes(20), "metadata": bytes(300_000), "body": b"b", "max_bytes": 99}, 300_060, 262_144),
        ({"body": b"b", "buffers": [bytes(50), bytes(50), bytes(50)], "max_bytes": 100}, 151, 100),
        ({"buffers": [b""] * 65536}, 65536, 65535),
    ],
)
def test_over_a_limit_the_error_names_size_and_limit(message: dict[str, Any], size: int, limit: int) -> None:
    with pytest.raises(errors.PayloadTooLarge, match=rf"\b{size}\b.*\b{limit}\b"):
        pack("call", **message)
    assert pinned() == NOTHING


def test_a_body_that_its_length_field_cannot_hold_is_refused_unread() -> None:
    size = 2**32
    with (
        mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE) as huge,
        pytest.raises(errors.PayloadTooLarge, match=f"{size} bytes; the limit is {size - 1}"),
    ):
        pack("call", body=huge, max_bytes=2**40)


def test_at_the_limits_nothing_is_refused() -> None:
    pack("call", topic=bytes(65535), method="x" * 65535)
    pack("call", topic=bytes(50), body=bytes(100), max_bytes=100)
    pack("call", body=bytes(40), buffers=[bytes(30), bytes(30)], max_bytes=100)
    pack("call", metadata=bytes(262_104), body=bytes(100), max_bytes=100)
    assert len(pack("call", buffers=[b""] * 65535)) == 65536
    assert pinned() == NOTHING


class Talkative(bytearray):
    """Changes the list that is being packed when libzmq has given it back."""

    victims: ClassVar[list[list[Any]]] = []

    def __del__(self) -> None:
        for victim in self.victims:
            victim.extend([b"more"] * 5000)


def test_a_list_of_buffers_that_grows_while_it_is_packed_harms_nothing() -> None:
    buffers = [b"one", b"two"]
    # An error leaves this buffer to be released by the next one who packs: in the middle of its work.
    with pytest.raises(TypeError):
        pack("call", buffers=[Talkative(b"given back later"), None])
    gc.collect()
    Talkative.victims.append(buffers)
    try:
        parts = pack("call", buffers=buffers)
    finally:
        Talkative.victims.clear()
    assert len(buffers) == 5002, "the test has lost its point: nothing was released while packing"
    assert parts[1:] == [b"one", b"two"]
    assert len(Envelope.parse(parts).buffers) == 2


# -- many threads --------------------------------------------------------------------------------------------


def test_threads_do_not_disturb_each_other() -> None:
    failures: list[str] = []

    def work(seed: int) -> None:
        for number in range(300):
            body = bytes([seed]) * (number * 7 % 900)
            buffers = [bytearray([seed, i]) * (number % 50) for i in range(number % 3)]
            sent = {"kind": "call", "id": number, "method": f"m{seed}", "body": body}
            envelope = Envelope.parse(pack(**sent, buffers=buffers))
            if (envelope.id, envelope.method, bytes(envelope.body)) != (number, f"m{seed}", body):
                failures.append(f"{seed}, {number}: {envelope!r}")
            if [bytes(buffer) for buffer in envelope.buffers] != [bytes(buffer) for buffer in buffers]:
                failures.append(f"{seed}, {number}: buffers")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert pinned() == NOTHING
