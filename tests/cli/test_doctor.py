"""doctor: the facts, and what it makes of things that are wrong."""

from __future__ import annotations

import platform
import resource
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgpack
import pytest
import zmq

from zmqcore import _libzmq, _pool
from zmqcore.cli import diagnosis
from zmqcore.cli.diagnosis import diagnose

if TYPE_CHECKING:
    from conftest import Shop

SECTIONS = ["versions", "libzmq", "limits", "budget", "runtime_directory", "matchmaker", "self_test"]


def test_a_sound_installation(shop: Shop) -> None:
    ran = shop.run("doctor")
    assert (ran.code, ran.err) == (0, ""), ran.out
    report = ran.json
    assert report["ok"] is True
    assert [name for name in SECTIONS if name not in report] == []
    versions = report["versions"]
    assert versions["python"] == platform.python_version()
    assert versions["pyzmq"] == zmq.pyzmq_version()
    assert versions["libzmq"] == zmq.zmq_version()
    assert versions["msgpack"] == ".".join(map(str, msgpack.version))
    assert versions["cython"][0] in "3456789", versions["cython"]
    assert Path(report["libzmq"]["path"]).exists()
    assert report["libzmq"]["capabilities"]["ipc"] is _libzmq.has("ipc")
    assert report["limits"]["nofile_soft"] == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert report["budget"]["max_sockets"] == _pool.default_max_sockets()
    assert report["budget"]["fds_open_now"] > 0
    assert report["runtime_directory"]["path"] == str(shop.runtime)
    assert report["runtime_directory"]["mode"] == "0700"
    for transport in ("tcp", "ipc"):
        test = report["self_test"][transport]
        assert test["ok"] is True
        assert test["endpoint"].startswith(f"{transport}://")
        assert 0 < test["p50_us"] <= test["p99_us"]


def test_text_for_people(shop: Shop) -> None:
    ran = shop.run("doctor", "--no-json")
    assert (ran.code, ran.err) == (0, "")
    for word in ("pyzmq", "curve", "nofile", "max sockets", str(shop.runtime), "p50", "as it should be"):
        assert word in ran.out


def test_a_runtime_directory_that_others_may_enter(shop: Shop) -> None:
    shop.runtime.chmod(0o755)
    ran = shop.run("doctor")
    assert ran.code == 6
    assert ran.json["ok"] is False
    [problem] = ran.json["problems"]
    assert problem["where"] == "runtime_directory"
    assert str(shop.runtime) in problem["what"]
    assert problem["advice"]
    assert "error" in ran.json["matchmaker"], "it is in that directory, and is not told of once more"
    text = shop.run("doctor", "--no-json")
    assert text.code == 6
    assert text.out.count("what to do:") == 1


def test_an_unknown_matchmaker(shop: Shop) -> None:
    ran = shop.run("doctor", "--matchmaker", "carrier-pigeon://coop")
    assert ran.code == 6
    assert [problem["where"] for problem in ran.json["problems"]] == ["matchmaker"]
    assert ran.json["self_test"]["tcp"]["ok"] is True, "the other looks go on"


def test_few_file_descriptors(shop: Shop) -> None:
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100));"
        "sys.argv[1:] = ['doctor', '--json']; from zmqcore.cli import main; main()"
    )
    ran = shop.python(code)
    report = ran.json
    assert report["limits"]["nofile_soft"] == 100
    warnings = [problem for problem in report["problems"] if problem["severity"] == "warning"]
    assert any("100 file descriptors" in problem["what"] for problem in warnings)
    assert any("ulimit -n" in problem["advice"] for problem in warnings)
    assert report["budget"]["fds_at_most"] < 100


def test_sockets_of_servers_that_are_gone(shop: Shop) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(shop.runtime / "left.sock"))
    with socket.socket(socket.AF_UNIX) as alive:
        alive.bind(str(shop.runtime / "alive.sock"))
        alive.listen()
        ran = shop.run("doctor")
    assert ran.code == 0, "a warning is no failure"
    assert ran.json["runtime_directory"]["stale_sockets"] == [str(shop.runtime / "left.sock")]
    assert ran.json["runtime_directory"]["sockets"] == 2
    [problem] = ran.json["problems"]
    assert problem["severity"] == "warning"
    assert problem["what"].endswith(": 1")


def test_a_path_too_long_for_sockets(shop: Shop) -> None:
    long = shop.directory / ("x" * 80)
    long.mkdir(mode=0o700)
    ran = shop.run("doctor", ZMQCORE_RUNTIME_DIR=str(long))
    assert ran.code == 6
    assert any("shorter path" in problem["advice"] for problem in ran.json["problems"])


def sections_with_problems(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, list[Any]]:
    monkeypatch.setenv("ZMQCORE_RUNTIME_DIR", str(tmp_path / "run"))
    found: dict[str, list[Any]] = {}
    for problem in diagnose("memory://doctor-test").problems:
        found.setdefault(problem.where, []).append(problem)
    return found


def test_an_old_msgpack_is_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(msgpack, "version", (1, 0, 8))
    [problem] = sections_with_problems(monkeypatch, tmp_path)["versions"]
    assert problem.severity == "broken"
    assert "1.0.8" in problem.what


def test_a_libzmq_without_ipc_or_curve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(diagnosis, "_capability", lambda name: name not in ("ipc", "curve"))
    found = sections_with_problems(monkeypatch, tmp_path)["libzmq"]
    assert {problem.severity for problem in found} == {"broken", "warning"}


def test_two_libzmq_are_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(zmq, "zmq_version_info", lambda: (4, 1, 0))
    [problem] = sections_with_problems(monkeypatch, tmp_path)["libzmq"]
    assert problem.severity == "broken"


def test_a_self_test_that_fails_is_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(diagnosis._Echo, "echo", lambda _self, _value: b"something else")
    found = sections_with_problems(monkeypatch, tmp_path)["self_test"]
    assert len(found) == 2
    assert all(problem.severity == "broken" for problem in found)


def test_the_registry_is_counted(shop: Shop) -> None:
    shop.serve("stock:Stock", "--server", "a")
    shop.serve("stock:Stock", "--server", "b")
    found = shop.run("doctor").json["matchmaker"]
    assert (found["topics"], found["members"]) == (1, 2)


def test_nothing_is_left_in_the_temporary_directory(shop: Shop) -> None:
    shop.run("doctor")
    assert list(shop.temporary.iterdir()) == []
