"""``delivery="accepted"``: what was accepted runs, whatever becomes of connections and servers meanwhile."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import zmqcore
from zmqcore import AsyncClient, AsyncServer, Client, Node, Server, errors

#: Far above what anything here takes. Nothing is asserted about time; this only ends a test that hangs.
PATIENCE = 30.0
_PROGRAM = Path(__file__).with_name("recorder.py")
_ROOT = Path(zmqcore.__file__).parent.parent


class RecorderProcess:
    """One run of a server that writes down what it runs, see recorder.py."""

    def __init__(self, path: Path, name: str, *, wait: bool = True, **options: Any) -> None:
        self.name = name
        options = {
            "matchmaker": "memory://",
            "topic": "t",
            "server": {},
            **options,
            "path": str(path),
            "name": name,
        }
        self.process = subprocess.Popen(
            [sys.executable, str(_PROGRAM), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": f"{_ROOT}:{_ROOT}/tests"},
        )
        self.endpoints: list[str] = self.hear()["endpoints"] if wait else []

    def hear(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the recorder ended with {self.process.wait(PATIENCE)}"
        return json.loads(line)

    def drain(self) -> None:
        """End as a good server does."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        assert self.hear()["finished"] is True, "not everything was finished"
        assert self.process.wait(PATIENCE) == 0

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)

    def freeze(self) -> None:
        os.kill(self.process.pid, 19)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


class Record:
    """What all runs together have written, and the runs themselves."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: list[RecorderProcess] = []

    def start(self, *endpoints: str, **options: Any) -> RecorderProcess:
        if endpoints:
            options.setdefault("server", {})["bind"] = list(endpoints)
        run = RecorderProcess(self.path, str(len(self.runs)), **options)
        self.runs.append(run)
        return run

    def lines(self) -> list[tuple[str, str, int]]:
        """What ran, in order: run, sender, number."""
        if not self.path.exists():
            return []
        split = (line.split() for line in self.path.read_text().splitlines())
        return [(run, sender, int(number)) for run, sender, number in split]

    def numbers(self, run: RecorderProcess | None = None) -> list[int]:
        return [number for name, _, number in self.lines() if run is None or name == run.name]

    def check(self, wanted: int, *, twice: bool) -> int:
        """Every number below ``wanted`` ran, none twice in one run. Return how many ran in two: 0 unless ``twice``."""
        numbers = self.numbers()
        assert set(numbers) == set(range(wanted)), sorted(set(range(wanted)) - set(numbers))[:20]
        in_one_run = Counter((run, number) for run, _, number in self.lines())
        assert not [key for key, n in in_one_run.items() if n > 1]
        again = len(numbers) - wanted
        assert twice or again == 0
        return again


@pytest.fixture
def record(tmp_path: Path) -> Iterator[Record]:
    made = Record(tmp_path / "record")
    yield made
    for run in made.runs:
        run.end()


@pytest.fixture
def address() -> str:
    """An endpoint for a server that comes back where it was."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"tcp://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def client_of(make_node: Callable[..., Node]) -> Callable[..., Client]:
    """``client_of(*endpoints, **options)``: a client that sends accepted, on a node of its own."""

    def make(*endpoints: str, node: dict[str, Any] | None = None, **options: Any) -> Client:
        made = make_node("memory://", **(node or {}))
        return Client("t", **{
            "node": made, "connect": endpoints, "timeout": PATIENCE, "delivery": "accepted", **options
        })  # fmt: skip

    return make


class Casting:
    """A thread that casts growing numbers until it is told to stop."""

    def __init__(
        self, client: Client, *, most: int = 1 << 62, sender: str = "me", pause: float = 0.0
    ) -> None:
        self.sent = 0
        self.error: BaseException | None = None
        self._stop = False

        def run() -> None:
            try:
                while not self._stop and self.sent < most:
                    try:
                        client.cast("note", sender, self.sent)
                    except (errors.Unreachable, errors.Overloaded):
                        continue  # the server is away for longer: not accepted
                    self.sent += 1
                    if pause:
                        time.sleep(pause)
            except BaseException as exc:  # noqa: BLE001 - handed to the test's thread
                self.error = exc

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def stop(self) -> int:
        self._stop = True
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()
        if self.error is not None:
            raise self.error
        return self.sent


