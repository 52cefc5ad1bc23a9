"""``local://``: all processes of one user on one host, by an SQLite file in the user's private directory.

The file ``members.sqlite3`` holds one row per member and one row about itself. Format 1:

* ``registry``: ``epoch``, counts changes; ``horizon``, the epoch up to which traces of gone members have been
  cleared away; ``boot``, the boot that the times belong to.
* ``member``: the key is ``topic`` (exchange and name, canonical text), ``server`` and ``instance``; ``epoch``
  of its last change; ``token`` of its registration, NULL once it has gone; ``expires`` and ``ttl``, seconds
  of the monotonic clock, which all processes of a host share and which stands still while the host is
  suspended; ``pid``, ``started`` and ``namespace``, the process, ``started`` being NULL if its death cannot
  be seen; ``endpoints``, one per line, and the rest as announced.

A renewal changes ``expires`` only, not the epoch. A change of a member gives it the next epoch, so what has
changed since an epoch is one indexed read, and a row whose token is NULL tells that the member has gone.
"""

from __future__ import annotations

import fcntl
import logging
import math
import os
import random
import sqlite3
import stat
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, final

from zmqcore.errors import MatchmakerError
from zmqcore.matchmaker.base import Backend, Busy, Registration, Update, path_in
from zmqcore.matchmaker.member import Member
from zmqcore.matchmaker.process import boot_id, lives, namespace, start_time
from zmqcore.runtime_dir import private_directory, runtime_directory
from zmqcore.topic import Topic

__all__ = ["FILE_NAME", "LocalBackend"]

logger = logging.getLogger("zmqcore.matchmaker")

FILE_NAME: Final = "members.sqlite3"
_FORMAT: Final = 1
#: "zmqc", so that ``file`` and we ourselves can tell whose database it is.
_APPLICATION_ID: Final = 0x7A6D7163
#: How long, in seconds, a hook waits for others who write; each holds the lock for well under a millisecond. Whoever
#: uses the matchmaker waits meanwhile, and so does a fork: who has reason to wait for longer tries again.
_BUSY_TIMEOUT: Final = 0.01
#: How long, in seconds, to try to make a registry, or to open one that others make.
_MAKING_TIMEOUT: Final = 5.0
#: How many changes a reader may lag behind before it has to read everything; traces of gone members are kept
#: between one and two times as long.
_HISTORY: Final = 1000
#: Somebody looks for dead processes this often, in seconds; a little less than a turn, so that none is
#: skipped.
_SWEEP_INTERVAL: Final = 0.08
#: Processes looked at per turn, about 10 µs each: a turn stays in the low milliseconds.
_CHECKS_PER_TURN: Final = 256

_SCHEMA: Final = f"""
    PRAGMA application_id = {_APPLICATION_ID};
    PRAGMA user_version = {_FORMAT};
    CREATE TABLE registry (epoch INTEGER NOT NULL, horizon INTEGER NOT NULL, boot TEXT NOT NULL);
        CREATE TABLE member (
        topic TEXT NOT NULL, server TEXT NOT NULL, instance TEXT NOT NULL,
        epoch INTEGER NOT NULL, token TEXT, expires REAL, ttl REAL,
        pid INTEGER, started INTEGER, namespace TEXT,
        endpoints TEXT, host TEXT, capacity INTEGER, version TEXT, public_key TEXT,
        PRIMARY KEY (topic, server, instance)
    ) WITHOUT ROWID;
    CREATE INDEX member_by_epoch ON member (topic, epoch);
    CREATE INDEX member_by_expiry ON member (expires) WHERE token IS NOT NULL;
"""

_STALE_SUFFIXES: Final = ("-wal", "-shm", "-journal")
_TOMBSTONE: Final = (
    "token = NULL, expires = NULL, ttl = NULL, pid = NULL, started = NULL, namespace = NULL,"
    " endpoints = NULL, host = NULL, capacity = NULL, version = NULL, public_key = NULL"
)
_COLUMNS: Final = "server, instance, token, endpoints, host, pid, capacity, version, public_key"
#: pid, and when it started in ticks since boot: together they outlast the reuse of pids.
_Process = tuple[int, int]

