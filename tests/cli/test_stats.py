"""stats: what servers in other processes have counted."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conftest import Shop


def test_every_server_is_asked(shop: Shop) -> None:
    pids = {name: shop.serve("stock:Stock", "--server", name)[1]["pid"] for name in ("a", "b")}
    for _ in range(3):
        assert shop.run("call", "inventory", "echo", "--server", "b").code == 0
    assert shop.run("call", "inventory", "fail", "--server", "b").code == 1
    ran = shop.run("stats", "inventory")
    assert (ran.code, ran.err) == (0, "")
    assert (ran.json["asked"], ran.json["answered"]) == (2, 2)
    members = {member["server"]: member for member in ran.json["members"]}
    assert {name: member["stats"]["pid"] for name, member in members.items()} == pids
    assert members["a"]["stats"]["handled"] == 0
    assert members["b"]["stats"]["failed"] == 1
    assert members["b"]["error"] is None
    pool = members["b"]["stats"]["node"]["pool"]
    assert (
        pool["open"]
        == pool["connecting"] + pool["in_use"] + pool["idle"] + pool["draining"] + pool["closing"]
    )
    assert pool["max_sockets"] >= 8


def test_one_server_alone(shop: Shop) -> None:
    for name in ("a", "b"):
        shop.serve("stock:Stock", "--server", name)
    ran = shop.run("stats", "inventory", "--server", "b")
    assert ran.code == 0
    assert [member["server"] for member in ran.json["members"]] == ["b"]


def test_tables_for_people(shop: Shop) -> None:
    _, announced = shop.serve("stock:Stock", "--server", "a")
    summary = shop.run("stats", "inventory", "--no-json")
    assert (summary.code, summary.err) == (0, "")
    assert all(word in summary.out for word in ("handled", "queued", "sockets", str(announced["pid"])))
    assert "node.pool.evicted_clean" not in summary.out
    everything = shop.run("stats", "inventory", "--no-json", "--all")
    assert everything.code == 0
    for figure in ("handled", "port.garbage", "node.pool.evicted_clean", "node.pool.messages.late_replies"):
        assert any(line.split()[:1] == [figure] for line in everything.out.splitlines()), figure


def test_who_does_not_answer(shop: Shop) -> None:
    process, gone = shop.serve("stock:Stock", "--server", "a", "--bind", "tcp://127.0.0.1:*")
    _, there = shop.serve("stock:Stock", "--server", "b", "--bind", "tcp://127.0.0.1:*")
    process.kill()
    process.wait()
    connect = ["-c", gone["endpoints"][0], "-c", there["endpoints"][0]]
    ran = shop.run("stats", "inventory", *connect)
    assert ran.code == 5
    assert (ran.json["asked"], ran.json["answered"]) == (2, 1)
    failed, answered = sorted(ran.json["members"], key=lambda member: member["error"] is None)
    assert "Unreachable" in failed["error"]
    assert (failed["stats"], failed["endpoints"]) == (None, gone["endpoints"])
    assert answered["server"] == "b", "its own name, though --connect names none"
    text = shop.run("stats", "inventory", "--no-json", *connect)
    assert text.code == 5
    assert "Unreachable" in text.out
    assert "is the server running" in text.err
    alone = shop.run("stats", "inventory", *connect[:2])
    assert (alone.code, alone.json["answered"]) == (3, 0)


def test_nobody_serves_it(shop: Shop) -> None:
    ran = shop.run("stats", "warehouse")
    assert (ran.code, ran.out) == (3, "")
    assert "warehouse" in ran.err
