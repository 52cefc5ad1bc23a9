"""The demo as a whole: that it succeeds, that it notices what is wrong, and that it leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from waiting_support import until

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Ran, Shop


def children_of(process: subprocess.Popen[str]) -> list[int]:
    listed = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True
    ).stdout
    pairs = [tuple(map(int, line.split())) for line in listed.splitlines()]
    return [pid for pid, parent in pairs if parent == process.pid]


def gone(pid: int) -> bool:
    """Whether the process has ended; one that nobody has waited for yet has."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    shown = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return shown.stdout.strip()[:1] in ("", "Z")


def assert_nothing_left(shop: Shop) -> None:
    assert list(shop.temporary.iterdir()) == []
    assert list(shop.runtime.iterdir()) == [], "the user's own directory was touched"


def test_it_succeeds_and_says_what_it_did(shop: Shop) -> None:
    ran = shop.run("demo", "--limit", "160", "--json")
    assert (ran.code, ran.err) == (0, "")
    report = ran.json
    assert report["ok"] is True
    assert report["problems"] == report["missing"] == report["wrong"] == []
    assert report["files"] == report["checked"] == 160
    assert report["calls"] == 160 + report["retries"]
    assert report["killed"]["after_files"] == 80
    assert len(report["workers"]) == 4
    assert sum(worker["results"] for worker in report["workers"]) == 160
    assert sum(1 for worker in report["workers"] if worker.get("killed")) == 1
    # At most the calls that the killed worker had are without an event.
    assert 160 - 8 <= report["events"] <= 160 + report["retries"]
    assert 0 < report["p50_ms"] <= report["p99_ms"]
    assert report["files_per_second"] > 0
    assert report["bytes"] > report["lines"] > 0
    assert_nothing_left(shop)


def test_the_killed_workers_calls_are_made_again(shop: Shop) -> None:
    """With many calls in flight the killed worker certainly has some."""
    ran = shop.run("demo", "--limit", "200", "--in-flight", "32", "--json")
    assert (ran.code, ran.err) == (0, "")
    assert ran.json["retries"] > 0
    assert sum(ran.json["retried_for"].values()) == ran.json["retries"]


def test_one_worker_alone_is_not_killed(shop: Shop) -> None:
    ran = shop.run("demo", "--limit", "20", "--workers", "1", "--in-flight", "1", "--json")
    assert (ran.code, ran.err) == (0, "")
    assert ran.json["killed"] is None
    assert ran.json["retries"] == 0


def test_text_for_people(shop: Shop) -> None:
    ran = shop.run("demo", "--limit", "40", "--no-json")
    assert (ran.code, ran.err) == (0, "")
    for word in (
        "files/s",
        "retries",
        "p50",
        "p99",
        "MB",
        "fds held",
        "killed half way",
        "everything arrived",
    ):
        assert word in ran.out


def test_own_files_and_broken_ones(shop: Shop) -> None:
    sources = shop.directory / "sources"
    sources.mkdir()
    sources.joinpath("good.py").write_text("a = 1\n")
    sources.joinpath("empty.py").write_text("")
    sources.joinpath("bad.py").write_bytes(b"# coding: no-such\n")
    sources.joinpath("binary.py").write_bytes(bytes(range(256)) * 1000)
    ran = shop.run("demo", "--directory", str(sources), "--json")
    assert (ran.code, ran.err) == (0, "")
    assert ran.json["files"] == 4
    assert ran.json["not_python"] >= 2
    sources.joinpath("none").mkdir()
    none = shop.run("demo", "--directory", str(sources / "none"))
    assert none.code == 2
    assert "no .py file" in none.err


WRONG = """
import sys
import zmqcore.cli.demo.analysis as module
from dataclasses import replace
real = module.analyse
def analyse(source, key):
    found = real(source, key)
    return replace(found, tokens=found.tokens + 1) if b"wrong" in bytes(source) else found
module.analyse = analyse
"""
RAISES = """
import zmqcore.cli.demo.analysis as module
real = module.analyse
def analyse(source, key):
    if b"wrong" in bytes(source):
        raise RuntimeError("cannot")
    return real(source, key)
module.analyse = analyse
"""
LOSES_EVENTS = """
import zmqcore.cli.demo.roles as module
module.Collector.event = lambda self, index, server: None
"""
DIES = """
import os
import zmqcore.cli.demo.roles as module
module.Worker.analyse = lambda self, index, source: os._exit(3)
"""


