"""call, cast, fanout, members and ping against servers in other processes."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Shop

GIVE_UP = 60.0


def lines_of(path: Path, number: int) -> list[str]:
    """Wait until *path* has that many lines, and return them."""
    give_up = time.monotonic() + GIVE_UP
    while True:
        lines = path.read_text().splitlines() if path.exists() else []
        if len(lines) >= number:
            return lines
        assert time.monotonic() < give_up, f"{path} has {lines}, expected {number} lines"
        time.sleep(0.02)


def test_call_passes_arguments_and_prints_the_result_as_json(shop: Shop) -> None:
    shop.serve()
    words = ["1", "-2", "1.5", "null", "sku-1", "two words", '"42"', "[1, {}]", "qty=2", "note=by hand"]
    ran = shop.run("call", "inventory", "echo", *words, "--kwargs", '{"more": [true]}')
    assert (ran.code, ran.err) == (0, "")
    assert ran.json == [
        [1, -2, 1.5, None, "sku-1", "two words", "42", [1, {}]],
        {"qty": 2, "note": "by hand", "more": [True]},
    ]
    assert shop.run("call", "inventory", "echo", "--raw", "1", "a=b", "-3").json == [["1", "a=b", "-3"], {}]
    assert shop.run("call", "inventory", "echo", "--", "--raw").json == [["--raw"], {}]


def test_call_prints_what_json_lacks(shop: Shop) -> None:
    shop.serve()
    ran = shop.run("call", "inventory", "odd")
    assert (ran.code, ran.err) == (0, "")
    assert ran.json == {
        "bytes": {"base64": "AP8="},
        "nan": None,
        "1": [2, 3],
        "when": "2024-02-29T00:00:00+00:00",
    }


def test_call_prints_the_items_of_a_stream(shop: Shop) -> None:
    shop.serve()
    ran = shop.run("call", "inventory", "count", "40")
    assert ran.out.split() == [str(number) for number in range(40)]
    assert ran.code == 1
    assert "LookupError: no more" in ran.err


def test_call_for_people_is_indented(shop: Shop) -> None:
    shop.serve()
    ran = shop.run("call", "inventory", "echo", "a=[1]", "--no-json")
    assert ran.code == 0
    assert len(ran.out.splitlines()) > 5


def test_each_failure_has_its_code_message_and_hint(shop: Shop) -> None:
    shop.serve()
    raised = shop.run("call", "inventory", "fail")
    assert (raised.code, raised.out) == (1, "")
    assert "LookupError: no such sku" in raised.err
    assert "stock.py" in raised.err, "the remote traceback is missing"

    unknown = shop.run("call", "inventory", "nothing")
    assert (unknown.code, unknown.out) == (1, "")
    assert "NoSuchMethod" in unknown.err
    assert "zmqcore call inventory zmqcore.methods" in unknown.err

    unfit = shop.run("call", "inventory", "slow", "1", "2", "3")
    assert (unfit.code, unfit.out) == (1, "")
    assert "BadArguments" in unfit.err

    late = shop.run("call", "inventory", "slow", "5", "--timeout", "0.2")
    assert (late.code, late.out) == (4, "")
    assert "DeadlineExceeded" in late.err
    assert "--timeout" in late.err

    nobody = shop.run("call", "warehouse", "echo")
    assert (nobody.code, nobody.out) == (3, "")
    assert "NoSuchTopic" in nobody.err
    assert "zmqcore members" in nobody.err


def test_an_address_where_nobody_listens(shop: Shop) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    for address in (f"tcp://127.0.0.1:{port}", f"ipc://{shop.directory}/nobody"):
        ran = shop.run("call", "--connect", address, "inventory", "echo", "--timeout", "3")
        assert (ran.code, ran.out) == (3, ""), ran.err
        assert "Unreachable" in ran.err
        assert address in ran.err


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["call", "inventory"], "METHOD"),
        (["call", "inventory", "echo", "--timeot", "3"], "--timeout"),
        (["call", "inventory", "echo", "--qty", "2"], "qty=VALUE"),
        (["call", "inventory", "echo", "--timeout", "0"], "timeout"),
        (["call", "inventory", "echo", "--kwargs", "[1]"], "must be a JSON object"),
        (["call", "inventory", "echo", "a=1", "a=2"], "given twice"),
        (["call", "", "echo"], "topic"),
        (["call", "inventory", "echo", "--connect", "tcp://nowhere"], "tcp://nowhere"),
        (["call", "inventory", "echo", "--connect", "http://a:1"], "http"),
        (["members", "--server", "a"], "TOPIC"),
        (["serve", "stock:Stock"], "--topic"),
        (["serve", "stock:Needy", "--topic", "t"], "without arguments"),
        (["nothing"], "nothing"),
    ],
)
def test_a_wrong_command_line_is_code_2(shop: Shop, words: list[str], why: str) -> None:
    ran = shop.run(*words)
    assert (ran.code, ran.out) == (2, ""), ran.err
    assert why in ran.err
    assert "Traceback" not in ran.err


def test_a_matchmaker_that_does_not_exist(shop: Shop) -> None:
    ran = shop.run("members", "--matchmaker", "carrier-pigeon://coop")
    assert (ran.code, ran.out) == (6, "")
    assert "carrier-pigeon" in ran.err
    assert "Traceback" not in ran.err


def test_json_with_a_mistake_is_noted(shop: Shop) -> None:
    shop.serve()
    ran = shop.run("call", "inventory", "echo", "{sku: 1}")
    assert ran.json == [["{sku: 1}"], {}]
    assert "looks like JSON" in ran.err


def test_cast_runs_the_method(shop: Shop) -> None:
    _, there = shop.serve()
    notes = shop.directory / "notes"
    ran = shop.run("cast", "inventory", "note", str(notes), "hello")
    assert (ran.code, ran.err) == (0, "")
    assert ran.json == {"sent": True}
    assert lines_of(notes, 1) == [f"hello {there['pid']}"]
    assert shop.run("cast", "inventory", "note", str(notes), "again", "--no-json").out.strip() == "sent"
    assert len(lines_of(notes, 2)) == 2
    assert shop.run("cast", "warehouse", "note").code == 3


def test_fanout_reaches_every_member(shop: Shop) -> None:
    pids = {shop.serve("stock:Stock", "--server", name)[1]["pid"] for name in ("a", "b")}
    notes = shop.directory / "notes"
    ran = shop.run("fanout", "inventory", "note", str(notes), "hello")
    assert (ran.code, ran.err) == (0, "")
    assert {member["server"] for member in ran.json["sent"]} == {"a", "b"}
    assert ran.json["failed"] == []
    assert {int(line.split()[1]) for line in lines_of(notes, 2)} == pids
    table = shop.run("fanout", "inventory", "note", str(notes), "hello", "--no-json")
    assert table.code == 0
    assert table.out.count("sent") == 2
    assert shop.run("fanout", "warehouse", "note").code == 3


def test_a_server_is_chosen_by_name(shop: Shop) -> None:
    pids = {name: shop.serve("stock:Stock", "--server", name)[1]["pid"] for name in ("a", "b@host/1")}
    for name, pid in pids.items():
        ran = shop.run("call", "inventory", "zmqcore.ping", "--server", name)
        assert ran.json["pid"] == pid
    assert shop.run("call", "inventory", "zmqcore.ping", "--server", "c", "-t", "2").code == 3


def test_an_exchange_is_a_world_of_its_own(shop: Shop) -> None:
    shop.serve("stock:Stock", "--exchange", "north")
    assert shop.run("call", "inventory", "echo").code == 3
    assert shop.run("call", "inventory", "echo", "--exchange", "north").code == 0
    assert shop.run("members", "inventory").code == 3
    assert [member["exchange"] for member in shop.run("members").json] == ["north"]


def test_members_lists_who_is_there(shop: Shop) -> None:
    empty = shop.run("members")
    assert (empty.code, empty.json, empty.err) == (0, [], "")
    there = {}
    for name in ("a", "b"):
        _, there[name] = shop.serve("stock:Stock", "--server", name)
    ran = shop.run("members", "inventory")
    assert ran.code == 0
    assert {member["server"]: (member["pid"], member["endpoints"]) for member in ran.json} == {
        name: (announced["pid"], announced["endpoints"]) for name, announced in there.items()
    }
    assert shop.run("members").json == ran.json
    assert [member["server"] for member in shop.run("members", "inventory", "--server", "b").json] == ["b"]
    table = shop.run("members", "--no-json").out
    assert all(endpoint in table for announced in there.values() for endpoint in announced["endpoints"])
    nobody = shop.run("members", "warehouse")
    assert (nobody.code, nobody.json) == (3, [])


def test_ping_asks_every_member(shop: Shop) -> None:
    pids = {shop.serve("stock:Stock", "--server", name)[1]["pid"] for name in ("a", "b")}
    ran = shop.run("ping", "inventory", "--count", "3", "--interval", "0")
    assert (ran.code, ran.err) == (0, "")
    assert (ran.json["asked"], ran.json["answered"]) == (2, 2)
    assert {member["pid"] for member in ran.json["members"]} == pids
    for member in ran.json["members"]:
        assert member["answered"] == 3
        assert 0 < member["best_ms"] <= member["p50_ms"] <= member["worst_ms"]
    assert shop.run("ping", "inventory", "--server", "a", "-n", "1", "--no-json").code == 0
    assert shop.run("ping", "warehouse").code == 3


def test_ping_tells_who_does_not_answer(shop: Shop) -> None:
    process, announced = shop.serve("stock:Stock", "--server", "a", "--bind", "tcp://127.0.0.1:*")
    _, other = shop.serve("stock:Stock", "--server", "b", "--bind", "tcp://127.0.0.1:*")
    process.kill()
    process.wait()
    addresses = [announced["endpoints"][0], other["endpoints"][0]]
    ran = shop.run("ping", "inventory", "-n", "1", "-t", "5", "-c", addresses[0], "-c", addresses[1])
    assert ran.code == 5
    assert [member["error"] is None for member in ran.json["members"]] == [False, True]
    alone = shop.run("ping", "inventory", "-n", "1", "-t", "5", "--connect", addresses[0])
    assert alone.code == 3


def test_connect_needs_no_matchmaker(shop: Shop) -> None:
    _, announced = shop.serve("stock:Stock", "--bind", "tcp://127.0.0.1:*")
    [address] = announced["endpoints"]
    assert address.startswith("tcp://127.0.0.1:")
    elsewhere = f"local://{shop.temporary}/elsewhere"
    ran = shop.run("call", "inventory", "echo", "--connect", address, "--matchmaker", elsewhere)
    assert (ran.code, ran.json) == (0, [[], {}])


def test_the_matchmaker_may_come_from_the_environment(shop: Shop) -> None:
    elsewhere = f"local://{shop.temporary}/elsewhere"
    shop.serve("stock:Stock", "--matchmaker", elsewhere)
    assert shop.run("members").json == []
    assert len(shop.run("members", ZMQCORE_MATCHMAKER=elsewhere).json) == 1
    assert shop.run("call", "inventory", "echo", ZMQCORE_MATCHMAKER=elsewhere).code == 0


def test_the_server_lists_its_methods(shop: Shop) -> None:
    shop.serve()
    methods = shop.run("call", "inventory", "zmqcore.methods").json
    assert {"echo", "fail", "slow"} <= set(methods)
    assert not any(name.startswith("_") for name in methods)


def test_a_reader_that_goes_away_is_no_error(shop: Shop) -> None:
    process = shop.start("--help")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(GIVE_UP) == 0
    assert err == ""


def test_a_terminal_gets_text_for_people(shop: Shop) -> None:
    shop.serve()
    ours, theirs = os.openpty()
    try:
        process = subprocess.Popen(
            shop.command("call", "inventory", "echo", "a=1"),
            cwd=shop.directory,
            env=shop.environment | {"TERM": "xterm"},
            stdout=theirs,
            stdin=subprocess.DEVNULL,
        )
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # EIO is what Linux says when the other end is closed
                break
            if not part:
                break
            shown += part
        assert process.wait(GIVE_UP) == 0
    finally:
        os.close(ours)
    assert b"\x1b[" in shown, "no colours"
    assert shown.count(b"\n") > 3, "not indented"
