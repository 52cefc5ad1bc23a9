"""``zmqcore serve``: any module, class or object as a server."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Self

import click

from zmqcore import Node, Server, Topic
from zmqcore.cli.options import Command, exchange_option, json_option, matchmaker_option
from zmqcore.cli.outcome import EXIT_CODES_HELP, Exit
from zmqcore.cli.output import Output, note
from zmqcore.endpoint import Endpoint

__all__ = ["NotServable", "load_endpoint", "serve"]


class NotServable(click.UsageError):
    """MODULE:OBJECT names nothing that can be served; the text says why."""


def load_endpoint(target: str) -> Any:
    """Import *target*, ``MODULE:OBJECT`` or ``MODULE``, and return the object to serve.

    A class is instantiated without arguments; a function is served under its own name; a module serves its
    public functions; everything else is served as it is. OBJECT may be dotted (``module:Outer.Inner``).

    Raises:
        NotServable: there is no such module or object, or a class cannot be made without arguments. What the
        module
            itself raises while it is imported is passed on.
    """
    module_name, colon, path = target.partition(":")
    if not module_name or (colon and not path) or module_name.endswith(".py") or "/" in module_name:
        raise NotServable(
            f"{target!r} is not MODULE:OBJECT; for stock.py with a class Stock in it write: stock:Stock"
        )
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as exc:
        # A module that the wanted one imports may be what is missing: that is for the user to see as it is.
        if exc.name is None or not (module_name + ".").startswith(exc.name + "."):
            raise
        raise NotServable(
            f"there is no module {exc.name!r}; it is looked for in {Path.cwd()} and in what is installed for "
            f"{sys.executable}"
        ) from exc
    for name in path.split(".") if path else ():
        try:
            found = getattr(found, name)
        except AttributeError as exc:
            public = ", ".join(sorted(each for each in vars(found) if not each.startswith("_"))[:12])
            raise NotServable(
                f"{module_name} has no {path!r}" + (f"; it has {public}" if public else "")
            ) from exc
    if inspect.isclass(found):
        try:
            inspect.signature(found).bind()
        except TypeError as exc:
            raise NotServable(
                f"{target} cannot be made without arguments ({exc}); name an object of it instead"
            ) from exc
        except ValueError:
            pass  # a class of an extension module may have no signature; then one sees when it is called
        return found()
    if inspect.isroutine(found):
        return {found.__name__: found}
    return found


class _Ended(Exception):
    """A second signal came while the server was draining."""


class _Signals:
    """The first SIGINT or SIGTERM asks to stop, the next one interrupts the main thread wherever it is.

    Context manager, for the main thread only; the handlers that were there before come back at the end.
    """

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.number = 0
        self._before: dict[int, Any] = {}

    def _received(self, number: int, frame: FrameType | None) -> None:
        del frame
        again = self.asked.is_set()
        self.number = number
        self.asked.set()
        if again:
            raise _Ended

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._received)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _end_now(number: int) -> NoReturn:
    """End the process at once; Python would wait for the threads of handlers that still run."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(128 + number)


class _SocketFiles:
    """The files of the ipc sockets that a server has bound: libzmq leaves them where they are."""

    def __init__(self) -> None:
        self._bound: dict[Path, int] = {}

    def add(self, endpoints: Iterable[str]) -> None:
        """Remember the files of these endpoints, which are bound now."""
        for endpoint in map(Endpoint.parse, endpoints):
            if endpoint.is_local_ipc and endpoint.path.startswith("/"):  # not @name, which is no file
                self._bound[Path(endpoint.path)] = Path(endpoint.path).stat().st_ino

    def remove(self) -> None:
        """Remove those that are still ours: a server that was started meanwhile may have bound one anew."""
        for path, inode in self._bound.items():
            with contextlib.suppress(OSError):
                if path.stat().st_ino == inode:
                    path.unlink()


@contextlib.contextmanager
def _in_path(directory: str) -> Iterator[None]:
    """Look for modules in *directory* first, as ``python -m`` does."""
    sys.path.insert(0, directory)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(directory)