# -- as long as nothing happens ------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 4])
def test_flush_returns_when_all_have_run(
    record: Record, client_of: Callable[..., Client], workers: int
) -> None:
    run = record.start("tcp://127.0.0.1:*", server={"workers": workers})
    client = client_of(*run.endpoints)
    client.flush()  # nothing is accepted yet
    for number in range(2000):
        client.cast("note", "me", number)
    client.flush(PATIENCE)
    assert sorted(record.numbers()) == list(range(2000))
    if workers == 0:
        assert record.numbers() == list(range(2000))
    stats = client._node.stats()
    assert stats["accepted"] == {"unfinished": 0, "waiting": 0, "sent_again": 0, "given_up": 0}
    [channel] = stats["channels"].values()
    assert (channel["accepted"], channel["finished"], channel["retained"]) == (2000, 2000, 0)


def test_what_raises_or_is_refused_is_finished(
    serve: Callable[..., Server], connect: Callable[..., Client]
) -> None:
    def fail() -> None:
        raise ValueError

    serve("t", {"fail": fail})
    client = connect("t", delivery="accepted")
    client.cast("fail")
    client.cast("no such method")
    client.cast("fail", "an argument")
    client.flush(PATIENCE)


def test_flush_says_what_is_not_finished(
    serve: Callable[..., Server], connect: Callable[..., Client]
) -> None:
    gate = threading.Event()
    server = serve("t", {"wait": gate.wait}, workers=2)
    client = connect("t", delivery="accepted")
    try:
        client.cast("wait", PATIENCE)
        client.cast("wait", PATIENCE)
        with pytest.raises(errors.DeadlineExceeded, match="2 for "):
            client.flush(0.2)
    finally:
        gate.set()
    client.flush(PATIENCE)
    assert server.stats()["port"]["duplicates"] == 0


def test_a_late_handler_holds_up_no_calls(
    serve: Callable[..., Server], make_node: Callable[..., Node], registry: str
) -> None:  # fmt: skip
    gate = threading.Event()
    serve("t", {"wait": gate.wait, "echo": lambda value: value}, workers=2)
    with Client("t", node=make_node(registry, window_messages=300), timeout=PATIENCE) as client:
        try:
            client.prepare(delivery="accepted").cast("wait", PATIENCE)
            for number in range(1000):
                assert client.call("echo", number) == number
        finally:
            gate.set()


def test_what_is_accepted_is_bounded(
    serve: Callable[..., Server], make_node: Callable[..., Node], registry: str
) -> None:
    gate = threading.Event()
    serve("t", {"wait": gate.wait, "echo": lambda value: value}, workers=2)
    node = make_node(registry, window_messages=300)
    client = Client("t", node=node, timeout=0.3, delivery="accepted", retry=None)
    try:
        client.cast("wait", PATIENCE)
        for _ in range(299):
            client.cast("echo", b"x")
        with pytest.raises(errors.Overloaded, match=r"300 accepted messages .*limits 300"):
            client.cast("echo", b"x")
        [channel] = node.stats()["channels"].values()
        assert channel["retained"] == 300
        assert client.call("echo", 5) == 5  # which need nothing to be finished
    finally:
        gate.set()
    client.flush(PATIENCE)
    for _ in range(1000):
        client.cast("echo", b"x")
    client.flush(PATIENCE)


