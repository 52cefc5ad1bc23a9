"""ServerProcesses: several under one topic, what becomes of those that die, and of all when the parent does."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import re
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from zmqcore import (
    AsyncClient,
    Client,
    InvalidEndpoint,
    Limits,
    MatchmakerError,
    Node,
    Overloaded,
    PayloadTooLarge,
    PeerLost,
    ServerProcesses,
)
from zmqcore.codec import get_codec
from zmqcore.rpc.processes import restart_delay
from zmqcore.rpc.target import NotServable

Until = Callable[..., None]
Running = Callable[..., Any]
Processes = Callable[..., ServerProcesses]

PATIENCE = 30.0
SERVERS = int(os.environ.get("ZMQCORE_RESTART_SERVERS", "4"))
"""How many processes the rolling restart has; the proof that is quoted elsewhere takes 20."""

MODULE = '''
"""What the processes serve."""
import asyncio, os, pathlib, time
import zmqcore.node

HERE = pathlib.Path(__file__).parent

if HERE.joinpath("broken").exists():
    raise RuntimeError("it is broken today")
if HERE.joinpath("vanish").exists():
    os._exit(7)
if HERE.joinpath("uvloop").exists():
    import uvloop
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())


def doubled(operation, proceed):
    return 2 * proceed(operation)


async def doubled_async(operation, proceed):
    return 2 * await proceed(operation)


class Work:
    def echo(self, value):
        return value

    def pid(self):
        return os.getpid()

    def nodes(self):
        return [[node.liveness, node.window_messages, node.limits.depth] for node in zmqcore.node._nodes]

    def sleep(self, seconds):
        HERE.joinpath(f"asleep-{os.getpid()}-{time.monotonic_ns()}").touch()
        time.sleep(seconds)
        return "slept"

    def note(self, key):
        """Write the key down, by one write."""
        fd = os.open(HERE / f"noted-{os.getpid()}", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(fd, f"{key}\\n".encode())
        os.close(fd)
        return key


class Needy:
    def __init__(self, shelf): pass


class Empty:
    pass


class Coroutines:
    async def sleep(self, seconds):
        HERE.joinpath(f"asleep-{os.getpid()}-{time.monotonic_ns()}").touch()
        await asyncio.sleep(seconds)
        return "slept"

    async def loop(self):
        return type(asyncio.get_running_loop()).__module__

    def block(self, seconds):
        HERE.joinpath(f"asleep-{os.getpid()}-{time.monotonic_ns()}").touch()
        time.sleep(seconds)
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of a module ``zmqcore_test_work``."""
    tmp_path.joinpath("zmqcore_test_work.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.fixture
def processes(module: Path) -> Iterator[Processes]:  # noqa: ARG001 - it must be there first
    """``processes(n, **options)`` starts so many; all are stopped at the end."""
    made: list[ServerProcesses] = []

    def start(n: int, target: str = "zmqcore_test_work:Work", **options: Any) -> ServerProcesses:
        made.append(ServerProcesses("t", target, processes=n, **options))
        return made[-1].start()

    yield start
    for one in made:
        one.stop(drain=False, timeout=0.0)


@pytest.fixture
def client(node: Node) -> Client:
    return Client("t", node=node, timeout=PATIENCE, discovery_timeout=PATIENCE)


def pids(servers: ServerProcesses) -> list[int]:
    return [process["pid"] for process in servers.running]


def asleep(module: Path) -> bool:
    return any(module.glob("asleep-*"))


# -- that they serve -----------------------------------------------------------------------------------------


def test_each_process_is_a_member(processes: Processes, client: Client) -> None:
    servers = processes(3, server="host", workers=2)
    assert [process["server"] for process in servers.running] == ["host-1", "host-2", "host-3"]
    assert {member.server for member in client.members()} == {"host-1", "host-2", "host-3"}
    assert {client.call("pid") for _ in range(6)} == set(pids(servers))
    assert os.getpid() not in pids(servers)
    assert client.prepare(server="host-2").call("pid") == pids(servers)[1]
    assert client.prepare(server="host-2").call("zmqcore.stats")["workers"] == 2
    assert servers.stats() == {"processes": 3, "running": 3, "restarts": 0}
    assert repr(servers) == "<ServerProcesses t 3 of 3 running>"
    with pytest.raises(RuntimeError, match="runs already"):
        servers.start()


def test_options_reach_the_servers(processes: Processes, client: Client, module: Path, until: Until) -> None:
    processes(1, workers=1, queue_size=1, on_full="reject")
    sleeping = client.submit("sleep", 1.0)
    until(lambda: asleep(module))
    more = [client.submit("echo", number) for number in range(3)]
    assert [type(future.exception()) for future in more] == [type(None), Overloaded, Overloaded]
    assert sleeping.result() == "slept"


def test_options_of_the_node(processes: Processes, client: Client) -> None:
    processes(
        2, node={"liveness": 0.75, "window_messages": 9, "limits": Limits(depth=12), "codec": "msgpack"}
    )
    assert client.call("nodes") == [[0.75, 9, 12]]
    with pytest.raises(PayloadTooLarge, match="12"):
        client.call("echo", [[[[[[[[[[[[0]]]]]]]]]]]])


@pytest.mark.parametrize(
    ("target", "interceptor"), [("Work", "doubled"), ("Coroutines", "doubled_async"), ("Coroutines", None)]
)
def test_interceptors_by_name(
    processes: Processes, client: Client, target: str, interceptor: str | None
) -> None:
    names = [f"zmqcore_test_work:{interceptor}"] if interceptor else []
    processes(1, f"zmqcore_test_work:{target}", interceptors=names)
    assert client.call("sleep", 0.0) == ("sleptslept" if interceptor else "slept")


@pytest.mark.parametrize("name", ["nowhere", "zmqcore_test_work:missing", "zmqcore_test_work:HERE"])
def test_interceptors_that_are_none(processes: Processes, name: str) -> None:
    with pytest.raises((NotServable, ChildProcessError), match=r"no module|has no|cannot be called"):
        processes(1, interceptors=[name])


@pytest.mark.skipif(importlib.util.find_spec("uvloop") is None, reason="uvloop is not installed")
def test_coroutines_run_on_the_loop_that_the_module_asks_for(
    processes: Processes, client: Client, module: Path
) -> None:
    module.joinpath("uvloop").touch()
    processes(1, "zmqcore_test_work:Coroutines")
    assert client.call("loop").partition(".")[0] == "uvloop"


def test_the_level_of_the_log_by_its_name(
    processes: Processes, client: Client, capfd: pytest.CaptureFixture[str]
) -> None:
    processes(1, log_level="DEBUG").stop()
    assert "zmqcore.server" in capfd.readouterr().err
    assert client.members() == ()


def test_coroutines_run_on_a_loop(processes: Processes, client: Client) -> None:
    """Far more at a time than there are workers; and they drain."""
    servers = processes(2, "zmqcore_test_work:Coroutines", workers=1, max_concurrency=40)
    for process in servers.running:
        client.prepare(server=process["server"]).call("zmqcore.ping")
    futures = [client.submit("sleep", 1.0) for _ in range(100)]
    one = client.prepare(server=servers.running[0]["server"])
    stats = one.call("zmqcore.stats")
    assert (stats["tasks"], stats["queued"]) == (40, 10)
    assert servers.stop() is True
    assert [future.result() for future in futures] == ["slept"] * 100


def test_a_loop_that_is_blocked_is_given_up(
    processes: Processes, client: Client, module: Path, until: Until
) -> None:
    servers = processes(1, "zmqcore_test_work:Coroutines")
    blocked = client.submit("block", 600.0)
    until(lambda: asleep(module))
    assert servers.stop(timeout=0.2) is False
    assert isinstance(blocked.exception(), PeerLost)


def test_it_can_be_started_again(processes: Processes, client: Client, runtime: Path, until: Until) -> None:
    servers = processes(2)
    first = pids(servers)
    assert client.call("echo", 1) == 1
    assert servers.stop() is True
    assert servers.wait(0)
    assert (servers.running, repr(servers)) == ((), "<ServerProcesses t not running>")
    assert list(runtime.glob("*.sock")) == []
    until(lambda: client.members() == ())
    with servers:
        assert client.call("echo", 2) == 2
        assert not set(first) & set(pids(servers))
    assert servers.stop() is True


# -- what cannot be served -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "complaint"),
    [
        ("zmqcore_test_none:Work", "no module 'zmqcore_test_none'"),
        ("zmqcore_test_work:None", "has no 'None'; it has Coroutines, Empty, HERE, Needy, Work"),
        ("zmqcore_test_work:Needy", "without arguments"),
        ("zmqcore_test_work:Empty", "has no public method to serve"),
        ("zmqcore_test_work.py", "is not MODULE:OBJECT"),
    ],
)
def test_what_cannot_be_served_says_why(processes: Processes, target: str, complaint: str) -> None:
    with pytest.raises(NotServable, match=re.escape(complaint)):
        processes(2, target)


