"""A real server and clients that know nothing but the specification: bare REQ and DEALER sockets, struct, msgpack."""

from __future__ import annotations

import itertools
import json
import re
import struct
import threading
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq

from zmqcore import Node, Server
from zmqcore.rpc import faults

HERE = Path(__file__).parent
SPECIFICATION = HERE.parents[1] / "docs" / "reference" / "protocol.md"
VECTORS: dict[str, dict[str, Any]] = {
    path.stem: json.loads(path.read_text(encoding="utf-8"))
    for path in sorted((HERE / "vectors").glob("*.json"))
}
HEADER = struct.Struct("<2sBBBBHQQIHHII")
CALL, CAST, FANOUT, REPLY, ERROR, ACK, PING, PONG, HELLO, GOODBYE, CANCEL, ITEM, CREDIT = range(1, 14)
FLOW = 1
NO_DEADLINE = 0xFFFFFFFF
# A bound for what would otherwise hang.
PATIENCE_MS = 30_000


class Inventory:
    def __init__(self) -> None:
        self.ran: list[int] = []
        self.touched = threading.Event()

    def reserve(self, *args: Any, **kwargs: Any) -> list[Any]:
        self.ran.append(len(args))
        return [len(args), sorted(kwargs)]

    def echo(self, value: Any) -> Any:
        return value

    def touch(self, *args: Any) -> None:
        self.ran.append(len(args))
        self.touched.set()

    def fail(self) -> None:
        raise KeyError("sku-9")

    def two(self, a: int, b: int) -> int:
        return a + b

    def count(self, n: int) -> Iterator[int]:
        try:
            yield from range(n)
        finally:
            self.touched.set()


@pytest.fixture
def inventory() -> Inventory:
    return Inventory()


# Of the tests that this is put on; the others run with handlers on the receiving thread.
with_and_without_workers = pytest.mark.parametrize("server", [0, 2], ids=["inline", "workers"], indirect=True)


@pytest.fixture
def server(request: pytest.FixtureRequest, inventory: Inventory) -> Generator[Server]:
    with (
        Node("memory://plain-clients", bind="tcp://127.0.0.1:*") as node,
        Server(
            "inventory", inventory, node=node, server="host-3", workers=getattr(request, "param", 0)
        ) as running,
    ):
        yield running


Connect = Callable[[int], "zmq.Socket[bytes]"]


@pytest.fixture
def connect(server: Server) -> Generator[Connect]:
    context: zmq.Context[Any] = zmq.Context()
    sockets = []

    def make(kind: int) -> zmq.Socket[bytes]:
        socket = context.socket(kind)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVTIMEO, PATIENCE_MS)
        socket.connect(server.endpoints[0])
        sockets.append(socket)
        return socket

    yield make
    for socket in sockets:
        socket.close()
    context.term()


def message(
    kind: int,
    id: int,
    body: bytes = b"",
    *,
    topic: bytes = b"inventory",
    method: bytes = b"reserve",
    metadata: bytes = b"",
    codec: int = 1,
    flags: int = 0,
    remaining: int = NO_DEADLINE,
    buffers: tuple[bytes, ...] = (),
) -> list[bytes]:
    lengths = (len(topic), len(method), len(metadata), len(body))
    header = HEADER.pack(b"zC", 1, kind, flags, codec, len(buffers), id, 0, remaining, *lengths)
    return [header + topic + method + metadata + body, *buffers]


def request(*args: Any, **kwargs: Any) -> bytes:
    packed: bytes = msgpack.packb([args, kwargs])
    return packed


