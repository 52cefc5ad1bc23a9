"""Names are looked up without holding anybody longer than he wants to wait."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from name_support import Names
from waiting_support import PATIENCE, until

from zmqcore import resolver
from zmqcore.endpoint import Refusal, numeric, probe
from zmqcore.resolver import addresses


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[Names]:
    with Names(monkeypatch) as made:
        yield made


def lookups() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "zmqcore-resolver"]


def test_a_name_that_takes_long_holds_nobody(names: Names) -> None:
    names.known["slow.test"] = ["192.0.2.1", "192.0.2.2"]
    names.answers.clear()
    for _ in range(3):
        with pytest.raises(TimeoutError, match="not been resolved yet"):
            addresses("slow.test", 0.01)
    names.answers.set()
    assert addresses("slow.test", PATIENCE) == ["192.0.2.1", "192.0.2.2"]
    assert names.asked == ["slow.test"], "all waited for the same lookup"
    until(lambda: not lookups())


def test_what_was_found_is_remembered_for_a_moment(
    names: Names,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names.known["moves.test"] = ["192.0.2.1"]
    monkeypatch.setattr(resolver, "_REMEMBERED", 1e9)
    assert addresses("moves.test", PATIENCE) == ["192.0.2.1"]
    names.known["moves.test"] = ["192.0.2.2"]
    assert addresses("moves.test", PATIENCE) == ["192.0.2.1"]
    # From zero on: what has just ended counts as it comes.
    resolver._resolver._lookups["moves.test"].ended = 0.0
    monkeypatch.setattr(resolver, "_REMEMBERED", 1.0)
    assert addresses("moves.test", PATIENCE) == ["192.0.2.2"]
    assert names.asked == ["moves.test"] * 2
    assert list(resolver._resolver._lookups) == ["moves.test"], "nothing else is kept"


def test_a_failure_is_told_to_each(names: Names) -> None:
    caught = []
    for _ in range(2):
        with pytest.raises(socket.gaierror, match="not known") as raised:
            addresses("nowhere.test", PATIENCE)
        caught.append(raised.value)
    assert caught[0] is not caught[1]
    assert names.asked == ["nowhere.test"]


def test_a_name_that_cannot_be_one() -> None:
    with pytest.raises(socket.gaierror, match="no host can have this name"):
        addresses("x" * 64 + ".example", PATIENCE)


def test_no_more_threads_than_so_many(names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver, "_MOST_LOOKUPS", 2)
    names.answers.clear()
    names.known = {f"{n}.test": ["192.0.2.1"] for n in range(4)}
    for name in names.known:
        with pytest.raises(TimeoutError):
            addresses(name, 0.01)
    assert len(lookups()) == 2
    names.answers.set()
    for name in names.known:
        assert addresses(name, PATIENCE)


def test_no_thread_can_be_started(names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    names.known["here.test"] = ["192.0.2.1"]
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", fail)
        with pytest.raises(OSError, match="no thread") as raised:
            addresses("here.test", PATIENCE)
        assert raised.value.errno == errno.EAGAIN
        refusal = numeric("tcp://here.test:1", PATIENCE)
        assert isinstance(refusal, Refusal)
        assert refusal.local
    assert addresses("here.test", PATIENCE) == ["192.0.2.1"]


def test_a_forked_child_begins_anew(names: Names) -> None:
    names.known["slow.test"] = ["192.0.2.1"]
    names.answers.clear()
    with pytest.raises(TimeoutError):
        addresses("slow.test", 0.01)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            names.answers.set()
            code = addresses("slow.test", PATIENCE) != ["192.0.2.1"]
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


_ENDS = """
import socket, threading
from zmqcore.resolver import addresses
socket.getaddrinfo = lambda *_: threading.Event().wait()
try:
    addresses("never.test", 0.01)
except TimeoutError:
    print("ends")
"""


def test_a_process_ends_although_a_lookup_goes_on() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", _ENDS], check=False, capture_output=True, text=True, timeout=PATIENCE
    )
    assert (ran.stdout, ran.stderr, ran.returncode) == ("ends\n", "", 0)


# -- endpoints -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "endpoint", ["tcp://127.0.0.1:1", "tcp://[::1]:1", "tcp://[fe80::1%eth0]:1", "ipc://@x", "inproc://x"]
)
def test_what_holds_no_name_is_left_as_it_is(endpoint: str, names: Names) -> None:
    assert numeric(endpoint, 0.0) is endpoint
    assert names.asked == []


def test_a_name_becomes_an_address(names: Names) -> None:
    names.known["one.test"] = ["192.0.2.7"]
    assert numeric("tcp://ONE.test:55", PATIENCE) == "tcp://192.0.2.7:55"
    assert numeric("tcp://two.test:55", PATIENCE) == Refusal("two.test: name or service not known")
    names.answers.clear()
    assert numeric("tcp://three.test:55", 0.01) == Refusal(
        "three.test: the name has not been resolved yet", final=False
    )
    assert probe("tcp://three.test:55", 0.01) == Refusal(
        "three.test: the name has not been resolved yet", final=False
    )


def test_of_several_addresses_the_first_that_accepts(names: Names) -> None:
    with socket.create_server(("127.0.0.3", 0)) as listener:
        port = listener.getsockname()[1]
        names.known["many.test"] = ["127.0.0.2", "127.0.0.3", "127.0.0.4"]
        assert numeric(f"tcp://many.test:{port}", PATIENCE) == f"tcp://127.0.0.3:{port}"
        assert probe(f"tcp://many.test:{port}", PATIENCE) is None
    assert numeric(f"tcp://many.test:{port}", PATIENCE) == Refusal("connection refused")
