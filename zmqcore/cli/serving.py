"""``zmqcore serve``: any module, class or object as a server."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Self

import click

from zmqcore import Node, Server, ServerProcesses, Topic, errors
from zmqcore.cli.options import (
    Command,
    count_option,
    exchange_option,
    json_option,
    matchmaker_option,
    seconds_option,
)
from zmqcore.cli.outcome import Exit, exit_codes_help
from zmqcore.cli.output import Output, note
from zmqcore.rpc.loop_server import LoopServer, server_for
from zmqcore.rpc.target import NotServable, load_endpoint

__all__ = ["serve"]

_logger = logging.getLogger("zmqcore.server")


class _Ended(Exception):
    """A second signal came while the server was draining."""


class _Signals:
    """The first SIGINT or SIGTERM asks to stop, the next one interrupts the main thread wherever it is.

    ``hangup`` is called for a SIGHUP, if given. Context manager, for the main thread only; the handlers that were there
    before come back at the end.
    """

    def __init__(self, hangup: Callable[[], object] | None = None) -> None:
        self._hangup = hangup
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
        if (hangup := self._hangup) is not None:
            self._before[signal.SIGHUP] = signal.signal(signal.SIGHUP, lambda *_: hangup())
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

If there are coroutine functions among the methods, all run on an event loop; else --workers threads run them.

The current directory is searched for MODULE first. One server may be one of many under the same topic: start
it again, here or elsewhere, and clients spread their calls over all. --processes starts several at once, each with
its own --workers, and starts again those that die.

\b
Examples:
    zmqcore serve stock:Inventory --topic inventory
    zmqcore serve statistics --topic stats --workers 8
    zmqcore serve stock:Inventory --topic inventory --processes 4 --workers 1
    zmqcore serve stock:shop --topic inventory --server host-3 --bind 'tcp://0.0.0.0:5555'

Without --bind it listens on ipc and on tcp on the loopback device, where only this machine reaches it.

Ctrl-C or SIGTERM ends it cleanly: no new work is taken, what runs is finished (at most --drain seconds), and
clients go elsewhere; exit code 0. A second one ends it at once. With --processes, SIGHUP replaces one process
after the other, so that the topic is served all the time.

{exit_codes_help()}""",
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
    help="Listen here: tcp://HOST:PORT (port * takes a free one), ipc:///PATH or ipc://*. Repeat it for several.",
)
@count_option(
    "--workers",
    "-w",
    least=0,
    default=4,
    help="Threads that run methods; 0 runs them where they are received: fastest, for short methods.",
)
@count_option(
    "--max-concurrency",
    default=1024,
    unit="COROUTINES",
    help="How many coroutines run at a time, if there are coroutine functions among the methods.",
)
@count_option("--queue-size", default=1024, unit="REQUESTS", help="How many requests may wait for a worker.")
@click.option(
    "--on-full",
    type=click.Choice(["wait", "reject"]),
    default="wait",
    show_default=True,
    help="When so many wait: stop reading until there is room, or answer further calls by Overloaded at once.",
)
@count_option(
    "--processes",
    "-p",
    help="Serve in so many processes, and start again those that die. Default: in this process.",
)
@seconds_option(
    "--liveness",
    default=5.0,
    least=0.1,
    most=86_400.0,
    help="After how long a client that is cut off is let go, and a server that a method calls is lost.",
)
@seconds_option("--drain", default=10.0, help="How long the end may wait for methods that still run.")
@click.option("--verbose", "-v", count=True, help="Log to standard error; twice for more.")
@matchmaker_option
@json_option
def serve(
    target: str,
    topic: str,
    exchange: str,
    matchmaker: str,
    processes: int | None,
    liveness: float,
    drain: float,
    verbose: int,
    json_wanted: bool | None,
    **options: Any,
) -> int:
    """Run ``zmqcore serve``; ``options`` are the server's own, by the names that it has for them."""
    log_level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    logging.basicConfig(level=log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if options["on_full"] == "reject" and not options["workers"]:
        raise click.UsageError(
            "--on-full reject needs --workers 1 at least: without workers there is no queue"
        )
    output = Output(json_wanted)
    options["bind"] = options["bind"] or None
    node = {"liveness": liveness}
    full = Topic(topic, exchange=exchange)
    with _in_path(str(Path.cwd())):
        if processes is None:
            return _serve_here(output, full, target, matchmaker, node, drain, options)
        several = ServerProcesses(
            full,
            target,
            processes=processes,
            matchmaker=matchmaker,
            node=node,
            drain_timeout=drain,
            log_level=log_level,
            **options,
        )
        return _serve_in_processes(output, several, drain)


def _serve_here(
    output: Output,
    topic: Topic,
    target: str,
    matchmaker: str,
    node_options: dict[str, Any],
    drain: float,
    options: dict[str, Any],
) -> int:
    """Serve in this process until a signal comes."""
    # Signals first: one that comes while the module is imported must not leave a traceback.
    with _Signals() as signals:
        try:
            endpoint = _imported(target)
        except _Ended:
            _end_now(signals.number)
        with Node(matchmaker, **node_options) as node:
            running = server_for(topic, endpoint, node, **options)
            try:
                running.start()
                _announce(output, running)
                # Python runs signal handlers between two waits of the main thread, so this ends at once.
                signals.asked.wait()
                _say_it_stops(output)
                finished = running.stop(drain=True, timeout=drain)
            except _Ended:
                # Before the node is closed, which would wait for a port that stop() may not have closed yet.
                running.remove_files()
                _end_now(signals.number)
            if not finished:
                running.remove_files()
                _note_unfinished(drain)
                _end_now(signals.number)
    return Exit.OK


def _serve_in_processes(output: Output, several: ServerProcesses, drain: float) -> int:
    """Serve in other processes until a signal comes; replace them at SIGHUP."""

    def replace() -> None:
        try:
            several.restart(drain)
        except errors.Closed:
            pass
        except Exception:
            _logger.exception("the processes that have not been replaced go on")

    def hangup() -> None:
        threading.Thread(target=replace, name="zmqcore-restart", daemon=True).start()

    with _Signals(hangup) as signals:
        try:
            try:
                several.start()
            except NotServable as exc:
                raise click.UsageError(str(exc)) from exc
            _announce_processes(output, several)
            signals.asked.wait()
            _say_it_stops(output)
            finished = several.stop(drain=True, timeout=drain)
        except _Ended:
            several.stop(drain=False, timeout=0.0)
            _end_now(signals.number)
        if not finished:
            _note_unfinished(drain)
            return 128 + signals.number
    return Exit.OK


def _say_it_stops(output: Output) -> None:
    if not output.machine:
        output.line("stopping: finishing what runs; once more to stop at once", style="yellow")


def _note_unfinished(drain: float) -> None:
    note(f"some methods were still running after {drain:g} s; their callers get an error")


def _imported(target: str) -> Any:
    """Return what *target* names; what its module raises is shown as the user's own fault."""
    try:
        return load_endpoint(target)
    except _Ended:
        raise
    except NotServable as exc:
        raise click.UsageError(str(exc)) from exc
    except Exception as exc:
        traceback.print_exception(exc)
        raise click.UsageError(f"{target} cannot be loaded: {type(exc).__name__}: {exc}") from exc


def _announce(output: Output, server: Server | LoopServer) -> None:
    """Print where *server* listens, as soon as it can be called."""
    member = server.member
    if output.machine:
        output.json(
            {
                "event": "listening",
                "topic": server.topic.name,
                "server": member.topic.server,
                "instance": member.instance,
                "pid": os.getpid(),
                "endpoints": list(server.endpoints),
            }
        )
        return
    output.line(
        f"serving {server.topic.name} as {member.topic.server}, process {os.getpid()}", style="bold green"
    )
    for endpoint in server.endpoints:
        output.line(f"  {endpoint}")
    output.line("Ctrl-C ends it", style="dim")


def _announce_processes(output: Output, several: ServerProcesses) -> None:
    """The same for several processes, once all can be called."""
    topic, running = several.topic.name, several.running
    if output.machine:
        output.json({"event": "listening", "topic": topic, "pid": os.getpid(), "processes": list(running)})
        return
    output.line(f"serving {topic} by {len(running)} processes", style="bold green")
    for process in running:
        output.line(f"  {process['server']}, process {process['pid']}: {', '.join(process['endpoints'])}")
    output.line("Ctrl-C ends them; SIGHUP replaces one after the other", style="dim")
