"""Endpoints are checked before libzmq sees them, and a probe says why one cannot be reached."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zmqcore.endpoint import IPC_LIMIT_BYTES, Endpoint, Refusal, probe
from zmqcore.errors import InvalidEndpoint


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tcp://127.0.0.1:5555", Endpoint("tcp", "127.0.0.1", 5555)),
        ("tcp://[::1]:5555", Endpoint("tcp", "::1", 5555)),
        ("tcp://[fe80::1%eth0]:1", Endpoint("tcp", "fe80::1%eth0", 1)),
        ("tcp://node-3.example.org:65535", Endpoint("tcp", "node-3.example.org", 65535)),
        ("ipc:///run/user/1000/zmqcore/a b.sock", Endpoint("ipc", path="/run/user/1000/zmqcore/a b.sock")),
        ("ipc://@name", Endpoint("ipc", path="@name")),
        ("inproc://a/b", Endpoint("inproc", path="a/b")),
    ],
)
def test_parse(text: str, expected: Endpoint) -> None:
    endpoint = Endpoint.parse(text)
    assert endpoint == expected
    assert str(endpoint) == text
    assert hash(endpoint) == hash(expected)
    assert endpoint.is_local_ipc is text.startswith("ipc:")
    assert not endpoint.is_wildcard


def test_the_text_is_canonical() -> None:
    assert str(Endpoint.parse("tcp://NODE.Example:80")) == "tcp://node.example:80"
    assert str(Endpoint.parse("tcp://[0:0:0:0:0:0:0:1]:80")) == "tcp://[::1]:80"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "must start with"),
        ("localhost:5555", "must start with"),
        ("udp://127.0.0.1:1", "must start with"),
        ("TCP://127.0.0.1:1", "must start with"),
        ("tcp://127.0.0.1", "no port"),
        ("tcp://:5555", "host"),
        ("tcp://127.0.0.1:", "the port is ''"),
        ("tcp://127.0.0.1:x", "the port is 'x'"),
        ("tcp://127.0.0.1:65536", "expected 1 to 65535"),
        ("tcp://127.0.0.1:-1", "expected 1 to 65535"),
        ("tcp://127.0.0.1:+1", "expected 1 to 65535"),
        ("tcp://127.0.0.1:00", "expected 1 to 65535"),
        ("tcp://127.0.0.1:1_0", "expected 1 to 65535"),
        ("tcp://127.0.0.1:\u0661", "expected 1 to 65535"),
        ("tcp://127.0.0.1:0", "only bind"),
        ("tcp://127.0.0.1:*", "only bind"),
        ("tcp://*:5555", "name a host"),
        ("tcp://::1:5555", "in brackets"),
        ("tcp://[::1]", r"\[address\]:port"),
        ("tcp://[::1:5555", r"\[address\]:port"),
        ("tcp://[localhost]:5555", "IPv6"),
        ("tcp://300.1.1.1:5555", "300"),
        ("tcp://a b:5555", "host"),
        ("tcp://eth0;10.0.0.1:5555", "host"),
        ("ipc://relative.sock", "absolute"),
        ("ipc://", "absolute"),
        ("ipc:///run/", "absolute"),
        ("ipc://*", "absolute"),
        ("ipc://@", "after the @"),
        ("ipc:///a\0b", "control"),
        ("ipc:///a\nb", "control"),
        ("ipc:///\ud800", "UTF-8"),
        ("inproc://", "bytes long"),
    ],
)
def test_what_is_wrong_is_said(text: str, complaint: str) -> None:
    with pytest.raises(InvalidEndpoint, match=complaint) as caught:
        Endpoint.parse(text)
    assert repr(text) in str(caught.value)


def test_only_a_str_is_parsed() -> None:
    with pytest.raises(InvalidEndpoint, match="bytes"):
        Endpoint.parse(b"tcp://127.0.0.1:1")  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["tcp://*:5555", "tcp://127.0.0.1:*", "tcp://*:*", "ipc://*"])
def test_bind_takes_wildcards(text: str) -> None:
    endpoint = Endpoint.parse(text, bind=True)
    assert str(endpoint) == text
    assert endpoint.is_wildcard


def test_port_0_is_a_wildcard() -> None:
    assert str(Endpoint.parse("tcp://127.0.0.1:0", bind=True)) == "tcp://127.0.0.1:*"


def test_the_limit_of_a_path_is_the_systems() -> None:
    longest = "/" + "x" * (IPC_LIMIT_BYTES - 1)
    assert Endpoint.parse(f"ipc://{longest}").path == longest
    with pytest.raises(InvalidEndpoint, match=f"{IPC_LIMIT_BYTES + 1} bytes long.*{IPC_LIMIT_BYTES}"):
        Endpoint.parse(f"ipc://{longest}x")
    with pytest.raises(InvalidEndpoint, match="bytes long"):
        Endpoint.parse("ipc:///" + "é" * (IPC_LIMIT_BYTES // 2 + 1))


@given(
    st.text()
    | st.builds(
        "{}://{}".format, st.sampled_from(["tcp", "ipc", "inproc"]), st.text("[]:*.@/%a1é\0", max_size=12)
    )
)
def test_any_text_is_read_or_refused(text: str) -> None:
    for bind in (False, True):
        try:
            endpoint = Endpoint.parse(text, bind=bind)
        except InvalidEndpoint:
            continue
        assert Endpoint.parse(str(endpoint), bind=bind) == endpoint


def _listener(family: socket.AddressFamily, address: object) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.bind(address)  # type: ignore[arg-type]
    return sock


def test_probe_tcp() -> None:
    with _listener(socket.AF_INET, ("127.0.0.1", 0)) as sock:
        endpoint = f"tcp://127.0.0.1:{sock.getsockname()[1]}"
        assert probe(endpoint, 5.0) == Refusal("connection refused")
        sock.listen()
        assert probe(endpoint, 5.0) is None
        assert probe(endpoint.replace("127.0.0.1", "localhost"), 5.0) is None


def test_probe_ipc(tmp_path: Path) -> None:
    path = tmp_path / "s"
    assert probe(f"ipc://{path}", 5.0) == Refusal("no such file or directory")
    with _listener(socket.AF_UNIX, str(path)) as sock:
        assert probe(f"ipc://{path}", 5.0) == Refusal("connection refused")
        sock.listen()
        assert probe(f"ipc://{path}", 5.0) is None
    name = f"zmqcore-test-{os.getpid()}"
    with _listener(socket.AF_UNIX, f"\0{name}") as sock:
        sock.listen()
        assert probe(f"ipc://@{name}", 5.0) is None


def test_probe_times_out_at_a_full_backlog(tmp_path: Path) -> None:
    with _listener(socket.AF_INET, ("127.0.0.1", 0)) as sock:
        sock.listen(0)
        queued = []
        try:
            # A backlog of 0 still takes one; then the kernel drops what comes.
            for _ in range(3):
                waiting = socket.socket()
                waiting.setblocking(False)
                waiting.connect_ex(sock.getsockname())
                queued.append(waiting)
            refusal = probe(f"tcp://127.0.0.1:{sock.getsockname()[1]}", 0.05)
            assert refusal is not None
            assert refusal.reason.startswith("timed out after 0.0")
            assert not refusal.final
        finally:
            for waiting in queued:
                waiting.close()
    with _listener(socket.AF_UNIX, str(tmp_path / "s")) as sock, socket.socket(socket.AF_UNIX) as waiting:
        sock.listen(0)
        waiting.connect(str(tmp_path / "s"))
        reason = probe(f"ipc://{tmp_path / 's'}", 0.05)
        assert reason is not None
        assert "backlog is full" in str(reason)
        assert not reason.final


def test_probe_of_a_name_that_does_not_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> object:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    assert str(probe("tcp://nowhere.invalid:1", 1.0)) == "nowhere.invalid: name or service not known"


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
def test_what_is_lacking_here_says_nothing_about_the_endpoint(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> object:
        raise OSError(number, os.strerror(number))

    with _listener(socket.AF_INET, ("127.0.0.1", 0)) as sock:
        monkeypatch.setattr(socket, "socket", fail)
        refusal = probe(f"tcp://127.0.0.1:{sock.getsockname()[1]}", 5.0)
    assert refusal is not None
    assert (refusal.local, refusal.final) == (True, False)
    assert refusal.reason == f"it cannot be asked from here: {os.strerror(number).lower()}"


def test_no_port_left_to_connect_from_says_nothing_about_the_endpoint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> object:
        raise OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")

    monkeypatch.setattr(socket.socket, "connect", fail)
    refusal = probe("tcp://127.0.0.1:1", 5.0)
    assert refusal is not None
    assert (refusal.local, refusal.final) == (True, False)


def test_probe_of_what_is_no_endpoint() -> None:
    with pytest.raises(InvalidEndpoint):
        probe("tcp://*:1", 1.0)
    assert probe("inproc://x", 1.0) is None