def test_it_is_bounded_in_bytes(
    serve: Callable[..., Server], make_node: Callable[..., Node], registry: str
) -> None:
    gate = threading.Event()
    serve("t", {"wait": gate.wait, "echo": len}, workers=2)
    node = make_node(registry, window_bytes=1 << 20)
    client = Client("t", node=node, timeout=0.3, delivery="accepted", retry=None)
    try:
        client.cast("wait", PATIENCE)
        for _ in range(20):
            client.cast("echo", b"x" * 50_000)
        with pytest.raises(errors.Overloaded, match=r"limits 4096 and 1048576"):
            client.cast("echo", b"x" * 50_000)
        [channel] = node.stats()["channels"].values()
        assert 900_000 < channel["retained_bytes"] <= 1 << 20
    finally:
        gate.set()
    client.flush(PATIENCE)


def test_large_buffers_are_kept_without_a_copy_and_let_go(
    serve: Callable[..., Server], connect: Callable[..., Client], until: Callable[..., None]
) -> None:
    gate = threading.Event()
    serve("t", {"wait": lambda _: gate.wait(PATIENCE)}, workers=2)
    client = connect("t", delivery="accepted")

    class Data(bytearray):
        pass

    data = Data(1 << 20)
    alive = weakref.ref(data)
    client.cast("wait", memoryview(data))
    with pytest.raises(errors.DeadlineExceeded):
        client.flush(0.2)
    with pytest.raises(BufferError):
        data.append(1)  # it is lent out
    del data
    gc.collect()
    assert alive() is not None
    gate.set()
    client.flush(PATIENCE)
    until(lambda: client._node.stats() and alive() is None, "the buffer is let go")


def test_metadata_travel_too(serve: Callable[..., Server], connect: Callable[..., Client]) -> None:
    seen: list[Any] = []
    serve("t", {"look": lambda: seen.append(dict(zmqcore.metadata()))})
    client = connect("t", delivery="accepted", metadata={"tenant": "blue"})
    client.cast("look")
    client.flush(PATIENCE)
    assert seen == [{"tenant": "blue"}]


# -- losses --------------------------------------------------------------------------------------------------


def test_a_killed_server_comes_back(record: Record, address: str, client_of: Callable[..., Client]) -> None:
    first = record.start(address, server={"workers": 0})
    client = client_of(address)
    client.cast("note", "me", 0)
    client.flush(PATIENCE)
    first.freeze()
    for number in range(1, 1000):  # these are in its socket at best
        client.cast("note", "me", number)
    first.kill()
    second = record.start(address, server={"workers": 0})
    for number in range(1000, 1500):
        client.cast("note", "me", number)
    client.flush(PATIENCE)
    assert record.numbers(first) == [0]
    assert record.numbers(second) == list(range(1, 1500))  # in order, and the new ones behind the old ones
    assert client._node.stats()["accepted"]["sent_again"] == 999


def test_all_of_several_channels_to_one_server(
    record: Record, address: str, client_of: Callable[..., Client]
) -> None:
    """``max_sockets_per_endpoint``: what one client sends is retained by two channels, which are lost together."""
    first = record.start(address, server={"workers": 0})
    client = client_of(address, node={"max_sockets_per_endpoint": 2})
    pool = client._node.pool
    client.cast("note", "me", 0)
    held = pool.acquire(address)
    client.cast("note", "me", 1)  # the other one is in use
    client.flush(PATIENCE)
    assert pool.stats()["opened"] == 2
    first.freeze()
    for number in range(2, 500):
        client.cast("note", "me", number)
    other = pool.acquire(address)
    pool.release(held)
    for number in range(500, 1000):
        client.cast("note", "me", number)
    pool.release(other)
    retained = [row["retained"] for row in pool.snapshot()]
    assert sorted(retained) == [498, 500]
    with pytest.raises(errors.DeadlineExceeded, match="998 for"):
        client.flush(0.01)
    first.kill()
    second = record.start(address, server={"workers": 0})
    for number in range(1000, 1500):
        client.cast("note", "me", number)
    client.flush(PATIENCE)
    assert record.numbers(first) == [0, 1]
    numbers = record.numbers(second)
    assert sorted(numbers) == list(range(2, 1500))
    accepted = client._node.stats()["accepted"]
    assert accepted["sent_again"] >= 998  # more if one goes first to where the loss has not been noticed yet
    assert (accepted["unfinished"], accepted["waiting"], accepted["given_up"]) == (0, 0, 0)


