"""Measure zmqcore beside other ways to call something in another process, all in one run.

::

    make bench-peers                                        # everything: about 8 minutes
    make bench-peers ARGS=--quick                           # a first look: 2 minutes
    make bench-peers ARGS='--peers zmqcore,grpc --tasks call,cast'
    make bench-peers ARGS='--from build/peers.json --write' # tables and plots for README and docs, from a run

A round starts a fresh server and a fresh client process for each peer, runs each task with the peers one right after
the other (in rotated order), and ends the processes. What is printed is the median over the rounds. ``README.md`` here
says what the tasks are and how to add a peer.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import floor
import machine
import usage
from options import some_of
from peers import BROKERS, PEERS, Peer
from peers.brokers import Broker, NoBroker
from peers.report import Figures, print_tables, write_documents
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from zmqcore.cli.bench.processes import PeerFailed, Process, busy_seconds

BENCH = Path(__file__).resolve().parent
MIB = 1 << 20
FANOUT_SERVERS = 8
ENDPOINTS = 500
DESCRIPTORS = 8192
"""What a process may open: 500 connections of libzmq are 1,000 descriptors."""
DEFAULT_JSON = BENCH.parent / "build" / "peers.json"


@dataclasses.dataclass(frozen=True)
class Task:
    """One measurement: a command of the line protocol; ``{s}`` is its duration. The others are run around it."""

    name: str
    title: str
    command: str
    servers: int = 1
    before: str = ""
    after: str = ""


TASKS = (
    Task("call", "sequential call, 16 B", "call 16 {s}"),
    Task("call-1k", "sequential call, 1 KiB", "call 1024 {s}"),
    Task("call-64k", "sequential call, 64 KiB", "call 65536 {s}"),
    Task("call-1m", "sequential call, 1 MiB", f"call {MIB} {{s}}"),
    Task("inflight", "100 calls in flight, 16 B", "inflight 16 {s} 100"),
    Task("cast", "one way, 16 B", "cast 16 {s}"),
    Task("cast-1k", "one way, 1 KiB", "cast 1024 {s}"),
    Task("fanout", f"fanout to {FANOUT_SERVERS} processes, 16 B", "fanout 16 {s}", servers=FANOUT_SERVERS),
    Task(
        "kept",
        f"{ENDPOINTS} endpoints in turn, connections kept",
        "kept 16 {s}",
        before=f"open 16 0 {ENDPOINTS}",
        after="shut 0 0",
    ),
    Task("new", f"{ENDPOINTS} endpoints in turn, a connection for each call", f"new 16 {{s}} {ENDPOINTS}"),
)
MANY = {"kept", "new"}


# -- processes -------------------------------------------------------------------------------------------


class Group:
    """One peer's servers and their client; with its broker, if there is one."""

    def __init__(self, servers: list[Process], client: Process, broker: Broker | None, ready: Any) -> None:
        self.servers = servers
        self.client = client
        self.broker = broker
        self.versions: dict[str, str] = ready.get("versions", ready)  # C says nothing else

    def measure(self, task: Task, seconds: float) -> dict[str, Any]:
        """Run one task; add what it cost to what the client says."""
        answer: dict[str, Any] = {}
        if task.before:
            answer |= {f"before_{key}": value for key, value in self.client.ask(task.before, 120).items()}
        sides = self._sides()
        began, busy = time.monotonic(), busy_seconds()
        used = {side: usage.cpu_seconds(pids) for side, pids in sides.items()}
        answer |= self.client.ask(task.command.format(s=seconds), 120 + 10 * seconds)
        used = {side: usage.cpu_seconds(pids) - used[side] for side, pids in sides.items()}
        if usage.known():
            self._add_usage(answer, sides, used)
            theirs = (busy_seconds() or 0.0) - (busy or 0.0) - sum(used.values())
            answer["others"] = max(theirs, 0.0) / (time.monotonic() - began)
        if task.after:
            self.client.ask(task.after, 120)
        return answer

    def _sides(self) -> dict[str, list[int]]:
        sides = {
            "client": usage.family(self.client.pid),
            "server": [pid for server in self.servers for pid in usage.family(server.pid)],
        }
        if self.broker is not None:
            sides["broker"] = usage.family(self.broker.pid)
        return sides if usage.known() else {}

    @staticmethod
    def _add_usage(answer: dict[str, Any], sides: dict[str, list[int]], used: dict[str, float]) -> None:
        answer["cpu_us"] = sum(used.values()) * 1e6 / answer["total"]
        for side, pids in sides.items():
            held = usage.usage(pids)
            answer[f"{side}_cpu_us"] = used[side] * 1e6 / answer["total"]
            answer[f"{side}_rss_mib"] = held.rss_mib
            answer[f"{side}_fds"] = held.fds

    def end(self) -> None:
        for process in [self.client, *self.servers]:
            process.end()


class NotStarted(PeerFailed):
    """A peer's processes do not even start."""