#: Connections that came through a fork without our hooks. Closing one would disturb the parent's locks.
_abandoned: list[sqlite3.Connection] = []


@final
class LocalBackend(Backend):
    """The registry in ``directory``, or in :func:`~zmqcore.runtime_dir.runtime_directory` if that is
    ``None``.

    Directory and file must belong to this user alone. Expired members are removed by whoever looks next, or, while
    another process holds the lock for writing, left out by who reads.
    Members whose process has died are removed within a turn by one of those that watch: the sweep is stamped
    on a file, so that a hundred watchers do not look at a hundred processes each. Where the system cannot
    tell that a process has died (no ``/proc``, another pid namespace), the lease alone decides.

    A connection must not live through a fork, not even unused: SQLite's own bookkeeping of file locks would
    be inherited and be wrong. So it is closed before, and each side opens its own when it next needs one.
    """

    def __init__(self, directory: Path | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._wanted = directory
        self._clock = clock
        self._path = Path()
        self._open_connection: sqlite3.Connection | None = None
        #: Device and inode of the registry last used; another one means that it was deleted and made anew.
        self._identity: tuple[int, int] | None = None
        self._processes: list[_Process] = []
        self._processes_epoch = 0

    # -- the connection -----------------------------------------------------------------------------------

    def connect(self) -> bool:
        if self._open_connection is not None:
            if _identity(self._path) == self._identity:
                return False
            # Deleted, or replaced: what is open is no longer what others see.
            self.disconnect()
        directory = runtime_directory() if self._wanted is None else private_directory(self._wanted)
        self._path = directory / FILE_NAME
        deadline = time.monotonic() + _MAKING_TIMEOUT
        while True:
            identity = self._check_file()
            self._open()
            if _identity(self._path) == identity:
                break
            # Replaced between the two: which of them is open cannot be told.
            self.disconnect()
            if time.monotonic() > deadline:
                raise MatchmakerError(f"the registry {self._path} keeps vanishing while it is opened")
        before, self._identity = self._identity, identity
        return before != identity

    def _check_file(self) -> tuple[int, int]:
        """Make the file if there is none, and return which one it is once it is known to be this user's
        alone."""
        try:
            try:
                found = self._path.lstat()
            except FileNotFoundError:
                self._create()
                found = self._path.lstat()
        except OSError as exc:
            raise MatchmakerError(f"the registry {self._path} cannot be made: {exc}") from exc
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise MatchmakerError(
                f"the registry {self._path} must be a file of this user's alone, mode 0600, but has owner uid"
                f" {found.st_uid}, mode {stat.filemode(found.st_mode)}; delete it, members register again"
            )
        return found.st_dev, found.st_ino

    def _create(self) -> None:
        """Put a complete registry in place in one step: nobody ever opens a half-made one."""
        with _exclusive(self._path.with_suffix(".lock")):
            if _identity(self._path) is not None:
                return
            handle, name = tempfile.mkstemp(prefix=".members-", dir=self._path.parent)  # mode 0600
            os.close(handle)
            made = Path(name)
            try:
                with self._errors():
                    connection = sqlite3.connect(made, isolation_level=None)
                    try:
                        connection.execute("PRAGMA journal_mode = WAL")
                        connection.executescript(_SCHEMA)
                        connection.execute("INSERT INTO registry VALUES (1, 0, ?)", (boot_id(),))
                    finally:
                        connection.close()
                # Left by a registry that was deleted without them, they would be played into the new one.
                for suffix in _STALE_SUFFIXES:
                    Path(f"{self._path}{suffix}").unlink(missing_ok=True)
                made.rename(self._path)
            finally:
                for suffix in ("", *_STALE_SUFFIXES):
                    Path(f"{made}{suffix}").unlink(missing_ok=True)

    def _open(self) -> None:
        with self._errors():
            # mode=rw: never create. What SQLite made here would have neither our mode nor our tables.
            connection = sqlite3.connect(
                f"{self._path.as_uri()}?mode=rw",
                uri=True,
                timeout=_BUSY_TIMEOUT,
                isolation_level=None,
                # The session lets in one thread at a time.
                check_same_thread=False,
            )
            self._open_connection = connection
            # Survives a crash of the process and of the host undamaged; what the host's crash loses is void
            # anyway.
            connection.execute("PRAGMA synchronous = NORMAL")
            (application,) = connection.execute("PRAGMA application_id").fetchone()
            (version,) = connection.execute("PRAGMA user_version").fetchone()
        if (application, version) != (_APPLICATION_ID, _FORMAT):
            self.disconnect()
            what = f"has format {version}" if application == _APPLICATION_ID else "is no registry of zmqcore"
            raise MatchmakerError(
                f"{self._path} {what}; this version reads and writes format {_FORMAT}. Let all processes use"
                " one version of zmqcore and delete the file, or use another one (local:///path/to/directory)"
            )
        self._processes_epoch = 0
        self._forget_other_boots()

    def _forget_other_boots(self) -> None:
        boot = boot_id()
        with self._errors():
            (found,) = self._connection.execute("SELECT boot FROM registry").fetchone()
        if found != boot:
            with self._writing() as connection:
                # Looked at again: another process may have been faster, and members have registered since.
                if connection.execute("UPDATE registry SET boot = ? WHERE boot <> ?", (boot, boot)).rowcount:
                    self._bury("1")
            logger.info("the registry %s was left by an earlier boot of this host: emptied", self._path)
        elif not boot:
            # The clock began anew: what claims to live for longer than a lease does is from before that.
            impossible, now = "expires > ? + ttl", self._clock()
            with self._errors():
                found = self._connection.execute(
                    f"SELECT 1 FROM member WHERE {impossible}", (now,)
                ).fetchone()
            if found:
                with self._writing():
                    self._bury(impossible, now)

    @property
    def _connection(self) -> sqlite3.Connection:
        if self._open_connection is None:
            raise MatchmakerError(f"the registry {self._path} is not open")
        return self._open_connection

    def disconnect(self) -> None:
        connection, self._open_connection = self._open_connection, None
        if connection is not None:
            try:
                connection.close()
            except sqlite3.Error as exc:
                logger.debug("closing the registry %s: %s", self._path, exc)

    def quiesce(self) -> None:
        self.disconnect()

    def abandon(self) -> None:
        if self._open_connection is not None:
            _abandoned.append(self._open_connection)
            self._open_connection = None

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn what SQLite raises into a MatchmakerError that says what to do, and start afresh after it."""
        try:
            yield
        except sqlite3.Error as exc:
            # The lower byte is the primary code, the rest tells variants apart (sqlite.org/rescode.html).
            code = getattr(exc, "sqlite_errorcode", 0) & 0xFF
            connection = self._open_connection
            if code in _BUSY_CODES and connection is not None and not connection.in_transaction:
                raise Busy(f"the registry {self._path} is locked by another process: {exc}") from exc
            self.disconnect()
            if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                raise MatchmakerError(_damaged(self._path, exc)) from exc
            raise MatchmakerError(f"the registry {self._path} cannot be used: {exc}") from exc

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that has the write lock from its start, so that it never has to be given up half
        way."""
        with self._errors():
            connection = self._connection
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")

    # -- writing ------------------------------------------------------------------------------------------

    def _next_epoch(self) -> int:
        """Count a change; inside of a transaction."""
        connection = self._connection
        connection.execute("UPDATE registry SET epoch = epoch + 1")
        epoch, horizon = connection.execute("SELECT epoch, horizon FROM registry").fetchone()
        if epoch - horizon > 2 * _HISTORY:
            horizon = epoch - _HISTORY
            connection.execute("DELETE FROM member WHERE token IS NULL AND epoch <= ?", (horizon,))
            connection.execute("UPDATE registry SET horizon = ?", (horizon,))
        return int(epoch)

    def _bury(self, condition: str, *values: object) -> int:
        """Mark members as gone; inside of a transaction. The epoch grows only if there are any."""
        where = f"token IS NOT NULL AND {condition}"
        changed = self._connection.execute(
            f"UPDATE member SET {_TOMBSTONE}, epoch = (SELECT epoch + 1 FROM registry) WHERE {where}", values
        ).rowcount
        if changed:
            self._next_epoch()
        return changed

    def _put(self, registration: Registration) -> None:
        member = registration.member
        here = namespace()
        # Of another process this one cannot say when it started, only when it is looked at.
        started = start_time(member.pid) if here and member.pid == os.getpid() else None
        self._connection.execute(
            "INSERT OR REPLACE INTO member VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                str(member.topic.group),
                member.server,
                member.instance,
                self._next_epoch(),
                registration.token,
                self._clock() + registration.ttl,
                registration.ttl,
                member.pid,
                started,
                here,
                "\n".join(member.endpoints),
                member.host,
                member.capacity,
                member.version,
                member.public_key,
            ),
        )

    def register(self, registration: Registration) -> None:
        with self._writing():
            self._put(registration)

    def renew(self, registrations: Sequence[Registration]) -> Sequence[Registration]:
        replaced = []
        with self._writing() as connection:
            for registration in registrations:
                key = _key(registration)
                if connection.execute(
                    f"UPDATE member SET expires = ? WHERE {_KEY} AND token = ?",
                    (self._clock() + registration.ttl, *key, registration.token),
                ).rowcount:
                    continue
                row = connection.execute(f"SELECT token FROM member WHERE {_KEY}", key).fetchone()
                if row is None or row[0] is None:
                    self._put(registration)
                else:
                    replaced.append(registration)
        return replaced

    def delete(self, registrations: Sequence[Registration]) -> None:
        with self._writing():
            for registration in registrations:
                self._bury(f"{_KEY} AND token = ?", *_key(registration), registration.token)

    def raise_epoch(self, floor: int) -> int:
        with self._writing() as connection:
            connection.execute("UPDATE registry SET epoch = max(epoch, ?)", (floor,))
            (epoch,) = connection.execute("SELECT epoch FROM registry").fetchone()
        return int(epoch)

    # -- reading ------------------------------------------------------------------------------------------

    def refresh(self) -> int:
        epoch, soonest = self._glance()
        now = self._clock()
        expired = soonest is not None and soonest <= now
        dead = self._dead_processes(epoch)
        self.unburied = False
        if not expired and not dead:
            return epoch
        try:
            with self._writing():
                changed = self._bury("expires <= ?", now)
                for pid, started in dead:
                    changed += self._bury(
                        "pid = ? AND started = ? AND namespace = ?", pid, started, namespace()
                    )
        except Busy:
            # Who reads must not wait for who writes: next time, then, or somebody else does it.
            self.unburied = expired
            return epoch
        return self._glance()[0] if changed else epoch

    def _glance(self) -> tuple[int, float | None]:
        with self._errors():
            epoch, soonest = self._connection.execute(
                "SELECT epoch, (SELECT min(expires) FROM member WHERE token IS NOT NULL) FROM registry"
            ).fetchone()
            return epoch, soonest

    def _dead_processes(self, epoch: int) -> list[_Process]:
        here = namespace()
        if not here:
            return []
        # A stamp for each namespace: from one, the processes of another cannot be looked at.
        if not _is_our_turn(self._path.with_suffix(f".{zlib.crc32(here.encode()):08x}.swept")):
            return []
        if self._processes_epoch != epoch:
            with self._errors():
                self._processes = self._connection.execute(
                    "SELECT DISTINCT pid, started FROM member"
                    " WHERE token IS NOT NULL AND started IS NOT NULL AND namespace = ?",
                    (here,),
                ).fetchall()
            self._processes_epoch = epoch
        looked_at = self._processes
        if len(looked_at) > _CHECKS_PER_TURN:
            looked_at = random.sample(looked_at, _CHECKS_PER_TURN)
        return [(pid, started) for pid, started in looked_at if not lives(pid, started)]

    def read(self, group: Topic, since: int) -> Update:
        with self._errors():
            connection = self._connection
            # One transaction, so that epoch and rows are of one moment.
            connection.execute("BEGIN")
            try:
                epoch, horizon = connection.execute("SELECT epoch, horizon FROM registry").fetchone()
                complete = since == 0 or since < horizon or self.unburied
                which = "epoch > ?"
                value: float = since
                if complete:
                    which = "token IS NOT NULL AND expires > ?"
                    value = self._clock() if self.unburied else -math.inf
                rows = connection.execute(
                    f"SELECT {_COLUMNS} FROM member WHERE topic = ? AND {which}", (str(group), value)
                ).fetchall()
            finally:
                connection.execute("COMMIT")
        try:
            records = {(row[0], row[1]): _member(group, row) for row in rows}
        except (AttributeError, TypeError, ValueError) as exc:
            raise MatchmakerError(_damaged(self._path, exc)) from exc
        return Update(epoch, complete, records)

    def groups(self) -> list[Topic]:
        with self._errors():
            rows = self._connection.execute(
                "SELECT DISTINCT topic FROM member WHERE token IS NOT NULL AND expires > ?", (self._clock(),)
            ).fetchall()
        return [Topic.parse(text) for (text,) in rows]


