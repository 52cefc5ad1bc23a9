"""What a failure means at the command line: its exit code, and what the user can do about it."""

from __future__ import annotations

import errno
from enum import IntEnum

from zmqcore import errors

__all__ = ["EXIT_CODES_HELP", "Exit", "exit_codes_help", "hint_for", "status_of"]


class Exit(IntEnum):
    """The exit codes. Part of the interface: a number never changes its meaning."""

    OK = 0
    REMOTE_ERROR = 1
    USAGE = 2
    NOBODY_THERE = 3
    DEADLINE = 4
    PARTLY = 5
    BROKEN = 6
    INTERNAL = 70  # EX_SOFTWARE of sysexits.h
    INTERRUPTED = 130  # 128 + SIGINT, as shells count


_MEANINGS = {
    Exit.OK: "done",
    Exit.REMOTE_ERROR: """the server answered with an error: the method raised, does not exist,
       or does not take these arguments""",
    Exit.USAGE: "the command line is wrong; nothing was sent",
    Exit.NOBODY_THERE: "nobody serves the topic, or it cannot be reached, or it was lost",
    Exit.DEADLINE: "no answer in time (--timeout)",
    Exit.PARTLY: "some members failed, or some results are missing or wrong",
    Exit.BROKEN: "something is broken here: the matchmaker, the installation, a limit",
    Exit.INTERNAL: "a fault of zmqcore itself; please report it",
    Exit.INTERRUPTED: "interrupted (143 if by SIGTERM)",
}


def exit_codes_help(*own: Exit) -> str:
    """Return what the help says of the exit codes that a command has: *own*, and those that every command has."""
    every = {Exit.OK, Exit.USAGE, Exit.BROKEN, Exit.INTERNAL, Exit.INTERRUPTED}
    lines = (f"{code:5}  {meaning}\n" for code, meaning in _MEANINGS.items() if code in every.union(own))
    return "\b\nExit codes:\n" + "".join(lines)


EXIT_CODES_HELP = exit_codes_help(*Exit)

# The first class that fits counts, so a class stands before its bases.
_OUTCOMES: tuple[tuple[type[BaseException], Exit, str], ...] = (
    (errors.RemoteError, Exit.REMOTE_ERROR, ""),
    (
        errors.NoSuchMethod,
        Exit.REMOTE_ERROR,
        "`zmqcore call {topic} zmqcore.methods` lists the methods that the server has",
    ),
    (
        errors.BadArguments,
        Exit.REMOTE_ERROR,
        "`zmqcore call {topic} zmqcore.methods` shows the signatures; NAME=VALUE is a keyword argument",
    ),
    (errors.InvalidTopic, Exit.USAGE, "a topic is a name such as inventory"),
    (
        errors.InvalidEndpoint,
        Exit.USAGE,
        "an endpoint looks like tcp://127.0.0.1:5555 (to listen, tcp://127.0.0.1:*) or ipc:///run/user/1000/name",
    ),
    (errors.PayloadTooLarge, Exit.USAGE, "send less at once, or raise the limits on both sides"),
    (
        errors.NoSuchTopic,
        Exit.NOBODY_THERE,
        "`zmqcore members` lists who serves what; is the server running, and with the same --matchmaker?",
    ),
    (
        errors.Unreachable,
        Exit.NOBODY_THERE,
        "is the server running, and is the address right? `zmqcore members {topic}` shows what is registered",
    ),
    (
        errors.PeerLost,
        Exit.NOBODY_THERE,
        "the server went away after it had been asked; the method may have been run",
    ),
    (
        errors.Overloaded,
        Exit.NOBODY_THERE,
        "the server takes no more work now; try again, or start more members",
    ),
    (
        errors.ProtocolError,
        Exit.NOBODY_THERE,
        "is it a zmqcore server of the same protocol version that listens there?",
    ),
    (
        errors.PoolExhausted,
        Exit.BROKEN,
        "`zmqcore doctor` shows the budget of sockets and where it comes from",
    ),
    (errors.DeadlineExceeded, Exit.DEADLINE, "give it longer with --timeout SECONDS, or look at the server"),
    (
        errors.MatchmakerError,
        Exit.BROKEN,
        "`zmqcore doctor` looks at the matchmaker; --matchmaker chooses another",
    ),
    (
        errors.InternalError,
        Exit.INTERNAL,
        "this is a fault of zmqcore: please report it with the output of `zmqcore doctor --json`",
    ),
    (errors.Closed, Exit.INTERNAL, "this is a fault of the command: please report it"),
)


_BIND_ERRNOS = frozenset({errno.EADDRINUSE, errno.EADDRNOTAVAIL})


def status_of(error: BaseException) -> Exit:
    """Return the exit code for *error*; :attr:`Exit.INTERNAL` for what is not expected at all."""
    for kind, status, _hint in _OUTCOMES:
        if isinstance(error, kind):
            return status
    return Exit.BROKEN if isinstance(error, (errors.ZmqcoreError, OSError)) else Exit.INTERNAL


def hint_for(error: BaseException, topic: str = "TOPIC") -> str:
    """Return one sentence that says what to do about *error*, or an empty text if there is none to give."""
    if isinstance(error, errors.PeerLost) and not error.executed_possible:
        return "the server went away before the method was run; it is safe to try again"
    for kind, _status, hint in _OUTCOMES:
        if isinstance(error, kind):
            return hint.replace("{topic}", topic)
    if isinstance(error, OSError) and error.errno in _BIND_ERRNOS:
        return "choose another address with --bind; tcp://127.0.0.1:* takes a free port"
    return ""
