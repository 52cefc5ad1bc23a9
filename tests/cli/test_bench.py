"""bench: that both systems are measured, that it can be interrupted, and what it makes of the figures."""

from __future__ import annotations

import os
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest
from waiting_support import until

from zmqcore.cli.bench.opinion import opinion, reservations
from zmqcore.cli.bench.run import Result, Run

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Ran, Shop

TASKS = ["call", "inflight", "cast"]


def peers_of(process: subprocess.Popen[str]) -> list[int]:
    """The measured processes that are at work: their imports are over."""
    listed = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True
    ).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()]
    return [int(pid) for pid, parent, args in rows if int(parent) == process.pid and "bench.peer" in args]


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_both_are_measured_in_each_row(shop: Shop) -> None:
    ran = shop.run("bench", "--seconds", "0.1", "--size", "100")
    assert (ran.code, ran.err) == (0, "")
    report = ran.json
    assert report["rounds"] == 1
    assert report["settings"]["size_bytes"] == 100
    assert report["versions"]["pyzmq"]
    rows = [(row["transport"], row["task"]) for row in report["results"]]
    assert sorted(rows) == sorted((transport, task) for transport in ("tcp", "ipc") for task in TASKS)
    for row in report["results"]:
        (only,) = row["rounds"]
        assert set(only) == {"zmqcore", "pyzmq"}
        assert all(only[system]["messages"] > 0 < only[system]["per_second"] for system in only)
        assert row["lowest_ratio"] == row["ratio"] == row["highest_ratio"] > 0
        if row["task"] == "call":
            expected = only["zmqcore"]["p50_us"] / only["pyzmq"]["p50_us"]
        else:
            expected = only["pyzmq"]["per_second"] / only["zmqcore"]["per_second"]
        assert row["ratio"] == pytest.approx(expected, rel=1e-3)
    assert len(report["opinion"]) >= 1 + len(report["results"])
    assert any("round only" in doubt for doubt in report["reservations"])
    assert list(shop.temporary.iterdir()) == []


@pytest.mark.parametrize("size", ["1", "1048576"])
def test_the_smallest_and_the_largest_over_one_transport(shop: Shop, size: str) -> None:
    ran = shop.run("bench", "--seconds", "0.1", "--size", size, "--transport", "ipc")
    assert (ran.code, ran.err) == (0, "")
    assert [row["transport"] for row in ran.json["results"]] == ["ipc"] * len(TASKS)


def test_as_many_rounds_as_there_is_time_for(shop: Shop) -> None:
    one = shop.run("bench", "--seconds", "0.1", "--transport", "ipc").json
    assert one["rounds"] == 1
    # Rounds are not all alike, and processes take longer to start on a busy machine.
    report = shop.run("bench", "--seconds", str(4 * one["seconds"]), "--transport", "ipc").json
    assert report["rounds"] > 1
    assert all(len(row["rounds"]) == report["rounds"] for row in report["results"])
    if os.path.exists("/proc/stat"):  # noqa: PTH110
        assert report["others_cpus"] >= 0


def test_text_for_people(shop: Shop) -> None:
    ran = shop.run("bench", "--seconds", "0.1", "--transport", "ipc", "--no-json")
    assert (ran.code, ran.err) == (0, "")
    for word in (
        "bare pyzmq",
        "time ratio",
        "a call",
        "100 calls in flight",
        "casts",
        "µs",
        "/s",
        "round only",
    ):
        assert word in ran.out, word


@pytest.mark.parametrize(
    "words", [["--size", "0"], ["--size", "1048577"], ["--seconds", "0"], ["--transport", "udp"]]
)
def test_wrong_options(shop: Shop, words: list[str]) -> None:
    ran = shop.run("bench", *words)
    assert ran.code == 2
    assert words[0] in ran.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(
    shop: Shop, ended: Callable[[subprocess.Popen[str]], Ran], number: signal.Signals
) -> None:
    process = shop.start("bench", "--seconds", "600")
    until(lambda: len(peers_of(process)) == 8, "the processes are there")
    peers = peers_of(process)
    os.killpg(process.pid, number)  # as a terminal sends it, to all of them
    ran = ended(process)
    assert (ran.code, ran.out) == (128 + number, "")
    assert "interrupted" in ran.err
    assert "Traceback" not in ran.err
    until(lambda: all(map(gone, peers)), "nothing outlives it")
    assert list(shop.temporary.iterdir()) == []