class Answer:
    def __init__(self, parts: list[bytes]) -> None:
        fields = HEADER.unpack_from(parts[0])
        self.magic, self.version, self.kind, self.flags, self.codec, self.n_buffers = fields[:6]
        self.id, self.ack, self.remaining = fields[6:9]
        self.lengths = fields[9:13]
        assert len(parts[0]) == 40 + sum(self.lengths)
        assert len(parts) == 1 + self.n_buffers
        assert (self.magic, self.version) == (b"zC", 1)
        self.body = parts[0][40 + sum(self.lengths[:3]) :]
        self.buffers = parts[1:]

    @property
    def value(self) -> Any:
        assert self.codec == 1
        return msgpack.unpackb(self.body)


def receive(socket: zmq.Socket[bytes]) -> Answer:
    return Answer(socket.recv_multipart())


def ask(socket: zmq.Socket[bytes], parts: list[bytes]) -> Answer:
    socket.send_multipart(parts)
    return receive(socket)


def is_quiet(socket: zmq.Socket[bytes]) -> bool:
    """Whether nothing came before the answer to one more call. Connections keep their order."""
    answer = ask(socket, message(CALL, 999, request()))
    return (answer.kind, answer.id) == (REPLY, 999)


# -- calls ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [zmq.REQ, zmq.DEALER], ids=["REQ", "DEALER"])
def test_a_call(connect: Connect, kind: int) -> None:
    socket = connect(kind)
    for id in (1, 2, 77, 2**64 - 1):
        answer = ask(socket, message(CALL, id, request("sku-1", 5, qty=2)))
        assert (answer.kind, answer.codec, answer.id, answer.value) == (REPLY, 1, id, [2, ["qty"]])
        # Without flow there is no acknowledgement; an answer has no deadline, no topic and no method.
        assert (answer.flags, answer.ack, answer.remaining) == (0, 0, NO_DEADLINE)
        assert answer.lengths[:3] == (0, 0, 0)


def test_a_dealer_may_send_the_delimiter_and_gets_it_back(connect: Connect) -> None:
    socket = connect(zmq.DEALER)
    socket.send_multipart([b"", *message(CALL, 5, request())])
    delimiter, *rest = socket.recv_multipart()
    assert delimiter == b""
    assert (Answer(rest).kind, Answer(rest).id) == (REPLY, 5)


@pytest.mark.parametrize("topic", [b"inventory", b"inventory@host-3"])
def test_a_server_has_two_topics(connect: Connect, topic: bytes) -> None:
    assert ask(connect(zmq.REQ), message(CALL, 1, request(), topic=topic)).kind == REPLY


@with_and_without_workers
def test_calls_may_overlap_on_a_dealer(connect: Connect) -> None:
    socket = connect(zmq.DEALER)
    for id in range(1, 101):
        socket.send_multipart(message(CALL, id, request(id), method=b"echo"))
    answers = [receive(socket) for _ in range(100)]
    assert {answer.id: answer.value for answer in answers} == {id: id for id in range(1, 101)}


@with_and_without_workers
@pytest.mark.parametrize("kind", [zmq.REQ, zmq.DEALER], ids=["REQ", "DEALER"])
def test_large_buffers_both_ways(connect: Connect, kind: int) -> None:
    socket = connect(kind)
    data = bytes(range(256)) * 400
    reference = msgpack.packb([[msgpack.ExtType(1, struct.pack("<I", 0))], {}])
    answer = ask(socket, message(CALL, 1, reference, method=b"echo", buffers=(data,)))
    assert answer.kind == REPLY
    assert answer.value == msgpack.ExtType(1, struct.pack("<I", 0))
    assert answer.buffers == [data]


def test_a_buffer_may_also_come_in_the_body(connect: Connect) -> None:
    data = bytes(100_000)
    answer = ask(connect(zmq.REQ), message(CALL, 1, request(data), method=b"echo"))
    assert answer.buffers == [data]  # and goes back out of band