def test_a_module_that_raises(processes: Processes, module: Path, capfd: pytest.CaptureFixture[str]) -> None:
    module.joinpath("broken").touch()
    with pytest.raises(NotServable, match="RuntimeError: it is broken today"):
        processes(4)
    traces = capfd.readouterr().err
    assert traces.count("Traceback") == 1, "once is enough"


def test_a_module_that_ends_its_process(processes: Processes, module: Path) -> None:
    module.joinpath("vanish").touch()
    with pytest.raises(ChildProcessError, match="exit code 7"):
        processes(2)


def test_a_registry_that_cannot_be_used(processes: Processes, runtime: Path) -> None:
    with pytest.raises(ChildProcessError, match="MatchmakerError"):
        processes(2, matchmaker="local:///proc")
    assert list(runtime.glob("*.sock")) == []


@pytest.mark.parametrize("bind", ["tcp://127.0.0.1:5555", "ipc:///tmp/one", "tcp://*:80"])
def test_processes_cannot_share_an_endpoint(bind: str) -> None:
    with pytest.raises(InvalidEndpoint, match="cannot share"):
        ServerProcesses("t", "zmqcore_test_work:Work", processes=2, bind=bind)


def test_each_takes_a_port_of_its_own(processes: Processes) -> None:
    servers = processes(2, bind=["tcp://127.0.0.1:*", "ipc://*"])
    endpoints = [endpoint for process in servers.running for endpoint in process["endpoints"]]
    assert len(set(endpoints)) == 4


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"processes": 0}, "processes is 0"),
        ({"queue_size": 0}, "queue_size is 0"),
        ({"on_full": "drop"}, "on_full is 'drop'"),
        ({"on_full": "reject", "workers": 0}, "give workers=1"),
        ({"lease": 0}, "lease is 0"),
        ({"drain_timeout": -1}, "drain_timeout is -1"),
        ({"log_level": "x"}, "log_level is 'x'; it must be 'CRITICAL' or"),
        ({"matchmaker": "foo"}, "no matchmaker can be made from 'foo'"),
        ({"node": 5}, "node is 5; it must be a mapping"),
        ({"node": {"livenes": 1.0}}, "unexpected keyword argument 'livenes'"),
        ({"node": {"liveness": "a"}}, "liveness is 'a'"),
        ({"node": {"window_messages": 0}}, "window_messages is 0"),
        ({"node": {"codec": "json"}}, "no codec is named 'json'"),
        ({"node": {"codec": get_codec("msgpack")}}, "cannot be given to another process"),
        ({"node": {"matchmaker": "local://"}}, "node has matchmaker, which is an option of ServerProcesses"),
        ({"interceptors": [print]}, "must be a list of texts, MODULE:OBJECT each"),
        ({"interceptors": "a:b"}, "must be a list of texts, MODULE:OBJECT each"),
    ],
)
def test_options_are_checked_before_anything_is_started(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises((ValueError, TypeError, MatchmakerError), match=complaint):
        ServerProcesses("t", "zmqcore_test_work:Work", **options)


# -- dying ---------------------------------------------------------------------------------------------------


def test_one_that_is_killed_is_started_again(
    processes: Processes, client: Client, until: Until, runtime: Path, caplog: pytest.LogCaptureFixture
) -> None:
    servers = processes(3)
    before = pids(servers)
    with caplog.at_level(logging.INFO, "zmqcore.server"):
        os.kill(before[1], signal.SIGKILL)
        until(lambda: servers.stats() == {"processes": 3, "running": 3, "restarts": 1})
    after = pids(servers)
    assert (after[0], after[2]) == (before[0], before[2])
    assert after[1] not in before
    until(lambda: {member.pid for member in client.members()} == set(after))
    assert {client.call("pid") for _ in range(6)} == set(after)
    assert not list(runtime.glob(f"{before[1]}-*.sock")), "what the dead one had bound"
    (died, again) = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(
        rf"process 2 of t: {before[1]} was ended by SIGKILL after [\d.]+ s; started again in 0.2 s", died
    )
    assert again == f"process 2 of t serves again: {after[1]}"


def test_one_that_ends_by_itself_is_started_again(
    processes: Processes, client: Client, module: Path, until: Until
) -> None:
    """SIGTERM to one process alone: it drains first. So an operator can replace one by hand."""
    servers = processes(1)
    (before,) = pids(servers)
    sleeping = client.submit("sleep", 0.5)
    until(lambda: asleep(module))
    os.kill(before, signal.SIGTERM)
    assert sleeping.result() == "slept"
    until(lambda: servers.stats() == {"processes": 1, "running": 1, "restarts": 1})
    assert client.call("pid") == pids(servers)[0] != before


def test_pauses_grow_while_it_cannot_be_started(
    processes: Processes, module: Path, until: Until, caplog: pytest.LogCaptureFixture
) -> None:
    servers = processes(2)
    module.joinpath("broken").touch()
    os.kill(pids(servers)[0], signal.SIGKILL)
    until(lambda: servers.stats()["restarts"] == 2)
    module.joinpath("broken").unlink()
    until(lambda: servers.stats()["running"] == 2)
    pauses = [re.search(r"again in (.*) s", record.getMessage()) for record in caplog.records]
    assert [found[1] for found in pauses if found][:3] == ["0.2", "0.4", "0.8"][: servers.stats()["restarts"]]


def test_restart_delay() -> None:
    assert [restart_delay(failures) for failures in range(5)] == [0.1, 0.2, 0.4, 0.8, 1.6]
    assert restart_delay(7) == restart_delay(100_000) == 10.0


_PARENT = """
import os, sys, time, zmqcore
sys.path.insert(0, sys.argv[1])
servers = zmqcore.ServerProcesses("t", "zmqcore_test_work:Work", processes=2, drain_timeout=30.0)
servers.start()
print("ready", flush=True)
if "fork" in sys.argv and os.fork() == 0:
    print(servers.running, servers.stop(), os.getpid(), flush=True)
    time.sleep(600.0)
finished = servers.serve_forever(float(sys.argv[2]))
print("served", finished, flush=True)
"""


@pytest.fixture
def parent(
    module: Path, start_program: Callable[..., subprocess.Popen[str]]
) -> Callable[..., subprocess.Popen[str]]:
    """``parent(drain)`` starts a process that starts two."""

    def start(drain: float = PATIENCE, *words: str) -> subprocess.Popen[str]:
        return start_program(_PARENT, str(module), str(drain), *words)

    return start


def test_when_the_parent_dies_the_others_drain_and_end(
    parent: Callable[..., subprocess.Popen[str]], client: Client, module: Path, until: Until
) -> None:
    process = parent()
    sleeping = [client.submit("sleep", 0.5) for _ in range(4)]
    until(lambda: len(list(module.glob("asleep-*"))) == 4)
    process.kill()
    assert [future.result() for future in sleeping] == ["slept"] * 4
    until(lambda: client.members() == ())
    # They hold its standard output as long as they live.
    process.communicate(timeout=PATIENCE)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_all(
    parent: Callable[..., subprocess.Popen[str]],
    client: Client,
    module: Path,
    until: Until,
    number: signal.Signals,
    runtime: Path,
) -> None:
    process = parent()
    sleeping = [client.submit("sleep", 0.5) for _ in range(4)]
    until(lambda: len(list(module.glob("asleep-*"))) == 4)
    process.send_signal(number)
    assert [future.result() for future in sleeping] == ["slept"] * 4
    assert process.communicate(timeout=PATIENCE) == ("served True\n", "")
    assert list(runtime.glob("*.sock")) == []


def test_a_second_signal_ends_all_at_once(
    parent: Callable[..., subprocess.Popen[str]], client: Client, module: Path, until: Until, runtime: Path
) -> None:
    process = parent(600.0)
    sleeping = [client.submit("sleep", 600.0) for _ in range(4)]
    until(lambda: len(list(module.glob("asleep-*"))) == 4)
    process.send_signal(signal.SIGTERM)
    until(lambda: client.members() == ())
    assert process.poll() is None, "it does not wait for what runs"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=PATIENCE) == ("served False\n", "")
    assert {type(future.exception()) for future in sleeping} == {PeerLost}
    assert list(runtime.glob("*.sock")) == []


