"""The demo itself: start the processes, send the files through them, kill a worker, and check every result.

Nothing here prints; who watches is told through an :class:`Observer`.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import secrets
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, Self

from zmqcore import Client, Node, errors
from zmqcore.cli.demo_analysis import Analysis
from zmqcore.cli.demo_processes import ANALYSIS, PROGRESS, command
from zmqcore.cli.measure import open_fds, percentile

__all__ = ["DemoFailed", "Interrupted", "Interrupts", "Observer", "Report", "compare", "run_demo"]

# A call that is lost is asked again of another worker; after so many times something else is wrong.
_MAX_ATTEMPTS = 10
# An analysis takes milliseconds. Long enough for a machine that is busy with other things.
_CALL_TIMEOUT = 30.0
_START_TIMEOUT = 60.0
# How long processes may take to end by themselves before they are killed.
_END_TIMEOUT = 10.0
# The path of a Unix socket has room for 107 bytes, and names of sockets follow the directory.
_MAX_BASE_BYTES = 40

# What a member that has gone, or has not come yet, makes of a call. Analysis is idempotent, so it may be
# repeated.
_RETRIED = (
    errors.PeerLost,
    errors.Unreachable,
    errors.Overloaded,
    errors.NoSuchTopic,
    errors.DeadlineExceeded,
)


class DemoFailed(Exception):
    """The demo could not be run to its end; the text says why."""


class Interrupted(BaseException):
    """SIGINT, SIGTERM or SIGHUP came. ``number`` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Interrupts:
    """Turns SIGINT, SIGTERM and SIGHUP into one :class:`Interrupted`, raised only where that is allowed.

    Context manager, for the main thread only. Outside :meth:`allowed` a signal is remembered, so that what
    creates or removes processes and files is never cut in two; the next :meth:`allowed` or :meth:`check`
    raises it. Everything outside is bounded in time. Signals after the first change nothing.
    """

    def __init__(self) -> None:
        self._allowed = False
        self._number: int | None = None
        self._raised = False
        self._before: dict[int, Any] = {}

    def _received(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._number is None:
            self._number = number
        if self._allowed:
            self.check()

    def check(self) -> None:
        """Raise Interrupted if a signal has come and that has not been raised yet."""
        if self._number is not None and not self._raised:
            self._raised = True
            raise Interrupted(self._number)

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        """Let signals interrupt the block. Sections do not nest."""
        self._allowed = True
        try:
            self.check()
            yield
        finally:
            self._allowed = False

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._before[number] = signal.signal(number, self._received)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Observer(Protocol):
    """Who watches a run. All methods are called on the main thread."""

    def phase(self, title: str, total: int | None) -> None:
        """Say that a phase begins; *total* is its number of steps, None if there is nothing to count."""

    def progress(self, done: int, detail: str) -> None:
        """Say how many steps of the phase are done."""

    def event(self, text: str) -> None:
        """Say that something worth a line has happened."""


@dataclass(slots=True)
class Report:
    """What came of a run. ``problems`` is empty exactly if everything was as it should be."""

    problems: list[str] = field(default_factory=list)
    files: int = 0
    bytes: int = 0
    tokens: int = 0
    lines: int = 0
    not_python: int = 0
    calls: int = 0
    retries: int = 0
    retried_for: dict[str, int] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    checked: int = 0
    seconds: float = 0.0
    files_per_second: float = 0.0
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    events: int = 0
    events_expected: int = 0
    killed: dict[str, Any] | None = None
    epoch: int = 0
    workers: list[dict[str, Any]] = field(default_factory=list)
    fds_before: int | None = None
    fds_peak: int | None = None
    node: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether nothing was missing, wrong or otherwise unexpected."""
        return not self.problems


def compare(
    results: dict[int, Analysis], reference: dict[int, Analysis], total: int
) -> tuple[list[int], list[int], list[int]]:
    """Compare what came by RPC with what was computed without; return the missing, the wrong and the
    unchecked.

    Each is a sorted list of indices below *total*; an index is in one of them at most.
    """
    missing = [index for index in range(total) if index not in results]
    unchecked = [index for index in range(total) if index in results and index not in reference]
    wrong = [
        index
        for index in range(total)
        if index in results and index in reference and results[index] != reference[index]
    ]
    return missing, wrong, unchecked


class _Processes:
    """The children, each with its standard input as its lifeline and its standard error in a file."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._running: dict[str, subprocess.Popen[str]] = {}
        self._killed: set[str] = set()

    def start(self, name: str, role: str, *words: str, output: bool = False) -> subprocess.Popen[str]:
        environment = os.environ | {"ZMQCORE_RUNTIME_DIR": str(self._directory)}
        with self._stderr(name).open("wb") as stderr:
            process = subprocess.Popen(
                command(role, *words),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if output else subprocess.DEVNULL,
                stderr=stderr,
                env=environment,
                text=True,
                encoding="utf-8",
                # The terminal's Ctrl-C is for the demo alone, which then ends them.
                start_new_session=True,
            )
            self._running[name] = process
        return process

    def _stderr(self, name: str) -> Path:
        return self._directory / f"{name}.stderr"

    def complaint(self, name: str) -> str:
        """Return the last line that the process of this name has written to its standard error."""
        with contextlib.suppress(OSError):
            lines = self._stderr(name).read_text("utf-8", "replace").strip().splitlines()
            if lines:
                return lines[-1]
        return "it said nothing"

    def expect_running(self) -> None:
        """Raise DemoFailed if a process has ended that was not killed by us."""
        for name, process in self._running.items():
            if process.poll() is not None and name not in self._killed:
                raise DemoFailed(f"{name} ended with code {process.returncode}: {self.complaint(name)}")

    def kill(self, name: str) -> int:
        """SIGKILL the process of this name and return its pid."""
        process = self._running[name]
        self._killed.add(name)
        process.kill()
        process.wait()
        return process.pid

    def end(self, names: list[str] | None = None) -> list[str]:
        """End processes (all if None) by closing their lifelines; return complaints about bad ends."""
        ending = {name: self._running[name] for name in (names if names is not None else list(self._running))}
        for process in ending.values():
            if process.stdin is not None:
                with contextlib.suppress(OSError):
                    process.stdin.close()
        complaints = []
        deadline = time.monotonic() + _END_TIMEOUT
        for name, process in ending.items():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                complaints.append(f"{name} did not end within {_END_TIMEOUT:g} s and was killed")
                process.kill()
                process.wait()
            else:
                if process.returncode != 0 and name not in self._killed:
                    complaints.append(f"{name} ended with code {process.returncode}: {self.complaint(name)}")
            self._forget(name)
        return complaints

    def _forget(self, name: str) -> None:
        process = self._running.pop(name)
        if process.stdout is not None:
            process.stdout.close()

    def close(self) -> None:
        """Kill and reap whatever still runs."""
        for process in self._running.values():
            process.kill()
        for name, process in list(self._running.items()):
            if process.stdin is not None:
                with contextlib.suppress(OSError):
                    process.stdin.close()
            process.wait()
            self._forget(name)


def _private_directory() -> Path:
    """Make a directory that nobody else can read, under a path that leaves room for the names of sockets."""
    base = tempfile.gettempdir()
    if len(os.fsencode(base)) > _MAX_BASE_BYTES:
        base = "/tmp"
    return Path(tempfile.mkdtemp(prefix="zmqcore-demo-", dir=base))


@dataclass(frozen=True, slots=True)
class _Done:
    """One file's result, or why there is none."""

    index: int
    size: int
    seconds: float
    answer: dict[str, Any] | None
    failure: str = ""


class _Callers:
    """Threads that share one client and call until no file is left.

    *abandon* makes the calls that run fail at once.
    """

    def __init__(
        self, client: Client, files: list[Path], threads: int, abandon: Callable[[], object]
    ) -> None:
        self._client = client
        self._abandon = abandon
        self._files = files
        self._left = deque(range(len(files)))
        self._stop = threading.Event()
        self.done: queue.SimpleQueue[_Done] = queue.SimpleQueue()
        # One entry per call that was repeated, the name of its error. Appending is atomic.
        self.retried: deque[str] = deque()
        self._threads = [threading.Thread(target=self._work, name=f"caller-{n}") for n in range(threads)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Begin no further call, abandon those that run, and wait for the threads."""
        self._stop.set()
        if any(thread.is_alive() for thread in self._threads):
            self._abandon()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def _work(self) -> None:
        while not self._stop.is_set():
            try:
                index = self._left.popleft()
            except IndexError:
                return
            try:
                self.done.put(self._analyse(index))
            except Exception as exc:  # noqa: BLE001 - or the demo would wait for it for ever
                self.done.put(_Done(index, 0, 0.0, None, f"{type(exc).__name__}: {exc}"))

    def _analyse(self, index: int) -> _Done:
        source = self._files[index].read_bytes()
        failure = ""
        for attempt in range(_MAX_ATTEMPTS):
            # No pause before the second attempt: there are other workers to ask.
            if self._stop.wait(0.05 * attempt if attempt > 1 else 0):
                break
            started = time.perf_counter()
            try:
                answer = self._client.call("analyse", index, source)
            except _RETRIED as exc:
                failure = f"{type(exc).__name__}: {exc}"
                self.retried.append(type(exc).__name__)
                continue
            return _Done(index, len(source), time.perf_counter() - started, answer)
        return _Done(index, len(source), 0.0, None, f"given up after {_MAX_ATTEMPTS} attempts: {failure}")


class _Run:
    """One run, phase by phase; :func:`run_demo` is the way in."""

    def __init__(
        self,
        files: list[Path],
        workers: int,
        in_flight: int,
        observer: Observer,
        interrupts: Interrupts,
    ) -> None:
        self._files = files
        self._names = [f"worker-{number}" for number in range(1, workers + 1)]
        self._in_flight = in_flight
        self._observer = observer
        self._interrupts = interrupts
        self._run_id = secrets.token_hex(8)
        self._key = secrets.token_bytes(16)
        self._results: dict[int, Analysis] = {}
        self._served_by: dict[int, str] = {}
        self.report = Report(files=len(files), fds_before=open_fds())

    def run(self) -> Report:
        # Signals interrupt the blocks in allowed() only; what is entered here is always left in order.
        with contextlib.ExitStack() as stack:
            directory = _private_directory()
            stack.callback(shutil.rmtree, directory, ignore_errors=True)
            processes = stack.enter_context(contextlib.closing(_Processes(directory)))
            self._talk(f"local://{directory}", processes)
            self._observer.phase("ending the workers", None)
            self.report.problems += processes.end()
            self._check(processes)
        self._interrupts.check()
        return self.report

    def _talk(self, url: str, processes: _Processes) -> None:
        """Do everything that needs RPC, with the workers and the collector running."""
        for name in self._names:
            processes.start(name, "worker", name, url)
        processes.start("collector", "collector", url)
        with (
            Node(matchmaker=url) as node,
            Client(ANALYSIS, node=node, timeout=_CALL_TIMEOUT) as analysis,
            Client(PROGRESS, node=node, timeout=_CALL_TIMEOUT) as progress,
            contextlib.closing(_Callers(analysis, self._files, self._in_flight, node.close)) as callers,
            self._interrupts.allowed(),
        ):
            self._wait_for_members(analysis, progress, processes)
            self._configure(analysis)
            self._analyse(callers, processes)
            self._gather(analysis)
            self._ask_collector(progress)
            self.report.node = node.stats()
            self._sample_fds()

    def _wait_for_members(self, analysis: Client, progress: Client, processes: _Processes) -> None:
        self._observer.phase(f"starting {len(self._names)} workers and a collector", len(self._names) + 1)
        deadline = time.monotonic() + _START_TIMEOUT
        while True:
            there = len(analysis.members()) + len(progress.members())
            self._observer.progress(there, "")
            if there == len(self._names) + 1:
                return
            processes.expect_running()
            if time.monotonic() > deadline:
                raise DemoFailed(
                    f"only {there} of {len(self._names) + 1} processes were there after {_START_TIMEOUT:g} s"
                )
            time.sleep(0.02)

    def _configure(self, analysis: Client) -> None:
        """Fan the configuration out, and ask until every worker has it: a fanout itself is one way."""
        sent = analysis.fanout("configure", self._run_id, self._key)
        self.report.epoch = sent.epoch
        reached = sorted(member.topic.server or "" for member in sent.sent)
        if reached != sorted(self._names):
            failed = ", ".join(f"{member.topic.server}: {error}" for member, error in sent.failed.items())
            raise DemoFailed(
                f"the configuration was sent to {reached} only ({failed or 'the others are unknown'})"
            )
        deadline = time.monotonic() + _START_TIMEOUT
        while True:
            answers = analysis.gather("configured")
            if list(answers.results.values()) == [self._run_id] * len(self._names):
                break
            if time.monotonic() > deadline:
                raise DemoFailed(
                    f"of {len(self._names)} workers {len(answers.results)} say that they are configured; "
                    f"errors: {[str(error) for error in answers.errors.values()]}"
                )
            time.sleep(0.02)
        self._observer.event(f"configuration sent to {len(reached)} workers, membership epoch {sent.epoch}")

    def _analyse(self, callers: _Callers, processes: _Processes) -> None:
        """Send every file, kill a worker when half of them are done, and keep the results."""
        report, total = self.report, len(self._files)
        self._observer.phase("analysing", total)
        seconds: list[float] = []
        started = time.perf_counter()
        callers.start()
        done = 0
        while done < total:
            if done >= total // 2 and report.killed is None and len(self._names) > 1:
                self._kill_one(processes, done)
            try:
                one = callers.done.get(timeout=0.1)
            except queue.Empty:
                processes.expect_running()
                self._sample_fds()
                continue
            done += 1
            self._take(one)
            if one.answer is not None:
                seconds.append(one.seconds)
            if done % 50 == 0:
                self._sample_fds()
            self._observer.progress(done, f"{len(callers.retried)} retried")
        report.seconds = time.perf_counter() - started
        report.files_per_second = total / report.seconds
        report.retries = len(callers.retried)
        report.retried_for = dict(Counter(callers.retried))
        report.calls = len(seconds) + report.retries
        seconds.sort()
        report.p50_ms = percentile(seconds, 0.50) * 1000
        report.p99_ms = percentile(seconds, 0.99) * 1000

    def _kill_one(self, processes: _Processes, done: int) -> None:
        name = self._names[-1]
        pid = processes.kill(name)
        self.report.killed = {"server": name, "pid": pid, "after_files": done}
        self._observer.event(f"{name} (process {pid}) killed after {done} files")

    def _take(self, one: _Done) -> None:
        path = str(self._files[one.index])
        if one.answer is None:
            self.report.problems.append(f"{path}: {one.failure}")
            return
        try:
            result = Analysis.from_message(one.answer)
            server = str(one.answer["server"])
        except (KeyError, TypeError) as exc:
            self.report.problems.append(
                f"{path}: the answer is not an analysis ({type(exc).__name__}: {exc})"
            )
            return
        self._results[one.index] = result
        self._served_by[one.index] = server
        self.report.bytes += one.size
        self.report.tokens += result.tokens
        self.report.lines += result.lines
        self.report.not_python += result.error is not None

    def _survivors(self) -> list[str]:
        return [
            name for name in self._names if self.report.killed is None or name != self.report.killed["server"]
        ]

    def _gather(self, analysis: Client) -> None:
        """Ask every worker that is left what it has done."""
        self._observer.phase("gathering statistics", None)
        gathered = analysis.gather("statistics")
        answered = {member.topic.server: answer for member, answer in gathered.results.items()}
        for name in self._survivors():
            if name not in answered:
                errors_text = ", ".join(
                    f"{member.topic.server}: {type(error).__name__}: {error}"
                    for member, error in [*gathered.errors.items(), *gathered.missing.items()]
                )
                self.report.problems.append(
                    f"{name} gave no statistics ({errors_text or 'it is not a member'})"
                )
        results = Counter(self._served_by.values())
        for name in self._names:
            statistics = answered.get(name) or {"server": name, "killed": True}
            self.report.workers.append({**statistics, "results": results[name]})
            if "files" in statistics and statistics["files"] < results[name]:
                self.report.problems.append(
                    f"{name} says {statistics['files']} files but has sent {results[name]}"
                )
            if statistics.get("casts_failed"):
                self.report.problems.append(
                    f"{name} could not cast {statistics['casts_failed']} progress events"
                )

    def _ask_collector(self, progress: Client) -> None:
        """Compare the events counted with those cast; some may be under way, so ask until they agree."""
        survivors = set(self._survivors())
        expected = {
            worker["server"]: worker["casts"]
            for worker in self.report.workers
            if worker["server"] in survivors and "casts" in worker
        }
        surviving_files = {index for index, server in self._served_by.items() if server in survivors}
        deadline = time.monotonic() + _END_TIMEOUT
        while True:
            counted = progress.call("counted")
            events: dict[str, int] = counted["events"]
            arrived = {name: events.get(name, 0) for name in expected}
            unseen = surviving_files - set(counted["files"])
            if (arrived == expected and not unseen) or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        self.report.events = sum(events.values())
        # What the killed worker had cast and not yet sent is lost with it: a cast is at most once.
        self.report.events_expected = sum(expected.values())
        for name, number in expected.items():
            if arrived[name] != number:
                self.report.problems.append(
                    f"{name} cast {number} progress events, {arrived[name]} were counted"
                )
        if unseen:
            self.report.problems.append(
                f"no progress event was counted for {len(unseen)} files of running workers"
            )
        for worker in self.report.workers:
            worker["events"] = events.get(worker["server"], 0)

    def _check(self, processes: _Processes) -> None:
        """Compute everything again without RPC and compare."""
        report, total = self.report, len(self._files)
        self._observer.phase("checking without RPC", total)
        reference: dict[int, Analysis] = {}
        arrived: queue.SimpleQueue[tuple[int, Analysis] | None] = queue.SimpleQueue()
        checkers = min(os.cpu_count() or 1, 4, total)
        names = [f"checker-{number}" for number in range(checkers)]
        readers = []
        for number, name in enumerate(names):
            process = processes.start(name, "checker", self._key.hex(), output=True)
            share = [[index, str(self._files[index])] for index in range(number, total, checkers)]
            reader = threading.Thread(
                target=_read_checker, args=(process, share, arrived), name=name, daemon=True
            )
            reader.start()
            readers.append(reader)
        ended = 0
        with self._interrupts.allowed():
            while ended < checkers:
                one = arrived.get()
                if one is None:
                    ended += 1
                else:
                    reference[one[0]] = one[1]
                    self._observer.progress(len(reference), "")
        for reader in readers:
            reader.join()
        report.problems += processes.end(names)
        missing, wrong, unchecked = compare(self._results, reference, total)
        report.checked = total - len(missing) - len(unchecked)
        report.missing = [str(self._files[index]) for index in missing]
        report.wrong = [str(self._files[index]) for index in wrong]
        if missing:
            report.problems.append(f"{len(missing)} results are missing, the first is {report.missing[0]}")
        if wrong:
            report.problems.append(f"{len(wrong)} results are wrong, the first is {report.wrong[0]}")
        if unchecked:
            report.problems.append(f"{len(unchecked)} results could not be checked")

    def _sample_fds(self) -> None:
        now = open_fds()
        if now is not None:
            self.report.fds_peak = max(now, self.report.fds_peak or 0)


def _read_checker(
    process: subprocess.Popen[str],
    share: list[list[Any]],
    arrived: queue.SimpleQueue[tuple[int, Analysis] | None],
) -> None:
    """Give a checker its share and pass on what it finds; None says that it has ended, however it did."""
    try:
        if process.stdin is None or process.stdout is None:
            return
        with contextlib.suppress(OSError, ValueError):
            json.dump(share, process.stdin)
            process.stdin.close()
            for line in process.stdout:
                index, message = json.loads(line)
                arrived.put((index, Analysis.from_message(message)))
    finally:
        arrived.put(None)


def run_demo(
    files: list[Path], *, workers: int, in_flight: int, observer: Observer, interrupts: Interrupts
) -> Report:
    """Analyse *files* through *workers* processes with *in_flight* calls at a time, and check every result.

    The processes, and a directory with the matchmaker's file and the sockets, exist only during the call.

    Raises:
        DemoFailed: it could not be run to its end.
        Interrupted: a signal came; everything has been cleaned up.
        ZmqcoreError: a step other than an analysis failed.
    """
    return _Run(files, workers, in_flight, observer, interrupts).run()
