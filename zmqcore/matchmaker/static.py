"""``static:///path/to/members.toml``: a registry that somebody writes by hand.

.. code-block:: toml

    [[member]]
    topic = "inventory"                     # the name; as it stands, not parsed
    server = "a"
    endpoints = ["tcp://10.0.0.1:5555"]
    # optional: exchange, instance, host, capacity, version, public_key
"""

from __future__ import annotations

import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, final

from zmqcore.endpoint import Endpoint
from zmqcore.errors import InvalidEndpoint, InvalidTopic, MatchmakerError
from zmqcore.matchmaker.base import Backend, Key, Registration, Update, path_in
from zmqcore.matchmaker.member import Member
from zmqcore.topic import Topic

__all__ = ["StaticBackend"]

_REQUIRED: Final = {"topic", "server", "endpoints"}
_OPTIONAL: Final[dict[str, type]] = {
    "exchange": str,
    "instance": str,
    "host": str,
    "capacity": int,
    "version": str,
    "public_key": str,
}

#: How long ago a file must have been written to be taken for complete. Above the kernel's tick (10 ms at 100
#: Hz).
_SETTLING_NS: Final = 100_000_000

_Table = dict[Topic, dict[Key, Member]]
#: What tells one state of the file from another, without reading it.
_Signature = tuple[int, int, int, int]


@final
class StaticBackend(Backend):
    """Reads the file again whenever its time, size or inode has changed, a tenth of a second after that.

    A file that is missing or wrong makes the registry unreachable, with an error that names the file and the
    entry; what was known stays. Its epoch is this process's own count of changed readings. A server may
    register what the file lists for its topic and server name (nothing is written, the lease is a formality);
    anything else is refused, since nobody would find it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._signature: _Signature | None = None
        self._table: _Table = {}
        self._changed_at: dict[Topic, int] = {}
        self._epoch = 0

    def connect(self) -> bool:
        try:
            found = self._path.stat()
        except OSError as exc:
            self._signature = None
            raise MatchmakerError(f"cannot read the static registry {self._path}: {exc.strerror}") from exc
        signature = (found.st_mtime_ns, found.st_size, found.st_ino, found.st_dev)
        # Who writes in place empties the file first, and a torn file may well be valid: fewer members. So
        # what has only just changed is left alone until it has settled, unless nothing is known yet.
        settled = abs(time.time_ns() - found.st_mtime_ns) > _SETTLING_NS
        if signature != self._signature and (settled or not self._epoch):
            self._take_in(_load(self._path))
            # Only now: a file that is wrong is read again until it is right. And what was read unsettled is
            # read once more: file times are no finer than the kernel's tick.
            self._signature = signature if settled else None
        return False

    def _take_in(self, table: _Table) -> None:
        changed = [
            group for group in table.keys() | self._table.keys() if table.get(group) != self._table.get(group)
        ]
        if changed or not self._epoch:
            self._epoch += 1
        for group in changed:
            self._changed_at[group] = self._epoch
        self._table = table

    def disconnect(self) -> None:
        pass

    def abandon(self) -> None:
        pass

    def register(self, registration: Registration) -> None:
        topic = registration.member.topic
        if not any(member.topic == topic for member in self._table.get(topic.group, {}).values()):
            raise MatchmakerError(
                f"the static registry {self._path} does not list server {topic.server!r} of topic"
                f" {str(topic.group)!r}; add a [[member]] entry for it, or nobody will find it"
            )

    def renew(self, registrations: Sequence[Registration]) -> Sequence[Registration]:  # noqa: ARG002
        return ()

    def delete(self, registrations: Sequence[Registration]) -> None:
        pass

    def refresh(self) -> int:
        return self._epoch

    def raise_epoch(self, floor: int) -> int:
        self._epoch = max(self._epoch, floor)
        return self._epoch

    def read(self, group: Topic, since: int) -> Update:
        if since and self._changed_at.get(group, 0) <= since:
            return Update(self._epoch, False, {})
        return Update(self._epoch, True, self._table.get(group, {}))

    def groups(self) -> list[Topic]:
        return list(self._table)


def _load(path: Path) -> _Table:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise MatchmakerError(f"cannot read the static registry {path}: {exc}") from exc
    unknown = document.keys() - {"member"}
    entries = document.get("member", [])
    if unknown or not isinstance(entries, list):
        what = ", ".join(sorted(unknown)) or "[member]"
        raise MatchmakerError(f"the static registry {path} may hold [[member]] entries only, not {what}")
    table: _Table = {}
    for number, entry in enumerate(entries, 1):
        try:
            member = _member(entry)
        except (InvalidTopic, InvalidEndpoint, ValueError) as exc:
            raise MatchmakerError(f"the static registry {path}, [[member]] entry {number}: {exc}") from exc
        group = table.setdefault(member.topic.group, {})
        if (member.server, member.instance) in group:
            raise MatchmakerError(
                f"the static registry {path}, [[member]] entry {number}: {member.topic} is there already;"
                " give one of them another instance"
            )
        group[member.server, member.instance] = member
    return table


def _member(entry: Any) -> Member:
    if not isinstance(entry, dict):
        raise ValueError(f"expected a table, not {entry!r}")
    missing, unknown = _REQUIRED - entry.keys(), entry.keys() - _REQUIRED - _OPTIONAL.keys()
    if missing or unknown:
        what = (
            f"{', '.join(sorted(missing))} missing"
            if missing
            else f"unknown key {', '.join(sorted(unknown))}"
        )
        raise ValueError(f"{what}; known are {', '.join(sorted(_REQUIRED | _OPTIONAL.keys()))}")
    for key, kind in {"topic": str, "server": str, **_OPTIONAL}.items():
        # Not isinstance: a TOML boolean would pass for an int.
        if key in entry and type(entry[key]) is not kind:
            raise ValueError(
                f"{key} must be {'text' if kind is str else 'a whole number'}, not {entry[key]!r}"
            )
    listed = entry["endpoints"]
    if not isinstance(listed, list):
        raise ValueError(f"endpoints must be a list of text, not {listed!r}")
    endpoints = tuple(str(Endpoint.parse(text)) for text in listed)
    first = Endpoint.parse(endpoints[0]) if endpoints else None
    return Member(
        topic=Topic(entry["topic"], entry["server"], entry.get("exchange", "")),
        endpoints=endpoints,
        instance=entry.get("instance", "static"),
        host=entry.get("host", first.host if first else ""),
        pid=0,
        capacity=entry.get("capacity", 1),
        version=entry.get("version", ""),
        public_key=entry.get("public_key", ""),
    )


def from_url(url: str) -> StaticBackend:
    path = path_in(url)
    if path is None:
        raise MatchmakerError(f"matchmaker {url!r} names no file; expected static:///path/to/members.toml")
    return StaticBackend(path)
