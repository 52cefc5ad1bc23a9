"""Write the test vectors of the wire format: ``python tests/frame/generate_vectors.py``.

With ``--check`` it only compares. This is a second implementation of ``docs/reference/protocol.md``, as
small as one can be: it packs with ``struct`` and plain MessagePack and uses nothing of zmqcore. The tests
hold zmqcore against what it writes.
"""

from __future__ import annotations

import datetime
import json
import struct
import sys
from pathlib import Path
from typing import Any

import msgpack

DIRECTORY = Path(__file__).parent / "vectors"

KINDS = {
    "call": 1, "cast": 2, "fanout": 3, "reply": 4, "error": 5, "ack": 6, "ping": 7, "pong": 8, "hello": 9,
    "goodbye": 10, "cancel": 11, "item": 12, "credit": 13,
}  # fmt: skip
FLOW = 1
IDENTIFIED = 2
MSGPACK = 1
NO_DEADLINE = 0xFFFFFFFF
INSTANCE = bytes(range(0xA0, 0xB0))
# The body of a hello: instance, the largest message in bytes (256 KiB more than body and buffers), the most buffers.
WELCOME = INSTANCE + struct.pack("<QI", (1 << 28) + (1 << 18), 1024)
ITEM_FORMATS = {
    "<i2": "h", "<i4": "i", "<u8": "Q", "<f4": "f", "<f8": "d", "H": "H", "d": "d",
}  # fmt: skip


def envelope(
    kind: str,
    *,
    id: int = 0,
    flags: int = 0,
    codec: int = 0,
    ack: int = 0,
    remaining_ms: int | None = None,
    topic: str = "",
    method: str = "",
    metadata: bytes = b"",
    body: bytes = b"",
    buffers: tuple[bytes, ...] = (),
) -> list[bytes]:
    """Return the message parts."""
    where, what = topic.encode(), method.encode()
    head = struct.pack(
        "<2sBBBBHQQIHHII",
        b"zC",
        1,
        KINDS[kind],
        flags,
        codec,
        len(buffers),
        id,
        ack,
        NO_DEADLINE if remaining_ms is None else remaining_ms,
        len(where),
        len(what),
        len(metadata),
        len(body),
    )
    return [head + where + what + metadata + body, *buffers]


