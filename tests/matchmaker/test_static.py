"""A registry that somebody writes by hand."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from waiting_support import until

from zmqcore.errors import MatchmakerError
from zmqcore.matchmaker import Matchmaker, Member, Membership, open_matchmaker
from zmqcore.topic import Topic

PATIENCE = 30.0

ONE = """
[[member]]
topic = "inventory"
server = "a"
endpoints = ["tcp://10.0.0.1:5555"]
"""
OTHER = """
[[member]]
topic = "in/ventory"
exchange = "stock"
server = "host@lvm"
endpoints = ["ipc:///run/x.sock", "tcp://[::1]:5555"]
instance = "7"
host = "h"
capacity = 3
version = "1.0"
public_key = "k"
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "members of this.toml"
    path.write_text(ONE, encoding="utf-8")
    return path


@pytest.fixture
def matchmaker(path: Path) -> Iterator[Matchmaker]:
    with open_matchmaker(path.as_uri().replace("file:", "static:")) as matchmaker:
        yield matchmaker


def _has(*servers: str) -> Callable[[Membership], bool]:
    return lambda membership: [member.server for member in membership.members] == list(servers)


def test_everything_is_read(path: Path, matchmaker: Matchmaker) -> None:
    path.write_text(ONE + OTHER, encoding="utf-8")
    (short,) = matchmaker.members("inventory").members
    assert short == Member(Topic("inventory", "a"), ("tcp://10.0.0.1:5555",), "static", "10.0.0.1", 0)
    (full,) = matchmaker.members(Topic("in/ventory", exchange="stock")).members
    assert full == Member(
        Topic("in/ventory", "host@lvm", "stock"),
        ("ipc:///run/x.sock", "tcp://[::1]:5555"),
        instance="7",
        host="h",
        pid=0,
        capacity=3,
        version="1.0",
        public_key="k",
    )
    assert matchmaker.topics() == [Topic("inventory"), Topic("in/ventory", None, "stock")]
    assert matchmaker.members("nothing").members == ()


def test_an_empty_file_is_an_empty_registry(path: Path, matchmaker: Matchmaker) -> None:
    path.write_text("# nobody yet\n", encoding="utf-8")
    assert matchmaker.topics() == []


def test_a_change_is_seen(path: Path, matchmaker: Matchmaker) -> None:
    watch = matchmaker.watch("inventory")
    first = watch.next(0)
    assert first is not None
    # In place, and of the same size: neither inode nor size tell.
    path.write_text(ONE.replace('"a"', '"b"'), encoding="utf-8")
    change = watch.next(PATIENCE)
    assert change is not None
    assert [member.server for member in change.added] == ["b"]
    assert [member.server for member in change.removed] == ["a"]
    assert change.epoch > first.epoch
    # Replaced by another file of an older date, as a deployment tool does.
    new = path.with_suffix(".new")
    new.write_text(ONE, encoding="utf-8")
    os.utime(new, (1, 1))
    new.rename(path)
    assert watch.wait_for(_has("a"), PATIENCE) is not None


def test_a_change_elsewhere_is_no_news(path: Path, matchmaker: Matchmaker) -> None:
    watch, other = matchmaker.watch("inventory"), matchmaker.watch(Topic("in/ventory", exchange="stock"))
    before = watch.current
    path.write_text(ONE + OTHER, encoding="utf-8")
    assert other.wait_for(_has("host@lvm"), PATIENCE) is not None
    assert watch.current is before


def test_a_file_that_is_being_written_is_left_alone(path: Path, matchmaker: Matchmaker) -> None:
    watch = matchmaker.watch("inventory")
    known = watch.current
    written = time.time_ns()
    with path.open("w", encoding="utf-8") as file:
        # Emptied, and kept fresh: as it is between the two steps of any write in place.
        for _ in range(5):
            os.utime(path)
            matchmaker._session.turn()
            # Unless the machine stood still for so long that the write was taken for finished, rightly.
            assert watch.current is known or time.time_ns() - written > 100_000_000
            written = time.time_ns()
        file.write(ONE + OTHER)
    other = matchmaker.watch(Topic("in/ventory", exchange="stock"))
    assert other.wait_for(_has("host@lvm"), PATIENCE) is not None


@pytest.mark.parametrize("outage", ["missing", "broken"])
def test_what_was_known_stays(outage: str, path: Path, matchmaker: Matchmaker) -> None:
    watch = matchmaker.watch("inventory")
    known = watch.current
    if outage == "missing":
        path.unlink()
    else:
        path.write_text("[[member", encoding="utf-8")
    until(lambda: watch.stale)
    assert watch.current is known
    with pytest.raises(MatchmakerError, match=str(path)):
        matchmaker.members("inventory")
    path.write_text(ONE + OTHER, encoding="utf-8")
    until(lambda: not watch.stale)
    assert watch.current is known
    assert len(matchmaker.topics()) == 2


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("x = 1", "not x"),
        ("[member]\ntopic = 'x'", "entries only"),
        ("member = [1]", "entry 1: expected a table"),
        (ONE + "[[member]]\nserver = 'b'\n", "entry 2: endpoints, topic missing"),
        (ONE + "port = 5\n", "entry 1: unknown key port; known are capacity, endpoints"),
        (ONE.replace('"a"', "7"), "server must be text, not 7"),
        (ONE + "capacity = true\n", "capacity must be a whole number, not True"),
        (ONE + "capacity = 0\n", "capacity is 0"),
        (ONE.replace('"a"', '""'), "server is empty"),
        (ONE.replace("[", "").replace("]", "").replace("member", "[[member]]"), "must be a list"),
        (ONE.replace('"tcp://10.0.0.1:5555"', ""), "no endpoint"),
        (ONE.replace("5555", "*"), "only bind"),
        (ONE.replace('"tcp://10.0.0.1:5555"', "5555"), "is a str, not int"),
        (ONE + ONE, "entry 2: inventory@a is there already"),
        ("\ud800", "utf-8"),
    ],
)
def test_what_is_wrong_is_said(text: str, complaint: str, path: Path, matchmaker: Matchmaker) -> None:
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(MatchmakerError, match=complaint) as caught:
        matchmaker.members("inventory")
    assert str(path) in str(caught.value)


def test_a_server_registers_only_what_is_listed(matchmaker: Matchmaker) -> None:
    here = Member(Topic("inventory", "a"), ("tcp://127.0.0.1:5555",), "5", "h", 1)
    with matchmaker.register(here) as lease:
        assert lease.alive
        (listed,) = matchmaker.members("inventory").members
        assert listed.endpoints == ("tcp://10.0.0.1:5555",)
    nowhere = Member(Topic("inventory", "z"), ("tcp://127.0.0.1:5555",), "5", "h", 1)
    with pytest.raises(MatchmakerError, match="does not list server 'z' of topic 'inventory'"):
        matchmaker.register(nowhere)