def test_killed_it_leaves_no_process(shop: Shop) -> None:
    process = shop.start("bench", "--seconds", "600")
    until(lambda: len(peers_of(process)) == 8, "the processes are there")
    peers = peers_of(process)
    process.kill()
    until(lambda: all(map(gone, peers)), "nothing outlives it")


def test_a_process_that_dies(shop: Shop, ended: Callable[[subprocess.Popen[str]], Ran]) -> None:
    process = shop.start("bench", "--seconds", "600")
    until(lambda: len(peers_of(process)) == 8, "the processes are there")
    peers = peers_of(process)
    os.kill(peers[-1], signal.SIGKILL)
    ran = ended(process)
    assert (ran.code, ran.out) == (6, "")
    assert "bench.peer" in ran.err
    assert "zmqcore doctor" in ran.err
    assert "Traceback" not in ran.err
    until(lambda: all(map(gone, peers)), "the others have ended, too")


# -- what it says of the figures ------------------------------------------------------------------------------


def called(*ratios: float) -> Result:
    rounds = [{"zmqcore": {"p50_us": 100 * ratio}, "pyzmq": {"p50_us": 100.0}} for ratio in ratios]
    return Result("call", "tcp", rounds)


def cast(*ratios: float) -> Result:
    rounds = [{"zmqcore": {"per_second": 1e6 / ratio}, "pyzmq": {"per_second": 1e6}} for ratio in ratios]
    return Result("cast", "ipc", rounds)


def run_of(*results: Result, others_cpus: float | None = 0.0) -> Run:
    return Run(list(results), len(results[0].rounds), others_cpus, 16, 10.0)


def test_a_ratio_is_that_of_each_round() -> None:
    rounds = [
        {"zmqcore": {"p50_us": ours}, "pyzmq": {"p50_us": bare}}
        for ours, bare in [(50.0, 100.0), (90.0, 100.0), (400.0, 500.0)]
    ]
    assert Result("call", "tcp", rounds).ratio == pytest.approx(0.8)


def test_faster_and_slower_are_both_said() -> None:
    short, call, casts, why = opinion(run_of(called(0.6, 0.6), cast(1.9, 1.9)))
    assert short == "of 2 rows zmqcore is faster than bare pyzmq in 1, slower in 1"
    assert call == "a call over tcp takes 0.60 of the time of bare pyzmq"
    assert casts == "casts over ipc take 1.9 times as long as in bare pyzmq"
    assert why.startswith("bare pyzmq sends your bytes")


def test_only_slower() -> None:
    assert opinion(run_of(called(1.2), cast(1.06)))[0] == "zmqcore is nowhere faster than bare pyzmq here"


def test_equal_is_not_called_slower() -> None:
    sentences = opinion(run_of(called(0.96), cast(1.04)))
    assert sentences == [
        "zmqcore is nowhere slower than bare pyzmq here",
        "a call over tcp takes as long as in bare pyzmq",
        "casts over ipc take as long as in bare pyzmq",
    ]


def test_no_reservations_about_many_quiet_rounds_that_agree() -> None:
    assert reservations(run_of(called(0.9, 1.0, 1.1, 1.2))) == []
    assert reservations(run_of(called(0.9, 1.0, 1.1, 1.2), others_cpus=None)) == []


def test_reservations() -> None:
    (disturbed,) = reservations(run_of(called(1.0, 1.0, 1.0, 1.0), others_cpus=0.8))
    assert "others used 0.8 s of CPU time each second. Repeat" in disturbed
    (few,) = reservations(run_of(called(0.5, 1.5)))
    assert "2 rounds only" in few
    (wide,) = reservations(run_of(called(1.0, 1.0, 1.0, 2.1), cast(1.0, 1.0, 1.0, 1.0)))
    assert "a factor of 2 (a call over tcp)" in wide