def test_many_threads_over_several_channels_across_kills(
    record: Record, address: str, client_of: Callable[..., Client]
) -> None:
    client = client_of(address, node={"max_sockets_per_endpoint": 3})
    run = record.start(address)
    casts = [Casting(client, sender=str(sender), pause=0.0005) for sender in range(4)]
    for _ in range(3):
        seen = len(record.lines())
        while len(record.lines()) < seen + 200:
            time.sleep(0.005)
        run.kill()
        run = record.start(address)
    sent = [casting.stop() for casting in casts]
    client.flush(PATIENCE)
    ran = {(sender, number) for _, sender, number in record.lines()}
    assert ran == {(str(sender), number) for sender, wanted in enumerate(sent) for number in range(wanted)}
    assert client._node.stats()["accepted"]["given_up"] == 0


def test_nobody_needs_to_call_for_that(
    record: Record, address: str, client_of: Callable[..., Client], until: Callable[..., None]
) -> None:
    first = record.start(address)
    client = client_of(address)
    client.cast("note", "me", 0, 0.2)
    first.kill()
    record.start(address)
    until(lambda: record.numbers() == [0], "it runs, though its sender sleeps")


def test_another_member_takes_over(
    record: Record, client_of: Callable[..., Client], until: Callable[..., None]
) -> None:
    first, second = (record.start("tcp://127.0.0.1:*", server={"workers": 0}) for _ in range(2))
    client = client_of(*first.endpoints, *second.endpoints, node={"connect_timeout": 0.3})
    client.cast("note", "me", 0)  # they take turns
    client.cast("note", "me", 1)
    client.flush(PATIENCE)
    assert len(record.numbers(first)) == 1
    first.freeze()
    for number in range(2, 1000):
        client.cast("note", "me", number)
    until(lambda: len(record.numbers(second)) == 500, "its own half")
    first.kill()
    client.flush(PATIENCE)
    assert sorted(record.numbers()) == list(range(1000))
    taken_over = [number for number in record.numbers(second) if number % 2 == record.numbers(first)[0]]
    assert taken_over == sorted(taken_over)
    for number in range(1000, 1010):
        client.cast("note", "me", number)
    client.flush(PATIENCE)
    record.check(1010, twice=False)


def test_a_server_that_is_drained_leaves_nothing_to_be_sent_again(
    record: Record, address: str, client_of: Callable[..., Client], until: Callable[..., None]
) -> None:
    client = client_of(address)
    run = record.start(address, server={"workers": 3})
    casting = Casting(client)
    for _ in range(3):
        before = casting.sent
        until(lambda before=before: casting.sent > before + 100)
        run.drain()
        run = record.start(address, server={"workers": 3})
    sent = casting.stop()
    client.flush(PATIENCE)
    assert sent > 100
    record.check(sent, twice=False)


def test_what_ran_behind_one_that_still_runs_runs_again(
    record: Record, address: str, client_of: Callable[..., Client], until: Callable[..., None], tmp_path: Path
) -> None:
    """A killed server has told up to where everything was finished: of that nothing runs again, of the rest all."""
    gate = tmp_path / "gate"
    run = record.start(address, server={"workers": 2})
    client = client_of(address)
    for number in range(100):
        client.cast("note", "me", number)
    client.flush(PATIENCE)
    client.cast("hold", "me", 100, str(gate))
    for number in range(101, 601):
        client.cast("note", "me", number)
    until(lambda: len(record.numbers()) == 600)
    assert client._node.stats()["accepted"]["unfinished"] == 501
    run.kill()
    gate.touch()
    record.start(address, server={"workers": 2})
    client.flush(PATIENCE)
    assert record.check(601, twice=True) == 500
    again = [number for number, times in Counter(record.numbers()).items() if times > 1]
    assert sorted(again) == list(range(101, 601))


