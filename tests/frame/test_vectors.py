"""The vectors in ``vectors/``: their generator writes them, zmqcore packs the same and reads the same."""

from __future__ import annotations

import array
import datetime
import json
import runpy
import struct
from pathlib import Path
from typing import Any

import pytest

from zmqcore import errors
from zmqcore._frame import KINDS, Envelope, pack, pinned, split
from zmqcore.codec import Limits, MsgpackCodec

try:
    import numpy
except ImportError:
    numpy = None  # type: ignore[assignment]

HERE = Path(__file__).parent
VECTORS: dict[str, dict[str, Any]] = {
    path.stem: json.loads(path.read_text(encoding="utf-8"))
    for path in sorted((HERE / "vectors").glob("*.json"))
}
VALID = [name for name, vector in VECTORS.items() if "envelope" in vector]
TOGETHER = [name for name, vector in VECTORS.items() if "holds" in vector]
WITH_VALUE = [name for name in VALID if "value" in VECTORS[name]]
INVALID = [name for name, vector in VECTORS.items() if not vector["valid"]]

# What the README says of canonical vectors.
CODEC = MsgpackCodec(Limits(inline_bytes=16))


def parts_of(vector: dict[str, Any]) -> list[bytes]:
    return [bytes.fromhex(part) for part in vector["parts"]]


def value_of(notation: Any, to_send: bool) -> Any:
    """Return the value that ``notation`` stands for: as one sends it, or in the plain form that arrives."""
    if isinstance(notation, list):
        return [value_of(item, to_send) for item in notation]
    if not isinstance(notation, dict):
        return notation
    if "map" in notation:
        return {key: value_of(item, to_send) for key, item in notation["map"]}
    if "bytes" in notation:
        return bytes.fromhex(notation["bytes"])
    if "time" in notation:
        return datetime.datetime.fromisoformat(notation["time"])
    if "array" in notation:
        return array.array(notation["array"], notation["items"]) if to_send else notation["items"]
    if to_send:
        return numpy.array(notation["items"], notation["ndarray"]).reshape(notation["shape"])
    return nested(notation["items"], notation["shape"])


def nested(items: list[Any], shape: list[int]) -> Any:
    """Return ``items`` as lists in lists."""
    if not shape:
        return items[0]
    step = len(items) // shape[0] if shape[0] else 0
    return [nested(items[i * step : (i + 1) * step], shape[1:]) for i in range(shape[0])]


def plain(value: Any, notation: Any) -> Any:
    """Return what was decoded in the form of ``value_of(notation, to_send=False)``."""
    if isinstance(value, list):
        return [plain(item, inner) for item, inner in zip(value, notation, strict=True)]
    if isinstance(value, dict):
        inner = dict(map(tuple, notation["map"]))
        return {key: plain(item, inner[key]) for key, item in value.items()}
    if isinstance(notation, dict) and "bytes" in notation:
        if "part" in notation:
            assert type(value) is memoryview
            assert value.readonly
        else:
            assert type(value) is bytes
        return bytes(value)
    if isinstance(notation, dict) and "ndarray" in notation and numpy is None:
        if 0 in notation["shape"]:  # no memoryview has a 0 in its shape
            return nested([], notation["shape"])
        return value.tolist()
    return value.tolist() if hasattr(value, "tolist") else value


def test_the_files_are_what_their_generator_writes() -> None:
    generator = runpy.run_path(str(HERE / "generate_vectors.py"))
    assert generator["differences"]() == []


def test_the_generator_notices_every_difference(tmp_path: Path) -> None:
    generator = runpy.run_path(str(HERE / "generate_vectors.py"))
    for name, text in generator["files"]().items():
        tmp_path.joinpath(name).write_text(text, encoding="utf-8")
    differences = generator["differences"]
    differences.__globals__["DIRECTORY"] = tmp_path
    assert differences() == []
    tmp_path.joinpath("call.json").unlink()
    tmp_path.joinpath("mine.json").write_text("{}", encoding="utf-8")
    tmp_path.joinpath("cast.json").write_text("{}", encoding="utf-8")
    assert differences() == [
        "call.json is missing",
        "mine.json is not one of the vectors",
        "cast.json differs",
    ]


