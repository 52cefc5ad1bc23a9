"""The registry in a file: who may touch it, what befalls it, and members in other processes."""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from clock_support import Clock
from waiting_support import until

from zmqcore.errors import MatchmakerError
from zmqcore.matchmaker import Matchmaker, Member, Membership, open_matchmaker
from zmqcore.matchmaker import local as module
from zmqcore.matchmaker.local import FILE_NAME, LocalBackend
from zmqcore.matchmaker.process import lives, start_time
from zmqcore.topic import Topic

PATIENCE = 30.0
Make = Callable[..., Member]
Open = Callable[[str], Matchmaker]
Start = Callable[..., Any]


def _has(*servers: str) -> Callable[[Membership], bool]:
    return lambda membership: [member.server for member in membership.members] == list(servers)


# -- the file ---------------------------------------------------------------------------------------------


def test_only_the_user_can_read_it(local_url: str, directory: Path, opened: Open, member: Make) -> None:
    before = os.umask(0)
    try:
        opened(local_url).register(member())
    finally:
        os.umask(before)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    files = sorted(directory.iterdir())
    assert FILE_NAME in [path.name for path in files]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}


def test_the_default_directory(
    tmp_path: Path, opened: Open, member: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZMQCORE_RUNTIME_DIR", str(tmp_path / "mine"))
    opened("local://").register(member())
    assert (tmp_path / "mine" / FILE_NAME).exists()
    assert len(opened(f"local://{tmp_path}/mine").members("inventory").members) == 1


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o666])
def test_a_file_that_others_may_touch_is_refused(mode: int, local_url: str, directory: Path) -> None:
    with open_matchmaker(local_url) as matchmaker:
        matchmaker.topics()
    (directory / FILE_NAME).chmod(mode)
    with (
        open_matchmaker(local_url) as matchmaker,
        pytest.raises(MatchmakerError, match=r"owner uid \d+, mode -rw"),
    ):
        matchmaker.topics()


def test_a_directory_that_others_may_touch_is_refused(local_url: str, directory: Path, opened: Open) -> None:
    directory.mkdir(mode=0o755)
    with pytest.raises(MatchmakerError, match="open to others"):
        opened(local_url).topics()
    assert list(directory.iterdir()) == []


def test_a_symlink_is_refused(local_url: str, directory: Path, tmp_path: Path, opened: Open) -> None:
    directory.mkdir(mode=0o700)
    (tmp_path / "elsewhere").touch(mode=0o600)
    (directory / FILE_NAME).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(MatchmakerError, match="mode l"):
        opened(local_url).topics()
    assert (tmp_path / "elsewhere").read_bytes() == b""


def test_somebody_elses_file_is_refused(
    local_url: str, directory: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_matchmaker(local_url) as matchmaker:
        matchmaker.topics()
    uid = os.geteuid()
    monkeypatch.setattr(module, "private_directory", lambda path: path)
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    with pytest.raises(MatchmakerError, match=f"{directory}.*owner uid {uid}"):
        opened(local_url).topics()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"not a database, and long enough to look like none at all" * 30, "is damaged.*delete it"),
        (b"", "is no registry of zmqcore"),
    ],
)
def test_what_is_no_registry(
    content: bytes, complaint: str, local_url: str, directory: Path, opened: Open
) -> None:
    directory.mkdir(mode=0o700)
    path = directory / FILE_NAME
    path.touch(mode=0o600)
    path.write_bytes(content)
    with pytest.raises(MatchmakerError, match=complaint) as caught:
        opened(local_url).topics()
    assert str(path) in str(caught.value)
    assert path.read_bytes() == content, "it is not ours to repair"


def test_another_format(local_url: str, directory: Path, opened: Open) -> None:
    with open_matchmaker(local_url) as matchmaker:
        matchmaker.topics()
    connection = sqlite3.connect(directory / FILE_NAME)
    connection.execute("PRAGMA user_version = 7")
    connection.close()
    with pytest.raises(MatchmakerError, match="has format 7; this version reads and writes format 1"):
        opened(local_url).topics()


def test_damage_is_reported_and_mended_by_deleting(
    local_url: str, directory: Path, opened: Open, member: Make
) -> None:
    matchmaker = opened(local_url)
    matchmaker.register(member("a"), ttl=0.5)
    watch = matchmaker.watch("inventory")
    known = watch.current
    with matchmaker._session.io:
        matchmaker._session.backend.disconnect()
        path = directory / FILE_NAME
        path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(MatchmakerError, match="is damaged"):
        matchmaker.topics()
    until(lambda: watch.stale)
    assert watch.current is known
    path.unlink()
    until(lambda: not watch.stale)
    assert matchmaker.members("inventory").members == known.members