#: How many casts the restarts have; ``ZMQCORE_ACCEPTED_CASTS=100000`` for the whole of it, with 20 restarts.
CASTS = int(os.environ.get("ZMQCORE_ACCEPTED_CASTS", "5000"))
RESTARTS = 20 if CASTS > 5000 else 6


@pytest.mark.parametrize("kind", ["inline", "threads", "async"])
def test_restarts(record: Record, address: str, client_of: Callable[..., Client], kind: str) -> None:
    """While a thread casts all the time; every other time by kill -9."""
    options: dict[str, Any] = {"async": kind == "async"}
    options["server"] = {"workers": {"inline": 0, "threads": 4}[kind]} if kind != "async" else {}
    client = client_of(address)
    run = record.start(address, **json.loads(json.dumps(options)))
    casting = Casting(client, most=CASTS)
    for restart in range(1, RESTARTS + 1):
        while casting.sent < CASTS * restart // (RESTARTS + 1) and casting.thread.is_alive():
            time.sleep(0.001)
        if restart % 2:
            run.kill()
        else:
            run.drain()
        run = record.start(address, **json.loads(json.dumps(options)))
    casting.thread.join(10 * PATIENCE)
    sent = casting.stop()
    client.flush(PATIENCE)
    assert sent == CASTS
    again = record.check(CASTS, twice=True)
    accepted = client._node.stats()["accepted"]
    # What a killed server had run and not told was sent again; nothing else runs in two of them.
    assert again <= accepted["sent_again"]
    assert (accepted["unfinished"], accepted["waiting"], accepted["given_up"]) == (0, 0, 0)


# -- coroutines ----------------------------------------------------------------------------------------------


def test_a_loop_across_a_kill(record: Record, address: str, client_of: Callable[..., Client]) -> None:
    node = client_of(address)._node
    first = record.start(address, **{"async": True})

    async def run() -> None:
        async with AsyncClient(
            "t", node=node, connect=address, timeout=PATIENCE, delivery="accepted"
        ) as client:
            await client.cast("note", "me", 0)
            await client.flush(PATIENCE)
            await asyncio.gather(*(client.cast("note", "me", number) for number in range(1, 500)))
            first.freeze()
            await asyncio.gather(*(client.cast("note", "me", number) for number in range(500, 1000)))
            first.kill()
            record.start(address, **{"async": True})
            await client.cast("note", "me", 1000)
            await client.cast("note", "me", 1001, 0.3)
            with pytest.raises(errors.DeadlineExceeded):
                await client.flush(0.001)
            await client.flush(PATIENCE)

    asyncio.run(run())
    record.check(1002, twice=True)


def test_the_loop_may_end_before_it_is_finished(
    record: Record, address: str, client_of: Callable[..., Client], until: Callable[..., None]
) -> None:
    node = client_of(address)._node
    first = record.start(address)

    async def run() -> None:
        client = AsyncClient("t", node=node, connect=address, timeout=PATIENCE, delivery="accepted")
        await client.cast("note", "me", 0)
        await client.flush(PATIENCE)
        first.freeze()
        for number in range(1, 100):
            await client.cast("note", "me", number)

    asyncio.run(run())
    first.kill()
    record.start(address)
    until(lambda: len(set(record.numbers())) == 100, "the node sends them again without the loop")
    record.check(100, twice=True)


