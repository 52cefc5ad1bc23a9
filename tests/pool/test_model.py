"""The pool against a model of it, step by step, with the clock in the machine's hands.

Channels are real ones, by inproc to ports in this process that nobody reads but the machine.
"""

from __future__ import annotations

import errno
import math
import threading
from typing import Any

import pytest
import zmq
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pool_support import adds_up, cast
from waiting_support import until

from zmqcore._channel import Channel
from zmqcore._pool import ChannelPool
from zmqcore._port import Port
from zmqcore.errors import Closed, PoolExhausted, Unreachable

IDLE_TTL, MAX_LIFETIME = 100.0, 1000.0
CAP = 8
NAMES = [f"inproc://{letter}" for letter in "abcdefghijklmn"]
NOWHERE = "ipc:///nowhere/at-all.sock"


class Slot:
    def __init__(self, machine: Machine, endpoint: str) -> None:
        self.endpoint = endpoint
        self.users = 1
        self.uses = 1.0
        self.created = self.last_used = self.decayed = machine.clock
        self.opened_before = machine.opened
        self.protected = False
        self.clean = True

    def factor(self) -> float:
        return min(8.0, 1 + math.log2(max(1.0, self.uses)))


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.context: zmq.Context[Any] = zmq.Context()
        self.ports = {name: Port(self.context, [name]) for name in NAMES}
        self.clock = 1000.0
        self.refuse = False
        self.all_channels: list[Channel] = []
        self.strangers: list[Channel] = []
        self.pool: ChannelPool
        self.sent = self.taken = 0
        self.done = threading.Event()
        self.reading = threading.Lock()  # guards ports
        self.reader = threading.Thread(target=self.read)
        self.reader.start()
        self.start()

    def start(self) -> None:
        self.pool = ChannelPool(
            self.connect,
            max_sockets=CAP,
            idle_ttl=IDLE_TTL,
            max_lifetime=MAX_LIFETIME,
            connect_timeout=0.004,
            clock=lambda: self.clock,
        )
        self.forget()

    def forget(self) -> None:
        self.slots: dict[str, Slot] = {}
        self.held: list[tuple[Slot, Channel]] = []
        self.probation: list[str] = []
        self.protected: list[str] = []
        self.failed_until: float | None = None
        self.attempts = 0
        self.opened = self.acquired = 0
        self.left = dict.fromkeys(
            (
                "evicted_clean",
                "evicted_draining",
                "expired_idle",
                "expired_lifetime",
                "lost",
                "dead",
                "failed",
            ),
            0,
        )

    def connect(self, endpoint: str) -> Channel:
        if self.refuse:
            raise zmq.ZMQError(errno.EMFILE)
        self.all_channels.append(Channel(self.context, endpoint))
        return self.all_channels[-1]

    def read(self) -> None:
        """Read all ports, as servers do: an inproc socket that is closed is not gone before its peer has noticed."""
        while not self.done.wait(0.0002):
            with self.reading:
                for port in self.ports.values():
                    self.taken += len(port.receive(64, 0.0))
                    port.flush()

    def none_leaving(self) -> bool:
        stats = self.pool.stats()
        return not stats["closing"] and not stats["draining"]

    # -- the model's own moves

    def all_taken(self) -> str:
        used = sum(slot.users > 0 for slot in self.slots.values())
        return f"all {CAP} sockets of the pool are taken: {used} in use, 0 idle, {CAP - used} idle but pinned, 0 d"

    def leave(self, endpoint: str, cause: str) -> None:
        slot = self.slots.pop(endpoint)
        for ring in (self.probation, self.protected):
            if endpoint in ring:
                ring.remove(endpoint)
        self.left[cause] += 1
        assert not slot.users

    def make_room(self) -> bool:
        """Evict if the budget is used up; return whether there is a place."""
        if len(self.slots) < CAP:
            return True
        ring = self.probation or self.protected
        if not ring:
            return False
        near = ring[:8]
        victim = next((name for name in near if self.slots[name].clean), ring[0])
        self.leave(victim, "evicted_clean" if self.slots[victim].clean else "evicted_draining")
        return True

    def park(self, slot: Slot) -> None:
        if slot.endpoint in self.pins:
            return
        if not slot.protected:
            self.probation.append(slot.endpoint)
            return
        self.protected.append(slot.endpoint)
        if len(self.protected) > CAP * 4 // 5:
            demoted = self.slots[self.protected.pop(0)]
            demoted.protected = False
            demoted.opened_before = self.opened
            self.probation.append(demoted.endpoint)

    # -- rules

    @initialize()
    def no_pins(self) -> None:
        self.pins: set[str] = set()

    @rule(endpoint=st.sampled_from(NAMES))
    def take(self, endpoint: str) -> None:
        self.acquire(endpoint)

    def acquire(self, endpoint: str) -> None:
        known = self.slots.get(endpoint)
        if known is None and not self.make_room():
            with pytest.raises(PoolExhausted, match=self.all_taken()):
                self.pool.acquire(endpoint, 0.0)
            return
        channel = self.pool.acquire(endpoint)
        self.acquired += 1
        if known is None:
            self.opened += 1
            slot = self.slots[endpoint] = Slot(self, endpoint)
        else:
            slot = known
            self.note_use(slot)
            slot.users += 1
        self.held.append((slot, channel))
        assert channel.endpoint == endpoint
        assert channel.state_name == "open"

    def note_use(self, slot: Slot) -> None:
        if not slot.users:
            for ring in (self.probation, self.protected):
                if slot.endpoint in ring:
                    ring.remove(slot.endpoint)
            if self.clock - slot.decayed > IDLE_TTL / 16:
                slot.uses *= 2 ** ((slot.decayed - self.clock) / IDLE_TTL)
                slot.decayed = self.clock
            if self.opened - slot.opened_before >= 4:
                slot.protected = True
        slot.uses = min(slot.uses + 1, 128 + 1)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.give_back(data.draw(st.integers(0, len(self.held) - 1)))

    @rule(endpoints=st.lists(st.sampled_from(NAMES), min_size=1, max_size=40))
    def use(self, endpoints: list[str]) -> None:
        """Take and give back one after the other: what fills the rings."""
        for endpoint in endpoints:
            before = len(self.held)
            self.acquire(endpoint)
            if len(self.held) > before:
                self.give_back(-1)

    def give_back(self, number: int) -> None:
        slot, channel = self.held.pop(number)
        lifetime = self.row(slot.endpoint)["ttl"] / slot.factor() / IDLE_TTL * MAX_LIFETIME
        self.pool.release(channel)
        slot.users -= 1
        if slot.users:
            return
        slot.last_used = self.clock
        # What has not been seen to be acknowledged is not closed for its age.
        if slot.endpoint not in self.pins and slot.clean and self.clock - slot.created > lifetime:
            self.leave(slot.endpoint, "expired_lifetime")
        else:
            self.park(slot)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def send(self, data: st.DataObject) -> None:
        """A cast that its port takes and acknowledges; the channel does not know before somebody looks."""
        slot, channel = data.draw(st.sampled_from(self.held))
        cast(channel, b"x")
        self.sent += 1
        until(lambda: self.taken == self.sent, "taking")
        slot.clean = False

    @rule(endpoint=st.sampled_from(NAMES))
    def send_now(self, endpoint: str) -> None:
        """A cast without acquiring: only on a channel that is open, and whose port has said hello."""
        slot = self.slots.get(endpoint)
        greeted = False
        if slot is not None:
            channel = next(channel for channel in self.pool.channels() if channel.endpoint == endpoint)
            until(channel.settle, "the acknowledgement")
            slot.clean = True
            greeted = channel.peer_instance is not None
        sent = self.pool.send_now(endpoint, "cast", b"t", "m", b"x", None, b"", 0)
        assert bool(sent) == greeted
        if slot is not None:
            self.note_use(slot)
            if not slot.users:
                slot.last_used = self.clock
                self.park(slot)
        if sent:
            assert slot is not None
            self.acquired += 1
            self.sent += 1
            until(lambda: self.taken == self.sent, "taking")
            slot.clean = False

    @rule(endpoint=st.sampled_from(NAMES))
    def acquire_at_the_limit_of_descriptors(self, endpoint: str) -> None:
        if endpoint in self.slots or not self.make_room():
            return
        self.refuse = True
        with pytest.raises(PoolExhausted, match="no file descriptor is left"):
            self.pool.acquire(endpoint)
        self.refuse = False
        self.opened += 1
        self.left["failed"] += 1

    @rule()
    def acquire_what_nobody_serves(self) -> None:
        if self.failed_until is not None and self.clock < self.failed_until - 1.0:
            return
        if self.failed_until is not None and self.clock < self.failed_until:
            # The pause is random: so there may or may not be an attempt.
            self.clock = self.failed_until
        if not self.make_room():
            return
        with pytest.raises(Unreachable, match="no connection came about"):
            self.pool.acquire(NOWHERE)
        hits = self.pool.stats()["negative_hits"]
        with pytest.raises(Unreachable, match="known from before"):
            self.pool.acquire(NOWHERE)
        assert self.pool.stats()["negative_hits"] == hits + 1
        self.opened += 1
        self.attempts += 1
        self.left["dead"] += 1
        self.failed_until = self.clock + 1.0

    @rule(endpoint=st.sampled_from(NAMES))
    def pin(self, endpoint: str) -> None:
        if len(self.pins) >= CAP and endpoint not in self.pins:
            with pytest.raises(PoolExhausted, match="cannot be pinned"):
                self.pool.pin(endpoint)
            return
        self.pool.pin(endpoint)
        self.pins.add(endpoint)
        for ring in (self.probation, self.protected):
            if endpoint in ring:
                ring.remove(endpoint)

    @rule(endpoint=st.sampled_from(NAMES))
    def unpin(self, endpoint: str) -> None:
        self.pool.unpin(endpoint)
        if endpoint in self.pins:
            self.pins.remove(endpoint)
            if endpoint in self.slots and not self.slots[endpoint].users:
                self.park(self.slots[endpoint])

    @rule(seconds=st.sampled_from([0.5, 5.0, 20.0, 95.0, 300.0, 900.0]))
    def wait(self, seconds: float) -> None:
        self.clock += seconds

    @rule()
    def maintain(self) -> None:
        rows = {row["endpoint"]: row for row in self.pool.snapshot()}
        self.pool.maintain()
        for endpoint, slot in list(self.slots.items()):
            if slot.users:
                continue
            slot.clean = True
            ttl = rows[endpoint]["ttl"]
            if endpoint in self.pins:
                continue
            if self.clock - slot.created > ttl / slot.factor() / IDLE_TTL * MAX_LIFETIME:
                self.leave(endpoint, "expired_lifetime")
            elif self.clock - slot.last_used > ttl:
                self.leave(endpoint, "expired_idle")

    @precondition(lambda self: any(not slot.users for slot in self.slots.values()))
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        """The server of an idle channel goes; the next one who asks for it gets a fresh channel."""
        endpoint = data.draw(
            st.sampled_from(sorted(name for name, slot in self.slots.items() if not slot.users))
        )
        with self.reading:
            self.ports.pop(endpoint).close()

        def bound_again() -> bool:
            try:
                port = Port(self.context, [endpoint])
            except zmq.ZMQError:
                return False  # the reaper has not got to the old one
            with self.reading:
                self.ports[endpoint] = port
            return True

        until(bound_again)
        # Taken note of by whoever looks, once libzmq knows; who does not would be given it, and find out then.
        lost = next(channel for channel in self.pool.channels() if channel.endpoint == endpoint)
        until(lambda: lost.look() or lost.state_name == "lost", "the loss")
        old = self.acquired
        channel = self.pool.acquire(endpoint)
        assert channel.state_name == "open"
        self.acquired = old + 1
        self.leave(endpoint, "lost")
        self.opened += 1
        slot = self.slots[endpoint] = Slot(self, endpoint)
        self.held.append((slot, channel))

    @rule()
    def fork(self) -> None:
        """What the hook does in a child: the pool is empty, and what the parent acquired is no business of it."""
        self.strangers += [channel for _, channel in self.held]
        self.pool._after_fork_in_child()
        self.forget()
        assert self.pool.snapshot() == []

    @precondition(lambda self: self.strangers)
    @rule()
    def give_back_what_the_parent_acquired(self) -> None:
        self.pool.release(self.strangers.pop())

    @rule()
    def close(self) -> None:
        clean = self.pool.close(0.0)
        assert clean or any(not slot.clean for slot in self.slots.values())
        adds_up(self.pool.stats())
        until(self.none_leaving, "closing")
        assert self.pool.stats()["open"] == 0
        assert self.pool.maintain() is None
        for _, channel in self.held:
            assert channel.state_name == "closed"
            self.pool.release(channel)
        with pytest.raises(Closed):
            self.pool.acquire(NAMES[0])
        assert "closed" in repr(self.pool)
        self.start()
        self.pins = set()

    # -- invariants

    def row(self, endpoint: str) -> dict[str, Any]:
        return next(row for row in self.pool.snapshot() if row["endpoint"] == endpoint)

    @invariant()
    def same_as_the_model(self) -> None:
        if not hasattr(self, "pins"):
            return
        adds_up(self.pool.stats())
        until(self.none_leaving, "closing")
        stats = self.pool.stats()
        in_use = sum(slot.users > 0 for slot in self.slots.values())
        assert (stats["open"], stats["in_use"]) == (len(self.slots), in_use)
        assert stats["pinned"] == len(self.pins)
        assert stats["protected"] == len(self.protected)
        assert (stats["opened"], stats["acquired"]) == (self.opened, self.acquired)
        assert {name: stats[name] for name in self.left} == self.left
        assert stats["waiting"] == 0
        rows = self.pool.snapshot()
        assert {row["endpoint"] for row in rows} == set(self.slots)
        for row in rows:
            slot = self.slots[row["endpoint"]]
            assert row["users"] == slot.users
            assert row["protected"] == slot.protected
            assert row["persistent"] == (slot.endpoint in self.pins)
            assert row["state"] == ("in use" if slot.users else "idle")
            assert row["uses"] == pytest.approx(slot.uses)
            assert 0.9 * 0.999 < row["ttl"] / (IDLE_TTL * slot.factor()) < 1.001
        assert f"{len(self.slots)} of {CAP} sockets, {in_use} in use" in repr(self.pool)
        assert len(self.slots) <= CAP

    def teardown(self) -> None:
        self.pool.close(0.0)
        for channel in self.all_channels:
            channel.close()
        self.done.set()
        self.reader.join()
        for port in self.ports.values():
            port.close()
        self.context.term()


TestModel = Machine.TestCase
TestModel.settings = settings(
    max_examples=100, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