def test_built_in_methods(connect: Connect, server: Server) -> None:
    socket = connect(zmq.REQ)
    pong = ask(socket, message(CALL, 1, request(), method=b"zmqcore.ping")).value
    assert pong["server"] == "host-3"
    assert pong["instance"] == server.instance
    methods = ask(socket, message(CALL, 2, request(), method=b"zmqcore.methods")).value
    assert methods["two"] == "(a: 'int', b: 'int') -> 'int'"
    assert ask(socket, message(CALL, 3, request(), method=b"zmqcore.stats")).kind == REPLY


# -- streams -------------------------------------------------------------------------------------------------


def control(kind: int, id: int, body: bytes = b"") -> list[bytes]:
    return message(kind, id, body, topic=b"", method=b"", codec=0, flags=FLOW)


@with_and_without_workers
def test_items_are_sent_as_they_are_granted(connect: Connect, inventory: Inventory) -> None:
    socket = connect(zmq.DEALER)
    hello = ask(socket, message(CALL, 1, request(40), method=b"count", flags=FLOW))
    assert (hello.kind, hello.id) == (HELLO, 1)

    def items(n: int) -> list[Any]:
        answers = [receive(socket) for _ in range(n)]
        assert {(answer.kind, answer.id, answer.ack) for answer in answers} == {(ITEM, 1, 1)}
        return [answer.value for answer in answers]

    assert items(32) == list(range(32))
    socket.send_multipart(control(CREDIT, 1, struct.pack("<I", 3)))
    assert items(3) == [32, 33, 34]
    socket.send_multipart(control(CREDIT, 77, struct.pack("<I", 9)))  # of a call that nobody knows
    socket.send_multipart(control(CREDIT, 1, b"\x01"))  # no number
    socket.send_multipart(control(CREDIT, 1, struct.pack("<I", 2**32 - 1)))
    assert items(5) == [35, 36, 37, 38, 39]
    end = receive(socket)
    assert (end.kind, end.id, end.value) == (REPLY, 1, None)
    assert inventory.touched.wait(PATIENCE_MS / 1000)


@with_and_without_workers
def test_a_cancel_ends_the_items_and_there_is_no_answer(connect: Connect, inventory: Inventory) -> None:
    socket = connect(zmq.DEALER)
    assert ask(socket, message(CALL, 1, request(10**9), method=b"count", flags=FLOW)).kind == HELLO
    assert [receive(socket).value for _ in range(32)] == list(range(32))
    socket.send_multipart(control(CANCEL, 1))
    socket.send_multipart(control(CREDIT, 1, struct.pack("<I", 9)))
    assert inventory.touched.wait(PATIENCE_MS / 1000)
    answer = ask(socket, message(CALL, 2, request(), flags=FLOW))
    while answer.kind == ACK:
        answer = receive(socket)
    assert (answer.kind, answer.id) == (REPLY, 2)


@pytest.mark.parametrize("kind", [zmq.REQ, zmq.DEALER], ids=["REQ", "DEALER"])
def test_without_flow_there_are_no_items(connect: Connect, kind: int) -> None:
    answer = ask(connect(kind), message(CALL, 1, request(3), method=b"count"))
    assert (answer.kind, answer.value["code"]) == (ERROR, "protocol")
    assert "with flow" in answer.value["message"]


# -- errors --------------------------------------------------------------------------------------------------


@with_and_without_workers
def test_what_a_handler_raises(connect: Connect) -> None:
    answer = ask(connect(zmq.REQ), message(CALL, 1, request(), method=b"fail"))
    assert (answer.kind, answer.id, answer.codec) == (ERROR, 1, 1)
    error = answer.value
    assert set(error) == {"code", "type", "message", "traceback"}
    assert (error["code"], error["type"], error["message"]) == ("raised", "KeyError", "'sku-9'")
    assert "in fail" in error["traceback"]


