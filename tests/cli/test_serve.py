"""serve: what it announces, what it serves, and how it ends."""

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

SIGNALS = [signal.SIGINT, signal.SIGTERM]


def wait_until_called(shop: Shop) -> None:
    """Return once a method of the server runs: it writes a note when it begins."""
    until(shop.directory.joinpath("began").exists, "nobody has called")


SLOW = """
import pathlib, time

def slow(seconds):
    pathlib.Path("began").write_text("")
    time.sleep(seconds)
    return "finished"
"""


def test_it_announces_where_it_listens(shop: Shop) -> None:
    process, announced = shop.serve("stock:Stock", "--server", "host-3")
    assert announced["event"] == "listening"
    assert announced["topic"] == "inventory"
    assert announced["server"] == "host-3"
    assert announced["pid"] == process.pid
    kinds = {endpoint.partition(":")[0] for endpoint in announced["endpoints"]}
    assert kinds == {"ipc", "tcp"}
    for endpoint in announced["endpoints"]:
        assert shop.run("call", "--connect", endpoint, "inventory", "echo").code == 0


@pytest.mark.parametrize(
    ("target", "method", "words", "result"),
    [
        ("stock:Stock", "echo", ["1"], [[1], {}]),
        ("stock:shop", "echo", ["1"], [[1], {}]),
        ("stock:double", "double", ["21"], 42),
        ("stock", "double", ["21"], 42),
        ("statistics", "median", ["[1, 2, 6]"], 2),
    ],
)
def test_what_can_be_served(shop: Shop, target: str, method: str, words: list[str], result: object) -> None:
    shop.serve(target)
    ran = shop.run("call", "inventory", method, *words)
    assert (ran.code, ran.err) == (0, "")
    assert ran.json == result


@pytest.mark.parametrize("workers", ["0", "1", "3"])
def test_any_number_of_workers(shop: Shop, workers: str) -> None:
    shop.serve("stock:Stock", "--workers", workers)
    assert shop.run("call", "inventory", "echo", "1").json == [[1], {}]


def test_coroutine_functions(shop: Shop, ended: Callable[[subprocess.Popen[str]], Ran]) -> None:
    """All methods run on an event loop then; it drains as threads do."""
    process, announced = shop.serve("stock:Clerk", "--server", "clerk", "--drain", "600")
    assert announced["server"] == "clerk"
    assert shop.run("call", "inventory", "advise", "apple").json == "take apple"
    assert shop.run("call", "inventory", "plain").json == "plain"
    assert shop.run("call", "inventory", "zmqcore.stats").json["tasks"] == 0
    ripe = shop.directory / "ripe"
    caller = shop.start("call", "inventory", "advise", "pear", str(ripe), "--timeout", "600")
    until(lambda: shop.run("call", "inventory", "zmqcore.stats").json["tasks"] == 1, "it is asked")
    process.send_signal(signal.SIGTERM)
    until(lambda: shop.run("members").json == [], "it takes nothing new")
    ripe.touch()
    assert ended(caller).json == "take pear"
    ran = ended(process)
    assert (ran.code, ran.err) == (0, "")
    assert [path.name for path in shop.runtime.iterdir() if path.is_socket()] == []


def test_bind_says_where(shop: Shop) -> None:
    path = shop.directory / "here"
    _, announced = shop.serve("stock:Stock", "--bind", f"ipc://{path}", "--bind", "tcp://127.0.0.1:*")
    assert announced["endpoints"][0] == f"ipc://{path}"
    assert announced["endpoints"][1].startswith("tcp://127.0.0.1:")
    assert shop.run("call", "--connect", f"ipc://{path}", "inventory", "echo").code == 0


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_it_cleanly(
    shop: Shop, ended: Callable[[subprocess.Popen[str]], Ran], number: signal.Signals
) -> None:
    process, _ = shop.serve()
    assert shop.run("call", "inventory", "echo").code == 0
    process.send_signal(number)
    ran = ended(process)
    assert (ran.code, ran.err) == (0, "")
    assert shop.run("members").json == []
    sockets = [path.name for path in shop.runtime.iterdir() if path.is_socket()]
    assert sockets == [], "sockets are left behind"