class Body:
    """A value in the vectors' notation (see the README there), packed."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.parts: dict[int, bytes] = {}
        self.bytes: bytes = msgpack.packb(self._packable(value))

    @property
    def buffers(self) -> tuple[bytes, ...]:
        return tuple(self.parts[number] for number in sorted(self.parts))

    def _packable(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._packable(item) for item in value]
        if not isinstance(value, dict):
            return value
        if "map" in value:
            return {self._packable(key): self._packable(item) for key, item in value["map"]}
        if "time" in value:
            return _time(value["time"])
        if "bytes" in value:
            raw = bytes.fromhex(value["bytes"])
            return raw if "part" not in value else msgpack.ExtType(1, self._part(value, raw))
        if "array" in value:
            typecode = value["array"]
            head = struct.pack("<BB", ord(typecode), struct.calcsize("<" + ITEM_FORMATS[typecode]))
            return self._items(value, typecode, head, 2, 3)
        dtype, shape = value["ndarray"], value["shape"]
        head = bytes([len(dtype)]) + dtype.encode() + struct.pack(f"<B{len(shape)}Q", len(shape), *shape)
        return self._items(value, dtype, head, 4, 5)

    def _items(self, value: Any, item: str, head: bytes, inside: int, outside: int) -> Any:
        raw = struct.pack(f"<{len(value['items'])}{ITEM_FORMATS[item]}", *value["items"])
        if "part" not in value:
            return msgpack.ExtType(inside, head + raw)
        return msgpack.ExtType(outside, head + self._part(value, raw))

    def _part(self, value: Any, raw: bytes) -> bytes:
        self.parts[value["part"]] = raw
        return struct.pack("<I", value["part"] - 1)


def _time(text: str) -> msgpack.Timestamp:
    since = datetime.datetime.fromisoformat(text) - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    return msgpack.Timestamp(since.days * 86400 + since.seconds, since.microseconds * 1000)


def request(args: list[Any], **kwargs: Any) -> list[Any]:
    return [args, {"map": [[key, value] for key, value in kwargs.items()]}]


def failure(code: str, type: str, message: str, traceback: str = "") -> dict[str, Any]:
    fields = {"code": code, "type": type, "message": message, "traceback": traceback}
    return {"map": [[key, value] for key, value in fields.items()]}


INVENTORY = {"topic": "inventory", "method": "reserve"}
LONG = bytes(range(32)).hex()
LONGER = bytes(range(255, 215, -1)).hex()


def valid() -> list[dict[str, Any]]:
    """Return the vectors that a receiver must accept."""
    made: list[dict[str, Any]] = []

    def add(
        name: str, text: str, kind: str, value: Any = ..., *, canonical: bool = True, **fields: Any
    ) -> None:
        vector: dict[str, Any] = {"name": name, "description": text, "valid": True}
        raw = fields.pop("raw", b"")
        if value is not ...:
            body = Body(value)
            fields["codec"] = MSGPACK
            parts = envelope(kind, body=body.bytes, buffers=body.buffers, **fields)
            raw = body.bytes
        else:
            parts = envelope(kind, body=raw, **fields)
        vector["parts"] = [part.hex() for part in parts]
        vector["envelope"] = {
            "kind": kind,
            "flags": fields.get("flags", 0),
            "codec": fields.get("codec", 0),
            "buffers": len(parts) - 1,
            "id": fields.get("id", 0),
            "ack": fields.get("ack", 0),
            "remaining_ms": fields.get("remaining_ms"),
            "topic": fields.get("topic", ""),
            "method": fields.get("method", ""),
            "metadata": fields.get("metadata", b"").hex(),
            "body": raw.hex(),
        }
        if fields.get("flags", 0) & IDENTIFIED:
            # What the message's own metadata are stands behind the identity.
            vector["envelope"]["identity"] = list(struct.unpack("<QQ", fields["metadata"][:16]))
            vector["envelope"]["metadata"] = fields["metadata"][16:].hex()
        if value is not ...:
            vector["value"] = value
            vector["canonical"] = canonical
        made.append(vector)

    add(
        "call",
        "The smallest useful call: no deadline, no flow, as a REQ socket would send it.",
        "call",
        request(["sku-1"], qty=2),
        id=1,
        **INVENTORY,
    )
    add(
        "call-no-arguments",
        "A call of a built-in method.",
        "call",
        request([]),
        id=2,
        topic="inventory",
        method="zmqcore.ping",
    )
    add(
        "call-flow",
        "A call by a client that counts on acknowledgements, with 2000 ms left, to one server.",
        "call",
        request(["sku-1"]),
        id=1,
        flags=FLOW,
        remaining_ms=2000,
        topic="stock/inventory@host-3%40lvm",
        method="reserve",
    )
    add(
        "call-expired",
        "No time is left: it is not run, and answered by the error 'expired'.",
        "call",
        request(["sku-1"]),
        id=3,
        remaining_ms=0,
        **INVENTORY,
    )
    add(
        "call-longest-deadline",
        "One less than the mark for no deadline: 49.7 days.",
        "call",
        request([]),
        id=3,
        remaining_ms=NO_DEADLINE - 1,
        **INVENTORY,
    )
    add(
        "call-unicode",
        "Topic and method are UTF-8; so is every str.",
        "call",
        request(["Grüße, 世界 🙂"], größe="ß"),
        id=4,
        topic="läger",
        method="größe",
    )
    add(
        "call-metadata",
        "Metadata is opaque bytes between method and body.",
        "call",
        request([1]),
        id=5,
        metadata=msgpack.packb({"trace": "4f1a"}),
        **INVENTORY,
    )
    add(
        "call-largest-numbers",
        "The largest id and ack, and flag bits without a meaning: a receiver ignores them.",
        "call",
        request([]),
        id=2**64 - 1,
        ack=2**64 - 1,
        flags=0xFC,
        **INVENTORY,
    )
    add(
        "call-plain-values",
        "Every plain type.",
        "call",
        request(
            [
                None,
                True,
                False,
                0,
                127,
                128,
                255,
                256,
                65535,
                65536,
                2**32,
                2**64 - 1,
                -1,
                -32,
                -33,
                -129,
                -32769,
                -(2**31) - 1,
                -(2**63),
                1.5,
                -0.25,
                "",
                "x" * 31,
                "x" * 32,
                {"bytes": ""},
                {"bytes": "00ff"},
                [],
                {"map": []},
                {"map": [[1, "int key"], ["s", [[]]]]},
            ]
        ),
        id=6,
        **INVENTORY,
    )
    add(
        "call-times",
        "Moments in MessagePack's three lengths.",
        "call",
        request(
            [
                {"time": "2001-09-09T01:46:40+00:00"},
                {"time": "2020-02-29T12:30:45.000250+00:00"},
                {"time": "1900-01-01T00:00:00+00:00"},
            ]
        ),
        id=7,
        **INVENTORY,
    )
    add(
        "call-buffer",
        "One out-of-band buffer.",
        "call",
        request([{"bytes": LONG, "part": 1}]),
        id=8,
        **INVENTORY,
    )
    add(
        "call-buffers",
        "Three of them, one inside containers, one by keyword.",
        "call",
        request(
            [{"bytes": LONG, "part": 1}, [{"map": [["deep", {"bytes": LONGER, "part": 2}]]}]],
            data={"bytes": LONG, "part": 3},
        ),
        id=9,
        **INVENTORY,
    )
    add(
        "call-buffers-in-another-order",
        "References may stand in any order.",
        "call",
        request([{"bytes": LONGER, "part": 2}, {"bytes": LONG, "part": 1}]),
        id=10,
        canonical=False,
        **INVENTORY,
    )
    add(
        "call-empty-buffer",
        "An out-of-band buffer may be empty.",
        "call",
        request([{"bytes": "", "part": 1}]),
        id=11,
        canonical=False,
        **INVENTORY,
    )
    add(
        "call-array",
        "Items in the body.",
        "call",
        request([{"array": "H", "items": [1, 2, 65535]}]),
        id=12,
        **INVENTORY,
    )
    add(
        "call-array-buffer",
        "Items out of band.",
        "call",
        request([{"array": "d", "items": [0.5, -1.0, 1e300], "part": 1}]),
        id=13,
        **INVENTORY,
    )
    add(
        "call-ndarray",
        "2 by 3 items in the body, in C order.",
        "call",
        request([{"ndarray": "<i2", "shape": [2, 3], "items": [1, 2, 3, -4, -5, -6]}]),
        id=14,
        **INVENTORY,
    )
    add(
        "call-ndarray-buffer",
        "2 by 4 items out of band.",
        "call",
        request(
            [
                {
                    "ndarray": "<f4",
                    "shape": [2, 4],
                    "items": [0.0, 0.5, 1.0, 1.5, -2.0, -2.5, 3.0, 1024.0],
                    "part": 1,
                }
            ]
        ),
        id=15,
        **INVENTORY,
    )
    add(
        "call-ndarray-empty",
        "A length of 0 in the shape.",
        "call",
        request([{"ndarray": "<f8", "shape": [3, 0], "items": []}]),
        id=16,
        **INVENTORY,
    )
    add(
        "call-ndarray-scalar",
        "No dimension at all: one item.",
        "call",
        request([{"ndarray": "<i4", "shape": [], "items": [-7]}]),
        id=17,
        **INVENTORY,
    )
    add(
        "cast",
        "One way: no answer comes.",
        "cast",
        request(["sku-1"]),
        id=18,
        flags=FLOW,
        topic="inventory",
        method="touch",
    )
    add(
        "cast-deadline",
        "A cast that is not run if it has waited longer than 1.5 s.",
        "cast",
        request([]),
        id=19,
        flags=FLOW,
        remaining_ms=1500,
        topic="inventory",
        method="touch",
    )
    add(
        "cast-accepted",
        "A cast that its sender keeps until it is finished, as its third one.",
        "cast",
        request(["sku-1"]),
        id=22,
        flags=FLOW | IDENTIFIED,
        metadata=struct.pack("<QQ", 0x0123456789ABCDEF, 3),
        topic="inventory",
        method="touch",
    )
    add(
        "cast-accepted-again",
        "The same one with metadata of its own, sent again on another connection: another id, the same identity.",
        "cast",
        request(["sku-1"]),
        id=1,
        flags=FLOW | IDENTIFIED,
        metadata=struct.pack("<QQ", 0x0123456789ABCDEF, 3) + msgpack.packb({"trace": "4f1a"}),
        topic="inventory",
        method="touch",
    )
    add(
        "fanout",
        "One copy of a message to every member; no answer comes.",
        "fanout",
        request([{"map": [["level", 3]]}]),
        id=20,
        flags=FLOW,
        topic="inventory",
        method="reload",
    )
    add(
        "reply",
        "The result of request 1. To a client without flow: ack is 0.",
        "reply",
        {"map": [["sku", "sku-1"], ["qty", 2]]},
        id=1,
    )
    add(
        "reply-ack",
        "The result of request 8, and the acknowledgement of everything up to 9.",
        "reply",
        42,
        id=8,
        ack=9,
    )
    add("reply-none", "A method that returns nothing.", "reply", None, id=2)
    add("reply-buffer", "A result that is one buffer.", "reply", {"bytes": LONG, "part": 1}, id=3)
    add(
        "reply-ndarray-buffer",
        "A result that is an array.",
        "reply",
        {"ndarray": "<u8", "shape": [3], "items": [1, 2, 2**64 - 1], "part": 1},
        id=4,
    )
    add(
        "error-raised",
        "The handler raised.",
        "error",
        failure("raised", "KeyError", "'sku-9'", "Traceback (most recent call last):\nKeyError: 'sku-9'\n"),
        id=5,
        ack=5,
    )
    add(
        "error-no-such-method",
        "The server refused.",
        "error",
        failure("no_such_method", "", "topic 'inventory' has no method 'resrve'; it has reserve"),
        id=6,
    )
    add(
        "error-of-the-port",
        "Refused before any codec was involved: codec 0 and plain text.",
        "error",
        id=7,
        raw=b"ProtocolError: the envelope announces another number of buffers than came",
    )
    add("ack", "Everything up to message 256 has been taken.", "ack", ack=256)
    add(
        "ack-finished",
        "Everything up to message 256 has been taken, and what was accepted up to 200 is finished.",
        "ack",
        id=200,
        ack=256,
    )
    add(
        "error-draining",
        "The call came on a connection made after the goodbye: not executed, and to be tried elsewhere.",
        "error",
        id=1,
        ack=1,
        raw=b"Draining: the server takes nothing new",
    )
    add(
        "hello",
        "The first message seen on this connection was number 1. The port takes messages of 256 MiB + 256 KiB with"
        " 1024 buffers.",
        "hello",
        id=1,
        raw=WELCOME,
    )
    add(
        "hello-longer",
        "Of a later port, which says more: what is behind the first 28 bytes is to be ignored.",
        "hello",
        id=1,
        raw=INSTANCE + struct.pack("<QI", 100_000 + (1 << 18), 2) + b"\x01\x02\x03\x04",
    )
    add(
        "hello-after-a-break",
        "The connection was made again: what is not acknowledged up to 41 is lost.",
        "hello",
        id=42,
        raw=WELCOME,
    )
    add(
        "hello-of-a-client",
        "Before its first message, number 1: it takes bodies and buffers of 1 MiB together, and 16 buffers.",
        "hello",
        id=1,
        flags=FLOW,
        raw=bytes(16) + struct.pack("<QI", (1 << 20) + (1 << 18), 16),
    )
    add("goodbye", "By a server: it takes nothing new. By a client: it will send nothing more.", "goodbye")
    add("ping", "Answered by a pong of the same id.", "ping", id=21, flags=FLOW)
    add("pong", "The answer to ping 21.", "pong", id=21, ack=21)
    add(
        "cancel",
        "The caller of request 8 does not wait any longer. There is no answer.",
        "cancel",
        id=8,
        flags=FLOW,
    )
    add("item", "One of several results of call 7; more are to come.", "item", "line 1", id=7, ack=7)
    add("item-buffer", "Likewise, and large.", "item", {"bytes": LONG, "part": 1}, id=7, ack=7)
    add(
        "item-last",
        "The reply to a call that was answered by items: nothing more comes.",
        "reply",
        None,
        id=7,
        ack=7,
    )
    add(
        "credit",
        "The caller of request 7 takes 16 items more.",
        "credit",
        id=7,
        flags=FLOW,
        raw=struct.pack("<I", 16),
    )
    return made


def together() -> list[dict[str, Any]]:
    """Return the vectors of parts that hold the envelopes of other vectors, which a receiver must accept."""
    by_name = {vector["name"]: vector for vector in valid()}

    def add(name: str, text: str, holds: list[str]) -> dict[str, Any]:
        part = "".join(by_name[each]["parts"][0] for each in holds)
        return {"name": name, "description": text, "valid": True, "parts": [part], "holds": holds}

    return [
        add("together", "Three requests and a ping in one part.", ["call-flow", "cast", "fanout", "ping"]),
        add("together-answers", "Two answers in one part.", ["reply", "error-raised"]),
    ]


def invalid() -> list[dict[str, Any]]:
    """Return the vectors that a receiver must refuse; ``layer`` says who sees it."""
    made: list[dict[str, Any]] = []
    good = Body(request(["sku-1"]))
    plain = envelope("call", id=1, codec=MSGPACK, body=good.bytes, **INVENTORY)[0]

    def add(name: str, text: str, parts: list[bytes], layer: str, error: str = "ProtocolError") -> None:
        made.append(
            {"name": f"invalid-{name}", "description": text, "valid": False, "layer": layer, "error": error,
             "parts": [part.hex() for part in parts]}
        )  # fmt: skip

    def patched(offset: int, *values: int) -> list[bytes]:
        data = bytearray(plain)
        data[offset : offset + len(values)] = values
        return [bytes(data)]

    def body(name: str, text: str, raw: bytes, *buffers: bytes, layer: str = "body", **more: str) -> None:
        parts = envelope("call", id=1, codec=MSGPACK, body=raw, buffers=buffers, **INVENTORY)
        add(name, text, parts, layer, **more)

    def ext(code: int, data: bytes) -> bytes:
        # By hand, because the library makes no ExtType of a negative code: [[ext 8], {}].
        return b"\x92\x91\xc7" + struct.pack("<Bb", len(data), code) + data + b"\x80"

    add("empty", "A part without a byte.", [b""], "envelope")
    add("short", "One byte less than a header.", [plain[:39]], "envelope")
    add("magic", "Another first byte.", patched(0, 0x5A), "envelope")
    add("magic-2", "Another second byte.", patched(1, 0x63), "envelope")
    add("version-0", "A version that has never been.", patched(2, 0), "envelope")
    add("version-2", "A version that is not known.", patched(2, 2), "envelope")
    add("kind-0", "Kind 0 is not used.", patched(3, 0), "envelope")
    add("kind-14", "The first kind that is not assigned.", patched(3, 14), "envelope")
    add("kind-255", "The last one.", patched(3, 255), "envelope")
    add("truncated", "The last byte of the body is missing.", [plain[:-1]], "envelope")
    add("header-only", "The lengths announce what did not come.", [plain[:40]], "envelope")
    add("surplus-byte", "A byte behind the body.", [plain + b"\0"], "envelope")
    add("together-surplus-byte", "A byte behind two envelopes.", [plain * 2 + b"\0"], "envelope")
    add("together-truncated", "The second one is not whole.", [plain + plain[:-1]], "envelope")
    add("together-magic", "The second one is none.", [plain + patched(0, 0x5A)[0]], "envelope")
    add("together-buffer", "The second one announces a buffer.", [plain + patched(6, 1)[0]], "envelope")
    add(
        "together-buffers",
        "The first one announces a buffer, which comes.",
        [patched(6, 1)[0] + plain, b"buffer"],
        "envelope",
    )
    add("topic-length", "The topic is announced one byte too long.", patched(28, 10), "envelope")
    add("topic-length-longest", "65535 bytes of topic announced.", patched(28, 0xFF, 0xFF), "envelope")
    add("method-length", "The method is announced one byte too short.", patched(30, 6), "envelope")
    add(
        "metadata-length-longest",
        "4294967295 bytes of metadata announced.",
        patched(32, *b"\xff" * 4),
        "envelope",
    )
    add(
        "identity-short",
        "An identity is announced, and there are no metadata for it.",
        patched(4, FLOW | IDENTIFIED),
        "envelope",
    )
    add("body-length-longest", "4294967295 bytes of body announced.", patched(36, *b"\xff" * 4), "envelope")
    add(
        "lengths-that-wrap",
        "Lengths whose sum is right only in 32 bits.",
        patched(32, *struct.pack("<II", 2**32 - 1, len(good.bytes) + 1)),
        "envelope",
    )
    add("buffer-missing", "One out-of-band buffer announced, none came.", patched(6, 1), "envelope")
    add("buffer-surplus", "A part behind an envelope that announces none.", [plain, b"surplus"], "envelope")
    add("buffers-65535", "65535 buffers announced, one came.", [*patched(6, 0xFF, 0xFF), b""], "envelope")

    body("body-empty", "No value at all.", b"")
    body("body-truncated", "The value ends too early.", good.bytes[:-1])
    body("body-surplus", "A second value behind the first.", good.bytes + b"\xc0")
    body("body-c1", "The byte that MessagePack does not use.", b"\x92\x91\xc1\x80")
    body("body-text-not-utf8", "A str of the byte FF.", b"\x92\x91\xa1\xff\x80")
    body(
        "body-array-of-4-billion",
        "An array that claims 4294967295 items.",
        b"\x92\xdd\xff\xff\xff\xff\x80",
        error="PayloadTooLarge",
    )
    body(
        "body-map-of-4-billion",
        "A map that claims 4294967295 entries.",
        b"\x92\x90\xdf\xff\xff\xff\xff",
        error="PayloadTooLarge",
    )
    body("body-bytes-of-4-billion", "Bytes that claim 4294967295 bytes.", b"\x92\x91\xc6\xff\xff\xff\xff\x80")
    body(
        "body-too-deep",
        "65 containers within each other; the limit is 64.",
        b"\x91" * 65 + b"\xc0",
        error="PayloadTooLarge",
    )
    body("body-key-is-a-container", "A map key that is an array.", b"\x92\x91\x81\x90\xc0\x80")
    body("body-ext-unknown", "An extension type that is not defined.", ext(6, b"x"))
    body("body-buffer-not-there", "A reference to buffer 1 of 1.", ext(1, struct.pack("<I", 1)), b"x" * 32)
    body(
        "body-buffer-twice",
        "Two references to buffer 0.",
        msgpack.packb([[msgpack.ExtType(1, bytes(4)), msgpack.ExtType(1, bytes(4))], {}]),
        b"x" * 32,
    )
    body("body-buffer-unused", "A buffer that nothing refers to.", good.bytes, b"x" * 32)
    body("body-reference-short", "A reference of 3 bytes.", ext(1, bytes(3)), b"x" * 32)
    body("body-array-typecode", "An array of characters.", ext(2, b"u\x04abcd"))
    body("body-array-itemsize", "Items of 3 bytes.", ext(2, b"i\x03abc"))
    body("body-array-ragged", "5 bytes of items of 2.", ext(2, b"H\x02abcde"))
    body("body-ndarray-dtype", "Python objects.", ext(4, b"\x02|O\x01" + struct.pack("<Q", 1) + bytes(8)))
    body(
        "body-ndarray-big-endian",
        "A dtype of the other byte order.",
        ext(4, b"\x03>i2\x01" + struct.pack("<Q", 1) + bytes(2)),
    )
    body(
        "body-ndarray-shape",
        "A shape of 3 items, and 2 items.",
        ext(4, b"\x03<i2\x01" + struct.pack("<Q", 3) + bytes(4)),
    )
    body(
        "body-ndarray-shape-wraps",
        "A shape whose product is right only in 64 bits.",
        ext(4, b"\x03|u1\x02" + struct.pack("<QQ", 2**63, 2)),
    )
    body("body-ndarray-head", "It ends within the shape.", ext(4, b"\x03<i2\x02" + bytes(9)))
    body("body-time-length", "A time of 5 bytes.", ext(-1, bytes(5)))
    body("body-time-nanoseconds", "2000000000 nanoseconds.", ext(-1, struct.pack(">Iq", 2_000_000_000, 0)))

    body("request-not-a-pair", "The body of a request has two items.", msgpack.packb([[]]), layer="request")
    body("request-args-a-map", "Arguments that are not an array.", msgpack.packb([{}, {}]), layer="request")
    body(
        "request-kwargs-nil",
        "Keyword arguments that are not a map.",
        msgpack.packb([[], None]),
        layer="request",
    )
    body("request-a-number", "No array at all.", b"\x07", layer="request")
    add("request-codec-0", "A request whose body has no codec.", patched(5, 0), "request")
    add(
        "request-codec-200", "A request in a codec that the server does not know.", patched(5, 200), "request"
    )
    return made


def files() -> dict[str, str]:
    """Return the text of each file by its name."""
    made: dict[str, str] = {}
    for vector in (*valid(), *together(), *invalid()):
        name = f"{vector['name']}.json"
        if name in made:
            raise ValueError(f"two vectors are named {name}")
        made[name] = json.dumps(vector, indent=2, ensure_ascii=False) + "\n"
    return made


def differences() -> list[str]:
    """Say in what the directory differs from what would be written."""
    wanted = files()
    there = {path.name: path.read_text(encoding="utf-8") for path in DIRECTORY.glob("*.json")}
    return (
        [f"{name} is missing" for name in sorted(wanted.keys() - there.keys())]
        + [f"{name} is not one of the vectors" for name in sorted(there.keys() - wanted.keys())]
        + [f"{name} differs" for name in sorted(wanted.keys() & there.keys()) if wanted[name] != there[name]]
    )


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--check"]):
        print(__doc__, file=sys.stderr)
        return 2
    if arguments:
        found = differences()
        print("\n".join(found) or f"{len(files())} vectors agree")
        return 1 if found else 0
    for path in DIRECTORY.glob("*.json"):
        path.unlink()
    for name, text in files().items():
        DIRECTORY.joinpath(name).write_text(text, encoding="utf-8")
    print(f"{len(files())} vectors written to {DIRECTORY}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