@pytest.mark.parametrize(
    ("code", "fields"),
    [
        ("no_such_topic", {"topic": b"invent"}),
        ("no_such_topic", {"topic": b"inventory@host-4"}),
        ("no_such_method", {"method": b"resrve"}),
        ("no_such_method", {"method": b"__init__"}),
        ("no_such_method", {"method": b"re\xffserve"}),
        ("bad_arguments", {"method": b"two", "body": request(1)}),
        ("bad_arguments", {"method": b"two", "body": request(1, 2, c=3)}),
        ("expired", {"remaining": 0}),
        ("protocol", {"codec": 2}),
        ("protocol", {"body": b"\xc1"}),
        ("protocol", {"body": b""}),
        ("too_large", {"body": b"\x92\xdd\xff\xff\xff\xff\x80"}),
    ],
)
def test_what_the_server_refuses(
    connect: Connect, inventory: Inventory, code: str, fields: dict[str, Any]
) -> None:
    answer = ask(connect(zmq.REQ), message(CALL, 1, **{"body": request(), **fields}))
    assert (answer.kind, answer.id) == (ERROR, 1)
    error = answer.value
    assert (error["code"], error["type"], error["traceback"]) == (code, "", "")
    assert error["message"]
    assert inventory.ran == []


def test_a_deadline_that_has_not_passed(connect: Connect) -> None:
    assert ask(connect(zmq.REQ), message(CALL, 1, request(), remaining=PATIENCE_MS)).kind == REPLY


@pytest.mark.parametrize(("announced", "came"), [(1, 0), (2, 1), (0, 1), (1, 2), (65535, 1)], ids=str)
@pytest.mark.parametrize("kind", [zmq.REQ, zmq.DEALER], ids=["REQ", "DEALER"])
def test_another_number_of_buffers(connect: Connect, kind: int, announced: int, came: int) -> None:
    """The port itself refuses these: with codec 0 and plain text."""
    (head,) = message(CALL, 4, request())
    head = head[:6] + struct.pack("<H", announced) + head[8:]
    socket = connect(kind)
    answer = ask(socket, [head, *[b"buffer"] * came])
    assert (answer.kind, answer.codec, answer.id) == (ERROR, 0, 4)
    name, _, text = answer.body.decode().partition(": ")
    assert name in ("ProtocolError", "PayloadTooLarge")
    assert text
    assert is_quiet(socket)


# -- one way, and the protocol's own messages ----------------------------------------------------------------


@pytest.mark.parametrize("kind", [CAST, FANOUT], ids=["cast", "fanout"])
def test_one_way_messages_have_no_answer(connect: Connect, inventory: Inventory, kind: int) -> None:
    socket = connect(zmq.DEALER)
    socket.send_multipart(message(kind, 1, request("sku-1"), method=b"touch"))
    assert inventory.touched.wait(PATIENCE_MS / 1000)
    socket.send_multipart(message(kind, 2, request(), method=b"fail"))
    socket.send_multipart(message(kind, 3, request(), method=b"no such method"))
    assert is_quiet(socket)


@with_and_without_workers
def test_with_flow_a_hello_comes_first_and_answers_acknowledge(connect: Connect) -> None:
    socket = connect(zmq.DEALER)
    socket.send_multipart(message(CALL, 7, request(), flags=FLOW))
    hello = receive(socket)
    assert (hello.kind, hello.id, hello.ack, hello.codec) == (HELLO, 7, 0, 0)
    instance, max_bytes, max_buffers = struct.unpack("<16sQI", hello.body)
    assert any(instance)
    assert (max_bytes, max_buffers) == ((1 << 28) + (1 << 18), 1024)
    answer = receive(socket)
    assert (answer.kind, answer.id, answer.ack) == (REPLY, 7, 7)
    # Once for each connection.
    answer = ask(socket, message(CALL, 8, request(), flags=FLOW))
    assert (answer.kind, answer.id, answer.ack) == (REPLY, 8, 8)
    other = connect(zmq.DEALER)
    other.send_multipart(message(CALL, 1, request(), flags=FLOW))
    again = receive(other)
    assert (again.kind, again.body) == (HELLO, hello.body)
    assert receive(other).kind == REPLY