_KEY: Final = "topic = ? AND server = ? AND instance = ?"
_BUSY_CODES: Final = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL)


def _key(registration: Registration) -> tuple[str, str, str]:
    member = registration.member
    return str(member.topic.group), member.server, member.instance


def _member(group: Topic, row: Any) -> Member | None:
    server, instance, token, endpoints, host, pid, capacity, version, public_key = row
    if token is None:
        return None
    return Member(
        Topic(group.name, server, group.exchange),
        tuple(endpoints.split("\n")),
        instance,
        host,
        pid,
        capacity,
        version,
        public_key,
    )


def _damaged(path: Path, exc: Exception) -> str:
    return (
        f"the registry {path} is damaged ({exc}); delete it. Nothing need be stopped: members register again"
        " by themselves when their leases are next renewed"
    )


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Hold the lock of a file for a moment, against other processes and other threads."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + _MAKING_TIMEOUT
        while True:
            try:
                # flock, not lockf: that one does not keep out another thread.
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as exc:
                if time.monotonic() > deadline:
                    raise MatchmakerError(
                        f"another process has held {path} for over {_MAKING_TIMEOUT:g} s; is it stopped?"
                    ) from exc
                time.sleep(0.005)
        yield
    finally:
        os.close(handle)


def _is_our_turn(stamp: Path) -> bool:
    """Whether nobody has swept for a while; if so, say that we do.

    Two may find so at once and both sweep: that costs a little and breaks nothing. A lock would be held by a
    process that may be stopped.
    """
    now = time.monotonic_ns()
    try:
        if 0 <= now - stamp.stat().st_mtime_ns < _SWEEP_INTERVAL * 1e9:
            return False
        os.utime(stamp, ns=(now, now))
    except OSError:
        try:
            stamp.touch(mode=0o600)
        except OSError as exc:
            logger.debug("%s cannot be stamped: %s", stamp, exc)
    return True


def from_url(url: str) -> LocalBackend:
    return LocalBackend(path_in(url))