def test_a_forked_child_leaves_them_alone(
    parent: Callable[..., subprocess.Popen[str]], client: Client, until: Until
) -> None:
    """It neither stops them, nor keeps them from noticing that the parent has died."""
    process = parent(PATIENCE, "fork")
    assert process.stdout is not None
    running, stopped, forked = process.stdout.readline().split()
    try:
        assert (running, stopped) == ("()", "True")
        assert client.call("echo", 1) == 1
        process.kill()
        until(lambda: client.members() == ())
    finally:
        os.kill(int(forked), signal.SIGKILL)


# -- stopping ------------------------------------------------------------------------------------------------


def test_stop_gives_up_in_the_end(
    processes: Processes, client: Client, module: Path, until: Until, runtime: Path
) -> None:
    servers = processes(2)
    sleeping = client.submit("sleep", 600.0)
    until(lambda: asleep(module))
    assert servers.stop(timeout=0.3) is False
    assert isinstance(sleeping.exception(), PeerLost)
    assert list(runtime.glob("*.sock")) == []


def test_a_second_stop_may_be_harder(
    processes: Processes, client: Client, module: Path, until: Until, running: Running
) -> None:
    servers = processes(2)
    sleeping = client.submit("sleep", 600.0)
    until(lambda: asleep(module))
    stopping = running(servers.stop, timeout=600.0)
    until(lambda: client.members() == ())
    assert not stopping.ended
    assert servers.stop(drain=False, timeout=0.0) is False
    assert stopping.result() is False
    assert isinstance(sleeping.exception(), PeerLost)