@with_and_without_workers
def test_casts_with_flow_are_acknowledged(connect: Connect) -> None:
    socket = connect(zmq.DEALER)
    for id in range(1, 1001):
        socket.send_multipart(message(CAST, id, request(), method=b"touch", flags=FLOW))
    assert receive(socket).kind == HELLO
    acks = [0]
    while acks[-1] < 1000:
        answer = receive(socket)
        assert (answer.kind, answer.id, answer.body, answer.codec) == (ACK, 0, b"", 0)
        acks.append(answer.ack)
    # At least one for 256 messages, and they only grow.
    assert all(0 < later - earlier <= 256 for earlier, later in itertools.pairwise(acks))


def test_bytes_count_too(connect: Connect) -> None:
    socket = connect(zmq.DEALER)
    body = request(bytes(600_000))
    for id in (1, 2, 3, 4):
        socket.send_multipart(message(CAST, id, body, method=b"touch", flags=FLOW))
    assert receive(socket).kind == HELLO
    acks = [0]
    while acks[-1] < 4:
        acks.append(receive(socket).ack)
    assert all(0 < later - earlier <= 2 for earlier, later in itertools.pairwise(acks))


@pytest.mark.parametrize("kind", [zmq.REQ, zmq.DEALER], ids=["REQ", "DEALER"])
def test_ping(connect: Connect, kind: int) -> None:
    pong = ask(connect(kind), message(PING, 3, topic=b"", method=b"", codec=0))
    assert (pong.kind, pong.id, pong.ack, pong.body) == (PONG, 3, 0, b"")


def test_ping_with_flow(connect: Connect) -> None:
    socket = connect(zmq.DEALER)
    socket.send_multipart(message(PING, 1, topic=b"", method=b"", codec=0, flags=FLOW))
    assert receive(socket).kind == HELLO
    pong = receive(socket)
    assert (pong.kind, pong.id, pong.ack) == (PONG, 1, 1)


def test_unknown_flags_and_metadata_are_ignored(connect: Connect) -> None:
    answer = ask(connect(zmq.REQ), message(CALL, 1, request(), flags=0xFC, metadata=b"\x81\xa5trace\xa1x"))
    assert answer.kind == REPLY


@pytest.mark.parametrize("kind", [ACK, HELLO, CANCEL, GOODBYE])
def test_kinds_that_a_server_needs_not_act_on(connect: Connect, kind: int) -> None:
    socket = connect(zmq.DEALER)
    socket.send_multipart(message(kind, 0, topic=b"", method=b"", codec=0))
    assert is_quiet(socket)


@with_and_without_workers
def test_a_server_that_stops_says_goodbye_to_who_counts_on_it(connect: Connect, server: Server) -> None:
    counts_on_it, plain = connect(zmq.DEALER), connect(zmq.DEALER)
    counts_on_it.send_multipart(message(CALL, 1, request(), flags=FLOW))
    assert [receive(counts_on_it).kind, receive(counts_on_it).kind] == [HELLO, REPLY]
    assert is_quiet(plain)
    stopping = threading.Thread(target=server.stop)
    stopping.start()
    goodbye = receive(counts_on_it)
    assert (goodbye.kind, goodbye.id, goodbye.ack, goodbye.body) == (GOODBYE, 0, 1, b"")
    counts_on_it.send_multipart(message(GOODBYE, 0, topic=b"", method=b"", codec=0, flags=FLOW))
    stopping.join()
    assert not plain.poll(0)


def after_goodbyes(socket: zmq.Socket[bytes]) -> Answer:
    while (answer := receive(socket)).kind == GOODBYE:
        pass
    return answer


