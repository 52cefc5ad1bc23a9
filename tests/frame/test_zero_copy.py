"""Large buffers are not copied, are held as long as libzmq reads them, and are given back without the GIL."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import zmq

from zmqcore import errors
from zmqcore._channel import Channel
from zmqcore._frame import pinned
from zmqcore._port import Port
from zmqcore._request import Request

READER = Path(__file__).parent / "reader.py"
NOTHING = {"sent_buffers": 0, "sent_bytes": 0, "received_buffers": 0, "received_bytes": 0}
MIB = 1 << 20
# Far longer than anything here takes: a bound for what would otherwise hang.
PATIENCE_S = 30.0

Connect = Callable[..., Channel]


@pytest.fixture
def context() -> Generator[zmq.Context[Any]]:
    made: zmq.Context[Any] = zmq.Context()
    yield made
    made.term()


@pytest.fixture(params=["inproc", "ipc"])
def endpoint(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return "inproc://zero-copy" if request.param == "inproc" else f"ipc://{tmp_path}/port.sock"


@pytest.fixture
def port(request: pytest.FixtureRequest, context: zmq.Context[Any], endpoint: str) -> Generator[Port]:
    made = Port(context, [endpoint], **getattr(request, "param", {}))
    yield made
    made.close()


@pytest.fixture
def connect(context: zmq.Context[Any]) -> Generator[Connect]:
    """Channels that are closed in the end, also after a failure: else the context would wait for them."""
    made: list[Channel] = []

    def connect(endpoint: str, **options: Any) -> Channel:
        made.append(Channel(context, endpoint, **options))
        return made[-1]

    yield connect
    for channel in made:
        channel.close()


@pytest.fixture
def channel(connect: Connect, port: Port) -> Channel:
    return introduced(connect(port.endpoints[0]), port)


def introduced(channel: Channel, port: Port) -> Channel:
    """Let the channel hear what the port takes: before that it sends nothing large, and here nobody would answer."""
    answered = threading.Event()

    def ping() -> None:
        channel.ping(PATIENCE_S)
        answered.set()

    pinging = threading.Thread(target=ping)
    pinging.start()
    while pinging.is_alive():
        port.receive(1, 0.01)
    pinging.join()
    assert answered.is_set()
    return channel


def wait_until(condition: Callable[[], object]) -> None:
    give_up = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < give_up, "it did not happen"
        time.sleep(0.002)


def cast(channel: Channel, *buffers: Any) -> None:
    channel.send("cast", b"topic", "method", b"body", list(buffers), b"", 1, PATIENCE_S)


def receive_one(port: Port) -> Request:
    (request,) = port.receive(1, PATIENCE_S)
    return request


def nothing_is_pinned() -> bool:
    gc.collect()
    return pinned() == NOTHING


# -- within one process --------------------------------------------------------------------------------------


def test_the_receiver_gets_a_read_only_view(channel: Channel, port: Port) -> None:
    data = bytes(range(256)) * 1024
    cast(channel, data)
    request = receive_one(port)
    (view,) = request.envelope.buffers
    assert type(view) is memoryview
    assert (view.readonly, view.format, view.ndim, view.nbytes) == (True, "B", 1, len(data))
    assert view == data
    assert pinned()["received_buffers"] == 1
    assert pinned()["received_bytes"] == len(data)
    with pytest.raises(TypeError):
        view[0] = 1


def test_the_view_keeps_the_memory_and_only_that(channel: Channel, port: Port) -> None:
    cast(channel, b"a" * 100_000, b"b" * 50_000)
    view = receive_one(port).envelope.buffers[1][10:20]
    wait_until(lambda: gc.collect() >= 0 and pinned()["received_bytes"] == 50_000)
    assert pinned()["received_buffers"] == 1
    assert view == b"b" * 10
    del view
    wait_until(nothing_is_pinned)


@pytest.mark.parametrize("endpoint", ["inproc"], indirect=True)
def test_inproc_shows_the_senders_own_memory(channel: Channel, port: Port) -> None:
    """Neither side copies: what the sender changes (it should not) the receiver sees."""
    data = bytearray(MIB)
    cast(channel, data)
    request = receive_one(port)
    (view,) = request.envelope.buffers
    assert view[500] == 0
    data[500] = 77
    assert view[500] == 77
    assert pinned() == {
        "sent_buffers": 1, "sent_bytes": MIB, "received_buffers": 1, "received_bytes": MIB,
    }  # fmt: skip
    with pytest.raises(BufferError):
        data.append(0)
    del view, request
    wait_until(nothing_is_pinned)
    data.append(0)


def test_the_export_is_given_back_once_it_has_been_sent(channel: Channel, port: Port) -> None:
    data = bytearray(MIB)
    cast(channel, data)
    receive_one(port)
    wait_until(nothing_is_pinned)
    data.append(0)  # raises BufferError as long as anybody holds its memory


@pytest.mark.parametrize("answer", ["reply", "error"])
def test_an_answer_is_not_copied_either(channel: Channel, port: Port, answer: str) -> None:
    results: list[Any] = []
    caller = threading.Thread(
        target=lambda: results.append(channel.call(b"t", "m", b"", None, b"", 1, PATIENCE_S).buffers)
    )
    caller.start()
    data = bytearray(b"x" * MIB)
    request = receive_one(port)
    assert getattr(request, answer)(b"", [data], 1)
    caller.join()
    ((view,),) = results
    assert view.readonly
    assert view == data
    if port.endpoints[0].startswith("inproc"):
        data[7] = 7
        assert view[7] == 7
    results.clear()
    del view
    wait_until(nothing_is_pinned)
    data.append(0)


def test_the_same_buffer_may_go_out_many_times_at_once(channel: Channel, port: Port) -> None:
    data = bytearray(b"y" * 70_000)
    for _ in range(20):
        cast(channel, data, data)
    taken = 0
    while taken < 20:
        for request in port.receive(64, PATIENCE_S):
            assert [bytes(view) for view in request.envelope.buffers] == [data, data]
            taken += 1
    del request
    wait_until(nothing_is_pinned)
    data.append(0)


def test_closing_the_channel_gives_everything_back(connect: Connect, port: Port) -> None:
    data = bytearray(MIB)
    channel = introduced(connect(port.endpoints[0]), port)
    for _ in range(10):
        cast(channel, data)
    channel.close()
    port.close()
    wait_until(nothing_is_pinned)
    data.append(0)


def test_a_message_that_never_left_gives_its_buffers_back(connect: Connect, tmp_path: Path) -> None:
    data = bytearray(MIB)
    channel = connect(f"ipc://{tmp_path}/nobody.sock")
    with pytest.raises(errors.Unreachable):
        channel.send("cast", b"t", "m", b"", [data], b"", 1, 0.05)
    channel.close()
    assert nothing_is_pinned()
    data.append(0)


class Busy(bytearray):
    """Uses the channel when its memory has been given back."""

    on_release: Callable[[], object] | None = None

    def __del__(self) -> None:
        if self.on_release is not None:
            self.on_release()


@pytest.mark.parametrize("who", ["channel", "port"])
def test_a_buffer_whose_end_uses_the_channel_does_not_block_it(
    channel: Channel, port: Port, who: str
) -> None:
    """Destructors are user code: they run outside the channel's and the port's lock."""
    ended: list[object] = []

    def use_both() -> None:
        channel.send("cast", b"t", "from the destructor", b"", None, b"", 0, PATIENCE_S)
        port.wake()
        ended.append(None)

    def work() -> None:
        data = Busy(b"z" * 100_000)
        data.on_release = use_both
        cast(channel, data)
        del data
        while not any(request.envelope.buffers for request in port.receive(64, 0.01)):
            pass
        while not ended:
            if who == "channel":
                channel.attend()
            else:
                port.receive(64, 0.01)

    # In a thread of its own: a deadlock would otherwise take the test run with it.
    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(PATIENCE_S)
    assert not worker.is_alive(), "deadlock"
    wait_until(nothing_is_pinned)


# -- limits, at the sender -----------------------------------------------------------------------------------


@pytest.mark.parametrize("endpoint", ["inproc"], indirect=True)
def test_a_channel_refuses_what_is_over_its_limits(connect: Connect, port: Port) -> None:
    channel = connect(port.endpoints[0], max_bytes=1000, max_buffers=3)
    with pytest.raises(errors.PayloadTooLarge, match=r"\b1001 bytes; the limit is 1000\b"):
        channel.send("cast", b"t" * 10, "m" * 10, b"b" * 1001, None, b"", 1, 1.0)
    with pytest.raises(errors.PayloadTooLarge, match=r"\b1001 bytes; the limit is 1000\b"):
        channel.call(b"t" * 10, "m" * 10, b"b" * 501, [b"x" * 500], b"", 1, 1.0)
    with pytest.raises(errors.PayloadTooLarge, match=r"\b4 out-of-band buffers; the limit is 3\b"):
        channel.send("cast", b"", "", b"", [b""] * 4, b"", 1, 1.0)
    assert channel.stats()["sent_bytes"] == 0
    assert pinned() == NOTHING
    # Exactly at the limits it goes.
    channel.send("cast", b"t" * 10, "m" * 10, b"b" * 100, [b"x" * 300] * 3, b"", 1, PATIENCE_S)
    request = receive_one(port)
    assert request.envelope.n_bytes == 1060
    del request
    wait_until(nothing_is_pinned)


@pytest.mark.parametrize("endpoint", ["inproc"], indirect=True)
@pytest.mark.parametrize("port", [{"max_bytes": 1000, "max_buffers": 3}], indirect=True)
def test_a_port_refuses_an_answer_over_its_limits_and_takes_another(channel: Channel, port: Port) -> None:
    answers: list[Any] = []
    caller = threading.Thread(
        target=lambda: answers.append(bytes(channel.call(b"", "", b"", None, b"", 1, PATIENCE_S).body))
    )
    caller.start()
    request = receive_one(port)
    with pytest.raises(errors.PayloadTooLarge, match=r"\b1001 bytes; the limit is 1000\b"):
        request.reply(b"b" * 1001)
    with pytest.raises(errors.PayloadTooLarge, match=r"\b4 out-of-band buffers; the limit is 3\b"):
        request.reply(b"", [b""] * 4)
    assert request.wants_reply
    assert request.reply(b"b" * 1000)
    caller.join()
    assert answers == [b"b" * 1000]
    assert nothing_is_pinned()


def test_nothing_large_leaves_before_the_port_has_said_what_it_takes(connect: Connect, port: Port) -> None:
    channel = connect(port.endpoints[0])
    assert channel.wait_open(PATIENCE_S)
    with pytest.raises(errors.DeadlineExceeded):
        channel.send("cast", b"t", "m", b"", [bytes(300_000)], b"", 1, 0.05)
    assert port.receive(64, 0.05) == []  # the ping, which is none of the requests
    assert pinned() == NOTHING
    wait_until(lambda: channel.settle() and channel.peer_instance)
    cast(channel, bytes(300_000))
    assert receive_one(port).envelope.n_bytes > 300_000


@pytest.mark.parametrize("endpoint", ["ipc"], indirect=True)
@pytest.mark.parametrize("port", [{"max_bytes": 1000, "max_buffers": 3}], indirect=True)
def test_a_channel_keeps_the_limits_of_the_port(channel: Channel, port: Port) -> None:
    """Its own are higher. Should it send all the same, libzmq would break the connection."""
    with pytest.raises(errors.PayloadTooLarge, match=r"\b1001 bytes; the limit is 1000\b"):
        channel.send("cast", b"t" * 10, "m" * 10, b"b" * 1001, None, b"", 1, PATIENCE_S)
    with pytest.raises(errors.PayloadTooLarge, match=r"\b4 out-of-band buffers; the limit is 3\b"):
        channel.call(b"", "", b"", [b""] * 4, b"", 1, PATIENCE_S)
    channel.send("cast", b"t" * 10, "m" * 10, b"b" * 1000, None, b"", 1, PATIENCE_S)
    assert receive_one(port).envelope.n_bytes == 1060


# -- between processes ---------------------------------------------------------------------------------------


class Reader:
    """The process of ``reader.py``."""

    def __init__(self, endpoint: str) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self.process = subprocess.Popen(
            [sys.executable, READER, endpoint],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.endpoint = self.stdout.readline().strip()

    def meet(self, channel: Channel) -> None:
        """Let the channel hear what the port takes."""
        self.stdin.write("meet\n")
        self.stdin.flush()
        channel.ping(PATIENCE_S)

    def order(self, count: int) -> None:
        self.stdin.write(f"take {count}\n")
        self.stdin.flush()

    def digests(self) -> list[str]:
        found: list[str] = json.loads(self.stdout.readline())
        return found

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def close(self) -> None:
        if self.process.poll() is None:
            self.signal(signal.SIGCONT)
        self.stdin.close()
        self.process.wait()
        self.stdout.close()


@pytest.fixture
def reader(tmp_path: Path) -> Generator[Reader]:
    made = Reader(f"ipc://{tmp_path}/reader.sock")
    yield made
    made.close()


def test_the_senders_memory_is_what_goes_onto_the_wire(connect: Connect, reader: Reader) -> None:
    """The peer is stopped with most of the buffer unsent; what is then written into its end arrives."""
    channel = connect(reader.endpoint)
    reader.meet(channel)
    reader.signal(signal.SIGSTOP)
    data = bytearray(64 * MIB)
    cast(channel, data)
    assert pinned()["sent_buffers"] == 1
    assert pinned()["sent_bytes"] == 64 * MIB
    data[-3:] = b"end"
    with pytest.raises(BufferError):
        data.append(0)
    reader.signal(signal.SIGCONT)
    reader.order(1)
    assert reader.digests() == [hashlib.sha256(data).hexdigest()]
    wait_until(nothing_is_pinned)
    data.append(0)
    channel.close()


def test_a_peer_that_dies_half_way_gives_the_buffers_back(connect: Connect, reader: Reader) -> None:
    channel = connect(reader.endpoint)
    reader.meet(channel)
    reader.signal(signal.SIGSTOP)
    data = bytearray(64 * MIB)
    cast(channel, data)
    assert pinned()["sent_buffers"] == 1
    reader.signal(signal.SIGKILL)
    reader.process.wait()
    wait_until(lambda: channel.attend() is None and channel.state_name == "lost")
    channel.close()
    wait_until(nothing_is_pinned)
    data.append(0)


def test_buffers_are_given_back_without_the_gil(connect: Connect, reader: Reader) -> None:
    """This thread keeps the GIL in one C call until the peer has everything.

    A free function that needed the GIL would stop libzmq's I/O thread at the first buffer, and the rest would
    never arrive.
    """
    channel = connect(reader.endpoint)
    reader.meet(channel)
    data = [bytearray([number]) * (4 * MIB) for number in range(8)]
    reader.signal(signal.SIGSTOP)
    reader.order(len(data))
    for buffer in data:
        cast(channel, buffer)
    assert pinned()["sent_buffers"] == len(data)
    assert has_arrived_while_the_gil_is_held(reader)
    assert reader.digests() == [hashlib.sha256(buffer).hexdigest() for buffer in data]
    wait_until(nothing_is_pinned)
    for buffer in data:
        buffer.append(0)
    channel.close()


class PollFd(ctypes.Structure):
    _fields_ = (("fd", ctypes.c_int), ("events", ctypes.c_short), ("revents", ctypes.c_short))


def has_arrived_while_the_gil_is_held(reader: Reader) -> bool:
    """Let the reader go on and wait for its line, all without giving up the GIL: PyDLL does not release it."""
    libc = ctypes.PyDLL(None)
    wanted = PollFd(reader.stdout.fileno(), select.POLLIN, 0)
    milliseconds = int(PATIENCE_S * 1000)
    libc.kill(reader.process.pid, signal.SIGCONT)
    ready: int = libc.poll(ctypes.byref(wanted), 1, milliseconds)
    return ready == 1