@click.command(
    cls=Command,
    short_help="Serve a module, class or object under a topic.",
    help=f"""Serve the public methods of MODULE:OBJECT (names without a leading underscore) under a topic.

\b
OBJECT may be
    a class       made once, without arguments
    an object     such as one that the module has set up
    a function    served under its own name
    left out      the module's own functions

The current directory is searched for MODULE first. One server may be one of many under the same topic: start
it again, here or elsewhere, and clients spread their calls over all.

\b
Examples:
    zmqcore serve stock:Inventory --topic inventory
    zmqcore serve statistics --topic stats --workers 8
    zmqcore serve stock:shop --topic inventory --server host-3 --bind 'tcp://0.0.0.0:5555'

Without --bind it listens on ipc and on tcp on the loopback device, where only this machine reaches it.

Ctrl-C or SIGTERM ends it cleanly: no new work is taken, what runs is finished (at most --drain seconds), and
clients go elsewhere; exit code 0. A second one ends it at once.

{EXIT_CODES_HELP}""",
)
@click.argument("target", metavar="MODULE:OBJECT")
@click.option("--topic", required=True, metavar="NAME", help="The topic under which clients find it.")
@click.option(
    "--server", "-s", metavar="NAME", help="This member's own name. Default: made from host and process."
)
@exchange_option
@click.option(
    "--bind",
    "-b",
    multiple=True,
    metavar="ENDPOINT",
    help="Listen here: tcp://HOST:PORT (port * takes a free one) or ipc:///PATH. Repeat it for several.",
)
@click.option(
    "--workers",
    "-w",
    type=click.IntRange(min=0),
    default=4,
    show_default=True,
    help="Threads that run methods; 0 runs them where they are received: fastest, for short methods.",
)
@click.option(
    "--drain",
    type=click.FloatRange(min=0),
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="How long the end may wait for methods that still run.",
)
@click.option("--verbose", "-v", count=True, help="Log to standard error; twice for more.")
@matchmaker_option
@json_option
def serve(
    target: str,
    topic: str,
    server: str | None,
    exchange: str,
    bind: tuple[str, ...],
    workers: int,
    drain: float,
    verbose: int,
    matchmaker: str,
    json_wanted: bool | None,
) -> int:
    """Run ``zmqcore serve``."""
    logging.basicConfig(
        level=(logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)],
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    output = Output(json_wanted)
    files = _SocketFiles()
    # Signals first: one that comes while the module is imported must not leave a traceback.
    with _Signals() as signals, _in_path(str(Path.cwd())):
        try:
            endpoint = _imported(target)
        except _Ended:
            _end_now(signals.number)
        with Node(matchmaker=matchmaker) as node:
            running = Server(
                Topic(topic, exchange=exchange),
                endpoint,
                node=node,
                server=server,
                workers=workers,
                bind=list(bind) or None,
            )
            try:
                running.start()
                files.add(running.endpoints)
                _announce(output, running, topic)
                # Python runs signal handlers between two waits of the main thread, so this ends at once.
                signals.asked.wait()
                if not output.machine:
                    output.line("stopping: finishing what runs; once more to stop at once", style="yellow")
                finished = running.stop(drain=True, timeout=drain)
            except _Ended:
                # Before the node is closed, which would wait for a port that stop() may not have closed yet.
                files.remove()
                _end_now(signals.number)
            files.remove()
            if not finished:
                note(f"some methods were still running after {drain:g} s; their callers get an error")
                _end_now(signals.number)
    return Exit.OK


def _imported(target: str) -> Any:
    """Return what *target* names; what its module raises is shown as the user's own fault."""
    try:
        return load_endpoint(target)
    except (click.ClickException, _Ended):
        raise
    except Exception as exc:
        traceback.print_exception(exc)
        raise NotServable(f"{target} cannot be imported: {type(exc).__name__}: {exc}") from exc


def _announce(output: Output, server: Server, topic: str) -> None:
    """Print where *server* listens, as soon as it can be called."""
    member = server.member
    if output.machine:
        output.json(
            {
                "event": "listening",
                "topic": topic,
                "server": member.topic.server,
                "instance": member.instance,
                "pid": os.getpid(),
                "endpoints": list(server.endpoints),
            }
        )
        return
    output.line(f"serving {topic} as {member.topic.server}, process {os.getpid()}", style="bold green")
    for endpoint in server.endpoints:
        output.line(f"  {endpoint}")
    output.line("Ctrl-C ends it", style="dim")