class Starter:
    """Starts the processes of every peer."""

    def __init__(self, brokers: dict[str, Broker], floor_command: list[str]) -> None:
        self.brokers = brokers
        self.floor_command = floor_command
        self.started = 0
        paths = [str(BENCH), os.environ.get("PYTHONPATH", "")]
        self.environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}

    def command(self, peer: Peer, form: str, role: str, endpoints: list[str]) -> list[str]:
        """Return the command line of a peer in one of its roles."""
        program, *more = peer.program
        if program == "c":
            return [*self.floor_command, role, *endpoints]
        start = [program, *more] if program == "-m" else [str(BENCH / program), *more]
        return [sys.executable, *start, role, *([form] if form else []), *endpoints]

    def start(self, peer: Peer, form: str, servers: int, everywhere: bool) -> Group:
        """Start a group; on a failure nothing of it is left. ``everywhere``: listen on all addresses."""
        self.started += 1
        broker = self.brokers.get(peer.broker)
        endpoint = f"tcp://{'0.0.0.0' if everywhere else '127.0.0.1'}:*"
        if broker is not None:
            endpoint = f"{broker.url}/bench{self.started}"
        processes: list[Process] = []
        try:
            for _ in range(servers):
                processes.append(Process(self.command(peer, form, "server", [endpoint]), self.environment))
            endpoints = [
                process.read()["endpoint"].replace("//0.0.0.0:", "//127.0.0.1:") for process in processes
            ]
            processes.append(Process(self.command(peer, form, "client", endpoints), self.environment))
            ready = processes[-1].read(60)
        except BaseException as failure:
            for process in processes:
                process.end()
            if isinstance(failure, PeerFailed):
                raise NotStarted(str(failure)) from failure
            raise
        return Group(processes[:-1], processes[-1], broker, ready)


# -- the run ---------------------------------------------------------------------------------------------


class Run:
    """All rounds, and what came of them; ``rounds`` are done."""

    def __init__(self, starter: Starter, peers: list[Peer], tasks: list[Task], seconds: float) -> None:
        self.starter = starter
        self.peers = peers
        self.tasks = tasks
        self.seconds = seconds
        self.samples: dict[tuple[str, str], list[dict[str, Any] | None]] = {}
        self.versions: dict[str, dict[str, str]] = {}
        self.rounds = 0
        self.failures: list[str] = []
        self.left_out: dict[str, str] = {}
        self.absent: set[str] = set()

    def steps(self) -> int:
        """Return how many measurements make a round."""
        return sum(task.name not in peer.without for peer in self.peers for task in self.tasks)

    def all(self, count: int, console: Console) -> None:
        """Run ``count`` rounds, and show how far they are."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            shown = progress.add_task("", total=self.steps() * count)
            for number in range(count):
                where = f"round {number + 1}/{count}"
                for text in self._round(number):
                    progress.update(shown, description=f"{where}, {text}", advance=1)
                self.rounds = number + 1

    def _round(self, number: int) -> Iterator[str]:
        """Run every task with every peer, in an order that changes from round to round; tell what comes next."""
        groups: dict[tuple[str, str], Group] = {}
        self.absent = set(self.left_out)
        try:
            for task in self.tasks:
                turn = number % len(self.peers)
                for peer in self.peers[turn:] + self.peers[:turn]:
                    if task.name not in peer.without and peer.name not in self.absent:
                        yield f"{task.title}: {peer.title}"
                        sample = self._measure(task, peer, groups)
                        self.samples.setdefault((task.name, peer.name), []).append(sample)
        finally:
            for group in groups.values():
                group.end()

    def _measure(self, task: Task, peer: Peer, groups: dict[tuple[str, str], Group]) -> dict[str, Any] | None:
        """Return one measurement, or None if the peer failed: the next task gets a fresh group."""
        form = peer.forms.get(task.name, peer.form)
        key = (peer.name, form)
        group = None
        try:
            if task.servers > 1:
                group = self.starter.start(peer, form, task.servers, everywhere=False)
                return group.measure(task, self.seconds)
            if key not in groups:
                everywhere = any(task.name in MANY for task in self.tasks)
                groups[key] = self.starter.start(peer, form, 1, everywhere)
                self.versions.setdefault(peer.name, groups[key].versions)
            return groups[key].measure(task, self.seconds)
        except PeerFailed as failure:
            why = str(failure).strip().rpartition("\n")[2]
            self.failures.append(f"{peer.name}, {task.name}: {why}")
            if isinstance(failure, NotStarted):
                self.absent.add(peer.name)  # not to wait for it again and again
                if peer.name not in self.versions:
                    self.left_out[peer.name] = f"it does not start: {why}"
            if task.servers == 1 and key in groups:
                groups.pop(key).end()
            return None
        finally:
            if group is not None:
                group.end()


def as_json(run: Run, known: dict[str, Any], left_out: dict[str, str]) -> dict[str, Any]:
    """Return everything, each round's answers included."""
    return {
        "environment": known,
        "settings": {
            "rounds": run.rounds,
            "seconds": run.seconds,
            "commands": {task.name: task.command for task in run.tasks},
        },
        "tasks": {task.name: task.title for task in run.tasks},
        "peers": {
            peer.name: {
                "title": peer.title,
                "settings": peer.settings,
                "broker": BROKERS.get(peer.broker, ""),
                "versions": run.versions.get(peer.name, {}),
                "without": dict(peer.without),
            }
            for peer in run.peers
        },
        "left_out": left_out | run.left_out,
        "samples": [
            {"task": task, "peer": peer, "rounds": samples} for (task, peer), samples in run.samples.items()
        ],
        "failures": run.failures,
    }