@pytest.mark.parametrize("number", SIGNALS)
def test_what_runs_is_finished_first(
    shop: Shop, ended: Callable[[subprocess.Popen[str]], Ran], number: signal.Signals
) -> None:
    shop.directory.joinpath("late.py").write_text(SLOW)
    process, _ = shop.serve("late")
    caller = shop.start("call", "inventory", "slow", "1.5", "--timeout", "30")
    wait_until_called(shop)
    process.send_signal(number)
    answer = ended(caller)
    assert (answer.code, answer.err) == (0, "")
    assert answer.json == "finished"
    assert ended(process).code == 0


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_ends_it_at_once(
    shop: Shop, ended: Callable[[subprocess.Popen[str]], Ran], number: signal.Signals
) -> None:
    shop.directory.joinpath("late.py").write_text(SLOW)
    # Drains for longer than the test waits: only the second signal can end it.
    process, _ = shop.serve("late", "--drain", "600")
    caller = shop.start("call", "inventory", "slow", "600", "--timeout", "600")
    wait_until_called(shop)
    process.send_signal(number)
    until(lambda: shop.run("members").json == [], "it takes nothing new")
    assert process.poll() is None, "it did not wait for what runs"
    process.send_signal(number)
    ran = ended(process)
    assert ran.code == 128 + number
    assert "Traceback" not in ran.err
    assert ended(caller).code == 3
    assert shop.run("members").json == []


def test_draining_has_an_end(shop: Shop, ended: Callable[[subprocess.Popen[str]], Ran]) -> None:
    shop.directory.joinpath("late.py").write_text(SLOW)
    process, _ = shop.serve("late", "--drain", "0.3")
    caller = shop.start("call", "inventory", "slow", "600", "--timeout", "600")
    wait_until_called(shop)
    process.send_signal(signal.SIGTERM)
    ran = ended(process)
    assert ran.code == 143
    assert "still running" in ran.err
    assert ended(caller).code == 3


def test_what_the_module_raises_is_shown(shop: Shop) -> None:
    shop.directory.joinpath("faulty.py").write_text("raise RuntimeError('in the module')")
    ran = shop.run("serve", "faulty", "--topic", "t")
    assert ran.code == 2
    assert "RuntimeError: in the module" in ran.err
    assert "faulty.py" in ran.err
    assert "report" not in ran.err, "it is no fault of ours"


def test_an_address_in_use_is_said(shop: Shop) -> None:
    _, announced = shop.serve("stock:Stock", "--bind", "tcp://127.0.0.1:*")
    [address] = announced["endpoints"]
    ran = shop.run("serve", "stock:Stock", "--topic", "other", "--bind", address)
    assert ran.code != 0
    assert ran.out == ""
    assert address in ran.err
    assert "Traceback" not in ran.err


def test_text_for_people_names_the_addresses(
    shop: Shop, ended: Callable[[subprocess.Popen[str]], Ran]
) -> None:
    process = shop.start("serve", "stock:Stock", "--topic", "inventory", "--no-json")
    until(lambda: shop.run("members").json, "it is registered")
    [member] = shop.run("members").json
    os.kill(process.pid, signal.SIGINT)
    ran = ended(process)
    assert ran.code == 0
    assert all(endpoint in ran.out for endpoint in member["endpoints"])


@pytest.mark.parametrize(
    ("target", "words", "entry"),
    [
        ("stock:Stock", ["echo", "1"], "zmqcore.requests: echo: done in "),
        ("stock:Stock", ["fail"], "zmqcore.requests: fail: LookupError in "),
        ("stock:Clerk", ["advise", "sku-1"], "zmqcore.requests: advise: done in "),
        ("stock:Clerk", ["plain"], "zmqcore.requests: plain: done in "),
    ],
)
def test_it_logs_requests_if_asked_twice(
    shop: Shop, ended: Callable[..., Ran], target: str, words: list[str], entry: str
) -> None:
    for verbose, logged in (("-vv", True), ("-v", False)):
        process, _ = shop.serve(target, verbose)
        shop.run("call", "inventory", *words)
        process.send_signal(signal.SIGTERM)
        assert (entry in ended(process).err) is logged