def test_coroutines_wait_for_what_is_not_finished_and_calls_pass_them(
    serve: Callable[..., Server], make_node: Callable[..., Node], registry: str
) -> None:
    gate = threading.Event()
    serve("t", {"wait": gate.wait, "echo": lambda value: value}, workers=2)
    node = make_node(registry, window_messages=300)

    async def run() -> None:
        client = AsyncClient("t", node=node, timeout=PATIENCE, delivery="accepted", retry=None)
        await client.cast("wait", PATIENCE)
        casts = [asyncio.ensure_future(client.cast("echo", n)) for n in range(600)]
        while sum(cast.done() for cast in casts) < 299:
            await asyncio.sleep(0.001)
        assert await client.call("echo", 5) == 5
        with pytest.raises(errors.Overloaded, match="300 accepted messages"):
            await client.prepare(timeout=0.1).cast("echo", "one more")
        assert sum(cast.done() for cast in casts) == 299
        gate.set()
        await asyncio.gather(*casts)
        await client.flush(PATIENCE)
        outcome = await client.fanout("echo", 1)
        assert (len(outcome.sent), len(outcome.finished), outcome.unknown) == (1, 1, ())
        await client.close()

    try:
        asyncio.run(run())
    finally:
        gate.set()


def test_what_a_server_cancels_when_it_stops_is_sent_again(
    make_node: Callable[..., Node], client_of: Callable[..., Client], address: str
) -> None:
    begun: list[int] = []

    async def slow() -> None:
        begun.append(1)
        if len(begun) == 1:
            await asyncio.sleep(PATIENCE)

    async def run() -> None:
        first_node = make_node("memory://")
        first = AsyncServer("t", {"slow": slow}, node=first_node, bind=address)
        await first.start()
        async with AsyncClient(
            "t", node=node, connect=address, timeout=PATIENCE, delivery="accepted"
        ) as client:
            await client.cast("slow")
            while not begun:
                await asyncio.sleep(0.001)
            assert not await first.stop(timeout=0.2)
            await asyncio.to_thread(first_node.close)  # its port is free then
            async with AsyncServer("t", {"slow": slow}, node=make_node("memory://"), bind=address):
                await client.flush(PATIENCE)

    node = client_of(address)._node
    asyncio.run(run())
    assert len(begun) == 2


# -- fanout --------------------------------------------------------------------------------------------------


def test_a_fanout_says_who_has_run_it_who_not_and_of_whom_nobody_knows(
    serve: Callable[..., Server], connect: Callable[..., Client]
) -> None:
    gate = threading.Event()
    ran: list[str] = []
    slow = serve("t", {"do": lambda: gate.wait(PATIENCE) and ran.append("slow")}, server="slow")
    fast = serve("t", {"do": lambda: ran.append("fast")}, server="fast")
    failing = serve("t", {"do": lambda: 1 / 0}, server="failing")
    client = connect("t", delivery="accepted", timeout=0.5)
    try:
        outcome = client.fanout("do")
        assert {member.topic.server for member in outcome.sent} == {"slow", "fast", "failing"}
        assert {member.topic.server for member in outcome.finished} == {"fast", "failing"}
        assert {member.topic.server for member in outcome.unknown} == {"slow"}
        assert outcome.failed == {}
    finally:
        gate.set()
    assert {member.topic.server for member in client.fanout("do").finished} == {"slow", "fast", "failing"}
    assert sorted(ran) == ["fast", "fast", "slow", "slow"]
    for server in (slow, fast, failing):
        server.stop()


def test_a_fanout_to_one_that_is_killed_is_unknown_and_not_sent_to_others(
    record: Record, client_of: Callable[..., Client], until: Callable[..., None]
) -> None:
    first, second = (record.start("tcp://127.0.0.1:*") for _ in range(2))
    client = client_of(*first.endpoints, *second.endpoints, timeout=1.0)
    kill = threading.Timer(0.3, first.kill)
    assert len(client.fanout("note", "me", 0).finished) == 2
    first.freeze()
    kill.start()
    outcome = client.fanout("note", "me", 1)
    kill.join()
    assert [member.endpoints[0] for member in outcome.unknown] == first.endpoints
    assert [member.endpoints[0] for member in outcome.finished] == second.endpoints
    until(lambda: client._node.stats()["accepted"]["given_up"] == 1, "nobody waits for it any more")
    assert record.numbers(second) == [0, 1]