def test_the_generator_uses_nothing_of_ours() -> None:
    source = (HERE / "generate_vectors.py").read_text(encoding="utf-8")
    assert "import zmqcore" not in source
    assert "from zmqcore" not in source


def test_every_kind_has_a_vector() -> None:
    assert {VECTORS[name]["envelope"]["kind"] for name in VALID} == set(KINDS)
    assert {VECTORS[name]["layer"] for name in INVALID} == {"envelope", "body", "request"}
    assert all(name == vector["name"] for name, vector in VECTORS.items())


@pytest.mark.parametrize("name", VALID)
def test_a_valid_message_is_read(name: str) -> None:
    vector = VECTORS[name]
    parts = parts_of(vector)
    wanted = dict(vector["envelope"])
    envelope = Envelope.parse(parts)
    identity = wanted.pop("identity", None)
    assert envelope.identity == (None if identity is None else tuple(identity))
    assert {
        "kind": envelope.kind,
        "flags": envelope.flags,
        "codec": envelope.codec,
        "buffers": len(envelope.buffers or ()),
        "id": envelope.id,
        "ack": envelope.ack,
        "remaining_ms": envelope.remaining_ms,
        "topic": envelope.topic.decode(),
        "method": envelope.method,
        "metadata": envelope.metadata.hex(),
        "body": envelope.body.hex(),
    } == wanted
    assert [bytes(buffer) for buffer in envelope.buffers or ()] == parts[1:]
    assert envelope.n_bytes == sum(map(len, parts))


@pytest.mark.parametrize("name", TOGETHER)
def test_envelopes_in_one_part_are_told_apart(name: str) -> None:
    vector = VECTORS[name]
    (part,) = parts_of(vector)
    assert split(part) == [parts_of(VECTORS[each])[0] for each in vector["holds"]]
    with pytest.raises(errors.ProtocolError, match="several envelopes"):
        Envelope.parse([part])


@pytest.mark.parametrize("name", VALID)
def test_a_valid_message_is_packed(name: str) -> None:
    vector = VECTORS[name]
    parts = parts_of(vector)
    fields = dict(vector["envelope"])
    del fields["buffers"]
    fields["topic"] = fields["topic"].encode()
    identity = struct.pack("<QQ", *fields.pop("identity")) if "identity" in fields else b""
    fields["metadata"] = identity + bytes.fromhex(fields["metadata"])
    fields["body"] = bytes.fromhex(fields["body"])
    assert pack(**fields, buffers=parts[1:]) == parts


@pytest.mark.parametrize("name", WITH_VALUE)
def test_a_body_is_decoded(name: str) -> None:
    vector = VECTORS[name]
    envelope = Envelope.parse(parts_of(vector))
    value = CODEC.decode(envelope, envelope.buffers or ())
    assert plain(value, vector["value"]) == value_of(vector["value"], to_send=False)


@pytest.mark.parametrize("name", [name for name in WITH_VALUE if VECTORS[name]["canonical"]])
def test_a_body_is_encoded(name: str) -> None:
    vector = VECTORS[name]
    if numpy is None and '"ndarray"' in json.dumps(vector):
        pytest.skip("needs NumPy")
    buffers: list[Any] = []
    body = CODEC.encode(value_of(vector["value"], to_send=True), buffers)
    assert bytes(body).hex() == vector["envelope"]["body"]
    assert [bytes(memoryview(buffer).cast("B")).hex() for buffer in buffers] == vector["parts"][1:]


@pytest.mark.parametrize("name", INVALID)
def test_an_invalid_message_is_refused(name: str) -> None:
    vector = VECTORS[name]
    refusal = getattr(errors, vector["error"])
    parts = parts_of(vector)
    if vector["layer"] == "envelope":
        with pytest.raises(refusal):
            Envelope.parse(parts)
        return
    envelope = Envelope.parse(parts)
    if vector["layer"] == "body":
        with pytest.raises(refusal):
            MsgpackCodec().decode(envelope, envelope.buffers or ())
    else:
        # Who serves the request refuses it: see test_plain_clients.py. The body alone is fine.
        MsgpackCodec().decode(envelope, envelope.buffers or ())


def test_nothing_is_held_afterwards() -> None:
    assert pinned() == {"sent_buffers": 0, "sent_bytes": 0, "received_buffers": 0, "received_bytes": 0}