@pytest.fixture
def draining(connect: Connect, server: Server) -> Generator[Draining]:
    """The server is stopping, and stays: a client that got a reply meanwhile has not answered the goodbye."""
    client = connect(zmq.DEALER)
    client.send_multipart(message(CALL, 1, request(), flags=FLOW))
    assert [receive(client).kind, receive(client).kind] == [HELLO, REPLY]
    made = Draining(client, server)
    made.start()
    assert receive(client).kind == GOODBYE
    client.send_multipart(message(CALL, 2, request("crossed"), flags=FLOW))
    answer = after_goodbyes(client)
    assert (answer.kind, answer.id) == (REPLY, 2)
    yield made
    made.answer_goodbye()
    made.join()


class Draining(threading.Thread):
    def __init__(self, client: zmq.Socket[bytes], server: Server) -> None:
        super().__init__()
        self.client = client
        self.server = server
        self.finished: bool | None = None

    def run(self) -> None:
        self.finished = self.server.stop(timeout=PATIENCE_MS / 1000)

    def answer_goodbye(self) -> None:
        self.client.send_multipart(message(GOODBYE, 0, topic=b"", method=b"", codec=0, flags=FLOW))


@with_and_without_workers
def test_a_server_repeats_its_goodbye_until_it_is_answered(draining: Draining) -> None:
    # Long after the 100 ms of quiet that would do for a client without a reply to lose.
    assert [receive(draining.client).kind for _ in range(20)] == [GOODBYE] * 20
    assert draining.finished is None
    draining.answer_goodbye()
    draining.join()
    assert draining.finished is True


@with_and_without_workers
@pytest.mark.usefixtures("draining")
def test_while_draining_calls_on_new_connections_are_refused(connect: Connect, inventory: Inventory) -> None:
    late = connect(zmq.DEALER)
    late.send_multipart(message(CALL, 1, request("late", "late"), flags=FLOW))
    assert [receive(late).kind, receive(late).kind] == [HELLO, GOODBYE]
    refused = after_goodbyes(late)
    assert (refused.kind, refused.id, refused.ack, refused.codec) == (ERROR, 1, 1, 0)
    assert refused.body.startswith(b"Draining: ")
    assert inventory.ran == [0, 1]
    # Nobody could be told of these, so they are taken.
    late.send_multipart(message(CAST, 2, request("a", "b", "c"), method=b"touch", flags=FLOW))
    assert inventory.touched.wait(PATIENCE_MS / 1000)
    assert ask(connect(zmq.REQ), message(CALL, 1, request(*"abcd"))).kind == REPLY
    assert inventory.ran == [0, 1, 3, 4]


# -- the vectors ---------------------------------------------------------------------------------------------


@with_and_without_workers
def test_every_valid_call_is_answered_once(connect: Connect) -> None:
    socket = connect(zmq.DEALER)
    calls = [vector for vector in VECTORS.values() if vector.get("envelope", {}).get("kind") == "call"]
    assert len(calls) > 10
    for vector in calls:
        envelope = vector["envelope"]
        answer = ask(socket, [bytes.fromhex(part) for part in vector["parts"]])
        while answer.kind == HELLO:
            answer = receive(socket)
        assert answer.id == envelope["id"], vector["name"]
        if envelope["topic"] != "inventory" or envelope["remaining_ms"] == 0:
            assert answer.value["code"] in ("no_such_topic", "expired"), vector["name"]
        else:
            assert answer.kind == REPLY, vector["name"]
    assert is_quiet(socket)


def test_everything_else_that_is_valid_harms_nothing(connect: Connect) -> None:
    for name, vector in VECTORS.items():
        if vector.get("envelope", {"kind": "call"})["kind"] != "call":
            socket = connect(zmq.DEALER)
            socket.send_multipart([bytes.fromhex(part) for part in vector["parts"]])
            socket.send_multipart(message(CALL, 999, request()))
            kinds = []
            while (answer := receive(socket)).id != 999:
                kinds.append(answer.kind)
            assert answer.kind == REPLY, name
            assert set(kinds) <= {HELLO, ACK, PONG}, name