# -- the end -------------------------------------------------------------------------------------------------


def test_close_waits_for_what_is_accepted(
    serve: Callable[..., Server], connect: Callable[..., Client]
) -> None:
    ran: list[int] = []

    def work(number: int) -> None:
        time.sleep(0.05)
        ran.append(number)

    serve("t", {"work": work})
    with connect("t", delivery="accepted") as client:
        for number in range(5):
            client.cast("work", number)
    assert sorted(ran) == list(range(5))


def test_close_says_what_is_left(
    serve: Callable[..., Server], connect: Callable[..., Client], caplog: pytest.LogCaptureFixture
) -> None:
    gate = threading.Event()
    serve("t", {"wait": gate.wait})
    client = connect("t", delivery="accepted")
    client.cast("wait", PATIENCE)
    client.close(timeout=0.1)
    gate.set()
    assert "not everything is finished that was accepted: 1 for " in caplog.text


def test_a_node_that_is_closed_gives_up_what_is_left(
    record: Record, client_of: Callable[..., Client], caplog: pytest.LogCaptureFixture
) -> None:
    run = record.start("tcp://127.0.0.1:*")
    client = client_of(*run.endpoints)
    client.cast("note", "me", 0)
    client.flush(PATIENCE)
    run.freeze()
    client.cast("note", "me", 1)
    client.cast("note", "me", 2)
    client._node.close(timeout=0.2)
    assert "2 accepted messages for tcp://" in caplog.text
    assert "given up" in caplog.text
    with pytest.raises(errors.PeerLost, match="2 accepted messages were given up"):
        client.flush()


def test_a_node_that_is_closed_sends_again_meanwhile(
    record: Record, address: str, client_of: Callable[..., Client], running: Callable[..., Any]
) -> None:
    run = record.start(address)
    client = client_of(address)
    client.cast("note", "me", 0)
    client.flush(PATIENCE)
    run.freeze()
    client.cast("note", "me", 1)
    run.kill()
    closing = running(client._node.close, timeout=PATIENCE)
    record.start(address)
    closing.result()
    assert sorted(record.numbers()) == [0, 1]