@pytest.mark.parametrize("what", ["file", "file and log", "directory"])
def test_a_registry_that_is_deleted_comes_back(
    what: str, local_url: str, directory: Path, opened: Open, member: Make, start_peer: Start
) -> None:
    matchmaker = opened(local_url)
    matchmaker.register(member("a"), ttl=60.0)
    watch = matchmaker.watch("inventory")
    # Not too short: our thread is to see the new file before the peer has renewed.
    start_peer("b", ttl="4")
    assert watch.wait_for(_has("a", "b"), PATIENCE) is not None
    before = watch.current
    with matchmaker._session.io:
        for path in sorted(directory.iterdir()):
            if (
                what == "directory"
                or path.name == FILE_NAME
                or (what == "file and log" and "sqlite3" in path.name)
            ):
                path.unlink()
        if what == "directory":
            directory.rmdir()
    # The peer watches nothing: it comes back when it renews. Meanwhile only we are in the new file.
    assert watch.wait_for(lambda known: known is not before and _has("a", "b")(known), PATIENCE) is not None
    assert watch.current.epoch > before.epoch
    with open_matchmaker(local_url) as reader:
        assert reader.members("inventory").members == watch.current.members


def test_an_earlier_boot_is_forgotten(
    local_url: str, opened: Open, member: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = opened(local_url)
    here.register(member("a"))
    before = here.members("inventory")
    with monkeypatch.context() as patch:
        patch.setattr(module, "boot_id", lambda: "another")
        with open_matchmaker(local_url) as reader:
            after = reader.members("inventory")
            assert after.members == ()
            assert after.epoch > before.epoch
            reader.register(member("b"))
            # Once only: what has registered since then stays.
            with open_matchmaker(local_url) as second:
                assert [each.server for each in second.members("inventory").members] == ["b"]


def test_without_a_boot_id_an_impossible_lease_tells(
    directory: Path, member: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "boot_id", lambda: "")
    with Matchmaker("test://", LocalBackend(directory), time.monotonic) as before:
        before.register(member("a"), ttl=10.0)
        # The clock starts at 0 with a boot.
        with Matchmaker("test://", LocalBackend(directory, lambda: 1.0)) as after:
            assert after.members("inventory").members == ()


@pytest.fixture
def locked(local_url: str, directory: Path, opened: Open) -> Iterator[sqlite3.Connection]:
    """As if another process were writing, and took its time; COMMIT ends that."""
    opened(local_url).topics()
    holder = sqlite3.connect(directory / FILE_NAME, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    yield holder
    holder.close()


def test_a_locked_registry_is_an_error_and_not_for_ever(
    local_url: str, opened: Open, member: Make, locked: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zmqcore.matchmaker.session._BUSY_PATIENCE", 0.05)
    matchmaker = opened(local_url)
    with pytest.raises(MatchmakerError, match="locked by another process"):
        matchmaker.register(member())
    # Reading does not wait for who writes.
    assert matchmaker.members("inventory").members == ()
    locked.execute("COMMIT")
    matchmaker.register(member())
    assert len(matchmaker.members("inventory").members) == 1


def test_who_registers_waits_for_who_writes(
    local_url: str, opened: Open, member: Make, locked: sqlite3.Connection
) -> None:
    matchmaker = opened(local_url)
    thread = threading.Thread(target=matchmaker.register, args=(member(),))
    thread.start()
    # Others use the matchmaker meanwhile.
    for _ in range(20):
        assert matchmaker.members("inventory").members == ()
    locked.execute("COMMIT")
    thread.join()
    assert len(matchmaker.members("inventory").members) == 1


def test_who_reads_a_locked_registry_does_not_wait_to_remove_who_has_expired(
    directory: Path, clock: Clock, member: Make
) -> None:
    """The lock cannot be had: whoever waited for it would end with an error."""
    # Without a matchmaker, whose thread would renew it.
    backend = LocalBackend(directory, clock)
    backend.connect()
    registration = module.Registration(member("a"), 10.0, "token")
    backend.register(registration)
    with (
        Matchmaker("test://", LocalBackend(directory, clock), clock) as there,
        closing(sqlite3.connect(directory / FILE_NAME, isolation_level=None)) as holder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr("zmqcore.matchmaker.session._BUSY_PATIENCE", 0.0)
        seen = there.watch("inventory")
        assert _has("a")(seen.current)
        holder.execute("BEGIN IMMEDIATE")
        clock.now += 11.0
        assert there.members("inventory").members == ()
        assert there.topics() == []
        with Matchmaker("test://", LocalBackend(directory, clock), clock) as third:
            late = third.watch("inventory")
            assert late.current.members == ()
            assert seen.wait_for(_has(), PATIENCE) is not None, "who watches already is told, too"
            holder.execute("COMMIT")
            # Renewed before anybody has removed it: that changes no epoch.
            backend.renew([registration])
            assert seen.wait_for(_has("a"), PATIENCE) is not None
            assert late.wait_for(_has("a"), PATIENCE) is not None
    backend.disconnect()


def test_a_lease_given_up_while_the_registry_is_locked(
    local_url: str, directory: Path, opened: Open, member: Make
) -> None:
    here, there = opened(local_url), opened(local_url)
    one, two = here.register(member("a"), ttl=3600.0), here.register(member("b"), ttl=3600.0)
    watch = there.watch("inventory")
    with closing(sqlite3.connect(directory / FILE_NAME, isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        one.close()
        assert not one.alive
        assert _has("a", "b")(watch.current)
        holder.execute("COMMIT")
        assert watch.wait_for(_has("b"), PATIENCE) is not None
        holder.execute("BEGIN IMMEDIATE")
        two.close()
        ending = threading.Thread(target=here.close)
        ending.start()
        holder.execute("COMMIT")
        ending.join()
    assert watch.wait_for(_has(), PATIENCE) is not None


# -- other processes --------------------------------------------------------------------------------------


@pytest.fixture
def start_peer(local_url: str, peer: Start) -> Start:
    def start(server: str, ttl: str = "60", count: str = "1") -> Any:
        process = peer(local_url, server, ttl, count)
        assert process.hear() == "ready"
        return process

    return start


def test_a_member_of_another_process_comes_and_goes(local_url: str, opened: Open, start_peer: Start) -> None:
    watch = opened(local_url).watch("inventory")
    other = start_peer("b")
    found = watch.wait_for(_has("b"), PATIENCE)
    assert found is not None
    assert found.members[0].pid == other.process.pid
    other.tell("close")
    assert other.hear() == "closed"
    assert watch.wait_for(_has(), PATIENCE) is not None


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only /proc tells that a process has died")
def test_who_is_killed_is_gone_long_before_the_lease(local_url: str, opened: Open, start_peer: Start) -> None:
    watch = opened(local_url).watch("inventory")
    killed, other = start_peer("killed", ttl="3600"), start_peer("other", ttl="3600")
    assert watch.wait_for(_has("killed", "other"), PATIENCE) is not None
    killed.kill()
    # It is a zombie now: still there for whoever asks for its pid only.
    assert watch.wait_for(_has("other"), PATIENCE) is not None
    other.tell("who")
    assert other.hear() == "other"


@pytest.mark.slow
def test_who_is_stopped_is_gone_with_its_lease_and_comes_back(
    local_url: str, opened: Open, start_peer: Start
) -> None:
    watch = opened(local_url).watch("inventory")
    stopped = start_peer("stopped", ttl="0.6")
    assert watch.wait_for(_has("stopped"), PATIENCE) is not None
    stopped.stop()
    assert watch.wait_for(_has(), PATIENCE) is not None
    stopped.cont()
    assert watch.wait_for(_has("stopped"), PATIENCE) is not None


@pytest.mark.slow
def test_a_lease_that_is_renewed_lasts(local_url: str, opened: Open, start_peer: Start) -> None:
    watch = opened(local_url).watch("inventory")
    start_peer("b", ttl="0.6")
    assert watch.wait_for(_has("b"), PATIENCE) is not None
    before = watch.current
    watch.next(0)
    assert watch.next(2.0) is None
    assert watch.current is before


def test_many_processes_register_at_once(local_url: str, opened: Open, peer: Start) -> None:
    # Nothing is there yet: they also make the file at once.
    peers = [peer(local_url, f"p{number}", "60", "25") for number in range(8)]
    expected = sorted(f"p{number}-{turn}" for number in range(8) for turn in range(25))
    for each in peers:
        assert each.hear() == "ready"
    watch = opened(local_url).watch("inventory")
    assert [member.server for member in watch.current.members] == expected
    for each in peers:
        each.tell("close")
    for each in peers:
        assert each.hear() == "closed"
        assert each.end() in (0, -signal.SIGKILL)
    assert watch.wait_for(_has(), PATIENCE) is not None


def test_a_pid_that_is_used_again_is_another_process() -> None:
    here = start_time(os.getpid())
    if here is None:
        pytest.skip("the system does not tell start times")
    assert lives(os.getpid(), here)
    assert not lives(os.getpid(), here - 1)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = start_time(child.pid)
    assert started is not None
    assert lives(child.pid, started)
    child.kill()
    until(lambda: start_time(child.pid) is None)
    assert not lives(child.pid, started), "a zombie is dead"
    assert child.stdin is not None
    child.stdin.close()
    child.wait()
    assert not lives(child.pid, started)


def test_what_cannot_be_told_counts_as_living(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_ours(*_: int) -> None:
        raise PermissionError

    monkeypatch.setattr("zmqcore.matchmaker.process.start_time", lambda _: None)
    monkeypatch.setattr(os, "kill", not_ours)
    assert lives(1, 5)


def test_a_member_on_behalf_of_another_process_has_its_lease_only(local_url: str, opened: Open) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    matchmaker = opened(local_url)
    matchmaker.register(Member(Topic("inventory", "a"), ("tcp://h:1",), "1", "host", child.pid))
    with matchmaker.watch("inventory") as watch:
        watch.next(0)
        assert watch.next(0.5) is None


def test_members_of_another_namespace_are_left_to_their_lease(
    local_url: str, opened: Open, start_peer: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "namespace", lambda: "elsewhere")
    watch = opened(local_url).watch("inventory")
    other = start_peer("b", ttl="3600")
    assert watch.wait_for(_has("b"), PATIENCE) is not None
    other.end()
    watch.next(0)
    assert watch.next(0.5) is None


# -- fork -------------------------------------------------------------------------------------------------


def _in_child(work: Callable[[], object]) -> None:
    """Run ``work`` in a forked child; whatever it raises fails the test here."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            work()
            code = 0
        except BaseException:  # noqa: BLE001 - the child must not go on as a second pytest
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


fork = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")


@fork
def test_a_forked_child_goes_on_by_itself(
    local_url: str, opened: Open, member: Make, start_peer: Start
) -> None:
    matchmaker = opened(local_url)
    lease = matchmaker.register(member("parent"), ttl=60.0)
    watch = matchmaker.watch("inventory")
    parents_thread = threading.active_count()

    def child() -> None:
        assert threading.active_count() == 1
        assert not lease.alive
        lease.close()
        assert watch.stale
        assert _has("parent")(watch.current), "closing an inherited lease must not remove the parent's member"
        assert not watch.stale
        with matchmaker.register(member("child")):
            assert watch.wait_for(_has("child", "parent"), PATIENCE) is not None
            start_peer("z")
            assert watch.wait_for(_has("child", "parent", "z"), PATIENCE) is not None
        matchmaker.close()

    _in_child(child)
    assert lease.alive
    assert threading.active_count() == parents_thread
    assert watch.wait_for(lambda known: any(each.server == "parent" for each in known.members), 0) is not None
    assert watch.wait_for(_has("parent"), PATIENCE) is not None


@fork
def test_a_child_begins_with_what_its_parent_knew(local_url: str, opened: Open, member: Make) -> None:
    """Right after the fork: who uses the watch does not wait for the registry, its thread reads that."""
    matchmaker = opened(local_url)
    matchmaker.register(member("parent"))
    watch = matchmaker.watch("inventory")
    assert watch.wait_for(_has("parent"), PATIENCE) is not None

    def child() -> None:
        backend = watch.session.backend
        connect, connected = backend.connect, []

        def note() -> bool:
            connected.append(threading.current_thread())
            return connect()

        backend.connect = note  # type: ignore[method-assign]
        assert _has("parent")(watch.current)
        assert not watch.stale
        assert threading.main_thread() not in connected
        matchmaker.register(member("child"))
        assert watch.wait_for(_has("child", "parent"), PATIENCE) is not None
        matchmaker.close()

    _in_child(child)


@fork
@pytest.mark.parametrize("waits", [True, False])
def test_a_child_hears_of_what_changes_later(
    local_url: str, opened: Open, member: Make, start_peer: Start, waits: bool
) -> None:
    """It starts no thread for its first look; who waits, or looks again later, needs one."""
    matchmaker = opened(local_url)
    matchmaker.register(member("parent"))
    watch = matchmaker.watch("inventory")
    assert watch.wait_for(_has("parent"), PATIENCE) is not None

    def child() -> None:
        assert _has("parent")(watch.current)
        if waits:
            threading.Thread(target=start_peer, args=("z",)).start()
            assert watch.wait_for(_has("parent", "z"), PATIENCE) is not None
        else:
            start_peer("z")
            deadline = time.monotonic() + PATIENCE
            while not _has("parent", "z")(watch.current):
                assert time.monotonic() < deadline
                time.sleep(0.01)
        matchmaker.close()

    _in_child(child)


@fork
def test_forks_while_threads_are_at_work(local_url: str, directory: Path, opened: Open, member: Make) -> None:
    matchmaker = opened(local_url)
    watch = matchmaker.watch("inventory")
    done = threading.Event()
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            while not done.is_set():
                matchmaker.register(member(f"w{number}")).close()
        except BaseException as exc:  # noqa: BLE001 - told by the test's own thread
            errors.append(exc)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()

    def child() -> None:
        lease = matchmaker.register(member("child"))
        assert any(each.server == "child" for each in matchmaker.members("inventory").members)
        lease.close()

    try:
        for _ in range(10):
            _in_child(child)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert errors == []
    assert watch.wait_for(_has(), PATIENCE) is not None
    with closing(sqlite3.connect(directory / FILE_NAME)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@fork
def test_a_fork_does_not_wait_for_who_writes(
    local_url: str, directory: Path, opened: Open, member: Make
) -> None:
    """The thread that renews waits for the lock, and must not keep anybody else waiting."""
    matchmaker = opened(local_url)
    lease = matchmaker.register(member("parent"), ttl=0.3)
    with closing(sqlite3.connect(directory / FILE_NAME, isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        until(lambda: matchmaker._session._busy_since is not None)
        before = matchmaker._session._busy_since
        for _ in range(5):
            _in_child(lambda: None)
        assert matchmaker._session._busy_since == before, "it is still locked: nobody has waited for its end"
        holder.execute("COMMIT")
        until(lambda: lease.alive)


@fork
def test_a_child_that_uses_nothing_costs_nothing(local_url: str, opened: Open, member: Make) -> None:
    matchmaker = opened(local_url)
    matchmaker.register(member("parent"))
    watch = matchmaker.watch("inventory")

    def child() -> None:
        assert threading.active_count() == 1
        # Named, not iterated: the directory's own descriptor is gone when its turn comes.
        held = [os.path.realpath(path) for path in Path("/proc/self/fd").iterdir()]
        assert not any(FILE_NAME in target for target in held)
        repr(watch)
        repr(matchmaker)
        matchmaker.close()
        assert threading.active_count() == 1

    if Path("/proc/self/fd").exists():
        _in_child(child)
    assert _has("parent")(matchmaker.members("inventory"))


# -- much ------------------------------------------------------------------------------------------------


def test_ten_thousand_members(local_url: str, opened: Open, member: Make) -> None:
    here, there = opened(local_url), opened(local_url)
    first = member("s00000")
    here.register(first)
    backend = here._session.backend
    assert isinstance(backend, LocalBackend)
    registration = next(iter(here._session.leases.values())).registration
    with here._session.io, backend._writing():
        for number in range(1, 10_000):
            one = member(f"s{number:05}", instance=str(number))
            backend._put(module.Registration(one, 60.0, f"{registration.token}{number}"))
    watch = there.watch("inventory")
    assert len(watch.current.members) == 10_000
    assert watch.current.members == there.members("inventory").members
    watch.next(0)
    # A change among them is read as such: nobody reads everything again.
    reads: list[int] = []
    real = LocalBackend.read

    def counting(self: LocalBackend, group: Topic, since: int) -> Any:
        update = real(self, group, since)
        reads.append(len(update.records))
        return update

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalBackend, "read", counting)
        here.register(member("t"))
        change = watch.next(PATIENCE)
    assert change is not None
    assert change.added == (member("t"),)
    assert reads
    assert max(reads) <= 2