def test_one_that_hangs_is_killed(processes: Processes) -> None:
    servers = processes(2)
    os.kill(pids(servers)[0], signal.SIGSTOP)
    assert servers.stop(timeout=0.0) is False


# -- replacing -----------------------------------------------------------------------------------------------


def test_a_rolling_restart_costs_no_call(
    processes: Processes, client: Client, module: Path, running: Running, until: Until
) -> None:
    """Threads and coroutines call all the time. Every call gets its answer, and every one has been run once."""
    servers = processes(SERVERS, workers=2)
    before = pids(servers)
    until(lambda: len(client.members()) == SERVERS)
    over = threading.Event()

    def work(thread: int) -> list[str]:
        keys: list[str] = []
        while not over.is_set():
            keys.append(f"{thread}-{len(keys)}")
            assert client.call("note", keys[-1]) == keys[-1]
        return keys

    async def work_by_coroutines() -> list[str]:
        keys: list[str] = []

        async def work(number: int) -> None:
            while not over.is_set():
                key = f"coroutine-{number}-{len(keys)}"
                keys.append(key)
                assert await asking.call("note", key) == key

        async with AsyncClient("t", node=client._node, timeout=PATIENCE) as asking:
            await asyncio.gather(*(work(number) for number in range(4)))
        return keys

    threads = [running(work, number) for number in range(4)]
    threads.append(running(lambda: asyncio.run(work_by_coroutines())))
    try:
        assert servers.restart(PATIENCE) is True
    finally:
        over.set()
    called = [key for thread in threads for key in thread.result()]
    noted = Counter(key for path in module.glob("noted-*") for key in path.read_text().split())
    assert noted == Counter(called)
    assert not set(before) & set(pids(servers)), "all have been replaced"
    assert servers.stats() == {"processes": SERVERS, "running": SERVERS, "restarts": 0}
    until(lambda: {member.pid for member in client.members()} == set(pids(servers)))
    assert len(list(module.glob("noted-*"))) > SERVERS, "old and new ones have had their share"


def test_what_cannot_be_started_replaces_nothing(processes: Processes, client: Client, module: Path) -> None:
    servers = processes(2)
    before = pids(servers)
    module.joinpath("broken").touch()
    with pytest.raises(NotServable, match="broken today"):
        servers.restart()
    assert pids(servers) == before
    assert {client.call("pid") for _ in range(4)} == set(before)
    assert servers.stop() is True


def test_stop_ends_a_restart(processes: Processes, running: Running, until: Until) -> None:
    servers = processes(2)
    restarting = running(servers.restart)
    until(servers._restarting.locked)
    servers.stop()
    restarting.join()
    assert servers.running == ()
    assert servers.wait(0)