def test_the_end_of_the_process_waits_a_little(
    record: Record, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    run = record.start("tcp://127.0.0.1:*")
    program = (
        "from zmqcore import Client, Node\n"
        f"client = Client('t', node=Node('memory://'), connect={run.endpoints[0]!r}, delivery='accepted')\n"
        "for number in range(3): client.cast('note', 'me', number, 0.05)\n"
    )
    ended = run_python(program)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert sorted(record.numbers()) == [0, 1, 2]


def test_a_forked_child_sends_nothing_of_its_parents_again(
    record: Record, address: str, client_of: Callable[..., Client]
) -> None:
    run = record.start(address, server={"workers": 0})
    client = client_of(address)
    client.cast("note", "me", 0)
    client.flush(PATIENCE)
    run.freeze()
    for number in range(1, 100):
        client.cast("note", "me", number)
    child = os.fork()
    if child == 0:
        try:
            ok = client._node.stats()["accepted"]["unfinished"] == 0
            client.flush(0.0)
            os.kill(run.process.pid, 18)
            client.cast("note", "child", 100)
            client.flush(PATIENCE)
            client._node.close()
            os._exit(0 if ok else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    client.flush(PATIENCE)
    record.check(101, twice=False)


# -- bad days ------------------------------------------------------------------------------------------------


def test_ten_servers_one_of_them_stopped(record: Record, client_of: Callable[..., Client]) -> None:
    """What it has not finished goes elsewhere, and no more is kept for it than its window holds."""
    servers = [record.start("tcp://127.0.0.1:*", server={"workers": 0}) for _ in range(10)]
    endpoints = [server.endpoints[0] for server in servers]
    client = client_of(
        *endpoints, node={"liveness": 1.0, "connect_timeout": 0.5, "window_messages": 300}, timeout=5.0
    )
    for number in range(100):
        client.cast("note", "me", number)
    client.flush(PATIENCE)
    servers[3].freeze()
    sent = 100
    while sent < 5_000:
        try:
            client.cast("note", "me", sent)
        except errors.Overloaded:
            continue
        sent += 1
        if sent % 100 == 0:
            stats = client._node.stats()
            kept = {endpoint: channel["retained"] for endpoint, channel in stats["channels"].items()}
            assert all(n <= 300 for n in kept.values())
            assert stats["accepted"]["waiting"] <= 300
    client.flush(PATIENCE)
    record.check(sent, twice=False)
    assert client._node.stats()["accepted"]["sent_again"] > 0


def test_a_host_that_does_not_answer_is_not_waited_for_once_for_each_of_its_members(
    record: Record, client_of: Callable[..., Client]
) -> None:
    """All of what they had goes to another host's member, after fewer attempts than there are members."""
    try:
        socket.create_server(("127.0.0.2", 0)).close()
    except OSError:
        pytest.skip("there is no second address on the loopback device")
    gone = [record.start("tcp://127.0.0.2:*", server={"workers": 0}) for _ in range(8)]
    alive = record.start("tcp://127.0.0.1:*", server={"workers": 0})
    endpoints = [server.endpoints[0] for server in (*gone, alive)]
    client = client_of(*endpoints, node={"liveness": 1.0, "connect_timeout": 0.5}, timeout=PATIENCE)
    for number in range(100):
        client.cast("note", "me", number)
    client.flush(PATIENCE)
    for server in gone:
        server.freeze()
    for number in range(100, 200):
        client.cast("note", "me", number)
    pool = client._node.pool
    before = pool.stats()
    client.flush(PATIENCE)
    after = pool.stats()
    assert sum(after[cause] - before[cause] for cause in ("dead", "abandoned")) < len(gone)
    record.check(200, twice=False)


def test_one_that_kills_its_server_goes_round_with_growing_pauses(
    record: Record, address: str, client_of: Callable[..., Client], tmp_path: Path
) -> None:
    run = record.start(address, server={"workers": 0})
    client = client_of(address)
    both_accepted = tmp_path / "both accepted"
    client.cast("exit", "poison", 0, str(both_accepted))
    client.cast("note", "me", 1)
    both_accepted.touch()
    run.process.wait(PATIENCE)
    for _ in range(3):
        # Not waited for: what kills it may come before it has said where it listens.
        run = record.start(address, server={"workers": 0}, wait=False)
        run.process.wait(PATIENCE)
    assert record.numbers() == [0] * 4
    assert client._node.stats()["accepted"]["unfinished"] == 2


def test_many_threads_and_a_signal_between(
    record: Record, address: str, client_of: Callable[..., Client]
) -> None:
    """Eight threads share one lane; each one's messages stay in its order, across a kill."""
    run = record.start(address, server={"workers": 0})
    client = client_of(address)
    casting = [Casting(client, sender=str(n), most=500) for n in range(8)]
    while sum(one.sent for one in casting) < 1000:
        time.sleep(0.001)
    run.kill()
    run = record.start(address, server={"workers": 0})
    for one in casting:
        one.thread.join(PATIENCE)
        assert one.stop() == 500
    client.flush(PATIENCE)
    for n in range(8):
        mine = [(name, number) for name, sender, number in record.lines() if sender == str(n)]
        assert {number for _, number in mine} == set(range(500))
        for name in ("0", "1"):
            numbers = [number for run_name, number in mine if run_name == name]
            assert numbers == sorted(set(numbers))