@contextlib.contextmanager
def started_brokers(
    peers: list[Peer], left_out: dict[str, str], console: Console
) -> Iterator[dict[str, Broker]]:
    """Start the servers that ``peers`` need; a peer whose server does not start is moved to ``left_out``."""
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="zmqcore-bench-")))
        brokers: dict[str, Broker] = {}
        for peer in list(peers):
            if not peer.broker:
                continue
            console.print(f"starting {BROKERS[peer.broker]} ...")
            try:
                brokers[peer.broker] = stack.enter_context(Broker(peer.broker, scratch))
            except NoBroker as failure:
                left_out[peer.name] = str(failure)
                peers.remove(peer)
        yield brokers


def choose(options: argparse.Namespace) -> tuple[list[Peer], list[Task], dict[str, str], list[str]]:
    """Return who takes part in what, who is left out and why, and the command of the C program."""
    peers = [peer for peer in PEERS if peer.name in options.peers]
    tasks = [task for task in TASKS if task.name in options.tasks]
    left_out = {peer.name: why for peer in peers if (why := peer.missing())}
    command: list[str] = []
    try:
        command = [str(floor.compiled()), str(floor.libzmq_path())]
    except floor.NoFloor as failure:
        left_out["c"] = str(failure)
    if not sys.platform.startswith("linux"):  # addresses() says why
        tasks = [task for task in tasks if task.name not in MANY]
    return [peer for peer in peers if peer.name not in left_out], tasks, left_out, command


def measure(options: argparse.Namespace, console: Console) -> tuple[Figures, bool]:
    """Run the rounds that ``options`` ask for; return the figures, and whether all went well. Ctrl-C ends it early."""
    peers, tasks, left_out, floor_command = choose(options)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard >= DESCRIPTORS:
        resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, hard))
    known = machine.environment(floor_command[-1] if floor_command else "")
    with started_brokers(peers, left_out, console) as brokers:
        known["brokers"] = {BROKERS[kind]: broker.version() for kind, broker in brokers.items()}
        run = Run(Starter(brokers, floor_command), peers, tasks, options.seconds)
        try:
            run.all(options.rounds, console)
        except KeyboardInterrupt:
            console.print(
                f"interrupted after {run.rounds} of {options.rounds} rounds; what was measured counts"
            )
    well = run.rounds == options.rounds and not run.failures
    return Figures(as_json(run, known, left_out)), well


# -- the command -----------------------------------------------------------------------------------------


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; each list is checked against what there is."""
    all_peers, all_tasks = [peer.name for peer in PEERS], [task.name for task in TASKS]
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], epilog="Commas separate the words of a list."
    )
    parser.add_argument("--rounds", type=int, help="default 5")
    parser.add_argument("--seconds", type=float, help="duration of one measurement (default 0.3)")
    parser.add_argument("--peers", type=some_of(all_peers), default=all_peers, help=", ".join(all_peers))
    parser.add_argument("--tasks", type=some_of(all_tasks), default=all_tasks, help=", ".join(all_tasks))
    parser.add_argument("--quick", action="store_true", help="2 rounds of 0.1 s, unless told otherwise")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        default=DEFAULT_JSON,
        help=f"write every answer there (default {DEFAULT_JSON.name} in build/)",
    )
    parser.add_argument(
        "--from", type=Path, dest="source", metavar="FILE", help="measure nothing; the tables of FILE"
    )
    parser.add_argument(
        "--write", action="store_true", help="put tables and plots into README.md, docs/ and docs/images/"
    )
    parser.add_argument(
        "--into",
        type=Path,
        default=BENCH.parent,
        metavar="DIRECTORY",
        help="the checkout that --write changes",
    )
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (2 if options.quick else 5)
    options.seconds = options.seconds or (0.1 if options.quick else 0.3)
    return options


def main() -> int:
    """Measure, or read figures; 0 if nothing failed, 1 if a peer did or it was interrupted."""
    options = parse()
    console = Console()
    if options.source:
        figures, well = Figures(json.loads(options.source.read_text())), True
    else:
        try:
            figures, well = measure(options, console)
        except KeyboardInterrupt:
            console.print("interrupted before the first round")
            return 1
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures.raw, indent=1) + "\n")
    print_tables(figures, console)
    if options.write:
        for path in write_documents(figures, options.into):
            console.print(f"written: {path}")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