def sabotage(shop: Shop, role: str, code: str) -> dict[str, str]:
    """Run *code* in the demo's processes of that role before anything else; return the environment for it."""
    directory = shop.directory / "sabotage"
    directory.mkdir()
    guarded = f"import sys\nif {role!r} in sys.orig_argv:\n" + "".join(
        f"    {line}\n" for line in code.strip().splitlines()
    )
    directory.joinpath("sitecustomize.py").write_text(guarded)
    sources = shop.directory / "sources"
    sources.mkdir()
    for number in range(20):
        text = "wrong = 1\n" if number == 7 else f"a = {number}\n"
        sources.joinpath(f"file{number:02}.py").write_text(text)
    return {"PYTHONPATH": f"{directory}{os.pathsep}{shop.environment['PYTHONPATH']}"}


@pytest.mark.parametrize(
    ("role", "code", "missing", "wrong", "problem"),
    [
        ("worker", WRONG, [], ["file07.py"], "1 results are wrong"),
        ("worker", RAISES, ["file07.py"], [], "RuntimeError: cannot"),
        ("checker", WRONG, [], ["file07.py"], "1 results are wrong"),
        pytest.param("collector", LOSES_EVENTS, [], [], "progress events", marks=pytest.mark.slow),
    ],
)
def test_what_is_wrong_is_noticed(
    shop: Shop, role: str, code: str, missing: list[str], wrong: list[str], problem: str
) -> None:
    environment = sabotage(shop, role, code)
    ran = shop.run("demo", "--directory", str(shop.directory / "sources"), "--json", **environment)
    assert ran.code == 5, ran.err
    report = ran.json
    assert report["ok"] is False
    assert [Path(path).name for path in report["missing"]] == missing
    assert [Path(path).name for path in report["wrong"]] == wrong
    assert any(problem in line for line in report["problems"]), report["problems"]
    assert_nothing_left(shop)


def test_workers_that_die_end_the_demo(shop: Shop) -> None:
    environment = sabotage(shop, "worker", DIES)
    ran = shop.run("demo", "--directory", str(shop.directory / "sources"), "--json", **environment)
    assert (ran.code, ran.out) == (6, ""), ran.err
    assert "ended with code 3" in ran.err
    assert "Traceback" not in ran.err
    assert_nothing_left(shop)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("processes", [1, 5])
def test_a_signal_leaves_nothing_behind(
    shop: Shop, ended: Callable[[subprocess.Popen[str]], Ran], number: signal.Signals, processes: int
) -> None:
    """Once while the processes are being started and once when all are there."""
    demo = shop.start("demo", "--json")
    until(lambda: len(children_of(demo)) >= processes or demo.poll() is not None, "no workers")
    children = children_of(demo)
    demo.send_signal(number)
    ran = ended(demo)
    assert (ran.code, ran.out) == (128 + number, "")
    assert "Traceback" not in ran.err
    until(lambda: all(gone(pid) for pid in children), "processes are left")
    assert_nothing_left(shop)


def test_a_signal_while_it_analyses(shop: Shop, ended: Callable[[subprocess.Popen[str]], Ran]) -> None:
    demo = shop.start("demo", "--json")
    until(lambda: len(children_of(demo)) == 5, "no workers")
    children = children_of(demo)
    # The worker is killed half way, so there are four left: calls are certainly in flight.
    until(lambda: len(children_of(demo)) == 4 or demo.poll() is not None, "no worker was killed")
    # To the whole group, as a terminal does.
    os.killpg(demo.pid, signal.SIGINT)
    ran = ended(demo)
    assert ran.code == 130, ran.err
    assert "Traceback" not in ran.err
    until(lambda: all(gone(pid) for pid in children), "processes are left")
    assert_nothing_left(shop)


def test_no_process_outlives_a_killed_demo(shop: Shop) -> None:
    demo = shop.start("demo", "--json")
    until(lambda: len(children_of(demo)) == 5, "no workers")
    children = children_of(demo)
    demo.kill()
    demo.wait()
    until(lambda: all(gone(pid) for pid in children), "processes are left")


def test_the_current_directory_is_not_imported_from(shop: Shop) -> None:
    """A user's own tokenize.py must not end up in the workers."""
    shop.directory.joinpath("tokenize.py").write_text("raise SystemExit(9)")
    ran = shop.run("demo", "--limit", "8", "--json")
    assert (ran.code, ran.err) == (0, "")
    assert json.loads(ran.out)["ok"] is True


@pytest.mark.slow
def test_the_whole_standard_library(shop: Shop) -> None:
    ran = shop.run("demo", "--json")
    assert (ran.code, ran.err) == (0, "")
    assert ran.json["files"] > 500
    assert ran.json["checked"] == ran.json["files"]
    assert_nothing_left(shop)
