"""The user's private directory for sockets and the local registry."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from zmqcore.errors import MatchmakerError

__all__ = ["private_directory", "runtime_directory"]


def runtime_directory() -> Path:
    """Return the directory that all processes of one user on one host share; it is created if missing.

    ``$ZMQCORE_RUNTIME_DIR`` if set (an absolute path), else ``$XDG_RUNTIME_DIR/zmqcore``, else
    ``<tempdir>/zmqcore-<uid>``. ``$XDG_RUNTIME_DIR`` counts only if it is a directory of this user's: after
    ``su`` it may still name that of another one. Processes find each other only if they agree on this
    directory, so set ``$ZMQCORE_RUNTIME_DIR`` for services that run outside a login session.

    Raises :class:`~zmqcore.errors.MatchmakerError` as :func:`private_directory` does.
    """
    chosen = os.environ.get("ZMQCORE_RUNTIME_DIR")
    if chosen:
        path = Path(chosen)
        if not path.is_absolute():
            raise MatchmakerError(f"ZMQCORE_RUNTIME_DIR={chosen!r} must be an absolute path")
        return private_directory(path)
    session = Path(os.environ.get("XDG_RUNTIME_DIR", ""))
    if session.is_absolute():
        try:
            found = session.stat()
        except OSError:
            pass
        else:
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid():
                return private_directory(session / "zmqcore")
    return private_directory(Path(tempfile.gettempdir(), f"zmqcore-{os.geteuid()}"))


def private_directory(path: Path) -> Path:
    """Create ``path`` (mode 0700) if missing and return it, once it is known to belong to this user alone.

    Whoever can write there could pose as any member. So a symlink, what is not a directory, another owner, or
    any permission for group or others is refused with a :class:`~zmqcore.errors.MatchmakerError` that names
    path, owner and mode; nothing is repaired silently.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError as exc:
        raise MatchmakerError(f"cannot use the runtime directory {path}: {exc.strerror or exc}") from exc
    facts = f"owner uid {found.st_uid}, mode {stat.filemode(found.st_mode)}"
    if stat.S_ISLNK(found.st_mode):
        raise MatchmakerError(f"the runtime directory {path} is a symlink ({facts}); name its target instead")
    if not stat.S_ISDIR(found.st_mode):
        raise MatchmakerError(f"the runtime directory {path} is not a directory ({facts})")
    if found.st_uid != os.geteuid():
        raise MatchmakerError(
            f"the runtime directory {path} belongs to someone else ({facts}; this process runs as uid"
            f" {os.geteuid()}); set ZMQCORE_RUNTIME_DIR to a directory of your own"
        )
    if found.st_mode & 0o077:
        raise MatchmakerError(
            f"the runtime directory {path} is open to others ({facts}); name one that is 0700, or chmod 700 this one"
            " if nobody else needs it"
        )
    return path
