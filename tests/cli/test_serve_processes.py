"""serve --processes: several at once, and how they end."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest
from waiting_support import until

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

    from conftest import Ran, Shop

    Ended = Callable[["subprocess.Popen[str]"], Ran]

SIGNALS = [signal.SIGINT, signal.SIGTERM]

SLOW = """
import os, pathlib, time

def slow(seconds):
    pathlib.Path(f"began-{os.getpid()}-{time.monotonic_ns()}").touch()
    time.sleep(seconds)
    return "finished"

def pid():
    return os.getpid()

def liveness():
    import zmqcore.node
    return [node.liveness for node in zmqcore.node._nodes]
"""


@pytest.fixture(autouse=True)
def late(shop: Shop) -> None:
    shop.directory.joinpath("late.py").write_text(SLOW, encoding="utf-8")


def registered(shop: Shop) -> list[int]:
    return sorted(member["pid"] for member in shop.run("members").json)


def test_it_announces_every_process(shop: Shop) -> None:
    process, announced = shop.serve("late", "--processes", "3", "--server", "host")
    assert (announced["event"], announced["topic"]) == ("listening", "inventory")
    assert announced["pid"] == process.pid
    assert [each["server"] for each in announced["processes"]] == ["host-1", "host-2", "host-3"]
    pids = sorted(each["pid"] for each in announced["processes"])
    assert registered(shop) == pids
    for each in announced["processes"]:
        assert shop.run("call", "--connect", each["endpoints"][0], "inventory", "pid").json == each["pid"]


@pytest.mark.parametrize("processes", [[], ["--processes", "2"]])
def test_liveness(shop: Shop, processes: list[str]) -> None:
    shop.serve("late", *processes, "--liveness", "0.75")
    assert shop.run("call", "inventory", "liveness").json == [0.75]


def test_text_for_people_names_the_processes(shop: Shop, ended: Ended) -> None:
    process = shop.start("serve", "late", "--topic", "inventory", "--processes", "2", "--no-json")
    until(lambda: len(registered(shop)) == 2)
    pids = registered(shop)
    process.send_signal(signal.SIGINT)
    ran = ended(process)
    assert (ran.code, ran.err) == (0, "")
    assert "serving inventory by 2 processes" in ran.out
    assert all(f"process {pid}: ipc://" in ran.out for pid in pids)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_to_the_group_drains_all(shop: Shop, ended: Ended, number: signal.Signals) -> None:
    """As Ctrl-C in a terminal: it counts once."""
    process, _ = shop.serve("late", "--processes", "2")
    callers = [shop.start("call", "inventory", "slow", "1.5", "--timeout", "30") for _ in range(2)]
    until(lambda: len(list(shop.directory.glob("began-*"))) == 2)
    os.killpg(process.pid, number)
    for caller in callers:
        answer = ended(caller)
        assert (answer.code, answer.json, answer.err) == (0, "finished", "")
    ran = ended(process)
    assert (ran.code, ran.err) == (0, "")
    assert registered(shop) == []
    assert [path.name for path in shop.runtime.iterdir() if path.is_socket()] == []


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_ends_all_at_once(shop: Shop, ended: Ended, number: signal.Signals) -> None:
    process, _ = shop.serve("late", "--processes", "2", "--drain", "600")
    caller = shop.start("call", "inventory", "slow", "600", "--timeout", "600")
    until(lambda: any(shop.directory.glob("began-*")))
    process.send_signal(number)
    until(lambda: registered(shop) == [])
    assert process.poll() is None, "it did not wait for what runs"
    process.send_signal(number)
    ran = ended(process)
    assert ran.code == 128 + number
    assert "Traceback" not in ran.err
    assert ended(caller).code == 3
    assert [path.name for path in shop.runtime.iterdir() if path.is_socket()] == []


def test_draining_has_an_end(shop: Shop, ended: Ended) -> None:
    process, _ = shop.serve("late", "--processes", "2", "--drain", "0.3")
    caller = shop.start("call", "inventory", "slow", "600", "--timeout", "600")
    until(lambda: any(shop.directory.glob("began-*")))
    process.send_signal(signal.SIGTERM)
    ran = ended(process)
    assert ran.code == 143
    assert "still running" in ran.err
    assert ended(caller).code == 3


def test_hangup_replaces_all(shop: Shop, ended: Ended) -> None:
    process, announced = shop.serve("late", "--processes", "2", "--verbose")
    before = {each["pid"] for each in announced["processes"]}
    process.send_signal(signal.SIGHUP)
    until(lambda: len(now := set(registered(shop))) == 2 and not now & before)
    assert shop.run("call", "inventory", "pid").code == 0
    process.send_signal(signal.SIGTERM)
    ran = ended(process)
    assert ran.code == 0
    assert ran.err.count(" is now ") == 2


def test_one_that_is_killed_is_started_again(shop: Shop, ended: Ended) -> None:
    process, announced = shop.serve("late", "--processes", "2")
    pids = {each["pid"] for each in announced["processes"]}
    killed = announced["processes"][0]["pid"]
    os.kill(killed, signal.SIGKILL)
    until(lambda: len(now := set(registered(shop))) == 2 and now & pids == pids - {killed})
    process.send_signal(signal.SIGTERM)
    ran = ended(process)
    assert ran.code == 0
    assert f"process 1 of inventory: {killed} was ended by SIGKILL" in ran.err


@pytest.mark.parametrize(
    ("words", "code", "complaint"),
    [
        (["nowhere"], 2, "no module 'nowhere'"),
        (["late", "--liveness", "0.05"], 2, "0.05 is not in the range 0.1<=x<=86400"),
        (["late:missing"], 2, "has no 'missing'"),
        (["late", "--bind", "tcp://127.0.0.1:5555"], 2, "cannot share tcp://127.0.0.1:5555"),
        (["late", "--workers", "0", "--on-full", "reject"], 2, "needs --workers 1"),
        (["late", "--bind", "tcp://192.0.2.1:*"], 6, "cannot listen on"),
    ],
)
def test_what_cannot_be_served_is_said_once(shop: Shop, words: list[str], code: int, complaint: str) -> None:
    ran = shop.run("serve", *words, "--topic", "t", "--processes", "3")
    assert (ran.code, ran.out) == (code, "")
    assert ran.err.count(complaint) == 1
    assert "Traceback" not in ran.err
    assert "report" not in ran.err, "it is no fault of ours"


def test_what_the_module_raises_is_shown(shop: Shop) -> None:
    shop.directory.joinpath("faulty.py").write_text("raise RuntimeError('in the module')")
    ran = shop.run("serve", "faulty", "--topic", "t", "--processes", "2")
    assert ran.code == 2
    assert ran.err.count("Traceback") == 1
    assert "faulty.py" in ran.err