@with_and_without_workers
def test_invalid_messages_are_dropped_or_refused(
    connect: Connect, server: Server, inventory: Inventory
) -> None:
    socket = connect(zmq.DEALER)
    garbage = 0
    for name, vector in VECTORS.items():
        if vector["valid"]:
            continue
        parts = [bytes.fromhex(part) for part in vector["parts"]]
        by_port = name in ("invalid-buffer-missing", "invalid-buffer-surplus", "invalid-buffers-65535")
        if vector["layer"] == "envelope" and not by_port:
            socket.send_multipart(parts)
            garbage += 1
            continue
        answer = ask(socket, parts)
        assert (answer.kind, answer.id) == (ERROR, 1), name
        if by_port:
            assert answer.codec == 0, name
        else:
            wanted = "too_large" if vector["error"] == "PayloadTooLarge" else "protocol"
            assert answer.value["code"] == wanted, name
    assert garbage > 10
    assert inventory.ran == []
    assert is_quiet(socket)
    stats = server.stats()["port"]
    # The two that a port refuses as malformed count too; the one with 65535 buffers is over a limit.
    assert (stats["garbage"], stats["too_large"]) == (garbage + 2, 1)


@with_and_without_workers
def test_arbitrary_parts_harm_nothing(connect: Connect) -> None:
    socket = connect(zmq.DEALER)
    (good,) = message(CALL, 1, request())
    odd: list[list[bytes]] = [[b""], [b"", b""], [b"", b"", b""], [b"x"], [b"", b"x"], [good[:20], good[20:]]]
    odd += [[good[:size]] for size in range(len(good))]
    for parts in odd:
        socket.send_multipart(parts)
    assert is_quiet(socket)


# -- the specification itself --------------------------------------------------------------------------------


def specification() -> str:
    if not SPECIFICATION.exists():
        pytest.skip("the documentation is not here (a build tree)")
    return SPECIFICATION.read_text(encoding="utf-8")


def hex_dumps(text: str) -> list[bytes]:
    """Return the bytes of each block of the worked example: lines of hex, with a comment after two spaces."""
    blocks = re.findall(r"```text\n(7a 43 .*?)```", text, re.DOTALL)
    return [bytes.fromhex(re.sub(r"(?m)  .*$", "", block)) for block in blocks]


def test_the_worked_example_is_what_happens(connect: Connect) -> None:
    call, reply = hex_dumps(specification())
    assert call.hex() == VECTORS["call"]["parts"][0]
    assert reply.hex() == VECTORS["reply"]["parts"][0]
    assert ask(connect(zmq.REQ), [call]).value == [1, ["qty"]]


def test_the_client_in_the_specification_works(server: Server) -> None:
    (source,) = re.findall(r"```python\n(.*?)```", specification(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(source, str(SPECIFICATION), "exec"), names)
    client = names["Client"](server.endpoints[0], "inventory")
    try:
        assert client.call("two", 20, 22) == 42
        assert client.call("two", a=1, b=2) == 3
        assert client.call("echo", bytes(100_000)) == bytes(100_000)
        with pytest.raises(RuntimeError, match=r"^raised KeyError: 'sku-9'"):
            client.call("fail")
        with pytest.raises(RuntimeError, match="no_such_method"):
            client.call("resrve")
    finally:
        client.close()


def test_the_specification_has_every_kind_and_code() -> None:
    text = specification()
    for name, number in {
        "call": 1, "cast": 2, "fanout": 3, "reply": 4, "error": 5, "ack": 6, "ping": 7, "pong": 8, "hello": 9,
        "goodbye": 10, "cancel": 11, "item": 12, "credit": 13,
    }.items():  # fmt: skip
        assert re.search(rf"(?m)^\| {number} +\| \*\*{name}\*\* ", text), name
    for code in (*faults._CODES, "raised"):
        assert f"`{code}`" in text
