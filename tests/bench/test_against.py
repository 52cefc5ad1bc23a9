"""The measurement beside other systems: it runs with what is at hand, and its figures become tables and a plot."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

import pytest
from peers.report import Figures, better_than_ours, where_others_are_better

ROOT = Path(__file__).parents[2]
AGAINST = ROOT / "bench" / "against.py"
STORED = Path(__file__).with_name("figures.json")
LIMIT_S = 240.0

linux = pytest.mark.skipif(sys.platform != "linux", reason="usage of processes is known on Linux only")
compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


def run(cache: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, AGAINST, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_S,
        env=environment,
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A directory with the documents that figures go into, and nothing else."""
    for name in ("README.md", "docs/explanation/performance.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("before\n<!-- peers: begin -->\nold\n<!-- peers: end -->\nafter\n")
    (tmp_path / "docs" / "images").mkdir()
    return tmp_path


def test_stored_figures_become_tables_and_a_plot(checkout: Path) -> None:
    done = run(checkout, "--from", STORED, "--write", "--into", checkout)
    assert done.returncode == 0, done.stderr
    page = (checkout / "docs/explanation/performance.md").read_text()
    assert page.startswith("before\n<!-- peers: begin -->\n")
    assert page.endswith("<!-- peers: end -->\nafter\n")
    assert "old" not in page
    # Medians of three rounds, one of which failed for gRPC; ours is bold.
    assert "| **zmqcore** | **62 / 120** |" in page
    assert "| gRPC | 440 / 910 |" in page
    assert "| **20 / 24** |" in page
    assert "| one way, 16 B: handled / handed over |" in page
    assert "| **559,000 / 700,000** |" in page
    assert "* nats: no nats-server: apt-get install nats-server" in page
    assert "* zeroapi without “one way, 16 B”: it has calls only" in page
    assert "| gRPC | grpcio 1.2.3 | bytes |" in page
    assert "1 of 12 measurements" in page
    readme = (checkout / "README.md").read_text()
    assert "| gRPC | 440 | - | 13,200 |" in readme
    picture = ET.parse(checkout / "docs/images/peers.svg").getroot()
    texts = ["".join(text.itertext()) for text in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert {"zmqcore", "gRPC", "440", "559,000"} <= set(texts)


def test_whoever_is_better_in_anything_is_named() -> None:
    """By each metric, beside each of ours, the best first; not who is as good, and not one of ours."""
    figures = Figures(json.loads(STORED.read_text()))
    assert better_than_ours(figures) == [
        ["sequential call, 16 B: p50", "bare pyzmq 1.2", "bare pyzmq 2.0, zeroapi 1.3"],
        ["sequential call, 16 B: p99", "bare pyzmq 1.3", "bare pyzmq 2.0"],
        ["sequential call, 16 B: CPU", "bare pyzmq 1.2", "bare pyzmq 1.8"],
        ["sequential call, 16 B: the client's descriptors", "bare pyzmq 2.0", ""],
        ["one way, 16 B: rate", "bare pyzmq 2.7", ""],
        ["one way, 16 B: CPU", "bare pyzmq 2.5", ""],
    ]
    table = where_others_are_better(figures).splitlines()
    assert table[:2] == ["|  | than zmqcore | than zmqcore asyncio |", "|---|---|---|"]
    assert table[-1] == "| one way, 16 B: CPU | bare pyzmq 2.5 |  |"


def test_where_nobody_is_better_there_is_no_table() -> None:
    raw = json.loads(STORED.read_text())
    raw["samples"] = [entry for entry in raw["samples"] if entry["peer"].startswith("zmqcore")]
    assert where_others_are_better(Figures(raw)) == ""


def test_the_documents_have_a_place_for_the_figures() -> None:
    for name in ("README.md", "docs/explanation/performance.md"):
        text = (ROOT / name).read_text()
        assert text.count("<!-- peers: begin -->") == text.count("<!-- peers: end -->") == 1


def test_without_a_place_for_the_figures_nothing_is_changed(checkout: Path) -> None:
    (checkout / "README.md").write_text("no place\n")
    done = run(checkout, "--from", STORED, "--write", "--into", checkout)
    assert done.returncode != 0
    assert "0 places for the figures" in done.stderr
    assert (checkout / "README.md").read_text() == "no place\n"


@linux
@compiler
def test_it_measures_what_is_at_hand(tmp_path: Path) -> None:
    written = tmp_path / "figures.json"
    names = ["zmqcore", "zmqcore-asyncio", "c", "pyzmq", "pyzmq-msgpack"]
    options = ["--rounds", "1", "--seconds", "0.02", "--peers", ",".join(names), "--json", written]
    done = run(tmp_path, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(written.read_text())
    assert not found["failures"]
    assert not found["left_out"]
    samples = {(entry["task"], entry["peer"]): entry["rounds"] for entry in found["samples"]}
    assert {peer for _, peer in samples} == set(names)
    for (task, peer), rounds in samples.items():
        (sample,) = rounds
        assert sample["rate"] > 0, (task, peer)
        assert sample["cpu_us"] > 0, (task, peer)
        assert sample["client_rss_mib"] > 0, (task, peer)
    for peer in names:
        assert samples["kept", peer][0]["client_fds"] > 1000, peer  # two for each socket
    assert found["peers"]["pyzmq"]["versions"].keys() == {"pyzmq", "libzmq"}
    assert "fanout to 8" in done.stdout


@linux
def test_what_is_not_installed_is_left_out_by_name(tmp_path: Path) -> None:
    """In the development environment there are neither gRPC nor nats-py."""
    written = tmp_path / "figures.json"
    options = ["--rounds", "1", "--seconds", "0.02", "--tasks", "call", "--json", written]
    done = run(tmp_path, "--peers", "pyzmq,grpc", *options)
    if "grpc" not in json.loads(written.read_text())["left_out"]:
        pytest.skip("gRPC is installed here")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "grpc: no module grpc: pip install" in done.stdout


def children_of(pid: int) -> Sequence[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


@linux
def test_ctrl_c_ends_every_process_and_keeps_the_figures(tmp_path: Path) -> None:
    written = tmp_path / "figures.json"
    options = ["--peers", "pyzmq", "--tasks", "call", "--rounds", "100000", "--seconds", "0.02"]
    process = subprocess.Popen(
        [sys.executable, AGAINST, *options, "--json", written],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        while len(children_of(process.pid)) < 2:  # a server and a client
            assert process.poll() is None
        started = children_of(process.pid)
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=LIMIT_S)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 1
    assert "interrupted after" in output
    assert json.loads(written.read_text())["settings"]["rounds"] < 100000
    end = time.monotonic() + LIMIT_S  # one was perhaps just being started, and ends by itself
    while left := [pid for pid in started if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < end, left
        time.sleep(0.01)
